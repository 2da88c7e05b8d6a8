//! The certificate authority of a cluster: one P-256 key, kept as a file on the nodes that sign.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use ashlar_core::records::ClusterId;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SignatureAlgorithm,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::IdentityError;
use super::files::{self, IdentityFileError};
use super::names::Peer;
use crate::volumes::unix_ms;

/// How long the authority's own certificate is good for. It cannot be renewed without giving every node a new one.
const AUTHORITY_LIFETIME: Duration = Duration::from_secs(20 * 365 * 24 * 3600);
/// How far the clocks of nodes may differ before a fresh certificate is taken for one of the future.
const CLOCK_SKEW: Duration = Duration::from_secs(3600);
/// Bytes of an uncompressed point on P-256 (SEC 1).
const PUBLIC_KEY_BYTES: usize = 65;
/// Most names of one certificate.
const NAMES_MAX: usize = 32;

/// From when to when a certificate is good, milliseconds since 1970-01-01 UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lifetime {
    /// When it was signed.
    pub issued_at_unix_ms: u64,
    /// When it ends.
    pub expires_at_unix_ms: u64,
}

impl Lifetime {
    fn from_now(length: Duration) -> Lifetime {
        let now = unix_ms();
        Lifetime {
            issued_at_unix_ms: now,
            expires_at_unix_ms: now + length.as_millis() as u64,
        }
    }

    /// When to get the next one: a third of the time before the end, so that a week without the authority does no harm.
    pub fn renew_at_unix_ms(&self) -> u64 {
        let length = self
            .expires_at_unix_ms
            .saturating_sub(self.issued_at_unix_ms);
        self.expires_at_unix_ms - length / 3
    }
}

/// Signs certificates.
pub struct Authority {
    cluster: ClusterId,
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").finish_non_exhaustive()
    }
}

fn unusable(reason: impl std::fmt::Display) -> IdentityError {
    IdentityError::Unusable {
        reason: reason.to_string(),
    }
}

/// The parameters of an authority follow from its cluster, so that its key is all there is to keep.
fn authority_params(cluster: ClusterId) -> CertificateParams {
    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(DnType::CommonName, format!("Ashlar cluster {}", cluster.0));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::DigitalSignature,
    ];
    params
}

fn set_lifetime(params: &mut CertificateParams, lifetime: Lifetime) -> Result<(), IdentityError> {
    let moment = |unix_ms: u64| {
        let seconds = i64::try_from(unix_ms / 1000).map_err(unusable)?;
        OffsetDateTime::from_unix_timestamp(seconds).map_err(unusable)
    };
    params.not_before = moment(lifetime.issued_at_unix_ms)? - CLOCK_SKEW;
    params.not_after = moment(lifetime.expires_at_unix_ms)?;
    Ok(())
}

impl Authority {
    /// Makes the authority of a new cluster. Its key is written down before anything is signed with it.
    pub fn create(cluster: ClusterId, data_dir: &Path) -> Result<Authority, IdentityFileError> {
        let key = KeyPair::generate().map_err(unusable)?;
        let mut params = authority_params(cluster);
        set_lifetime(&mut params, Lifetime::from_now(AUTHORITY_LIFETIME))?;
        let certificate = params.self_signed(&key).map_err(unusable)?;
        files::write_authority(data_dir, &key.serialize_pem(), &certificate.pem())?;
        Ok(Authority {
            cluster,
            certificate: certificate.der().clone(),
            issuer: Issuer::new(params, key),
        })
    }

    /// The authority whose key is in the data directory; `None` when there is none.
    pub fn load(
        cluster: ClusterId,
        certificate: &CertificateDer<'static>,
        data_dir: &Path,
    ) -> Result<Option<Authority>, IdentityError> {
        let Some(pem) = files::read_authority_key(data_dir).map_err(unusable)? else {
            return Ok(None);
        };
        let key = KeyPair::from_pem(&pem)
            .map_err(|_| unusable("identity/ca-key.pem holds no private key in PEM"))?;
        let is_its_key = certified(&key, vec![certificate.clone()])?
            .keys_match()
            .is_ok();
        if !is_its_key {
            return Err(unusable(
                "identity/ca-key.pem is not the key of this cluster's authority",
            ));
        }
        Ok(Some(Authority {
            cluster,
            certificate: certificate.clone(),
            issuer: Issuer::new(authority_params(cluster), key),
        }))
    }

