//! `ashlar store inspect` and `ashlar store check`: without a daemon.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};

use ashlar_core::{
    store::{CheckFinding, CheckReport, ExtentKey, Inspection, OpenError},
    units::BLOCK_BYTES,
};
use serde::Serialize;

use super::{
    args::Format,
    error::{CliError, Exit},
    output::{self, Answer},
    progress,
    size::{Exact, human},
    view,
};
use crate::offline::{OfflineError, OfflineStore, bytes};

pub(super) fn inspect(format: Format, path: &Path) -> Result<(), CliError> {
    let mut store = open(path)?;
    let inspection = store
        .inspect()
        .map_err(|error| unreadable(&store, &error))?;
    output::print(format, &Inspected::new(&store, inspection))
}

pub(super) fn check(format: Format, path: &Path) -> Result<(), CliError> {
    let mut store = open(path)?;
    let bar = progress::bytes_bar(0, store.path().display().to_string());
    let report = store.check(|done_blocks, total_blocks| {
        bar.set_length(bytes(total_blocks));
        bar.set_position(bytes(done_blocks));
    });
    bar.finish_and_clear();
    let report = report.map_err(|error| unreadable(&store, &error))?;
    let checked = Checked::new(&store, report);
    output::print(format, &checked)?;
    if checked.damages_found == 0 {
        Ok(())
    } else {
        Err(CliError::reported(Exit::Damaged))
    }
}

fn open(path: &Path) -> Result<OfflineStore, CliError> {
    let store = OfflineStore::open(path).map_err(|error| {
        let exit = match error {
            OfflineError::Missing { .. } | OfflineError::NoStore { .. } => Exit::NotFound,
            OfflineError::Several { .. } | OfflineError::WrongType { .. } => Exit::Usage,
            OfflineError::Io { .. } => Exit::Failed,
        };
        CliError::new(exit, error)
    })?;
    if store.in_use() {
        output::note(format_args!(
            "{} is open in a daemon: it changes while it is read, and damage reported here need not be damage; 'ashlar \
             store scrub' verifies it through the daemon",
            store.path().display()
        ));
    }
    Ok(store)
}

fn unreadable(store: &OfflineStore, error: &OpenError) -> CliError {
    let exit = match error {
        OpenError::NotAStore => Exit::NotFound,
        OpenError::Version(_) | OpenError::OtherNode { .. } => Exit::Refused,
        OpenError::SuperblockDamaged
        | OpenError::CheckpointDamaged { .. }
        | OpenError::LogDamaged { .. } => Exit::Damaged,
        _ => Exit::Failed,
    };
    CliError::new(exit, format_args!("{}: {error}", store.path().display()))
}

#[derive(Serialize)]
struct Inspected {
    path: PathBuf,
    in_use: bool,
    store_id: String,
    node_id: String,
    created_at: String,
    closed_cleanly: bool,
    incarnation: u64,
    capacity_bytes: u64,
    segment_bytes: u64,
    segments_max: u32,
    segments_allocated: u32,
    segments_free: u32,
    segments_damaged: u32,
    checkpoint_sequence: u64,
    checkpoint_bytes: u64,
    checkpoint_frame: u64,
    /// As of the checkpoint; the log behind it may map more or fewer.
    live_bytes: u64,
    log_frames: u64,
    log_bytes: u64,
    log_end_offset_bytes: u64,
    layers: Vec<LayerChunks>,
    layers_being_dropped: Vec<u64>,
}

#[derive(Serialize)]
struct LayerChunks {
    layer: u64,
    chunks: u64,
}

impl Inspected {
    fn new(store: &OfflineStore, inspection: Inspection) -> Inspected {
        let geometry = inspection.geometry;
        Inspected {
            path: store.path().to_owned(),
            in_use: store.in_use(),
            store_id: inspection.store.0.to_string(),
            node_id: uuid::Uuid::from_bytes(inspection.node).to_string(),
            created_at: view::time(inspection.created_unix_ms as i64),
            closed_cleanly: inspection.clean,
            incarnation: inspection.incarnation,
            capacity_bytes: geometry.total_bytes(),
            segment_bytes: bytes(geometry.segment_blocks.into()),
            segments_max: geometry.segments_max,
            segments_allocated: inspection.segments,
            segments_free: inspection.segments_free,
            segments_damaged: inspection.segments_damaged,
            checkpoint_sequence: inspection.checkpoint_seq,
            checkpoint_bytes: inspection.checkpoint_bytes,
            checkpoint_frame: inspection.checkpoint_frame,
            live_bytes: bytes(inspection.mapped_blocks),
            log_frames: inspection.frames,
            log_bytes: bytes(inspection.frame_blocks),
            log_end_offset_bytes: inspection.log_end.offset(),
            layers: inspection
                .layers
                .into_iter()
                .map(|(layer, chunks)| LayerChunks {
                    layer: layer.0,
                    chunks,
                })
                .collect(),
            layers_being_dropped: inspection
                .dropping
                .into_iter()
                .map(|layer| layer.0)
                .collect(),
        }
    }
}

