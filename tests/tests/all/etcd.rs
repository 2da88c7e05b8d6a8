//! The metadata store in etcd, against real etcds: the suite every implementation passes, and what happens when etcd
//! restarts, freezes, compacts, is another one or is not there.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use ashlar_core::records::{Revision, Transaction};
use ashlar_proto::etcd::CompactionRequest;
use ashlar_proto::etcd::kv_client::KvClient;
use ashlar_server::meta::{
    Change, EtcdConfig, EtcdStore, EtcdTls, MetadataError, MetadataStore, Outcome, WatchEnd,
    conformance,
};
use ashlar_tests::etcd::{Etcd, ServerTls};
use ashlar_tests::scratch::{Scratch, free_port};
use async_trait::async_trait;
use tokio::runtime::Runtime;

/// Much longer than anything takes here, so that only a store that waits for ever runs into it.
const LONG: Duration = Duration::from_secs(120);

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime")
}

fn config(endpoints: &[String], prefix: &str) -> EtcdConfig {
    EtcdConfig {
        endpoints: endpoints.to_vec(),
        prefix: prefix.to_owned(),
        request_timeout: Duration::from_secs(30),
        tls: EtcdTls::default(),
    }
}

fn open(etcd: &Etcd, prefix: &str) -> EtcdStore {
    EtcdStore::new(config(&[etcd.endpoint()], prefix)).expect("a store")
}

async fn commit(store: &dyn MetadataStore, transaction: Transaction) -> Revision {
    match store.commit(transaction).await {
        Ok(Outcome::Committed(revision)) => revision,
        other => panic!("not committed: {other:?}"),
    }
}

async fn compact(etcd: &Etcd, revision: Revision) {
    let mut client = KvClient::connect(etcd.endpoint()).await.expect("connects");
    let request = CompactionRequest {
        revision: i64::try_from(revision.0).expect("a revision"),
        physical: true,
    };
    client.compact(request).await.expect("compacts");
}

/// Every store is a prefix of its own in one etcd.
struct Prefixes {
    endpoint: String,
    count: AtomicU32,
}

impl Prefixes {
    fn store(&self, number: u32) -> Arc<dyn MetadataStore> {
        let prefix = format!("/ashlar/{number}/");
        let config = config(std::slice::from_ref(&self.endpoint), &prefix);
        Arc::new(EtcdStore::new(config).expect("a store"))
    }
}

#[async_trait]
impl conformance::Subject for Prefixes {
    async fn empty(&self) -> Arc<dyn MetadataStore> {
        self.store(self.count.fetch_add(1, Ordering::Relaxed) + 1)
    }

    async fn reopen(&self, store: Arc<dyn MetadataStore>) -> Arc<dyn MetadataStore> {
        drop(store);
        self.store(self.count.load(Ordering::Relaxed))
    }
}

#[test]
fn etcd_conforms() {
    let scratch = Scratch::new("etcd-conforms");
    let etcd = Etcd::start(&scratch);
    runtime().block_on(async {
        let subject = Prefixes {
            endpoint: etcd.endpoint(),
            count: AtomicU32::new(0),
        };
        conformance::check_all(&subject).await;
    });
}

#[test]
fn a_list_of_many_pages_is_of_one_moment_and_clusters_do_not_see_each_other() {
    let scratch = Scratch::new("etcd-pages");
    let etcd = Etcd::start(&scratch);
    runtime().block_on(async {
        let store = open(&etcd, "/a/");
        let neighbour = open(&etcd, "/a0/");
        commit(&neighbour, Transaction::new().put("k", b"x".to_vec())).await;
        for page in 0..4 {
            let hundred = (0..100).fold(Transaction::new(), |t, n| {
                t.put(format!("k{}", 1000 + page * 100 + n), vec![page as u8])
            });
            commit(&store, hundred).await;
        }
        let listing = store.list("").await.expect("list");
        assert_eq!(listing.entries.len(), 400);
        assert!(
            listing
                .entries
                .windows(2)
                .all(|pair| pair[0].key < pair[1].key)
        );
        assert_eq!(neighbour.list("").await.expect("list").entries.len(), 1);
    });
}

