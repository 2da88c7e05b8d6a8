//! Machines of their own on one computer: network namespaces on a switch, between which links can be cut, one way or both.
//!
//! Needs root, `ip` and `iptables`. Where they are missing tests fail and say what is.

use std::net::Ipv4Addr;
use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};

/// Panics where namespaces cannot be made: nobody must take a skipped test for one that passed.
pub fn demand() {
    assert!(rustix::process::geteuid().is_root(), "this test needs root");
    for arguments in [["ip", "netns"], ["iptables", "--version"]] {
        run_quietly(arguments[0], &arguments[1..]).unwrap_or_else(|error| {
            panic!(
                "this test needs `{}` (scripts/setup.sh test installs it): {error}",
                arguments[0]
            )
        });
    }
}

fn run_quietly(program: &str, arguments: &[&str]) -> Result<String, String> {
    let path = std::env::var("PATH").unwrap_or_default();
    let output = Command::new(program)
        .args(arguments)
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .output()
        .map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        Err(format!("{program} {}: {said}", arguments.join(" ")))
    }
}

fn run(program: &str, arguments: &[&str]) {
    run_quietly(program, arguments).unwrap_or_else(|error| panic!("{error}"));
}

/// Somebody on the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Host(usize),
    /// Where the tests run, and etcd.
    Outside,
}

/// A switch and the machines on it. Goes away when dropped.
pub struct Network {
    prefix: String,
    subnet: u8,
    hosts: usize,
}

impl Network {
    pub fn new(hosts: usize) -> Network {
        static NEXT: AtomicU8 = AtomicU8::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let pid = std::process::id();
        let network = Network {
            prefix: format!("ash{}-{number}", pid % 100_000),
            // Different processes should not meet; should they, adding the address fails.
            subnet: (pid as u8).wrapping_mul(7).wrapping_add(number),
            hosts,
        };
        let switch = network.switch();
        run("ip", &["netns", "add", &switch]);
        let bridge = ["-n", &switch, "link", "add", "bridge", "type", "bridge"];
        run("ip", &bridge);
        run("ip", &["-n", &switch, "link", "set", "bridge", "up"]);
        let uplink = format!("{}u", network.prefix);
        network.plug(&uplink, None, Place::Outside);
        for host in 0..hosts {
            let namespace = network.namespace(host);
            run("ip", &["netns", "add", &namespace]);
            run("ip", &["-n", &namespace, "link", "set", "lo", "up"]);
            network.plug("eth0", Some(&namespace), Place::Host(host));
        }
        network
    }

    fn switch(&self) -> String {
        format!("{}s", self.prefix)
    }

    /// A cable from the switch.
    fn plug(&self, device: &str, namespace: Option<&str>, place: Place) {
        let switch = self.switch();
        let port = match place {
            Place::Host(host) => format!("port{host}"),
            Place::Outside => "uplink".to_owned(),
        };
        let add = ["-n", &switch, "link", "add", &port, "type", "veth"];
        run("ip", &[&add[..], &["peer", "name", "peer"]].concat());
        // Renamed before it moves, because here the name may be taken.
        run(
            "ip",
            &["-n", &switch, "link", "set", "peer", "name", device],
        );
        let to = namespace.map_or_else(|| "1".to_owned(), str::to_owned);
        run("ip", &["-n", &switch, "link", "set", device, "netns", &to]);
        run(
            "ip",
            &[
                "-n", &switch, "link", "set", &port, "master", "bridge", "up",
            ],
        );
        let address = format!("{}/24", self.address(place));
        let inside = namespace.map_or_else(Vec::new, |name| vec!["-n", name]);
        let ip = |arguments: &[&str]| run("ip", &[&inside, arguments].concat());
        ip(&["addr", "add", &address, "dev", device]);
        ip(&["link", "set", device, "up"]);
    }

    /// The namespace of a host, as `ip netns` names it.
    pub fn namespace(&self, host: usize) -> String {
        format!("{}h{host}", self.prefix)
    }

    pub fn address(&self, place: Place) -> Ipv4Addr {
        let last = match place {
            Place::Host(host) => 10 + host as u8,
            Place::Outside => 1,
        };
        Ipv4Addr::new(10, 77, self.subnet, last)
    }

    /// Nothing that `from` sends arrives at `to` any more. One of them is a host.
    pub fn cut(&self, from: Place, to: Place) {
        let (host, chain, flag, peer) = match (from, to) {
            (_, Place::Host(host)) => (host, "INPUT", "-s", from),
            (Place::Host(host), Place::Outside) => (host, "OUTPUT", "-d", to),
            (Place::Outside, Place::Outside) => panic!("a cut inside the tests themselves"),
        };
        let namespace = self.namespace(host);
        let peer = self.address(peer).to_string();
        let rule = ["iptables", "-w", "-A", chain, flag, &peer, "-j", "DROP"];
        run("ip", &[&["netns", "exec", &namespace][..], &rule].concat());
    }

    /// Nothing goes either way.
    pub fn cut_both(&self, one: Place, other: Place) {
        self.cut(one, other);
        self.cut(other, one);
    }

    /// Cuts a host off from everybody.
    pub fn isolate(&self, host: usize) {
        self.cut_both(Place::Host(host), Place::Outside);
        for other in (0..self.hosts).filter(|other| *other != host) {
            self.cut_both(Place::Host(host), Place::Host(other));
        }
    }

    /// Everything gets through again.
    pub fn heal(&self) {
        for host in 0..self.hosts {
            let namespace = self.namespace(host);
            run("ip", &["netns", "exec", &namespace, "iptables", "-w", "-F"]);
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for host in 0..self.hosts {
            let _ = run_quietly("ip", &["netns", "del", &self.namespace(host)]);
        }
        let _ = run_quietly("ip", &["netns", "del", &self.switch()]);
    }
}
