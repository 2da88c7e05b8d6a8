//! The command line, as clap reads it.

use std::path::PathBuf;

use ashlar_core::records::COPIES_MAX;
use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::config::{Address, ByteCount, Every, HostPort, MetadataSetting};

use super::{connect::parse_address, size::NewSize};

const AFTER_HELP: &str = "\
Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 refused, 5 daemon unreachable, 6 no space, 7 damaged data found.

Sizes: 10GiB, 10G and 10Gi are powers of 1024; 10GB is a power of 1000; plain digits are bytes.";

/// Replicated block storage in userspace: the command line of ashlard.
#[derive(Debug, Parser)]
#[command(name = "ashlar", version, after_help = AFTER_HELP, propagate_version = true)]
pub(super) struct Cli {
    /// Where the daemon's admin interface is: unix:PATH or tcp:HOST:PORT. Without it, the first of ./data/admin.sock,
    /// /run/ashlar/admin.sock and /var/lib/ashlar/admin.sock that answers
    #[arg(long, global = true, env = "ASHLAR_ADMIN", value_name = "ADDRESS", value_parser = parse_address)]
    pub(super) admin: Option<Address>,

    /// A directory with ca-cert.pem, client-cert.pem and client-key.pem, for a daemon behind TCP in a cluster;
    /// `ashlar cluster client-cert NAME --role admin` makes one
    #[arg(long, global = true, env = "ASHLAR_CERTIFICATES", value_name = "DIR")]
    pub(super) certificates: Option<PathBuf>,

    /// How to print what was asked for
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table)]
    pub(super) output: Format,

    #[command(subcommand)]
    pub(super) command: Command,
}

/// Forms of output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// For people; may change between versions
    Table,
    /// For programs
    Json,
    /// For programs and people
    Yaml,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    #[command(flatten)]
    Daemon(DaemonCommand),
    /// The daemon, its listeners, its stores and what needs attention; exit code 5 when it is not ready
    Status {
        /// Wait this many seconds until the daemon answers and is ready
        #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "60", require_equals = true)]
        wait: Option<u32>,
    },
    /// Look at and look after stores
    #[command(subcommand)]
    Store(StoreCommand),

    /// Found a cluster, let nodes and clients in
    #[command(subcommand)]
    Cluster(ClusterStart),
    /// Print a completion script for a shell
    Completions {
        /// Which shell
        shell: Shell,
    },
}

/// What a daemon answers.
#[derive(Debug, Subcommand)]
pub(super) enum DaemonCommand {
    /// Create, list, show, change and delete volumes
    #[command(subcommand, visible_alias = "vol")]
    Volume(VolumeCommand),
    /// The machines that volumes are published to
    #[command(subcommand)]
    ClientNode(ClientNodeCommand),
    /// Open NBD connections
    Connections {
        /// Only those of this volume (name or id)
        volume: Option<String>,
    },
    /// Why a volume is degraded, waiting or not served, and what would free it
    Explain {
        /// Name or id
        volume: String,
    },
    /// Compare records with what the stores hold, and copies with each other; exit code 7 when something is wrong
    Doctor(DoctorArgs),
    /// What happened in the daemon that is asked, since it was started
    Events {
        /// Only what happened to this volume (name or id)
        volume: Option<String>,
        /// Go on with what happens from now on
        #[arg(long, short)]
        follow: bool,
    },
    /// What every volume and store is doing, live
    Top(TopArgs),

    /// List, label and remove the nodes of a cluster
    #[command(subcommand)]
    Node(NodeCommand),
}

#[derive(Debug, Args)]
pub(super) struct DoctorArgs {
    /// Only this volume (name or id); without it all of them, and what belongs to none
    pub(super) volume: Option<String>,
    /// What to put right; nothing is without it
    #[arg(long, value_enum, value_name = "WHAT")]
    pub(super) repair: Vec<Repair>,
    /// Compare copies however much there is, not 64 GiB of each volume at most
    #[arg(long)]
    pub(super) all: bool,
    /// Compare records with stores, and not copies with each other
    #[arg(long, conflicts_with = "all")]
    pub(super) records_only: bool,
    /// Do not ask before a repair, even at a terminal
    #[arg(long, short)]
    pub(super) yes: bool,
}

