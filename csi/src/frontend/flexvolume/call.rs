//! What a kubelet or a controller manager says on the command line, and what is answered on standard output.
//!
//! The argument lists are those that Kubernetes passes (`pkg/volume/flexvolume`), which are not in all those of its
//! documentation.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::capability::Filesystem;
use crate::frontend::Wish;
use crate::mount_options;
use crate::refusal::Refusal;

/// Keys of Kubernetes' own start with it.
const OWN_KEYS: &str = "kubernetes.io/";
const FILESYSTEM: &str = "kubernetes.io/fsType";
const READ_WRITE: &str = "kubernetes.io/readwrite";
/// The volume's name or id.
const VOLUME: &str = "volume";
/// Options for mount(8), with commas between.
const MOUNT_OPTIONS: &str = "mountOptions";

/// A command and its arguments, checked as far as that goes without asking anybody.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// `init`
    Init,
    /// `getvolumename JSON`
    Name(Options),
    /// `mount DIRECTORY JSON`
    Mount {
        /// The pod's directory, not checked.
        directory: String,
        /// Which volume and how.
        options: Options,
    },
    /// `unmount DIRECTORY`
    Unmount {
        /// The pod's directory, not checked.
        directory: String,
    },
    /// `expandvolume JSON DEVICE NEW OLD`
    ExpandVolume {
        /// Which volume.
        options: Options,
        /// At least.
        size_bytes: u64,
    },
    /// `expandfs JSON DEVICE DIRECTORY NEW OLD`
    ExpandFilesystem {
        /// Which volume.
        options: Options,
        /// Where it is mounted, not checked.
        directory: String,
        /// At least.
        size_bytes: u64,
    },
    /// A command that this driver leaves to Kubernetes, because nothing is attached by a controller.
    NotSupported,
}

/// The options of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Name or id.
    pub volume: String,
    /// How it is mounted.
    pub wish: Wish,
}

/// Every command there is, also those that are not supported.
pub const COMMANDS: [&str; 12] = [
    "init",
    "attach",
    "detach",
    "waitforattach",
    "isattached",
    "mountdevice",
    "unmountdevice",
    "mount",
    "unmount",
    "getvolumename",
    "expandvolume",
    "expandfs",
];

impl Call {
    /// Reads a command line, without the program's name.
    pub fn parse(arguments: &[String]) -> Result<Call, Refusal> {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        match arguments.as_slice() {
            ["init"] => Ok(Call::Init),
            ["getvolumename", json] => Ok(Call::Name(Options::parse(json)?)),
            ["mount", directory, json] => Ok(Call::Mount {
                directory: (*directory).to_owned(),
                options: Options::parse(json)?,
            }),
            ["unmount", directory] => Ok(Call::Unmount {
                directory: (*directory).to_owned(),
            }),
            ["expandvolume", json, _device, new, _old] => Ok(Call::ExpandVolume {
                options: Options::parse(json)?,
                size_bytes: size(new)?,
            }),
            ["expandfs", json, _device, directory, new, _old] => Ok(Call::ExpandFilesystem {
                options: Options::parse(json)?,
                directory: (*directory).to_owned(),
                size_bytes: size(new)?,
            }),
            [
                "attach" | "detach" | "waitforattach" | "isattached" | "mountdevice"
                | "unmountdevice",
                ..,
            ] => Ok(Call::NotSupported),
            [command, rest @ ..] if COMMANDS.contains(command) => Err(Refusal::invalid(format!(
                "{command} does not take {} arguments",
                rest.len()
            ))),
            // What a later Kubernetes may ask.
            [_, ..] => Ok(Call::NotSupported),
            [] => Err(Refusal::invalid("no command is given")),
        }
    }
}

fn size(text: &str) -> Result<u64, Refusal> {
    text.parse()
        .ok()
        .filter(|bytes| *bytes != 0)
        .ok_or_else(|| Refusal::invalid(format!("{text:?} is not a number of bytes")))
}

