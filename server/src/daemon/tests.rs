//! A whole daemon in this process, asked through its own interfaces.

mod scrubs;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::pin::pin;
use std::time::Duration;

use ashlar_core::units::{Version, VolumeId};
use ashlar_core::volume::EPOCH_RESERVE;

use ashlar_proto::admin::admin_client::AdminClient;
use ashlar_proto::admin::{
    CheckpointRequest, CreateVolumeRequest, DaemonState, DeleteVolumeRequest, GetStatusRequest,
    GetVolumeRequest, ListStoresRequest, ListVolumesRequest, RenameVolumeRequest,
    ResizeVolumeRequest, ScrubProgress, ScrubRequest, SetVolumeRequest, StoreScrub,
    WatchStatsRequest,
};
use clap::Parser;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use super::metadata::METADATA_FILE;
use super::run::Daemon;
use crate::config::{Arguments, Config};
use crate::daemon::open_local;
use crate::meta::{CLOSED, OpenError};

/// Long enough for a loaded machine; a hang fails the test instead of holding up the run.
const PATIENCE: Duration = Duration::from_secs(30);

fn config(dir: &Path) -> Config {
    config_with(dir, &[])
}

fn config_with(dir: &Path, more: &[&str]) -> Config {
    let flags = [
        "ashlard".to_owned(),
        format!("--data-dir={}", dir.join("d").display()),
        format!("--tail-dir={}", dir.display()),
        "--tail-size=16MiB".to_owned(),
        "--store-size=256MiB".to_owned(),
        "--listen-http=127.0.0.1:0".to_owned(),
    ];
    let flags = flags
        .into_iter()
        .chain(more.iter().map(|flag| (*flag).to_owned()));
    Config::resolve(&Arguments::parse_from(flags)).expect("config")
}

async fn start(dir: &Path) -> (Daemon, AdminClient<Channel>, Channel) {
    start_with(dir, &[]).await
}

async fn start_with(dir: &Path, more: &[&str]) -> (Daemon, AdminClient<Channel>, Channel) {
    std::fs::create_dir_all(dir.join("d")).expect("create");
    let config = config_with(dir, more);
    nobody_has_the_records(dir).await;
    let daemon = Daemon::start(config, Vec::new()).await.expect("start");
    let endpoint = Endpoint::from_shared(format!("unix://{}", dir.join("d/admin.sock").display()))
        .expect("address");
    let channel = endpoint.connect().await.expect("connect");
    (daemon, AdminClient::new(channel.clone()), channel)
}

/// What answered the clients of a daemon lets go of its records a moment after the drain. A process that ends does not
/// wait for that; the next daemon in the same process has to.
async fn nobody_has_the_records(dir: &Path) {
    let data_dir = dir.join("d");
    // To look would make it.
    if !data_dir.join(METADATA_FILE).exists() {
        return;
    }
    let free = async {
        loop {
            let mut closed = pin!(CLOSED.notified());
            // From here on none is missed.
            closed.as_mut().enable();
            match open_local(&data_dir) {
                Err(OpenError::InUse { .. }) => closed.await,
                _ => return,
            }
        }
    };
    tokio::time::timeout(PATIENCE, free)
        .await
        .expect("everybody lets go of the records");
}

async fn stop(daemon: Daemon) {
    tokio::time::timeout(PATIENCE, daemon.drain(Duration::from_secs(1)))
        .await
        .expect("the drain ends");
}

fn code<T: std::fmt::Debug>(answer: Result<T, Status>) -> Code {
    answer.expect_err("refused").code()
}

