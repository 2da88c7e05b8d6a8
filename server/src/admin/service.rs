//! `ashlar.admin.v1.Admin`.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use ashlar_core::store::StoreError;
use ashlar_core::units::{BLOCK_BYTES, StoreId, VolumeId};
use ashlar_proto::{admin, request};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{convert, forward, orchestration, status};
use crate::daemon::{Phase, Services, State};
use crate::plane::StoreView;
use crate::volumes::{HostError, VolumeError, VolumeView, unix_ms};

/// Between two looks at a scrub: as often as a person wants a progress bar to move.
const SCRUB_PROGRESS: Duration = Duration::from_secs(1);
/// Samples a slow reader of statistics may be behind before the sampling waits for it.
const SAMPLES_AHEAD: usize = 4;

/// The service; cheap to clone.
#[derive(Clone)]
pub(super) struct Service {
    pub(super) state: Arc<State>,
}

type Answer<T> = Result<Response<T>, Status>;
type Messages<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Service {
    pub(super) fn new(state: Arc<State>) -> Service {
        Service { state }
    }

    pub(super) fn services(&self) -> Result<&Services, Status> {
        services_of(&self.state)
    }

    /// A volume by the name or id in a request.
    pub(super) fn reference(volume: &str) -> Result<String, Status> {
        Ok(request::VolumeRef::parse(volume)?.to_string())
    }

    /// Where clients open volumes.
    pub(super) fn nbd_listeners(&self) -> Vec<admin::Listener> {
        let listeners = self.state.listeners();
        let is_nbd = |listener: &admin::Listener| listener.kind() == admin::ListenerKind::Nbd;
        listeners.into_iter().filter(is_nbd).collect()
    }

    /// How much of the stores may be promised to volumes.
    pub(super) fn overcommit_percent(&self) -> u32 {
        self.state.config().overcommit_percent
    }

    async fn stores(services: &Services) -> Vec<admin::Store> {
        let disks = services.plane.metrics().stores();
        let disk_of = |view: &StoreView| {
            disks
                .iter()
                .find(|(id, _)| *id == view.id)
                .map(|(_, disk)| &**disk)
        };
        let views = services.plane.store_views().await;
        views
            .iter()
            .map(|view| convert::store(view, disk_of(view), services.scrubs.of(view.id)))
            .collect()
    }

    /// The stores meant by a request: one, or all.
    fn chosen_stores(
        services: &Services,
        asked: Option<uuid::Uuid>,
    ) -> Result<Vec<StoreId>, Status> {
        let open = services.plane.stores();
        match asked.map(StoreId) {
            None => Ok(open),
            Some(store) if open.contains(&store) => Ok(vec![store]),
            Some(store) => Err(Status::not_found(format!(
                "there is no store {}; `ashlar store list` shows those there are",
                store.0
            ))),
        }
    }

    async fn sample(state: &State, services: &Services) -> admin::StatsSample {
        let usage = crate::daemon::usage();
        let counters = services.plane.metrics().volumes();
        let of = |view: &VolumeView| counters.iter().find(|(id, ..)| *id == view.record.id);
        let views = services.volumes.list();
        let volumes = views
            .iter()
            .filter_map(|view| Some(convert::volume_stats(view, &of(view)?.2)));
        admin::StatsSample {
            at_unix_ms: unix_ms() as i64,
            uptime_ms: state.uptime().as_millis() as u64,
            cpu_time_us: usage.cpu.as_micros() as u64,
            resident_bytes: usage.resident_bytes,
            volumes: volumes.collect(),
            stores: Service::stores(services).await,
        }
    }
}

/// What serves volumes, as long as it does.
pub(super) fn services_of(state: &State) -> Result<&Services, Status> {
    match state.phase() {
        Phase::Draining => Err(Status::unavailable("the daemon is shutting down")),
        Phase::Starting | Phase::Ready => state.services().ok_or_else(|| {
            Status::unavailable(format!("the daemon is starting: {}", state.step()))
        }),
    }
}

