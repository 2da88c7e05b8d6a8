//! FlexVolume: a program that the kubelet runs for each step, with one line of JSON as its answer.
//!
//! Nothing is attached by a controller (`attach: false`): mounting takes the volume to this node, attaches, formats and
//! mounts it, and unmounting undoes all of that after the last pod. The calls share a state directory; one runs at a
//! time, under a lock that ends with the process that has it.

pub mod call;
pub mod install;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use clap::{CommandFactory, FromArgMatches};
use rustix::fs::{FlockOperation, flock};
use tracing_subscriber::EnvFilter;

use super::Host;
use crate::controller::NAME_KEY;
use crate::node::filesystem::mounts;
use crate::node::keep_connected;
use crate::refusal::{Class, Refusal};
use crate::run::{Arguments, keep_registered, open_state_directory, start_log};
use crate::{failpoint, paths};
use call::{Answer, COMMANDS, Call, Options};

pub use install::{CONFIGURATION, install};

const STATE_DIRECTORY: &str = "/var/lib/ashlar-csi/flexvolume";
const NODE_SUFFIX: &str = ".flexvolume";
/// Names another file of settings.
const CONFIGURATION_VARIABLE: &str = "ASHLAR_CSI_FLEXVOLUME_CONFIG";
/// How long a call waits for another one. The kubelet asks again.
const LOCK_LIMIT: Duration = Duration::from_secs(90);
const LOCK_RETRY: Duration = Duration::from_millis(50);
/// The log is begun anew above it; the one before is kept.
const LOG_BYTES_MAX: u64 = 4 << 20;

/// Whether a first argument is one of the interface's commands: the program is run under the driver's name then.
pub fn is_command(argument: &str) -> bool {
    COMMANDS.contains(&argument)
}

