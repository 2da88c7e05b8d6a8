use super::*;
use crate::nbd::session::{Session, transmission_flag};
use crate::nbd::wire::command as cmd;
use crate::nbd::wire::command_flag as flag;
use crate::units::VolumeId;
use proptest::prelude::*;
use uuid::Uuid;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 256 * MIB;

fn session(style: ReplyStyle) -> Session {
    Session {
        volume: VolumeId(Uuid::nil()),
        style,
        base_allocation: style != ReplyStyle::Simple,
        read_only: false,
        token: None,
        size_bytes: SIZE,
    }
}

fn read_only(style: ReplyStyle) -> Session {
    Session {
        read_only: true,
        token: None,
        ..session(style)
    }
}

fn raw(command: u16, flags: u16, offset: u64, length: u64) -> RawRequest {
    RawRequest {
        flags,
        command,
        cookie: 0x1122_3344_5566_7788,
        offset,
        length,
    }
}

use ReplyStyle::{Extended, Simple, Structured};

fn served(session: &Session, raw: RawRequest) -> Request {
    match raw.check(session) {
        Verdict::Serve(request) => request,
        other => panic!("{raw:?} in {:?}: {other:?}", session.style),
    }
}

fn refused(session: &Session, raw: RawRequest, error: RequestError, payload_bytes: u32) {
    assert_eq!(
        raw.check(session),
        Verdict::Refuse {
            error,
            payload_bytes
        },
        "{raw:?} in {:?}",
        session.style
    );
}

/// WRITE's flags in a session of this style.
fn write_flags(style: ReplyStyle) -> u16 {
    if style == Extended {
        flag::PAYLOAD_LEN
    } else {
        0
    }
}

#[test]
fn nothing_to_do_is_done() {
    for style in [Simple, Structured, Extended] {
        let session = session(style);
        for offset in [0, 1, 4095, SIZE] {
            for command in [cmd::READ, cmd::TRIM, cmd::CACHE, cmd::WRITE_ZEROES] {
                assert_eq!(served(&session, raw(command, 0, offset, 0)).length, 0);
            }
            let write = served(&session, raw(cmd::WRITE, write_flags(style), offset, 0));
            assert_eq!(write.payload_bytes(), 0);
        }
        refused(
            &session,
            raw(cmd::READ, 0, SIZE + 1, 0),
            RequestError::PastEnd,
            0,
        );
    }
    refused(
        &session(Structured),
        raw(cmd::BLOCK_STATUS, 0, 0, 0),
        RequestError::StatusOfNothing,
        0,
    );
}

#[test]
fn past_the_end_is_enospc_for_what_writes_and_einval_for_the_rest() {
    for style in [Simple, Structured, Extended] {
        let session = session(style);
        let ranges = [
            (SIZE - 4096, 4097),
            (SIZE, 1),
            (u64::MAX, 1),
            (u64::MAX - 4095, 4096),
            (u64::MAX, MIB),
        ];
        for (offset, length) in ranges {
            for command in [cmd::READ, cmd::TRIM, cmd::CACHE] {
                refused(
                    &session,
                    raw(command, 0, offset, length),
                    RequestError::PastEnd,
                    0,
                );
            }
            refused(
                &session,
                raw(cmd::WRITE, write_flags(style), offset, length),
                RequestError::NoRoomPastEnd,
                length as u32,
            );
            refused(
                &session,
                raw(cmd::WRITE_ZEROES, 0, offset, length),
                RequestError::NoRoomPastEnd,
                0,
            );
        }
    }
    refused(
        &session(Structured),
        raw(cmd::BLOCK_STATUS, 0, SIZE - 1, 2),
        RequestError::PastEnd,
        0,
    );
}

#[test]
fn fua_is_taken_on_every_command() {
    for style in [Simple, Structured, Extended] {
        let session = session(style);
        for command in [cmd::READ, cmd::TRIM, cmd::CACHE, cmd::WRITE_ZEROES] {
            assert!(served(&session, raw(command, flag::FUA, 0, 4096)).fua);
        }
        assert!(served(&session, raw(cmd::FLUSH, flag::FUA, 0, 0)).fua);
        let flags = flag::FUA | write_flags(style);
        assert!(served(&session, raw(cmd::WRITE, flags, 0, 4096)).fua);
        if style != Simple {
            assert!(served(&session, raw(cmd::BLOCK_STATUS, flag::FUA, 0, 4096)).fua);
        }
    }
}

