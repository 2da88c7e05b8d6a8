//! Fault injection: an engine that answers chosen disk operations with an error instead of doing them.
//!
//! Reached only through the daemon's hidden `--fault` setting. The plan is text, so that a test can give it on a
//! command line: rules separated by `;`, each `KIND:key=value,…`. KIND is `write`, `read`, `sync`, `allocate` or
//! `any`. A durable write is a write and a sync: a `sync` rule lets its bytes reach the file and then fails it. Keys: `nth=N` (the first operation hit, counted from 1 per rule; default 1), `count=M` (how many in a row;
//! default 1, `all` for every one from then on), `when=PATH` (count only while that file exists, so that a test
//! chooses the moment), and one of `errno=EIO|ENOSPC|…|NUMBER`, `short=BYTES` (does and reports only so many),
//! `delay_ms=MS` (does it and reports it later).

use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::{DiskOp, Engine, Event, FileId, Tag, Waker, WatchId};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Write,
    Read,
    Sync,
    Allocate,
    Any,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    Fail(Errno),
    Short(usize),
    Delay(Duration),
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    kind: Kind,
    /// First operation hit, from 1.
    nth: u64,
    count: u64,
    when: Option<PathBuf>,
    effect: Effect,
    seen: u64,
}

/// Which operations go wrong, and how. See the module text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FaultPlan {
    rules: Vec<Rule>,
}

/// A plan that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("fault rule {rule:?}: {reason}")]
pub struct FaultPlanError {
    rule: String,
    reason: String,
}

impl FromStr for FaultPlan {
    type Err = FaultPlanError;

    fn from_str(text: &str) -> Result<FaultPlan, FaultPlanError> {
        let rules = text
            .split(';')
            .filter(|r| !r.trim().is_empty())
            .map(|r| parse_rule(r.trim()))
            .collect::<Result<_, _>>()?;
        Ok(FaultPlan { rules })
    }
}

fn parse_rule(text: &str) -> Result<Rule, FaultPlanError> {
    let wrong = |reason: &str| FaultPlanError {
        rule: text.to_owned(),
        reason: reason.to_owned(),
    };
    let (kind, rest) = text.split_once(':').ok_or_else(|| wrong("has no ':'"))?;
    let kind = match kind {
        "write" => Kind::Write,
        "read" => Kind::Read,
        "sync" => Kind::Sync,
        "allocate" => Kind::Allocate,
        "any" => Kind::Any,
        _ => return Err(wrong("unknown kind")),
    };
    let (mut nth, mut count, mut when, mut effect) = (1, 1, None, None);
    for pair in rest.split(',') {
        let (key, value) = pair
            .split_once('=')
            .ok_or_else(|| wrong("a key has no value"))?;
        let number = || {
            value
                .parse::<u64>()
                .map_err(|_| wrong("a value is not a number"))
        };
        match key {
            "nth" => nth = number()?.max(1),
            "count" if value == "all" => count = u64::MAX,
            "count" => count = number()?,
            "when" => when = Some(PathBuf::from(value)),
            "errno" => {
                effect = Some(Effect::Fail(
                    parse_errno(value).ok_or_else(|| wrong("unknown errno"))?,
                ))
            }
            "short" => effect = Some(Effect::Short(number()? as usize)),
            "delay_ms" => effect = Some(Effect::Delay(Duration::from_millis(number()?))),
            _ => return Err(wrong("unknown key")),
        }
    }
    let effect = effect.ok_or_else(|| wrong("needs errno, short or delay_ms"))?;
    Ok(Rule {
        kind,
        nth,
        count,
        when,
        effect,
        seen: 0,
    })
}

fn parse_errno(text: &str) -> Option<Errno> {
    Some(match text {
        "EIO" => Errno::IO,
        "ENOSPC" => Errno::NOSPC,
        "EROFS" => Errno::ROFS,
        "ENODEV" => Errno::NODEV,
        "ETIMEDOUT" => Errno::TIMEDOUT,
        number => Errno::from_raw_os_error(number.parse().ok().filter(|n| (1..4096).contains(n))?),
    })
}

impl FaultPlan {
    /// What happens to `op`, and whether to its sync alone.
    fn effect_for(&mut self, op: &DiskOp) -> Option<(Effect, bool)> {
        let durable = matches!(op, DiskOp::Write { durable: true, .. });
        let kind = match op {
            DiskOp::Write { .. } => Kind::Write,
            DiskOp::Read { .. } => Kind::Read,
            DiskOp::Sync { .. } => Kind::Sync,
            DiskOp::Allocate { .. } => Kind::Allocate,
        };
        let mut hit = None;
        for rule in &mut self.rules {
            let of_sync = durable && rule.kind == Kind::Sync;
            if (rule.kind != kind && rule.kind != Kind::Any && !of_sync)
                || rule.when.as_ref().is_some_and(|path| !path.exists())
            {
                continue;
            }
            rule.seen += 1;
            if hit.is_none() && rule.seen >= rule.nth && rule.seen - rule.nth < rule.count {
                hit = Some((rule.effect, of_sync));
            }
        }
        hit
    }
}

