//! How to reach a volume: the exact lines for the clients people use.

use serde::Serialize;

use crate::config::{Address, HostPort};

/// The NBD URI of an export, as uri.md of the NBD project defines it.
fn uri(address: &Address, export: &str) -> String {
    match address {
        Address::Unix(path) => {
            format!(
                "nbd+unix:///{}?socket={}",
                escape(export),
                escape(&path.to_string_lossy())
            )
        }
        Address::Tcp(host_port) => format!("nbd://{host_port}/{}", escape(export)),
    }
}

/// Percent-encodes what may not stand in a path or a query of a URI. `/` stays: it is allowed in both.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => {
                out.push(byte as char)
            }
            _ => out += &format!("%{byte:02X}"),
        }
    }
    out
}

/// Quotes a word for a POSIX shell where it needs it.
fn quote(word: &str) -> String {
    let plain = |c: char| {
        c.is_ascii_alphanumeric()
            || matches!(c, '-' | '_' | '.' | '/' | ':' | '=' | ',' | '+' | '@')
    };
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// Quotes a value inside a comma-separated option of qemu, where a comma is doubled.
fn qemu_value(value: &str) -> String {
    value.replace(',', ",,")
}

/// One command line each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct AttachLines {
    pub(super) uri: String,
    pub(super) nbd_client: String,
    pub(super) nbd_client_detach: String,
    pub(super) qemu_system: String,
    pub(super) qemu_img: String,
    pub(super) qemu_nbd: String,
    pub(super) nbdinfo: String,
    pub(super) nbdcopy: String,
    pub(super) nbdfuse: String,
    pub(super) fio: String,
}

impl AttachLines {
    pub(super) fn new(address: &Address, export: &str, read_only: bool) -> AttachLines {
        let uri = uri(address, export);
        let quoted = quote(&uri);
        // The kernel's sector size on the device becomes a block, so that file systems align themselves to it; four
        // connections let the kernel spread its queues, which is safe because a flush on one covers writes on all.
        let kernel = if read_only {
            "-block-size 4096 -connections 4 -readonly"
        } else {
            "-block-size 4096 -connections 4"
        };
        let nbd_client = match address {
            Address::Unix(path) => {
                format!(
                    "sudo nbd-client -unix {} -name {} {kernel} /dev/nbd0",
                    quote(&path.to_string_lossy()),
                    quote(export)
                )
            }
            Address::Tcp(HostPort { host, port }) => {
                format!(
                    "sudo nbd-client {} {port} -name {} {kernel} /dev/nbd0",
                    quote(host),
                    quote(export)
                )
            }
        };
        let server = match address {
            Address::Unix(path) => {
                format!(
                    "server.type=unix,server.path={}",
                    qemu_value(&path.to_string_lossy())
                )
            }
            Address::Tcp(HostPort { host, port }) => {
                format!(
                    "server.type=inet,server.host={},server.port={port}",
                    qemu_value(host)
                )
            }
        };
        let mut drive = format!(
            "driver=nbd,{server},export={},if=virtio,cache=none,discard=unmap,detect-zeroes=unmap",
            qemu_value(export)
        );
        if read_only {
            drive += ",readonly=on";
        }
        let read_only_flag = if read_only { " --read-only" } else { "" };
        let nbdcopy = if read_only {
            format!(
                "nbdcopy --progress {quoted} {}",
                quote(&format!("{export}.raw"))
            )
        } else {
            format!("nbdcopy --progress image.raw {quoted}")
        };
        AttachLines {
            nbd_client,
            nbd_client_detach: "sudo nbd-client -d /dev/nbd0".into(),
            qemu_system: format!("qemu-system-x86_64 ... -drive {}", quote(&drive)),
            qemu_img: format!("qemu-img info {quoted}"),
            qemu_nbd: format!(
                "sudo qemu-nbd --connect=/dev/nbd0 --format=raw{read_only_flag} {quoted}"
            ),
            nbdinfo: format!("nbdinfo {quoted}"),
            nbdcopy,
            nbdfuse: format!(
                "mkdir -p mnt && nbdfuse{} mnt/{} {quoted}",
                if read_only { " -r" } else { "" },
                quote(export)
            ),
            // Reads only: whoever pastes this into a shell keeps his data.
            fio: format!(
                "fio --name={} --ioengine=nbd --uri={quoted} --rw=randread --bs=4k --iodepth=32 --time_based --runtime=10",
                quote(export)
            ),
            uri,
        }
    }

