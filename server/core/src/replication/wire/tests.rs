//! Whatever bytes arrive, they are refused or understood, and what is sent is understood.

use proptest::prelude::*;
use uuid::Uuid;

use super::{
    HEADER_BYTES, Header, Hello, Kind, LeafStates, OpenBody, RowVersions, Rows, RowsQuery, Status,
    WireError, flags,
};
use crate::records::HeadClaim;
use crate::replication::{BlockContent, BlockState};
use crate::store::ExtentKey;
use crate::units::{ChunkIndex, Epoch, LayerId, NodeId, StoreId, Version, VolumeId};

fn write() -> Header {
    Header {
        flags: flags::DURABLE,
        session: 7,
        epoch: Epoch(3),
        version: Version::new(Epoch(3), 9),
        op: u64::MAX - 1,
        extent: ExtentKey {
            layer: LayerId(5),
            chunk: ChunkIndex(6),
        },
        first_block: 16_380,
        count: 4,
        body_bytes: Header::data_body_bytes(4),
        ..Header::new(Kind::Write)
    }
}

// The form that released daemons speak.
#[test]
fn the_header_is_fixed() {
    let bytes = write().encode();
    assert_eq!(&bytes[..8], [b'A', b'L', b'N', b'K', 16, 1, 0, 0]);
    assert_eq!(bytes[12..16], (4u32 * 4100).to_le_bytes());
    assert_eq!(bytes[16..24], [7, 0, 0, 0, 3, 0, 0, 0]);
    assert_eq!(bytes[24..32], ((3u64 << 40) | 9).to_le_bytes());
    assert_eq!(bytes[32..40], (u64::MAX - 1).to_le_bytes());
    assert_eq!(bytes[40..52], [5, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0]);
    assert_eq!(bytes[52..60], [0xfc, 0x3f, 0, 0, 4, 0, 0, 0]);
    assert_eq!(Header::decode(&bytes), Ok(write()));
}

#[test]
fn what_cannot_be_is_refused() {
    let refused = |header: Header| Header::decode(&header.encode());
    let invalid = |what| Err(WireError::Invalid(what));
    assert_eq!(
        refused(Header {
            count: 5,
            body_bytes: Header::data_body_bytes(5),
            ..write()
        }),
        invalid("range of blocks")
    );
    assert_eq!(
        refused(Header {
            first_block: u32::MAX,
            ..write()
        }),
        invalid("range of blocks")
    );
    assert_eq!(
        refused(Header {
            count: 0,
            body_bytes: 0,
            ..write()
        }),
        invalid("range of blocks")
    );
    assert_eq!(
        refused(Header {
            first_block: 0,
            count: 257,
            body_bytes: Header::data_body_bytes(257),
            ..write()
        }),
        invalid("number of blocks")
    );
    assert_eq!(
        refused(Header {
            version: Version::NONE,
            ..write()
        }),
        invalid("version")
    );
    assert_eq!(
        refused(Header {
            body_bytes: 4096,
            ..write()
        }),
        invalid("length of a body")
    );
    assert_eq!(
        refused(Header {
            flags: 128,
            ..write()
        }),
        invalid("flag")
    );
    assert_eq!(
        refused(Header {
            epoch: Epoch(1 << 24),
            ..write()
        }),
        invalid("epoch")
    );
    let mut other = write().encode();
    other[0] = b'X';
    assert_eq!(Header::decode(&other), Err(WireError::Magic));
}

fn any_header() -> impl Strategy<Value = Header> {
    (
        prop::sample::select(vec![
            Kind::Zero,
            Kind::Read,
            Kind::Flush,
            Kind::Done,
            Kind::Alive,
            Kind::Fenced,
        ]),
        0..64u8,
        prop::sample::select(vec![
            Status::Ok,
            Status::Fenced,
            Status::NoSpace,
            Status::Refused,
        ]),
        any::<(u32, u64, u64, u64, u32)>(),
        (0..1u32 << 24, 1..256u32, 0..16_000u32),
    )
        .prop_map(
            |(
                kind,
                flags,
                status,
                (session, version, op, layer, chunk),
                (epoch, count, first_block),
            )| Header {
                kind,
                flags,
                status,
                session,
                epoch: Epoch(epoch),
                version: Version(version.max(1)),
                op,
                extent: ExtentKey {
                    layer: LayerId(layer),
                    chunk: ChunkIndex(chunk),
                },
                first_block,
                count,
                ..Header::new(kind)
            },
        )
}

