//! The program inside the virtual machines of the tests: the first process, the agent that does what the test on the host asks,
//! and the loads that tests put on a file system.

mod agent;
mod csi;
mod init;
mod load;
mod netlink;
mod processes;

use std::process::ExitCode;

use anyhow::bail;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        _ if std::process::id() == 1 => init::run(),
        ["agent"] => agent::run(),
        ["load", rest @ ..] => load::run(rest),
        ["verify", rest @ ..] => load::verify(rest),
        ["csi", rest @ ..] => csi::run(rest),
        ["nbd", rest @ ..] => netlink::run(rest),
        _ => Err(anyhow::anyhow!(
            "not to be run by hand; see docs/testing.md"
        )),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vm-guest: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The value behind `--name` in a list of `--name value` pairs.
fn option<'a>(words: &[&'a str], name: &str) -> Option<&'a str> {
    words
        .chunks_exact(2)
        .find(|pair| pair[0].strip_prefix("--") == Some(name))
        .map(|pair| pair[1])
}

/// As [`option`], parsed, and an error when it is absent.
fn wanted<T: std::str::FromStr>(words: &[&str], name: &str) -> anyhow::Result<T> {
    let Some(text) = option(words, name) else {
        bail!("--{name} is missing")
    };
    match text.parse() {
        Ok(value) => Ok(value),
        Err(_) => bail!("--{name} {text:?} is no such value"),
    }
}
