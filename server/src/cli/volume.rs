//! `ashlar volume …`

mod answers;

use std::io;

use ashlar_proto::admin::{
    CreateVolumeRequest, DeleteVolumeRequest, GetVolumeRequest, ListVolumesRequest, Listener,
    ListenerKind, OpenVolumeRequest, RenameVolumeRequest, ResizeVolumeRequest, SetVolumeRequest,
    VolumeLimits, Zones,
};

use answers::{Changed, Deleted, Resized, Shown, VolumeList};

use crate::config::Address;

use super::{
    args::{Format, SetArgs, VolumeCommand},
    attach::{AttachLines, is_secured},
    confirm::confirmed,
    connect::Daemon,
    error::{CliError, Exit},
    output, progress, publication,
    size::{NewSize, human},
    view::Volume,
};

pub(super) async fn run(
    daemon: &mut Daemon,
    format: Format,
    command: VolumeCommand,
) -> Result<(), CliError> {
    match command {
        VolumeCommand::Create {
            name,
            size,
            write_through,
            read_only,
            replicas,
            min_in_sync,
            zone,
            iops,
            bps,
        } => {
            let limits = VolumeLimits {
                iops: iops.unwrap_or(0),
                bytes_per_second: bps.map_or(0, |bytes| bytes.0),
            };
            let request = CreateVolumeRequest {
                limits: Some(limits),
                name,
                size_bytes: size.0,
                read_only,
                write_through,
                replicas: replicas.unwrap_or(0),
                min_in_sync: min_in_sync.unwrap_or(0),
                zones: zone,
                ..CreateVolumeRequest::default()
            };
            let volume = required(
                daemon
                    .client
                    .create_volume(request)
                    .await?
                    .into_inner()
                    .volume,
            )?;
            say_if_rounded(size.0, volume.size_bytes);
            output::print(
                format,
                &Changed {
                    verb: "created",
                    volume,
                },
            )
        }
        VolumeCommand::List => {
            let answer = daemon
                .client
                .list_volumes(ListVolumesRequest::default())
                .await?
                .into_inner();
            output::print(
                format,
                &VolumeList {
                    volumes: answer.volumes.into_iter().map(Volume::from).collect(),
                },
            )
        }
        VolumeCommand::Show { volume } => {
            let answer = daemon
                .client
                .get_volume(GetVolumeRequest { volume })
                .await?
                .into_inner();
            let volume = required(answer.volume)?;
            output::print(
                format,
                &Shown {
                    attach: attach_lines(&volume, &answer.nbd_listeners),
                    volume,
                },
            )
        }
        VolumeCommand::Open { volume } => {
            let request = OpenVolumeRequest {
                volume,
                ..OpenVolumeRequest::default()
            };
            let answer = daemon.client.open_volume(request).await?;
            let volume = required(answer.into_inner().volume)?;
            output::print(
                format,
                &Changed {
                    verb: "served here",
                    volume,
                },
            )
        }
        VolumeCommand::Resize { volume, size } => resize(daemon, format, volume, size).await,
        VolumeCommand::Rename { volume, new_name } => {
            let request = RenameVolumeRequest { volume, new_name };
            let volume = required(
                daemon
                    .client
                    .rename_volume(request)
                    .await?
                    .into_inner()
                    .volume,
            )?;
            output::print(
                format,
                &Changed {
                    verb: "renamed to",
                    volume,
                },
            )
        }
        VolumeCommand::Delete { volumes, yes } => delete(daemon, format, volumes, yes).await,
        VolumeCommand::Unpublish { volume, node } => {
            publication::unpublish(daemon, format, volume, node).await
        }
        VolumeCommand::Disconnect { volume } => {
            publication::disconnect(daemon, format, volume).await
        }
        VolumeCommand::Set(SetArgs {
            volume,
            read_only,
            write_through,
            iops,
            bps,
            min_in_sync,
            zone,
            all_zones,
        }) => {
            let request = SetVolumeRequest {
                volume,
                read_only,
                write_through,
                iops,
                bytes_per_second: bps.map(|bytes| bytes.0),
                min_in_sync,
                zones: (all_zones || !zone.is_empty()).then_some(Zones { names: zone }),
            };
            let volume = required(daemon.client.set_volume(request).await?.into_inner().volume)?;
            output::print(
                format,
                &Changed {
                    verb: "changed",
                    volume,
                },
            )
        }
    }
}

/// The message every answer about a volume must hold.
fn required(volume: Option<ashlar_proto::admin::Volume>) -> Result<Volume, CliError> {
    volume.map(Volume::from).ok_or_else(|| {
        CliError::new(
            Exit::Failed,
            "the daemon's answer holds no volume: it is of another version",
        )
    })
}