fn create(name: &str, size_bytes: u64) -> CreateVolumeRequest {
    CreateVolumeRequest {
        name: name.to_owned(),
        size_bytes,
        ..CreateVolumeRequest::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn volumes_are_managed_and_survive_a_restart() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (daemon, mut admin, _) = start(dir.path()).await;
    let made = admin
        .create_volume(create("db", 5000))
        .await
        .expect("create")
        .into_inner()
        .volume
        .expect("volume");
    assert_eq!(
        (made.size_bytes, made.epoch, made.store_ids.len()),
        (8192, 1, 1)
    );
    assert_eq!(
        code(admin.create_volume(create("db", 4096)).await),
        Code::AlreadyExists
    );
    assert_eq!(
        code(admin.create_volume(create("DB", 4096)).await),
        Code::InvalidArgument
    );
    assert_eq!(
        code(admin.create_volume(create("x", 0)).await),
        Code::InvalidArgument
    );

    let volume = || made.id.clone();
    let rename = RenameVolumeRequest {
        volume: volume(),
        new_name: "base".to_owned(),
    };
    admin.rename_volume(rename).await.expect("rename");
    let resize = |size_bytes| ResizeVolumeRequest {
        volume: "base".to_owned(),
        size_bytes,
    };
    let grown = admin
        .resize_volume(resize(1 << 20))
        .await
        .expect("resize")
        .into_inner();
    assert_eq!(
        (
            grown.previous_size_bytes,
            grown.volume.expect("volume").size_bytes
        ),
        (8192, 1 << 20)
    );
    assert_eq!(
        code(admin.resize_volume(resize(4096)).await),
        Code::FailedPrecondition
    );
    let set = SetVolumeRequest {
        volume: volume(),
        read_only: Some(true),
        ..SetVolumeRequest::default()
    };
    assert!(
        admin
            .set_volume(set)
            .await
            .expect("set")
            .into_inner()
            .volume
            .expect("volume")
            .read_only
    );
    stop(daemon).await;

    let (daemon, mut admin, _) = start(dir.path()).await;
    let got = admin
        .get_volume(GetVolumeRequest { volume: volume() })
        .await
        .expect("get")
        .into_inner();
    let kept = got.volume.expect("volume");
    assert_eq!(
        (kept.name.as_str(), kept.size_bytes, kept.read_only),
        ("base", 1 << 20, true)
    );
    assert!(
        kept.epoch > made.epoch && kept.runtime.is_some(),
        "{kept:?}"
    );
    assert_eq!(got.nbd_listeners.len(), 1);
    admin
        .delete_volume(DeleteVolumeRequest { volume: volume() })
        .await
        .expect("delete");
    assert_eq!(
        code(
            admin
                .get_volume(GetVolumeRequest { volume: volume() })
                .await
        ),
        Code::NotFound
    );
    let listed = admin
        .list_volumes(ListVolumesRequest::default())
        .await
        .expect("list")
        .into_inner();
    assert!(listed.volumes.is_empty());
    stop(daemon).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_daemon_tells_how_it_is() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (daemon, mut admin, _) = start(dir.path()).await;
    admin
        .create_volume(create("a", 1 << 20))
        .await
        .expect("create");
    let status = admin
        .get_status(GetStatusRequest {})
        .await
        .expect("status")
        .into_inner();
    assert_eq!(
        (status.state(), status.volumes, status.data_threads),
        (DaemonState::Ready, 1, 1)
    );
    assert_eq!(status.warnings, Vec::<String>::new());
    assert_eq!(status.listeners.len(), 3);
    let stores = admin
        .list_stores(ListStoresRequest {})
        .await
        .expect("stores")
        .into_inner()
        .stores;
    assert!(
        stores.len() == 1 && stores[0].capacity_bytes > 0 && stores[0].available_bytes > 0,
        "{stores:?}"
    );

    let before = stores[0].checkpoint_sequence;
    let request = CheckpointRequest {
        store_id: stores[0].id.clone(),
    };
    assert_eq!(
        admin
            .checkpoint(request)
            .await
            .expect("checkpoint")
            .into_inner()
            .stores,
        1
    );
    let stores = admin
        .list_stores(ListStoresRequest {})
        .await
        .expect("stores")
        .into_inner()
        .stores;
    assert!(stores[0].checkpoint_sequence > before);

    let nowhere = ScrubRequest {
        store_id: uuid::Uuid::nil().to_string(),
        rate_bytes_per_second: 0,
    };
    assert_eq!(code(admin.scrub(nowhere).await), Code::NotFound);
    let everything = ScrubRequest {
        store_id: String::new(),
        rate_bytes_per_second: 0,
    };
    let mut scrub = admin.scrub(everything).await.expect("scrub").into_inner();
    let mut last = None;
    while let Some(progress) = scrub.message().await.expect("progress") {
        last = Some(progress);
    }
    let last = last.expect("progress");
    assert!(last.finished && last.damages.is_empty(), "{last:?}");
    stop(daemon).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watcher_of_statistics_does_not_hold_up_a_drain() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (daemon, mut admin, _) = start(dir.path()).await;
    admin
        .create_volume(create("a", 1 << 20))
        .await
        .expect("create");
    let mut samples = admin
        .watch_stats(WatchStatsRequest { interval_ms: 100 })
        .await
        .expect("watch")
        .into_inner();
    for _ in 0..2 {
        let sample = samples.message().await.expect("sample").expect("sample");
        assert!(sample.volumes.len() == 1 && sample.stores.len() == 1 && sample.resident_bytes > 0);
    }
    let refused = admin
        .watch_stats(WatchStatsRequest { interval_ms: 1 })
        .await;
    assert_eq!(code(refused), Code::InvalidArgument);
    stop(daemon).await;
    // Samples that were under way may still come, then the stream ends, in order or with the connection.
    while let Ok(Some(_)) = samples.message().await {}
    assert!(!dir.path().join("d/admin.sock").exists() && !dir.path().join("d/nbd.sock").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_and_reflection_are_served() {
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_client::HealthClient;
    use tonic_reflection::pb::v1::ServerReflectionRequest;
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

    let dir = tempfile::tempdir().expect("temporary directory");
    let (daemon, _, channel) = start(dir.path()).await;
    let mut health = HealthClient::new(channel.clone());
    let ask = HealthCheckRequest {
        service: "ashlar.admin.v1.Admin".to_owned(),
    };
    let mut answers = health.watch(ask).await.expect("watch").into_inner();
    // Serving comes as soon as the phase has been seen; before that "not serving" may be answered.
    let serving = async {
        while answers
            .message()
            .await
            .expect("health")
            .expect("health")
            .status
            != tonic_health::pb::health_check_response::ServingStatus::Serving as i32
        {}
    };
    tokio::time::timeout(PATIENCE, serving)
        .await
        .expect("it serves");

    let mut reflection = ServerReflectionClient::new(channel);
    let ask = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = reflection
        .server_reflection_info(tokio_stream::once(ask))
        .await
        .expect("ask")
        .into_inner();
    let answer = answers
        .message()
        .await
        .expect("answer")
        .expect("answer")
        .message_response;
    let Some(MessageResponse::ListServicesResponse(services)) = answer else {
        panic!("{answer:?}")
    };
    let names: Vec<_> = services
        .service
        .iter()
        .map(|service| service.name.as_str())
        .collect();
    assert!(
        names.contains(&"ashlar.admin.v1.Admin") && names.contains(&"grpc.health.v1.Health"),
        "{names:?}"
    );
    drop((answers, reflection, health));
    stop(daemon).await;
}

/// A client in its transmission phase, by the oldest handshake there is.
fn connect_nbd(path: &Path, export: &str) -> UnixStream {
    let mut stream = UnixStream::connect(path).expect("connect");
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).expect("greeting");
    // Fixed newstyle, no zeroes; NBD_OPT_EXPORT_NAME.
    let mut hello = 3u32.to_be_bytes().to_vec();
    hello.extend(b"IHAVEOPT");
    hello.extend(1u32.to_be_bytes());
    hello.extend((export.len() as u32).to_be_bytes());
    hello.extend(export.as_bytes());
    stream.write_all(&hello).expect("hello");
    let mut size_and_flags = [0; 10];
    stream.read_exact(&mut size_and_flags).expect("the export");
    stream
}

/// Writes a block and answers the error number.
fn write_block(stream: &mut UnixStream, block: u64, fill: u8) -> u32 {
    let mut request = 0x2560_9513u32.to_be_bytes().to_vec();
    request.extend([0, 0, 0, 1]);
    request.extend(block.to_be_bytes());
    request.extend((block * 4096).to_be_bytes());
    request.extend(4096u32.to_be_bytes());
    request.extend([fill; 4096]);
    stream.write_all(&request).expect("write");
    let mut reply = [0; 16];
    stream.read_exact(&mut reply).expect("reply");
    u32::from_be_bytes([reply[4], reply[5], reply[6], reply[7]])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_epoch_that_runs_out_is_renewed_and_clients_notice_nothing() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (daemon, mut admin, _) = start(dir.path()).await;
    let made = admin.create_volume(create("a", 1 << 20)).await;
    let made = made.expect("create").into_inner().volume.expect("volume");
    let id = VolumeId(made.id.parse().expect("id"));
    let last = Version::COUNTER_MAX - EPOCH_RESERVE;
    daemon.data_plane().set_versions_given(id, last - 3).await;
    let mut stream = connect_nbd(&dir.path().join("d/nbd.sock"), "a");
    let renewed = async {
        for turn in 0u64.. {
            assert_eq!(write_block(&mut stream, turn % 16, turn as u8), 0);
            let request = GetVolumeRequest {
                volume: "a".to_owned(),
            };
            let volume = admin.get_volume(request).await.expect("get").into_inner();
            if volume.volume.expect("volume").epoch > made.epoch {
                return turn;
            }
        }
        unreachable!()
    };
    let turns = tokio::time::timeout(PATIENCE, renewed)
        .await
        .expect("renewed");
    assert!(turns >= 2, "before it was asked for: {turns}");
    assert_eq!(write_block(&mut stream, 0, 1), 0);
    drop(stream);
    stop(daemon).await;
    let (daemon, mut admin, _) = start(dir.path()).await;
    let request = GetVolumeRequest {
        volume: "a".to_owned(),
    };
    let volume = admin.get_volume(request).await.expect("get").into_inner();
    assert!(volume.volume.expect("volume").epoch > made.epoch + 1);
    stop(daemon).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_went_missing_is_never_made_anew() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (daemon, ..) = start(dir.path()).await;
    stop(daemon).await;
    let store = dir.path().join("d/stores/0");
    std::fs::rename(&store, dir.path().join("away")).expect("rename");
    nobody_has_the_records(dir.path()).await;
    let refusal = Daemon::start(config(dir.path()), Vec::new())
        .await
        .err()
        .expect("refused")
        .to_string();
    assert!(refusal.contains("stores/0"), "{refusal}");
    std::fs::rename(dir.path().join("away"), &store).expect("rename");
    let (daemon, ..) = start(dir.path()).await;
    stop(daemon).await;
}
