//! What becomes of tails when a data plane stops.

use std::path::PathBuf;

use super::*;

fn tails(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).expect("a directory");
    let paths = entries.map(|entry| entry.expect("an entry").path());
    paths
        .filter(|path| path.extension().is_some_and(|end| end == "tail"))
        .collect()
}

#[test]
fn a_stop_in_order_leaves_no_tail() {
    let dir = tempfile::tempdir().expect("dir");
    let config = config(dir.path(), 2);
    let size = 192 * MIB;
    for epoch in 1..=3 {
        let (runtime, plane) = start(config.clone());
        assert!(plane.stores().iter().all(|store| store.report.clean));
        assert_eq!(tails(dir.path()).len(), 2, "one for each store");
        runtime
            .block_on(plane.open_volume(spec(&plane, size, epoch)))
            .expect("open");
        let mut client = Client::attach(&plane, ReplyStyle::Simple, size);
        for chunk in 0..3 {
            let before = vec![epoch as u8 - 1; 4096];
            assert_eq!(client.read(chunk * 64 * MIB, 4096), before);
            client.write(0, chunk * 64 * MIB, &[epoch as u8; 4096]);
        }
        runtime.block_on(plane.drain());
        assert_eq!(tails(dir.path()), [] as [PathBuf; 0]);
    }
}

/// What was answered and did not reach the log is in the tail, and nowhere else.
#[test]
fn a_stop_of_a_poisoned_store_keeps_its_tail() {
    let dir = tempfile::tempdir().expect("dir");
    let mut config = config(dir.path(), 1);
    let trigger = dir.path().join("now");
    let plan = format!("write:when={},errno=EIO,count=all", trigger.display());
    config.fault = Some(plan.parse().expect("plan"));
    let (runtime, plane) = start(config.clone());
    let size = 64 * MIB;
    runtime
        .block_on(plane.open_volume(spec(&plane, size, 1)))
        .expect("open");
    let mut client = Client::attach(&plane, ReplyStyle::Simple, size);
    client.write(command_flag::FUA, 0, &[1; 4096]);
    std::fs::write(&trigger, b"").expect("trigger");
    client.write(0, 0, &[2; 4096]);
    runtime.block_on(plane.drain());
    assert_eq!(tails(dir.path()).len(), 1);

    config.fault = None;
    let (runtime, plane) = start(config);
    runtime
        .block_on(plane.open_volume(spec(&plane, size, 2)))
        .expect("open");
    let mut client = Client::attach(&plane, ReplyStyle::Simple, size);
    assert_eq!(client.read(0, 4096), vec![2; 4096]);
    runtime.block_on(plane.drain());
    assert_eq!(tails(dir.path()), [] as [PathBuf; 0]);
}

/// A drain that runs out of patience closes no store in order: something may have been answered behind its checkpoint.
#[test]
fn a_stop_under_requests_keeps_the_tail() {
    let dir = tempfile::tempdir().expect("dir");
    let mut config = config(dir.path(), 1);
    config.drain_timeout = Duration::from_millis(1);
    let trigger = dir.path().join("now");
    let plan = format!("read:when={},count=all,delay_ms=3000", trigger.display());
    config.fault = Some(plan.parse().expect("plan"));
    let (runtime, plane) = start(config.clone());
    let size = 64 * MIB;
    runtime
        .block_on(plane.open_volume(spec(&plane, size, 1)))
        .expect("open");
    let mut client = Client::attach(&plane, ReplyStyle::Simple, size);
    client.write(command_flag::FUA, 0, &[1; 4096]);
    std::fs::write(&trigger, b"").expect("trigger");
    client.send(command::READ, 0, 0, 4096, &[]);
    runtime.block_on(plane.drain());
    assert_eq!(tails(dir.path()).len(), 1);
}