fn say_if_rounded(asked_bytes: u64, got_bytes: u64) {
    if asked_bytes != got_bytes {
        output::note(format_args!(
            "{asked_bytes} bytes is not a multiple of the 4096-byte block: rounded up to {got_bytes} bytes"
        ));
    }
}

async fn resize(
    daemon: &mut Daemon,
    format: Format,
    volume: String,
    size: NewSize,
) -> Result<(), CliError> {
    let (volume, size_bytes) = match size {
        NewSize::Absolute(size) => (volume, size.0),
        NewSize::More(more) => {
            let answer = daemon
                .client
                .get_volume(GetVolumeRequest { volume })
                .await?
                .into_inner();
            let now = required(answer.volume)?;
            let size_bytes = now.size_bytes.checked_add(more.0).ok_or_else(|| {
                CliError::new(Exit::Usage, "the sum is more bytes than 64 bits can count")
            })?;
            // By id from here on, so that a rename in between cannot lead to another volume.
            (now.id, size_bytes)
        }
    };
    let answer = daemon
        .client
        .resize_volume(ResizeVolumeRequest { volume, size_bytes })
        .await?
        .into_inner();
    let volume = required(answer.volume)?;
    say_if_rounded(size_bytes, volume.size_bytes);
    let connections = volume.runtime.map_or(0, |runtime| runtime.connections);
    if connections > 0 && volume.size_bytes != answer.previous_size_bytes {
        output::note(format_args!(
            "{connections} client(s) are connected and do not know the new size: NBD cannot tell them. Detach a kernel \
             device ('nbd-client -d /dev/nbdN') and attach it again"
        ));
    }
    output::print(
        format,
        &Resized {
            previous_size_bytes: answer.previous_size_bytes,
            volume,
        },
    )
}

async fn delete(
    daemon: &mut Daemon,
    format: Format,
    volumes: Vec<String>,
    yes: bool,
) -> Result<(), CliError> {
    // Ids first: what was confirmed is what is deleted, and a wrong name stops everything before anything is gone.
    let mut found = Vec::with_capacity(volumes.len());
    for volume in volumes {
        let answer = daemon
            .client
            .get_volume(GetVolumeRequest { volume })
            .await?
            .into_inner();
        found.push(required(answer.volume)?);
    }
    if !yes && !confirm(&found)? {
        return Err(CliError::new(Exit::Refused, "nothing was deleted"));
    }
    let mut deleted = Deleted {
        deleted: Vec::with_capacity(found.len()),
    };
    for volume in found {
        let spinner = progress::spinner(format!(
            "deleting {} ({})",
            volume.name,
            human(volume.size_bytes)
        ));
        let result = daemon
            .client
            .delete_volume(DeleteVolumeRequest {
                volume: volume.id.clone(),
            })
            .await;
        spinner.finish_and_clear();
        if let Err(status) = result {
            if !deleted.deleted.is_empty() {
                output::print(format, &deleted)?;
            }
            return Err(status.into());
        }
        deleted.deleted.push(volume);
    }
    output::print(format, &deleted)
}

fn confirm(volumes: &[Volume]) -> io::Result<bool> {
    let what: Vec<String> = volumes
        .iter()
        .map(|volume| {
            format!(
                "{}  {}  created {}",
                volume.name,
                human(volume.size_bytes),
                volume.created_at
            )
        })
        .collect();
    let question = match volumes {
        [_] => "Delete it with all data? There is no way back.",
        _ => "Delete them with all data? There is no way back.",
    };
    confirmed(&what, question)
}

