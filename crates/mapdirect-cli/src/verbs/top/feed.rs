//! Threads that wait, so that the screen need not.

use crate::open;
use anyhow::Result;
use mapdirect::records::{Heard, Record};
use mapdirect::status::Status;
use mapdirect::{BlockMap, DeviceId, Guard, block_map};
use rustix::fs::OFlags;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::Builder;
use std::time::Duration;

/// A file, whatever its name is.
pub(super) type FileId = (DeviceId, u64);

/// What has come.
pub(super) enum News {
    /// The state of the guard; `None` if no guard answers.
    Status(Option<Box<Status>>),
    Record(Box<Record>),
    Missed(u64),
    /// The block map of a file, or why there is none.
    Map(FileId, Result<Box<BlockMap>, String>),
}

/// The file whose block map is wanted.
#[derive(Default)]
struct Wish {
    file: Mutex<Option<(FileId, PathBuf)>>,
    changed: Condvar,
}

pub(super) struct Feed {
    news: Receiver<News>,
    wish: Arc<Wish>,
}

impl Feed {
    /// Asks for the state every `interval`.
    pub(super) fn start(guard: Guard, interval: Duration) -> Result<Self> {
        let (sender, news) = channel();
        let wish = Arc::new(Wish::default());
        let (asks, tells) = (guard.clone(), sender.clone());
        Builder::new()
            .name(String::from("status"))
            .spawn(move || ask_for_status(&asks, interval, &tells))?;
        let tells = sender.clone();
        Builder::new()
            .name(String::from("records"))
            .spawn(move || follow(&guard, &tells))?;
        let wished = Arc::clone(&wish);
        Builder::new()
            .name(String::from("maps"))
            .spawn(move || look_at_maps(&wished, interval, &sender))?;
        Ok(Self { news, wish })
    }

    /// What has come, if anything has.
    pub(super) fn next(&self) -> Option<News> {
        self.news.try_recv().ok()
    }

    /// Says whose block map to look at, again and again.
    pub(super) fn show_map_of(&self, file: Option<(FileId, &str)>) {
        let file = file.map(|(id, path)| (id, PathBuf::from(path)));
        let mut wish = self
            .wish
            .file
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if *wish != file {
            *wish = file;
            self.wish.changed.notify_all();
        }
    }
}

fn ask_for_status(guard: &Guard, interval: Duration, news: &Sender<News>) {
    loop {
        let status = guard.status().ok().map(Box::new);
        if news.send(News::Status(status)).is_err() {
            return;
        }
        std::thread::sleep(interval);
    }
}

/// Hears records for as long as anybody wants them, of one guard after the other.
fn follow(guard: &Guard, news: &Sender<News>) {
    /// How many that the guard has kept to begin with.
    const KEPT: u32 = 256;
    let mut kept = KEPT;
    loop {
        if let Ok(mut records) = guard.records(kept, true) {
            while let Ok(heard) = records.next(None) {
                let sent = match heard {
                    Heard::Record(record) => news.send(News::Record(record)),
                    Heard::Missed(count) => news.send(News::Missed(count)),
                    _ => Ok(()),
                };
                if sent.is_err() {
                    return;
                }
            }
            // The same ones would come again.
            kept = 0;
        }
        std::thread::sleep(Duration::from_millis(300));
    }
}

/// Looks at the block map that is wanted. Opening the file may take long: its
/// path may lead anywhere by now.
fn look_at_maps(wish: &Wish, interval: Duration, news: &Sender<News>) {
    let mut last = None;
    loop {
        let file = {
            let file = wish.file.lock().unwrap_or_else(PoisonError::into_inner);
            let (file, _) = wish
                .changed
                .wait_timeout_while(file, interval, |file| *file == last)
                .unwrap_or_else(PoisonError::into_inner);
            file.clone()
        };
        last.clone_from(&file);
        let Some((id, path)) = file else {
            continue;
        };
        let map = look(id, &path).map(Box::new);
        if news.send(News::Map(id, map)).is_err() {
            return;
        }
    }
}

fn look(id: FileId, path: &Path) -> Result<BlockMap, String> {
    let file = open::open(path, OFlags::RDONLY).map_err(|errno| errno.to_string())?;
    let stat = rustix::fs::fstat(&file).map_err(|errno| errno.to_string())?;
    let (major, minor) = (
        rustix::fs::major(stat.st_dev),
        rustix::fs::minor(stat.st_dev),
    );
    if (id.0.major, id.0.minor, id.1) != (major, minor, stat.st_ino) {
        return Err(String::from("that name means another file now"));
    }
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    if size == 0 {
        return Err(String::from("the file is empty"));
    }
    block_map(&file, 0..size).map_err(|error| format!("{error:#}"))
}
