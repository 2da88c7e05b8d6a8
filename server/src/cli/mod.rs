//! The `ashlar` program: the admin interface for people and scripts, and the offline reading of stores.

mod args;
mod attach;
mod cluster;
mod confirm;
mod connect;
mod copies;
mod diagnosis;
mod doctor;
mod error;
mod init;
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

use args::{Cli, ClusterStart, Command, DaemonCommand, Format, StoreCommand};
use connect::{Asked, Daemon};
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
    let asked = Asked {
        admin: cli.admin,
        certificates: cli.certificates,
    };
    let way = asked.clone();
    let done = match cli.command {
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "ashlar", &mut script);
            Ok(io::stdout().write_all(&script)?)
        }
        Command::Store(StoreCommand::Inspect { path }) => offline::inspect(cli.output, &path),
        Command::Store(StoreCommand::Check { path }) => offline::check(cli.output, &path),
        Command::Store(StoreCommand::Daemon(command)) => wait_for(async {
            store::run(&mut connect::connect(asked).await?, cli.output, command).await
        }),
        Command::Status { wait } => {
            let limit = Duration::from_secs(wait.unwrap_or(0).into());
            wait_for(status::status(asked, cli.output, limit))
        }
        Command::Cluster(ClusterStart::Init(args)) => wait_for(init::init(cli.output, *args)),
        Command::Cluster(ClusterStart::Daemon(command)) => wait_for(async {
            cluster::run(&mut connect::connect(asked).await?, cli.output, command).await
        }),
        Command::Daemon(command) => {
            wait_for(async { ask(&mut connect::connect(asked).await?, cli.output, command).await })
        }
    };
    done.map_err(|error| way.explain(error))
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
        DaemonCommand::ClientNode(command) => publication::node(daemon, format, command).await,
        DaemonCommand::Connections { volume } => status::connections(daemon, format, volume).await,
        DaemonCommand::Node(command) => cluster::node(daemon, format, command).await,
        DaemonCommand::Explain { volume } => diagnosis::explain(daemon, format, volume).await,
        DaemonCommand::Doctor(args) => doctor::run(daemon, format, args).await,
        DaemonCommand::Events { volume, follow } => {
            diagnosis::events(daemon, format, volume.unwrap_or_default(), follow).await
        }
        DaemonCommand::Top(args) => top::run(daemon, format, args).await,
    }
}
