//! Where records are kept: `sqlite`, or `etcd:URL,URL…`.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use ashlar_core::records::{LABELS_MAX, check_label};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::address::text_form;
use super::{ConfigError, HostPort, Settings, absolute, value};

/// Default of `etcd-prefix`.
const ETCD_PREFIX_DEFAULT: &str = "/ashlar/";
/// Longest prefix; keys of etcd are short, and a prefix is in each of them.
const ETCD_PREFIX_MAX_BYTES: usize = 128;

/// What `--metadata` says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum MetadataSetting {
    /// In the data directory: a single node.
    #[default]
    Sqlite,
    /// In etcd, at these endpoints: a cluster.
    Etcd(Vec<String>),
}

/// A place for records that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "{text:?} is no place for metadata: write sqlite, or etcd:http://HOST:PORT with more endpoints after commas"
)]
pub struct MetadataSettingError {
    /// What was given.
    pub text: String,
}

impl FromStr for MetadataSetting {
    type Err = MetadataSettingError;

    fn from_str(text: &str) -> Result<MetadataSetting, MetadataSettingError> {
        let wrong = || MetadataSettingError {
            text: text.to_owned(),
        };
        if text == "sqlite" {
            return Ok(MetadataSetting::Sqlite);
        }
        let endpoints = text.strip_prefix("etcd:").ok_or_else(wrong)?;
        let endpoints = endpoints.split(',').map(|endpoint| {
            let host_port = endpoint
                .strip_prefix("http://")
                .or_else(|| endpoint.strip_prefix("https://"))
                .ok_or_else(wrong)?;
            let host_port = host_port.strip_suffix('/').unwrap_or(host_port);
            host_port.parse::<HostPort>().map_err(|_| wrong())?;
            Ok(endpoint.trim_end_matches('/').to_owned())
        });
        Ok(MetadataSetting::Etcd(endpoints.collect::<Result<_, _>>()?))
    }
}

impl fmt::Display for MetadataSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MetadataSetting::Sqlite => f.write_str("sqlite"),
            MetadataSetting::Etcd(endpoints) => write!(f, "etcd:{}", endpoints.join(",")),
        }
    }
}

text_form!(MetadataSetting, MetadataSettingError);

/// Where records are kept, decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Metadata {
    /// In the data directory.
    Sqlite,
    /// In etcd.
    Etcd(EtcdAccess),
}

/// How etcd is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdAccess {
    /// At least one; all `http` or all `https`.
    pub endpoints: Vec<String>,
    /// Begins and ends with a slash.
    pub prefix: String,
    /// A file in PEM: whom to believe. The rest are absolute paths too.
    pub authority: Option<PathBuf>,
    /// A file in PEM: our certificate and its chain.
    pub certificate: Option<PathBuf>,
    /// A file in PEM: its private key.
    pub key: Option<PathBuf>,
}

impl Metadata {
    pub(super) fn from_settings(settings: &Settings) -> Result<Metadata, ConfigError> {
        let only_etcd = [
            ("etcd-prefix", settings.etcd_prefix.is_some()),
            ("etcd-ca", settings.etcd_ca.is_some()),
            ("etcd-cert", settings.etcd_cert.is_some()),
            ("etcd-key", settings.etcd_key.is_some()),
        ];
        let endpoints = match settings.metadata.clone().unwrap_or_default() {
            MetadataSetting::Etcd(endpoints) => endpoints,
            MetadataSetting::Sqlite => {
                if let Some((setting, _)) = only_etcd.into_iter().find(|(_, is_set)| *is_set) {
                    return Err(value(
                        setting,
                        "it means something only with --metadata etcd:…",
                    ));
                }
                return Ok(Metadata::Sqlite);
            }
        };
        let secure = endpoints.iter().filter(|e| e.starts_with("https:")).count();
        if secure != 0 && secure != endpoints.len() {
            return Err(value(
                "metadata",
                "the endpoints of etcd are either all http or all https",
            ));
        }
        if secure == 0
            && let Some((setting, _)) = only_etcd[1..].iter().find(|(_, is_set)| *is_set)
        {
            return Err(value(
                setting,
                "it means something only with https endpoints",
            ));
        }
        if settings.etcd_cert.is_some() != settings.etcd_key.is_some() {
            return Err(value("etcd-cert", "--etcd-cert and --etcd-key go together"));
        }
        let prefix = settings.etcd_prefix.as_deref();
        let file = |setting, path: &Option<PathBuf>| {
            path.as_deref()
                .map(|path: &Path| absolute(setting, path))
                .transpose()
        };
        Ok(Metadata::Etcd(EtcdAccess {
            endpoints,
            prefix: checked_prefix(prefix.unwrap_or(ETCD_PREFIX_DEFAULT))?,
            authority: file("etcd-ca", &settings.etcd_ca)?,
            certificate: file("etcd-cert", &settings.etcd_cert)?,
            key: file("etcd-key", &settings.etcd_key)?,
        }))
    }

