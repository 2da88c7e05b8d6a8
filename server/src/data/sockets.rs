//! The sockets of a data thread: receiving, sending, pausing and ending connections.

use std::time::{Duration, Instant};

use super::connection::Phase;
use super::operation::Payload;
use super::receiver::{Next, Received};
use super::thread::DataThread;

/// Bytes received from one connection in a turn before the others have theirs.
const TURN_BYTES: usize = 1 << 20;
/// Connections that may keep a receive buffer between turns because the beginning of a request lies in it.
const HELD_RECEIVE_BUFFERS: usize = 32;
/// How often such connections are looked at.
const SWEEP: Duration = Duration::from_secs(1);
/// How long the rest of a request that came in part is looked for: clients send a header and what follows it by two calls.
const REST: Duration = Duration::from_micros(4);
/// A request this small is let in even when the daemon's buffers are all lent, so that no client is starved by others.
const ALWAYS_ADMITTED_BYTES: usize = 64 << 10;

impl DataThread {
    // -- sockets

    pub(super) fn make_ready(&mut self, key: u32) {
        let connection = &mut self.connections[key as usize];
        if !connection.is_ready {
            connection.is_ready = true;
            self.ready.push(key);
        }
    }

    pub(super) fn make_dirty(&mut self, key: u32) {
        let connection = &mut self.connections[key as usize];
        if !connection.is_dirty {
            connection.is_dirty = true;
            self.dirty.push(key);
        }
    }

    pub(super) fn kill(&mut self, key: u32) {
        let connection = &mut self.connections[key as usize];
        if connection.phase != Phase::Dead {
            connection.phase = Phase::Dead;
            self.dead.push(key);
        }
    }

    pub(super) fn on_readable(&mut self, token: u32, hang_up: bool) {
        if let Some(connection) = self.connections.get_mut(token as usize) {
            connection.readable = true;
            connection.hang_up |= hang_up;
            if hang_up {
                connection.stream.hung_up();
            }
            connection.was_idle = false;
            if !connection.is_paused {
                self.make_ready(token);
            }
        }
    }

    pub(super) fn on_writable(&mut self, token: u32) {
        if let Some(connection) = self.connections.get_mut(token as usize) {
            connection.is_blocked = false;
            self.make_dirty(token);
        }
    }

    pub(super) fn serve_ready(&mut self) {
        let mut ready = std::mem::take(&mut self.ready);
        for key in ready.drain(..) {
            if let Some(connection) = self.connections.get_mut(key as usize) {
                connection.is_ready = false;
                self.serve(key);
            }
        }
        // Those that were made ready meanwhile have used their share of this turn.
        ready.append(&mut self.ready);
        self.ready = ready;
    }

    /// Takes requests from one connection and receives more, until its socket is empty or its share is used.
    pub(super) fn serve(&mut self, key: u32) {
        if self.stores_are_closing() {
            return;
        }
        let mut left = TURN_BYTES;
        let mut rest_until = None;
        loop {
            if !self.take_requests(key) {
                return;
            }
            let connection = &mut self.connections[key as usize];
            // The rest of a request whose first part came by itself is on its way.
            if !connection.readable
                && connection.receiver.is_mid_small_request()
                && self.rest.tries()
            {
                connection.readable = true;
                rest_until = Some(Instant::now() + REST);
            }
            // A drain finishes what was received and receives no more.
            if !connection.readable || connection.phase != Phase::Open || self.drain.is_some() {
                break;
            }
            if left == 0 {
                self.make_ready(key);
                return;
            }
            let scarce = self.pool.used_bytes() > self.limits.bytes;
            let received = connection.receiver.receive(
                &mut connection.stream,
                &mut self.pool,
                &mut self.stores,
                scarce,
            );
            self.metrics.receives.add(1);
            let connection = &mut self.connections[key as usize];
            match received {
                Ok(Received::Bytes { count, drained }) => {
                    connection.moved_at = self.now;
                    self.metrics.received_bytes.add(count as u64);
                    left = left.saturating_sub(count);
                    if drained && !connection.hang_up {
                        connection.readable = false;
                    }
                    if rest_until.take().is_some() {
                        self.rest.learn(true);
                    }
                }
                Ok(Received::WouldBlock) => match rest_until {
                    Some(until) if Instant::now() < until => {}
                    Some(_) => {
                        self.rest.learn(false);
                        connection.readable = false;
                        break;
                    }
                    None => connection.readable = false,
                },
                Ok(Received::End) => {
                    connection.readable = false;
                    if connection.receiver.is_mid_request() {
                        tracing::debug!(
                            peer = connection.peer,
                            "the client hung up in the middle of a request"
                        );
                    }
                    self.leave(key);
                    return;
                }
                Err(error) => {
                    tracing::debug!(peer = connection.peer, %error, "receiving failed");
                    self.kill(key);
                    return;
                }
            }
        }
        self.release_receive_buffer(key);
    }

