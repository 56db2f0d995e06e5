//! What NCCL must be told of a rank's place, as the environment of its process.

/// NCCL's variables for the rank in one of the agent's slots, which are on these devices, where ranks talk to each other
/// over `interface`.
///
/// NCCL refuses two ranks of one machine on one GPU. Since 2.30 a variable allows it; before, they must pass for two
/// machines, and then reach each other by the network alone. That is slow, since they have the GPU by turns, and right.
pub(super) fn environment(
    agent: &str,
    devices: &[&str],
    slot: usize,
    interface: Option<&str>,
) -> Vec<(&'static str, String)> {
    let mut chosen = Vec::new();
    if let Some(interface) = interface {
        // Without the sign it would be a prefix.
        chosen.push(("NCCL_SOCKET_IFNAME", format!("={interface}")));
    }
    if devices[slot] != "cpu" && sharing(devices, devices[slot]) > 1 {
        chosen.push(("NCCL_MULTI_RANK_GPU_ENABLE", "1".to_owned()));
        // Other than that of any slot of any machine.
        chosen.push(("NCCL_HOSTID", format!("{agent}-{slot}")));
        for other_way in ["NCCL_MNNVL_ENABLE", "NCCL_NVLS_ENABLE", "NCCL_RAS_ENABLE"] {
            chosen.push((other_way, "0".to_owned()));
        }
        chosen.push(("NCCL_IB_DISABLE", "1".to_owned()));
    }
    chosen
}

/// How many of these are that device.
pub(super) fn sharing(devices: &[&str], device: &str) -> usize {
    devices.iter().filter(|other| **other == device).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_on_one_gpu_pass_for_machines_of_their_own_and_others_are_left_alone() {
        let devices = ["cuda:0", "cuda:1", "cuda:0", "cpu", "cpu"];
        let of = |slot| environment("a", &devices, slot, Some("lo"));
        let interface = ("NCCL_SOCKET_IFNAME", "=lo".to_owned());
        for slot in [1, 3, 4] {
            assert_eq!(of(slot), std::slice::from_ref(&interface), "{slot}");
        }
        for (slot, id) in [(0, "a-0"), (2, "a-2")] {
            let chosen = of(slot);
            assert_eq!(chosen[0], interface);
            assert!(chosen.contains(&("NCCL_HOSTID", id.to_owned())), "{chosen:?}");
            assert!(chosen.contains(&("NCCL_MULTI_RANK_GPU_ENABLE", "1".to_owned())), "{chosen:?}");
            assert!(chosen.contains(&("NCCL_IB_DISABLE", "1".to_owned())), "{chosen:?}");
        }
        assert_eq!(environment("a", &devices, 1, None), []);
    }
}
