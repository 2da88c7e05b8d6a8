//! A thousand clients that mean harm or know no better, while one that does verify its data works on.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ashlar_tests::daemon::Setup;
use ashlar_tests::fio::Fio;
use ashlar_tests::nbd::{
    self, Address, Connection, Handshake, Request, Wishes, export_request, meta_request, wire,
};
use ashlar_tests::seed::{self, Rng};
use ashlar_tests::wait;

const CLIENTS: u64 = 1_000;
/// Beside what an idle daemon has: buffers of clients are limited to 128 MiB by default and can hold twice that for a
/// while, 32 MiB of free ones are kept, and the rest is for all else. Without the limits this reaches many GiB.
const GROWTH_MAX: u64 = 320 << 20;

#[test]
fn a_thousand_hostile_clients() {
    let seed = seed::of_run("hostile");
    let mut daemon = Setup::default().start("hostile");
    // A warning about a client is right; a stop or an error is not.
    daemon.log.expect(" WARN ");
    daemon.log.expect("\"WARN\"");
    daemon.create("good", "64MiB");
    daemon.create("prey", "16MiB");
    let uri = daemon.uri("good");
    let address = daemon.address();
    let resident_before = daemon.usage().resident_bytes;
    let descriptors_before = daemon.usage().descriptors;
    let attacking = AtomicBool::new(true);
    let mut resident_most = 0;
    let mut passes = 0;
    std::thread::scope(|scope| {
        let attackers: Vec<_> = (0..4)
            .map(|part| {
                let address = &address;
                scope.spawn(move || {
                    let mut rng = Rng::new(seed + part);
                    for _ in 0..CLIENTS / 4 {
                        attack(address, &mut rng);
                    }
                })
            })
            .collect();
        let watch = scope.spawn(|| {
            let mut most = 0;
            while attacking.load(Ordering::Relaxed) {
                most = most.max(daemon.usage().resident_bytes);
                wait::pass(Duration::from_millis(20));
            }
            most
        });
        // Verify passes, one after the other, until the attack is over. A pass that fails panics here.
        let guard = StopOnDrop(&attacking);
        while attackers.iter().any(|attacker| !attacker.is_finished()) || passes == 0 {
            Fio::verify(&uri)
                .args(["--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=32m"])
                .succeed();
            passes += 1;
        }
        for attacker in attackers {
            attacker.join().expect("an attacker does not panic");
        }
        drop(guard);
        resident_most = watch.join().expect("the watch does not panic");
    });
    println!(
        "{passes} verify passes, {} MiB resident at most, {} before",
        resident_most >> 20,
        resident_before >> 20
    );
    assert!(daemon.is_running());
    assert!(
        resident_most < resident_before + GROWTH_MAX,
        "{resident_most} bytes resident, {resident_before} before"
    );
    wait::until(
        Duration::from_secs(30),
        "the hostile connections are gone",
        || {
            let now = daemon.usage().descriptors;
            if now <= descriptors_before + 4 {
                Ok(())
            } else {
                Err(format!("{now} descriptors, {descriptors_before} before"))
            }
        },
    );
    daemon
        .open("prey", Wishes::EXTENDED)
        .read(0, 4096)
        .expect("served as before");
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// One hostile client. What it gets for an answer does not matter here; the other tests look at answers.
fn attack(address: &Address, rng: &mut Rng) {
    let result = match rng.below(12) {
        0 => garbage(address, rng),
        1 => mutated_handshake(address, rng),
        2 => lengths_that_lie(address, rng),
        3 => silence(address, rng),
        4 => mutated_requests(address, rng),
        5 => absurd_requests(address, rng),
        6 => payload_cut_short(address, rng),
        7 => asks_and_hangs_up(address, rng),
        8 => asks_and_never_reads(address, rng),
        9 => talks_behind_goodbye(address, rng),
        10 => many_options(address, rng),
        _ => one_byte_at_a_time(address, rng),
    };
    // A server may close at any point of this.
    let _ = result;
}

type Outcome = Result<(), nbd::Failure>;

/// Takes whatever comes for a moment.
fn listen_a_little(connection: &mut Connection) {
    let _ = connection.until_closed(Duration::from_millis(5));
}

fn impatient(connection: &Connection) {
    let _ = connection.set_write_timeout(Duration::from_millis(200));
}

fn garbage(address: &Address, rng: &mut Rng) -> Outcome {
    let mut connection = address.connect()?;
    impatient(&connection);
    let count = rng.logarithmic(1 << 18) as usize;
    connection.write_all(&rng.bytes(count))?;
    listen_a_little(&mut connection);
    Ok(())
}

/// A good client's words, as one stream.
fn good_handshake(rng: &mut Rng) -> Vec<u8> {
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    let mut option = |number: u32, data: Vec<u8>| {
        bytes.extend(wire::IHAVEOPT.to_be_bytes());
        bytes.extend(number.to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
    };
    option(
        *rng.pick(&[wire::OPT_STRUCTURED_REPLY, wire::OPT_EXTENDED_HEADERS]),
        Vec::new(),
    );
    option(
        wire::OPT_SET_META_CONTEXT,
        meta_request(b"prey", &["base:allocation"]),
    );
    option(wire::OPT_LIST, Vec::new());
    option(wire::OPT_INFO, export_request(b"prey", &[1, 2, 3]));
    option(wire::OPT_GO, export_request(b"prey", &[3]));
    bytes
}

fn mutate(bytes: &mut Vec<u8>, rng: &mut Rng) {
    for _ in 0..rng.logarithmic(20) {
        let at = rng.below(bytes.len() as u64) as usize;
        match rng.below(5) {
            0 => bytes[at] = rng.next() as u8,
            1 => bytes[at] ^= 1 << rng.below(8),
            2 => bytes[at] = *rng.pick(&[0, 0xff, 0x80, 0x7f]),
            3 => {
                let extra = rng.bytes(rng.clone().below(40) as usize);
                bytes.splice(at..at, extra);
            }
            _ => bytes.truncate(at + 1),
        }
    }
}

fn mutated_handshake(address: &Address, rng: &mut Rng) -> Outcome {
    let mut connection = address.connect()?;
    impatient(&connection);
    let mut bytes = good_handshake(rng);
    mutate(&mut bytes, rng);
    connection.write_all(&bytes)?;
    listen_a_little(&mut connection);
    Ok(())
}

fn lengths_that_lie(address: &Address, rng: &mut Rng) -> Outcome {
    let mut handshake = Handshake::begin(address)?;
    impatient(&handshake.connection);
    let mut data = export_request(b"prey", &[1, 2, 3]);
    let word = rng
        .pick(&[0xffff_ffff_u32, 0x7fff_ffff, 0x8000_0000, 4097, 100_000])
        .to_be_bytes();
    let at = if rng.chance(50) { 0 } else { data.len() - 4 };
    data[at..at + 4].copy_from_slice(&word);
    let option = *rng.pick(&[
        wire::OPT_GO,
        wire::OPT_INFO,
        wire::OPT_SET_META_CONTEXT,
        wire::OPT_EXPORT_NAME,
    ]);
    let mut bytes = wire::IHAVEOPT.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    let claimed = *rng.pick(&[data.len() as u32, 0xffff_ffff, 1 << 24, 3]);
    bytes.extend(claimed.to_be_bytes());
    bytes.extend(data);
    handshake.connection.write_all(&bytes)?;
    listen_a_little(&mut handshake.connection);
    Ok(())
}

fn silence(address: &Address, rng: &mut Rng) -> Outcome {
    let mut connection = address.connect()?;
    connection.write_all(&rng.bytes(rng.clone().below(4) as usize))?;
    Ok(())
}

fn opened(address: &Address, rng: &mut Rng) -> Result<nbd::Transmission, nbd::Failure> {
    let wishes = *rng.pick(&[Wishes::SIMPLE, Wishes::STRUCTURED, Wishes::EXTENDED]);
    let client = nbd::open(address, "prey", wishes)?;
    impatient(&client.connection);
    Ok(client)
}

fn mutated_requests(address: &Address, rng: &mut Rng) -> Outcome {
    let mut client = opened(address, rng)?;
    let mut bytes = Vec::new();
    for cookie in 0..rng.logarithmic(60) {
        let command = rng.below(9) as u16;
        let length = rng.logarithmic(100_000);
        let request = Request {
            flags: 0,
            command,
            offset: rng.below(16 << 20),
            length,
            payload: &[],
        };
        bytes.extend(client.header(&request, cookie));
        if command == wire::CMD_WRITE {
            bytes.extend(rng.bytes(length as usize));
        }
    }
    mutate(&mut bytes, rng);
    client.connection.write_all(&bytes)?;
    listen_a_little(&mut client.connection);
    Ok(())
}

fn absurd_requests(address: &Address, rng: &mut Rng) -> Outcome {
    let mut client = opened(address, rng)?;
    for cookie in 0..30 {
        let command = *rng.pick(&[0, 1, 3, 4, 5, 6, 7, 8, 77, 0xffff]);
        let offset = *rng.pick(&[
            0,
            16 << 20,
            (16 << 20) - 1,
            u64::MAX,
            u64::MAX - 4095,
            1 << 63,
        ]);
        let length = *rng.pick(&[0, 1, 4096, 32 << 20, (32 << 20) + 1, 0xffff_ffff]);
        let flags = rng.next() as u16 & *rng.pick(&[0, 0x1f, 0xffff]);
        let header = client.header(
            &Request {
                flags,
                command,
                offset,
                length,
                payload: &[],
            },
            cookie,
        );
        client.connection.write_all(&header)?;
    }
    listen_a_little(&mut client.connection);
    Ok(())
}

fn payload_cut_short(address: &Address, rng: &mut Rng) -> Outcome {
    let mut client = opened(address, rng)?;
    let length = rng.logarithmic(32 << 20);
    let flags = if client.style == nbd::HeaderStyle::Extended {
        wire::CMD_FLAG_PAYLOAD_LEN
    } else {
        0
    };
    let header = client.header(
        &Request {
            flags,
            command: wire::CMD_WRITE,
            offset: 0,
            length,
            payload: &[],
        },
        1,
    );
    client.connection.write_all(&header)?;
    let some = rng.below(length).min(1 << 20) as usize;
    client.connection.write_all(&rng.bytes(some))?;
    Ok(())
}

/// The one that ends nbdkit 1.32: reads queue up, the asker is gone.
fn asks_and_hangs_up(address: &Address, rng: &mut Rng) -> Outcome {
    let mut client = opened(address, rng)?;
    for cookie in 0..rng.logarithmic(200) {
        let length = rng.logarithmic(1 << 20);
        let header = client.header(
            &Request {
                command: wire::CMD_READ,
                length,
                ..Request::default()
            },
            cookie,
        );
        client.connection.write_all(&header)?;
    }
    Ok(())
}

fn asks_and_never_reads(address: &Address, rng: &mut Rng) -> Outcome {
    let mut client = opened(address, rng)?;
    let length = *rng.pick(&[4096, 1 << 20, 16 << 20]);
    for cookie in 0..2_000 {
        let header = client.header(
            &Request {
                command: wire::CMD_READ,
                length,
                ..Request::default()
            },
            cookie,
        );
        client.connection.write_all(&header)?;
    }
    Ok(())
}

fn talks_behind_goodbye(address: &Address, rng: &mut Rng) -> Outcome {
    let mut client = opened(address, rng)?;
    let mut bytes = client.header(
        &Request {
            command: wire::CMD_FLUSH,
            ..Request::default()
        },
        1,
    );
    bytes.extend(client.header(
        &Request {
            command: wire::CMD_DISC,
            ..Request::default()
        },
        2,
    ));
    let count = rng.logarithmic(50_000) as usize;
    bytes.extend(rng.bytes(count));
    client.connection.write_all(&bytes)?;
    listen_a_little(&mut client.connection);
    Ok(())
}

fn many_options(address: &Address, rng: &mut Rng) -> Outcome {
    let mut handshake = Handshake::begin(address)?;
    impatient(&handshake.connection);
    // Answers pile up on the server's side: this client never reads them.
    for _ in 0..rng.logarithmic(20_000) {
        handshake.send_option(*rng.pick(&[wire::OPT_LIST, wire::OPT_STARTTLS, 1234]), &[])?;
    }
    Ok(())
}

fn one_byte_at_a_time(address: &Address, rng: &mut Rng) -> Outcome {
    let mut connection = address.connect()?;
    for byte in good_handshake(rng).iter().take(rng.below(200) as usize) {
        connection.write_all(&[*byte])?;
    }
    Ok(())
}
