//! Completions for shells, from the description the command line is parsed by.

use anyhow::Result;
use clap::CommandFactory;
use clap_complete::{Shell, generate};
use mapdirect_cli::args::Mapdirect;

/// What a shell's completion is called in a package of Debian's and below the
/// prefix of others, and its text.
pub(super) struct Completion {
    pub(super) in_debian: &'static str,
    pub(super) elsewhere: &'static str,
    pub(super) text: Vec<u8>,
}

/// Those for every shell that is usual.
pub(super) fn all() -> Result<Vec<Completion>> {
    [
        (
            Shell::Bash,
            "usr/share/bash-completion/completions/mapdirect",
            "share/bash-completion/completions/mapdirect",
        ),
        (
            Shell::Zsh,
            "usr/share/zsh/vendor-completions/_mapdirect",
            "share/zsh/site-functions/_mapdirect",
        ),
        (
            Shell::Fish,
            "usr/share/fish/vendor_completions.d/mapdirect.fish",
            "share/fish/vendor_completions.d/mapdirect.fish",
        ),
    ]
    .into_iter()
    .map(|(shell, in_debian, elsewhere)| {
        let mut text = Vec::new();
        generate(shell, &mut Mapdirect::command(), "mapdirect", &mut text);
        anyhow::ensure!(!text.is_empty(), "{shell} has no completion");
        Ok(Completion {
            in_debian,
            elsewhere,
            text,
        })
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_verb_is_completed() {
        let command = Mapdirect::command();
        for completion in all().unwrap() {
            let text = String::from_utf8(completion.text).unwrap();
            for verb in command.get_subcommands() {
                let place = completion.elsewhere;
                assert!(text.contains(verb.get_name()), "{place}: {verb}");
            }
        }
    }
}
