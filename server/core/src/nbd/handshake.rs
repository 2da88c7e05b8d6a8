//! Fixed newstyle, as a machine: bytes in, replies and steps out.
//!
//! ```text
//! driver:  new ─> step ─┬─ NeedInput ──> read, feed ──────────────────────┐
//!                ^      ├─ Resolve(name) ─> look up, resolved ────────────┤
//!                │      ├─ List ─────────> list, listed ──────────────────┤
//!                │      ├─ StartTls ─────> TLS handshake, tls_established ┤
//!                │      ├─ Enter(session)  ───> transmission              │
//!                │      └─ Close(reason)   ───> close                     │
//!                └────────────────────────────────────────────────────────┘
//! ```
//! Before acting on any step the driver sends what was put into `out`. The machine keeps at most one option
//! ([`Limits::max_option_bytes`]) and whatever one `feed` brought; longer options are skipped as they come.

mod answers;

use self::answers::{clip, found, known, parsed, reply};
use super::options::{InfoRequest, MetaRequest, text};
use super::session::{ReplyStyle, Session, transmission_flags};
use super::wire::{
    GREETING_MAGIC, Greeting, OPTION_MAGIC, OptionHeader, handshake_flag, option, option_reply,
};
use crate::units::{ExportToken, VolumeId};
use zerocopy::{FromBytes, IntoBytes};

/// An export, as a look-up finds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// The volume.
    pub volume: VolumeId,
    /// Its name, at most 4096 bytes.
    pub name: String,
    /// For people; empty when there is none.
    pub description: String,
    /// Bytes.
    pub size_bytes: u64,
    /// Changes are refused.
    pub read_only: bool,
    /// What it was found by; `None`: the volume's name or id.
    pub token: Option<ExportToken>,
}

/// An entry of a list of exports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportName {
    /// Its name, at most 4096 bytes.
    pub name: String,
    /// For people; empty when there is none.
    pub description: String,
}

/// The outcome of a look-up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// This one.
    Found(Export),
    /// There is none of that name.
    Unknown,
    /// It cannot be served now; the text goes to the client.
    Unavailable(String),
    /// This client may not have it, now or later; the text goes to the client.
    Forbidden(String),
    /// The daemon is going away.
    ShuttingDown,
}

/// Whether the client must start TLS. Constant for a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsMode {
    /// There is no TLS here (NOTLS).
    Off,
    /// TLS for clients that ask for it (SELECTIVETLS, with no export that needs it).
    Offered,
    /// Nothing but STARTTLS and ABORT before TLS (FORCEDTLS).
    Required,
}

/// What an unknown peer may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Options in one handshake.
    pub max_options: u32,
    /// Data of one option that are kept in memory; longer ones are skipped and refused.
    pub max_option_bytes: u32,
    /// Bytes of all options together; a client that announces more is closed at once.
    pub max_total_bytes: u64,
}

impl Default for Limits {
    /// Room for a client that asks for the details of a thousand exports in one handshake, and for an option with two
    /// strings of the greatest length and sixty thousand bytes more.
    fn default() -> Limits {
        Limits {
            max_options: 4096,
            max_option_bytes: 64 << 10,
            max_total_bytes: 32 << 20,
        }
    }
}

/// What the driver does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Read from the socket, then [`Handshake::feed`].
    NeedInput,
    /// Look this export up (empty: the default export), then [`Handshake::resolved`].
    Resolve(String),
    /// List the exports, then [`Handshake::listed`].
    List,
    /// Do the server's side of a TLS handshake, then [`Handshake::tls_established`].
    StartTls,
    /// The handshake is over. [`Handshake::into_leftover`] has the bytes behind it.
    Enter(Session),
    /// Close the connection.
    Close(CloseReason),
}

/// Why a handshake ended without a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// The client sent ABORT; all is well.
    #[error("the client ended the handshake")]
    Aborted,
    /// Flags we do not know or did not offer.
    #[error("unknown client flags {0:#x}")]
    UnknownClientFlags(u32),
    /// Not an option: the stream is out of step.
    #[error("bad option magic")]
    BadOptionMagic,
    /// See [`Limits::max_options`].
    #[error("too many options")]
    TooManyOptions,
    /// See [`Limits::max_total_bytes`].
    #[error("too many bytes of options")]
    TooManyBytes,
    /// EXPORT_NAME cannot be answered with an error, so the session ends.
    #[error("EXPORT_NAME of an export that cannot be served")]
    ExportNameRefused,
    /// A client without FIXED_NEWSTYLE may send EXPORT_NAME only.
    #[error("an option other than EXPORT_NAME from a client without fixed newstyle")]
    NotFixedNewstyle,
    /// Bytes behind STARTTLS that were not encrypted; acting on them later would let a man in the middle speak for the
    /// client.
    #[error("plaintext behind STARTTLS")]
    PlaintextBehindStartTls,
}

