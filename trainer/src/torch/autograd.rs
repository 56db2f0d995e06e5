//! Gradients of chosen tensors by chosen ones, where `tch` has only those of all.

use tch::Tensor;

use super::error::Result;
use super::ffi::{self, check, pointer, pointers};

/// The gradients of `output`, times `by` (or 1) where it is not a single number, by each of these leaves, which lie in
/// memory as the leaves do. What the leaves hold as their gradients stays as it is, and no reducer hears of it.
pub(crate) fn gradients(output: &Tensor, by: Option<&Tensor>, leaves: &[Tensor]) -> Result<Vec<Tensor>> {
    let mut raw = vec![std::ptr::null_mut(); leaves.len()];
    let (by, leaves) = (by.map_or(std::ptr::null(), pointer), pointers(leaves));
    // SAFETY: the tensors outlive the call, and both lists are of the length that is given.
    check(unsafe { ffi::c10d_gradients(pointer(output), by, leaves.as_ptr(), leaves.len(), raw.as_mut_ptr()) })?;
    // SAFETY: new tensors, each of which is this one's alone.
    Ok(raw.into_iter().map(|raw| unsafe { Tensor::from_ptr(raw.cast()) }).collect())
}

/// From now on these are the gradients that the parameters hold, in the same memory. The lists must be of the same
/// length.
pub(crate) fn set_gradients(parameters: &[Tensor], gradients: &[Tensor]) -> Result<()> {
    assert_eq!(parameters.len(), gradients.len(), "lists of unequal length");
    let (parameters, gradients) = (pointers(parameters), pointers(gradients));
    // SAFETY: tensors and lists outlive the call, and the lists are of the length that is given.
    check(unsafe { ffi::c10d_set_gradients(parameters.as_ptr(), gradients.as_ptr(), parameters.len()) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    #[test]
    fn a_chain_in_two_parts_has_the_gradients_of_the_whole_and_leaves_the_parameters_own_alone() {
        let of = |values: &[f64]| Tensor::from_slice(values).set_requires_grad(true);
        let (a, b) = (of(&[1.0, 2.0]), of(&[3.0, 4.0]));
        let first = &a * &a;
        let cut = first.detach().set_requires_grad(true);
        let loss = (&cut * &b).sum(Kind::Double);
        let of_second = gradients(&loss, None, &[b.shallow_clone(), cut]).expect("both are used");
        let of_first = gradients(&first, Some(&of_second[1]), &[a.shallow_clone()]).expect("it is used");
        assert_eq!(of_second[0], Tensor::from_slice(&[1.0, 4.0]));
        assert_eq!(of_first[0], Tensor::from_slice(&[6.0, 16.0]));
        assert!(!a.grad().defined() && !b.grad().defined());
        set_gradients(&[a.shallow_clone()], &of_first).expect("both are alive");
        assert_eq!((a.grad().data_ptr(), b.grad().defined()), (of_first[0].data_ptr(), false));
        let unused = gradients(&of(&[1.0]).sum(Kind::Double), None, &[b]).expect_err("no way leads there");
        assert!(matches!(unused, crate::torch::Error::Other(_)), "{unused}");
    }

    #[test]
    fn a_gradient_lies_in_memory_as_its_leaf_does() {
        let leaf = Tensor::ones([3, 2], (Kind::Double, tch::Device::Cpu)).tr().set_requires_grad(true);
        // It comes as one number for all places.
        let found = gradients(&leaf.sum(Kind::Double), None, &[leaf.shallow_clone()]).expect("it is used");
        assert_eq!((found[0].size(), found[0].stride()), (leaf.size(), leaf.stride()));
    }
}
