//! The least that an NBD server can do: a yardstick, as the bare file is one.
//!
//! It answers rightly and keeps nothing. A read goes to the file by the shortest way: a direct `pread` when it is alone,
//! io_uring when there are several. What is written stays where the socket's bytes were received, in memory that is used
//! again in time. A flush appends what came since the last one, as far as that memory still has it, to a second file, in
//! one durable write. There are no checksums, no index and nothing to be found again. It shows about what the socket, the
//! client, the disk and the kernel leave for a server to gain. It is no bound: it answers what has ended at once, and one that
//! orders its work with more thought may be faster.
//!
//! One thread serves one connection. While the disk has none of its reads it may look for the next request for some time
//! before it sleeps; the two ways are measured apart.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ashlar_core::nbd::errors;
use ashlar_core::nbd::session::transmission_flag;
use ashlar_core::nbd::wire::{self, command, handshake_flag, option, option_reply};
use io_uring::{IoUring, opcode, types};
use memmap2::MmapMut;
use rustix::io::{Errno, ReadWriteFlags};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};
use zerocopy::big_endian::U64;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// What it serves, and how.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct LeastServer {
    /// Unix socket to listen on.
    #[arg(long)]
    socket: PathBuf,
    /// File to read from.
    #[arg(long)]
    file: PathBuf,
    /// File that flushes append to; it is made anew.
    #[arg(long)]
    log: PathBuf,
    /// Time after answers in which it looks for requests before it sleeps, in microseconds.
    #[arg(long, default_value_t = 0)]
    look_us: u64,
}

const BLOCK_BYTES: usize = 4096;
/// Memory that the bytes of the socket are received into.
const MEMORY_BYTES: usize = 64 << 20;
/// Longest request, and most bytes received at a time.
const REQUEST_BYTES: usize = 1 << 20;
const LOG_BYTES: u64 = 64 << 20;
/// Reads under way at a time.
const READS: usize = 64;
const SOCKET_BYTES: usize = 1 << 20;
const EINVAL: u32 = errors::Errno::Inval as u32;

impl LeastServer {
    /// Serves until the process is ended.
    pub(crate) fn run(&self) -> Result<()> {
        let listener =
            UnixListener::bind(&self.socket).with_context(|| self.socket.display().to_string())?;
        fill(&self.log).with_context(|| self.log.display().to_string())?;
        loop {
            let (socket, _) = listener.accept()?;
            let server = self.clone();
            thread::spawn(move || {
                if let Err(error) = server.serve(socket) {
                    eprintln!("a connection ended: {error:#}");
                }
            });
        }
    }

    fn serve(&self, mut socket: UnixStream) -> Result<()> {
        let direct = |path| {
            let mut options = OpenOptions::new();
            options.read(true).write(true);
            options.custom_flags(rustix::fs::OFlags::DIRECT.bits().cast_signed());
            options.open(path)
        };
        let file = direct(&self.file)?;
        let size_bytes = file.metadata()?.len();
        if !negotiate(&mut socket, size_bytes)? {
            return Ok(());
        }
        rustix::net::sockopt::set_socket_send_buffer_size(&socket, SOCKET_BYTES)?;
        let mut memory = MmapMut::map_anon(MEMORY_BYTES)?;
        // No page is touched for the first time while something is measured.
        memory.fill(1);
        let mut connection = Connection {
            socket,
            file,
            size_bytes,
            log: direct(&self.log)?,
            log_at: 0,
            ring: IoUring::new(4 * READS as u32)?,
            look: Duration::from_micros(self.look_us),
            memory,
            start: 0,
            end: 0,
            unflushed: 0,
            is_dirty: false,
            buffers: MmapMut::map_anon(READS * REQUEST_BYTES)?,
            reads: [None; READS],
            free: (0..READS).collect(),
            is_polled: false,
            answers: Vec::new(),
        };
        connection.run()
    }
}

/// Writes a file in full, so that what is written later finds its blocks there.
fn fill(path: &Path) -> io::Result<()> {
    let mut file = File::create(path)?;
    let piece = vec![1; REQUEST_BYTES];
    for _ in 0..LOG_BYTES / REQUEST_BYTES as u64 {
        file.write_all(&piece)?;
    }
    file.sync_all()
}

