//! A network with 8-bit weights and activations, for phones and pages: a quarter of the bytes.
//!
//! Static quantisation as ONNX's `QuantizeLinear` and `DequantizeLinear` say it, in the places where ONNX Runtime looks
//! for them: weights symmetric and channel by channel, activations by one scale each, measured on pictures; biases in
//! 32 bits. The outputs stay f32.

use std::collections::HashMap;

use anyhow::{Context, Result, ensure};
use prost::Message;
use proto::onnx::attribute_proto::AttributeType;
use proto::onnx::tensor_proto::DataType;
use proto::onnx::{AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto};
use worker::Pixels;

use super::network::Network;

/// Values of an activation that are taken of a picture to measure it.
const SAMPLES: usize = 2048;
/// The shares of an activation's range that are tried: what lies outside is cut off.
const SHARES: std::ops::RangeInclusive<u32> = 40..=100;

/// The scale of an activation, and the byte that stands for zero.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Scale {
    step: f32,
    zero: u8,
}

/// Quantises an exported network; `pictures`, prepared for it, say how large its activations are.
///
/// # Errors
/// If the file is no network of ours, or there is no picture.
pub(super) fn quantise(onnx: &[u8], pictures: &[Pixels]) -> Result<Vec<u8>> {
    ensure!(!pictures.is_empty(), "no picture to measure activations on");
    let mut model = ModelProto::decode(onnx).context("model.onnx")?;
    let graph = model.graph.take().context("model.onnx has no graph")?;
    let mut quantised = Quantised::new(&graph);
    let measured = quantised.measured();
    let scales = measure(&model, &graph, &measured, pictures)?;
    quantised.scales = measured.into_iter().zip(scales).collect();
    for node in &graph.node {
        quantised.add(node)?;
    }
    let Quantised { nodes, constants, .. } = quantised;
    model.graph = Some(GraphProto { node: nodes, initializer: constants, ..graph });
    Ok(model.encode_to_vec())
}

/// Runs the network on all pictures and fits a scale to each value.
fn measure(model: &ModelProto, graph: &GraphProto, values: &[String], pictures: &[Pixels]) -> Result<Vec<Scale>> {
    let mut graph = graph.clone();
    let named = |name: &String| ValueInfoProto { name: name.clone(), r#type: None };
    graph.output = values.iter().map(named).collect();
    let network = Network::new(ModelProto { graph: Some(graph), ..model.clone() }.encode_to_vec())?;
    let mut samples = vec![Vec::new(); values.len()];
    for pixels in pictures {
        for (kept, value) in samples.iter_mut().zip(network.values(pixels)?) {
            let every = value.len().div_ceil(SAMPLES).max(1);
            kept.extend(value.into_iter().step_by(every));
        }
    }
    Ok(samples.iter().map(|values| fitted(values)).collect())
}

/// The scale with the least squared error on these values.
fn fitted(values: &[f32]) -> Scale {
    let low = values.iter().copied().fold(0.0, f32::min);
    let high = values.iter().copied().fold(f32::MIN_POSITIVE, f32::max);
    let of = |share: u32| {
        let (low, high) = (low * share as f32 / 100.0, high * share as f32 / 100.0);
        let step = (high - low) / 255.0;
        Scale { step, zero: (-low / step).round() as u8 }
    };
    let error =
        |scale: &Scale| -> f64 { values.iter().map(|&value| f64::from(scale.restored(value) - value).powi(2)).sum() };
    let scales = SHARES.map(of).map(|scale| (error(&scale), scale));
    scales.min_by(|(a, _), (b, _)| a.total_cmp(b)).map_or_else(|| of(100), |(_, scale)| scale)
}

impl Scale {
    /// A value as it comes back from 8 bits.
    fn restored(self, value: f32) -> f32 {
        let byte = (value / self.step).round_ties_even() + f32::from(self.zero);
        (byte.clamp(0.0, 255.0) - f32::from(self.zero)) * self.step
    }
}

/// The graph as it grows.
struct Quantised<'a> {
    graph: &'a GraphProto,
    floats: HashMap<&'a str, &'a TensorProto>,
    makers: HashMap<&'a str, &'a NodeProto>,
    scales: HashMap<String, Scale>,
    /// Values that went through 8 bits, by their old name.
    restored: HashMap<String, String>,
    nodes: Vec<NodeProto>,
    constants: Vec<TensorProto>,
}

