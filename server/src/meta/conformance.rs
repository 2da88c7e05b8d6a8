//! What every implementation of [`MetadataStore`] must do, as tests any of them can be run through.
//!
//! [`check_all`] panics at the first thing that does not hold and says what. An implementation's own tests call it
//! with a [`Subject`] that opens stores of that implementation.

use std::sync::Arc;

use ashlar_core::records::{Revision, Transaction};
use async_trait::async_trait;

use super::{
    Batch, Change, KEY_MAX_BYTES, MetadataError, MetadataStore, Outcome, TRANSACTION_MAX_STEPS,
    VALUE_MAX_BYTES,
};

/// An implementation under test.
#[async_trait]
pub trait Subject: Sync {
    /// A store that holds nothing. Each call is a fresh one.
    async fn empty(&self) -> Arc<dyn MetadataStore>;

    /// What a new client sees after the store given was closed, or its client disconnected.
    async fn reopen(&self, store: Arc<dyn MetadataStore>) -> Arc<dyn MetadataStore>;
}

/// Runs every check.
pub async fn check_all(subject: &dyn Subject) {
    nothing_is_found_in_an_empty_store(&*subject.empty().await).await;
    a_committed_record_is_read_back(&*subject.empty().await).await;
    conditions_decide_and_a_conflict_changes_nothing(&*subject.empty().await).await;
    a_record_written_again_is_another_one(&*subject.empty().await).await;
    a_transaction_is_whole(&*subject.empty().await).await;
    the_revision_counts_changes_only(&*subject.empty().await).await;
    lists_are_ordered_and_bounded_by_the_prefix(&*subject.empty().await).await;
    one_of_many_swappers_wins_each_round(subject.empty().await).await;
    a_watch_sees_each_change_once_and_in_order(&*subject.empty().await).await;
    a_watch_begins_where_a_list_ended(&*subject.empty().await).await;
    wrong_requests_are_refused(&*subject.empty().await).await;
    everything_survives_a_reopening(subject).await;
}

async fn commit(store: &dyn MetadataStore, transaction: Transaction) -> Revision {
    match store.commit(transaction.clone()).await {
        Ok(Outcome::Committed(revision)) => revision,
        other => panic!("{transaction:?} should have been committed: {other:?}"),
    }
}

async fn conflict(store: &dyn MetadataStore, transaction: Transaction) {
    let outcome = store.commit(transaction.clone()).await;
    assert_eq!(
        outcome,
        Ok(Outcome::Conflict),
        "{transaction:?} should have met a conflict"
    );
}

async fn value(store: &dyn MetadataStore, key: &str) -> Option<Vec<u8>> {
    store.get(key).await.expect("get").map(|entry| entry.value)
}

async fn nothing_is_found_in_an_empty_store(store: &dyn MetadataStore) {
    assert_eq!(store.get("a").await, Ok(None));
    let listing = store.list("").await.expect("list");
    assert!(
        listing.entries.is_empty(),
        "an empty store lists {listing:?}"
    );
}

async fn a_committed_record_is_read_back(store: &dyn MetadataStore) {
    let bytes = vec![0, 255, b'"', 10];
    let revision = commit(store, Transaction::new().put("a/b", bytes.clone())).await;
    let entry = store.get("a/b").await.expect("get").expect("there");
    assert_eq!(
        (entry.key.as_str(), entry.value, entry.changed_at),
        ("a/b", bytes, revision)
    );
    commit(store, Transaction::new().put("empty", vec![])).await;
    assert_eq!(
        value(store, "empty").await,
        Some(vec![]),
        "an empty value is a value"
    );
}

async fn conditions_decide_and_a_conflict_changes_nothing(store: &dyn MetadataStore) {
    let first = commit(
        store,
        Transaction::new().when_absent("a").put("a", b"1".to_vec()),
    )
    .await;
    conflict(
        store,
        Transaction::new().when_absent("a").put("a", b"2".to_vec()),
    )
    .await;
    let second = commit(
        store,
        Transaction::new()
            .when_unchanged("a", first)
            .put("a", b"2".to_vec()),
    )
    .await;
    assert!(second > first, "revisions grow");
    conflict(
        store,
        Transaction::new()
            .when_unchanged("a", first)
            .put("a", b"3".to_vec()),
    )
    .await;
    conflict(
        store,
        Transaction::new()
            .when_unchanged("none", second)
            .put("a", b"3".to_vec()),
    )
    .await;
    let one_of_two = Transaction::new()
        .when_unchanged("a", second)
        .when_absent("a");
    conflict(
        store,
        one_of_two.put("a", b"3".to_vec()).put("b", b"3".to_vec()),
    )
    .await;
    assert_eq!(value(store, "a").await, Some(b"2".to_vec()));
    assert_eq!(value(store, "b").await, None);
    // A condition on one record and an effect on another.
    commit(
        store,
        Transaction::new()
            .when_unchanged("a", second)
            .when_absent("b")
            .put("b", b"4".to_vec()),
    )
    .await;
    let a = store.get("a").await.expect("get").expect("there");
    assert_eq!(
        a.changed_at, second,
        "a record that was only looked at is unchanged"
    );
}