/// An engine with a [`FaultPlan`] in front of its disk operations.
pub struct FaultEngine {
    inner: Box<dyn Engine>,
    plan: FaultPlan,
    /// Completions made up here, returned by the next wait.
    ready: Vec<Event>,
    /// Tags whose completion is to be turned into an error.
    to_fail: Vec<(Tag, Errno)>,
    /// Tags whose completion is to be held back.
    to_delay: Vec<(Tag, Duration)>,
    delayed: Vec<(Instant, Event)>,
}

impl FaultEngine {
    pub fn new(inner: Box<dyn Engine>, plan: FaultPlan) -> FaultEngine {
        FaultEngine {
            inner,
            plan,
            ready: Vec::new(),
            to_fail: Vec::new(),
            to_delay: Vec::new(),
            delayed: Vec::new(),
        }
    }
}

impl Engine for FaultEngine {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn begin_queued(&mut self) {
        self.inner.begin_queued();
    }

    fn add_file(&mut self, file: Arc<OwnedFd>) -> io::Result<FileId> {
        self.inner.add_file(file)
    }

    unsafe fn pin(&mut self, pieces: &[(*mut u8, usize)]) -> io::Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.inner.pin(pieces) }
    }

    unsafe fn submit(&mut self, tag: Tag, op: DiskOp) {
        let effect = self.plan.effect_for(&op);
        if let Some((effect, _)) = effect {
            tracing::warn!(?op, ?effect, "injecting a fault");
        }
        let op = match (effect, op) {
            (
                Some((Effect::Fail(errno), true)),
                DiskOp::Write {
                    file,
                    offset,
                    data,
                    len,
                    ..
                },
            ) => {
                self.to_fail.push((tag, errno));
                DiskOp::Write {
                    file,
                    offset,
                    data,
                    len,
                    durable: false,
                }
            }
            (Some((Effect::Fail(errno), _)), _) => {
                self.ready.push(Event::Disk {
                    tag,
                    result: Err(errno),
                });
                return;
            }
            (
                Some((Effect::Short(most), false)),
                DiskOp::Write {
                    file,
                    offset,
                    data,
                    len,
                    durable,
                },
            ) => DiskOp::Write {
                file,
                offset,
                data,
                len: len.min(most),
                durable,
            },
            (
                Some((Effect::Short(most), false)),
                DiskOp::Read {
                    file,
                    offset,
                    data,
                    len,
                },
            ) => DiskOp::Read {
                file,
                offset,
                data,
                len: len.min(most),
            },
            (Some((Effect::Delay(delay), _)), op) => {
                self.to_delay.push((tag, delay));
                op
            }
            (_, op) => op,
        };
        // SAFETY: the caller's promise is passed on; a shortened operation uses a part of the same memory.
        unsafe { self.inner.submit(tag, op) };
    }

    fn watch(&mut self, fd: RawFd, token: u32) -> io::Result<WatchId> {
        self.inner.watch(fd, token)
    }

    fn watch_writable(&mut self, watch: WatchId) {
        self.inner.watch_writable(watch);
    }

    fn unwatch(&mut self, watch: WatchId) {
        self.inner.unwatch(watch);
    }

    fn waker(&self) -> Waker {
        self.inner.waker()
    }

    fn wait(&mut self, deadline: Option<Instant>, out: &mut Vec<Event>) -> io::Result<()> {
        let now = Instant::now();
        let mut until = deadline;
        if !self.ready.is_empty() {
            until = Some(now);
        }
        if let Some(next) = self.delayed.iter().map(|(at, _)| *at).min() {
            until = Some(until.map_or(next, |u| u.min(next)));
        }
        let first = out.len();
        self.inner.wait(until, out)?;
        if !self.to_fail.is_empty() {
            for event in &mut out[first..] {
                if let Event::Disk { tag, result } = event
                    && let Some(at) = self.to_fail.iter().position(|f| f.0 == *tag)
                {
                    *result = Err(self.to_fail.swap_remove(at).1);
                }
            }
        }
        if !self.to_delay.is_empty() {
            let mut kept = first;
            for i in first..out.len() {
                let event = out[i];
                if let Event::Disk { tag, .. } = event
                    && let Some(at) = self.to_delay.iter().position(|d| d.0 == tag)
                {
                    let (_, delay) = self.to_delay.swap_remove(at);
                    self.delayed.push((Instant::now() + delay, event));
                    continue;
                }
                out[kept] = event;
                kept += 1;
            }
            out.truncate(kept);
        }
        out.append(&mut self.ready);
        let now = Instant::now();
        let mut i = 0;
        while i < self.delayed.len() {
            if self.delayed[i].0 <= now {
                out.push(self.delayed.swap_remove(i).1);
            } else {
                i += 1;
            }
        }
        Ok(())
    }
}
