//! The metadata store in etcd, against real etcds: the suite every implementation passes, and what happens when etcd
//! restarts, freezes, compacts, is another one or is not there.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ashlar_core::records::{Revision, Transaction};
use ashlar_proto::etcd::CompactionRequest;
use ashlar_proto::etcd::kv_client::KvClient;
use ashlar_server::meta::{
    Change, EtcdConfig, EtcdStore, EtcdTls, MetadataError, MetadataStore, Outcome, WatchEnd,
    conformance,
};
use ashlar_tests::certificate::Authority;
use ashlar_tests::daemon::Setup;
use ashlar_tests::etcd::{Etcd, ServerTls};
use ashlar_tests::nbd::Wishes;
use ashlar_tests::scratch::{Scratch, free_port};
use ashlar_tests::wait;
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
        // The first and the last page change while they are listed, always together.
        let both = |n: u64| {
            let value = n.to_be_bytes().to_vec();
            Transaction::new()
                .put("k1000", value.clone())
                .put("k1399", value)
        };
        commit(&store, both(0)).await;
        let changed = Arc::new(AtomicU64::new(0));
        let changing = {
            let (store, changed) = (open(&etcd, "/a/"), changed.clone());
            tokio::spawn(async move {
                for n in 1.. {
                    commit(&store, both(n)).await;
                    changed.store(n, Ordering::Relaxed);
                }
            })
        };
        let (begun, mut lists) = (Instant::now(), 0);
        while lists < 50 || changed.load(Ordering::Relaxed) < 50 {
            let entries = store.list("").await.expect("list").entries;
            assert_eq!(entries.len(), 400);
            assert!(entries.windows(2).all(|pair| pair[0].key < pair[1].key));
            assert_eq!(entries[0].value, entries[399].value, "of two moments");
            assert!(begun.elapsed() < LONG, "too few changes");
            lists += 1;
        }
        assert!(!changing.is_finished(), "nothing changes any more");
        changing.abort();
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
    let progress = Arc::new(AtomicU64::new(0));
    // Up to where they may count: they are not through before the last restart, however fast they are.
    let (allow, mut allowed) = tokio::sync::watch::channel(SWAPS * 2 / 5 - 1);
    let swapping = {
        let (store, progress) = (store.clone(), progress.clone());
        runtime.spawn(async move {
            let mut unknown = 0;
            let mut value = 0u64;
            while value < SWAPS {
                let more = allowed.wait_for(|most| value < *most).await;
                more.expect("the test goes on");
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
                progress.store(value, Ordering::Relaxed);
            }
            unknown
        })
    };
    for part in 1..=4 {
        wait::until(LONG, "the swappers get on", || {
            let value = progress.load(Ordering::Relaxed);
            if value >= SWAPS * part / 5 {
                Ok(())
            } else {
                Err(format!("{value} before restart {part}"))
            }
        });
        assert!(!swapping.is_finished(), "all over before restart {part}");
        allow.send_replace(SWAPS * (part + 2) / 5 - 1);
        etcd.kill();
        etcd.run();
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
    println!("{unknown} unknown outcomes");
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
        let connected = async { while store.get("a").await.is_err() {} };
        let connected = tokio::time::timeout(LONG, connected).await;
        connected.expect("etcd answers");
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
        let store = EtcdStore::new(config(&endpoints, "/o/")).expect("a store");
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
fn a_compaction_under_a_watch_is_not_noticed() {
    let scratch = Scratch::new("etcd-compaction");
    let etcd = Etcd::start(&scratch);
    runtime().block_on(async {
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
    });
}

/// Passes one TCP port on to another, until it is cut.
struct Line {
    port: u16,
    cut: tokio::sync::watch::Sender<bool>,
}

impl Line {
    async fn to(endpoint: &str) -> Line {
        let target = endpoint.strip_prefix("http://").expect("plain").to_owned();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .expect("bind");
        let port = listener.local_addr().expect("address").port();
        let (cut, is_cut) = tokio::sync::watch::channel(false);
        tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let (target, mut is_cut) = (target.clone(), is_cut.clone());
                tokio::spawn(async move {
                    let through = async {
                        let mut far = tokio::net::TcpStream::connect(target).await?;
                        tokio::io::copy_bidirectional(&mut near, &mut far).await
                    };
                    tokio::select! {
                        biased;
                        _ = is_cut.wait_for(|cut| *cut) => {}
                        _ = through => {}
                    }
                });
            }
        });
        Line { port, cut }
    }
}

