//! Asking the person at the terminal before something that cannot be undone.

use std::io::{self, IsTerminal, Write};

use super::output;

/// Whether to go on. `what` says on lines of its own what will be done, `question` is put after them. Where nobody is there to
/// answer, nobody is asked: a script has said what it wants.
pub(super) fn confirmed(what: &[String], question: &str) -> io::Result<bool> {
    if !io::stdin().is_terminal() || !output::stderr_is_watched() {
        return Ok(true);
    }
    let mut err = io::stderr().lock();
    for line in what {
        writeln!(err, "{line}")?;
    }
    write!(err, "{question} [y/N] ")?;
    err.flush()?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
