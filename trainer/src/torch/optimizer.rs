//! Stochastic gradient descent.

use proto::network::is_of_output;
use proto::run_spec::Train;
use tch::Tensor;

use super::error::Result;
use super::ffi::{self, check, pointers};
use super::tensor::Named;

/// SGD with momentum and weight decay on all parameters, as `torch.optim.SGD` counts.
#[derive(Debug)]
pub(crate) struct Sgd {
    parameters: Vec<Tensor>,
    momenta: Named,
    /// How many of them are not of the last layer, which stands last.
    body: usize,
    /// The learning rate of the last layer in multiples of that of the others.
    head_factor: f64,
    momentum: f64,
    weight_decay: f64,
    clip_norm: f64,
}

impl Sgd {
    /// For these parameters, from input to output, with momenta of zero, as a spec has it.
    pub(crate) fn new(parameters: Named, train: &Train) -> Self {
        let momenta = parameters.iter().map(|(name, parameter)| (name.clone(), parameter.detach().zeros_like()));
        let momenta = momenta.collect();
        let body = parameters.iter().take_while(|(name, _)| !is_of_output(name)).count();
        let parameters = parameters.into_iter().map(|(_, parameter)| parameter).collect();
        let &Train { momentum, weight_decay, clip_norm, head_factor, .. } = train;
        Self { parameters, momenta, body, head_factor, momentum, weight_decay, clip_norm }
    }

    /// Applies the gradients that the parameters hold, scaled down to the norm's limit if there is one.
    pub(crate) fn step(&mut self, learning_rate: f64) -> Result<()> {
        let gradients: Vec<Tensor> = self.parameters.iter().map(Tensor::grad).collect();
        if self.clip_norm > 0.0 {
            clip(&gradients, self.clip_norm);
        }
        let momenta: Vec<Tensor> = self.momenta.iter().map(|(_, momentum)| momentum.shallow_clone()).collect();
        // One kernel for all if it can be.
        let body = if self.head_factor == 1.0 { self.parameters.len() } else { self.body };
        for (part, factor) in [(0..body, 1.0), (body..self.parameters.len(), self.head_factor)] {
            if !part.is_empty() {
                let (p, g, m) = (&self.parameters[part.clone()], &gradients[part.clone()], &momenta[part]);
                fused_sgd(p, g, m, learning_rate * factor, self.momentum, self.weight_decay)?;
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_layer_has_a_learning_rate_of_its_own_also_without_momentum() {
        let parameter = |name: &str| (name.to_owned(), Tensor::from_slice(&[1.0_f64]).set_requires_grad(true));
        let named = [parameter("features.0.weight"), parameter("classifier.6.weight")];
        let train = Train { momentum: 0.0, weight_decay: 0.0, head_factor: 10.0, ..Train::default() };
        let mut sgd =
            Sgd::new(named.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect(), &train);
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
