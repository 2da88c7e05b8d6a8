//! The command line of Ashlar.

use std::process::ExitCode;

fn main() -> ExitCode {
    ashlar_server::cli::main()
}
