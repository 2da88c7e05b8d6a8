//! What is measured: the rows, and who runs in each.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// Who answers the requests of a cell.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Contender {
    /// `ashlard` as built here, with its defaults.
    Ashlar,
    /// qemu-nbd on a raw file past the page cache.
    QemuNone,
    /// qemu-nbd on a raw file through the page cache.
    QemuWriteback,
    /// nbdkit's file plugin.
    Nbdkit,
    /// nbd-server, the reference implementation.
    NbdServer,
    /// No server: fio on the file itself, io_uring and O_DIRECT. What the device gives.
    Bare,
    /// A server that keeps nothing: what NBD costs by itself. See [`crate::least`].
    Least,
    /// The same, looking for requests for some time before it sleeps.
    LeastLooking,
    /// Three nodes of one cluster with a copy each, served by one of them over NBD.
    Cluster,
    /// One `ashlard` on its own, beside the cluster: what one copy costs.
    Single,
    /// Ceph through its own client library.
    CephRbd,
    /// Ceph through qemu-nbd, over NBD as Ashlar is.
    CephNbd,
}

/// Where stores lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Medium {
    /// In memory: what is left is the software.
    Tmpfs,
    /// In the scratch directory.
    Disk,
}

impl Medium {
    /// The name for people.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Medium::Tmpfs => "tmpfs",
            Medium::Disk => "disk",
        }
    }
}

/// Which comparison is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Comparison {
    /// One daemon beside other NBD servers.
    Servers,
    /// A cluster with three copies beside Ceph with three copies.
    Cluster,
}

impl Comparison {
    /// Everyone who may take part.
    pub(crate) fn everyone(self) -> &'static [Contender] {
        match self {
            Comparison::Servers => &[
                Contender::Ashlar,
                Contender::QemuNone,
                Contender::QemuWriteback,
                Contender::Nbdkit,
                Contender::NbdServer,
                Contender::Bare,
                Contender::Least,
                Contender::LeastLooking,
            ],
            Comparison::Cluster => &[
                Contender::Cluster,
                Contender::Single,
                Contender::CephRbd,
                Contender::CephNbd,
            ],
        }
    }

    /// Who runs in a row: everyone of a cluster's comparison, whose promises do not differ from row to row.
    pub(crate) fn contenders(self, row: &Row) -> &'static [Contender] {
        match self {
            Comparison::Servers => row.contenders(),
            Comparison::Cluster => self.everyone(),
        }
    }
}

impl Contender {
    /// The name in tables and charts, with the mode it runs in.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Contender::Ashlar => "ashlar",
            Contender::QemuNone => "qemu-nbd cache=none",
            Contender::QemuWriteback => "qemu-nbd cache=writeback",
            Contender::Nbdkit => "nbdkit file",
            Contender::NbdServer => "nbd-server",
            Contender::Bare => "bare file",
            Contender::Least => "least server",
            Contender::LeastLooking => "least server, looking",
            Contender::Cluster => "ashlar, 3 copies",
            Contender::Single => "ashlar, 1 copy",
            Contender::CephRbd => "ceph, librbd",
            Contender::CephNbd => "ceph, qemu-nbd over rbd",
        }
    }

    /// Whether its server is ours.
    pub(crate) fn is_ours(self) -> bool {
        matches!(
            self,
            Contender::Ashlar | Contender::Cluster | Contender::Single
        )
    }

    /// Whether it shows what is possible, and is nobody's peer.
    pub(crate) fn is_yardstick(self) -> bool {
        matches!(
            self,
            Contender::Bare | Contender::Least | Contender::LeastLooking
        )
    }

    /// The name of its files and sockets.
    pub(crate) fn slug(self) -> &'static str {
        match self {
            Contender::Ashlar => "ashlar",
            Contender::QemuNone => "qemu-none",
            Contender::QemuWriteback => "qemu-writeback",
            Contender::Nbdkit => "nbdkit",
            Contender::NbdServer => "nbd-server",
            Contender::Bare => "bare",
            Contender::Least => "least",
            Contender::LeastLooking => "least-looking",
            Contender::Cluster => "cluster",
            Contender::Single => "single",
            Contender::CephRbd => "ceph-rbd",
            Contender::CephNbd => "ceph-nbd",
        }
    }
}

/// What a row's answers promise, which decides who may be compared in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Group {
    /// Reads that miss every cache.
    Reads,
    /// Writes answered before they are durable.
    Writes,
    /// Writes with flushes between them.
    SyncedWrites,
}

