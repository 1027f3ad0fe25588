//! `mapdirect log`: the latest refusals and breaches.

use super::records::{Colours, Filter, as_json, line};
use super::watch::output_line;
use crate::Exit;
use crate::args::LogArgs;
use anyhow::Result;
use mapdirect::Guard;
use mapdirect::records::Heard;
use std::collections::VecDeque;
use std::time::{SystemTime, UNIX_EPOCH};

pub(crate) fn run(args: &LogArgs) -> Result<Exit> {
    let mut filter = Filter::of(&args.filters)?;
    if let Some(since) = args.since {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(u64::MAX));
        filter.since = since.nanoseconds(now);
    }
    let most = args.lines.unwrap_or(usize::MAX);
    let mut records = Guard::from_env().records(u32::MAX, false)?;
    let mut wanted = VecDeque::new();
    while let Heard::Record(record) = records.next(None)? {
        if filter.wants(&record) {
            if wanted.len() == most {
                wanted.pop_front();
            }
            if most > 0 {
                wanted.push_back(record);
            }
        }
    }
    let colours = Colours::of_stdout();
    for record in wanted {
        let text = if args.json {
            as_json(&record).to_string()
        } else {
            line(&record, colours)
        };
        if !output_line(&text) {
            break;
        }
    }
    Ok(Exit::SUCCESS)
}
