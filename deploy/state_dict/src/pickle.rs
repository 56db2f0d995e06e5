//! A reader of pickles that runs nothing: it knows the operations and the names that a saved state dict is made of, and
//! refuses all others. Each operation makes at most one value, and values refer to each other by number, so that no
//! pickle needs more memory than a small multiple of its own length.

use std::collections::HashMap;

use crate::error::{Error, Result, refuse};

/// A longer pickle is refused. That of a state dict has a hundred bytes a tensor, whatever the tensor's size.
const LONGEST: usize = 4 << 20;

/// The kinds of storages: their name in PyTorch, in safetensors, and the bytes of a number.
const KINDS: [Kind; 10] = [
    Kind { torch: "DoubleStorage", safe: Some("F64"), width: 8 },
    Kind { torch: "FloatStorage", safe: Some("F32"), width: 4 },
    Kind { torch: "HalfStorage", safe: Some("F16"), width: 2 },
    Kind { torch: "BFloat16Storage", safe: Some("BF16"), width: 2 },
    Kind { torch: "LongStorage", safe: None, width: 8 },
    Kind { torch: "IntStorage", safe: None, width: 4 },
    Kind { torch: "ShortStorage", safe: None, width: 2 },
    Kind { torch: "CharStorage", safe: None, width: 1 },
    Kind { torch: "ByteStorage", safe: None, width: 1 },
    Kind { torch: "BoolStorage", safe: None, width: 1 },
];

/// What numbers a storage has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kind {
    torch: &'static str,
    /// None: they are no floating-point numbers.
    pub(crate) safe: Option<&'static str>,
    pub(crate) width: usize,
}

/// A part of a storage, seen as a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tensor<'a> {
    pub(crate) kind: Kind,
    /// The name of its storage.
    pub(crate) storage: &'a str,
    /// Numbers of that before the tensor's first.
    pub(crate) offset: usize,
    pub(crate) shape: Vec<usize>,
    /// How many numbers further the next one is, for each dimension.
    pub(crate) strides: Vec<usize>,
}

/// What is on the stack. Numbers are places in the lists of [`Pickle`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Value<'a> {
    /// Something that is part of no tensor: None, fractions, lists.
    Other,
    Bool(bool),
    Int(i64),
    Text(&'a str),
    Tuple(usize),
    Dict(usize),
    Storage(Kind, &'a str),
    Tensor(usize),
    Global(Global),
}

/// What a pickle may refer to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(Kind),
}

/// What pickles have made.
#[derive(Debug, Default)]
pub(crate) struct Pickle<'a> {
    stack: Vec<Value<'a>>,
    marks: Vec<usize>,
    memo: HashMap<u32, Value<'a>>,
    tuples: Vec<Vec<Value<'a>>>,
    dicts: Vec<Vec<(Value<'a>, Value<'a>)>>,
    tensors: Vec<Tensor<'a>>,
    /// The storages that were named.
    storages: HashMap<&'a str, Kind>,
    /// What was put into lists by the pickle that is being read.
    appended: Vec<Value<'a>>,
}

