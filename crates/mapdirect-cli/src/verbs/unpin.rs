//! `mapdirect unpin`: ends a pin of somebody else.

use crate::Exit;
use crate::args::UnpinArgs;
use anyhow::Result;
use mapdirect::Guard;

pub(crate) fn run(args: &UnpinArgs) -> Result<Exit> {
    Guard::from_env().unpin(args.id)?;
    Ok(Exit::SUCCESS)
}
