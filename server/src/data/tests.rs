//! The whole data plane in one process: real stores on real files, clients on socket pairs.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use ashlar_core::nbd::request::{RawRequest, encode};
use ashlar_core::nbd::session::{Admitted, ReplyStyle, Session};
use ashlar_core::nbd::wire::{command, command_flag};
use ashlar_core::records::{Placement, VolumeLimits};
use ashlar_core::store::{OpenError, StoreError};
use ashlar_core::units::{Epoch, ExportToken, LayerId, NodeId, VolumeId};
use uuid::Uuid;

mod admission;
mod client;
mod epochs;
mod faults;
mod fragments;
mod pipelined;
mod random;
mod strange;
mod tails;

pub(crate) use self::client::{Client, Reply};
pub(crate) use self::random::Random;
use super::*;
use crate::engine::EngineChoice;
use crate::nbd::{Attach, AttachedClient, ConnectionCount};
use crate::stream::Stream;

mod payloads;

const MIB: u64 = 1 << 20;
const NODE: NodeId = NodeId(Uuid::from_u128(7));
pub(crate) const VOLUME: VolumeId = VolumeId(Uuid::from_u128(42));

fn anywhere() -> tempfile::TempDir {
    tempfile::tempdir().expect("dir")
}

/// Where the disk ends an operation as soon as it is asked for it; containers often have little room there.
fn in_memory() -> tempfile::TempDir {
    let room = rustix::fs::statvfs("/dev/shm").map_or(0, |fs| fs.f_bavail * fs.f_frsize);
    if room < 1024 * MIB {
        eprintln!("/dev/shm has no room for a store: this runs on a disk");
        return anywhere();
    }
    tempfile::tempdir_in("/dev/shm").expect("dir")
}

fn config(dir: &Path, stores: usize) -> DataConfig {
    let stores = (0..stores)
        .map(|i| StoreConfig {
            path: dir.join(format!("store-{i}")),
            expected: None,
            capacity_bytes: 1024 * MIB,
        })
        .collect();
    let mut config = DataConfig::new(NODE, dir.to_path_buf(), stores);
    config.tail_dir = Some(dir.to_path_buf());
    config.tail_bytes = 8 * MIB;
    config
}

