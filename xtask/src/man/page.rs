//! A manual page of a verb: what the command line is parsed by says what can be
//! given, and `mapdirect_cli::pages` says the rest.

use super::roff::Roff;
use clap::{Arg, ArgAction, Command};
use mapdirect_cli::pages::Page;

/// The section of a verb's page: what runs for the system is in section 8.
pub(super) fn section(verb: &str) -> &'static str {
    if verb == "guard" { "8" } else { "1" }
}

/// The name of a verb's page.
pub(super) fn name(verb: &str) -> String {
    if verb.is_empty() {
        String::from("mapdirect")
    } else {
        format!("mapdirect-{verb}")
    }
}

/// The page of `command`, which is the verb that `page` is about.
pub(super) fn render(command: &Command, page: &Page) -> String {
    let name = name(page.verb);
    let mut roff = Roff::new(&name, section(page.verb));
    roff.section("NAME");
    let about = command.get_about().map(ToString::to_string);
    let about = about.unwrap_or_default();
    roff.line(&format!("{name} - {}", about.trim_end_matches('.')));
    roff.section("SYNOPSIS");
    roff.synopsis(&synopsis(command, page.verb));
    roff.section("DESCRIPTION");
    describe(&mut roff, command, &about);
    options(&mut roff, command);
    if page.verb.is_empty() {
        verbs(&mut roff, command);
    }
    notes(&mut roff, command);
    roff.section("EXIT STATUS");
    for (status, meaning) in page.exit {
        roff.tagged(
            &format!("**{status}**"),
            &[format!("{}.", capital(meaning))],
        );
    }
    roff.section("EXAMPLES");
    for (line, what) in page.examples {
        roff.example(what, line);
    }
    roff.section("SEE ALSO");
    let mut others: Vec<_> = page.see_also.to_vec();
    if page.verb.is_empty() {
        let verbs =
            shown(command).map(|verb| (verb.get_name().to_owned(), section(verb.get_name())));
        let verbs: Vec<_> = verbs
            .map(|(verb, section)| (self::name(&verb), section))
            .collect();
        let named = others
            .iter()
            .map(|(name, section)| ((*name).to_owned(), *section));
        roff.see_also(&verbs.into_iter().chain(named).collect::<Vec<_>>());
    } else {
        if !others.contains(&("mapdirect", "1")) {
            others.insert(0, ("mapdirect", "1"));
        }
        let named = others
            .iter()
            .map(|(name, section)| ((*name).to_owned(), *section));
        roff.see_also(&named.collect::<Vec<_>>());
    }
    roff.finish()
}

/// Verbs that are told of.
fn shown(command: &Command) -> impl Iterator<Item = &Command> {
    command
        .get_subcommands()
        .filter(|verb| verb.get_name() != "help" && !verb.is_hide_set())
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    let first = letters
        .next()
        .map(|letter| letter.to_uppercase().to_string());
    // What a person types begins as it begins.
    let stays = ["pin ", "COMMAND"]
        .iter()
        .any(|word| text.starts_with(word));
    if stays {
        return text.to_owned();
    }
    first.unwrap_or_default() + letters.as_str()
}

/// How the verb is called: each option, and then what it is about.
fn synopsis(command: &Command, verb: &str) -> Vec<String> {
    let mut words = vec![format!("**{}**", name(verb).replacen('-', " ", 1))];
    if verb.is_empty() {
        words.push(String::from("__VERB__ [__ARGUMENT__...]"));
        return words;
    }
    for argument in command.get_arguments().filter(|arg| !arg.is_positional()) {
        if argument.get_id() == "help" {
            continue;
        }
        let many = if matches!(argument.get_action(), ArgAction::Append) {
            "..."
        } else {
            ""
        };
        words.push(format!("[{}]{many}", spelled(argument, true)));
    }
    for argument in command.get_positionals() {
        let value = value(argument);
        words.push(if argument.is_last_set() {
            let whole = format!("**--** __{value}__ [__ARGUMENT__...]");
            if argument.is_required_set() {
                whole
            } else {
                format!("[{whole}]")
            }
        } else {
            let many = matches!(argument.get_action(), ArgAction::Append);
            let word = format!("__{value}__{}", if many { "..." } else { "" });
            if argument.is_required_set() {
                word
            } else {
                format!("[{word}]")
            }
        });
    }
    words
}

fn value(argument: &Arg) -> String {
    let names = argument.get_value_names().unwrap_or_default();
    match names.first() {
        Some(name) => name.to_string(),
        None => argument.get_id().as_str().to_ascii_uppercase(),
    }
}

