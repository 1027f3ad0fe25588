//! Pictures as SVG: plain text and rectangles, readable on light and dark pages.

use std::fmt::Write;

/// The width of a character of the fonts that are named, by their size.
const ASPECT: f64 = 0.6;

const STYLE: &str = "\
svg { color-scheme: light dark; }
.page { fill: #ffffff; stroke: #d0d7de; }
text { font-family: ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace; fill: #1f2328; }
.strong { font-weight: bold; }
.good { fill: #1a7f37; }
.note { fill: #9a6700; }
.bad { fill: #cf222e; font-weight: bold; }
.faint { fill: #59636e; }
.line { stroke: #d0d7de; stroke-width: 1; }
.ours { fill: #0969da; }
.peer { fill: #8c959f; }
@media (prefers-color-scheme: dark) {
.page { fill: #0d1117; stroke: #3d444d; }
text { fill: #e6edf3; }
.good { fill: #3fb950; }
.note { fill: #d29922; }
.bad { fill: #f85149; }
.faint { fill: #9198a1; }
.line { stroke: #3d444d; }
.ours { fill: #4493f8; }
.peer { fill: #6e7681; }
}";

/// A picture of so many pixels.
pub(crate) struct Svg {
    body: String,
    width: f64,
    height: f64,
}

impl Svg {
    pub(crate) fn new(width: f64, height: f64) -> Self {
        Self {
            body: String::new(),
            width,
            height,
        }
    }

    /// Text in a class. It takes as much room as the characters have in every
    /// font, so that columns stay columns.
    pub(crate) fn text(&mut self, (x, y): (f64, f64), size: f64, class: &str, text: &str) {
        let characters = text.chars().count();
        if text.trim().is_empty() {
            return;
        }
        let length = f64::from(u32::try_from(characters).unwrap_or(0)) * size * ASPECT;
        let _ = writeln!(
            self.body,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size}\" class=\"{class}\" \
             textLength=\"{length:.1}\" lengthAdjust=\"spacingAndGlyphs\" \
             xml:space=\"preserve\">{}</text>",
            escaped(text)
        );
    }

    /// The width of text of a size.
    pub(crate) fn width_of(text: &str, size: f64) -> f64 {
        f64::from(u32::try_from(text.chars().count()).unwrap_or(0)) * size * ASPECT
    }

    pub(crate) fn bar(&mut self, (x, y): (f64, f64), (width, height): (f64, f64), class: &str) {
        let _ = writeln!(
            self.body,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{height:.1}\" \
             class=\"{class}\"/>",
            width.max(1.0)
        );
    }

    pub(crate) fn line(&mut self, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
        let _ = writeln!(
            self.body,
            "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" class=\"line\"/>"
        );
    }

    /// The whole file. Those who cannot see it are told what it shows.
    pub(crate) fn finish(self, title: &str, description: &str) -> String {
        let (width, height) = (self.width, self.height);
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" \
             viewBox=\"0 0 {width:.0} {height:.0}\" role=\"img\">\n\
             <title>{}</title>\n<desc>{}</desc>\n<style>\n{STYLE}\n</style>\n\
             <rect x=\"0.5\" y=\"0.5\" width=\"{:.0}\" height=\"{:.0}\" rx=\"6\" class=\"page\"/>\n\
             {}</svg>\n",
            escaped(title),
            escaped(description),
            width - 1.0,
            height - 1.0,
            self.body
        )
    }
}

/// Text with nothing in it that XML would obey.
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\n' | '\t' => escaped.push(character),
            other if other.is_control() => escaped.push('\u{fffd}'),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_no_markup() {
        let mut svg = Svg::new(100.0, 50.0);
        svg.text((0.0, 10.0), 12.0, "bad", "<b> & \"c\"\u{1b}");
        let text = svg.finish("a < b", "c");
        assert!(
            text.contains("&lt;b&gt; &amp; &quot;c&quot;\u{fffd}</text>"),
            "{text}"
        );
        assert!(text.contains("<title>a &lt; b</title>"), "{text}");
    }
}
