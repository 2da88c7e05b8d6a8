//! One list of settings, said by flags, the environment or the file.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::address::text_form;
use super::{Address, ByteCount, Every, HostPort, MetadataSetting};
use crate::engine::EngineChoice;

/// Between the values of a list in an environment variable; none of them contains it, unless a path does, for which
/// there are flags and the file.
const LIST_DELIMITER: char = ';';

/// What one source says. A setting it does not mention is `None`; a list it does not mention is empty.
///
/// The same names serve everywhere: `--data-dir`, `ASHLAR_DATA_DIR` and `data-dir` in the file.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Settings {
    /// Directory of the daemon's state: metadata, sockets and, unless --store says otherwise, data
    #[arg(long, env = "ASHLAR_DATA_DIR", value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_dir: Option<PathBuf>,

    /// A directory or raw block device to keep data on; may be given several times [default: DATA_DIR/stores/0]
    #[arg(long, env = "ASHLAR_STORE", value_name = "PATH[,size=SIZE]", value_delimiter = LIST_DELIMITER)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub store: Vec<StoreSetting>,

    /// Size of a new store that names none itself [default: most of the free space of its filesystem]
    #[arg(long, env = "ASHLAR_STORE_SIZE", value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store_size: Option<ByteCount>,

    /// Where NBD clients connect, TCP beyond loopback in a cluster only and with TLS; may be given several times
    /// [default: unix:DATA_DIR/nbd.sock]
    #[arg(long, env = "ASHLAR_LISTEN_NBD", value_name = "unix:PATH|tcp:HOST:PORT", value_delimiter = LIST_DELIMITER)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub listen_nbd: Vec<Address>,

    /// Where the ashlar command and other nodes connect, TCP beyond loopback in a cluster only and with TLS; may be given
    /// several times [default: unix:DATA_DIR/admin.sock]
    #[arg(long, env = "ASHLAR_LISTEN_ADMIN", value_name = "unix:PATH|tcp:HOST:PORT", value_delimiter = LIST_DELIMITER)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub listen_admin: Vec<Address>,

    /// Where other nodes reach this one's TCP admin interface [default: the first address in --listen-admin that is one]
    #[arg(long, env = "ASHLAR_ADVERTISE", value_name = "HOST:PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advertise: Option<HostPort>,

    /// Where the heads of other nodes reach this one's stores, with TLS; in a cluster only [default: the host of
    /// --advertise and a port of the system's choice, which the others are told]
    #[arg(long, env = "ASHLAR_LISTEN_LINK", value_name = "HOST:PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen_link: Option<HostPort>,

    /// A node without a cluster joins one with this, as `ashlar cluster token` prints it; afterwards it means nothing
    #[arg(
        long,
        env = "ASHLAR_JOIN",
        value_name = "TOKEN@HOST:PORT",
        hide_env_values = true
    )]
    // Never printed: it holds a secret.
    #[serde(skip_serializing)]
    pub join: Option<String>,

    /// What tells this node's place when it joins, such as zone=a or rack=7; may be given several times
    #[arg(long, env = "ASHLAR_LABEL", value_name = "KEY=VALUE", value_delimiter = LIST_DELIMITER)]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub label: Vec<String>,

    /// Seconds that certificates of nodes are good for which this node signs; they renew themselves
    /// [default: 7776000, 90 days]
    #[arg(long, env = "ASHLAR_CERTIFICATE_LIFETIME", value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate_lifetime: Option<u32>,

    /// Where /metrics, /healthz and /readyz are served, or "off" [default: 127.0.0.1:9460]
    #[arg(long, env = "ASHLAR_LISTEN_HTTP", value_name = "HOST:PORT|off")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen_http: Option<HttpListen>,

    /// Where records of volumes are kept: in DATA_DIR for a single node, in etcd for a cluster [default: sqlite]
    #[arg(long, env = "ASHLAR_METADATA", value_name = "sqlite|etcd:URL[,URL]")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<MetadataSetting>,

    /// What every key in etcd begins with; clusters that share an etcd differ in it [default: /ashlar/]
    #[arg(long, env = "ASHLAR_ETCD_PREFIX", value_name = "PREFIX")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub etcd_prefix: Option<String>,

    /// Certificates (PEM) of the authority that vouches for etcd
    #[arg(long, env = "ASHLAR_ETCD_CA", value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub etcd_ca: Option<PathBuf>,

    /// Certificate (PEM) to show to etcd
    #[arg(long, env = "ASHLAR_ETCD_CERT", value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub etcd_cert: Option<PathBuf>,

    /// Private key (PEM) of that certificate
    #[arg(long, env = "ASHLAR_ETCD_KEY", value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub etcd_key: Option<PathBuf>,

    /// How log lines look [default: text]
    #[arg(long, env = "ASHLAR_LOG_FORMAT", value_name = "FORMAT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_format: Option<LogFormat>,

    /// What is logged: error, warn, info, debug, trace, or a filter such as info,ashlar_server::nbd=debug [default: info]
    #[arg(long, env = "ASHLAR_LOG_LEVEL", value_name = "LEVEL|FILTER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_level: Option<String>,

    /// Threads that do the I/O; each owns its stores and their volumes [default: 1]
    #[arg(long, env = "ASHLAR_DATA_THREADS", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_threads: Option<u16>,

    /// How disks are reached: auto takes io_uring where it works, else posix [default: auto]
    #[arg(long, env = "ASHLAR_IO_ENGINE", value_name = "auto|io-uring|posix")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io_engine: Option<EngineChoice>,

    /// Memory for acknowledged writes of each new store that are not yet in its log [default: 64MiB]
    #[arg(long, env = "ASHLAR_TAIL_SIZE", value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tail_size: Option<ByteCount>,

    /// Directory of the tails; best on a tmpfs that outlives the daemon [default: /run or /dev/shm, else DATA_DIR]
    #[arg(long, env = "ASHLAR_TAIL_DIR", value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tail_dir: Option<PathBuf>,

    /// Memory for the index of each store [default: 64MiB]
    #[arg(long, env = "ASHLAR_LEAF_CACHE_SIZE", value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub leaf_cache_size: Option<ByteCount>,

    /// NBD connections open at once [default: 1024]
    #[arg(long, env = "ASHLAR_MAX_CONNECTIONS", value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_connections: Option<u32>,

    /// Requests and replies held in memory for one connection [default: 64MiB]
    #[arg(long, env = "ASHLAR_MAX_CONNECTION_BUFFER", value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_connection_buffer: Option<ByteCount>,

    /// Requests and replies held in memory for all connections [default: 128MiB]
    #[arg(long, env = "ASHLAR_MAX_BUFFER", value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_buffer: Option<ByteCount>,

    /// Seconds a client may take to negotiate [default: 10]
    #[arg(long, env = "ASHLAR_HANDSHAKE_TIMEOUT", value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub handshake_timeout: Option<u32>,

    /// Bytes a second that a scrub reads unless it is told otherwise [default: 64MiB]
    #[arg(long, env = "ASHLAR_SCRUB_RATE", value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scrub_rate: Option<ByteCount>,

    /// Bytes a second that a volume's head copies to copies that are made or brought up to date, at most; copies that only
    /// move take a quarter of it while clients are at work [default: 128MiB]
    #[arg(long, env = "ASHLAR_FILL_RATE", value_name = "SIZE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fill_rate: Option<ByteCount>,

    /// Seconds that a node of a cluster is away before its copies are made anew elsewhere; the same on all nodes
    /// [default: 600]
    #[arg(long, env = "ASHLAR_REPLACE_AFTER", value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replace_after: Option<u32>,

    /// How often each store is read and verified, at that rate: 7d, 12h, 30m, or off [default: 7d]
    #[arg(long, env = "ASHLAR_SCRUB_EVERY", value_name = "INTERVAL|off")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scrub_every: Option<Every>,

    /// How much of the space of the stores the sizes of volumes may add up to before `GetCapacity` says that there is
    /// no room for another: 100 promises nothing twice, 300 everything three times [default: 100]
    #[arg(long, env = "ASHLAR_OVERCOMMIT", value_name = "PERCENT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overcommit: Option<u32>,

    /// Seconds that SIGTERM waits for requests in flight before connections are cut [default: 30]
    #[arg(long, env = "ASHLAR_DRAIN_TIMEOUT", value_name = "SECONDS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drain_timeout: Option<u32>,

    /// Open stores although the tail of a daemon that was killed is missing or damaged: writes that were answered and not
    /// flushed are gone, and volumes tell their clients so. For one start, never to stay [default: false]
    #[arg(long, env = "ASHLAR_ACCEPT_TAIL_LOSS", value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accept_tail_loss: Option<bool>,

    /// Tell the kernel that this process serves block I/O (PR_SET_IO_FLUSHER, needs CAP_SYS_RESOURCE), so that it
    /// never waits for memory that only its own volumes could free [default: false]
    #[arg(long, env = "ASHLAR_IO_FLUSHER", value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io_flusher: Option<bool>,

    /// Value for /proc/self/oom_score_adj, -1000 to 1000; lower than it is needs CAP_SYS_RESOURCE [default: unchanged]
    #[arg(
        long,
        env = "ASHLAR_OOM_SCORE_ADJUST",
        value_name = "N",
        allow_negative_numbers = true
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oom_score_adjust: Option<i32>,

    /// Faults to inject below the stores, for tests
    #[arg(long, env = "ASHLAR_FAULT", value_name = "PLAN", hide = true)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fault: Option<String>,
}