    /// Writes it back into `settings`.
    pub(super) fn to_settings(&self, settings: &mut Settings) {
        match self {
            Metadata::Sqlite => settings.metadata = Some(MetadataSetting::Sqlite),
            Metadata::Etcd(etcd) => {
                settings.metadata = Some(MetadataSetting::Etcd(etcd.endpoints.clone()));
                settings.etcd_prefix = Some(etcd.prefix.clone());
                settings.etcd_ca = etcd.authority.clone();
                settings.etcd_cert = etcd.certificate.clone();
                settings.etcd_key = etcd.key.clone();
            }
        }
    }
}

fn checked_prefix(prefix: &str) -> Result<String, ConfigError> {
    let fits = prefix.starts_with('/')
        && prefix.len() < ETCD_PREFIX_MAX_BYTES
        && prefix.bytes().all(|byte| byte.is_ascii_graphic());
    if !fits {
        return Err(value(
            "etcd-prefix",
            format!(
                "{prefix:?} is not a slash and then at most {ETCD_PREFIX_MAX_BYTES} printable ASCII characters"
            ),
        ));
    }
    Ok(format!("{}/", prefix.trim_end_matches('/')))
}

/// `KEY=VALUE` each.
pub(super) fn labels(given: &[String]) -> Result<BTreeMap<String, String>, ConfigError> {
    let mut labels = BTreeMap::new();
    for label in given {
        let (key, text) = label
            .split_once('=')
            .ok_or_else(|| value("label", format!("{label:?} is not KEY=VALUE")))?;
        for part in [key, text] {
            check_label(part).map_err(|error| value("label", error.to_string()))?;
        }
        labels.insert(key.to_owned(), text.to_owned());
    }
    if labels.len() > LABELS_MAX {
        return Err(value("label", format!("at most {LABELS_MAX} are allowed")));
    }
    Ok(labels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_read_and_print_the_same() {
        for text in [
            "sqlite",
            "etcd:http://127.0.0.1:2379",
            "etcd:https://a:1,https://[::1]:2",
        ] {
            let place = text.parse::<MetadataSetting>().expect(text);
            assert_eq!(place.to_string(), text);
        }
        for text in [
            "",
            "etcd",
            "etcd:",
            "etcd:h:1",
            "etcd:http://h",
            "etcd:http://h:1,",
            "sqlite:x",
        ] {
            assert!(text.parse::<MetadataSetting>().is_err(), "{text}");
        }
    }

    #[test]
    fn settings_that_do_not_go_together_are_refused() {
        let etcd = |endpoints: &str| Settings {
            metadata: Some(endpoints.parse().expect("endpoints")),
            ..Settings::default()
        };
        let refused = |settings: Settings, why: &str| {
            let error = Metadata::from_settings(&settings)
                .expect_err(why)
                .to_string();
            assert!(error.contains(why), "{error}");
        };
        refused(etcd("etcd:http://a:1,https://b:1"), "all http or all https");
        refused(
            Settings {
                etcd_ca: Some("ca".into()),
                ..etcd("etcd:http://a:1")
            },
            "https endpoints",
        );
        refused(
            Settings {
                etcd_key: Some("k".into()),
                ..etcd("etcd:https://a:1")
            },
            "go together",
        );
        refused(
            Settings {
                etcd_prefix: Some("/a".into()),
                ..Settings::default()
            },
            "only with --metadata",
        );
        refused(
            Settings {
                etcd_prefix: Some("a".into()),
                ..etcd("etcd:http://a:1")
            },
            "not a slash",
        );
        let Ok(Metadata::Etcd(access)) = Metadata::from_settings(&Settings {
            etcd_prefix: Some("/b".into()),
            ..etcd("etcd:http://a:1/")
        }) else {
            panic!("should be taken");
        };
        assert_eq!(
            (access.endpoints, access.prefix),
            (vec!["http://a:1".to_owned()], "/b/".to_owned())
        );
    }
}