#[test]
fn a_watch_goes_on_after_its_line_was_cut_unless_a_compaction_took_what_it_missed() {
    let scratch = Scratch::new("etcd-line");
    let etcd = Etcd::start(&scratch);
    runtime().block_on(async {
        let line = Line::to(&etcd.endpoint()).await;
        let far = format!("http://127.0.0.1:{}", line.port);
        let store = EtcdStore::new(config(&[far], "/l/")).expect("a store");
        let direct = open(&etcd, "/l/");
        let first = commit(&direct, Transaction::new().put("a", vec![0])).await;
        let mut watch = store.watch("", first).await.expect("watch");

        line.cut.send_replace(true);
        let missed = commit(&direct, Transaction::new().put("a", vec![1])).await;
        line.cut.send_replace(false);
        let batch = tokio::time::timeout(LONG, watch.next())
            .await
            .expect("in time");
        assert_eq!(batch.expect("it goes on").revision, missed);

        line.cut.send_replace(true);
        commit(&direct, Transaction::new().delete("a")).await;
        let last = commit(&direct, Transaction::new().put("b", vec![2])).await;
        compact(&etcd, last).await;
        line.cut.send_replace(false);
        let end = tokio::time::timeout(LONG, watch.next())
            .await
            .expect("in time");
        assert_eq!(
            end,
            Err(WatchEnd::Lagged),
            "a deletion was missed in silence"
        );
    });
}

#[test]
fn etcd_over_tls_wants_the_right_authority_and_a_certificate() {
    let scratch = Scratch::new("etcd-tls");
    let authority = Authority::new("etcd authority");
    let server = authority.issue(scratch.path(), "server", &[], false);
    let client = authority.issue(scratch.path(), "client", &[], false);
    let tls = ServerTls {
        certificate: server.certificate,
        key: server.key,
        client_authority: authority.write(&scratch.join("ca.pem")),
    };
    let etcd = Etcd::start_named(&scratch, "tls", Some(tls));
    let read = |path: &std::path::Path| std::fs::read(path).expect("a file");
    let identity = (read(&client.certificate), read(&client.key));
    let with = |authority: &Authority, identity| EtcdConfig {
        request_timeout: Duration::from_secs(3),
        tls: EtcdTls {
            authority: Some(authority.pem().into_bytes()),
            identity,
        },
        ..config(&[etcd.endpoint()], "/t/")
    };
    runtime().block_on(async {
        let right = EtcdConfig {
            request_timeout: Duration::from_secs(60),
            ..with(&authority, Some(identity.clone()))
        };
        let store = EtcdStore::new(right).expect("a store");
        commit(&store, Transaction::new().put("a", vec![1])).await;
        let foreign = Authority::new("somebody else");
        for wrong in [with(&foreign, Some(identity)), with(&authority, None)] {
            let store = EtcdStore::new(wrong).expect("a store");
            let read = store.get("a").await;
            assert!(
                matches!(read, Err(MetadataError::Unavailable { .. })),
                "{read:?}"
            );
        }
    });
}

/// A daemon keeps its records in etcd: an outage stops no I/O, changes meanwhile are refused, and nothing is forgotten.
#[test]
fn a_daemon_serves_through_an_outage_of_etcd() {
    let scratch = Scratch::new("etcd-daemon");
    let mut etcd = Etcd::start(&scratch);
    let mut daemon = Setup::default()
        .args(["--metadata", &etcd.setting(), "--etcd-prefix", "/one"])
        .args(["--listen-link", "127.0.0.1:0"])
        .prepare("etcd-daemon-d");
    let refusal = daemon.start_refused();
    assert!(refusal.contains("belongs to no cluster"), "{refusal}");
    ashlar_tests::cluster::found(&daemon, &etcd, &["--etcd-prefix", "/one"]);
    daemon.start();
    daemon.create("disk", "64MiB");
    let mut client = daemon.open_when_served("disk", Wishes::SIMPLE);
    client.write(4096, b"before").expect("write");
    etcd.kill();
    client
        .write(8192, b"during")
        .expect("no I/O waits for etcd");
    client.flush().expect("flush");
    assert_eq!(client.read(4096, 6).expect("read"), b"before");
    let refusal = daemon
        .admin()
        .refused(["volume", "create", "other", "--size", "1MiB"]);
    assert!(refusal.contains("etcd at http://"), "{refusal}");
    etcd.run();
    daemon.create("other", "1MiB");
    daemon.kill();
    daemon.start();
    let mut client = daemon.open_when_served("disk", Wishes::SIMPLE);
    assert_eq!(client.read(8192, 6).expect("read"), b"during");
    daemon.open_when_served("other", Wishes::SIMPLE);
    daemon.stop();
    // Without it nothing can be served; with it again, all is.
    etcd.kill();
    daemon
        .log
        .expect("nothing is served before the cluster's records");
    daemon.spawn();
    wait::until(LONG, "it says what it waits for", || {
        let log = daemon.log.text();
        let says =
            log.contains("trying again error=the metadata store is not available: etcd at http://");
        says.then_some(()).ok_or(log)
    });
    etcd.run();
    daemon.wait_ready();
    daemon.open_when_served("disk", Wishes::SIMPLE);
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
