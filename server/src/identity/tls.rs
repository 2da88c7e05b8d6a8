//! TLS as the cluster uses it: mutual, with certificates of its own authority, and with a look at the records in every
//! handshake.
//!
//! Sessions are never resumed: a resumed handshake shows no certificate, so it would let in whoever was let in before.
//!
//! For links between daemons: [`Identity::link_server`] and [`Identity::link_client`] give the two sides, and
//! [`Identity::peer`] says who is on the other one.

use std::sync::Arc;

use ashlar_core::records::{ClientRole, ClusterId};
use ashlar_core::units::NodeId;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{
    ResolvesClientCert, Resumption, WebPkiServerVerifier, verify_server_cert_signed_by_trust_anchor,
};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{
    ClientHello, NoServerSessionStorage, ParsedCertificate, ResolvesServerCert,
    WebPkiClientVerifier,
};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, RootCertStore,
    ServerConfig, SignatureScheme,
};

use super::names::{Peer, peer_in};
use super::trust::{Trust, TrustError};
use super::{Identity, IdentityError, sha256_hex};

/// Whom a server lets in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admitted {
    /// Daemons only: links between stores.
    Nodes,
    /// Daemons and users of volumes: NBD.
    Volumes,
    /// Daemons, administrators, and callers without a certificate, who may only ask to join: the admin interface.
    Admin,
}

impl Admitted {
    fn check(self, peer: &Peer) -> Result<(), TrustError> {
        let is_admitted = match (self, peer) {
            (_, Peer::Node(_)) => true,
            (Admitted::Nodes, Peer::Client { .. }) => false,
            (Admitted::Volumes, Peer::Client { role, .. }) => *role == ClientRole::Volumes,
            (Admitted::Admin, Peer::Client { role, .. }) => *role == ClientRole::Admin,
        };
        if is_admitted {
            Ok(())
        } else {
            Err(TrustError::WrongRole { peer: peer.clone() })
        }
    }
}

/// The client's side of a link.
#[derive(Clone, Debug)]
pub struct LinkClient {
    /// For every handshake with that node.
    pub config: Arc<ClientConfig>,
    /// The node, as the handshake names and checks it.
    pub name: ServerName<'static>,
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn unusable(error: impl std::fmt::Display) -> IdentityError {
    IdentityError::Unusable {
        reason: error.to_string(),
    }
}

fn roots(authority: &CertificateDer<'static>) -> Result<Arc<RootCertStore>, IdentityError> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.clone()).map_err(unusable)?;
    Ok(Arc::new(roots))
}

impl Identity {
    /// The server's side: TLS 1.2 and later, the current certificate of this node in each handshake.
    pub fn server(
        self: &Arc<Self>,
        admitted: Admitted,
        alpn: &[&[u8]],
    ) -> Result<Arc<ServerConfig>, IdentityError> {
        let provider = provider();
        let verifier = WebPkiClientVerifier::builder_with_provider(
            roots(self.authority_certificate())?,
            provider.clone(),
        );
        let verifier = match admitted {
            Admitted::Admin => verifier.allow_unauthenticated(),
            Admitted::Nodes | Admitted::Volumes => verifier,
        };
        let verifier = KnownClients {
            chain: verifier.build().map_err(unusable)?,
            cluster: self.cluster(),
            trust: self.trust().clone(),
            admitted,
        };
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(unusable)?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_cert_resolver(Arc::new(Shown(self.clone())));
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        Ok(Arc::new(config))
    }

    /// The accepting side of a link between daemons: nodes of this cluster only.
    pub fn link_server(self: &Arc<Self>) -> Result<Arc<ServerConfig>, IdentityError> {
        self.server(Admitted::Nodes, &[])
    }

    /// The connecting side of a link to `node`: no other node will do, whatever its address.
    pub fn link_client(self: &Arc<Self>, node: NodeId) -> Result<LinkClient, IdentityError> {
        let provider = provider();
        let mut config = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(unusable)?
            .dangerous()
            .with_custom_certificate_verifier(self.node_verifier()?)
            .with_client_cert_resolver(Arc::new(Shown(self.clone())));
        config.resumption = Resumption::disabled();
        let name = Peer::Node(node).dns_name(self.cluster());
        Ok(LinkClient {
            config: Arc::new(config),
            name: ServerName::try_from(name).map_err(unusable)?,
        })
    }

