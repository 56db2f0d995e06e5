//! A network between two processes that can be cut at any time.

use std::net::SocketAddr;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What becomes of the bytes that are sent over a [`Wire`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// They arrive.
    Passes,
    /// They wait, and neither side is told.
    Waits,
    /// What is asked arrives, and what is answered waits.
    Answerless,
    /// Every connection is reset, also one that is only just made.
    Resets,
}

/// Leads whoever connects to it to another address; it ends when it is dropped.
pub struct Wire {
    address: SocketAddr,
    flow: watch::Sender<Flow>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Wire {
    /// A wire on loopback to this address, HOST:PORT, at which nobody need listen yet.
    ///
    /// # Panics
    /// If loopback has no free port.
    pub fn to(address: &str) -> Self {
        Self::at("127.0.0.1", address)
    }

    /// The same, with its near end at an own address of this machine's.
    ///
    /// # Panics
    /// If the address is none of this machine's.
    pub fn at(host: &str, address: &str) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a thread");
        let listener = runtime.block_on(TcpListener::bind((host, 0))).expect("a free port");
        let (to, own) = (address.to_owned(), listener.local_addr().expect("bound"));
        let (flow, told) = watch::channel(Flow::Passes);
        runtime.spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                tokio::spawn(carry(near, to.clone(), told.clone()));
            }
        });
        Self { address: own, flow, runtime: Some(runtime) }
    }

    /// Where to connect to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on bytes fare so.
    pub fn set(&self, flow: Flow) {
        self.flow.send_replace(flow);
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// One connection, to its end.
async fn carry(mut near: TcpStream, to: String, mut told: watch::Receiver<Flow>) {
    // Whoever is not there refuses, and the near side sees a reset.
    if let Ok(mut far) = TcpStream::connect(to).await {
        let (asks, answers) = (told.clone(), told.clone());
        let ((from_near, to_near), (from_far, to_far)) = (near.split(), far.split());
        let passes = async {
            tokio::join!(
                pass(from_near, to_far, asks, |flow| matches!(flow, Flow::Passes | Flow::Answerless)),
                pass(from_far, to_near, answers, |flow| flow == Flow::Passes)
            )
        };
        tokio::select! {
            _ = passes => return,
            _ = told.wait_for(|flow| *flow == Flow::Resets) => {}
        }
        let _ = far.set_zero_linger();
    }
    // One that has gone already needs no reset.
    let _ = near.set_zero_linger();
}

/// Passes on what comes while the flow lets it, until one side ends.
async fn pass(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut told: watch::Receiver<Flow>,
    open: impl Fn(Flow) -> bool,
) {
    let mut bytes = vec![0; 16 << 10];
    loop {
        let read = from.read(&mut bytes).await;
        if told.wait_for(|flow| open(*flow)).await.is_err() {
            return;
        }
        match read {
            Ok(0) | Err(_) => break,
            Ok(length) if to.write_all(&bytes[..length]).await.is_err() => break,
            Ok(_) => {}
        }
    }
    // The other side learns of the end, if it is still there.
    let _ = to.shutdown().await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{ErrorKind, Read, Write};
    use std::time::Duration;

    /// A server that sends back what it gets.
    fn echo() -> SocketAddr {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("bound");
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                std::thread::spawn(move || std::io::copy(&mut stream.try_clone().expect("a socket"), &mut stream));
            }
        });
        address
    }

    #[test]
    fn bytes_pass_wait_or_are_answered_by_a_reset_as_is_said() {
        let wire = Wire::to(&echo().to_string());
        let connect = || {
            let stream = std::net::TcpStream::connect(wire.address()).expect("it listens");
            stream.set_read_timeout(Some(Duration::from_millis(300))).expect("allowed");
            stream
        };
        let mut stream = connect();
        let mut ask = |text: &[u8]| {
            let mut answer = [0; 1];
            stream.write_all(text)?;
            stream.read(&mut answer).map(|length| (length, answer[0]))
        };
        assert_eq!(ask(b"a").expect("it passes"), (1, b'a'));
        for flow in [Flow::Waits, Flow::Answerless] {
            wire.set(flow);
            let waits = ask(b"b").expect_err("nothing comes");
            assert!(matches!(waits.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{flow:?}: {waits}");
            wire.set(Flow::Passes);
            assert_eq!(ask(b"").expect("it comes late"), (1, b'b'), "{flow:?}");
        }
        wire.set(Flow::Resets);
        let mut is_reset = |text| ask(text).is_err_and(|error| error.kind() == ErrorKind::ConnectionReset);
        assert!(is_reset(b""));
        let mut next = connect();
        assert!(matches!(next.read(&mut [0; 1]), Err(error) if error.kind() == ErrorKind::ConnectionReset));
    }
}