impl<'a> Pickle<'a> {
    /// Reads one pickle, and moves `bytes` behind it.
    pub(crate) fn read(&mut self, bytes: &mut &'a [u8]) -> Result<Value<'a>> {
        (self.stack, self.marks, self.memo) = Default::default();
        self.appended.clear();
        let mut from = Source { bytes: &bytes[..bytes.len().min(LONGEST)] };
        let length = from.bytes.len();
        while !self.step(&mut from)? {}
        *bytes = &bytes[length - from.bytes.len()..];
        self.pop()
    }

    /// Reads one pickle of a list of texts.
    pub(crate) fn texts(&mut self, bytes: &mut &'a [u8]) -> Result<Vec<&'a str>> {
        self.read(bytes)?;
        let text = |value| if let Value::Text(text) = value { Ok(text) } else { Err(strange()) };
        self.appended.drain(..).map(text).collect()
    }

    /// The entries of a dict.
    pub(crate) fn dict(&self, dict: usize) -> &[(Value<'a>, Value<'a>)] {
        &self.dicts[dict]
    }

    /// A tensor.
    pub(crate) fn tensor(&self, tensor: usize) -> &Tensor<'a> {
        &self.tensors[tensor]
    }

    /// The numbers of a storage that was named.
    pub(crate) fn kind(&self, storage: &str) -> Option<Kind> {
        self.storages.get(storage).copied()
    }

    /// Does the next operation. True: it was the last.
    fn step(&mut self, from: &mut Source<'a>) -> Result<bool> {
        let [operation] = from.array()?;
        let value = match operation {
            b'.' => return Ok(true),
            0x80 => match from.array()? {
                [0..=2] => return Ok(false),
                [version] => return refuse(format!("was saved with pickle_protocol {version}: 2 is read")),
            },
            b'(' => {
                self.marks.push(self.stack.len());
                return Ok(false);
            }
            b'q' => return self.remember(u8::from_le_bytes(from.array()?).into()),
            b'r' => return self.remember(u32::from_le_bytes(from.array()?)),
            b'h' => self.recall(u8::from_le_bytes(from.array()?).into())?,
            b'j' => self.recall(u32::from_le_bytes(from.array()?))?,
            b'N' | b']' => Value::Other,
            b'G' => from.array::<8>().map(|_| Value::Other)?,
            0x88 => Value::Bool(true),
            0x89 => Value::Bool(false),
            b'K' => Value::Int(u8::from_le_bytes(from.array()?).into()),
            b'M' => Value::Int(u16::from_le_bytes(from.array()?).into()),
            b'J' => Value::Int(i32::from_le_bytes(from.array()?).into()),
            0x8a => from.long()?,
            b'X' => {
                let length = u32::from_le_bytes(from.array()?);
                from.text(length as usize)?
            }
            b'U' => {
                let [length] = from.array()?;
                from.text(length.into())?
            }
            b')' => self.tuple(0)?,
            0x85..=0x87 => self.tuple(usize::from(operation - 0x84))?,
            b't' => {
                let count = self.above_mark()?;
                self.tuple(count)?
            }
            b'}' => self.new_dict(),
            b's' => return self.set(2),
            b'u' => {
                let count = self.above_mark()?;
                return self.set(count);
            }
            b'a' => return self.append(1),
            b'e' => {
                let count = self.above_mark()?;
                return self.append(count);
            }
            // What is set of an object beside its entries, as the versions of its layers.
            b'b' => {
                self.pop()?;
                let is_dict = matches!(self.stack.last(), Some(Value::Dict(_)));
                return if is_dict { Ok(false) } else { Err(strange()) };
            }
            b'c' => {
                let (module, name) = (from.line()?, from.line()?);
                Value::Global(Global::of(module, name)?)
            }
            b'Q' => {
                let id = self.pop()?;
                self.storage(id)?
            }
            b'R' => {
                let (arguments, function) = (self.pop()?, self.pop()?);
                self.call(function, arguments)?
            }
            _ => {
                return refuse(format!("uses the operation 0x{operation:02x} of pickles, which no state dict needs"));
            }
        };
        self.stack.push(value);
        Ok(false)
    }

    fn pop(&mut self) -> Result<Value<'a>> {
        // What is below the last mark belongs to somebody else.
        if self.marks.last().is_some_and(|mark| *mark >= self.stack.len()) {
            return Err(strange());
        }
        self.stack.pop().ok_or_else(strange)
    }

    fn remember(&mut self, place: u32) -> Result<bool> {
        let value = *self.stack.last().ok_or_else(strange)?;
        self.memo.insert(place, value);
        Ok(false)
    }

