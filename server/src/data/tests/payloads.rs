//! Payloads that come in pieces, from clients that are slow, stop or vanish.

use super::*;

/// One thread within these limits, with a volume open.
fn start_within(
    dir: &std::path::Path,
    limits: Limits,
    size: u64,
) -> (tokio::runtime::Runtime, DataPlane) {
    let mut config = config(dir, 1);
    config.limits = limits;
    let (runtime, plane) = start(config);
    runtime
        .block_on(plane.open_volume(spec(&plane, size, 1)))
        .expect("open");
    (runtime, plane)
}

#[test]
fn a_client_that_hangs_up_in_a_payload_writes_nothing() {
    let dir = tempfile::tempdir().expect("dir");
    let (runtime, plane) = start(config(dir.path(), 1));
    let size = 64 * MIB;
    runtime
        .block_on(plane.open_volume(spec(&plane, size, 1)))
        .expect("open");
    for sent in [1, 4095, 100_000, 900_000] {
        let mut client = Client::attach(&plane, ReplyStyle::Simple, size);
        let mut out = Vec::new();
        client.encode(&mut out, command::WRITE, 0, 0, 1 << 20, &vec![9; sent]);
        client.stream.write_all(&out).expect("send");
        drop(client);
    }
    // A write followed by DISC is carried out and answered.
    let mut client = Client::attach(&plane, ReplyStyle::Simple, size);
    let mut out = Vec::new();
    let cookie = client.encode(
        &mut out,
        command::WRITE,
        command_flag::FUA,
        8192,
        4096,
        &[5; 4096],
    );
    client.encode(&mut out, command::DISC, 0, 0, 0, &[]);
    client.stream.write_all(&out).expect("send");
    assert_eq!(client.reply(0, None), (cookie, Reply::Ok(vec![])));
    assert!(client.is_closed());

    let mut client = Client::attach(&plane, ReplyStyle::Structured, size);
    let data = client.read(0, 1 << 20);
    assert!(
        data[..8192].iter().all(|b| *b == 0)
            && data[8192..12288].iter().all(|b| *b == 5)
            && data[12288..].iter().all(|b| *b == 0)
    );
    // The others are gone, and nothing of theirs is held.
    runtime.block_on(async {
        // Each answer is a turn of the data thread, in which a closed socket is seen.
        let deadline = Instant::now() + Duration::from_secs(10);
        while plane
            .volume_status(VOLUME)
            .await
            .expect("open")
            .connections
            .len()
            != 1
        {
            assert!(
                Instant::now() < deadline,
                "connections of dead clients stay"
            );
        }
    });
    runtime.block_on(plane.drain());
}

#[test]
fn clients_that_stop_in_their_payloads_do_not_starve_the_others() {
    let dir = tempfile::tempdir().expect("dir");
    let limits = Limits {
        bytes: 8 << 20,
        stall: Duration::from_millis(500),
        ..Limits::default()
    };
    let size = 64 * MIB;
    let (runtime, plane) = start_within(dir.path(), limits, size);
    let stalled: Vec<Client> = (0..8)
        .map(|_| {
            let mut client = Client::attach(&plane, ReplyStyle::Simple, size);
            let mut out = Vec::new();
            client.encode(&mut out, command::WRITE, 0, 0, 4 << 20, &[9; 70_000]);
            client.stream.write_all(&out).expect("send");
            client
        })
        .collect();
    // Small requests go on at once, large ones when the stalled have been ended.
    let mut client = Client::attach(&plane, ReplyStyle::Structured, size);
    for i in 0..100u64 {
        client.write(0, i * 8192, &[1; 4096]);
        assert_eq!(client.read(i * 8192, 4096), vec![1; 4096]);
    }
    let lent = plane.metrics().threads()[0].buffered_bytes.get();
    // The limit, one request more, and a little for each client.
    assert!(lent < 13 << 20, "{lent} bytes are held");
    client.write(0, 32 * MIB, &vec![2; 4 << 20]);
    drop(stalled);
    runtime.block_on(plane.drain());
}

/// Sends the header of a large write and half of its payload.
fn half_a_write(client: &mut Client, offset: u64, payload: &[u8]) -> u64 {
    let half = payload.len() / 2;
    client.send(
        command::WRITE,
        0,
        offset,
        payload.len() as u64,
        &payload[..half],
    )
}

/// Sends the rest.
fn the_other_half(client: &mut Client, payload: &[u8]) {
    client
        .stream
        .write_all(&payload[payload.len() / 2..])
        .expect("send");
}

/// So many wait for memory that what they hold by the beginnings of their requests is half of the limit. Nothing but
/// letting one of them in gives memory back.
#[test]
fn clients_that_all_wait_for_memory_get_on() {
    let dir = tempfile::tempdir().expect("dir");
    let limits = Limits {
        bytes: 2 << 20,
        ..Limits::default()
    };
    let size = 256 * MIB;
    let (runtime, plane) = start_within(dir.path(), limits, size);
    // More than half of the limit, so that the others are not let in.
    let payload = vec![3; 1200 << 10];
    let mut first = Client::attach(&plane, ReplyStyle::Simple, size);
    let cookie = half_a_write(&mut first, 0, &payload);
    let waiting: Vec<(Client, u64, Vec<u8>)> = (1..=120)
        .map(|number: u8| {
            let mut client = Client::attach(&plane, ReplyStyle::Simple, size);
            let payload = vec![number; 1500 << 10];
            let at = u64::from(number) * 2 * MIB;
            let len = payload.len() as u64;
            let cookie = client.send(command::WRITE, 0, at, len, &payload[..1000]);
            (client, cookie, payload)
        })
        .collect();
    let deadline = Instant::now() + Duration::from_secs(60);
    while plane.metrics().threads()[0].pauses.get() < waiting.len() as u64 {
        assert!(Instant::now() < deadline, "not all of them wait");
        std::thread::yield_now();
    }
    the_other_half(&mut first, &payload);
    assert_eq!(first.reply(0, None), (cookie, Reply::Ok(vec![])));
    std::thread::scope(|scope| {
        for (mut client, cookie, payload) in waiting {
            scope.spawn(move || {
                client.stream.write_all(&payload[1000..]).expect("send");
                assert_eq!(client.reply(0, None), (cookie, Reply::Ok(vec![])));
            });
        }
    });
    runtime.block_on(plane.drain());
}

