//! The daemon's log as evidence.
//!
//! A line at ERROR or WARN that a test did not announce fails the test, and so does a panic at any time: ERROR means a
//! human should look, and a test in which nothing is meant to go wrong must not call a human.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// A log that grows while the daemon runs. Restarts append to it.
pub struct Log {
    path: PathBuf,
    expected: Mutex<Vec<String>>,
}

impl Log {
    pub fn new(path: PathBuf) -> Log {
        Log {
            path,
            expected: Mutex::default(),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn text(&self) -> String {
        std::fs::read(&self.path).map_or_else(
            |_| String::new(),
            |bytes| String::from_utf8_lossy(&bytes).into_owned(),
        )
    }

    /// Lines at WARN or ERROR that contain `part` are meant to be there.
    pub fn expect(&self, part: &str) {
        assert!(!part.is_empty(), "that would be in every line");
        let mut expected = self.expected.lock().expect("nobody panics with it");
        expected.push(part.to_owned());
    }

    /// The lines that should not be there.
    pub fn surprises(&self) -> Vec<String> {
        let expected = self.expected.lock().expect("nobody panics with it");
        let unexpected = |line: &&str| match severity(line) {
            Severity::Fine => false,
            Severity::Alarming => !expected.iter().any(|part| line.contains(part.as_str())),
            Severity::Panic => true,
        };
        self.text()
            .lines()
            .filter(unexpected)
            .map(str::to_owned)
            .collect()
    }

    /// Panics when there is a line that should not be there.
    pub fn check(&self) {
        let surprises = self.surprises();
        assert!(
            surprises.is_empty(),
            "unexpected in {}:\n{}",
            self.path.display(),
            surprises.join("\n")
        );
    }

    /// The last lines, for the message of a failure.
    pub fn tail(&self) -> String {
        let text = self.text();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }
}

/// The lines of a log that tell of a panic.
pub fn panics(text: &str) -> Vec<String> {
    text.lines()
        .filter(|line| severity(line) == Severity::Panic)
        .map(str::to_owned)
        .collect()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Severity {
    Fine,
    Alarming,
    Panic,
}

/// A line's level, in the text format (`2026-01-01T00:00:00Z  WARN target: …`) or in JSON (`"level":"WARN"`).
fn severity(line: &str) -> Severity {
    if line.contains("panicked at") || line.contains("stack overflow") || line.contains("SIGABRT") {
        return Severity::Panic;
    }
    let level = match serde_json::from_str::<serde_json::Value>(line) {
        Ok(value) if value.is_object() => value["level"].as_str().unwrap_or("").to_owned(),
        _ => line
            .split_whitespace()
            .take(2)
            .find(|word| matches!(*word, "WARN" | "ERROR"))
            .unwrap_or("")
            .to_owned(),
    };
    if level == "WARN" || level == "ERROR" {
        Severity::Alarming
    } else {
        Severity::Fine
    }
}

#[cfg(test)]
mod tests {
    use super::{Severity, severity};

    #[test]
    fn levels_are_found_in_both_formats() {
        assert_eq!(
            severity("2026-11-23T20:00:00Z  INFO ashlard: an ERROR in words"),
            Severity::Fine
        );
        assert_eq!(
            severity("2026-11-23T20:00:00Z  WARN ashlard: x"),
            Severity::Alarming
        );
        assert_eq!(
            severity("2026-11-23T20:00:00Z ERROR ashlard: x"),
            Severity::Alarming
        );
        assert_eq!(
            severity(r#"{"timestamp":"t","level":"ERROR","fields":{}}"#),
            Severity::Alarming
        );
        assert_eq!(
            severity(r#"{"timestamp":"t","level":"INFO","fields":{"m":"WARN"}}"#),
            Severity::Fine
        );
        assert_eq!(
            severity("thread 'data-0' panicked at server/src/x.rs:1:2:"),
            Severity::Panic
        );
    }
}
