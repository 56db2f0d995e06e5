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
    settings: Settings,
}

/// How it learns.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings {
    pub momentum: f64,
    pub weight_decay: f64,
    /// Gradients are scaled down to this norm, unless it is 0.
    pub clip_norm: f64,
    /// Parameters from this one on have ...
    pub head: usize,
    /// ... so many times the learning rate of those before.
    pub head_factor: f64,
}

impl Sgd {
    /// For these parameters, with momenta of zero.
    pub(crate) fn new(parameters: Named, settings: Settings) -> Self {
        let momenta = parameters.iter().map(|(name, parameter)| (name.clone(), parameter.detach().zeros_like()));
        let momenta = momenta.collect();
        let parameters = parameters.into_iter().map(|(_, parameter)| parameter).collect();
        Self { parameters, momenta, settings }
    }

    /// Applies the gradients that the parameters hold, scaled down to the norm's limit if there is one.
    pub(crate) fn step(&mut self, learning_rate: f64) -> Result<()> {
        let Settings { momentum, weight_decay, clip_norm, head, head_factor } = self.settings;
        let gradients: Vec<Tensor> = self.parameters.iter().map(Tensor::grad).collect();
        if clip_norm > 0.0 {
            clip(&gradients, clip_norm);
        }
        let momenta: Vec<Tensor> = self.momenta.iter().map(|(_, momentum)| momentum.shallow_clone()).collect();
        // One kernel for all if it can be.
        let head = if head_factor == 1.0 { self.parameters.len() } else { head };
        for (part, factor) in [(0..head, 1.0), (head..self.parameters.len(), head_factor)] {
            if !part.is_empty() {
                let (p, g, m) = (&self.parameters[part.clone()], &gradients[part.clone()], &momenta[part]);
                fused_sgd(p, g, m, learning_rate * factor, momentum, weight_decay)?;
            }
        }
        Ok(())
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

/// The steps in memory along each dimension that has more than one element.
fn order(tensor: &Tensor) -> Vec<i64> {
    tensor.size().into_iter().zip(tensor.stride()).filter(|(size, _)| *size > 1).map(|(_, stride)| stride).collect()
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
    // libtorch's kernels go through the memory of all three at once. A gradient lies as its parameter does, whoever made
    // it: autograd and c10d's buckets see to that.
    let all = parameters.iter().zip(gradients).zip(momenta);
    if !all.map(|((p, g), m)| [p, g, m].map(order)).all(|[p, g, m]| p == g && p == m) {
        return Err(Error::Other("parameters, gradients and momenta lie in memory in different orders".to_owned()));
    }
    let (p, g, m) = (pointers(parameters), pointers(gradients), pointers(momenta));
    // SAFETY: tensors and lists outlive the call, and the lists are of the length that is given.
    check(unsafe {
        ffi::c10d_fused_sgd(p.as_ptr(), g.as_ptr(), m.as_ptr(), p.len(), learning_rate, momentum, weight_decay)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_has_a_learning_rate_of_its_own_also_without_momentum() {
        let parameter = |name: &str| (name.to_owned(), Tensor::from_slice(&[1.0_f64]).set_requires_grad(true));
        let named = [parameter("first"), parameter("last")];
        let settings = Settings { momentum: 0.0, weight_decay: 0.0, clip_norm: 0.0, head: 1, head_factor: 10.0 };
        let own = named.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone()));
        let mut sgd = Sgd::new(own.collect(), settings);
        let sum = &named[0].1 + &named[1].1;
        sum.sum(tch::Kind::Double).backward();
        sgd.step(0.01).expect("sound gradients");
        let values: Vec<f64> = named.iter().map(|(_, tensor)| tensor.double_value(&[0])).collect();
        assert!((values[0] - 0.99).abs() < 1e-12 && (values[1] - 0.9).abs() < 1e-12, "{values:?}");
    }

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
