//! One machine: started, asked to do things, switched off.

use std::collections::HashMap;
use std::fmt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::disk::Disk;
use super::image::Image;
use super::wire::{self, Answer, Ask, End, Process, Question, Ran, Reply};
use crate::log;
use crate::process::{Group, describe};
use crate::scratch::Scratch;
use crate::wait;

/// Longest wait for the agent's first word. A start takes 4 s of one processor; those are shared and emulated.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// Longest run of a program, unless a test says otherwise. It ends what hangs; on a machine that is busy with other things what
/// gets on may take minutes.
const RUN_LIMIT: Duration = Duration::from_secs(600);
/// How much longer than a program's own limit the host waits for the agent to say how it ended.
const GRACE: Duration = Duration::from_secs(60);
/// Machines at a time: each is one busy processor and MEMORY_MIB of memory.
const MACHINES_MAX: usize = 2;
const MEMORY_MIB: u32 = 1280;

/// Words of the kernel's log that no test wants to see.
const ALARMS: [&str; 9] = [
    "BUG:",
    "Oops",
    "Kernel panic",
    "blocked for more than",
    "WARNING: ",
    "I/O error",
    "EXT4-fs error",
    "XFS (nbd",
    "Buffer I/O",
];
/// What XFS says when all is well.
const CALM: [&str; 6] = [
    "Mounting V5",
    "Ending clean mount",
    "Unmounting Filesystem",
    "Starting recovery",
    "Ending recovery",
    "Metadata I/O Error (0x0)",
];

/// What to start.
#[derive(Debug, Default)]
pub struct Plan {
    /// More words for the kernel's command line.
    pub kernel_words: String,
}

/// The permission to run a machine.
struct Slot;

static RUNNING: Mutex<usize> = Mutex::new(0);
static ENDED: Condvar = Condvar::new();

impl Slot {
    fn take() -> Slot {
        let mut running = RUNNING.lock().unwrap_or_else(|poison| poison.into_inner());
        while *running >= MACHINES_MAX {
            running = ENDED
                .wait(running)
                .unwrap_or_else(|poison| poison.into_inner());
        }
        *running += 1;
        Slot
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        *RUNNING.lock().unwrap_or_else(|poison| poison.into_inner()) -= 1;
        ENDED.notify_one();
    }
}

type Waiting = Arc<Mutex<HashMap<u64, Sender<Answer>>>>;

/// A running machine. Killed when dropped; then the kernel must have had nothing to complain about.
pub struct Machine {
    name: String,
    qemu: Group,
    disks: Vec<Disk>,
    to_agent: Mutex<UnixStream>,
    waiting: Waiting,
    next_id: AtomicU64,
    console: PathBuf,
    expected: Mutex<Vec<String>>,
    saved: Mutex<Vec<String>>,
    scratch: Scratch,
    _image: Arc<Image>,
    _slot: Slot,
}