    /// Its certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// Signs that whoever has the private key of `public_key` is `peer`. `names` are host names and IP addresses that
    /// it can be reached by; those that cannot be names of a host are refused.
    pub fn sign(
        &self,
        peer: &Peer,
        public_key: &[u8],
        names: &[String],
        length: Duration,
    ) -> Result<(CertificateDer<'static>, Lifetime), IdentityError> {
        if public_key.len() != PUBLIC_KEY_BYTES || public_key[0] != 4 {
            return Err(unusable(
                "a public key is an uncompressed point on P-256 of 65 bytes",
            ));
        }
        if names.len() > NAMES_MAX {
            return Err(unusable(format!("at most {NAMES_MAX} names")));
        }
        let lifetime = Lifetime::from_now(length);
        let mut params = CertificateParams::default();
        set_lifetime(&mut params, lifetime)?;
        params
            .distinguished_name
            .push(DnType::CommonName, peer.to_string());
        let own = peer.dns_name(self.cluster);
        let mut sans = vec![SanType::DnsName(own.try_into().map_err(unusable)?)];
        for name in names {
            sans.push(match name.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(host_name(name)?.try_into().map_err(unusable)?),
            });
        }
        params.subject_alt_names = sans;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = match peer {
            Peer::Node(_) => vec![
                ExtendedKeyUsagePurpose::ServerAuth,
                ExtendedKeyUsagePurpose::ClientAuth,
            ],
            Peer::Client { .. } => vec![ExtendedKeyUsagePurpose::ClientAuth],
        };
        params.use_authority_key_identifier_extension = true;
        let signed = params
            .signed_by(&PublicKey(public_key), &self.issuer)
            .map_err(unusable)?;
        Ok((signed.der().clone(), lifetime))
    }
}

/// A host's name as a certificate may hold it. Names below our own domain are identities and are never taken from whoever
/// asks.
fn host_name(name: &str) -> Result<String, IdentityError> {
    let lower = name.to_ascii_lowercase();
    let is_good = !lower.is_empty()
        && lower.len() <= 253
        && lower.split('.').all(|label| {
            !label.is_empty()
                && label.len() <= 63
                && label
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        })
        && !lower.ends_with(".internal");
    if is_good {
        Ok(lower)
    } else {
        Err(unusable(format!("{name:?} is not the name of a host")))
    }
}

/// A key pair with the chain that vouches for it.
pub(super) fn certified(
    key: &KeyPair,
    chain: Vec<CertificateDer<'static>>,
) -> Result<CertifiedKey, IdentityError> {
    let der = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let signing = rustls::crypto::aws_lc_rs::sign::any_supported_type(&der).map_err(unusable)?;
    Ok(CertifiedKey::new(chain, signing))
}

/// A public key that came as bytes.
struct PublicKey<'a>(&'a [u8]);

impl PublicKeyData for PublicKey<'_> {
    fn der_bytes(&self) -> &[u8] {
        self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

#[cfg(test)]
mod tests {
    use ashlar_core::units::NodeId;
    use uuid::Uuid;

    use super::*;
    use crate::identity::peer_in;

    #[test]
    fn what_is_signed_names_its_holder_and_the_key_is_found_again() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let cluster = ClusterId(Uuid::from_u128(5));
        let authority = Authority::create(cluster, dir.path()).expect("an authority");
        let again = Authority::load(cluster, authority.certificate(), dir.path())
            .expect("readable")
            .expect("there");
        let peer = Peer::Node(NodeId(Uuid::from_u128(6)));
        let key = KeyPair::generate().expect("a key");
        let day = Duration::from_secs(86400);
        let names = ["10.0.0.1".to_owned(), "Host-1.example".to_owned()];
        let (certificate, lifetime) = again
            .sign(&peer, key.public_key_raw(), &names, day)
            .expect("signed");
        assert_eq!(peer_in(&certificate), Ok((peer.clone(), cluster)));
        assert_eq!(
            lifetime.expires_at_unix_ms - lifetime.renew_at_unix_ms(),
            day.as_millis() as u64 / 3
        );
        for wrong in ["", "a b", "a..b", "x.node.y.ashlar.internal"] {
            let names = [wrong.to_owned()];
            assert!(
                again
                    .sign(&peer, key.public_key_raw(), &names, day)
                    .is_err()
            );
        }
        assert!(again.sign(&peer, &[4; 64], &[], day).is_err());
        let other = tempfile::tempdir().expect("temporary directory");
        Authority::create(cluster, other.path()).expect("another authority");
        assert!(Authority::load(cluster, authority.certificate(), other.path()).is_err());
    }
}
