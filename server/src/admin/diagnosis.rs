//! `ashlar.diagnosis.v1.Diagnosis`.

use std::pin::Pin;
use std::sync::Arc;

use ashlar_core::units::VolumeId;
use ashlar_proto::{diagnosis as proto, request};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::service::{refused, services_of};
use crate::daemon::{Services, State};
use crate::diagnosis::{self, DiagnosisError};

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
