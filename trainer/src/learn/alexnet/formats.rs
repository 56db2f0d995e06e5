//! A trained network in the forms that other programs load: ONNX (phones, browsers, anything with onnxruntime) and
//! TorchScript.
//!
//! Both take `image` [n, 3, crop, crop], f32 from 0 to 1, red, green, blue, for any n; mean and deviation of the
//! training set are part of the network. Batch normalisation is folded into the layers before it, so what is left is
//! convolutions, products and comparisons.

use anyhow::{Context, Result};
use tch::{CModule, Kind, Tensor};

use super::{AlexNet, Layer, RESPONSE_ALPHA, RESPONSE_BIAS, RESPONSE_CHANNELS, norm};
use crate::learn::onnx::{Attribute, Dimension, Graph};

impl AlexNet {
    /// The network as it evaluates: f32, without gradients, each norm folded into its layer's weight and bias.
    pub(crate) fn folded(&self) -> Self {
        let fold = |layers: &[Layer]| layers.iter().map(Layer::folded).collect();
        Self {
            features: fold(&self.features),
            hidden: fold(&self.hidden),
            output: self.output.folded(),
            paper: self.paper,
            groups: self.groups,
            stride: self.stride,
            grid: self.grid,
            dropout: 0.0,
        }
    }

    /// An ONNX file of a [`AlexNet::folded`] network; `properties` stand in its metadata. Outputs are `logits` and
    /// `probabilities`, [n, classes].
    ///
    /// # Errors
    /// If a tensor cannot be read.
    pub(crate) fn onnx(
        &self,
        crop: i64,
        mean: &Tensor,
        deviation: &Tensor,
        properties: &[(&str, String)],
    ) -> Result<Vec<u8>> {
        let mut graph = Graph::new("AlexNet");
        let n = Dimension::Any("n");
        let image = [n, Dimension::Of(3), Dimension::Of(crop), Dimension::Of(crop)];
        let mut x = graph.input("image", &image);
        for (operator, name, channels) in [("Sub", "mean", mean), ("Div", "deviation", deviation)] {
            let value = graph.constant(name, &channels.view([1, 3, 1, 1]))?;
            x = graph.node(operator, &format!("{name}.applied"), &[&x, &value], &[]);
        }
        let mut side = crop;
        for (layer, stage) in self.features.iter().zip(self.stages()) {
            let (stride, padding) = (stage.stride, stage.padding);
            let size = layer.weight.size()[2];
            side = (side + 2 * padding - size) / stride + 1;
            let attributes = [
                ("kernel_shape", Attribute::Ints(vec![size; 2])),
                ("strides", Attribute::Ints(vec![stride; 2])),
                ("pads", Attribute::Ints(vec![padding; 4])),
                ("group", Attribute::Int(stage.groups)),
            ];
            x = layer.in_graph(&mut graph, "Conv", &x, &attributes)?;
            x = graph.node("Relu", &format!("{}.relu", layer.name), &[&x], &[]);
            if stage.lrn {
                x = Self::responses_in_graph(&mut graph, &layer.name, &x, layer.weight.size()[0])?;
            }
            if stage.pools {
                side = (side - 3) / 2 + 1;
                let attributes =
                    [("kernel_shape", Attribute::Ints(vec![3; 2])), ("strides", Attribute::Ints(vec![2; 2]))];
                x = graph.node("MaxPool", &format!("{}.pool", layer.name), &[&x], &attributes);
            }
        }
        if side != self.grid {
            // Averaging over parts of different sizes has no operator: it is a product with a matrix from each side.
            let part = averaging(side, self.grid);
            let (rows, columns) =
                (graph.constant("average.rows", &part)?, graph.constant("average.columns", &part.tr())?);
            x = graph.node("MatMul", "average.down", &[&rows, &x], &[]);
            x = graph.node("MatMul", "average", &[&x, &columns], &[]);
        }
        x = graph.node("Flatten", "flat", &[&x], &[("axis", Attribute::Int(1))]);
        let transposed = [("transB", Attribute::Int(1))];
        for layer in &self.hidden {
            x = layer.in_graph(&mut graph, "Gemm", &x, &transposed)?;
            x = graph.node("Relu", &format!("{}.relu", layer.name), &[&x], &[]);
        }
        x = self.output.in_graph(&mut graph, "Gemm", &x, &transposed)?;
        let logits = graph.node("Identity", "logits", &[&x], &[]);
        let probabilities = graph.node("Softmax", "probabilities", &[&logits], &[("axis", Attribute::Int(1))]);
        let classes = Dimension::Of(self.output.weight.size()[0]);
        graph.output(&logits, &[n, classes]);
        graph.output(&probabilities, &[n, classes]);
        Ok(graph.encode(properties))
    }

