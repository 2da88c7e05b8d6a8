//! No flushed write lost, nothing half-visible, nothing that was read goes back; and each rule that carries this is
//! seen to.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};

use ashlar_core::store::{OpenError, Params, Rules};

use crate::world::World;

/// What a run saw.
#[derive(Default, Debug)]
pub(crate) struct Seen {
    pub(crate) images: u64,
    pub(crate) kills: u64,
    pub(crate) cuts_in_recovery: u64,
    /// Power cuts while a store was opened in the boot in which its process had died.
    pub(crate) cuts_while_saving: u64,
    /// Tails that were damaged, and of these, openings that refused until their loss was accepted.
    pub(crate) damaged_tails: u64,
    pub(crate) accepted_losses: u64,
    pub(crate) cleaned: u64,
    pub(crate) checkpoints: u64,
    pub(crate) no_space: u64,
    pub(crate) busy: u64,
    pub(crate) landed: u64,
}

/// Several lives of one store; at the end of each, several images of the same crash are recovered and compared.
pub(crate) fn run(seed: u64, images: u64, rules: Rules) -> Result<Seen, String> {
    let mut world = World::new(seed, |p: &mut Params| p.rules = rules);
    let mut seen = Seen::default();
    world.open(u64::MAX).map_err(|e| e.to_string())?;
    for _life in 0..3 {
        let ops = 20 + world.rng.below(160);
        for _ in 0..ops {
            world.client_op();
            // A disk that is slow, even or quick.
            for _ in 0..world.rng.below(4) {
                world.complete_one();
            }
        }
        if world.rng.below(4) == 0 {
            world.settle();
            world.check_live();
        }
        if world.rng.below(3) == 0 {
            // The process dies, the machine does not: the tail is there.
            seen.kills += 1;
            world.kill();
            match world.rng.below(4) {
                0 | 1 => {
                    world.power_cuts_while_opening(&mut seen)?;
                    continue;
                }
                2 => {
                    world.damaged_tails(images, &mut seen)?;
                    continue;
                }
                _ => {}
            }
            let mut lives = 1 + world.rng.below(12);
            loop {
                match world.open(lives) {
                    Ok(_) => break,
                    Err(OpenError::Disk(_)) => lives = lives * 2 + 4,
                    Err(e) => return Err(format!("after a kill: {e}")),
                }
            }
            world.verify(false)?;
            continue;
        }
        world.power_cut_images(images, &mut seen)?;
    }
    world.settle();
    world.check_live();
    world.note_counters();
    seen.cleaned = world.cleaned;
    seen.checkpoints = world.checkpoints;
    seen.no_space = world.no_space;
    seen.busy = world.busy;
    seen.landed = world.landed;
    Ok(seen)
}

impl World {
    /// Cuts the power in `images` different ways and goes on from the last.
    fn power_cut_images(&mut self, images: u64, seen: &mut Seen) -> Result<(), String> {
        self.kill();
        let disk = self.disk.borrow().clone();
        let oracle = self.oracle.clone();
        for image in 0..images {
            seen.images += 1;
            self.forget();
            *self.disk.borrow_mut() = disk.clone();
            self.oracle = oracle.clone();
            self.power_cut();
            // Now and then the power goes again while the store is opened.
            let mut lives = if self.rng.below(3) == 0 {
                self.rng.below(6)
            } else {
                u64::MAX
            };
            loop {
                match self.open(lives) {
                    Ok(_) => break,
                    Err(OpenError::Disk(_)) => {
                        seen.cuts_in_recovery += 1;
                        seen.images += 1;
                        self.power_cut();
                        lives = lives * 2 + 2;
                    }
                    Err(e) => return Err(format!("image {image}: {e}")),
                }
            }
            self.verify(true)
                .map_err(|e| format!("image {image}: {e}"))?;
            // What was just read must survive another cut at once.
            if self.rng.below(4) == 0 {
                seen.images += 1;
                self.power_cut();
                self.open(u64::MAX)
                    .map_err(|e| format!("image {image}, second cut: {e}"))?;
                self.verify(true)
                    .map_err(|e| format!("image {image}, second cut: {e}"))?;
            }
        }
        Ok(())
    }
}

impl World {
    /// The process is dead, the machine is not; then the power goes while the store is opened, at each write and sync of
    /// that in turn. Goes on from the opening that is not cut.
    fn power_cuts_while_opening(&mut self, seen: &mut Seen) -> Result<(), String> {
        // Now and then that opening is not the first: those before were killed as well, or the process was soon after.
        let before = if self.rng.below(3) == 0 {
            1 + self.rng.below(4)
        } else {
            0
        };
        for _ in 0..before {
            let lives = self.rng.below(24);
            match self.open(lives) {
                Ok(_) => self.kill(),
                Err(OpenError::Disk(_)) => {}
                Err(e) => return Err(format!("after a kill: {e}")),
            }
        }
        let machine = self.machine();
        for lives in 0.. {
            self.set_machine(&machine);
            match self.open(lives) {
                Ok(_) => break,
                Err(OpenError::Disk(_)) => {}
                Err(e) => return Err(format!("after a kill: {e}")),
            }
            seen.images += 1;
            seen.cuts_while_saving += 1;
            self.power_cut();
            let at = format!("the power went at write {lives} of an opening after a kill");
            self.open(u64::MAX).map_err(|e| format!("{at}: {e}"))?;
            self.verify(true).map_err(|e| format!("{at}: {e}"))?;
        }
        self.verify(false)
    }
}