#[test]
fn a_stray_flag_is_einval_and_the_payload_is_eaten() {
    for style in [Simple, Structured, Extended] {
        let session = session(style);
        for bit in 0..16 {
            let bit = 1u16 << bit;
            for command in 0..=7 {
                if command == cmd::DISC {
                    assert_eq!(raw(command, bit, 9, 9).check(&session), Verdict::Disconnect);
                    continue;
                }
                let allowed = match command {
                    cmd::READ if style != Simple => flag::DF,
                    cmd::WRITE => write_flags(style),
                    cmd::WRITE_ZEROES => flag::NO_HOLE | flag::FAST_ZERO,
                    cmd::BLOCK_STATUS if style == Extended => flag::REQ_ONE | flag::PAYLOAD_LEN,
                    cmd::BLOCK_STATUS => flag::REQ_ONE,
                    _ => 0,
                } | flag::FUA;
                let base = if command == cmd::WRITE {
                    write_flags(style)
                } else {
                    0
                };
                let length = if command == cmd::FLUSH { 0 } else { 512 };
                let request = raw(command, bit | base, 0, length);
                let carries = command == cmd::WRITE
                    || (style == Extended && (bit | base) & flag::PAYLOAD_LEN != 0);
                let payload = if carries { length as u32 } else { 0 };
                match request.check(&session) {
                    Verdict::Serve(_) => assert!(bit & allowed != 0, "{request:?} {style:?}"),
                    Verdict::Refuse {
                        error,
                        payload_bytes,
                    } => {
                        let no_context =
                            command == cmd::BLOCK_STATUS && error == RequestError::NoContext;
                        assert!(no_context || bit & allowed == 0, "{request:?} {style:?}");
                        assert_eq!(error.errno() as u32, 22);
                        assert_eq!(payload_bytes, payload, "{request:?} {style:?}");
                    }
                    other => panic!("{request:?}: {other:?}"),
                }
            }
        }
    }
}

#[test]
fn df_needs_chunks() {
    refused(
        &session(Simple),
        raw(cmd::READ, flag::DF, 0, 4096),
        RequestError::BadFlags,
        0,
    );
    let request = served(&session(Structured), raw(cmd::READ, flag::DF, 0, 65536));
    assert_eq!(
        request.command,
        Command::Read {
            dont_fragment: true
        }
    );
}

#[test]
fn unknown_commands_are_einval() {
    for command in [8, 9, 0x7fff, 0xffff] {
        for style in [Simple, Structured] {
            // RESIZE (8) is not advertised.
            refused(
                &session(style),
                raw(command, 0, 0, 512),
                RequestError::UnknownCommand,
                0,
            );
        }
        refused(
            &session(Extended),
            raw(command, flag::PAYLOAD_LEN, 0, 512),
            RequestError::UnknownCommand,
            512,
        );
    }
}

#[test]
fn changes_to_a_read_only_export_are_eperm() {
    for style in [Simple, Structured, Extended] {
        let session = read_only(style);
        let flags = write_flags(style);
        refused(
            &session,
            raw(cmd::WRITE, flags, 0, 4096),
            RequestError::ReadOnly,
            4096,
        );
        refused(
            &session,
            raw(cmd::WRITE, flags, SIZE, 4096),
            RequestError::ReadOnly,
            4096,
        );
        refused(
            &session,
            raw(cmd::TRIM, 0, 0, 4096),
            RequestError::ReadOnly,
            0,
        );
        refused(
            &session,
            raw(cmd::WRITE_ZEROES, flag::NO_HOLE, 0, 0),
            RequestError::ReadOnly,
            0,
        );
        served(&session, raw(cmd::READ, 0, 0, 4096));
        served(&session, raw(cmd::FLUSH, 0, 0, 0));
        served(&session, raw(cmd::CACHE, 0, 0, 4096));
    }
}

#[test]
fn flush_takes_no_range() {
    for (offset, length) in [(1, 0), (0, 1), (4096, 4096)] {
        refused(
            &session(Structured),
            raw(cmd::FLUSH, 0, offset, length),
            RequestError::FlushWithRange,
            0,
        );
    }
}

