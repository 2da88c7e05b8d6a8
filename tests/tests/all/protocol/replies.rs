//! Answers: their shape, their order, and what they promise.

use std::collections::HashSet;
use std::time::Duration;

use ashlar_tests::nbd::{Request, Wishes, wire};

use super::{Fixture, Row, SIZE, STYLES};

#[test]
fn every_row_of_the_replies() {
    Fixture::start("replies").check(ROWS);
}

const ROWS: &[Row] = &[
    ("structured and extended reads send holes as holes", holes),
    ("DF: one piece, holes as zeros", df),
    (
        "BLOCK_STATUS: holes, data, and holes again after a trim",
        block_status,
    ),
    (
        "BLOCK_STATUS: REQ_ONE, unaligned ranges, length 0, and no context",
        block_status_edges,
    ),
    ("errors come with words", error_text),
    (
        "WRITE then DISC at once: applied and answered, 30 times",
        write_then_disc,
    ),
    ("commands behind DISC are not answered", behind_disc),
    (
        "a client that goes away in the middle of a payload writes nothing",
        torn_payload,
    ),
    (
        "the same cookie twice in flight: answered twice",
        same_cookie,
    ),
    (
        "1,000 requests in flight on one connection: each is answered once",
        thousand_in_flight,
    ),
    (
        "128 writes of 64 KiB in flight, then all read back",
        deep_writes,
    ),
    ("requests dribbled byte by byte", dribbled),
    (
        "a client that sends and does not read holds up nobody",
        deaf_client,
    ),
];

fn holes(fixture: &Fixture) {
    for wishes in [Wishes::STRUCTURED, Wishes::EXTENDED] {
        let mut client = fixture.open(wishes);
        client.trim(0, 1 << 20).unwrap();
        client.write(65_536, &[1; 4096]).unwrap();
        let answer = client
            .ask(&Request {
                command: wire::CMD_READ,
                length: 1 << 20,
                ..Request::default()
            })
            .unwrap();
        assert_eq!(answer.errno, 0);
        let hole_bytes: u64 = answer.holes.iter().map(|hole| hole.end - hole.start).sum();
        assert_eq!(hole_bytes, (1 << 20) - 4096, "{:?}", answer.holes);
        assert!(answer.data[65_536..69_632].iter().all(|byte| *byte == 1));
        // Inside one hole, not aligned.
        let answer = client
            .ask(&Request {
                command: wire::CMD_READ,
                offset: 5,
                length: 100,
                ..Request::default()
            })
            .unwrap();
        assert_eq!((answer.data.len(), answer.holes.len()), (100, 1));
    }
}

fn df(fixture: &Fixture) {
    for wishes in [Wishes::STRUCTURED, Wishes::EXTENDED] {
        let mut client = fixture.open(wishes);
        client.trim(0, 1 << 20).unwrap();
        client.write(8192, &[2; 4096]).unwrap();
        for length in [4096, 20_480, 65_536] {
            let request = Request {
                flags: wire::CMD_FLAG_DF,
                command: wire::CMD_READ,
                length,
                ..Request::default()
            };
            let answer = client.ask(&request).unwrap();
            // That it is one piece without holes is checked by the client.
            assert_eq!(answer.errno, 0, "DF must work up to 65,536 bytes");
            let expected = |at: usize| u8::from((8192..12_288).contains(&at)) * 2;
            assert!(
                answer
                    .data
                    .iter()
                    .enumerate()
                    .all(|(at, byte)| *byte == expected(at)),
                "{length}"
            );
        }
        let request = Request {
            flags: wire::CMD_FLAG_DF,
            command: wire::CMD_READ,
            length: 1 << 20,
            ..Request::default()
        };
        let errno = client.ask(&request).unwrap().errno;
        assert!([0, wire::EOVERFLOW].contains(&errno), "{errno}");
    }
}

const HOLE: u64 = wire::STATUS_HOLE | wire::STATUS_ZERO;

