//! The Ashlar daemon.

use std::process::ExitCode;

fn main() -> ExitCode {
    ashlar_server::daemon::run(std::env::args_os())
}
