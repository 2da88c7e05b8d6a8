//! The socket the orchestrator calls on.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use super::controller::Controller;
use super::identity::Identity;
use super::node::Node;
use crate::csi::controller_server::ControllerServer;
use crate::csi::identity_server::IdentityServer;
use crate::csi::node_server::NodeServer;

/// The largest message that is taken: the interface's bounds add up to far less.
const MESSAGE_BYTES_MAX: usize = 1 << 20;
/// How long calls under way get when the driver is told to stop. What they began goes on from its state files later.
const DRAIN_LIMIT: Duration = Duration::from_secs(25);

/// What is served.
pub struct Services {
    /// Always.
    pub identity: Identity,
    /// Where volumes are provisioned.
    pub controller: Option<Controller>,
    /// On every node.
    pub node: Option<Node>,
}

/// `unix:///path`, `unix:/path` or `/path` of a socket.
pub fn endpoint(text: &str) -> Result<PathBuf, String> {
    let path = text
        .strip_prefix("unix://")
        .or_else(|| text.strip_prefix("unix:"));
    let path = Path::new(path.unwrap_or(text));
    if path.is_absolute() {
        Ok(path.to_owned())
    } else {
        Err(format!(
            "{text:?}: an endpoint is unix:///absolute/path.sock"
        ))
    }
}

/// Listens at `path`. A socket that nobody answers on is what an earlier run left, and is replaced; one that somebody does
/// is not.
pub async fn listen(path: &Path) -> io::Result<UnixListener> {
    if UnixStream::connect(path).await.is_ok() {
        return Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            "somebody serves this socket already",
        ));
    }
    if std::fs::symlink_metadata(path).is_ok_and(|found| {
        use std::os::unix::fs::FileTypeExt;
        found.file_type().is_socket()
    }) {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

/// Serves until `stop` is over, then lets the calls under way end.
pub async fn serve(
    listener: UnixListener,
    services: Services,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<(), tonic::transport::Error> {
    let (told, is_told) = tokio::sync::oneshot::channel();
    let stop = async move {
        stop.await;
        let _ = told.send(());
    };
    let identity = IdentityServer::new(services.identity);
    let controller = services.controller.map(|controller| {
        ControllerServer::new(controller).max_decoding_message_size(MESSAGE_BYTES_MAX)
    });
    let node = services
        .node
        .map(|node| NodeServer::new(node).max_decoding_message_size(MESSAGE_BYTES_MAX));
    let serving = Server::builder()
        .add_service(identity)
        .add_optional_service(controller)
        .add_optional_service(node)
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop);
    tokio::select! {
        ended = serving => ended,
        () = async {
            let _ = is_told.await;
            tokio::time::sleep(DRAIN_LIMIT).await;
        } => {
            tracing::warn!("calls are still under way; leaving them to the next start");
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_read() {
        for text in [
            "unix:///run/csi.sock",
            "unix:/run/csi.sock",
            "/run/csi.sock",
        ] {
            assert_eq!(endpoint(text), Ok(PathBuf::from("/run/csi.sock")), "{text}");
        }
        for text in ["", "tcp://h:1", "csi.sock", "unix:csi.sock"] {
            assert!(endpoint(text).is_err(), "{text}");
        }
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let scratch = tempfile::tempdir().expect("a directory");
        let path = scratch.path().join("csi.sock");
        let first = listen(&path).await.expect("free");
        assert!(listen(&path).await.is_err(), "somebody listens");
        drop(first);
        assert!(path.exists(), "closing leaves the file");
        listen(&path).await.expect("replaced");
        std::fs::remove_file(&path).expect("removed");
        std::fs::write(&path, b"a file").expect("written");
        assert!(listen(&path).await.is_err(), "a file is not removed");
    }
}
