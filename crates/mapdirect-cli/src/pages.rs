//! What `--help` and the manual page of each verb say beside its options: how
//! it ends, examples, and where more is to be found. `cargo xtask man` makes the
//! pages of the same words.

use crate::args::Mapdirect;
use clap::{Command, CommandFactory};
use std::fmt::Write;

/// What is said of a verb.
#[derive(Clone, Copy, Debug)]
pub struct Page {
    /// The verb; empty for the command as a whole.
    pub verb: &'static str,
    /// Exit statuses, and what each means.
    pub exit: &'static [(&'static str, &'static str)],
    /// Command lines, and what each is for.
    pub examples: &'static [(&'static str, &'static str)],
    /// Other manual pages: name and section.
    pub see_also: &'static [(&'static str, &'static str)],
}

const WORKED: (&str, &str) = ("0", "it worked");
const REFUSED: (&str, &str) = ("1", "it was refused, or failed");
const USAGE: (&str, &str) = ("2", "the command line makes no sense");
const NO_GUARD: (&str, &str) = ("3", "no guard answers");
const UNREAD: (&str, &str) = (
    "141",
    "nobody reads what it prints any more, as if SIGPIPE had ended it",
);
const COMMAND: (&str, &str) = (
    "other",
    "the status of COMMAND, or 128 + N if signal N killed it",
);
const NOT_RUN: (&str, &str) = ("125", "COMMAND was not run");
const CANNOT_EXECUTE: (&str, &str) = ("126", "COMMAND cannot be executed");
const NOT_FOUND: (&str, &str) = ("127", "there is no COMMAND");

const PROMISE: (&str, &str) = ("mapdirect", "7");

