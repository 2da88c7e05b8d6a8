mod client;

use super::*;
use crate::nbd::session::transmission_flag as flag;
use client::{Client, Reply, info_data, meta_data, option_bytes};
use proptest::prelude::*;
use uuid::Uuid;

const FIXED: u32 = 1;
const FIXED_NO_ZEROES: u32 = 3;

const UNSUP: u32 = option_reply::ERR_UNSUP;
const INVALID: u32 = option_reply::ERR_INVALID;
const ACK: u32 = option_reply::ACK;
const INFO: u32 = option_reply::INFO;

#[test]
fn unknown_client_flags_close() {
    for flags in [4, 8, 0x8000_0000, u32::MAX] {
        let client = Client::connect(TlsMode::Off, flags);
        assert_eq!(client.closed(), CloseReason::UnknownClientFlags(flags));
    }
}

#[test]
fn unknown_options_are_skipped_whatever_their_length() {
    let mut client = Client::plain();
    for length in [0, 16, 64 << 10, (64 << 10) + 1, 2 << 20] {
        for option in [0, 4, 12, 99, u32::MAX] {
            assert_eq!(client.kinds(option, &vec![7; length]), [UNSUP], "{length}");
        }
        assert_eq!(client.kinds(option::LIST, &[]), [2, 2, ACK]);
    }
}

#[test]
fn an_option_announced_too_long_closes_at_once() {
    let mut client = Client::plain();
    let mut bytes = option_bytes(99, &[]);
    bytes[12..].copy_from_slice(&u32::MAX.to_be_bytes());
    client.send(&bytes);
    assert_eq!(client.closed(), CloseReason::TooManyBytes);
}

#[test]
fn limits_end_a_handshake_that_does_not() {
    let limits = Limits {
        max_options: 3,
        ..Limits::default()
    };
    let mut client = Client::connect_with(TlsMode::Off, limits, FIXED);
    for _ in 0..3 {
        assert_eq!(client.kinds(99, &[]), [UNSUP]);
    }
    assert!(client.kinds(99, &[]).is_empty());
    assert_eq!(client.closed(), CloseReason::TooManyOptions);
}

#[test]
fn a_bad_option_magic_closes() {
    let mut client = Client::plain();
    client.send(b"IHAVEOPTIHAVEOPT");
    // "IHAV" as the option and "EOPT" as the length: more than anyone may announce.
    assert_eq!(client.closed(), CloseReason::TooManyBytes);
    let mut client = Client::plain();
    client.send(b"NBDMAGIC\0\0\0\x07\0\0\0\0");
    assert_eq!(client.closed(), CloseReason::BadOptionMagic);
}

#[test]
fn list_names_every_export() {
    let mut client = Client::plain();
    let replies = client.option(option::LIST, &[]);
    assert_eq!(replies[0].data, b"\0\0\0\x04diskthe disk volume");
    assert_eq!(replies[2].kind, ACK);
    assert_eq!(client.kinds(option::LIST, b"x"), [INVALID]);
}

#[test]
fn abort_is_acknowledged_and_its_data_ignored() {
    for data in [&b""[..], b"whatever"] {
        let mut client = Client::plain();
        assert_eq!(client.kinds(option::ABORT, data), [ACK]);
        assert_eq!(client.closed(), CloseReason::Aborted);
    }
}

#[test]
fn starttls_without_tls_is_policy() {
    let mut client = Client::plain();
    assert_eq!(
        client.kinds(option::STARTTLS, &[]),
        [option_reply::ERR_POLICY]
    );
    assert_eq!(client.kinds(option::STARTTLS, b"x"), [INVALID]);
}

#[test]
fn info_then_go_tell_the_same() {
    for types in [&[][..], &[3, 1, 2, 0, 77, 3, 1]] {
        let mut client = Client::structured();
        let data = info_data(b"disk", types);
        let strip = |replies: Vec<Reply>| -> Vec<(u32, Vec<u8>)> {
            replies.into_iter().map(|r| (r.kind, r.data)).collect()
        };
        let info = strip(client.option(option::INFO, &data));
        let go = strip(client.option(option::GO, &data));
        assert_eq!(info, go);
        let expected = if types.is_empty() { 2 } else { 5 };
        assert_eq!(info.len(), expected, "each type once, unknown ones not");
        assert_eq!(info[0].1.len(), 12);
        assert_eq!(info[0].1[..10], [0, 0, 0, 0, 0, 0, 4, 0, 0, 0]);
        assert_eq!(
            u16::from_be_bytes([info[0].1[10], info[0].1[11]]),
            client.entered().flags()
        );
        if !types.is_empty() {
            assert_eq!(info[1].1, b"\0\x01disk");
            assert_eq!(info[2].1, b"\0\x02the disk volume");
            assert_eq!(info[3].1, [0, 3, 0, 0, 0, 1, 0, 0, 16, 0, 2, 0, 0, 0]);
        }
        assert_eq!(info.last().unwrap(), &(ACK, vec![]));
    }
}

