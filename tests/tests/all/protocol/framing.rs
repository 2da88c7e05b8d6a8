//! Requests that do not say rightly where they end: the connection is in step afterwards, or it is dropped.

use ashlar_tests::nbd::{Failure, Request, Wishes, wire};

use super::requests::errno;
use super::{Fixture, Row, SIZE, SOON, STYLES};

#[test]
fn every_row_of_the_framing() {
    Fixture::start("framing").check(ROWS);
}

const ROWS: &[Row] = &[
    (
        "WRITE of 33 MiB: dropped, refused or served; nobody else notices",
        too_large_write,
    ),
    ("WRITE of 4 GiB - 1: dropped, not waited for", absurd_write),
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
];

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
