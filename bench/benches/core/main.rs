//! What the deciding half spends on the path of one 4 KiB operation, without sockets and disks:
//! `cargo bench -p ashlar-bench`.

mod memory_disk;
mod store;

use std::hint::black_box;

use ashlar_core::nbd::request::RawRequest;
use ashlar_core::nbd::session::{ReplyStyle, Session};
use ashlar_core::units::VolumeId;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

const BLOCK_BYTES: usize = 4096;
/// Enough different blocks that no single one stays in the first-level cache, as payloads from a socket do not.
const BLOCKS: usize = 256;

fn checksum(criterion: &mut Criterion) {
    let blocks: Vec<u8> = (0..BLOCKS * BLOCK_BYTES)
        .map(|at| (at * 31 % 251) as u8)
        .collect();
    let mut group = criterion.benchmark_group("checksum");
    group.throughput(Throughput::Bytes(BLOCK_BYTES as u64));
    let mut turn = 0;
    group.bench_function("crc32 of a block", |bencher| {
        bencher.iter(|| {
            turn = (turn + 1) % BLOCKS;
            crc32fast::hash(black_box(&blocks[turn * BLOCK_BYTES..][..BLOCK_BYTES]))
        });
    });
    let mut copy = vec![0; BLOCK_BYTES];
    group.bench_function("copy of a block, to compare", |bencher| {
        bencher.iter(|| {
            turn = (turn + 1) % BLOCKS;
            copy.copy_from_slice(black_box(&blocks[turn * BLOCK_BYTES..][..BLOCK_BYTES]));
            black_box(&mut copy);
        });
    });
    group.finish();
}

/// A WRITE of a block, 4 KiB into the export; 28 bytes, or 32 in extended style.
fn write_header(style: ReplyStyle) -> Vec<u8> {
    let extended = style == ReplyStyle::Extended;
    let magic: u32 = if extended { 0x21e4_1c71 } else { 0x2560_9513 };
    // PAYLOAD_LEN is what an extended WRITE has to carry.
    let flags: u16 = if extended { 1 << 5 } else { 0 };
    let mut header = Vec::new();
    header.extend(magic.to_be_bytes());
    header.extend(flags.to_be_bytes());
    header.extend(1u16.to_be_bytes());
    header.extend(0x0102_0304_0506_0708_u64.to_be_bytes());
    header.extend((BLOCK_BYTES as u64).to_be_bytes());
    if extended {
        header.extend((BLOCK_BYTES as u64).to_be_bytes());
    } else {
        header.extend((BLOCK_BYTES as u32).to_be_bytes());
    }
    header
}

fn request(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("nbd request");
    for (name, style) in [
        ("structured", ReplyStyle::Structured),
        ("extended", ReplyStyle::Extended),
    ] {
        let session = Session {
            volume: VolumeId(uuid::Uuid::nil()),
            style,
            base_allocation: true,
            read_only: false,
            token: None,
            size_bytes: 1 << 30,
        };
        let header = write_header(style);
        group.bench_function(format!("parse and check, {name}"), |bencher| {
            bencher.iter(|| {
                let raw = RawRequest::parse(style, black_box(&header))
                    .expect("a whole header")
                    .expect("a request");
                raw.check(black_box(&session))
            });
        });
    }
    group.finish();
}

criterion_group!(benches, checksum, request, store::write);
criterion_main!(benches);
