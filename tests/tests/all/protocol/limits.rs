//! What a peer can make the daemon hold.

use std::time::Duration;

use ashlar_tests::nbd::{Handshake, Wishes};
use ashlar_tests::process::Usage;
use ashlar_tests::wait;

use super::Fixture;

/// Idle connections cost little, come in numbers, and leave nothing behind.
#[test]
fn four_hundred_idle_connections() {
    let fixture = Fixture::start("idle-conns");
    fixture.open(Wishes::SIMPLE).write(0, b"before").unwrap();
    let before: Usage = fixture.daemon().usage();
    let half_open: Vec<_> = (0..200)
        .map(|_| Handshake::begin(&fixture.address).expect("greeted"))
        .collect();
    let mut idle: Vec<_> = (0..200).map(|_| fixture.open(Wishes::SIMPLE)).collect();
    for client in &mut idle {
        assert_eq!(client.read(0, 6).unwrap(), b"before");
    }
    let during = fixture.daemon().usage();
    let grown = during.resident_bytes.saturating_sub(before.resident_bytes);
    assert!(grown < 128 << 20, "400 idle connections cost {grown} bytes");
    drop((half_open, idle));
    wait::until(
        Duration::from_secs(20),
        "the connections are closed",
        || {
            let descriptors = fixture.daemon().usage().descriptors;
            if descriptors <= before.descriptors + 4 {
                Ok(())
            } else {
                Err(format!("{descriptors} descriptors"))
            }
        },
    );
}
