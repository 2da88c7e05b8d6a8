//! Whom a volume's head serves, when its first change is let through, and how fast.

use super::*;

/// Much longer than anything takes here.
const LONG: Duration = Duration::from_secs(60);
const FIRST: ExportToken = ExportToken(Uuid::from_u128(0x111));
const SECOND: ExportToken = ExportToken(Uuid::from_u128(0x222));

fn holders(tokens: &[ExportToken]) -> Admitted {
    Admitted::Holders(tokens.to_vec())
}

#[test]
fn who_is_fenced_is_gone_and_never_comes_back() {
    let dir = tempfile::tempdir().expect("dir");
    let (runtime, plane) = start(config(dir.path(), 1));
    let size = 64 * MIB;
    let by = |token| Client::attach_by(&plane, ReplyStyle::Simple, size, token);
    runtime
        .block_on(plane.open_volume(spec(&plane, size, 1)))
        .expect("open");
    let mut plain = by(None);
    plain.write(0, 0, &[1; 4096]);
    assert!(matches!(
        runtime.block_on(plane.admit(VOLUME, holders(&[FIRST]))),
        Err(DataError::InUse { connections: 1, .. })
    ));
    assert_eq!(
        plain.read(0, 4096),
        [1; 4096],
        "refused, and nothing changed"
    );
    assert_eq!(runtime.block_on(plane.fence(VOLUME, None)), Ok(1));
    assert!(plain.is_closed());
    by(None).write(0, 4096, &[2; 4096]);
    runtime
        .block_on(async {
            // The client above has hung up, which the thread learns in its own time.
            let admitted = async {
                loop {
                    match plane.admit(VOLUME, holders(&[FIRST])).await {
                        Err(DataError::InUse { .. }) => tokio::task::yield_now().await,
                        other => return other,
                    }
                }
            };
            tokio::time::timeout(LONG, admitted).await.expect("in time")
        })
        .expect("nobody is connected");
    assert!(by(None).is_closed());
    assert!(by(Some(SECOND)).is_closed());
    let mut first = by(Some(FIRST));
    first.write(0, 8192, &[3; 4096]);
    runtime
        .block_on(plane.admit(VOLUME, holders(&[FIRST, SECOND])))
        .expect("the first stays");
    let mut second = by(Some(SECOND));
    assert_eq!(
        runtime.block_on(plane.fence(VOLUME, Some(holders(&[SECOND])))),
        Ok(1)
    );
    assert!(first.is_closed() && by(Some(FIRST)).is_closed());
    assert_eq!(
        second.read(0, 12288),
        [[1; 4096], [2; 4096], [3; 4096]].concat()
    );
    assert_eq!(
        runtime.block_on(plane.fence(VOLUME, Some(holders(&[SECOND])))),
        Ok(0),
        "again"
    );
    second.write(0, 0, &[4; 4096]);
    runtime.block_on(plane.drain());
}

/// A client that sends as fast as it can and reads no answer is ended, and from then on nothing of it arrives.
#[test]
fn nothing_of_a_fenced_writer_arrives_later() {
    let dir = tempfile::tempdir().expect("dir");
    let (runtime, plane) = start(config(dir.path(), 1));
    let size = 64 * MIB;
    runtime
        .block_on(plane.open_volume(VolumeSpec {
            admitted: holders(&[FIRST, SECOND]),
            ..spec(&plane, size, 1)
        }))
        .expect("open");
    for round in 1..=8u8 {
        let mut writer = Client::attach_by(&plane, ReplyStyle::Simple, size, Some(FIRST));
        writer.write(0, 0, &[round; 4096]);
        let flood = std::thread::spawn(move || {
            let payload = vec![round; 256 << 10];
            for number in 0u64.. {
                let mut out = Vec::new();
                let offset = number % 200 * payload.len() as u64;
                let length = payload.len() as u64;
                writer.encode(&mut out, command::WRITE, 0, offset, length, &payload);
                if writer.stream.write_all(&out).is_err() {
                    return;
                }
            }
        });
        let mut reader = Client::attach_by(&plane, ReplyStyle::Simple, size, Some(SECOND));
        let begun = Instant::now();
        while reader.read(20 * (256 << 10), 4096)[0] != round {
            assert!(begun.elapsed() < LONG, "the writer does not get there");
        }
        runtime
            .block_on(plane.fence(VOLUME, Some(holders(&[SECOND]))))
            .expect("fenced");
        let after: Vec<_> = (0..50).map(|mib| reader.read(mib * MIB, MIB)).collect();
        flood.join().expect("ended");
        for (mib, before) in after.iter().enumerate() {
            assert!(
                reader.read(mib as u64 * MIB, MIB) == *before,
                "round {round}: MiB {mib} changed"
            );
            for block in before.chunks(4096) {
                assert!(block.iter().all(|byte| *byte == block[0]), "a torn block");
            }
        }
        runtime
            .block_on(plane.admit(VOLUME, holders(&[FIRST, SECOND])))
            .expect("the next round");
    }
    runtime.block_on(plane.drain());
}

