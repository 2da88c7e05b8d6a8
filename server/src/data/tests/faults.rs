//! Stores without room, and devices that fail: every request is answered.

use super::*;

/// The longest writes, many in flight, until the store is full: each is taken or refused, and the thread goes on.
#[test]
fn long_writes_into_a_store_that_becomes_full_are_all_answered() {
    for unapplied in 0..12 {
        fill_with_long_writes(unapplied);
    }
}

/// Two long writes take 514 blocks, the page of the index included: one of them finds room for itself, and not for the
/// page that it begins. A second one of a page counts two blocks more than it takes as long as it is not applied.
fn fill_with_long_writes(unapplied: u64) {
    const COUNT: u64 = 64;
    const IN_FLIGHT: u64 = 16;
    let dir = tempfile::tempdir().expect("dir");
    let mut config = config(dir.path(), 1);
    config.stores[0].capacity_bytes = COUNT * MIB;
    let (runtime, plane) = start(config);
    let size = 256 * MIB;
    runtime
        .block_on(plane.open_volume(spec(&plane, size, 1)))
        .expect("open");
    let mut client = Client::attach(&plane, ReplyStyle::Simple, size);
    let status = &runtime.block_on(plane.store_statuses())[0].status;
    let first = (status.capacity_blocks - 257 - 2 - 2 * unapplied) % 514;
    if first > 0 {
        let payload = vec![1; first as usize * 4096];
        client.write(command_flag::FUA, 192 * MIB, &payload);
    }
    let payload = vec![2; MIB as usize];
    let mut sender = client.stream.try_clone().expect("clone");
    let (mut begun, mut refused) = (0, 0);
    for ended in 0..COUNT {
        while begun < COUNT.min(ended + IN_FLIGHT) {
            let mut out = Vec::new();
            client.encode(&mut out, command::WRITE, 0, begun * MIB, MIB, &payload);
            sender.write_all(&out).expect("send");
            begun += 1;
        }
        match client.reply(0, None).1 {
            Reply::Ok(_) => {}
            Reply::Err(code) => {
                assert_eq!(code, 28);
                refused += 1;
            }
        }
    }
    assert!((10..60).contains(&refused), "{refused} of {COUNT} refused");
    assert_eq!(client.call(command::FLUSH, 0, 0, 0, &[]), Reply::Ok(vec![]));
    runtime.block_on(plane.drain());
}

/// Making the file larger ends with a sync, and one that failed may have been for what clients wrote: no later flush is
/// answered as if nothing had happened.
#[test]
fn a_store_whose_file_fails_to_grow_for_another_reason_than_room_stops() {
    for (errno, stops) in [("EIO", true), ("ENOSPC", false)] {
        let dir = tempfile::tempdir().expect("dir");
        let mut config = config(dir.path(), 1);
        let trigger = dir.path().join("now");
        let plan = format!(
            "allocate:count=all,when={},errno={errno}",
            trigger.display()
        );
        config.fault = Some(plan.parse().expect("plan"));
        let (runtime, plane) = start(config.clone());
        let size = 512 * MIB;
        runtime
            .block_on(plane.open_volume(spec(&plane, size, 1)))
            .expect("open");
        let mut client = Client::attach(&plane, ReplyStyle::Simple, size);
        let payload = vec![7; MIB as usize];
        let mut taken = 0;
        let refusal = loop {
            match client.call(command::WRITE, 0, taken * MIB, MIB, &payload) {
                Reply::Ok(_) => taken += 1,
                Reply::Err(code) => break code,
            }
            if taken == 4 {
                std::fs::write(&trigger, b"").expect("trigger");
            }
        };
        let flushed = client.call(command::FLUSH, 0, 0, 0, &[]);
        let status = &runtime.block_on(plane.store_statuses())[0].status;
        assert_eq!(status.poisoned.is_some(), stops);
        let (refused, answer) = match stops {
            true => (5, Reply::Err(5)),
            false => (28, Reply::Ok(vec![])),
        };
        assert_eq!((refusal, flushed), (refused, answer));
        runtime.block_on(plane.drain());
        config.fault = None;
        let (runtime, plane) = start(config);
        runtime
            .block_on(plane.open_volume(spec(&plane, size, 2)))
            .expect("open");
        let mut client = Client::attach(&plane, ReplyStyle::Simple, size);
        for at in 0..taken {
            assert!(client.read(at * MIB, MIB) == payload, "MiB {at}");
        }
        runtime.block_on(plane.drain());
    }
}

/// The index cannot be read: what asks for it gets an answer, and so does who closes the volume.
#[test]
fn questions_that_need_an_unreadable_index_are_answered() {
    let dir = tempfile::tempdir().expect("dir");
    let mut config = config(dir.path(), 1);
    let size = 64 * MIB;
    let (runtime, plane) = start(config.clone());
    runtime
        .block_on(plane.open_volume(spec(&plane, size, 1)))
        .expect("open");
    let mut client = Client::attach(&plane, ReplyStyle::Structured, size);
    client.write(0, 4096, &[1; 8192]);
    drop(client);
    runtime.block_on(plane.drain());

    let trigger = dir.path().join("now");
    let plan = format!("read:count=all,when={},errno=EIO", trigger.display());
    config.fault = Some(plan.parse().expect("plan"));
    let (runtime, plane) = start(config);
    let store = plane.stores()[0].id;
    runtime
        .block_on(plane.open_volume(spec(&plane, size, 2)))
        .expect("open");
    let mut client = Client::attach(&plane, ReplyStyle::Structured, size);
    std::fs::write(&trigger, b"").expect("trigger");
    let mut status = || client.call(command::BLOCK_STATUS, 0, 0, 4 * MIB, &[]);
    let words = |extents: &[[u32; 2]]| {
        let words = std::iter::once(1).chain(extents.iter().flatten().copied());
        Reply::Ok(words.flat_map(u32::to_be_bytes).collect())
    };
    // What is not known may be data.
    let first_leaf = 2 * MIB as u32;
    assert_eq!(status(), words(&[[first_leaf, 0], [first_leaf, 3]]));
    let extent = ashlar_core::store::ExtentKey {
        layer: LayerId(1),
        chunk: ashlar_core::units::ChunkIndex(0),
    };
    let sums = || runtime.block_on(plane.survey_sums(store, extent, vec![0]));
    assert!(matches!(
        sums(),
        Err(DataError::Store(ashlar_core::store::StoreError::Device(_)))
    ));
    assert!(
        runtime.block_on(plane.store_statuses())[0]
            .status
            .poisoned
            .is_none()
    );
    std::fs::remove_file(&trigger).expect("remove");
    let begun = Instant::now();
    let known = words(&[[4096, 3], [8192, 0], [4 * MIB as u32 - 12288, 3]]);
    while status() != known {
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "never read again"
        );
    }
    sums().expect("readable");
    runtime
        .block_on(plane.close_volume(VOLUME, true))
        .expect("close");
    runtime.block_on(plane.drain());
}
