//! What crosses the boundary to C: an errno, words, and never a panic.

use mapdirect::Error;
use mapdirect_sys::errno;
use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Why a call fails.
#[derive(Debug)]
pub(crate) struct Failure {
    errno: i32,
    words: String,
}

impl Failure {
    /// One that this crate finds itself.
    pub(crate) fn new(errno: i32, obstacle: &str, help: &str) -> Self {
        let name = std::io::Error::from_raw_os_error(errno);
        Self {
            errno,
            words: format!("{obstacle} ({name})\n  help: {help}"),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self {
            errno: error.errno(),
            words: format!("{error:#}"),
        }
    }
}

thread_local! {
    static WORDS: RefCell<CString> = RefCell::default();
}

/// Runs a call of C. What it returns if it fails is `failed`, with errno and
/// words set.
pub(crate) fn call<T>(failed: T, run: impl FnOnce() -> Result<T, Failure>) -> T {
    // What a panic leaves behind is in tables whose entries it has locked: they
    // answer EIO from then on.
    let result = catch_unwind(AssertUnwindSafe(run));
    let failure = match result {
        Ok(Ok(value)) => return value,
        Ok(Err(failure)) => failure,
        Err(panic) => Failure::new(errno::EIO, &said(&*panic), "report this, it is a bug"),
    };
    say(failure.words);
    errno::set(failure.errno);
    failed
}

fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("the library panicked: {}", text.unwrap_or("without a word"))
}

/// Keeps words for [`words`].
pub(crate) fn say(words: String) {
    let mut bytes = words.into_bytes();
    bytes.retain(|byte| *byte != 0);
    let words = CString::new(bytes).unwrap_or_default();
    // A thread that is ending has no place for them any more.
    let _ = WORDS.try_with(|place| place.replace(words));
}

/// The last words of this thread; valid until it fails again.
pub(crate) fn words() -> *const c_char {
    const NOTHING: &CStr = c"";
    WORDS
        .try_with(|words| words.borrow().as_ptr())
        .unwrap_or(NOTHING.as_ptr())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_eio() {
        let failed = call(-1, || panic!("of {}", "test"));
        assert_eq!(failed, -1);
        assert_eq!(errno::get(), errno::EIO);
        let words = WORDS.with(|words| words.borrow().to_string_lossy().into_owned());
        assert!(
            words.starts_with("the library panicked: of test"),
            "{words}"
        );
        assert!(words.contains("\n  help: "), "{words}");
    }

    #[test]
    fn words_have_no_zero_inside() {
        say(String::from("a\0b"));
        let words = WORDS.with(|words| words.borrow().clone());
        assert_eq!(words.as_c_str(), c"ab");
    }
}