pub(super) fn refused(error: VolumeError) -> Status {
    status::of_volume_error(&error)
}

fn host_refused(error: HostError) -> Status {
    Status::new(status::of_host_error(&error), error.to_string())
}

#[tonic::async_trait]
impl admin::admin_server::Admin for Service {
    async fn create_volume(
        &self,
        request: Request<admin::CreateVolumeRequest>,
    ) -> Answer<admin::CreateVolumeResponse> {
        let mut asked = request.into_inner();
        let settings = orchestration::settings(&mut asked)?;
        let volumes = &self.services()?.volumes;
        let created = volumes.create(&asked.name, asked.size_bytes, settings);
        let view = created.await.map_err(refused)?;
        Ok(Response::new(admin::CreateVolumeResponse {
            volume: Some(convert::volume(&view)),
        }))
    }

    async fn list_volumes(
        &self,
        request: Request<admin::ListVolumesRequest>,
    ) -> Answer<admin::ListVolumesResponse> {
        let services = self.services()?;
        let views = services.volumes.list();
        let (views, next_page_token) = orchestration::page(views, &request.into_inner())?;
        let mut volumes = Vec::with_capacity(views.len());
        for view in &views {
            volumes.push(Service::volume(services, view).await);
        }
        Ok(Response::new(admin::ListVolumesResponse {
            volumes,
            next_page_token,
        }))
    }

    async fn get_volume(
        &self,
        request: Request<admin::GetVolumeRequest>,
    ) -> Answer<admin::GetVolumeResponse> {
        let reference = Service::reference(&request.into_inner().volume)?;
        let services = self.services()?;
        let view = services.volumes.find(&reference).await.map_err(refused)?;
        Ok(Response::new(admin::GetVolumeResponse {
            volume: Some(Service::volume(services, &view).await),
            nbd_listeners: self.nbd_listeners(),
        }))
    }

    async fn rename_volume(
        &self,
        request: Request<admin::RenameVolumeRequest>,
    ) -> Answer<admin::RenameVolumeResponse> {
        let asked = request.into_inner();
        let reference = Service::reference(&asked.volume)?;
        let view = self
            .services()?
            .volumes
            .rename(&reference, &asked.new_name)
            .await
            .map_err(refused)?;
        Ok(Response::new(admin::RenameVolumeResponse {
            volume: Some(convert::volume(&view)),
        }))
    }

    async fn resize_volume(
        &self,
        request: Request<admin::ResizeVolumeRequest>,
    ) -> Answer<admin::ResizeVolumeResponse> {
        let asked = request.into_inner();
        let reference = Service::reference(&asked.volume)?;
        let resized = self
            .services()?
            .volumes
            .resize(&reference, asked.size_bytes)
            .await;
        let (view, previous_size_bytes) = resized.map_err(refused)?;
        Ok(Response::new(admin::ResizeVolumeResponse {
            volume: Some(convert::volume(&view)),
            previous_size_bytes,
        }))
    }

    async fn delete_volume(
        &self,
        request: Request<admin::DeleteVolumeRequest>,
    ) -> Answer<admin::DeleteVolumeResponse> {
        let (metadata, _, mut message) = request.into_parts();
        let reference = Service::reference(&message.volume)?;
        let volumes = &self.services()?.volumes;
        // A name may mean another volume by the time it is passed on.
        if let Ok(found) = volumes.get(&reference) {
            message.volume = found.record.id.0.to_string();
        }
        match volumes.delete(&reference).await {
            Ok(VolumeId(id)) => Ok(Response::new(admin::DeleteVolumeResponse {
                id: id.to_string(),
            })),
            Err(refusal) => {
                let mut node = self.ask_instead(&metadata, refusal).await?;
                let answer = node.client.delete_volume(forward::passed_on(message)).await;
                node.answer(answer)
            }
        }
    }