/// One line of the comparison.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    /// The name on the command line and in the results.
    pub(crate) name: &'static str,
    /// The name for people.
    pub(crate) title: &'static str,
    pub(crate) group: Group,
    /// fio's `rw`.
    pub(crate) pattern: &'static str,
    pub(crate) block_bytes: u64,
    pub(crate) depth: u32,
    /// A flush after this many writes; 0 is none.
    pub(crate) flush_every: u32,
    /// Ashlar must also be above the bare file here: its log turns random writes into appends.
    pub(crate) must_beat_bare: bool,
}

impl Row {
    /// Everyone who runs in this row, the yardsticks among them.
    fn contenders(&self) -> &'static [Contender] {
        match self.group {
            Group::Reads => &[
                Contender::Ashlar,
                Contender::QemuNone,
                Contender::Bare,
                Contender::Least,
                Contender::LeastLooking,
            ],
            Group::Writes => &[
                Contender::Ashlar,
                Contender::Nbdkit,
                Contender::QemuWriteback,
                Contender::NbdServer,
                Contender::Bare,
                Contender::Least,
                Contender::LeastLooking,
            ],
            Group::SyncedWrites => &[
                Contender::Ashlar,
                Contender::Nbdkit,
                Contender::QemuWriteback,
                Contender::NbdServer,
                Contender::QemuNone,
                Contender::Bare,
                Contender::Least,
                Contender::LeastLooking,
            ],
        }
    }

    pub(crate) fn is_read(&self) -> bool {
        self.group == Group::Reads
    }
}

const KIB: u64 = 1024;

/// Every row, in the order in which they are run: the reads first, while the data lies as it was written.
pub(crate) const ROWS: [Row; 8] = [
    Row {
        name: "read-rand-4k-qd1",
        title: "4 KiB random reads, depth 1",
        group: Group::Reads,
        pattern: "randread",
        block_bytes: 4 * KIB,
        depth: 1,
        flush_every: 0,
        must_beat_bare: false,
    },
    Row {
        name: "read-rand-4k-qd32",
        title: "4 KiB random reads, depth 32",
        group: Group::Reads,
        pattern: "randread",
        block_bytes: 4 * KIB,
        depth: 32,
        flush_every: 0,
        must_beat_bare: false,
    },
    Row {
        name: "read-seq-128k-qd16",
        title: "128 KiB sequential reads, depth 16",
        group: Group::Reads,
        pattern: "read",
        block_bytes: 128 * KIB,
        depth: 16,
        flush_every: 0,
        must_beat_bare: false,
    },
    Row {
        name: "write-seq-128k-qd16",
        title: "128 KiB sequential writes, depth 16",
        group: Group::Writes,
        pattern: "write",
        block_bytes: 128 * KIB,
        depth: 16,
        flush_every: 0,
        must_beat_bare: false,
    },
    Row {
        name: "write-rand-4k-qd1",
        title: "4 KiB random writes, depth 1",
        group: Group::Writes,
        pattern: "randwrite",
        block_bytes: 4 * KIB,
        depth: 1,
        flush_every: 0,
        must_beat_bare: false,
    },
    Row {
        name: "write-rand-4k-qd32",
        title: "4 KiB random writes, depth 32",
        group: Group::Writes,
        pattern: "randwrite",
        block_bytes: 4 * KIB,
        depth: 32,
        flush_every: 0,
        must_beat_bare: true,
    },
    Row {
        name: "sync-rand-4k-qd1",
        title: "4 KiB random writes, a flush after each, depth 1",
        group: Group::SyncedWrites,
        pattern: "randwrite",
        block_bytes: 4 * KIB,
        depth: 1,
        flush_every: 1,
        must_beat_bare: true,
    },
    Row {
        name: "sync-rand-4k-qd32",
        title: "4 KiB random writes, a flush after every 32, depth 32",
        group: Group::SyncedWrites,
        pattern: "randwrite",
        block_bytes: 4 * KIB,
        depth: 32,
        flush_every: 32,
        must_beat_bare: true,
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        let mut names: Vec<_> = ROWS.iter().map(|row| row.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ROWS.len());
    }

    #[test]
    fn the_bare_file_and_ashlar_run_in_every_row_beside_a_peer() {
        for row in ROWS {
            let contenders = Comparison::Servers.contenders(&row);
            assert!(contenders.contains(&Contender::Ashlar), "{}", row.name);
            assert!(contenders.contains(&Contender::Bare), "{}", row.name);
            let is_peer = |one: &&Contender| !one.is_ours() && !one.is_yardstick();
            assert!(contenders.iter().any(|one| is_peer(&one)), "{}", row.name);
        }
    }

    #[test]
    fn only_servers_that_promise_the_same_are_compared() {
        for row in ROWS {
            let past_the_cache = row.contenders().contains(&Contender::QemuNone);
            assert_eq!(past_the_cache, row.group != Group::Writes, "{}", row.name);
        }
    }
}
