//! Every node is stopped in order and started again, one after the other, under clients that verify all they read and
//! come back to the same socket when their connection ends, as the kernel's client would.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ashlar_tests::campaign::{self, Campaign, Ending, Victim};
use ashlar_tests::cluster::Trio;
use ashlar_tests::ledger::{Ended, Ledger};
use ashlar_tests::nbd::{self, Address, Transmission, Wishes};
use ashlar_tests::seed::{self, Rng};
use ashlar_tests::wait;

use super::LEASE;

/// Blocks that a client writes again and again.
const BLOCKS: u64 = 4_096;
/// Blocks behind them that are filled once: they show when more is copied than was missed.
const FILLED: u64 = 16_384;
/// A stop that takes longer than this does not end in order.
const STOP_LIMIT: Duration = Duration::from_secs(8);
/// From the start of a daemon until its volume answers: the claim, two seals and rows, on a slow machine.
const SERVED_LIMIT: Duration = Duration::from_secs(10);
/// The longest that a client whose head stays may wait for an answer.
const PAUSE_LIMIT: Duration = Duration::from_secs(6);

fn name(number: usize) -> String {
    format!("disk{number}")
}

#[derive(Default)]
struct Client {
    operations: AtomicU64,
    lost: AtomicU64,
    /// The longest operation that was answered on the connection it was sent on, microseconds.
    pause_us: AtomicU64,
}

/// Works until it is over; an error that is answered, or wrong data, ends it at once.
fn work(
    address: &Address,
    number: usize,
    over: &AtomicBool,
    seen: &Client,
    seed: u64,
) -> Result<Ledger, String> {
    let mut rng = Rng::new(seed);
    let mut ledger = Ledger::new(number as u64 + 1, BLOCKS);
    let connect = || -> Result<Transmission, String> {
        let start = Instant::now();
        loop {
            match nbd::open(address, &name(number), Wishes::EXTENDED) {
                Ok(transmission) => return Ok(transmission),
                Err(error) if start.elapsed() > Duration::from_secs(60) => {
                    return Err(format!("{} is not served: {error}", name(number)));
                }
                Err(_) => wait::pass(Duration::from_millis(20)),
            }
        }
    };
    let mut transmission = connect()?;
    while !over.load(Ordering::Acquire) {
        let start = Instant::now();
        match ledger.anything(&mut transmission, &mut rng)? {
            Ended::Well => {
                let took = start.elapsed().as_micros() as u64;
                seen.pause_us.fetch_max(took, Ordering::Relaxed);
                seen.operations.fetch_add(1, Ordering::Release);
            }
            Ended::Lost => {
                seen.lost.fetch_add(1, Ordering::Relaxed);
                transmission = connect()?;
            }
            Ended::Refused(errno) => {
                return Err(format!("a request was answered with errno {errno}"));
            }
        }
    }
    Ok(ledger)
}

/// Waits until a client got an answer that it had not got before.
fn wait_answered(client: &Client, what: &str) {
    let before = client.operations.load(Ordering::Acquire);
    wait::until(Duration::from_secs(60), what, || {
        if client.operations.load(Ordering::Acquire) > before + 1 {
            Ok(())
        } else {
            Err("no answer".to_owned())
        }
    });
}

