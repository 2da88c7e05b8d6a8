//! Ashlar's gRPC interfaces.
