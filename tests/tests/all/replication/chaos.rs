//! Faults of every kind at random moments under clients that verify all they read and try again when a connection ends.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ashlar_tests::cluster::Trio;
use ashlar_tests::ledger::{Ended, Ledger};
use ashlar_tests::nbd::{self, Address, Transmission, Wishes};
use ashlar_tests::network::{self, Network, Place};
use ashlar_tests::seed::{self, Rng};
use ashlar_tests::wait;
use rustix::process::Signal;

use super::LEASE;

/// Each client has a volume of its own; three heads and nine copies are at stake at any moment.
const CLIENTS: usize = 3;
/// Small, so that blocks are written again and again.
const BLOCKS: u64 = 2_048;
/// The longest that one request may take: faults are shorter, and none is about two nodes.
const PATIENCE: Duration = Duration::from_secs(60);
/// From the end of all faults until every copy is in sync.
const HEALING_LIMIT: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug)]
enum Fault {
    Kill(usize),
    Restart(usize),
    Freeze(usize),
    Isolate(usize),
    OneWay(Place, Place),
    Between(usize, usize),
    KillEtcd,
    FreezeEtcd,
}

/// What clients and the one that does the harm share.
struct Shared {
    sockets: Vec<Address>,
    over: AtomicBool,
    operations: AtomicU64,
    reconnections: AtomicU64,
    /// Which node serves each volume, as far as is known.
    heads: Vec<AtomicUsize>,
    /// The connection of each client, to be cut when its volume was moved away from under it.
    connections: Vec<Mutex<Option<OwnedFd>>>,
}

fn name(client: usize) -> String {
    format!("disk{client}")
}

impl Shared {
    /// Tries until some node serves the client's volume.
    fn connect(&self, client: usize) -> Result<Transmission, String> {
        let start = Instant::now();
        let mut last = String::new();
        while start.elapsed() < PATIENCE {
            let guess = self.heads[client].load(Ordering::Acquire);
            for at in [guess, 0, 1, 2] {
                // A frozen daemon accepts nothing; its queue does.
                let opened = open(&self.sockets[at], &name(client));
                match opened {
                    Ok(transmission) => {
                        let watched = transmission.connection.as_fd().try_clone_to_owned();
                        *self.connections[client].lock().expect("not poisoned") = watched.ok();
                        self.heads[client].store(at, Ordering::Release);
                        return Ok(transmission);
                    }
                    Err(error) => last = error,
                }
            }
            wait::pass(Duration::from_millis(20));
        }
        Err(format!(
            "nobody serves {} for {PATIENCE:?}: {last}",
            name(client)
        ))
    }

    fn cut(&self, client: usize) {
        if let Some(socket) = &*self.connections[client].lock().expect("not poisoned") {
            let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
        }
    }
}

fn open(address: &Address, export: &str) -> Result<Transmission, String> {
    let (address, export) = (address.clone(), export.to_owned());
    // A frozen daemon would keep the handshake for as long as it is frozen: another thread waits for it.
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let _ = sender.send(nbd::open(&address, &export, Wishes::SIMPLE));
    });
    match receiver.recv_timeout(Duration::from_secs(2)) {
        Ok(Ok(transmission)) => {
            let _ = transmission.connection.set_read_timeout(PATIENCE);
            Ok(transmission)
        }
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("no handshake within 2 s".to_owned()),
    }
}

/// One client until the end: its ledger.
fn client(shared: &Shared, number: usize, seed: u64) -> Result<Ledger, String> {
    let mut rng = Rng::new(seed);
    let mut ledger = Ledger::new(number as u64 + 1, BLOCKS);
    let mut transmission = shared.connect(number)?;
    while !shared.over.load(Ordering::Acquire) {
        match ledger.anything(&mut transmission, &mut rng)? {
            Ended::Well => {
                shared.operations.fetch_add(1, Ordering::Relaxed);
            }
            Ended::Lost => {
                shared.reconnections.fetch_add(1, Ordering::Relaxed);
                transmission = shared.connect(number)?;
            }
            Ended::Refused(errno) => {
                // A daemon that is being stopped refuses what it cannot do any more, and ends the connection.
                if errno != nbd::wire::ESHUTDOWN {
                    return Err(format!("a request was answered with errno {errno}"));
                }
                shared.reconnections.fetch_add(1, Ordering::Relaxed);
                transmission = shared.connect(number)?;
            }
        }
    }
    Ok(ledger)
}

struct Harm<'a> {
    trio: Trio,
    network: &'a Network,
    shared: Arc<Shared>,
    rng: Rng,
}

