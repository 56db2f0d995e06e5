//! What a page calls (`deploy/src/web/engine.js`). Bytes go in and out by two places in memory: the caller asks for one of so many bytes,
//! fills it and calls; the answer lies at [`answer`], [`answered`] bytes long. A call that fails returns 1, and its answer is the reason.

#![allow(unsafe_code, reason = "a name that the page knows must not be mangled")]

use std::cell::RefCell;

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};

use crate::Network;

#[derive(Default)]
struct State {
    given: Vec<u8>,
    answer: Vec<u8>,
    network: Option<Network>,
}

thread_local! {
    static STATE: RefCell<State> = RefCell::default();
}

/// Where `bytes` bytes can be written for the next call.
#[unsafe(no_mangle)]
extern "C" fn room(bytes: usize) -> *mut u8 {
    STATE.with_borrow_mut(|state| {
        state.given = vec![0; bytes];
        state.given.as_mut_ptr()
    })
}

/// Where the last call's answer lies.
#[unsafe(no_mangle)]
extern "C" fn answer() -> *const u8 {
    STATE.with_borrow(|state| state.answer.as_ptr())
}

/// The bytes of the last call's answer.
#[unsafe(no_mangle)]
extern "C" fn answered() -> usize {
    STATE.with_borrow(|state| state.answer.len())
}

/// Takes the given bytes as an ONNX file; answers what is to be known of it, as JSON.
#[unsafe(no_mangle)]
extern "C" fn load() -> u32 {
    call(|state| {
        let network = Network::new(std::mem::take(&mut state.given)).map_err(told)?;
        let [classes, resize] = [network.property("classes").map_err(told)?, network.property("resize").map_err(told)?];
        let crop = network.crop();
        let description = format!(r#"{{"crop":{crop},"classes":{classes},"resize":{resize}}}"#);
        state.network = Some(network);
        Ok(description.into_bytes())
    })
}

/// Takes the given bytes as the pixels of a picture, red, green, blue and one more byte each; scales what is in the square of side `side`
/// at (`left`, `top`) as the network wants it and answers the network's outputs, each as an f32.
#[unsafe(no_mangle)]
extern "C" fn classify(width: u32, height: u32, left: f64, top: f64, side: f64) -> u32 {
    call(|state| {
        let network = state.network.as_ref().ok_or("no model is loaded")?;
        let picture = ImageRef::new(width, height, &state.given, PixelType::U8x4).map_err(told)?;
        let crop = network.crop() as u32;
        let mut square = Image::new(crop, crop, PixelType::U8x4);
        let options = ResizeOptions::new()
            .crop(left, top, side, side)
            .resize_alg(ResizeAlg::Convolution(FilterType::Lanczos3))
            .use_alpha(false);
        Resizer::new().resize(&picture, &mut square, &options).map_err(told)?;
        let side = network.crop();
        let logits = network.logits(square.buffer(), (side, side), 4).map_err(told)?;
        Ok(logits.iter().flat_map(|logit| logit.to_le_bytes()).collect())
    })
}

fn call(what: impl FnOnce(&mut State) -> Result<Vec<u8>, String>) -> u32 {
    STATE.with_borrow_mut(|state| {
        let result = what(state);
        let failed = u32::from(result.is_err());
        state.answer = result.unwrap_or_else(String::into_bytes);
        failed
    })
}

/// An error with its causes.
fn told(error: impl std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}
