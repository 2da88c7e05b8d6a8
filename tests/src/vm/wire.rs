//! What the host and the agent in a virtual machine say to each other: JSON behind a length, over a virtio serial port.

use std::io::{self, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Name of the port, host and guest.
pub const PORT: &str = "ashlar.agent";
/// Longest message, bytes: the output of a program, bounded by what the agent keeps of it, as JSON.
const MESSAGE_MAX: u32 = 64 << 20;

/// A question to the agent. Questions are answered as they are done, not in their order.
#[derive(Debug, Serialize, Deserialize)]
pub struct Question {
    pub id: u64,
    pub what: Ask,
}

/// The answer to the question of the same id. The agent's first word is an answer to no question, with id 0.
#[derive(Debug, Serialize, Deserialize)]
pub struct Reply {
    pub id: u64,
    pub what: Answer,
}

#[derive(Debug, Serialize, Deserialize)]
pub enum Ask {
    /// Runs a program to its end; past the limit it is killed.
    Run {
        argv: Vec<String>,
        input: String,
        limit_ms: u64,
    },
    /// Starts a program that stays; its output is appended to a file.
    Start {
        argv: Vec<String>,
        output: String,
    },
    /// Sends a signal to a process.
    Signal {
        pid: u32,
        signal: i32,
    },
    /// Waits for the end of a program that was started.
    Wait {
        pid: u32,
        limit_ms: u64,
    },
    Read {
        path: String,
    },
    Write {
        path: String,
        text: String,
    },
    Processes,
    /// Ends the machine in an orderly way: nothing is unmounted, but what is dirty is written.
    PowerOff,
}

#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    Hello,
    Ran(Ran),
    Started { pid: u32 },
    Ended(End),
    Text(String),
    Processes(Vec<Process>),
    Done,
    Failed(String),
}

/// How a program ended, or did not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    Code(i32),
    Signal(i32),
    /// It was still running at its limit and was killed then.
    Late,
    /// It was still running at its limit, was killed, and did not die of it: the kernel holds it.
    Stuck,
    /// It still runs, and nobody minds.
    Running,
}

/// A program that was run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ran {
    pub end: End,
    pub stdout: String,
    pub stderr: String,
}

/// A process of the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pub pid: u32,
    pub name: String,
    /// The kernel's letter: R runs, S sleeps, D waits for the kernel and cannot be killed, Z is dead.
    pub state: char,
    /// Whether it is a thread of the kernel.
    pub kernel: bool,
    /// Where in the kernel it waits.
    pub waits_in: String,
}

pub fn send(out: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let body = serde_json::to_vec(message)?;
    let length = u32::try_from(body.len())
        .ok()
        .filter(|length| *length <= MESSAGE_MAX)
        .ok_or_else(|| io::Error::other("a message that is too long"))?;
    // One write, so that a reader never waits long for the rest of what has begun.
    let mut bytes = length.to_le_bytes().to_vec();
    bytes.extend_from_slice(&body);
    out.write_all(&bytes)?;
    out.flush()
}

pub fn receive<T: DeserializeOwned>(source: &mut impl Read) -> io::Result<T> {
    let mut length = [0; 4];
    source.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length);
    if length > MESSAGE_MAX {
        return Err(io::Error::other(format!("a message of {length} bytes")));
    }
    let mut body = vec![0; length as usize];
    source.read_exact(&mut body)?;
    serde_json::from_slice(&body).map_err(io::Error::other)
}
