//! Read-only exports.

use ashlar_tests::nbd::{self, HeaderStyle, Request, wire};

use super::{Fixture, STYLES};

#[test]
fn a_read_only_volume_is_read_and_not_written() {
    let fixture = Fixture::start("read-only");
    fixture.daemon().create("source", "1MiB");
    // What can be read from it: zeros.
    fixture.daemon().admin().run([
        "volume",
        "create",
        "frozen",
        "--size",
        "1MiB",
        "--read-only",
    ]);
    for wishes in STYLES {
        let mut client = nbd::open(&fixture.address, "frozen", wishes).unwrap();
        assert_ne!(client.flags & wire::TRANSMIT_READ_ONLY, 0);
        let payload = [1; 4096];
        for command in [wire::CMD_WRITE, wire::CMD_TRIM, wire::CMD_WRITE_ZEROES] {
            let payload: &[u8] = if command == wire::CMD_WRITE {
                &payload
            } else {
                &[]
            };
            // Also past the end: permission comes first or the range does, never success.
            for (offset, allowed) in [
                (0, &[wire::EPERM][..]),
                (1 << 20, &[wire::EPERM, wire::EINVAL, wire::ENOSPC]),
            ] {
                let answer = client
                    .ask(&Request {
                        command,
                        offset,
                        length: 4096,
                        payload,
                        flags: 0,
                    })
                    .unwrap();
                assert!(
                    allowed.contains(&answer.errno),
                    "command {command} at {offset}: {}",
                    answer.errno
                );
            }
        }
        client.flush().unwrap();
        assert_eq!(client.read(0, 4096).unwrap(), [0; 4096]);
        if client.style != HeaderStyle::Simple {
            client.allocation(0, 4096, 0).unwrap();
        }
        client.disconnect().unwrap();
    }
}
