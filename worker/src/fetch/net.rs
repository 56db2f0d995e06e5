//! Which addresses and ports a worker may reach.
//!
//! A URL list is somebody else's text: it must not be able to make a worker speak to what only the worker can reach.
//! Names are checked when a connection is about to be made (`dns`), so a name that changes its address between two
//! look-ups gains nothing; IP literals never see a resolver and are checked before the request.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// Ports of services that speak something else than HTTP, and might take a request for it: those that browsers ask
/// nothing of ("bad ports" in WHATWG's Fetch).
#[rustfmt::skip]
const BAD_PORTS: [u16; 83] = [
    0, 1, 7, 9, 11, 13, 15, 17, 19, 20, 21, 22, 23, 25, 37, 42, 43, 53, 69, 77, 79, 87, 95, 101, 102, 103, 104, 109, 110, 111, 113,
    115, 117, 119, 123, 135, 137, 139, 143, 161, 179, 389, 427, 465, 512, 513, 514, 515, 526, 530, 531, 532, 540, 548, 554, 556, 563,
    587, 601, 636, 989, 990, 993, 995, 1719, 1720, 1723, 2049, 3659, 4045, 4190, 5060, 5061, 6000, 6566, 6665, 6666, 6667, 6668, 6669,
    6679, 6697, 10080,
];

/// Whether HTTP may be spoken to a port.
pub(super) fn permits_port(port: u16) -> bool {
    BAD_PORTS.binary_search(&port).is_err()
}

/// The addresses that a worker may reach: global unicast ones, and the nets that its operator named.
#[derive(Debug, Clone, Default)]
pub(crate) struct AddressRules {
    pub(crate) allowed: Vec<IpNet>,
}

impl AddressRules {
    pub(crate) fn permits(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.allowed.iter().any(|net| net.contains(&address)) || is_global(address)
    }
}

/// Whether the public internet is behind an address: neither private nor local, and not a way round to such an address.
/// After IANA's special-purpose address registries (RFC 6890 and its updates).
fn is_global(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_global_v4(address),
        IpAddr::V6(address) => is_global_v6(address),
    }
}

fn is_global_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, d] = address.octets();
    !(a == 0 // this network
        || a == 10
        || a == 127
        || (a == 100 && (64..128).contains(&b)) // carrier-grade NAT; also a cloud's metadata service
        || (a == 169 && b == 254) // link-local, where most clouds' metadata services are
        || (a == 172 && (16..32).contains(&b))
        || (a == 192 && b == 168)
        || (a == 192 && b == 0 && (c == 0 || c == 2)) // protocol assignments, documentation
        || (a == 192 && b == 88 && c == 99) // 6to4 relays
        || (a == 198 && (b == 18 || b == 19)) // benchmarks
        || (a == 198 && b == 51 && c == 100) // documentation
        || (a == 203 && b == 0 && c == 113) // documentation
        || a >= 224 // multicast, reserved, broadcast
        || [a, b, c, d] == [168, 63, 129, 16]) // Azure's metadata and DNS: a public address that is not public
}

fn is_global_v6(address: Ipv6Addr) -> bool {
    let s = address.segments();
    let v4 = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        is_global_v4(Ipv4Addr::new(a, b, c, d))
    };
    match s {
        [0, 0, 0, 0, 0, 0xffff, high, low] => v4(high, low), // IPv4-mapped
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => v4(high, low), // NAT64
        [0x2002, high, low, ..] => v4(high, low),            // 6to4
        [0x2001, second, ..] if second < 0x200 => false,     // protocol assignments, Teredo, ORCHID
        [0x2001, 0xdb8, ..] => false,                        // documentation
        [0x3fff, second, ..] if second < 0x1000 => false,    // documentation
        // 2000::/3 is all that is given out as global unicast: what lies outside is local, multicast, embedded or
        // unassigned.
        [first, ..] => first & 0xe000 == 0x2000,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect(text)
    }

    #[test]
    fn only_global_unicast_addresses_are_permitted() {
        let rules = AddressRules::default();
        for address in [
            "0.0.0.0",
            "10.1.2.3",
            "100.100.100.200",
            "127.0.0.1",
            "127.255.255.255",
            "168.63.129.16",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.192",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.1.1",
            "198.18.0.1",
            "198.19.255.255",
            "198.51.100.7",
            "203.0.113.7",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::127.0.0.1",
            "::8.8.8.8",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "64:ff9b::127.0.0.1",
            "64:ff9b::a9fe:a9fe",
            "64:ff9b:1::808:808",
            "100::1",
            "2001::1",
            "2001:10::1",
            "2001:db8::1",
            "2002:7f00:1::1",
            "2002:a00:1::",
            "3fff::1",
            "5f00::1",
            "fc00::1",
            "fd00:ec2::254",
            "fe80::1",
            "fec0::1",
            "ff02::1",
        ] {
            assert!(!rules.permits(ip(address)), "{address}");
        }
        for address in [
            "1.1.1.1",
            "100.63.255.255",
            "100.128.0.1",
            "172.15.0.1",
            "172.32.0.1",
            "192.0.1.1",
            "198.20.0.1",
            "223.255.255.255",
            "::ffff:8.8.8.8",
            "64:ff9b::8.8.8.8",
            "2002:808:808::1",
            "2001:4860:4860::8888",
            "2606:4700::1111",
        ] {
            assert!(rules.permits(ip(address)), "{address}");
        }
    }

    #[test]
    fn ports_of_other_services_are_not_asked() {
        assert!(BAD_PORTS.is_sorted());
        assert!([22, 25, 53, 6667, 10080].into_iter().all(|port| !permits_port(port)));
        assert!([80, 443, 8000, 8080, 8443, 3000, 65_535].into_iter().all(permits_port));
    }

    #[test]
    fn an_allowed_net_permits_its_own_addresses_alone() {
        let rules = AddressRules { allowed: vec!["127.0.0.0/8".parse().expect("a net")] };
        assert!(rules.permits(ip("127.0.0.1")) && rules.permits(ip("::ffff:127.0.0.1")));
        assert!(!rules.permits(ip("10.0.0.1")) && !rules.permits(ip("::1")));
    }
}
