//! The protocol, row by row, over a real socket: what the specification demands of each edge case, with the rows that
//! other servers get wrong. Sources: doc/proto.md of NetworkBlockDevice/nbd; docs/nbd.md has the table in words.

mod contexts;
mod exports;
mod framing;
mod handshake;
mod limits;
mod read_only;
mod replies;
mod requests;
mod zeroing;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use ashlar_tests::campaign::Victim;
use ashlar_tests::daemon::{Daemon, Setup};
use ashlar_tests::nbd::{self, Address, Failure, Handshake, Transmission, Wishes};
use ashlar_tests::pattern::BLOCK;
use ashlar_tests::reference::Reference;

/// Size of the volume under test: two chunks and a bit, so that requests cross chunk boundaries.
const SIZE: u64 = (129 << 20) + BLOCK as u64;
const STYLES: [Wishes; 3] = [Wishes::SIMPLE, Wishes::STRUCTURED, Wishes::EXTENDED];

/// A server that means to close does so at once; this is for a loaded machine.
const SOON: Duration = Duration::from_secs(5);

/// A server with an export `disk`.
struct Fixture {
    server: Server,
    address: Address,
}

enum Server {
    Ours(Daemon),
    /// To see the table find fault; kept because it ends when it is dropped.
    Another(#[expect(dead_code)] Reference),
}

type Row = (&'static str, fn(&Fixture));

impl Fixture {
    fn start(test: &str) -> Fixture {
        let daemon = Setup::default().start(test);
        daemon.create("disk", &SIZE.to_string());
        let address = daemon.address();
        Fixture {
            server: Server::Ours(daemon),
            address,
        }
    }

    fn daemon(&self) -> &Daemon {
        match &self.server {
            Server::Ours(daemon) => daemon,
            Server::Another(_) => panic!("this row needs our daemon"),
        }
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

    /// Runs all rows, then says which ones failed.
    fn check(&self, rows: &[Row]) {
        let failed = self.failures(rows);
        let text: Vec<String> = failed
            .iter()
            .map(|(name, why)| format!("* {name}\n    {why}"))
            .collect();
        assert!(
            failed.is_empty(),
            "{} of {} rows failed:\n{}",
            failed.len(),
            rows.len(),
            text.join("\n")
        );
    }

    /// The rows that failed, and why. After each row the server must still serve.
    fn failures(&self, rows: &[Row]) -> Vec<(&'static str, String)> {
        let bystander = || {
            let mut client = self.open(Wishes::SIMPLE);
            client.read(0, 512).expect("a bystander is served");
            client.disconnect().expect("a bystander leaves");
        };
        let outcome = |row: &fn(&Fixture)| caught(|| row(self)).and_then(|()| caught(bystander));
        rows.iter()
            .filter_map(|(name, row)| Some((*name, outcome(row).err()?.replace('\n', "\n    "))))
            .collect()
    }
}

/// The table can find fault: nbdkit's memory plugin serves any export name and speaks no extended headers, and releases
/// differ in more.
#[test]
fn the_table_finds_what_another_server_does_not_do() {
    let size = format!("size={SIZE}");
    let server = Reference::nbdkit(0, &["memory", &size]);
    let fixture = Fixture {
        address: server.address(),
        server: Server::Another(server),
    };
    let rows = [handshake::ROWS, exports::ROWS, contexts::ROWS].concat();
    let failed: Vec<&str> = fixture
        .failures(&rows)
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    for expected in [
        "EXTENDED_HEADERS: ACK",
        "INFO and GO: an unknown export",
        "GO: the volume's id",
    ] {
        assert!(
            failed.iter().any(|name| name.starts_with(expected)),
            "{expected} not among {failed:#?}"
        );
    }
    assert!(
        failed.len() < rows.len() * 2 / 3,
        "most rows hold for a server that is widely used: {failed:#?}"
    );
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
