//! Addresses for processes that are started later.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};

use socket2::{Domain, Socket, Type};

/// An address of this machine with a free port, which stays free until somebody listens there: a socket is bound to it,
/// without listening. The system gives such a port to nobody who asks for any port, and lets whoever names it listen
/// (SO_REUSEADDR, which both std and tokio set). Until then connections are refused.
#[derive(Debug)]
pub struct FreeAddress {
    address: SocketAddr,
    text: String,
    _bound: Socket,
}

impl FreeAddress {
    /// On loopback.
    pub fn loopback() -> Self {
        Self::at("127.0.0.1")
    }

    /// On this address of the machine.
    ///
    /// # Panics
    /// If it is none.
    pub fn at(host: &str) -> Self {
        let host: IpAddr = host.parse().expect("an IP address");
        Self::bind(SocketAddr::new(host, 0)).expect("an address of this machine with a free port")
    }

    /// This address; port 0 is any free one.
    ///
    /// # Errors
    /// If somebody has it, or it is not this machine's.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        let address = socket.local_addr()?.as_socket().ok_or(io::ErrorKind::Unsupported)?;
        Ok(Self { address, text: address.to_string(), _bound: socket })
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.address.port()
    }
}

impl std::ops::Deref for FreeAddress {
    type Target = str;

    fn deref(&self) -> &str {
        &self.text
    }
}

impl fmt::Display for FreeAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn an_address_can_be_listened_at_again_and_again_while_it_is_reserved() {
        let address = FreeAddress::loopback();
        assert!(TcpStream::connect(&*address).is_err(), "nobody listens yet");
        for _ in 0..3 {
            let listener = TcpListener::bind(&*address).expect("it is free for whoever names it");
            let client = TcpStream::connect(&*address).expect("somebody listens");
            drop((listener.accept().expect("a connection"), client));
        }
        assert!(TcpStream::connect(&*address).is_err(), "nobody listens any more");
    }
}