/// The handshake. False: the client has gone.
fn negotiate(socket: &mut UnixStream, size_bytes: u64) -> Result<bool> {
    let greeting = wire::Greeting {
        magic: wire::GREETING_MAGIC.into(),
        option_magic: wire::OPTION_MAGIC.into(),
        flags: (handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES).into(),
    };
    socket.write_all(greeting.as_bytes())?;
    let mut client_flags = [0; 4];
    if socket.read_exact(&mut client_flags).is_err() {
        return Ok(false);
    }
    let flags = transmission_flag::HAS_FLAGS | transmission_flag::SEND_FLUSH;
    let mut export = size_bytes.to_be_bytes().to_vec();
    export.extend(flags.to_be_bytes());
    loop {
        let mut header = wire::OptionHeader::new_zeroed();
        socket.read_exact(header.as_mut_bytes())?;
        let length = header.length.get() as usize;
        ensure!(
            header.magic == wire::OPTION_MAGIC && length <= wire::MAX_STRING_BYTES,
            "not an option"
        );
        socket.read_exact(&mut vec![0; length])?;
        let mut reply = |kind: u32, body: &[u8]| {
            let header = wire::OptionReplyHeader {
                magic: wire::OPTION_REPLY_MAGIC.into(),
                option: header.option,
                kind: kind.into(),
                length: (body.len() as u32).into(),
            };
            socket.write_all(&[header.as_bytes(), body].concat())
        };
        match header.option.get() {
            option::EXPORT_NAME => {
                let no_zeroes = u32::from(handshake_flag::NO_ZEROES);
                let wants_zeroes = u32::from_be_bytes(client_flags) & no_zeroes == 0;
                export.resize(export.len() + if wants_zeroes { 124 } else { 0 }, 0);
                socket.write_all(&export)?;
                return Ok(true);
            }
            chosen @ (option::INFO | option::GO) => {
                let body = [&wire::info::EXPORT.to_be_bytes(), &export[..]].concat();
                reply(option_reply::INFO, &body)?;
                reply(option_reply::ACK, &[])?;
                if chosen == option::GO {
                    return Ok(true);
                }
            }
            _ => reply(option_reply::ERR_UNSUP, &[])?,
        }
    }
}

/// A read that the disk has.
#[derive(Clone, Copy, Debug)]
struct Reading {
    cookie: U64,
    len: usize,
}

/// An answer that is to be sent.
#[derive(Clone, Copy)]
struct Answer {
    header: wire::SimpleReplyHeader,
    /// The buffer with its data, and their length.
    data: Option<(usize, usize)>,
}

impl Answer {
    fn new(cookie: U64, error: u32, data: Option<(usize, usize)>) -> Answer {
        let header = wire::SimpleReplyHeader {
            magic: wire::SIMPLE_REPLY_MAGIC.into(),
            error: error.into(),
            cookie,
        };
        Answer { header, data }
    }
}

struct Connection {
    socket: UnixStream,
    file: File,
    size_bytes: u64,
    log: File,
    log_at: u64,
    ring: IoUring,
    look: Duration,
    /// What was received; requests that are not answered yet are `start..end`.
    memory: MmapMut,
    start: usize,
    end: usize,
    /// Where what no flush has made durable begins, and whether a write is in it.
    unflushed: usize,
    is_dirty: bool,
    /// One for each read under way.
    buffers: MmapMut,
    reads: [Option<Reading>; READS],
    free: Vec<usize>,
    /// The ring tells when the socket has something.
    is_polled: bool,
    answers: Vec<Answer>,
}

impl Drop for Connection {
    /// Waits for what the kernel still writes into the buffers.
    fn drop(&mut self) {
        while self.reads.iter().any(Option::is_some) {
            if self.ring.submit_and_wait(1).is_err() {
                // The memory must not be used for anything else.
                std::process::abort();
            }
            for entry in self.ring.completion() {
                if entry.user_data() != SOCKET {
                    self.reads[entry.user_data() as usize] = None;
                }
            }
        }
    }
}

/// What the ring calls the socket; reads have the number of their buffer.
const SOCKET: u64 = u64::MAX;

impl Connection {
    fn run(&mut self) -> Result<()> {
        loop {
            let came = if self.free.len() == READS {
                self.receive_or_sleep()?
            } else {
                self.wait_for_reads()?
            };
            if came == Some(0) || self.take_requests()? {
                return Ok(());
            }
            // The disk begins before the answers are copied out.
            if !self.ring.submission().is_empty() {
                self.ring.submit()?;
            }
            self.send_answers()?;
        }
    }

    /// Bytes that came; zero is the end.
    fn receive(&mut self, flags: RecvFlags) -> Result<usize, Errno> {
        let room = &mut self.memory[self.end..self.end + REQUEST_BYTES];
        let (count, _) = rustix::net::recv(&self.socket, room, flags)?;
        self.end += count;
        Ok(count)
    }

    fn receive_or_sleep(&mut self) -> Result<Option<usize>> {
        if !self.look.is_zero() {
            let until = Instant::now() + self.look;
            while Instant::now() < until {
                match self.receive(RecvFlags::DONTWAIT) {
                    Err(Errno::AGAIN) => {}
                    result => return Ok(Some(result?)),
                }
            }
        }
        Ok(Some(self.receive(RecvFlags::empty())?))
    }

