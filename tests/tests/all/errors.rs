//! What goes wrong outside: each has a clear message, ends nothing it need not, and loses nothing.

use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ashlar_tests::daemon::{Daemon, Setup};
use ashlar_tests::nbd::Wishes;
use ashlar_tests::scratch::Scratch;
use ashlar_tests::tool::Tool;
use ashlar_tests::wait;

/// A daemon with data, stopped.
fn with_data(test: &str) -> Daemon {
    let mut daemon = Setup::default().store_size("256MiB").start(test);
    daemon.create("disk", "8MiB");
    daemon
        .open("disk", Wishes::SIMPLE)
        .write(4096, b"precious")
        .unwrap();
    daemon.stop();
    daemon
}

fn still_there(daemon: &mut Daemon) {
    daemon.start();
    assert_eq!(
        daemon.open("disk", Wishes::SIMPLE).read(4096, 8).unwrap(),
        b"precious"
    );
    daemon.stop();
}

#[track_caller]
fn says(said: &str, parts: &[&str]) {
    let lower = said.to_lowercase();
    for part in parts {
        assert!(
            lower.contains(&part.to_lowercase()),
            "no {part:?} in:\n{said}"
        );
    }
}

#[test]
fn a_store_that_is_open_already() {
    let mut daemon = with_data("open-twice");
    daemon.start();
    // The same data directory.
    let scratch = Scratch::new("second");
    let mut second = Daemon::at(daemon.setup.clone(), scratch, daemon.data_dir().to_owned());
    let said = second.start_refused();
    says(&said, &["in use"]);
    // Another data directory, the same store.
    let mut third = Setup::default()
        .own_stores()
        .args(["--store".as_ref(), daemon.store().as_os_str()])
        .prepare("third");
    says(&third.start_refused(), &["store"]);
    assert_eq!(
        daemon.open("disk", Wishes::SIMPLE).read(4096, 8).unwrap(),
        b"precious"
    );
    daemon.stop();
    still_there(&mut daemon);
}

#[test]
fn a_store_of_another_daemon() {
    let mut daemon = with_data("foreign");
    let mut other = Setup::default()
        .own_stores()
        .args(["--store".as_ref(), daemon.store().as_os_str()])
        .prepare("foreign-2");
    says(
        &other.start_refused(),
        &["another daemon", daemon.store().to_str().unwrap()],
    );
    still_there(&mut daemon);
}

/// Every copy of the superblock, and then a version from the future.
#[test]
fn a_superblock_that_cannot_be_used() {
    let mut daemon = with_data("superblock");
    let path = daemon.store();
    let saved: Vec<u8> = read_at(&path, 0, 1 << 20);
    let copies: Vec<usize> = (0..saved.len() / 4096)
        .filter(|at| saved[at * 4096..].starts_with(b"ASHLARSB"))
        .collect();
    assert!(copies.len() >= 2, "copies of the superblock at {copies:?}");
    // One copy damaged is survived.
    write_at(&path, copies[0] as u64 * 4096 + 40, &[0xff; 16]);
    still_there(&mut daemon);
    for copy in 0..256 {
        if read_at(&path, copy * 4096, 8) == b"ASHLARSB" {
            write_at(&path, copy * 4096 + 40, &[0xff; 16]);
        }
    }
    says(
        &daemon.start_refused(),
        &["superblock", "damaged", path.to_str().unwrap()],
    );
    write_at(&path, 0, &saved);
    still_there(&mut daemon);
}

#[test]
fn a_store_that_is_gone_or_empty() {
    let mut daemon = with_data("gone");
    let path = daemon.store();
    let aside = path.with_extension("aside");
    std::fs::rename(&path, &aside).unwrap();
    // It must not be made anew in silence: its data would be gone without a word.
    says(&daemon.start_refused(), &["store"]);
    std::fs::write(&path, b"").unwrap();
    says(&daemon.start_refused(), &["store"]);
    std::fs::write(&path, vec![0x42; 1 << 20]).unwrap();
    says(&daemon.start_refused(), &["store"]);
    assert_eq!(
        std::fs::read(&path).unwrap(),
        vec![0x42; 1 << 20],
        "it wrote to what is not its store"
    );
    std::fs::rename(&aside, &path).unwrap();
    still_there(&mut daemon);
}

