//! Requests and answers of Docker's volume plugins: JSON over HTTP, whatever the content type says.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::controller::parameters::Parameters;
use crate::controller::sizing::Range;
use crate::refusal::Refusal;

/// How answers are labelled.
pub const CONTENT_TYPE: &str = "application/vnd.docker.plugins.v1+json";
/// The size of a new volume.
const SIZE: &str = "size";
/// A name as the engine allows it.
const NAME_BYTES_MAX: usize = 255;

/// Every request: fields that a call does not have are empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Ask {
    /// The volume.
    #[serde(rename = "Name")]
    pub name: String,
    /// Of a container; of `Mount` and `Unmount`.
    #[serde(rename = "ID")]
    pub id: String,
    /// `docker volume create --opt`; of `Create`.
    #[serde(rename = "Opts")]
    pub options: Option<BTreeMap<String, String>>,
}

impl Ask {
    /// Reads a body; an empty one has no fields.
    pub fn parse(body: &[u8]) -> Result<Ask, Refusal> {
        if body.iter().all(u8::is_ascii_whitespace) {
            return Ok(Ask::default());
        }
        serde_json::from_slice(body)
            .map_err(|error| Refusal::invalid(format!("the request is not understood: {error}")))
    }

    /// The volume's name, which has to be given.
    pub fn name(&self) -> Result<&str, Refusal> {
        if self.name.is_empty() {
            return Err(Refusal::invalid("the volume's name is missing"));
        }
        if self.name.len() > NAME_BYTES_MAX || self.name.chars().any(char::is_control) {
            return Err(Refusal::invalid("the volume's name is not a name"));
        }
        Ok(&self.name)
    }

    /// How large and with what a volume is to be made.
    pub fn wanted(&self) -> Result<(Range, Parameters, BTreeMap<String, String>), Refusal> {
        let mut given = self.options.clone().unwrap_or_default();
        let required_bytes = match given.remove(SIZE) {
            None => 0,
            Some(text) => size(&text)?,
        };
        let parameters = Parameters::parse(&given, &BTreeMap::new())?;
        let range = Range {
            required_bytes,
            limit_bytes: 0,
        };
        Ok((range, parameters, given))
    }
}

/// Bytes, or a number with a unit: `10G`, `10GiB`, `10g` are all 10 × 2^30, as everywhere in Docker.
fn size(text: &str) -> Result<u64, Refusal> {
    let wrong = || {
        Refusal::invalid(format!(
            "{SIZE}: {text:?} is not a size like 1073741824 or 10GiB"
        ))
    };
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(wrong()),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    number
        .checked_mul(1 << shift)
        .filter(|bytes| *bytes != 0)
        .ok_or_else(wrong)
}

/// A volume as it is shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Shown {
    /// As the engine calls it.
    #[serde(rename = "Name")]
    pub name: String,
    /// Where it is mounted on this machine; empty when it is not.
    #[serde(rename = "Mountpoint")]
    pub mountpoint: String,
    /// For people.
    #[serde(rename = "Status", skip_serializing_if = "BTreeMap::is_empty")]
    pub status: BTreeMap<&'static str, serde_json::Value>,
}