    /// Waits until the disk has read something or the socket has something.
    fn wait_for_reads(&mut self) -> Result<Option<usize>> {
        if !self.is_polled {
            let socket = types::Fd(self.socket.as_raw_fd());
            let poll = opcode::PollAdd::new(socket, rustix::event::PollFlags::IN.bits().into());
            // SAFETY: a poll refers to no memory, and the kernel holds the socket that it refers to.
            unsafe {
                self.ring
                    .submission()
                    .push(&poll.build().user_data(SOCKET))?
            };
            self.is_polled = true;
        }
        self.ring.submit_and_wait(1)?;
        let mut is_readable = false;
        for entry in self.ring.completion() {
            if entry.user_data() == SOCKET {
                self.is_polled = false;
                is_readable = true;
                continue;
            }
            let buffer = entry.user_data() as usize;
            let Some(read) = self.reads[buffer].take() else {
                bail!("the ring ended what was not begun");
            };
            ensure!(entry.result() == read.len as i32, "a read was cut short");
            self.answers
                .push(Answer::new(read.cookie, 0, Some((buffer, read.len))));
        }
        if !is_readable {
            return Ok(None);
        }
        match self.receive(RecvFlags::DONTWAIT) {
            Err(Errno::AGAIN) => Ok(None),
            result => Ok(Some(result?)),
        }
    }

    /// Carries out what was received. True: the client says goodbye.
    fn take_requests(&mut self) -> Result<bool> {
        while let Ok((header, _)) =
            wire::RequestHeader::read_from_prefix(&self.memory[self.start..self.end])
        {
            ensure!(
                !self.free.is_empty(),
                "more reads at once than there are buffers"
            );
            ensure!(header.magic == wire::REQUEST_MAGIC, "not a request");
            let (command, cookie) = (header.command.get(), header.cookie);
            let (offset, len) = (header.offset.get(), header.length.get() as usize);
            ensure!(len <= REQUEST_BYTES / 2, "too long a request");
            let payload = if command == command::WRITE { len } else { 0 };
            let whole = size_of_val(&header) + payload;
            if self.end - self.start < whole {
                break;
            }
            self.start += whole;
            let until = offset.checked_add(len as u64);
            let is_inside = until.is_some_and(|until| until <= self.size_bytes);
            match command {
                command::READ if is_inside => self.read(cookie, offset, len)?,
                command::WRITE if is_inside => {
                    self.is_dirty = true;
                    self.answers.push(Answer::new(cookie, 0, None));
                }
                command::FLUSH => {
                    self.append()?;
                    self.answers.push(Answer::new(cookie, 0, None));
                }
                command::DISC => return Ok(true),
                _ => self.answers.push(Answer::new(cookie, EINVAL, None)),
            }
        }
        if MEMORY_BYTES - self.end < 2 * REQUEST_BYTES {
            // What a client flushes now and then is little, and kept until it does.
            if self.start - self.unflushed <= REQUEST_BYTES {
                self.append()?;
            }
            self.memory.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
            self.unflushed = 0;
        }
        Ok(false)
    }

    fn read(&mut self, cookie: U64, offset: u64, len: usize) -> Result<()> {
        let is_alone = self.free.len() == READS && self.start == self.end;
        let Some(buffer) = self.free.pop() else {
            bail!("no buffer for a read");
        };
        let at = buffer * REQUEST_BYTES;
        if is_alone && self.answers.is_empty() {
            let data = &mut self.buffers[at..at + len];
            self.file.read_exact_at(data, offset)?;
            self.answers
                .push(Answer::new(cookie, 0, Some((buffer, len))));
            return Ok(());
        }
        let file = types::Fd(self.file.as_raw_fd());
        let data = self.buffers.as_mut_ptr().wrapping_add(at);
        let read = opcode::Read::new(file, data, len as u32).offset(offset);
        // SAFETY: the buffer is this read's alone until its answer is sent, and is not given up before the read has ended: see
        // `Drop`.
        unsafe {
            self.ring
                .submission()
                .push(&read.build().user_data(buffer as u64))?;
        }
        self.reads[buffer] = Some(Reading { cookie, len });
        Ok(())
    }

    /// Makes what came since the last time durable.
    fn append(&mut self) -> Result<()> {
        // Requests lie there too: a flush that follows another has nothing to append.
        if !std::mem::take(&mut self.is_dirty) {
            self.unflushed = self.start;
            return Ok(());
        }
        let from = self.unflushed / BLOCK_BYTES * BLOCK_BYTES;
        let until = self.start.next_multiple_of(BLOCK_BYTES);
        for piece in self.memory[from..until].chunks(REQUEST_BYTES) {
            if self.log_at + piece.len() as u64 > LOG_BYTES {
                self.log_at = 0;
            }
            let written = rustix::io::pwritev2(
                &self.log,
                &[IoSlice::new(piece)],
                self.log_at,
                ReadWriteFlags::DSYNC,
            )?;
            ensure!(written == piece.len(), "an append was cut short");
            self.log_at += piece.len() as u64;
        }
        self.unflushed = self.start;
        Ok(())
    }

