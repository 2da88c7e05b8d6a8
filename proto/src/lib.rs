//! Ashlar's gRPC interfaces.
//!
//! [`admin`] is generated at build time from `proto/ashlar/admin/v1/admin.proto`, where every field's unit and meaning
//! is written down. [`request`] turns what a client sent into types that can be relied upon, or names the field that
//! is wrong. [`FILE_DESCRIPTOR_SET`] is what the reflection service serves.

pub mod request;

/// `ashlar.admin.v1`: messages, the client and the server trait.
pub mod admin {
    #![allow(clippy::all, unreachable_pub)]
    tonic::include_proto!("ashlar.admin.v1");
}

/// `ashlar.cluster.v1`: who belongs to a cluster, from `proto/ashlar/cluster/v1/cluster.proto`.
pub mod cluster {
    #![allow(clippy::all, unreachable_pub)]
    tonic::include_proto!("ashlar.cluster.v1");
}

/// `ashlar.diagnosis.v1`: why volumes are as they are and what happened, from
/// `proto/ashlar/diagnosis/v1/diagnosis.proto`.
pub mod diagnosis {
    #![allow(clippy::all, unreachable_pub)]
    tonic::include_proto!("ashlar.diagnosis.v1");
}

/// The part of etcd's interface that the metadata store uses: messages and clients, from `proto/etcd/rpc.proto`.
pub mod etcd {
    #![allow(clippy::all, unreachable_pub)]
    tonic::include_proto!("etcdserverpb");
}

/// On a refusal of `ashlar.admin.v1`: only the node that serves the volume can decide, and it could not be asked. Nothing was
/// begun, neither there nor here.
pub const NODE_NOT_ASKED: &str = "ashlar-node-not-asked";

/// The compiled descriptors of every interface, a serialised `google.protobuf.FileDescriptorSet`.
pub const FILE_DESCRIPTOR_SET: &[u8] =
    include_bytes!(concat!(env!("OUT_DIR"), "/ashlar.descriptors.bin"));
