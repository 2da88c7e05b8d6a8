//! Starts the servers that are compared, proves that each runs in the mode it is compared in, and ends them.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ashlar_core::nbd::session::transmission_flag;
use ashlar_core::nbd::wire::{self, handshake_flag};
use rustix::fs::OFlags;
use rustix::process::{Pid, Signal, kill_process};
use zerocopy::{FromZeros, IntoBytes};

use crate::command::run_to_end;
use crate::fio::Target;
use crate::procfs;
use crate::rows::Contender;

/// The name under which every server exports its data.
pub(crate) const EXPORT: &str = "bench";

const START_LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(30);
/// How long the least server that looks does so: longer than a client on the same machine takes to come back.
const LOOK_US: u64 = 100;
const POLL_EVERY: Duration = Duration::from_millis(20);

/// A running server process. Dropping it ends the process.
#[derive(Debug)]
pub(crate) struct ServerProcess {
    pub(crate) pid: u32,
    child: Option<Child>,
    _guard: Guard,
}

impl ServerProcess {
    /// Takes charge of a process that was started as a child of this one.
    pub(crate) fn of_child(child: Child) -> Result<ServerProcess> {
        let pid = child.id();
        Ok(ServerProcess {
            pid,
            child: Some(child),
            _guard: Guard::over(pid)?,
        })
    }

    /// Takes charge of a daemon that has detached itself.
    fn of_daemon(pid: u32) -> Result<ServerProcess> {
        Ok(ServerProcess {
            pid,
            child: None,
            _guard: Guard::over(pid)?,
        })
    }

    /// Whether it still runs. A child that has ended is reaped.
    pub(crate) fn is_alive(&mut self) -> bool {
        match &mut self.child {
            Some(child) => matches!(child.try_wait(), Ok(None)),
            None => Path::new(&format!("/proc/{}", self.pid)).exists(),
        }
    }

    fn signal(&self, signal: Signal) {
        if let Some(pid) = Pid::from_raw(self.pid.cast_signed()) {
            // An error is a process that has ended already.
            let _ = kill_process(pid, signal);
        }
    }

    /// Interrupts it, as Ctrl-C does.
    pub(crate) fn interrupt(&self) {
        self.signal(Signal::INT);
    }

    /// Asks it to end, and ends it by force when it has not done so in time. Says whether it went by itself.
    pub(crate) fn stop(&mut self) -> bool {
        let went = self.is_alive() && {
            self.signal(Signal::TERM);
            wait_for(STOP_LIMIT, || !self.is_alive())
        };
        if self.is_alive() {
            self.signal(Signal::KILL);
            wait_for(STOP_LIMIT, || !self.is_alive());
        }
        went
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A shell that ends a server when this program goes away without doing so (Ctrl-C, a kill): it waits on a pipe
/// that only this program holds open.
#[derive(Debug)]
struct Guard {
    shell: Child,
}

impl Guard {
    fn over(pid: u32) -> Result<Guard> {
        let shell = Command::new("sh")
            .args([
                "-c",
                "trap '' INT TERM HUP; read -r _; kill -TERM \"$1\"; sleep 5; kill -KILL \"$1\"",
                "sh",
            ])
            .arg(pid.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("sh could not be started")?;
        Ok(Guard { shell })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // Before its pipe closes, or it would signal a process id that may belong to someone else by then.
        let _ = self.shell.kill();
        let _ = self.shell.wait();
    }
}

/// Polls `condition` until it holds or the time is over.
pub(crate) fn wait_for(limit: Duration, condition: impl FnMut() -> bool) -> bool {
    poll(limit, POLL_EVERY, condition)
}

/// As [`wait_for`], with this pause between two questions, which take processor time of those that are measured.
pub(crate) fn poll(limit: Duration, pause: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(pause);
    }
}

/// A contender that is ready to be measured.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) target: Target,
    /// The servers of this contender alone. None for the bare file.
    pub(crate) servers: Vec<ServerProcess>,
    /// Process ids of servers that other contenders use too; [`crate::measure::Field`] ends them.
    pub(crate) shared: Vec<u32>,
}

impl Running {
    /// One server of its own.
    pub(crate) fn of(target: Target, server: ServerProcess) -> Running {
        Running {
            target,
            servers: vec![server],
            shared: Vec::new(),
        }
    }

    /// Whether every server is there.
    pub(crate) fn is_alive(&mut self) -> bool {
        let own = self.servers.iter_mut().all(ServerProcess::is_alive);
        own && self.shared.iter().all(|&pid| procfs::is_running(pid))
    }

    /// The processes whose time counts as the servers'.
    pub(crate) fn pids(&self) -> Vec<u32> {
        let own = self.servers.iter().map(|server| server.pid);
        own.chain(self.shared.iter().copied()).collect()
    }

