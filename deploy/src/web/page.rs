//! The frame around a page, and what is told when there is none.

use std::collections::BTreeMap;

use anyhow::Error;
use axum::http::StatusCode;
use axum::http::header::CACHE_CONTROL;
use axum::response::{Html, IntoResponse, Response};
use maud::{DOCTYPE, Markup, PreEscaped, html};
use proto::pb::Trouble;

use crate::exit::{Exit, explain};
use crate::output::state_name;
use crate::time::span;

/// A page that could not be made, as its answer.
pub(super) struct Failure(Error);

impl<E: Into<Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let (exit, text) = explain(&self.0);
        match exit {
            Exit::NotFound => missing(&text),
            Exit::Usage => failed(StatusCode::BAD_REQUEST, "This cannot be shown", &text),
            Exit::Unavailable => failed(StatusCode::SERVICE_UNAVAILABLE, "The coordinator does not answer", &text),
            _ => failed(StatusCode::INTERNAL_SERVER_ERROR, "This page cannot be made", &text),
        }
    }
}

/// What a page is about.
pub(super) struct Page<'a> {
    pub(super) title: &'a str,
    /// Whether what it shows may still change.
    pub(super) live: bool,
    /// The command that shows the same.
    pub(super) command: &'a str,
    /// Its sections, each with an id.
    pub(super) sections: Markup,
}

impl IntoResponse for Page<'_> {
    fn into_response(self) -> Response {
        (StatusCode::OK, [(CACHE_CONTROL, "no-store")], Html(self.render().into_string())).into_response()
    }
}

impl Page<'_> {
    fn render(&self) -> Markup {
        html! {
            (DOCTYPE)
            html lang="en" {
                head {
                    meta charset="utf-8";
                    meta name="viewport" content="width=device-width, initial-scale=1";
                    title { (self.title) " - Gleaner" }
                    link rel="icon" href="/icon.svg";
                    link rel="stylesheet" href="/style.css";
                    script src="/live.js" defer {}
                }
                body {
                    a .skip href="#main" { "Skip to content" }
                    header {
                        a .brand href="/" { "Gleaner" }
                        span #age {}
                    }
                    main #main data-live[self.live] { (self.sections) }
                    footer { "The same in a terminal: " code { (self.command) } }
                }
            }
        }
    }
}

/// An answer to whoever asks for what there is not.
pub(super) fn missing(text: &str) -> Response {
    failed(StatusCode::NOT_FOUND, "Not found", text)
}

fn failed(status: StatusCode, title: &str, text: &str) -> Response {
    let sections = html! {
        section #failure { h1 { (title) } p { (text) } p { a href="/" { "To the cluster's page" } } }
    };
    let page = Page { title, live: false, command: "gleaner status", sections };
    (status, page).into_response()
}

/// What goes wrong, a card each; at most five, the rest as a number.
pub(super) fn troubles(troubles: &[Trouble]) -> Markup {
    const MOST: usize = 5;
    html! {
        @for trouble in troubles.iter().take(MOST) {
            div .card .trouble {
                strong { "⚠ " (state_name(trouble.kind().as_str_name(), "FAILURE_KIND_")) }
                " of " (if trouble.worker.is_empty() { "the coordinator" } else { &trouble.worker })
                @if !trouble.dataset.is_empty() { ", at " (trouble.dataset) }
                ": " (trouble.text)
                small { " " (trouble.count) " times, for " (span(trouble.since_millis_ago)) ", last " (span(trouble.last_millis_ago)) " ago" }
            }
        }
        @if troubles.len() > MOST { p { "and " (troubles.len() - MOST) " more: " code { "gleaner status" } } }
    }
}

/// The values of a query by name; what nobody asked for is not there.
pub(super) fn query(raw: Option<String>) -> BTreeMap<String, String> {
    let raw = raw.unwrap_or_default();
    url::form_urlencoded::parse(raw.as_bytes()).into_owned().filter(|(_, value)| !value.is_empty()).collect()
}

/// A number with its thousands apart.
pub(super) fn number(n: u64) -> Markup {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            // A narrow space that does not break.
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    PreEscaped(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_by_threes_and_text_is_never_markup() {
        assert_eq!(number(12).into_string(), "12");
        assert_eq!(number(1_234_567).into_string(), "1\u{202f}234\u{202f}567");
        let page = Page { title: "<script>", live: true, command: "a & b", sections: html! { p { "<b>" } } };
        let text = page.render().into_string();
        assert!(
            text.contains("&lt;script&gt; - Gleaner") && text.contains("a &amp; b") && text.contains("&lt;b&gt;"),
            "{text}"
        );
        assert!(!text.contains("style=") && !text.contains("<script>"), "the policy allows neither: {text}");
    }
}
