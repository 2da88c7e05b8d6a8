//! What a daemon says of itself over HTTP.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};

/// The counter of everything that stores write: frames, leaves, checkpoints, what the cleaner moves.
const STORED_BYTES: &str = "ashlar_store_written_bytes_total";
/// Blocks of clients that the stores hold.
const LIVE_BYTES: &str = "ashlar_store_live_bytes";
/// What the stores' tails hold at most.
const TAIL_BYTES: &str = "ashlar_store_tail_bytes";
/// How long an answer may take.
const HTTP_LIMIT: Duration = Duration::from_secs(10);

/// Where one daemon answers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Http {
    pub(crate) address: SocketAddr,
}

impl Http {
    /// A port that was free a moment ago; ashlard says so when it no longer is.
    pub(crate) fn on_free_port() -> Result<Http> {
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        Ok(Http { address })
    }

    /// Whether the daemon says that it is ready.
    pub(crate) fn is_ready(&self) -> bool {
        self.get("/readyz").is_ok_and(|(status, _)| status == 200)
    }

    /// Bytes that the daemon's stores have written to their files so far, as it counts them itself; None while it
    /// does not say.
    pub(crate) fn stored_bytes(&self) -> Result<Option<f64>> {
        Ok(self.metrics()?.sum(STORED_BYTES, ""))
    }

    /// Bytes of clients that the daemon's stores hold; None while it does not say.
    pub(crate) fn live_bytes(&self) -> Result<Option<f64>> {
        Ok(self.metrics()?.sum(LIVE_BYTES, ""))
    }

    /// Bytes that the stores' tails hold at most; None while the daemon does not say.
    pub(crate) fn tail_bytes(&self) -> Result<Option<f64>> {
        Ok(self.metrics()?.sum(TAIL_BYTES, ""))
    }

    fn metrics(&self) -> Result<Metrics> {
        let (status, body) = self.get("/metrics")?;
        ensure!(status == 200, "/metrics answered {status}");
        Ok(Metrics { body })
    }

    fn get(&self, path: &str) -> Result<(u16, String)> {
        let mut stream = TcpStream::connect_timeout(&self.address, HTTP_LIMIT)?;
        stream.set_read_timeout(Some(HTTP_LIMIT))?;
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        let answer = String::from_utf8_lossy(&answer);
        let status = answer
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok())
            .ok_or_else(|| anyhow!("not an HTTP answer"))?;
        let (_, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
        Ok((status, body.to_owned()))
    }
}

/// One reading of `/metrics`.
#[derive(Debug)]
struct Metrics {
    body: String,
}

impl Metrics {
    /// The sum of a metric over its labels, as far as they contain `label`; None when there is no such metric.
    fn sum(&self, name: &str, label: &str) -> Option<f64> {
        let mut found = None;
        for line in self.body.lines() {
            let Some(rest) = line.strip_prefix(name) else {
                continue;
            };
            let (labels, value) = match rest.as_bytes().first() {
                Some(b'{') => rest.split_once('}').unwrap_or_default(),
                Some(b' ') => ("", rest),
                _ => continue,
            };
            let value = value
                .split_whitespace()
                .next()
                .and_then(|value| value.parse::<f64>().ok());
            if let Some(value) = value.filter(|_| labels.contains(label)) {
                *found.get_or_insert(0.0) += value;
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_summed_over_matching_labels_only() {
        let body = "# HELP a_total x\na_total{command=\"write\",volume=\"a\"} 5\na_total{command=\"write\",volume=\"b\"} 2\n\
                    a_total{command=\"read\"} 9\na_total_more 100\nplain 3 1700000000\n";
        let metrics = Metrics {
            body: body.to_owned(),
        };
        assert_eq!(metrics.sum("a_total", "command=\"write\""), Some(7.0));
        assert_eq!(metrics.sum("a_total", ""), Some(16.0));
        assert_eq!(metrics.sum("plain", ""), Some(3.0));
        assert_eq!(metrics.sum("none", ""), None);
    }
}
