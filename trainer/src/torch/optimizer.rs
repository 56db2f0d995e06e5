//! Stochastic gradient descent.

use tch::Tensor;

use super::error::{Error, Result};
use super::ffi::{self, check, pointers};
use super::tensor::Named;

/// SGD with momentum and weight decay on all parameters, as `torch.optim.SGD` counts.
#[derive(Debug)]
pub(crate) struct Sgd {
    parameters: Vec<Tensor>,
    momenta: Named,
    momentum: f64,
    weight_decay: f64,
    clip_norm: f64,
}

impl Sgd {
    /// For these parameters, with momenta of zero. Gradients are scaled down to a norm of `clip_norm`, unless that is 0.
    pub(crate) fn new(parameters: Named, momentum: f64, weight_decay: f64, clip_norm: f64) -> Self {
        let momenta = parameters.iter().map(|(name, parameter)| (name.clone(), parameter.detach().zeros_like()));
        let momenta = momenta.collect();
        let parameters = parameters.into_iter().map(|(_, parameter)| parameter).collect();
        Self { parameters, momenta, momentum, weight_decay, clip_norm }
    }

    /// Applies the gradients that the parameters hold, scaled down to the norm's limit if there is one.
    pub(crate) fn step(&mut self, learning_rate: f64) -> Result<()> {
        let gradients: Vec<Tensor> = self.parameters.iter().map(Tensor::grad).collect();
        if self.clip_norm > 0.0 {
            clip(&gradients, self.clip_norm);
        }
        let momenta: Vec<Tensor> = self.momenta.iter().map(|(_, momentum)| momentum.shallow_clone()).collect();
        fused_sgd(&self.parameters, &gradients, &momenta, learning_rate, self.momentum, self.weight_decay)
    }

    /// The momenta by their parameters' names.
    pub(crate) fn momenta(&self) -> Named {
        self.momenta.iter().map(|(name, momentum)| (name.clone(), momentum.shallow_clone())).collect()
    }
}

/// Scales all gradients by one factor so that their common norm is at most `limit`. Without waiting for the device.
fn clip(gradients: &[Tensor], limit: f64) {
    tch::no_grad(|| {
        let norms: Vec<Tensor> = gradients.iter().map(|gradient| gradient.norm()).collect();
        let factor = (limit / (Tensor::stack(&norms, 0).norm() + 1e-6)).clamp_max(1.0);
        for gradient in gradients {
            let _ = gradient.shallow_clone().g_mul_(&factor);
        }
    });
}

/// One step of SGD with momentum on all parameters in one kernel, as `torch.optim.SGD` counts:
/// m = `momentum` m + (g + `weight_decay` p), p = p - `learning_rate` m. The three lists must be of the same length.
fn fused_sgd(
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clipped_gradients_have_the_limits_norm_and_small_ones_are_left_alone() {
        let gradients = || vec![Tensor::from_slice(&[3.0_f64, 0.0]), Tensor::from_slice(&[4.0_f64])];
        let large = gradients();
        clip(&large, 1.0);
        assert!((large[1].double_value(&[0]) - 0.8).abs() < 1e-6);
        let small = gradients();
        clip(&small, 10.0);
        assert_eq!(small[0].double_value(&[0]), 3.0);
    }
}
