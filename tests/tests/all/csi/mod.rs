//! The CSI driver over the real daemon, with nbdfuse and loop devices: what an orchestrator does, what goes wrong, and
//! that nothing is lost or left behind.

mod classes;
mod crowd;
mod docker;
mod flexvolume;
mod formatting;
mod health;
mod killed;
mod lifecycle;
mod nodes;
mod once;
mod sanity;
mod simulated;
mod tls;

/// A size that ext4 and its journal fit on.
const SMALL: i64 = 32 << 20;

/// With what something was refused.
fn code<T: std::fmt::Debug>(answer: Result<T, (tonic::Code, String)>) -> tonic::Code {
    answer.expect_err("refused").0
}