    /// Local response normalisation. ONNX's own operator is missing in some runtimes; a convolution with a band of ones
    /// sums over neighbouring channels, too.
    fn responses_in_graph(graph: &mut Graph, layer: &str, x: &str, channels: i64) -> Result<String> {
        let name = |part: &str| format!("{layer}.responses.{part}");
        let ones = Tensor::ones([channels, channels], (Kind::Float, tch::Device::Cpu));
        let band = ones.triu(-(RESPONSE_CHANNELS / 2)).tril(RESPONSE_CHANNELS / 2) * RESPONSE_ALPHA;
        let band = graph.constant(&name("band"), &band.view([channels, channels, 1, 1]))?;
        let bias = Tensor::full([channels], RESPONSE_BIAS, (Kind::Float, tch::Device::Cpu));
        let bias = graph.constant(&name("bias"), &bias)?;
        let power = graph.constant(&name("exponent"), &Tensor::from(0.75_f32))?;
        let squares = graph.node("Mul", &name("squares"), &[x, x], &[]);
        // What ONNX would do without it, too, but not each runtime.
        let one = [("kernel_shape", Attribute::Ints(vec![1; 2])), ("strides", Attribute::Ints(vec![1; 2]))];
        let sums = graph.node("Conv", &name("sums"), &[&squares, &band, &bias], &one);
        let divisor = graph.node("Pow", &name("divisor"), &[&sums, &power], &[]);
        Ok(graph.node("Div", &name("applied"), &[x, &divisor], &[]))
    }

    /// A TorchScript file of a [`AlexNet::folded`] network: its `forward` gives the logits.
    ///
    /// # Errors
    /// If libtorch cannot trace or save it.
    pub(crate) fn torchscript(&self, crop: i64, mean: &Tensor, deviation: &Tensor) -> Result<Vec<u8>> {
        let example = Tensor::zeros([2, 3, crop, crop], (Kind::Float, tch::Device::Cpu));
        let (mean, deviation) = (mean.view([1, 3, 1, 1]), deviation.view([1, 3, 1, 1]));
        let mut forward = |inputs: &[Tensor]| vec![self.evaluate(&((&inputs[0] - &mean) / &deviation))];
        let module = CModule::create_by_tracing("AlexNet", "forward", &[example], &mut forward)
            .context("failed to trace the network")?;
        // libtorch writes to a file only.
        let folder = tempfile::tempdir().context("no temporary folder")?;
        let file = folder.path().join("model.pt");
        module.save(&file).context("failed to save the TorchScript module")?;
        std::fs::read(&file).with_context(|| format!("failed to read {}", file.display()))
    }
}

impl Layer {
    fn folded(&self) -> Self {
        let (weight, bias) = tch::no_grad(|| {
            let weight = self.weight.detach().to_device(tch::Device::Cpu).to_kind(Kind::Double);
            let bias = self.bias.as_ref().map(|bias| bias.detach().to_device(tch::Device::Cpu).to_kind(Kind::Double));
            let Some(norm) = &self.norm else { return (weight, bias) };
            let value = |tensor: &Tensor| tensor.detach().to_device(tch::Device::Cpu).to_kind(Kind::Double);
            let factor = value(&norm.weight) / (value(&norm.variance) + norm::EPS).sqrt();
            let mean = value(&norm.mean) - bias.unwrap_or_else(|| value(&norm.mean).zeros_like());
            let bias = value(&norm.bias) - mean * &factor;
            let mut per_output = vec![1; weight.dim()];
            per_output[0] = -1;
            (weight * factor.view(per_output.as_slice()), Some(bias))
        });
        // Files have them in one order, whatever the device liked.
        let float = |tensor: Tensor| tensor.to_kind(Kind::Float).contiguous();
        Self { name: self.name.clone(), weight: float(weight), bias: bias.map(float), norm: None }
    }

