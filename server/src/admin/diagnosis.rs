//! `ashlar.diagnosis.v1.Diagnosis`.

use std::pin::Pin;
use std::sync::Arc;

use ashlar_core::store::ExtentKey;
use ashlar_core::units::{CHUNK_LEAVES, ChunkIndex, LayerId, StoreId, VolumeId};
use ashlar_proto::{diagnosis as proto, request};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::service::{refused, services_of};
use crate::daemon::{Services, State};
use crate::diagnosis::{self, DiagnosisError, Doctor, Orders};

/// Pages that a slow reader may be behind before the reading of events waits for it.
const PAGES_AHEAD: usize = 4;
/// Events of one message.
const EVENTS_AT_ONCE: usize = 256;

/// The service; cheap to clone.
#[derive(Clone)]
pub(super) struct Service {
    state: Arc<State>,
}

type Answer<T> = Result<Response<T>, Status>;

impl Service {
    pub(super) fn new(state: Arc<State>) -> Service {
        Service { state }
    }

    fn services(&self) -> Result<&Services, Status> {
        services_of(&self.state)
    }
}

fn undiagnosed(error: DiagnosisError) -> Status {
    match error {
        DiagnosisError::Volume(error) => refused(error),
        DiagnosisError::Starting => Status::unavailable(error.to_string()),
    }
}

#[tonic::async_trait]
impl proto::diagnosis_server::Diagnosis for Service {
    async fn explain(
        &self,
        request: Request<proto::ExplainRequest>,
    ) -> Answer<proto::ExplainResponse> {
        let reference = request::VolumeRef::parse(&request.into_inner().volume)?.to_string();
        let explained = diagnosis::explain(&self.state, self.services()?, &reference).await;
        let (facts, explanation) = explained.map_err(undiagnosed)?;
        Ok(Response::new(diagnosis::explanation(&facts, &explanation)))
    }

    async fn report(
        &self,
        request: Request<proto::ReportRequest>,
    ) -> Answer<proto::ReportResponse> {
        let id = Uuid::try_parse(&request.into_inner().volume_id)
            .map_err(|_| Status::invalid_argument("volume_id is not a UUID"))?;
        let report = diagnosis::report(self.services()?, VolumeId(id)).await;
        Ok(Response::new(diagnosis::report_message(&report)))
    }

    type WatchEventsStream = Pin<Box<dyn Stream<Item = Result<proto::EventPage, Status>> + Send>>;

