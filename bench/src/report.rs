//! Everything that a run has to say, and the files it is written to.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::chart;
use crate::joining::Joining;
use crate::measure::{Effort, Figures, Sample, summarise};
use crate::procfs::Machine;
use crate::rows::{Comparison, Contender, Medium, Row};
use crate::standing::{ClusterStanding, Standing, cluster_standing, standing};

/// Everything that a run has to say.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) comparison: Comparison,
    /// When it began, UTC.
    pub(crate) date: String,
    /// The commit of the working directory; `+` when files differ from it.
    pub(crate) commit: String,
    pub(crate) effort: Effort,
    pub(crate) ashlard_flags: Vec<String>,
    /// As it was when each medium was begun with.
    pub(crate) machines: Vec<Machine>,
    /// What each program says its version is.
    pub(crate) versions: BTreeMap<String, String>,
    pub(crate) rows: Vec<RowReport>,
    /// Of a cluster, on each medium.
    pub(crate) joinings: Vec<Joining>,
    pub(crate) failures: Vec<String>,
}

/// One row, summed up and in full.
#[derive(Debug, Serialize)]
pub(crate) struct RowReport {
    pub(crate) name: &'static str,
    pub(crate) title: String,
    pub(crate) medium: Medium,
    pub(crate) must_beat_bare: bool,
    pub(crate) medians: BTreeMap<Contender, Figures>,
    /// Against other NBD servers.
    pub(crate) standing: Option<Standing>,
    /// How the least servers would stand in its place.
    pub(crate) least: Vec<(Contender, Standing)>,
    /// Against Ceph and what was read elsewhere.
    pub(crate) cluster: Option<ClusterStanding>,
    pub(crate) samples: Vec<Sample>,
}

impl RowReport {
    pub(crate) fn new(
        comparison: Comparison,
        medium: Medium,
        row: &Row,
        samples: Vec<Sample>,
    ) -> RowReport {
        let medians = summarise(&samples);
        let least = match comparison {
            Comparison::Servers => [Contender::Least, Contender::LeastLooking]
                .into_iter()
                .filter_map(|who| Some((who, standing(who, row, &medians)?)))
                .collect(),
            Comparison::Cluster => Vec::new(),
        };
        let (title, standing, cluster) = match comparison {
            Comparison::Servers => (
                row.title.to_owned(),
                standing(Contender::Ashlar, row, &medians),
                None,
            ),
            Comparison::Cluster => (
                format!("{}, {}", row.title, medium.title()),
                None,
                cluster_standing(row, &medians),
            ),
        };
        RowReport {
            name: row.name,
            title,
            medium,
            must_beat_bare: row.must_beat_bare,
            medians,
            standing,
            least,
            cluster,
            samples,
        }
    }
}

impl Report {
    pub(crate) fn new(
        comparison: Comparison,
        effort: Effort,
        ashlard_flags: Vec<String>,
    ) -> Report {
        Report {
            comparison,
            date: jiff::Timestamp::now()
                .strftime("%Y-%m-%dT%H:%MZ")
                .to_string(),
            commit: commit(),
            effort,
            ashlard_flags,
            machines: Vec::new(),
            versions: BTreeMap::new(),
            rows: Vec::new(),
            joinings: Vec::new(),
            failures: Vec::new(),
        }
    }

    /// What is compared, as a heading.
    pub(crate) fn title(&self) -> &'static str {
        match self.comparison {
            Comparison::Servers => "Ashlar beside other NBD servers",
            Comparison::Cluster => "Three nodes of Ashlar beside Ceph",
        }
    }

    /// Writes the results in all three forms into `folder` and returns the Markdown's path.
    pub(crate) fn write(&self, folder: &Path) -> Result<PathBuf> {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let date = self.date.replace([':', 'T', 'Z'], "-");
        let date = date.trim_end_matches('-');
        let name = match self.comparison {
            Comparison::Servers => date.to_owned(),
            Comparison::Cluster => format!("{date}-cluster"),
        };
        let path = |extension: &str| folder.join(format!("{name}.{extension}"));
        let put = |extension: &str, text: &str| {
            fs::write(path(extension), text).with_context(|| path(extension).display().to_string())
        };
        put("json", &(serde_json::to_string_pretty(self)? + "\n"))?;
        put("svg", &chart::draw(self))?;
        put("md", &self.markdown(&format!("{name}.svg")))?;
        Ok(path("md"))
    }
}

fn commit() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git")
            .args(arguments)
            .output()
            .ok()
            .filter(|output| output.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(head) = git(&["rev-parse", "--short=12", "HEAD"]) else {
        return "unknown".to_owned();
    };
    let clean = git(&["status", "--porcelain", "--untracked-files=no"])
        .is_some_and(|changes| changes.is_empty());
    if clean { head } else { format!("{head}+") }
}