#[test]
fn the_first_change_waits_for_its_record() {
    let dir = tempfile::tempdir().expect("dir");
    let (runtime, plane) = start(config(dir.path(), 1));
    let size = 64 * MIB;
    runtime
        .block_on(plane.open_volume(VolumeSpec {
            never_written: true,
            ..spec(&plane, size, 1)
        }))
        .expect("open");
    let attach = || Client::attach(&plane, ReplyStyle::Simple, size);
    let (mut small, mut large, mut trimmer, mut reader) = (attach(), attach(), attach(), attach());
    small.send(command::WRITE, 0, 0, 4096, &[1; 4096]);
    // Received straight into the store where it may be.
    large.send(command::WRITE, 0, MIB, 128 << 10, &[2; 128 << 10]);
    trimmer.send(command::TRIM, 0, 2 * MIB, 4096, &[]);
    assert_eq!(runtime.block_on(plane.first_change()), Some(VOLUME));
    assert_eq!(reader.read(0, 4096), [0; 4096]);
    assert_eq!(reader.call(command::FLUSH, 0, 0, 0, &[]), Reply::Ok(vec![]));
    // Whatever the store made of them: none was taken.
    let status = runtime.block_on(plane.volume_status(VOLUME)).expect("open");
    let answered: u64 = status.connections.iter().map(|c| c.requests).sum();
    assert_eq!((answered, status.in_flight), (2, 0), "the reader's two");
    let layers = runtime.block_on(plane.layers()).expect("layers");
    assert!(
        layers.iter().all(|(_, layers)| layers.is_empty()),
        "{layers:?}"
    );
    runtime
        .block_on(plane.first_change_recorded(VOLUME))
        .expect("open");
    for client in [&mut small, &mut large, &mut trimmer] {
        assert_eq!(client.reply(0, None), (1, Reply::Ok(vec![])));
    }
    small.write(0, 4096, &[3; 4096]);
    assert_eq!(reader.read(0, 8192), [[1; 4096], [3; 4096]].concat());
    assert_eq!(reader.read(MIB, 128 << 10), vec![2; 128 << 10]);
    runtime.block_on(plane.drain());
    assert_eq!(runtime.block_on(plane.first_change()), None, "asked once");
}

#[test]
fn a_first_change_that_is_never_recorded_keeps_nobody_from_stopping() {
    let dir = tempfile::tempdir().expect("dir");
    let config = config(dir.path(), 1);
    let patience = config.drain_timeout;
    let (runtime, plane) = start(config);
    let size = 64 * MIB;
    runtime
        .block_on(plane.open_volume(VolumeSpec {
            never_written: true,
            ..spec(&plane, size, 1)
        }))
        .expect("open");
    let mut client = Client::attach(&plane, ReplyStyle::Simple, size);
    client.send(command::WRITE, 0, 0, 4096, &[1; 4096]);
    assert_eq!(runtime.block_on(plane.first_change()), Some(VOLUME));
    let begun = Instant::now();
    runtime.block_on(plane.drain());
    assert!(client.is_closed());
    assert!(begun.elapsed() < patience, "waited for what cannot come");
}

#[test]
fn limits_hold_are_lifted_at_once_and_let_a_stop_through() {
    let dir = tempfile::tempdir().expect("dir");
    let (runtime, plane) = start(config(dir.path(), 1));
    let size = 64 * MIB;
    let limits = |iops, bytes_per_second| VolumeLimits {
        iops,
        bytes_per_second,
    };
    runtime
        .block_on(plane.open_volume(VolumeSpec {
            limits: limits(Some(100), None),
            ..spec(&plane, size, 1)
        }))
        .expect("open");
    let mut client = Client::attach(&plane, ReplyStyle::Simple, size);
    // Ten come at once, one more goes ahead, and each of the rest takes 10 ms.
    let begun = Instant::now();
    for _ in 0..50 {
        client.read(0, 4096);
    }
    assert!(
        begun.elapsed() >= Duration::from_millis(380),
        "{:?}",
        begun.elapsed()
    );

    let set = |limits| {
        runtime
            .block_on(plane.set_limits(VOLUME, limits))
            .expect("open")
    };
    set(limits(None, Some(8 << 20)));
    let begun = Instant::now();
    for at in 0..6 {
        client.write(0, at * MIB, &[7; MIB as usize]);
    }
    assert!(
        begun.elapsed() >= Duration::from_millis(480),
        "{:?}",
        begun.elapsed()
    );

    // What waits under one limit goes on under the next: at 10 a second it would take half a minute. A socket has room
    // for some 270 messages; who sends more waits for the limit.
    set(limits(Some(10), None));
    let mut other = Client::attach(&plane, ReplyStyle::Simple, size);
    for _ in 0..150 {
        client.send(command::READ, 0, 0, 512, &[]);
        other.send(command::READ, 0, 0, 512, &[]);
    }
    let begun = Instant::now();
    set(limits(None, None));
    for _ in 0..150 {
        assert_eq!(client.reply(0, Some(512)).1, Reply::Ok(vec![7; 512]));
        assert_eq!(other.reply(0, Some(512)).1, Reply::Ok(vec![7; 512]));
    }
    assert!(begun.elapsed() < Duration::from_secs(25), "still limited");

    // A stop does not wait for them: it would give up long before they are through.
    set(limits(Some(2), None));
    for _ in 0..150 {
        client.send(command::READ, 0, 0, 512, &[]);
    }
    // The limit is at work. Those behind it have been sent, wherever they are.
    assert_eq!(client.reply(0, Some(512)).1, Reply::Ok(vec![7; 512]));
    let answers = std::thread::spawn(move || {
        for _ in 0..149 {
            assert_eq!(client.reply(0, Some(512)).1, Reply::Ok(vec![7; 512]));
        }
    });
    runtime.block_on(plane.drain());
    answers.join().expect("all were answered");
}
