//! What the handshake answers: the encoding of option replies and of what they tell about an export.

use super::super::options::{InfoRequest, Malformed, MetaRequest};
use super::super::session::{BASE_ALLOCATION, BASE_ALLOCATION_ID};
use super::super::wire::{
    MAX_PAYLOAD_BYTES, MAX_STRING_BYTES, MIN_BLOCK_BYTES, OPTION_REPLY_MAGIC, OptionReplyHeader,
    PREFERRED_BLOCK_BYTES, info, option, option_reply,
};
use super::{Export, Handshake, Resolution};
use zerocopy::IntoBytes;

impl Handshake {
    pub(super) fn information(
        &self,
        option: u32,
        request: &InfoRequest,
        export: &Export,
        out: &mut Vec<u8>,
    ) {
        let mut piece = |kind: u16, parts: &[&[u8]]| {
            let mut data = kind.to_be_bytes().to_vec();
            for part in parts {
                data.extend_from_slice(part);
            }
            reply(out, option, option_reply::INFO, &data);
        };
        piece(
            info::EXPORT,
            &[
                &export.size_bytes.to_be_bytes(),
                &self.flags(export).to_be_bytes(),
            ],
        );
        for known in [info::NAME, info::DESCRIPTION, info::BLOCK_SIZE] {
            if !request.types.contains(&known) {
                continue;
            }
            match known {
                info::NAME => piece(known, &[clip(&export.name).as_bytes()]),
                info::DESCRIPTION if export.description.is_empty() => {}
                info::DESCRIPTION => piece(known, &[clip(&export.description).as_bytes()]),
                _ => piece(
                    known,
                    &[
                        &MIN_BLOCK_BYTES.to_be_bytes(),
                        &PREFERRED_BLOCK_BYTES.to_be_bytes(),
                        &MAX_PAYLOAD_BYTES.to_be_bytes(),
                    ],
                ),
            }
        }
    }

    pub(super) fn contexts(
        &mut self,
        option: u32,
        request: &MetaRequest,
        export: &Export,
        out: &mut Vec<u8>,
    ) {
        let listing = option == option::LIST_META_CONTEXT;
        // Queries of other namespaces, or of other leaves of `base:`, are ignored. `base:` alone asks for all of them
        // in a list and means nothing in a choice. The same context named twice is one context.
        let chosen = (listing && request.queries.is_empty())
            || request
                .queries
                .iter()
                .any(|query| query == BASE_ALLOCATION || (listing && query == "base:"));
        if chosen {
            let id = if listing { 0 } else { BASE_ALLOCATION_ID };
            let mut data = id.to_be_bytes().to_vec();
            data.extend_from_slice(BASE_ALLOCATION.as_bytes());
            reply(out, option, option_reply::META_CONTEXT, &data);
            if !listing {
                self.base_allocation = Some(export.volume);
            }
        }
        reply(out, option, option_reply::ACK, &[]);
    }
}

/// An option reply type and a text for people.
pub(super) type OptionRefusal<T> = (u32, T);

pub(super) fn known(data: Option<&[u8]>) -> Result<&[u8], OptionRefusal<&'static str>> {
    data.ok_or((option_reply::ERR_TOO_BIG, "the option is too long"))
}

pub(super) fn parsed<T>(
    parse: impl Fn(&[u8]) -> Result<T, Malformed>,
) -> impl Fn(&[u8]) -> Result<T, OptionRefusal<&'static str>> {
    move |data| parse(data).map_err(|Malformed(text)| (option_reply::ERR_INVALID, text))
}

pub(super) fn found(resolution: Resolution) -> Result<Export, OptionRefusal<String>> {
    match resolution {
        Resolution::Found(export) => Ok(export),
        Resolution::Unknown => Err((
            option_reply::ERR_UNKNOWN,
            "no volume has this name or id".to_owned(),
        )),
        Resolution::Unavailable(text) => Err((option_reply::ERR_PLATFORM, clip(&text).to_owned())),
        Resolution::Forbidden(text) => Err((option_reply::ERR_POLICY, clip(&text).to_owned())),
        Resolution::ShuttingDown => Err((
            option_reply::ERR_SHUTDOWN,
            "the server is shutting down".to_owned(),
        )),
    }
}

/// No string on the wire is longer than the protocol allows.
pub(super) fn clip(string: &str) -> &str {
    let mut end = string.len().min(MAX_STRING_BYTES);
    while !string.is_char_boundary(end) {
        end -= 1;
    }
    &string[..end]
}

pub(super) fn reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    out.extend_from_slice(
        OptionReplyHeader {
            magic: OPTION_REPLY_MAGIC.into(),
            option: option.into(),
            kind: kind.into(),
            length: (data.len() as u32).into(),
        }
        .as_bytes(),
    );
    out.extend_from_slice(data);
}
