//! The `ashlar` program: the admin interface for people and scripts, and the offline reading of stores.

mod args;
mod attach;
mod connect;
mod error;
mod offline;
mod output;
mod progress;
mod publication;
mod screen;
mod size;
mod status;
mod store;
mod top;
mod view;
mod volume;

use std::{
    io::{self, Write},
    process::ExitCode,
    time::Duration,
};

use clap::{CommandFactory, Parser};

use args::{Cli, Command, DaemonCommand, Format, StoreCommand};
use connect::Daemon;
use error::{CliError, Exit};

/// Runs the program on the process's arguments.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => error.report(),
    }
}

fn run(cli: Cli) -> Result<(), CliError> {
    match cli.command {
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "ashlar", &mut script);
            Ok(io::stdout().write_all(&script)?)
        }
        Command::Store(StoreCommand::Inspect { path }) => offline::inspect(cli.output, &path),
        Command::Store(StoreCommand::Check { path }) => offline::check(cli.output, &path),
        Command::Store(StoreCommand::Daemon(command)) => wait_for(async {
            store::run(&mut connect::connect(cli.admin).await?, cli.output, command).await
        }),
        Command::Status { wait } => {
            let limit = Duration::from_secs(wait.unwrap_or(0).into());
            wait_for(status::status(cli.admin, cli.output, limit))
        }
        Command::Daemon(command) => wait_for(async {
            ask(&mut connect::connect(cli.admin).await?, cli.output, command).await
        }),
    }
}

fn wait_for(answer: impl Future<Output = Result<(), CliError>>) -> Result<(), CliError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime =
        runtime.map_err(|e| CliError::new(Exit::Failed, format_args!("starting: {e}")))?;
    runtime.block_on(answer)
}

async fn ask(daemon: &mut Daemon, format: Format, command: DaemonCommand) -> Result<(), CliError> {
    match command {
        DaemonCommand::Volume(command) => volume::run(daemon, format, command).await,
        DaemonCommand::Node(command) => publication::node(daemon, format, command).await,
        DaemonCommand::Connections { volume } => status::connections(daemon, format, volume).await,
        DaemonCommand::Top(args) => top::run(daemon, format, args).await,
    }
}
