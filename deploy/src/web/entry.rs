//! Who is shown the pages where other machines reach them: browsers that have brought a code. Each code lets one
//! browser in, which gets a cookie for it; the next code is then told where the pages are served from.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use axum::http::header::COOKIE;
use axum::http::{HeaderMap, Uri};
use subtle::ConstantTimeEq;

/// The cookie's name.
const NAME: &str = "gleaner-pages";

/// Browsers that are let in at the same time; one more, and the first must bring a code again.
const BROWSERS: usize = 64;

/// Those that were let in.
pub(super) struct Entry(Mutex<State>);

struct State {
    code: String,
    /// The oldest first.
    cookies: VecDeque<String>,
}

/// What a request gets.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Admission {
    /// What it asks for.
    Page,
    /// This cookie, and to be asked again; the code has been used up.
    Cookie(String),
    /// The question for a code.
    Refused,
}

impl Entry {
    /// Nobody is let in yet.
    pub(super) fn new() -> Self {
        Self(Mutex::new(State { code: word(), cookies: VecDeque::new() }))
    }

    /// The code that lets the next browser in.
    pub(super) fn code(&self) -> String {
        self.state().code.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing under the lock can leave it half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Decides about a request.
    pub(super) fn admit(&self, uri: &Uri, headers: &HeaderMap) -> Admission {
        let mut state = self.state();
        let shown = headers.get_all(COOKIE).iter().filter_map(|cookies| cookies.to_str().ok());
        let shown = shown.flat_map(|cookies| cookies.split(';')).filter_map(|cookie| cookie.trim().split_once('='));
        let mut shown = shown.filter(|(name, _)| *name == NAME);
        if shown.any(|(_, shown)| state.cookies.iter().any(|known| is_same(known, shown))) {
            return Admission::Page;
        }
        let mut query = url::form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes());
        if !query.any(|(name, code)| name == "code" && is_same(&state.code, &code)) {
            return Admission::Refused;
        }
        state.code = word();
        if state.cookies.len() >= BROWSERS {
            state.cookies.pop_front();
        }
        let cookie = word();
        state.cookies.push_back(cookie.clone());
        Admission::Cookie(format!("{NAME}={cookie}; Path=/; HttpOnly; SameSite=Strict"))
    }
}

fn is_same(one: &str, other: &str) -> bool {
    one.as_bytes().ct_eq(other.as_bytes()).into()
}

/// One that nobody can guess.
fn word() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_lets_one_browser_in_and_is_used_up() {
        let entry = Entry::new();
        let ask = |uri: &str, cookie: Option<&str>| {
            let cookie = cookie.map(|cookie| (COOKIE, cookie.parse().expect("a header")));
            entry.admit(&uri.parse().expect("a path"), &cookie.into_iter().collect())
        };
        let with_code = format!("/?code={}", entry.code());
        for refused in ["/", "/?code=", "/?code=x", "/?kode=1"] {
            assert_eq!(ask(refused, Some("gleaner-pages=; other=1")), Admission::Refused, "{refused}");
        }
        let Admission::Cookie(cookie) = ask(&with_code, None) else { panic!("the code is right") };
        assert!(cookie.ends_with("; HttpOnly; SameSite=Strict"), "{cookie}");
        let own = cookie.split(';').next().expect("a value");
        assert_eq!(ask("/runs/a", Some(&format!("a=b; {own}"))), Admission::Page);
        assert_eq!(ask(&with_code, None), Admission::Refused, "it was used");
        assert_eq!(ask("/", Some(&own[..own.len() - 1])), Admission::Refused);
        for _ in 0..BROWSERS {
            assert!(matches!(ask(&format!("/?code={}", entry.code()), None), Admission::Cookie(_)));
        }
        assert_eq!(ask("/", Some(own)), Admission::Refused, "there are too many");
    }
}