impl Harm<'_> {
    fn draw(&mut self) -> Fault {
        let at = self.rng.below(3) as usize;
        let other = (at + 1 + self.rng.below(2) as usize) % 3;
        let places = [Place::Host(other), Place::Outside];
        let place = *self.rng.pick(&places);
        match self.rng.below(10) {
            0 | 1 => Fault::Kill(at),
            2 => Fault::Restart(at),
            3 | 4 => Fault::Freeze(at),
            5 => Fault::Isolate(at),
            6 if self.rng.chance(50) => Fault::OneWay(Place::Host(at), place),
            6 => Fault::OneWay(place, Place::Host(at)),
            7 => Fault::Between(at, other),
            8 => Fault::KillEtcd,
            _ => Fault::FreezeEtcd,
        }
    }

    /// Volumes that a node serves are opened elsewhere, as an orchestrator would. Their clients either notice by
    /// themselves or are told.
    fn move_from(&mut self, at: usize) {
        for number in 0..CLIENTS {
            if self.shared.heads[number].load(Ordering::Acquire) != at || self.rng.chance(25) {
                continue;
            }
            let new = (at + 1 + self.rng.below(2) as usize) % 3;
            let admin = self.trio.nodes[new].daemon.admin();
            self.trio.expect_move(new);
            let opened = admin.try_run(["volume", "open", &name(number)]);
            if opened.status.success() {
                self.shared.heads[number].store(new, Ordering::Release);
                self.shared.cut(number);
            } else {
                println!(
                    "  {} is not opened at {new}: {}",
                    name(number),
                    opened.stderr.trim()
                );
            }
        }
    }

    fn one(&mut self) {
        let fault = self.draw();
        let hold = Duration::from_millis(200 + self.rng.below(6_000));
        println!("{fault:?} for {hold:?}");
        match fault {
            Fault::Kill(at) => {
                self.trio.nodes[at].daemon.kill();
                self.move_from(at);
                wait::pass(hold);
                self.trio.nodes[at].daemon.start();
            }
            Fault::Restart(at) => {
                self.trio.nodes[at].daemon.stop();
                self.move_from(at);
                self.trio.nodes[at].daemon.start();
            }
            Fault::Freeze(at) => {
                self.trio.nodes[at].daemon.process().signal(Signal::STOP);
                self.move_from(at);
                wait::pass(LEASE / 2 + hold);
                self.trio.nodes[at].daemon.process().signal(Signal::CONT);
            }
            Fault::Isolate(at) => {
                self.network.isolate(at);
                self.move_from(at);
                wait::pass(LEASE / 2 + hold);
                self.network.heal();
            }
            Fault::OneWay(from, to) => {
                self.network.cut(from, to);
                wait::pass(hold);
                self.network.heal();
            }
            Fault::Between(one, other) => {
                self.network.cut_both(Place::Host(one), Place::Host(other));
                if self.rng.chance(50) {
                    self.move_from(one);
                }
                wait::pass(hold);
                self.network.heal();
            }
            Fault::KillEtcd => {
                self.trio.etcd.kill();
                wait::pass(hold);
                self.trio.etcd.run();
            }
            Fault::FreezeEtcd => {
                self.trio.etcd.freeze();
                wait::pass(hold);
                self.trio.etcd.thaw();
            }
        }
        // Volumes whose node died and came back are served by it again, or by nobody if they had been moved; then again.
        wait::pass(Duration::from_millis(self.rng.below(3_000)));
    }
}

/// For 75 s, or as many as `ASHLAR_TESTS_CHAOS_SECONDS` says.
#[test]
fn nothing_is_lost_whatever_happens_to_one_at_a_time() {
    network::demand();
    let seconds = std::env::var("ASHLAR_TESTS_CHAOS_SECONDS");
    let seconds = seconds.map_or(75, |text| text.parse().expect("a number of seconds"));
    let seed = seed::of_run("chaos");
    let network = Network::new(3);
    let mut trio = Trio::on("chaos", &network);
    trio.expect_losses();
    for number in 0..CLIENTS {
        trio.create(&name(number), &(BLOCKS * 4096).to_string());
        trio.open_at(number, &name(number));
    }
    let shared = Arc::new(Shared {
        sockets: trio
            .nodes
            .iter()
            .map(|node| node.daemon.address())
            .collect(),
        over: AtomicBool::new(false),
        operations: AtomicU64::new(0),
        reconnections: AtomicU64::new(0),
        heads: (0..CLIENTS).map(AtomicUsize::new).collect(),
        connections: (0..CLIENTS).map(|_| Mutex::new(None)).collect(),
    });
    let clients: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let shared = shared.clone();
            std::thread::spawn(move || client(&shared, number, seed + number as u64))
        })
        .collect();
    let mut harm = Harm {
        trio,
        network: &network,
        shared: shared.clone(),
        rng: Rng::new(seed ^ 0xc4a05),
    };
    let start = Instant::now();
    let mut faults = 0;
    while start.elapsed() < Duration::from_secs(seconds) {
        harm.one();
        faults += 1;
        if let Some(number) = clients.iter().position(|client| client.is_finished()) {
            println!("client {number} has ended");
            break;
        }
    }
    let ended = Instant::now();
    let Harm { trio, .. } = harm;
    let mut healed = Duration::ZERO;
    for number in 0..CLIENTS {
        let at = shared.heads[number].load(Ordering::Acquire);
        trio.wait_in_sync(at, &name(number), 3);
        healed = healed.max(ended.elapsed());
    }
    shared.over.store(true, Ordering::Release);
    let (operations, lost) = (
        shared.operations.load(Ordering::Relaxed),
        shared.reconnections.load(Ordering::Relaxed),
    );
    println!(
        "{faults} faults, {operations} operations, {lost} lost connections, healed in {healed:?}"
    );
    for (number, client) in clients.into_iter().enumerate() {
        let ledger = client.join().expect("a client does not panic");
        let mut ledger = ledger.unwrap_or_else(|error| panic!("client {number}: {error}"));
        // Every copy has it: each node serves from its own.
        for at in [0, 1, 2] {
            let admin = trio.nodes[at].daemon.admin();
            trio.expect_move(at);
            // It may have been away until a moment ago.
            wait::until(HEALING_LIMIT, "it is served there", || {
                let said = admin.try_run(["volume", "open", &name(number)]);
                if said.status.success() {
                    Ok(())
                } else {
                    Err(said.to_string())
                }
            });
            let mut client = trio.nodes[at].daemon.open(&name(number), Wishes::SIMPLE);
            let verified = ledger.verify(&mut client);
            verified.unwrap_or_else(|error| panic!("volume {number} at node {at}: {error}"));
        }
    }
    assert!(healed < HEALING_LIMIT, "{healed:?}");
    assert!(operations > 1_000 && lost > 0, "nothing was at stake");
}
