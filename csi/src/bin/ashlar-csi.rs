//! The CSI driver.

use std::process::ExitCode;

use ashlar_csi::run::{Arguments, run, start_log};
use clap::Parser;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = start_log(&arguments.log, arguments.log_format).and_then(|()| {
        // Two threads: the work is waiting for children and for the daemon.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let outcome = runtime.block_on(run(arguments));
        // A thread that waits for a dead device must not keep the program from ending.
        runtime.shutdown_background();
        outcome
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ashlar-csi: {error:#}");
            ExitCode::FAILURE
        }
    }
}
