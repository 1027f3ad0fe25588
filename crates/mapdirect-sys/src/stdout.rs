//! Whether there was a standard output when the program began.
//!
//! std opens `/dev/null` for what is closed (library/std/src/sys/pal/unix/mod.rs,
//! `sanitize_standard_fds`), so that no file of the program comes to be there, and
//! what is written is lost without a word. It does so before `main`, and what is in
//! `.init_array` runs before that.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

static WAS_CLOSED: AtomicBool = AtomicBool::new(false);

#[used]
// SAFETY: the C library calls every pointer of this section once, with arguments
// that a C function may ignore.
#[unsafe(link_section = ".init_array")]
static LOOK: extern "C" fn() = look;

extern "C" fn look() {
    // SAFETY: touches no memory.
    let flags = unsafe { libc::fcntl(libc::STDOUT_FILENO, libc::F_GETFD) };
    WAS_CLOSED.store(flags < 0, Relaxed);
}

/// Whether standard output was closed when the program began.
#[must_use]
pub fn was_closed() -> bool {
    WAS_CLOSED.load(Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_was_looked_at_before_main() {
        assert!(!was_closed());
        let test = std::env::current_exe().unwrap();
        let closed = std::process::Command::new("sh")
            .args([
                "-c",
                "\"$0\" --exact stdout::tests::told_by_status --ignored >&-",
            ])
            .arg(test)
            .status()
            .unwrap();
        assert_eq!(closed.code(), Some(42));
    }

    #[test]
    #[ignore = "run by the other test, with its standard output closed"]
    fn told_by_status() {
        std::process::exit(if was_closed() { 42 } else { 0 });
    }
}