    /// Makes what was written durable, so that no contender's backlog runs into the next one's time.
    pub(crate) fn settle(&self) -> Result<()> {
        match &self.target {
            Target::Nbd(uri) => {
                let mut command = Command::new("qemu-io");
                command.args(["-f", "raw", "-c", "flush", uri]);
                run_to_end(command, Duration::from_secs(120)).context("flushing")
            }
            Target::File(path) => Ok(File::open(path)?.sync_all()?),
            // Without librbd's cache a write is durable on every copy when it is answered.
            Target::Rbd { .. } => Ok(()),
        }
    }
}

/// Where peers keep their sockets and data.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Places<'a> {
    /// A short path: the name of a Unix socket may have 107 bytes.
    pub(crate) sockets: &'a Path,
    pub(crate) data: &'a Path,
}

/// Starts a peer over `file`, which holds its data already, and checks that it runs in the mode it is meant to.
pub(crate) fn start_peer(contender: Contender, file: &Path, places: Places<'_>) -> Result<Running> {
    let socket = places.sockets.join(contender.slug());
    let command = match contender {
        Contender::Bare => {
            return Ok(Running {
                target: Target::File(file.to_owned()),
                servers: Vec::new(),
                shared: Vec::new(),
            });
        }
        Contender::QemuNone => qemu_nbd(&["--cache=none", "--aio=io_uring"], &socket, file),
        Contender::QemuWriteback => qemu_nbd(&["--cache=writeback"], &socket, file),
        Contender::Nbdkit => {
            let mut command = Command::new("nbdkit");
            command.arg("--foreground").arg("--unix").arg(&socket);
            command
                .arg(format!("--exportname={EXPORT}"))
                .arg("file")
                .arg(file);
            command
        }
        Contender::Least => least_server(0, &socket, file, places)?,
        Contender::LeastLooking => least_server(LOOK_US, &socket, file, places)?,
        Contender::NbdServer => return start_nbd_server(&socket, file, places),
        _ => bail!("{} is no server over a file", contender.title()),
    };
    let log = places.data.join(format!("{}.log", contender.slug()));
    let mut process = spawn(command, &log)?;
    await_socket(contender, &socket, &mut process)?;
    prove_mode(contender, file, &socket, process.pid)?;
    Ok(Running::of(Target::Nbd(uri(&socket)), process))
}

/// Starts a server in the foreground, with what it says added to the end of `log`.
pub(crate) fn spawn(mut command: Command, log: &Path) -> Result<ServerProcess> {
    let name = command.get_program().to_string_lossy().into_owned();
    let log = File::options().create(true).append(true).open(log)?;
    let child = command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("{name} could not be started"))?;
    ServerProcess::of_child(child)
}

/// The last lines of a log, for messages.
pub(crate) fn end_of(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let from = text.lines().count().saturating_sub(5);
    text.lines().skip(from).collect::<Vec<_>>().join("\n  ")
}

/// The URI of the export on a Unix socket.
pub(crate) fn uri(socket: &Path) -> String {
    format!("nbd+unix:///{EXPORT}?socket={}", socket.display())
}

fn qemu_nbd(modes: &[&str], socket: &Path, file: &Path) -> Command {
    let mut command = Command::new("qemu-nbd");
    // --persistent: stay after the first client; --shared=0: any number of clients.
    command
        .args(["--persistent", "--shared=0", "--format=raw"])
        .args(modes);
    command
        .arg(format!("--export-name={EXPORT}"))
        .arg(format!("--socket={}", socket.display()))
        .arg(file);
    command
}

/// This program as a server. See [`crate::least`].
fn least_server(look_us: u64, socket: &Path, file: &Path, places: Places<'_>) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("least-server");
    command.arg("--socket").arg(socket);
    command.arg("--file").arg(file);
    let log = places.data.join(format!("least-{look_us}.log-data"));
    command.arg("--log").arg(log);
    command.arg(format!("--look-us={look_us}"));
    Ok(command)
}

pub(crate) fn await_socket(
    contender: Contender,
    socket: &Path,
    process: &mut ServerProcess,
) -> Result<()> {
    let ready = wait_for(START_LIMIT, || {
        UnixStream::connect(socket).is_ok() || !process.is_alive()
    });
    ensure!(
        ready && process.is_alive(),
        "{} did not start listening",
        contender.title()
    );
    Ok(())
}

