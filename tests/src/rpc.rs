//! The admin interface as an orchestrator's driver uses it: gRPC, one call after the other.

use std::path::Path;
use std::time::Duration;

use ashlar_proto::admin::{self, admin_client::AdminClient};
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// One connection to a daemon.
pub struct Rpc {
    runtime: Runtime,
    client: AdminClient<Channel>,
}

/// Calls a method with a request and gives its answer: `rpc.call(AdminClient::get_volume, request)` without the noise.
macro_rules! calls {
    ($($name:ident($request:ident) -> $answer:ident;)*) => {
        $(
            #[doc = concat!("`Admin.", stringify!($name), "`.")]
            pub fn $name(&mut self, request: admin::$request) -> Result<admin::$answer, Status> {
                let mut request = tonic::Request::new(request);
                request.set_timeout(Duration::from_secs(60));
                let answer = self.runtime.block_on(self.client.$name(request))?;
                Ok(answer.into_inner())
            }
        )*
    };
}

impl Rpc {
    /// Connects to the admin socket of a daemon.
    pub fn connect(socket: &Path) -> Rpc {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        let address = format!("unix://{}", socket.display());
        let endpoint = Endpoint::from_shared(address).expect("a socket's address");
        let channel = runtime
            .block_on(endpoint.connect())
            .expect("a daemon that listens");
        Rpc {
            runtime,
            client: AdminClient::new(channel),
        }
    }

    calls! {
        create_volume(CreateVolumeRequest) -> CreateVolumeResponse;
        get_volume(GetVolumeRequest) -> GetVolumeResponse;
        list_volumes(ListVolumesRequest) -> ListVolumesResponse;
        delete_volume(DeleteVolumeRequest) -> DeleteVolumeResponse;
        open_volume(OpenVolumeRequest) -> OpenVolumeResponse;
        set_volume(SetVolumeRequest) -> SetVolumeResponse;
        set_annotations(SetAnnotationsRequest) -> SetAnnotationsResponse;
        publish_volume(PublishVolumeRequest) -> PublishVolumeResponse;
        unpublish_volume(UnpublishVolumeRequest) -> UnpublishVolumeResponse;
        close_connections(CloseConnectionsRequest) -> CloseConnectionsResponse;
        begin_format(BeginFormatRequest) -> BeginFormatResponse;
        end_format(EndFormatRequest) -> EndFormatResponse;
        get_capacity(GetCapacityRequest) -> GetCapacityResponse;
        register_node(RegisterNodeRequest) -> RegisterNodeResponse;
        unregister_node(UnregisterNodeRequest) -> UnregisterNodeResponse;
        list_nodes(ListNodesRequest) -> ListNodesResponse;
    }

    /// A volume as it is now.
    pub fn volume(&mut self, volume: &str) -> admin::Volume {
        let request = admin::GetVolumeRequest {
            volume: volume.to_owned(),
        };
        let answer = self.get_volume(request).expect("the volume is there");
        answer.volume.expect("an answer about a volume holds it")
    }

    /// Makes a client node known.
    pub fn node(&mut self, node_id: &str) {
        let request = admin::RegisterNodeRequest {
            node_id: node_id.to_owned(),
            ..Default::default()
        };
        self.register_node(request).expect("registered");
    }

    /// Publishes and gives the export name.
    pub fn publish(
        &mut self,
        volume: &str,
        node_id: &str,
        mode: admin::AccessMode,
    ) -> Result<String, Status> {
        let request = admin::PublishVolumeRequest {
            volume: volume.to_owned(),
            node_id: node_id.to_owned(),
            read_only: false,
            access_mode: mode.into(),
        };
        Ok(self.publish_volume(request)?.export_name)
    }

    /// Takes a volume back; an empty node means all.
    pub fn unpublish(&mut self, volume: &str, node_id: &str) -> admin::UnpublishVolumeResponse {
        let request = admin::UnpublishVolumeRequest {
            volume: volume.to_owned(),
            node_id: node_id.to_owned(),
        };
        self.unpublish_volume(request).expect("taken back")
    }
}

/// The code of a refusal, and its message.
pub fn refusal<T: std::fmt::Debug>(answer: Result<T, Status>) -> (Code, String) {
    let status = answer.expect_err("refused");
    (status.code(), status.message().to_owned())
}
