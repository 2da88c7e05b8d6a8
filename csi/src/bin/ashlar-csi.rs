//! The CSI driver, and the other front ends over the same node operations.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use ashlar_csi::frontend::{docker, flexvolume};
use ashlar_csi::run::{Arguments, run, start_log};
use clap::Parser;

fn main() -> ExitCode {
    let mut given = std::env::args_os().skip(1);
    let first = given.next().unwrap_or_default();
    let outcome = match first.to_str() {
        Some("flexvolume") => return flexvolume::main(&text(given)),
        // Installed under the driver's name, it is run with a command right away.
        Some(command) if flexvolume::is_command(command) => {
            return flexvolume::main(&text(std::env::args_os().skip(1)));
        }
        Some("flexvolume-install") => install(given),
        Some("flexvolume-keep") => on_two_threads(flexvolume::keep()),
        Some("docker") => docker::main(given),
        _ => csi(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ashlar-csi: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn csi() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    start_log(&arguments.log, arguments.log_format)?;
    on_two_threads(run(arguments))
}

/// Two threads: the work is waiting for children and for the daemon.
fn on_two_threads(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let outcome = runtime.block_on(work);
    // A thread that waits for a dead device must not keep the program from ending.
    runtime.shutdown_background();
    outcome
}

/// `flexvolume-install DIR [SETTING ...]`
fn install(mut given: impl Iterator<Item = OsString>) -> anyhow::Result<()> {
    let directory = given.next().map(PathBuf::from).context(
        "flexvolume-install needs the kubelet's directory of volume plugins, and then the settings of the driver, \
         each as --NAME=VALUE",
    )?;
    let path = flexvolume::install(&directory, &text(given))?;
    println!("{}", path.display());
    Ok(())
}

/// What is not text becomes what no command, option or path is.
fn text(given: impl Iterator<Item = OsString>) -> Vec<String> {
    given
        .map(|each| each.to_string_lossy().into_owned())
        .collect()
}