    async fn set_volume(
        &self,
        request: Request<admin::SetVolumeRequest>,
    ) -> Answer<admin::SetVolumeResponse> {
        let (metadata, _, mut message) = request.into_parts();
        let asked = request::SetVolume::try_from(message.clone())?;
        let services = self.services()?;
        if let Ok(found) = services.volumes.get(&asked.volume.to_string()) {
            message.volume = found.record.id.0.to_string();
        }
        match Service::set(services, &asked).await {
            Ok(view) => Ok(Response::new(admin::SetVolumeResponse {
                volume: Some(Service::volume(services, &view).await),
            })),
            Err(refusal) => {
                let mut node = self.ask_instead(&metadata, refusal).await?;
                let answer = node.client.set_volume(forward::passed_on(message)).await;
                node.answer(answer)
            }
        }
    }

    async fn set_annotations(
        &self,
        request: Request<admin::SetAnnotationsRequest>,
    ) -> Answer<admin::SetAnnotationsResponse> {
        Ok(Response::new(self.annotate(request.into_inner()).await?))
    }

    async fn publish_volume(
        &self,
        request: Request<admin::PublishVolumeRequest>,
    ) -> Answer<admin::PublishVolumeResponse> {
        Ok(Response::new(self.publish(request.into_inner()).await?))
    }

    async fn open_volume(
        &self,
        request: Request<admin::OpenVolumeRequest>,
    ) -> Answer<admin::OpenVolumeResponse> {
        let asked = request.into_inner();
        let reference = Service::reference(&asked.volume)?;
        let client = match &asked.client_node_id[..] {
            "" => None,
            id => Some(orchestration::node_id(id)?),
        };
        let services = self.services()?;
        let opened = services.volumes.open_here(&reference, client).await;
        let view = opened.map_err(refused)?;
        Ok(Response::new(admin::OpenVolumeResponse {
            volume: Some(Service::volume(services, &view).await),
        }))
    }

    async fn unpublish_volume(
        &self,
        request: Request<admin::UnpublishVolumeRequest>,
    ) -> Answer<admin::UnpublishVolumeResponse> {
        Ok(Response::new(self.unpublish(request.into_inner()).await?))
    }

    async fn begin_format(
        &self,
        request: Request<admin::BeginFormatRequest>,
    ) -> Answer<admin::BeginFormatResponse> {
        Ok(Response::new(self.begin(request.into_inner()).await?))
    }

    async fn end_format(
        &self,
        request: Request<admin::EndFormatRequest>,
    ) -> Answer<admin::EndFormatResponse> {
        Ok(Response::new(self.end(request.into_inner()).await?))
    }

    async fn close_connections(
        &self,
        request: Request<admin::CloseConnectionsRequest>,
    ) -> Answer<admin::CloseConnectionsResponse> {
        let reference = Service::reference(&request.into_inner().volume)?;
        let volumes = &self.services()?.volumes;
        let closed = volumes
            .close_connections(&reference)
            .await
            .map_err(refused)?;
        Ok(Response::new(admin::CloseConnectionsResponse {
            closed_connections: closed,
        }))
    }

    async fn get_capacity(
        &self,
        request: Request<admin::GetCapacityRequest>,
    ) -> Answer<admin::GetCapacityResponse> {
        Ok(Response::new(self.capacity(request.into_inner()).await?))
    }

    async fn register_node(
        &self,
        request: Request<admin::RegisterNodeRequest>,
    ) -> Answer<admin::RegisterNodeResponse> {
        Ok(Response::new(self.register(request.into_inner()).await?))
    }

    async fn unregister_node(
        &self,
        request: Request<admin::UnregisterNodeRequest>,
    ) -> Answer<admin::UnregisterNodeResponse> {
        Ok(Response::new(self.unregister(request.into_inner()).await?))
    }