impl Machine {
    /// Starts a machine with `disks` as /dev/vda and so on, and waits for its agent.
    pub fn boot(name: &str, plan: &Plan, mut disks: Vec<Disk>) -> Machine {
        let slot = Slot::take();
        let image = Image::shared();
        let scratch = Scratch::new(&format!("vm-{name}"));
        let socket = scratch.join("agent.sock");
        let console = scratch.join("console.log");
        let listener = UnixListener::bind(&socket).expect("a socket in the scratch directory");
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
            ])
            .args([
                "-machine", "q35", "-accel", "tcg", "-cpu", "max", "-smp", "2",
            ])
            .args(["-m", &format!("{MEMORY_MIB}M")])
            .arg("-kernel")
            .arg(&image.kernel)
            .arg("-initrd")
            .arg(&image.archive)
            .arg("-append")
            // mitigations=off: they cost much under emulation and change nothing that is tested here. The clock is the HPET,
            // which qemu keeps by the host's clock: the emulated TSC is the processor's own counter, and where the host is
            // a virtual machine itself the two may go at different speeds, so that limits inside would end too early.
            .arg(format!(
                "console=ttyS0 panic=-1 oops=panic mitigations=off tsc=unstable clocksource=hpet no_timer_check {}",
                plan.kernel_words
            ))
            .arg("-serial")
            .arg(format!("file:{}", console.display()))
            .args(["-device", "virtio-serial-pci"])
            .arg("-chardev")
            .arg(format!("socket,id=agent,path={}", socket.display()))
            .args([
                "-device",
                &format!("virtserialport,chardev=agent,nr=1,name={}", wire::PORT),
            ]);
        for (at, disk) in disks.iter_mut().enumerate() {
            command
                .arg("-drive")
                .arg(format!("if=none,id=disk{at},{}", disk.plug_in()))
                .args(["-device", &format!("virtio-blk-pci,drive=disk{at}")]);
        }
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(scratch.join("qemu.log")).expect("a log for qemu"));
        let qemu = Group::spawn(&mut command).unwrap_or_else(|error| {
            panic!("cannot run qemu: {error} (`make test` installs what the tests need)")
        });
        let mut machine = Machine {
            name: name.to_owned(),
            qemu,
            disks,
            // A pair that goes nowhere until the real one is there.
            to_agent: Mutex::new(UnixStream::pair().expect("a pair of sockets").0),
            waiting: Waiting::default(),
            next_id: AtomicU64::new(1),
            console,
            expected: Mutex::default(),
            saved: Mutex::default(),
            scratch,
            _image: image,
            _slot: slot,
        };
        machine.meet(&listener);
        machine
    }

    /// Waits for the agent's first word.
    fn meet(&mut self, listener: &UnixListener) {
        let (hello, heard) = channel();
        self.lock_waiting().insert(0, hello);
        listener.set_nonblocking(true).expect("a socket of ours");
        let stream = wait::until(BOOT_LIMIT, "qemu connects", || {
            self.still_there();
            let (stream, _) = listener.accept().map_err(|error| error.to_string())?;
            Ok(stream)
        });
        stream.set_nonblocking(false).expect("a socket of ours");
        let mut source = stream.try_clone().expect("a second descriptor");
        self.to_agent = Mutex::new(stream);
        let waiting = self.waiting.clone();
        std::thread::spawn(move || {
            while let Ok(reply) = wire::receive::<Reply>(&mut source) {
                let asked = waiting
                    .lock()
                    .unwrap_or_else(|poison| poison.into_inner())
                    .remove(&reply.id);
                if let Some(asked) = asked {
                    let _ = asked.send(reply.what);
                }
            }
            // Who waits still is told that nothing will come.
            waiting
                .lock()
                .unwrap_or_else(|poison| poison.into_inner())
                .clear();
        });
        let answer = self.hear(&heard, BOOT_LIMIT, "the agent's first word");
        assert!(matches!(answer, Answer::Hello), "{answer:?}");
    }

    fn lock_waiting(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Sender<Answer>>> {
        self.waiting
            .lock()
            .unwrap_or_else(|poison| poison.into_inner())
    }

    fn still_there(&mut self) {
        if let Some(status) = self.qemu.exited() {
            let said = std::fs::read_to_string(self.scratch.join("qemu.log")).unwrap_or_default();
            panic!(
                "qemu ended with {}: {said}\n{}",
                describe(status),
                self.console_tail()
            );
        }
    }

    fn hear(&self, from: &Receiver<Answer>, limit: Duration, what: &str) -> Answer {
        from.recv_timeout(limit).unwrap_or_else(|error| {
            let said = std::fs::read_to_string(self.scratch.join("qemu.log")).unwrap_or_default();
            panic!(
                "{what}: {error}; qemu says {said:?}, the console\n{}",
                self.console_tail()
            )
        })
    }

    fn put_question(&self, what: Ask, answer: Sender<Answer>) {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        self.lock_waiting().insert(id, answer);
        let mut to_agent = self
            .to_agent
            .lock()
            .unwrap_or_else(|poison| poison.into_inner());
        // One that cannot be sent has no answer, which is seen where that is waited for.
        let _ = wire::send(&mut *to_agent, &Question { id, what });
    }

    fn ask(&self, what: Ask, limit: Duration) -> Answer {
        let (answer, heard) = channel();
        let line = format!("{what:?}");
        self.put_question(what, answer);
        match self.hear(&heard, limit, &line) {
            Answer::Failed(why) => panic!("{line}: {why}"),
            answer => answer,
        }
    }

    /// Runs a program with a limit.
    pub fn run_within(&self, argv: &[&str], limit: Duration) -> Outcome {
        let line = argv.join(" ");
        let ask = Ask::Run {
            argv: argv.iter().map(|word| (*word).to_owned()).collect(),
            input: String::new(),
            limit_ms: limit.as_millis() as u64,
        };
        let started = Instant::now();
        let Answer::Ran(ran) = self.ask(ask, limit + GRACE) else {
            panic!("{line}: not the answer to that")
        };
        Outcome {
            line,
            ran,
            took: started.elapsed(),
        }
    }

    /// Runs a program.
    pub fn try_run(&self, argv: &[&str]) -> Outcome {
        self.run_within(argv, RUN_LIMIT)
    }

    /// Runs a program and demands exit code 0; returns its standard output.
    pub fn run(&self, argv: &[&str]) -> String {
        self.try_run(argv).success()
    }

    /// Runs lines for a shell, which stops at the first that fails.
    pub fn try_sh(&self, script: &str) -> Outcome {
        self.try_run(&["bash", "-ec", script])
    }

    /// As [`Machine::try_sh`], and demands exit code 0; returns the standard output without the last line's end.
    pub fn sh(&self, script: &str) -> String {
        self.try_sh(script).success().trim_end().to_owned()
    }

    /// Starts a program that stays; its output is appended to the file `output`. Returns its process id.
    pub fn start(&self, argv: &[&str], output: &str) -> u32 {
        let ask = Ask::Start {
            argv: argv.iter().map(|word| (*word).to_owned()).collect(),
            output: output.to_owned(),
        };
        match self.ask(ask, RUN_LIMIT) {
            Answer::Started { pid } => pid,
            other => panic!("{argv:?}: {other:?}"),
        }
    }

    pub fn signal(&self, pid: u32, signal: Signal) {
        let signal = signal.as_raw();
        self.ask(Ask::Signal { pid, signal }, RUN_LIMIT);
    }

    /// Waits for the end of a program that [`Machine::start`] started.
    pub fn wait(&self, pid: u32, limit: Duration) -> End {
        let limit_ms = limit.as_millis() as u64;
        match self.ask(Ask::Wait { pid, limit_ms }, limit + GRACE) {
            Answer::Ended(end) => end,
            other => panic!("waiting for {pid}: {other:?}"),
        }
    }

    pub fn read(&self, path: &str) -> Option<String> {
        let path = path.to_owned();
        match self.ask(Ask::Read { path }, RUN_LIMIT) {
            Answer::Text(text) => Some(text),
            _ => None,
        }
    }

    pub fn write(&self, path: &str, text: &str) {
        let (path, text) = (path.to_owned(), text.to_owned());
        self.ask(Ask::Write { path, text }, RUN_LIMIT);
    }

    pub fn processes(&self) -> Vec<Process> {
        match self.ask(Ask::Processes, RUN_LIMIT) {
            Answer::Processes(processes) => processes,
            other => panic!("{other:?}"),
        }
    }

    /// Processes that are not the kernel's own, wait in it and cannot be killed, twice in a row.
    pub fn held(&self) -> Vec<Process> {
        let now = || -> Vec<Process> {
            let mut all = self.processes();
            all.retain(|process| process.state == 'D' && !process.kernel);
            all
        };
        let first = now();
        wait::pass(Duration::from_millis(500));
        let second = now();
        second
            .into_iter()
            .filter(|process| first.iter().any(|other| other.pid == process.pid))
            .collect()
    }

    /// Alarms of the kernel's log that contain `part` are meant to be there.
    pub fn expect(&self, part: &str) {
        self.expected
            .lock()
            .unwrap_or_else(|poison| poison.into_inner())
            .push(part.to_owned());
    }

    /// A program's log: it is kept with the console's when the test fails, and a panic in it fails the test.
    pub fn save(&self, path: &str) {
        self.saved
            .lock()
            .unwrap_or_else(|poison| poison.into_inner())
            .push(path.to_owned());
    }

    /// What the kernel wrote so far.
    pub fn console(&self) -> String {
        std::fs::read(&self.console).map_or_else(
            |_| String::new(),
            |bytes| String::from_utf8_lossy(&bytes).into_owned(),
        )
    }

    fn console_tail(&self) -> String {
        let text = self.console();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    /// Lines of the kernel's log that should not be there.
    pub fn alarms(&self) -> Vec<String> {
        let expected = self
            .expected
            .lock()
            .unwrap_or_else(|poison| poison.into_inner());
        self.console()
            .lines()
            .filter(|line| ALARMS.iter().any(|word| line.contains(word)))
            .filter(|line| !CALM.iter().any(|word| line.contains(word)))
            .filter(|line| !expected.iter().any(|part| line.contains(part.as_str())))
            .map(str::to_owned)
            .collect()
    }

    /// Panics that the machine's programs tell of.
    fn panics(&self) -> Vec<String> {
        let saved = self
            .saved
            .lock()
            .unwrap_or_else(|poison| poison.into_inner())
            .clone();
        let mut panics = Vec::new();
        for path in saved {
            let (answer, heard) = channel();
            self.put_question(Ask::Read { path: path.clone() }, answer);
            // A log that is not there yet is none.
            if let Answer::Text(text) = self.hear(&heard, RUN_LIMIT, &path) {
                panics.extend(log::panics(&text));
            }
        }
        panics
    }

    fn check_logs(&self) {
        let panics = self.panics();
        assert!(
            panics.is_empty(),
            "a program's log has\n{}",
            panics.join("\n")
        );
    }

    /// Ends the machine in an orderly way, as `poweroff` does after its last unmount; returns the disks.
    pub fn power_off(mut self) -> Vec<Disk> {
        self.check_logs();
        // The machine may be off before its answer is out.
        let (answer, _) = channel();
        self.put_question(Ask::PowerOff, answer);
        let ended = self.qemu.wait(RUN_LIMIT);
        assert!(
            ended.is_some_and(|status| status.success()),
            "qemu after the power-off: {ended:?}\n{}",
            self.console_tail()
        );
        std::mem::take(&mut self.disks)
    }

    /// Cuts the power: everything stops at one moment, and what no disk had flushed is gone. Returns the disks.
    pub fn cut_power(mut self) -> Vec<Disk> {
        self.check_logs();
        // The machine stops first, so that it never sees its disks go.
        self.qemu.signal(Signal::STOP);
        for disk in &mut self.disks {
            disk.cut_power();
        }
        self.qemu.kill();
        std::mem::take(&mut self.disks)
    }

    /// Copies what there is to know to a place that stays.
    fn keep_evidence(&mut self) {
        let folder = super::target().join("vm-failed").join(&self.name);
        let _ = std::fs::create_dir_all(&folder);
        for name in ["console.log", "qemu.log"] {
            let _ = std::fs::copy(self.scratch.join(name), folder.join(name));
        }
        let saved = std::mem::take(
            &mut *self
                .saved
                .lock()
                .unwrap_or_else(|poison| poison.into_inner()),
        );
        if self.qemu.exited().is_none() {
            for path in saved {
                let (answer, heard) = channel();
                self.put_question(Ask::Read { path: path.clone() }, answer);
                if let Ok(Answer::Text(text)) = heard.recv_timeout(Duration::from_secs(10)) {
                    let name = path.trim_start_matches('/').replace('/', "-");
                    let _ = std::fs::write(folder.join(name), text);
                }
            }
        }
        eprintln!("kept the machine's logs in {}", folder.display());
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.keep_evidence();
            return;
        }
        let panics = if self.qemu.exited().is_none() {
            self.panics()
        } else {
            Vec::new()
        };
        let alarms = self.alarms();
        if !panics.is_empty() || !alarms.is_empty() {
            self.keep_evidence();
        }
        self.qemu.kill();
        assert!(
            panics.is_empty(),
            "a program's log has\n{}",
            panics.join("\n")
        );
        assert!(
            alarms.is_empty(),
            "the kernel's log has\n{}",
            alarms.join("\n")
        );
    }
}

/// A program that was run in a machine.
#[derive(Debug)]
pub struct Outcome {
    pub line: String,
    pub ran: Ran,
    /// As the host saw it.
    pub took: Duration,
}

impl Outcome {
    pub fn ok(&self) -> bool {
        self.ran.end == End::Code(0)
    }

    /// Demands exit code 0 and returns the standard output.
    pub fn success(self) -> String {
        assert!(self.ok(), "{self}");
        self.ran.stdout
    }

    /// Demands an end with another exit code and returns both streams.
    pub fn failure(self) -> String {
        assert!(
            matches!(self.ran.end, End::Code(code) if code != 0),
            "expected a failure\n{self}"
        );
        format!("{}{}", self.ran.stdout, self.ran.stderr)
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            out,
            "vm$ {}\n{:?} after {:?}",
            self.line, self.ran.end, self.took
        )?;
        writeln!(
            out,
            "--- stdout\n{}\n--- stderr\n{}",
            self.ran.stdout, self.ran.stderr
        )
    }
}
