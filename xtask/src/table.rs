//! A table whose rows appear one by one.

/// Widths of the columns but the last.
pub(crate) struct Table<const N: usize> {
    widths: [usize; N],
}

impl<const N: usize> Table<N> {
    /// Prints the heading.
    pub(crate) fn new(columns: [(&str, usize); N]) -> Self {
        let table = Self {
            widths: columns.map(|(_, width)| width),
        };
        table.row(columns.map(|(name, _)| name.to_owned()));
        println!(
            "  {}",
            table.widths.map(|width| "─".repeat(width)).join("  ")
        );
        table
    }

    /// Prints a row; a number stands at the right of its column.
    pub(crate) fn row(&self, cells: [String; N]) {
        let mut line = String::from(" ");
        for (cell, width) in cells.iter().zip(self.widths) {
            line.push(' ');
            if cell.parse::<u64>().is_ok() {
                line.push_str(&format!("{cell:>width$}"));
            } else {
                line.push_str(&format!("{cell:<width$}"));
            }
            line.push(' ');
        }
        println!("{}", line.trim_end());
    }
}