#[test]
fn a_rolling_restart_costs_connections_and_nothing_else() {
    let seed = seed::of_run("rolling");
    let mut trio = Trio::start("rolling");
    trio.expect_losses();
    // Each node serves one volume and has a copy of each: whichever is stopped, a head and two copies go.
    for number in 0..3 {
        trio.create(&name(number), &((BLOCKS + FILLED) * 4096).to_string());
        trio.open_at(number, &name(number));
        let mut client = trio.nodes[number]
            .daemon
            .open(&name(number), Wishes::SIMPLE);
        let piece = vec![0x5a; 1 << 20];
        for at in (BLOCKS * 4096..(BLOCKS + FILLED) * 4096).step_by(piece.len()) {
            client.write(at, &piece).expect("written");
        }
        client.flush().expect("flushed");
    }
    for number in 0..3 {
        trio.wait_in_sync(number, &name(number), 3);
    }
    let over = Arc::new(AtomicBool::new(false));
    let clients: Vec<Arc<Client>> = (0..3).map(|_| Arc::default()).collect();
    let workers: Vec<_> = (0..3)
        .map(|number| {
            let (over, seen) = (over.clone(), clients[number].clone());
            let address = trio.nodes[number].daemon.address();
            let seed = seed + number as u64;
            std::thread::spawn(move || {
                let worked = work(&address, number, &over, &seen, seed);
                if let Err(error) = &worked {
                    println!("client {number}: {error}");
                }
                worked
            })
        })
        .collect();
    for client in &clients {
        wait_answered(client, "the first answers");
    }
    let written = |trio: &Trio, number: usize| {
        let volume = name(number);
        let labels = [("volume", volume.as_str()), ("command", "write")];
        let metrics = trio.nodes[number].daemon.metrics();
        metrics
            .sum("ashlar_volume_bytes_total", &labels)
            .unwrap_or(0.0)
    };
    for at in 0..3 {
        let others: Vec<usize> = (0..3).filter(|other| *other != at).collect();
        let before: Vec<f64> = others.iter().map(|n| written(&trio, *n)).collect();
        let told: Vec<usize> = others
            .iter()
            .map(|n| trio.nodes[*n].copied_bytes().len())
            .collect();
        let stopped = trio.nodes[at].daemon.stop();
        // The others go on with two copies.
        for other in &others {
            wait_answered(&clients[*other], "answers with one node away");
        }
        let start = Instant::now();
        trio.nodes[at].daemon.start();
        let ready = start.elapsed();
        wait_answered(&clients[at], "answers of the volume whose node is back");
        let served = start.elapsed();
        println!(
            "node {at}: stopped in {stopped:?}, ready after {ready:?}, its volume answers after {served:?}"
        );
        assert!(stopped < STOP_LIMIT, "{stopped:?}");
        assert!(served < SERVED_LIMIT, "{served:?}");
        // Before the next node is stopped, every copy is in sync again, by what it missed.
        for number in 0..3 {
            trio.wait_in_sync(number, &name(number), 3);
        }
        for (place, other) in others.iter().enumerate() {
            let copied = wait::until(LEASE, "what was copied is told", || {
                let all = trio.nodes[*other].copied_bytes();
                all.get(told[place]..)
                    .filter(|new| !new.is_empty())
                    .map(|new| new.iter().sum::<u64>())
                    .ok_or_else(String::new)
            });
            let meanwhile = written(&trio, *other) - before[place];
            println!(
                "  {}: copied {copied} bytes of {meanwhile} written meanwhile",
                name(*other)
            );
            // Trims and zeroes are copied too, and are not among the bytes written.
            assert!(
                copied as f64 <= 2.0 * meanwhile + 4e6 && copied < FILLED * 4096 / 2,
                "copied {copied}, written meanwhile {meanwhile}"
            );
        }
    }
    over.store(true, Ordering::Release);
    for (number, worker) in workers.into_iter().enumerate() {
        let ledger = worker.join().expect("a client does not panic");
        let mut ledger = ledger.unwrap_or_else(|error| panic!("client {number}: {error}"));
        let seen = &clients[number];
        let pause = Duration::from_micros(seen.pause_us.load(Ordering::Relaxed));
        let (operations, lost) = (
            seen.operations.load(Ordering::Relaxed),
            seen.lost.load(Ordering::Relaxed),
        );
        println!(
            "client {number}: {operations} operations, {lost} lost connection(s), longest answer {pause:?}"
        );
        assert!(lost >= 1, "its node was stopped");
        assert!(pause < PAUSE_LIMIT, "{pause:?}");
        // Every copy has it: each node serves from its own.
        for at in 0..3 {
            trio.open_at(at, &name(number));
            trio.wait_in_sync(at, &name(number), 3);
            let mut client = trio.nodes[at].daemon.open(&name(number), Wishes::SIMPLE);
            let verified = ledger.verify(&mut client);
            verified.unwrap_or_else(|error| panic!("volume {number} at node {at}: {error}"));
            for offset in (BLOCKS * 4096..(BLOCKS + FILLED) * 4096).step_by(1 << 20) {
                let data = client.read(offset, 1 << 20).expect("read");
                assert!(data.iter().all(|byte| *byte == 0x5a), "at {offset}");
            }
        }
    }
}

/// The node that serves is stopped in order and started again.
struct Head {
    trio: Trio,
    longest: Duration,
}

impl Victim for Head {
    fn address(&self) -> Address {
        self.trio.nodes[0].daemon.address()
    }

    fn export(&self) -> String {
        "disk".to_owned()
    }

    fn start(&mut self) {
        if self.trio.nodes[0].daemon.is_running() {
            return;
        }
        let start = Instant::now();
        self.trio.nodes[0].daemon.start();
        self.trio.wait_served(0, "disk");
        self.longest = self.longest.max(start.elapsed());
    }

    fn spawn(&mut self) {
        unreachable!("the campaign does not kill starts");
    }

    fn kill(&mut self) {
        unreachable!("the campaign stops in order");
    }

    fn stop(&mut self) {
        self.trio.wait_in_sync(0, "disk", 3);
        self.trio.nodes[0].daemon.stop();
    }

    fn words(&self) -> String {
        self.trio.nodes[0].daemon.log.tail()
    }
}

#[test]
fn a_head_that_is_stopped_in_order_answers_no_request_with_an_error() {
    let seed = seed::of_run("rolling-head");
    let campaign = Campaign {
        rounds: 5,
        ending: Ending::Terminate,
        kill_starts_percent: 0,
        ..Campaign::new(seed)
    };
    let mut trio = Trio::start("rolling-head");
    trio.expect_losses();
    trio.create("disk", &campaign.volume_bytes().to_string());
    let mut head = Head {
        trio,
        longest: Duration::ZERO,
    };
    let report = campaign::run(&campaign, &mut head).unwrap_or_else(|error| panic!("{error}"));
    println!(
        "{report:?}; served again after {:?} at the longest",
        head.longest
    );
    // How much a round does is drawn; it may be little.
    assert!(
        report.answered_writes > 0,
        "nothing was at stake: {report:?}"
    );
    assert!(head.longest < SERVED_LIMIT, "{:?}", head.longest);
}
