//! Pieces of files that are in the store or on the web. Those of the web are asked for as pictures are: when their host
//! has room, as its owner allows, again if that may help.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use parquet::data_type::ByteArray;
use proto::files::{self, FileUrl, Part, Place};
use proto::{Limits, Rejection};

use super::Dispatcher;
use super::batch::{Shared, SliceEntry};
use super::files::blocking;
use crate::fetch::{Body, End, LONGEST_PIECE, Object, Request, Sparse, groups, rows};

/// For one piece, which may be large.
const PIECE_SECONDS: f64 = 600.0;

/// The request for a file on the web or some of its bytes; None: it is no such address, or a row, which is not asked
/// for alone.
pub(super) fn request(url: &str) -> Option<Result<Request, Rejection>> {
    match files::parse(url)? {
        FileUrl { place: Place::Web(url), part: Part::Whole } => Some(Request::new(&url)),
        FileUrl { place: Place::Web(url), part: Part::Bytes { offset, length, .. } } => {
            let end = offset.checked_add(length).ok_or(Rejection::BadUrl);
            Some(end.and_then(|end| Request::of_part(&url, offset..end)))
        }
        _ => None,
    }
}

impl Dispatcher {
    /// An object, or some of its bytes.
    pub(super) async fn stored(&self, object: Object, part: Part<'_>, limits: &Limits) -> Result<Body, Rejection> {
        let range = match part {
            Part::Whole => 0..object.length().await?,
            Part::Bytes { offset, length, .. } => offset..offset.checked_add(length).ok_or(Rejection::BadUrl)?,
            Part::Row { .. } => return Err(Rejection::BadUrl),
        };
        let mut body = self.fetcher.room(range.end - range.start, limits).await?;
        body.bytes.extend_from_slice(&object.read(range).await?);
        Ok(body)
    }

    /// Hands on the `wanted` rows, which count up, of a column of a file of this length: from its end and, one after
    /// the other, from what each row group has of the column.
    pub(super) async fn read_groups(
        self: &Arc<Self>,
        batch: &Arc<Shared>,
        place: &Place<'_>,
        length: Option<u64>,
        column: String,
        wanted: &[u64],
        hand: impl FnMut(u64, Result<ByteArray, Rejection>) -> bool + Send + 'static,
    ) -> Result<(), Rejection> {
        let length = length.ok_or(Rejection::BadUrl)?;
        let (mut file, mut hand) = (Sparse::new(length), hand);
        let about = loop {
            let end = file.clone();
            match blocking(move || end.end()).await? {
                End::Missing(range) => {
                    let bytes = self.piece(batch, place, range.clone()).await?;
                    file = Sparse::new(length).with(range.start, bytes);
                }
                End::Read(about) => break about,
            }
        };
        let (name, rows_wanted) = (column.clone(), wanted.to_vec());
        let groups = blocking(move || groups(&about, &name, &rows_wanted)).await?;
        for (range, wanted) in groups {
            // One at a time, since each may be large.
            let _one = self.groups.acquire().await.map_err(|_| Rejection::Unfetched)?;
            let file = file.with(range.start, self.piece(batch, place, range).await?);
            let column = column.clone();
            hand = blocking(move || rows(file, &column, &wanted, &mut hand).map(|()| hand)).await?;
        }
        Ok(())
    }

    async fn piece(
        self: &Arc<Self>,
        batch: &Arc<Shared>,
        place: &Place<'_>,
        range: Range<u64>,
    ) -> Result<Bytes, Rejection> {
        let url = match place {
            Place::Path(_) => return Err(Rejection::BadUrl),
            Place::Stored(key) => return self.fetcher.roots().object(key)?.read(range).await,
            Place::Web(url) => url,
        };
        let part = Part::Bytes { name: "".into(), offset: range.start, length: range.end - range.start };
        let url = FileUrl { place: Place::Web(Cow::Borrowed(url)), part }.to_string();
        let limits = Limits { max_bytes: LONGEST_PIECE, timeout_seconds: PIECE_SECONDS, ..batch.limits.clone() };
        let entry = SliceEntry { url, ..SliceEntry::default() };
        let mut asked = self.begin(vec![entry], true, limits, batch.respect, false);
        let result = asked.next().await.ok_or(Rejection::Unfetched)?;
        // Its memory counts no more: what is made of it needs some.
        result.body.map(|(mut body, _)| std::mem::take(&mut body.bytes).into())
    }
}
