//! Option haggling.

use std::collections::BTreeSet;
use std::io::Write;
use std::time::{Duration, Instant};

use ashlar_tests::nbd::{
    Failure, Handshake, Info, Request, Wishes, export_request, meta_request, wire,
};

use ashlar_tests::wait;

use super::{Fixture, Row, SIZE, STYLES};

/// A server that means to close does so at once; this is for a loaded machine.
const SOON: Duration = Duration::from_secs(5);

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
        "EXPORT_NAME: 124 zero bytes unless both sides said NO_ZEROES",
        export_name_padding,
    ),
    (
        "EXPORT_NAME: an unknown export closes the connection",
        export_name_unknown,
    ),
    (
        "EXPORT_NAME: refused by closing under extended headers",
        export_name_after_extended,
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
    ("INFO and GO tell the same", info_then_go),
    ("INFO and GO: an unknown export is UNKNOWN", unknown_export),
    (
        "INFO and GO: names that no export can have",
        impossible_names,
    ),
    (
        "INFO and GO: lengths that do not add up are INVALID",
        malformed_requests,
    ),
    (
        "INFO and GO: unknown and repeated info types are ignored, each known one comes once",
        info_types,
    ),
    ("GO: name, description and block sizes 1/4096/32 MiB", infos),
    (
        "GO: the transmission flags are exactly what is served",
        transmission_flags,
    ),
    ("GO: the volume's id is as good as its name", export_by_id),
    (
        "SET_META_CONTEXT before structured replies: INVALID",
        set_meta_too_early,
    ),
    (
        "SET_META_CONTEXT: the same context twice is selected once",
        set_meta_twice,
    ),
    (
        "SET_META_CONTEXT: a query longer than the option is INVALID",
        set_meta_malformed,
    ),
    (
        "SET_META_CONTEXT: an unknown export is UNKNOWN",
        set_meta_unknown_export,
    ),
    (
        "SET_META_CONTEXT: unknown namespaces and leaves are ignored, `base:` too",
        set_meta_unknown_context,
    ),
    (
        "SET_META_CONTEXT: zero queries select nothing; a failed one drops the selection",
        set_meta_replaces,
    ),
    (
        "SET_META_CONTEXT: selected for another export, it does not count",
        set_meta_other_export,
    ),
    (
        "LIST_META_CONTEXT: all without queries, `base:` as a wildcard",
        list_meta,
    ),
    (
        "bytes that come one by one, options that come together",
        dribbled_and_joined,
    ),
    (
        "a request sent together with GO is answered",
        request_behind_go,
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

fn export_name_padding(fixture: &Fixture) {
    // The client checks the padding itself: it is there for 0 and 1, and absent for 3.
    for flags in [0, 1, 3] {
        let handshake = Handshake::with_client_flags(&fixture.address, flags).unwrap();
        let mut client = handshake.export_name("disk").unwrap();
        assert_eq!(client.size_bytes, SIZE);
        client.read(0, 512).unwrap();
        client.disconnect().unwrap();
    }
}

fn export_name_unknown(fixture: &Fixture) {
    let mut handshake = fixture.handshake();
    handshake
        .send_option(wire::OPT_EXPORT_NAME, b"no such export")
        .unwrap();
    assert_eq!(handshake.connection.until_closed(SOON).unwrap(), b"");
}

fn export_name_after_extended(fixture: &Fixture) {
    let mut handshake = fixture.handshake();
    handshake
        .acknowledged(wire::OPT_EXTENDED_HEADERS, &[])
        .unwrap();
    handshake
        .send_option(wire::OPT_EXPORT_NAME, b"disk")
        .unwrap();
    assert_eq!(handshake.connection.until_closed(SOON).unwrap(), b"");
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

fn info_then_go(fixture: &Fixture) {
    let wanted = [
        wire::INFO_NAME,
        wire::INFO_DESCRIPTION,
        wire::INFO_BLOCK_SIZE,
    ];
    for wanted in [&[][..], &wanted[..]] {
        let mut handshake = fixture.handshake();
        let info = handshake.infos(wire::OPT_INFO, "disk", wanted).unwrap();
        let go = handshake.infos(wire::OPT_GO, "disk", wanted).unwrap();
        assert_eq!(info, go);
        assert!(
            go.iter().any(|info| matches!(
                info,
                Info::Export {
                    size_bytes: SIZE,
                    ..
                }
            )),
            "{go:?}"
        );
    }
}

fn unknown_export(fixture: &Fixture) {
    let mut handshake = fixture.handshake();
    for option in [wire::OPT_INFO, wire::OPT_GO] {
        for name in [
            "nope",
            "disk ",
            "DISK",
            "disk/",
            "../disk",
            "00000000-0000-0000-0000-000000000000",
        ] {
            let verdict = handshake
                .verdict(option, &export_request(name.as_bytes(), &[]))
                .unwrap();
            assert_eq!(verdict, wire::REP_ERR_UNKNOWN, "{name:?}");
        }
    }
}

fn impossible_names(fixture: &Fixture) {
    let mut handshake = fixture.handshake();
    let longest = vec![b'n'; wire::STRING_MAX];
    let too_long = vec![b'n'; wire::STRING_MAX + 1];
    for option in [wire::OPT_INFO, wire::OPT_GO] {
        assert_eq!(
            handshake
                .verdict(option, &export_request(&longest, &[]))
                .unwrap(),
            wire::REP_ERR_UNKNOWN
        );
        let refused = [
            wire::REP_ERR_INVALID,
            wire::REP_ERR_UNKNOWN,
            wire::REP_ERR_TOO_BIG,
        ];
        for name in [
            too_long.as_slice(),
            b"di\0sk",
            b"disk\0",
            b"\xff\xfe",
            b"\xc0\x80",
        ] {
            let verdict = handshake
                .verdict(option, &export_request(name, &[]))
                .unwrap();
            assert!(
                refused.contains(&verdict),
                "{} bytes: {verdict:#x}",
                name.len()
            );
        }
    }
    handshake.go("disk").unwrap();
}

fn malformed_requests(fixture: &Fixture) {
    let mut handshake = fixture.handshake();
    let good = export_request(b"disk", &[wire::INFO_NAME]);
    let mut longer_name = good.clone();
    longer_name[3] = 200;
    let mut endless_name = good.clone();
    endless_name[..4].copy_from_slice(&[0xff; 4]);
    let mut more_infos = good.clone();
    more_infos[9] = 5;
    let mut many_infos = good.clone();
    many_infos[8..10].copy_from_slice(&[0xff; 2]);
    let mut trailing = good.clone();
    trailing.push(0);
    for option in [wire::OPT_INFO, wire::OPT_GO] {
        let short = [
            &[][..],
            &good[..1],
            &good[..4],
            &good[..8],
            &good[..9],
            &good[..11],
        ];
        let bad = [
            &longer_name[..],
            &endless_name,
            &more_infos,
            &many_infos,
            &trailing,
        ];
        for data in short.into_iter().chain(bad) {
            assert_eq!(
                handshake.verdict(option, data).unwrap(),
                wire::REP_ERR_INVALID,
                "{data:02x?}"
            );
        }
    }
    handshake.go("disk").unwrap();
}

fn info_types(fixture: &Fixture) {
    let mut wanted = vec![
        wire::INFO_NAME,
        0xbeef,
        wire::INFO_NAME,
        wire::INFO_EXPORT,
        wire::INFO_BLOCK_SIZE,
        4,
        9999,
    ];
    for _ in 0..2 {
        let mut handshake = fixture.handshake();
        let infos = handshake.infos(wire::OPT_INFO, "disk", &wanted).unwrap();
        let kinds: Vec<_> = infos.iter().map(std::mem::discriminant).collect();
        assert_eq!(
            kinds.len(),
            kinds.iter().collect::<std::collections::HashSet<_>>().len(),
            "{infos:?}"
        );
        assert!(
            !infos.iter().any(|info| matches!(info, Info::Other(..))),
            "{infos:?}"
        );
        // As many as the count can say; it may be refused, not mishandled.
        wanted = (0..20_000).collect();
        let verdict = handshake
            .verdict(wire::OPT_INFO, &export_request(b"disk", &wanted))
            .unwrap();
        assert!(
            [wire::REP_ACK, wire::REP_ERR_TOO_BIG, wire::REP_ERR_INVALID].contains(&verdict),
            "{verdict:#x}"
        );
        wanted.truncate(100);
    }
}

fn infos(fixture: &Fixture) {
    let wanted = [
        wire::INFO_NAME,
        wire::INFO_DESCRIPTION,
        wire::INFO_BLOCK_SIZE,
    ];
    let infos = fixture
        .handshake()
        .infos(wire::OPT_GO, "disk", &wanted)
        .unwrap();
    assert!(infos.contains(&Info::Name("disk".into())), "{infos:?}");
    assert!(
        infos
            .iter()
            .any(|i| matches!(i, Info::Description(text) if !text.is_empty())),
        "{infos:?}"
    );
    let sizes = Info::BlockSize {
        minimum: 1,
        preferred: 4096,
        max_payload: wire::PAYLOAD_MAX as u32,
    };
    assert!(infos.contains(&sizes), "{infos:?}");
}

fn transmission_flags(fixture: &Fixture) {
    let always = wire::TRANSMIT_HAS_FLAGS
        | wire::TRANSMIT_FLUSH
        | wire::TRANSMIT_FUA
        | wire::TRANSMIT_TRIM
        | wire::TRANSMIT_WRITE_ZEROES
        | wire::TRANSMIT_MULTI_CONN
        | wire::TRANSMIT_CACHE
        | wire::TRANSMIT_FAST_ZERO;
    assert_eq!(fixture.open(Wishes::SIMPLE).flags, always);
    assert_eq!(
        fixture.open(Wishes::STRUCTURED).flags,
        always | wire::TRANSMIT_DF
    );
    let extended = fixture.open(Wishes::EXTENDED).flags & !wire::TRANSMIT_BLOCK_STATUS_PAYLOAD;
    assert_eq!(extended, always | wire::TRANSMIT_DF);
}

fn export_by_id(fixture: &Fixture) {
    let shown = fixture.daemon().admin().json(["volume", "show", "disk"]);
    let id = shown["id"]
        .as_str()
        .unwrap_or_else(|| panic!("no id in {shown}"));
    let mut by_name = fixture.open(Wishes::SIMPLE);
    by_name.write(4096 * 50, &[0x42; 4096]).unwrap();
    let mut by_id = fixture.handshake().go(id).unwrap();
    assert_eq!(by_id.size_bytes, SIZE);
    assert_eq!(by_id.read(4096 * 50, 4096).unwrap(), [0x42; 4096]);
}

fn set_meta_too_early(fixture: &Fixture) {
    let request = meta_request(b"disk", &["base:allocation"]);
    assert_eq!(
        fixture
            .handshake()
            .verdict(wire::OPT_SET_META_CONTEXT, &request)
            .unwrap(),
        wire::REP_ERR_INVALID
    );
}

fn set_meta_twice(fixture: &Fixture) {
    let mut handshake = fixture.handshake();
    handshake
        .acknowledged(wire::OPT_STRUCTURED_REPLY, &[])
        .unwrap();
    let request = meta_request(b"disk", &["base:allocation", "base:allocation"]);
    assert_eq!(
        handshake
            .acknowledged(wire::OPT_SET_META_CONTEXT, &request)
            .unwrap()
            .len(),
        2,
        "one context and an ACK"
    );
}

fn set_meta_malformed(fixture: &Fixture) {
    let mut handshake = fixture.handshake();
    handshake
        .acknowledged(wire::OPT_STRUCTURED_REPLY, &[])
        .unwrap();
    let good = meta_request(b"disk", &["base:allocation"]);
    let mut long_query = good.clone();
    long_query[15] = 200;
    let mut many = good.clone();
    many[8..12].copy_from_slice(&[0xff; 4]);
    let mut trailing = good.clone();
    trailing.push(0);
    for option in [wire::OPT_SET_META_CONTEXT, wire::OPT_LIST_META_CONTEXT] {
        for data in [
            &long_query[..],
            &many,
            &trailing,
            &good[..3],
            &good[..8],
            &good[..11],
            &good[..14],
            &good[..20],
        ] {
            assert_eq!(
                handshake.verdict(option, data).unwrap(),
                wire::REP_ERR_INVALID,
                "{data:02x?}"
            );
        }
    }
    handshake.go("disk").unwrap();
}

fn set_meta_unknown_export(fixture: &Fixture) {
    let mut handshake = fixture.handshake();
    handshake
        .acknowledged(wire::OPT_STRUCTURED_REPLY, &[])
        .unwrap();
    let request = meta_request(b"nope", &["base:allocation"]);
    for option in [wire::OPT_SET_META_CONTEXT, wire::OPT_LIST_META_CONTEXT] {
        assert_eq!(
            handshake.verdict(option, &request).unwrap(),
            wire::REP_ERR_UNKNOWN
        );
    }
}

fn set_meta_unknown_context(fixture: &Fixture) {
    let mut handshake = fixture.handshake();
    handshake
        .acknowledged(wire::OPT_STRUCTURED_REPLY, &[])
        .unwrap();
    let request = meta_request(
        b"disk",
        &["base:", "base:unknown", "qemu:dirty-bitmap:x", "x-own:y"],
    );
    assert_eq!(
        handshake
            .acknowledged(wire::OPT_SET_META_CONTEXT, &request)
            .unwrap()
            .len(),
        1,
        "nothing but the ACK"
    );
}

/// The errno of a block status request after `handshake` is complete.
fn status_errno(handshake: Handshake) -> u32 {
    let mut client = handshake.go("disk").unwrap();
    let request = Request {
        command: wire::CMD_BLOCK_STATUS,
        length: 4096,
        ..Request::default()
    };
    client.ask(&request).unwrap().errno
}

fn set_meta_replaces(fixture: &Fixture) {
    for second in [
        meta_request(b"disk", &[]),
        meta_request(b"nope", &["base:allocation"]),
        b"\0".to_vec(),
    ] {
        let mut handshake = fixture.handshake();
        handshake
            .acknowledged(wire::OPT_STRUCTURED_REPLY, &[])
            .unwrap();
        handshake.select_allocation("disk").unwrap();
        handshake
            .verdict(wire::OPT_SET_META_CONTEXT, &second)
            .unwrap();
        assert_eq!(status_errno(handshake), wire::EINVAL, "after {second:02x?}");
    }
}

fn set_meta_other_export(fixture: &Fixture) {
    let admin = fixture.daemon().admin();
    admin.run(["volume", "create", "other", "--size", "1MiB"]);
    let mut handshake = fixture.handshake();
    handshake
        .acknowledged(wire::OPT_STRUCTURED_REPLY, &[])
        .unwrap();
    handshake.select_allocation("other").unwrap();
    assert_eq!(status_errno(handshake), wire::EINVAL);
    admin.run(["volume", "delete", "other", "--yes"]);
}

fn list_meta(fixture: &Fixture) {
    let mut handshake = fixture.handshake();
    handshake
        .acknowledged(wire::OPT_STRUCTURED_REPLY, &[])
        .unwrap();
    for (queries, found) in [
        (&[][..], true),
        (&["base:"], true),
        (&["base:allocation"], true),
        (&["qemu:"], false),
    ] {
        let replies = handshake
            .acknowledged(wire::OPT_LIST_META_CONTEXT, &meta_request(b"disk", queries))
            .unwrap();
        let names: BTreeSet<&[u8]> = replies
            .iter()
            .filter(|reply| reply.kind == wire::REP_META_CONTEXT)
            .map(|reply| &reply.data[4..])
            .collect();
        assert_eq!(
            names.contains(b"base:allocation".as_slice()),
            found,
            "{queries:?}: {names:?}"
        );
    }
    // Listing selects nothing.
    assert_eq!(status_errno(handshake), wire::EINVAL);
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

fn request_behind_go(fixture: &Fixture) {
    fixture.open(Wishes::SIMPLE).write(8192, &[7; 512]).unwrap();
    let mut handshake = fixture.handshake();
    let data = export_request(b"disk", &[]);
    let mut bytes = wire::IHAVEOPT.to_be_bytes().to_vec();
    bytes.extend(wire::OPT_GO.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes.extend(wire::REQUEST_MAGIC.to_be_bytes());
    bytes.extend([0; 4]);
    bytes.extend(77_u64.to_be_bytes());
    bytes.extend(8192_u64.to_be_bytes());
    bytes.extend(512_u32.to_be_bytes());
    handshake.connection.write_all(&bytes).unwrap();
    while !handshake.reply().unwrap().is_final() {}
    assert_eq!(
        handshake.connection.take_u32().unwrap(),
        wire::SIMPLE_REPLY_MAGIC
    );
    assert_eq!(
        (
            handshake.connection.take_u32().unwrap(),
            handshake.connection.take_u64().unwrap()
        ),
        (0, 77)
    );
    assert_eq!(handshake.connection.take(512).unwrap(), [7; 512]);
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
