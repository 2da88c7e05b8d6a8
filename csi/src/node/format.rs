//! Whether a filesystem may be made, decided without ever believing a blank disk.
//!
//! `blkid` says the same of a disk that was never written, of one that is missing and of one that answers errors, so what
//! it does *not* find proves nothing. What proves that nothing can be lost is the store: it knows whether a block of the
//! volume was ever written.

use uuid::Uuid;

use crate::capability::Filesystem;

/// What the volume's record says of its filesystem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Recorded {
    /// None was ever announced.
    Nothing,
    /// One was announced and may be half made; nobody has mounted it.
    Begun {
        /// As blkid names it.
        filesystem: String,
        /// The one it was to get.
        uuid: Uuid,
    },
    /// One was made.
    Made {
        /// As blkid names it.
        filesystem: String,
        /// Its own.
        uuid: Uuid,
    },
}

/// What was found on the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// No signature; the places where one would be could be read.
    Nothing,
    /// A signature.
    Signature {
        /// As blkid names it.
        kind: String,
        /// Empty when it has none.
        uuid: String,
    },
    /// A signature whose filesystem was never finished, as its own marks say: nobody can have mounted it. Told only of one
    /// that is recorded as begun.
    Unfinished {
        /// As blkid names it.
        kind: String,
        /// Its own.
        uuid: String,
    },
    /// The device could not be read, or has signatures of more than one kind.
    Unreadable(String),
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Announce a new UUID and make it.
    Make,
    /// What is there is of a mkfs that did not finish: discard it and make it again, with the same UUID.
    MakeAgain(Filesystem, Uuid),
    /// It is the one that was begun and it is whole, though nobody recorded that: record it, check it and mount it.
    Keep(Filesystem, Uuid),
    /// Check it and mount it.
    Use(Filesystem),
    /// Neither; why, and what a person can do.
    Refuse(Problem),
}

/// Why a volume can be neither mounted nor formatted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// Its filesystem is there no more, or cannot be read.
    #[error(
        "the volume has an {filesystem} (UUID {uuid}) whose superblock cannot be read ({why}); it is NOT formatted again. \
         Check the volume with `ashlar store scrub` and repair it by hand"
    )]
    Damaged {
        /// As recorded.
        filesystem: String,
        /// As recorded.
        uuid: Uuid,
        /// What was seen.
        why: String,
    },
    /// The device has another filesystem than the volume: a wrong device, or one that somebody changed.
    #[error("the device has {found} where the volume has {recorded}; it is not touched")]
    Other {
        /// As recorded.
        recorded: String,
        /// What was seen.
        found: String,
    },
    /// Its filesystem was begun and did not end, and somebody else wrote to it since.
    #[error(
        "making {begun} on the volume was begun and did not end, and the device has {found} now: somebody else wrote that, \
         and it is not touched. If it is needed, have the volume detached, open it by its name, which is read-only, and copy \
         it; then delete this volume"
    )]
    Overwritten {
        /// As recorded.
        begun: String,
        /// What was seen.
        found: String,
    },
    /// Written by somebody, without a filesystem this driver can use.
    #[error(
        "the volume was written to and {found}; it is not formatted, because that could destroy data. Use it as a raw \
         block volume, or delete it"
    )]
    Occupied {
        /// What was seen.
        found: String,
    },
    /// The caller wants another one than it has.
    #[error("the volume has {recorded} and {wanted} was asked for")]
    Unwanted {
        /// What it has.
        recorded: String,
        /// What was asked for.
        wanted: Filesystem,
    },
    /// It has none, and nothing may be written.
    #[error("the volume has no filesystem yet and is attached read-only; stage it writable once")]
    ReadOnly,
    /// The store says that nothing was written, and yet there is something.
    #[error(
        "the device has {0} although nothing was ever written to the volume: it is the wrong device"
    )]
    WrongDevice(String),
}

/// Decides. `wanted` is the filesystem asked for, `None` when the caller takes what is there; a new one is then `default`.
pub fn decide(
    recorded: &Recorded,
    found: &Found,
    ever_written: bool,
    wanted: Option<Filesystem>,
    default: Filesystem,
    read_only: bool,
) -> Decision {
    let filesystem = wanted.unwrap_or(default);
    match recorded {
        Recorded::Made {
            filesystem: kind,
            uuid,
        } => made(kind, *uuid, found, wanted),
        Recorded::Begun { .. } | Recorded::Nothing if read_only && !ever_written => {
            Decision::Refuse(Problem::ReadOnly)
        }
        Recorded::Begun {
            filesystem: kind,
            uuid,
        } => match kind.parse::<Filesystem>() {
            _ if read_only => Decision::Refuse(Problem::ReadOnly),
            Ok(kind) if kind == filesystem || wanted.is_none() => begun(kind, *uuid, found),
            _ => Decision::Refuse(Problem::Unwanted {
                recorded: kind.clone(),
                wanted: filesystem,
            }),
        },
        Recorded::Nothing if ever_written => written(found, wanted),
        Recorded::Nothing => match found {
            Found::Nothing => Decision::Make,
            Found::Signature { kind, .. } | Found::Unfinished { kind, .. } => {
                Decision::Refuse(Problem::WrongDevice(kind.clone()))
            }
            // Even though nothing is at stake: a device that cannot be read is no place for a filesystem.
            Found::Unreadable(why) => Decision::Refuse(Problem::Occupied {
                found: format!("cannot be read ({why})"),
            }),
        },
    }
}

