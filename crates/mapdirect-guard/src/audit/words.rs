//! A record in one line, for the operator of the guard.

use mapdirect_proto::Record;
use mapdirect_proto::record::Event;
use mapdirect_sys::proc::printable;

/// The line.
pub(crate) fn of(record: &Record) -> String {
    let range = record.range.as_ref().map_or_else(String::new, |range| {
        if range.end == u64::MAX {
            format!(", bytes from {}", range.start)
        } else {
            format!(", bytes {} to {}", range.start, range.end)
        }
    });
    let actor = &record.actor;
    let who = match (actor.tid, actor.pid) {
        (0, 0) => String::from("somebody"),
        (0, pid) => format!("process {pid} ({})", actor.command),
        (tid, _) => format!("thread {tid} ({})", actor.command),
    };
    let file = format!(
        "{} (inode {} of {})",
        record.name, record.inode, record.device
    );
    let pin = match record.pin {
        0 => String::new(),
        pin => format!("; pin {pin}"),
    };
    let line = match record.event {
        Event::Breach => {
            format!("breach: blocks under a pin have changed: {file}{range}{pin}; by {who}")
        }
        _ => format!(
            "refused {} by {who} on {file}{range}{pin}",
            record.operation
        ),
    };
    printable(&line)
}