impl World {
    /// The process is dead, the machine is not, but the tail is no longer what it was. A start takes what is whole, or
    /// refuses and changes nothing, and then what was flushed is there when the loss is accepted. Goes on from the last.
    fn damaged_tails(&mut self, images: u64, seen: &mut Seen) -> Result<(), String> {
        let machine = self.machine();
        for image in 0..images {
            let at = |e: &dyn std::fmt::Display| format!("damaged tail {image}: {e}");
            self.set_machine(&machine);
            let what = self.damage_tail();
            seen.damaged_tails += 1;
            match self.open(u64::MAX) {
                Ok(report) => {
                    let lossy = report.tail_void;
                    self.verify(lossy)
                        .map_err(|e| at(&format!("{what}: {e}")))?;
                }
                Err(OpenError::TailDamaged(_) | OpenError::TailMissing) => {
                    if *self.disk.borrow() != *machine.disk() {
                        return Err(at(&"a start that refuses wrote something"));
                    }
                    seen.accepted_losses += 1;
                    let report = self.open_as_told(u64::MAX, true).map_err(|e| at(&e))?;
                    if !report.tail_void {
                        return Err(at(&"a loss that was accepted is not reported"));
                    }
                    self.verify(true).map_err(|e| at(&format!("{what}: {e}")))?;
                    // What was just read is there after a power cut, too.
                    if self.rng.below(4) == 0 {
                        self.power_cut();
                        self.open(u64::MAX).map_err(|e| at(&e))?;
                        self.verify(true).map_err(|e| at(&e))?;
                    }
                }
                Err(e) => return Err(at(&format!("{what}: {e}"))),
            }
        }
        Ok(())
    }
}

fn guarded(seed: u64, images: u64, rules: Rules) -> Result<Seen, String> {
    catch_unwind(AssertUnwindSafe(|| run(seed, images, rules))).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
            .unwrap_or_else(|| "panic".to_owned());
        Err(text)
    })
}

fn seeds_from_env() -> (u64, u64) {
    let number = |name: &str, default| {
        std::env::var(name)
            .ok()
            .and_then(|v| v.parse().ok())
            .unwrap_or(default)
    };
    (number("ASHLAR_SEED", 0), number("ASHLAR_SEEDS", 0))
}

#[test]
fn a_power_cut_loses_nothing_flushed_and_shows_nothing_torn() {
    let (start, count) = seeds_from_env();
    // 2,900 seeds make more than 100,000 images.
    let count = if count == 0 { 2900 } else { count };
    let images = AtomicU64::new(0);
    let next = AtomicU64::new(start);
    let totals = std::sync::Mutex::new(Seen::default());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, |n| n.get()) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= start + count {
                        return;
                    }
                    let seen = guarded(seed, 12, Rules::default()).unwrap_or_else(|e| {
                        panic!(
                            "seed {seed}: {e}\nreplay: ASHLAR_SEED={seed} ASHLAR_SEEDS=1 cargo test --release -p \
                             ashlar-core --test store_sim a_power_cut"
                        )
                    });
                    images.fetch_add(seen.images, Ordering::Relaxed);
                    let mut t = totals.lock().expect("not poisoned");
                    t.images += seen.images;
                    t.kills += seen.kills;
                    t.cuts_in_recovery += seen.cuts_in_recovery;
                    t.cuts_while_saving += seen.cuts_while_saving;
                    t.damaged_tails += seen.damaged_tails;
                    t.accepted_losses += seen.accepted_losses;
                    t.cleaned += seen.cleaned;
                    t.checkpoints += seen.checkpoints;
                    t.no_space += seen.no_space;
                    t.busy += seen.busy;
                    t.landed += seen.landed;
                }
            });
        }
    });
    let totals = totals.into_inner().expect("not poisoned");
    println!("{totals:?}");
    if count >= 2900 {
        assert!(images.load(Ordering::Relaxed) >= 100_000, "too few images");
        assert!(
            totals.cleaned > 1000
                && totals.checkpoints > 10_000
                && totals.cuts_in_recovery > 1000
                && totals.cuts_while_saving > 10_000
                && totals.damaged_tails > 3000
                && totals.accepted_losses > 1000
                && totals.kills > 1000
                && totals.landed > 10_000
        );
    }
}

/// The same runs with one rule off must fail within this many seeds.
const SEEDS_TO_NOTICE: u64 = 400;

fn is_noticed(rules: Rules) -> Option<(u64, String)> {
    // Panics are expected here; their backtraces are noise.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let found =
        (0..SEEDS_TO_NOTICE).find_map(|seed| guarded(seed, 12, rules).err().map(|e| (seed, e)));
    std::panic::set_hook(hook);
    found
}

#[test]
fn without_a_sync_before_a_flush_is_answered_flushed_writes_are_lost() {
    let found = is_noticed(Rules {
        sync_before_flush: false,
        ..Rules::default()
    });
    println!("{found:?}");
    assert!(found.is_some());
}

#[test]
fn without_quarantine_of_freed_segments_flushed_writes_are_lost() {
    let found = is_noticed(Rules {
        quarantine_freed: false,
        ..Rules::default()
    });
    println!("{found:?}");
    assert!(found.is_some());
}

#[test]
fn without_ordered_acknowledgement_flushed_writes_are_lost() {
    let found = is_noticed(Rules {
        ordered_ack: false,
        ..Rules::default()
    });
    println!("{found:?}");
    assert!(found.is_some());
}