/// One was announced. Until it is recorded as made only who has the secret name of a publication can write to the volume,
/// and that is the driver. So what has no signature is of our own mkfs; what has one is ours if it has our UUID, and worth
/// nothing only if it says itself that it was never finished.
fn begun(kind: Filesystem, uuid: Uuid, found: &Found) -> Decision {
    let is_own =
        |seen: &str, its: &str| seen == kind.name() && its.parse::<Uuid>().as_ref() == Ok(&uuid);
    match found {
        Found::Nothing => Decision::MakeAgain(kind, uuid),
        Found::Unfinished {
            kind: seen,
            uuid: its,
        } if is_own(seen, its) => Decision::MakeAgain(kind, uuid),
        Found::Signature {
            kind: seen,
            uuid: its,
        } if is_own(seen, its) => Decision::Keep(kind, uuid),
        Found::Signature {
            kind: seen,
            uuid: its,
        }
        | Found::Unfinished {
            kind: seen,
            uuid: its,
        } => Decision::Refuse(Problem::Overwritten {
            begun: format!("{kind} {uuid}"),
            found: format!("{seen} {its}").trim_end().to_owned(),
        }),
        Found::Unreadable(why) => Decision::Refuse(Problem::Damaged {
            filesystem: kind.to_string(),
            uuid,
            why: why.clone(),
        }),
    }
}

/// A filesystem is recorded: it has to be there, and be that one.
fn made(kind: &str, uuid: Uuid, found: &Found, wanted: Option<Filesystem>) -> Decision {
    let damaged = |why: &str| {
        Decision::Refuse(Problem::Damaged {
            filesystem: kind.to_owned(),
            uuid,
            why: why.to_owned(),
        })
    };
    let Found::Signature {
        kind: seen,
        uuid: seen_uuid,
    } = found
    else {
        return match found {
            Found::Unreadable(why) => damaged(why),
            Found::Unfinished { .. } => damaged("it says that it was never finished"),
            _ => damaged("there is none where it should be"),
        };
    };
    if seen != kind || seen_uuid.parse::<Uuid>() != Ok(uuid) {
        return Decision::Refuse(Problem::Other {
            recorded: format!("{kind} {uuid}"),
            found: format!("{seen} {seen_uuid}"),
        });
    }
    usable(kind, wanted)
}

/// Nothing is recorded, but somebody wrote: use what is there when it is something we can use, and never make anything.
fn written(found: &Found, wanted: Option<Filesystem>) -> Decision {
    match found {
        Found::Signature { kind, .. } if kind.parse::<Filesystem>().is_ok() => usable(kind, wanted),
        Found::Signature { kind, .. } | Found::Unfinished { kind, .. } => {
            Decision::Refuse(Problem::Occupied {
                found: format!("holds {kind}"),
            })
        }
        Found::Nothing => Decision::Refuse(Problem::Occupied {
            found: "holds no filesystem that can be recognised".to_owned(),
        }),
        Found::Unreadable(why) => Decision::Refuse(Problem::Occupied {
            found: format!("cannot be read ({why})"),
        }),
    }
}

