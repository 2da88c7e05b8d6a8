//! Log lines on stderr, and what happens when a thread panics.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::config::LogFormat;

/// Starts logging. `filter` was checked when the configuration was.
pub(super) fn start(format: LogFormat, filter: &str) {
    let filter = EnvFilter::new(own_level(filter));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    // A second call in one process (tests) keeps the first subscriber.
    let _ = match format {
        LogFormat::Text => builder
            .with_ansi(std::io::stderr().is_terminal())
            .try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
}

/// A bare level is meant for what this project logs: at `debug` an HTTP/2 library would write a line for every frame.
fn own_level(filter: &str) -> String {
    match filter.parse::<tracing::Level>() {
        Ok(level) if level > tracing::Level::INFO => {
            format!("info,ashlar_server={level},ashlar_core={level}")
        }
        _ => filter.to_owned(),
    }
}

/// Makes any panic the end of the process. A daemon that lost a thread must not look alive: its clients would wait for
/// answers that never come, while a restart loses nothing that was acknowledged.
pub(super) fn abort_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let thread = std::thread::current();
        tracing::error!(thread = thread.name().unwrap_or("unnamed"), %panic, "a fault in ashlard; the process ends");
        report(panic);
        std::process::abort();
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_level_is_about_this_project() {
        assert_eq!(
            own_level("debug"),
            "info,ashlar_server=DEBUG,ashlar_core=DEBUG"
        );
        for as_it_is in ["info", "error", "h2=trace", "warn,ashlar_server::nbd=debug"] {
            assert_eq!(own_level(as_it_is), as_it_is);
        }
    }
}
