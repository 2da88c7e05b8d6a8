//! Asking everybody who knows something of a volume.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ashlar_core::diagnosis::{
    Explanation, Facts, HeadFact, NodeFact, NodeReport, Standing, StoreFact, StoreTrouble,
    VolumeFact,
};
use ashlar_core::records::{MemberState, SpaceRecord, VolumeRecord, VolumeState, keys};
use ashlar_core::units::{NodeId, VolumeId};
use ashlar_proto::diagnosis as proto;
use ashlar_proto::diagnosis::diagnosis_client::DiagnosisClient;
use thiserror::Error;
use tokio::task::JoinSet;

use super::wire;
use crate::admin::poison_reason;
use crate::daemon::{ClusterServices, Services, State};
use crate::meta::{self, MetadataError, MetadataStore};
use crate::volumes::{Serving, VolumeError, unix_ms};

/// How long one node, or the metadata store, is waited for: a person waits for the answer.
const PATIENCE: Duration = Duration::from_secs(3);

/// Why nothing can be told.
#[derive(Debug, Error)]
pub(crate) enum DiagnosisError {
    /// The volume.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// This daemon does not know yet who it is.
    #[error("the daemon is starting")]
    Starting,
}

/// Gathers the facts and has them explained.
pub(crate) async fn explain(
    state: &State,
    services: &Services,
    reference: &str,
) -> Result<(Facts, Explanation), DiagnosisError> {
    let facts = facts(state, services, reference).await?;
    let explanation = ashlar_core::diagnosis::explain(&facts);
    Ok((facts, explanation))
}

/// What this daemon knows of a volume and of its own stores.
pub(crate) async fn report(services: &Services, id: VolumeId) -> NodeReport {
    let views = services.plane.store_views().await;
    let stores = views.iter().map(|view| {
        let trouble = match poison_reason(view) {
            Some(reason) => Some(StoreTrouble::Poisoned { reason }),
            None => (view.status.used_blocks >= view.status.capacity_blocks)
                .then_some(StoreTrouble::Full),
        };
        StoreFact {
            id: view.id,
            path: view.path.display().to_string(),
            trouble,
        }
    });
    let mut report = NodeReport {
        stores: stores.collect(),
        volume: VolumeFact::default(),
    };
    let Ok(view) = services.volumes.get(&id.0.to_string()) else {
        report.volume.unserved_reason = "the node does not know it".to_owned();
        return report;
    };
    let head = services.volumes.replication(id).await;
    report.volume = VolumeFact {
        is_served: view.serving == Serving::Yes,
        unserved_reason: view.serving.reason().unwrap_or_default(),
        head: head.map(|status| HeadFact::of(&status.head)),
        connections: view.runtime.map_or(0, |runtime| runtime.connections),
        requests: view.runtime.map_or(0, |runtime| runtime.inflight_requests),
    };
    report
}

async fn facts(
    state: &State,
    services: &Services,
    reference: &str,
) -> Result<Facts, DiagnosisError> {
    let own = state.node().ok_or(DiagnosisError::Starting)?;
    let known = services.volumes.find(reference).await?.record;
    let read = tokio::time::timeout(PATIENCE, services.volumes.read_record(known.id)).await;
    let (record, metadata_error) = match read {
        Ok(Ok(read)) => (read.record, None),
        // It went between the look and the reading.
        Ok(Err(error @ VolumeError::NotFound { .. })) => return Err(error.into()),
        Ok(Err(error)) => (known, Some(error.to_string())),
        Err(_) => (known, Some(too_slow())),
    };
    let dropped = match record.state {
        VolumeState::Deleting if metadata_error.is_none() => services
            .volumes
            .dropped(record.id)
            .await
            .unwrap_or_default(),
        _ => Vec::new(),
    };
    let cluster = state.cluster();
    let needed = nodes_of(&record, own);
    let mut nodes = Vec::new();
    let mut asked = JoinSet::new();
    for node in needed {
        let member = cluster.as_ref().and_then(|cluster| {
            let members = cluster.identity.trust().members();
            members.into_iter().find(|member| member.id == node)
        });
        let standing = match (&cluster, &member) {
            (None, _) => Standing::Alone,
            (Some(_), None) => Standing::Unknown,
            (Some(_), Some(member)) => match member.state {
                MemberState::Active => Standing::Member,
                MemberState::Removed => Standing::Removed,
            },
        };
        let address = member.and_then(|member| member.address);
        nodes.push(NodeFact {
            id: node,
            address: address.clone(),
            standing,
            told_at_unix_ms: None,
            report: Err("it was removed from the cluster".to_owned()),
        });
        let (id, cluster) = (record.id, cluster.clone());
        if node == own {
            let services = services.clone();
            asked.spawn(async move { (node, Ok(report(&services, id).await)) });
        } else if standing == Standing::Member
            && let Some(cluster) = cluster
        {
            asked.spawn(async move { (node, ask(&cluster, node, address, id).await) });
        }
    }
    let told = match &cluster {
        Some(cluster) if metadata_error.is_none() => told(&*cluster.records).await,
        _ => BTreeMap::new(),
    };
    while let Some(answer) = asked.join_next().await {
        let Ok((node, report)) = answer else { continue };
        if let Some(fact) = nodes.iter_mut().find(|fact| fact.id == node) {
            fact.report = report;
        }
    }
    for fact in &mut nodes {
        fact.told_at_unix_ms = told.get(&fact.id).copied();
    }
    Ok(Facts {
        now_unix_ms: unix_ms(),
        record,
        metadata_error,
        nodes,
        dropped,
    })
}

/// The nodes that a volume needs: who has copies, and who serves it.
fn nodes_of(record: &VolumeRecord, own: NodeId) -> BTreeSet<NodeId> {
    if !record.placement.is_replicated() {
        return BTreeSet::from([own]);
    }
    let sets = record.placement.sets.iter();
    let replicas = sets.flat_map(|set| &set.replicas);
    let head = record.head.map(|head| head.node);
    replicas.map(|replica| replica.node).chain(head).collect()
}

fn too_slow() -> String {
    format!("no answer within {} s", PATIENCE.as_secs())
}

async fn ask(
    cluster: &ClusterServices,
    node: NodeId,
    address: Option<String>,
    volume: VolumeId,
) -> Result<NodeReport, String> {
    let address = address.ok_or("it has told no address of its admin interface")?;
    let asking = async {
        let channel = cluster.identity.channel(node, &address, PATIENCE).await?;
        let request = proto::ReportRequest {
            volume_id: volume.0.to_string(),
        };
        let answer = DiagnosisClient::new(channel).report(request).await;
        let answer = answer.map_err(|status| status.message().to_owned())?;
        wire::report(answer.into_inner())
    };
    tokio::time::timeout(PATIENCE, asking)
        .await
        .unwrap_or_else(|_| Err(too_slow()))
}

/// When each node told last what room its stores have: as good as a sign of life.
async fn told(records: &dyn MetadataStore) -> BTreeMap<NodeId, u64> {
    let listed = async {
        let mut told: BTreeMap<NodeId, u64> = BTreeMap::new();
        for space in meta::list::<SpaceRecord>(records, keys::SPACES).await? {
            let space = space.record;
            let at = told.entry(space.node).or_default();
            *at = space.at_unix_ms.max(*at);
        }
        Ok::<_, MetadataError>(told)
    };
    // Without it less is told, and nothing wrong.
    match tokio::time::timeout(PATIENCE, listed).await {
        Ok(Ok(told)) => told,
        Ok(Err(_)) | Err(_) => BTreeMap::new(),
    }
}
