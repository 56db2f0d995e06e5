//! Texts: small, of no use to anybody but this worker, and read no further than they count.

use std::io::Read;

use proto::Rejection;
use reqwest::Response;
use reqwest::header::CONTENT_ENCODING;
use tokio::time::{Instant, timeout_at};

use super::error;
use super::gzip::Coding;
use super::request::Request;
use super::retry::{FetchError, Retry};

/// The first bytes of a response's body, at most so many.
pub(super) async fn read(
    mut response: Response,
    request: &mut Request,
    deadline: Instant,
    most: usize,
) -> Result<Vec<u8>, FetchError> {
    let coding = response.headers().get(CONTENT_ENCODING);
    let coding = coding.and_then(|coding| Coding::of(coding.as_bytes()));
    let mut text = Vec::new();
    while text.len() < most {
        match timeout_at(deadline, response.chunk()).await {
            Err(_) => return Err(FetchError { retry: Retry::Never, ..FetchError::of_host(Rejection::Timeout) }),
            Ok(Err(error)) => {
                request.is_open = !error::is_over(&error);
                return Err(error::of_body(&error));
            }
            Ok(Ok(None)) => {
                request.is_open = false;
                break;
            }
            Ok(Ok(Some(chunk))) => text.extend_from_slice(&chunk[..chunk.len().min(most - text.len())]),
        }
    }
    if let Some(coding) = coding {
        let mut plain = Vec::new();
        // What comes before a fault counts.
        let _ = coding.reader(&text).take(most as u64).read_to_end(&mut plain);
        text = plain;
    }
    Ok(text)
}