    /// Checks that a server is the node whose name was asked for, and still one of the cluster.
    pub(super) fn node_verifier(&self) -> Result<Arc<dyn ServerCertVerifier>, IdentityError> {
        let chain = WebPkiServerVerifier::builder_with_provider(
            roots(self.authority_certificate())?,
            provider(),
        );
        Ok(Arc::new(KnownNodes {
            chain: chain.build().map_err(unusable)?,
            cluster: self.cluster(),
            trust: self.trust().clone(),
        }))
    }

    /// Who is on the other side of a finished handshake; `None`: somebody without a certificate.
    pub fn peer(&self, certificates: Option<&[CertificateDer<'_>]>) -> Option<Peer> {
        let (peer, cluster) = peer_in(certificates?.first()?).ok()?;
        (cluster == self.cluster()).then_some(peer)
    }
}

/// Shows the certificate that is current when the handshake is made.
#[derive(Debug)]
struct Shown(Arc<Identity>);

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.current().credentials)
    }
}

impl ResolvesClientCert for Shown {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.current().credentials)
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// A certificate that is good, of somebody who is not.
fn refused(error: TrustError) -> Error {
    tracing::info!(%error, "a TLS handshake was refused");
    Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)
}

fn known(
    certificate: &CertificateDer<'_>,
    cluster: ClusterId,
    trust: &Trust,
) -> Result<Peer, Error> {
    match peer_in(certificate) {
        Ok((peer, its)) if its == cluster => {
            trust.check(&peer).map_err(refused)?;
            Ok(peer)
        }
        _ => Err(Error::InvalidCertificate(
            CertificateError::ApplicationVerificationFailure,
        )),
    }
}

#[derive(Debug)]
struct KnownClients {
    chain: Arc<dyn ClientCertVerifier>,
    cluster: ClusterId,
    trust: Arc<Trust>,
    admitted: Admitted,
}

impl ClientCertVerifier for KnownClients {
    fn offer_client_auth(&self) -> bool {
        self.chain.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.chain.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self
            .chain
            .verify_client_cert(end_entity, intermediates, now)?;
        let peer = known(end_entity, self.cluster, &self.trust)?;
        self.admitted.check(&peer).map_err(refused)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain
            .verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

#[derive(Debug)]
struct KnownNodes {
    chain: Arc<WebPkiServerVerifier>,
    cluster: ClusterId,
    trust: Arc<Trust>,
}

impl ServerCertVerifier for KnownNodes {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified = self.chain.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        )?;
        known(end_entity, self.cluster, &self.trust)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain
            .verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// What a node that joins knows of the cluster: the digest of its authority's certificate. The server must be a node that
/// this authority vouches for.
#[derive(Debug)]
pub(super) struct FingerprintVerifier {
    authority_sha256: String,
    provider: Arc<CryptoProvider>,
}

impl FingerprintVerifier {
    pub(super) fn new(authority_sha256: &str) -> Arc<FingerprintVerifier> {
        Arc::new(FingerprintVerifier {
            authority_sha256: authority_sha256.to_owned(),
            provider: provider(),
        })
    }
}

impl ServerCertVerifier for FingerprintVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let authority = intermediates
            .iter()
            .find(|certificate| sha256_hex(certificate) == self.authority_sha256)
            .ok_or(Error::InvalidCertificate(CertificateError::UnknownIssuer))?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(end_entity)?,
            &roots,
            &[],
            now,
            self.provider.signature_verification_algorithms.all,
        )?;
        // A client's certificate is of the same authority; its holder must not pass for the cluster.
        match peer_in(end_entity) {
            Ok((Peer::Node(_), _)) => Ok(ServerCertVerified::assertion()),
            _ => Err(Error::InvalidCertificate(
                CertificateError::ApplicationVerificationFailure,
            )),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
