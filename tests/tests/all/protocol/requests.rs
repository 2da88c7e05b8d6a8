//! Single requests: which are served, which are refused and with what, and that a refusal leaves the connection in step.

use std::time::Duration;

use ashlar_tests::nbd::{Failure, HeaderStyle, Request, Transmission, Wishes, wire};
use ashlar_tests::seed::{self, Rng};

use super::{Fixture, Row, SIZE, STYLES};

const SOON: Duration = Duration::from_secs(5);

#[test]
fn every_row_of_the_requests() {
    Fixture::start("requests").check(ROWS);
}

const ROWS: &[Row] = &[
    ("length 0: answered, with success or EINVAL", zero_length),
    (
        "READ past the end, or at an offset that overflows: EINVAL",
        read_past_end,
    ),
    (
        "WRITE and WRITE_ZEROES past the end: ENOSPC, the payload consumed, nothing written",
        write_past_end,
    ),
    (
        "TRIM, CACHE and BLOCK_STATUS past the end: EINVAL",
        trim_past_end,
    ),
    ("FUA is accepted on every command", fua_everywhere),
    (
        "DF without structured replies: EINVAL",
        df_without_structured,
    ),
    (
        "an unknown flag: EINVAL, the payload consumed",
        unknown_flag,
    ),
    ("a known flag on the wrong command: EINVAL", misplaced_flag),
    ("an unknown command, and RESIZE: EINVAL", unknown_command),
    ("FLUSH with an offset or a length: answered", odd_flush),
    (
        "32 MiB in one READ and one WRITE; 33 MiB in one READ refused or served",
        largest_payload,
    ),
    (
        "WRITE of 33 MiB: dropped, refused or served; nobody else notices",
        too_large_write,
    ),
    ("WRITE of 4 GiB - 1: dropped, not waited for", absurd_write),
    ("CACHE of 64 MiB and of the whole volume: answered", cache),
    ("WRITE_ZEROES and TRIM of the whole volume", whole_volume),
    (
        "TRIM and WRITE_ZEROES that are not aligned leave their neighbours alone",
        unaligned_zeroes,
    ),
    ("WRITE_ZEROES: NO_HOLE and FAST_ZERO", zero_flags),
    ("a bad request magic: dropped", bad_request_magic),
    ("the other header style: dropped", wrong_header_style),
    (
        "lengths beyond 32 bits under extended headers",
        extended_lengths,
    ),
    (
        "PAYLOAD_LEN where it does not belong: refused and in step, or dropped",
        misplaced_payload,
    ),
    (
        "1 to 4097 bytes at odd offsets, against a model",
        unaligned_model,
    ),
];

fn each_style(fixture: &Fixture, check: impl Fn(&mut Transmission)) {
    for wishes in STYLES {
        let mut client = fixture.open(wishes);
        check(&mut client);
        // In step: the next request is answered as if nothing had been.
        client
            .write(0, b"in step")
            .unwrap_or_else(|error| panic!("{wishes:?} is out of step: {error}"));
        assert_eq!(client.read(0, 7).unwrap(), b"in step", "{wishes:?}");
        client.disconnect().unwrap();
    }
}

fn errno(client: &mut Transmission, command: u16, offset: u64, length: u64, flags: u16) -> u32 {
    let payload = if command == wire::CMD_WRITE {
        vec![0xee; length as usize]
    } else {
        Vec::new()
    };
    let request = Request {
        flags,
        command,
        offset,
        length,
        payload: &payload,
    };
    client
        .ask(&request)
        .unwrap_or_else(|e| panic!("command {command} {offset}+{length}, flags {flags:#x}: {e}"))
        .errno
}

fn zero_length(fixture: &Fixture) {
    each_style(fixture, |client| {
        for command in [
            wire::CMD_READ,
            wire::CMD_WRITE,
            wire::CMD_TRIM,
            wire::CMD_CACHE,
            wire::CMD_WRITE_ZEROES,
        ] {
            for offset in [0, 1, SIZE] {
                let errno = errno(client, command, offset, 0, 0);
                assert!(
                    [0, wire::EINVAL].contains(&errno),
                    "command {command} at {offset}: {errno}"
                );
            }
        }
    });
}