#[test]
fn go_finds_by_name_and_by_id() {
    for name in ["disk", "00000000-0000-0000-0000-000000000001"] {
        let mut client = Client::plain();
        assert_eq!(
            client.kinds(option::GO, &info_data(name.as_bytes(), &[1])),
            [INFO, INFO, ACK]
        );
        let session = client.entered();
        assert_eq!(session.volume, VolumeId(Uuid::from_u128(1)));
        assert_eq!(session.style, ReplyStyle::Simple);
        assert_eq!(session.flags() & flag::SEND_DF, 0);
        assert_ne!(session.flags() & flag::CAN_MULTI_CONN, 0);
    }
}

#[test]
fn an_export_that_cannot_be_served_is_an_error_and_the_talk_goes_on() {
    let mut client = Client::structured();
    for (name, kind) in [
        ("nowhere", option_reply::ERR_UNKNOWN),
        ("", option_reply::ERR_UNKNOWN),
        ("broken", option_reply::ERR_PLATFORM),
        ("held", option_reply::ERR_POLICY),
        ("late", option_reply::ERR_SHUTDOWN),
    ] {
        for option in [option::INFO, option::GO] {
            assert_eq!(
                client.kinds(option, &info_data(name.as_bytes(), &[])),
                [kind]
            );
        }
        for option in [option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
            assert_eq!(
                client.kinds(option, &meta_data(name.as_bytes(), &[])),
                [kind]
            );
        }
    }
    let replies = client.option(option::INFO, &info_data(b"broken", &[]));
    assert_eq!(replies[0].data, b"its store is poisoned");
    assert_eq!(
        client.kinds(option::GO, &info_data(b"disk", &[])),
        [INFO, ACK]
    );
}

#[test]
fn malformed_go_is_invalid_and_the_talk_goes_on() {
    let good = info_data(b"disk", &[3]);
    let mut long_name = info_data(&[b'x'; 4097], &[]);
    let mut trailing = good.clone();
    trailing.push(0);
    let mut wrong_count = good.clone();
    wrong_count[9] = 2;
    let mut few_count = good.clone();
    few_count[9] = 0;
    let mut name_past_end = good.clone();
    name_past_end[3] = 200;
    let mut client = Client::plain();
    for data in [
        long_name.clone(),
        trailing,
        wrong_count,
        few_count,
        name_past_end,
        info_data(b"di\0k", &[]),
        info_data(b"di\xffk", &[]),
        good[..3].to_vec(),
        good[..8].to_vec(),
        good[..9].to_vec(),
        vec![],
    ] {
        for option in [option::INFO, option::GO] {
            assert_eq!(client.kinds(option, &data), [INVALID], "{data:?}");
        }
    }
    // 4096 bytes are allowed, and nobody has that name.
    long_name = info_data(&[b'x'; 4096], &[]);
    assert_eq!(
        client.kinds(option::GO, &long_name),
        [option_reply::ERR_UNKNOWN]
    );
    // Too much to keep: another error, and still in step.
    let huge = info_data(&vec![b'x'; 100_000], &[]);
    assert_eq!(client.kinds(option::GO, &huge), [option_reply::ERR_TOO_BIG]);
    assert_eq!(
        client.kinds(option::GO, &info_data(b"disk", &[])),
        [INFO, ACK]
    );
}

#[test]
fn structured_replies_and_extended_headers_are_agreed_once() {
    let mut client = Client::plain();
    assert_eq!(client.kinds(option::STRUCTURED_REPLY, b"x"), [INVALID]);
    assert_eq!(client.kinds(option::STRUCTURED_REPLY, &[]), [ACK]);
    assert_eq!(client.kinds(option::STRUCTURED_REPLY, &[]), [INVALID]);
    assert_eq!(client.kinds(option::EXTENDED_HEADERS, b"x"), [INVALID]);
    assert_eq!(client.kinds(option::EXTENDED_HEADERS, &[]), [ACK]);
    assert_eq!(client.kinds(option::EXTENDED_HEADERS, &[]), [INVALID]);
    assert_eq!(
        client.kinds(option::STRUCTURED_REPLY, &[]),
        [option_reply::ERR_EXT_HEADER_REQD]
    );
    client.kinds(option::GO, &info_data(b"disk", &[]));
    assert_eq!(client.entered().style, ReplyStyle::Extended);
}

