//! Starting again after much was written.

use std::time::Duration;

use ashlar_tests::daemon::{Daemon, Setup};
use ashlar_tests::fio::Fio;
use ashlar_tests::nbd::Wishes;
use ashlar_tests::wait;

/// The promise is under 2 s with 20 GiB written (`ASHLAR_TESTS_RESTART_GIB=20` repeats it); by default less is written, to
/// a store that is smaller than that, so that segments were cleaned and reused.
#[test]
fn a_restart_is_quick_however_much_was_written() {
    let gib: u64 = std::env::var("ASHLAR_TESTS_RESTART_GIB")
        .ok()
        .map_or(3, |text| text.parse().expect("a number"));
    let mut daemon = Setup::default()
        .store_size(if gib > 3 { "32GiB" } else { "2GiB" })
        .start("restart");
    let volume_gib = if gib > 3 { gib } else { 1 };
    daemon.create("disk", &format!("{volume_gib}GiB"));
    let uri = daemon.uri("disk");
    for _ in 0..gib / volume_gib {
        Fio::plain(&uri)
            .args([
                "--rw=randwrite",
                "--bs=128k",
                "--iodepth=16",
                &format!("--size={volume_gib}g"),
            ])
            .succeed();
    }
    Fio::plain(&uri)
        .args([
            "--rw=randwrite",
            "--bs=4k",
            "--iodepth=32",
            &format!("--size={volume_gib}g"),
            "--io_size=128m",
        ])
        .succeed();
    let mut client = daemon.open("disk", Wishes::SIMPLE);
    client.write(12_345, b"the last word").unwrap();
    daemon.kill();
    let killed = daemon.start();
    assert_eq!(
        daemon
            .open("disk", Wishes::SIMPLE)
            .read(12_345, 13)
            .unwrap(),
        b"the last word"
    );
    let drained = daemon.stop();
    let stopped = daemon.start();
    println!(
        "{gib} GiB written: {killed:?} to start after kill -9, {stopped:?} after SIGTERM, which took {drained:?}"
    );
    for took in [killed, stopped] {
        // Generous: other tests use the same disk meanwhile.
        assert!(took < Duration::from_secs(6), "{took:?}");
    }
}

/// What a daemon keeps in memory it gives back when it stops cleanly, and not when it is killed.
#[test]
fn a_clean_stop_leaves_nothing_in_memory() {
    let mut daemon = Setup::default().store_size("256MiB").start("no-tail");
    daemon.create("disk", "8MiB");
    let left = |daemon: &ashlar_tests::daemon::Daemon| {
        let entries = std::fs::read_dir(daemon.scratch.memory()).unwrap();
        entries.count()
    };
    let written = |daemon: &ashlar_tests::daemon::Daemon, word: &[u8]| {
        let mut client = daemon.open("disk", Wishes::SIMPLE);
        client.write(100, word).unwrap();
    };
    written(&daemon, b"first");
    assert_eq!(left(&daemon), 1);
    daemon.kill();
    assert_eq!(left(&daemon), 1);
    daemon.start();
    assert_eq!(
        daemon.open("disk", Wishes::SIMPLE).read(100, 5).unwrap(),
        b"first"
    );
    written(&daemon, b"after");
    daemon.stop();
    assert_eq!(left(&daemon), 0);
    daemon.start();
    assert_eq!(
        daemon.open("disk", Wishes::SIMPLE).read(100, 5).unwrap(),
        b"after"
    );
    daemon.stop();
    assert_eq!(left(&daemon), 0);
}

/// Data of a previous life may be needed at once: clients that connect during the start are served or refused, not hung.
#[test]
fn clients_that_come_too_early() {
    let mut daemon = Setup::default().start("early");
    daemon.create("disk", "64MiB");
    daemon
        .open("disk", Wishes::SIMPLE)
        .write(0, b"early")
        .unwrap();
    for _ in 0..5 {
        daemon.kill();
        daemon.spawn();
        let read = wait::until(Duration::from_secs(30), "served", || {
            let mut client = daemon
                .try_open("disk", Wishes::SIMPLE)
                .map_err(|error| error.to_string())?;
            client
                .read(0, 5)
                .map_err(|error| panic!("an answer before the data is there: {error}"))
        });
        assert_eq!(read, b"early");
        daemon.wait_ready();
    }
}

/// What a power cut takes, a killed daemon still has: only of the first are clients told.
#[test]
fn clients_are_told_of_a_power_cut_and_of_nothing_else() {
    let mut daemon = Setup::default().store_size("256MiB").start("told");
    daemon.create("disk", "8MiB");
    daemon.create("through", "8MiB");
    let admin = daemon.admin();
    admin.run(["volume", "set", "through", "--write-through"]);
    let generation = |daemon: &Daemon, name: &str| {
        let shown = daemon.admin().json(["volume", "show", name]);
        shown["client_generation"].as_u64().expect("a number")
    };
    let write = |daemon: &Daemon, number: u8| {
        let mut client = daemon.open("disk", Wishes::SIMPLE);
        client.write(0, &[number; 4096]).unwrap();
    };
    write(&daemon, 1);
    daemon.kill();
    daemon.start();
    daemon.stop();
    daemon.start();
    assert_eq!(generation(&daemon, "disk"), 0);

    // Another boot, after an orderly stop and after none.
    let booted_anew = |daemon: &mut Daemon| {
        let file = daemon.scratch.join("boot_id");
        let id = std::fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap();
        std::fs::write(&file, id).unwrap();
        daemon.setup.booted_as(&file);
    };
    daemon.stop();
    booted_anew(&mut daemon);
    daemon.start();
    assert_eq!(generation(&daemon, "disk"), 0);
    write(&daemon, 2);
    daemon.kill();
    booted_anew(&mut daemon);
    daemon.log.expect("the machine lost power");
    daemon.start();
    assert_eq!(generation(&daemon, "disk"), 1);
    // It never answered what was not durable.
    assert_eq!(generation(&daemon, "through"), 0);
    daemon.kill();
    daemon.start();
    assert_eq!(generation(&daemon, "disk"), 1);

    // The tail alone is gone: refused, and told once it is accepted.
    write(&daemon, 3);
    daemon.kill();
    for entry in std::fs::read_dir(daemon.scratch.memory()).unwrap() {
        std::fs::remove_file(entry.unwrap().path()).unwrap();
    }
    daemon
        .log
        .expect("accept their loss with --accept-tail-loss");
    let refused = daemon.start_refused();
    assert!(refused.contains("--accept-tail-loss"), "{refused}");
    let as_before = daemon.setup.clone();
    daemon.setup = as_before.clone().arg("--accept-tail-loss");
    daemon.start();
    assert_eq!(generation(&daemon, "disk"), 2);
    daemon.kill();
    daemon.setup = as_before;
    daemon.start();
    assert_eq!(generation(&daemon, "disk"), 2);
}
