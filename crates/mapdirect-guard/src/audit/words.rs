//! A record in one line, for the operator of the guard.

use mapdirect_proto::Record;
use mapdirect_proto::record::Event;
use mapdirect_sys::names::{told, told_word};
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
        (0, pid) => format!("process {pid} ({})", told_word(&actor.command)),
        (tid, _) => format!("thread {tid} ({})", told_word(&actor.command)),
    };
    let show = |name: &str| told(name, true);
    let remark = match record.name.remark_as(show) {
        remark if remark.is_empty() => remark,
        remark => format!(", {remark}"),
    };
    let file = format!(
        "{} (inode {} of {}{remark})",
        show(&record.name.path),
        record.inode,
        record.device
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

#[cfg(test)]
mod tests {
    use super::*;
    use mapdirect_proto::{DeviceId, Gate, Name, NameState};

    #[test]
    fn nobody_writes_more_into_the_line_than_a_name() {
        let device = DeviceId { major: 7, minor: 0 };
        for event in [Event::Refusal, Event::Breach] {
            let mut record = Record::new(event, 12, Gate::Bpf, (device, 5));
            record.operation = String::from("write");
            let path = "/a\nmapdirect: pin 1 is lost";
            record.name = Name::new(path, "/b\x1b[31m", NameState::REPLACED);
            (record.actor.pid, record.actor.tid) = (7, 7);
            record.actor.command = String::from("\x1b[31m); pin 9");
            let line = of(&record);
            assert!(!line.contains(char::is_control), "{line:?}");
            assert!(line.contains(r"$'/a\nmapdirect: pin 1 is lost'"), "{line}");
            assert!(line.contains(r"was $'/b\x1b[31m'"), "{line}");
            assert!(line.contains("($'\\xef\\xbf\\xbd[31m); pin 9')"), "{line}");
        }
    }
}
