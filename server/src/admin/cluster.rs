//! `ashlar.cluster.v1.Cluster`: read, decide in the core, swap, and again on a conflict.

mod nodes;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ashlar_core::records::{
    ClientRecord, ClientRole, Joiner, MemberState, Record, TOKEN_REMEMBERED_MS, TokenRecord,
    Transaction, check_client_name, check_label, join, keys, label,
};
use ashlar_core::units::NodeId;
use ashlar_proto::cluster as proto;
use tonic::{Request, Response, Status};
use uuid::Uuid;

use nodes::Seen;

use super::secure::{Caller, admitted};
use super::status;
use crate::daemon::{ClusterServices, State};
use crate::identity::{IdentityError, Peer, Token, sha256_hex};
use crate::meta::{self, MetadataError, MetadataStore, Outcome};
use crate::volumes::unix_ms;

/// How often a change is decided again after a conflict.
const ATTEMPTS: usize = 16;
/// Default of a token's life: a person carries it from one terminal to another.
const TOKEN_SECONDS_DEFAULT: u32 = 3600;
/// Longest life of a token.
const TOKEN_SECONDS_MAX: u32 = 30 * 86400;
/// Default of a client certificate's life.
const CLIENT_DAYS_DEFAULT: u32 = 365;
const CLIENT_DAYS_MAX: u32 = 3650;

#[derive(Clone)]
pub(super) struct Service {
    state: Arc<State>,
}

type Answer<T> = Result<Response<T>, Status>;

impl Service {
    pub(super) fn new(state: Arc<State>) -> Service {
        Service { state }
    }

    /// What the controller of this daemon saw last; nothing before it has looked.
    fn seen(&self) -> Seen {
        let services = self.state.services();
        let Some(services) = services else {
            return Seen::default();
        };
        let controller = services.controller.as_ref();
        Seen {
            picture: controller.map(|c| c.picture()).unwrap_or_default(),
            volumes: services.volumes.records(),
        }
    }

    fn cluster(&self) -> Result<ClusterServices, Status> {
        self.state.cluster().ok_or_else(|| {
            if self.state.config().is_clustered() {
                Status::unavailable(format!("the daemon is starting: {}", self.state.step()))
            } else {
                Status::failed_precondition(
                    "this daemon is a single node; `ashlar cluster init` makes it the first of a cluster",
                )
            }
        })
    }
}

fn unsigned(error: IdentityError) -> Status {
    Status::invalid_argument(error.to_string())
}

fn contended() -> Status {
    Status::aborted("others change the same records all the time; try again")
}

/// Commits, and answers whether it was the last attempt that is needed. What is unknown is read again.
async fn committed(records: &dyn MetadataStore, change: Transaction) -> Result<bool, Status> {
    match records.commit(change).await {
        Ok(Outcome::Committed(_)) => Ok(true),
        Ok(Outcome::Conflict) | Err(MetadataError::Unknown { .. }) => Ok(false),
        Err(error) => Err(status::unread(error)),
    }
}

#[tonic::async_trait]
impl proto::cluster_server::Cluster for Service {
    async fn join(&self, request: Request<proto::JoinRequest>) -> Answer<proto::JoinResponse> {
        let cluster = self.cluster()?;
        let authority = cluster.authority()?;
        let asked = request.into_inner();
        let node = Uuid::try_parse(&asked.node_id)
            .map_err(|_| Status::invalid_argument("node_id is not a UUID"))?;
        let labels: BTreeMap<_, _> = asked.labels.into_iter().collect();
        for part in labels.iter().flat_map(|(key, value)| [key, value]) {
            check_label(part).map_err(|error| status::of_member_error(&error))?;
        }
        let joiner = Joiner {
            node: NodeId(node),
            public_key_sha256: sha256_hex(&asked.public_key),
            address: (!asked.address.is_empty()).then_some(asked.address),
            labels,
        };
        let length = self.state.config().certificate_lifetime;
        let peer = Peer::Node(joiner.node);
        // Signed before the token is spent, so that what cannot be signed costs no token.
        let (certificate, lifetime) = authority
            .sign(&peer, &asked.public_key, &asked.names, length)
            .map_err(unsigned)?;
        let token_sha256 = Token::secret_sha256(&asked.secret);
        let token_key = keys::token(&token_sha256);
        for _ in 0..ATTEMPTS {
            let token = meta::read::<TokenRecord>(&*cluster.records, &token_key).await;
            let token = token.map_err(status::unread)?;
            let member = crate::identity::member(&*cluster.records, joiner.node).await;
            let member = member.map_err(status::unread)?;
            let change = join(
                &token_sha256,
                token.as_ref(),
                member.as_ref(),
                &joiner,
                unix_ms(),
            );
            let is_done = match change.map_err(|error| status::of_join_error(&error))? {
                Some(change) => committed(&*cluster.records, change).await?,
                None => true,
            };
            if is_done {
                tracing::info!(node = %joiner.node.0, "a node joined the cluster");
                return Ok(Response::new(proto::JoinResponse {
                    cluster_id: cluster.identity.cluster().0.to_string(),
                    authority: authority.certificate().to_vec(),
                    certificate: certificate.to_vec(),
                    expires_at_unix_ms: lifetime.expires_at_unix_ms,
                }));
            }
        }
        Err(contended())
    }

