use super::*;
use crate::records::Record;
use crate::records::sample::read_volume;

fn ext4() -> FilesystemType {
    FilesystemType::parse("ext4").expect("type")
}

const ONE: Uuid = Uuid::from_u128(0x11);
const OTHER: Uuid = Uuid::from_u128(0x22);

#[test]
fn a_blank_volume_is_formatted_once() {
    let mut volume = read_volume();
    assert!(matches!(
        end_format(&volume, ONE),
        Err(FormatError::NotBegun { .. })
    ));
    let (begun, _) = begin_format(&volume, &ext4(), ONE, false)
        .expect("blank")
        .expect("new");
    volume.record = VolumeRecord::decode("k", &begun.encode()).expect("decodes");
    // mkfs wrote, and was killed.
    let (written, _) = mark_written(&volume).expect("was not written");
    volume.record = written;
    assert_eq!(mark_written(&volume), None);
    assert_eq!(
        begin_format(&volume, &ext4(), ONE, true),
        Ok(None),
        "again, with the same UUID"
    );
    let xfs = FilesystemType::parse("xfs").expect("type");
    for (kind, uuid) in [(ext4(), OTHER), (xfs, ONE)] {
        assert!(matches!(
            begin_format(&volume, &kind, uuid, true),
            Err(FormatError::Other {
                state: FilesystemState::Formatting,
                ..
            })
        ));
    }
    assert!(matches!(
        end_format(&volume, OTHER),
        Err(FormatError::Other { .. })
    ));
    let (ended, _) = end_format(&volume, ONE).expect("begun").expect("new");
    volume.record = ended;
    assert_eq!(end_format(&volume, ONE), Ok(None));
    for uuid in [ONE, OTHER] {
        assert!(matches!(
            begin_format(&volume, &ext4(), uuid, true),
            Err(FormatError::Other {
                state: FilesystemState::Formatted,
                ..
            })
        ));
    }
}

#[test]
fn a_volume_that_may_hold_data_is_never_formatted() {
    let mut volume = read_volume();
    assert!(matches!(
        begin_format(&volume, &ext4(), ONE, true),
        Err(FormatError::Written { .. })
    ));
    volume.record.never_written = false;
    assert!(matches!(
        begin_format(&volume, &ext4(), ONE, false),
        Err(FormatError::Written { .. })
    ));
    // A record of a version that did not keep this is of unknown history.
    let old = String::from_utf8(volume.record.encode()).expect("text");
    assert!(!old.contains("never_written"));
    volume.record.state = VolumeState::Deleting;
    assert!(matches!(
        begin_format(&volume, &ext4(), ONE, false),
        Err(FormatError::Deleting { .. })
    ));
}

#[test]
fn a_first_write_and_a_format_cannot_both_win() {
    let volume = read_volume();
    let (_, format) = begin_format(&volume, &ext4(), ONE, false)
        .expect("blank")
        .expect("new");
    let (_, write) = mark_written(&volume).expect("was not written");
    assert_eq!(
        format.conditions, write.conditions,
        "each relies on the record as it was read"
    );
}

#[test]
fn types_are_words() {
    for good in ["ext4", "xfs", "btrfs", "fuse_x-1"] {
        assert!(FilesystemType::parse(good).is_ok());
    }
    for bad in ["", "Ext4", "ext4 -F", "../x", "é", &"x".repeat(33)] {
        assert!(FilesystemType::parse(bad).is_err(), "{bad:?}");
    }
}
