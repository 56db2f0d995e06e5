//! The optimizer's kernel.

use tch::Tensor;

use super::error::{Error, Result};
use super::ffi::{self, check, pointers};

/// One step of SGD with momentum on all parameters in one kernel, as `torch.optim.SGD` counts:
/// m = `momentum` m + (g + `weight_decay` p), p = p - `learning_rate` m. The three lists must be of the same length.
pub(crate) fn fused_sgd(
    parameters: &[Tensor],
    gradients: &[Tensor],
    momenta: &[Tensor],
    learning_rate: f64,
    momentum: f64,
    weight_decay: f64,
) -> Result<()> {
    assert!(parameters.len() == gradients.len() && parameters.len() == momenta.len(), "lists of unequal length");
    let (p, g, m) = (pointers(parameters), pointers(gradients), pointers(momenta));
    // SAFETY: tensors and lists outlive the call, and the lists are of the length that is given.
    check(unsafe {
        ffi::c10d_fused_sgd(p.as_ptr(), g.as_ptr(), m.as_ptr(), p.len(), learning_rate, momentum, weight_decay)
    })
    .map_err(Error::Other)
}