    async fn list_nodes(
        &self,
        _: Request<admin::ListNodesRequest>,
    ) -> Answer<admin::ListNodesResponse> {
        Ok(Response::new(self.nodes().await?))
    }

    async fn list_connections(
        &self,
        request: Request<admin::ListConnectionsRequest>,
    ) -> Answer<admin::ListConnectionsResponse> {
        let asked = request::VolumeRef::parse_optional(&request.into_inner().volume)?;
        let services = self.services()?;
        let views = match asked {
            Some(volume) => {
                let found = services.volumes.find(&volume.to_string()).await;
                vec![found.map_err(refused)?]
            }
            None => services.volumes.list(),
        };
        let mut connections = Vec::new();
        for view in views {
            let of_volume = services.plane.connections(view.record.id).await;
            connections.extend(
                of_volume
                    .into_iter()
                    .map(|one| convert::connection(&view.record, one)),
            );
        }
        Ok(Response::new(admin::ListConnectionsResponse {
            connections,
        }))
    }

    async fn get_status(
        &self,
        _: Request<admin::GetStatusRequest>,
    ) -> Answer<admin::GetStatusResponse> {
        // Answered in every phase: a person who asks wants to know what it is waiting for.
        let services = self.state.services();
        let mut answer = admin::GetStatusResponse {
            node_id: self
                .state
                .node()
                .map(|node| node.0.to_string())
                .unwrap_or_default(),
            version: crate::VERSION.to_owned(),
            pid: std::process::id(),
            started_at_unix_ms: self.state.started_at_unix_ms() as i64,
            uptime_ms: self.state.uptime().as_millis() as u64,
            state: match self.state.phase() {
                Phase::Starting => admin::DaemonState::Starting,
                Phase::Ready => admin::DaemonState::Ready,
                Phase::Draining => admin::DaemonState::Draining,
            }
            .into(),
            data_dir: self.state.config().data_dir.display().to_string(),
            listeners: self.state.listeners(),
            connections: self.state.connections().open() as u32,
            ..admin::GetStatusResponse::default()
        };
        if let Some(services) = services {
            let views = services.plane.store_views().await;
            let engine = views.first().map_or("", |view| view.engine);
            answer.engine = engine.to_owned();
            if engine == "posix" {
                answer.engine_fallback_reason = services.engine_reason.clone();
            }
            answer.data_threads = services.plane.metrics().threads().len() as u32;
            let active =
                |view: &&VolumeView| view.record.state == ashlar_core::records::VolumeState::Active;
            answer.volumes = services.volumes.list().iter().filter(active).count() as u32;
            answer.stores = Service::stores(services).await;
            answer.warnings = self.state.warnings(&views);
        } else {
            answer.warnings = vec![format!("not serving yet: {}", self.state.step())];
        }
        Ok(Response::new(answer))
    }

    async fn list_stores(
        &self,
        _: Request<admin::ListStoresRequest>,
    ) -> Answer<admin::ListStoresResponse> {
        let stores = Service::stores(self.services()?).await;
        Ok(Response::new(admin::ListStoresResponse { stores }))
    }

    type ScrubStream = Messages<admin::ScrubProgress>;

