use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicU32;

use ashlar_core::nbd::session::Admitted;
use ashlar_core::placement::StoreSpace;
use ashlar_core::units::{Epoch, StoreId};
use async_trait::async_trait;

use ashlar_core::records::create;

use super::*;
use crate::meta::{SqliteStore, Watch};
use crate::nbd::{CatalogError, ExportCatalog};

/// A data plane that serves nothing but remembers what it was told.
#[derive(Default)]
struct Host {
    open: Mutex<BTreeMap<VolumeId, VolumeSpec>>,
    connections: Mutex<BTreeMap<VolumeId, u32>>,
    layers: Mutex<BTreeSet<LayerId>>,
    /// Epochs served so far: none may come twice for one volume.
    served: Mutex<BTreeSet<(VolumeId, Epoch)>>,
    refuse_drops: AtomicBool,
    /// What the stores were written under.
    written: Mutex<BTreeMap<LayerId, Epoch>>,
    /// Volumes that ask for a new epoch.
    wanted: Mutex<Vec<VolumeId>>,
    wants: tokio::sync::Notify,
    /// Volumes whose first change waits.
    changing: Mutex<Vec<VolumeId>>,
    changes: tokio::sync::Notify,
    recorded: tokio::sync::Notify,
    renewed: tokio::sync::Notify,
}

const STORE: StoreId = StoreId(Uuid::from_u128(0xabc));

#[async_trait]
impl VolumeHost for Host {
    async fn open_volume(&self, spec: VolumeSpec) -> Result<(), HostError> {
        assert!(
            lock(&self.served).insert((spec.id, spec.epoch)),
            "an epoch was served twice"
        );
        lock(&self.layers).extend(spec.layers.iter().copied());
        assert!(
            lock(&self.open).insert(spec.id, spec).is_none(),
            "opened twice"
        );
        Ok(())
    }

    async fn close_volume(&self, id: VolumeId) -> Result<(), HostError> {
        match lock(&self.connections).get(&id) {
            Some(&connections) if connections > 0 => Err(HostError::Busy { connections }),
            _ => lock(&self.open)
                .remove(&id)
                .map(drop)
                .ok_or(HostError::NotOpen),
        }
    }

    async fn epoch_wanted(&self) -> Option<VolumeId> {
        loop {
            if let Some(id) = lock(&self.wanted).pop() {
                return Some(id);
            }
            self.wants.notified().await;
        }
    }

    async fn renew_epoch(&self, id: VolumeId, epoch: Epoch) -> Result<(), HostError> {
        assert!(
            lock(&self.served).insert((id, epoch)),
            "an epoch was served twice"
        );
        let mut open = lock(&self.open);
        let spec = open.get_mut(&id).ok_or(HostError::NotOpen)?;
        assert!(spec.epoch < epoch);
        spec.epoch = epoch;
        self.renewed.notify_one();
        Ok(())
    }

    async fn admit(&self, id: VolumeId, admitted: Admitted) -> Result<(), HostError> {
        let connections = lock(&self.connections).get(&id).copied().unwrap_or(0);
        let mut open = lock(&self.open);
        let spec = open.get_mut(&id).ok_or(HostError::NotOpen)?;
        if connections > 0 && spec.admitted == Admitted::Anyone {
            return Err(HostError::Busy { connections });
        }
        spec.admitted = admitted;
        Ok(())
    }

    async fn fence(&self, id: VolumeId, admitted: Option<Admitted>) -> Result<u32, HostError> {
        let mut open = lock(&self.open);
        let spec = open.get_mut(&id).ok_or(HostError::NotOpen)?;
        if admitted.as_ref() == Some(&spec.admitted) {
            return Ok(0);
        }
        spec.admitted = admitted.unwrap_or_else(|| spec.admitted.clone());
        Ok(lock(&self.connections).remove(&id).unwrap_or(0))
    }

    async fn first_change(&self) -> Option<VolumeId> {
        loop {
            if let Some(id) = lock(&self.changing).pop() {
                return Some(id);
            }
            self.changes.notified().await;
        }
    }

    async fn first_change_recorded(&self, id: VolumeId) -> Result<(), HostError> {
        let mut open = lock(&self.open);
        let spec = open.get_mut(&id).ok_or(HostError::NotOpen)?;
        spec.never_written = false;
        self.recorded.notify_one();
        Ok(())
    }

    async fn set_limits(&self, id: VolumeId, limits: VolumeLimits) -> Result<(), HostError> {
        let mut open = lock(&self.open);
        open.get_mut(&id).ok_or(HostError::NotOpen)?.limits = limits;
        Ok(())
    }

    async fn open_replicated(&self, _: crate::data::ReplicatedSpec) -> Result<(), HostError> {
        unreachable!("these volumes have one copy")
    }

    async fn replication_event(&self) -> Option<crate::replication::ReplicationEvent> {
        std::future::pending().await
    }

    fn record_seen(&self, _: VolumeId, _: Option<Versioned<VolumeRecord>>) {}

    async fn forget_replicas(&self, _: VolumeId) {}

    async fn replication(&self, _: VolumeId) -> Option<crate::data::ReplicationStatus> {
        None
    }

    async fn resize_volume(&self, id: VolumeId, size_bytes: u64) -> Result<(), HostError> {
        lock(&self.open)
            .get_mut(&id)
            .map(|spec| spec.size_bytes = size_bytes)
            .ok_or(HostError::NotOpen)
    }

    fn rename_volume(&self, id: VolumeId, name: &str) {
        if let Some(spec) = lock(&self.open).get_mut(&id) {
            spec.name = name.to_owned();
        }
    }

