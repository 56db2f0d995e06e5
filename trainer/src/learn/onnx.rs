//! The part of ONNX that a convolutional network needs, written as its `onnx.proto` defines it (IR version 8, operator set 13: what mobile
//! and browser runtimes of recent years read).

use prost::Message;
use tch::{Kind, Tensor};

const IR_VERSION: i64 = 8;
const OPERATOR_SET: i64 = 13;
/// `TensorProto.DataType`.
const FLOAT: i32 = 1;

/// A graph that grows node by node; values are known by name, and each node has one output, of the node's own name.
#[derive(Debug)]
pub(crate) struct Graph(GraphProto);

/// One attribute of a node.
#[derive(Debug, Clone)]
pub(crate) enum Attribute {
    Float(f32),
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
        self.0.input.push(ValueInfoProto::new(name, shape));
        name.to_owned()
    }

    /// Declares a value as an output of f32.
    pub(crate) fn output(&mut self, name: &str, shape: &[Dimension]) {
        self.0.output.push(ValueInfoProto::new(name, shape));
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
        self.0.initializer.push(TensorProto { dims, data_type: FLOAT, name: name.clone(), raw_data });
        Ok(name)
    }

    /// Adds a node; `name` is also that of its output.
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
            name: name.to_owned(),
            op_type: operator.to_owned(),
            attribute: attributes.iter().map(|(name, value)| AttributeProto::new(name, value)).collect(),
        });
        name.to_owned()
    }

    /// The file's bytes, with properties for people and programs.
    pub(crate) fn encode(self, properties: &[(&str, String)]) -> Vec<u8> {
        let property = |(key, value): &(&str, String)| Property { key: (*key).to_owned(), value: value.clone() };
        ModelProto {
            ir_version: IR_VERSION,
            producer_name: "Gleaner".to_owned(),
            producer_version: env!("CARGO_PKG_VERSION").to_owned(),
            graph: Some(self.0),
            opset_import: vec![OperatorSetId { domain: String::new(), version: OPERATOR_SET }],
            metadata_props: properties.iter().map(property).collect(),
        }
        .encode_to_vec()
    }
}

#[derive(Clone, PartialEq, Message)]
struct ModelProto {
    #[prost(int64, tag = "1")]
    ir_version: i64,
    #[prost(string, tag = "2")]
    producer_name: String,
    #[prost(string, tag = "3")]
    producer_version: String,
    #[prost(message, optional, tag = "7")]
    graph: Option<GraphProto>,
    #[prost(message, repeated, tag = "8")]
    opset_import: Vec<OperatorSetId>,
    #[prost(message, repeated, tag = "14")]
    metadata_props: Vec<Property>,
}

#[derive(Clone, PartialEq, Message)]
struct OperatorSetId {
    #[prost(string, tag = "1")]
    domain: String,
    #[prost(int64, tag = "2")]
    version: i64,
}

/// `StringStringEntryProto`.
#[derive(Clone, PartialEq, Message)]
struct Property {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(string, tag = "2")]
    value: String,
}

#[derive(Clone, PartialEq, Message)]
struct GraphProto {
    #[prost(message, repeated, tag = "1")]
    node: Vec<NodeProto>,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(message, repeated, tag = "5")]
    initializer: Vec<TensorProto>,
    #[prost(message, repeated, tag = "11")]
    input: Vec<ValueInfoProto>,
    #[prost(message, repeated, tag = "12")]
    output: Vec<ValueInfoProto>,
}

#[derive(Clone, PartialEq, Message)]
struct NodeProto {
    #[prost(string, repeated, tag = "1")]
    input: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    output: Vec<String>,
    #[prost(string, tag = "3")]
    name: String,
    #[prost(string, tag = "4")]
    op_type: String,
    #[prost(message, repeated, tag = "5")]
    attribute: Vec<AttributeProto>,
}

#[derive(Clone, PartialEq, Message)]
struct AttributeProto {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(float, tag = "2")]
    f: f32,
    #[prost(int64, tag = "3")]
    i: i64,
    #[prost(int64, repeated, packed = "false", tag = "8")]
    ints: Vec<i64>,
    /// `AttributeType`: 1 f, 2 i, 7 ints.
    #[prost(int32, tag = "20")]
    r#type: i32,
}

impl AttributeProto {
    fn new(name: &str, value: &Attribute) -> Self {
        let name = name.to_owned();
        match value {
            Attribute::Float(f) => Self { name, f: *f, r#type: 1, ..Self::default() },
            Attribute::Int(i) => Self { name, i: *i, r#type: 2, ..Self::default() },
            Attribute::Ints(ints) => Self { name, ints: ints.clone(), r#type: 7, ..Self::default() },
        }
    }
}

#[derive(Clone, PartialEq, Message)]
struct TensorProto {
    #[prost(int64, repeated, packed = "false", tag = "1")]
    dims: Vec<i64>,
    #[prost(int32, tag = "2")]
    data_type: i32,
    #[prost(string, tag = "8")]
    name: String,
    /// Little-endian.
    #[prost(bytes = "vec", tag = "9")]
    raw_data: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct ValueInfoProto {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    r#type: Option<TypeProto>,
}

impl ValueInfoProto {
    fn new(name: &str, shape: &[Dimension]) -> Self {
        let dim = |dimension: &Dimension| match *dimension {
            Dimension::Of(value) => DimensionProto { dim_value: Some(value), dim_param: None },
            Dimension::Any(name) => DimensionProto { dim_value: None, dim_param: Some(name.to_owned()) },
        };
        let shape = ShapeProto { dim: shape.iter().map(dim).collect() };
        let tensor = TensorTypeProto { elem_type: FLOAT, shape: Some(shape) };
        Self { name: name.to_owned(), r#type: Some(TypeProto { tensor_type: Some(tensor) }) }
    }
}

#[derive(Clone, PartialEq, Message)]
struct TypeProto {
    #[prost(message, optional, tag = "1")]
    tensor_type: Option<TensorTypeProto>,
}

/// `TypeProto.Tensor`.
#[derive(Clone, PartialEq, Message)]
struct TensorTypeProto {
    #[prost(int32, tag = "1")]
    elem_type: i32,
    #[prost(message, optional, tag = "2")]
    shape: Option<ShapeProto>,
}

/// `TensorShapeProto`.
#[derive(Clone, PartialEq, Message)]
struct ShapeProto {
    #[prost(message, repeated, tag = "1")]
    dim: Vec<DimensionProto>,
}

/// `TensorShapeProto.Dimension`.
#[derive(Clone, PartialEq, Message)]
struct DimensionProto {
    #[prost(int64, optional, tag = "1")]
    dim_value: Option<i64>,
    #[prost(string, optional, tag = "2")]
    dim_param: Option<String>,
}