/// Carries a command out and prints its answer, and nothing else on any output.
pub fn main(arguments: &[String]) -> ExitCode {
    // A report of a panic would make the answer unreadable.
    std::panic::set_hook(Box::new(|_| {}));
    let answer = std::panic::catch_unwind(|| answer(arguments))
        .unwrap_or_else(|_| Answer::failure("the driver broke off; see its log"));
    println!("{}", answer.to_json());
    if answer.is_success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn answer(arguments: &[String]) -> Answer {
    let call = match Call::parse(arguments) {
        Ok(call) => call,
        Err(refusal) => return Answer::failure(refusal.message),
    };
    match call {
        Call::Init => Answer::capabilities(),
        Call::NotSupported => Answer::not_supported(),
        Call::Name(options) => Answer::named(options.volume),
        call => match work(call) {
            Ok(answer) => answer,
            Err(error) => Answer::failure(format!("{error:#}")),
        },
    }
}

fn work(call: Call) -> anyhow::Result<Answer> {
    let mut settings = settings()?;
    settings.state_dir = open_state_directory(&settings.state_dir)?;
    log_to(&settings)?;
    if let Some(name) = &settings.fail_point {
        failpoint::arm(name).map_err(|error| anyhow!(error))?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let done = runtime.block_on(async {
        let _lock = lock(&settings.state_dir).await?;
        let host = Host::open(&settings, NODE_SUFFIX).await?;
        anyhow::Ok(carry_out(&host, call, settings.flexvolume_any_volume).await?)
    });
    runtime.shutdown_background();
    if let Err(error) = &done {
        tracing::warn!(error = format!("{error:#}"), "failed");
    }
    done
}

async fn carry_out(host: &Host, call: Call, any_volume: bool) -> Result<Answer, Refusal> {
    let node = host.node();
    match call {
        Call::Mount { directory, options } => {
            let target = node.roots().check("the directory", &directory)?;
            let volume = find(host, &options).await?;
            is_free(&volume, any_volume)?;
            if let Some(parent) = target.parent() {
                std::fs::create_dir_all(parent).map_err(|error| {
                    Refusal::internal(format!("making {}: {error}", parent.display()))
                })?;
            }
            host.bring_up(&volume, &target, &options.wish).await?;
            Ok(Answer::success())
        }
        Call::Unmount { directory } => {
            let target = node.roots().check("the directory", &directory)?;
            match node.held_at(&target)? {
                Some(held) => host.take_down(held.volume, &target).await?,
                None => nothing_at(&target)?,
            }
            Ok(Answer::success())
        }
        Call::ExpandVolume {
            options,
            size_bytes,
        } => {
            let volume = find(host, &options).await?;
            is_free(&volume, any_volume)?;
            let range = crate::controller::sizing::Range {
                required_bytes: size_bytes,
                limit_bytes: 0,
            };
            let size_bytes = host.controller().expand(volume.id, range).await?;
            Ok(Answer::sized(size_bytes))
        }
        Call::ExpandFilesystem {
            options,
            directory,
            size_bytes,
        } => {
            let target = node.roots().check("the directory", &directory)?;
            let volume = find(host, &options).await?;
            let size_bytes = node.expand(volume.id, &target, size_bytes).await?;
            Ok(Answer::sized(size_bytes))
        }
        Call::Init | Call::Name(_) | Call::NotSupported => {
            Err(Refusal::internal("a call that needs no work"))
        }
    }
}

async fn find(host: &Host, options: &Options) -> Result<crate::daemon::Volume, Refusal> {
    let found = host.find(&options.volume).await?;
    found.ok_or_else(|| Refusal::not_found(format!("there is no volume {:?}", options.volume)))
}

/// Refuses a volume that was made for a claim or by Docker: a pod's author names any volume here, and nothing asks whether it
/// is for him. `any_volume`: an administrator allowed it.
fn is_free(volume: &crate::daemon::Volume, any_volume: bool) -> Result<(), Refusal> {
    let Some(made_for) = volume.annotations.get(NAME_KEY).filter(|_| !any_volume) else {
        return Ok(());
    };
    Err(Refusal::new(
        Class::PermissionDenied,
        format!(
            "volume {} was made by the CSI or the Docker driver (as {made_for:?}) and is used through that one alone; FlexVolume \
             uses volumes that were made with `ashlar volume create`. An administrator can allow it with \
             --flexvolume-any-volume=true in the driver's settings",
            volume.name
        ),
    ))
}

/// Unmounting what no volume of ours is at: done, unless something of somebody's is there.
fn nothing_at(target: &Path) -> Result<(), Refusal> {
    let mounts = mounts()?;
    if let Some(mount) = mounts.at(target) {
        return Err(Refusal::precondition(format!(
            "{} is a mount of {} that this driver did not make; it is left alone",
            target.display(),
            mount.kind
        )));
    }
    paths::remove(target)
        .map_err(|error| Refusal::internal(format!("removing {}: {error}", target.display())))
}

/// Keeps the connections of the node's devices: the calls come and go, and somebody has to see that a daemon was started
/// anew. Runs until it is told to stop.
pub async fn keep() -> anyhow::Result<()> {
    let mut settings = settings()?;
    start_log(&settings.log, settings.log_format)?;
    settings.state_dir = open_state_directory(&settings.state_dir)?;
    let host = {
        let _lock = lock(&settings.state_dir).await?;
        Host::open(&settings, NODE_SUFFIX).await?
    };
    tracing::info!(node = host.node_id(), "keeping connections");
    tokio::spawn(keep_registered(
        host.node().daemon().clone(),
        host.node_id().to_owned(),
        std::collections::BTreeMap::new(),
    ));
    // Only reads the state files, which are replaced as a whole, so it needs no lock.
    let kept = keep_connected(Arc::clone(host.node()));
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        () = kept => {}
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
    Ok(())
}

/// The settings: a file with an argument a line, because a kubelet passes none of its own.
fn settings() -> anyhow::Result<Arguments> {
    let mut lines = Vec::new();
    if let Some(path) = configuration() {
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("reading {}", path.display()))?;
        lines = arguments_of(&text);
    }
    read_arguments(&lines)
}

fn arguments_of(text: &str) -> Vec<String> {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(str::to_owned)
        .collect()
}

fn read_arguments(lines: &[String]) -> anyhow::Result<Arguments> {
    let command =
        Arguments::command().mut_arg("state_dir", |state| state.default_value(STATE_DIRECTORY));
    let matches = command
        .try_get_matches_from(std::iter::once("ashlar-csi").chain(lines.iter().map(String::as_str)))
        .map_err(|error| anyhow!("the settings: {}", error.to_string().trim_end()))?;
    Ok(Arguments::from_arg_matches(&matches)?)
}

/// Beside the program, where an installer puts it, or in /etc.
fn configuration() -> Option<PathBuf> {
    if let Some(given) = std::env::var_os(CONFIGURATION_VARIABLE) {
        return Some(PathBuf::from(given));
    }
    let beside = std::env::current_exe().ok()?.parent()?.join(CONFIGURATION);
    let general = Path::new("/etc/ashlar").join(CONFIGURATION);
    [beside, general].into_iter().find(|path| path.exists())
}

/// To a file in the state directory: both outputs belong to the answer.
fn log_to(settings: &Arguments) -> anyhow::Result<()> {
    let path = settings.state_dir.join("flexvolume.log");
    if std::fs::metadata(&path).is_ok_and(|file| file.len() > LOG_BYTES_MAX) {
        std::fs::rename(&path, path.with_extension("log.1"))?;
    }
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("opening {}", path.display()))?;
    let filter = EnvFilter::try_new(&settings.log).context("--log")?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(Arc::new(file))
        .init();
    Ok(())
}

/// One call at a time: state files and devices are not shared by processes.
async fn lock(directory: &Path) -> anyhow::Result<File> {
    let path = directory.join("lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("opening {}", path.display()))?;
    let begun = tokio::time::Instant::now();
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK) if begun.elapsed() < LOCK_LIMIT => {
                tokio::time::sleep(LOCK_RETRY).await;
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(anyhow!("another call is under way; ask again"));
            }
            Err(error) => return Err(anyhow!("locking {}: {error}", path.display())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_an_argument_a_line() {
        let lines = arguments_of("# where\n--daemon=unix:/run/a.sock\n\n  --attach=fuse \n");
        assert_eq!(lines, ["--daemon=unix:/run/a.sock", "--attach=fuse"]);
        let settings = read_arguments(&lines).expect("good ones");
        assert_eq!(settings.daemon[0].to_string(), "unix:/run/a.sock");
        assert_eq!(settings.state_dir, Path::new(STATE_DIRECTORY));
        let wrong = read_arguments(&["--nonsense".to_owned()]).expect_err("a bad one");
        assert!(wrong.to_string().contains("--nonsense"), "{wrong}");
    }

    #[test]
    fn only_commands_are_commands() {
        assert!(is_command("unmountdevice") && !is_command("docker") && !is_command("--mode"));
    }
}
