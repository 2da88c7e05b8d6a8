//! The nodes that are asked what they hold: this one by a call, the others over their admin interface.

use std::time::Duration;

use ashlar_core::diagnosis::doctor::{Holdings, LeafDigest, digest};
use ashlar_core::diagnosis::{HeadFact, NodeReport};
use ashlar_core::store::{ExtentKey, LeafSums};
use ashlar_core::units::{ChunkIndex, LayerId, NodeId, StoreId, Version, VolumeId};
use ashlar_proto::diagnosis as proto;
use ashlar_proto::diagnosis::diagnosis_client::DiagnosisClient;
use tonic::transport::Channel;

use super::{gather, wire};
use crate::daemon::{ClusterServices, Services};
use crate::data::SURVEY_LEAVES_MAX;

/// How long one question may take; none asks for more than a few MiB of a disk.
const PATIENCE: Duration = Duration::from_secs(10);

/// A page of digests, and the last chunk it is of when there is more behind it.
#[derive(Clone, Debug, Default)]
pub(crate) struct DigestPage {
    pub(crate) leaves: Vec<(ChunkIndex, u32, LeafDigest)>,
    pub(crate) more_after: Option<ChunkIndex>,
}

/// One node.
#[derive(Clone)]
pub(super) enum Peer {
    Here(Services),
    There(DiagnosisClient<Channel>),
}

/// What this daemon's stores hold.
pub(crate) async fn holdings(services: &Services) -> Result<Holdings, String> {
    services.plane.holdings().await.map_err(|e| e.to_string())
}

/// Digests of the leaves of some chunks of a layer in a store of this daemon.
pub(crate) async fn digests(
    services: &Services,
    store: StoreId,
    layer: LayerId,
    from: ChunkIndex,
) -> Result<DigestPage, String> {
    let rows = services.plane.survey_rows(store, layer, from).await;
    let (rows, more) = rows.map_err(|error| error.to_string())?;
    let mut page = DigestPage {
        more_after: rows.last().map(|(chunk, _)| *chunk).filter(|_| more),
        leaves: Vec::new(),
    };
    for (chunk, versions) in rows {
        let written: Vec<u32> = (0..)
            .zip(versions)
            .filter(|(_, version)| *version != Version::NONE)
            .map(|(leaf, _)| leaf)
            .collect();
        for leaves in written.chunks(SURVEY_LEAVES_MAX) {
            let sums = sums(services, store, ExtentKey { layer, chunk }, leaves.to_vec()).await?;
            let digests = leaves.iter().zip(&sums);
            page.leaves
                .extend(digests.map(|(leaf, sums)| (chunk, *leaf, digest(sums))));
        }
    }
    Ok(page)
}

/// What a store's index says of the blocks of leaves.
pub(crate) async fn sums(
    services: &Services,
    store: StoreId,
    extent: ExtentKey,
    leaves: Vec<u32>,
) -> Result<Vec<LeafSums>, String> {
    let sums = services.plane.survey_sums(store, extent, leaves).await;
    sums.map_err(|error| error.to_string())
}

impl Peer {
    /// Another node of the cluster.
    pub(super) async fn there(
        cluster: &ClusterServices,
        node: NodeId,
        address: &str,
    ) -> Result<Peer, String> {
        let connecting = cluster.identity.channel(node, address, PATIENCE);
        let channel = tokio::time::timeout(PATIENCE, connecting).await;
        let channel = channel.unwrap_or_else(|_| Err(too_slow()))?;
        Ok(Peer::There(DiagnosisClient::new(channel)))
    }

    pub(super) async fn holdings(&self) -> Result<Holdings, String> {
        match self {
            Peer::Here(services) => holdings(services).await,
            Peer::There(client) => {
                let mut client = client.clone();
                let asked = client.holdings(proto::HoldingsRequest {});
                wire::holdings(answer(asked).await?)
            }
        }
    }