/// The pages, one for each verb and one for the command.
pub const PAGES: &[Page] = &[
    Page {
        verb: "",
        exit: &[
            WORKED,
            REFUSED,
            USAGE,
            NO_GUARD,
            (
                "4",
                "a pin that was held is lost: nothing keeps it any more",
            ),
            (
                "5",
                "a pin that was held is broken: blocks of it have changed",
            ),
            UNREAD,
            (
                "123-127",
                "of pin -- COMMAND and run: see mapdirect-pin(1) and mapdirect-run(1)",
            ),
        ],
        examples: &[
            (
                "mapdirect doctor",
                "What this machine offers, and what to do first",
            ),
            (
                "mapdirect prepare image.raw --size 4G",
                "A file of which every block can be pinned",
            ),
            (
                "mapdirect pin image.raw",
                "Hold its blocks where they are, until Ctrl-C",
            ),
            (
                "mapdirect run --files '/data/**' -- ./server",
                "Pin what a program maps, as it is",
            ),
        ],
        see_also: &[
            PROMISE,
            ("mapdirect", "3"),
            ("MAP_DIRECT", "2const"),
            ("mapdirect-policy", "5"),
        ],
    },
    Page {
        verb: "guard",
        exit: &[
            (
                "0",
                "it was ended by SIGTERM or SIGINT, or --unload has worked",
            ),
            ("1", "it lacks something, or could not go on"),
            USAGE,
        ],
        examples: &[
            (
                "mapdirect guard",
                "Guard, with the best gate this kernel has",
            ),
            (
                "mapdirect guard --gate fanotify --socket /run/test.sock",
                "A second one, for clients with MAPDIRECT_SOCKET=/run/test.sock",
            ),
            (
                "mapdirect guard --unload",
                "Take away the bpf gate that a guard has left, and the pins it keeps",
            ),
        ],
        see_also: &[
            ("mapdirect", "1"),
            ("mapdirect-status", "1"),
            ("mapdirect-doctor", "1"),
            ("mapdirect-policy", "5"),
            PROMISE,
        ],
    },
    Page {
        verb: "pin",
        exit: &[
            ("0", "SIGINT or SIGTERM came while the pin was held"),
            REFUSED,
            USAGE,
            NO_GUARD,
            ("4", "the pin is lost: nothing keeps it any more"),
            ("5", "the pin is broken: blocks of it have changed"),
            (
                "128 + N",
                "signal N came before the pin was granted; without COMMAND",
            ),
            COMMAND,
            (
                "123",
                "with COMMAND: the pin was broken while it ran; unless --on-loss is ignore",
            ),
            (
                "124",
                "with COMMAND: the pin was lost while it ran; unless --on-loss is ignore",
            ),
            (
                "125",
                "with COMMAND: the pin was not granted, COMMAND was not run",
            ),
            CANNOT_EXECUTE,
            NOT_FOUND,
        ],
        examples: &[
            (
                "mapdirect pin image.raw --range 1M:2M",
                "Two MiB, from the second MiB on, until Ctrl-C",
            ),
            (
                "mapdirect pin app.db -- sqlite3 app.db",
                "For as long as a command and its descendants run",
            ),
            (
                "mapdirect pin image.raw --format csv -- sh -c 'cat $MAPDIRECT_EXTENTS'",
                "COMMAND learns where the blocks are",
            ),
            (
                "mapdirect pin image.raw --format dmsetup --device /dev/loop7 -- sh -c \
                 'dmsetup create raw $MAPDIRECT_EXTENTS && copier /dev/mapper/raw; dmsetup remove raw'",
                "The file's blocks as a device. A filesystem's own device is busy for device-mapper \
                 while it is mounted; a loop device over it is not",
            ),
            (
                "mapdirect pin grows.log --strength stable",
                "Hold what is written, and let the file grow",
            ),
        ],
        see_also: &[
            ("mapdirect-prepare", "1"),
            ("mapdirect-run", "1"),
            ("mapdirect-show", "1"),
            ("mapdirect-status", "1"),
            PROMISE,
        ],
    },
    Page {
        verb: "prepare",
        exit: &[
            ("0", "every block of the range is stable"),
            REFUSED,
            USAGE,
            UNREAD,
        ],
        examples: &[
            (
                "mapdirect prepare image.raw --size 4G --huge",
                "A new file that huge pages can map",
            ),
            (
                "mapdirect prepare image.raw --size 4G --contiguous",
                "A new file in one piece on the device",
            ),
            (
                "mapdirect prepare swapfile --size 8G --contiguous && mkswap swapfile && \
                 mapdirect show swapfile --format resume-offset",
                "A swap file to hibernate to",
            ),
        ],
        see_also: &[
            ("mapdirect-pin", "1"),
            ("mapdirect-show", "1"),
            ("fallocate", "1"),
            PROMISE,
        ],
    },
    Page {
        verb: "run",
        exit: &[COMMAND, USAGE, NOT_RUN, CANNOT_EXECUTE, NOT_FOUND],
        examples: &[
            (
                "mapdirect run --files '/data/**' -- ./server",
                "Pin what the server maps of the files below /data",
            ),
            (
                "mapdirect run --strict --prepare --files data.mdb -- ./app",
                "Nothing of the file is mapped that is not pinned",
            ),
        ],
        see_also: &[("mapdirect-pin", "1"), ("mapdirect-status", "1"), PROMISE],
    },
    Page {
        verb: "show",
        exit: &[
            WORKED,
            (
                "1",
                "it failed; of several files: one of them could not be shown",
            ),
            USAGE,
            UNREAD,
        ],
        examples: &[
            (
                "mapdirect show image.raw",
                "The block map, drawn, and what is pinned",
            ),
            (
                "mapdirect show -o file,offset,length,state *.db",
                "A table with these columns",
            ),
            (
                "mapdirect show image.raw --format csv",
                "Where it is on the device and on the whole disk",
            ),
            (
                "mapdirect show swapfile --format resume-offset",
                "For the kernel's resume_offset=",
            ),
        ],
        see_also: &[
            ("mapdirect-pin", "1"),
            ("mapdirect-prepare", "1"),
            ("filefrag", "8"),
            PROMISE,
        ],
    },
    Page {
        verb: "status",
        exit: &[
            ("0", "it worked; with FILE: every one of them is pinned"),
            (
                "1",
                "it failed; with FILE: one of them is not pinned, or cannot be examined",
            ),
            USAGE,
            NO_GUARD,
            UNREAD,
        ],
        examples: &[
            (
                "mapdirect status",
                "Pins, who maps them, who was refused what",
            ),
            (
                "mapdirect status app.db || echo 'not pinned'",
                "Whether a file is pinned",
            ),
            (
                "mapdirect status --metrics-file /var/lib/node_exporter/mapdirect.prom",
                "Metrics for a collector, from a timer",
            ),
            (
                "mapdirect status -o file,pid,command,age",
                "A table with these columns",
            ),
        ],
        see_also: &[
            ("mapdirect-show", "1"),
            ("mapdirect-unpin", "1"),
            ("mapdirect-guard", "8"),
            PROMISE,
        ],
    },
    Page {
        verb: "top",
        exit: &[
            ("0", "it was told to end, by a key or a signal"),
            ("1", "it failed"),
            (
                "2",
                "the command line makes no sense, or there is no terminal that can show it (TERM)",
            ),
            NO_GUARD,
        ],
        examples: &[
            ("mapdirect top", "All of it, asked for every second"),
            ("mapdirect top --interval 5", "Every five seconds"),
        ],
        see_also: &[
            ("mapdirect-status", "1"),
            ("mapdirect-watch", "1"),
            ("mapdirect-show", "1"),
            PROMISE,
        ],
    },
    Page {
        verb: "watch",
        exit: &[
            ("0", "SIGINT or SIGTERM came"),
            ("1", "it failed"),
            USAGE,
            ("3", "no guard answered when it began"),
            UNREAD,
        ],
        examples: &[
            ("mapdirect watch", "Who is refused what, as it happens"),
            (
                "mapdirect watch --file app.db --uid postgres",
                "Only what a user does to a file, whatever its name becomes",
            ),
            (
                "mapdirect watch --kind breach --json",
                "Changes that no gate refused, for a program",
            ),
        ],
        see_also: &[
            ("mapdirect-log", "1"),
            ("mapdirect-status", "1"),
            ("mapdirect-guard", "8"),
            PROMISE,
        ],
    },
    Page {
        verb: "log",
        exit: &[WORKED, ("1", "it failed"), USAGE, NO_GUARD, UNREAD],
        examples: &[
            (
                "mapdirect log -n 20",
                "The last twenty refusals and breaches",
            ),
            (
                "mapdirect log --since 10m --operation truncate",
                "Who tried to truncate a pinned file in the last ten minutes",
            ),
            (
                "journalctl -t mapdirect MAPDIRECT_PIN=7",
                "The same in the journal, for one pin",
            ),
        ],
        see_also: &[
            ("mapdirect-watch", "1"),
            ("mapdirect-status", "1"),
            ("journalctl", "1"),
            PROMISE,
        ],
    },
    Page {
        verb: "doctor",
        exit: &[
            ("0", "files can be pinned here, by whoever may"),
            ("1", "files cannot be pinned here, or it failed"),
            USAGE,
            UNREAD,
        ],
        examples: &[
            ("mapdirect doctor", "What is missing, and what to do first"),
            (
                "mapdirect doctor --json | jq -r .first",
                "Only what to do first",
            ),
        ],
        see_also: &[("mapdirect-guard", "8"), ("mapdirect-status", "1"), PROMISE],
    },
    Page {
        verb: "arm",
        exit: &[WORKED, REFUSED, USAGE, NO_GUARD],
        examples: &[
            (
                "mapdirect arm image.raw --allow-uid 1000",
                "User 1000 may pin it, for a minute",
            ),
            (
                "mapdirect arm image.raw --allow-gid kvm --range 0:1G --seconds 600",
                "The members of a group may pin its first GiB, for ten minutes",
            ),
        ],
        see_also: &[
            ("mapdirect-disarm", "1"),
            ("mapdirect-policy", "1"),
            ("mapdirect-policy", "5"),
            PROMISE,
        ],
    },
    Page {
        verb: "disarm",
        exit: &[WORKED, REFUSED, USAGE, NO_GUARD],
        examples: &[(
            "mapdirect disarm image.raw",
            "Nobody new may pin it who lacks the capability",
        )],
        see_also: &[("mapdirect-arm", "1"), ("mapdirect-unpin", "1")],
    },
    Page {
        verb: "unpin",
        exit: &[
            WORKED,
            ("1", "there is no such pin, or it was refused"),
            USAGE,
            NO_GUARD,
        ],
        examples: &[(
            "mapdirect status -n -o pin image.raw | xargs -n 1 mapdirect unpin",
            "End every pin of a file",
        )],
        see_also: &[("mapdirect-status", "1"), PROMISE],
    },
    Page {
        verb: "policy",
        exit: &[
            (
                "0",
                "the policy makes sense; with --as and a file: the user may pin it",
            ),
            (
                "1",
                "the policy has a mistake; with --as and a file: the user may not pin it",
            ),
            USAGE,
            UNREAD,
        ],
        examples: &[
            ("mapdirect policy check", "What the policy allows"),
            (
                "mapdirect policy check /data/a.db --as alice",
                "Whether alice may pin a file, and by which rule",
            ),
        ],
        see_also: &[
            ("mapdirect-policy", "5"),
            ("mapdirect-arm", "1"),
            ("mapdirect-guard", "8"),
        ],
    },
];