/// What the doctor may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Repair {
    /// Drop layers that no record names
    Orphans,
    /// Put the copy of each volume that is wrong most often out of sync, so that it is filled from the others
    Differing,
}

#[derive(Debug, Subcommand)]
pub(super) enum ClusterStart {
    /// Make a node that is stopped the first of a new cluster, with its volumes; can be run again after a failure
    Init(Box<InitArgs>),
    #[command(flatten)]
    Daemon(ClusterCommand),
}

#[derive(Debug, Args)]
pub(super) struct InitArgs {
    /// The settings file of that node's ashlard; the rest here means what it means there
    #[arg(long, env = "ASHLAR_CONFIG", value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// Its data directory
    #[arg(long, env = "ASHLAR_DATA_DIR", value_name = "DIR")]
    pub(super) data_dir: Option<PathBuf>,
    /// Where the cluster's records shall be
    #[arg(long, env = "ASHLAR_METADATA", value_name = "etcd:URL[,URL]")]
    pub(super) metadata: Option<MetadataSetting>,
    /// What every key in etcd begins with
    #[arg(long, env = "ASHLAR_ETCD_PREFIX", value_name = "PREFIX")]
    pub(super) etcd_prefix: Option<String>,
    /// Certificates (PEM) of the authority that vouches for etcd
    #[arg(long, env = "ASHLAR_ETCD_CA", value_name = "FILE")]
    pub(super) etcd_ca: Option<PathBuf>,
    /// Certificate (PEM) to show to etcd
    #[arg(long, env = "ASHLAR_ETCD_CERT", value_name = "FILE")]
    pub(super) etcd_cert: Option<PathBuf>,
    /// Private key (PEM) of that certificate
    #[arg(long, env = "ASHLAR_ETCD_KEY", value_name = "FILE")]
    pub(super) etcd_key: Option<PathBuf>,
    /// Where other nodes will reach this one's TCP admin interface
    #[arg(long, env = "ASHLAR_ADVERTISE", value_name = "HOST:PORT")]
    pub(super) advertise: Option<HostPort>,
    /// What tells this node's place, such as zone=a
    #[arg(
        long,
        env = "ASHLAR_LABEL",
        value_name = "KEY=VALUE",
        value_delimiter = ';'
    )]
    pub(super) label: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub(super) enum ClusterCommand {
    /// Print a token that lets one node join: ashlard --join TOKEN@HOST:PORT
    Token {
        /// How long it is good for, for example 30m; at most 30d [default: 1h]
        #[arg(long, value_name = "INTERVAL")]
        lifetime: Option<Every>,
    },
    /// Make a certificate for a user of volumes over TCP; what was made under that name before is worth nothing then
    ClientCert {
        /// Lower-case letters, digits and '-', at most 63 characters
        name: String,
        /// Directory for ca-cert.pem, client-cert.pem and client-key.pem [default: NAME]
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// What it is for
        #[arg(long, value_enum, default_value_t = Role::Volumes)]
        role: Role,
        /// Days it is good for, at most 3650 [default: 365]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=3650))]
        days: Option<u32>,
    },
    /// List the certificates of clients
    ClientCerts,
    /// Shut a client out, whose connections are cut
    RevokeClient {
        /// Its name
        name: String,
    },
}

/// What a certificate is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Role {
    /// NBD over TCP
    Volumes,
    /// This program, over TCP
    Admin,
}

