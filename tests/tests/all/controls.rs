//! The checkers themselves, against other servers: they pass a sound one and find fault with a lossy one.

use ashlar_tests::campaign::{self, Campaign, Victim};
use ashlar_tests::nbd::{self, Wishes, wire};
use ashlar_tests::reference::Reference;
use ashlar_tests::seed;

fn small(seed: u64) -> Campaign {
    // nbdkit and qemu-nbd of the distributions this runs on have no extended headers.
    Campaign {
        rounds: 4,
        styles: vec![Wishes::SIMPLE, Wishes::STRUCTURED],
        most_operations: 2_000,
        ..Campaign::new(seed)
    }
}

/// nbdkit's file plugin answers a write when the page cache has it, which outlives the process.
#[test]
fn crash_checker_passes_a_server_that_keeps_what_it_answered() {
    let campaign = small(seed::of_run("crash control"));
    let mut server = Reference::nbdkit(campaign.volume_bytes(), &["file", "{image}"]);
    // A read and a write of a page cache are not atomic against each other, so readers could see halves of a block.
    let alone = Campaign {
        connections: 1,
        ..campaign
    };
    let report = campaign::run(&alone, &mut server).expect("a sound server");
    assert!(
        report.answered_writes > 0 && report.rounds == 4,
        "{report:?}"
    );
}

#[test]
fn crash_checker_finds_a_server_that_forgets_everything() {
    let campaign = small(seed::of_run("crash control"));
    let size = format!("size={}", campaign.volume_bytes());
    let mut server = Reference::nbdkit(campaign.volume_bytes(), &["memory", &size]);
    let error =
        campaign::run(&campaign, &mut server).expect_err("a memory disk loses all at a kill");
    assert!(
        error.contains("allowed") || error.contains("lost"),
        "{error}"
    );
}

/// The cow filter keeps writes in a temporary file that goes away with the process: what was committed before stays, so
/// only the newest answered writes are lost.
#[test]
fn crash_checker_finds_a_server_that_forgets_the_newest_writes() {
    let campaign = small(seed::of_run("crash control"));
    let mut server = Reference::nbdkit(
        campaign.volume_bytes(),
        &["--filter=cow", "file", "{image}"],
    );
    campaign::run(&campaign, &mut server).expect_err("an overlay is lost at a kill");
}

/// The tests' client speaks with servers that others wrote.
#[test]
fn the_client_understands_other_servers() {
    let nbdkit = Reference::nbdkit(16 << 20, &["file", "{image}"]);
    let qemu = Reference::qemu_nbd(16 << 20, &["{image}"]);
    for address in [nbdkit.address(), qemu.address()] {
        for wishes in [
            Wishes::SIMPLE,
            Wishes {
                allocation: false,
                ..Wishes::STRUCTURED
            },
            Wishes::STRUCTURED,
        ] {
            let mut client = nbd::open(&address, "", wishes).unwrap();
            assert_eq!(client.size_bytes, 16 << 20);
            assert_ne!(client.flags & wire::TRANSMIT_FLUSH, 0);
            let data: Vec<u8> = (0..9000).map(|n| n as u8).collect();
            client.write(4095, &data).unwrap();
            client.flush().unwrap();
            assert_eq!(client.read(4095, 9000).unwrap(), data);
            client.write_zeroes(5000, 100, 0).unwrap();
            assert_eq!(client.read(5000, 100).unwrap(), vec![0; 100]);
            assert_eq!(
                client.read(16 << 20, 512).unwrap_err().errno(),
                Some(wire::EINVAL)
            );
            if wishes.allocation {
                let extents = client.allocation(0, 16 << 20, 0).unwrap();
                assert_eq!(extents.iter().map(|extent| extent.0).sum::<u64>(), 16 << 20);
            }
            client.disconnect().unwrap();
        }
    }
}
