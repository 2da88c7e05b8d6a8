//! Other NBD servers, to prove the tests' own tools with: a client or a checker that finds fault with a sound server is
//! wrong, and one that finds no fault with an unsound one is worthless.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::campaign::Victim;
use crate::nbd::Address;
use crate::process::Group;
use crate::scratch::Scratch;
use crate::wait;

/// nbdkit with some plugin and filters, or qemu-nbd, on a Unix socket.
pub struct Reference {
    scratch: Scratch,
    program: &'static str,
    arguments: Vec<String>,
    process: Option<Group>,
}

impl Reference {
    /// Starts `nbdkit ARGUMENTS`. `{image}` in an argument is a sparse file of `size_bytes`, which outlives restarts.
    pub fn nbdkit(size_bytes: u64, arguments: &[&str]) -> Reference {
        Reference::launch("nbdkit", size_bytes, arguments)
    }

    /// Starts `qemu-nbd ARGUMENTS`, likewise.
    pub fn qemu_nbd(size_bytes: u64, arguments: &[&str]) -> Reference {
        Reference::launch("qemu-nbd", size_bytes, arguments)
    }

    fn launch(program: &'static str, size_bytes: u64, arguments: &[&str]) -> Reference {
        let scratch = Scratch::new(program);
        let image = scratch.join("image");
        std::fs::File::create(&image)
            .and_then(|file| file.set_len(size_bytes))
            .expect("a sparse image");
        let image = image.to_str().expect("a UTF-8 path");
        let arguments = arguments
            .iter()
            .map(|argument| argument.replace("{image}", image))
            .collect();
        let mut server = Reference {
            scratch,
            program,
            arguments,
            process: None,
        };
        server.start();
        server
    }

    fn socket(&self) -> PathBuf {
        self.scratch.join("s")
    }
}

impl Victim for Reference {
    fn address(&self) -> Address {
        Address::Unix(self.socket())
    }

    fn start(&mut self) {
        let socket = self.socket();
        let _ = std::fs::remove_file(&socket);
        let mut command = Command::new(self.program);
        match self.program {
            "nbdkit" => command.args(["-f", "-U"]).arg(&socket),
            _ => command
                .args(["-f", "raw", "-t", "-e", "0", "-k"])
                .arg(&socket),
        };
        command
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        self.process = Some(Group::spawn(&mut command).expect("the reference server starts"));
        let address = self.address();
        wait::until(Duration::from_secs(10), self.program, || {
            address.connect().map(drop).map_err(|e| e.to_string())
        });
    }

    fn spawn(&mut self) {
        self.start();
    }

    fn kill(&mut self) {
        self.process.take().expect("it runs").kill();
    }

    fn words(&self) -> String {
        String::new()
    }
}