fn spec(plane: &DataPlane, size_bytes: u64, epoch: u32) -> VolumeSpec {
    VolumeSpec {
        id: VOLUME,
        name: "v".to_owned(),
        size_bytes,
        layer: LayerId(1),
        epoch: Epoch(epoch),
        write_through: false,
        read_only: false,
        placement: Placement {
            // The first store comes twice, as one with more room does.
            stores: plane
                .stores()
                .iter()
                .chain(plane.stores().first())
                .map(|store| store.id)
                .collect(),
            sets: Vec::new(),
        },
        admitted: Admitted::Anyone,
        never_written: false,
        limits: VolumeLimits::default(),
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("runtime")
}

fn start(config: DataConfig) -> (tokio::runtime::Runtime, DataPlane) {
    let runtime = runtime();
    let plane = runtime.block_on(DataPlane::start(config)).expect("start");
    (runtime, plane)
}

/// Random requests of every kind against a model in memory, in one style on one engine.
fn like_the_model(
    style: ReplyStyle,
    engine: EngineChoice,
    stores: usize,
    seed: u64,
    dir: tempfile::TempDir,
) {
    let mut config = config(dir.path(), stores);
    config.engine = engine;
    let (runtime, plane) = start(config.clone());
    // Three chunks, the last one short.
    let size = 130 * MIB;
    runtime
        .block_on(plane.open_volume(spec(&plane, size, 1)))
        .expect("open");
    let mut client = Client::attach(&plane, style, size);
    let mut model = vec![0u8; size as usize];
    let mut random = Random(seed);
    for step in 0..400 {
        let base =
            [0, 64 * MIB - 20_000, 128 * MIB - 50_000, size - 40_000][random.below(4) as usize];
        let mut offset = base + random.below(40_000);
        let most = if random.below(20) == 0 {
            2 * MIB
        } else {
            30_000
        };
        let mut length = 1 + random.below(most);
        if random.below(2) == 0 {
            offset &= !4095;
            length = length.next_multiple_of(4096);
        }
        let length = length.min(size - offset);
        let range = offset as usize..(offset + length) as usize;
        let fua = if random.below(8) == 0 {
            command_flag::FUA
        } else {
            0
        };
        match random.below(10) {
            0..=3 => {
                let payload: Vec<u8> = (0..length).map(|_| random.next() as u8 | 1).collect();
                client.write(fua, offset, &payload);
                model[range].copy_from_slice(&payload);
            }
            4 => {
                let flags = if random.below(2) == 0 {
                    command_flag::NO_HOLE
                } else {
                    0
                };
                assert_eq!(
                    client.call(command::WRITE_ZEROES, flags | fua, offset, length, &[]),
                    Reply::Ok(vec![])
                );
                model[range].fill(0);
            }
            5 => {
                assert_eq!(
                    client.call(command::TRIM, fua, offset, length, &[]),
                    Reply::Ok(vec![])
                );
                let (first, end) = (
                    offset.next_multiple_of(4096),
                    (offset + length) / 4096 * 4096,
                );
                if first < end {
                    model[first as usize..end as usize].fill(0);
                }
            }
            6 => assert_eq!(client.call(command::FLUSH, 0, 0, 0, &[]), Reply::Ok(vec![])),
            7 => assert_eq!(
                client.call(command::CACHE, 0, offset, length, &[]),
                Reply::Ok(vec![])
            ),
            _ => {
                let flags = if style != ReplyStyle::Simple && random.below(3) == 0 {
                    command_flag::DF
                } else {
                    0
                };
                let got = client.call(command::READ, flags, offset, length, &[]);
                assert!(
                    got == Reply::Ok(model[range].to_vec()),
                    "step {step}: read {length} at {offset}"
                );
            }
        }
    }
    // Everything is there after a restart.
    drop(client);
    runtime.block_on(plane.drain());
    let (runtime, plane) = start(config);
    assert!(
        plane
            .stores()
            .iter()
            .all(|s| !s.formatted && s.report.clean)
    );
    runtime
        .block_on(plane.open_volume(spec(&plane, size, 2)))
        .expect("open");
    let mut client = Client::attach(&plane, style, size);
    for offset in (0..size).step_by(MIB as usize) {
        let range = offset as usize..(offset + MIB) as usize;
        assert!(
            client.read(offset, MIB) == model[range],
            "after the restart, at {offset}"
        );
    }
    runtime.block_on(plane.drain());
    assert!(client.is_closed());
}

#[test]
fn simple_replies_on_io_uring() {
    like_the_model(ReplyStyle::Simple, EngineChoice::Auto, 1, 1, anywhere());
}

#[test]
fn structured_replies_on_io_uring_over_two_stores() {
    like_the_model(ReplyStyle::Structured, EngineChoice::Auto, 2, 2, anywhere());
}

#[test]
fn extended_replies_over_two_stores_in_memory() {
    like_the_model(ReplyStyle::Extended, EngineChoice::Auto, 2, 4, in_memory());
}

#[test]
fn extended_replies_on_posix() {
    like_the_model(ReplyStyle::Extended, EngineChoice::Posix, 1, 3, anywhere());
}

#[test]
fn errors_leave_the_stream_in_step() {
    let dir = tempfile::tempdir().expect("dir");
    let (runtime, plane) = start(config(dir.path(), 1));
    let size = 64 * MIB;
    runtime
        .block_on(plane.open_volume(spec(&plane, size, 1)))
        .expect("open");
    for style in [
        ReplyStyle::Simple,
        ReplyStyle::Structured,
        ReplyStyle::Extended,
    ] {
        let mut client = Client::attach(&plane, style, size);
        // A refused write's payload is thrown away, however long.
        for len in [512, 4096, 1 << 20, 32 << 20] {
            assert_eq!(
                client.call(command::WRITE, 0, size - 100, len, &vec![1; len as usize]),
                Reply::Err(28),
                "{style:?} {len}"
            );
        }
        assert_eq!(
            client.call(command::READ, 0, size - 100, 101, &[]),
            Reply::Err(22)
        );
        assert_eq!(client.call(99, 0, 0, 0, &[]), Reply::Err(22));
        assert_eq!(
            client.call(
                command::WRITE_ZEROES,
                command_flag::FAST_ZERO | command_flag::NO_HOLE,
                0,
                4096,
                &[]
            ),
            Reply::Err(95)
        );
        for command in [
            command::READ,
            command::WRITE,
            command::TRIM,
            command::WRITE_ZEROES,
            command::CACHE,
        ] {
            assert_eq!(
                client.call(command, 0, 0, 0, &[]),
                Reply::Ok(vec![]),
                "{style:?}: nothing of {command}"
            );
        }
        client.write(0, 8, b"still in step");
        assert_eq!(client.read(8, 13), b"still in step");
    }
    // One client's nonsense ends that client only.
    let mut good = Client::attach(&plane, ReplyStyle::Simple, size);
    let mut bad = Client::attach(&plane, ReplyStyle::Simple, size);
    bad.stream.write_all(&[7; 64]).expect("send");
    assert!(bad.is_closed());
    good.write(0, 0, &[1; 4096]);
    runtime.block_on(plane.drain());
}

#[test]
fn block_status_tells_data_from_holes() {
    let dir = tempfile::tempdir().expect("dir");
    let (runtime, plane) = start(config(dir.path(), 1));
    let size = 192 * MIB;
    runtime
        .block_on(plane.open_volume(spec(&plane, size, 1)))
        .expect("open");
    let mut client = Client::attach(&plane, ReplyStyle::Structured, size);
    client.write(0, 4096, &[1; 8192]);
    client.write(0, 64 * MIB, &[1; 4096]);
    let Reply::Ok(status) = client.call(command::BLOCK_STATUS, 0, 100, size - 100, &[]) else {
        panic!("an error")
    };
    let words: Vec<u32> = status
        .chunks(4)
        .map(|w| u32::from_be_bytes(w.try_into().expect("four")))
        .collect();
    let rest = (size - 64 * MIB - 4096) as u32;
    assert_eq!(
        words,
        [
            1,
            3996,
            3,
            8192,
            0,
            (64 * MIB) as u32 - 12288,
            3,
            4096,
            0,
            rest,
            3
        ]
    );
    let Reply::Ok(status) = client.call(
        command::BLOCK_STATUS,
        command_flag::REQ_ONE,
        4096,
        8192,
        &[],
    ) else {
        panic!("an error")
    };
    assert_eq!(status, [0, 0, 0, 1, 0, 0, 0x20, 0, 0, 0, 0, 0]);
    runtime.block_on(plane.drain());
}

#[test]
fn volumes_grow_under_their_clients_and_close_only_when_told_to() {
    let dir = tempfile::tempdir().expect("dir");
    let (runtime, plane) = start(config(dir.path(), 1));
    let size = 64 * MIB;
    runtime
        .block_on(plane.open_volume(spec(&plane, size, 1)))
        .expect("open");
    assert_eq!(
        runtime.block_on(plane.open_volume(spec(&plane, size, 1))),
        Err(DataError::AlreadyOpen(VOLUME))
    );
    let mut client = Client::attach(&plane, ReplyStyle::Simple, size);
    assert_eq!(
        client.call(command::READ, 0, size, 4096, &[]),
        Reply::Err(22)
    );
    runtime
        .block_on(plane.resize_volume(VOLUME, 2 * size))
        .expect("grow");
    assert!(matches!(
        runtime.block_on(plane.resize_volume(VOLUME, size)),
        Err(DataError::Resize(_))
    ));
    client.write(0, size, &[3; 4096]);
    assert_eq!(
        runtime.block_on(plane.close_volume(VOLUME, false)),
        Err(DataError::InUse {
            volume: VOLUME,
            connections: 1
        })
    );
    runtime
        .block_on(plane.close_volume(VOLUME, true))
        .expect("close");
    assert!(client.is_closed());
    assert_eq!(
        runtime.block_on(plane.close_volume(VOLUME, true)),
        Err(DataError::NotOpen(VOLUME))
    );
    // Its layer can go; a volume opened on it again reads zeros.
    runtime
        .block_on(plane.delete_layer(LayerId(1)))
        .expect("drop");
    let mut again = spec(&plane, 2 * size, 2);
    again.layer = LayerId(2);
    runtime.block_on(plane.open_volume(again)).expect("open");
    let mut client = Client::attach(&plane, ReplyStyle::Simple, 2 * size);
    assert_eq!(client.read(size, 4096), vec![0; 4096]);
    runtime.block_on(plane.drain());
}

#[test]
fn a_failed_write_poisons_the_store_and_says_so() {
    let dir = tempfile::tempdir().expect("dir");
    let mut config = config(dir.path(), 1);
    let trigger = dir.path().join("now");
    config.fault = Some(
        format!("write:when={},errno=EIO", trigger.display())
            .parse()
            .expect("plan"),
    );
    let (runtime, plane) = start(config.clone());
    let size = 64 * MIB;
    runtime
        .block_on(plane.open_volume(spec(&plane, size, 1)))
        .expect("open");
    let mut client = Client::attach(&plane, ReplyStyle::Structured, size);
    client.write(command_flag::FUA, 0, &[1; 4096]);
    std::fs::write(&trigger, b"").expect("trigger");
    client.write(0, 4096, &[2; 4096]);
    assert_eq!(client.call(command::FLUSH, 0, 0, 0, &[]), Reply::Err(5));
    assert_eq!(
        client.call(command::WRITE, 0, 0, 4096, &[1; 4096]),
        Reply::Err(5)
    );
    assert_eq!(client.call(command::READ, 0, 0, 4096, &[]), Reply::Err(5));
    assert!(
        runtime.block_on(plane.store_statuses())[0]
            .status
            .poisoned
            .is_some()
    );
    let scrub = runtime.block_on(plane.start_scrub(plane.stores()[0].id, 1000));
    assert!(
        matches!(scrub, Err(DataError::Store(StoreError::Poisoned(_)))),
        "{scrub:?}"
    );
    runtime.block_on(plane.drain());
    // Nothing that was answered is lost: the tail has it.
    config.fault = None;
    let (runtime, plane) = start(config);
    runtime
        .block_on(plane.open_volume(spec(&plane, size, 2)))
        .expect("open");
    let mut client = Client::attach(&plane, ReplyStyle::Simple, size);
    assert_eq!(client.read(0, 4096), vec![1; 4096]);
    assert_eq!(client.read(4096, 4096), vec![2; 4096]);
    runtime.block_on(plane.drain());
}

/// What a client had sent when the drain began is carried out and answered, then the socket closes; nothing is lost.
#[test]
fn a_drain_answers_what_was_sent() {
    let dir = tempfile::tempdir().expect("dir");
    let config = config(dir.path(), 1);
    let (runtime, plane) = start(config.clone());
    let size = 64 * MIB;
    runtime
        .block_on(plane.open_volume(spec(&plane, size, 1)))
        .expect("open");
    let mut client = Client::attach(&plane, ReplyStyle::Simple, size);
    let mut out = Vec::new();
    for i in 0..40u64 {
        client.encode(
            &mut out,
            command::WRITE,
            0,
            i * 4096,
            4096,
            &[i as u8 + 1; 4096],
        );
    }
    client.stream.write_all(&out).expect("send");
    runtime.block_on(plane.drain());
    for _ in 0..40 {
        assert_eq!(client.reply(0, None).1, Reply::Ok(vec![]));
    }
    assert!(client.is_closed());
    let (runtime, plane) = start(config);
    assert!(plane.stores()[0].report.clean);
    runtime
        .block_on(plane.open_volume(spec(&plane, size, 2)))
        .expect("open");
    let mut client = Client::attach(&plane, ReplyStyle::Simple, size);
    for i in 0..40u64 {
        assert_eq!(client.read(i * 4096, 4096), vec![i as u8 + 1; 4096]);
    }
    runtime.block_on(plane.drain());
}

#[test]
fn stores_are_dealt_out_to_threads_and_a_volume_stays_on_one() {
    let dir = tempfile::tempdir().expect("dir");
    let mut config = config(dir.path(), 3);
    config.threads = 2;
    let (runtime, plane) = start(config);
    assert_eq!(plane.metrics().threads().len(), 2);
    let groups = plane.store_groups();
    assert_eq!(groups.iter().map(Vec::len).collect::<Vec<_>>(), [2, 1]);
    let size = 192 * MIB;
    assert_eq!(
        runtime.block_on(plane.open_volume(spec(&plane, size, 1))),
        Err(DataError::StoresApart)
    );
    // The second thread's volume, and one over both stores of the first.
    for group in groups {
        let mut spec = spec(&plane, size, 1);
        spec.placement.stores = group;
        runtime.block_on(plane.open_volume(spec)).expect("open");
        let mut client = Client::attach(&plane, ReplyStyle::Extended, size);
        for chunk in 0..3 {
            client.write(
                command_flag::FUA,
                chunk * 64 * MIB,
                &[chunk as u8 + 1; 8192],
            );
        }
        assert_eq!(client.call(command::FLUSH, 0, 0, 0, &[]), Reply::Ok(vec![]));
        for chunk in 0..3 {
            assert_eq!(
                client.read(chunk * 64 * MIB, 8192),
                vec![chunk as u8 + 1; 8192]
            );
        }
        drop(client);
        runtime
            .block_on(plane.close_volume(VOLUME, true))
            .expect("close");
    }
    runtime.block_on(plane.drain());
}
