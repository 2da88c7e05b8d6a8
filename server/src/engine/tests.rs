use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::*;

/// Both engines must pass every test here.
fn each_engine(test: impl Fn(&mut dyn Engine)) {
    test(&mut PosixEngine::open().expect("posix"));
    match UringEngine::open() {
        Ok(mut engine) => test(&mut engine),
        Err(e) => eprintln!("io_uring does not work here, only posix was tested: {e}"),
    }
}

/// And with a file wherever one may lie: on a disk, as a rule, and in memory.
fn each_file(test: impl Fn(&mut dyn Engine, &StoreFile, FileId)) {
    for parent in [std::env::temp_dir(), "/dev/shm".into()] {
        each_engine(|engine| {
            let (_dir, file, id) = temp_file(engine, &parent);
            test(engine, &file, id);
        });
    }
}

fn wait_for(engine: &mut dyn Engine, count: usize) -> Vec<Event> {
    let mut events = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(20);
    while events.len() < count {
        engine.wait(Some(deadline), &mut events).expect("wait");
        assert!(Instant::now() < deadline, "only {events:?} of {count}");
    }
    events
}

fn temp_file(engine: &mut dyn Engine, parent: &Path) -> (tempfile::TempDir, StoreFile, FileId) {
    let dir = tempfile::tempdir_in(parent).expect("dir");
    let file = StoreFile::open_or_create(&dir.path().join("store")).expect("open");
    let id = engine.add_file(file.fd.clone()).expect("add");
    (dir, file, id)
}

#[repr(align(4096))]
struct Aligned([u8; 16384]);

#[test]
fn writes_read_back_after_more_operations_than_the_queue_holds() {
    each_file(|engine, _, id| {
        const COUNT: u64 = 3000;
        let blocks: Vec<Box<Aligned>> = (0..4u8)
            .map(|i| Box::new(Aligned([i + 1; 16384])))
            .collect();
        for i in 0..COUNT {
            let data = blocks[(i % 4) as usize].0.as_ptr();
            // SAFETY: `blocks` outlives the wait for all completions.
            unsafe {
                engine.submit(
                    i,
                    DiskOp::Write {
                        file: id,
                        offset: i * 4096,
                        data,
                        len: 4096,
                        durable: i % 1000 == 0,
                    },
                )
            };
        }
        let mut tags: Vec<_> = wait_for(engine, COUNT as usize)
            .into_iter()
            .map(|e| match e {
                Event::Disk {
                    tag,
                    result: Ok(4096),
                } => tag,
                other => panic!("{other:?}"),
            })
            .collect();
        tags.sort_unstable();
        assert!(tags.iter().copied().eq(0..COUNT));
        let mut back = Box::new(Aligned([0; 16384]));
        // SAFETY: `back` outlives the wait.
        unsafe {
            engine.submit(
                7,
                DiskOp::Read {
                    file: id,
                    offset: 4096 * 401,
                    data: back.0.as_mut_ptr(),
                    len: 8192,
                },
            )
        };
        assert_eq!(
            wait_for(engine, 1),
            [Event::Disk {
                tag: 7,
                result: Ok(8192)
            }]
        );
        assert!(
            back.0[..4096].iter().all(|b| *b == 2) && back.0[4096..8192].iter().all(|b| *b == 3)
        );
    });
}

#[test]
fn a_read_past_the_end_is_short_and_a_sync_ends() {
    each_file(|engine, file, id| {
        rustix::fs::ftruncate(&*file.fd, 4096).expect("truncate");
        let mut back = Box::new(Aligned([1; 16384]));
        // SAFETY: `back` outlives the waits.
        unsafe {
            engine.submit(
                1,
                DiskOp::Read {
                    file: id,
                    offset: 0,
                    data: back.0.as_mut_ptr(),
                    len: 16384,
                },
            );
            assert_eq!(
                wait_for(engine, 1),
                [Event::Disk {
                    tag: 1,
                    result: Ok(4096)
                }]
            );
            engine.submit(2, DiskOp::Sync { file: id });
        }
        assert_eq!(
            wait_for(engine, 1),
            [Event::Disk {
                tag: 2,
                result: Ok(0)
            }]
        );
    });
}

#[test]
fn allocate_grows_the_file_with_real_zeros() {
    each_file(|engine, file, id| {
        let bytes = (ZERO_BYTES + 8192) as u64;
        // SAFETY: Allocate names no memory.
        unsafe {
            engine.submit(
                3,
                DiskOp::Allocate {
                    file: id,
                    offset: 4096,
                    len: bytes,
                },
            )
        };
        assert_eq!(
            wait_for(engine, 1),
            [Event::Disk {
                tag: 3,
                result: Ok(0)
            }]
        );
        let stat = rustix::fs::fstat(&*file.fd).expect("stat");
        assert_eq!(stat.st_size as u64, bytes + 4096);
        assert!(stat.st_blocks as u64 * 512 >= bytes);
    });
}

