//! Text as man(7) wants it.

/// The day that the pages carry: that of their last change in form. (The day on
/// which they are written would change all of them each time.)
const DATE: &str = "2026-11-30";

/// A page that is being written. In its text `**word**` is bold and `__word__`
/// italic, as is what a person types literally, between backquotes.
pub(super) struct Roff {
    text: String,
    /// Whether something stands above in this section.
    begun: bool,
}

impl Roff {
    pub(super) fn new(name: &str, section: &str) -> Self {
        let name = escaped(name);
        Self {
            text: format!(
                ".\\\" Made by `cargo xtask man`: change crates/mapdirect-cli/src/args.rs or pages.rs.\n\
                 .TH {name} {section} {DATE} mapdirect \"mapdirect manual\"\n"
            ),
            begun: false,
        }
    }

    pub(super) fn finish(self) -> String {
        self.text
    }

    pub(super) fn section(&mut self, heading: &str) {
        let heading = if heading.contains(' ') {
            format!("\"{heading}\"")
        } else {
            heading.to_owned()
        };
        self.text.push_str(&format!(".SH {heading}\n"));
        self.begun = false;
    }

    /// A line as it is.
    pub(super) fn line(&mut self, text: &str) {
        self.text.push_str(&formatted(text));
        self.text.push('\n');
        self.begun = true;
    }

    pub(super) fn paragraph(&mut self, text: &str) {
        if self.begun {
            self.text.push_str(".PP\n");
        }
        self.sentences(text);
    }

    /// A line of the source for each sentence, so that a change shows as one.
    fn sentences(&mut self, text: &str) {
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        let mut rest = &*text;
        while let Some(at) = rest.find(". ") {
            self.line(&rest[..=at]);
            rest = &rest[at + 2..];
        }
        self.line(rest);
    }

    /// How something is called. No word of it is divided.
    pub(super) fn synopsis(&mut self, words: &[String]) {
        let Some((command, rest)) = words.split_first() else {
            return;
        };
        self.text.push_str(".nh\n.ad l\n.HP\n");
        self.line(command);
        for word in rest {
            self.line(&word.replace(' ', "\\~"));
        }
        self.text.push_str(".hy\n.ad b\n");
    }

    pub(super) fn tagged(&mut self, tag: &str, paragraphs: &[String]) {
        self.text.push_str(".TP\n");
        self.line(tag);
        for paragraph in paragraphs.iter().filter(|paragraph| !paragraph.is_empty()) {
            self.sentences(paragraph);
        }
    }

    /// Tags within the text of a tag.
    pub(super) fn nested(&mut self, tags: &[(String, Vec<String>)]) {
        self.text.push_str(".RS\n");
        for (tag, paragraphs) in tags {
            self.tagged(tag, paragraphs);
        }
        self.text.push_str(".RE\n");
    }

    /// Something to type, and what it is for.
    pub(super) fn example(&mut self, what: &str, line: &str) {
        self.paragraph(&format!("{what}:"));
        self.text.push_str(".PP\n.RS 4\n.nf\n");
        for (at, part) in folded(line).iter().enumerate() {
            let indent = if at == 0 { "" } else { "    " };
            self.text.push_str(&format!("{indent}{}\n", escaped(part)));
        }
        self.text.push_str(".fi\n.RE\n");
    }

    pub(super) fn see_also(&mut self, pages: &[(String, &str)]) {
        let last = pages.len().saturating_sub(1);
        for (at, (name, section)) in pages.iter().enumerate() {
            let comma = if at == last { "" } else { "," };
            let name = escaped(name);
            self.text
                .push_str(&format!(".BR {name} ({section}){comma}\n"));
        }
    }
}

/// A command line in pieces that fit between the margins of a page.
fn folded(line: &str) -> Vec<String> {
    const WIDTH: usize = 64;
    let mut parts = Vec::new();
    let mut rest = line;
    while rest.len() > WIDTH {
        // Between words, and rather where a command ends.
        let Some(at) = rest[..WIDTH]
            .rfind(" && ")
            .map(|at| at + 3)
            .or_else(|| rest[..WIDTH].rfind(' '))
        else {
            break;
        };
        parts.push(format!("{} \\", &rest[..at]));
        rest = rest[at..].trim_start();
    }
    parts.push(rest.to_owned());
    parts
}

