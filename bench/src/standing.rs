//! How Ashlar stands against the others of its row.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::measure::Figures;
use crate::reference::{CRUCIBLE, System, VITASTOR};
use crate::rows::{Contender, Row};

/// How a server, Ashlar as a rule, stands in one row.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Standing {
    pub(crate) best_peer: Contender,
    /// Its operations a second over the best peer's.
    pub(crate) ratio: f64,
    /// Over the bare file's.
    pub(crate) bare_ratio: Option<f64>,
    /// Its processor time an operation over that of the peer which spends least.
    pub(crate) cpu_ratio: Option<f64>,
    pub(crate) meets_speed: bool,
    pub(crate) meets_cpu: bool,
}

/// A row is won at this many times the best peer's operations a second...
const RATIO_WANTED: f64 = 1.3;
/// ...or, where the device is the limit, at this part of what the bare file gives...
const BARE_RATIO_WANTED: f64 = 0.9;
/// ...with at most this part of the processor time of the peer that spends least.
const CPU_RATIO_WANTED: f64 = 0.8;

/// Compares Ashlar, or a yardstick in its place, with the peers of a row; None when either side is missing.
pub(crate) fn standing(
    who: Contender,
    row: &Row,
    figures: &BTreeMap<Contender, Figures>,
) -> Option<Standing> {
    let subject = figures.get(&who)?;
    let peers = || {
        figures
            .iter()
            .filter(|(contender, _)| !contender.is_ours() && !contender.is_yardstick())
    };
    let speed = |figures: &Figures| figures.operations_per_second;
    let (&best_peer, best) =
        peers().max_by(|(_, one), (_, other)| speed(one).total_cmp(&speed(other)))?;
    let least_cpu = peers()
        .filter_map(|(_, figures)| figures.server_cpu_us)
        .min_by(f64::total_cmp);
    let ratio = speed(subject) / speed(best);
    let bare_ratio = figures
        .get(&Contender::Bare)
        .map(|bare| speed(subject) / speed(bare));
    let cpu_ratio = subject
        .server_cpu_us
        .zip(least_cpu)
        .map(|(ours, theirs)| ours / theirs);
    let beats_bare = !row.must_beat_bare || bare_ratio.is_none_or(|ratio| ratio > 1.0);
    Some(Standing {
        best_peer,
        ratio,
        bare_ratio,
        cpu_ratio,
        meets_speed: beats_bare
            && (ratio >= RATIO_WANTED
                || bare_ratio.is_some_and(|ratio| ratio >= BARE_RATIO_WANTED)),
        meets_cpu: cpu_ratio.is_some_and(|ratio| ratio <= CPU_RATIO_WANTED),
    })
}

/// How the cluster stands in one row, against Ceph in the same run and the figures that were read elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct ClusterStanding {
    /// The faster of Ceph's two ways.
    pub(crate) best_ceph: Option<Contender>,
    /// The cluster's operations a second over those.
    pub(crate) ceph_ratio: Option<f64>,
    pub(crate) ceph_wanted: f64,
    /// The cluster's processor time an operation over that of Ceph through librbd: daemons only on both sides.
    pub(crate) ceph_cpu_ratio: Option<f64>,
    /// Over Vitastor's figure, where there is one for the row.
    pub(crate) vitastor_cpu_ratio: Option<f64>,
    /// Over Crucible's.
    pub(crate) crucible_cpu_ratio: Option<f64>,
    /// The mean latency with three copies over that with one.
    pub(crate) single_latency_ratio: Option<f64>,
    /// The most that may be, in the row that it is asked of.
    pub(crate) single_latency_wanted: Option<f64>,
}

/// The cluster has to give so many times Ceph's reads a second...
const CEPH_READS_WANTED: f64 = 4.0;
/// ...and so many times its writes...
const CEPH_WRITES_WANTED: f64 = 10.0;
/// ...with at most this part of Vitastor's processor time...
const VITASTOR_CPU_WANTED: f64 = 0.5;
/// ...and, in the row [`LATENCY_ROW`], at most this many times the latency of one copy.
const SINGLE_LATENCY_WANTED: f64 = 2.5;
const LATENCY_ROW: &str = "write-rand-4k-qd1";

impl ClusterStanding {
    /// None without Ceph.
    pub(crate) fn meets_speed(&self) -> Option<bool> {
        self.ceph_ratio.map(|ratio| ratio >= self.ceph_wanted)
    }

    /// None in a row that Vitastor has no figure of.
    pub(crate) fn meets_cpu(&self) -> Option<bool> {
        self.vitastor_cpu_ratio
            .map(|ratio| ratio <= VITASTOR_CPU_WANTED)
    }

    /// None in a row of which it is not asked, or without the single daemon.
    pub(crate) fn meets_latency(&self) -> Option<bool> {
        self.single_latency_ratio
            .zip(self.single_latency_wanted)
            .map(|(ratio, wanted)| ratio <= wanted)
    }
}

