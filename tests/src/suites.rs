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

/// Over what csi-sanity runs.
pub struct CsiSanity<'a> {
    /// The driver's socket.
    pub socket: &'a str,
    /// Directories that the suite makes.
    pub mount: &'a str,
    pub staging: &'a str,
    /// `mount` or `block`.
    pub access: &'a str,
    /// A file with [`CsiSanity::MUTABLE`].
    pub mutable: &'a str,
}

impl CsiSanity<'_> {
    /// The parameters of a VolumeAttributesClass, as the suite wants them in a file.
    pub const MUTABLE: &'static str = "iops: \"2000\"\nbytesPerSecond: \"104857600\"\n";

    /// Every case has to pass. `run` gives the program its arguments and returns what it printed. Returns the suite's summary.
    ///
    /// Only what no capability of ours calls for is left out: snapshots, clones and groups skip themselves.
    pub fn pass(&self, mut run: impl FnMut(&[String]) -> String) -> String {
        let arguments = [
            format!("--csi.endpoint=unix:{}", self.socket),
            format!("--csi.mountdir={}", self.mount),
            format!("--csi.stagingdir={}", self.staging),
            format!("--csi.testvolumeaccesstype={}", self.access),
            format!("--csi.testvolumesize={}", 64 << 20),
            format!("--csi.testvolumeexpandsize={}", 96 << 20),
            format!("--csi.testvolumemutableparameters={}", self.mutable),
            "--csi.testnodevolumeattachlimit".to_owned(),
            "--ginkgo.no-color".to_owned(),
            "--ginkgo.timeout=20m".to_owned(),
        ];
        let mut said = run(&arguments);
        for _ in 0..3 {
            if !missed_its_connection(&said) {
                break;
            }
            println!("csi-sanity missed its connection and is started again");
            said = run(&arguments);
        }
        let summary = summary(&said).unwrap_or_else(|| panic!("no summary in {said}"));
        assert!(
            summary.starts_with("SUCCESS!") && summary.contains("| 0 Failed |"),
            "{said}"
        );
        format!("csi-sanity {}: {summary}", self.access)
    }
}

fn summary(said: &str) -> Option<&str> {
    said.lines().rev().find(|line| line.contains(" Passed | "))
}

/// Whether the one case that failed is the first, for what its `utils.Connect` does: it asks for the connection's state twice
/// in a round, and when the connection becomes ready between the two it waits a minute for the state to change, and gives up.
fn missed_its_connection(said: &str) -> bool {
    summary(said).is_some_and(|summary| summary.contains("| 1 Failed |"))
        && said.contains("s: \"Connection timed out\"")
        && said.contains("[FAILED] in [BeforeEach]")
}

/// Where scripts/setup.sh puts what is no package.
pub(crate) fn cache() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))
        .expect("a home directory");
    cache.join("ashlar")
}

#[cfg(test)]
mod tests {
    use super::missed_its_connection;

    #[test]
    fn only_a_missed_connection_of_the_suite_starts_it_again() {
        let missed = "  [FAILED] in [BeforeEach] - sanity/sanity.go:272\n          s: \"Connection timed out\",\n\
            FAIL! -- 65 Passed | 1 Failed | 1 Pending | 25 Skipped\n";
        assert!(missed_its_connection(missed));
        assert!(!missed_its_connection(
            &missed.replace("1 Failed", "2 Failed")
        ));
        assert!(!missed_its_connection(
            &missed.replace("Connection", "Operation")
        ));
        assert!(!missed_its_connection(&missed.replace("BeforeEach", "It")));
        assert!(!missed_its_connection(
            "SUCCESS! -- 66 Passed | 0 Failed | 1 Pending | 25 Skipped"
        ));
        assert!(!missed_its_connection(""));
    }
}
