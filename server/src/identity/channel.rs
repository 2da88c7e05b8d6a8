//! The admin interface of another node, asked as this node.

use std::time::Duration;

use ashlar_core::units::NodeId;
use tonic::transport::{Channel, ClientTlsConfig, Endpoint};

use super::Identity;
use super::files::IdentityFile;
use super::join::innermost;
use super::names::Peer;

impl Identity {
    /// Connects to the admin interface of `node` at `address`, and only to that node. `timeout` bounds the connecting
    /// and every call.
    pub(crate) async fn channel(
        &self,
        node: NodeId,
        address: &str,
        timeout: Duration,
    ) -> Result<Channel, String> {
        let file = IdentityFile::read(&self.data_dir).map_err(|error| error.to_string())?;
        let file = file.ok_or("the identity of this node is gone")?;
        let own = tonic::transport::Identity::from_pem(file.certificate_pem(), file.key_pem());
        let tls = ClientTlsConfig::new()
            .identity(own)
            .domain_name(Peer::Node(node).dns_name(self.cluster()))
            .timeout(timeout);
        let verifier = self.node_verifier().map_err(|error| error.to_string())?;
        Endpoint::from_shared(format!("https://{address}"))
            .and_then(|endpoint| {
                endpoint
                    .connect_timeout(timeout)
                    .timeout(timeout)
                    .tls_config_with_verifier(tls, verifier)
            })
            .map_err(|error| innermost(&error))?
            .connect()
            .await
            .map_err(|error| innermost(&error))
    }
}
