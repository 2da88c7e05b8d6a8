//! Structured replies in many pieces.

use super::*;

/// Replies that a client does not read are held once, and all of what is held counts.
#[test]
fn replies_in_pieces_are_held_once_and_counted() {
    const READ: u64 = MIB;
    const ROOM: usize = 8;
    let dir = tempfile::tempdir().expect("dir");
    let mut config = config(dir.path(), 1);
    // And a little for the headers of the pieces.
    config.limits.bytes_per_connection = ROOM * READ as usize + (256 << 10);
    let (runtime, plane) = start(config);
    let size = 64 * MIB;
    runtime
        .block_on(plane.open_volume(spec(&plane, size, 1)))
        .expect("open");
    let mut client = Client::attach(&plane, ReplyStyle::Structured, size);
    // Every other block: nothing can be longer than one.
    for block in (0..READ / 4096).step_by(2) {
        client.write(0, block * 4096, &[block as u8 + 1; 4096]);
    }
    let written = READ / 4096 / 2;
    let mut wanted = vec![0; READ as usize];
    for (block, bytes) in wanted.chunks_mut(4096).enumerate().step_by(2) {
        bytes.fill(block as u8 + 1);
    }
    assert!(client.read(0, READ) == wanted);
    // As many are answered as there is room for their data; one more waits until the client reads.
    let answered = || {
        let status = runtime.block_on(plane.volume_status(VOLUME)).expect("open");
        status.connections[0].requests - written - 1
    };
    let wait_for = |what: &str, reached: &dyn Fn() -> bool| {
        let begun = Instant::now();
        while !reached() {
            let waited = begun.elapsed();
            assert!(waited < Duration::from_secs(10), "{what}: {}", answered());
            std::thread::yield_now();
        }
    };
    for number in 1..=ROOM as u64 {
        client.send(command::READ, 0, 0, READ, &[]);
        wait_for("answered", &|| answered() == number);
    }
    let pauses = || plane.metrics().threads()[0].pauses.get();
    assert_eq!(pauses(), 0);
    client.send(command::READ, 0, 0, READ, &[]);
    wait_for("paused", &|| pauses() > 0);
    assert_eq!(answered(), ROOM as u64);
    let held = plane.metrics().threads()[0].buffered_bytes.get();
    assert!(held >= (ROOM as u64 - 1) * READ, "{held} bytes counted");
    for _ in 0..=ROOM {
        assert_eq!(
            client.reply(0, Some(READ as usize)).1,
            Reply::Ok(wanted.clone())
        );
    }
    assert_eq!(answered(), ROOM as u64 + 1);
    runtime.block_on(plane.drain());
}