fn read_past_end(fixture: &Fixture) {
    each_style(fixture, |client| {
        for (offset, length) in [
            (SIZE, 1),
            (SIZE - 1, 2),
            (SIZE + 4096, 512),
            (u64::MAX, 1),
            (u64::MAX - 510, 512),
            (1 << 63, 4096),
        ] {
            assert_eq!(
                errno(client, wire::CMD_READ, offset, length, 0),
                wire::EINVAL,
                "{offset}+{length}"
            );
        }
        assert_eq!(errno(client, wire::CMD_READ, SIZE - 1, 1, 0), 0);
    });
}

fn write_past_end(fixture: &Fixture) {
    each_style(fixture, |client| {
        client.write(SIZE - 4096, &[0x11; 4096]).unwrap();
        for command in [wire::CMD_WRITE, wire::CMD_WRITE_ZEROES] {
            for (offset, length) in [
                (SIZE, 4096),
                (SIZE - 4096, 8192),
                (SIZE - 1, 2),
                (u64::MAX - 510, 512),
                (1 << 63, 4096),
            ] {
                assert_eq!(
                    errno(client, command, offset, length, 0),
                    wire::ENOSPC,
                    "command {command} {offset}+{length}"
                );
            }
        }
        assert_eq!(client.read(SIZE - 4096, 4096).unwrap(), [0x11; 4096]);
    });
}

fn trim_past_end(fixture: &Fixture) {
    each_style(fixture, |client| {
        client.write(SIZE - 4096, &[0x12; 4096]).unwrap();
        let status = (client.style != HeaderStyle::Simple).then_some(wire::CMD_BLOCK_STATUS);
        for command in [wire::CMD_TRIM, wire::CMD_CACHE].into_iter().chain(status) {
            for (offset, length) in [(SIZE, 4096), (SIZE - 4096, 8192), (u64::MAX - 510, 512)] {
                assert_eq!(
                    errno(client, command, offset, length, 0),
                    wire::EINVAL,
                    "command {command} {offset}+{length}"
                );
            }
        }
        assert_eq!(client.read(SIZE - 4096, 4096).unwrap(), [0x12; 4096]);
    });
}

fn fua_everywhere(fixture: &Fixture) {
    each_style(fixture, |client| {
        let all = [
            wire::CMD_READ,
            wire::CMD_WRITE,
            wire::CMD_TRIM,
            wire::CMD_CACHE,
            wire::CMD_WRITE_ZEROES,
        ];
        for command in all {
            assert_eq!(
                errno(client, command, 8192, 4096, wire::CMD_FLAG_FUA),
                0,
                "command {command}"
            );
        }
        assert_eq!(errno(client, wire::CMD_FLUSH, 0, 0, wire::CMD_FLAG_FUA), 0);
        if client.style != HeaderStyle::Simple {
            assert_eq!(
                errno(client, wire::CMD_BLOCK_STATUS, 0, 4096, wire::CMD_FLAG_FUA),
                0
            );
        }
    });
}

fn df_without_structured(fixture: &Fixture) {
    let mut client = fixture.open(Wishes::SIMPLE);
    assert_eq!(
        errno(&mut client, wire::CMD_READ, 0, 4096, wire::CMD_FLAG_DF),
        wire::EINVAL
    );
    client.read(0, 4096).unwrap();
}

fn unknown_flag(fixture: &Fixture) {
    each_style(fixture, |client| {
        client.write(0, &[0x31; 8192]).unwrap();
        for flag in [0x4000, 0x8000, 1 << 6, 0xffc0] {
            for command in [
                wire::CMD_READ,
                wire::CMD_WRITE,
                wire::CMD_TRIM,
                wire::CMD_CACHE,
                wire::CMD_WRITE_ZEROES,
            ] {
                assert_eq!(
                    errno(client, command, 0, 8192, flag),
                    wire::EINVAL,
                    "command {command} flag {flag:#x}"
                );
            }
            assert_eq!(errno(client, wire::CMD_FLUSH, 0, 0, flag), wire::EINVAL);
        }
        assert_eq!(
            client.read(0, 8192).unwrap(),
            [0x31; 8192],
            "a refused request changed data"
        );
    });
}

