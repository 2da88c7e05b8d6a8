//! The protocol, row by row, over a real socket: what the specification demands of each edge case, with the rows that
//! other servers get wrong. Sources: doc/proto.md of NetworkBlockDevice/nbd; docs/nbd.md has the table in words.

mod handshake;
mod limits;
mod read_only;
mod replies;
mod requests;

use std::panic::{AssertUnwindSafe, catch_unwind};

use ashlar_tests::daemon::{Daemon, Setup};
use ashlar_tests::nbd::{self, Address, Failure, Handshake, Transmission, Wishes};
use ashlar_tests::pattern::BLOCK;

/// Size of the volume under test: two chunks and a bit, so that requests cross chunk boundaries.
const SIZE: u64 = (129 << 20) + BLOCK as u64;
const STYLES: [Wishes; 3] = [Wishes::SIMPLE, Wishes::STRUCTURED, Wishes::EXTENDED];

/// A daemon with a volume `disk`.
struct Fixture {
    daemon: Daemon,
    address: Address,
}

type Row = (&'static str, fn(&Fixture));

impl Fixture {
    fn start(test: &str) -> Fixture {
        let daemon = Setup::default().start(test);
        daemon.create("disk", &SIZE.to_string());
        let address = daemon.address();
        Fixture { daemon, address }
    }

    fn handshake(&self) -> Handshake {
        Handshake::begin(&self.address).expect("a greeting")
    }

    fn open(&self, wishes: Wishes) -> Transmission {
        self.try_open(wishes)
            .unwrap_or_else(|error| panic!("{wishes:?}: {error}"))
    }

    fn try_open(&self, wishes: Wishes) -> Result<Transmission, Failure> {
        nbd::open(&self.address, "disk", wishes)
    }

    /// Runs all rows, then says which ones failed. After each row the daemon must still serve.
    fn check(&self, rows: &[Row]) {
        let mut failed = Vec::new();
        for (name, row) in rows {
            let outcome = caught(|| row(self)).and_then(|()| {
                caught(|| {
                    let mut client = self.open(Wishes::SIMPLE);
                    client.read(0, 512).expect("a bystander is served");
                    client.disconnect().expect("a bystander leaves");
                })
            });
            if let Err(why) = outcome {
                failed.push(format!("* {name}\n    {}", why.replace('\n', "\n    ")));
            }
        }
        assert!(
            failed.is_empty(),
            "{} of {} rows failed:\n{}",
            failed.len(),
            rows.len(),
            failed.join("\n")
        );
    }
}

/// Runs `row`; a panic becomes its message. (Its place is in the captured output.)
fn caught(row: impl FnOnce()) -> Result<(), String> {
    catch_unwind(AssertUnwindSafe(row)).map_err(|panic| {
        panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .unwrap_or_else(|| "a panic without words".to_owned())
    })
}
