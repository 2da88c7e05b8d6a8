use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use proptest::prelude::*;
use rustls::pki_types::{PrivatePkcs8KeyDer, ServerName};

use super::*;

/// Both ends of a TLS session over a socket pair, the handshake done.
fn pair() -> (Stream, Stream) {
    let name = "node.test";
    let key = rcgen::generate_simple_self_signed([name.to_owned()]).expect("certificate");
    let certificate = key.cert.der().clone();
    let private = PrivatePkcs8KeyDer::from(key.signing_key.serialize_der());
    let server = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.clone()], private.into())
        .expect("server");
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate).expect("root");
    let client = rustls::ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from(name).expect("name");
    let mut client =
        rustls::Connection::from(rustls::ClientConnection::new(Arc::new(client), name).expect("c"));
    let mut server =
        rustls::Connection::from(rustls::ServerConnection::new(Arc::new(server)).expect("s"));
    let (a, b) = UnixStream::pair().expect("pair");
    while client.is_handshaking() || server.is_handshaking() {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).expect("write");
        }
        feed(&mut server, &wire);
        wire.clear();
        while server.wants_write() {
            server.write_tls(&mut wire).expect("write");
        }
        feed(&mut client, &wire);
    }
    for socket in [&a, &b] {
        socket.set_nonblocking(true).expect("non-blocking");
    }
    (Stream::tls(a.into(), client), Stream::tls(b.into(), server))
}

fn feed(session: &mut rustls::Connection, mut wire: &[u8]) {
    while !wire.is_empty() {
        session.read_tls(&mut wire).expect("read");
        session.process_new_packets().expect("handshake");
    }
}

fn send(stream: &mut Stream, bytes: &[u8], cut: usize) -> Taken {
    let (a, b) = bytes.split_at(cut.min(bytes.len()));
    let pieces = [a, b].map(|part| libc::iovec {
        iov_base: part.as_ptr().cast_mut().cast(),
        iov_len: part.len(),
    });
    // SAFETY: the pieces are borrowed slices.
    unsafe { stream.send(&pieces) }.expect("send")
}

fn receive(stream: &mut Stream, room: usize, cut: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; room];
    let (a, b) = bytes.split_at_mut(cut.min(room));
    let mut pieces = [a, b].map(|part| libc::iovec {
        iov_base: part.as_mut_ptr().cast(),
        iov_len: part.len(),
    });
    // SAFETY: the pieces are slices borrowed for the call.
    let count = unsafe { stream.receive(&mut pieces) }?;
    bytes.truncate(count);
    Ok(bytes)
}

/// Bytes that differ from place to place.
fn bytes(count: usize) -> Vec<u8> {
    (0..count)
        .map(|i| (i ^ (i >> 8) ^ (i >> 16)) as u8)
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn everything_arrives_in_order_through_a_full_socket(
        steps in prop::collection::vec((1usize..200_000, 0usize..5000, 1usize..300_000), 1..40)
    ) {
        let (mut ours, mut theirs) = pair();
        let sent = bytes(steps.iter().map(|step| step.0).sum());
        let (mut at, mut got) = (0, Vec::new());
        let mut blocked = false;
        let mut idle_turns = 0;
        for (len, cut, room) in steps.iter().copied().cycle() {
            let before = (at, got.len());
            if at < sent.len() || blocked {
                let taken = send(&mut ours, &sent[at..(at + len).min(sent.len())], cut);
                at += taken.bytes;
                blocked = taken.blocked;
                prop_assert_eq!(blocked, ours.has_unsent());
            }
            match receive(&mut theirs, room, cut) {
                Ok(part) => got.extend_from_slice(&part),
                Err(error) => prop_assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
            if got.len() == sent.len() {
                break;
            }
            // A few, in which a record is not whole yet.
            idle_turns = if (at, got.len()) == before { idle_turns + 1 } else { 0 };
            prop_assert!(idle_turns < 1_000, "{} of {} bytes arrived", got.len(), sent.len());
        }
        prop_assert!(got == sent);
        drop(ours);
        prop_assert_eq!(receive(&mut theirs, 10, 0).expect("end"), Vec::<u8>::new());
    }
}

#[test]
fn a_peer_that_breaks_the_session_is_an_error_not_data() {
    let (ours, mut theirs) = pair();
    let socket = UnixStream::from(ours.socket().try_clone().expect("duplicate"));
    (&socket).write_all(&[0x17, 3, 3, 0, 32]).expect("write");
    (&socket).write_all(&[7; 32]).expect("write");
    let error = receive(&mut theirs, 100, 0).expect_err("not decrypted");
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
}

/// A session that was sent half a record, and the socket that the other half would come through.
fn half_a_record() -> (Stream, UnixStream) {
    let (mut ours, theirs) = pair();
    send(&mut ours, &bytes(1000), 0);
    let mut record = vec![0; 4096];
    let wire = UnixStream::from(theirs.socket().try_clone().expect("duplicate"));
    let count = (&wire).read(&mut record).expect("record");
    // Nobody else reads from that socket now; what is left of the record comes through another one.
    let mut session = match theirs {
        Stream::Tls(mut stream) => std::mem::replace(&mut stream.session, spare()),
        Stream::Plain(_) => unreachable!("made so"),
    };
    session.set_buffer_limit(None);
    let (front, mut back) = UnixStream::pair().expect("pair");
    front.set_nonblocking(true).expect("non-blocking");
    back.write_all(&record[..count / 2]).expect("write");
    (Stream::tls(front.into(), session), back)
}

#[test]
fn a_cut_in_the_middle_of_a_record_ends_the_stream_without_half_of_it() {
    let (mut theirs, back) = half_a_record();
    let error = receive(&mut theirs, 100, 0).expect_err("half a record");
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    drop(back);
    assert_eq!(receive(&mut theirs, 100, 0).expect("end"), Vec::<u8>::new());
}

/// Who is told of a socket only when something comes is told once of both, or of the end by itself.
#[test]
fn an_end_that_was_told_of_is_seen_behind_half_a_record() {
    let (mut theirs, back) = half_a_record();
    drop(back);
    theirs.hung_up();
    assert_eq!(receive(&mut theirs, 100, 0).expect("end"), Vec::<u8>::new());

    let (mut theirs, back) = half_a_record();
    drop(back);
    let error = receive(&mut theirs, 100, 0).expect_err("not told of yet");
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    theirs.hung_up();
    assert_eq!(receive(&mut theirs, 100, 0).expect("end"), Vec::<u8>::new());
}

/// A session of no further use.
fn spare() -> rustls::Connection {
    let config = rustls::ClientConfig::builder()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let name = ServerName::try_from("node.test").expect("name");
    rustls::ClientConnection::new(Arc::new(config), name)
        .expect("session")
        .into()
}