/// A device that takes every write and fails each sync, not with EIO: whoever grew the file learns of the sync.
#[test]
fn a_sync_that_fails_behind_an_allocation_is_never_taken_for_want_of_room() {
    each_engine(|engine| {
        let zero = std::fs::OpenOptions::new().write(true).open("/dev/zero");
        let device = OwnedFd::from(zero.expect("open"));
        let id = engine.add_file(Arc::new(device)).expect("add");
        let allocate = DiskOp::Allocate {
            file: id,
            offset: 0,
            len: 8192,
        };
        for (tag, op, error) in [
            (1, DiskOp::Sync { file: id }, Errno::INVAL),
            (2, allocate, Errno::IO),
        ] {
            // SAFETY: neither names memory.
            unsafe { engine.submit(tag, op) };
            let result = Err(error);
            assert_eq!(wait_for(engine, 1), [Event::Disk { tag, result }]);
        }
    });
}

#[test]
fn readiness_hang_up_writability_and_the_mailbox_arrive() {
    each_engine(|engine| {
        let (ours, mut theirs) = UnixStream::pair().expect("pair");
        ours.set_nonblocking(true).expect("nonblocking");
        let watch = engine.watch(ours.as_raw_fd(), 5).expect("watch");
        let mut none = Vec::new();
        engine
            .wait(Some(Instant::now() + Duration::from_millis(20)), &mut none)
            .expect("wait");
        assert_eq!(none, []);
        for _ in 0..3 {
            theirs.write_all(b"x").expect("write");
            assert_eq!(
                wait_for(engine, 1),
                [Event::Readable {
                    token: 5,
                    hang_up: false
                }]
            );
            let mut buf = [0; 8];
            assert_eq!((&ours).read(&mut buf).expect("read"), 1);
        }
        let waker = engine.waker();
        let thread = std::thread::spawn(move || waker.wake());
        assert_eq!(wait_for(engine, 1), [Event::Mailbox]);
        thread.join().expect("join");
        engine.waker().wake();
        assert_eq!(wait_for(engine, 1), [Event::Mailbox]);
        // Fill the socket, then make room.
        while (&ours).write(&[0; 65536]).is_ok() {}
        engine.watch_writable(watch);
        theirs.set_nonblocking(true).expect("nonblocking");
        let mut sink = vec![0; 1 << 20];
        while theirs.read(&mut sink).is_ok() {}
        assert!(wait_for(engine, 1).contains(&Event::Writable { token: 5 }));
        drop(theirs);
        assert!(wait_for(engine, 1).contains(&Event::Readable {
            token: 5,
            hang_up: true
        }));
    });
}

#[test]
fn an_ended_watch_reports_nothing_and_lets_the_peer_see_the_close() {
    each_engine(|engine| {
        let (ours, mut theirs) = UnixStream::pair().expect("pair");
        let old = engine.watch(ours.as_raw_fd(), 5).expect("watch");
        theirs.write_all(b"x").expect("write");
        engine.unwatch(old);
        drop(ours);
        let (again, mut peer) = UnixStream::pair().expect("pair");
        let new = engine.watch(again.as_raw_fd(), 6).expect("watch");
        assert_ne!(old, new);
        peer.write_all(b"y").expect("write");
        assert_eq!(
            wait_for(engine, 1),
            [Event::Readable {
                token: 6,
                hang_up: false
            }]
        );
        theirs
            .set_read_timeout(Some(Duration::from_secs(5)))
            .expect("timeout");
        // Bytes nobody read make the close a reset; an end of file is the other way to see it.
        match theirs.read(&mut [0; 8]) {
            Ok(n) => assert_eq!(n, 0),
            Err(e) => assert_eq!(e.kind(), io::ErrorKind::ConnectionReset),
        }
    });
}

