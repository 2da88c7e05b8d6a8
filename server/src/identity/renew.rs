//! Certificates of nodes renew themselves: signed by this node where it holds the authority's key, else by one that does.

use std::sync::Arc;
use std::time::Duration;

use ashlar_core::records::MemberState;
use ashlar_core::units::NodeId;
use ashlar_proto::cluster::RenewRequest;
use ashlar_proto::cluster::cluster_client::ClusterClient;
use rcgen::KeyPair;
use rustls::pki_types::{CertificateDer, ServerName};

use super::authority::Lifetime;
use super::files::IdentityFile;
use super::names::Peer;
use super::{Identity, IdentityError};
use crate::volumes::unix_ms;

/// Longest sleep: the clock may be set meanwhile.
const LOOK_EVERY: Duration = Duration::from_secs(3600);
/// Pause after a renewal that failed, at most; less when the certificate's whole life is short.
const PAUSE_MAX: Duration = Duration::from_secs(600);
/// The same while clients are refused for want of a name.
const PAUSE_MAX_MISSING: Duration = Duration::from_secs(15);
const TIMEOUT: Duration = Duration::from_secs(20);

/// Renews the certificate whenever it is time, and at once where it lacks one of `names`: who connects by that name would
/// refuse this node. `length` is how long one that is signed here is good for.
pub async fn keep_renewed(identity: Arc<Identity>, names: Vec<String>, length: Duration) {
    let mut missing = match identity.current().credentials.cert.first() {
        Some(certificate) => missing_names(certificate, &names),
        None => Vec::new(),
    };
    loop {
        let lifetime = identity.current().lifetime;
        let left = lifetime.renew_at_unix_ms().saturating_sub(unix_ms());
        if left > 0 && missing.is_empty() {
            tokio::time::sleep(Duration::from_millis(left).min(LOOK_EVERY)).await;
            continue;
        }
        match renew(&identity, &names, length).await {
            Ok(lifetime) => {
                tracing::info!(
                    expires_at_unix_ms = lifetime.expires_at_unix_ms,
                    added = ?missing,
                    "the certificate of this node was renewed"
                );
                missing.clear();
            }
            Err(error) => {
                let until_end = lifetime.expires_at_unix_ms.saturating_sub(unix_ms());
                tracing::warn!(%error, until_end_s = until_end / 1000, ?missing, "the certificate of this node cannot be renewed for now");
                let pause = Duration::from_millis(until_end / 20);
                let most = match missing.is_empty() {
                    true => PAUSE_MAX,
                    false => PAUSE_MAX_MISSING,
                };
                tokio::time::sleep(pause.clamp(Duration::from_secs(1), most)).await;
            }
        }
    }
}

/// Those of `names` by which nobody who checks `certificate` would take this node for the one that was asked for. What
/// can be the name of no server is not among them.
fn missing_names(certificate: &CertificateDer<'_>, names: &[String]) -> Vec<String> {
    let Ok(parsed) = webpki::EndEntityCert::try_from(certificate) else {
        return names.to_vec();
    };
    let is_missing = |name: &&String| match ServerName::try_from(name.as_str()) {
        Ok(name) => parsed.verify_is_valid_for_subject_name(&name).is_err(),
        Err(_) => false,
    };
    names.iter().filter(is_missing).cloned().collect()
}

async fn renew(
    identity: &Arc<Identity>,
    names: &[String],
    length: Duration,
) -> Result<Lifetime, IdentityError> {
    let unusable = |reason: String| IdentityError::Unusable { reason };
    let key = KeyPair::generate().map_err(|error| unusable(error.to_string()))?;
    let public_key = key.public_key_raw();
    let (certificate, lifetime) = match identity.authority() {
        Some(authority) => {
            authority.sign(&Peer::Node(identity.node()), public_key, names, length)?
        }
        None => ask(identity, public_key, names).await?,
    };
    let file = IdentityFile::new(
        identity.cluster(),
        identity.node(),
        identity.authority_certificate(),
        &certificate,
        &key,
        lifetime,
    );
    // On the disk first: what is shown must survive a restart.
    file.write(&identity.data_dir)
        .map_err(|error| unusable(error.to_string()))?;
    identity.replace(&file)?;
    Ok(lifetime)
}

/// Asks the nodes that sign, one after the other.
async fn ask(
    identity: &Arc<Identity>,
    public_key: &[u8],
    names: &[String],
) -> Result<(CertificateDer<'static>, Lifetime), IdentityError> {
    let mut reason = "no node with the authority's key has an address".to_owned();
    for member in identity.trust().members() {
        if member.state != MemberState::Active || !member.is_authority {
            continue;
        }
        let Some(address) = member.address else {
            continue;
        };
        match ask_one(identity, member.id, &address, public_key, names).await {
            Ok(signed) => return Ok(signed),
            Err(error) => reason = format!("{address}: {error}"),
        }
    }
    Err(IdentityError::Unusable { reason })
}

async fn ask_one(
    identity: &Arc<Identity>,
    node: NodeId,
    address: &str,
    public_key: &[u8],
    names: &[String],
) -> Result<(CertificateDer<'static>, Lifetime), String> {
    let channel = identity.channel(node, address, TIMEOUT).await?;
    let answer = ClusterClient::new(channel)
        .renew(RenewRequest {
            public_key: public_key.to_vec(),
            names: names.to_vec(),
        })
        .await
        .map_err(|status| status.message().to_owned())?
        .into_inner();
    let lifetime = Lifetime {
        issued_at_unix_ms: unix_ms(),
        expires_at_unix_ms: answer.expires_at_unix_ms,
    };
    Ok((CertificateDer::from(answer.certificate), lifetime))
}

#[cfg(test)]
mod tests {
    use ashlar_core::records::ClusterId;
    use uuid::Uuid;

    use super::super::authority::Authority;
    use super::*;

    #[test]
    fn names_that_a_certificate_lacks_are_found() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let cluster = ClusterId(Uuid::from_u128(5));
        let authority = Authority::create(cluster, dir.path()).expect("an authority");
        let key = KeyPair::generate().expect("a key");
        let texts =
            |names: &[&str]| -> Vec<String> { names.iter().map(|&name| name.to_owned()).collect() };
        let (certificate, _) = authority
            .sign(
                &Peer::Node(NodeId(Uuid::from_u128(6))),
                key.public_key_raw(),
                &texts(&["Host-1.example", "10.0.0.1", "::1"]),
                Duration::from_secs(60),
            )
            .expect("signed");
        let missing = |names: &[&str]| missing_names(&certificate, &texts(names));
        let has = ["host-1.example", "10.0.0.1", "::1", "0:0:0:0:0:0:0:1"];
        assert!(missing(&has).is_empty());
        let lacks = ["host-2.example", "10.0.0.2", "fd00::1"];
        assert_eq!(missing(&lacks), lacks);
        // No server can have it, and a renewal would not change that.
        assert!(missing(&["4711", "a b"]).is_empty());
    }
}