/// Swappers count up while etcd is killed and started again. An unknown outcome is read again, as the trait says. What
/// was answered as committed must be there, what was answered as not done must not, and a watch sees each revision once.
#[test]
fn restarts_under_load_lose_nothing_and_a_watch_goes_on() {
    const SWAPS: u64 = 200;
    let scratch = Scratch::new("etcd-restart");
    let mut etcd = Etcd::start(&scratch);
    let runtime = runtime();
    let store = runtime.block_on(async { Arc::new(open(&etcd, "/r/")) });
    let first = runtime.block_on(commit(
        &*store,
        Transaction::new().put("n", 0u64.to_be_bytes().to_vec()),
    ));
    let mut watch = runtime.block_on(store.watch("", first)).expect("watch");
    let watching = runtime.spawn(async move {
        let mut last = first;
        let mut values = Vec::new();
        while values.last() != Some(&SWAPS) {
            let batch = watch.next().await.expect("the watch goes on");
            assert!(batch.revision > last, "a revision twice");
            last = batch.revision;
            for change in batch.changes {
                let Change::Put { key, value } = change else {
                    panic!("nothing was deleted")
                };
                assert_eq!(key, "n");
                values.push(u64::from_be_bytes(value.try_into().expect("eight bytes")));
            }
        }
        values
    });
    let swapping = {
        let store = store.clone();
        runtime.spawn(async move {
            let mut unknown = 0;
            let mut value = 0u64;
            while value < SWAPS {
                let entry = match store.get("n").await {
                    Ok(entry) => entry.expect("there"),
                    Err(MetadataError::Unavailable { .. }) => continue,
                    Err(other) => panic!("{other}"),
                };
                let found = u64::from_be_bytes(entry.value.try_into().expect("eight bytes"));
                assert!(
                    found == value || found == value + 1,
                    "{value} was committed, {found} is there"
                );
                let next = found + 1;
                let swap = Transaction::new()
                    .when_unchanged("n", entry.changed_at)
                    .put("n", next.to_be_bytes().to_vec());
                value = match store.commit(swap).await {
                    Ok(Outcome::Committed(_)) => next,
                    // The only swapper: its own change, of which it did not know.
                    Ok(Outcome::Conflict) => panic!("a conflict with nobody"),
                    Err(MetadataError::Unavailable { .. }) => found,
                    Err(MetadataError::Unknown { .. }) => {
                        unknown += 1;
                        found
                    }
                    Err(other) => panic!("{other}"),
                };
            }
            unknown
        })
    };
    let mut restarts = 0;
    while !swapping.is_finished() && restarts < 4 {
        std::thread::sleep(Duration::from_millis(300));
        etcd.kill();
        etcd.run();
        restarts += 1;
    }
    let (unknown, values) = runtime.block_on(async {
        let done = async {
            (
                swapping.await.expect("swaps"),
                watching.await.expect("watch"),
            )
        };
        tokio::time::timeout(LONG, done).await.expect("in time")
    });
    println!("{restarts} restarts, {unknown} unknown outcomes");
    assert!(restarts > 0, "etcd was never restarted");
    let expected: Vec<u64> = (1..=SWAPS).collect();
    assert_eq!(values, expected, "each change once and in order");
}

#[test]
fn a_frozen_etcd_leaves_a_change_unknown_and_a_read_unavailable_within_the_deadline() {
    let scratch = Scratch::new("etcd-frozen");
    let mut etcd = Etcd::start(&scratch);
    runtime().block_on(async {
        let limited = EtcdConfig {
            request_timeout: Duration::from_secs(2),
            ..config(&[etcd.endpoint()], "/f/")
        };
        let store = EtcdStore::new(limited).expect("a store");
        // The first connection may need more than two seconds on a loaded machine.
        while store.get("a").await.is_err() {}
        etcd.freeze();
        let begun = Instant::now();
        let read = store.get("a").await;
        assert!(
            matches!(read, Err(MetadataError::Unavailable { .. })),
            "{read:?}"
        );
        let change = store.commit(Transaction::new().put("a", vec![1])).await;
        assert!(
            matches!(change, Err(MetadataError::Unknown { .. })),
            "{change:?}"
        );
        assert!(
            begun.elapsed() < LONG,
            "errors came after {:?}",
            begun.elapsed()
        );
        etcd.thaw();
        let settled = tokio::time::timeout(LONG, async {
            loop {
                if let Ok(entry) = store.get("a").await {
                    break entry;
                }
            }
        });
        // Either way, but one way: the member read the request from its socket when it was thawed, or it did not.
        println!("in the end: {:?}", settled.await.expect("etcd is back"));
    });
}

#[test]
fn an_etcd_that_is_not_there_is_an_error_within_the_deadline_and_nothing_was_done() {
    let endpoints = [1, 2].map(|_| format!("http://127.0.0.1:{}", free_port()));
    runtime().block_on(async {
        let limited = EtcdConfig {
            request_timeout: Duration::from_secs(1),
            ..config(&endpoints, "/n/")
        };
        let store = EtcdStore::new(limited).expect("a store");
        let begun = Instant::now();
        let read = store.get("a").await;
        assert!(
            matches!(&read, Err(MetadataError::Unavailable { reason }) if reason.contains("127.0.0.1")),
            "{read:?}"
        );
        let change = store.commit(Transaction::new().put("a", vec![])).await;
        assert!(
            matches!(change, Err(MetadataError::Unavailable { .. })),
            "a change that was never sent is not unknown: {change:?}"
        );
        let watch = store.watch("", Revision(0)).await.map(|_| ());
        assert!(
            matches!(watch, Err(MetadataError::Unavailable { .. })),
            "{watch:?}"
        );
        assert!(begun.elapsed() < LONG);
    });
}

