//! Writes everyone's data and starts everyone. Who cannot be started is told, and the others go on.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::ashlar::Ashlar;
use crate::ceph::Ceph;
use crate::cluster;
use crate::fio;
use crate::measure::{Field, Metered};
use crate::rows::Contender;
use crate::scratch::Scratch;
use crate::servers::{self, Places};

/// What it takes to start contenders.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry<'a> {
    /// The folder with ashlard and ashlar.
    pub(crate) programs: &'a Path,
    pub(crate) scratch: &'a Scratch,
    /// More flags for ashlard.
    pub(crate) flags: &'a [String],
    pub(crate) size_bytes: u64,
}

/// How many times its data a store is that is given a size: as full as one that is cleaned at leisure.
const STORE_SIZES: u64 = 4;

impl Entry<'_> {
    /// One daemon and other NBD servers.
    pub(crate) fn servers(&self, contenders: &[Contender]) -> (Field, Vec<String>) {
        let mut field = Field::default();
        let mut failures = Vec::new();
        for &contender in contenders {
            if let Err(error) = self.server(contender, &mut field) {
                failures.push(format!("{}: {error:#}", contender.title()));
            }
        }
        (field, failures)
    }

    fn server(&self, contender: Contender, field: &mut Field) -> Result<()> {
        let file = self.data_file(contender.slug(), contender.title())?;
        if contender == Contender::Ashlar {
            self.daemon(contender, self.flags.to_vec(), &file, field)?;
            fs::remove_file(&file)?;
            return Ok(());
        }
        let places = Places {
            sockets: &self.scratch.sockets,
            data: &self.scratch.data,
        };
        let running = servers::start_peer(contender, &file, places)?;
        field.running.insert(contender, running);
        Ok(())
    }

    /// A daemon on its own.
    fn daemon(
        &self,
        contender: Contender,
        flags: Vec<String>,
        file: &Path,
        field: &mut Field,
    ) -> Result<()> {
        let Scratch { data, sockets, .. } = self.scratch;
        let daemon = Ashlar::new(contender.slug(), self.programs, data, sockets, flags)?;
        let running = daemon.prepare(self.size_bytes, file)?;
        field.running.insert(contender, running);
        let metered = Metered {
            daemons: vec![daemon.http],
            copies: 1,
            head: None,
        };
        field.ours.insert(contender, metered);
        Ok(())
    }

    /// Three nodes of a cluster, one daemon, and Ceph.
    pub(crate) fn cluster(&self, contenders: &[Contender]) -> (Field, Vec<String>) {
        let mut field = Field::default();
        let mut failures = Vec::new();
        let file = match self.data_file("data", "everyone") {
            Ok(file) => file,
            Err(error) => return (field, vec![format!("{error:#}")]),
        };
        let mut flags = self.flags.to_vec();
        flags.push(format!("--store-size={}", STORE_SIZES * self.size_bytes));
        let mut ceph = None;
        for &contender in contenders {
            eprintln!("starting {}", contender.title());
            let entered = match contender {
                Contender::Cluster => self.three_nodes(&flags, &file, &mut field),
                Contender::Single => self.daemon(contender, flags.clone(), &file, &mut field),
                _ => self.ceph(contender, &mut ceph, &file, &mut field),
            };
            if let Err(error) = entered {
                failures.push(format!("{}: {error:#}", contender.title()));
            }
        }
        field
            .beside
            .extend(ceph.into_iter().flatten().flat_map(|ceph| ceph.processes));
        if let Err(error) = fs::remove_file(&file) {
            failures.push(format!("{}: {error}", file.display()));
        }
        (field, failures)
    }

    fn three_nodes(&self, flags: &[String], file: &Path, field: &mut Field) -> Result<()> {
        let Scratch { data, sockets, .. } = self.scratch;
        let started = cluster::start(self.programs, data, sockets, flags, self.size_bytes, file)?;
        field.running.insert(Contender::Cluster, started.running);
        field.ours.insert(Contender::Cluster, started.metered);
        field.cluster = Some(started.cluster);
        Ok(())
    }

    /// Both ways lead to the same OSDs, which the first that is asked for starts. `ceph` is None before that, and holds
    /// None when they could not be started.
    fn ceph(
        &self,
        contender: Contender,
        ceph: &mut Option<Option<Ceph>>,
        file: &Path,
        field: &mut Field,
    ) -> Result<()> {
        if contender == Contender::CephRbd {
            fio::require_engines(&["rbd"])?;
        }
        let Scratch { data, sockets, .. } = self.scratch;
        if ceph.is_none() {
            // Not tried again when it fails.
            *ceph = Some(None);
            let started = Ceph::start(&data.join("ceph"), sockets, self.size_bytes);
            *ceph = Some(Some(started.context("setting Ceph up")?));
        }
        let ceph = ceph.as_ref().and_then(Option::as_ref);
        let ceph = ceph.context("Ceph could not be set up")?;
        let running = ceph.enter(contender, file, sockets)?;
        field.running.insert(contender, running);
        Ok(())
    }

    fn data_file(&self, name: &str, whose: &str) -> Result<PathBuf> {
        eprintln!("writing {} MiB for {whose}", self.size_bytes >> 20);
        let file = self.scratch.data.join(format!("{name}.raw"));
        fio::write_data_file(&file, self.size_bytes)?;
        Ok(file)
    }
}
