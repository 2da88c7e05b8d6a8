//! What the set-up brings for the tests beside packages.

use std::path::PathBuf;

/// csi-sanity (kubernetes-csi/csi-test v5.4.0), from where scripts/setup.sh puts it or `ASHLAR_TESTS_CSI_SANITY` says it is.
pub fn csi_sanity() -> PathBuf {
    if let Some(given) = std::env::var_os("ASHLAR_TESTS_CSI_SANITY") {
        return PathBuf::from(given);
    }
    let program = cache().join("csi-sanity-v5.4.0/csi-sanity");
    assert!(
        program.exists(),
        "{} is not there; `scripts/setup.sh test` installs it",
        program.display()
    );
    program
}

/// Where scripts/setup.sh puts what is no package.
pub(crate) fn cache() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))
        .expect("a home directory");
    cache.join("ashlar")
}
