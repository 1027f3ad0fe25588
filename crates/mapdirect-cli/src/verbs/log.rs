//! `mapdirect log`: the latest refusals and breaches.

use super::records::{Filter, as_json, tell};
use crate::args::LogArgs;
use crate::{Exit, output};
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
    for record in wanted {
        if args.json {
            output::json(&as_json(&record));
        } else {
            tell(&record);
        }
    }
    Ok(Exit::SUCCESS)
}
