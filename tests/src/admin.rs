//! The `ashlar` command line, as a person or a script uses it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::daemon::binary;
use crate::tool::{Finished, Tool};

/// `ashlar`, pointed at one daemon.
pub struct Admin {
    address: String,
    certificates: Option<PathBuf>,
}

impl Admin {
    pub fn new(socket: &Path) -> Admin {
        Admin {
            address: format!("unix:{}", socket.display()),
            certificates: None,
        }
    }

    /// Over TCP, and with TLS when there are certificates to show.
    pub fn tcp(port: u16, certificates: Option<&Path>) -> Admin {
        Admin {
            address: format!("tcp:127.0.0.1:{port}"),
            certificates: certificates.map(Path::to_owned),
        }
    }

    /// The program with these arguments, to be run.
    pub fn tool<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Tool {
        let tool = Tool::new(binary("ashlar").to_str().expect("a UTF-8 path"));
        let tool = match &self.certificates {
            Some(directory) => tool.arg("--certificates").arg(directory),
            None => tool,
        };
        tool.args(["--admin", &self.address])
            .args(arguments)
            .limit(Duration::from_secs(60))
    }

    /// Runs it and demands success; returns its standard output.
    pub fn run<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> String {
        self.tool(arguments).succeed()
    }

    /// Runs it with `-o json` and parses the answer.
    pub fn json<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Value {
        let text = self.tool(arguments).args(["-o", "json"]).succeed();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("not JSON ({error}): {text}"))
    }

    /// Runs it, demands failure, and returns what it said.
    pub fn refused<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> String {
        self.tool(arguments).run().failure()
    }

    /// Runs it.
    pub fn try_run<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Finished {
        self.tool(arguments).run()
    }
}

/// `ashlar store …`, which needs no daemon.
pub fn offline<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Finished {
    Tool::new(binary("ashlar").to_str().expect("a UTF-8 path"))
        .args(arguments)
        .limit(Duration::from_secs(120))
        .run()
}