#[test]
fn thirty_two_mebibytes_are_the_most_a_payload_may_have() {
    let session = session(Structured);
    let most = u64::from(MAX_PAYLOAD_BYTES);
    served(&session, raw(cmd::READ, 0, 0, most));
    refused(
        &session,
        raw(cmd::READ, 0, 0, 33 * MIB),
        RequestError::TooLong,
        0,
    );
    assert_eq!(
        served(&session, raw(cmd::WRITE, 0, 0, most)).payload_bytes(),
        MAX_PAYLOAD_BYTES
    );
    for length in [most + 1, 33 * MIB, 0xffff_ffff] {
        assert_eq!(
            raw(cmd::WRITE, 0, 0, length).check(&session),
            Verdict::Close(CloseReason::PayloadTooLong(length))
        );
    }
    served(&session, raw(cmd::CACHE, 0, 0, 64 * MIB));
    served(&session, raw(cmd::TRIM, 0, 0, SIZE));
    let zeroes = served(
        &session,
        raw(cmd::WRITE_ZEROES, flag::FAST_ZERO | flag::NO_HOLE, 0, SIZE),
    );
    assert_eq!(
        zeroes.command,
        Command::WriteZeroes {
            no_hole: true,
            fast_only: true
        }
    );
}

#[test]
fn block_status_needs_a_context() {
    let without = Session {
        base_allocation: false,
        ..session(Structured)
    };
    refused(
        &without,
        raw(cmd::BLOCK_STATUS, 0, 0, 4096),
        RequestError::NoContext,
        0,
    );
    let request = served(
        &session(Structured),
        raw(cmd::BLOCK_STATUS, flag::REQ_ONE, 0, SIZE),
    );
    assert_eq!(
        request.command,
        Command::BlockStatus {
            one_extent: true,
            payload_bytes: 0
        }
    );
}

#[test]
fn a_status_payload_names_the_one_context_once() {
    let session = session(Extended);
    assert!(session.flags() & transmission_flag::BLOCK_STATUS_PAYLOAD != 0);
    let header = raw(cmd::BLOCK_STATUS, flag::PAYLOAD_LEN, 4096, 12);
    let request = served(&session, header);
    assert_eq!((request.payload_bytes(), request.length), (12, 0));
    let payload = |length: u64, ids: &[u32]| {
        let mut bytes = length.to_be_bytes().to_vec();
        for id in ids {
            bytes.extend_from_slice(&id.to_be_bytes());
        }
        bytes
    };
    let whole = SIZE - 4096;
    let complete = request
        .with_status_payload(&session, &payload(whole, &[1]))
        .unwrap();
    assert_eq!((complete.length, complete.payload_bytes()), (whole, 0));
    for (bytes, error) in [
        (payload(4096, &[]), RequestError::BadStatusPayload),
        (payload(4096, &[2]), RequestError::BadStatusPayload),
        (payload(4096, &[1, 1]), RequestError::BadStatusPayload),
        (vec![0; 7], RequestError::BadStatusPayload),
        (payload(0, &[1]), RequestError::StatusOfNothing),
        (payload(whole + 1, &[1]), RequestError::PastEnd),
        (payload(u64::MAX, &[1]), RequestError::PastEnd),
    ] {
        assert_eq!(request.with_status_payload(&session, &bytes), Err(error));
    }
    refused(
        &session,
        raw(cmd::BLOCK_STATUS, flag::PAYLOAD_LEN, 0, 0),
        RequestError::BadStatusPayload,
        0,
    );
    // Not advertised without a context.
    let without = Session {
        base_allocation: false,
        ..session.clone()
    };
    assert!(without.flags() & transmission_flag::BLOCK_STATUS_PAYLOAD == 0);
    refused(&without, header, RequestError::UnexpectedPayload, 12);
}

#[test]
fn extended_headers_have_a_payload_when_they_say_so() {
    let session = session(Extended);
    assert_eq!(
        raw(cmd::WRITE, 0, 0, 512).check(&session),
        Verdict::Close(CloseReason::AmbiguousPayload)
    );
    refused(
        &session,
        raw(cmd::TRIM, flag::PAYLOAD_LEN, 0, 512),
        RequestError::UnexpectedPayload,
        512,
    );
    assert_eq!(
        raw(cmd::READ, flag::PAYLOAD_LEN, 0, 1 << 40).check(&session),
        Verdict::Close(CloseReason::PayloadTooLong(1 << 40))
    );
    // Effect lengths have 64 bits.
    let huge = Session {
        size_bytes: 1 << 50,
        ..session
    };
    assert_eq!(served(&huge, raw(cmd::TRIM, 0, 0, 1 << 50)).length, 1 << 50);
    refused(
        &huge,
        raw(cmd::READ, 0, 0, 1 << 40),
        RequestError::TooLong,
        0,
    );
}

