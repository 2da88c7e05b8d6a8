//! Calls that only the node of a volume's head can decide, passed on to it: that node knows who is connected.

use std::time::Duration;

use ashlar_core::records::MemberState;
use ashlar_core::units::NodeId;
use ashlar_proto::NODE_NOT_ASKED;
use ashlar_proto::admin::admin_client::AdminClient;
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};

use super::service::{Service, refused};
use crate::volumes::VolumeError;

/// On a call that was passed on; it goes no further.
const PASSED_ON: &str = "ashlar-passed-on";
/// How long the other node may take to be reached.
const REACH: Duration = Duration::from_secs(5);
/// How long it may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// The node of a head, reached.
pub(super) struct HeadNode {
    pub(super) client: AdminClient<Channel>,
    node: NodeId,
}

impl HeadNode {
    /// What it answered. A call that broke off may have been carried out.
    pub(super) fn answer<T>(
        &self,
        answer: Result<Response<T>, Status>,
    ) -> Result<Response<T>, Status> {
        answer.map_err(|status| {
            let broke_off = std::error::Error::source(&status).is_some()
                || matches!(
                    status.code(),
                    Code::Unavailable | Code::Cancelled | Code::Unknown | Code::DeadlineExceeded
                );
            if broke_off {
                Status::aborted(format!(
                    "node {}, which serves the volume, was asked and has not answered ({}); it may still do it: look, and ask again",
                    self.node.0,
                    status.message()
                ))
            } else {
                status
            }
        })
    }
}

/// A call for the node of the head.
pub(super) fn passed_on<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    let yes = MetadataValue::from_static("1");
    request.metadata_mut().insert(PASSED_ON, yes);
    request
}

impl Service {
    /// The node to ask instead, when this one refused a call for no other reason than that another one's head has the volume.
    /// What else was refused stays so. See [`NODE_NOT_ASKED`].
    pub(super) async fn ask_instead(
        &self,
        metadata: &MetadataMap,
        refusal: VolumeError,
    ) -> Result<HeadNode, Status> {
        let VolumeError::Elsewhere { node, .. } = refusal else {
            return Err(refused(refusal));
        };
        if metadata.contains_key(PASSED_ON) {
            return Err(refused(refusal));
        }
        match self.reach(node).await {
            Ok(client) => Ok(HeadNode { client, node }),
            Err(reason) => {
                let text = format!("that node cannot be asked ({reason}); {refusal}");
                let mut status = Status::failed_precondition(text);
                let yes = MetadataValue::from_static("1");
                status.metadata_mut().insert(NODE_NOT_ASKED, yes);
                Err(status)
            }
        }
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
        let reached = tokio::time::timeout(REACH, channel).await;
        let channel =
            reached.map_err(|_| format!("it did not answer within {} s", REACH.as_secs()))?;
        Ok(AdminClient::new(channel?))
    }
}