    fn send_answers(&mut self) -> Result<()> {
        let mut pieces: Vec<IoSlice<'_>> = Vec::with_capacity(2 * self.answers.len());
        for answer in &self.answers {
            pieces.push(IoSlice::new(answer.header.as_bytes()));
            if let Some((buffer, len)) = answer.data {
                let at = buffer * REQUEST_BYTES;
                pieces.push(IoSlice::new(&self.buffers[at..at + len]));
            }
        }
        let mut left = &mut pieces[..];
        while !left.is_empty() {
            let sent = rustix::net::sendmsg(
                &self.socket,
                left,
                &mut SendAncillaryBuffer::default(),
                SendFlags::NOSIGNAL,
            )?;
            IoSlice::advance_slices(&mut left, sent);
        }
        self.free.extend(
            self.answers
                .drain(..)
                .filter_map(|answer| Some(answer.data?.0)),
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
        let header = wire::RequestHeader {
            magic: wire::REQUEST_MAGIC.into(),
            flags: 0.into(),
            command: command.into(),
            cookie: cookie.into(),
            offset: offset.into(),
            length: length.into(),
        };
        header.as_bytes().to_vec()
    }

    /// The cookie and error of an answer, and so many bytes behind it.
    fn answer(socket: &mut UnixStream, len: usize) -> (u64, u32, Vec<u8>) {
        let mut header = wire::SimpleReplyHeader::new_zeroed();
        socket.read_exact(header.as_mut_bytes()).unwrap();
        assert_eq!(header.magic, wire::SIMPLE_REPLY_MAGIC);
        let mut data = vec![0; len];
        socket.read_exact(&mut data).unwrap();
        (header.cookie.get(), header.error.get(), data)
    }

    #[test]
    fn it_reads_the_file_and_a_flush_appends_what_was_written() {
        // Beside the build, which is on a disk that takes O_DIRECT.
        let program = std::env::current_exe().unwrap();
        let folder = program.with_extension(format!("least-{}", std::process::id()));
        std::fs::create_dir(&folder).unwrap();
        let file = folder.join("file");
        let content: Vec<u8> = (0..16 * BLOCK_BYTES)
            .map(|at| (at / BLOCK_BYTES) as u8)
            .collect();
        std::fs::write(&file, &content).unwrap();
        let log = folder.join("log");
        fill(&log).unwrap();
        let server = LeastServer {
            socket: PathBuf::new(),
            file,
            log: log.clone(),
            look_us: 50,
        };
        let (mut client, socket) = UnixStream::pair().unwrap();
        let served = thread::spawn(move || server.serve(socket));

        client.read_exact(&mut [0; 18]).unwrap();
        client.write_all(&3u32.to_be_bytes()).unwrap();
        let hello = wire::OptionHeader {
            magic: wire::OPTION_MAGIC.into(),
            option: option::EXPORT_NAME.into(),
            length: 0.into(),
        };
        client.write_all(hello.as_bytes()).unwrap();
        let mut size = U64::new(0);
        client.read_exact(size.as_mut_bytes()).unwrap();
        client.read_exact(&mut [0; 2]).unwrap();
        assert_eq!(size, content.len() as u64);

        client
            .write_all(&request(command::READ, 1, 8192, 4096))
            .unwrap();
        assert_eq!(answer(&mut client, 4096), (1, 0, vec![2; 4096]));
        // Several at once go by the ring, and are answered as they end.
        let three: Vec<u8> = (0..3)
            .flat_map(|at| request(command::READ, at, at * 4096, 4096))
            .collect();
        client.write_all(&three).unwrap();
        for _ in 0..3 {
            let (cookie, error, data) = answer(&mut client, 4096);
            assert_eq!((error, data), (0, vec![cookie as u8; 4096]));
        }
        let mut write = request(command::WRITE, 4, 0, 4096);
        write.extend([77; 4096]);
        write.extend(request(command::FLUSH, 5, 0, 0));
        client.write_all(&write).unwrap();
        assert_eq!(answer(&mut client, 0), (4, 0, Vec::new()));
        assert_eq!(answer(&mut client, 0), (5, 0, Vec::new()));
        let logged = std::fs::read(&log).unwrap();
        assert!(
            logged
                .windows(4096)
                .take(8192)
                .any(|bytes| bytes == [77; 4096])
        );
        client
            .write_all(&request(command::READ, 6, 1 << 40, 4096))
            .unwrap();
        assert_eq!(answer(&mut client, 0), (6, EINVAL, Vec::new()));
        client.write_all(&request(command::DISC, 7, 0, 0)).unwrap();
        served.join().unwrap().unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