#[test]
fn something_that_is_not_a_store() {
    let scratch = Scratch::new("not-a-store");
    let file = scratch.join("letters");
    std::fs::write(&file, b"Dear Sir, ".repeat(100_000)).unwrap();
    let mut daemon = Setup::default()
        .own_stores()
        .args(["--store".as_ref(), file.as_os_str()])
        .prepare("not-a-store");
    says(&daemon.start_refused(), &[file.to_str().unwrap()]);
    assert_eq!(
        std::fs::read(&file).unwrap(),
        b"Dear Sir, ".repeat(100_000),
        "it wrote to what is not its store"
    );
}

/// The disk under the store is full: a file system of its own, smaller than the store wants to be.
#[test]
fn the_disk_under_the_store_is_full() {
    let scratch = Scratch::new("disk-full");
    let (image, mount) = (scratch.join("image"), scratch.join("m"));
    std::fs::create_dir(&mount).unwrap();
    std::fs::File::create(&image)
        .unwrap()
        .set_len(160 << 20)
        .unwrap();
    Tool::new("mkfs.ext4")
        .args(["-q", "-F"])
        .arg(&image)
        .succeed();
    Tool::new("mount")
        .args(["-o", "loop"])
        .arg(&image)
        .arg(&mount)
        .succeed();
    struct Unmount(PathBuf);
    impl Drop for Unmount {
        fn drop(&mut self) {
            let done = Tool::new("umount").arg(&self.0).run();
            if !std::thread::panicking() {
                done.success();
            }
        }
    }
    let _unmount = Unmount(mount.clone());
    let store = mount.join("store");
    let mut setting = store.clone().into_os_string();
    setting.push(",size=1GiB");
    let mut daemon = Setup::default()
        .own_stores()
        .args(["--store".into(), setting])
        .prepare("disk-full");
    daemon
        .log
        .expect("the store's file could not be made larger; trying again in a minute");
    if !daemon.start_or_end() {
        // Refusing what cannot fit is right too, if it says so.
        return says(&daemon.log.text(), &["space"]);
    }
    daemon.create("disk", "512MiB");
    let mut client = daemon.open("disk", Wishes::STRUCTURED);
    let mut written = 0;
    let refused = loop {
        match client.write(written << 20, &vec![written as u8 + 1; 1 << 20]) {
            Ok(()) => written += 1,
            Err(error) => break error,
        }
        assert!(written < 512);
    };
    assert_eq!(refused.errno(), Some(28), "{refused}");
    println!("{written} MiB written before ENOSPC on a disk of 160 MiB");
    assert!(written > 60, "{written} MiB");
    // Not broken: overwrites and flushes go on, and all of it is there after a crash.
    client.write(0, &[0xaa; 1 << 20]).unwrap();
    client.flush().unwrap();
    daemon.kill();
    daemon.start();
    let mut client = daemon.open("disk", Wishes::STRUCTURED);
    assert!(client.read(0, 1 << 20).unwrap() == vec![0xaa; 1 << 20]);
    for at in 1..written {
        assert!(
            client.read(at << 20, 1 << 20).unwrap() == vec![at as u8 + 1; 1 << 20],
            "megabyte {at}"
        );
    }
    drop(client);
    daemon.kill();
}

/// A raw block device, and one that is too small.
#[test]
fn a_block_device_as_a_store() {
    let scratch = Scratch::new("device");
    let image = scratch.join("image");
    std::fs::File::create(&image)
        .unwrap()
        .set_len(300 << 20)
        .unwrap();
    let device = Tool::new("losetup")
        .args(["-f", "--show"])
        .arg(&image)
        .succeed()
        .trim()
        .to_owned();
    struct Detach(String);
    impl Drop for Detach {
        fn drop(&mut self) {
            Tool::new("losetup").args(["-d", &self.0]).run();
        }
    }
    let _detach = Detach(device.clone());
    let mut daemon = Setup::default()
        .own_stores()
        .args(["--store", &device])
        .start("device");
    daemon.create("disk", "64MiB");
    let mut client = daemon.open("disk", Wishes::SIMPLE);
    client.write(100_000, &[6; 500_000]).unwrap();
    client.flush().unwrap();
    daemon.kill();
    daemon.start();
    assert_eq!(
        daemon
            .open("disk", Wishes::SIMPLE)
            .read(100_000, 500_000)
            .unwrap(),
        vec![6; 500_000]
    );
    daemon.stop();
    // Whoever has it for himself is waited for, for a moment: it may be what a killed daemon had under way.
    let mut options = std::fs::File::options();
    options.read(true).write(true).custom_flags(libc::O_EXCL);
    let held = options.open(&device).unwrap();
    daemon.spawn();
    wait::until(Duration::from_secs(30), "it is waited for", || {
        let log = daemon.log.text();
        let is_waited_for = log.contains("the store is held by another process");
        is_waited_for.then_some(()).ok_or(log)
    });
    drop(held);
    daemon.wait_ready();
    daemon.stop();
    let check = ashlar_tests::admin::offline(["store", "check", &device]);
    assert!(check.status.success(), "{check}");
}

