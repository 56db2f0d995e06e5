//! Computing in smaller numbers.

use std::ffi::c_int;

use tch::{Device, Kind};

use super::error::Result;
use super::ffi::{self, check};

/// Numbers of 16 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Half {
    /// IEEE's: 11 significant bits, up to 65504.
    Fp16 = 1,
    /// 8 significant bits, the range of f32.
    Bf16 = 2,
}

impl Half {
    /// libtorch's name of them.
    pub(crate) fn kind(self) -> Kind {
        match self {
            Self::Fp16 => Kind::Half,
            Self::Bf16 => Kind::BFloat16,
        }
    }
}

pub(super) fn code(half: Option<Half>) -> c_int {
    half.map_or(0, |half| half as c_int)
}

/// What `work` computes on this thread is computed in smaller numbers where that does little harm (convolutions, matrix
/// products), as PyTorch's autocast has it.
pub(crate) fn autocast<T>(device: Device, kind: Half, work: impl FnOnce() -> T) -> Result<T> {
    struct Off(c_int);
    impl Drop for Off {
        fn drop(&mut self) {
            // SAFETY: takes no pointers. It cannot fail for a device for which it was just turned on.
            let _ = check(unsafe { ffi::c10d_autocast(self.0, 0) });
        }
    }
    let cuda = c_int::from(device.is_cuda());
    // SAFETY: takes no pointers.
    check(unsafe { ffi::c10d_autocast(cuda, kind as c_int) })?;
    let _off = Off(cuda);
    Ok(work())
}
