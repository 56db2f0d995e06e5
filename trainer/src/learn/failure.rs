//! Why a rank cannot go on in its generation.

use tch::{Device, TchError};

use crate::torch::{self, device};

/// Why a rank left its generation.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// Another rank is gone.
    #[error("{0}")]
    Collective(String),
    /// This one cannot go on.
    #[error("{0:#}")]
    Here(anyhow::Error),
    /// Its device failed, or it panicked: the process must end.
    #[error("{0}")]
    Device(String),
    /// Its device had no memory left: the process must end, too, and the next one must make do with less.
    #[error("{0}")]
    OutOfMemory(String),
    /// The loss or the state is not finite: it would be so again.
    #[error("{0}")]
    Diverged(String),
}

impl Failure {
    /// Of a panic. What panics is mostly an operation of `tch` that failed.
    pub(crate) fn panicked(message: &str, device: Option<Device>) -> Self {
        match device.and_then(|device| device::failure(device, message)) {
            Some(error) => error.into(),
            None => Self::Device(format!("panicked: {message}")),
        }
    }

    /// The same, or that the device failed if that is behind it.
    pub(crate) fn on(self, device: Device) -> Self {
        let error = match &self {
            Self::Here(error) => {
                let unclassed = error.chain().any(|cause| {
                    cause.is::<TchError>()
                        || matches!(cause.downcast_ref(), Some(torch::Error::Tch(_) | torch::Error::Other(_)))
                });
                unclassed.then(|| device::failure(device, &format!("{error:#}"))).flatten()
            }
            Self::Collective(_) => device::lost(device),
            Self::Device(_) | Self::OutOfMemory(_) | Self::Diverged(_) => None,
        };
        error.map_or(self, Self::from)
    }
}

impl From<torch::Error> for Failure {
    fn from(error: torch::Error) -> Self {
        match error {
            torch::Error::Timeout(_) | torch::Error::Collective(_) => Self::Collective(error.to_string()),
            torch::Error::Device(_) => Self::Device(error.to_string()),
            torch::Error::OutOfMemory(_) => Self::OutOfMemory(format!(
                "{error}; with train.micro_batch a rank computes a step in parts, which need less, as does a smaller train.batch; \
                 and a smaller --device-cache-bytes leaves more"
            )),
            torch::Error::Tch(error) => error.into(),
            torch::Error::Other(_) => Self::Here(error.into()),
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        // Those of threads that bring data to the device.
        let of_device = matches!(error.downcast_ref(), Some(torch::Error::Device(_) | torch::Error::OutOfMemory(_)));
        match of_device {
            true => error.downcast::<torch::Error>().map_or_else(Self::Here, Self::from),
            false => Self::Here(error),
        }
    }
}

impl From<TchError> for Failure {
    fn from(error: TchError) -> Self {
        Self::Here(error.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_failed_is_told_by_its_class_and_a_lack_of_memory_with_what_to_do() {
        let of = |error: torch::Error| Failure::from(error);
        // The words are of another class.
        let timed_out = || "CUDA out of memory: timed out".to_owned();
        assert!(matches!(of(torch::Error::Collective(timed_out())), Failure::Collective(_)));
        assert!(matches!(of(torch::Error::Device(timed_out())), Failure::Device(_)));
        assert!(matches!(of(torch::Error::Other(timed_out())), Failure::Here(_)));
        let Failure::OutOfMemory(said) = of(torch::Error::OutOfMemory("tried to allocate 2 GiB".to_owned())) else {
            panic!("the device's")
        };
        assert!(said.contains("2 GiB") && said.contains("train.micro_batch"), "{said}");
        let of_loader = anyhow::Error::from(torch::Error::Device("no kernel image".to_owned())).context("sample 3");
        assert!(matches!(Failure::from(of_loader), Failure::Device(said) if said.contains("no kernel image")));
        let other = anyhow::Error::from(torch::Error::Other("shapes".to_owned())).context("sample 3");
        assert!(matches!(Failure::from(other), Failure::Here(said) if format!("{said:#}").contains("sample 3")));
        assert!(
            matches!(Failure::panicked("no rows", Some(Device::Cpu)), Failure::Device(said) if said.contains("no rows"))
        );
        // Classes that libtorch does not tell apart: its device is asked, and here says that it had no memory.
        torch::device::FAKE_OOMS.set(1);
        let unclassed = || torch::Error::Other("CUDNN_STATUS_EXECUTION_FAILED".to_owned());
        assert!(matches!(of(unclassed()).on(Device::Cpu), Failure::OutOfMemory(_)));
        assert!(matches!(Failure::panicked("no rows", Some(Device::Cpu)), Failure::OutOfMemory(_)));
        torch::device::FAKE_OOMS.set(0);
        assert!(matches!(of(unclassed()).on(Device::Cpu), Failure::Here(_)));
    }
}
