//! Memory of tensors as slices, so that it is filled in place and by several threads.

use std::ffi::c_int;
use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};

use tch::{Device, Kind, Tensor};

use super::error::Result;
use super::ffi::{self, check};
use super::graph::is_recording;

/// Names and tensors that share memory with their owner, in an order that is the same on every rank.
pub(crate) type Named = Vec<(String, Tensor)>;

/// The same [samples, channels, height, width] with the channels of each pixel beside each other in memory (NHWC,
/// "channels last"): itself if they are.
pub(crate) fn nhwc(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.f_permute([0, 2, 3, 1])?.f_contiguous()?.f_permute([0, 3, 1, 2])?)
}

/// A number that a tensor can hold.
pub(crate) trait Element: Copy + Send + Sync + 'static {
    /// libtorch's name for it.
    const KIND: Kind;
}

impl Element for f32 {
    const KIND: Kind = Kind::Float;
}

impl Element for f64 {
    const KIND: Kind = Kind::Double;
}

/// A new tensor in the CPU's memory, of which `fill` writes every element, in the order in which they lie.
pub(crate) fn filled<T: Element>(shape: &[i64], fill: impl FnOnce(&mut [MaybeUninit<T>])) -> Tensor {
    debug_assert!(!is_recording(), "a recording has nothing of the host");
    let tensor = Tensor::empty(shape, (T::KIND, Device::Cpu));
    // SAFETY: a new tensor is contiguous and of this kind, nothing else refers to its memory yet, and `tensor` keeps it
    // alive.
    fill(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), tensor.numel()) });
    tensor
}

/// Calls `read` with the elements of a contiguous tensor of bytes in the CPU's memory.
pub(crate) fn bytes<R>(tensor: &Tensor, read: impl FnOnce(&[u8]) -> R) -> R {
    assert!(tensor.kind() == Kind::Uint8 && tensor.device() == Device::Cpu && tensor.is_contiguous());
    // SAFETY: kind, place and layout were checked, and `tensor` keeps the memory alive. Who writes to a tensor's memory
    // holds it as chunks, before there is a tensor to read.
    read(unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), tensor.numel()) })
}

/// The same on a device. A GPU copies it by itself, in its turn: nobody waits for that.
pub(crate) fn sent(tensor: &Tensor, device: Device) -> Result<Tensor> {
    debug_assert!(!is_recording(), "a recording has nothing of the host");
    if !device.is_cuda() || tensor.device() == device {
        return Ok(tensor.f_to_device(device)?);
    }
    Ok(staged(tensor, device)?.f_to_device_(device, tensor.kind(), true, false)?)
}

/// The same in memory from which a device copies by itself, if it is a GPU.
pub(crate) fn staged(tensor: &Tensor, device: Device) -> Result<Tensor> {
    if !device.is_cuda() {
        return Ok(tensor.shallow_clone());
    }
    let bytes = tensor.numel() * tensor.kind().elt_size_in_bytes();
    copied_to(&pinned(&[bytes as i64])?, tensor)
}

/// A copy in this memory, which is as long.
fn copied_to(bytes: &Tensor, tensor: &Tensor) -> Result<Tensor> {
    let mut copy = bytes.f_view_dtype(tensor.kind())?.f_view(tensor.size().as_slice())?;
    copy.f_copy_(tensor)?;
    Ok(copy)
}

/// So many bytes in a device's memory, not filled; None if a GPU would not have `spare` bytes left beside them.
pub(crate) fn reserved(bytes: i64, spare: i64, device: Device) -> Result<Option<Tensor>> {
    let Device::Cuda(index) = device else {
        return Ok(Some(Tensor::f_empty([bytes], (Kind::Uint8, device))?));
    };
    let mut raw = std::ptr::null_mut();
    // SAFETY: `raw` outlives the call.
    check(unsafe { ffi::c10d_empty_cuda(index as c_int, bytes, spare, &raw mut raw) })?;
    // SAFETY: a new tensor, which is this one's alone.
    Ok((!raw.is_null()).then(|| unsafe { Tensor::from_ptr(raw.cast()) }))
}

/// These bytes on a device. A GPU copies them by itself, in its turn: nobody waits for that.
pub(crate) fn sent_bytes(bytes: &[u8], device: Device) -> Result<Tensor> {
    let mut slab = Slab::new(&[bytes.len() as i64], device)?;
    slab.chunk(bytes.len()).copy_from_slice(bytes);
    Ok(slab.tensor.f_to_device_(device, Kind::Uint8, true, false)?)
}

/// A tensor of bytes that is still being given out in chunks, one after the other.
#[derive(Debug)]
pub(crate) struct Slab {
    tensor: Tensor,
    given: usize,
}