impl Options {
    /// Reads the options of a volume. An unknown key is refused, except those of Kubernetes' own.
    pub fn parse(json: &str) -> Result<Options, Refusal> {
        // Never with the text: it may have secrets.
        let given: BTreeMap<String, String> = serde_json::from_str(json).map_err(|_| {
            Refusal::invalid("the options are not a JSON object of strings".to_owned())
        })?;
        let mut volume = None;
        let mut wish = Wish::default();
        for (key, value) in given {
            match key.as_str() {
                VOLUME if !value.is_empty() => volume = Some(value),
                MOUNT_OPTIONS => {
                    wish.options = mount_options::split(&value);
                    mount_options::check(&wish.options)?;
                }
                FILESYSTEM if value.is_empty() => {}
                FILESYSTEM => {
                    wish.filesystem = Some(value.parse::<Filesystem>().map_err(Refusal::invalid)?);
                }
                READ_WRITE => {
                    wish.read_only = match value.as_str() {
                        "ro" => true,
                        "rw" | "" => false,
                        _ => {
                            return Err(Refusal::invalid(format!(
                                "{READ_WRITE} is neither rw nor ro"
                            )));
                        }
                    }
                }
                key if key.starts_with(OWN_KEYS) => {}
                key => return Err(Refusal::invalid(format!("there is no option {key:?}"))),
            }
        }
        let volume = volume.ok_or_else(|| {
            Refusal::invalid(format!(
                "the option {VOLUME:?}, a volume's name or id, is missing"
            ))
        })?;
        Ok(Options { volume, wish })
    }
}

/// What is answered: one line of JSON.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Answer {
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<String>,
    #[serde(rename = "volumeName", skip_serializing_if = "Option::is_none")]
    volume_name: Option<String>,
    #[serde(rename = "volumeNewSize", skip_serializing_if = "Option::is_none")]
    volume_new_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    capabilities: Option<Capabilities>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct Capabilities {
    attach: bool,
    #[serde(rename = "selinuxRelabel")]
    selinux_relabel: bool,
    #[serde(rename = "supportsMetrics")]
    supports_metrics: bool,
    #[serde(rename = "fsGroup")]
    fs_group: bool,
    #[serde(rename = "requiresFSResize")]
    requires_fs_resize: bool,
}

impl Answer {
    /// It is done.
    pub fn success() -> Answer {
        Answer {
            status: "Success",
            ..Answer::default()
        }
    }

    /// To `init`: nothing is attached by a controller, what is mounted has a file system of its own with files that the
    /// kubelet may give to a group, label and count, and which has to be grown after the volume was.
    pub fn capabilities() -> Answer {
        Answer {
            capabilities: Some(Capabilities {
                attach: false,
                selinux_relabel: true,
                supports_metrics: true,
                fs_group: true,
                requires_fs_resize: true,
            }),
            ..Answer::success()
        }
    }

    /// To `getvolumename`.
    pub fn named(name: String) -> Answer {
        Answer {
            volume_name: Some(name),
            ..Answer::success()
        }
    }

    /// To `expandvolume`, `expandfs`.
    pub fn sized(size_bytes: u64) -> Answer {
        Answer {
            volume_new_size: Some(size_bytes),
            ..Answer::success()
        }
    }

    /// It is not done, and why.
    pub fn failure(message: impl Into<String>) -> Answer {
        Answer {
            status: "Failure",
            message: Some(message.into()),
            ..Answer::default()
        }
    }

    /// Kubernetes does what it does by itself, and does not ask again.
    pub fn not_supported() -> Answer {
        Answer {
            status: "Not supported",
            ..Answer::default()
        }
    }

    /// Whether the program ends with 0.
    pub fn is_success(&self) -> bool {
        self.status == "Success"
    }

    /// As it is printed.
    pub fn to_json(&self) -> String {
        // Strings, numbers and booleans always serialise.
        serde_json::to_string(self).unwrap_or_else(|_| r#"{"status":"Failure"}"#.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &[&str]) -> Result<Call, Refusal> {
        let line: Vec<String> = line.iter().map(|each| (*each).to_owned()).collect();
        Call::parse(&line)
    }

    const JSON: &str = r#"{"kubernetes.io/fsType":"xfs","kubernetes.io/readwrite":"ro","kubernetes.io/pvOrVolumeName":"pv",
        "kubernetes.io/pod.name":"p","kubernetes.io/secret/key":"c2VjcmV0","kubernetes.io/mounterArgs.FsGroup":"7",
        "volume":"v","mountOptions":"noatime,,nodiratime"}"#;