/// A payload that is received into the open frame stays whole when the frame is closed, filled by others or long gone
/// before the payload ends.
#[test]
fn a_slow_payload_survives_what_others_do_to_its_frame() {
    let dir = tempfile::tempdir().expect("dir");
    let (runtime, plane) = start(config(dir.path(), 1));
    let size = 64 * MIB;
    runtime
        .block_on(plane.open_volume(spec(&plane, size, 1)))
        .expect("open");
    let mut slow = Client::attach(&plane, ReplyStyle::Simple, size);
    let mut other = Client::attach(&plane, ReplyStyle::Simple, size);
    let mut random = Random(11);
    for (step, large) in [96, 128, 512, 764, 768, 1024].into_iter().enumerate() {
        let at = step as u64 * 2 * MIB;
        let payload: Vec<u8> = (0..large << 10).map(|_| random.next() as u8 | 1).collect();
        let cookie = half_a_write(&mut slow, at, &payload);
        // A small write behind it, a flush that closes the frame, and then more than the whole tail.
        let small = vec![7; 4096];
        other.write(0, 40 * MIB, &small);
        match step % 3 {
            0 => {}
            1 => assert_eq!(other.call(command::FLUSH, 0, 0, 0, &[]), Reply::Ok(vec![])),
            _ => {
                for i in 0..80 {
                    other.write(0, 44 * MIB + i % 10 * 300_000, &vec![i as u8; 256 << 10]);
                }
            }
        }
        // It is not there before it is whole.
        assert!(other.read(at, 4096).iter().all(|byte| *byte == 0));
        the_other_half(&mut slow, &payload);
        assert_eq!(slow.reply(0, None), (cookie, Reply::Ok(vec![])));
        assert!(
            other.read(at, payload.len() as u64) == payload,
            "{large} KiB"
        );
        assert!(other.read(40 * MIB, 4096) == small);
    }
    runtime.block_on(plane.drain());
}

/// Two writes to the same blocks, the later one received while the earlier one waits for its payload.
#[test]
fn large_writes_of_two_clients_end_one_after_the_other() {
    let dir = tempfile::tempdir().expect("dir");
    let (runtime, plane) = start(config(dir.path(), 1));
    let size = 64 * MIB;
    runtime
        .block_on(plane.open_volume(spec(&plane, size, 1)))
        .expect("open");
    let mut clients = [
        Client::attach(&plane, ReplyStyle::Simple, size),
        Client::attach(&plane, ReplyStyle::Simple, size),
    ];
    for first in 0..20u8 {
        let payloads = [
            vec![2 * first + 1; 128 << 10],
            vec![2 * first + 2; 128 << 10],
        ];
        let cookies = [0, 1].map(|i| half_a_write(&mut clients[i], MIB, &payloads[i]));
        let order = if first % 2 == 0 { [0, 1] } else { [1, 0] };
        for i in order {
            the_other_half(&mut clients[i], &payloads[i]);
            assert_eq!(clients[i].reply(0, None), (cookies[i], Reply::Ok(vec![])));
        }
        let last = order[1];
        let mut reader = Client::attach(&plane, ReplyStyle::Simple, size);
        assert!(reader.read(MIB, 128 << 10) == payloads[last]);
    }
    runtime.block_on(plane.drain());
}

/// Large payloads that fill the tail wait in it, in order, and what is read back is what was written last.
#[test]
fn large_pipelined_writes_fill_the_tail() {
    let dir = tempfile::tempdir().expect("dir");
    let (runtime, plane) = start(config(dir.path(), 1));
    let size = 64 * MIB;
    runtime
        .block_on(plane.open_volume(spec(&plane, size, 1)))
        .expect("open");
    let mut client = Client::attach(&plane, ReplyStyle::Simple, size);
    let mut out = Vec::new();
    let mut cookies = Vec::new();
    // 60 MiB through a tail of 8, some of it FUA, each place twice.
    for i in 0..480u64 {
        let flags = if i % 7 == 0 { command_flag::FUA } else { 0 };
        let payload = vec![(i % 251) as u8 + 1; 128 << 10];
        let length = payload.len() as u64;
        cookies.push(client.encode(
            &mut out,
            command::WRITE,
            flags,
            i % 240 * (128 << 10),
            length,
            &payload,
        ));
    }
    let mut sender = client.stream.try_clone().expect("clone");
    let sending = std::thread::spawn(move || sender.write_all(&out));
    let mut answered: Vec<u64> = cookies
        .iter()
        .map(|_| match client.reply(0, None) {
            (cookie, Reply::Ok(_)) => cookie,
            (_, Reply::Err(code)) => panic!("error {code}"),
        })
        .collect();
    sending.join().expect("sender").expect("sent");
    answered.sort_unstable();
    assert_eq!(answered, cookies);
    for i in 240..480u64 {
        let expected = (i % 251) as u8 + 1;
        let got = client.read(i % 240 * (128 << 10), 128 << 10);
        assert!(got.iter().all(|byte| *byte == expected), "write {i}");
    }
    runtime.block_on(plane.drain());
}
