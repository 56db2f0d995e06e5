//! The networks' layers: what weights they have, by which a run can begin with those of another.

use std::collections::BTreeMap;

use super::{Arch, Model};

/// Crops under this have a first convolution of stride 2 instead of 4: the maps behind it would be too small to tell
/// shapes apart.
const SMALL_CROP: u32 = 96;

/// The last layer, with a row for each class.
pub const OUTPUT: &str = "classifier.6";

/// The names and shapes of tensors.
pub type Shapes = BTreeMap<String, Vec<u64>>;

/// The layers of a network. They are named as in torchvision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// Of the first convolution.
    pub stride: u32,
    /// Side of the map that the features are averaged to.
    pub grid: u32,
    /// In how many groups each convolution is computed, none of which sees the channels of another.
    pub groups: [u64; CONVOLUTIONS],
    /// The convolutions, the hidden layers, the output.
    pub layers: Vec<Layer>,
}

/// How many of the layers are convolutions.
pub const CONVOLUTIONS: usize = 5;

/// A layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Such as `features.3`.
    pub name: String,
    /// The shape of its weight: outputs, inputs, and of a convolution the window.
    pub shape: Vec<u64>,
    /// Whether it has batch normalisation instead of a bias.
    pub norm: bool,
}

impl Network {
    /// Of a spec's model, for images of `crop` x `crop` pixels.
    pub fn new(model: &Model, classes: u64, crop: u32) -> Self {
        // Multiples of 8 fill the vector registers of convolution kernels.
        let wide = |channels: u64| (((channels as f64 * model.width / 8.0).round() as u64) * 8).max(8);
        let paper = model.arch == Arch::Alexnet2012;
        let norm = model.is_normalised();
        let slim = model.arch == Arch::AlexnetSlim;
        let stride = if crop < SMALL_CROP { 2 } else { 4 };
        let pooled = |side: u32| (side - 3) / 2 + 1;
        let side = pooled(pooled(pooled((crop + 4 - 11) / stride + 1)));
        let grid = if slim { 1 } else { side.min(6) };
        let groups = if paper { [1, 2, 1, 2, 2] } else { [1; CONVOLUTIONS] };
        let channels = if paper { [96, 256, 384, 384, 256] } else { [64, 192, 384, 256, 256] };
        let sizes = [(0, 11), (3, 5), (6, 3), (8, 3), (10, 3)];
        let mut layers = Vec::new();
        let mut inputs = 3;
        for (((index, size), channels), groups) in sizes.into_iter().zip(channels).zip(groups) {
            let shape = vec![wide(channels), inputs / groups, size, size];
            layers.push(Layer { name: format!("features.{index}"), shape, norm });
            inputs = wide(channels);
        }
        inputs *= u64::from(grid * grid);
        for index in if slim { &[][..] } else { &[1, 4] } {
            layers.push(Layer { name: format!("classifier.{index}"), shape: vec![wide(4096), inputs], norm });
            inputs = wide(4096);
        }
        layers.push(Layer { name: OUTPUT.to_owned(), shape: vec![classes, inputs], norm: false });
        Self { stride, grid, groups, layers }
    }

    /// All that is learned by gradients.
    pub fn parameters(&self) -> Shapes {
        let of = |layer: &Layer| {
            let (name, rows) = (&layer.name, vec![layer.shape[0]]);
            let rest = match layer.norm {
                false => vec![(format!("{name}.bias"), rows)],
                true => ["weight", "bias"].map(|part| (format!("{name}.norm.{part}"), rows.clone())).into(),
            };
            [vec![(format!("{name}.weight"), layer.shape.clone())], rest].concat()
        };
        self.layers.iter().flat_map(of).collect()
    }

    /// Parameters and running statistics.
    pub fn tensors(&self) -> Shapes {
        let mut all = self.parameters();
        for layer in self.layers.iter().filter(|layer| layer.norm) {
            for part in ["running_mean", "running_var"] {
                all.insert(format!("{}.norm.{part}", layer.name), vec![layer.shape[0]]);
            }
        }
        all
    }

