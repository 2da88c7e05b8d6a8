mod host;
mod orchestration;
mod unsteady;

use std::collections::{BTreeMap, BTreeSet};

use ashlar_core::nbd::session::Admitted;
use ashlar_core::records::{NewVolume, Placement, VolumeState, create as decide_creation};
use ashlar_core::units::{Epoch, StoreId};
use host::Host;
use unsteady::Unsteady;

use super::*;
use crate::daemon::node_record;
use crate::meta::SqliteStore;
use crate::nbd::{CatalogError, ExportCatalog};

const STORE: StoreId = StoreId(Uuid::from_u128(0xabc));

struct Daemon {
    dir: tempfile::TempDir,
    host: Arc<Host>,
}

impl Daemon {
    fn new() -> Daemon {
        Daemon {
            dir: tempfile::tempdir().expect("temporary directory"),
            host: Arc::default(),
        }
    }

    fn store(&self) -> Arc<dyn MetadataStore> {
        Arc::new(SqliteStore::open(&self.dir.path().join("m.db")).expect("open"))
    }

    async fn start(&self) -> Arc<Volumes> {
        self.start_over(self.store()).await
    }

    async fn start_over(&self, store: Arc<dyn MetadataStore>) -> Arc<Volumes> {
        lock(&self.host.open).clear();
        let node = node_record(&*store).await.expect("node").id;
        let service = Volumes::start(
            store,
            self.host.clone(),
            node,
            false,
            &BTreeSet::new(),
            Events::default(),
        )
        .await
        .expect("start");
        service.catalog().check_invariants();
        service
    }

    fn spec(&self, id: VolumeId) -> Option<VolumeSpec> {
        lock(&self.host.open).get(&id).cloned()
    }

    fn connect(&self, id: VolumeId, connections: u32) {
        lock(&self.host.connections).insert(id, connections);
    }
}

/// Creates a volume of one block.
async fn create(service: &Arc<Volumes>, name: &str) -> VolumeRecord {
    let made = service.create(name, 4096, VolumeSettings::default()).await;
    made.expect("create").record
}

#[tokio::test]
async fn a_volume_lives_from_creation_to_deletion() {
    let daemon = Daemon::new();
    let service = daemon.start().await;
    let made = service
        .create(
            "db",
            5000,
            VolumeSettings {
                write_through: true,
                ..VolumeSettings::default()
            },
        )
        .await
        .expect("create");
    let id = made.record.id;
    assert_eq!(made.record.size_bytes, 8192, "rounded up to a block");
    assert_eq!(made.record.epoch, Epoch(1), "claimed before it was served");
    let spec = daemon.spec(id).expect("open");
    assert!(
        spec.write_through
            && !spec.read_only
            && spec.epoch == Epoch(1)
            && spec.placement.stores == [STORE]
    );

    service.rename("db", "base").await.expect("rename");
    assert!(matches!(
        service.get("db"),
        Err(VolumeError::NotFound { .. })
    ));
    assert_eq!(
        service
            .get(&id.0.to_string())
            .expect("by id")
            .record
            .name
            .as_str(),
        "base"
    );
    assert_eq!(daemon.spec(id).expect("open").name, "base");

    let (grown, before) = service.resize("base", 8193).await.expect("grow");
    assert_eq!((before, grown.record.size_bytes), (8192, 12288));
    assert_eq!(daemon.spec(id).expect("open").size_bytes, 12288);

    assert_eq!(service.delete("base").await, Ok(id));
    assert!(
        service.list().is_empty()
            && daemon.spec(id).is_none()
            && lock(&daemon.host.layers).is_empty()
    );
    service.catalog().check_invariants();
}

#[tokio::test]
async fn a_restart_serves_the_same_volumes_under_new_epochs() {
    let daemon = Daemon::new();
    let service = daemon.start().await;
    let ids: Vec<_> = {
        let mut ids = Vec::new();
        for number in 0..205 {
            ids.push(
                service
                    .create(&format!("v{number}"), 1 << 20, VolumeSettings::default())
                    .await
                    .expect("create")
                    .record
                    .id,
            );
        }
        ids
    };
    drop(service);
    let service = daemon.start().await;
    assert_eq!(service.list().len(), 205);
    for id in ids {
        assert_eq!(daemon.spec(id).expect("open").epoch, Epoch(2));
    }
}

