//! `mapdirect policy`: what the policy says.

use crate::args::{PolicyArgs, PolicyVerb};
use crate::size::human;
use crate::terminal::{self, told_name, told_word};
use crate::{Exit, open, output};
use anyhow::{Context, Result};
use mapdirect_guard::{Account, Policy, Rule, would_allow};
use mapdirect_proto::Flags;
use std::os::fd::AsFd;

pub(crate) fn run(args: &PolicyArgs) -> Result<Exit> {
    let PolicyVerb::Check = args.verb;
    let policy = match Policy::load(&args.policy) {
        Ok(policy) => policy,
        Err(errors) => {
            for error in errors {
                output::complain(&error.to_string());
            }
            return Ok(Exit::FAILURE);
        }
    };
    let (Some(user), Some(path)) = (&args.as_user, &args.file) else {
        if policy.rules().is_empty() {
            output::prose("no rules: whoever lacks CAP_LINUX_IMMUTABLE pins nothing");
        }
        for rule in policy.rules() {
            tell(rule);
        }
        return Ok(Exit::SUCCESS);
    };
    let Some(account) = Account::find(user) else {
        output::complain(&format!(
            "there is no user {} in /etc/passwd; a number does as well",
            told_word(user)
        ));
        return Ok(Exit::USAGE);
    };
    let file = open::find(path).with_context(|| terminal::name(path))?;
    match would_allow(&policy, &account, file.as_fd(), !args.read_only) {
        Ok(rules) => {
            let names: Vec<_> = rules.iter().map(|rule| told_word(&rule.name)).collect();
            output::prose(&format!(
                "user {} may pin {}: by rule {}",
                account.uid,
                terminal::name(path),
                names.join(", ")
            ));
            Ok(Exit::SUCCESS)
        }
        Err(why) => {
            output::prose(&format!(
                "user {} may not pin {}: {why}",
                account.uid,
                terminal::name(path)
            ));
            Ok(Exit::FAILURE)
        }
    }
}

fn tell(rule: &Rule) {
    let list = |what: &str, ids: &[u32]| {
        let ids: Vec<_> = ids.iter().map(ToString::to_string).collect();
        (!ids.is_empty()).then(|| format!("{what} {}", ids.join(", ")))
    };
    let who: Vec<_> = [list("users", &rule.users), list("groups", &rule.groups)]
        .into_iter()
        .flatten()
        .collect();
    let paths: Vec<_> = rule.paths().iter().map(|path| told_name(path)).collect();
    output::prose(&format!(
        "{} ({}:{}): {} may {} {}{}; {}, {}, {}, each",
        told_word(&rule.name),
        terminal::name(&rule.file),
        rule.line,
        who.join(" and "),
        if rule.writes {
            "pin"
        } else {
            "pin, by descriptors that can only read,"
        },
        paths.join(", "),
        match (
            rule.denies.contains(Flags::DENY_WRITE),
            rule.denies.contains(Flags::DENY_RENAME)
        ) {
            (false, false) => "",
            (true, false) => ", and deny others to write",
            (false, true) => ", and deny others to rename",
            (true, true) => ", and deny others to write or rename",
        },
        output::count(rule.pins.into(), "pin"),
        rule.bytes
            .map_or_else(|| String::from("any number of bytes"), human),
        rule.seconds.map_or_else(
            || String::from("as long as they are held"),
            |seconds| { output::seconds(seconds.into()) }
        ),
    ));
}