impl Settings {
    /// These settings where they say something, else those of `below`. A list replaces a list.
    pub(super) fn over(self, below: Settings) -> Settings {
        fn list<T>(above: Vec<T>, below: Vec<T>) -> Vec<T> {
            if above.is_empty() { below } else { above }
        }
        Settings {
            data_dir: self.data_dir.or(below.data_dir),
            store: list(self.store, below.store),
            store_size: self.store_size.or(below.store_size),
            listen_nbd: list(self.listen_nbd, below.listen_nbd),
            listen_admin: list(self.listen_admin, below.listen_admin),
            advertise: self.advertise.or(below.advertise),
            listen_link: self.listen_link.or(below.listen_link),
            join: self.join.or(below.join),
            label: list(self.label, below.label),
            certificate_lifetime: self.certificate_lifetime.or(below.certificate_lifetime),
            listen_http: self.listen_http.or(below.listen_http),
            metadata: self.metadata.or(below.metadata),
            etcd_prefix: self.etcd_prefix.or(below.etcd_prefix),
            etcd_ca: self.etcd_ca.or(below.etcd_ca),
            etcd_cert: self.etcd_cert.or(below.etcd_cert),
            etcd_key: self.etcd_key.or(below.etcd_key),
            log_format: self.log_format.or(below.log_format),
            log_level: self.log_level.or(below.log_level),
            data_threads: self.data_threads.or(below.data_threads),
            io_engine: self.io_engine.or(below.io_engine),
            tail_size: self.tail_size.or(below.tail_size),
            tail_dir: self.tail_dir.or(below.tail_dir),
            leaf_cache_size: self.leaf_cache_size.or(below.leaf_cache_size),
            max_connections: self.max_connections.or(below.max_connections),
            max_connection_buffer: self.max_connection_buffer.or(below.max_connection_buffer),
            max_buffer: self.max_buffer.or(below.max_buffer),
            handshake_timeout: self.handshake_timeout.or(below.handshake_timeout),
            scrub_rate: self.scrub_rate.or(below.scrub_rate),
            fill_rate: self.fill_rate.or(below.fill_rate),
            replace_after: self.replace_after.or(below.replace_after),
            scrub_every: self.scrub_every.or(below.scrub_every),
            overcommit: self.overcommit.or(below.overcommit),
            drain_timeout: self.drain_timeout.or(below.drain_timeout),
            accept_tail_loss: self.accept_tail_loss.or(below.accept_tail_loss),
            io_flusher: self.io_flusher.or(below.io_flusher),
            oom_score_adjust: self.oom_score_adjust.or(below.oom_score_adjust),
            fault: self.fault.or(below.fault),
        }
    }
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One object a line.
    Json,
}

