//! `ashlar doctor`

use std::io::{self, Write};

use ashlar_core::units::{BLOCK_BYTES, LEAF_BLOCKS};
use ashlar_proto::diagnosis::diagnosis_client::DiagnosisClient;
use ashlar_proto::diagnosis::{self as proto, ExamineRequest, Weight};
use serde::Serialize;

use super::{
    args::{DoctorArgs, Format, Repair},
    confirm::confirmed,
    connect::Daemon,
    error::{CliError, Exit},
    output::{self, Answer},
    progress,
};

/// Bytes of a volume that a leaf maps.
const LEAF_BYTES: u64 = LEAF_BLOCKS as u64 * BLOCK_BYTES as u64;

pub(super) async fn run(
    daemon: &mut Daemon,
    format: Format,
    args: DoctorArgs,
) -> Result<(), CliError> {
    if !args.repair.is_empty() && !args.yes {
        confirm(&args.repair)?;
    }
    let repair = |repair: &Repair| match repair {
        Repair::Orphans => proto::Repair::Orphans.into(),
        Repair::Differing => proto::Repair::Differing.into(),
    };
    let request = ExamineRequest {
        volume: args.volume.unwrap_or_default(),
        repair: args.repair.iter().map(repair).collect(),
        all: args.all,
        records_only: args.records_only,
    };
    let mut client = DiagnosisClient::new(daemon.channel.clone());
    let mut messages = client.examine(request).await?.into_inner();
    let spinner = progress::spinner("asking every node");
    let mut report = Report::default();
    while let Some(message) = messages.message().await? {
        let is_compared = message.compared_leaves > 0 || message.ailments.is_empty();
        if !message.volume_name.is_empty() && is_compared {
            spinner.set_message(format!("{} was compared", message.volume_name));
            report.compared.push(Compared {
                volume_name: message.volume_name,
                compared_bytes: message.compared_leaves * LEAF_BYTES,
            });
        }
        report
            .ailments
            .extend(message.ailments.into_iter().map(Ailment::from));
        report.repairs.extend(message.repairs);
    }
    spinner.finish_and_clear();
    output::print(format, &report)?;
    if report.ailments.iter().any(|one| one.weight == WRONG) {
        Err(CliError::reported(Exit::Damaged))
    } else {
        Ok(())
    }
}

fn confirm(repairs: &[Repair]) -> Result<(), CliError> {
    let what: Vec<String> = repairs
        .iter()
        .map(|repair| match repair {
            Repair::Orphans => "Layers that no record names will be dropped, for ever.",
            Repair::Differing => {
                "Copies that are wrong will be put out of sync until they are filled; with too few in sync, writes wait."
            }
        })
        .map(str::to_owned)
        .collect();
    if confirmed(&what, "Go on?")? {
        Ok(())
    } else {
        Err(CliError::new(Exit::Refused, "nothing was changed"))
    }
}

const WRONG: &str = "wrong";

#[derive(Serialize)]
struct Ailment {
    code: String,
    /// `unknown`, `untidy` or `wrong`.
    weight: &'static str,
    text: String,
    remedy: String,
}

impl From<proto::Ailment> for Ailment {
    fn from(ailment: proto::Ailment) -> Ailment {
        Ailment {
            weight: match ailment.weight() {
                Weight::Wrong => WRONG,
                Weight::Untidy => "untidy",
                Weight::Unknown | Weight::Unspecified => "unknown",
            },
            code: ailment.code,
            text: ailment.text,
            remedy: ailment.remedy,
        }
    }
}

#[derive(Serialize)]
struct Compared {
    volume_name: String,
    compared_bytes: u64,
}

#[derive(Default, Serialize)]
struct Report {
    ailments: Vec<Ailment>,
    repairs: Vec<String>,
    /// Volumes whose copies were compared.
    compared: Vec<Compared>,
}

impl Answer for Report {
    fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        for ailment in &self.ailments {
            writeln!(out, "{:8} {}", ailment.weight, ailment.text)?;
            writeln!(out, "         -> {}", ailment.remedy)?;
        }
        for repair in &self.repairs {
            writeln!(out, "repair   {repair}")?;
        }
        if !self.ailments.is_empty() || !self.repairs.is_empty() {
            writeln!(out)?;
        }
        for compared in &self.compared {
            writeln!(
                out,
                "{}: copies of {} were compared by what the stores' indexes say",
                compared.volume_name,
                super::size::human(compared.compared_bytes)
            )?;
        }
        if self.ailments.is_empty() {
            writeln!(out, "nothing is wrong")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_told_with_what_to_do() {
        let ailment = Ailment::from(proto::Ailment {
            code: "orphan".into(),
            weight: Weight::Untidy.into(),
            text: "a store holds layer 9".into(),
            remedy: "drop it".into(),
        });
        let report = Report {
            ailments: vec![ailment],
            ..Report::default()
        };
        let mut out = Vec::new();
        report.write_table(&mut out).expect("writes to memory");
        let text = String::from_utf8(out).expect("text");
        assert_eq!(
            text,
            "untidy   a store holds layer 9\n         -> drop it\n\n"
        );
        let mut out = Vec::new();
        Report::default()
            .write_table(&mut out)
            .expect("writes to memory");
        assert_eq!(out, b"nothing is wrong\n");
    }
}
