//! Panics of libraries that read what strangers have written: where that is damaged, some of them panic instead of
//! saying so.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

thread_local! {
    /// Whether a panic of this thread is told by [`caught`] alone.
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Calls a library. What it may have left half done has to be dropped by whoever gets an error.
///
/// # Errors
/// If it panics: with the panic's own words, which are then told nowhere else.
pub fn caught<T>(library: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = take_hook();
        set_hook(Box::new(move |panic| {
            if !QUIET.get() {
                usual(panic);
            }
        }));
    });
    let was = QUIET.replace(true);
    let result = catch_unwind(AssertUnwindSafe(library));
    QUIET.set(was);
    result.map_err(|panic| words(&*panic).to_owned())
}

/// What a panic has said.
pub fn words(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("it has panicked")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_with_its_words() {
        assert_eq!(caught(|| 7), Ok(7));
        assert_eq!(caught(|| -> u8 { panic!("no page {}", 3) }), Err("no page 3".to_owned()));
        assert_eq!(caught(|| -> u8 { panic!("no page") }), Err("no page".to_owned()));
        assert_eq!(caught(|| caught(|| -> u8 { panic!("inner") }).unwrap_or(1)), Ok(1));
        assert!(!QUIET.get());
    }
}
