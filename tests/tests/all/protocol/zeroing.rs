//! Requests that make a range read as zeros.

use ashlar_tests::nbd::wire;

use super::requests::{each_style, errno};
use super::{Fixture, Row, SIZE};

#[test]
fn every_row_of_the_zeroing() {
    Fixture::start("zeroing").check(ROWS);
}

const ROWS: &[Row] = &[
    ("WRITE_ZEROES and TRIM of the whole volume", whole_volume),
    (
        "TRIM and WRITE_ZEROES that are not aligned leave their neighbours alone",
        unaligned_zeroes,
    ),
    ("WRITE_ZEROES: NO_HOLE and FAST_ZERO", zero_flags),
];

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
