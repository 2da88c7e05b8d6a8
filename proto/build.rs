//! Generates the gRPC code with protox, so that no protoc is needed, and keeps the descriptors for reflection.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(
        [
            "ashlar/admin/v1/admin.proto",
            "ashlar/cluster/v1/cluster.proto",
            "ashlar/diagnosis/v1/diagnosis.proto",
        ],
        ["proto"],
    )?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(
        out.join("ashlar.descriptors.bin"),
        descriptors.encode_to_vec(),
    )?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    // Apart, so that reflection does not offer what the daemon only uses.
    let etcd = protox::compile(["etcd/rpc.proto"], ["proto"])?;
    tonic_prost_build::configure()
        .build_server(false)
        .compile_fds(etcd)?;
    Ok(())
}