    /// Bytes that a rank needs for a step in numbers of 32 bits, `samples` at a time: weights, gradients and momenta,
    /// what forward keeps for backward, and the two largest gradients on the way. An estimate: kernels need some room
    /// more.
    pub fn memory(&self, crop: u32, samples: u64) -> u64 {
        let numbers: u64 = self.parameters().values().map(|shape| shape.iter().product::<u64>()).sum();
        let (mut of_sample, mut largest) = (3 * u64::from(crop * crop) * 4, 0);
        let mut side = u64::from(crop);
        for (index, layer) in self.layers.iter().enumerate() {
            let outputs = match layer.shape[..] {
                [channels, _, window, _] => {
                    let (stride, padding) = if index == 0 { (u64::from(self.stride), 2) } else { (1, window / 2) };
                    side = (side + 2 * padding - window) / stride + 1;
                    channels * side * side
                }
                // With what dropout makes of the inputs.
                _ => layer.shape[0] + 2 * layer.shape[1],
            };
            // A norm keeps its input beside its output.
            of_sample += outputs * 4 * if layer.norm { 2 } else { 1 };
            largest = outputs.max(largest);
            if matches!(index, 0 | 1 | 4) {
                side = (side - 3) / 2 + 1;
                // Values, and where each was.
                of_sample += layer.shape[0] * side * side * (4 + 8);
            }
        }
        3 * 4 * numbers + samples * (of_sample + 2 * 4 * largest)
    }

    /// Whether weights of these shapes can be taken over. The rows of the last layer may be of other classes.
    ///
    /// # Errors
    /// The first tensor that does not fit.
    pub fn takes(&self, theirs: &Shapes) -> Result<(), String> {
        let tensors = self.tensors();
        // The last layer's misfits mostly follow from others.
        let (last, others): (Vec<_>, Vec<_>) = tensors.into_iter().partition(|(name, _)| is_of_output(name));
        for (name, shape) in others.into_iter().chain(last) {
            let Some(found) = theirs.get(&name) else { return Err(format!("there is no tensor {name}")) };
            let rows_differ = is_of_output(&name) && !found.is_empty();
            if *found != shape && !(rows_differ && found[1..] == shape[1..]) {
                return Err(format!("tensor {name} is of shape {found:?} where {shape:?} belongs"));
            }
        }
        Ok(())
    }
}

/// Whether a tensor belongs to the last layer.
pub fn is_of_output(tensor: &str) -> bool {
    is_within(tensor, OUTPUT)
}

/// Whether a tensor is `part`, as in `features.0.weight`, or belongs to it, as to `features.0` or `features`.
pub fn is_within(tensor: &str, part: &str) -> bool {
    tensor.strip_prefix(part).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(arch: Arch, classes: u64, crop: u32) -> Network {
        Network::new(&Model { arch, ..Model::default() }, classes, crop)
    }

    fn count(shapes: &Shapes) -> u64 {
        shapes.values().map(|shape| shape.iter().product::<u64>()).sum()
    }

    #[test]
    fn the_networks_have_as_many_parameters_as_is_known_of_them() {
        // torchvision's alexnet has 61,100,840; the others differ by biases and norms, groups, and the head.
        let found = [Arch::Alexnet, Arch::AlexnetBn, Arch::Alexnet2012, Arch::AlexnetSlim]
            .map(|arch| count(&network(arch, 1000, 224).parameters()));
        assert_eq!(found, [61_100_840, 61_110_184, 60_965_224, 2_727_848]);
    }

    #[test]
    fn a_step_needs_memory_for_weights_and_for_each_sample() {
        let full = network(Arch::AlexnetBn, 1000, 224);
        let weights = full.memory(224, 0);
        assert_eq!(weights, 3 * 4 * 61_110_184);
        // Seven million bytes a sample: 1.4 million numbers are kept, and the gradients of the first layer are the
        // largest.
        let sample = full.memory(224, 1) - weights;
        assert!((6_500_000..8_000_000).contains(&sample), "{sample}");
        assert_eq!(full.memory(224, 256), weights + 256 * sample);
        assert!(network(Arch::AlexnetSlim, 1000, 112).memory(112, 256) < 700 << 20);
    }

    #[test]
    fn weights_fit_whatever_the_classes_and_no_other_network_nor_crop() {
        let of_crop = |crop| network(Arch::Alexnet, 20, crop);
        assert_eq!(of_crop(224).takes(&network(Arch::Alexnet, 1000, 224).tensors()), Ok(()));
        assert_eq!(of_crop(256).takes(&of_crop(224).tensors()), Ok(()), "averaged to the same map");
        let small = of_crop(224).takes(&of_crop(112).tensors()).expect_err("a smaller map");
        assert!(small.contains("classifier.1.weight") && small.contains("[4096, 9216]"), "{small}");
        let other = network(Arch::AlexnetBn, 20, 224).takes(&of_crop(224).tensors()).expect_err("no norms");
        assert!(other.contains("there is no tensor classifier.1.norm.bias"), "{other}");
    }

    #[test]
    fn parts_of_a_network_are_named_by_whole_words() {
        assert!(is_within("features.0.weight", "features.0") && is_within("features.0.weight", "features"));
        assert!(is_within("features.0.weight", "features.0.weight") && !is_within("features.10.weight", "features.1"));
    }
}
