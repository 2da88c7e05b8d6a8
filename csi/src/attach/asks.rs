//! What the kernel is asked and may never answer.
//!
//! A thread that waits inside the kernel cannot be interrupted. So each ask has a thread of its own, which is left behind when
//! it takes too long, and while one is left behind nothing more is asked: it would wait for the same lock.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::sync::oneshot;

use super::AttachError;

/// Asks of one part of the kernel; clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Asks {
    left_behind: Arc<AtomicU32>,
}

impl Asks {
    /// Does `work` on a thread of its own and waits for it for at most `limit`. What is left behind may still be done.
    pub async fn ask<T, F>(
        &self,
        what: &'static str,
        limit: Duration,
        work: F,
    ) -> Result<T, AttachError>
    where
        T: Send + 'static,
        F: FnOnce() -> io::Result<T> + Send + 'static,
    {
        if self.left_behind.load(Ordering::Acquire) != 0 {
            return Err(AttachError::KernelStuck { what });
        }
        let (done, mut answer) = oneshot::channel();
        std::thread::Builder::new()
            .name("netlink".to_owned())
            .spawn(move || {
                // Nobody may be waiting any more.
                let _ = done.send(work());
            })
            .map_err(|error| AttachError::system(what, error))?;
        match tokio::time::timeout(limit, &mut answer).await {
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err(error))) => Err(AttachError::system(what, error)),
            Ok(Err(error)) => Err(AttachError::system(what, io::Error::other(error))),
            Err(_) => {
                tracing::error!(
                    what,
                    limit_s = limit.as_secs(),
                    "the kernel does not answer; nothing more is asked of its nbd driver until it does"
                );
                self.left_behind.fetch_add(1, Ordering::AcqRel);
                let left_behind = Arc::clone(&self.left_behind);
                tokio::spawn(async move {
                    let _ = answer.await;
                    left_behind.fetch_sub(1, Ordering::AcqRel);
                });
                Err(AttachError::TooSlow {
                    what: format!("{what}: the kernel does not answer"),
                    limit,
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::refusal::{Class, Refusal};

    const SOON: Duration = Duration::from_millis(20);
    const ENOUGH: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn one_that_is_never_answered_holds_nobody_and_lets_no_other_in() {
        let asks = Asks::default();
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let stuck = asks.ask("growing", SOON, move || {
            let _ = wait.recv();
            Ok(())
        });
        let class = |error: AttachError| Refusal::from(error).class;
        assert_eq!(
            class(stuck.await.expect_err("stuck")),
            Class::DeadlineExceeded
        );
        let refused = asks.ask("setting up", ENOUGH, || Ok(()));
        assert_eq!(
            class(refused.await.expect_err("not asked")),
            Class::Unavailable
        );
        go.send(()).expect("it waits");
        while asks.ask("setting up", ENOUGH, || Ok(())).await.is_err() {
            tokio::task::yield_now().await;
        }
        let failed = asks.ask("failing", ENOUGH, || Err::<(), _>(io::Error::other("no")));
        assert_eq!(class(failed.await.expect_err("an error")), Class::Internal);
    }
}