/// Lines for the listener that suits a client on this machine best: a Unix socket if there is one. None for a volume that
/// no client can open here.
fn attach_lines(volume: &Volume, listeners: &[Listener]) -> Option<AttachLines> {
    if !volume.publications.is_empty() || !volume.not_served_reason.is_empty() {
        return None;
    }
    let mut addresses: Vec<Address> = listeners
        .iter()
        .filter(|listener| listener.kind() == ListenerKind::Nbd)
        .filter_map(|listener| listener.address.parse().ok())
        .collect();
    // Then one in the clear, which every client can use.
    addresses.sort_by_key(|address| (!matches!(address, Address::Unix(_)), is_secured(address)));
    addresses
        .first()
        .map(|address| AttachLines::new(address, &volume.name, volume.read_only))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::output::Answer;

    fn volume() -> Volume {
        Volume::from(ashlar_proto::admin::Volume {
            id: "67e55044-10b1-426f-9247-bb680e5fe0c8".into(),
            name: "data".into(),
            size_bytes: 1 << 30,
            replicas: 1,
            state: ashlar_proto::admin::VolumeState::Active.into(),
            ..Default::default()
        })
    }

    fn listener(kind: ListenerKind, address: &str) -> Listener {
        Listener {
            kind: kind.into(),
            address: address.into(),
        }
    }

    fn table(answer: &impl Answer) -> String {
        let mut out = Vec::new();
        answer.write_table(&mut out).expect("writes to memory");
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn a_unix_socket_is_preferred_and_other_listeners_are_not_nbd() {
        let listeners = [
            listener(ListenerKind::Admin, "unix:/d/admin.sock"),
            listener(ListenerKind::Nbd, "tcp:127.0.0.1:10809"),
            listener(ListenerKind::Nbd, "unix:/d/nbd.sock"),
        ];
        let lines = attach_lines(&volume(), &listeners).expect("lines");
        assert_eq!(lines.uri, "nbd+unix:///data?socket=/d/nbd.sock");
        assert_eq!(attach_lines(&volume(), &listeners[..1]), None);
        let listeners = [
            listener(ListenerKind::Nbd, "tcp:10.0.0.11:10809"),
            listener(ListenerKind::Nbd, "tcp:127.0.0.1:10809"),
        ];
        let lines = attach_lines(&volume(), &listeners).expect("lines");
        assert_eq!(lines.uri, "nbd://127.0.0.1:10809/data");
    }

    #[test]
    fn show_tells_everything_once() {
        let attach = attach_lines(
            &volume(),
            &[listener(ListenerKind::Nbd, "unix:/d/nbd.sock")],
        );
        let shown = Shown {
            attach,
            volume: volume(),
        };
        let text = table(&shown);
        for part in [
            "Size:",
            "1073741824 bytes (1 GiB)",
            "nbd-client -unix",
            "qemu-img",
            "nbdcopy",
            "nbdfuse",
            "fio --name",
        ] {
            assert_eq!(text.matches(part).count(), 1, "{part} in\n{text}");
        }
        let json = serde_json::to_value(&shown).expect("serialises");
        assert_eq!(json["name"], "data");
        assert_eq!(json["attach"]["uri"], "nbd+unix:///data?socket=/d/nbd.sock");
        assert_eq!(json.get("runtime"), None);
    }

    #[test]
    fn a_volume_that_is_not_served_here_says_where_it_can_be_attached() {
        let listeners = [listener(ListenerKind::Nbd, "unix:/d/nbd.sock")];
        let mut elsewhere = volume();
        elsewhere.not_served_reason = "node n-2 serves it".into();
        elsewhere.head_node_id = "n-2".into();
        elsewhere.served_elsewhere = true;
        let attach = attach_lines(&elsewhere, &listeners);
        assert_eq!(attach, None);
        let shown = Shown {
            attach,
            volume: elsewhere,
        };
        let text = table(&shown);
        for part in [
            "ask node n-2",
            "Attach it at node n-2, or serve it here: ashlar volume open data",
        ] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
        assert!(!text.contains("nbd-client"), "{text}");
        let json = serde_json::to_value(&shown).expect("serialises");
        assert_eq!(json.get("attach"), None);

        let mut failed = volume();
        failed.not_served_reason = "its store is gone".into();
        let attach = attach_lines(&failed, &listeners);
        let text = table(&Shown {
            attach,
            volume: failed,
        });
        assert!(text.contains("ashlar explain data"), "{text}");
    }

    #[test]
    fn the_list_tells_who_serves() {
        let volumes = [
            ("", false),
            ("node n-2 serves it", true),
            ("its store is gone", false),
        ];
        let volumes = volumes.map(|(reason, served_elsewhere)| Volume {
            not_served_reason: reason.to_owned(),
            served_elsewhere,
            head_node_id: "n-2".to_owned(),
            ..volume()
        });
        let text = table(&VolumeList {
            volumes: volumes.into(),
        });
        let column = text.find("SERVED BY").expect("a column");
        let cells: Vec<&str> = text
            .lines()
            .map(|line| line[column..].trim_start())
            .collect();
        for (cell, served) in cells
            .iter()
            .zip(["SERVED BY", "this node", "n-2 ", "nobody"])
        {
            assert!(cell.starts_with(served), "{served} in\n{text}");
        }
    }

    #[test]
    fn changes_are_told_in_a_line() {
        let text = table(&Changed {
            verb: "created",
            volume: volume(),
        });
        assert_eq!(
            text,
            "created data: 1 GiB, write-back, id 67e55044-10b1-426f-9247-bb680e5fe0c8\n"
        );
        let text = table(&Resized {
            previous_size_bytes: 1 << 29,
            volume: volume(),
        });
        assert_eq!(
            text,
            "resized data from 512 MiB to 1073741824 bytes (1 GiB)\n"
        );
    }
}