/// Every answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Answer {
    #[serde(rename = "Implements", skip_serializing_if = "Option::is_none")]
    implements: Option<[&'static str; 1]>,
    #[serde(rename = "Capabilities", skip_serializing_if = "Option::is_none")]
    capabilities: Option<Scope>,
    #[serde(rename = "Mountpoint", skip_serializing_if = "Option::is_none")]
    mountpoint: Option<String>,
    #[serde(rename = "Volume", skip_serializing_if = "Option::is_none")]
    volume: Option<Shown>,
    #[serde(rename = "Volumes", skip_serializing_if = "Option::is_none")]
    volumes: Option<Vec<Shown>>,
    #[serde(rename = "Err")]
    error: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct Scope {
    #[serde(rename = "Scope")]
    scope: &'static str,
}

impl Answer {
    /// What this plugin is.
    pub fn implements() -> Answer {
        Answer {
            implements: Some(["VolumeDriver"]),
            ..Answer::default()
        }
    }

    /// A volume is the same one on every machine.
    pub fn capabilities() -> Answer {
        Answer {
            capabilities: Some(Scope { scope: "global" }),
            ..Answer::default()
        }
    }

    /// Where a volume is mounted.
    pub fn mountpoint(path: String) -> Answer {
        Answer {
            mountpoint: Some(path),
            ..Answer::default()
        }
    }

    /// One volume.
    pub fn volume(shown: Shown) -> Answer {
        Answer {
            volume: Some(shown),
            ..Answer::default()
        }
    }

    /// All of them.
    pub fn volumes(all: Vec<Shown>) -> Answer {
        Answer {
            volumes: Some(all),
            ..Answer::default()
        }
    }

    /// It is not done, and why.
    pub fn error(refusal: &Refusal) -> Answer {
        Answer {
            error: refusal.message.clone(),
            ..Answer::default()
        }
    }

    /// Whether it is done.
    pub fn is_error(&self) -> bool {
        !self.error.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read() {
        assert_eq!(Ask::parse(b""), Ok(Ask::default()));
        assert_eq!(Ask::parse(b"{}\n"), Ok(Ask::default()));
        let create = Ask::parse(br#"{"Name":"v","Opts":{"size":"2g","filesystem":"xfs"}}"#);
        let create = create.expect("a request");
        let (range, parameters, given) = create.wanted().expect("good options");
        assert_eq!(range.required_bytes, 2 << 30);
        assert_eq!(
            parameters.filesystem,
            Some(crate::capability::Filesystem::Xfs)
        );
        assert_eq!(given.len(), 1);
        let none = Ask::parse(br#"{"Name":"v","Opts":null,"More":1}"#).expect("a request");
        assert_eq!(none.wanted().expect("defaults").0, Range::default());
        let mount = Ask::parse(br#"{"Name":"v","ID":"abc"}"#).expect("a request");
        assert_eq!((mount.name(), mount.id.as_str()), (Ok("v"), "abc"));
        for bad in [&b"["[..], b"\"x\"", br#"{"Name":1}"#] {
            Ask::parse(bad).expect_err("not a request");
        }
        for name in ["", "a\nb", &"n".repeat(256)] {
            let ask = Ask {
                name: name.into(),
                ..Ask::default()
            };
            ask.name().expect_err(name);
        }
        let typo = Ask::parse(br#"{"Name":"v","Opts":{"sise":"2g"}}"#).expect("a request");
        typo.wanted().expect_err("an unknown option");
    }

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [
            ("4096", 4096),
            ("1b", 1),
            ("10GiB", 10 << 30),
            ("10G", 10 << 30),
            ("3mb", 3 << 20),
            ("1t", 1 << 40),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "0", "g", "-1", "1.5g", "1 g", "1x", "99999999999999t"] {
            size(text).expect_err(text);
        }
    }

    #[test]
    fn answers_are_exact() {
        let shown = Shown {
            name: "v".into(),
            mountpoint: String::new(),
            status: BTreeMap::new(),
        };
        let table = [
            (
                Answer::implements(),
                r#"{"Implements":["VolumeDriver"],"Err":""}"#,
            ),
            (
                Answer::capabilities(),
                r#"{"Capabilities":{"Scope":"global"},"Err":""}"#,
            ),
            (Answer::default(), r#"{"Err":""}"#),
            (
                Answer::mountpoint("/m".into()),
                r#"{"Mountpoint":"/m","Err":""}"#,
            ),
            (
                Answer::volume(shown.clone()),
                r#"{"Volume":{"Name":"v","Mountpoint":""},"Err":""}"#,
            ),
            (
                Answer::volumes(vec![shown]),
                r#"{"Volumes":[{"Name":"v","Mountpoint":""}],"Err":""}"#,
            ),
            (Answer::volumes(Vec::new()), r#"{"Volumes":[],"Err":""}"#),
            (Answer::error(&Refusal::internal("no")), r#"{"Err":"no"}"#),
        ];
        for (answer, text) in table {
            assert_eq!(serde_json::to_string(&answer).expect("JSON"), text);
        }
    }
}
