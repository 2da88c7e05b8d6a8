//! Test suites of others that the set-up brings.

use std::path::PathBuf;

/// csi-sanity (kubernetes-csi/csi-test v5.4.0), from where scripts/setup.sh puts it or `ASHLAR_TESTS_CSI_SANITY` says it is.
pub fn csi_sanity() -> PathBuf {
    if let Some(given) = std::env::var_os("ASHLAR_TESTS_CSI_SANITY") {
        return PathBuf::from(given);
    }
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))
        .expect("a home directory");
    let program = cache.join("ashlar/csi-sanity-v5.4.0/csi-sanity");
    assert!(
        program.exists(),
        "{} is not there; `scripts/setup.sh test` installs it",
        program.display()
    );
    program
}
