//! A trained network that can be asked on any processor, without libtorch: by the command line, and, compiled to WebAssembly, by a page in
//! a browser (`browser`; `make engine`).

#[cfg(target_arch = "wasm32")]
mod browser;

use rten::{Dimension, LoadError, Model, ModelOptions, NodeId, RunError, Value, op_registry};
use rten_tensor::prelude::*;
use rten_tensor::{NdTensor, Tensor};

/// A network in an ONNX file of ours: it takes the pixels of a square from 0 to 1, and has what else is needed to use it among its
/// properties.
#[derive(Debug)]
pub struct Network {
    model: Model,
    crop: usize,
    input: NodeId,
    outputs: Vec<NodeId>,
}

/// Why a network cannot be used, or not on a picture.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file is no network that is understood here.
    #[error("cannot be loaded")]
    Load(#[source] Box<LoadError>),
    /// The file is a network, but not one of ours.
    #[error("{0}")]
    Other(String),
    /// A picture has fewer pixels than the network sees.
    #[error("is stored as {width} x {height} pixels, and the model sees {crop} x {crop}")]
    Small {
        /// The picture's pixels in a row.
        width: usize,
        /// The picture's rows.
        height: usize,
        /// The side of the square that the network sees.
        crop: usize,
    },
    /// The network cannot be computed.
    #[error("cannot be computed")]
    Run(#[from] RunError),
}

impl Network {
    /// Reads an ONNX file.
    ///
    /// # Errors
    /// If it is none, or takes no square of red, green and blue.
    pub fn new(onnx: Vec<u8>) -> Result<Self, Error> {
        // What our networks are made of. Any other operator would be dead weight in a page.
        let operators = op_registry!(
            Conv,
            DequantizeLinear,
            Div,
            Flatten,
            Gemm,
            Identity,
            MatMul,
            MaxPool,
            Mul,
            Pow,
            QuantizeLinear,
            Relu,
            Softmax,
            Sub
        );
        let model = ModelOptions::with_ops(operators).load(onnx).map_err(|error| Error::Load(Box::new(error)))?;
        let shape = model.input_shape(0).ok_or_else(|| Error::Other("has no input of a known shape".to_owned()))?;
        let crop = match shape[..] {
            [_, Dimension::Fixed(3), Dimension::Fixed(height), Dimension::Fixed(width)] if height == width => width,
            _ => return Err(Error::Other(format!("takes no square of red, green and blue, but {shape:?}"))),
        };
        // By place and not by name: the nodes that compute values have the same names.
        let (&[input], outputs @ [_, ..]) = (model.input_ids(), model.output_ids()) else {
            return Err(Error::Other("has not one input and an output".to_owned()));
        };
        let outputs = outputs.to_vec();
        Ok(Self { model, crop, input, outputs })
    }

    /// The side of the square that it sees, in pixels.
    pub fn crop(&self) -> usize {
        self.crop
    }

    /// One of the file's properties.
    ///
    /// # Errors
    /// If it has none of that name.
    pub fn property(&self, name: &str) -> Result<&str, Error> {
        let missing =
            || format!("has no {name:?} among its properties: only models of this version and later ones have");
        self.model.metadata().get(name).ok_or_else(|| Error::Other(missing()))
    }

    /// The first output for the centre of a picture of `channels` bytes a pixel, of which the first three are red, green and blue.
    ///
    /// # Errors
    /// If the picture is smaller than what the network sees.
    pub fn logits(&self, pixels: &[u8], size: (usize, usize), channels: usize) -> Result<Vec<f32>, Error> {
        Ok(self.run(pixels, size, channels, &self.outputs[..1])?.swap_remove(0))
    }

    /// All outputs, as [`Network::logits`] gives the first.
    ///
    /// # Errors
    /// As [`Network::logits`].
    pub fn values(&self, pixels: &[u8], size: (usize, usize), channels: usize) -> Result<Vec<Vec<f32>>, Error> {
        self.run(pixels, size, channels, &self.outputs)
    }

    fn run(
        &self,
        pixels: &[u8],
        (width, height): (usize, usize),
        channels: usize,
        outputs: &[NodeId],
    ) -> Result<Vec<Vec<f32>>, Error> {
        let crop = self.crop;
        if width < crop || height < crop || pixels.len() < width * height * channels {
            return Err(Error::Small { width, height, crop });
        }
        let (left, top) = ((width - crop) / 2, (height - crop) / 2);
        let input = NdTensor::<f32, 4>::from_fn([1, 3, crop, crop], |[_, channel, y, x]| {
            f32::from(pixels[channels * ((top + y) * width + left + x) + channel]) / 255.0
        });
        let values = self.model.run(vec![(self.input, input.into())], outputs, None)?;
        let numbers = |value: Value| {
            let numbers: Tensor<f32> =
                value.try_into().map_err(|_| Error::Other("puts out what is not f32".to_owned()))?;
            Ok(numbers.to_vec())
        };
        values.into_iter().map(numbers).collect()
    }
}