    /// Hands every whole request on. False when the connection takes no more for now.
    pub(super) fn take_requests(&mut self, key: u32) -> bool {
        loop {
            let connection = &mut self.connections[key as usize];
            if connection.phase != Phase::Open {
                return false;
            }
            let limits = self.limits;
            let (now, born) = (self.now, self.born);
            let (used, working) = (self.pool.used_bytes(), self.pool.working_bytes());
            let (held, in_flight) = (
                connection.held_bytes + connection.outbox.header_bytes(),
                connection.in_flight,
            );
            let admit = |needs: usize| {
                // One request is let in whatever its size, so that every client gets on. What others hold by what they
                // have sent does not keep it out: they may be waiting for the same.
                let own = held == 0 || held + needs <= limits.bytes_per_connection;
                let all = used + needs <= limits.bytes
                    || (held == 0 && working <= limits.bytes / 2)
                    || (needs <= ALWAYS_ADMITTED_BYTES && held <= ALWAYS_ADMITTED_BYTES);
                own && all && in_flight < limits.requests_per_connection
            };
            let next = connection.receiver.next(
                &connection.session,
                &mut self.pool,
                &mut self.stores,
                &self.volumes[connection.volume],
                || now.duration_since(born).as_nanos() as u64,
                admit,
            );
            match next {
                Next::Incomplete => return true,
                Next::Paused => {
                    if !connection.is_paused {
                        connection.is_paused = true;
                        self.paused.push(key);
                        self.metrics.pauses.add(1);
                        self.next_sweep.get_or_insert(self.now + SWEEP);
                    }
                    return false;
                }
                Next::Held(hold) => {
                    self.hold_back(key, hold);
                    return false;
                }
                Next::Request { request, from, len } => {
                    let payload: &[u8] = match connection.receiver.buffer() {
                        // SAFETY: `from..from + len` was received, and the receive buffer is neither moved nor written
                        // to before `next` or `receive` are called again, which serving a request does not do: it
                        // never removes a connection.
                        Some(buffer) if len > 0 => unsafe {
                            std::slice::from_raw_parts(buffer.at(from), len)
                        },
                        _ => &[],
                    };
                    self.request(key, request, Payload::Received(payload));
                }
                Next::Buffered { request, buffer } => {
                    self.request(key, request, Payload::Buffered(buffer));
                }
                Next::Landed { request, landed } => {
                    self.request(key, request, Payload::Landed(landed));
                }
                Next::Refuse {
                    cookie,
                    offset,
                    command,
                    error,
                } => self.refuse(key, cookie, offset, command, error),
                Next::Disconnect => {
                    self.leave(key);
                    return false;
                }
                Next::Close(reason) => {
                    tracing::info!(peer = connection.peer, %reason, "closing a connection");
                    self.metrics.protocol_errors.add(1);
                    self.leave(key);
                    return false;
                }
            }
        }
    }

    /// Takes no more requests; the connection ends when what was taken has been answered.
    pub(super) fn leave(&mut self, key: u32) {
        let connection = &mut self.connections[key as usize];
        if connection.phase == Phase::Open {
            connection.phase = Phase::Leaving;
            connection.receiver.clear(&mut self.pool, &mut self.stores);
            self.freed = true;
            let settled = connection.is_settled();
            self.buffer_released(key);
            if settled {
                self.kill(key);
            }
        }
    }

    pub(super) fn release_receive_buffer(&mut self, key: u32) {
        let connection = &mut self.connections[key as usize];
        if !connection.receiver.holds_buffer() {
            return;
        }
        // A payload that is half here will go on in a moment; moving it would be a copy for nothing.
        if connection.receiver.has_bytes()
            && (connection.keeps_buffer || self.held_receive_buffers < HELD_RECEIVE_BUFFERS)
        {
            if !connection.keeps_buffer {
                connection.keeps_buffer = true;
                self.held_receive_buffers += 1;
            }
            self.next_sweep.get_or_insert(self.now + SWEEP);
            return;
        }
        self.force_release(key);
    }

