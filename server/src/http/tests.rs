use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::metrics::{Command, Metrics};
use ashlar_core::units::VolumeId;

struct Fixed {
    ready: bool,
}

#[async_trait]
impl Probe for Fixed {
    async fn scrape(&self) -> Scrape {
        let metrics = Metrics::new();
        let volume = metrics.add_volume(VolumeId(uuid::Uuid::from_u128(1)), "db");
        let reads = volume.command(Command::Read);
        for latency_us in [1, 2, 3, 100, 100_000_000] {
            reads.operations.add(1);
            reads.bytes.add(4096);
            reads.latency.record(Duration::from_micros(latency_us));
        }
        Scrape {
            version: "1.2.3",
            ready: self.ready,
            volumes: vec![VolumeScrape {
                name: "db".to_owned(),
                id: "some-id".to_owned(),
                size_bytes: 8192,
                metrics: Some(volume),
            }],
            threads: vec![metrics.add_thread()],
            ..Scrape::default()
        }
    }

    async fn readiness(&self) -> Readiness {
        let reasons = if self.ready {
            vec![]
        } else {
            vec!["stores are being opened".to_owned()]
        };
        Readiness {
            ready: self.ready,
            state: if self.ready { "ready" } else { "starting" },
            reasons,
        }
    }
}

async fn get(ready: bool, path: &str) -> String {
    let (listener, address) = bind(&"127.0.0.1:0".parse().expect("address")).expect("bind");
    let server = tokio::spawn(serve(
        listener,
        Arc::new(Fixed { ready }),
        std::future::pending(),
    ));
    let mut stream = tokio::net::TcpStream::connect(address)
        .await
        .expect("connect");
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("write");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("read");
    server.abort();
    answer
}

#[tokio::test]
async fn metrics_are_openmetrics_with_doubling_buckets() {
    let page = get(true, "/metrics").await;
    assert!(
        page.starts_with("HTTP/1.1 200") && page.contains("application/openmetrics-text"),
        "{page}"
    );
    let sample = r#"{volume="db",id="some-id",command="read"}"#;
    for line in [
        "ashlar_ready 1".to_owned(),
        format!("ashlar_volume_operations_total{sample} 5"),
        format!("ashlar_volume_bytes_total{sample} 20480"),
        r#"ashlar_volume_size_bytes{volume="db",id="some-id"} 8192"#.to_owned(),
        r#"ashlar_volume_latency_seconds_count{volume="db",id="some-id",command="read"} 5"#
            .to_owned(),
        r#"ashlar_thread_turns_total{thread="0"} 0"#.to_owned(),
    ] {
        assert!(
            page.lines().any(|there| there == line),
            "{line} is missing in\n{page}"
        );
    }
    // Cumulative: 1 µs holds one, 4 µs three, everything but the slowest four.
    let bucket = |le: &str| {
        let line = page
            .lines()
            .find(|line| line.contains("_bucket{") && line.contains(&format!("le=\"{le}\"")));
        line.unwrap_or_else(|| panic!("no bucket {le} in\n{page}"))
            .rsplit(' ')
            .next()
            .expect("value")
            .to_owned()
    };
    assert_eq!(
        (bucket("0.000001").as_str(), bucket("0.000004").as_str()),
        ("1", "3")
    );
    assert_eq!(
        (bucket("0.000128").as_str(), bucket("+Inf").as_str()),
        ("4", "5")
    );
    assert!(
        !page.contains("command=\"write\""),
        "a command nobody used is not on the page"
    );
}

#[tokio::test]
async fn readiness_is_a_code_and_says_why_not() {
    let ready = get(true, "/readyz").await;
    assert!(ready.starts_with("HTTP/1.1 200"), "{ready}");
    let starting = get(false, "/readyz").await;
    assert!(
        starting.starts_with("HTTP/1.1 503") && starting.contains("stores are being opened"),
        "{starting}"
    );
    assert!(get(false, "/healthz").await.starts_with("HTTP/1.1 200"));
    assert!(get(true, "/nothing").await.starts_with("HTTP/1.1 404"));
}

#[tokio::test]
async fn a_port_in_use_is_told() {
    let (_listener, address) = bind(&"127.0.0.1:0".parse().expect("address")).expect("bind");
    let taken = format!("127.0.0.1:{}", address.port())
        .parse()
        .expect("address");
    let refusal = bind(&taken).expect_err("taken").to_string();
    assert!(
        refusal.contains("in use") && refusal.contains("--listen-http"),
        "{refusal}"
    );
}
