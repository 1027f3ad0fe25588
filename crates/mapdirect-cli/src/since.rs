//! Times as people write them: `90s`, `10m`, `2h`, `1d`, or `@1796083199`.

/// Since when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Since {
    /// So many seconds ago.
    Ago(u64),
    /// Seconds since the epoch.
    At(u64),
}

impl Since {
    /// Nanoseconds since the epoch, if it is `now`.
    #[must_use]
    pub fn nanoseconds(self, now: u64) -> u64 {
        const SECOND: u64 = 1_000_000_000;
        match self {
            Self::Ago(seconds) => now.saturating_sub(seconds.saturating_mul(SECOND)),
            Self::At(seconds) => seconds.saturating_mul(SECOND),
        }
    }
}

/// Parses a time.
///
/// # Errors
///
/// What is wrong with it, in words.
pub fn parse_since(text: &str) -> Result<Since, String> {
    let wrong = || format!("`{text}` is no time: write 90s, 10m, 2h, 1d or @SECONDS");
    if let Some(seconds) = text.strip_prefix('@') {
        return seconds.parse().map(Since::At).map_err(|_| wrong());
    }
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let factor = match unit {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(wrong()),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let seconds = number.checked_mul(factor).ok_or_else(wrong)?;
    Ok(Since::Ago(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_they_are_written() {
        assert_eq!(parse_since("90"), Ok(Since::Ago(90)));
        assert_eq!(parse_since("90s"), Ok(Since::Ago(90)));
        assert_eq!(parse_since("10m"), Ok(Since::Ago(600)));
        assert_eq!(parse_since("1d"), Ok(Since::Ago(86_400)));
        assert_eq!(parse_since("@5"), Ok(Since::At(5)));
        for wrong in ["", "m", "5w", "-5", "@", "99999999999999999999", "5 m"] {
            assert!(parse_since(wrong).is_err(), "{wrong}");
        }
        assert_eq!(Since::Ago(u64::MAX).nanoseconds(7), 0);
        assert_eq!(Since::At(2).nanoseconds(7), 2_000_000_000);
    }
}