/// Text with nothing in it that roff would obey.
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for character in text.chars() {
        match character {
            '\\' => escaped.push_str("\\e"),
            '-' => escaped.push_str("\\-"),
            '\'' => escaped.push_str("\\(aq"),
            '`' => escaped.push_str("\\(ga"),
            '^' => escaped.push_str("\\(ha"),
            '~' => escaped.push_str("\\(ti"),
            other => escaped.push(other),
        }
    }
    if escaped.starts_with(['.', '\'']) {
        escaped.insert_str(0, "\\&");
    }
    escaped
}

/// A line of text with its marks. A word with an underscore is no mark, and a
/// hyphen between letters stays one.
fn formatted(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    let marks = [("**", "\\fB"), ("__", "\\fI"), ("`", "\\fB")];
    while !rest.is_empty() {
        let begins = marks
            .iter()
            .filter_map(|(mark, font)| {
                let at = rest.find(mark)?;
                let end = rest[at + mark.len()..].find(mark)?;
                Some((at, end, *mark, *font))
            })
            .min();
        let Some((at, end, mark, font)) = begins else {
            out.push_str(&plain(rest));
            break;
        };
        out.push_str(&plain(&rest[..at]));
        let inner = at + mark.len();
        out.push_str(font);
        out.push_str(&escaped(&rest[inner..inner + end]).replace("\\e\\(ti", "\\~"));
        out.push_str("\\fR");
        rest = &rest[inner + end + mark.len()..];
    }
    if out.starts_with(['.', '\'']) {
        out.insert_str(0, "\\&");
    }
    out
}

/// Text without marks. References to pages are bold, and so are options.
fn plain(text: &str) -> String {
    // What a blank must not divide.
    let text = text.replace("\\~", "\u{a0}");
    let mut words = Vec::new();
    for word in text.split(' ') {
        let bare = word.trim_end_matches(|c: char| ".,;:)".contains(c));
        let is_option = bare.starts_with("--") && bare.len() > 2;
        let reference = reference(word);
        words.push(match reference {
            Some((name, section, behind)) => {
                format!(
                    "\\fB{}\\fR({section}){}",
                    escaped(name),
                    escaped_prose(behind)
                )
            }
            None if is_option => {
                format!(
                    "\\fB{}\\fR{}",
                    escaped(bare),
                    escaped_prose(&word[bare.len()..])
                )
            }
            None => escaped_prose(word),
        });
    }
    words.join(" ").replace('\u{a0}', "\\~")
}

/// `name(section)` and what stands behind it.
fn reference(word: &str) -> Option<(&str, &str, &str)> {
    let (name, rest) = word.split_once('(')?;
    let (section, behind) = rest.split_once(')')?;
    let is_section = section.starts_with(|c: char| c.is_ascii_digit()) && section.len() <= 6;
    let is_name = !name.is_empty()
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    let nothing = behind.chars().all(|c| ".,;:)".contains(c));
    (is_section && is_name && nothing).then_some((name, section, behind))
}

/// Prose keeps hyphens between letters as they are.
fn escaped_prose(text: &str) -> String {
    let letters: Vec<char> = text.chars().collect();
    let mut out = String::new();
    for (at, letter) in letters.iter().enumerate() {
        let between = at > 0
            && letters[at - 1].is_alphanumeric()
            && letters.get(at + 1).is_some_and(|next| next.is_alphabetic());
        if *letter == '-' && between {
            out.push('-');
        } else {
            let escaped = escaped(&letter.to_string());
            out.push_str(escaped.strip_prefix("\\&").unwrap_or(&escaped));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_become_fonts() {
        assert_eq!(
            formatted("**--size** __SIZE__"),
            "\\fB\\-\\-size\\fR \\fISIZE\\fR"
        );
        assert_eq!(
            formatted("see mapdirect-policy(5), or --strict; `pin x` of MAP_DIRECT"),
            "see \\fBmapdirect\\-policy\\fR(5), or \\fB\\-\\-strict\\fR; \\fBpin x\\fR of MAP_DIRECT"
        );
        assert_eq!(
            formatted(".d is a well-known end: it's"),
            "\\&.d is a well-known end: it\\(aqs"
        );
        assert_eq!(formatted("a\\~b"), "a\\~b");
    }

    #[test]
    fn long_lines_are_folded_where_a_shell_reads_on() {
        let line =
            "mapdirect prepare swapfile --size 8G --contiguous && mkswap swapfile && show it";
        let parts = folded(line);
        assert!(parts.len() > 1 && parts[0].ends_with(" && \\"), "{parts:?}");
        let whole = parts
            .iter()
            .map(|part| part.trim_end_matches('\\').trim())
            .collect::<Vec<_>>();
        assert_eq!(whole.join(" "), line);
    }
}
