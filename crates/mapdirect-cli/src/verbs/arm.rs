//! `mapdirect arm` and `disarm`: permissions for a while.

use crate::args::{ArmArgs, DisarmArgs};
use crate::{Exit, open, output, terminal};
use anyhow::{Context, Result, bail};
use mapdirect::{Guard, Who};
use mapdirect_guard::{group_number, user_number};
use std::fs::File;
use std::path::Path;

/// Opens a file without reading it, which neither breaks leases nor is noticed.
fn path_to(path: &Path) -> Result<File> {
    open::find(path).with_context(|| terminal::name(path))
}

pub(crate) fn arm(args: &ArmArgs) -> Result<Exit> {
    let who = match (&args.allow_uid, &args.allow_gid) {
        (Some(user), _) => user_number(user).map(Who::User),
        (None, Some(group)) => group_number(group).map(Who::Group),
        (None, None) => bail!("give --allow-uid or --allow-gid"),
    };
    let Some(who) = who else {
        output::complain("there is no such user or group in /etc; a number does as well");
        return Ok(Exit::USAGE);
    };
    let file = path_to(&args.file)?;
    let range = args.range.map(|range| range.resolve(u64::MAX));
    Guard::from_env().arm(&file, who, range, args.seconds)?;
    output::prose(&format!(
        "{}: {who} may pin it for {}",
        terminal::name(&args.file),
        output::count(args.seconds.into(), "second")
    ));
    Ok(Exit::SUCCESS)
}

pub(crate) fn disarm(args: &DisarmArgs) -> Result<Exit> {
    Guard::from_env().disarm(path_to(&args.file)?)?;
    Ok(Exit::SUCCESS)
}
