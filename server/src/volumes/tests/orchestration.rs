//! Publications, formats, annotations, limits and client nodes, over restarts.

use ashlar_core::records::{
    AccessMode, ClientNodeId, FilesystemState, FilesystemType, Publication, PublishError,
};
use ashlar_core::units::ExportToken;

use super::*;

fn node(id: &str) -> ClientNodeId {
    ClientNodeId::parse(id).expect("id")
}

async fn publish_to(
    service: &Arc<Volumes>,
    to: &str,
    mode: AccessMode,
) -> Result<Publication, VolumeError> {
    let published = service.publish("db", node(to), mode, false).await;
    published.map(|(_, publication)| publication)
}

async fn ready(daemon: &Daemon) -> (Arc<Volumes>, VolumeId) {
    let service = daemon.start().await;
    for id in ["a", "b"] {
        service
            .register_node(node(id), BTreeMap::new())
            .await
            .expect("registered");
    }
    let made = service.create("db", 4096, VolumeSettings::default()).await;
    (service, made.expect("create").record.id)
}

fn admitted(daemon: &Daemon, id: VolumeId) -> Admitted {
    daemon.spec(id).expect("open").admitted
}

#[tokio::test]
async fn a_publication_lasts_until_it_is_taken_back() {
    use AccessMode::{MultiNodeReader, SingleNodeWriter};
    let daemon = Daemon::new();
    let (service, id) = ready(&daemon).await;
    assert!(matches!(
        publish_to(&service, "c", SingleNodeWriter).await,
        Err(VolumeError::Publish(PublishError::UnknownNode { .. }))
    ));
    let given = publish_to(&service, "a", SingleNodeWriter)
        .await
        .expect("published");
    assert_eq!(
        publish_to(&service, "a", SingleNodeWriter).await,
        Ok(given.clone()),
        "again"
    );
    assert!(matches!(
        publish_to(&service, "a", MultiNodeReader).await,
        Err(VolumeError::Publish(PublishError::OtherTerms { .. }))
    ));
    assert!(matches!(
        publish_to(&service, "b", SingleNodeWriter).await,
        Err(VolumeError::Publish(PublishError::Elsewhere { .. }))
    ));
    let name = given.export_name(id);
    let found = service.lookup(&name).await.expect("served").expect("found");
    assert_eq!(
        (found.volume, found.token, found.read_only),
        (id, Some(given.token), false)
    );
    assert!(service.lookup("db").await.is_err(), "by name");
    assert!(service.lookup(&id.0.to_string()).await.is_err(), "by id");
    assert!(matches!(
        service.delete("db").await,
        Err(VolumeError::Delete(_))
    ));
    assert!(daemon.spec(id).is_some(), "still served");

    drop(service);
    let service = daemon.start().await;
    assert_eq!(admitted(&daemon, id), Admitted::Holders(vec![given.token]));
    assert!(service.lookup(&name).await.expect("served").is_some());
    // The node goes; what it has is taken from it all the same.
    assert_eq!(service.unregister_node(node("a")).await, Ok(true));
    assert_eq!(service.unregister_node(node("a")).await, Ok(false));
    assert_eq!(service.published_to()[&node("a")], [id]);
    daemon.connect(id, 3);
    let before = daemon.spec(id).expect("open").epoch;
    let ended = service
        .unpublish("db", Some(node("a")))
        .await
        .expect("taken back");
    assert_eq!(
        (ended.closed_connections, ended.nodes),
        (3, vec![node("a")])
    );
    assert!(ended.epoch > before && daemon.spec(id).expect("open").epoch == ended.epoch);
    assert!(service.lookup(&name).await.is_err() && service.lookup("db").await.is_ok());
    let again = service.unpublish("db", None).await.expect("nothing to do");
    assert_eq!((again.epoch, again.nodes), (ended.epoch, vec![]));
    drop(service);
    let service = daemon.start().await;
    assert_eq!(admitted(&daemon, id), Admitted::Anyone);
    assert!(service.lookup(&name).await.is_err());
    service.delete("db").await.expect("deleted");
}

#[tokio::test]
async fn readers_share_and_leave_one_by_one() {
    let daemon = Daemon::new();
    let (service, id) = ready(&daemon).await;
    let a = publish_to(&service, "a", AccessMode::MultiNodeReader)
        .await
        .expect("a");
    let b = publish_to(&service, "b", AccessMode::MultiNodeReader)
        .await
        .expect("b");
    assert!(a.read_only && b.read_only && a.token != b.token);
    let found = service
        .lookup(&b.export_name(id))
        .await
        .expect("served")
        .expect("found");
    assert!(found.read_only);
    service
        .unpublish("db", Some(node("a")))
        .await
        .expect("taken back");
    assert_eq!(admitted(&daemon, id), Admitted::Holders(vec![b.token]));
    assert!(service.lookup(&a.export_name(id)).await.is_err());
    assert!(service.lookup("db").await.is_err());
}

#[tokio::test]
async fn a_volume_in_use_by_hand_is_not_published() {
    let daemon = Daemon::new();
    let (service, id) = ready(&daemon).await;
    daemon.connect(id, 1);
    let refusal = publish_to(&service, "a", AccessMode::SingleNodeWriter)
        .await
        .expect_err("in use");
    assert!(refusal.to_string().contains("in use by 1"), "{refusal}");
    assert_eq!(admitted(&daemon, id), Admitted::Anyone);
    assert!(
        service
            .get("db")
            .expect("there")
            .record
            .publications
            .is_empty()
    );
    let guess = format!("{}@{}", id.0, ExportToken(Uuid::nil()).0.simple());
    assert!(service.lookup(&guess).await.is_err());
}