    async fn renew(&self, request: Request<proto::RenewRequest>) -> Answer<proto::RenewResponse> {
        let cluster = self.cluster()?;
        let caller = request.extensions().get::<Caller>().cloned();
        let Some(peer @ Peer::Node(_)) = caller.and_then(|caller| caller.peer) else {
            return Err(Status::permission_denied(
                "only a node renews its certificate, and shows the one it has",
            ));
        };
        let asked = request.into_inner();
        let length = self.state.config().certificate_lifetime;
        let (certificate, lifetime) = cluster
            .authority()?
            .sign(&peer, &asked.public_key, &asked.names, length)
            .map_err(unsigned)?;
        Ok(Response::new(proto::RenewResponse {
            certificate: certificate.to_vec(),
            expires_at_unix_ms: lifetime.expires_at_unix_ms,
        }))
    }

    async fn create_token(
        &self,
        request: Request<proto::CreateTokenRequest>,
    ) -> Answer<proto::CreateTokenResponse> {
        admitted(&request)?;
        let cluster = self.cluster()?;
        let seconds = match request.into_inner().lifetime_seconds {
            0 => TOKEN_SECONDS_DEFAULT,
            seconds if seconds <= TOKEN_SECONDS_MAX => seconds,
            _ => return Err(Status::invalid_argument("a token lives at most 30 days")),
        };
        let now = unix_ms();
        let expires_at_unix_ms = now + 1000 * u64::from(seconds);
        let authority_sha256 = cluster.cluster_record().await?.authority_sha256;
        let token = Token::generate(&authority_sha256)
            .map_err(|error| Status::internal(error.to_string()))?;
        let record = TokenRecord {
            expires_at_unix_ms,
            used_by: None,
        };
        let mut change = Transaction::new().put(
            keys::token(&Token::secret_sha256(token.secret())),
            record.encode(),
        );
        let known = cluster
            .records
            .list(keys::TOKENS)
            .await
            .map_err(status::unread)?;
        let stale = known.entries.iter().filter(|entry| {
            entry
                .read::<TokenRecord>()
                .is_ok_and(|old| old.record.expires_at_unix_ms + TOKEN_REMEMBERED_MS < now)
        });
        for entry in stale.take(ATTEMPTS) {
            change = change.delete(entry.key.clone());
        }
        cluster
            .records
            .commit(change)
            .await
            .map_err(status::unread)?;
        let members = cluster.members().await?.into_iter();
        let mut signing: Vec<_> = members
            .map(|member| member.record)
            .filter(|record| record.is_authority && record.state == MemberState::Active)
            .collect();
        // Most take the first: this node, which is there, before one that may be gone.
        let (this, seen) = (cluster.identity.node(), self.seen());
        signing.sort_by_key(|record| {
            let known = seen.picture.nodes.get(&record.id);
            (record.id != this, known.is_some_and(|known| known.is_away))
        });
        let addresses = signing.into_iter().filter_map(|record| record.address);
        Ok(Response::new(proto::CreateTokenResponse {
            token: token.reveal(),
            expires_at_unix_ms,
            addresses: addresses.collect(),
        }))
    }

    async fn list_nodes(
        &self,
        request: Request<proto::ListNodesRequest>,
    ) -> Answer<proto::ListNodesResponse> {
        admitted(&request)?;
        let cluster = self.cluster()?;
        let mut holdings = cluster.holdings().await?;
        let seen = self.seen();
        let nodes = cluster.members().await?.into_iter().map(|member| {
            let has = holdings.remove(&member.record.id);
            cluster.node(member.record, has.unwrap_or_default(), &seen)
        });
        Ok(Response::new(proto::ListNodesResponse {
            cluster_id: cluster.identity.cluster().0.to_string(),
            nodes: nodes.collect(),
        }))
    }

    async fn remove_node(
        &self,
        request: Request<proto::RemoveNodeRequest>,
    ) -> Answer<proto::RemoveNodeResponse> {
        admitted(&request)?;
        let cluster = self.cluster()?;
        let reference = request.into_inner().node;
        let member = cluster.find(&reference).await?.record;
        // From here on it gets no new copy: what is found to be there is all that there is.
        let marked =
            member.state == MemberState::Active && cluster.set_draining(member.id, true).await?;
        let removed = cluster.shut_out(member.id).await;
        if removed.is_err() && marked {
            cluster.set_draining(member.id, false).await?;
        }
        removed?;
        tracing::info!(node = %member.id.0, "a node was removed from the cluster");
        let node = cluster.shown(member.id, &self.seen()).await?;
        Ok(Response::new(proto::RemoveNodeResponse { node }))
    }

