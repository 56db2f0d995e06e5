//! What a rank computes on.

use tch::Device;

use super::c10d::{Error, Result};

/// libtorch's name of `cpu` or `cuda:N`.
pub(crate) fn parse(device: &str) -> Result<Device> {
    let number = device.strip_prefix("cuda:").and_then(|number| number.parse().ok());
    match (device, number) {
        ("cpu", _) => Ok(Device::Cpu),
        (_, Some(number)) => Ok(Device::Cuda(number)),
        _ => Err(Error::Other(format!("device {device:?}: must be cpu or cuda:N"))),
    }
}
