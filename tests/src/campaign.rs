//! The crash campaign: write with known versions, kill the server at a random moment, look at what is left.
//!
//! Blocks are of two kinds. The *shared* ones are written by all connections at once, every version once. The *owned*
//! ones belong to one connection each, which lets one write of a block be in flight at a time and also trims and zeroes
//! them. What was seen of every block between two kills is checked by [`crate::history`].

mod worker;

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::history::{History, Read, Tick, Write, ZEROS};
use crate::nbd::{self, Address, Failure, Wishes};
use crate::pattern::{self, BLOCK, Content};
use crate::seed::Rng;
use crate::wait;

use worker::Worker;

/// A server that can be killed.
pub trait Victim {
    fn address(&self) -> Address;
    /// The name of the export.
    fn export(&self) -> String {
        String::new()
    }
    /// Starts it and returns when it serves.
    fn start(&mut self);
    /// Starts it and returns at once.
    fn spawn(&mut self);
    /// Ends it at once; it is gone on return.
    fn kill(&mut self);
    /// Asks it to finish; it is gone on return. Only campaigns that end that way need it.
    fn stop(&mut self) {
        self.kill();
    }
    /// The end of its log.
    fn words(&self) -> String;
}

/// How a round ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// SIGKILL.
    Kill,
    /// SIGTERM: besides, no client may get an error as an answer.
    Terminate,
}

/// What to do to a server.
#[derive(Clone, Debug)]
pub struct Campaign {
    pub seed: u64,
    pub rounds: u32,
    pub ending: Ending,
    pub connections: usize,
    /// Header styles to use, connection by connection in turn.
    pub styles: Vec<Wishes>,
    /// Blocks that everybody writes.
    pub shared: Range<u64>,
    /// First block of the owned ones.
    pub owned_from: u64,
    /// Owned blocks of each connection.
    pub owned_each: u64,
    /// Most operations between two kills; the number is drawn evenly in its logarithm.
    pub most_operations: u64,
    /// Percentage of rounds after which the server is also killed while it starts.
    pub kill_starts_percent: u64,
}

impl Campaign {
    /// Four connections over 96 MiB; the shared blocks lie across the first chunk boundary (64 MiB).
    pub fn new(seed: u64) -> Campaign {
        Campaign {
            seed,
            rounds: 50,
            ending: Ending::Kill,
            connections: 4,
            styles: vec![Wishes::SIMPLE, Wishes::STRUCTURED, Wishes::EXTENDED],
            shared: 16_384 - 24..16_384 + 24,
            owned_from: 16_500,
            owned_each: 2_000,
            most_operations: 6_000,
            kill_starts_percent: 30,
        }
    }

    /// Bytes of volume it needs.
    pub fn volume_bytes(&self) -> u64 {
        (self.owned_from + self.owned_each * self.connections as u64).max(self.shared.end)
            * BLOCK as u64
    }

    fn owned(&self, connection: usize) -> Range<u64> {
        let start = self.owned_from + self.owned_each * connection as u64;
        start..start + self.owned_each
    }

    fn registers(&self) -> [Range<u64>; 2] {
        [
            self.shared.clone(),
            self.owned_from..self.owned_from + self.owned_each * self.connections as u64,
        ]
    }
}

/// What a campaign did.
#[derive(Clone, Debug, Default)]
pub struct Report {
    pub rounds: u32,
    pub kills: u32,
    pub answered_writes: u64,
    pub answered_reads: u64,
    /// Blocks of writes that were in flight when the server went.
    pub in_doubt: u64,
    pub longest_start: Duration,
}