/// What the machine waits for, or has come to.
#[derive(Debug)]
enum State {
    ClientFlags,
    Header,
    /// Keeping `length` bytes of an option's data.
    Data {
        option: u32,
        length: u32,
    },
    /// Throwing away the rest of an option that is too long to keep.
    Skip {
        option: u32,
        remaining: u32,
    },
    Asking(Question),
    Entered(Session),
    Closed(CloseReason),
}

/// What was asked of the driver.
#[derive(Debug)]
enum Question {
    ExportName { name: String },
    Info { option: u32, request: InfoRequest },
    Meta { option: u32, request: MetaRequest },
    List,
    Tls,
}

/// One connection's handshake.
#[derive(Debug)]
pub struct Handshake {
    tls_mode: TlsMode,
    limits: Limits,
    /// The question in `State::Asking` has been handed out.
    asked: bool,
    tls_on: bool,
    fixed_newstyle: bool,
    no_zeroes: bool,
    style: ReplyStyle,
    /// The volume `base:allocation` was chosen for.
    base_allocation: Option<VolumeId>,
    options: u32,
    option_bytes: u64,
    state: State,
    input: Vec<u8>,
    /// Bytes of `input` already used.
    used: usize,
}

impl Handshake {
    /// A new connection; puts the greeting into `out`.
    pub fn new(tls_mode: TlsMode, limits: Limits, out: &mut Vec<u8>) -> Handshake {
        out.extend_from_slice(
            Greeting {
                magic: GREETING_MAGIC.into(),
                option_magic: OPTION_MAGIC.into(),
                flags: (handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES).into(),
            }
            .as_bytes(),
        );
        Handshake {
            tls_mode,
            limits,
            asked: false,
            tls_on: false,
            fixed_newstyle: false,
            no_zeroes: false,
            style: ReplyStyle::Simple,
            base_allocation: None,
            options: 0,
            option_bytes: 0,
            state: State::ClientFlags,
            input: Vec::new(),
            used: 0,
        }
    }

