//! Machines with addresses of their own on this one: network namespaces on a bridge; and names for one machine.

use std::net::UdpSocket;
use std::process::Command;

/// So many machines, each with one interface, `eth0`, and the test's own namespace as the gateway. Removed when it is
/// dropped.
pub struct Net {
    prefix: String,
    subnet: String,
    machines: usize,
}

impl Net {
    /// None, and the reason on stdout, where namespaces cannot be made.
    #[expect(clippy::print_stdout, reason = "a test that is left out says so")]
    pub fn start(machines: usize) -> Option<Self> {
        let id = std::process::id();
        let net = Self {
            prefix: format!("gl{}", id % 100_000),
            subnet: format!("10.{}.{}", 64 + id % 64, id / 64 % 256),
            machines,
        };
        match net.make() {
            Ok(()) => Some(net),
            Err(reason) => {
                println!("skipped: network namespaces need root and iproute2: {reason}");
                None
            }
        }
    }

    fn make(&self) -> Result<(), String> {
        let bridge = format!("{}b", self.prefix);
        ip(&["link", "add", &bridge, "type", "bridge"])?;
        ip(&["addr", "add", &format!("{}/24", self.gateway()), "dev", &bridge])?;
        ip(&["link", "set", &bridge, "up"])?;
        for machine in 0..self.machines {
            let (name, link) = (self.name(machine), self.link(machine));
            ip(&["netns", "add", &name])?;
            ip(&["link", "add", &link, "type", "veth", "peer", "name", "eth0", "netns", &name])?;
            ip(&["link", "set", &link, "master", &bridge, "up"])?;
            ip(&["-n", &name, "addr", "add", &format!("{}/24", self.address(machine)), "dev", "eth0"])?;
            ip(&["-n", &name, "link", "set", "eth0", "up"])?;
            ip(&["-n", &name, "link", "set", "lo", "up"])?;
        }
        Ok(())
    }

    /// The test's own address.
    pub fn gateway(&self) -> String {
        format!("{}.1", self.subnet)
    }

    /// A machine's namespace.
    pub fn name(&self, machine: usize) -> String {
        format!("{}n{machine}", self.prefix)
    }

    /// A machine's address.
    pub fn address(&self, machine: usize) -> String {
        format!("{}.{}", self.subnet, 10 + machine)
    }

    fn link(&self, machine: usize) -> String {
        format!("{}v{machine}", self.prefix)
    }

    /// Pulls a machine's cable: packets vanish, and neither side is told.
    pub fn cut(&self, machine: usize) {
        ip(&["link", "set", &self.link(machine), "nomaster"]).expect("it was made");
    }

    /// Puts the cable back.
    pub fn mend(&self, machine: usize) {
        ip(&["link", "set", &self.link(machine), "master", &format!("{}b", self.prefix)]).expect("it was made");
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        // What was not made need not be removed. A link goes with its namespace.
        for machine in 0..self.machines {
            let _ = ip(&["netns", "del", &self.name(machine)]);
        }
        let _ = ip(&["link", "del", &format!("{}b", self.prefix)]);
    }
}

fn ip(args: &[&str]) -> Result<(), String> {
    let output = Command::new("ip").args(args).output().map_err(|error| format!("ip: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("ip {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim())),
    }
}

/// A name server for which every name has the address 127.0.0.1; its own address.
///
/// # Panics
/// If there is no free port.
pub fn name_server() -> String {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a free port");
    let address = socket.local_addr().expect("bound").to_string();
    std::thread::spawn(move || {
        let mut query = [0; 1500];
        while let Ok((length, from)) = socket.recv_from(&mut query) {
            // The question ends behind its name, its type and its class; what follows are the client's options.
            let name = query[12..length].iter().position(|byte| *byte == 0).unwrap_or(0);
            let question = &query[12..12 + name + 5];
            let is_a = question[name + 1..name + 3] == [0, 1];
            let head = [&query[..2], &[0x81, 0x80, 0, 1, 0, u8::from(is_a), 0, 0, 0, 0]].concat();
            let record: &[u8] = &[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 127, 0, 0, 1];
            let answer = [&head[..], question, if is_a { record } else { &[] }].concat();
            // A resolver that has gone away needs no answer.
            let _ = socket.send_to(&answer, from);
        }
    });
    address
}