fn usable(kind: &str, wanted: Option<Filesystem>) -> Decision {
    match (kind.parse::<Filesystem>(), wanted) {
        (Ok(kind), None) => Decision::Use(kind),
        (Ok(kind), Some(wanted)) if kind == wanted => Decision::Use(kind),
        (_, Some(wanted)) => Decision::Refuse(Problem::Unwanted {
            recorded: kind.to_owned(),
            wanted,
        }),
        (Err(_), None) => Decision::Refuse(Problem::Occupied {
            found: format!("holds {kind}"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Filesystem::{Ext4, Xfs};

    fn uuid() -> Uuid {
        Uuid::from_u128(7)
    }

    fn signature(kind: &str, uuid: &str) -> Found {
        Found::Signature {
            kind: kind.into(),
            uuid: uuid.into(),
        }
    }

    fn unfinished(kind: &str, uuid: &str) -> Found {
        Found::Unfinished {
            kind: kind.into(),
            uuid: uuid.into(),
        }
    }

    fn everything_found() -> Vec<Found> {
        vec![
            Found::Nothing,
            Found::Unreadable("EIO".into()),
            signature("ext4", &uuid().to_string()),
            signature("ext4", &Uuid::nil().to_string()),
            signature("xfs", &uuid().to_string()),
            signature("LVM2_member", "x"),
            unfinished("ext4", &uuid().to_string()),
            unfinished("ext4", &Uuid::nil().to_string()),
            unfinished("xfs", &uuid().to_string()),
        ]
    }

    fn everything_recorded() -> Vec<Recorded> {
        let filesystem = || "ext4".to_owned();
        vec![
            Recorded::Nothing,
            Recorded::Begun {
                filesystem: filesystem(),
                uuid: uuid(),
            },
            Recorded::Made {
                filesystem: filesystem(),
                uuid: uuid(),
            },
            Recorded::Made {
                filesystem: "btrfs".into(),
                uuid: uuid(),
            },
        ]
    }

    /// The one rule that must never break, over every combination there is.
    #[test]
    fn nothing_is_made_where_anything_could_be_lost() {
        for recorded in everything_recorded() {
            for found in everything_found() {
                for ever_written in [false, true] {
                    for wanted in [None, Some(Ext4), Some(Xfs)] {
                        for read_only in [false, true] {
                            let decision =
                                decide(&recorded, &found, ever_written, wanted, Ext4, read_only);
                            let case = format!(
                                "{recorded:?} {found:?} {ever_written} {wanted:?} {read_only}: {decision:?}"
                            );
                            match decision {
                                Decision::Make => assert!(
                                    recorded == Recorded::Nothing
                                        && found == Found::Nothing
                                        && !ever_written
                                        && !read_only,
                                    "{case}"
                                ),
                                // Nothing but what a mkfs of ours that did not end leaves.
                                Decision::MakeAgain(kind, own) => assert!(
                                    matches!(recorded, Recorded::Begun { .. })
                                        && !read_only
                                        && (found == Found::Nothing
                                            || found == unfinished(kind.name(), &own.to_string())),
                                    "{case}"
                                ),
                                Decision::Keep(kind, own) => assert!(
                                    matches!(recorded, Recorded::Begun { .. })
                                        && !read_only
                                        && found == signature(kind.name(), &own.to_string())
                                        && wanted.is_none_or(|wanted| wanted == kind),
                                    "{case}"
                                ),
                                Decision::Use(kind) => {
                                    assert!(
                                        matches!(&found, Found::Signature { kind: seen, .. } if seen == kind.name()),
                                        "{case}"
                                    );
                                    assert!(wanted.is_none_or(|wanted| wanted == kind), "{case}");
                                }
                                Decision::Refuse(_) => {}
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_blank_volume_is_formatted_and_a_damaged_one_is_not() {
        let made = Recorded::Made {
            filesystem: "ext4".into(),
            uuid: uuid(),
        };
        let begun = Recorded::Begun {
            filesystem: "ext4".into(),
            uuid: uuid(),
        };
        let whole = signature("ext4", &uuid().to_string());
        let decide = |recorded: &Recorded, found: &Found, written: bool| {
            decide(recorded, found, written, None, Ext4, false)
        };
        assert_eq!(
            decide(&Recorded::Nothing, &Found::Nothing, false),
            Decision::Make
        );
        assert_eq!(decide(&made, &whole, true), Decision::Use(Ext4));
        assert_eq!(decide(&begun, &whole, true), Decision::Keep(Ext4, uuid()));
        assert_eq!(
            decide(&begun, &unfinished("ext4", &uuid().to_string()), true),
            Decision::MakeAgain(Ext4, uuid())
        );
        assert_eq!(
            decide(&begun, &Found::Nothing, false),
            Decision::MakeAgain(Ext4, uuid())
        );
        // Written by somebody meanwhile, or the wrong device: one of the same kind too.
        for other in [
            signature("xfs", ""),
            signature("ext4", &Uuid::nil().to_string()),
            signature("ext4", ""),
            signature("xfs", &uuid().to_string()),
            unfinished("ext4", &Uuid::nil().to_string()),
            signature("a partition table (gpt)", ""),
        ] {
            assert!(
                matches!(
                    decide(&begun, &other, true),
                    Decision::Refuse(Problem::Overwritten { .. })
                ),
                "{other:?}"
            );
        }
        for damaged in [Found::Nothing, Found::Unreadable("EIO".into())] {
            assert!(matches!(
                decide(&made, &damaged, true),
                Decision::Refuse(Problem::Damaged { .. })
            ));
            // Even when the store claimed that nothing was written.
            assert!(matches!(
                decide(&made, &damaged, false),
                Decision::Refuse(Problem::Damaged { .. })
            ));
            assert!(matches!(
                decide(&Recorded::Nothing, &damaged, true),
                Decision::Refuse(Problem::Occupied { .. })
            ));
        }
        let other = signature("ext4", &Uuid::nil().to_string());
        assert!(matches!(
            decide(&made, &other, true),
            Decision::Refuse(Problem::Other { .. })
        ));
        assert!(matches!(
            decide(&Recorded::Nothing, &whole, false),
            Decision::Refuse(Problem::WrongDevice(_))
        ));
        assert_eq!(
            decide(&Recorded::Nothing, &whole, true),
            Decision::Use(Ext4)
        );
    }
}
