use super::*;
use proptest::prelude::*;

use ReplyStyle::{Extended, Simple, Structured};

const COOKIE: u64 = 0x0102_0304_0506_0708;

fn to(style: ReplyStyle) -> ReplyTo {
    ReplyTo {
        style,
        cookie: COOKIE,
        offset: 0x1000,
    }
}

/// A chunk as a client reads it, written from the specification and sharing nothing with the encoder.
#[derive(Debug, PartialEq, Eq)]
struct Chunk {
    done: bool,
    kind: u16,
    payload: Vec<u8>,
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |n, byte| (n << 8) | u64::from(*byte))
}

/// Reads chunks until the last; `data` are the bytes that follow OFFSET_DATA headers.
fn chunks(style: ReplyStyle, mut bytes: &[u8]) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    while !bytes.is_empty() {
        let (header, magic) = match style {
            Structured => (20, 0x668e_33ef),
            Extended => (32, 0x6e8a_278c),
            Simple => panic!("no chunks"),
        };
        assert_eq!(number(&bytes[0..4]), magic);
        assert_eq!(number(&bytes[8..16]), COOKIE);
        let length = if style == Extended {
            assert_eq!(number(&bytes[16..24]), 0x1000, "the request's offset");
            number(&bytes[24..32])
        } else {
            number(&bytes[16..20])
        } as usize;
        assert!(number(&bytes[4..6]) <= 1);
        chunks.push(Chunk {
            done: bytes[5] == 1,
            kind: number(&bytes[6..8]) as u16,
            payload: bytes[header..header + length].to_vec(),
        });
        bytes = &bytes[header + length..];
    }
    chunks
}

#[test]
fn simple_replies_are_sixteen_bytes() {
    let mut expected = vec![0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0];
    expected.extend_from_slice(&COOKIE.to_be_bytes());
    assert_eq!(done(to(Simple), false)[..], expected[..]);
    assert_eq!(done(to(Structured), false)[..], expected[..]);
    assert_eq!(read_simple(to(Simple))[..], expected[..]);
    expected[7] = 28;
    assert_eq!(error(to(Simple), RequestError::NoSpace)[..], expected[..]);
}

#[test]
fn the_end_of_chunks_is_an_empty_last_chunk() {
    for (style, after_chunks) in [(Structured, true), (Extended, true), (Extended, false)] {
        let read = chunks(style, &done(to(style), after_chunks));
        assert_eq!(
            read,
            [Chunk {
                done: true,
                kind: 0,
                payload: vec![]
            }]
        );
    }
}

#[test]
fn data_and_holes_name_their_offset() {
    for style in [Structured, Extended] {
        let mut sent = read_data(to(style), 0x1000, 5, false).to_vec();
        sent.extend_from_slice(b"hello");
        sent.extend_from_slice(&read_hole(to(style), 0x1005, 4091, true));
        let read = chunks(style, &sent);
        assert_eq!((read[0].done, read[0].kind), (false, 1));
        assert_eq!(number(&read[0].payload[..8]), 0x1000);
        assert_eq!(&read[0].payload[8..], b"hello");
        assert_eq!((read[1].done, read[1].kind), (true, 2));
        assert_eq!(number(&read[1].payload[..8]), 0x1005);
        assert_eq!(number(&read[1].payload[8..]), 4091);
    }
}

#[test]
fn errors_carry_their_number_and_text() {
    for style in [Structured, Extended] {
        for (failure, errno) in [(RequestError::BadFlags, 22), (RequestError::Device, 5)] {
            let read = chunks(style, &error(to(style), failure));
            assert_eq!(read.len(), 1);
            assert!(read[0].done);
            assert_eq!(read[0].kind, 0x8001);
            assert_eq!(number(&read[0].payload[..4]), errno);
            let length = number(&read[0].payload[4..6]) as usize;
            assert_eq!(&read[0].payload[6..], failure.text().as_bytes());
            assert_eq!(length, failure.text().len());
        }
    }
}

fn extents(style: ReplyStyle, sent: &[u8]) -> Vec<(u64, u64)> {
    let read = chunks(style, sent);
    assert_eq!(read.len(), 1);
    assert!(read[0].done);
    let payload = &read[0].payload;
    assert_eq!(number(&payload[..4]), 1, "the context's id");
    if style == Extended {
        assert_eq!(read[0].kind, 6);
        let body = &payload[8..];
        assert_eq!(number(&payload[4..8]) as usize * 16, body.len());
        body.chunks(16)
            .map(|d| (number(&d[..8]), number(&d[8..])))
            .collect()
    } else {
        assert_eq!(read[0].kind, 5);
        payload[4..]
            .chunks(8)
            .map(|d| (number(&d[..4]), number(&d[4..])))
            .collect()
    }
}

#[test]
fn long_extents_are_cut_on_a_block_where_lengths_have_32_bits() {
    let length = 10 << 30;
    for (style, expected) in [(Structured, 0xffff_f000), (Extended, length)] {
        let mut status = Status::new(to(style), length, false);
        status.push(4 << 30, Allocation::Data);
        status.push(6 << 30, Allocation::Data);
        let mut sent = Vec::new();
        assert_eq!(status.described_bytes(), expected);
        status.finish(&mut sent);
        assert_eq!(extents(style, &sent), [(expected, 0)]);
    }
}

#[test]
fn one_extent_is_one_extent_within_the_request() {
    for style in [Structured, Extended] {
        let mut status = Status::new(to(style), 8192, true);
        assert!(status.push(4096, Allocation::Hole));
        assert!(!status.push(1 << 20, Allocation::Data));
        let mut sent = Vec::new();
        status.finish(&mut sent);
        assert_eq!(extents(style, &sent), [(4096, 3)]);
        let mut status = Status::new(to(style), 8192, true);
        assert!(!status.push(1 << 20, Allocation::Zero));
        let mut sent = Vec::new();
        status.finish(&mut sent);
        assert_eq!(extents(style, &sent), [(8192, 2)]);
    }
}

proptest! {
    /// The rules of the specification for a status reply, whatever the runs were.
    #[test]
    fn status_replies_keep_the_rules(
        extended in any::<bool>(),
        request in 1..(1u64 << 36),
        runs in prop::collection::vec((1..(1u64 << 34), 0..3u8), 1..50),
    ) {
        let style = if extended { Extended } else { Structured };
        let mut status = Status::new(to(style), request, false);
        let mut at = Vec::new();
        for (length, kind) in runs {
            let kind = [Allocation::Data, Allocation::Hole, Allocation::Zero][usize::from(kind)];
            at.push((length, kind));
            if !status.push(length, kind) {
                break;
            }
        }
        let described = status.described_bytes();
        let mut sent = Vec::new();
        status.finish(&mut sent);
        let read = extents(style, &sent);
        prop_assert_eq!(read.iter().map(|e| e.0).sum::<u64>(), described);
        prop_assert!(described <= request && !read.is_empty());
        prop_assert!(read.iter().all(|e| e.0 > 0));
        prop_assert!(read.windows(2).all(|pair| pair[0].1 != pair[1].1));
        // Each byte described has the status that was pushed for it.
        let mut expected = at.into_iter();
        let mut current = expected.next().unwrap();
        for (mut length, bits) in read {
            while length > 0 {
                if current.0 == 0 {
                    current = expected.next().unwrap();
                }
                let step = length.min(current.0);
                prop_assert_eq!(u64::from(current.1.bits()), bits);
                length -= step;
                current.0 -= step;
            }
        }
    }
}
