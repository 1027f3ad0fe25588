//! Whether this process writes to the journal of systemd.

use std::path::PathBuf;

/// The socket of the journal, if stderr goes there: then an entry with fields
/// takes the place of a line. `JOURNAL_STREAM` names the stream by device and
/// inode (systemd.exec(5)); a child whose stderr was redirected has the variable
/// all the same.
pub(crate) fn of_stderr() -> Option<PathBuf> {
    let stream = std::env::var("JOURNAL_STREAM").ok()?;
    let stat = rustix::fs::fstat(std::io::stderr()).ok()?;
    (stream == format!("{}:{}", stat.st_dev, stat.st_ino))
        .then(|| PathBuf::from(mapdirect_guard::JOURNAL_SOCKET))
}
