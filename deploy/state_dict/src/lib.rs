//! State dicts as `torch.save` writes them, made safetensors files. A pickle is a program for a machine that can call
//! whatever it names; here it is read by one (`pickle`) that knows the few operations and names of which state dicts
//! are made, and that runs nothing. The storages lie in a `zip` file, or, before PyTorch 1.6, behind the pickle.

mod error;
mod pickle;
mod zip;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};

use serde_json::{Map, json};

pub use crate::error::Error;
use crate::error::{Result, refuse};
use crate::pickle::{Pickle, Tensor, Value};
use crate::zip::Zip;

/// What PyTorch wrote before its version 1.6 begins with this number and this version, both pickled.
const LEGACY: &[u8] = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.";

/// Under these names checkpoints have the state dict of their network beside whatever else they have.
const WITHIN: [&str; 3] = ["state_dict", "model_state_dict", "model"];

/// Tensors may share storages, so that together they may have more bytes than the file, but not more than so many times
/// as many.
const MOST: usize = 4;

/// A tensor of more is refused.
const DIMENSIONS: usize = 16;

/// A network's tensors by name.
type Tensors<'p, 'a> = BTreeMap<String, &'p Tensor<'a>>;

/// A state dict in the format of safetensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Converted {
    /// The file.
    pub safetensors: Vec<u8>,
    /// The names of what is not in it: what is no tensor of floating-point numbers.
    pub left_out: Vec<String>,
}

/// Makes a safetensors file of one by PyTorch: a state dict, or a checkpoint that has one. Of the names of its tensors
/// the parts `module`, which `DataParallel` puts there, are left out.
///
/// # Errors
/// If the file is none, is damaged, or has anything in it that no state dict needs.
pub fn convert(file: &[u8]) -> std::result::Result<Converted, Error> {
    let mut pickle = Pickle::default();
    let (root, storages) = if file.starts_with(zip::SIGNATURE) {
        let zip = Zip::read(file)?;
        let folder = folder(&zip)?;
        if let Some(order) = zip.bytes(&format!("{folder}/byteorder"))?
            && order != b"little"
        {
            return refuse("was saved on a machine that puts the highest byte of a number first");
        }
        let mut bytes = zip.bytes(&format!("{folder}/data.pkl"))?.unwrap_or_default();
        (pickle.read(&mut bytes)?, Storages::Zipped { zip, folder })
    } else if let Some(mut bytes) = file.strip_prefix(LEGACY) {
        // What machine wrote it; those that put the highest byte first were hardly there.
        pickle.read(&mut bytes)?;
        let root = pickle.read(&mut bytes)?;
        let keys = pickle.texts(&mut bytes)?;
        (root, Storages::Behind { keys, bytes })
    } else {
        return refuse("is no file by torch.save");
    };
    let (tensors, left_out) = tensors(&pickle, root)?;
    let storages = storages.find(&pickle, &tensors)?;
    write(&tensors, &storages, MOST * file.len()).map(|safetensors| Converted { safetensors, left_out })
}

/// The folder in which all entries lie.
fn folder<'a>(zip: &Zip<'a>) -> Result<&'a str> {
    let mut folders = zip.names().filter_map(|name| name.strip_suffix("/data.pkl")).filter(|name| !name.contains('/'));
    let (Some(folder), None) = (folders.next(), folders.next()) else {
        return refuse("is a zip file, but none by torch.save");
    };
    if zip.names().any(|name| name.starts_with(folder) && name[folder.len()..].starts_with("/code/")) {
        return refuse("is a TorchScript program: save its state_dict()");
    }
    Ok(folder)
}

/// A network's tensors by name, and the names of what else there is.
fn tensors<'p, 'a>(pickle: &'p Pickle<'a>, root: Value<'a>) -> Result<(Tensors<'p, 'a>, Vec<String>)> {
    let Value::Dict(root) = root else { return refuse("has no state dict in it: was a single tensor saved?") };
    let within = |name: &str| {
        let mut entries = pickle.dict(root).iter();
        entries.find_map(|entry| match entry {
            (Value::Text(key), Value::Dict(dict)) if *key == name => Some(*dict),
            _ => None,
        })
    };
    let dict = WITHIN.into_iter().find_map(within).unwrap_or(root);
    let (mut tensors, mut left_out) = (BTreeMap::new(), Vec::new());
    for (key, value) in pickle.dict(dict) {
        let Value::Text(key) = key else { return refuse("has no state dict in it: its keys are no names") };
        let name = key.split('.').filter(|part| *part != "module").collect::<Vec<_>>().join(".");
        match value {
            Value::Tensor(tensor) if pickle.tensor(*tensor).kind.safe.is_some() => {
                if tensors.insert(name, pickle.tensor(*tensor)).is_some() {
                    return refuse(format!("has two tensors of the name {key:?}"));
                }
            }
            _ => left_out.push(name),
        }
    }
    if tensors.is_empty() {
        return refuse("has no state dict in it: none of its entries is a tensor of floating-point numbers");
    }
    Ok((tensors, left_out))
}

