//! What a daemon is told: flags, the environment (`ASHLAR_…`) and a TOML file, with the same names everywhere.
//!
//! A flag beats the environment, that beats the file, that beats the default. What a source says and nobody knows is
//! refused, so that a misspelt setting is not silently the default. `--print-config` prints the outcome as a file that
//! means the same.

mod address;
mod every;
mod metadata;
mod settings;
mod size;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Parser;
use thiserror::Error;

pub use address::{Address, AddressError, HostPort, UNIX_PATH_MAX_BYTES};
pub use every::{Every, EveryError};
pub use metadata::{EtcdAccess, Metadata, MetadataSetting, MetadataSettingError};
pub use settings::{HttpListen, LogFormat, Settings, StoreSetting, StoreSettingError};
pub use size::{ByteCount, ByteCountError};

use crate::data::{DataConfig, Limits};
use crate::engine::{EngineChoice, FaultPlan};
use crate::identity::JoinSetting;

/// Default port of HTTP. Not taken by anything in IANA's list, next to the exporters people already scrape.
const HTTP_PORT_DEFAULT: u16 = 9460;
/// The smallest tail: twice what a store takes at least, so that one part is filled while another is carried away.
const TAIL_BYTES_MIN: u64 = 8 << 20;
/// Least that lets cleaning and recovery work without thrashing.
const LEAF_CACHE_BYTES_MIN: u64 = 4 << 20;
/// Default of `scrub-every`: often enough to find rot while backups still have what it hit, and at the default rate a
/// tenth of the time for a store of 4 TiB.
const SCRUB_EVERY_DEFAULT: Every = Every::days(7);
/// Default of `certificate-lifetime`: short enough that a certificate nobody knows of is worth nothing before long, long
/// enough that a month without the authority does no harm.
const CERTIFICATE_SECONDS_DEFAULT: u32 = 90 * 86400;
/// The largest NBD request is 32 MiB; a connection must be able to hold one.
const CONNECTION_BUFFER_BYTES_MIN: u64 = 33 << 20;
/// More data threads than this is a slip of the keyboard.
const DATA_THREADS_MAX: u16 = 256;

const AFTER_HELP: &str = "\
What may be given several times has ';' between its values in a variable:
ASHLAR_LISTEN_NBD='unix:/run/ashlar/nbd.sock;tcp:10.0.0.11:10809'";

/// The Ashlar daemon: keeps volumes in local stores and serves them over NBD.
#[derive(Parser, Clone, Debug)]
#[command(name = "ashlard", version, next_line_help = true, after_help = AFTER_HELP)]
pub struct Arguments {
    /// A TOML file with any of the settings below, named as the flags are, without the dashes
    #[arg(long, env = "ASHLAR_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Print the settings that result from flags, environment and file, and exit
    #[arg(long)]
    pub print_config: bool,

    #[command(flatten)]
    pub settings: Settings,
}

/// Everything decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Absolute.
    pub data_dir: PathBuf,
    /// At least one; paths are absolute and differ.
    pub stores: Vec<StoreSetting>,
    /// Size of a new store that names none.
    pub store_size_bytes: Option<u64>,
    /// At least one; all differ.
    pub listen_nbd: Vec<Address>,
    /// At least one; all differ.
    pub listen_admin: Vec<Address>,
    /// Where other nodes reach the admin interface.
    pub advertise: Option<HostPort>,
    /// Where the heads of other nodes reach this one's stores.
    pub listen_link: Option<HostPort>,
    /// How to join a cluster, for a node without one.
    pub join: Option<JoinSetting>,
    /// Of this node when it joins.
    pub labels: BTreeMap<String, String>,
    /// Of certificates that are signed here.
    pub certificate_lifetime: Duration,
    pub listen_http: HttpListen,
    pub metadata: Metadata,
    pub log_format: LogFormat,
    /// A filter of `tracing_subscriber`.
    pub log_level: String,
    /// At least one.
    pub data_threads: u16,
    pub io_engine: EngineChoice,
    pub tail_bytes: u64,
    pub tail_dir: Option<PathBuf>,
    pub leaf_cache_bytes: u64,
    pub max_connections: u32,
    pub max_connection_buffer_bytes: u64,
    pub max_buffer_bytes: u64,
    pub handshake_timeout: Duration,
    pub scrub_bytes_per_second: u64,
    pub fill_bytes_per_second: u64,
    /// How long a node is away before its copies are made anew elsewhere.
    pub replace_after: Duration,
    pub scrub_every: Every,
    /// At least 100.
    pub overcommit_percent: u32,
    pub drain_timeout: Duration,
    pub accept_tail_loss: bool,
    pub io_flusher: bool,
    pub oom_score_adjust: Option<i32>,
    /// Checked: parses as a [`FaultPlan`].
    pub fault: Option<String>,
}