/// An option as it is typed: the long form alone, or the short one as well.
fn spelled(argument: &Arg, briefly: bool) -> String {
    let takes = argument.get_action().takes_values();
    let value = if takes {
        format!(" __{}__", value(argument))
    } else {
        String::new()
    };
    let mut forms = Vec::new();
    if let Some(short) = argument.get_short().filter(|_| !briefly) {
        forms.push(format!("**-{short}**"));
    }
    if let Some(long) = argument.get_long() {
        forms.push(format!("**--{long}**"));
    }
    forms.join(", ") + &value
}

fn describe(roff: &mut Roff, command: &Command, about: &str) {
    let long = command.get_long_about().map(ToString::to_string);
    let long = long.unwrap_or_else(|| format!("{about}."));
    let mut paragraphs = long.split("\n\n").peekable();
    // The first one is what NAME has said.
    let rest: Vec<_> = match paragraphs.peek() {
        Some(first) if first.trim_end_matches('.') == about.trim_end_matches('.') => {
            paragraphs.skip(1).collect()
        }
        _ => paragraphs.collect(),
    };
    if rest.is_empty() {
        roff.paragraph(&format!("{}.", about.trim_end_matches('.')));
    }
    for paragraph in rest {
        roff.paragraph(paragraph);
    }
}

fn options(roff: &mut Roff, command: &Command) {
    let (named, given): (Vec<_>, Vec<_>) = command
        .get_arguments()
        .filter(|argument| !argument.is_hide_set())
        .partition(|argument| !argument.is_positional());
    if !given.is_empty() {
        roff.section("ARGUMENTS");
        for argument in given {
            explain(roff, argument, &format!("__{}__", value(argument)));
        }
    }
    roff.section("OPTIONS");
    for argument in named {
        explain(roff, argument, &spelled(argument, false));
    }
}

fn explain(roff: &mut Roff, argument: &Arg, tag: &str) {
    let help = argument.get_long_help().or_else(|| argument.get_help());
    let help = help.map(ToString::to_string).unwrap_or_default();
    let mut text = help.split("\n\n").map(sentence).collect::<Vec<_>>();
    let defaults: Vec<_> = argument
        .get_default_values()
        .iter()
        .map(|value| value.to_string_lossy())
        .collect();
    let switch = matches!(argument.get_action(), ArgAction::SetTrue);
    if !defaults.is_empty() && !switch {
        text.push(format!("The default is **{}**.", defaults.join(" ")));
    }
    if let Some(variable) = argument.get_env() {
        let variable = variable.to_string_lossy();
        text.push(format!(
            "Without it **{variable}** in the environment counts."
        ));
    }
    roff.tagged(tag, &text);
    if switch || !argument.get_action().takes_values() {
        return;
    }
    let values = argument.get_possible_values();
    let told: Vec<_> = values
        .iter()
        .filter_map(|value| {
            let help = value.get_help()?;
            Some((
                format!("**{}**", value.get_name()),
                vec![sentence(&help.to_string())],
            ))
        })
        .collect();
    if !told.is_empty() {
        roff.nested(&told);
    }
}

/// Help is no sentence; what stands in a page is.
fn sentence(text: &str) -> String {
    let text = text.trim();
    let ends = text.ends_with(['.', ')', ':', ']']) && !text.ends_with("()");
    if ends || text.is_empty() {
        text.to_owned()
    } else {
        format!("{text}.")
    }
}

fn verbs(roff: &mut Roff, command: &Command) {
    roff.section("VERBS");
    for verb in shown(command) {
        let page = format!("{}({})", name(verb.get_name()), section(verb.get_name()));
        let about = verb
            .get_about()
            .map(ToString::to_string)
            .unwrap_or_default();
        roff.tagged(&page, &[sentence(&about)]);
    }
}

/// What is said behind the options. A block of it under a heading of its own
/// becomes a section.
fn notes(roff: &mut Roff, command: &Command) {
    let Some(notes) = command.get_after_help().map(ToString::to_string) else {
        return;
    };
    let mut in_notes = false;
    for block in notes.split("\n\n") {
        let mut lines = block.lines();
        let first = lines.next().unwrap_or_default();
        let is_indented = lines
            .clone()
            .next()
            .is_some_and(|line| line.starts_with("  "));
        if let Some(heading) = first.strip_suffix(':').filter(|_| is_indented) {
            roff.section(&heading.to_ascii_uppercase());
            in_notes = true;
            for line in lines {
                match line
                    .strip_prefix("  ")
                    .and_then(|line| line.split_once("  "))
                {
                    Some((tag, text)) => {
                        roff.tagged(&format!("**{tag}**"), &[sentence(&capital(text.trim()))])
                    }
                    None => roff.paragraph(line),
                }
            }
        } else {
            if !in_notes {
                roff.section("NOTES");
                in_notes = true;
            }
            roff.paragraph(block);
        }
    }
}