    fn options() -> Options {
        Options {
            volume: "v".into(),
            wish: Wish {
                filesystem: Some(Filesystem::Xfs),
                options: vec!["noatime".into(), "nodiratime".into()],
                read_only: true,
            },
        }
    }

    #[test]
    fn the_argument_lists_are_those_of_kubernetes() {
        let directory = "/pods/a".to_owned();
        let table: [(&[&str], Call); 14] = [
            (&["init"], Call::Init),
            (&["getvolumename", JSON], Call::Name(options())),
            (
                &["mount", "/pods/a", JSON],
                Call::Mount {
                    directory: directory.clone(),
                    options: options(),
                },
            ),
            (
                &["unmount", "/pods/a"],
                Call::Unmount {
                    directory: directory.clone(),
                },
            ),
            (
                &["expandvolume", JSON, "", "8192", "4096"],
                Call::ExpandVolume {
                    options: options(),
                    size_bytes: 8192,
                },
            ),
            (
                &["expandfs", JSON, "", "/pods/a", "8192", "4096"],
                Call::ExpandFilesystem {
                    options: options(),
                    directory,
                    size_bytes: 8192,
                },
            ),
            (&["attach", JSON, "node"], Call::NotSupported),
            (&["detach", "pv", "node"], Call::NotSupported),
            (&["waitforattach", "/dev/x", JSON], Call::NotSupported),
            (&["isattached", JSON, "node"], Call::NotSupported),
            (&["mountdevice", "/d", "/dev/x", JSON], Call::NotSupported),
            (&["unmountdevice", "/d"], Call::NotSupported),
            (&["somethingnew", "x"], Call::NotSupported),
            (&["attach"], Call::NotSupported),
        ];
        for (line, call) in table {
            assert_eq!(parse(line), Ok(call), "{line:?}");
        }
        let bad: [&[&str]; 8] = [
            &[],
            &["init", "x"],
            &["mount", "/pods/a"],
            &["mount", JSON, "/pods/a"],
            &["unmount"],
            &["getvolumename"],
            &["expandvolume", JSON, "", "8Gi", "4096"],
            &["expandfs", JSON, "", "/pods/a", "-1", "0"],
        ];
        for line in bad {
            parse(line).expect_err(&format!("{line:?}"));
        }
    }

    #[test]
    fn options_are_checked_and_never_repeated() {
        for bad in [
            "",
            "[]",
            r#"{"volume":1}"#,
            "{}",
            r#"{"volume":""}"#,
            r#"{"volume":"v","kubernetes.io/fsType":"ntfs"}"#,
            r#"{"volume":"v","kubernetes.io/readwrite":"wo"}"#,
            r#"{"volume":"v","replica":"3"}"#,
            r#"{"volume":"v","mountOptions":"noatime,logdev=/dev/sda"}"#,
            r#"{"volume":"v","mountOptions":"errors=panic"}"#,
            r#"{"volume":"v","mountOptions":"context=\"a,bind"}"#,
        ] {
            Options::parse(bad).expect_err(bad);
        }
        let secret = Options::parse(r#"{"kubernetes.io/secret/k":"hidden""#).expect_err("cut");
        assert!(!secret.message.contains("hidden"), "{secret}");
        let plain = Options::parse(
            r#"{"volume":"v","kubernetes.io/fsType":"","kubernetes.io/readwrite":"rw"}"#,
        );
        assert_eq!(plain.expect("plain").wish, Wish::default());
    }

    #[test]
    fn answers_are_exact() {
        let table = [
            (
                Answer::capabilities(),
                r#"{"status":"Success","capabilities":{"attach":false,"selinuxRelabel":true,"supportsMetrics":true,"fsGroup":true,"requiresFSResize":true}}"#,
            ),
            (Answer::success(), r#"{"status":"Success"}"#),
            (
                Answer::named("v".into()),
                r#"{"status":"Success","volumeName":"v"}"#,
            ),
            (
                Answer::sized(4096),
                r#"{"status":"Success","volumeNewSize":4096}"#,
            ),
            (
                Answer::failure("no \"x\"\n"),
                r#"{"status":"Failure","message":"no \"x\"\n"}"#,
            ),
            (Answer::not_supported(), r#"{"status":"Not supported"}"#),
        ];
        for (answer, text) in table {
            assert_eq!(answer.to_json(), text);
        }
    }
}