    /// Adds the layer to a graph; returns its output.
    fn in_graph(&self, graph: &mut Graph, operator: &str, x: &str, attributes: &[(&str, Attribute)]) -> Result<String> {
        let mut inputs = vec![x.to_owned(), graph.constant(&format!("{}.weight", self.name), &self.weight)?];
        if let Some(bias) = &self.bias {
            inputs.push(graph.constant(&format!("{}.bias", self.name), bias)?);
        }
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        Ok(graph.node(operator, &self.name, &inputs, attributes))
    }
}

/// The matrix [to, from] whose product with a column averages it to `to` parts, as adaptive average pooling does: part
/// i goes from floor(i from / to) to ceil((i + 1) from / to).
fn averaging(from: i64, to: i64) -> Tensor {
    let weight = |i: i64, j: i64| {
        let (begin, end) = (i * from / to, ((i + 1) * from + to - 1) / to);
        if (begin..end).contains(&j) { 1.0 / (end - begin) as f32 } else { 0.0 }
    };
    let values: Vec<f32> = (0..to).flat_map(|i| (0..from).map(move |j| weight(i, j))).collect();
    Tensor::from_slice(&values).view([to, from])
}

#[cfg(test)]
mod tests {
    use proto::run_spec::{Arch, Model};
    use tch::Device;

    use super::*;
    use crate::learn::checkpoint;

    #[test]
    fn a_folded_network_evaluates_as_the_one_it_is_made_of() {
        for arch in [Arch::Alexnet, Arch::AlexnetBn, Arch::Alexnet2012, Arch::AlexnetSlim] {
            let model = Model { arch, width: 0.125, dropout: 0.5 };
            let network = AlexNet::new(&model, 5, 64, 1, Kind::Double, Device::Cpu);
            let images = Tensor::rand([6, 3, 64, 64], (Kind::Double, Device::Cpu));
            let forward = network.train(&images, &[3, 3], &[1, 2, 3, 4, 5, 6]);
            network.update_running(&(forward.statistics / 2.0));
            let (whole, folded) = (network.evaluate(&images), network.folded());
            assert!(folded.buffers().is_empty());
            let difference = (folded.evaluate(&images.to_kind(Kind::Float)) - &whole).abs().max().double_value(&[]);
            assert!(difference < 1e-5 * whole.abs().max().double_value(&[]).max(1.0), "{arch:?}: {difference:e}");

            let relaid = AlexNet::new(&model, 5, 64, 1, Kind::Double, Device::Cpu).in_nhwc();
            checkpoint::load(&relaid.weights(), &network.weights()).expect("the same names and shapes");
            let ones = Tensor::ones([3], (Kind::Float, Device::Cpu));
            let onnx = |network: &AlexNet| network.folded().onnx(64, &ones, &ones, &[]).expect("tensors that are here");
            assert!(onnx(&relaid) == onnx(&network), "{arch:?}: files are the same in either layout");
            assert!(relaid.folded().weights().iter().all(|(_, tensor)| tensor.is_contiguous()), "{arch:?}");
        }
    }

    #[test]
    fn the_averaging_matrix_is_adaptive_average_pooling() {
        for (from, to) in [(7, 6), (13, 6), (5, 2), (6, 6), (3, 1)] {
            let map = Tensor::rand([2, 3, from, from], (Kind::Float, Device::Cpu));
            let part = averaging(from, to);
            let difference = part.matmul(&map).matmul(&part.tr()) - map.adaptive_avg_pool2d([to, to]);
            assert!(difference.abs().max().double_value(&[]) < 1e-6, "{from} to {to}");
        }
    }
}
