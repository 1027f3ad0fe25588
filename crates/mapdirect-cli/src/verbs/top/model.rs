//! What the screen shows, and how keys change it.

use super::feed::{FileId, News};
use mapdirect::BlockMap;
use mapdirect::records::{Event, Record};
use mapdirect::status::{FileStatus, Status};
use std::collections::{HashMap, VecDeque};
use std::time::Instant;

/// The most records that are kept to be shown.
const RECORDS: usize = 256;
/// The number of seconds of which the rate of refusals is shown.
const SECONDS: usize = 240;
/// The most files whose refusals are counted one by one.
const COUNTED: usize = 4096;

/// The orders in which files are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sort {
    Name,
    Pins,
    Bytes,
    Refusals,
}

impl Sort {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Name => "name",
            Self::Pins => "pins",
            Self::Bytes => "bytes",
            Self::Refusals => "refusals",
        }
    }
}

pub(super) struct Model {
    pub(super) status: Status,
    /// Whether a guard answers. If not, the status is the last one there was.
    pub(super) there: bool,
    pub(super) sort: Sort,
    /// Part of the names to show, if not all are.
    pub(super) search: Option<String>,
    typing: bool,
    pub(super) help: bool,
    pub(super) details: bool,
    selected: Option<FileId>,
    /// Refusals per second, the latest last.
    pub(super) rates: VecDeque<u64>,
    last: (Instant, u64, i32),
    /// The latest first.
    pub(super) records: VecDeque<Record>,
    pub(super) missed: u64,
    refused: HashMap<FileId, u64>,
    pub(super) map: Option<(FileId, Result<Box<BlockMap>, String>)>,
}

/// What is pinned of a file.
pub(super) fn bytes_of(file: &FileStatus) -> u64 {
    file.pins.iter().map(|pin| pin.stable + pin.frozen).sum()
}

fn total(status: &Status) -> u64 {
    status.refused.iter().map(|(_, count)| count).sum()
}

pub(super) fn id_of(file: &FileStatus) -> FileId {
    (file.device, file.inode)
}

impl Model {
    pub(super) fn new(status: Status) -> Self {
        let last = (Instant::now(), total(&status), status.pid);
        let mut model = Self {
            status,
            there: true,
            sort: Sort::Name,
            search: None,
            typing: false,
            help: false,
            details: false,
            selected: None,
            rates: VecDeque::new(),
            last,
            records: VecDeque::new(),
            missed: 0,
            refused: HashMap::new(),
            map: None,
        };
        model.keep_selection();
        model
    }

    pub(super) fn hear(&mut self, news: News) {
        match news {
            News::Status(None) => self.there = false,
            News::Status(Some(status)) => {
                self.there = true;
                self.count(&status);
                self.status = *status;
                self.keep_selection();
            }
            News::Record(record) => self.hear_of(*record),
            News::Missed(count) => self.missed += count,
            News::Map(id, map) => self.map = Some((id, map)),
        }
    }

    fn count(&mut self, status: &Status) {
        let (then, before, pid) = self.last;
        let now = total(status);
        let seconds = then.elapsed().as_secs_f64().max(0.1);
        // Another guard begins from nothing; the bpf gate goes on.
        let more = if pid == status.pid || now >= before {
            now.saturating_sub(before)
        } else {
            now
        };
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "a rate for people to look at"
        )]
        let rate = (more as f64 / seconds).round() as u64;
        self.last = (Instant::now(), now, status.pid);
        if self.rates.len() == SECONDS {
            self.rates.pop_front();
        }
        // What is rare is seen, too.
        self.rates.push_back(if more > 0 { rate.max(1) } else { 0 });
    }

    fn hear_of(&mut self, record: Record) {
        if record.event == Event::Refusal {
            let id = (record.device, record.inode);
            if self.refused.len() < COUNTED || self.refused.contains_key(&id) {
                *self.refused.entry(id).or_default() += 1;
            }
        }
        self.records.push_front(record);
        self.records.truncate(RECORDS);
    }

    pub(super) fn refused_of(&self, id: FileId) -> u64 {
        self.refused.get(&id).copied().unwrap_or(0)
    }

    /// The files to show, in the order in which they are shown.
    pub(super) fn files(&self) -> Vec<&FileStatus> {
        let wanted = |file: &&FileStatus| {
            self.search
                .as_ref()
                .is_none_or(|part| file.path.contains(part.as_str()))
        };
        let mut files: Vec<_> = self.status.files.iter().filter(wanted).collect();
        match self.sort {
            Sort::Name => files.sort_by(|one, other| one.path.cmp(&other.path)),
            Sort::Pins => files.sort_by_key(|file| std::cmp::Reverse(file.pins.len())),
            Sort::Bytes => files.sort_by_key(|file| std::cmp::Reverse(bytes_of(file))),
            Sort::Refusals => {
                files.sort_by_key(|file| std::cmp::Reverse(self.refused_of(id_of(file))));
            }
        }
        files
    }

    /// The place of the selected file among those.
    pub(super) fn place(&self) -> Option<usize> {
        let selected = self.selected?;
        self.files().iter().position(|file| id_of(file) == selected)
    }

    /// The selected file.
    pub(super) fn file(&self) -> Option<&FileStatus> {
        let selected = self.selected?;
        let mut files = self.status.files.iter();
        files.find(|file| id_of(file) == selected)
    }

    pub(super) fn selected(&self) -> Option<(FileId, &str)> {
        self.file().map(|file| (id_of(file), &*file.path))
    }

    /// Selects something if the selected file is there no more.
    fn keep_selection(&mut self) {
        if self.place().is_none() {
            self.selected = self.files().first().map(|file| id_of(file));
        }
    }

    pub(super) fn move_by(&mut self, by: isize) {
        let files = self.files();
        let last = files.len().saturating_sub(1);
        let place = self
            .place()
            .unwrap_or(0)
            .saturating_add_signed(by)
            .min(last);
        self.selected = files.get(place).map(|file| id_of(file));
    }

    pub(super) fn sort_otherwise(&mut self) {
        self.sort = match self.sort {
            Sort::Name => Sort::Pins,
            Sort::Pins => Sort::Bytes,
            Sort::Bytes => Sort::Refusals,
            Sort::Refusals => Sort::Name,
        };
    }

    /// Begins to type what to search for, or searches no more.
    pub(super) fn search(&mut self, part: Option<String>) {
        self.typing = part.is_some();
        self.search = part;
        self.keep_selection();
    }

    pub(super) fn types(&self) -> bool {
        self.typing
    }

    pub(super) fn end_typing(&mut self) {
        self.typing = false;
        if self.search.as_ref().is_some_and(String::is_empty) {
            self.search = None;
        }
    }

    pub(super) fn type_in(&mut self, character: char) {
        if let Some(part) = &mut self.search {
            part.push(character);
        }
        self.keep_selection();
    }

    pub(super) fn untype(&mut self) {
        if let Some(part) = &mut self.search {
            part.pop();
        }
        self.keep_selection();
    }
}
