//! The `ashlar` program: the admin interface for people and scripts, and the offline reading of stores.

mod args;
mod attach;
mod connect;
mod error;
mod output;
mod progress;
mod size;
mod status;
mod store;
mod top;
mod view;
mod volume;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::{CommandFactory, Parser};

use args::{Cli, Command};
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
        command => {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(|e| CliError::new(Exit::Failed, format_args!("starting: {e}")))?;
            runtime.block_on(ask(cli.admin, cli.output, command))
        }
    }
}

/// What needs a daemon.
async fn ask(
    admin: Option<connect::AdminAddress>,
    format: args::Format,
    command: Command,
) -> Result<(), CliError> {
    let mut daemon = connect::connect(admin).await?;
    match command {
        Command::Volume(command) => volume::run(&mut daemon, format, command).await,
        Command::Store(command) => store::run(&mut daemon, format, command).await,
        Command::Status => status::status(&mut daemon, format).await,
        Command::Connections { volume } => status::connections(&mut daemon, format, volume).await,
        Command::Top(args) => top::run(&mut daemon, format, args).await,
        Command::Completions { .. } => unreachable!("answered without a daemon"),
    }
}