#[tokio::test]
async fn what_is_taken_in_use_or_too_small_is_refused() {
    let daemon = Daemon::new();
    let service = daemon.start().await;
    let id = service
        .create("a", 1 << 20, VolumeSettings::default())
        .await
        .expect("create")
        .record
        .id;
    let refusal = service
        .create("a", 4096, VolumeSettings::default())
        .await
        .expect_err("taken")
        .to_string();
    assert!(refusal.contains("taken"), "{refusal}");
    assert!(matches!(
        service.create("A", 4096, VolumeSettings::default()).await,
        Err(VolumeError::Name(_))
    ));
    assert!(matches!(
        service.create("b", 0, VolumeSettings::default()).await,
        Err(VolumeError::Size(_))
    ));
    assert!(matches!(
        service.resize("a", 4096).await,
        Err(VolumeError::Resize(_))
    ));
    assert!(matches!(
        service.delete("none").await,
        Err(VolumeError::NotFound { .. })
    ));

    daemon.connect(id, 2);
    let refusal = service.delete("a").await.expect_err("in use").to_string();
    assert!(refusal.contains("2 connection"), "{refusal}");
    assert!(matches!(
        service.configure("a", Some(true), None).await,
        Err(VolumeError::Configure(_))
    ));
    assert!(daemon.spec(id).is_some(), "still served");
    service
        .configure("a", Some(false), None)
        .await
        .expect("nothing changes, so nobody is disturbed");

    daemon.connect(id, 0);
    let view = service
        .configure("a", Some(true), Some(true))
        .await
        .expect("idle");
    assert!(view.record.read_only && view.record.write_through);
    let spec = daemon.spec(id).expect("served again");
    assert!(spec.read_only && spec.write_through && spec.epoch == Epoch(2));
}

#[tokio::test]
async fn a_deletion_cut_short_is_finished_by_the_next_start() {
    let daemon = Daemon::new();
    let service = daemon.start().await;
    let id = create(&service, "a").await.id;
    daemon.host.refuse_drops.store(true, Ordering::Relaxed);
    assert!(matches!(
        service.delete("a").await,
        Err(VolumeError::NotFreed { .. })
    ));
    assert_eq!(
        service
            .get(&id.0.to_string())
            .expect("tombstone")
            .record
            .state,
        VolumeState::Deleting
    );
    assert_eq!(
        service.lookup("a").await.expect("look-up"),
        None,
        "a tombstone is no export"
    );
    // The name is free at once, and the layer is not the old one.
    let next = service
        .create("a", 4096, VolumeSettings::default())
        .await
        .expect("create");
    assert_ne!(next.record.id, id);
    service.catalog().check_invariants();
    drop(service);

    daemon.host.refuse_drops.store(false, Ordering::Relaxed);
    let store = daemon.store();
    let mut watch = store
        .watch(
            &keys::volume(id),
            store.list("").await.expect("list").revision,
        )
        .await
        .expect("watch");
    let service = daemon.start_over(store).await;
    watch.next().await.expect("the tombstone goes");
    drop(watch);
    while service.list().len() > 1 {
        tokio::task::yield_now().await;
    }
    assert_eq!(service.list()[0].record.id, next.record.id);
    assert_eq!(
        lock(&daemon.host.layers)
            .iter()
            .copied()
            .collect::<Vec<_>>(),
        next.record.layers
    );
}

#[tokio::test]
async fn metadata_from_an_old_backup_takes_no_epoch_and_no_layer_again() {
    let daemon = Daemon::new();
    let service = daemon.start().await;
    let old = create(&service, "a").await;
    drop(service);
    // What happened after the backup: the volume was opened often, and others were made.
    lock(&daemon.host.written).insert(old.live_layer(), Epoch(50));
    lock(&daemon.host.written).insert(LayerId(30), Epoch(2));
    let service = daemon.start().await;
    assert_eq!(daemon.spec(old.id).expect("open").epoch, Epoch(51));
    assert_eq!(service.unknown_layers(), [LayerId(30)]);
    let new = create(&service, "b").await;
    assert_eq!(new.live_layer(), LayerId(31));
    let view = service
        .configure("a", Some(true), None)
        .await
        .expect("opened again");
    assert_eq!(view.record.epoch, Epoch(52));
}

#[tokio::test]
async fn a_layer_nobody_names_is_reported_and_kept() {
    let daemon = Daemon::new();
    lock(&daemon.host.layers).insert(LayerId(77));
    let service = daemon.start().await;
    create(&service, "a").await;
    assert_eq!(service.unknown_layers(), [LayerId(77)]);
    assert!(lock(&daemon.host.layers).contains(&LayerId(77)));
}