#[test]
fn contexts_are_chosen_for_one_export() {
    let set = option::SET_META_CONTEXT;
    let chosen = meta_data(b"disk", &["base:allocation"]);
    let mut client = Client::plain();
    assert_eq!(client.kinds(set, &chosen), [INVALID], "before structured");
    let mut client = Client::structured();
    let replies = client.option(set, &chosen);
    assert_eq!(replies[0].kind, option_reply::META_CONTEXT);
    assert_eq!(replies[0].data, b"\0\0\0\x01base:allocation");
    assert_eq!(replies[1].kind, ACK);
    client.kinds(
        option::GO,
        &info_data(b"00000000-0000-0000-0000-000000000001", &[]),
    );
    assert!(
        client.entered().base_allocation,
        "the same volume by its id"
    );

    let mut client = Client::structured();
    client.kinds(set, &chosen);
    client.kinds(option::GO, &info_data(b"other", &[]));
    assert!(!client.entered().base_allocation, "another export");

    // What replaces a choice: another choice, also one that fails, is malformed, or is of nothing.
    for (data, kinds) in [
        (meta_data(b"disk", &[]), vec![ACK]),
        (
            meta_data(b"disk", &["base:", "qemu:x", "base:no"]),
            vec![ACK],
        ),
        (
            meta_data(b"nowhere", &["base:allocation"]),
            vec![option_reply::ERR_UNKNOWN],
        ),
        (vec![1], vec![INVALID]),
    ] {
        let mut client = Client::structured();
        client.kinds(set, &chosen);
        assert_eq!(client.kinds(set, &data), kinds);
        client.kinds(option::GO, &info_data(b"disk", &[]));
        assert!(!client.entered().base_allocation);
    }

    let mut client = Client::structured();
    let twice = meta_data(
        b"disk",
        &["base:allocation", "x-unknown:leaf", "base:allocation"],
    );
    assert_eq!(client.kinds(set, &twice), [option_reply::META_CONTEXT, ACK]);

    let mut client = Client::structured();
    let mut past_end = chosen.clone();
    past_end[15] = 200;
    let mut too_many = chosen.clone();
    too_many[8..12].copy_from_slice(&u32::MAX.to_be_bytes());
    let mut trailing = chosen.clone();
    trailing.push(0);
    for data in [past_end, too_many, trailing] {
        assert_eq!(client.kinds(set, &data), [INVALID]);
    }
}

#[test]
fn contexts_can_be_listed() {
    let mut client = Client::plain();
    for (queries, any) in [
        (&[][..], true),
        (&["base:"], true),
        (&["base:allocation"], true),
        (&["qemu:", "base:other"], false),
    ] {
        let replies = client.option(option::LIST_META_CONTEXT, &meta_data(b"disk", queries));
        assert_eq!(replies.len(), 1 + usize::from(any), "{queries:?}");
        if any {
            assert_eq!(replies[0].data, b"\0\0\0\0base:allocation");
        }
    }
}

#[test]
fn export_name_enters_or_closes() {
    for (client_flags, length) in [(FIXED_NO_ZEROES, 10), (FIXED, 134), (0, 134)] {
        let mut client = Client::connect(TlsMode::Off, client_flags);
        client.send(&option_bytes(option::EXPORT_NAME, b"other"));
        assert_eq!(client.out.len(), length);
        assert_eq!(client.out[..8], (64u64 << 20).to_be_bytes());
        let session = client.entered();
        assert!(session.read_only);
        assert_eq!(client.out[8..10], session.flags().to_be_bytes());
        assert_eq!(
            session.flags() & (flag::SEND_TRIM | flag::SEND_WRITE_ZEROES),
            0
        );
        assert!(client.out[10..].iter().all(|byte| *byte == 0));
    }
    for name in [&b"nowhere"[..], b"broken", b"di\0k", &[b'x'; 5000]] {
        let mut client = Client::plain();
        client.send(&option_bytes(option::EXPORT_NAME, name));
        assert!(client.out.is_empty());
        assert_eq!(client.closed(), CloseReason::ExportNameRefused);
    }
    let mut client = Client::plain();
    client.kinds(option::EXTENDED_HEADERS, &[]);
    client.out.clear();
    client.send(&option_bytes(option::EXPORT_NAME, b"disk"));
    assert!(client.out.is_empty());
    assert_eq!(client.closed(), CloseReason::ExportNameRefused);
}

#[test]
fn a_client_without_fixed_newstyle_may_only_name_an_export() {
    let mut client = Client::connect(TlsMode::Off, 0);
    client.send(&option_bytes(option::LIST, &[]));
    assert_eq!(client.closed(), CloseReason::NotFixedNewstyle);
}

