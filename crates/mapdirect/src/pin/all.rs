//! Pinning many files with one request.

use super::{Pin, PinOptions};
use crate::error::Result;
use crate::guard::Guard;
use crate::holder::{Connection, is_capable};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

/// How many files to ask for at once. The guard answers each connection in
/// turn, and looks once at the threads of the system for all that ask
/// meanwhile, which is what the first pin of a file takes longest for.
const AT_ONCE: usize = 16;

/// Files that are pinned together.
struct Batch<'a> {
    options: &'a PinOptions,
    guard: &'a Guard,
    files: Vec<BorrowedFd<'a>>,
    /// The file to pin next.
    next: AtomicUsize,
    /// A file could not be pinned, so none shall be.
    failed: AtomicBool,
    /// What came of each file, as far as it was asked for.
    results: Mutex<Vec<(usize, Result<Pin>)>>,
}

impl PinOptions {
    /// Pins the same range of each of many files; all of them, or none.
    ///
    /// The first pin of a file can take the guard a look at every thread of the
    /// system. This asks for several files at a time, for which the guard looks
    /// once. The pins come in the order of the files. Each is a [`Pin`] of its
    /// own, and ends by itself.
    ///
    /// # Errors
    ///
    /// As [`PinOptions::pin`], for the first of the files that cannot be pinned;
    /// the error names it. The pins that were granted have ended then.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use mapdirect::PinOptions;
    ///
    /// let files: Vec<_> = ["base.img", "delta.img"]
    ///     .iter()
    ///     .map(std::fs::File::open)
    ///     .collect::<Result<_, _>>()?;
    /// for pin in PinOptions::new().pin_all(&files)? {
    ///     println!("{} extents", pin.extents().len());
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn pin_all(&self, files: &[impl AsFd]) -> Result<Vec<Pin>> {
        let guard = self.guard.clone().unwrap_or_default();
        let batch = Batch {
            options: self,
            guard: &guard,
            files: files.iter().map(AsFd::as_fd).collect(),
            next: AtomicUsize::new(0),
            failed: AtomicBool::new(false),
            results: Mutex::default(),
        };
        let helpers = files.len().min(AT_ONCE).saturating_sub(1);
        std::thread::scope(|scope| {
            for _ in 0..helpers {
                let by_its_own = || {
                    // Where there is no room for it, fewer ask at once.
                    if let Ok(connection) = Connection::open(guard.socket(), None, is_capable()) {
                        let connection = Arc::new(connection);
                        batch.work(|| Ok(Arc::clone(&connection)));
                    }
                };
                let builder = std::thread::Builder::new().name(String::from("mapdirect-pin"));
                if builder.spawn_scoped(scope, by_its_own).is_err() {
                    break;
                }
            }
            batch.work(|| guard.connect());
        });
        batch.finish()
    }
}

impl Batch<'_> {
    /// Pins files until there are none left, or one could not be pinned.
    fn work(&self, connect: impl Fn() -> Result<Arc<Connection>>) {
        while !self.failed.load(Relaxed) {
            let index = self.next.fetch_add(1, Relaxed);
            let Some(file) = self.files.get(index) else {
                return;
            };
            let pinned = self.options.pin_by(self.guard, &connect, *file);
            if pinned.is_err() {
                self.failed.store(true, Relaxed);
            }
            let mut results = self.results.lock().unwrap_or_else(PoisonError::into_inner);
            results.push((index, pinned));
        }
    }

    /// The pins in the order of the files, or what went wrong first in that
    /// order.
    fn finish(self) -> Result<Vec<Pin>> {
        let mut results = self
            .results
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        results.sort_by_key(|(index, _)| *index);
        results.into_iter().map(|(_, pinned)| pinned).collect()
    }
}
