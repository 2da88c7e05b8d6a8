//! Option haggling.

use std::time::{Duration, Instant};

use ashlar_tests::nbd::{Failure, Handshake, export_request, wire};
use ashlar_tests::wait;

use super::{Fixture, Row, SOON, STYLES};

#[test]
fn every_row_of_the_handshake() {
    Fixture::start("handshake").check(ROWS);
}

pub(super) const ROWS: &[Row] = &[
    ("greeting: exactly the two known handshake flags", greeting),
    (
        "client flags: an unknown one closes the connection",
        unknown_client_flag,
    ),
    (
        "unknown options of 16 B, 64 KiB and 2 MiB: UNSUP, and the next one is parsed",
        unknown_options,
    ),
    ("PEEK_EXPORT: UNSUP", peek_export),
    (
        "option length 0xffffffff: closed, not waited for",
        huge_option,
    ),
    ("bad option magic: closed", bad_option_magic),
    ("LIST: every volume; INVALID with data", list),
    ("ABORT: ACK, with or without data, then closed", abort),
    (
        "STARTTLS without TLS: UNSUP or POLICY, with data also INVALID; haggling goes on",
        starttls,
    ),
    (
        "STRUCTURED_REPLY: ACK, INVALID with data, twice does no harm",
        structured_reply,
    ),
    (
        "EXTENDED_HEADERS: ACK, INVALID with data; STRUCTURED_REPLY after it: EXT_HEADER_REQD",
        extended_headers,
    ),
    (
        "bytes that come one by one, options that come together",
        dribbled_and_joined,
    ),
];

fn greeting(fixture: &Fixture) {
    assert_eq!(
        fixture.handshake().server_flags,
        wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES
    );
}

fn unknown_client_flag(fixture: &Fixture) {
    for flags in [4, 7, 0x8000_0003] {
        let mut handshake = Handshake::with_client_flags(&fixture.address, flags).unwrap();
        let _ = handshake.send_option(wire::OPT_LIST, &[]);
        let sent = handshake.connection.until_closed(SOON).unwrap();
        assert!(
            sent.is_empty(),
            "flags {flags:#x} were answered with {} bytes",
            sent.len()
        );
    }
}

fn unknown_options(fixture: &Fixture) {
    let mut handshake = fixture.handshake();
    for (option, length) in [
        (99, 0),
        (12, 16),
        (0xffff_ffff, 64 << 10),
        (0, 16),
        (1000, 2 << 20),
    ] {
        let verdict = handshake.verdict(option, &vec![0xa5; length]).unwrap();
        assert_eq!(
            verdict,
            wire::REP_ERR_UNSUP,
            "option {option} with {length} bytes"
        );
    }
    assert_eq!(
        handshake.verdict(wire::OPT_LIST, &[]).unwrap(),
        wire::REP_ACK
    );
}

fn peek_export(fixture: &Fixture) {
    assert_eq!(
        fixture
            .handshake()
            .verdict(wire::OPT_PEEK_EXPORT, b"disk")
            .unwrap(),
        wire::REP_ERR_UNSUP
    );
}

fn huge_option(fixture: &Fixture) {
    for option in [wire::OPT_GO, wire::OPT_EXPORT_NAME, wire::OPT_LIST, 77] {
        let mut handshake = fixture.handshake();
        let mut bytes = wire::IHAVEOPT.to_be_bytes().to_vec();
        bytes.extend(option.to_be_bytes());
        bytes.extend(0xffff_ffff_u32.to_be_bytes());
        handshake.connection.send(&bytes).unwrap();
        handshake
            .connection
            .until_closed(SOON)
            .unwrap_or_else(|error| panic!("option {option}: {error}"));
    }
}

fn bad_option_magic(fixture: &Fixture) {
    let mut handshake = fixture.handshake();
    handshake
        .connection
        .send(b"NOTANOPT\0\0\0\x03\0\0\0\0")
        .unwrap();
    handshake.connection.until_closed(SOON).unwrap();
}

fn list(fixture: &Fixture) {
    let mut handshake = fixture.handshake();
    assert_eq!(
        handshake.verdict(wire::OPT_LIST, b"x").unwrap(),
        wire::REP_ERR_INVALID
    );
    let replies = handshake.acknowledged(wire::OPT_LIST, &[]).unwrap();
    let names: Vec<&[u8]> = replies
        .iter()
        .filter(|reply| reply.kind == wire::REP_SERVER)
        .map(|reply| {
            let length = u32::from_be_bytes(reply.data[..4].try_into().unwrap()) as usize;
            &reply.data[4..4 + length]
        })
        .collect();
    assert!(names.contains(&b"disk".as_slice()), "{names:?}");
}

fn abort(fixture: &Fixture) {
    for data in [b"".as_slice(), b"goodbye"] {
        let mut handshake = fixture.handshake();
        assert_eq!(
            handshake.verdict(wire::OPT_ABORT, data).unwrap(),
            wire::REP_ACK
        );
        assert_eq!(handshake.connection.until_closed(SOON).unwrap(), b"");
    }
    // A client that says goodbye and does not wait for the answer.
    let mut handshake = fixture.handshake();
    handshake.send_option(wire::OPT_ABORT, &[]).unwrap();
}

