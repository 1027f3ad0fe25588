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
        const CLOSED: &str = "MAPDIRECT_TEST_STDOUT";
        if std::env::var_os(CLOSED).is_some() {
            assert!(was_closed());
            return;
        }
        assert!(!was_closed());
        let test = std::env::current_exe().unwrap();
        let closed = std::process::Command::new("sh")
            .args([
                "-c",
                "exec \"$0\" --exact stdout::tests::it_was_looked_at_before_main >&-",
            ])
            .arg(test)
            .env(CLOSED, "1")
            .status()
            .unwrap();
        assert!(closed.success());
    }
}
