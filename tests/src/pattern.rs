//! Blocks that say what they are: volume, number, version, and a checksum over all of it.

/// Bytes of a block.
pub const BLOCK: usize = 4096;
const MAGIC: u64 = 0x6173_686c_6172_2d74;
/// Magic, volume, block, version.
const HEAD: usize = 32;

/// What a block on the volume turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// All zeros: never written, or trimmed.
    Zeros,
    /// One whole block of ours.
    Version(u64),
}

/// Fills `block` with version `version` of block `number`. `version` is not 0.
pub fn fill(block: &mut [u8], volume: u64, number: u64, version: u64) {
    assert_eq!(block.len(), BLOCK);
    for (at, word) in [MAGIC, volume, number, version].into_iter().enumerate() {
        block[at * 8..at * 8 + 8].copy_from_slice(&word.to_le_bytes());
    }
    // Every word depends on the version, so that a mixture of two versions shows in whatever word it happens.
    let mut word = version.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number.rotate_left(32);
    for piece in block[HEAD..BLOCK - 8].chunks_exact_mut(8) {
        word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
        piece.copy_from_slice(&word.to_le_bytes());
    }
    let sum = u64::from(crc32fast::hash(&block[..BLOCK - 8]));
    block[BLOCK - 8..].copy_from_slice(&sum.to_le_bytes());
}

/// `count` blocks from `first` on, all at `version`.
pub fn blocks(volume: u64, first: u64, count: u64, version: u64) -> Vec<u8> {
    let mut bytes = vec![0; count as usize * BLOCK];
    for (at, block) in bytes.chunks_exact_mut(BLOCK).enumerate() {
        fill(block, volume, first + at as u64, version);
    }
    bytes
}

/// What `block`, read from block `number`, is; or what is wrong with it.
pub fn identify(block: &[u8], volume: u64, number: u64) -> Result<Content, String> {
    assert_eq!(block.len(), BLOCK);
    if block.iter().all(|byte| *byte == 0) {
        return Ok(Content::Zeros);
    }
    let word = |at: usize| u64::from_le_bytes(block[at..at + 8].try_into().expect("8 bytes"));
    let version = word(24);
    let mut whole = vec![0; BLOCK];
    fill(&mut whole, volume, number, version);
    if whole == block {
        return Ok(Content::Version(version));
    }
    let first_bad = whole
        .iter()
        .zip(block)
        .position(|(a, b)| a != b)
        .expect("they differ");
    Err(format!(
        "block {number} is no version of itself: magic {:#x}, volume {:#x}, block {}, version {version:#x}, first wrong \
         byte {first_bad}",
        word(0),
        word(8),
        word(16),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_recognised_and_nothing_else_is() {
        let good = blocks(7, 3, 2, 9);
        assert_eq!(identify(&good[..BLOCK], 7, 3), Ok(Content::Version(9)));
        assert_eq!(identify(&good[BLOCK..], 7, 4), Ok(Content::Version(9)));
        assert_eq!(identify(&[0; BLOCK], 7, 3), Ok(Content::Zeros));
        assert!(identify(&good[..BLOCK], 7, 4).is_err(), "misplaced");
        assert!(identify(&good[..BLOCK], 8, 3).is_err(), "another volume's");
        let other = blocks(7, 3, 1, 10);
        for cut in [32, 512, 2048, 4088] {
            let mixed: Vec<u8> = good[..cut].iter().chain(&other[cut..]).copied().collect();
            assert!(identify(&mixed, 7, 3).is_err(), "torn at {cut}");
        }
        for at in (0..BLOCK).step_by(97) {
            let mut rotten = good[..BLOCK].to_vec();
            rotten[at] ^= 1;
            assert!(identify(&rotten, 7, 3).is_err(), "bit flipped in byte {at}");
        }
    }
}