/// Compares the cluster with Ceph and the reference figures; None when the cluster is missing.
pub(crate) fn cluster_standing(
    row: &Row,
    figures: &BTreeMap<Contender, Figures>,
) -> Option<ClusterStanding> {
    let ours = figures.get(&Contender::Cluster)?;
    let best = [Contender::CephRbd, Contender::CephNbd]
        .into_iter()
        .filter_map(|way| Some((way, figures.get(&way)?)))
        .max_by(|(_, one), (_, other)| {
            one.operations_per_second
                .total_cmp(&other.operations_per_second)
        });
    let cpu_over = |theirs: Option<f64>| Some(ours.server_cpu_us? / theirs?);
    let reference = |system: &System| system.row(row.name).map(|figures| figures.cpu_us);
    let single = figures.get(&Contender::Single);
    Some(ClusterStanding {
        best_ceph: best.map(|(way, _)| way),
        ceph_ratio: best.map(|(_, ceph)| ours.operations_per_second / ceph.operations_per_second),
        ceph_wanted: if row.is_read() {
            CEPH_READS_WANTED
        } else {
            CEPH_WRITES_WANTED
        },
        ceph_cpu_ratio: cpu_over(
            figures
                .get(&Contender::CephRbd)
                .and_then(|ceph| ceph.server_cpu_us),
        ),
        vitastor_cpu_ratio: cpu_over(reference(&VITASTOR)),
        crucible_cpu_ratio: cpu_over(reference(&CRUCIBLE)),
        single_latency_ratio: single.map(|single| ours.mean_us / single.mean_us),
        single_latency_wanted: (row.name == LATENCY_ROW).then_some(SINGLE_LATENCY_WANTED),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::ROWS;

    fn at(operations_per_second: f64, server_cpu_us: Option<f64>) -> Figures {
        Figures {
            operations_per_second,
            server_cpu_us,
            ..Figures::default()
        }
    }

    #[test]
    fn the_fastest_and_the_leanest_peer_may_differ() {
        let figures = BTreeMap::from([
            (Contender::Ashlar, at(130.0, Some(4.0))),
            (Contender::Nbdkit, at(100.0, Some(10.0))),
            (Contender::NbdServer, at(50.0, Some(5.0))),
        ]);
        let standing = standing(Contender::Ashlar, &ROWS[4], &figures).unwrap();
        assert_eq!(standing.best_peer, Contender::Nbdkit);
        assert_eq!(standing.ratio, 1.3);
        assert_eq!(standing.cpu_ratio, Some(0.8));
        assert!(standing.meets_speed && standing.meets_cpu);
    }

    #[test]
    fn the_bare_file_excuses_a_row_bound_by_the_device_but_not_one_that_must_beat_it() {
        let figures = BTreeMap::from([
            (Contender::Ashlar, at(95.0, Some(4.0))),
            (Contender::QemuNone, at(94.0, Some(10.0))),
            (Contender::Bare, at(100.0, None)),
        ]);
        assert!(
            standing(Contender::Ashlar, &ROWS[0], &figures)
                .unwrap()
                .meets_speed
        );
        assert!(
            ROWS[6].must_beat_bare
                && !standing(Contender::Ashlar, &ROWS[6], &figures)
                    .unwrap()
                    .meets_speed
        );
    }

    #[test]
    fn a_cluster_is_held_against_the_faster_way_to_ceph_and_the_figures_from_elsewhere() {
        let with_latency = |figures: Figures, mean_us: f64| Figures { mean_us, ..figures };
        let figures = BTreeMap::from([
            (
                Contender::Cluster,
                with_latency(at(5000.0, Some(130.0)), 250.0),
            ),
            (Contender::Single, with_latency(at(20_000.0, None), 50.0)),
            (Contender::CephRbd, at(400.0, Some(1300.0))),
            (Contender::CephNbd, at(500.0, Some(2600.0))),
        ]);
        let row = ROWS.iter().find(|row| row.name == LATENCY_ROW).unwrap();
        let standing = cluster_standing(row, &figures).unwrap();
        assert_eq!(standing.best_ceph, Some(Contender::CephNbd));
        assert_eq!(standing.ceph_ratio, Some(10.0));
        assert_eq!(standing.ceph_cpu_ratio, Some(0.1));
        assert_eq!(standing.vitastor_cpu_ratio, Some(0.5));
        assert_eq!(standing.single_latency_ratio, Some(5.0));
        assert_eq!(standing.meets_speed(), Some(true));
        assert_eq!(standing.meets_cpu(), Some(true));
        assert_eq!(standing.meets_latency(), Some(false));
    }

    #[test]
    fn what_is_missing_is_not_judged() {
        let figures = BTreeMap::from([(Contender::Cluster, at(5000.0, Some(130.0)))]);
        let standing = cluster_standing(&ROWS[2], &figures).unwrap();
        assert_eq!(standing.meets_speed(), None);
        assert_eq!(standing.meets_cpu(), None);
        assert_eq!(standing.meets_latency(), None);
        assert!(cluster_standing(&ROWS[2], &BTreeMap::new()).is_none());
    }
}