/// Neighbours with the same status joined, and cut at the end of what was asked.
fn joined(extents: &[(u64, u64)], asked: u64) -> Vec<(u64, u64)> {
    let mut left = asked;
    let mut all: Vec<(u64, u64)> = Vec::new();
    for (length, status) in extents {
        let length = (*length).min(left);
        left -= length;
        match all.last_mut() {
            Some(last) if last.1 == *status => last.0 += length,
            _ => all.push((length, *status)),
        }
    }
    all
}

fn block_status(fixture: &Fixture) {
    for wishes in [Wishes::STRUCTURED, Wishes::EXTENDED] {
        let mut client = fixture.open(wishes);
        client.trim(0, SIZE).unwrap();
        assert_eq!(
            joined(&client.allocation(0, SIZE, 0).unwrap(), SIZE),
            [(SIZE, HOLE)]
        );
        client.write(4096 * 10, &[3; 4096 * 5]).unwrap();
        client.write(70 << 20, &[3; 1]).unwrap();
        let mut at = 0;
        let mut whole = Vec::new();
        // An answer may stop early; the next question starts where it ended.
        while at < SIZE {
            for extent in client.allocation(at, SIZE - at, 0).unwrap() {
                let length = extent.0.min(SIZE - at);
                whole.push((length, extent.1));
                at += length;
            }
        }
        let gap = (70 << 20) - 4096 * 15;
        let expected = [
            (40_960, HOLE),
            (20_480, 0),
            (gap, HOLE),
            (4096, 0),
            (SIZE - (70 << 20) - 4096, HOLE),
        ];
        assert_eq!(joined(&whole, SIZE), expected);
        client.trim(4096 * 11, 4096).unwrap();
        let expected = [(4096, 0), (4096, HOLE), (4096 * 3, 0)];
        assert_eq!(
            joined(
                &client.allocation(4096 * 10, 4096 * 5, 0).unwrap(),
                4096 * 5
            ),
            expected
        );
    }
}

fn block_status_edges(fixture: &Fixture) {
    for wishes in [Wishes::STRUCTURED, Wishes::EXTENDED] {
        let mut client = fixture.open(wishes);
        client.trim(0, 1 << 20).unwrap();
        client.write(8192, &[4; 8192]).unwrap();
        let one = client
            .allocation(0, 1 << 20, wire::CMD_FLAG_REQ_ONE)
            .unwrap();
        assert_eq!(one, [(8192, HOLE)]);
        assert_eq!(
            client
                .allocation(8192, 4096, wire::CMD_FLAG_REQ_ONE)
                .unwrap(),
            [(4096, 0)]
        );
        for (offset, length) in [(1, 1), (8191, 2), (511, 20_000), (8193, 100), (SIZE - 1, 1)] {
            // The client checks that the extents cover what was asked.
            let extents = client.allocation(offset, length, 0).unwrap();
            let covered: u64 = extents.iter().map(|extent| extent.0).sum();
            assert!(covered > 0, "{offset}+{length}: {extents:?}");
        }
        let request = Request {
            command: wire::CMD_BLOCK_STATUS,
            ..Request::default()
        };
        let errno = client.ask(&request).unwrap().errno;
        assert_eq!(errno, wire::EINVAL, "length 0");
        client.read(0, 512).unwrap();
    }
    for wishes in [
        Wishes::SIMPLE,
        Wishes {
            allocation: false,
            ..Wishes::STRUCTURED
        },
    ] {
        let mut client = fixture.open(wishes);
        let request = Request {
            command: wire::CMD_BLOCK_STATUS,
            length: 4096,
            ..Request::default()
        };
        assert_eq!(
            client.ask(&request).unwrap().errno,
            wire::EINVAL,
            "no context was selected: {wishes:?}"
        );
        client.read(0, 512).unwrap();
    }
}

