//! A head whose epoch runs out of versions.

use ashlar_core::units::Version;
use ashlar_core::volume::EPOCH_RESERVE;

use super::*;

/// It asks in time, goes on under the new epoch, and what was written last counts, also after a restart.
#[test]
fn an_epoch_is_renewed_under_a_client() {
    let dir = tempfile::tempdir().expect("dir");
    let config = config(dir.path(), 1);
    let (runtime, plane) = start(config.clone());
    let size = 64 * MIB;
    runtime
        .block_on(plane.open_volume(spec(&plane, size, 1)))
        .expect("open");
    let near_the_end = Version::COUNTER_MAX - EPOCH_RESERVE - 10;
    runtime.block_on(plane.set_versions_given(VOLUME, near_the_end));
    let mut client = Client::attach(&plane, ReplyStyle::Simple, size);
    for i in 0..20u64 {
        client.write(0, i % 4 * 4096, &[i as u8; 4096]);
    }
    assert_eq!(runtime.block_on(plane.epoch_wanted()), Some(VOLUME));
    // A partial block takes the other way.
    client.write(0, 5 * 4096 + 7, &[5; 100]);
    runtime
        .block_on(plane.renew_epoch(VOLUME, Epoch(2)))
        .expect("renew");
    let status = runtime.block_on(plane.volume_status(VOLUME));
    assert_eq!(status.expect("open").epoch, Epoch(2));
    // A claim that is late changes nothing.
    runtime
        .block_on(plane.renew_epoch(VOLUME, Epoch(2)))
        .expect("nothing to do");
    for i in 20..26u64 {
        client.write(0, i % 4 * 4096, &[i as u8; 4096]);
    }
    runtime.block_on(plane.set_versions_given(VOLUME, Version::COUNTER_MAX));
    assert_eq!(
        client.call(command::WRITE, 0, 0, 4096, &[99; 4096]),
        Reply::Err(5)
    );
    // The refusal lasts until the epoch is renewed, and no longer.
    assert_eq!(runtime.block_on(plane.epoch_wanted()), Some(VOLUME));
    runtime
        .block_on(plane.renew_epoch(VOLUME, Epoch(3)))
        .expect("renew");
    client.write(0, 9 * 4096, &[9; 4096]);
    runtime.block_on(plane.drain());
    assert_eq!(runtime.block_on(plane.epoch_wanted()), None);

    let (runtime, plane) = start(config);
    runtime
        .block_on(plane.open_volume(spec(&plane, size, 4)))
        .expect("open");
    let mut client = Client::attach(&plane, ReplyStyle::Simple, size);
    for (block, wanted) in [24, 25, 22, 23].into_iter().enumerate() {
        assert_eq!(client.read(block as u64 * 4096, 4096), vec![wanted; 4096]);
    }
    assert_eq!(client.read(5 * 4096 + 6, 3), [0, 5, 5]);
    assert_eq!(client.read(9 * 4096, 4096), vec![9; 4096]);
    runtime.block_on(plane.drain());
}