/// What is said of a verb.
#[must_use]
pub fn of(verb: &str) -> Option<&'static Page> {
    PAGES.iter().find(|page| page.verb == verb)
}

/// The command line, with what `--help` says at its end.
#[must_use]
pub fn command() -> Command {
    let mut command = Mapdirect::command();
    let verbs: Vec<_> = command
        .get_subcommands()
        .map(|verb| verb.get_name().to_owned())
        .collect();
    command = with_ending(command, "");
    for verb in verbs {
        command = command.mut_subcommand(&verb, |described| with_ending(described, &verb));
    }
    command
}

fn with_ending(command: Command, verb: &str) -> Command {
    let Some(page) = of(verb) else {
        return command;
    };
    let notes = command.get_after_help().map(ToString::to_string);
    let notes = notes.map_or_else(String::new, |notes| format!("{}\n\n", notes.trim_end()));
    let mut ending = notes.clone();
    if !page.examples.is_empty() {
        ending.push_str("Examples:\n");
        for (line, what) in page.examples {
            let _ = writeln!(ending, "  {what}:\n    {line}");
        }
        ending.push('\n');
    }
    ending.push_str("Exit status:\n");
    for (status, meaning) in page.exit {
        let _ = writeln!(ending, "  {status:<7}  {meaning}");
    }
    command
        .after_help(format!("{notes}`--help` says more: examples, exit status."))
        .after_long_help(ending)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_verb_has_a_page_and_every_page_a_verb() {
        let command = Mapdirect::command();
        let verbs: Vec<_> = command.get_subcommands().map(Command::get_name).collect();
        for verb in &verbs {
            let page = of(verb).unwrap_or_else(|| panic!("{verb} has no page in pages.rs"));
            assert!(!page.examples.is_empty() && !page.exit.is_empty(), "{verb}");
            assert!(!page.see_also.is_empty(), "{verb}");
        }
        for page in PAGES {
            assert!(
                page.verb.is_empty() || verbs.contains(&page.verb),
                "{}",
                page.verb
            );
        }
    }

    /// A command line in an example is one that is understood.
    #[test]
    fn examples_can_be_typed() {
        for page in PAGES {
            for (line, _) in page.examples {
                for part in line.split(" && ").flat_map(|part| part.split(" | ")) {
                    let part = part.split(" || ").next().unwrap_or_default();
                    let part = part.trim_start_matches("xargs -n 1 ");
                    if !part.starts_with("mapdirect ") || part.contains("-- sh -c") {
                        continue;
                    }
                    let mut words: Vec<_> = part
                        .split(' ')
                        .map(|word| word.trim_matches('\''))
                        .collect();
                    if part == "mapdirect unpin" {
                        words.push("7");
                    }
                    let understood = command().try_get_matches_from(words);
                    assert!(understood.is_ok(), "{line}: {:?}", understood.err());
                }
            }
        }
    }

    #[test]
    fn help_says_how_it_ends() {
        let mut command = command();
        for verb in command.clone().get_subcommands() {
            let help = command
                .find_subcommand_mut(verb.get_name())
                .map(|verb| verb.render_long_help().to_string());
            assert!(help.is_some_and(|help| help.contains("Exit status:")));
        }
    }
}