fn misplaced_flag(fixture: &Fixture) {
    each_style(fixture, |client| {
        client.write(0, &[0x32; 4096]).unwrap();
        let cases = [
            (wire::CMD_READ, wire::CMD_FLAG_NO_HOLE),
            (wire::CMD_READ, wire::CMD_FLAG_REQ_ONE),
            (wire::CMD_READ, wire::CMD_FLAG_FAST_ZERO),
            (wire::CMD_WRITE, wire::CMD_FLAG_NO_HOLE),
            (wire::CMD_WRITE, wire::CMD_FLAG_DF),
            (wire::CMD_WRITE, wire::CMD_FLAG_FAST_ZERO),
            (wire::CMD_TRIM, wire::CMD_FLAG_NO_HOLE),
            (wire::CMD_TRIM, wire::CMD_FLAG_FAST_ZERO),
            (wire::CMD_WRITE_ZEROES, wire::CMD_FLAG_DF),
            (wire::CMD_WRITE_ZEROES, wire::CMD_FLAG_REQ_ONE),
            (wire::CMD_CACHE, wire::CMD_FLAG_DF),
        ];
        for (command, flag) in cases {
            assert_eq!(
                errno(client, command, 0, 4096, flag),
                wire::EINVAL,
                "command {command} flag {flag:#x}"
            );
        }
        assert_eq!(
            client.read(0, 4096).unwrap(),
            [0x32; 4096],
            "a refused request changed data"
        );
    });
}

fn unknown_command(fixture: &Fixture) {
    each_style(fixture, |client| {
        for command in [9, 10, 200, 0xffff, wire::CMD_RESIZE] {
            assert_eq!(
                errno(client, command, 0, 4096, 0),
                wire::EINVAL,
                "command {command}"
            );
        }
        assert_eq!(client.size_bytes, SIZE);
    });
}

fn odd_flush(fixture: &Fixture) {
    each_style(fixture, |client| {
        for (offset, length) in [(4096, 0), (0, 4096), (u64::MAX, 0xffff_ffff)] {
            let errno = errno(client, wire::CMD_FLUSH, offset, length, 0);
            assert!([0, wire::EINVAL].contains(&errno), "{errno}");
        }
    });
}

fn largest_payload(fixture: &Fixture) {
    let mut rng = Rng::new(seed::of_run("largest payload"));
    each_style(fixture, |client| {
        // Not aligned, and across the chunk boundary.
        let offset = (50 << 20) + rng.clone().below(4096);
        let data = rng.clone().bytes(wire::PAYLOAD_MAX);
        client.write(offset, &data).unwrap();
        assert!(
            client.read(offset, data.len() as u64).unwrap() == data,
            "32 MiB came back different"
        );
        let more = errno(client, wire::CMD_READ, 0, 33 << 20, 0);
        assert!(
            [0, wire::EINVAL, wire::EOVERFLOW, wire::ENOMEM].contains(&more),
            "{more}"
        );
    });
    rng.next();
}

fn too_large_write(fixture: &Fixture) {
    for wishes in STYLES {
        let mut client = fixture.open(wishes);
        let payload = vec![0x55; 33 << 20];
        let request = Request {
            command: wire::CMD_WRITE,
            length: payload.len() as u64,
            payload: &payload,
            ..Request::default()
        };
        match client.ask(&request) {
            Ok(answer)
                if answer.errno == 0
                    || answer.errno == wire::EINVAL
                    || answer.errno == wire::EOVERFLOW =>
            {
                client.read(0, 512).expect("in step after an answer");
            }
            Ok(answer) => panic!("errno {}", answer.errno),
            Err(Failure::Io(_)) => {}
            Err(other) => panic!("{other}"),
        }
    }
}

fn absurd_write(fixture: &Fixture) {
    for wishes in STYLES {
        let mut client = fixture.open(wishes);
        let header = client.header(
            &Request {
                command: wire::CMD_WRITE,
                length: 0xffff_ffff,
                ..Request::default()
            },
            5,
        );
        client.connection.send(&header).unwrap();
        // A little of it, then silence: the server must not wait for 4 GiB.
        let _ = client.connection.send(&[0; 4096]);
        client
            .connection
            .until_closed(SOON)
            .unwrap_or_else(|error| panic!("{wishes:?}: {error}"));
    }
}

fn cache(fixture: &Fixture) {
    each_style(fixture, |client| {
        for (offset, length) in [(0, 64 << 20), (0, SIZE), (1, 511)] {
            let errno = errno(client, wire::CMD_CACHE, offset, length, 0);
            assert!(
                [0, wire::EINVAL].contains(&errno),
                "{offset}+{length}: {errno}"
            );
        }
    });
}

