//! Many requests of several clients in flight at once.

use super::*;

/// Many requests in flight on several connections, more than the tail holds: out-of-order replies, parked writes, and
/// every byte right.
#[test]
fn pipelined_clients_that_fill_the_tail() {
    fill_the_tail(anywhere());
}

#[test]
fn pipelined_clients_that_fill_the_tail_of_a_store_in_memory() {
    fill_the_tail(in_memory());
}

fn fill_the_tail(dir: tempfile::TempDir) {
    let (runtime, plane) = start(config(dir.path(), 1));
    let size = 256 * MIB;
    runtime
        .block_on(plane.open_volume(spec(&plane, size, 1)))
        .expect("open");
    std::thread::scope(|scope| {
        for worker in 0..3u64 {
            let mut client = Client::attach(&plane, ReplyStyle::Structured, size);
            scope.spawn(move || {
                // Each worker has its own 64 MiB, written whole in pieces of 4 KiB to 512 KiB, 64 at a time.
                let base = worker * 64 * MIB;
                let mut random = Random(worker + 11);
                let mut at = base;
                let mut writes = Vec::new();
                while at < base + 64 * MIB {
                    let most = if random.below(4) == 0 { 128 } else { 4 };
                    let length = (4096 * (1 + random.below(most))).min(base + 64 * MIB - at);
                    writes.push((at, length));
                    at += length;
                }
                for batch in writes.chunks(64) {
                    let mut out = Vec::new();
                    let mut waiting = Vec::new();
                    for (offset, length) in batch {
                        let payload = vec![(offset / 4096 % 251) as u8 + 1; *length as usize];
                        waiting.push(client.encode(
                            &mut out,
                            command::WRITE,
                            0,
                            *offset,
                            *length,
                            &payload,
                        ));
                    }
                    let mut sender = client.stream.try_clone().expect("clone");
                    let sending = std::thread::spawn(move || sender.write_all(&out).expect("send"));
                    for _ in batch {
                        let (cookie, reply) = client.reply(0, None);
                        assert_eq!(reply, Reply::Ok(vec![]));
                        let at = waiting
                            .iter()
                            .position(|w| *w == cookie)
                            .expect("answered once");
                        waiting.swap_remove(at);
                    }
                    sending.join().expect("join");
                }
                for (offset, length) in writes {
                    let data = client.read(offset, length);
                    assert!(
                        data.iter().all(|b| *b == (offset / 4096 % 251) as u8 + 1),
                        "at {offset}"
                    );
                }
            });
        }
    });
    let thread = &plane.metrics().threads()[0];
    assert!(
        thread.parked_writes.get() > 0,
        "the tail was never full: the test shows less than it should"
    );
    runtime.block_on(plane.drain());
}
