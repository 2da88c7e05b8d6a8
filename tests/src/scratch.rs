//! Directories and ports that tests may use.

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};

/// A directory that goes away with its owner, unless the test fails and `ASHLAR_TESTS_KEEP` is set.
pub struct Scratch {
    directory: Option<tempfile::TempDir>,
    /// For what must be in memory and outlive a process: on a tmpfs where there is one.
    memory: tempfile::TempDir,
}

impl Scratch {
    /// Under `ASHLAR_TESTS_DIR`, else /var/tmp: on a disk where O_DIRECT works, and with a path short enough for a Unix
    /// socket (108 bytes).
    pub fn new(test: &str) -> Scratch {
        let base = std::env::var_os("ASHLAR_TESTS_DIR")
            .map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
        let make = |base: &Path| {
            tempfile::Builder::new()
                .prefix(&format!("ashlar-{test}-"))
                .tempdir_in(base)
        };
        let directory = make(&base)
            .unwrap_or_else(|error| panic!("no scratch directory in {}: {error}", base.display()));
        let memory = make(Path::new("/dev/shm"))
            .or_else(|_| make(&base))
            .expect("a second scratch directory");
        Scratch {
            directory: Some(directory),
            memory,
        }
    }

    pub fn path(&self) -> &Path {
        self.directory.as_ref().expect("kept until drop").path()
    }

    /// A directory on a tmpfs, where there is one.
    pub fn memory(&self) -> &Path {
        self.memory.path()
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let directory = self.directory.take().expect("kept until drop");
        if std::thread::panicking() && std::env::var_os("ASHLAR_TESTS_KEEP").is_some() {
            eprintln!("kept {}", directory.keep().display());
        }
    }
}

/// A TCP port on loopback that nothing listens on. Below the range the kernel hands out by itself, and never handed out
/// twice by this process, so that parallel tests do not race for it.
pub fn free_port() -> u16 {
    const FIRST: u16 = 20_000;
    const COUNT: u16 = 10_000;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Different processes start at different places.
    let base = (std::process::id() as u16).wrapping_mul(97) % COUNT;
    for _ in 0..COUNT {
        let port = FIRST + (base.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % COUNT);
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
    panic!("no free port in {FIRST}..{}", FIRST + COUNT);
}