impl<'a> Quantised<'a> {
    fn new(graph: &'a GraphProto) -> Self {
        let floats = graph.initializer.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
        let makers = graph.node.iter().filter_map(|node| Some((node.output.first()?.as_str(), node))).collect();
        let (scales, restored) = (HashMap::new(), HashMap::new());
        Self { graph, floats, makers, scales, restored, nodes: Vec::new(), constants: Vec::new() }
    }

    /// Whether a node is a layer whose weights were learned.
    fn is_layer(node: &NodeProto) -> bool {
        matches!(node.op_type.as_str(), "Conv" | "Gemm")
            && node.input.get(1).is_some_and(|name| name.ends_with(".weight"))
    }

    /// Where a value was computed: what only picks or reshapes has the scale of its input.
    fn root(&self, value: &str) -> String {
        match self.makers.get(value) {
            Some(node) if matches!(node.op_type.as_str(), "MaxPool" | "Flatten") => self.root(&node.input[0]),
            _ => value.to_owned(),
        }
    }

    /// The values that are measured: what layers take in.
    fn measured(&self) -> Vec<String> {
        let layers = self.graph.node.iter().filter(|node| Self::is_layer(node));
        let mut values: Vec<String> = layers.map(|node| self.root(&node.input[0])).collect();
        values.dedup();
        values
    }

    /// Adds a node as it is, or, if it is a layer, with everything that it takes in 8 bits.
    fn add(&mut self, node: &NodeProto) -> Result<()> {
        let mut node = node.clone();
        if Self::is_layer(&node) {
            let weight = node.input[1].clone();
            let step = self.scales[&self.root(&node.input[0])].step;
            let steps = self.weight(&weight)?;
            if let Some(bias) = node.input.get(2).cloned() {
                self.bias(&bias, &steps, step)?;
            }
            node.input[1..].iter_mut().for_each(|name| name.push_str(RESTORED));
        }
        for (at, name) in node.input.iter_mut().enumerate() {
            if at == 0 && self.scales.contains_key(&self.root(name)) {
                *name = self.activation(name);
            } else if let Some(tensor) = self.floats.get(name.as_str())
                && !self.constants.iter().any(|known| known.name == *name)
            {
                self.constants.push((*tensor).clone());
            }
        }
        self.nodes.push(node);
        Ok(())
    }

    /// The name under which a value is that went through 8 bits.
    fn activation(&mut self, name: &str) -> String {
        if let Some(restored) = self.restored.get(name) {
            return restored.clone();
        }
        let Scale { step, zero } = self.scales[&self.root(name)];
        let (scale_name, zero_name, small) = (format!("{name}.scale"), format!("{name}.zero"), format!("{name}.small"));
        self.constant(&scale_name, vec![], DataType::Float, step.to_le_bytes().to_vec());
        self.constant(&zero_name, vec![], DataType::Uint8, vec![zero]);
        let restored = format!("{name}{RESTORED}");
        self.nodes.push(node("QuantizeLinear", &small, [name, &scale_name, &zero_name], None));
        self.nodes.push(node("DequantizeLinear", &restored, [&small, &scale_name, &zero_name], None));
        self.restored.insert(name.to_owned(), restored.clone());
        restored
    }

    /// Adds a weight in 8 bits, channel by channel of its output; returns their scales.
    fn weight(&mut self, name: &str) -> Result<Vec<f32>> {
        let (dims, values) = self.float(name)?;
        let channels = usize::try_from(dims.first().copied().unwrap_or(1)).unwrap_or(1).max(1);
        let rows: Vec<&[f32]> = values.chunks((values.len() / channels).max(1)).collect();
        let largest = |row: &&[f32]| row.iter().fold(f32::MIN_POSITIVE, |most, value| most.max(value.abs()));
        let steps: Vec<f32> = rows.iter().map(|row| largest(row) / 127.0).collect();
        let bytes =
            rows.iter().zip(&steps).flat_map(|(row, step)| row.iter().map(move |value| (value / step).round() as i8));
        let bytes = bytes.map(|value| value.to_le_bytes()[0]).collect();
        self.channels(name, dims, (DataType::Int8, bytes, 1), &steps);
        Ok(steps)
    }

