//! `mapdirect top` in a program that was built without it.

use crate::args::TopArgs;
use crate::{Exit, output};
use anyhow::Result;

pub(crate) fn run(_args: &TopArgs) -> Result<Exit> {
    output::complain("this program was built without `top`; build it with its default features");
    Ok(Exit::FAILURE)
}