/// Checks every block's history between rounds; the error says which promise broke.
pub fn run(campaign: &Campaign, victim: &mut impl Victim) -> Result<Report, String> {
    let mut rng = Rng::new(campaign.seed);
    // Blocks carry it, so that data of an earlier run is recognised as foreign.
    let volume = rng.next() | 1;
    let mut known: HashMap<u64, u64> = campaign
        .registers()
        .into_iter()
        .flatten()
        .map(|block| (block, ZEROS))
        .collect();
    let mut report = Report::default();
    let mut versions = 0;
    for round in 0..campaign.rounds {
        let place = |what: String, words: String| {
            format!(
                "round {round} of seed {}: {what}\n--- the server's last words\n{words}",
                campaign.seed
            )
        };
        let end_after = rng.logarithmic(campaign.most_operations);
        let state = Round {
            clock: AtomicU64::new(1),
            answered: AtomicU64::new(0),
            end_after,
            volume,
        };
        let logs = one_round(
            campaign,
            victim,
            &state,
            &mut rng,
            round,
            &mut versions,
            &mut report,
        );
        let logs = logs.map_err(|what| place(what, victim.words()))?;
        // Everything in flight is decided by now: the process that could still apply it is gone.
        let crash = state.tick();
        while campaign.ending == Ending::Kill && rng.chance(campaign.kill_starts_percent) {
            victim.spawn();
            wait::pass(Duration::from_micros(rng.below(60_000)));
            victim.kill();
            report.kills += 1;
        }
        let start = Instant::now();
        victim.start();
        report.longest_start = report.longest_start.max(start.elapsed());
        let mut histories = merge(campaign, &known, logs, crash, &mut report);
        for (block, version, start, finish) in
            read_all(campaign, victim, &state).map_err(|what| place(what, victim.words()))?
        {
            histories.entry(block).or_default().reads.push(Read {
                version,
                start,
                finish,
            });
            known.insert(block, version);
        }
        for (block, history) in &histories {
            let verdict = if campaign.shared.contains(block) {
                history.check_unique()
            } else {
                history.check_sequential()
            };
            verdict.map_err(|what| place(format!("block {block}: {what}"), victim.words()))?;
        }
        // Decided once: nothing was written since, so nothing may change, not even over one more crash.
        if rng.chance(30) && campaign.ending == Ending::Kill {
            victim.kill();
            report.kills += 1;
            victim.start();
        }
        for (block, version, _, _) in
            read_all(campaign, victim, &state).map_err(|what| place(what, victim.words()))?
        {
            if known[&block] != version {
                let what = format!(
                    "block {block} was {} after the restart and is {version} now",
                    known[&block]
                );
                return Err(place(what, victim.words()));
            }
        }
        report.rounds += 1;
    }
    Ok(report)
}

/// What the connections of a round share.
struct Round {
    clock: AtomicU64,
    answered: AtomicU64,
    end_after: u64,
    volume: u64,
}

impl Round {
    fn tick(&self) -> Tick {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }
}

/// One operation as its connection saw it.
enum Event {
    Write {
        first: u64,
        count: u64,
        version: u64,
        start: Tick,
        finish: Option<Tick>,
    },
    Read {
        first: u64,
        versions: Vec<u64>,
        start: Tick,
        finish: Tick,
    },
}