    /// Adds a bias in 32 bits, in units of the products that it is added to.
    fn bias(&mut self, name: &str, steps: &[f32], step: f32) -> Result<()> {
        let (dims, values) = self.float(name)?;
        let steps: Vec<f32> = steps.iter().map(|of_channel| of_channel * step).collect();
        let bytes = values.iter().zip(&steps).flat_map(|(value, step)| ((value / step).round() as i32).to_le_bytes());
        self.channels(name, dims, (DataType::Int32, bytes.collect(), 4), &steps);
        Ok(())
    }

    /// Adds integers with a scale for each channel, and the node that makes numbers of them.
    fn channels(
        &mut self,
        name: &str,
        dims: Vec<i64>,
        (kind, bytes, width): (DataType, Vec<u8>, usize),
        steps: &[f32],
    ) {
        let (small, scale, zero) = (format!("{name}.small"), format!("{name}.scale"), format!("{name}.zero"));
        let channels = vec![steps.len() as i64];
        self.constant(&small, dims, kind, bytes);
        self.constant(
            &scale,
            channels.clone(),
            DataType::Float,
            steps.iter().flat_map(|step| step.to_le_bytes()).collect(),
        );
        self.constant(&zero, channels, kind, vec![0; width * steps.len()]);
        self.nodes.push(node("DequantizeLinear", &format!("{name}{RESTORED}"), [&small, &scale, &zero], Some(0)));
    }

    fn constant(&mut self, name: &str, dims: Vec<i64>, kind: DataType, raw_data: Vec<u8>) {
        self.constants.push(TensorProto { dims, data_type: kind.into(), name: name.to_owned(), raw_data });
    }

    /// A constant of f32.
    fn float(&self, name: &str) -> Result<(Vec<i64>, Vec<f32>)> {
        let tensor = self.floats.get(name).with_context(|| format!("model.onnx has no {name}"))?;
        ensure!(
            tensor.data_type == i32::from(DataType::Float),
            "{name} is not f32: only what was exported as such can be quantised"
        );
        let (values, rest) = tensor.raw_data.as_chunks();
        ensure!(rest.is_empty(), "{name} ends in the middle of a number");
        Ok((tensor.dims.clone(), values.iter().map(|value| f32::from_le_bytes(*value)).collect()))
    }
}

/// What a name ends with that stands for a value which was integers.
const RESTORED: &str = ".restored";

fn node(operator: &str, output: &str, inputs: [&str; 3], axis: Option<i64>) -> NodeProto {
    let attribute =
        |i| AttributeProto { name: "axis".to_owned(), r#type: AttributeType::Int.into(), i, ..Default::default() };
    NodeProto {
        input: inputs.map(str::to_owned).to_vec(),
        output: vec![output.to_owned()],
        name: format!("{output}.{}", operator.to_lowercase()),
        op_type: operator.to_owned(),
        attribute: axis.map(attribute).into_iter().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_covers_what_there_is_and_zero_stays_zero() {
        let values: Vec<f32> = (0..=1000).map(|n| n as f32 / 100.0 - 2.0).collect();
        let scale = fitted(&values);
        assert_eq!(scale.restored(0.0), 0.0);
        for value in values {
            assert!((scale.restored(value) - value).abs() < 0.03, "{value}: {}", scale.restored(value));
        }
        let positive = fitted(&[0.0, 1.0, 2.0, 255.0 / 64.0]);
        assert_eq!(positive, Scale { step: 1.0 / 64.0, zero: 0 });
        // Nothing but zeros is no reason to divide by zero.
        assert_eq!(fitted(&[0.0; 9]).restored(0.0), 0.0);
    }

    #[test]
    fn a_lone_outlier_is_cut_off() {
        let mut values: Vec<f32> = (0..100_000).map(|n| (n % 1000) as f32 / 1000.0).collect();
        values.push(2.0);
        let scale = fitted(&values);
        assert!(scale.restored(2.0) < 1.9, "{scale:?}");
    }
}