    pub(super) async fn digests(
        &self,
        store: StoreId,
        layer: LayerId,
        from: ChunkIndex,
    ) -> Result<DigestPage, String> {
        match self {
            Peer::Here(services) => digests(services, store, layer, from).await,
            Peer::There(client) => {
                let mut client = client.clone();
                let asked = client.digests(proto::DigestsRequest {
                    store_id: store.0.to_string(),
                    layer: layer.0,
                    from_chunk: from.0,
                });
                Ok(wire::digest_page(answer(asked).await?))
            }
        }
    }

    pub(super) async fn leaf(
        &self,
        store: StoreId,
        extent: ExtentKey,
        leaf: u32,
    ) -> Result<LeafSums, String> {
        match self {
            Peer::Here(services) => {
                let mut all = sums(services, store, extent, vec![leaf]).await?;
                all.pop().ok_or_else(|| "no leaf was told".to_owned())
            }
            Peer::There(client) => {
                let mut client = client.clone();
                let asked = client.leaf_sums(proto::LeafSumsRequest {
                    store_id: store.0.to_string(),
                    layer: extent.layer.0,
                    chunk: extent.chunk.0,
                    leaf,
                });
                wire::leaf_sums(&answer(asked).await?)
            }
        }
    }

    pub(super) async fn drop_orphan(&self, store: StoreId, layer: LayerId) -> Result<(), String> {
        match self {
            Peer::Here(services) => drop_orphan(services, store, layer).await,
            Peer::There(client) => {
                let mut client = client.clone();
                let asked = client.drop_orphan(proto::DropOrphanRequest {
                    store_id: store.0.to_string(),
                    layer: layer.0,
                });
                answer(asked).await.map(drop)
            }
        }
    }

    pub(super) async fn distrust(&self, volume: VolumeId, store: StoreId) -> Result<(), String> {
        match self {
            Peer::Here(services) => distrust(services, volume, store).await,
            Peer::There(client) => {
                let mut client = client.clone();
                let asked = client.distrust_copy(proto::DistrustCopyRequest {
                    volume_id: volume.0.to_string(),
                    store_id: store.0.to_string(),
                });
                answer(asked).await.map(drop)
            }
        }
    }

    /// The head of a volume there.
    pub(super) async fn head(&self, volume: VolumeId) -> Result<Option<HeadFact>, String> {
        let report: NodeReport = match self {
            Peer::Here(services) => gather::report(services, volume).await,
            Peer::There(client) => {
                let mut client = client.clone();
                let volume_id = volume.0.to_string();
                let asked = client.report(proto::ReportRequest { volume_id });
                wire::report(answer(asked).await?)?
            }
        };
        Ok(report.volume.head)
    }
}

/// Drops a layer that no record names from a store of this daemon. The records are read anew: what was an orphan when
/// somebody looked must be one now, and numbers of layers are never given out twice.
pub(crate) async fn drop_orphan(
    services: &Services,
    store: StoreId,
    layer: LayerId,
) -> Result<(), String> {
    let records = services.volumes.read_records().await;
    let records = records.map_err(|error| error.to_string())?;
    if let Some(owner) = records.iter().find(|r| r.layers.contains(&layer)) {
        return Err(format!("layer {} is of volume {}", layer.0, owner.name));
    }
    let dropped = services.plane.drop_layer_at(store, layer).await;
    dropped.map_err(|error| error.to_string())?;
    services.volumes.forget_unknown_layer(layer).await;
    Ok(())
}

/// Puts a copy of a volume whose head is here out of sync, to be compared and filled as a whole.
pub(crate) async fn distrust(
    services: &Services,
    volume: VolumeId,
    store: StoreId,
) -> Result<(), String> {
    match services.plane.distrust(volume, store).await {
        Ok(true) => {
            services.volumes.distrusted(volume, store);
            Ok(())
        }
        Ok(false) => Err(
            "its head cannot spare that copy: it is not in sync, or the only one of some chunks"
                .to_owned(),
        ),
        Err(error) => Err(error.to_string()),
    }
}

fn too_slow() -> String {
    format!("no answer within {} s", PATIENCE.as_secs())
}

async fn answer<T>(
    asked: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, String> {
    match tokio::time::timeout(PATIENCE, asked).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(status.message().to_owned()),
        Err(_) => Err(too_slow()),
    }
}