/// Where storages are.
enum Storages<'a> {
    Zipped { zip: Zip<'a>, folder: &'a str },
    Behind { keys: Vec<&'a str>, bytes: &'a [u8] },
}

impl<'a> Storages<'a> {
    /// The bytes of all storages that the tensors need.
    fn find(self, pickle: &Pickle<'a>, tensors: &Tensors<'_, 'a>) -> Result<HashMap<&'a str, &'a [u8]>> {
        let mut found = HashMap::new();
        match self {
            Self::Zipped { zip, folder } => {
                for tensor in tensors.values() {
                    if !found.contains_key(tensor.storage) {
                        let bytes = zip.bytes(&format!("{folder}/data/{}", tensor.storage))?;
                        found.extend(bytes.map(|bytes| (tensor.storage, bytes)));
                    }
                }
            }
            Self::Behind { keys, mut bytes } => {
                // Each begins with how many numbers it has.
                for key in keys {
                    let storage = bytes.split_first_chunk().and_then(|(numbers, rest)| {
                        let numbers = usize::try_from(i64::from_le_bytes(*numbers)).ok()?;
                        rest.split_at_checked(numbers.checked_mul(pickle.kind(key)?.width)?)
                    });
                    let Some((storage, rest)) = storage else { return refuse("ends too early: is it all there?") };
                    found.insert(key, storage);
                    bytes = rest;
                }
            }
        }
        Ok(found)
    }
}

/// The tensors as a safetensors file, which may have so many bytes beside its head.
fn write(tensors: &Tensors<'_, '_>, storages: &HashMap<&str, &[u8]>, most: usize) -> Result<Vec<u8>> {
    let of = |name: &str, Error(what)| Error(format!("has a tensor {name:?} that {what}"));
    let (mut head, mut end) = (Map::new(), 0);
    for (name, tensor) in tensors {
        let begin = end;
        end += bytes(tensor, most - begin).map_err(|error| of(name, error))?;
        let entry = json!({"dtype": tensor.kind.safe, "shape": tensor.shape, "data_offsets": [begin, end]});
        head.insert(name.clone(), entry);
    }
    let mut head = serde_json::Value::Object(head).to_string();
    // Whoever maps the file into memory finds numbers at places that are multiples of their length.
    head.extend(std::iter::repeat_n(' ', head.len().next_multiple_of(8) - head.len()));
    let mut file = Vec::with_capacity(8 + head.len() + end);
    file.extend_from_slice(&(head.len() as u64).to_le_bytes());
    file.extend_from_slice(head.as_bytes());
    for (name, tensor) in tensors {
        let storage = storages.get(tensor.storage).copied().unwrap_or_default();
        copy(tensor, storage, &mut file).map_err(|error| of(name, error))?;
    }
    Ok(file)
}

/// How many bytes a tensor's numbers have.
fn bytes(tensor: &Tensor<'_>, most: usize) -> Result<usize> {
    let Tensor { kind, shape, strides, .. } = tensor;
    if shape.len() != strides.len() || shape.len() > DIMENSIONS {
        return refuse(format!("has {} dimensions and {} strides", shape.len(), strides.len()));
    }
    let bytes = shape.iter().try_fold(kind.width, |bytes, size| bytes.checked_mul(*size));
    bytes.filter(|bytes| *bytes <= most).ok_or_else(|| Error("is larger than its file".to_owned()))
}

/// Appends a tensor's numbers in the order of its indices.
fn copy(tensor: &Tensor<'_>, storage: &[u8], to: &mut Vec<u8>) -> Result<()> {
    let Tensor { kind, offset, shape, strides, .. } = tensor;
    if shape.contains(&0) {
        return Ok(());
    }
    let mut sizes = shape.iter().zip(strides);
    let last = sizes.try_fold(*offset, |at, (size, stride)| at.checked_add((size - 1).checked_mul(*stride)?));
    let end = last.and_then(|last| last.checked_add(1)?.checked_mul(kind.width));
    if end.is_none_or(|end| end > storage.len()) {
        return refuse("reaches beyond the end of its storage");
    }
    // From the last dimension on, those that lie one behind the other are copied at once.
    let (mut run, mut outer) = (1, shape.len());
    while outer > 0 && (shape[outer - 1] == 1 || strides[outer - 1] == run) {
        outer -= 1;
        run *= shape[outer];
    }
    let mut index = vec![0; outer];
    loop {
        let at = index.iter().zip(strides).fold(*offset, |at, (index, stride)| at + index * stride);
        to.extend_from_slice(&storage[at * kind.width..(at + run) * kind.width]);
        let Some(next) = (0..outer).rev().find(|dimension| index[*dimension] + 1 < shape[*dimension]) else {
            return Ok(());
        };
        index[next] += 1;
        index[next + 1..].fill(0);
    }
}
