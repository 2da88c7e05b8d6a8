//! `csi.v1.Identity`.

use std::collections::HashMap;

use tonic::{Request, Response, Status};

use super::{NAME, Spec, status};
use crate::address::Address;
use crate::csi;
use crate::csi::plugin_capability::{
    Service as Offer, Type, VolumeExpansion, service, volume_expansion,
};
use crate::daemon::Daemon;
use crate::refusal::{Class, Refusal};

/// The service.
pub struct Identity {
    daemon: Daemon,
    spec: Spec,
}

impl Identity {
    /// Over the daemon whose health is this driver's.
    pub fn new(daemon: Daemon, spec: Spec) -> Identity {
        Identity { daemon, spec }
    }
}

#[tonic::async_trait]
impl csi::identity_server::Identity for Identity {
    async fn get_plugin_info(
        &self,
        _request: Request<csi::GetPluginInfoRequest>,
    ) -> Result<Response<csi::GetPluginInfoResponse>, Status> {
        let spec = match self.spec {
            Spec::V1_12 => "1.12",
            Spec::V1_13 => "1.13",
        };
        Ok(Response::new(csi::GetPluginInfoResponse {
            name: NAME.to_owned(),
            vendor_version: env!("CARGO_PKG_VERSION").to_owned(),
            manifest: HashMap::from([("spec".to_owned(), spec.to_owned())]),
        }))
    }

    /// The same whatever `--mode` says: all instances of one version must answer alike.
    async fn get_plugin_capabilities(
        &self,
        _request: Request<csi::GetPluginCapabilitiesRequest>,
    ) -> Result<Response<csi::GetPluginCapabilitiesResponse>, Status> {
        let service = |kind: service::Type| csi::PluginCapability {
            r#type: Some(Type::Service(Offer {
                r#type: kind.into(),
            })),
        };
        let online = csi::PluginCapability {
            r#type: Some(Type::VolumeExpansion(VolumeExpansion {
                r#type: volume_expansion::Type::Online.into(),
            })),
        };
        Ok(Response::new(csi::GetPluginCapabilitiesResponse {
            capabilities: vec![
                service(service::Type::ControllerService),
                service(service::Type::VolumeAccessibilityConstraints),
                online,
            ],
        }))
    }

    async fn probe(
        &self,
        _request: Request<csi::ProbeRequest>,
    ) -> Result<Response<csi::ProbeResponse>, Status> {
        let ready = match self.daemon.status().await {
            Ok(summary) => summary.is_ready,
            // It is starting, or away and will be back at the same socket. The sidecars of Kubernetes wait for a driver that
            // is not ready, and end when Probe is answered with an error.
            Err(refusal)
                if refusal.class == Class::Unavailable
                    && matches!(self.daemon.address(), Address::Unix(_)) =>
            {
                tracing::debug!(%refusal, "not ready");
                false
            }
            Err(refusal) if refusal.class == Class::Unavailable => {
                return Err(status(Refusal::precondition(format!(
                    "{} does not serve: {refusal}",
                    self.daemon.address()
                ))));
            }
            Err(refusal) => {
                return Err(status(Refusal::precondition(refusal.message)));
            }
        };
        Ok(Response::new(csi::ProbeResponse { ready: Some(ready) }))
    }
}