/// nbd-server forks a process for each connection and only serves more than one when it has detached itself, which
/// is also how it is run in practice.
fn start_nbd_server(socket: &Path, file: &Path, places: Places<'_>) -> Result<Running> {
    let config = places.data.join("nbd-server.conf");
    fs::write(
        &config,
        format!(
            "[generic]\nunixsock = {}\n[{EXPORT}]\nexportname = {}\nflush = true\nfua = true\nsync = false\n",
            socket.display(),
            file.display()
        ),
    )?;
    let pid_file = places.data.join("nbd-server.pid");
    let _ = fs::remove_file(&pid_file);
    let mut command = Command::new("nbd-server");
    command.arg("-C").arg(&config).arg("-p").arg(&pid_file);
    run_to_end(command, START_LIMIT)?;
    let mut pid = None;
    wait_for(START_LIMIT, || {
        pid = fs::read_to_string(&pid_file)
            .ok()
            .and_then(|text| text.trim().parse::<u32>().ok());
        pid.is_some()
    });
    let pid = pid.context("nbd-server wrote no process id")?;
    let mut process = ServerProcess::of_daemon(pid)?;
    await_socket(Contender::NbdServer, socket, &mut process)?;
    prove_mode(Contender::NbdServer, file, socket, process.pid)?;
    Ok(Running::of(Target::Nbd(uri(socket)), process))
}

/// Compares what a server really does, as far as the kernel and the NBD handshake show it, with what its row says.
fn prove_mode(contender: Contender, file: &Path, socket: &Path, pid: u32) -> Result<()> {
    let title = contender.title();
    // Some open the file only for a client.
    let client = Client::attach(socket).with_context(|| format!("attaching to {title}"))?;
    let opened: Vec<_> = procfs::tree(pid)
        .into_iter()
        .flat_map(|pid| procfs::open_files(pid).unwrap_or_default())
        .collect();
    let file = file.canonicalize()?;
    ensure!(
        client.size_bytes == file.metadata()?.len(),
        "{title} exports {} bytes",
        client.size_bytes
    );
    ensure!(client.takes_flush, "{title} takes no flush");
    let flags: Vec<OFlags> = opened
        .iter()
        .filter(|open| open.target == file)
        .map(|open| OFlags::from_bits_retain(open.flags))
        .collect();
    let has_ring = opened
        .iter()
        .any(|open| open.target.as_os_str() == "anon_inode:[io_uring]");
    let direct = flags.iter().any(|flags| flags.contains(OFlags::DIRECT));
    let synced = flags
        .iter()
        .any(|flags| flags.intersects(OFlags::DSYNC | OFlags::SYNC));
    ensure!(
        !flags.is_empty(),
        "{title} does not have its data file open"
    );
    ensure!(
        !synced,
        "{title} opened its data file for synchronous writes"
    );
    match contender {
        Contender::QemuNone => {
            ensure!(direct, "{title} did not open its data file with O_DIRECT");
            ensure!(has_ring, "{title} has no io_uring");
        }
        Contender::Least | Contender::LeastLooking => {
            ensure!(direct, "{title} did not open its data file with O_DIRECT");
        }
        Contender::QemuWriteback | Contender::Nbdkit | Contender::NbdServer => {
            ensure!(!direct, "{title} opened its data file with O_DIRECT");
        }
        _ => {}
    }
    Ok(())
}

/// Checks what an export of `size_bytes` says of itself.
pub(crate) fn prove_export(contender: Contender, socket: &Path, size_bytes: u64) -> Result<()> {
    let title = contender.title();
    let client = Client::attach(socket).with_context(|| format!("attaching to {title}"))?;
    ensure!(
        client.size_bytes == size_bytes,
        "{title} exports {} bytes",
        client.size_bytes
    );
    ensure!(client.takes_flush, "{title} takes no flush");
    Ok(())
}

/// A connection in the transmission phase, which makes a server open its file.
#[derive(Debug)]
struct Client {
    stream: UnixStream,
    size_bytes: u64,
    takes_flush: bool,
}

impl Client {
    fn attach(socket: &Path) -> Result<Client> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(START_LIMIT))?;
        let mut greeting = wire::Greeting::new_zeroed();
        stream.read_exact(greeting.as_mut_bytes())?;
        ensure!(
            greeting.magic == wire::GREETING_MAGIC && greeting.option_magic == wire::OPTION_MAGIC,
            "not a newstyle NBD server"
        );
        let flags = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
        // The option that every server answers.
        let option = wire::OptionHeader {
            magic: wire::OPTION_MAGIC.into(),
            option: wire::option::EXPORT_NAME.into(),
            length: (EXPORT.len() as u32).into(),
        };
        let flags = u32::from(flags).to_be_bytes();
        stream.write_all(&[&flags, option.as_bytes(), EXPORT.as_bytes()].concat())?;
        let mut size = [0; 8];
        stream.read_exact(&mut size)?;
        let mut flags = [0; 2];
        stream.read_exact(&mut flags)?;
        Ok(Client {
            stream,
            size_bytes: u64::from_be_bytes(size),
            takes_flush: u16::from_be_bytes(flags) & transmission_flag::SEND_FLUSH != 0,
        })
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let mut request = wire::RequestHeader::new_zeroed();
        request.magic = wire::REQUEST_MAGIC.into();
        request.command = wire::command::DISC.into();
        // An error is a server that has gone, and then there is nobody to tell.
        let _ = self.stream.write_all(request.as_bytes());
    }
}