/// A part of a [`Slab`], to be written on any thread.
#[derive(Debug)]
pub(crate) struct Chunk {
    start: *mut u8,
    length: usize,
    tensor: Tensor,
}

// SAFETY: a chunk is the only way to its part of the memory, as `&mut` would be, and its handle on the tensor counts
// atomically.
unsafe impl Send for Chunk {}

impl Slab {
    /// Of this shape, in memory from which a device copies by itself if there is one.
    pub(crate) fn new(shape: &[i64], device: Device) -> Result<Self> {
        let tensor = match device.is_cuda() {
            true => pinned(shape)?,
            false => Tensor::f_empty(shape, (Kind::Uint8, Device::Cpu))?,
        };
        Ok(Self { tensor, given: 0 })
    }

    /// The next `length` bytes.
    pub(crate) fn chunk(&mut self, length: usize) -> Chunk {
        assert!(self.given + length <= self.tensor.numel(), "a slab is given out once");
        // SAFETY: the sum stays within the tensor's memory.
        let start = unsafe { self.tensor.data_ptr().cast::<u8>().add(self.given) };
        self.given += length;
        Chunk { start, length, tensor: self.tensor.shallow_clone() }
    }
}

fn pinned(shape: &[i64]) -> Result<Tensor> {
    let mut raw = std::ptr::null_mut();
    // SAFETY: the shape is as long as it is said, and both outlive the call.
    check(unsafe { ffi::c10d_empty_pinned(shape.as_ptr(), shape.len(), &raw mut raw) })?;
    // SAFETY: a new tensor, which is this one's alone.
    Ok(unsafe { Tensor::from_ptr(raw.cast()) })
}

impl Chunk {
    /// The first rows of the tensor whose chunks these are: all chunks of these rows, so that nobody is left who writes
    /// to them.
    pub(crate) fn join(mut chunks: Vec<Self>) -> Option<Tensor> {
        chunks.sort_by_key(|chunk| chunk.start);
        let tensor = chunks.first()?.tensor.shallow_clone();
        let begin = tensor.data_ptr().cast::<u8>();
        let mut joined = 0;
        for chunk in &chunks {
            if chunk.start != begin.wrapping_add(joined) {
                return None;
            }
            joined += chunk.length;
        }
        let row = tensor.numel() / (tensor.size()[0] as usize).max(1);
        (joined % row.max(1) == 0).then(|| tensor.narrow(0, 0, (joined / row.max(1)) as i64))
    }
}

impl Deref for Chunk {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the chunk's own part of memory that its tensor keeps alive.
        unsafe { std::slice::from_raw_parts(self.start, self.length) }
    }
}

impl DerefMut for Chunk {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and nobody else holds this part. What nobody has written yet is as C++ left it, and any
        // byte is a `u8`.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.length) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_that_are_filled_on_other_threads_are_the_first_rows_of_one_tensor_again() {
        let mut slab = Slab::new(&[5, 2], Device::Cpu).expect("ten bytes");
        let (mut first, mut second, third) = (slab.chunk(4), slab.chunk(2), slab.chunk(4));
        std::thread::scope(|scope| {
            scope.spawn(|| first.fill(1));
            scope.spawn(|| second.fill(2));
        });
        assert!(Chunk::join(vec![third]).is_none(), "others may still write before it");
        let tensor = Chunk::join(vec![second, first]).expect("all of them");
        assert_eq!(bytes(&tensor, <[u8]>::to_vec), [1, 1, 1, 1, 2, 2]);
        assert_eq!(tensor.size(), [3, 2]);
        let whole = Slab::new(&[5, 2], Device::Cpu).expect("ten bytes").chunk(10);
        assert_eq!(Chunk::join(vec![whole]).expect("all of them").size(), [5, 2]);
    }

    #[test]
    fn what_is_sent_is_the_same_in_other_memory() {
        let numbers = Tensor::from_slice(&[1_i64, -2, i64::MAX, 4, 5, 6]).view([3, 2]);
        let part = numbers.narrow(1, 1, 1);
        let bytes = Tensor::zeros([3 * 8], (Kind::Uint8, Device::Cpu));
        let copy = copied_to(&bytes, &part).expect("it is as long");
        assert_eq!((&copy, copy.data_ptr()), (&part, bytes.data_ptr()));
        assert_eq!(sent(&part, Device::Cpu).expect("it is there already"), part);
    }

    #[test]
    fn what_is_filled_is_what_the_tensor_holds() {
        let tensor = filled(&[2, 2], |values: &mut [MaybeUninit<f64>]| {
            for (place, value) in values.iter_mut().zip([1.0, 2.0, 3.0, 4.0]) {
                place.write(value);
            }
        });
        assert_eq!(tensor, Tensor::from_slice(&[1.0, 2.0, 3.0, 4.0]).view([2, 2]));
    }
}
