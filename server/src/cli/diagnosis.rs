//! `ashlar explain` and `ashlar events`

use std::io::{self, Write};

use ashlar_proto::diagnosis::diagnosis_client::DiagnosisClient;
use ashlar_proto::diagnosis::{
    self as proto, Condition, ExplainRequest, Severity, WatchEventsRequest,
};
use serde::Serialize;
use tonic::transport::Channel;

use super::{
    args::Format,
    connect::Daemon,
    error::{CliError, Exit},
    output::{self, Answer},
    view,
};

fn client(daemon: &Daemon) -> DiagnosisClient<Channel> {
    DiagnosisClient::new(daemon.channel.clone())
}

/// Prints why a volume is as it is.
pub(super) async fn explain(
    daemon: &mut Daemon,
    format: Format,
    volume: String,
) -> Result<(), CliError> {
    let answer = client(daemon).explain(ExplainRequest { volume }).await?;
    output::print(format, &Explanation::from(answer.into_inner()))
}

fn word(condition: Condition) -> &'static str {
    match condition {
        Condition::Healthy => "healthy",
        Condition::Degraded => "degraded",
        Condition::Waiting => "waiting",
        Condition::Stuck => "stuck",
        Condition::Unserved => "unserved",
        Condition::Deleting => "deleting",
        Condition::Unspecified => "unknown",
    }
}

#[derive(Serialize)]
struct Explanation {
    volume_id: String,
    volume_name: String,
    condition: &'static str,
    summary: String,
    causes: Vec<Cause>,
    /// Empty when no node ever served it.
    #[serde(skip_serializing_if = "String::is_empty")]
    head_node_id: String,
    silent_node_ids: Vec<String>,
}

#[derive(Serialize)]
struct Cause {
    code: String,
    condition: &'static str,
    text: String,
    /// Absent when it is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    since: Option<String>,
    remedies: Vec<String>,
}

impl From<proto::ExplainResponse> for Explanation {
    fn from(answer: proto::ExplainResponse) -> Explanation {
        let cause = |cause: proto::Cause| Cause {
            condition: word(cause.condition()),
            code: cause.code,
            text: cause.text,
            since: (cause.since_unix_ms != 0).then(|| view::time(cause.since_unix_ms)),
            remedies: cause.remedies,
        };
        Explanation {
            condition: word(answer.condition()),
            volume_id: answer.volume_id,
            volume_name: answer.volume_name,
            summary: answer.summary,
            causes: answer.causes.into_iter().map(cause).collect(),
            head_node_id: answer.head_node_id,
            silent_node_ids: answer.silent_node_ids,
        }
    }
}

impl Answer for Explanation {
    fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(
            out,
            "{} is {}: {}",
            self.volume_name, self.condition, self.summary
        )?;
        for cause in &self.causes {
            let since = match &cause.since {
                Some(since) => format!(", since {since}"),
                None => String::new(),
            };
            // The worst cause is the summary where the volume is not served as it should be.
            let text = match cause.text == self.summary {
                true => cause.code.as_str(),
                false => &cause.text,
            };
            writeln!(out, "\n{text}{since}")?;
            for remedy in &cause.remedies {
                writeln!(out, "  -> {remedy}")?;
            }
        }
        Ok(())
    }
}

/// Prints what the daemon remembers, and with `follow` what happens from then on.
pub(super) async fn events(
    daemon: &mut Daemon,
    format: Format,
    volume: String,
    follow: bool,
) -> Result<(), CliError> {
    let request = WatchEventsRequest { volume, follow };
    let mut pages = client(daemon).watch_events(request).await?.into_inner();
    let mut all = Vec::new();
    while let Some(page) = pages.message().await? {
        if page.missed > 0 {
            output::note(format_args!(
                "{} event(s) were forgotten before they could be shown",
                page.missed
            ));
        }
        let events = page.events.into_iter().map(Event::from);
        if !follow {
            all.extend(events);
            continue;
        }
        for event in events {
            match format {
                Format::Table => {
                    let mut out = io::stdout().lock();
                    writeln!(out, "{}", event.line())?;
                    out.flush()?;
                }
                Format::Json | Format::Yaml => output::print_streamed(format, &event)?,
            }
        }
    }
    if follow {
        return Err(CliError::new(
            Exit::Unreachable,
            "the daemon ended the events: it is stopping",
        ));
    }
    output::print(format, &Events(all))
}

