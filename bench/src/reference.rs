//! Figures of other replicated storage, read off a like machine (two cores, stores on tmpfs, three copies) with their
//! own clients and without NBD, except where it says otherwise. They are no part of a run: nothing here measures them.

/// What a system gave in one row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct ReferenceFigures {
    /// The row's name.
    row: &'static str,
    /// Processor time an operation over its three storage daemons.
    pub(crate) cpu_us: f64,
    pub(crate) operations_per_second: Option<f64>,
}

/// A system and its figures.
#[derive(Clone, Copy, Debug)]
pub(crate) struct System {
    /// With its version, and what was measured of it.
    pub(crate) title: &'static str,
    figures: [ReferenceFigures; 4],
}

impl System {
    /// Its figures of a row; None where there are none.
    pub(crate) fn row(&self, name: &str) -> Option<ReferenceFigures> {
        self.figures.into_iter().find(|figures| figures.row == name)
    }
}

const fn figures(
    row: &'static str,
    cpu_us: f64,
    operations_per_second: Option<f64>,
) -> ReferenceFigures {
    ReferenceFigures {
        row,
        cpu_us,
        operations_per_second,
    }
}

/// Vitastor by its native client.
pub(crate) const VITASTOR: System = System {
    title: "Vitastor 3.0.8",
    figures: [
        figures("write-rand-4k-qd1", 260.0, Some(3800.0)),
        figures("write-rand-4k-qd32", 86.0, Some(13_500.0)),
        figures("read-rand-4k-qd1", 86.0, Some(5600.0)),
        figures("read-rand-4k-qd32", 28.0, Some(40_000.0)),
    ],
};

/// Crucible: three downstairs and its NBD server.
pub(crate) const CRUCIBLE: System = System {
    title: "Crucible",
    figures: [
        figures("write-rand-4k-qd1", 246.0, Some(5900.0)),
        figures("write-rand-4k-qd32", 213.0, Some(7000.0)),
        figures("read-rand-4k-qd1", 324.0, Some(3900.0)),
        figures("read-rand-4k-qd32", 310.0, Some(4700.0)),
    ],
};

/// Ceph by librbd. A run measures Ceph itself; this tells whether it went as elsewhere.
pub(crate) const CEPH: System = System {
    title: "Ceph 16.2",
    figures: [
        figures("write-rand-4k-qd1", 2300.0, None),
        figures("write-rand-4k-qd32", 1300.0, None),
        figures("read-rand-4k-qd1", 320.0, None),
        figures("read-rand-4k-qd32", 100.0, None),
    ],
};

/// All of them, as they are printed.
pub(crate) const ALL: [System; 3] = [VITASTOR, CRUCIBLE, CEPH];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::ROWS;

    #[test]
    fn every_figure_is_of_a_row_that_is_measured() {
        for system in ALL {
            for figures in system.figures {
                let known = ROWS.iter().any(|row| row.name == figures.row);
                assert!(known, "{}: {}", system.title, figures.row);
            }
        }
    }
}
