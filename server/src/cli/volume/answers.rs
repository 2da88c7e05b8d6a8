//! What is told of volumes, in tables and as JSON.

use std::io::{self, Write};

use serde::Serialize;

use crate::cli::{
    attach::AttachLines,
    copies,
    output::{self, Answer},
    size::{Exact, human},
    view::Volume,
};

fn mode(volume: &Volume) -> &'static str {
    match (volume.read_only, volume.write_through) {
        (true, _) => "read-only",
        (false, true) => "write-through",
        (false, false) => "write-back",
    }
}

/// Where clients reach it.
fn served_by(volume: &Volume) -> String {
    match (volume.served_elsewhere, volume.not_served_reason.is_empty()) {
        (true, _) => volume.head_node_id.clone(),
        (false, true) => "this node".to_owned(),
        (false, false) => "nobody".to_owned(),
    }
}

#[derive(Serialize)]
#[serde(transparent)]
pub(super) struct VolumeList {
    pub(super) volumes: Vec<Volume>,
}

impl Answer for VolumeList {
    fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        if self.volumes.is_empty() {
            output::note("no volumes; create one with 'ashlar volume create NAME --size 10GiB'");
            return Ok(());
        }
        let rows = self.volumes.iter().map(|volume| {
            vec![
                volume.name.clone(),
                human(volume.size_bytes),
                mode(volume).to_owned(),
                volume.state.to_owned(),
                volume
                    .runtime
                    .map_or("-".into(), |runtime| runtime.connections.to_string()),
                served_by(volume),
                volume.created_at.clone(),
                volume.id.clone(),
            ]
        });
        let header = [
            "NAME",
            "SIZE",
            "MODE",
            "STATE",
            "CONNECTIONS",
            "SERVED BY",
            "CREATED",
            "ID",
        ];
        out.write_all(output::columns(&header, &[1, 4], rows).as_bytes())
    }
}

#[derive(Serialize)]
pub(super) struct Changed {
    #[serde(skip)]
    pub(super) verb: &'static str,
    #[serde(flatten)]
    pub(super) volume: Volume,
}

impl Answer for Changed {
    fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        let Changed { verb, volume } = self;
        writeln!(
            out,
            "{verb} {}: {}, {}, id {}",
            volume.name,
            human(volume.size_bytes),
            mode(volume),
            volume.id
        )
    }
}

#[derive(Serialize)]
pub(super) struct Resized {
    pub(super) previous_size_bytes: u64,
    #[serde(flatten)]
    pub(super) volume: Volume,
}

impl Answer for Resized {
    fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        let Resized {
            previous_size_bytes,
            volume,
        } = self;
        if *previous_size_bytes == volume.size_bytes {
            writeln!(
                out,
                "{} already has {}",
                volume.name,
                Exact(volume.size_bytes)
            )
        } else {
            writeln!(
                out,
                "resized {} from {} to {}",
                volume.name,
                human(*previous_size_bytes),
                Exact(volume.size_bytes)
            )
        }
    }
}

#[derive(Serialize)]
#[serde(transparent)]
pub(super) struct Deleted {
    pub(super) deleted: Vec<Volume>,
}

impl Answer for Deleted {
    fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        for volume in &self.deleted {
            writeln!(
                out,
                "deleted {}: {}, id {}",
                volume.name,
                human(volume.size_bytes),
                volume.id
            )?;
        }
        Ok(())
    }
}

/// What there is to say of limits, filesystem and publications.
fn orchestrated(volume: &Volume) -> Vec<(&'static str, String)> {
    let mut fields = Vec::new();
    let limits = match (volume.limits.iops, volume.limits.bytes_per_second) {
        (0, 0) => None,
        (iops, 0) => Some(format!("{iops} IOPS")),
        (0, bytes) => Some(format!("{}/s", human(bytes))),
        (iops, bytes) => Some(format!("{iops} IOPS, {}/s", human(bytes))),
    };
    fields.extend(limits.map(|limits| ("Limits", limits)));
    let filesystem = volume.filesystem.as_ref().map(|filesystem| {
        let state = match filesystem.state {
            "formatted" => "",
            _ => ", not finished",
        };
        format!("{} {}{state}", filesystem.r#type, filesystem.uuid)
    });
    let blank = (!volume.ever_written).then(|| "none; never written".to_owned());
    fields.extend(filesystem.or(blank).map(|text| ("Filesystem", text)));
    for publication in &volume.publications {
        let text = format!(
            "{}, {}{}, {} connection(s), since {}",
            publication.node_id,
            publication.access_mode,
            if publication.read_only {
                ", read-only"
            } else {
                ""
            },
            publication.connections,
            publication.published_at,
        );
        fields.push(("Published to", text));
    }
    if !volume.not_served_reason.is_empty() {
        fields.push(("Not served", volume.not_served_reason.clone()));
    }
    fields
}

#[derive(Serialize)]
pub(super) struct Shown {
    #[serde(flatten)]
    pub(super) volume: Volume,
    /// Absent when no client can open it here: it is published, or not served, or the daemon has no NBD listener.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) attach: Option<AttachLines>,
}

impl Answer for Shown {
    fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        let volume = &self.volume;
        let mut fields = vec![
            ("Name", volume.name.clone()),
            ("Id", volume.id.clone()),
            ("Size", Exact(volume.size_bytes).to_string()),
            ("Mode", mode(volume).to_owned()),
            ("State", volume.state.to_owned()),
            ("Created", volume.created_at.clone()),
            ("Replicas", volume.replicas.to_string()),
            ("Epoch", volume.epoch.to_string()),
        ];
        if volume.replica_sets.is_empty() {
            fields.push(("Stores", volume.store_ids.join(" ")));
        }
        fields.extend(copies::fields(volume));
        fields.extend(orchestrated(volume));
        match volume.runtime {
            Some(runtime) => {
                fields.push(("Connections", runtime.connections.to_string()));
                fields.push(("In flight", runtime.inflight_requests.to_string()));
            }
            None if volume.served_elsewhere => {
                fields.push(("Connections", format!("ask node {}", volume.head_node_id)))
            }
            None => fields.push(("Connections", "none; the volume is not open".into())),
        }
        out.write_all(output::fields(&fields).as_bytes())?;
        if !volume.replica_sets.is_empty() {
            write!(out, "\n{}", copies::table(volume))?;
        }
        match &self.attach {
            Some(attach) => {
                writeln!(out)?;
                for (label, line) in attach.labelled() {
                    writeln!(out, "{label:17}{line}")?;
                }
                Ok(())
            }
            None if !volume.publications.is_empty() => writeln!(
                out,
                "\nOnly the client nodes it is published to can open it. To attach it by hand: ashlar volume unpublish {}",
                volume.name
            ),
            None if volume.served_elsewhere => writeln!(
                out,
                "\nAttach it at node {}, or serve it here: ashlar volume open {}",
                volume.head_node_id, volume.name
            ),
            None if !volume.not_served_reason.is_empty() => writeln!(
                out,
                "\nIt cannot be attached while it is not served; what would free it: ashlar explain {}",
                volume.name
            ),
            None => writeln!(
                out,
                "\nThe daemon has no NBD listener: start it with --listen-nbd to attach this volume."
            ),
        }
    }
}
