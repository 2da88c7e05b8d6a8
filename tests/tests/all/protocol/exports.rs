//! Options that name an export: EXPORT_NAME, INFO and GO.

use std::collections::HashSet;
use std::io::Write;

use ashlar_tests::nbd::{Handshake, Info, Wishes, export_request, wire};

use super::{Fixture, Row, SIZE, SOON};

#[test]
fn every_row_of_the_exports() {
    Fixture::start("exports").check(ROWS);
}

pub(super) const ROWS: &[Row] = &[
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
        "a request sent together with GO is answered",
        request_behind_go,
    ),
];

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
            kinds.iter().collect::<HashSet<_>>().len(),
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
