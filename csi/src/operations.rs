//! One operation a volume at a time, each carried to its end whoever waits for it.

use std::collections::HashSet;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::refusal::{Class, Refusal};

/// What is being worked on.
#[derive(Clone, Default)]
pub struct Operations {
    busy: Arc<Mutex<HashSet<String>>>,
}

/// Held while an operation goes on.
pub struct Turn {
    busy: Arc<Mutex<HashSet<String>>>,
    key: String,
}

impl Operations {
    /// Takes the turn for `key`, a volume's id or the name of one that is being created. Refused with
    /// [`Class::Aborted`] while somebody has it: waiting would pile up retries behind one slow operation.
    pub fn begin(&self, key: &str) -> Result<Turn, Refusal> {
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        if !busy.insert(key.to_owned()) {
            return Err(Refusal::busy(&format!("volume {key}")));
        }
        Ok(Turn {
            busy: Arc::clone(&self.busy),
            key: key.to_owned(),
        })
    }

    /// Carries `work` out in a task of its own, under the turn for `key`, and waits for it for at most `patience`.
    ///
    /// A caller that gives up leaves the work going on, with its turn: the next attempt is told [`Class::Aborted`] until
    /// it is over and then finds what was done. That is why neither a vanished caller nor a deadline can leave a volume
    /// half way with nobody at it.
    pub async fn carry_out<T, W>(
        &self,
        key: &str,
        patience: Option<Duration>,
        work: W,
    ) -> Result<T, Refusal>
    where
        T: Send + 'static,
        W: Future<Output = Result<T, Refusal>> + Send + 'static,
    {
        let turn = self.begin(key)?;
        let task = tokio::spawn(async move {
            let _turn = turn;
            work.await
        });
        let ended = match patience {
            None => task.await,
            Some(patience) => match tokio::time::timeout(patience, task).await {
                Ok(ended) => ended,
                Err(_) => {
                    return Err(Refusal::new(
                        Class::DeadlineExceeded,
                        "not done within the caller's deadline; it is going on, ask again",
                    ));
                }
            },
        };
        ended.unwrap_or_else(|error| {
            Err(Refusal::internal(format!(
                "the operation broke off: {error}"
            )))
        })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        busy.remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_operation_is_told_to_come_back() {
        let operations = Operations::default();
        let turn = operations.begin("a").expect("free");
        let other = operations.begin("b").expect("another volume");
        let refused = operations.begin("a").err().expect("busy");
        assert_eq!(refused.class, Class::Aborted);
        drop(turn);
        assert!(operations.begin("a").is_ok());
        drop(other);
    }

    #[tokio::test]
    async fn work_goes_on_after_its_caller_gave_up() {
        let operations = Operations::default();
        let (go, wait) = tokio::sync::oneshot::channel::<()>();
        let (done, finished) = tokio::sync::oneshot::channel::<()>();
        let work = async move {
            wait.await.map_err(|_| Refusal::internal("no signal"))?;
            done.send(()).map_err(|()| Refusal::internal("nobody"))
        };
        let answer = operations
            .carry_out("a", Some(Duration::from_millis(1)), work)
            .await;
        assert_eq!(answer.unwrap_err().class, Class::DeadlineExceeded);
        assert!(operations.begin("a").is_err(), "it still has its turn");
        go.send(()).expect("the work waits");
        finished.await.expect("the work ended");
        while operations.begin("a").is_err() {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_panic_gives_the_turn_back() {
        let operations = Operations::default();
        let answer: Result<(), Refusal> = operations
            .carry_out("a", None, async { panic!("on purpose") })
            .await;
        assert_eq!(answer.unwrap_err().class, Class::Internal);
        assert!(operations.begin("a").is_ok());
    }
}
