//! Looks for records, which are only so many.
//!
//! A look may hang for as long as a stranger likes, and grants need looks, too.
//! So records may keep only a few of them busy. When those hang, records do
//! without.

use crate::bounded::{Looking, within};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

/// The looks under way for one purpose.
#[derive(Debug)]
pub(crate) struct Few {
    under_way: Arc<AtomicUsize>,
    most: usize,
}

/// Counts a look until it ends, even if nobody waits for it any more.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

impl Few {
    pub(crate) fn new(most: usize) -> Self {
        Self {
            under_way: Arc::default(),
            most,
        }
    }

    /// Looks for no longer than `limit`; `None` if that was not enough, or too
    /// many looks hang.
    pub(crate) fn within<T: Send + 'static>(
        &self,
        limit: Duration,
        look: impl FnOnce(&Looking) -> T + Send + 'static,
    ) -> Option<T> {
        let one_more = |under_way| (under_way < self.most).then_some(under_way + 1);
        self.under_way.fetch_update(SeqCst, SeqCst, one_more).ok()?;
        let counted = Counted(Arc::clone(&self.under_way));
        let look = move |looking: &Looking| {
            let _counted = counted;
            look(looking)
        };
        within(limit, look).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn only_a_few_looks_hang() {
        let few = Few::new(2);
        let soon = Duration::from_millis(20);
        let hanging: Vec<mpsc::Sender<()>> = (0..2)
            .map(|_| {
                let (release, wait) = mpsc::channel::<()>();
                let look = move |_: &Looking| wait.recv().unwrap_or(());
                assert_eq!(few.within(soon, look), None);
                release
            })
            .collect();
        assert_eq!(few.within(Duration::from_secs(20), |_| ()), None, "at once");
        drop(hanging);
        while few.within(Duration::from_secs(20), |_| 7) != Some(7) {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(few.within(Duration::from_secs(20), |_| 7), Some(7));
    }
}
