//! The page on which a browser asks a trained network, without anything leaving the device: as `gleaner web` serves it,
//! and as a folder that any web server can.
//!
//! The network runs in `engine.wasm.gz`, which is the crate `classifier` as `make engine` builds it; `make test` knows
//! if it is another's.

use std::io::Read;

use flate2::read::GzDecoder;
use maud::{DOCTYPE, Markup, html};

/// Shows the guesses.
pub(crate) const SCRIPT: &str = include_str!("try_it/try_it.js");
/// Runs the network, beside the page.
pub(crate) const ENGINE: &str = include_str!("try_it/engine.js");
/// The network's own code, compressed with gzip.
pub(crate) const WASM: &[u8] = include_bytes!("try_it/engine.wasm.gz");
pub(crate) const STYLE: &str = include_str!("web/style.css");
/// What the page needs to be allowed: its own code, and nothing from elsewhere.
pub(crate) const POLICY: &str = "default-src 'none'; style-src 'self'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; \
                                 img-src 'self'; connect-src 'self'; form-action 'none'; base-uri 'none'";

/// Where the page's parts are, seen from it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Parts<'a> {
    pub(crate) model: &'a str,
    pub(crate) engine: &'a str,
    pub(crate) wasm: &'a str,
    pub(crate) script: &'a str,
}

/// What stands on the page about the network of a run.
pub(crate) fn body(run: &str, Parts { model, engine, wasm, script }: Parts<'_>) -> Markup {
    html! {
        section #try data-model=(model) data-engine=(engine) data-wasm=(wasm) {
            h1 { "What does " (run) " see?" }
            p #status role="status" { "Loading the model. (This page needs a script, and WebAssembly.)" }
            form {
                label for="files" { "Drop or paste a picture, or choose one" }
                input #files type="file" accept="image/*" multiple disabled;
                button #camera type="button" hidden { "Use the camera" }
            }
            div #answers .answers {}
        }
        script src=(script) defer {}
    }
}

/// The files of a folder that shows the network of a run, which stands beside them as the file `model`.
pub(crate) fn folder(run: &str, model: &str) -> std::io::Result<[(&'static str, Vec<u8>); 6]> {
    let mut wasm = Vec::new();
    GzDecoder::new(WASM).read_to_end(&mut wasm)?;
    let parts = Parts { model, engine: "engine.js", wasm: "engine.wasm", script: "try_it.js" };
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta http-equiv="Content-Security-Policy" content=(POLICY);
                title { (run) " - Gleaner" }
                link rel="icon" href="icon.svg";
                link rel="stylesheet" href="style.css";
            }
            body { main { (body(run, parts)) } }
        }
    };
    Ok([
        ("index.html", page.into_string().into_bytes()),
        ("try_it.js", SCRIPT.into()),
        ("engine.js", ENGINE.into()),
        ("engine.wasm", wasm),
        ("style.css", STYLE.into()),
        ("icon.svg", include_bytes!("web/icon.svg").to_vec()),
    ])
}