    async fn scrub(&self, request: Request<admin::ScrubRequest>) -> Answer<Self::ScrubStream> {
        let asked = request::Scrub::try_from(request.into_inner())?;
        let services = self.services()?.clone();
        let chosen = Service::chosen_stores(&services, asked.store_id)?;
        let rate = asked
            .rate_bytes_per_second
            .unwrap_or(self.state.config().scrub_bytes_per_second);
        let (sender, receiver) = mpsc::channel(SAMPLES_AHEAD);
        let state = self.state.clone();
        tokio::spawn(async move {
            for store in chosen {
                if let Err(error) = scrub_store(&state, &services, store, rate, &sender).await {
                    let _ = sender.send(Err(error)).await;
                    return;
                }
                if sender.is_closed() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn checkpoint(
        &self,
        request: Request<admin::CheckpointRequest>,
    ) -> Answer<admin::CheckpointResponse> {
        let asked = request::Checkpoint::try_from(request.into_inner())?;
        let services = self.services()?;
        let chosen = Service::chosen_stores(services, asked.store_id)?;
        let begun = std::time::Instant::now();
        for store in &chosen {
            services
                .plane
                .checkpoint(*store)
                .await
                .map_err(host_refused)?;
        }
        Ok(Response::new(admin::CheckpointResponse {
            duration_ms: begun.elapsed().as_millis() as u64,
            stores: chosen.len() as u32,
        }))
    }

    type WatchStatsStream = Messages<admin::StatsSample>;

    async fn watch_stats(
        &self,
        request: Request<admin::WatchStatsRequest>,
    ) -> Answer<Self::WatchStatsStream> {
        let asked = request::WatchStats::try_from(request.into_inner())?;
        let services = self.services()?.clone();
        let state = self.state.clone();
        let (sender, receiver) = mpsc::channel(SAMPLES_AHEAD);
        tokio::spawn(async move {
            // The only timer of an admin connection, and it lives as long as somebody watches.
            let mut ticks = tokio::time::interval(asked.interval);
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                tokio::select! {
                    _ = ticks.tick() => {}
                    () = sender.closed() => return,
                    () = state.draining() => return,
                }
                let sample = Service::sample(&state, &services).await;
                if sender.send(Ok(sample)).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

/// Scrubs one store to its end, until nobody listens any more, or until the daemon drains.
async fn scrub_store(
    state: &State,
    services: &Services,
    store: StoreId,
    rate_bytes_per_second: u64,
    sender: &mpsc::Sender<Result<admin::ScrubProgress, Status>>,
) -> Result<(), Status> {
    // A small store is through before the answer is here.
    let mut seen = services.plane.metrics().damage_count(store);
    let pass = services
        .plane
        .start_scrub(store, rate_bytes_per_second)
        .await
        .map_err(host_refused)?;
    loop {
        let views = services.plane.store_views().await;
        let Some(view) = views.into_iter().find(|view| view.id == store) else {
            return Err(Status::unavailable("the daemon is shutting down"));
        };
        let status = &view.status;
        let finished = status.scrub_ended.pass == pass;
        let (blocks, damaged_blocks) = if finished {
            (status.scrub_ended.blocks, status.scrub_ended.damaged)
        } else if status.scrubbing && status.scrub_pass == pass {
            (status.scrub_blocks, status.scrub_damaged)
        } else if let Some(error) = status.poisoned {
            let reason = StoreError::Poisoned(error).to_string();
            return Err(host_refused(HostError::Store { reason }));
        } else {
            return Err(Status::aborted(
                "the scrub was ended before it was complete: another one of the same store was begun, or the daemon is shutting down",
            ));
        };
        let block_bytes = BLOCK_BYTES as u64;
        let new = services.plane.metrics().damages_after(store, &mut seen);
        let progress = admin::ScrubProgress {
            store_id: store.0.to_string(),
            done_bytes: blocks * block_bytes,
            total_bytes: status.mapped_blocks.max(blocks) * block_bytes,
            damages: new
                .iter()
                .map(|damage| convert::damage(damage, services.volumes.owner_of(damage.layer)))
                .collect(),
            damaged_blocks,
            finished,
        };
        if sender.send(Ok(progress)).await.is_err() {
            let _ = services.plane.stop_scrub(store, pass).await;
            return Ok(());
        }
        if finished {
            return Ok(());
        }
        tokio::select! {
            () = tokio::time::sleep(SCRUB_PROGRESS) => {}
            () = sender.closed() => {}
            () = state.draining() => {
                let _ = services.plane.stop_scrub(store, pass).await;
                return Err(Status::unavailable("the daemon is shutting down"));
            }
        }
    }
}