#[test]
fn a_bad_magic_closes() {
    for style in [Simple, Structured, Extended] {
        let mut bytes = Vec::new();
        encode(style, &raw(cmd::READ, 0, 0, 1), &mut bytes);
        bytes[3] ^= 1;
        assert!(matches!(
            RawRequest::parse(style, &bytes),
            Some(Err(CloseReason::BadMagic(_)))
        ));
    }
}

fn any_style() -> impl Strategy<Value = ReplyStyle> {
    prop_oneof![Just(Simple), Just(Structured), Just(Extended)]
}

proptest! {
    #[test]
    fn headers_survive_the_wire(
        style in any_style(),
        flags in any::<u16>(),
        command in any::<u16>(),
        cookie in any::<u64>(),
        offset in any::<u64>(),
        length in any::<u64>(),
        behind in prop::collection::vec(any::<u8>(), 0..8),
    ) {
        let length = if style == Extended { length } else { length & 0xffff_ffff };
        let sent = RawRequest { flags, command, cookie, offset, length };
        let mut bytes = Vec::new();
        encode(style, &sent, &mut bytes);
        prop_assert_eq!(bytes.len(), RawRequest::header_bytes(style));
        prop_assert_eq!(RawRequest::parse(style, &bytes[..bytes.len() - 1]), None);
        bytes.extend_from_slice(&behind);
        prop_assert_eq!(RawRequest::parse(style, &bytes), Some(Ok(sent)));
    }

    /// Whatever comes, the verdict is sane: what is served lies inside, what is swallowed is bounded.
    #[test]
    fn no_header_gets_past_the_table(
        style in any_style(),
        is_read_only in any::<bool>(),
        flags in prop_oneof![0..64u16, any::<u16>()],
        command in prop_oneof![4 => 0..9u16, 1 => any::<u16>()],
        offset in prop_oneof![0..2 * SIZE, any::<u64>()],
        length in prop_oneof![0..64u64, 0..2 * SIZE, any::<u64>()],
    ) {
        let length = if style == Extended { length } else { length & 0xffff_ffff };
        let session = if is_read_only { read_only(style) } else { session(style) };
        match raw(command, flags, offset, length).check(&session) {
            Verdict::Serve(request) => {
                // A status payload brings the real length, and is checked when it is read.
                let to_come = matches!(request.command, Command::BlockStatus { payload_bytes: 1.., .. });
                if to_come {
                    let mut payload = [0; 12];
                    payload[..8].copy_from_slice(&length.to_be_bytes());
                    payload[8..].copy_from_slice(&1u32.to_be_bytes());
                    if let Ok(request) = request.with_status_payload(&session, &payload) {
                        prop_assert!(request.offset.checked_add(request.length).unwrap() <= SIZE);
                    }
                } else {
                    prop_assert!(request.offset.checked_add(request.length).unwrap() <= SIZE);
                }
                prop_assert!(request.payload_bytes() <= MAX_PAYLOAD_BYTES);
                prop_assert_eq!(request.offset, offset);
                let changes = matches!(
                    request.command,
                    Command::Write | Command::Trim | Command::WriteZeroes { .. }
                );
                prop_assert!(!(is_read_only && changes));
            }
            Verdict::Refuse { payload_bytes, .. } => prop_assert!(payload_bytes <= MAX_PAYLOAD_BYTES),
            Verdict::Disconnect => prop_assert_eq!(command, cmd::DISC),
            Verdict::Close(_) => prop_assert!(
                length > u64::from(MAX_PAYLOAD_BYTES) || (style == Extended && command == cmd::WRITE)
            ),
        }
    }

    #[test]
    fn no_bytes_panic(style in any_style(), bytes in prop::collection::vec(any::<u8>(), 0..64)) {
        let _ = RawRequest::parse(style, &bytes);
        let session = session(style);
        let request = Request {
            cookie: 0,
            offset: 0,
            length: 0,
            command: Command::BlockStatus { one_extent: false, payload_bytes: 12 },
            fua: false,
        };
        let _ = request.with_status_payload(&session, &bytes);
    }
}
