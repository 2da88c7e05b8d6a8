//! When everything is quiet, all replicas of a block are the same.

use std::collections::BTreeSet;

use super::Violation;
use crate::disk::{At, Disk};

pub(crate) fn check(disks: &[(usize, &Disk)], sets: u32, set: u32) -> Result<(), Violation> {
    let blocks: BTreeSet<At> = disks
        .iter()
        .flat_map(|(_, disk)| disk.blocks().map(|(at, _)| at))
        .filter(|(chunk, _)| chunk % sets == set)
        .collect();
    for at in blocks {
        let states: Vec<_> = disks
            .iter()
            .map(|(node, disk)| (*node, disk.get(at)))
            .collect();
        // Zeros are alike whatever their version: stores forget it where it does not matter.
        let key = |(_, cell): &(usize, Option<crate::disk::Cell>)| {
            cell.filter(|cell| cell.content != 0)
                .map(|cell| (cell.version, cell.content))
        };
        if states.windows(2).any(|two| key(&two[0]) != key(&two[1])) {
            return Err(Violation {
                promise: "replicas_are_identical",
                what: format!("block {at:?} differs: {states:?}"),
            });
        }
    }
    Ok(())
}