impl Answer for Inspected {
    fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        let closed = match (self.in_use, self.closed_cleanly) {
            (true, _) => "open in a daemon now",
            (false, true) => "cleanly",
            (false, false) => "not cleanly: the next start replays the log and the tail",
        };
        let damaged = match self.segments_damaged {
            0 => String::new(),
            damaged => format!(", {damaged} damaged"),
        };
        let fields = [
            ("Path", self.path.display().to_string()),
            ("Store", self.store_id.clone()),
            ("Node", self.node_id.clone()),
            ("Created", self.created_at.clone()),
            ("Opened", format!("{} time(s)", self.incarnation)),
            ("Closed", closed.to_owned()),
            ("Capacity", Exact(self.capacity_bytes).to_string()),
            (
                "Segments",
                format!(
                    "{} of {} allocated, {} free{damaged}, {} each",
                    self.segments_allocated,
                    self.segments_max,
                    self.segments_free,
                    human(self.segment_bytes)
                ),
            ),
            (
                "Checkpoint",
                format!(
                    "{}, {}, up to frame {}",
                    self.checkpoint_sequence,
                    human(self.checkpoint_bytes),
                    self.checkpoint_frame
                ),
            ),
            (
                "Live data",
                format!("{} as of the checkpoint", human(self.live_bytes)),
            ),
            (
                "Log behind it",
                format!(
                    "{} frame(s), {}, ends at byte {}",
                    self.log_frames,
                    human(self.log_bytes),
                    self.log_end_offset_bytes
                ),
            ),
        ];
        out.write_all(output::fields(&fields).as_bytes())?;
        if !self.layers.is_empty() {
            let rows = self.layers.iter().map(|row| {
                let dropped = self.layers_being_dropped.contains(&row.layer);
                vec![
                    row.layer.to_string(),
                    row.chunks.to_string(),
                    if dropped { "being dropped" } else { "" }.to_owned(),
                ]
            });
            write!(
                out,
                "\n{}",
                output::columns(&["LAYER", "CHUNKS", ""], &[0, 1], rows)
            )?;
        }
        Ok(())
    }
}

#[derive(Serialize)]
struct Checked {
    path: PathBuf,
    in_use: bool,
    verified_bytes: u64,
    leaves: u64,
    log_frames: u64,
    damages_found: u64,
    /// The first of them.
    damages: Vec<Damage>,
    /// Of those found, how many are not in the list.
    damages_left_out: u64,
}

/// One damaged place. Which fields are there depends on what it is.
#[derive(Default, Serialize)]
struct Damage {
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    layer: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    chunk: Option<u32>,
    /// First block of the chunk that is affected.
    #[serde(skip_serializing_if = "Option::is_none")]
    block: Option<u32>,
    /// Where in its volume that is.
    #[serde(skip_serializing_if = "Option::is_none")]
    volume_offset_bytes: Option<u64>,
    store_offset_bytes: u64,
    problem: String,
}

impl Damage {
    fn in_volume(self, key: ExtentKey, block: u32) -> Damage {
        let chunk_offset = u64::from(key.chunk.0) * ashlar_core::units::CHUNK_BYTES;
        Damage {
            layer: Some(key.layer.0),
            chunk: Some(key.chunk.0),
            block: Some(block),
            volume_offset_bytes: Some(chunk_offset + u64::from(block) * BLOCK_BYTES as u64),
            ..self
        }
    }
}

impl From<&CheckFinding> for Damage {
    fn from(finding: &CheckFinding) -> Damage {
        let problem = finding.to_string();
        let at = |kind, store_offset_bytes| Damage {
            kind,
            store_offset_bytes,
            problem,
            ..Damage::default()
        };
        match finding {
            CheckFinding::SuperblockCopy(block) => at("superblock copy", bytes((*block).into())),
            CheckFinding::Log(addr) => at("log", addr.offset()),
            CheckFinding::Leaf {
                key,
                first,
                at: addr,
            } => at("index", addr.offset()).in_volume(*key, *first),
            CheckFinding::Block {
                key,
                block,
                at: addr,
            } => at("data", addr.offset()).in_volume(*key, *block),
            CheckFinding::Device { at: addr, .. } => at("device", addr.offset()),
        }
    }
}

impl Checked {
    fn new(store: &OfflineStore, report: CheckReport) -> Checked {
        Checked {
            path: store.path().to_owned(),
            in_use: store.in_use(),
            verified_bytes: bytes(report.blocks),
            leaves: report.leaves,
            log_frames: report.frames,
            damages_found: report.findings.len() as u64 + report.findings_left_out,
            damages: report.findings.iter().map(Damage::from).collect(),
            damages_left_out: report.findings_left_out,
        }
    }
}

impl Answer for Checked {
    fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        for damage in &self.damages {
            write!(out, "damaged: {}", damage.problem)?;
            match damage.volume_offset_bytes {
                Some(offset) => writeln!(
                    out,
                    "; byte {offset} of the volume, byte {} of the store",
                    damage.store_offset_bytes
                )?,
                None => writeln!(out, "; byte {} of the store", damage.store_offset_bytes)?,
            }
        }
        writeln!(
            out,
            "{}: {} of data, {} leaves and {} log frame(s) verified, {}",
            self.path.display(),
            human(self.verified_bytes),
            self.leaves,
            self.log_frames,
            match (self.damages_found, self.damages_left_out) {
                (0, _) => "no damage".to_owned(),
                (found, 0) => format!("{found} damaged place(s)"),
                (found, more) => format!("{found} damaged place(s), {more} of them not listed"),
            }
        )
    }
}
