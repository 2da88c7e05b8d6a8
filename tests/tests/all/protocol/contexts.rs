//! Options that choose metadata contexts.

use std::collections::BTreeSet;

use ashlar_tests::nbd::{Handshake, Request, meta_request, wire};

use super::{Fixture, Row};

#[test]
fn every_row_of_the_contexts() {
    Fixture::start("contexts").check(ROWS);
}

pub(super) const ROWS: &[Row] = &[
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
];

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