#[derive(Serialize)]
struct Event {
    sequence: u64,
    at: String,
    /// When it happened last; the same as `at` where it happened once.
    last_at: String,
    count: u64,
    severity: &'static str,
    code: String,
    text: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    volume_id: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    volume_name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    node_id: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    store_id: String,
}

impl From<proto::Event> for Event {
    fn from(event: proto::Event) -> Event {
        Event {
            severity: match event.severity() {
                Severity::Info => "info",
                Severity::Warning => "warning",
                Severity::Error => "error",
                Severity::Unspecified => "unknown",
            },
            sequence: event.sequence,
            at: view::time(event.at_unix_ms),
            last_at: view::time(event.last_at_unix_ms),
            count: event.count,
            code: event.code,
            text: event.text,
            volume_id: event.volume_id,
            volume_name: event.volume_name,
            node_id: event.node_id,
            store_id: event.store_id,
        }
    }
}

impl Event {
    /// What it happened to.
    fn subject(&self) -> String {
        let volume = match self.volume_name.as_str() {
            "" => &self.volume_id,
            name => name,
        };
        let mut parts = Vec::new();
        if !volume.is_empty() {
            parts.push(format!("volume {volume}"));
        }
        if !self.node_id.is_empty() {
            parts.push(format!("node {}", self.node_id));
        }
        if !self.store_id.is_empty() {
            parts.push(format!("store {}", self.store_id));
        }
        parts.join(", ")
    }

    fn told(&self) -> String {
        match self.count {
            0 | 1 => self.text.clone(),
            count => format!("{} ({count} times since {})", self.text, self.at),
        }
    }

    /// For people who watch: it can have no columns, because what comes is not known.
    fn line(&self) -> String {
        format!(
            "{}  {:7}  {}: {}",
            self.last_at,
            self.severity,
            self.subject(),
            self.told()
        )
    }
}

#[derive(Serialize)]
#[serde(transparent)]
struct Events(Vec<Event>);

impl Answer for Events {
    fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        if self.0.is_empty() {
            output::note("nothing happened since the daemon was started");
            return Ok(());
        }
        let rows = self.0.iter().map(|event| {
            vec![
                event.last_at.clone(),
                event.severity.to_owned(),
                event.subject(),
                event.told(),
            ]
        });
        out.write_all(
            output::columns(&["TIME", "SEVERITY", "SUBJECT", "EVENT"], &[], rows).as_bytes(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_explanation_is_told_with_what_to_do() {
        let explanation = Explanation::from(proto::ExplainResponse {
            volume_name: "db".into(),
            condition: Condition::Stuck.into(),
            summary: "writes wait".into(),
            causes: vec![proto::Cause {
                code: "copy-out".into(),
                condition: Condition::Degraded.into(),
                text: "the copy on node b is out of sync".into(),
                since_unix_ms: 1000,
                remedies: vec!["start node b".into()],
            }],
            ..proto::ExplainResponse::default()
        });
        let mut out = Vec::new();
        explanation.write_table(&mut out).expect("writes to memory");
        assert_eq!(
            String::from_utf8(out).expect("text"),
            "db is stuck: writes wait\n\nthe copy on node b is out of sync, since 1970-01-01T00:00:01Z\n  -> start node b\n"
        );
    }

    #[test]
    fn an_event_is_a_line() {
        let event = Event::from(proto::Event {
            at_unix_ms: 1000,
            last_at_unix_ms: 2000,
            count: 3,
            severity: Severity::Error.into(),
            text: "checksum mismatch".into(),
            volume_name: "db".into(),
            store_id: "s".into(),
            ..proto::Event::default()
        });
        assert_eq!(
            event.line(),
            "1970-01-01T00:00:02Z  error    volume db, store s: checksum mismatch (3 times since 1970-01-01T00:00:01Z)"
        );
    }
}
