//! The part of ONNX that a convolutional network needs, written as its `onnx.proto` defines it (IR version 8, operator
//! set 13: what mobile and browser runtimes of recent years read).

use prost::Message;
use proto::onnx::attribute_proto::AttributeType;
use proto::onnx::tensor_proto::DataType;
use proto::onnx::tensor_shape_proto::dimension;
use proto::onnx::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto, TensorProto,
    TensorShapeProto, TypeProto, ValueInfoProto, tensor_shape_proto, type_proto,
};
use tch::{Kind, Tensor};

const IR_VERSION: i64 = 8;
const OPERATOR_SET: i64 = 13;

/// A graph that grows node by node; values are known by name, and each node has one output.
#[derive(Debug)]
pub(crate) struct Graph(GraphProto);

/// One attribute of a node.
#[derive(Debug, Clone)]
pub(crate) enum Attribute {
    Int(i64),
    Ints(Vec<i64>),
}

/// A dimension of an input or output: a number, or a name where any number is right.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Dimension {
    Of(i64),
    Any(&'static str),
}

impl Graph {
    pub(crate) fn new(name: &str) -> Self {
        Self(GraphProto { name: name.to_owned(), ..GraphProto::default() })
    }

    /// Declares an input of f32.
    pub(crate) fn input(&mut self, name: &str, shape: &[Dimension]) -> String {
        self.0.input.push(value_info(name, shape));
        name.to_owned()
    }

    /// Declares a value as an output of f32.
    pub(crate) fn output(&mut self, name: &str, shape: &[Dimension]) {
        self.0.output.push(value_info(name, shape));
    }

    /// Adds a constant, as f32.
    ///
    /// # Errors
    /// If the tensor cannot be read.
    pub(crate) fn constant(&mut self, name: &str, tensor: &Tensor) -> Result<String, tch::TchError> {
        let tensor = tensor.f_to_device(tch::Device::Cpu)?.f_to_kind(Kind::Float)?.f_contiguous()?;
        let mut raw_data = vec![0; tensor.numel() * 4];
        tensor.f_copy_data_u8(&mut raw_data, tensor.numel())?;
        let (dims, name) = (tensor.size(), name.to_owned());
        self.0.initializer.push(TensorProto { dims, data_type: DataType::Float.into(), name: name.clone(), raw_data });
        Ok(name)
    }

    /// Adds a node whose output is called `name`. The node itself is called otherwise, since some runtimes keep both in
    /// one table.
    pub(crate) fn node(
        &mut self,
        operator: &str,
        name: &str,
        inputs: &[&str],
        attributes: &[(&str, Attribute)],
    ) -> String {
        self.0.node.push(NodeProto {
            input: inputs.iter().map(|&input| input.to_owned()).collect(),
            output: vec![name.to_owned()],
            name: format!("{name}.{}", operator.to_lowercase()),
            op_type: operator.to_owned(),
            attribute: attributes.iter().map(|(name, value)| attribute(name, value)).collect(),
        });
        name.to_owned()
    }

    /// The file's bytes, with properties for people and programs.
    pub(crate) fn encode(self, properties: &[(&str, String)]) -> Vec<u8> {
        let property =
            |(key, value): &(&str, String)| StringStringEntryProto { key: (*key).to_owned(), value: value.clone() };
        ModelProto {
            ir_version: IR_VERSION,
            producer_name: "Gleaner".to_owned(),
            producer_version: env!("CARGO_PKG_VERSION").to_owned(),
            graph: Some(self.0),
            opset_import: vec![OperatorSetIdProto { domain: String::new(), version: OPERATOR_SET }],
            metadata_props: properties.iter().map(property).collect(),
        }
        .encode_to_vec()
    }
}

fn attribute(name: &str, value: &Attribute) -> AttributeProto {
    let mut attribute = AttributeProto { name: name.to_owned(), ..AttributeProto::default() };
    match value {
        Attribute::Int(i) => (attribute.r#type, attribute.i) = (AttributeType::Int.into(), *i),
        Attribute::Ints(ints) => (attribute.r#type, attribute.ints) = (AttributeType::Ints.into(), ints.clone()),
    }
    attribute
}

/// A tensor of f32.
fn value_info(name: &str, shape: &[Dimension]) -> ValueInfoProto {
    let dim = |dimension: &Dimension| match *dimension {
        Dimension::Of(value) => dimension::Value::DimValue(value),
        Dimension::Any(name) => dimension::Value::DimParam(name.to_owned()),
    };
    let dim = shape.iter().map(|dimension| tensor_shape_proto::Dimension { value: Some(dim(dimension)) });
    let shape = Some(TensorShapeProto { dim: dim.collect() });
    let tensor = type_proto::Tensor { elem_type: DataType::Float.into(), shape };
    let value = Some(type_proto::Value::TensorType(tensor));
    ValueInfoProto { name: name.to_owned(), r#type: Some(TypeProto { value }) }
}