/// `store inspect` and `store check` read; they write nothing.
#[test]
fn the_offline_tools_only_read() {
    let daemon = with_data("offline");
    let path = daemon.store();
    let before = std::fs::read(&path).unwrap();
    let store = daemon.store();
    for command in ["inspect", "check"] {
        let done =
            ashlar_tests::admin::offline(["store".as_ref(), command.as_ref(), store.as_os_str()]);
        assert!(done.status.success() && !done.stdout.is_empty(), "{done}");
        let json = ashlar_tests::admin::offline([
            "-o".as_ref(),
            "json".as_ref(),
            "store".as_ref(),
            command.as_ref(),
            store.as_os_str(),
        ]);
        serde_json::from_str::<serde_json::Value>(&json.stdout)
            .unwrap_or_else(|error| panic!("{error}: {json}"));
    }
    assert!(
        std::fs::read(&path).unwrap() == before,
        "a tool that only reads has written"
    );
    let missing = ashlar_tests::admin::offline(["store", "check", "/no/such/store"]).failure();
    assert!(missing.contains("/no/such/store"), "{missing}");
}

#[test]
fn the_command_line_without_a_daemon() {
    let scratch = Scratch::new("no-daemon");
    let admin = ashlar_tests::admin::Admin::new(&scratch.join("admin.sock"));
    let said = admin.refused(["volume", "list"]);
    says(&said, &["admin.sock", "ashlard"]);
}

/// Each names the setting, the directory and what to do.
#[test]
fn a_directory_that_does_not_exist() {
    let mut daemon = with_data("no-dir");
    let missing = daemon.scratch.join("missing");
    let file = daemon.scratch.join("letter");
    std::fs::write(&file, b"Dear Sir").unwrap();
    let (missing, file) = (missing.to_str().unwrap(), file.to_str().unwrap());
    let does_not_exist = format!("{missing} does not exist; make it");
    let is_not_a_directory = format!("{file} is not a directory");
    let (tail_dir, socket) = (missing.to_owned(), format!("unix:{missing}/s"));
    let program = ashlar_tests::daemon::binary("ashlard");
    let other = |arguments: &[&str], parts: &[&str]| {
        let command = Tool::new(program.to_str().unwrap())
            .args(["--listen-http", "off", "--store-size", "256MiB"])
            .args(arguments);
        says(&command.run().failure(), parts);
    };
    let data = daemon.scratch.join("other");
    let data = data.to_str().unwrap();
    other(
        &["--data-dir", data, "--tail-dir", &tail_dir],
        &["--tail-dir", &does_not_exist],
    );
    other(
        &["--data-dir", data, "--listen-nbd", &socket],
        &["cannot listen on", &does_not_exist],
    );
    other(
        &["--data-dir", data, "--listen-admin", &socket],
        &["cannot listen on", &does_not_exist],
    );
    other(&["--data-dir", file], &["--data-dir", &is_not_a_directory]);
    other(
        &["--data-dir", data, "--store", &format!("{file}/store")],
        &["--store", &is_not_a_directory],
    );
    other(
        &["--data-dir", data, "--store", "/dev/no-such-disk"],
        &["--store", "no such device"],
    );
    other(
        &["--data-dir", data, "--config", &format!("{missing}/c.toml")],
        &["c.toml", "cannot be read"],
    );
    still_there(&mut daemon);
}

fn read_at(path: &Path, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    std::fs::File::open(path)
        .unwrap()
        .read_exact_at(&mut bytes, offset)
        .unwrap();
    bytes
}

fn write_at(path: &Path, offset: u64, bytes: &[u8]) {
    std::fs::File::options()
        .write(true)
        .open(path)
        .unwrap()
        .write_all_at(bytes, offset)
        .unwrap();
}