async fn a_record_written_again_is_another_one(store: &dyn MetadataStore) {
    let first = commit(store, Transaction::new().put("a", b"same".to_vec())).await;
    commit(store, Transaction::new().delete("a")).await;
    let again = commit(store, Transaction::new().put("a", b"same".to_vec())).await;
    assert!(again > first);
    conflict(
        store,
        Transaction::new().when_unchanged("a", first).delete("a"),
    )
    .await;
    let rewritten = commit(store, Transaction::new().put("a", b"same".to_vec())).await;
    conflict(
        store,
        Transaction::new().when_unchanged("a", again).delete("a"),
    )
    .await;
    commit(
        store,
        Transaction::new()
            .when_unchanged("a", rewritten)
            .delete("a"),
    )
    .await;
    assert_eq!(value(store, "a").await, None);
}

async fn a_transaction_is_whole(store: &dyn MetadataStore) {
    commit(store, Transaction::new().put("old", b"x".to_vec())).await;
    let swap = Transaction::new()
        .delete("old")
        .put("new", b"x".to_vec())
        .put("count", b"1".to_vec());
    let revision = commit(store, swap).await;
    let listing = store.list("").await.expect("list");
    let found: Vec<_> = listing
        .entries
        .iter()
        .map(|entry| (entry.key.as_str(), entry.changed_at))
        .collect();
    assert_eq!(
        found,
        [("count", revision), ("new", revision)],
        "all effects carry one revision"
    );
}

async fn the_revision_counts_changes_only(store: &dyn MetadataStore) {
    let revision = commit(store, Transaction::new().put("a", vec![])).await;
    assert_eq!(commit(store, Transaction::new()).await, revision);
    assert_eq!(
        commit(store, Transaction::new().delete("none")).await,
        revision
    );
    conflict(store, Transaction::new().when_absent("a").delete("a")).await;
    assert_eq!(store.list("").await.expect("list").revision, revision);
}

async fn lists_are_ordered_and_bounded_by_the_prefix(store: &dyn MetadataStore) {
    for key in ["v/b", "v/a", "v", "v/", "u/z", "v0", "w", "v/a/c", "v/~"] {
        commit(store, Transaction::new().put(key, key.into())).await;
    }
    let listing = store.list("v/").await.expect("list");
    let keys: Vec<_> = listing
        .entries
        .iter()
        .map(|entry| entry.key.as_str())
        .collect();
    assert_eq!(keys, ["v/", "v/a", "v/a/c", "v/b", "v/~"]);
    assert!(
        listing
            .entries
            .iter()
            .all(|entry| entry.value == entry.key.as_bytes())
    );
    assert_eq!(store.list("").await.expect("list").entries.len(), 9);
    assert_eq!(store.list("nothing/").await.expect("list").entries.len(), 0);
}

async fn one_of_many_swappers_wins_each_round(store: Arc<dyn MetadataStore>) {
    const SWAPPERS: u64 = 8;
    const ROUNDS: u64 = 20;
    commit(
        &*store,
        Transaction::new().put("counter", 0u64.to_be_bytes().to_vec()),
    )
    .await;
    let swappers: Vec<_> = (0..SWAPPERS)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move {
                let mut won = 0;
                while won < ROUNDS {
                    let entry = store.get("counter").await.expect("get").expect("there");
                    let count = u64::from_be_bytes(entry.value.try_into().expect("eight bytes"));
                    let next = (count + 1).to_be_bytes().to_vec();
                    let swap = Transaction::new()
                        .when_unchanged("counter", entry.changed_at)
                        .put("counter", next);
                    if let Outcome::Committed(_) = store.commit(swap).await.expect("commit") {
                        won += 1;
                    }
                }
            })
        })
        .collect();
    for swapper in swappers {
        swapper.await.expect("swapper");
    }
    let count = value(&*store, "counter").await.expect("there");
    assert_eq!(
        count,
        (SWAPPERS * ROUNDS).to_be_bytes(),
        "two swappers won one round"
    );
}

