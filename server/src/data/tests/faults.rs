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