#[tokio::test]
async fn what_was_written_is_not_formatted() {
    let daemon = Daemon::new();
    let (service, id) = ready(&daemon).await;
    let ext4 = || FilesystemType::parse("ext4").expect("type");
    let one = Uuid::from_u128(1);
    assert!(!service.get("db").expect("there").ever_written);
    let begun = service
        .begin_format("db", ext4(), one)
        .await
        .expect("blank");
    assert_eq!(
        begun.record.filesystem.expect("begun").state,
        FilesystemState::Formatting
    );
    // Only who it was published to may write now: what is there when it is begun again is thrown away.
    let by_hand = service.lookup("db").await.expect("served").expect("found");
    assert!(by_hand.read_only);
    assert!(by_hand.description.contains("not finished"));
    let (_, publication) = service
        .publish("db", node("a"), AccessMode::SingleNodeWriter, false)
        .await
        .expect("published");
    let name = publication.export_name(id);
    let by_driver = service.lookup(&name).await.expect("served").expect("found");
    assert!(!by_driver.read_only);
    service
        .unpublish("db", Some(node("a")))
        .await
        .expect("unpublished");
    lock(&daemon.host.changing).push(id);
    daemon.host.changes.notify_one();
    daemon.host.recorded.notified().await;
    assert!(service.get("db").expect("there").ever_written);
    drop(service);

    let service = daemon.start().await;
    assert!(!daemon.spec(id).expect("open").never_written, "it lasts");
    service
        .begin_format("db", ext4(), one)
        .await
        .expect("the same again");
    assert!(
        service
            .begin_format("db", ext4(), Uuid::from_u128(2))
            .await
            .is_err()
    );
    let ended = service.end_format("db", one).await.expect("ended");
    assert_eq!(
        ended.record.filesystem.expect("made").state,
        FilesystemState::Formatted
    );
    service.end_format("db", one).await.expect("again");
    let by_hand = service.lookup("db").await.expect("served").expect("found");
    assert!(!by_hand.read_only);
    assert!(service.begin_format("db", ext4(), one).await.is_err());

    // Metadata from before the first write, stores from after it.
    let old = service
        .create("old", 4096, VolumeSettings::default())
        .await
        .expect("create");
    lock(&daemon.host.written).insert(old.record.live_layer(), Epoch(1));
    drop(service);
    let service = daemon.start().await;
    assert!(service.get("old").expect("there").ever_written);
    assert!(matches!(
        service.begin_format("old", ext4(), one).await,
        Err(VolumeError::Format(_))
    ));
}

#[tokio::test]
async fn annotations_and_limits_last_and_go_with_the_volume() {
    let daemon = Daemon::new();
    let service = daemon.start().await;
    let text = |value: &str| {
        Annotations::check(BTreeMap::from([("k".to_owned(), value.to_owned())])).expect("small")
    };
    let settings = VolumeSettings {
        annotations: text("first"),
        limits: VolumeLimits::check(100, 0).expect("limits"),
        ..VolumeSettings::default()
    };
    let made = service.create("db", 4096, settings).await.expect("create");
    let id = made.record.id;
    assert_eq!(
        (
            made.annotations.revision,
            &made.annotations.entries["k"][..]
        ),
        (1, "first")
    );
    assert_eq!(daemon.spec(id).expect("open").limits.iops, Some(100));
    let set = service
        .annotate("db", 1, text("second"))
        .await
        .expect("set");
    assert_eq!(set.annotations.revision, 2);
    assert!(matches!(
        service.annotate("db", 1, text("late")).await,
        Err(VolumeError::AnnotationsMoved(_))
    ));
    let limited = service
        .limit("db", None, Some(1 << 30))
        .await
        .expect("limited");
    assert_eq!(
        limited.record.limits,
        VolumeLimits::check(100, 1 << 30).expect("limits")
    );
    assert_eq!(daemon.spec(id).expect("open").limits, limited.record.limits);
    assert!(matches!(
        service.limit("db", Some(1), None).await,
        Err(VolumeError::Limits(_))
    ));
    drop(service);
    let service = daemon.start().await;
    let view = service.get("db").expect("there");
    assert_eq!(
        (
            view.annotations.revision,
            &view.annotations.entries["k"][..]
        ),
        (2, "second")
    );
    assert_eq!(daemon.spec(id).expect("open").limits, view.record.limits);
    service.delete("db").await.expect("deleted");
    let left = service.store.list(keys::ANNOTATIONS).await.expect("listed");
    assert!(left.entries.is_empty());
}

#[tokio::test]
async fn client_nodes_are_kept() {
    let daemon = Daemon::new();
    let service = daemon.start().await;
    let zone = |name: &str| BTreeMap::from([("zone".to_owned(), name.to_owned())]);
    let long = "n".repeat(256);
    for id in ["b", "a", &long] {
        service
            .register_node(node(id), zone("x"))
            .await
            .expect("registered");
    }
    service
        .register_node(node("a"), zone("y"))
        .await
        .expect("moved");
    drop(service);
    let service = daemon.start().await;
    let nodes = service.nodes().await.expect("listed");
    let seen: Vec<_> = nodes
        .iter()
        .map(|n| (n.id.as_str(), &n.topology["zone"][..]))
        .collect();
    assert_eq!(seen, [("a", "y"), ("b", "x"), (&long, "x")]);
}