async fn a_watch_sees_each_change_once_and_in_order(store: &dyn MetadataStore) {
    let before = commit(store, Transaction::new().put("w/before", vec![])).await;
    let mut watch = store.watch("w/", before).await.expect("watch");
    let put = commit(store, Transaction::new().put("w/a", b"1".to_vec())).await;
    commit(store, Transaction::new().put("other", b"1".to_vec())).await;
    conflict(
        store,
        Transaction::new()
            .when_absent("w/a")
            .put("w/a", b"x".to_vec()),
    )
    .await;
    let both = commit(
        store,
        Transaction::new()
            .put("w/b", b"2".to_vec())
            .delete("w/a")
            .put("z", vec![]),
    )
    .await;
    commit(store, Transaction::new().delete("w/none")).await;
    let last = commit(store, Transaction::new().delete("w/b")).await;
    let written = |key: &str, value: &[u8]| Change::Put {
        key: key.to_owned(),
        value: value.to_owned(),
    };
    let removed = |key: &str| Change::Deleted {
        key: key.to_owned(),
    };
    let expected = [
        Batch {
            revision: put,
            changes: vec![written("w/a", b"1")],
        },
        Batch {
            revision: both,
            changes: vec![written("w/b", b"2"), removed("w/a")],
        },
        Batch {
            revision: last,
            changes: vec![removed("w/b")],
        },
    ];
    for mut batch in expected {
        let mut seen = watch.next().await.expect("watch");
        // The order within one transaction is not promised: etcd sorts by key.
        batch.changes.sort_by_key(|change| format!("{change:?}"));
        seen.changes.sort_by_key(|change| format!("{change:?}"));
        assert_eq!(seen, batch);
    }
}

async fn a_watch_begins_where_a_list_ended(store: &dyn MetadataStore) {
    commit(store, Transaction::new().put("a", b"1".to_vec())).await;
    let listing = store.list("").await.expect("list");
    let missed = commit(store, Transaction::new().put("a", b"2".to_vec())).await;
    let mut watch = store.watch("", listing.revision).await.expect("watch");
    let later = commit(store, Transaction::new().put("a", b"3".to_vec())).await;
    assert_eq!(
        watch.next().await.expect("watch").revision,
        missed,
        "what happened before the watch began is seen"
    );
    assert_eq!(watch.next().await.expect("watch").revision, later);
}

async fn wrong_requests_are_refused(store: &dyn MetadataStore) {
    let invalid = |result: Result<(), MetadataError>, what: &str| {
        assert!(
            matches!(result, Err(MetadataError::Invalid { .. })),
            "{what}: {result:?}"
        );
    };
    let commit = async |transaction| store.commit(transaction).await.map(|_| ());
    invalid(store.get("").await.map(|_| ()), "empty key");
    invalid(
        store.get(&"k".repeat(KEY_MAX_BYTES + 1)).await.map(|_| ()),
        "long key",
    );
    invalid(store.get("ä").await.map(|_| ()), "key outside ASCII");
    invalid(store.list("a b").await.map(|_| ()), "prefix with a space");
    invalid(
        commit(Transaction::new().put("a", vec![]).delete("a")).await,
        "one key twice",
    );
    invalid(
        commit(Transaction::new().put("a", vec![0; VALUE_MAX_BYTES + 1])).await,
        "large value",
    );
    let many =
        (0..=TRANSACTION_MAX_STEPS).fold(Transaction::new(), |t, n| t.put(format!("k{n}"), vec![]));
    invalid(commit(many).await, "many steps");
    assert!(
        store.list("").await.expect("list").entries.is_empty(),
        "a refused transaction did something"
    );
    let allowed =
        (0..TRANSACTION_MAX_STEPS).fold(Transaction::new(), |t, n| t.put(format!("k{n}"), vec![]));
    commit(allowed).await.expect("as many steps as are allowed");
    commit(Transaction::new().put("large", vec![7; VALUE_MAX_BYTES]))
        .await
        .expect("as large as is allowed");
}

async fn everything_survives_a_reopening(subject: &dyn Subject) {
    let store = subject.empty().await;
    let first = commit(
        &*store,
        Transaction::new()
            .put("a", b"1".to_vec())
            .put("gone", vec![]),
    )
    .await;
    let second = commit(
        &*store,
        Transaction::new().put("b", b"2".to_vec()).delete("gone"),
    )
    .await;
    let store = subject.reopen(store).await;
    let listing = store.list("").await.expect("list");
    let found: Vec<_> = listing
        .entries
        .iter()
        .map(|e| (e.key.as_str(), &e.value[..], e.changed_at))
        .collect();
    assert_eq!(found, [("a", &b"1"[..], first), ("b", &b"2"[..], second)]);
    assert_eq!(listing.revision, second);
    let mut watch = store.watch("", first).await.expect("watch");
    assert_eq!(
        watch.next().await.expect("watch").revision,
        second,
        "changes are kept across a reopening"
    );
    let third = commit(
        &*store,
        Transaction::new().when_unchanged("b", second).delete("b"),
    )
    .await;
    assert!(third > second);
}