fn error_text(fixture: &Fixture) {
    for wishes in [Wishes::STRUCTURED, Wishes::EXTENDED] {
        let mut client = fixture.open(wishes);
        let read = client
            .ask(&Request {
                command: wire::CMD_READ,
                offset: SIZE,
                length: 1,
                ..Request::default()
            })
            .unwrap();
        assert!(
            read.errno == wire::EINVAL && !read.simple && !read.text.is_empty(),
            "{read:?}"
        );
        assert!(read.text.len() <= wire::STRING_MAX);
    }
}

fn write_then_disc(fixture: &Fixture) {
    let mut reader = fixture.open(Wishes::SIMPLE);
    for round in 0..30_u8 {
        let mut writer = fixture.open(STYLES[usize::from(round) % 3]);
        let payload = vec![round + 1; 65_536];
        let offset = u64::from(round) * 65_536;
        let flags = if writer.style == ashlar_tests::nbd::HeaderStyle::Extended {
            wire::CMD_FLAG_PAYLOAD_LEN
        } else {
            0
        };
        let request = Request {
            flags,
            command: wire::CMD_WRITE,
            offset,
            length: 65_536,
            payload: &payload,
        };
        let mut bytes = writer.header(&request, 1);
        bytes.extend_from_slice(&payload);
        bytes.extend(writer.header(
            &Request {
                command: wire::CMD_DISC,
                ..Request::default()
            },
            2,
        ));
        writer.expect(&request, 1);
        writer.connection.send(&bytes).unwrap();
        let answer = writer
            .complete()
            .unwrap_or_else(|error| panic!("round {round}: {error}"));
        assert_eq!((answer.errno, answer.cookie), (0, 1));
        assert_eq!(
            writer
                .connection
                .until_closed(Duration::from_secs(5))
                .unwrap(),
            b""
        );
        assert_eq!(
            reader.read(offset, 65_536).unwrap(),
            payload,
            "round {round}"
        );
    }
}

fn behind_disc(fixture: &Fixture) {
    let mut client = fixture.open(Wishes::SIMPLE);
    client.write(0, &[9; 512]).unwrap();
    let mut bytes = client.header(
        &Request {
            command: wire::CMD_DISC,
            ..Request::default()
        },
        1,
    );
    bytes.extend(client.header(
        &Request {
            command: wire::CMD_READ,
            length: 512,
            ..Request::default()
        },
        2,
    ));
    bytes.extend(client.header(
        &Request {
            command: wire::CMD_WRITE,
            length: 512,
            ..Request::default()
        },
        3,
    ));
    bytes.extend([0; 512]);
    client.connection.send(&bytes).unwrap();
    assert_eq!(
        client
            .connection
            .until_closed(Duration::from_secs(5))
            .unwrap(),
        b""
    );
    assert_eq!(fixture.open(Wishes::SIMPLE).read(0, 512).unwrap(), [9; 512]);
}

fn torn_payload(fixture: &Fixture) {
    let mut reader = fixture.open(Wishes::SIMPLE);
    for cut in [0, 1, 4096, 8191, 16_383] {
        reader.write(0, &[0x5a; 16_384]).unwrap();
        let mut writer = fixture.open(Wishes::SIMPLE);
        let mut bytes = writer.header(
            &Request {
                command: wire::CMD_WRITE,
                length: 16_384,
                ..Request::default()
            },
            1,
        );
        bytes.extend(vec![0xff; cut]);
        writer.connection.send(&bytes).unwrap();
        writer.connection.finish_sending().unwrap();
        assert_eq!(
            writer
                .connection
                .until_closed(Duration::from_secs(5))
                .unwrap(),
            b""
        );
        assert!(
            reader.read(0, 16_384).unwrap() == [0x5a; 16_384],
            "{cut} bytes of 16,384 came and were written"
        );
    }
}