/// Settings that cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("the configuration file {} cannot be read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is not understood; the reason names line and column.
    #[error("the configuration file {} is not valid: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Where and why.
        reason: String,
    },
    /// A setting without a default.
    #[error(
        "{setting} is not set; give --{setting}, {variable} or {setting} in the configuration file"
    )]
    Missing {
        /// Its name.
        setting: &'static str,
        /// Its environment variable.
        variable: &'static str,
    },
    /// A value that cannot be.
    #[error("{setting}: {problem}")]
    Value {
        /// Its name.
        setting: &'static str,
        /// What is wrong, and what would be right.
        problem: String,
    },
}

impl Config {
    /// Puts flags and environment (in `arguments`) over the file and the defaults.
    pub fn resolve(arguments: &Arguments) -> Result<Config, ConfigError> {
        let file = match &arguments.config {
            Some(path) => read_file(path)?,
            None => Settings::default(),
        };
        Config::from_settings(arguments.settings.clone().over(file))
    }

    /// Fills in defaults and checks everything that can be checked without touching the system.
    fn from_settings(settings: Settings) -> Result<Config, ConfigError> {
        let metadata = Metadata::from_settings(&settings)?;
        let data_dir = settings.data_dir.ok_or(ConfigError::Missing {
            setting: "data-dir",
            variable: "ASHLAR_DATA_DIR",
        })?;
        let data_dir = absolute("data-dir", &data_dir)?;

        let mut stores = settings.store;
        if stores.is_empty() {
            stores.push(StoreSetting {
                path: data_dir.join("stores/0"),
                size: None,
            });
        }
        for store in &mut stores {
            store.path = absolute("store", &store.path)?;
        }
        if let Some(twice) = duplicate(stores.iter().map(|store| &store.path)) {
            return Err(value(
                "store",
                format!("{} is given twice", twice.display()),
            ));
        }

        let mut listen_nbd = settings.listen_nbd;
        if listen_nbd.is_empty() {
            listen_nbd.push(Address::Unix(data_dir.join("nbd.sock")));
        }
        let is_secured = metadata != Metadata::Sqlite;
        let listen = |setting: &'static str, addresses: Vec<Address>| {
            let checked = addresses.into_iter().map(|address| match address {
                tcp @ Address::Tcp(_) if is_secured => Ok(tcp),
                other => listener(setting, other),
            });
            checked.collect::<Result<Vec<_>, _>>()
        };
        let listen_nbd = listen("listen-nbd", listen_nbd)?;
        let mut listen_admin = settings.listen_admin;
        if listen_admin.is_empty() {
            listen_admin.push(Address::Unix(data_dir.join("admin.sock")));
        }
        let listen_admin = listen("listen-admin", listen_admin)?;
        let fixed = |address: &&Address| !matches!(address, Address::Tcp(HostPort { port: 0, .. }));
        if let Some(twice) = duplicate(listen_nbd.iter().chain(&listen_admin).filter(fixed)) {
            return Err(value("listen-nbd", format!("{twice} is given twice")));
        }
        let advertise = settings.advertise.or_else(|| reachable(&listen_admin));
        let join = settings.join.as_deref().map(str::parse::<JoinSetting>);
        let join = join
            .transpose()
            .map_err(|error| value("join", error.to_string()))?;
        let listen_http = settings.listen_http.unwrap_or_else(|| {
            HttpListen::On(HostPort {
                host: "127.0.0.1".to_owned(),
                port: HTTP_PORT_DEFAULT,
            })
        });

        let log_level = settings.log_level.unwrap_or_else(|| "info".to_owned());
        if let Err(error) = log_level.parse::<tracing_subscriber::EnvFilter>() {
            return Err(value(
                "log-level",
                format!("{log_level:?} is not a level or filter: {error}"),
            ));
        }
        if let Some(plan) = &settings.fault
            && let Err(error) = plan.parse::<FaultPlan>()
        {
            return Err(value("fault", error.to_string()));
        }