    /// Gives the machine what the socket brought.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.input.drain(..self.used);
        self.used = 0;
        self.input.extend_from_slice(bytes);
    }

    /// Goes on until something is needed from outside, or the handshake is over.
    pub fn step(&mut self, out: &mut Vec<u8>) -> Step {
        loop {
            match &mut self.state {
                State::ClientFlags => match self.take::<4>() {
                    None => return Step::NeedInput,
                    Some(flags) => self.client_flags(u32::from_be_bytes(flags)),
                },
                State::Header => match self.take::<{ size_of::<OptionHeader>() }>() {
                    None => return Step::NeedInput,
                    Some(bytes) => self.header(
                        OptionHeader::read_from_bytes(&bytes).expect("the size is the type's"),
                    ),
                },
                State::Data { option, length } => {
                    let (option, length) = (*option, *length as usize);
                    if self.input.len() - self.used < length {
                        return Step::NeedInput;
                    }
                    let data = self.input[self.used..self.used + length].to_vec();
                    self.used += length;
                    self.state = State::Header;
                    self.option(option, Some(&data), out);
                }
                State::Skip { option, remaining } => {
                    let option = *option;
                    let here = (self.input.len() - self.used).min(*remaining as usize);
                    *remaining -= here as u32;
                    let done = *remaining == 0;
                    self.used += here;
                    if !done {
                        return Step::NeedInput;
                    }
                    self.state = State::Header;
                    self.option(option, None, out);
                }
                State::Asking(question) => {
                    debug_assert!(!self.asked, "the last question was not answered");
                    self.asked = true;
                    return match question {
                        Question::ExportName { name } => Step::Resolve(name.clone()),
                        Question::Info { request, .. } => Step::Resolve(request.name.clone()),
                        Question::Meta { request, .. } => Step::Resolve(request.name.clone()),
                        Question::List => Step::List,
                        Question::Tls => Step::StartTls,
                    };
                }
                State::Entered(session) => return Step::Enter(session.clone()),
                State::Closed(reason) => return Step::Close(*reason),
            }
        }
    }

    /// Answers [`Step::Resolve`].
    pub fn resolved(&mut self, resolution: Resolution, out: &mut Vec<u8>) {
        match self.answered() {
            Some(Question::ExportName { .. }) => match resolution {
                Resolution::Found(export) => {
                    let flags = self.flags(&export);
                    out.extend_from_slice(&export.size_bytes.to_be_bytes());
                    out.extend_from_slice(&flags.to_be_bytes());
                    if !self.no_zeroes {
                        out.extend_from_slice(&[0; 124]);
                    }
                    self.enter(&export);
                }
                _ => self.close(CloseReason::ExportNameRefused),
            },
            Some(Question::Info { option, request }) => match found(resolution) {
                Ok(export) => {
                    self.information(option, &request, &export, out);
                    reply(out, option, option_reply::ACK, &[]);
                    if option == option::GO {
                        self.enter(&export);
                    }
                }
                Err((kind, text)) => reply(out, option, kind, text.as_bytes()),
            },
            Some(Question::Meta { option, request }) => match found(resolution) {
                Ok(export) => self.contexts(option, &request, &export, out),
                Err((kind, text)) => reply(out, option, kind, text.as_bytes()),
            },
            other => debug_assert!(false, "resolved does not answer {other:?}"),
        }
    }

    /// Answers [`Step::List`].
    pub fn listed(&mut self, exports: Result<&[ExportName], Resolution>, out: &mut Vec<u8>) {
        let answered = self.answered();
        debug_assert!(matches!(answered, Some(Question::List)));
        match exports {
            Ok(exports) => {
                for export in exports {
                    let name = clip(&export.name);
                    let mut data = Vec::with_capacity(4 + name.len() + export.description.len());
                    data.extend_from_slice(&(name.len() as u32).to_be_bytes());
                    data.extend_from_slice(name.as_bytes());
                    data.extend_from_slice(clip(&export.description).as_bytes());
                    reply(out, option::LIST, option_reply::SERVER, &data);
                }
                reply(out, option::LIST, option_reply::ACK, &[]);
            }
            Err(resolution) => {
                let (kind, text) = match found(resolution) {
                    Err(refusal) => refusal,
                    Ok(_) => (option_reply::ERR_PLATFORM, String::new()),
                };
                reply(out, option::LIST, kind, text.as_bytes());
            }
        }
    }

    /// Answers [`Step::StartTls`]: from here on, bytes are what TLS decrypted. Everything agreed before is forgotten.
    pub fn tls_established(&mut self) {
        let answered = self.answered();
        debug_assert!(matches!(answered, Some(Question::Tls)));
        self.tls_on = true;
        self.style = ReplyStyle::Simple;
        self.base_allocation = None;
    }

    /// The bytes behind the last option: the start of transmission.
    pub fn into_leftover(mut self) -> Vec<u8> {
        self.input.drain(..self.used);
        self.input
    }

    fn answered(&mut self) -> Option<Question> {
        debug_assert!(self.asked, "there was no question");
        self.asked = false;
        match std::mem::replace(&mut self.state, State::Header) {
            State::Asking(question) => Some(question),
            other => {
                self.state = other;
                None
            }
        }
    }

    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let bytes = *self.input[self.used..].first_chunk::<N>()?;
        self.used += N;
        Some(bytes)
    }

    fn close(&mut self, reason: CloseReason) {
        self.state = State::Closed(reason);
    }

    fn client_flags(&mut self, flags: u32) {
        let fixed = u32::from(handshake_flag::FIXED_NEWSTYLE);
        let no_zeroes = u32::from(handshake_flag::NO_ZEROES);
        if flags & !(fixed | no_zeroes) != 0 {
            return self.close(CloseReason::UnknownClientFlags(flags));
        }
        self.fixed_newstyle = flags & fixed != 0;
        self.no_zeroes = flags & no_zeroes != 0;
        self.state = State::Header;
    }

    fn header(&mut self, header: OptionHeader) {
        if header.magic.get() != OPTION_MAGIC {
            return self.close(CloseReason::BadOptionMagic);
        }
        let (option, length) = (header.option.get(), header.length.get());
        self.options += 1;
        self.option_bytes += u64::from(length);
        if self.options > self.limits.max_options {
            return self.close(CloseReason::TooManyOptions);
        }
        if self.option_bytes > self.limits.max_total_bytes {
            return self.close(CloseReason::TooManyBytes);
        }
        self.state = if length > self.limits.max_option_bytes {
            State::Skip {
                option,
                remaining: length,
            }
        } else {
            State::Data { option, length }
        };
    }

    /// One whole option; `data` is `None` when there was too much of it to keep.
    fn option(&mut self, option: u32, data: Option<&[u8]>, out: &mut Vec<u8>) {
        if option == option::ABORT {
            // Data are ignored, TLS is not asked for, and an unfixed client may read the ACK or not.
            reply(out, option, option_reply::ACK, &[]);
            return self.close(CloseReason::Aborted);
        }
        if !self.fixed_newstyle && option != option::EXPORT_NAME {
            return self.close(CloseReason::NotFixedNewstyle);
        }
        let tls_missing = self.tls_mode == TlsMode::Required && !self.tls_on;
        if tls_missing && option == option::EXPORT_NAME {
            return self.close(CloseReason::ExportNameRefused);
        }
        if tls_missing && option != option::STARTTLS {
            let text = b"this server talks over TLS only: send STARTTLS first";
            return reply(out, option, option_reply::ERR_TLS_REQD, text);
        }
        match option {
            option::EXPORT_NAME => self.export_name(data),
            option::LIST => {
                if self.expect_no_data(option, data, out) {
                    self.state = State::Asking(Question::List);
                }
            }
            option::STARTTLS => {
                if self.expect_no_data(option, data, out) {
                    self.starttls(out);
                }
            }
            option::STRUCTURED_REPLY => {
                if self.expect_no_data(option, data, out) {
                    self.structured_reply(out);
                }
            }
            option::EXTENDED_HEADERS => {
                if self.expect_no_data(option, data, out) {
                    self.extended_headers(out);
                }
            }
            option::INFO | option::GO => match known(data).and_then(parsed(InfoRequest::parse)) {
                Ok(request) => self.state = State::Asking(Question::Info { option, request }),
                Err((kind, text)) => reply(out, option, kind, text.as_bytes()),
            },
            option::LIST_META_CONTEXT => match known(data).and_then(parsed(MetaRequest::parse)) {
                Ok(request) => self.state = State::Asking(Question::Meta { option, request }),
                Err((kind, text)) => reply(out, option, kind, text.as_bytes()),
            },
            option::SET_META_CONTEXT => {
                // The old choice goes, whatever becomes of this one.
                self.base_allocation = None;
                let request = if self.style == ReplyStyle::Simple {
                    Err((
                        option_reply::ERR_INVALID,
                        "negotiate structured replies or extended headers first",
                    ))
                } else {
                    known(data).and_then(parsed(MetaRequest::parse))
                };
                match request {
                    Ok(request) => self.state = State::Asking(Question::Meta { option, request }),
                    Err((kind, text)) => reply(out, option, kind, text.as_bytes()),
                }
            }
            _ => reply(out, option, option_reply::ERR_UNSUP, b"unknown option"),
        }
    }

    fn expect_no_data(&mut self, option: u32, data: Option<&[u8]>, out: &mut Vec<u8>) -> bool {
        let empty = data.is_some_and(<[u8]>::is_empty);
        if !empty {
            let text = b"this option takes no data";
            reply(out, option, option_reply::ERR_INVALID, text);
        }
        empty
    }

    fn export_name(&mut self, data: Option<&[u8]>) {
        // Its answer has no room for an error, and none for a session with extended headers.
        match data.map(text) {
            Some(Ok(name)) if self.style != ReplyStyle::Extended => {
                let name = name.to_owned();
                self.state = State::Asking(Question::ExportName { name });
            }
            _ => self.close(CloseReason::ExportNameRefused),
        }
    }

    fn starttls(&mut self, out: &mut Vec<u8>) {
        let option = option::STARTTLS;
        if self.tls_mode == TlsMode::Off {
            let text = b"this server has no TLS";
            return reply(out, option, option_reply::ERR_POLICY, text);
        }
        if self.tls_on {
            return reply(out, option, option_reply::ERR_INVALID, b"TLS is on");
        }
        if self.used < self.input.len() {
            return self.close(CloseReason::PlaintextBehindStartTls);
        }
        reply(out, option, option_reply::ACK, &[]);
        self.state = State::Asking(Question::Tls);
    }

    fn structured_reply(&mut self, out: &mut Vec<u8>) {
        let option = option::STRUCTURED_REPLY;
        match self.style {
            ReplyStyle::Simple => {
                self.style = ReplyStyle::Structured;
                reply(out, option, option_reply::ACK, &[]);
            }
            ReplyStyle::Structured => {
                let text = b"structured replies are on";
                reply(out, option, option_reply::ERR_INVALID, text);
            }
            ReplyStyle::Extended => {
                let text = b"extended headers are on";
                reply(out, option, option_reply::ERR_EXT_HEADER_REQD, text);
            }
        }
    }

    fn extended_headers(&mut self, out: &mut Vec<u8>) {
        let option = option::EXTENDED_HEADERS;
        if self.style == ReplyStyle::Extended {
            let text = b"extended headers are on";
            return reply(out, option, option_reply::ERR_INVALID, text);
        }
        self.style = ReplyStyle::Extended;
        reply(out, option, option_reply::ACK, &[]);
    }

    fn has_base_allocation(&self, export: &Export) -> bool {
        self.style != ReplyStyle::Simple && self.base_allocation == Some(export.volume)
    }

    fn flags(&self, export: &Export) -> u16 {
        transmission_flags(
            self.style,
            self.has_base_allocation(export),
            export.read_only,
        )
    }

    fn enter(&mut self, export: &Export) {
        self.state = State::Entered(Session {
            volume: export.volume,
            style: self.style,
            base_allocation: self.has_base_allocation(export),
            read_only: export.read_only,
            token: export.token,
            size_bytes: export.size_bytes,
        });
    }
}

#[cfg(test)]
mod tests;