fn one_round(
    campaign: &Campaign,
    victim: &mut impl Victim,
    state: &Round,
    rng: &mut Rng,
    round: u32,
    versions: &mut u64,
    report: &mut Report,
) -> Result<Vec<Event>, String> {
    let (address, export) = (victim.address(), victim.export());
    let (moment, reached) = mpsc::channel();
    let mut workers = Vec::new();
    for number in 0..campaign.connections {
        let wishes = campaign.styles[(number + round as usize) % campaign.styles.len()];
        let transmission = nbd::open(&address, &export, wishes)
            .map_err(|error| format!("cannot connect: {error}"))?;
        let depth = *rng.pick(&[1, 4, 16, 48]);
        // Room for more versions than a connection can use in a round; version 0 means zeros.
        let version = *versions + 1;
        *versions += 1 << 32;
        workers.push(Worker {
            campaign,
            state,
            transmission,
            owned: campaign.owned(number),
            depth,
            version,
            rng: rng.split(),
            moment: moment.clone(),
            in_flight: HashMap::new(),
            busy: HashSet::new(),
            broken: false,
            read_blocks: 0,
            events: Vec::new(),
        });
    }
    drop(moment);
    std::thread::scope(|scope| {
        let threads: Vec<_> = workers
            .into_iter()
            .map(|worker| scope.spawn(|| worker.work()))
            .collect();
        // An end of the channel instead of the moment means that all connections broke by themselves.
        let came = reached.recv_timeout(Duration::from_secs(120));
        match campaign.ending {
            Ending::Kill => victim.kill(),
            Ending::Terminate => victim.stop(),
        }
        report.kills += u32::from(campaign.ending == Ending::Kill);
        let mut events = Vec::new();
        for thread in threads {
            events.extend(thread.join().expect("a worker does not panic")?);
        }
        came.map_err(|error| {
            format!("no progress, or all connections were lost, before the end was due: {error}")
        })?;
        Ok(events)
    })
}

fn versions_of(data: &[u8], volume: u64, first: u64) -> Result<Vec<u64>, String> {
    let blocks = data.chunks_exact(BLOCK).enumerate();
    blocks
        .map(
            |(at, block)| match pattern::identify(block, volume, first + at as u64)? {
                Content::Zeros => Ok(ZEROS),
                Content::Version(version) => Ok(version),
            },
        )
        .collect()
}

fn merge(
    campaign: &Campaign,
    known: &HashMap<u64, u64>,
    events: Vec<Event>,
    crash: Tick,
    report: &mut Report,
) -> HashMap<u64, History> {
    let blank = |block: u64| {
        (
            block,
            History {
                initial: known[&block],
                ..History::default()
            },
        )
    };
    let mut histories: HashMap<u64, History> = campaign
        .registers()
        .into_iter()
        .flatten()
        .map(blank)
        .collect();
    for event in events {
        match event {
            Event::Write {
                first,
                count,
                version,
                start,
                finish,
            } => {
                report.answered_writes += u64::from(finish.is_some());
                report.in_doubt += if finish.is_none() { count } else { 0 };
                for block in first..first + count {
                    let history = histories.get_mut(&block).expect("a block of the campaign");
                    let answered = finish.is_some();
                    history.writes.push(Write {
                        version,
                        start,
                        finish: finish.unwrap_or(crash),
                        answered,
                    });
                }
            }
            Event::Read {
                first,
                versions,
                start,
                finish,
            } => {
                report.answered_reads += 1;
                for (at, version) in versions.into_iter().enumerate() {
                    let history = histories
                        .get_mut(&(first + at as u64))
                        .expect("a block of the campaign");
                    history.reads.push(Read {
                        version,
                        start,
                        finish,
                    });
                }
            }
        }
    }
    histories
}

/// Every block of the campaign, as `(block, version, start, finish)`.
fn read_all(
    campaign: &Campaign,
    victim: &impl Victim,
    state: &Round,
) -> Result<Vec<(u64, u64, Tick, Tick)>, String> {
    let failed = |error: Failure| format!("reading everything: {error}");
    let mut transmission =
        nbd::open(&victim.address(), &victim.export(), campaign.styles[0]).map_err(failed)?;
    let mut all = Vec::new();
    for range in campaign.registers() {
        let mut first = range.start;
        while first < range.end {
            let count = (range.end - first).min(256);
            let start = state.tick();
            let data = transmission
                .read(first * BLOCK as u64, count * BLOCK as u64)
                .map_err(failed)?;
            let finish = state.tick();
            let versions = versions_of(&data, state.volume, first)?;
            all.extend(
                versions
                    .into_iter()
                    .enumerate()
                    .map(|(at, version)| (first + at as u64, version, start, finish)),
            );
            first += count;
        }
    }
    Ok(all)
}