#[derive(Debug, Subcommand)]
pub(super) enum NodeCommand {
    /// List the nodes of the cluster; the one that is asked has a star
    #[command(visible_alias = "ls")]
    List,
    /// Shut out for ever a node that holds no volume and no copy (see `drain`); its connections are cut
    #[command(visible_alias = "rm")]
    Remove {
        /// Its id, or the beginning of it
        node: String,
    },
    /// Have the copies of a node move to others; it gets no new ones. Without --wait it returns at once, and
    /// `ashlar node list` tells what is left
    Drain {
        /// Its id, or the beginning of it
        node: String,
        /// What has not moved yet stays, and the node gets copies again
        #[arg(long, conflicts_with = "wait")]
        cancel: bool,
        /// Return when no copy is left on it
        #[arg(long)]
        wait: bool,
    },
    /// Set what tells a node's place
    Label {
        /// Its id, or the beginning of it
        node: String,
        /// KEY=VALUE sets a label, KEY- removes it
        #[arg(required = true, value_name = "KEY=VALUE|KEY-")]
        labels: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum ClientNodeCommand {
    /// List the client nodes
    #[command(visible_alias = "ls")]
    List,
}

#[derive(Debug, Subcommand)]
pub(super) enum VolumeCommand {
    /// Create a volume that reads as zeros
    Create {
        /// Lower-case letters, digits, '-', '_' and '.', at most 63 characters
        name: String,
        /// Size, for example 10GiB; rounded up to a multiple of 4096 bytes
        #[arg(long, short)]
        size: ByteCount,
        /// Acknowledge a write only once it is durable on the device
        #[arg(long)]
        write_through: bool,
        /// Refuse writes
        #[arg(long)]
        read_only: bool,
        /// Copies of each chunk, on as many nodes [default: 3, or as many as a smaller cluster has nodes]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(COPIES_MAX)))]
        replicas: Option<u32>,
        /// Copies that must be in sync for a write to be answered [default: more than half of them, and one of two]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(COPIES_MAX)))]
        min_in_sync: Option<u32>,
        /// A zone whose nodes may hold copies, as their label zone says; may be given several times [default: all nodes]
        #[arg(long, value_name = "ZONE")]
        zone: Vec<String>,
        /// Requests a second that clients may ask of it at most, 10 or more
        #[arg(long, value_name = "N")]
        iops: Option<u64>,
        /// Bytes a second that they may read and write at most, for example 100MiB, at least 1MiB
        #[arg(long, value_name = "SIZE")]
        bps: Option<ByteCount>,
    },
    /// List all volumes
    #[command(visible_alias = "ls")]
    List,
    /// Show one volume and how to attach it
    Show {
        /// Name or id
        volume: String,
    },
    /// Serve a volume on the node that is asked, wherever it is served now; its old clients' connections end
    Open {
        /// Name or id
        volume: String,
    },
    /// Make a volume larger
    Resize {
        /// Name or id
        volume: String,
        /// New size, or +SIZE to add to what it has
        #[arg(long, short)]
        size: NewSize,
    },
    /// Give a volume another name; connections stay open
    Rename {
        /// Name or id
        volume: String,
        /// The name it shall have
        new_name: String,
    },
    /// Delete volumes and all their data; refused while one is in use
    #[command(visible_alias = "rm")]
    Delete {
        /// Names or ids
        #[arg(required = true, value_name = "VOLUME")]
        volumes: Vec<String>,
        /// Do not ask, even at a terminal
        #[arg(long, short)]
        yes: bool,
    },
    /// Change the settings of a volume
    Set(SetArgs),
    /// Take a volume back from a client node, gone or not: its connections end, and what it still sends is refused
    Unpublish {
        /// Name or id
        volume: String,
        /// Which client node; without it all of them
        #[arg(long)]
        node: Option<String>,
    },
    /// End the open connections of a volume once what they sent is answered; clients may connect again
    Disconnect {
        /// Name or id
        volume: String,
    },
}

#[derive(Debug, Args)]
#[group(skip)]
#[command(group = ArgGroup::new("settings").required(true).multiple(true))]
pub(super) struct SetArgs {
    /// Name or id
    pub(super) volume: String,
    /// Refuse writes; only while nothing is connected
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", require_equals = true, group = "settings")]
    pub(super) read_only: Option<bool>,
    /// Acknowledge a write only once it is durable on the device
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", require_equals = true, group = "settings")]
    pub(super) write_through: Option<bool>,
    /// Requests a second that clients may ask of it at most, 10 or more; 0: as many as they like
    #[arg(long, value_name = "N", group = "settings")]
    pub(super) iops: Option<u64>,
    /// Bytes a second that they may read and write at most, for example 100MiB, at least 1MiB; 0: as many as they like
    #[arg(long, value_name = "SIZE", group = "settings")]
    pub(super) bps: Option<ByteCount>,
    /// Copies that must be in sync for a write to be answered, from now on
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(COPIES_MAX)), group = "settings")]
    pub(super) min_in_sync: Option<u32>,
    /// A zone whose nodes may hold copies, from now on; may be given several times. Copies that lie elsewhere move
    #[arg(
        long,
        value_name = "ZONE",
        group = "settings",
        conflicts_with = "all_zones"
    )]
    pub(super) zone: Vec<String>,
    /// All nodes may hold copies again, in whatever zone
    #[arg(long, group = "settings")]
    pub(super) all_zones: bool,
}

