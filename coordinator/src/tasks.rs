//! The tasks without which a coordinator would be deaf. None of them has an end; they end with what holds them.

use std::collections::HashMap;

use anyhow::anyhow;
use tokio::task::{Id, JoinSet};

use crate::error::Error;

/// Those that run, each with what it does.
#[derive(Debug, Default)]
pub(crate) struct Tasks {
    running: JoinSet<()>,
    names: HashMap<Id, &'static str>,
}

impl Tasks {
    /// Begins one; `name` completes "the task that ...".
    pub(crate) fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.names.insert(self.running.spawn(task).id(), name);
    }

    /// Returns once one of them has ended, with what is to be said of it.
    pub(crate) async fn ended(&mut self) -> anyhow::Error {
        let Some(ended) = self.running.join_next_with_id().await else { return std::future::pending().await };
        let (id, why) = match ended {
            Ok((id, ())) => (id, anyhow!("it has returned, which it never should")),
            Err(error) => (error.id(), Error::from(error).into()),
        };
        let name = self.names.get(&id).copied().unwrap_or("nobody knows");
        why.context(format!("a coordinator cannot do without the task that {name}, which has ended"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_panics_or_returns_is_told_by_its_name_and_one_that_goes_on_is_not() {
        let mut tasks = Tasks::default();
        tasks.spawn("waits", std::future::pending());
        let patience = std::time::Duration::from_millis(50);
        assert!(tokio::time::timeout(patience, tasks.ended()).await.is_err());
        tasks.spawn("counts", async { panic!("seven is {}", 7) });
        let told = format!("{:#}", tasks.ended().await);
        assert!(told.contains("the task that counts,") && told.contains("seven is 7"), "{told}");
        tasks.spawn("listens", async {});
        let told = format!("{:#}", tasks.ended().await);
        assert!(told.contains("the task that listens,") && told.contains("returned"), "{told}");
    }

    #[tokio::test]
    async fn tasks_end_with_what_holds_them() {
        let (held, mut gone) = tokio::sync::oneshot::channel::<()>();
        let mut tasks = Tasks::default();
        tasks.spawn("holds", async {
            std::future::pending::<()>().await;
            drop(held);
        });
        assert!(gone.try_recv().is_err_and(|error| error == tokio::sync::oneshot::error::TryRecvError::Empty));
        drop(tasks);
        assert!(gone.await.is_err());
    }
}
