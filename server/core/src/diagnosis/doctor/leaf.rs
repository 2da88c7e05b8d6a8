//! The leaf of several copies: whether they say the same, and if not, which of them are wrong.

use crate::store::{BlockContent, BlockSum, LeafSums};
use crate::units::Version;

/// One copy's leaf in a few bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeafDigest {
    /// The same for the same content: versions do not count, and neither does how a block came to be zeros.
    pub content: u64,
}

/// The digest of a leaf.
pub fn digest(sums: &LeafSums) -> LeafDigest {
    // FNV-1a: what is compared comes from our own stores, not from somebody who would make two leaves meet.
    let mut content = 0xcbf2_9ce4_8422_2325_u64;
    let mut is_zeros = true;
    for (block, sum) in (0u16..).zip(sums) {
        if sum.state.reads_as_zeros() {
            continue;
        }
        is_zeros = false;
        let lost = u8::from(sum.state.content == BlockContent::Lost);
        let bytes = block.to_le_bytes().into_iter().chain([lost]);
        for byte in bytes.chain(sum.crc.to_le_bytes()) {
            content = (content ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    // A leaf that was never written is not even listed.
    LeafDigest {
        content: if is_zeros { 0 } else { content },
    }
}

/// Whether two copies read the same. A block that one of them knows to be damaged is read from the other, and mended
/// then.
fn is_same(one: &BlockSum, other: &BlockSum) -> bool {
    let lost = |sum: &BlockSum| sum.state.content == BlockContent::Lost;
    (one.state.reads_as_zeros() && other.state.reads_as_zeros())
        || lost(one)
        || lost(other)
        || (one.state.content == other.state.content && one.crc == other.crc)
}

/// What two looks at a leaf of several copies tell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeafVerdict {
    /// Blocks that differ for certain.
    pub blocks: u32,
    /// Copies, by their place, that are wrong in some of them.
    pub wrong: Vec<usize>,
    /// It can be told which copies are wrong for each of them, and they have older versions.
    pub is_mendable: bool,
    /// Blocks that differ and changed between the looks: a write may be on its way.
    pub changing: u32,
}

/// Compares the leaf of several copies, each looked at twice with more time between than a write may take: what is
/// answered, or given up on, by then is the same on all that still count. So a block that differs and did not change is
/// one that will not become the same by itself. Two blocks of one version that differ are that at once: a version is
/// never used twice.
pub fn compare(first: &[LeafSums], second: &[LeafSums]) -> LeafVerdict {
    let mut verdict = LeafVerdict {
        is_mendable: true,
        ..LeafVerdict::default()
    };
    let blocks = second.iter().map(Vec::len).min().unwrap_or(0);
    for block in 0..blocks {
        let now: Vec<&BlockSum> = second.iter().map(|copy| &copy[block]).collect();
        if now.iter().all(|sum| is_same(now[0], sum)) && pairwise_same(&now) {
            continue;
        }
        let is_settled = first
            .iter()
            .zip(&now)
            .all(|(before, now)| before.get(block) == Some(*now));
        let is_twice = now.iter().enumerate().any(|(at, one)| {
            now[..at]
                .iter()
                .any(|other| one.state.version == other.state.version && !is_same(one, other))
        });
        if !is_settled && !is_twice {
            verdict.changing += 1;
            continue;
        }
        verdict.blocks += 1;
        let newest = now.iter().map(|sum| sum.state.version).max();
        let newest = newest.unwrap_or(Version::NONE);
        let have = |at: &usize| now[*at].state.version == newest;
        let right: Vec<usize> = (0..now.len()).filter(have).collect();
        let agree = right.iter().all(|at| is_same(now[right[0]], now[*at]));
        if !agree {
            verdict.is_mendable = false;
            continue;
        }
        for at in 0..now.len() {
            if !is_same(now[right[0]], now[at]) && !verdict.wrong.contains(&at) {
                verdict.wrong.push(at);
            }
        }
    }
    verdict.wrong.sort_unstable();
    if verdict.blocks == 0 || verdict.wrong.is_empty() || verdict.wrong.len() == second.len() {
        // Every copy is wrong somewhere: none of them can be filled from another as a whole.
        verdict.is_mendable = false;
    }
    if verdict.wrong.len() == second.len() {
        verdict.wrong.clear();
    }
    verdict
}

/// With damaged blocks among them, that all are like the first does not make them alike.
fn pairwise_same(sums: &[&BlockSum]) -> bool {
    sums.iter()
        .enumerate()
        .all(|(at, one)| sums[..at].iter().all(|other| is_same(one, other)))
}

#[cfg(test)]
mod tests;
