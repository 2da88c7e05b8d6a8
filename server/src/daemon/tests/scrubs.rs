//! When stores are verified, by whom, and what is told of it.

use super::*;

/// Makes a volume of 8 MiB and writes these blocks of it.
async fn write_blocks(dir: &Path, admin: &mut AdminClient<Channel>, blocks: std::ops::Range<u64>) {
    let made = admin.create_volume(create("a", 8 << 20)).await;
    made.expect("create");
    let mut stream = connect_nbd(&dir.join("d/nbd.sock"), "a");
    for block in blocks {
        assert_eq!(write_block(&mut stream, block, 7), 0);
    }
}

/// The verification of the one store, as soon as it is `wanted`.
async fn scrub_when(
    admin: &mut AdminClient<Channel>,
    wanted: impl Fn(&StoreScrub) -> bool,
) -> StoreScrub {
    let samples = admin.watch_stats(WatchStatsRequest { interval_ms: 100 });
    let mut samples = samples.await.expect("watch").into_inner();
    let seen = async {
        loop {
            let sample = samples.message().await.expect("sample").expect("sample");
            let scrub = sample.stores[0].scrub.expect("told");
            if wanted(&scrub) {
                return scrub;
            }
        }
    };
    tokio::time::timeout(PATIENCE, seen)
        .await
        .expect("it comes to that")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stores_are_verified_by_themselves_and_a_restart_remembers() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (daemon, mut admin, _) = start_with(dir.path(), &["--scrub-every=1s"]).await;
    let fresh = scrub_when(&mut admin, |_| true).await;
    assert!(fresh.next_at_unix_ms > 0, "{fresh:?}");
    write_blocks(dir.path(), &mut admin, 0..64).await;
    let first = scrub_when(&mut admin, |scrub| scrub.last_verified_bytes >= 64 * 4096).await;
    assert_eq!(first.last_damaged_blocks, 0);
    let second = scrub_when(&mut admin, |scrub| {
        scrub.last_finished_at_unix_ms >= first.last_finished_at_unix_ms + 1000
    })
    .await;
    assert!(second.running || second.next_at_unix_ms > second.last_finished_at_unix_ms);
    stop(daemon).await;

    let (daemon, mut admin, _) = start_with(dir.path(), &["--scrub-every=off"]).await;
    let kept = scrub_when(&mut admin, |_| true).await;
    assert!(kept.last_finished_at_unix_ms >= second.last_finished_at_unix_ms);
    assert_eq!(
        (kept.last_verified_bytes, kept.next_at_unix_ms, kept.running),
        (64 * 4096, 0, false)
    );
    // One that somebody asks for counts as well.
    let everything = ScrubRequest {
        store_id: String::new(),
        rate_bytes_per_second: 0,
    };
    let mut scrub = admin.scrub(everything).await.expect("scrub").into_inner();
    while scrub.message().await.expect("progress").is_some() {}
    let asked = scrub_when(&mut admin, |scrub| {
        scrub.last_finished_at_unix_ms > kept.last_finished_at_unix_ms
    })
    .await;
    assert_eq!(asked.next_at_unix_ms, 0);
    stop(daemon).await;

    let (daemon, mut admin, _) = start_with(dir.path(), &["--scrub-every=2d"]).await;
    let kept = scrub_when(&mut admin, |_| true).await;
    assert_eq!(
        kept.next_at_unix_ms,
        asked.last_finished_at_unix_ms + 2 * 86_400_000
    );
    stop(daemon).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scrub_that_is_interrupted_is_begun_again() {
    let dir = tempfile::tempdir().expect("temporary directory");
    // Some 20 seconds for what is written below.
    let slow = ["--scrub-every=1s", "--scrub-rate=64KiB"];
    let (daemon, mut admin, _) = start_with(dir.path(), &slow).await;
    write_blocks(dir.path(), &mut admin, 0..320).await;
    scrub_when(&mut admin, |scrub| scrub.running && scrub.done_bytes > 0).await;
    let begun = std::time::Instant::now();
    stop(daemon).await;
    assert!(
        begun.elapsed() < Duration::from_secs(10),
        "it was not waited for"
    );

    let (daemon, mut admin, _) = start_with(dir.path(), &["--scrub-every=1s"]).await;
    let whole = scrub_when(&mut admin, |scrub| scrub.last_verified_bytes > 0).await;
    assert_eq!(
        (whole.last_verified_bytes, whole.last_damaged_blocks),
        (320 * 4096, 0)
    );
    stop(daemon).await;
}

/// The end of what a scrub tells.
async fn end_of(mut scrub: tonic::Streaming<ScrubProgress>) -> Result<ScrubProgress, Status> {
    let told = async {
        let mut last = None;
        while let Some(progress) = scrub.message().await? {
            last = Some(progress);
        }
        Ok(last.expect("progress"))
    };
    tokio::time::timeout(PATIENCE, told).await.expect("it ends")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scrub_that_another_one_replaces_is_not_told_as_complete() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (daemon, mut admin, _) = start_with(dir.path(), &["--scrub-every=off"]).await;
    // Of two leaves: the second waits for the rate.
    write_blocks(dir.path(), &mut admin, 400..600).await;
    let asked = |rate_bytes_per_second| ScrubRequest {
        store_id: String::new(),
        rate_bytes_per_second,
    };
    let slow = || asked(64 << 10);
    let begun = async |admin: &mut AdminClient<Channel>, request| {
        let scrub = admin.scrub(request).await;
        let mut scrub = scrub.expect("scrub").into_inner();
        let first = scrub.message().await.expect("progress");
        (first.expect("progress"), scrub)
    };
    let (first, replaced) = begun(&mut admin, slow()).await;
    assert!(!first.finished, "{first:?}");
    let (second, cancelled) = begun(&mut admin, slow()).await;
    assert!(!second.finished, "{second:?}");
    assert_eq!(code(end_of(replaced).await), Code::Aborted);
    // Whoever was replaced ends nobody else's; who cancels ends his own.
    scrub_when(&mut admin, |scrub| scrub.running).await;
    drop(cancelled);
    scrub_when(&mut admin, |scrub| !scrub.running).await;

    let (_, replaced) = begun(&mut admin, slow()).await;
    let whole = admin.scrub(asked(1 << 30)).await;
    let whole = end_of(whole.expect("scrub").into_inner()).await;
    let whole = whole.expect("complete");
    assert_eq!((whole.finished, whole.done_bytes), (true, 200 * 4096));
    assert_eq!(code(end_of(replaced).await), Code::Aborted);
    stop(daemon).await;
}