proptest! {
    #[test]
    fn headers_come_back(header in any_header()) {
        prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
    }

    #[test]
    fn a_flipped_bit_is_seen(header in any_header(), bit in 0..HEADER_BYTES * 8) {
        let mut bytes = header.encode();
        bytes[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(Header::decode(&bytes).is_err());
    }

    #[test]
    fn no_bytes_cause_a_panic(bytes in prop::array::uniform32(any::<u8>()), body in prop::collection::vec(any::<u8>(), 0..600), kind in any::<u8>()) {
        let mut header = [0; HEADER_BYTES];
        header[..32].copy_from_slice(&bytes);
        prop_assert!(Header::decode(&header).is_err());
        // Past the checksums, anything may be in a body.
        let header = Header { flags: kind & 63, ..Header::new(Kind::Rows) }.with_body(&body);
        let _ = Hello::decode(&header, &body);
        let _ = OpenBody::decode(&header, &body);
        let _ = RowsQuery::decode(&header, &body);
        let _ = Rows::decode(&header, &body);
        let _ = LeafStates::decode(&header, &body);
    }

    #[test]
    fn bodies_come_back(ids in any::<[u128; 3]>(), opening in any::<u64>(), sets in 1..300u32, chunks in prop::collection::btree_set(any::<u32>(), 0..5), versions in any::<[u64; 32]>()) {
        let id = ids.map(Uuid::from_u128);
        let hello = Hello { cluster: id[0], node: NodeId(id[1]), store: StoreId(id[2]) };
        let body = hello.encode();
        prop_assert_eq!(Hello::decode(&Header::new(Kind::Hello).with_body(&body), &body), Ok(hello));
        let open = OpenBody { volume: VolumeId(id[0]), claim: HeadClaim { node: NodeId(id[1]), incarnation: id[2] }, opening };
        let body = open.encode();
        prop_assert_eq!(OpenBody::decode(&Header::new(Kind::Open).with_body(&body), &body), Ok(open));
        let query = RowsQuery { sets, set: sets - 1, floor: Version(opening) };
        let body = query.encode();
        prop_assert_eq!(RowsQuery::decode(&Header::new(Kind::ReadRows).with_body(&body), &body), Ok(query));
        let rows = Rows {
            rows: chunks.iter().map(|chunk| RowVersions { chunk: ChunkIndex(*chunk), leaves: versions.map(Version) }).collect(),
            more: false,
        };
        let body = rows.encode();
        let mut header = Header::new(Kind::Rows).with_body(&body);
        prop_assert_eq!(Rows::decode(&header, &body), Ok(rows));
        header.body_crc ^= 1;
        prop_assert_eq!(Rows::decode(&header, &body), Err(WireError::BodyChecksum));
    }
}

#[test]
fn the_states_of_a_leaf_come_back() {
    let mut states = LeafStates::holes();
    for (block, state) in states.0.iter_mut().enumerate() {
        state.version = Version(block as u64 * 7);
        state.content = [
            BlockContent::Hole,
            BlockContent::Zeros,
            BlockContent::Data,
            BlockContent::Lost,
        ][block % 4];
    }
    let mut body = states.encode();
    let header = Header::new(Kind::Leaf).with_body(&body);
    assert!(Header::decode(&header.encode()).is_ok());
    assert_eq!(LeafStates::decode(&header, &body), Ok(states));
    body[4608 - 1] = 9;
    let header = Header::new(Kind::Leaf).with_body(&body);
    assert_eq!(
        LeafStates::decode(&header, &body),
        Err(WireError::Invalid("content of a block"))
    );
    assert!(BlockState::HOLE.reads_as_zeros());
}