    async fn watch_events(
        &self,
        request: Request<proto::WatchEventsRequest>,
    ) -> Answer<Self::WatchEventsStream> {
        let asked = request.into_inner();
        // A volume that is gone is asked for by its id, which is all that is left of it.
        let volume = match request::VolumeRef::parse_optional(&asked.volume)? {
            None => None,
            Some(request::VolumeRef::Id(id)) => Some(VolumeId(id)),
            Some(name) => {
                let view = self.services()?.volumes.get(&name.to_string());
                Some(view.map_err(refused)?.record.id)
            }
        };
        let (sender, receiver) = mpsc::channel(PAGES_AHEAD);
        let state = self.state.clone();
        tokio::spawn(async move {
            let mut news = state.events().follow();
            let mut seen = 0;
            loop {
                news.borrow_and_update();
                let page = state.events().after(seen, volume);
                seen = page.seen;
                if send(&sender, page.events, page.missed).await.is_err() || !asked.follow {
                    return;
                }
                tokio::select! {
                    changed = news.changed() => if changed.is_err() { return },
                    () = sender.closed() => return,
                    () = state.draining() => {
                        let page = state.events().after(seen, volume);
                        let _ = send(&sender, page.events, page.missed).await;
                        return;
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    type ExamineStream = Pin<Box<dyn Stream<Item = Result<proto::ExamineResponse, Status>> + Send>>;

    async fn examine(
        &self,
        request: Request<proto::ExamineRequest>,
    ) -> Answer<Self::ExamineStream> {
        let asked = request.into_inner();
        let volume = request::VolumeRef::parse_optional(&asked.volume)?;
        let volume = volume.map(|volume| volume.to_string());
        let orders = Orders {
            repairs_orphans: asked.repair().any(|one| one == proto::Repair::Orphans),
            repairs_differing: asked.repair().any(|one| one == proto::Repair::Differing),
            is_whole: asked.all,
            is_records_only: asked.records_only,
        };
        let (state, services) = (self.state.clone(), self.services()?.clone());
        if let Some(volume) = &volume {
            services.volumes.find(volume).await.map_err(refused)?;
        }
        let (sender, receiver) = mpsc::channel(PAGES_AHEAD);
        tokio::spawn(async move {
            if let Err(error) = examine(&state, &services, volume, orders, &sender).await {
                let _ = sender.send(Err(error)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn holdings(
        &self,
        _: Request<proto::HoldingsRequest>,
    ) -> Answer<proto::HoldingsResponse> {
        let holdings = diagnosis::holdings(self.services()?).await;
        let holdings = holdings.map_err(unheld)?;
        Ok(Response::new(diagnosis::holdings_message(&holdings)))
    }

    async fn digests(
        &self,
        request: Request<proto::DigestsRequest>,
    ) -> Answer<proto::DigestsResponse> {
        let asked = request.into_inner();
        let (store, layer) = (store(&asked.store_id)?, LayerId(asked.layer));
        let from = ChunkIndex(asked.from_chunk);
        let page = diagnosis::digests(self.services()?, store, layer, from).await;
        Ok(Response::new(diagnosis::digest_message(
            &page.map_err(unheld)?,
        )))
    }

    async fn leaf_sums(
        &self,
        request: Request<proto::LeafSumsRequest>,
    ) -> Answer<proto::LeafSumsResponse> {
        let asked = request.into_inner();
        let store = store(&asked.store_id)?;
        if asked.leaf >= CHUNK_LEAVES {
            return Err(Status::invalid_argument("leaf: a chunk has no such leaf"));
        }
        let extent = ExtentKey {
            layer: LayerId(asked.layer),
            chunk: ChunkIndex(asked.chunk),
        };
        let sums = diagnosis::sums(self.services()?, store, extent, vec![asked.leaf]).await;
        let sums = sums.map_err(unheld)?.pop().unwrap_or_default();
        Ok(Response::new(diagnosis::sums_message(&sums)))
    }

    async fn drop_orphan(
        &self,
        request: Request<proto::DropOrphanRequest>,
    ) -> Answer<proto::DropOrphanResponse> {
        let asked = request.into_inner();
        let (store, layer) = (store(&asked.store_id)?, LayerId(asked.layer));
        let dropped = diagnosis::drop_orphan(self.services()?, store, layer).await;
        dropped.map_err(unheld)?;
        Ok(Response::new(proto::DropOrphanResponse {}))
    }

    async fn distrust_copy(
        &self,
        request: Request<proto::DistrustCopyRequest>,
    ) -> Answer<proto::DistrustCopyResponse> {
        let asked = request.into_inner();
        let store = store(&asked.store_id)?;
        let volume = Uuid::try_parse(&asked.volume_id)
            .map_err(|_| Status::invalid_argument("volume_id is not a UUID"))?;
        let done = diagnosis::distrust(self.services()?, VolumeId(volume), store).await;
        done.map_err(unheld)?;
        Ok(Response::new(proto::DistrustCopyResponse {}))
    }
}

/// A store and whatever else names a place, from a request.
fn store(text: &str) -> Result<StoreId, Status> {
    Uuid::try_parse(text)
        .map(StoreId)
        .map_err(|_| Status::invalid_argument("store_id is not a UUID"))
}

fn unheld(error: String) -> Status {
    Status::failed_precondition(error)
}

/// A visit of the doctor, message by message, until it is over or nobody listens.
async fn examine(
    state: &State,
    services: &Services,
    volume: Option<String>,
    orders: Orders,
    sender: &mpsc::Sender<Result<proto::ExamineResponse, Status>>,
) -> Result<(), Status> {
    let visit = Doctor::visit(state, services, volume.as_deref(), orders).await;
    let doctor = visit.map_err(undiagnosed)?;
    let (findings, volumes) = doctor.examine().await.map_err(refused)?;
    let mut next = Some(diagnosis::findings_message(&findings));
    let mut volumes = volumes.into_iter();
    while let Some(message) = next.take() {
        if sender.send(Ok(message)).await.is_err() {
            return Ok(());
        }
        if let Some(volume) = volumes.next() {
            let compared = tokio::select! {
                compared = doctor.compare(volume) => compared,
                () = sender.closed() => return Ok(()),
                () = state.draining() => {
                    return Err(Status::unavailable("the daemon is shutting down"));
                }
            };
            next = Some(diagnosis::findings_message(&compared));
        }
    }
    Ok(())
}

/// Sends events in messages of a bounded size. An error: nobody listens any more.
async fn send(
    sender: &mpsc::Sender<Result<proto::EventPage, Status>>,
    events: Vec<ashlar_core::diagnosis::events::Event>,
    mut missed: u64,
) -> Result<(), ()> {
    for events in events.chunks(EVENTS_AT_ONCE) {
        let page = proto::EventPage {
            events: events.iter().map(diagnosis::event).collect(),
            missed: std::mem::take(&mut missed),
        };
        sender.send(Ok(page)).await.map_err(drop)?;
    }
    Ok(())
}
