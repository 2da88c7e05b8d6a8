//! The admin interface: gRPC over a Unix socket that only its owner may use, or over TCP: plain on the loopback of a
//! single node, with mutual TLS in a cluster.

mod cluster;
mod convert;
mod diagnosis;
mod forward;
mod orchestration;
mod secure;
mod service;
mod status;

use std::sync::Arc;
use std::time::Duration;

use ashlar_proto::admin::admin_server::AdminServer;
use ashlar_proto::cluster::cluster_server::ClusterServer;
use ashlar_proto::diagnosis::diagnosis_server::DiagnosisServer;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tokio_stream::{Stream, StreamExt};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Server;
use tonic::transport::server::Router;
use tonic::{Request, Status};

pub(crate) use convert::poison_reason;

use crate::daemon::{Phase, State};
use crate::nbd::socket::{Bound, BoundSocket};

/// How long calls under way may take once the daemon has drained; what they asked of it is done or refused by then.
const LAST_ANSWERS: Duration = Duration::from_secs(2);
/// How long the listening socket is left alone after it failed.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);
/// Largest message that is accepted: requests are names and numbers.
const REQUEST_MAX_BYTES: usize = 64 << 10;
/// Streams of one connection at once, so that one client cannot make the daemon hold any number of them.
const STREAMS_MAX: u32 = 64;

/// Serves on every socket until `stop` says so.
pub(crate) async fn serve(
    sockets: Vec<Bound>,
    state: Arc<State>,
    stop: watch::Receiver<bool>,
) -> std::io::Result<()> {
    let (health, health_service) = tonic_health::server::health_reporter();
    health
        .set_not_serving::<AdminServer<service::Service>>()
        .await;
    let admin = AdminServer::new(service::Service::new(state.clone()))
        .max_decoding_message_size(REQUEST_MAX_BYTES);
    // Its calls say for themselves who may make them: one is for everybody.
    let cluster = ClusterServer::new(cluster::Service::new(state.clone()))
        .max_decoding_message_size(REQUEST_MAX_BYTES);
    let diagnosis = DiagnosisServer::new(diagnosis::Service::new(state.clone()))
        .max_decoding_message_size(REQUEST_MAX_BYTES);
    let describe = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(ashlar_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    // The descriptors were made by this build; a test asks for them.
    let reflection = describe().build_v1().map_err(std::io::Error::other)?;
    let reflection_alpha = describe().build_v1alpha().map_err(std::io::Error::other)?;
    let router = Server::builder()
        .max_concurrent_streams(STREAMS_MAX)
        .add_service(cluster)
        .add_service(InterceptedService::new(admin, admitted))
        .add_service(InterceptedService::new(diagnosis, admitted))
        .add_service(InterceptedService::new(health_service, admitted))
        .add_service(InterceptedService::new(reflection, admitted))
        .add_service(InterceptedService::new(reflection_alpha, admitted));

    let mut tasks = tokio::task::JoinSet::new();
    for bound in sockets {
        tasks.spawn(serve_socket(
            router.clone(),
            bound,
            state.clone(),
            stop.clone(),
        ));
    }
    let mut phases = state.phases();
    let report = async move {
        loop {
            let phase = *phases.borrow_and_update();
            match phase {
                Phase::Ready => health.set_serving::<AdminServer<service::Service>>().await,
                Phase::Starting | Phase::Draining => {
                    health
                        .set_not_serving::<AdminServer<service::Service>>()
                        .await;
                }
            }
            if phases.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    };
    let all = async {
        while let Some(ended) = tasks.join_next().await {
            ended.map_err(std::io::Error::other)??;
        }
        Ok(())
    };
    tokio::select! {
        ended = all => ended,
        () = report => Ok(()),
    }
}

async fn serve_socket(
    router: Router,
    bound: Bound,
    state: Arc<State>,
    stop: watch::Receiver<bool>,
) -> std::io::Result<()> {
    let stopped = stop_said(stop.clone());
    // The second value of a Unix socket removes its path when it is dropped.
    let (served, _path) = match bound.socket {
        BoundSocket::Unix(listener, path) => {
            let incoming = patient(UnixListenerStream::new(UnixListener::from_std(listener)?));
            let served = router.serve_with_incoming_shutdown(incoming, stop_said(stop));
            (bounded(served, stopped).await, path)
        }
        BoundSocket::Tcp(listener) if state.config().is_clustered() => {
            let listener = TcpListener::from_std(listener)?;
            // Before there is an identity nobody could be told who we are.
            let identity = tokio::select! {
                identity = state.identity() => identity,
                () = stopped => return Ok(()),
            };
            let incoming = secure::incoming(listener, identity)?;
            let again = stop_said(stop.clone());
            let served = router.serve_with_incoming_shutdown(incoming, stop_said(stop));
            (bounded(served, again).await, None)
        }
        BoundSocket::Tcp(listener) => {
            let incoming = patient(TcpListenerStream::new(TcpListener::from_std(listener)?));
            let served = router.serve_with_incoming_shutdown(incoming, stop_said(stop));
            (bounded(served, stopped).await, None)
        }
    };
    served
}

fn admitted(request: Request<()>) -> Result<Request<()>, Status> {
    secure::admitted(&request)?;
    Ok(request)
}

/// Rests after a connection could not be accepted: for want of descriptors the next attempt would fail as well, and the
/// one after it, with all of a processor's time.
fn patient<T: Send>(
    incoming: impl Stream<Item = std::io::Result<T>> + Send,
) -> impl Stream<Item = std::io::Result<T>> + Send {
    incoming.then(async |accepted| {
        if let Err(error) = &accepted {
            tracing::warn!(%error, "cannot accept an admin connection for now");
            tokio::time::sleep(EXHAUSTED_PAUSE).await;
        }
        accepted
    })
}

async fn stop_said(mut stop: watch::Receiver<bool>) {
    // An error means that the sender is gone, which is a stop too.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Waits for the server, and after `stopped` only as long as [`LAST_ANSWERS`].
async fn bounded(
    served: impl Future<Output = Result<(), tonic::transport::Error>>,
    stopped: impl Future<Output = ()>,
) -> std::io::Result<()> {
    let too_late = async {
        stopped.await;
        tokio::time::sleep(LAST_ANSWERS).await;
    };
    tokio::select! {
        served = served => served.map_err(std::io::Error::other),
        () = too_late => Ok(()),
    }
}