fn whole_volume(fixture: &Fixture) {
    each_style(fixture, |client| {
        for command in [wire::CMD_WRITE_ZEROES, wire::CMD_TRIM] {
            for offset in [0, 70 << 20, SIZE - 5000] {
                client.write(offset, &[0x77; 5000]).unwrap();
            }
            assert_eq!(errno(client, command, 0, SIZE, 0), 0);
            for offset in [0, 70 << 20, SIZE - 5000] {
                assert_eq!(
                    client.read(offset, 5000).unwrap(),
                    [0; 5000],
                    "command {command}, at {offset}"
                );
            }
        }
    });
}

fn unaligned_zeroes(fixture: &Fixture) {
    each_style(fixture, |client| {
        for command in [wire::CMD_WRITE_ZEROES, wire::CMD_TRIM] {
            for (from, to) in [
                (1, 2),
                (4095, 4097),
                (100, 12_000),
                (4096, 9000),
                (511, 8192),
                (4000, 4096 * 4 + 1),
            ] {
                client.write(0, &[0x66; 24_576]).unwrap();
                assert_eq!(errno(client, command, from, to - from, 0), 0);
                let data = client.read(0, 24_576).unwrap();
                let (from, to) = (from as usize, to as usize);
                assert!(
                    data[..from]
                        .iter()
                        .chain(&data[to..])
                        .all(|byte| *byte == 0x66),
                    "neighbours of {from}..{to}"
                );
                if command == wire::CMD_WRITE_ZEROES {
                    assert!(
                        data[from..to].iter().all(|byte| *byte == 0),
                        "{from}..{to} is not zero"
                    );
                }
                // Whole blocks that are trimmed read as zeros; for parts of a block trim is only a hint.
                let (first, last) = (from.next_multiple_of(4096), to / 4096 * 4096);
                assert!(
                    first >= last || data[first..last].iter().all(|byte| *byte == 0),
                    "{first}..{last} was discarded"
                );
            }
        }
    });
}

fn zero_flags(fixture: &Fixture) {
    each_style(fixture, |client| {
        for flags in [
            0,
            wire::CMD_FLAG_NO_HOLE,
            wire::CMD_FLAG_FAST_ZERO,
            wire::CMD_FLAG_NO_HOLE | wire::CMD_FLAG_FAST_ZERO,
        ] {
            client.write(4096, &[0x44; 8192]).unwrap();
            let errno = errno(
                client,
                wire::CMD_WRITE_ZEROES,
                4096,
                8192,
                flags | wire::CMD_FLAG_FUA,
            );
            let may_decline = flags & wire::CMD_FLAG_FAST_ZERO != 0;
            assert!(
                errno == 0 || (may_decline && errno == wire::ENOTSUP),
                "flags {flags:#x}: {errno}"
            );
            let expected = if errno == 0 { 0 } else { 0x44 };
            assert_eq!(
                client.read(4096, 8192).unwrap(),
                [expected; 8192],
                "flags {flags:#x}"
            );
        }
    });
}

fn bad_request_magic(fixture: &Fixture) {
    for wishes in STYLES {
        for magic in [0_u32, 0x2560_9514, wire::SIMPLE_REPLY_MAGIC, 0x1234_5678] {
            let mut client = fixture.open(wishes);
            let mut header = client.header(
                &Request {
                    length: 512,
                    ..Request::default()
                },
                9,
            );
            header[..4].copy_from_slice(&magic.to_be_bytes());
            client.connection.send(&header).unwrap();
            let came = client
                .connection
                .until_closed(SOON)
                .unwrap_or_else(|error| panic!("{wishes:?}: {error}"));
            assert!(came.is_empty(), "{magic:#x} was answered");
        }
    }
}

fn wrong_header_style(fixture: &Fixture) {
    for (negotiated, magic) in [
        (Wishes::SIMPLE, wire::EXTENDED_REQUEST_MAGIC),
        (Wishes::STRUCTURED, wire::EXTENDED_REQUEST_MAGIC),
        (Wishes::EXTENDED, wire::REQUEST_MAGIC),
    ] {
        let mut client = fixture.open(negotiated);
        let mut bytes = magic.to_be_bytes().to_vec();
        bytes.resize(64, 0);
        client.connection.send(&bytes).unwrap();
        client
            .connection
            .until_closed(SOON)
            .unwrap_or_else(|error| panic!("{negotiated:?}: {error}"));
    }
}

