//! A GET over plain HTTP/1.1, and Prometheus text.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

/// Status code and body of `GET path`.
pub fn get(port: u16, path: &str) -> std::io::Result<(u16, String)> {
    get_from((Ipv4Addr::LOCALHOST, port).into(), path)
}

/// The same from anywhere.
pub fn get_from(address: SocketAddr, path: &str) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.write_all(
        format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").as_bytes(),
    )?;
    let mut all = Vec::new();
    stream.read_to_end(&mut all)?;
    let text = String::from_utf8(all).map_err(std::io::Error::other)?;
    let (head, body) = text
        .split_once("\r\n\r\n")
        .ok_or(std::io::Error::other("no end of the headers"))?;
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    let code = code.ok_or(std::io::Error::other("no status code"))?;
    let chunked = head.lines().any(|line| {
        line.to_ascii_lowercase()
            .starts_with("transfer-encoding: chunked")
    });
    Ok((
        code,
        if chunked {
            unchunk(body)
        } else {
            body.to_owned()
        },
    ))
}

fn unchunk(mut body: &str) -> String {
    let mut all = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size.trim(), 16).unwrap_or(0);
        if size == 0 || rest.len() < size {
            break;
        }
        all.push_str(&rest[..size]);
        body = rest[size..].trim_start_matches("\r\n");
    }
    all
}

/// One sample: a name, its labels and a value.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub name: String,
    pub labels: Vec<(String, String)>,
    pub value: f64,
}

/// A scrape of `/metrics`.
#[derive(Clone, Debug)]
pub struct Metrics {
    pub samples: Vec<Sample>,
    pub text: String,
}

impl Metrics {
    /// Parses the text format; a line that is neither a comment nor a sample is an error.
    pub fn parse(text: &str) -> Result<Metrics, String> {
        let mut samples = Vec::new();
        for line in text
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
        {
            samples.push(parse_sample(line).ok_or_else(|| format!("not a sample: {line}"))?);
        }
        Ok(Metrics {
            samples,
            text: text.to_owned(),
        })
    }

    /// The sum of all samples of `name` that carry every one of `labels`; `None` when there is no such sample.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let mut found = None;
        for sample in &self.samples {
            let has = |(key, value): &(&str, &str)| {
                sample.labels.iter().any(|(k, v)| k == key && v == value)
            };
            if sample.name == name && labels.iter().all(has) {
                found = Some(found.unwrap_or(0.0) + sample.value);
            }
        }
        found
    }
}

fn parse_sample(line: &str) -> Option<Sample> {
    let (name, labels, value) = match line.split_once('{') {
        Some((name, rest)) => {
            let (labels, value) = rest.rsplit_once('}')?;
            (name, labels, value)
        }
        None => {
            let (name, value) = line.split_once(' ')?;
            (name, "", value)
        }
    };
    let mut parsed = Vec::new();
    let mut rest = labels;
    while let Some((key, after)) = rest.split_once("=\"") {
        let end = after
            .char_indices()
            .find(|(at, c)| *c == '"' && !after[..*at].ends_with('\\'))
            .map(|(at, _)| at)?;
        parsed.push((
            key.trim_start_matches(',').to_owned(),
            after[..end].to_owned(),
        ));
        rest = &after[end + 1..];
    }
    let value = value.split_whitespace().next()?.parse().ok()?;
    Some(Sample {
        name: name.to_owned(),
        labels: parsed,
        value,
    })
}

#[cfg(test)]
mod tests {
    use super::Metrics;

    #[test]
    fn prometheus_text_is_parsed() {
        let metrics = Metrics::parse(
            "# TYPE a counter\na_total{v=\"x y\",c=\"read\"} 3\na_total{c=\"write\"} 4\nb 0.5\n",
        );
        let metrics = metrics.unwrap();
        assert_eq!(metrics.sum("a_total", &[]), Some(7.0));
        assert_eq!(metrics.sum("a_total", &[("v", "x y")]), Some(3.0));
        assert_eq!(metrics.sum("b", &[]), Some(0.5));
        assert_eq!(metrics.sum("c", &[]), None);
        assert!(Metrics::parse("nonsense").is_err());
    }
}
