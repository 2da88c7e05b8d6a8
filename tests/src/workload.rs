//! What a workload does with its volume, and what it may find there later: everything that was answered, nothing torn.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;

use crate::pattern::{self, BLOCK, Content};
use crate::seed::Rng;

/// A device for one who wants no page cache between.
pub fn direct(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlags::DIRECT.bits() as i32)
        .open(path)
}

/// A buffer of one block that O_DIRECT takes.
struct Aligned {
    bytes: Vec<u8>,
    from: usize,
}

impl Aligned {
    fn new() -> Aligned {
        let bytes = vec![0; 2 * BLOCK];
        let from = bytes.as_ptr().align_offset(BLOCK);
        Aligned { bytes, from }
    }

    fn block(&mut self) -> &mut [u8] {
        &mut self.bytes[self.from..self.from + BLOCK]
    }
}

/// Versions that a block may have: the one answered last, and those that were sent after it and never answered.
#[derive(Clone, Debug, Default)]
struct Possible {
    answered: u64,
    in_doubt: Vec<u64>,
}

/// Blocks of a raw volume, written one at a time by one workload after the other.
#[derive(Clone, Debug)]
pub struct Blocks {
    volume: u64,
    first: u64,
    count: u64,
    version: u64,
    known: HashMap<u64, Possible>,
}

impl Blocks {
    /// `count` blocks from `first` on of what patterns call `volume`; none was ever written.
    pub fn new(volume: u64, first: u64, count: u64) -> Blocks {
        Blocks {
            volume,
            first,
            count,
            version: 0,
            known: HashMap::new(),
        }
    }

    /// Writes one of them.
    pub fn write(&mut self, device: &File, rng: &mut Rng) -> io::Result<()> {
        self.version += 1;
        let number = self.first + rng.below(self.count);
        let mut buffer = Aligned::new();
        pattern::fill(buffer.block(), self.volume, number, self.version);
        let possible = self.known.entry(number).or_default();
        let written = device.write_all_at(buffer.block(), number * BLOCK as u64);
        match &written {
            Ok(()) => {
                *possible = Possible {
                    answered: self.version,
                    in_doubt: Vec::new(),
                };
            }
            Err(_) => possible.in_doubt.push(self.version),
        }
        written
    }

    /// Reads them all; panics when one is not as it may be. How many were of writes that were not answered.
    pub fn check(&mut self, device: &File) -> io::Result<u64> {
        let mut buffer = Aligned::new();
        let mut doubts = 0;
        for (number, possible) in &mut self.known {
            device.read_exact_at(buffer.block(), number * BLOCK as u64)?;
            let found = match pattern::identify(buffer.block(), self.volume, *number) {
                Ok(Content::Zeros) => 0,
                Ok(Content::Version(version)) => version,
                Err(torn) => panic!("{torn}"),
            };
            if found != possible.answered {
                assert!(
                    found != 0 && possible.in_doubt.contains(&found),
                    "block {number} of volume {}: version {found}, and {possible:?}",
                    self.volume
                );
                doubts += 1;
            }
            // What was seen stays.
            *possible = Possible {
                answered: found,
                in_doubt: Vec::new(),
            };
        }
        Ok(doubts)
    }
}

/// Small files in a directory, each durable before the next.
#[derive(Clone, Debug)]
pub struct Files {
    volume: u64,
    next: u64,
    durable: Vec<u64>,
}

impl Files {
    /// Of what their contents call `volume`; there is none yet.
    pub fn new(volume: u64) -> Files {
        Files {
            volume,
            next: 0,
            durable: Vec::new(),
        }
    }

    fn content(&self, number: u64) -> Vec<u8> {
        let line = format!("file {number} of volume {}\n", self.volume);
        line.repeat(200).into_bytes()
    }

    /// Writes the next one.
    pub fn write(&mut self, directory: &Path) -> io::Result<()> {
        let number = self.next;
        self.next += 1;
        let mut file = File::create_new(directory.join(format!("f{number}")))?;
        file.write_all(&self.content(number))?;
        file.sync_all()?;
        // The file's name is durable with the directory.
        File::open(directory)?.sync_all()?;
        self.durable.push(number);
        Ok(())
    }

    /// How many are durable.
    pub fn durable(&self) -> usize {
        self.durable.len()
    }

    /// Reads all that are durable; panics when one is missing or not as it was written.
    pub fn check(&self, directory: &Path) -> io::Result<()> {
        for number in &self.durable {
            let path = directory.join(format!("f{number}"));
            let mut found = Vec::new();
            match File::open(&path).and_then(|mut file| file.read_to_end(&mut found)) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    panic!("{} was synced and is gone", path.display())
                }
                Err(error) => return Err(error),
            }
            assert!(
                found == self.content(*number),
                "{} is not as it was synced",
                path.display()
            );
        }
        Ok(())
    }
}