    async fn label_node(
        &self,
        request: Request<proto::LabelNodeRequest>,
    ) -> Answer<proto::LabelNodeResponse> {
        admitted(&request)?;
        let cluster = self.cluster()?;
        let asked = request.into_inner();
        let set: BTreeMap<_, _> = asked.set.into_iter().collect();
        for _ in 0..ATTEMPTS {
            let member = cluster.find(&asked.node).await?;
            let change = label(&member, &set, &asked.unset)
                .map_err(|error| status::of_member_error(&error))?;
            if committed(&*cluster.records, change).await? {
                let node = cluster.shown(member.record.id, &self.seen()).await?;
                return Ok(Response::new(proto::LabelNodeResponse { node }));
            }
        }
        Err(contended())
    }

    async fn drain_node(
        &self,
        request: Request<proto::DrainNodeRequest>,
    ) -> Answer<proto::DrainNodeResponse> {
        admitted(&request)?;
        let cluster = self.cluster()?;
        let asked = request.into_inner();
        let node = cluster.find(&asked.node).await?.record.id;
        if cluster.set_draining(node, !asked.cancel).await? {
            let what = if asked.cancel {
                "a node keeps its copies again"
            } else {
                "the copies of a node are to move elsewhere"
            };
            tracing::info!(node = %node.0, "{what}");
        }
        let node = cluster.shown(node, &self.seen()).await?;
        Ok(Response::new(proto::DrainNodeResponse { node }))
    }

    async fn issue_client_certificate(
        &self,
        request: Request<proto::IssueClientCertificateRequest>,
    ) -> Answer<proto::IssueClientCertificateResponse> {
        admitted(&request)?;
        let cluster = self.cluster()?;
        let authority = cluster.authority()?;
        let asked = request.into_inner();
        let role = match asked.role() {
            proto::ClientRole::Volumes => ClientRole::Volumes,
            proto::ClientRole::Admin => ClientRole::Admin,
            proto::ClientRole::Unspecified => {
                return Err(Status::invalid_argument("role is not given"));
            }
        };
        check_client_name(&asked.name)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let days = match asked.lifetime_days {
            0 => CLIENT_DAYS_DEFAULT,
            days if days <= CLIENT_DAYS_MAX => days,
            _ => {
                return Err(Status::invalid_argument(
                    "a certificate lives at most 10 years",
                ));
            }
        };
        let certificate = Uuid::new_v4();
        let peer = Peer::Client {
            name: asked.name.clone(),
            certificate,
            role,
        };
        let length = Duration::from_secs(86400 * u64::from(days));
        let (signed, lifetime) = authority
            .sign(&peer, &asked.public_key, &[], length)
            .map_err(unsigned)?;
        let record = ClientRecord {
            name: asked.name,
            certificate,
            role,
            issued_at_unix_ms: lifetime.issued_at_unix_ms,
            expires_at_unix_ms: lifetime.expires_at_unix_ms,
        };
        let change = Transaction::new().put(keys::client(&record.name), record.encode());
        cluster
            .records
            .commit(change)
            .await
            .map_err(status::unread)?;
        tracing::info!(name = record.name, "a client certificate was issued");
        Ok(Response::new(proto::IssueClientCertificateResponse {
            authority: authority.certificate().to_vec(),
            certificate: signed.to_vec(),
            expires_at_unix_ms: lifetime.expires_at_unix_ms,
        }))
    }

    async fn list_client_certificates(
        &self,
        request: Request<proto::ListClientCertificatesRequest>,
    ) -> Answer<proto::ListClientCertificatesResponse> {
        admitted(&request)?;
        let cluster = self.cluster()?;
        let mut certificates = Vec::new();
        let listing = cluster
            .records
            .list(keys::CLIENTS)
            .await
            .map_err(status::unread)?;
        for entry in listing.entries {
            let record = entry.read::<ClientRecord>().map_err(status::unread)?.record;
            let role = match record.role {
                ClientRole::Volumes => proto::ClientRole::Volumes,
                ClientRole::Admin => proto::ClientRole::Admin,
            };
            certificates.push(proto::ClientCertificate {
                name: record.name,
                role: role.into(),
                issued_at_unix_ms: record.issued_at_unix_ms,
                expires_at_unix_ms: record.expires_at_unix_ms,
            });
        }
        Ok(Response::new(proto::ListClientCertificatesResponse {
            certificates,
        }))
    }

    async fn revoke_client_certificate(
        &self,
        request: Request<proto::RevokeClientCertificateRequest>,
    ) -> Answer<proto::RevokeClientCertificateResponse> {
        admitted(&request)?;
        let cluster = self.cluster()?;
        let name = request.into_inner().name;
        check_client_name(&name).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let key = keys::client(&name);
        let found = cluster.records.get(&key).await.map_err(status::unread)?;
        let found = found.ok_or_else(|| {
            Status::not_found(format!(
                "there is no certificate {name:?}; `ashlar cluster client-certs` shows those there are"
            ))
        })?;
        let change = Transaction::new()
            .when_unchanged(key.clone(), found.changed_at)
            .delete(key);
        match cluster
            .records
            .commit(change)
            .await
            .map_err(status::unread)?
        {
            Outcome::Committed(_) => {
                tracing::info!(name, "a client certificate was revoked");
                Ok(Response::new(proto::RevokeClientCertificateResponse {}))
            }
            Outcome::Conflict => Err(contended()),
        }
    }
}