    /// Label and line, in the order they are shown.
    pub(super) fn labelled(&self) -> [(&'static str, &str); 10] {
        [
            ("URI", &self.uri),
            ("Kernel device", &self.nbd_client),
            ("  and detach", &self.nbd_client_detach),
            ("Virtual machine", &self.qemu_system),
            ("Image info", &self.qemu_img),
            ("Kernel by qemu", &self.qemu_nbd),
            ("Inspect", &self.nbdinfo),
            ("Copy", &self.nbdcopy),
            ("As a file", &self.nbdfuse),
            ("Measure", &self.fio),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_become_uris() {
        for (address, uri) in [
            (
                "unix:/run/ashlar/nbd.sock",
                "nbd+unix:///data?socket=/run/ashlar/nbd.sock",
            ),
            (
                "unix:/tmp/a b?.sock",
                "nbd+unix:///data?socket=/tmp/a%20b%3F.sock",
            ),
            ("tcp:127.0.0.1:10809", "nbd://127.0.0.1:10809/data"),
            ("tcp:[::1]:10809", "nbd://[::1]:10809/data"),
        ] {
            assert_eq!(super::uri(&address.parse().expect(address), "data"), uri);
        }
    }

    #[test]
    fn lines_of_a_unix_socket() {
        let lines = AttachLines::new(&Address::Unix("/run/ashlar/nbd.sock".into()), "data", false);
        assert_eq!(
            lines.nbd_client,
            "sudo nbd-client -unix /run/ashlar/nbd.sock -name data -block-size 4096 -connections 4 /dev/nbd0"
        );
        assert_eq!(
            lines.qemu_system,
            "qemu-system-x86_64 ... -drive driver=nbd,server.type=unix,server.path=/run/ashlar/nbd.sock,export=data,\
             if=virtio,cache=none,discard=unmap,detect-zeroes=unmap"
        );
        assert_eq!(
            lines.fio,
            "fio --name=data --ioengine=nbd --uri='nbd+unix:///data?socket=/run/ashlar/nbd.sock' --rw=randread --bs=4k \
             --iodepth=32 --time_based --runtime=10"
        );
        assert_eq!(
            lines.nbdcopy,
            "nbdcopy --progress image.raw 'nbd+unix:///data?socket=/run/ashlar/nbd.sock'"
        );
    }

    #[test]
    fn lines_of_tcp_and_of_a_read_only_volume() {
        let lines = AttachLines::new(
            &"tcp:[::1]:10809".parse().expect("an address"),
            "data",
            true,
        );
        assert_eq!(
            lines.nbd_client,
            "sudo nbd-client ::1 10809 -name data -block-size 4096 -connections 4 -readonly /dev/nbd0"
        );
        assert!(
            lines.qemu_system.ends_with(",readonly=on"),
            "{}",
            lines.qemu_system
        );
        assert_eq!(
            lines.nbdcopy,
            "nbdcopy --progress 'nbd://[::1]:10809/data' data.raw"
        );
    }

    #[test]
    fn odd_paths_are_quoted() {
        let lines = AttachLines::new(&Address::Unix("/tmp/it's, here.sock".into()), "data", false);
        assert!(
            lines
                .nbd_client
                .contains(r"-unix '/tmp/it'\''s, here.sock' "),
            "{}",
            lines.nbd_client
        );
        assert!(
            lines
                .qemu_system
                .contains(r"server.path=/tmp/it'\''s,, here.sock,export"),
            "{}",
            lines.qemu_system
        );
    }
}