fn starttls(fixture: &Fixture) {
    let mut handshake = fixture.handshake();
    let plain = handshake.verdict(wire::OPT_STARTTLS, &[]).unwrap();
    assert!(
        [wire::REP_ERR_UNSUP, wire::REP_ERR_POLICY].contains(&plain),
        "{plain:#x}"
    );
    let with_data = handshake.verdict(wire::OPT_STARTTLS, b"x").unwrap();
    let allowed = [
        wire::REP_ERR_UNSUP,
        wire::REP_ERR_POLICY,
        wire::REP_ERR_INVALID,
    ];
    assert!(allowed.contains(&with_data), "{with_data:#x}");
    assert_eq!(
        handshake.verdict(wire::OPT_LIST, &[]).unwrap(),
        wire::REP_ACK
    );
}

fn structured_reply(fixture: &Fixture) {
    let mut handshake = fixture.handshake();
    assert_eq!(
        handshake.verdict(wire::OPT_STRUCTURED_REPLY, b"x").unwrap(),
        wire::REP_ERR_INVALID
    );
    handshake
        .acknowledged(wire::OPT_STRUCTURED_REPLY, &[])
        .unwrap();
    let again = handshake.verdict(wire::OPT_STRUCTURED_REPLY, &[]).unwrap();
    assert!(
        [wire::REP_ACK, wire::REP_ERR_INVALID].contains(&again),
        "{again:#x}"
    );
    // Still structured, not forgotten by the repetition.
    handshake.go("disk").unwrap().read(0, 512).unwrap();
}

fn extended_headers(fixture: &Fixture) {
    let mut handshake = fixture.handshake();
    assert_eq!(
        handshake.verdict(wire::OPT_EXTENDED_HEADERS, b"x").unwrap(),
        wire::REP_ERR_INVALID
    );
    handshake
        .acknowledged(wire::OPT_EXTENDED_HEADERS, &[])
        .unwrap();
    let structured = handshake.verdict(wire::OPT_STRUCTURED_REPLY, &[]).unwrap();
    assert_eq!(structured, wire::REP_ERR_EXT_HEADER_REQD);
    let again = handshake.verdict(wire::OPT_EXTENDED_HEADERS, &[]).unwrap();
    assert!(
        [wire::REP_ACK, wire::REP_ERR_INVALID].contains(&again),
        "{again:#x}"
    );
    handshake.go("disk").unwrap().read(0, 512).unwrap();
    // The other way round is an upgrade.
    let mut handshake = fixture.handshake();
    handshake
        .acknowledged(wire::OPT_STRUCTURED_REPLY, &[])
        .unwrap();
    handshake
        .acknowledged(wire::OPT_EXTENDED_HEADERS, &[])
        .unwrap();
    handshake.go("disk").unwrap().read(0, 512).unwrap();
}

fn dribbled_and_joined(fixture: &Fixture) {
    let mut handshake = fixture.handshake();
    let mut bytes = Vec::new();
    for (option, data) in [
        (wire::OPT_INFO, export_request(b"disk", &[])),
        (wire::OPT_LIST, Vec::new()),
    ] {
        bytes.extend(wire::IHAVEOPT.to_be_bytes());
        bytes.extend(option.to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
    }
    for byte in &bytes {
        handshake.connection.send(&[*byte]).unwrap();
    }
    let answer_both = |handshake: &mut Handshake| {
        for option in [wire::OPT_INFO, wire::OPT_LIST] {
            loop {
                let reply = handshake.reply().unwrap();
                assert_eq!(reply.option, option);
                if reply.is_final() {
                    break assert_eq!(reply.kind, wire::REP_ACK);
                }
            }
        }
    };
    answer_both(&mut handshake);
    handshake.connection.send(&bytes).unwrap();
    answer_both(&mut handshake);
}

/// A peer that is not known yet may not hold a connection for ever.
#[test]
fn an_idle_handshake_is_ended() {
    let fixture = Fixture::start("idle-hs");
    let mut silent = fixture.address.connect().unwrap();
    let mut talking = fixture.handshake();
    let start = Instant::now();
    let end = Duration::from_secs(25);
    // Talking does not extend it: 1 byte now and then is the slow-loris attack.
    let talker = std::thread::spawn(move || {
        while start.elapsed() < end {
            if matches!(talking.verdict(wire::OPT_LIST, &[]), Err(Failure::Io(_))) {
                return start.elapsed();
            }
            wait::pass(Duration::from_millis(200));
        }
        panic!("a client that only haggles is still connected after {end:?}");
    });
    silent.until_closed(end).unwrap();
    let (silent, talking) = (start.elapsed(), talker.join().unwrap());
    for (who, ended) in [("silent", silent), ("talking", talking)] {
        assert!(
            ended >= Duration::from_secs(4),
            "a slow but honest client would be cut off: {who} after {ended:?}"
        );
    }
    // Transmission has no such limit, and the daemon serves on.
    for wishes in STYLES {
        fixture.open(wishes).read(0, 512).unwrap();
    }
}
