//! Does what the test on the host asks.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, mpsc};
use std::time::Duration;

use anyhow::{Context, anyhow};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use rustix::system::{RebootCommand, reboot};

use ashlar_tests::vm::wire::{self, Answer, Ask, End, Question, Ran, Reply};
use ashlar_tests::wait;

use crate::processes;

/// The port by the number it is given on qemu's command line; nobody makes /dev/virtio-ports here.
const PORT: &str = "/dev/vport0p1";
/// How long a killed program may take to die before it counts as held by the kernel.
const DEATH_LIMIT: Duration = Duration::from_secs(5);
/// Most output that is kept of one stream, bytes.
const OUTPUT_MAX: usize = 4 << 20;

type Started = Arc<Mutex<HashMap<u32, Child>>>;

pub(super) fn run() -> anyhow::Result<()> {
    let mut port = wait::until(Duration::from_secs(60), PORT, || {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(PORT)
            .map_err(|error| error.to_string())
    });
    let replies = Arc::new(Mutex::new(port.try_clone()?));
    reply(&replies, 0, Answer::Hello);
    let started = Started::default();
    loop {
        let question: Question = wire::receive(&mut port).context("the host is gone")?;
        let (replies, started) = (replies.clone(), started.clone());
        std::thread::spawn(move || {
            let answer = answer(question.what, &started)
                .unwrap_or_else(|error| Answer::Failed(format!("{error:#}")));
            reply(&replies, question.id, answer);
        });
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poison| poison.into_inner())
}

fn reply(port: &Mutex<File>, id: u64, what: Answer) {
    if let Err(error) = wire::send(&mut *lock(port), &Reply { id, what }) {
        eprintln!("agent: the port: {error}");
    }
}

fn answer(what: Ask, started: &Started) -> anyhow::Result<Answer> {
    match what {
        Ask::Run {
            argv,
            input,
            limit_ms,
        } => Ok(Answer::Ran(run_to_end(
            &argv,
            input,
            Duration::from_millis(limit_ms),
        )?)),
        Ask::Start { argv, output } => {
            let out = OpenOptions::new()
                .create(true)
                .append(true)
                .open(&output)
                .context(output)?;
            let child = command(&argv)?
                .stdin(Stdio::null())
                .stdout(out.try_clone()?)
                .stderr(out)
                .spawn()
                .with_context(|| argv.join(" "))?;
            let pid = child.id();
            lock(started).insert(pid, child);
            Ok(Answer::Started { pid })
        }
        Ask::Signal { pid, signal } => {
            let pid = Pid::from_raw(pid as i32).context("no process has the id 0")?;
            let signal = Signal::from_named_raw(signal).context("no such signal")?;
            kill_process(pid, signal)?;
            Ok(Answer::Done)
        }
        Ask::Wait { pid, limit_ms } => {
            // Taken out while it is waited for, so that others can be started and waited for meanwhile.
            let mut child = lock(started)
                .remove(&pid)
                .with_context(|| format!("{pid} was not started here"))?;
            let ended = ended_within(&mut child, Duration::from_millis(limit_ms))?;
            if ended.is_none() {
                lock(started).insert(pid, child);
            }
            Ok(Answer::Ended(ended.map_or(End::Running, describe)))
        }
        Ask::Read { path } => {
            let bytes = std::fs::read(&path).context(path)?;
            Ok(Answer::Text(String::from_utf8_lossy(&bytes).into_owned()))
        }
        Ask::Write { path, text } => {
            std::fs::write(&path, text).context(path)?;
            Ok(Answer::Done)
        }
        Ask::Processes => Ok(Answer::Processes(processes::list()?)),
        Ask::PowerOff => {
            rustix::fs::sync();
            reboot(RebootCommand::PowerOff)?;
            Ok(Answer::Done)
        }
    }
}

fn command(argv: &[String]) -> anyhow::Result<Command> {
    let (program, arguments) = argv.split_first().ok_or_else(|| anyhow!("no program"))?;
    let mut command = Command::new(program);
    command.args(arguments).current_dir("/").process_group(0);
    Ok(command)
}

fn describe(status: ExitStatus) -> End {
    match status.code() {
        Some(code) => End::Code(code),
        None => End::Signal(status.signal().unwrap_or_default()),
    }
}

/// Waits on a thread of its own: `wait` has no limit, and a program that the kernel holds may never end.
fn ended_within(child: &mut Child, limit: Duration) -> anyhow::Result<Option<ExitStatus>> {
    let pid = Pid::from_child(child);
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
    let timeout = rustix::event::Timespec {
        tv_sec: limit.as_secs() as i64,
        tv_nsec: i64::from(limit.subsec_nanos()),
    };
    let mut fds = [rustix::event::PollFd::new(
        &pidfd,
        rustix::event::PollFlags::IN,
    )];
    rustix::event::poll(&mut fds, Some(&timeout))?;
    Ok(child.try_wait()?)
}

/// Collects a stream as it comes, so that what a stuck program said is not lost with it.
fn collect(mut source: impl Read + Send + 'static) -> (Arc<Mutex<Vec<u8>>>, mpsc::Receiver<()>) {
    let kept = Arc::new(Mutex::new(Vec::new()));
    let (done, finished) = mpsc::channel();
    let into = kept.clone();
    std::thread::spawn(move || {
        let mut piece = vec![0; 1 << 16];
        while let Ok(count) = source.read(&mut piece) {
            let mut kept = lock(&into);
            let room = OUTPUT_MAX - kept.len();
            kept.extend_from_slice(&piece[..count.min(room)]);
            if count == 0 {
                break;
            }
        }
        let _ = done.send(());
    });
    (kept, finished)
}

fn run_to_end(argv: &[String], input: String, limit: Duration) -> anyhow::Result<Ran> {
    let mut child = command(argv)?
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| argv.join(" "))?;
    let mut stdin = child.stdin.take().context("stdin is piped")?;
    std::thread::spawn(move || {
        // A program that does not read its input is free to.
        let _ = stdin.write_all(input.as_bytes());
    });
    let (stdout, stdout_done) = collect(child.stdout.take().context("stdout is piped")?);
    let (stderr, stderr_done) = collect(child.stderr.take().context("stderr is piped")?);
    let mut end = ended_within(&mut child, limit)?.map_or(End::Late, describe);
    let _ = kill_process_group(Pid::from_child(&child), Signal::KILL);
    if end == End::Late && ended_within(&mut child, DEATH_LIMIT)?.is_none() {
        end = End::Stuck;
    }
    // What a daemon left behind may hold the pipes open; it is not waited for.
    for done in [stdout_done, stderr_done] {
        let _ = done.recv_timeout(Duration::from_secs(2));
    }
    let text = |kept: &Mutex<Vec<u8>>| String::from_utf8_lossy(&lock(kept)).into_owned();
    Ok(Ran {
        end,
        stdout: text(&stdout),
        stderr: text(&stderr),
    })
}
