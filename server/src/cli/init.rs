//! `ashlar cluster init`: a stopped node becomes the first of a cluster.

use std::fmt::Display;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::Serialize;

use super::args::{Format, InitArgs};
use super::attach::quote;
use super::error::{CliError, Exit};
use super::output::{self, Answer};
use crate::config::{Arguments, Config, Metadata, Settings};
use crate::daemon::{DataDirLock, certificate_names, connect, node_record, open_local};
use crate::identity::{InitError, Initialising, initialise};
use crate::meta::MetadataError;

const ROOT: u32 = 0;

fn failed(error: impl Display) -> CliError {
    CliError::new(Exit::Failed, error)
}

fn refused(error: InitError) -> CliError {
    let is_away = matches!(
        error,
        InitError::Metadata(MetadataError::Unavailable { .. } | MetadataError::Unknown { .. })
    );
    match is_away {
        true => CliError::new(Exit::Unreachable, error)
            .hint("is that where etcd is, and does it let this node in? Then run this again"),
        false => CliError::new(Exit::Refused, error),
    }
}

/// What is made in the data directory has to be the daemon's, which could not read what root makes there. Another user than
/// the owner may be right: a directory can be a group's.
fn is_owners(data_dir: &Path) -> Result<(), CliError> {
    let Ok(metadata) = std::fs::metadata(data_dir) else {
        // It is made, or refused, when it is locked.
        return Ok(());
    };
    let own = rustix::process::geteuid().as_raw();
    if own != ROOT || metadata.uid() == ROOT {
        return Ok(());
    }
    let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let owner = user(metadata.uid(), &users);
    let arguments: Vec<String> = std::env::args().map(|word| quote(&word)).collect();
    Err(CliError::new(
        Exit::Refused,
        format_args!(
            "{} belongs to {owner}, and this runs as {}: the daemon could not read what is made here",
            data_dir.display(),
            user(own, &users)
        ),
    )
    .hint(format_args!(
        "run it as its owner: sudo -u {} {}",
        quote(&owner),
        arguments.join(" ")
    )))
}

/// What sudo takes for a user: its name in the lines of /etc/passwd, or `#` and the number.
fn user(uid: u32, passwd: &str) -> String {
    let fields = passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>());
    let mut names = fields.filter_map(|fields| match fields[..] {
        [name, _, number, ..] if number.parse() == Ok(uid) => Some(name.to_owned()),
        _ => None,
    });
    names.next().unwrap_or_else(|| format!("#{uid}"))
}

/// Makes the node of a data directory the first of a cluster. Its daemon must not run.
pub(super) async fn init(format: Format, args: InitArgs) -> Result<(), CliError> {
    let arguments = Arguments {
        config: args.config,
        print_config: false,
        settings: Settings {
            data_dir: args.data_dir,
            metadata: args.metadata,
            etcd_prefix: args.etcd_prefix,
            etcd_ca: args.etcd_ca,
            etcd_cert: args.etcd_cert,
            etcd_key: args.etcd_key,
            advertise: args.advertise,
            label: args.label,
            ..Settings::default()
        },
    };
    let config = Config::resolve(&arguments).map_err(|error| CliError::new(Exit::Usage, error))?;
    let Metadata::Etcd(access) = &config.metadata else {
        return Err(CliError::new(
            Exit::Usage,
            "a cluster keeps its records in etcd; give --metadata etcd:http://HOST:PORT",
        ));
    };
    is_owners(&config.data_dir)?;
    let _lock = DataDirLock::take(&config.data_dir).map_err(|error| {
        CliError::new(Exit::Refused, error)
            .hint("stop ashlard first; its volumes are moved as they are")
    })?;
    let local = open_local(&config.data_dir).map_err(failed)?;
    let shared = connect(access).map_err(failed)?;
    let node = node_record(&*local).await.map_err(failed)?.id;
    let founded = initialise(&Initialising {
        data_dir: &config.data_dir,
        local: &*local,
        shared: &shared,
        node,
        names: certificate_names(&config),
        labels: config.labels.clone(),
        length: config.certificate_lifetime,
    })
    .await
    .map_err(refused)?;
    output::print(
        format,
        &Founded {
            cluster_id: founded.cluster.0.to_string(),
            node_id: node.0.to_string(),
            authority_sha256: founded.authority_sha256,
            volumes: founded.volumes,
        },
    )
}

#[derive(Serialize)]
struct Founded {
    cluster_id: String,
    node_id: String,
    authority_sha256: String,
    volumes: usize,
}

impl Answer for Founded {
    fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(
            out,
            "cluster {} has its first node, {}",
            self.cluster_id, self.node_id
        )?;
        writeln!(out, "volumes moved into it: {}", self.volumes)?;
        writeln!(out, "authority (SHA-256):   {}", self.authority_sha256)?;
        writeln!(
            out,
            "keep a copy of identity/ca-key.pem where it is safe; start ashlard with the same --metadata"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_have_names_where_the_machine_knows_one() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\nashlar:x:998:997::/var/lib/ashlar:\n";
        assert_eq!(user(998, passwd), "ashlar");
        assert_eq!(user(0, passwd), "root");
        assert_eq!(user(997, passwd), "#997");
    }

    #[test]
    fn an_etcd_that_is_away_is_no_refusal() {
        let away = MetadataError::Unavailable {
            reason: "nobody answers".to_owned(),
        };
        assert_eq!(refused(away.into()).exit, Exit::Unreachable);
        assert_eq!(refused(InitError::Contended).exit, Exit::Refused);
    }
}