#[test]
fn a_watch_ends_although_an_event_is_just_coming_in() {
    each_engine(|engine| {
        let (ours, mut theirs) = UnixStream::pair().expect("pair");
        ours.set_nonblocking(true).expect("nonblocking");
        let watch = engine.watch(ours.as_raw_fd(), 1).expect("watch");
        theirs.write_all(b"x").expect("write");
        wait_for(engine, 1);
        // Seen by the kernel, not yet by us, when the watch is ended.
        theirs.write_all(b"y").expect("write");
        engine.unwatch(watch);
        drop(ours);
        theirs
            .set_read_timeout(Some(Duration::from_millis(10)))
            .expect("timeout");
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let mut events = Vec::new();
            engine
                .wait(Some(Instant::now()), &mut events)
                .expect("wait");
            assert!(events.is_empty(), "{events:?}");
            // Data was left unread, so the end may come as a reset.
            match theirs.read(&mut [0]) {
                Ok(0) => return,
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return,
                other => assert!(Instant::now() < deadline, "still open: {other:?}"),
            }
        }
    });
}

#[test]
fn two_opens_of_one_store_are_refused() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("store");
    assert!(matches!(
        StoreFile::open(&path),
        Err(OpenStoreError::Missing { .. })
    ));
    let first = StoreFile::open_or_create(&path).expect("create");
    assert!(first.created && !first.is_device);
    assert!(matches!(
        StoreFile::open(&path),
        Err(OpenStoreError::InUse { .. })
    ));
    assert!(matches!(
        StoreFile::open_read_only(&path),
        Err(OpenStoreError::InUse { .. })
    ));
    drop(first);
    let readers = [
        StoreFile::open_read_only(&path),
        StoreFile::open_read_only(&path),
    ];
    assert!(readers.iter().all(Result::is_ok));
    assert!(matches!(
        StoreFile::open(dir.path()),
        Err(OpenStoreError::WrongType { .. })
    ));
}

#[test]
fn faults_hit_the_operations_they_name() {
    let plan: FaultPlan =
        "write:nth=2,errno=ENOSPC;sync:errno=EIO;read:short=4096;write:nth=4,delay_ms=30"
            .parse()
            .expect("plan");
    let mut engine = FaultEngine::new(Box::new(PosixEngine::open().expect("posix")), plan);
    let (_dir, _file, id) = temp_file(&mut engine, &std::env::temp_dir());
    let mut block = Box::new(Aligned([9; 16384]));
    let data = block.0.as_mut_ptr();
    let write = DiskOp::Write {
        file: id,
        offset: 0,
        data,
        len: 16384,
        durable: false,
    };
    let cases = [
        (write, Ok(16384)),
        (write, Err(Errno::NOSPC)),
        (write, Ok(16384)),
        (DiskOp::Sync { file: id }, Err(Errno::IO)),
        (DiskOp::Sync { file: id }, Ok(0)),
        (
            DiskOp::Read {
                file: id,
                offset: 0,
                data,
                len: 16384,
            },
            Ok(4096),
        ),
        (
            DiskOp::Read {
                file: id,
                offset: 0,
                data,
                len: 16384,
            },
            Ok(16384),
        ),
    ];
    for (tag, (op, result)) in cases.into_iter().enumerate() {
        // SAFETY: `block` outlives the wait.
        unsafe { engine.submit(tag as u64, op) };
        assert_eq!(
            wait_for(&mut engine, 1),
            [Event::Disk {
                tag: tag as u64,
                result
            }],
            "case {tag}"
        );
    }
    let start = Instant::now();
    // SAFETY: `block` outlives the wait.
    unsafe { engine.submit(99, write) };
    assert_eq!(
        wait_for(&mut engine, 1),
        [Event::Disk {
            tag: 99,
            result: Ok(16384)
        }]
    );
    assert!(start.elapsed() >= Duration::from_millis(30));
    for wrong in [
        "write",
        "fly:errno=EIO",
        "write:nth=1",
        "write:errno=EWHAT",
        "write:nth=x,errno=EIO",
        "write:colour=red",
    ] {
        assert!(wrong.parse::<FaultPlan>().is_err(), "{wrong}");
    }
}