/// Where HTTP is served, if anywhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum HttpListen {
    /// Nowhere.
    Off,
    /// There.
    On(HostPort),
}

impl FromStr for HttpListen {
    type Err = super::AddressError;

    fn from_str(text: &str) -> Result<HttpListen, super::AddressError> {
        if text == "off" {
            Ok(HttpListen::Off)
        } else {
            text.parse().map(HttpListen::On)
        }
    }
}

impl fmt::Display for HttpListen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HttpListen::Off => f.write_str("off"),
            HttpListen::On(host_port) => host_port.fmt(f),
        }
    }
}

text_form!(HttpListen, super::AddressError);

/// A store to open, made when its directory is empty or its device blank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct StoreSetting {
    /// A directory or a raw block device.
    pub path: PathBuf,
    /// Its size when it is made; a device is used whole unless this says less.
    pub size: Option<ByteCount>,
}

/// A store that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum StoreSettingError {
    /// No path.
    #[error("{text:?} is not a store: write PATH or PATH,size=100GiB")]
    NoPath {
        /// What was given.
        text: String,
    },
    /// Something other than `size=`.
    #[error(
        "{option:?} is not an option of a store; there is size=SIZE. A path with a comma in it cannot be used"
    )]
    Option {
        /// What was given.
        option: String,
    },
    /// No amount.
    #[error(transparent)]
    Size(#[from] super::ByteCountError),
}

impl FromStr for StoreSetting {
    type Err = StoreSettingError;

    fn from_str(text: &str) -> Result<StoreSetting, StoreSettingError> {
        let mut parts = text.split(',');
        let path = parts
            .next()
            .filter(|path| !path.is_empty() && !path.contains('\0'));
        let path = PathBuf::from(path.ok_or_else(|| StoreSettingError::NoPath {
            text: text.to_owned(),
        })?);
        let mut size = None;
        for option in parts {
            match option.strip_prefix("size=") {
                Some(value) if size.is_none() => size = Some(value.parse()?),
                _ => {
                    return Err(StoreSettingError::Option {
                        option: option.to_owned(),
                    });
                }
            }
        }
        Ok(StoreSetting { path, size })
    }
}

impl fmt::Display for StoreSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)?;
        match self.size {
            Some(size) => write!(f, ",size={size}"),
            None => Ok(()),
        }
    }
}

text_form!(StoreSetting, StoreSettingError);
