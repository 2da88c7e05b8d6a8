//! To which zones the copies of a volume are confined.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::change::rewrite;
use super::{
    ConfigureError, LABEL_MAX_BYTES, Transaction, Versioned, VolumeRecord, VolumeState, check_label,
};

/// The label of a node that tells its zone: what fails together.
pub const ZONE_LABEL: &str = "zone";
/// Most zones that a volume is confined to; a record stays small.
pub const ZONES_MAX: usize = 16;

/// The zones whose nodes may hold copies of a volume; with none named all may, those without a zone too.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Zones(BTreeSet<String>);

/// Zones that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ZonesError {
    /// No node can have that label.
    #[error(
        "{0:?} is no zone: lower-case letters, digits, '-', '_', '.' and '/', at most {LABEL_MAX_BYTES}, as in a node's label {ZONE_LABEL}=NAME"
    )]
    Name(String),
    /// Too many of them.
    #[error("{0} zones were named, and a volume is confined to at most {ZONES_MAX}")]
    TooMany(usize),
    /// There are no nodes to choose from.
    #[error(
        "zones are those of a cluster's nodes, and this daemon is on its own; `ashlar cluster init` makes it the first of a cluster"
    )]
    NoCluster,
}

impl Zones {
    /// The zones of these names; one that is named twice counts once.
    pub fn check(names: impl IntoIterator<Item = String>) -> Result<Zones, ZonesError> {
        let names: BTreeSet<String> = names.into_iter().collect();
        if names.len() > ZONES_MAX {
            return Err(ZonesError::TooMany(names.len()));
        }
        for name in &names {
            check_label(name).map_err(|_| ZonesError::Name(name.clone()))?;
        }
        Ok(Zones(names))
    }

    /// No zone is named: copies may lie on every node.
    pub fn are_all(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a node of this zone, or of none, may hold copies.
    pub fn allow(&self, zone: Option<&str>) -> bool {
        self.are_all() || zone.is_some_and(|zone| self.0.contains(zone))
    }

    /// Whether every place that `others` allow is allowed here.
    pub fn include(&self, others: &Zones) -> bool {
        self.are_all() || (!others.are_all() && others.0.is_subset(&self.0))
    }

    /// Those that are named, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}

impl fmt::Display for Zones {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.names().collect();
        f.write_str(&names.join(", "))
    }
}

/// Decides to which zones a volume's copies are confined from now on. Those that lie elsewhere are moved; nobody has to
/// disconnect. `None`: it is so already.
pub fn set_zones(
    current: &Versioned<VolumeRecord>,
    zones: &Zones,
) -> Result<Option<(VolumeRecord, Transaction)>, ConfigureError> {
    let record = &current.record;
    if record.state == VolumeState::Deleting {
        return Err(ConfigureError::Deleting {
            name: record.name.clone(),
        });
    }
    if record.zones == *zones {
        return Ok(None);
    }
    if !record.placement.is_replicated() {
        let name = record.name.clone();
        return Err(ConfigureError::OneCopy { name });
    }
    let confined = VolumeRecord {
        zones: zones.clone(),
        ..record.clone()
    };
    let transaction = rewrite(current, &confined);
    Ok(Some((confined, transaction)))
}

#[cfg(test)]
mod tests {
    use super::super::sample::volume;
    use super::super::{Placement, Record, Revision};
    use super::*;
    use crate::units::{NodeId, StoreId};
    use uuid::Uuid;

    fn zones(names: &[&str]) -> Zones {
        Zones::check(names.iter().map(|name| (*name).to_owned())).expect("zones")
    }

    #[test]
    fn none_named_is_everywhere_and_a_name_is_a_label() {
        let everywhere = zones(&[]);
        assert!(everywhere.are_all() && everywhere.allow(None) && everywhere.allow(Some("a")));
        let two = zones(&["b", "a", "b"]);
        assert!(two.allow(Some("a")) && two.allow(Some("b")));
        assert!(!two.allow(Some("c")) && !two.allow(None) && !two.are_all());
        assert_eq!(two.to_string(), "a, b");
        assert!(two.include(&two) && two.include(&zones(&["a"])) && everywhere.include(&two));
        assert!(!zones(&["a"]).include(&two) && !two.include(&everywhere));
        let wrong = |name: &str| Zones::check([name.to_owned()]);
        assert_eq!(wrong("A"), Err(ZonesError::Name("A".to_owned())));
        assert!(wrong("").is_err() && wrong("a,b").is_err());
        let many = (0..=ZONES_MAX).map(|n| format!("z{n}"));
        assert_eq!(Zones::check(many), Err(ZonesError::TooMany(ZONES_MAX + 1)));
    }

    #[test]
    fn a_volume_is_confined_once_and_only_where_it_has_places() {
        let (node, store) = (NodeId(Uuid::from_u128(2)), StoreId(Uuid::from_u128(7)));
        let alone = Placement {
            stores: vec![store],
            sets: Vec::new(),
        };
        let at = |placement: Placement| Versioned {
            record: VolumeRecord {
                placement,
                ..volume()
            },
            changed_at: Revision(3),
        };
        let single = at(alone.clone());
        assert_eq!(
            set_zones(&single, &zones(&["a"])),
            Err(ConfigureError::OneCopy {
                name: single.record.name.clone()
            })
        );
        assert_eq!(set_zones(&single, &Zones::default()), Ok(None));
        let of_cluster = at(alone.into_sets(node));
        let (confined, _) = set_zones(&of_cluster, &zones(&["a"]))
            .expect("allowed")
            .expect("new");
        assert_eq!(confined.zones, zones(&["a"]));
        assert_eq!(confined.check_invariants(), Ok(()));
        let stored = String::from_utf8(confined.encode()).expect("text");
        assert!(stored.contains(r#""zones":["a"]"#), "{stored}");
        let again = Versioned {
            record: confined,
            changed_at: Revision(4),
        };
        assert_eq!(set_zones(&again, &zones(&["a"])), Ok(None));
    }
}