/// Its file system cannot tell the ring that there is no device to wait for.
#[test]
fn what_is_asked_of_a_file_in_memory_ends_at_once_and_keeps_nobody_else_waiting() {
    let Ok(mut engine) = UringEngine::open() else {
        return;
    };
    let (_dir, file, id) = temp_file(&mut engine, Path::new("/dev/shm"));
    let mut block = Box::new(Aligned([7; 16384]));
    let data = block.0.as_mut_ptr();
    let (len, offset) = (16384, 0);
    let write = |file, durable| DiskOp::Write {
        file,
        offset,
        data,
        len,
        durable,
    };
    let read = DiskOp::Read {
        file: id,
        offset,
        data,
        len,
    };
    let ops = [
        write(id, false),
        write(id, true),
        DiskOp::Sync { file: id },
        read,
    ];
    for (tag, op) in (0..).zip(ops) {
        // SAFETY: `block` outlives the engine's use of it.
        unsafe { engine.submit(tag, op) };
    }
    assert!(engine.may_have_events());
    let mut ended = Vec::new();
    engine.take_ended(&mut ended);
    let disk = |tag, result| Event::Disk { tag, result };
    assert_eq!(
        ended,
        [
            disk(0, Ok(16384)),
            disk(1, Ok(16384)),
            disk(2, Ok(0)),
            disk(3, Ok(16384))
        ]
    );
    engine.take_ended(&mut ended);
    assert_eq!(ended.len(), 4, "each is reported once");

    // Not taken, it is what the next wait finds, and sockets have their turn all the same.
    let (ours, mut theirs) = UnixStream::pair().expect("pair");
    engine.watch(ours.as_raw_fd(), 5).expect("watch");
    theirs.write_all(b"x").expect("write");
    // SAFETY: as above.
    unsafe { engine.submit(4, read) };
    let mut events = Vec::new();
    engine.wait(None, &mut events).expect("wait");
    assert!(events.contains(&disk(4, Ok(16384))), "{events:?}");
    assert!(
        events.contains(&Event::Readable {
            token: 5,
            hang_up: false
        }),
        "{events:?}"
    );
    theirs.write_all(b"y").expect("write");
    // SAFETY: as above.
    unsafe { engine.submit(5, read) };
    events.clear();
    engine.work_here(&mut events).expect("work");
    assert_eq!(events.len(), 2, "{events:?}");
    assert!(events.contains(&disk(5, Ok(16384))), "{events:?}");

    // What fails there is told as anywhere.
    let read_only = std::fs::File::open(&file.path).expect("open");
    let read_only = engine
        .add_file(Arc::new(OwnedFd::from(read_only)))
        .expect("add");
    // SAFETY: as above.
    unsafe { engine.submit(6, write(read_only, false)) };
    assert_eq!(wait_for(&mut engine, 1), [disk(6, Err(Errno::BADF))]);

    // A device's name lies in memory, its bytes do not.
    let null = std::fs::OpenOptions::new().write(true).open("/dev/null");
    let null = OwnedFd::from(null.expect("open"));
    let null = engine.add_file(Arc::new(null)).expect("add");
    // SAFETY: as above.
    unsafe { engine.submit(7, write(null, false)) };
    ended.clear();
    engine.take_ended(&mut ended);
    assert_eq!(ended, []);
    assert_eq!(wait_for(&mut engine, 1), [disk(7, Ok(16384))]);
}

/// What a thread copies itself keeps everybody else waiting.
#[test]
fn long_writes_to_a_file_in_memory_and_many_reads_of_it_go_to_workers() {
    let Ok(mut engine) = UringEngine::open() else {
        return;
    };
    let (_dir, _file, id) = temp_file(&mut engine, Path::new("/dev/shm"));
    let mut memory = vec![3u8; 1 << 20];
    let data = memory.as_mut_ptr();
    let write = |len, durable| DiskOp::Write {
        file: id,
        offset: 0,
        data,
        len,
        durable,
    };
    let read = |len| DiskOp::Read {
        file: id,
        offset: 0,
        data,
        len,
    };
    let sync = DiskOp::Sync { file: id };
    let allocate = DiskOp::Allocate {
        file: id,
        offset: 0,
        len: 4096,
    };
    const KIB: usize = 1 << 10;
    for (ops, at_once) in [
        (vec![write(128 * KIB, false)], 1),
        (vec![write(132 * KIB, false)], 0),
        (vec![write(1024 * KIB, true)], 1),
        (vec![allocate], 0),
        (
            vec![read(512 * KIB), read(512 * KIB), sync, read(4 * KIB)],
            3,
        ),
        (vec![read(512 * KIB), read(516 * KIB), read(4 * KIB)], 2),
    ] {
        let mut ended = Vec::new();
        for op in &ops {
            // SAFETY: `memory` outlives the engine's use of it.
            unsafe { engine.submit(9, *op) };
        }
        engine.take_ended(&mut ended);
        assert_eq!(ended.len(), at_once, "{ops:?}");
        if at_once < ops.len() {
            ended.extend(wait_for(&mut engine, ops.len() - at_once));
        }
        assert!(
            ended
                .iter()
                .all(|event| matches!(event, Event::Disk { result: Ok(_), .. })),
            "{ended:?}"
        );
        // The next wait lets it begin anew.
        engine.wait(Some(Instant::now()), &mut ended).expect("wait");
    }
}