    fn recall(&self, place: u32) -> Result<Value<'a>> {
        self.memo.get(&place).copied().ok_or_else(strange)
    }

    /// How many values there are since the last mark, which is taken away.
    fn above_mark(&mut self) -> Result<usize> {
        let mark = self.marks.pop().ok_or_else(strange)?;
        self.stack.len().checked_sub(mark).ok_or_else(strange)
    }

    /// Takes so many values off the stack.
    fn take(&mut self, count: usize) -> Result<Vec<Value<'a>>> {
        let first = self.stack.len().checked_sub(count).ok_or_else(strange)?;
        Ok(self.stack.split_off(first))
    }

    fn tuple(&mut self, count: usize) -> Result<Value<'a>> {
        let values = self.take(count)?;
        self.tuples.push(values);
        Ok(Value::Tuple(self.tuples.len() - 1))
    }

    fn new_dict(&mut self) -> Value<'a> {
        self.dicts.push(Vec::new());
        Value::Dict(self.dicts.len() - 1)
    }

    /// Puts the topmost values, of which every second is a key, into the dict below them.
    fn set(&mut self, count: usize) -> Result<bool> {
        let values = self.take(count)?;
        let (pairs, rest) = values.as_chunks::<2>();
        match self.stack.last() {
            Some(Value::Dict(dict)) if rest.is_empty() => {
                self.dicts[*dict].extend(pairs.iter().map(|[key, value]| (*key, *value)));
                Ok(false)
            }
            _ => Err(strange()),
        }
    }

    /// Puts the topmost values into the list below them. Which list that was is forgotten.
    fn append(&mut self, count: usize) -> Result<bool> {
        let values = self.take(count)?;
        match self.stack.last() {
            Some(Value::Other) => {
                self.appended.extend(values);
                Ok(false)
            }
            _ => Err(strange()),
        }
    }

    fn arguments(&self, tuple: Value<'a>) -> Result<&[Value<'a>]> {
        if let Value::Tuple(place) = tuple { Ok(&self.tuples[place]) } else { Err(strange()) }
    }

    /// `("storage", kind, name, device, numbers)`, before 1.6 with None or the part of another storage that it is.
    fn storage(&mut self, id: Value<'a>) -> Result<Value<'a>> {
        use Value::{Global, Int, Other, Text};
        match *self.arguments(id)? {
            [Text("storage"), Global(self::Global::Storage(kind)), Text(name), Text(_), Int(_)]
            | [Text("storage"), Global(self::Global::Storage(kind)), Text(name), Text(_), Int(_), Other] => {
                // Tensors say how they see a storage, which is as its numbers are.
                if *self.storages.entry(name).or_insert(kind) != kind {
                    return Err(strange());
                }
                Ok(Value::Storage(kind, name))
            }
            _ => Err(strange()),
        }
    }

    fn call(&mut self, function: Value<'a>, arguments: Value<'a>) -> Result<Value<'a>> {
        let Value::Global(function) = function else { return Err(strange()) };
        let arguments = self.arguments(arguments)?;
        match (function, arguments) {
            (Global::OrderedDict, []) => Ok(self.new_dict()),
            (Global::RebuildParameter, [tensor @ Value::Tensor(_), ..]) => Ok(*tensor),
            (Global::RebuildTensor, &[Value::Storage(kind, storage), Value::Int(offset), shape, strides, ..]) => {
                let sizes = |tuple| {
                    let size = |value: &Value<'_>| match value {
                        Value::Int(size) => usize::try_from(*size).map_err(|_| strange()),
                        _ => Err(strange()),
                    };
                    self.arguments(tuple)?.iter().map(size).collect::<Result<Vec<_>>>()
                };
                let (shape, strides) = (sizes(shape)?, sizes(strides)?);
                let offset = usize::try_from(offset).map_err(|_| strange())?;
                self.tensors.push(Tensor { kind, storage, offset, shape, strides });
                Ok(Value::Tensor(self.tensors.len() - 1))
            }
            _ => Err(strange()),
        }
    }
}

impl Global {
    fn of(module: &str, name: &str) -> Result<Self> {
        match (module, name) {
            ("collections", "OrderedDict") => Ok(Self::OrderedDict),
            ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => Ok(Self::RebuildTensor),
            ("torch._utils", "_rebuild_parameter") => Ok(Self::RebuildParameter),
            _ => {
                let kind = KINDS.iter().find(|kind| module == "torch" && kind.torch == name);
                kind.map(|kind| Self::Storage(*kind)).ok_or_else(|| {
                    let name = format!("{module}.{name}");
                    Error(format!("refers to {name:?}, which no state dict needs: was a whole network saved?"))
                })
            }
        }
    }
}

/// The bytes of a pickle that are left.
struct Source<'a> {
    bytes: &'a [u8],
}

impl<'a> Source<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.bytes.split_at_checked(count).ok_or_else(|| {
            Error(format!("has a pickle that does not end, or that is longer than {} MiB", LONGEST >> 20))
        })?;
        self.bytes = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        self.take(N)?.try_into().map_err(|_| strange())
    }

    fn text(&mut self, length: usize) -> Result<Value<'a>> {
        std::str::from_utf8(self.take(length)?).map(Value::Text).map_err(|_| strange())
    }

    /// An integer of any length; one that does not fit is part of no tensor.
    fn long(&mut self) -> Result<Value<'a>> {
        let [length] = self.array()?;
        let bytes = self.take(length.into())?;
        if bytes.len() > 8 {
            return Ok(Value::Other);
        }
        let is_negative = bytes.last().is_some_and(|last| *last >= 0x80);
        let mut whole = [if is_negative { 0xff } else { 0 }; 8];
        whole[..bytes.len()].copy_from_slice(bytes);
        Ok(Value::Int(i64::from_le_bytes(whole)))
    }

    fn line(&mut self) -> Result<&'a str> {
        let length = self.bytes.iter().take(1000).position(|byte| *byte == b'\n').ok_or_else(strange)?;
        let line = self.take(length + 1)?;
        std::str::from_utf8(&line[..length]).map_err(|_| strange())
    }
}

fn strange() -> Error {
    Error("has a pickle that is not put together as state dicts are".to_owned())
}