    async fn delete_layer(&self, layer: LayerId) -> Result<(), HostError> {
        let open = lock(&self.open);
        assert!(
            open.values().all(|spec| !spec.layers.contains(&layer)),
            "a layer that is served was dropped"
        );
        if self.refuse_drops.load(Ordering::Relaxed) {
            return Err(HostError::Store {
                reason: "poisoned".to_owned(),
            });
        }
        lock(&self.layers).remove(&layer);
        Ok(())
    }

    fn runtime(&self, id: VolumeId) -> Option<VolumeRuntime> {
        let connections = lock(&self.connections).get(&id).copied().unwrap_or(0);
        lock(&self.open).get(&id).map(|_| VolumeRuntime {
            connections,
            inflight_requests: 0,
            resynced_bytes: 0,
        })
    }

    fn stores(&self) -> Vec<StoreId> {
        vec![STORE]
    }

    async fn store_groups(&self) -> Vec<Vec<StoreSpace>> {
        vec![
            vec![],
            vec![StoreSpace {
                id: STORE,
                free_blocks: 1000,
            }],
        ]
    }

    async fn layers(&self) -> Result<BTreeMap<LayerId, Epoch>, HostError> {
        let mut layers: BTreeMap<_, _> = lock(&self.layers)
            .iter()
            .map(|layer| (*layer, Epoch(0)))
            .collect();
        layers.extend(
            lock(&self.written)
                .iter()
                .map(|(layer, epoch)| (*layer, *epoch)),
        );
        Ok(layers)
    }
}

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
    let id = service
        .create("a", 4096, VolumeSettings::default())
        .await
        .expect("create")
        .record
        .id;
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
    let old = service
        .create("a", 4096, VolumeSettings::default())
        .await
        .expect("create")
        .record;
    drop(service);
    // What happened after the backup: the volume was opened often, and others were made.
    lock(&daemon.host.written).insert(old.live_layer(), Epoch(50));
    lock(&daemon.host.written).insert(LayerId(30), Epoch(2));
    let service = daemon.start().await;
    assert_eq!(daemon.spec(old.id).expect("open").epoch, Epoch(51));
    assert_eq!(service.unknown_layers(), [LayerId(30)]);
    let new = service
        .create("b", 4096, VolumeSettings::default())
        .await
        .expect("create")
        .record;
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
    service
        .create("a", 4096, VolumeSettings::default())
        .await
        .expect("create");
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

/// Is away for the next commits, so many as the number says.
struct Away(Arc<dyn MetadataStore>, AtomicU32);

#[async_trait]
impl MetadataStore for Away {
    async fn get(&self, key: &str) -> Result<Option<meta::Entry>, MetadataError> {
        self.0.get(key).await
    }

    async fn list(&self, prefix: &str) -> Result<meta::Listing, MetadataError> {
        self.0.list(prefix).await
    }

    async fn commit(&self, transaction: Transaction) -> Result<Outcome, MetadataError> {
        let less = |left: u32| left.checked_sub(1);
        if self
            .1
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less)
            .is_ok()
        {
            let reason = "away".to_owned();
            return Err(MetadataError::Unavailable { reason });
        }
        self.0.commit(transaction).await
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, MetadataError> {
        self.0.watch(prefix, after).await
    }
}

#[tokio::test]
async fn a_head_that_asks_gets_a_new_epoch_even_if_the_metadata_store_is_away_for_a_while() {
    let daemon = Daemon::new();
    let store = Arc::new(Away(daemon.store(), AtomicU32::new(0)));
    let service = daemon.start_over(store.clone()).await;
    let id = service
        .create("a", 4096, VolumeSettings::default())
        .await
        .expect("create")
        .record
        .id;
    daemon.connect(id, 1);
    for (failures, epoch) in [(0, 2), (1, 3)] {
        store.1.store(failures, Ordering::Relaxed);
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

/// Commits, and then says that it does not know.
struct Forgetful(Arc<dyn MetadataStore>);

#[async_trait]
impl MetadataStore for Forgetful {
    async fn get(&self, key: &str) -> Result<Option<meta::Entry>, MetadataError> {
        self.0.get(key).await
    }

    async fn list(&self, prefix: &str) -> Result<meta::Listing, MetadataError> {
        self.0.list(prefix).await
    }

    async fn commit(&self, transaction: Transaction) -> Result<Outcome, MetadataError> {
        match self.0.commit(transaction).await? {
            Outcome::Conflict => Ok(Outcome::Conflict),
            Outcome::Committed(_) => Err(MetadataError::Unknown {
                reason: "the answer was lost".to_owned(),
            }),
        }
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<Watch, MetadataError> {
        self.0.watch(prefix, after).await
    }
}

#[tokio::test]
async fn an_unknown_outcome_is_looked_up_and_not_assumed() {
    let daemon = Daemon::new();
    let store = daemon.store();
    node_record(&*store).await.expect("node");
    let service = daemon.start_over(Arc::new(Forgetful(store))).await;
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
        placement: Placement {
            stores: vec![StoreId(Uuid::from_u128(9))],
            sets: Vec::new(),
        },
        limits: VolumeLimits::default(),
        annotations: Annotations::default(),
    };
    store
        .commit(create(elsewhere, None, None).expect("create").transaction)
        .await
        .expect("commit");
    let service = daemon.start_over(store).await;
    service
        .create("near", 4096, VolumeSettings::default())
        .await
        .expect("others are served");
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

mod orchestration;
