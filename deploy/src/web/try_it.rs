//! A run's network, to be tried in the browser: the page, and the model for it.

use axum::extract::{Path, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};

use super::page::{Failure, Page};
use super::source::Source;
use crate::run::model_files;
use crate::try_it::{Parts, body};

pub(super) async fn page(State(source): State<Source>, Path(name): Path<String>) -> Result<Response, Failure> {
    // Whether there is a model at all.
    let run = super::run::get(&source, &name).await?;
    let model = format!("/runs/{}/model.onnx", run.run);
    let parts = Parts { model: &model, engine: "/engine.js", wasm: "/engine.wasm", script: "/try_it.js" };
    let command = format!("gleaner classify {} PICTURE", run.run);
    Ok(Page { title: &run.run, live: false, command: &command, sections: body(&run.run, parts) }.into_response())
}

pub(super) async fn onnx(State(source): State<Source>, Path(name): Path<String>) -> Result<Response, Failure> {
    let bytes = model_files::fetch(&source.cluster, &name, "model.onnx").await?;
    Ok(([(CONTENT_TYPE, "application/octet-stream"), (CACHE_CONTROL, "no-cache")], bytes).into_response())
}