    pub(super) fn force_release(&mut self, key: u32) {
        let limits = self.limits;
        let used = self.pool.used_bytes();
        let connection = &mut self.connections[key as usize];
        let admit = |needs: usize| used + needs <= limits.bytes;
        if connection
            .receiver
            .release(&connection.session, &mut self.pool, admit)
        {
            self.buffer_released(key);
        }
    }

    pub(super) fn buffer_released(&mut self, key: u32) {
        let connection = &mut self.connections[key as usize];
        if std::mem::take(&mut connection.keeps_buffer) {
            self.held_receive_buffers -= 1;
        }
    }

    /// Looks at clients that make the daemon hold memory and do nothing: takes receive buffers back, and, while others
    /// wait for memory, ends those that have not moved a byte for [`super::Limits::stall`].
    pub(super) fn sweep(&mut self) {
        if self.next_sweep.is_none_or(|at| at > self.now) {
            return;
        }
        self.next_sweep = None;
        let scarce = !self.paused.is_empty() && self.pool.used_bytes() > self.limits.bytes / 2;
        let mut again = !self.paused.is_empty();
        for key in 0..self.connections.capacity() {
            let Some(connection) = self.connections.get_mut(key) else {
                continue;
            };
            if scarce
                && connection.waits_for_client()
                && self.now.saturating_duration_since(connection.moved_at) >= self.limits.stall
            {
                tracing::warn!(
                    peer = connection.peer,
                    "closing a connection that stalls while others wait for the memory it holds"
                );
                self.kill(key as u32);
                continue;
            }
            if !connection.receiver.holds_buffer() || connection.is_ready || connection.is_paused {
                continue;
            }
            if std::mem::replace(&mut connection.was_idle, true) {
                self.force_release(key as u32);
            } else {
                again = true;
            }
        }
        if again {
            self.next_sweep = Some(self.now + SWEEP);
        }
    }

    /// One `sendmsg` for each connection with something to send.
    pub(super) fn send_dirty(&mut self) {
        let mut dirty = std::mem::take(&mut self.dirty);
        if let Some(&first) = dirty.first() {
            self.hot = (dirty.len() == 1).then_some(first);
        }
        for key in dirty.drain(..) {
            let Some(connection) = self.connections.get_mut(key as usize) else {
                continue;
            };
            connection.is_dirty = false;
            if connection.phase == Phase::Dead || connection.is_blocked {
                continue;
            }
            match connection
                .outbox
                .send(&mut connection.stream, &mut self.pool)
            {
                Ok(sent) => {
                    self.metrics.sends.add(sent.calls);
                    self.metrics.sent_bytes.add(sent.bytes);
                    connection.held_bytes -= sent.freed_bytes;
                    if sent.bytes > 0 {
                        connection.moved_at = self.now;
                    }
                    self.freed |= sent.bytes > 0;
                    if sent.blocked {
                        connection.is_blocked = true;
                        self.engine.watch_writable(connection.watch);
                    } else if connection.phase == Phase::Leaving && connection.is_settled() {
                        self.kill(key);
                    }
                }
                Err(error) => {
                    tracing::debug!(peer = connection.peer, %error, "sending failed");
                    self.kill(key);
                }
            }
        }
        dirty.append(&mut self.dirty);
        self.dirty = dirty;
    }

    /// Removes the connections that ended.
    pub(super) fn bury(&mut self) {
        while let Some(key) = self.dead.pop() {
            self.buffer_released(key);
            let mut connection = self.connections.remove(key as usize);
            connection.receiver.clear(&mut self.pool, &mut self.stores);
            connection.outbox.clear(&mut self.pool);
            self.engine.unwatch(connection.watch);
            self.freed = true;
            self.metrics.connections.sub(1);
            if let Some(volume) = self.volumes.get_mut(connection.volume) {
                volume.connections.retain(|k| *k != key);
                volume.metrics.connections.sub(1);
            }
            tracing::debug!(peer = connection.peer, "connection closed");
            for list in [&mut self.ready, &mut self.dirty, &mut self.paused] {
                list.retain(|k| *k != key);
            }
            self.held.retain(|held| held.connection != key);
            if self.connections.is_empty() {
                self.pool.trim();
            }
            self.volume_may_close(connection.volume);
        }
        self.metrics
            .buffered_bytes
            .set(self.pool.lent_bytes() as u64);
    }
}