#[tokio::test]
async fn many_at_once_get_a_layer_each_and_one_gets_the_name() {
    let daemon = Daemon::new();
    let service = daemon.start().await;
    let tasks: Vec<_> = (0..20)
        .map(|number| {
            let service = service.clone();
            let name = if number % 2 == 0 {
                "same".to_owned()
            } else {
                format!("v{number}")
            };
            tokio::spawn(
                async move { service.create(&name, 4096, VolumeSettings::default()).await },
            )
        })
        .collect();
    let mut refused = 0;
    for task in tasks {
        match task.await.expect("task") {
            Ok(_) => {}
            Err(VolumeError::Create(_)) => refused += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(refused, 9);
    let layers: BTreeSet<_> = service
        .list()
        .iter()
        .map(|view| view.record.live_layer())
        .collect();
    assert_eq!(layers.len(), 11);
}

#[tokio::test]
async fn exports_are_found_by_name_and_id_until_the_daemon_drains() {
    let daemon = Daemon::new();
    let service = daemon.start().await;
    let id = service
        .create(
            "a",
            4096,
            VolumeSettings {
                read_only: true,
                ..VolumeSettings::default()
            },
        )
        .await
        .expect("create")
        .record
        .id;
    let by_name = service.lookup("a").await.expect("look-up").expect("found");
    let by_id = service
        .lookup(&id.0.to_string())
        .await
        .expect("look-up")
        .expect("found");
    assert_eq!(by_name, by_id);
    assert!(by_name.read_only && by_name.size_bytes == 4096 && by_name.volume == id);
    assert_eq!(service.lookup("").await.expect("look-up"), None);
    assert_eq!(ExportCatalog::list(&*service).await.expect("list").len(), 1);
    service.drain().await;
    assert!(matches!(
        service.lookup("a").await,
        Err(CatalogError::ShuttingDown)
    ));
    assert_eq!(
        service.create("b", 4096, VolumeSettings::default()).await,
        Err(VolumeError::ShuttingDown)
    );
}

#[tokio::test]
async fn a_head_that_asks_gets_a_new_epoch_even_if_the_metadata_store_is_away_for_a_while() {
    let daemon = Daemon::new();
    let store = Arc::new(Unsteady::over(daemon.store()));
    let service = daemon.start_over(store.clone()).await;
    let id = create(&service, "a").await.id;
    daemon.connect(id, 1);
    for (failures, epoch) in [(0, 2), (1, 3)] {
        store.away.store(failures, Ordering::Relaxed);
        lock(&daemon.host.wanted).push(id);
        daemon.host.wants.notify_one();
        let renewed = daemon.host.renewed.notified();
        tokio::time::timeout(std::time::Duration::from_secs(30), renewed)
            .await
            .expect("renewed");
        assert_eq!(daemon.spec(id).expect("open").epoch, Epoch(epoch));
        assert_eq!(service.get("a").expect("there").record.epoch, Epoch(epoch));
    }
    // What was claimed is recorded: the next start claims a newer one.
    let recorded = meta::read::<VolumeRecord>(&*store, &keys::volume(id)).await;
    let recorded = recorded.expect("read").expect("there");
    assert_eq!(recorded.record.epoch, Epoch(3));
    // One that is gone is not asked for for ever.
    daemon.connect(id, 0);
    service.delete("a").await.expect("delete");
    lock(&daemon.host.wanted).push(id);
    daemon.host.wants.notify_one();
}

#[tokio::test]
async fn an_unknown_outcome_is_looked_up_and_not_assumed() {
    let daemon = Daemon::new();
    let store = daemon.store();
    node_record(&*store).await.expect("node");
    let service = daemon
        .start_over(Arc::new(Unsteady::forgetting(store)))
        .await;
    let made = service
        .create("a", 4096, VolumeSettings::default())
        .await
        .expect("it happened");
    assert_eq!((made.record.epoch, made.serving), (Epoch(1), Serving::Yes));
    service.resize("a", 8192).await.expect("it happened");
    service.rename("a", "b").await.expect("it happened");
    assert_eq!(service.get("b").expect("there").record.size_bytes, 8192);
}

#[tokio::test]
async fn a_volume_whose_store_is_missing_is_listed_with_the_reason() {
    let daemon = Daemon::new();
    let store = daemon.store();
    let elsewhere = NewVolume {
        id: VolumeId(Uuid::from_u128(5)),
        name: VolumeName::parse("far").expect("name"),
        size: round_up_to_block(4096).expect("size"),
        read_only: false,
        write_through: false,
        created_at_unix_ms: 0,
        replicas: 1,
        zones: Zones::default(),
        min_in_sync: None,
        placement: Placement {
            stores: vec![StoreId(Uuid::from_u128(9))],
            sets: Vec::new(),
        },
        limits: VolumeLimits::default(),
        annotations: Annotations::default(),
    };
    store
        .commit(
            decide_creation(elsewhere, None, None)
                .expect("create")
                .transaction,
        )
        .await
        .expect("commit");
    let service = daemon.start_over(store).await;
    create(&service, "near").await;
    let Serving::No(reason) = service.get("far").expect("listed").serving else {
        panic!("served from nowhere")
    };
    assert!(
        reason.contains("00000000-0000-0000-0000-000000000009"),
        "{reason}"
    );
    assert!(matches!(
        service.lookup("far").await,
        Err(CatalogError::Unavailable(_))
    ));
}
