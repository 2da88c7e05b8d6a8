//! Showing that something takes long. Only where a person watches stderr; a script sees nothing of it.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::output::stderr_is_watched;

/// How often a spinner turns: often enough to look alive.
const TURN: Duration = Duration::from_millis(120);

/// A bar over bytes.
pub(super) fn bytes_bar(total_bytes: u64, what: impl Into<String>) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total_bytes), target());
    // The template is a constant that a test parses.
    if let Ok(style) = ProgressStyle::with_template(BYTES_TEMPLATE) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_message(what.into());
    bar
}

/// A spinner for what has no measure.
pub(super) fn spinner(what: impl Into<String>) -> ProgressBar {
    let spinner = ProgressBar::with_draw_target(None, target()).with_message(what.into());
    spinner.enable_steady_tick(TURN);
    spinner
}

const BYTES_TEMPLATE: &str =
    "{msg} [{wide_bar}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}, {eta} left";

fn target() -> ProgressDrawTarget {
    if stderr_is_watched() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_template_is_understood() {
        super::ProgressStyle::with_template(super::BYTES_TEMPLATE).expect("a template");
    }
}