fn same_cookie(fixture: &Fixture) {
    let mut client = fixture.open(Wishes::SIMPLE);
    client.write(0, &[[1; 512], [2; 512]].concat()).unwrap();
    let read = |offset| Request {
        command: wire::CMD_READ,
        offset,
        length: 512,
        ..Request::default()
    };
    let mut bytes = client.header(&read(0), 42);
    bytes.extend(client.header(&read(512), 42));
    client.connection.send(&bytes).unwrap();
    let mut seen = HashSet::new();
    for _ in 0..2 {
        let head = client.connection.take(16).unwrap();
        assert_eq!(&head[4..16], [&[0; 4][..], &42_u64.to_be_bytes()].concat());
        seen.insert(client.connection.take(512).unwrap()[0]);
    }
    assert_eq!(seen, HashSet::from([1, 2]));
}

fn thousand_in_flight(fixture: &Fixture) {
    for wishes in STYLES {
        let mut client = fixture.open(wishes);
        let pattern: Vec<u8> = (0..1000_u32)
            .flat_map(|n| n.to_be_bytes().repeat(128))
            .collect();
        client.write(0, &pattern).unwrap();
        let mut expected = std::collections::HashMap::new();
        for n in 0..1000_u64 {
            let request = Request {
                command: wire::CMD_READ,
                offset: n * 512,
                length: 512,
                ..Request::default()
            };
            expected.insert(client.submit(&request).unwrap(), n as u32);
        }
        for _ in 0..1000 {
            let answer = client.complete().unwrap();
            let n = expected.remove(&answer.cookie).expect("answered once");
            assert_eq!(answer.errno, 0);
            assert!(
                answer.data == n.to_be_bytes().repeat(128),
                "request {n} got another's data"
            );
        }
    }
}

fn deep_writes(fixture: &Fixture) {
    for wishes in STYLES {
        let mut client = fixture.open(wishes);
        for n in 0..128_u64 {
            // Write answers are 16 or 32 bytes: they fit the socket while this client only sends.
            let payload = vec![n as u8; 65_536];
            client
                .submit(&Request {
                    command: wire::CMD_WRITE,
                    offset: n * 65_536 + 100,
                    length: 65_536,
                    payload: &payload,
                    flags: 0,
                })
                .unwrap();
        }
        for _ in 0..128 {
            assert_eq!(client.complete().unwrap().errno, 0);
        }
        for n in 0..128_u64 {
            assert!(client.read(n * 65_536 + 100, 65_536).unwrap() == vec![n as u8; 65_536]);
        }
    }
}

fn dribbled(fixture: &Fixture) {
    for wishes in STYLES {
        let mut client = fixture.open(wishes);
        let flags = if wishes.extended {
            wire::CMD_FLAG_PAYLOAD_LEN
        } else {
            0
        };
        let write = Request {
            flags,
            command: wire::CMD_WRITE,
            offset: 777,
            length: 5000,
            payload: &[8; 5000],
        };
        let mut bytes = client.header(&write, 1);
        bytes.extend_from_slice(write.payload);
        client.expect(&write, 1);
        for piece in bytes.chunks(7) {
            client.connection.send(piece).unwrap();
        }
        assert_eq!(client.complete().unwrap().errno, 0);
        assert_eq!(client.read(777, 5000).unwrap(), [8; 5000]);
    }
}

fn deaf_client(fixture: &Fixture) {
    let mut deaf = fixture.open(Wishes::SIMPLE);
    deaf.connection
        .set_write_timeout(Duration::from_secs(2))
        .unwrap();
    let header = deaf.header(
        &Request {
            command: wire::CMD_READ,
            length: 1 << 20,
            ..Request::default()
        },
        1,
    );
    // Until the server stops taking more, or 64 GiB of answers are asked for.
    for _ in 0..65_536 {
        if deaf.connection.send(&header).is_err() {
            break;
        }
    }
    let resident = fixture.daemon().usage().resident_bytes;
    let mut other = fixture.open(Wishes::SIMPLE);
    for n in 0..100 {
        other.write(n * 4096, &[1; 4096]).unwrap();
        other.read(n * 4096, 4096).unwrap();
    }
    other.flush().unwrap();
    assert!(
        resident < 512 << 20,
        "{resident} bytes resident for one client that does not read"
    );
}