#[test]
fn a_member_that_is_away_is_passed_over() {
    let scratch = Scratch::new("etcd-failover");
    let etcd = Etcd::start(&scratch);
    runtime().block_on(async {
        let nobody = format!("http://127.0.0.1:{}", free_port());
        let store = EtcdStore::new(config(&[nobody, etcd.endpoint()], "/m/")).expect("a store");
        let revision = commit(&store, Transaction::new().put("a", vec![1])).await;
        assert_eq!(
            store.get("a").await.expect("get").map(|e| e.changed_at),
            Some(revision)
        );
        store.watch("", revision).await.expect("watch");
    });
}

#[test]
fn an_etcd_of_another_cluster_is_not_listened_to() {
    let scratch = Scratch::new("etcd-other");
    let mut one = Etcd::start_named(&scratch, "one", None);
    let two = Etcd::start_named(&scratch, "two", None);
    runtime().block_on(async {
        let endpoints = [one.endpoint(), two.endpoint()];
        let limited = EtcdConfig {
            request_timeout: Duration::from_secs(3),
            ..config(&endpoints, "/o/")
        };
        let store = EtcdStore::new(limited).expect("a store");
        let wrote = async {
            loop {
                if let Ok(Outcome::Committed(revision)) =
                    store.commit(Transaction::new().put("a", vec![1])).await
                {
                    break revision;
                }
            }
        };
        tokio::time::timeout(LONG, wrote).await.expect("written");
        one.kill();
        let read = store.get("a").await;
        assert!(
            matches!(&read, Err(MetadataError::Unavailable { reason }) if reason.contains("belongs to cluster")),
            "the value of another etcd: {read:?}"
        );
    });
}

#[test]
fn a_compaction_under_a_watch_is_not_noticed_and_one_it_missed_ends_it() {
    let scratch = Scratch::new("etcd-compaction");
    let mut etcd = Etcd::start(&scratch);
    let runtime = runtime();
    let (store, first, mut watch) = runtime.block_on(async {
        let store = open(&etcd, "/c/");
        let first = commit(&store, Transaction::new().put("w/a", vec![0])).await;
        let mut watch = store.watch("w/", first).await.expect("watch");
        let mut last = first;
        for n in 1..=20u8 {
            last = commit(&store, Transaction::new().put("w/a", vec![n])).await;
        }
        compact(&etcd, last).await;
        let after = commit(&store, Transaction::new().put("w/a", vec![21])).await;
        for n in 1..=21u8 {
            let batch = tokio::time::timeout(LONG, watch.next()).await;
            let batch = batch.expect("in time").expect("the watch goes on");
            assert_eq!(
                batch.changes,
                [Change::Put {
                    key: "w/a".into(),
                    value: vec![n]
                }]
            );
        }
        // A new watch cannot begin before the compaction, and is told where it can.
        let early = store.watch("w/", first).await.map(|_| ());
        assert_eq!(early, Err(MetadataError::Compacted { oldest: last }));
        let mut from_oldest = store.watch("w/", last).await.expect("watch");
        assert_eq!(from_oldest.next().await.expect("batch").revision, after);
        let future = store.watch("w/", Revision(after.0 + 100)).await.map(|_| ());
        assert!(
            matches!(future, Err(MetadataError::Invalid { .. })),
            "{future:?}"
        );
        (store, first, watch)
    });
    assert!(first > Revision(0));
    // The watch's etcd is away while others change and compact what it has not seen.
    etcd.freeze();
    let blocked = runtime
        .block_on(async { tokio::time::timeout(Duration::from_millis(200), watch.next()).await });
    assert!(blocked.is_err(), "nothing happened yet: {blocked:?}");
    etcd.thaw();
    etcd.kill();
    etcd.run();
    runtime.block_on(async {
        // Another client: changes and a compaction, which the watch may or may not come back before.
        let other = open(&etcd, "/c/");
        let mut last = Revision(0);
        for n in 30..40u8 {
            last = commit(&other, Transaction::new().put("w/a", vec![n])).await;
        }
        compact(&etcd, last).await;
        loop {
            match tokio::time::timeout(LONG, watch.next())
                .await
                .expect("in time")
            {
                Ok(batch) if batch.revision == last => break,
                Ok(_) => {}
                Err(end) => {
                    assert_eq!(
                        end,
                        WatchEnd::Lagged,
                        "a watch that missed something says so"
                    );
                    break;
                }
            }
        }
        drop(store);
    });
}

#[test]
fn a_watch_ends_with_its_store() {
    let scratch = Scratch::new("etcd-watch-end");
    let etcd = Etcd::start(&scratch);
    runtime().block_on(async {
        let store = open(&etcd, "/e/");
        let mut watch = store.watch("", Revision(0)).await.expect("watch");
        drop(store);
        let end = tokio::time::timeout(LONG, watch.next()).await;
        assert_eq!(end.expect("in time"), Err(WatchEnd::Closed));
    });
}