fn extended_lengths(fixture: &Fixture) {
    let mut client = fixture.open(Wishes::EXTENDED);
    for length in [SIZE + 1, 1 << 32, (1 << 32) + 4096, 1 << 62, u64::MAX] {
        let mut ask = |command| errno(&mut client, command, 4096, length, 0);
        let read = ask(wire::CMD_READ);
        assert!(
            [wire::EINVAL, wire::EOVERFLOW].contains(&read),
            "read of {length}: {read}"
        );
        assert_eq!(ask(wire::CMD_TRIM), wire::EINVAL, "{length}");
        assert_eq!(ask(wire::CMD_CACHE), wire::EINVAL, "{length}");
        assert_eq!(ask(wire::CMD_BLOCK_STATUS), wire::EINVAL, "{length}");
        assert_eq!(ask(wire::CMD_WRITE_ZEROES), wire::ENOSPC, "{length}");
    }
    client.read(0, 512).unwrap();
    // A payload of more than 4 GiB is announced: dropped.
    let flags = wire::CMD_FLAG_PAYLOAD_LEN;
    let header = client.header(
        &Request {
            flags,
            command: wire::CMD_WRITE,
            length: 1 << 40,
            ..Request::default()
        },
        1,
    );
    client.connection.send(&header).unwrap();
    client.connection.until_closed(SOON).unwrap();
}

fn misplaced_payload(fixture: &Fixture) {
    for command in [
        wire::CMD_READ,
        wire::CMD_TRIM,
        wire::CMD_FLUSH,
        wire::CMD_WRITE_ZEROES,
        wire::CMD_CACHE,
        99,
    ] {
        let mut client = fixture.open(Wishes::EXTENDED);
        let request = Request {
            flags: wire::CMD_FLAG_PAYLOAD_LEN,
            command,
            length: 16,
            payload: &[1; 16],
            offset: 0,
        };
        match client.ask(&request) {
            Ok(answer) => {
                assert_eq!(answer.errno, wire::EINVAL, "command {command}");
                client
                    .read(0, 512)
                    .unwrap_or_else(|error| panic!("command {command} is out of step: {error}"));
            }
            Err(Failure::Io(_)) => {}
            Err(other) => panic!("command {command}: {other}"),
        }
    }
    // And the flag only exists under extended headers.
    for wishes in [Wishes::SIMPLE, Wishes::STRUCTURED] {
        let mut client = fixture.open(wishes);
        assert_eq!(
            errno(
                &mut client,
                wire::CMD_READ,
                0,
                16,
                wire::CMD_FLAG_PAYLOAD_LEN
            ),
            wire::EINVAL
        );
        client.read(0, 512).unwrap();
    }
}

fn unaligned_model(fixture: &Fixture) {
    const SPAN: usize = 300_000;
    // Across the boundary of two chunks.
    let base = (64 << 20) - SPAN as u64 / 2;
    let mut rng = Rng::new(seed::of_run("unaligned model"));
    let mut model = vec![0; SPAN];
    let mut clients: Vec<Transmission> =
        STYLES.iter().map(|wishes| fixture.open(*wishes)).collect();
    clients[0].write_zeroes(base, SPAN as u64, 0).unwrap();
    for step in 0..3_000 {
        let client = &mut clients[rng.below(3) as usize];
        let length = *rng.pick(&[1, 2, 511, 512, 513, 4095, 4096, 4097, 9_000, 70_001]);
        let at = rng.below((SPAN - length) as u64 + 1) as usize;
        let offset = base + at as u64;
        let range = at..at + length;
        match rng.below(10) {
            0..5 => {
                let data = rng.bytes(length);
                let fua = if rng.chance(5) { wire::CMD_FLAG_FUA } else { 0 };
                client.write_with(offset, &data, fua).unwrap();
                model[range].copy_from_slice(&data);
            }
            5 => {
                client.write_zeroes(offset, length as u64, 0).unwrap();
                model[range].fill(0);
            }
            6 if rng.chance(20) => client.flush().unwrap(),
            _ => {
                let data = client.read(offset, length as u64).unwrap();
                assert!(
                    data == model[range],
                    "step {step}: {length} bytes at {offset} differ from the model"
                );
            }
        }
    }
    for client in &mut clients {
        assert!(client.read(base, SPAN as u64).unwrap() == model);
    }
}