#[test]
fn requests_sent_ahead_are_kept() {
    let mut client = Client::plain();
    let mut bytes = option_bytes(option::GO, &info_data(b"disk", &[]));
    bytes.extend_from_slice(b"the first request");
    client.send(&bytes);
    client.entered();
    assert_eq!(client.machine.into_leftover(), b"the first request");
}

#[test]
fn forced_tls_lets_nothing_else_pass() {
    let mut client = Client::connect(TlsMode::Required, FIXED_NO_ZEROES);
    let go = info_data(b"disk", &[]);
    for (option, data) in [
        (option::LIST, &[][..]),
        (option::GO, &go),
        (option::STRUCTURED_REPLY, &[]),
        (option::EXTENDED_HEADERS, &[]),
        (99, b"unknown"),
    ] {
        assert_eq!(client.kinds(option, data), [option_reply::ERR_TLS_REQD]);
    }
    assert_eq!(client.kinds(option::STARTTLS, b"x"), [INVALID]);
    assert_eq!(client.kinds(option::STARTTLS, &[]), [ACK]);
    assert_eq!(client.last, Step::StartTls);
    client.machine.tls_established();
    client.run();
    assert_eq!(client.kinds(option::STARTTLS, &[]), [INVALID]);
    assert_eq!(client.kinds(option::STRUCTURED_REPLY, &[]), [ACK]);
    assert_eq!(client.kinds(option::GO, &go), [INFO, ACK]);

    let mut client = Client::connect(TlsMode::Required, FIXED_NO_ZEROES);
    client.send(&option_bytes(option::EXPORT_NAME, b"disk"));
    assert_eq!(client.closed(), CloseReason::ExportNameRefused);

    let mut client = Client::connect(TlsMode::Required, FIXED_NO_ZEROES);
    assert_eq!(client.kinds(option::ABORT, &[]), [ACK]);
}

#[test]
fn plaintext_behind_starttls_is_refused() {
    let mut client = Client::connect(TlsMode::Required, FIXED_NO_ZEROES);
    let mut bytes = option_bytes(option::STARTTLS, &[]);
    bytes.extend_from_slice(&option_bytes(option::STRUCTURED_REPLY, &[])[..1]);
    client.out.clear();
    client.send(&bytes);
    assert!(client.out.is_empty());
    assert_eq!(client.closed(), CloseReason::PlaintextBehindStartTls);
}

/// A stream of options, mostly well formed.
fn any_stream() -> impl Strategy<Value = Vec<u8>> {
    let data = prop_oneof![
        Just(vec![]),
        Just(info_data(b"disk", &[0, 1, 2, 3])),
        Just(meta_data(b"disk", &["base:allocation"])),
        prop::collection::vec(any::<u8>(), 0..40),
    ];
    let option = prop_oneof![4 => 0..13u32, 1 => any::<u32>()]
        .prop_filter("ends the talk", |option| *option != option::ABORT);
    let whole = (option, data).prop_map(|(option, data)| option_bytes(option, &data));
    let piece = prop_oneof![9 => whole, 1 => prop::collection::vec(any::<u8>(), 0..30)];
    prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

proptest! {
    /// How the bytes were cut on their way must not matter, nothing may panic, and memory stays bounded.
    #[test]
    fn cuts_do_not_matter_and_no_bytes_panic(
        stream in any_stream(),
        flags in prop_oneof![9 => 0..4u32, 1 => any::<u32>()],
        cuts in prop::collection::vec(1..50usize, 1..40),
        tls in any::<bool>(),
    ) {
        let tls = if tls { TlsMode::Required } else { TlsMode::Off };
        let mut whole = Client::connect(tls, flags);
        if !matches!(whole.last, Step::Close(_)) {
            whole.send(&stream);
        }
        let mut cut = Client::connect(tls, flags);
        let mut rest = &stream[..];
        let mut cuts = cuts.into_iter().cycle();
        while !rest.is_empty() && cut.last == Step::NeedInput {
            let (first, more) = rest.split_at(cuts.next().unwrap().min(rest.len()));
            cut.send(first);
            prop_assert!(cut.machine.input.len() <= (64 << 10) + 50);
            rest = more;
        }
        // Only TLS looks at how bytes were cut: what comes behind STARTTLS in one read is refused.
        if cut.last != Step::StartTls && whole.last != Step::Close(CloseReason::PlaintextBehindStartTls) {
            prop_assert_eq!(&whole.out, &cut.out);
            prop_assert_eq!(whole.last, cut.last);
        }
    }
}
