//! Single requests: which are served, which are refused and with what, and that a refusal leaves the connection in step.

use ashlar_tests::nbd::{HeaderStyle, Request, Transmission, Wishes, wire};
use ashlar_tests::seed::{self, Rng};

use super::{Fixture, Row, SIZE, STYLES};

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
    ("CACHE of 64 MiB and of the whole volume: answered", cache),
    (
        "1 to 4097 bytes at odd offsets, against a model",
        unaligned_model,
    ),
];

pub(super) fn each_style(fixture: &Fixture, check: impl Fn(&mut Transmission)) {
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

pub(super) fn errno(
    client: &mut Transmission,
    command: u16,
    offset: u64,
    length: u64,
    flags: u16,
) -> u32 {
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
