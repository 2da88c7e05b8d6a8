//! Points at which the process can be told to die, so that tests see every state a crash can leave.
//!
//! `--fail-point NAME` arms one. The process kills itself with SIGKILL there, as the kernel's memory killer or a node's
//! power button would, so nothing is flushed, unwound or tidied.

use std::sync::OnceLock;

static ARMED: OnceLock<String> = OnceLock::new();

/// Every point, in the order in which one volume meets them.
pub const NAMES: [&str; 24] = [
    "stage-begun",
    "stage-state-written",
    "attach-half",
    "attach-done",
    "stage-device-recorded",
    "format-intended",
    "format-made",
    "format-recorded",
    "stage-checked",
    "stage-mounted",
    "stage-grown",
    "stage-recorded",
    "publish-begun",
    "publish-target-made",
    "publish-bound",
    "publish-recorded",
    "unpublish-begun",
    "unpublish-unmounted",
    "unpublish-target-gone",
    "unstage-begun",
    "unstage-unmounted",
    "detach-half",
    "unstage-detached",
    "unstage-forgotten",
];

/// Arms `name`. Errors with the names there are when it is none of them.
pub fn arm(name: &str) -> Result<(), String> {
    if !NAMES.contains(&name) {
        return Err(format!(
            "there is no fail point {name:?}; there are {}",
            NAMES.join(", ")
        ));
    }
    let _ = ARMED.set(name.to_owned());
    Ok(())
}

/// Dies here when `name` is armed.
pub fn reach(name: &'static str) {
    debug_assert!(NAMES.contains(&name), "{name}");
    if ARMED.get().is_some_and(|armed| armed == name) {
        // The message goes first: a test that waits for the death wants to know its cause.
        tracing::warn!(fail_point = name, "dying on purpose");
        let own = rustix::process::getpid();
        let _ = rustix::process::kill_process(own, rustix::process::Signal::KILL);
        std::process::abort();
    }
}