/// What a daemon does for its stores.
#[derive(Debug, Subcommand)]
pub(super) enum DaemonStoreCommand {
    /// List the daemon's stores
    #[command(visible_alias = "ls")]
    List,
    /// Read and verify everything a running daemon's stores hold
    Scrub {
        /// Id or path of one store; without it all of them
        store: Option<String>,
        /// Bytes to read a second at most, for example 100MiB
        #[arg(long, value_name = "SIZE")]
        rate: Option<ByteCount>,
    },
    /// Take a checkpoint now, so that the next start has little to replay
    Checkpoint {
        /// Id or path of one store; without it all of them
        store: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum StoreCommand {
    #[command(flatten)]
    Daemon(DaemonStoreCommand),
    /// Print what a store holds, without a daemon; never writes
    Inspect {
        /// Directory of the store, its file, or its block device
        path: PathBuf,
    },
    /// Verify every checksum of a store, without a daemon; never writes
    Check {
        /// Directory of the store, its file, or its block device
        path: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(super) struct TopArgs {
    /// Seconds between two samples, 0.1 to 60
    #[arg(long, short, default_value_t = 1.0, value_name = "SECONDS")]
    pub(super) interval: f64,
    /// Print one sample and exit
    #[arg(long)]
    pub(super) once: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn settings_take_an_optional_value() {
        let set = |args: &[&str]| {
            let argv = ["ashlar", "volume", "set"].iter().chain(args);
            Cli::try_parse_from(argv).map(|cli| match cli.command {
                Command::Daemon(DaemonCommand::Volume(VolumeCommand::Set(set))) => {
                    (set.volume, set.read_only, set.write_through)
                }
                other => panic!("parsed as {other:?}"),
            })
        };
        assert_eq!(
            set(&["v", "--read-only"]).expect("parses"),
            ("v".into(), Some(true), None)
        );
        assert_eq!(
            set(&["--read-only=false", "v"]).expect("parses"),
            ("v".into(), Some(false), None)
        );
        assert_eq!(
            set(&["v", "--write-through=false", "--read-only"]).expect("parses"),
            ("v".into(), Some(true), Some(false))
        );
        assert!(set(&["v"]).is_err());
        assert!(set(&["--read-only"]).is_err());
    }

    #[test]
    fn a_certificate_is_good_for_some_days() {
        let days = |days: &str| {
            let argv = ["ashlar", "cluster", "client-cert", "db", "--days", days];
            Cli::try_parse_from(argv)
        };
        for good in ["1", "3650"] {
            assert!(days(good).is_ok(), "{good}");
        }
        for wrong in ["0", "3651", "-1"] {
            assert!(days(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn global_options_may_stand_anywhere() {
        for argv in [
            ["ashlar", "-o", "json", "volume", "list"],
            ["ashlar", "volume", "list", "-o", "json"],
        ] {
            assert_eq!(
                Cli::try_parse_from(argv).expect("parses").output,
                Format::Json
            );
        }
    }
}
