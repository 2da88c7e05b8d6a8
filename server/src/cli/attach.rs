//! How to reach a volume: the exact lines for the clients people use.

use std::net::IpAddr;

use serde::Serialize;

use crate::config::{Address, HostPort};

/// What stands for a directory of certificates, and how to get one.
const CERTIFICATES: &str = "DIR";
const MAKE_CERTIFICATES: &str = "ashlar cluster client-cert NAME --out DIR";

/// Whether the listener at this address answers nothing in the clear: one that others than this machine can reach.
pub(super) fn is_secured(address: &Address) -> bool {
    match address {
        Address::Unix(_) => false,
        Address::Tcp(HostPort { host, .. }) => match host.parse::<IpAddr>() {
            Ok(address) => !address.is_loopback(),
            Err(_) => host != "localhost",
        },
    }
}

/// The NBD URI of an export, as uri.md of the NBD project defines it; the parameter for certificates is libnbd's.
fn uri(address: &Address, export: &str) -> String {
    match address {
        Address::Unix(path) => {
            format!(
                "nbd+unix:///{}?socket={}",
                escape(export),
                escape(&path.to_string_lossy())
            )
        }
        Address::Tcp(HostPort { host, port }) if is_secured(address) => {
            // Every address of the machine is none that a certificate names.
            let host = match host.parse::<IpAddr>() {
                Ok(every) if every.is_unspecified() => "localhost".to_owned(),
                _ => host.clone(),
            };
            let server = HostPort { host, port: *port };
            format!(
                "nbds://{server}/{}?tls-certificates={CERTIFICATES}",
                escape(export)
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
pub(super) fn quote(word: &str) -> String {
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
    /// Where the listener wants TLS: what makes the certificates in DIR.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) certificates: Option<String>,
    /// Those of libnbd.
    pub(super) nbdinfo: String,
    pub(super) nbdcopy: String,
    pub(super) nbdfuse: String,
    /// Absent where the listener wants TLS: these take no directory of certificates with their address.
    #[serde(flatten)]
    pub(super) in_the_clear: Option<InTheClear>,
}

/// Lines of clients that know no TLS, or want it told in several options.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct InTheClear {
    pub(super) nbd_client: String,
    pub(super) nbd_client_detach: String,
    pub(super) qemu_system: String,
    pub(super) qemu_img: String,
    pub(super) qemu_nbd: String,
    pub(super) fio: String,
}

impl AttachLines {
    pub(super) fn new(address: &Address, export: &str, read_only: bool) -> AttachLines {
        let uri = uri(address, export);
        let quoted = quote(&uri);
        let nbdcopy = if read_only {
            format!(
                "nbdcopy --progress {quoted} {}",
                quote(&format!("{export}.raw"))
            )
        } else {
            format!("nbdcopy --progress image.raw {quoted}")
        };
        AttachLines {
            certificates: is_secured(address).then(|| MAKE_CERTIFICATES.to_owned()),
            nbdinfo: format!("nbdinfo {quoted}"),
            nbdcopy,
            nbdfuse: format!(
                "mkdir -p mnt && nbdfuse{} mnt/{} {quoted}",
                if read_only { " -r" } else { "" },
                quote(export)
            ),
            in_the_clear: (!is_secured(address))
                .then(|| InTheClear::new(address, export, read_only, &quoted)),
            uri,
        }
    }

    /// Label and line, in the order they are shown.
    pub(super) fn labelled(&self) -> Vec<(&'static str, &str)> {
        let mut lines = vec![("URI", self.uri.as_str())];
        lines.extend(
            self.certificates
                .as_deref()
                .map(|line| ("  DIR is made by", line)),
        );
        if let Some(clear) = &self.in_the_clear {
            lines.extend([
                ("Kernel device", clear.nbd_client.as_str()),
                ("  and detach", &clear.nbd_client_detach),
                ("Virtual machine", &clear.qemu_system),
                ("Image info", &clear.qemu_img),
                ("Kernel by qemu", &clear.qemu_nbd),
            ]);
        }
        lines.extend([
            ("Inspect", self.nbdinfo.as_str()),
            ("Copy", &self.nbdcopy),
            ("As a file", &self.nbdfuse),
        ]);
        lines.extend(
            self.in_the_clear
                .as_ref()
                .map(|clear| ("Measure", clear.fio.as_str())),
        );
        lines
    }
}

impl InTheClear {
    fn new(address: &Address, export: &str, read_only: bool, quoted: &str) -> InTheClear {
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
        InTheClear {
            nbd_client,
            nbd_client_detach: "sudo nbd-client -d /dev/nbd0".into(),
            qemu_system: format!("qemu-system-x86_64 ... -drive {}", quote(&drive)),
            qemu_img: format!("qemu-img info {quoted}"),
            qemu_nbd: format!(
                "sudo qemu-nbd --connect=/dev/nbd0 --format=raw{read_only_flag} {quoted}"
            ),
            // Reads only: whoever pastes this into a shell keeps his data.
            fio: format!(
                "fio --name={} --ioengine=nbd --uri={quoted} --rw=randread --bs=4k --iodepth=32 --time_based --runtime=10",
                quote(export)
            ),
        }
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
            ("tcp:localhost:10809", "nbd://localhost:10809/data"),
            (
                "tcp:10.0.0.11:10809",
                "nbds://10.0.0.11:10809/data?tls-certificates=DIR",
            ),
            (
                "tcp:[fd00::1]:10809",
                "nbds://[fd00::1]:10809/data?tls-certificates=DIR",
            ),
            (
                "tcp:0.0.0.0:10809",
                "nbds://localhost:10809/data?tls-certificates=DIR",
            ),
        ] {
            assert_eq!(super::uri(&address.parse().expect(address), "data"), uri);
        }
    }

    #[test]
    fn lines_of_a_unix_socket() {
        let lines = AttachLines::new(&Address::Unix("/run/ashlar/nbd.sock".into()), "data", false);
        let clear = lines.in_the_clear.as_ref().expect("in the clear");
        assert_eq!(
            clear.nbd_client,
            "sudo nbd-client -unix /run/ashlar/nbd.sock -name data -block-size 4096 -connections 4 /dev/nbd0"
        );
        assert_eq!(
            clear.qemu_system,
            "qemu-system-x86_64 ... -drive driver=nbd,server.type=unix,server.path=/run/ashlar/nbd.sock,export=data,\
             if=virtio,cache=none,discard=unmap,detect-zeroes=unmap"
        );
        assert_eq!(
            clear.fio,
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
        let clear = lines.in_the_clear.as_ref().expect("in the clear");
        assert_eq!(
            clear.nbd_client,
            "sudo nbd-client ::1 10809 -name data -block-size 4096 -connections 4 -readonly /dev/nbd0"
        );
        assert!(
            clear.qemu_system.ends_with(",readonly=on"),
            "{}",
            clear.qemu_system
        );
        assert_eq!(
            lines.nbdcopy,
            "nbdcopy --progress 'nbd://[::1]:10809/data' data.raw"
        );
    }

    #[test]
    fn a_listener_that_wants_tls_gets_clients_that_can() {
        let address = "tcp:10.0.0.11:10809".parse().expect("an address");
        let lines = AttachLines::new(&address, "data", false);
        assert_eq!(lines.in_the_clear, None);
        let labelled = lines.labelled();
        let made = labelled.iter().find(|(_, line)| *line == MAKE_CERTIFICATES);
        assert!(made.is_some(), "{labelled:?}");
        assert_eq!(
            lines.nbdinfo,
            "nbdinfo 'nbds://10.0.0.11:10809/data?tls-certificates=DIR'"
        );
        let json = serde_json::to_value(&lines).expect("serialises");
        assert_eq!(json["certificates"], MAKE_CERTIFICATES);
        assert_eq!(json.get("nbd_client"), None);
    }

    #[test]
    fn odd_paths_are_quoted() {
        let lines = AttachLines::new(&Address::Unix("/tmp/it's, here.sock".into()), "data", false);
        let clear = lines.in_the_clear.expect("in the clear");
        assert!(
            clear
                .nbd_client
                .contains(r"-unix '/tmp/it'\''s, here.sock' "),
            "{}",
            clear.nbd_client
        );
        assert!(
            clear
                .qemu_system
                .contains(r"server.path=/tmp/it'\''s,, here.sock,export"),
            "{}",
            clear.qemu_system
        );
    }
}