        let max_connection_buffer = at_least(
            "max-connection-buffer",
            settings.max_connection_buffer,
            Limits::BYTES_PER_CONNECTION,
            CONNECTION_BUFFER_BYTES_MIN,
        )?;
        let config = Config {
            stores,
            store_size_bytes: settings.store_size.map(|size| size.0),
            listen_nbd,
            listen_admin,
            advertise,
            listen_link: settings.listen_link,
            join,
            labels: metadata::labels(&settings.label)?,
            certificate_lifetime: between(
                "certificate-lifetime",
                settings.certificate_lifetime,
                CERTIFICATE_SECONDS_DEFAULT,
                30,
                10 * 365 * 86400,
            )
            .map(|seconds| Duration::from_secs(u64::from(seconds)))?,
            listen_http,
            metadata,
            log_format: settings.log_format.unwrap_or_default(),
            log_level,
            data_threads: between(
                "data-threads",
                settings.data_threads,
                1,
                1,
                DATA_THREADS_MAX,
            )?,
            io_engine: settings.io_engine.unwrap_or_default(),
            tail_bytes: at_least(
                "tail-size",
                settings.tail_size,
                DataConfig::TAIL_BYTES,
                TAIL_BYTES_MIN,
            )?,
            tail_dir: settings
                .tail_dir
                .map(|dir| absolute("tail-dir", &dir))
                .transpose()?,
            leaf_cache_bytes: at_least(
                "leaf-cache-size",
                settings.leaf_cache_size,
                DataConfig::CACHE_BYTES,
                LEAF_CACHE_BYTES_MIN,
            )?,
            max_connections: between(
                "max-connections",
                settings.max_connections,
                1024,
                1,
                1 << 20,
            )?,
            max_connection_buffer_bytes: max_connection_buffer,
            max_buffer_bytes: at_least(
                "max-buffer",
                settings.max_buffer,
                Limits::BYTES,
                max_connection_buffer,
            )?,
            handshake_timeout: seconds("handshake-timeout", settings.handshake_timeout, 10, 1)?,
            scrub_bytes_per_second: at_least(
                "scrub-rate",
                settings.scrub_rate,
                64 << 20,
                64 << 10,
            )?,
            fill_bytes_per_second: at_least(
                "fill-rate",
                settings.fill_rate,
                DataConfig::FILL_BYTES_PER_SECOND,
                1 << 20,
            )?,
            replace_after: between("replace-after", settings.replace_after, 600, 5, 30 * 86400)
                .map(|seconds| Duration::from_secs(u64::from(seconds)))?,
            scrub_every: settings.scrub_every.unwrap_or(SCRUB_EVERY_DEFAULT),
            overcommit_percent: between("overcommit", settings.overcommit, 100, 100, 100_000)?,
            drain_timeout: seconds(
                "drain-timeout",
                settings.drain_timeout,
                DataConfig::DRAIN_TIMEOUT.as_secs() as u32,
                0,
            )?,
            accept_tail_loss: settings.accept_tail_loss.unwrap_or(false),
            io_flusher: settings.io_flusher.unwrap_or(false),
            oom_score_adjust: settings
                .oom_score_adjust
                .map(|score| between("oom-score-adjust", Some(score), 0, -1000, 1000))
                .transpose()?,
            fault: settings.fault,
            data_dir,
        };
        Ok(config)
    }

    /// Whether this node is one of a cluster.
    pub fn is_clustered(&self) -> bool {
        self.metadata != Metadata::Sqlite
    }

    /// The settings as a file that means the same.
    pub fn to_toml(&self) -> String {
        let mut settings = Settings {
            data_dir: Some(self.data_dir.clone()),
            store: self.stores.clone(),
            store_size: self.store_size_bytes.map(ByteCount),
            listen_nbd: self.listen_nbd.clone(),
            listen_admin: self.listen_admin.clone(),
            advertise: self.advertise.clone(),
            listen_link: self.listen_link.clone(),
            label: self
                .labels
                .iter()
                .map(|(key, value)| format!("{key}={value}"))
                .collect(),
            certificate_lifetime: Some(self.certificate_lifetime.as_secs() as u32),
            listen_http: Some(self.listen_http.clone()),
            log_format: Some(self.log_format),
            log_level: Some(self.log_level.clone()),
            data_threads: Some(self.data_threads),
            io_engine: Some(self.io_engine),
            tail_size: Some(ByteCount(self.tail_bytes)),
            tail_dir: self.tail_dir.clone(),
            leaf_cache_size: Some(ByteCount(self.leaf_cache_bytes)),
            max_connections: Some(self.max_connections),
            max_connection_buffer: Some(ByteCount(self.max_connection_buffer_bytes)),
            max_buffer: Some(ByteCount(self.max_buffer_bytes)),
            handshake_timeout: Some(self.handshake_timeout.as_secs() as u32),
            scrub_rate: Some(ByteCount(self.scrub_bytes_per_second)),
            fill_rate: Some(ByteCount(self.fill_bytes_per_second)),
            replace_after: Some(self.replace_after.as_secs() as u32),
            scrub_every: Some(self.scrub_every),
            overcommit: Some(self.overcommit_percent),
            drain_timeout: Some(self.drain_timeout.as_secs() as u32),
            accept_tail_loss: Some(self.accept_tail_loss),
            io_flusher: Some(self.io_flusher),
            oom_score_adjust: self.oom_score_adjust,
            fault: self.fault.clone(),
            ..Settings::default()
        };
        self.metadata.to_settings(&mut settings);
        // Strings, numbers and lists of strings: nothing TOML lacks. Paths are UTF-8 (see `absolute`).
        toml::to_string(&settings).expect("settings are TOML")
    }
}

