//! Calls that only the node of a volume's head can decide, passed on to it: that node knows who is connected.

use std::time::Duration;

use ashlar_core::records::MemberState;
use ashlar_core::units::NodeId;
use ashlar_proto::admin::admin_client::AdminClient;
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::transport::Channel;
use tonic::{Request, Status};

use super::service::{Service, refused};
use crate::volumes::VolumeError;

/// On a call that was passed on; it goes no further.
const PASSED_ON: &str = "ashlar-passed-on";
/// How long the other node may take to connect, and to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// A call for the node of the head.
pub(super) fn passed_on<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    let yes = MetadataValue::from_static("1");
    request.metadata_mut().insert(PASSED_ON, yes);
    request
}

impl Service {
    /// The node to ask instead, when this one refused a call for no other reason than that another one's head has the volume.
    /// What else was refused stays so. UNAVAILABLE when that node cannot be asked.
    pub(super) async fn ask_instead(
        &self,
        metadata: &MetadataMap,
        refusal: VolumeError,
    ) -> Result<AdminClient<Channel>, Status> {
        let (VolumeError::Elsewhere { node, .. } | VolumeError::OneCopyElsewhere { node, .. }) =
            refusal
        else {
            return Err(refused(refusal));
        };
        if metadata.contains_key(PASSED_ON) {
            return Err(refused(refusal));
        }
        let reached = self.reach(node).await;
        reached.map_err(|reason| {
            Status::unavailable(format!("that node cannot be asked ({reason}); {refusal}"))
        })
    }

    async fn reach(&self, node: NodeId) -> Result<AdminClient<Channel>, String> {
        let cluster = self.state.cluster().ok_or("this daemon is in no cluster")?;
        let members = cluster.identity.trust().members();
        let member = members.into_iter().find(|member| member.id == node);
        let member = member.ok_or("it is not in the cluster")?;
        if member.state == MemberState::Removed {
            return Err("it was removed from the cluster".to_owned());
        }
        let address = member
            .address
            .ok_or("it has told no address of its admin interface")?;
        let channel = cluster.identity.channel(node, &address, PATIENCE);
        Ok(AdminClient::new(channel.await?))
    }
}