/// Reads flags and environment. Exits with clap's message and code 2 when they make no sense, as `--help` does with 0.
pub fn parse_arguments(arguments: impl IntoIterator<Item = OsString>) -> Arguments {
    Arguments::parse_from(arguments)
}

fn read_file(path: &Path) -> Result<Settings, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: path.to_owned(),
        source,
    })?;
    toml::from_str(&text).map_err(|error| ConfigError::File {
        path: path.to_owned(),
        reason: error.to_string(),
    })
}

fn value(setting: &'static str, problem: impl Into<String>) -> ConfigError {
    ConfigError::Value {
        setting,
        problem: problem.into(),
    }
}

fn absolute(setting: &'static str, path: &Path) -> Result<PathBuf, ConfigError> {
    if path.to_str().is_none() {
        return Err(value(setting, format!("{} is not UTF-8", path.display())));
    }
    std::path::absolute(path)
        .map_err(|error| value(setting, format!("{}: {error}", path.display())))
}

/// The first address that others may reach: one with a port, which is not every address of the machine.
fn reachable(listen_admin: &[Address]) -> Option<HostPort> {
    listen_admin.iter().find_map(|address| match address {
        Address::Tcp(host_port) => {
            let ip = host_port.host.parse::<std::net::IpAddr>();
            let is_any = ip.is_ok_and(|ip| ip.is_unspecified());
            (host_port.port != 0 && !is_any).then(|| host_port.clone())
        }
        Address::Unix(_) => None,
    })
}

/// Checks what can be told of an address before it is listened on.
fn listener(setting: &'static str, address: Address) -> Result<Address, ConfigError> {
    match address {
        Address::Unix(path) => {
            let path = absolute(setting, &path)?;
            let length = path.as_os_str().len();
            if length > UNIX_PATH_MAX_BYTES {
                let problem = format!(
                    "{} has {length} bytes, a Unix socket's path at most {UNIX_PATH_MAX_BYTES}; choose a shorter one",
                    path.display()
                );
                return Err(value(setting, problem));
            }
            Ok(Address::Unix(path))
        }
        Address::Tcp(host_port) if !host_port.may_be_loopback() => Err(value(
            setting,
            format!(
                "{host_port} can be reached from other machines, which needs TLS, and that needs a cluster (`ashlar cluster init`); use 127.0.0.1, or a tunnel"
            ),
        )),
        tcp @ Address::Tcp(_) => Ok(tcp),
    }
}

fn duplicate<T: PartialEq>(items: impl Iterator<Item = T>) -> Option<T> {
    let mut seen = Vec::new();
    for item in items {
        if seen.contains(&item) {
            return Some(item);
        }
        seen.push(item);
    }
    None
}

fn at_least(
    setting: &'static str,
    size: Option<ByteCount>,
    default: u64,
    least: u64,
) -> Result<u64, ConfigError> {
    // A default follows a larger minimum, so that raising one setting does not demand another.
    let bytes = size.map_or(default.max(least), |size| size.0);
    if bytes < least {
        return Err(value(
            setting,
            format!(
                "{} is too small; at least {}",
                ByteCount(bytes),
                ByteCount(least)
            ),
        ));
    }
    Ok(bytes)
}

fn between<T: PartialOrd + Copy + std::fmt::Display>(
    setting: &'static str,
    number: Option<T>,
    default: T,
    least: T,
    most: T,
) -> Result<T, ConfigError> {
    let number = number.unwrap_or(default);
    if number < least || number > most {
        return Err(value(
            setting,
            format!("{number} is not between {least} and {most}"),
        ));
    }
    Ok(number)
}

fn seconds(
    setting: &'static str,
    number: Option<u32>,
    default: u32,
    least: u32,
) -> Result<Duration, ConfigError> {
    between(setting, number, default, least, 3600)
        .map(|number| Duration::from_secs(u64::from(number)))
}

#[cfg(test)]
mod tests;
