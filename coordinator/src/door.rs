//! The door: connections come in, plain or over TLS. Whoever says nothing is sent away, and there are never more than
//! so many at once, so that a stranger who only opens connections does not keep others out.

mod certificate;

use std::collections::VecDeque;
use std::collections::hash_map::{Entry, HashMap};
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, Sleep, sleep, sleep_until, timeout, timeout_at};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::{CertificateDer, UnixTime};
use tokio_rustls::rustls::server::danger::ClientCertVerifier;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::either::Either;
use tonic::transport::server::Connected;
use tonic::{Request, Status};
use tracing::{debug, warn};

pub(crate) use self::certificate::PeerCertificate;
use crate::metrics;

/// For a connection to say so much that it is clear what it wants.
const GREETING: Duration = Duration::from_secs(10);
/// The least that a caller says before anything else: HTTP/2's preface, and the head of its settings.
const GREETING_BYTES: usize = 24 + 9;
/// Connections that have not said anything yet, or are at their TLS handshake. One more, and the oldest is sent away:
/// whoever means it needs a moment only, so that he is never among the oldest.
const MOST_WAITING: usize = 4_096;
/// Connections that have.
const MOST_CONNECTIONS: usize = 16_384;
/// Connections of one address: many machines may stand behind it, but not so many that nobody else has room.
const MOST_OF_ONE_ADDRESS: usize = MOST_CONNECTIONS / 4;
/// For a connection to make a call as somebody who is known here.
const NAMELESS: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 60 });
/// How often the certificates of open connections are looked at: they end some day.
const LOOK: Duration = Duration::from_secs(60);
/// After a connection could not be accepted, as when there are too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// The first byte of what is sent over TLS.
const HANDSHAKE_RECORD: u8 = 0x16;

/// How the door speaks TLS.
#[derive(Debug, Clone)]
pub struct Tls {
    /// Whether calls over plain connections are refused.
    pub required: bool,
    /// What each new connection takes the newest of, and each that is open is held against.
    pub config: watch::Receiver<Arc<Trust>>,
}

/// The certificate that is shown, and whose clients' certificates are trusted.
#[derive(Debug)]
pub struct Trust {
    /// For handshakes; it checks clients by `clients`, too.
    pub server: Arc<ServerConfig>,
    /// None: no certificate of a client is looked at.
    pub clients: Option<Arc<dyn ClientCertVerifier>>,
}

/// Whose connection it is; in the extensions of each request.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    /// Whether it is over TLS.
    pub(crate) encrypted: bool,
    /// The certificate that was shown, and is signed by an authority of ours.
    pub(crate) certificate: Option<Arc<PeerCertificate>>,
    /// Whether somebody who is known here has made a call.
    named: Arc<AtomicBool>,
}

impl Peer {
    /// Somebody who is known here has made a call, so that the connection may stay.
    pub(crate) fn is_named(&self) {
        self.named.store(true, Ordering::Relaxed);
    }
}

/// The connections that come in at `listener`, until they are no longer asked for.
pub(crate) fn open(listener: TcpListener, tls: Option<Tls>) -> ReceiverStream<io::Result<Accepted>> {
    let (sender, receiver) = mpsc::channel(64);
    tokio::spawn(async move {
        tokio::select! {
            () = sender.closed() => {}
            () = accept(listener, tls, &sender) => {}
        }
    });
    ReceiverStream::new(receiver)
}

async fn accept(listener: TcpListener, tls: Option<Tls>, accepted: &mpsc::Sender<io::Result<Accepted>>) {
    let places = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    let crowd = Crowd::default();
    let mut waiting = Waiting::default();
    loop {
        let (socket, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "a connection cannot be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (tls, places, accepted) = (tls.clone(), Arc::clone(&places), accepted.clone());
        let crowd = crowd.clone();
        let greeting = tokio::spawn(async move {
            match greet(socket, tls, places, &crowd).await {
                Ok(connection) => {
                    let _ = accepted.send(Ok(connection)).await;
                }
                Err(refused) => {
                    metrics::connection_refused(refused.name());
                    debug!(%address, %refused, "a connection was not let in");
                }
            }
        });
        waiting.push(greeting.abort_handle());
    }
}

/// Those that have not greeted, oldest first.
#[derive(Default)]
struct Waiting(VecDeque<AbortHandle>);

impl Waiting {
    fn push(&mut self, greeting: AbortHandle) {
        self.0.push_back(greeting);
        while self.0.front().is_some_and(AbortHandle::is_finished) {
            self.0.pop_front();
        }
        if self.0.len() > MOST_WAITING {
            // Those in the middle that are done must not cost one that is not.
            self.0.retain(|greeting| !greeting.is_finished());
        }
        if self.0.len() > MOST_WAITING
            && let Some(oldest) = self.0.pop_front()
        {
            oldest.abort();
            metrics::connection_refused("crowded");
        }
    }
}

/// Why a connection was not let in.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("it said nothing within {} s", GREETING.as_secs())]
    Silent,
    #[error("there are {MOST_CONNECTIONS} connections already")]
    Full,
    #[error("its address has {MOST_OF_ONE_ADDRESS} connections already")]
    Crowded,
    #[error("{0}")]
    Handshake(io::Error),
}

impl Refused {
    fn name(&self) -> &'static str {
        match self {
            Self::Silent => "silent",
            Self::Full => "full",
            Self::Crowded => "crowded_address",
            Self::Handshake(_) => "handshake",
        }
    }
}

/// How many connections each address has; of IPv6 each network of 64 bits, which one machine may have as a whole.
#[derive(Clone, Default)]
struct Crowd(Arc<Mutex<HashMap<IpAddr, usize>>>);

impl Crowd {
    /// One more of an address, as long as that is kept; None: it has too many.
    fn enter(&self, address: IpAddr) -> Option<OfAddress> {
        let address = match address.to_canonical() {
            IpAddr::V6(address) => IpAddr::V6((address.to_bits() >> 64 << 64).into()),
            address => address,
        };
        let mut counts = self.counts();
        let count = counts.entry(address).or_default();
        if *count >= MOST_OF_ONE_ADDRESS {
            return None;
        }
        *count += 1;
        Some(OfAddress { crowd: self.clone(), address })
    }

    fn counts(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        // Nothing under the lock can leave it half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection of an address.
struct OfAddress {
    crowd: Crowd,
    address: IpAddr,
}

impl Drop for OfAddress {
    fn drop(&mut self) {
        if let Entry::Occupied(mut count) = self.crowd.counts().entry(self.address) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

/// Waits for what a connection wants.
async fn greet(
    socket: TcpStream,
    tls: Option<Tls>,
    places: Arc<Semaphore>,
    crowd: &Crowd,
) -> Result<Accepted, Refused> {
    let address = socket.peer_addr().map_err(Refused::Handshake)?.ip();
    let deadline = Instant::now() + GREETING;
    let mut first = [0];
    let seen = timeout_at(deadline, socket.peek(&mut first)).await.map_err(|_| Refused::Silent)?;
    if seen.map_err(Refused::Handshake)? == 0 {
        return Err(Refused::Handshake(io::ErrorKind::UnexpectedEof.into()));
    }
    // An answer that waits for the next one to fill a packet would cost a round trip each.
    socket.set_nodelay(true).map_err(Refused::Handshake)?;
    let (io, certificate, distrusted) = match tls {
        Some(tls) if first == [HANDSHAKE_RECORD] => {
            let server = Arc::clone(&tls.config.borrow().server);
            let stream = timeout_at(deadline, TlsAcceptor::from(server).accept(socket)).await;
            let stream = stream.map_err(|_| Refused::Silent)?.map_err(Refused::Handshake)?;
            let shown = stream.get_ref().1.peer_certificates().unwrap_or_default();
            let certificate = shown.first().map(PeerCertificate::read).transpose().map_err(Refused::Handshake)?;
            let chain: Vec<_> = shown.iter().map(|certificate| certificate.clone().into_owned()).collect();
            let distrusted: Option<Distrusted> =
                if chain.is_empty() { None } else { Some(Box::pin(distrusted(tls.config, chain))) };
            (Either::Right(stream), certificate.map(Arc::new), distrusted)
        }
        _ => (Either::Left(socket), None, None),
    };
    let place = places.try_acquire_owned().map_err(|_| Refused::Full)?;
    let of_address = crowd.enter(address).ok_or(Refused::Crowded)?;
    let peer = Peer { encrypted: matches!(io, Either::Right(_)), certificate, named: Arc::default() };
    metrics::connections(1);
    let greeting = Some((GREETING_BYTES, Box::pin(sleep_until(deadline))));
    let nameless = Some(Box::pin(sleep(NAMELESS)));
    Ok(Accepted { io, peer, greeting, nameless, distrusted, _place: (place, of_address) })
}

/// Ends when a client's certificates are good no more.
type Distrusted = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Waits until `chain`, which was good at the handshake, is not: its authority has gone, or its time is over.
async fn distrusted(mut config: watch::Receiver<Arc<Trust>>, chain: Vec<CertificateDer<'static>>) {
    loop {
        // Files that are read no more change nothing; time still does.
        if let Ok(Err(_)) = timeout(LOOK, config.changed()).await {
            sleep(LOOK).await;
        }
        let trust = Arc::clone(&config.borrow_and_update());
        let Some((own, between)) = chain.split_first() else { return };
        let good =
            |clients: &Arc<dyn ClientCertVerifier>| clients.verify_client_cert(own, between, UnixTime::now()).is_ok();
        if !trust.clients.as_ref().is_some_and(good) {
            return;
        }
    }
}

/// A connection that was let in.
pub(crate) struct Accepted {
    io: Either<TcpStream, TlsStream<TcpStream>>,
    peer: Peer,
    /// How many bytes of the greeting have not come yet, and until when they must have.
    greeting: Option<(usize, Pin<Box<Sleep>>)>,
    /// Until when somebody who is known must have made a call. None: somebody has.
    nameless: Option<Pin<Box<Sleep>>>,
    /// None: there is no certificate that could become bad.
    distrusted: Option<Distrusted>,
    _place: (OwnedSemaphorePermit, OfAddress),
}

impl Drop for Accepted {
    fn drop(&mut self) {
        metrics::connections(-1);
    }
}

impl Connected for Accepted {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Accepted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Some((_, deadline)) = &mut self.greeting
            && deadline.as_mut().poll(cx).is_ready()
        {
            metrics::connection_refused("silent");
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        if let Some(deadline) = &mut self.nameless
            && deadline.as_mut().poll(cx).is_ready()
        {
            self.nameless = None;
            if !self.peer.named.load(Ordering::Relaxed) {
                metrics::connection_refused("nameless");
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
        }
        if let Some(distrusted) = &mut self.distrusted
            && distrusted.as_mut().poll(cx).is_ready()
        {
            self.distrusted = None;
            metrics::connection_refused("distrusted");
            return Poll::Ready(Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "its certificate is trusted no more",
            )));
        }
        let before = buffer.filled().len();
        let read = ready!(Pin::new(&mut self.io).poll_read(cx, buffer));
        if let Some((missing, _)) = &mut self.greeting {
            *missing = missing.saturating_sub(buffer.filled().len() - before);
            if *missing == 0 {
                self.greeting = None;
            }
        }
        Poll::Ready(read)
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// Refuses every call over a plain connection where TLS is required.
pub(crate) fn interceptor(tls: Option<&Tls>) -> impl Fn(Request<()>) -> Result<Request<()>, Status> + Clone + use<> {
    let required = tls.is_some_and(|tls| tls.required);
    move |request| {
        if required && !request.extensions().get::<Peer>().is_some_and(|peer| peer.encrypted) {
            return Err(Status::unauthenticated(
                "this coordinator takes calls over TLS alone: write https://HOST:PORT, and name its authority by --tls-ca",
            ));
        }
        Ok(request)
    }
}

/// Reads a certificate.
#[cfg(fuzzing)]
pub(crate) fn fuzz_certificate(der: &[u8]) {
    drop(PeerCertificate::read(&CertificateDer::from(der)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_stream::StreamExt;

    #[test]
    fn one_address_takes_no_more_than_its_part_and_gives_it_back() {
        let crowd = Crowd::default();
        let enter = |address: &str| crowd.enter(address.parse().expect("an address"));
        let mut all: Vec<OfAddress> = (0..MOST_OF_ONE_ADDRESS).filter_map(|_| enter("10.0.0.1")).collect();
        assert_eq!(all.len(), MOST_OF_ONE_ADDRESS);
        assert!(enter("10.0.0.1").is_none() && enter("::ffff:10.0.0.1").is_none() && enter("10.0.0.2").is_some());
        all.pop();
        assert!(enter("10.0.0.1").is_some());
        let whole: Vec<OfAddress> =
            (0..MOST_OF_ONE_ADDRESS).filter_map(|n| enter(&format!("2001:db8::{n:x}"))).collect();
        assert!(
            whole.len() == MOST_OF_ONE_ADDRESS
                && enter("2001:db8::ffff:1").is_none()
                && enter("2001:db8:0:1::1").is_some()
        );
        drop((all, whole));
        assert!(crowd.counts().is_empty());
    }

    /// How many bytes come until the end.
    async fn rest(mut connection: Accepted) -> Result<usize, io::ErrorKind> {
        connection.read_to_end(&mut Vec::new()).await.map_err(|error| error.kind())
    }

    #[tokio::test]
    async fn a_connection_on_which_nobody_known_calls_is_ended_and_another_stays() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
        let address = listener.local_addr().expect("bound");
        let mut accepted = open(listener, None);
        let mut connect = async || {
            let mut client = TcpStream::connect(address).await.expect("it listens");
            client.write_all(&[b'x'; GREETING_BYTES]).await.expect("it is connected");
            let connection = accepted.next().await.expect("one comes").expect("it is let in");
            (client, connection)
        };
        let ((_one, nameless), (mut other, named)) = (connect().await, connect().await);
        named.connect_info().is_named();
        assert_eq!(rest(nameless).await, Err(io::ErrorKind::TimedOut));
        let read = tokio::spawn(rest(named));
        sleep(NAMELESS).await;
        assert!(!read.is_finished(), "whoever is known may be silent");
        other.shutdown().await.expect("it is connected");
        assert_eq!(read.await.expect("no panic"), Ok(GREETING_BYTES));
    }

    #[tokio::test]
    async fn the_oldest_that_says_nothing_goes_when_there_are_too_many() {
        let mut waiting = Waiting::default();
        let silent = || tokio::spawn(std::future::pending::<()>());
        let mut tasks: VecDeque<_> = (0..MOST_WAITING).map(|_| silent()).collect();
        tasks.iter().for_each(|task| waiting.push(task.abort_handle()));
        let done = tokio::spawn(async {});
        let greeted = done.abort_handle();
        done.await.expect("it greets");
        waiting.push(greeted);
        assert_eq!(waiting.0.len(), MOST_WAITING, "one that has greeted takes nobody's place");
        let next = silent();
        waiting.push(next.abort_handle());
        let oldest = tasks.pop_front().expect("there are many").await;
        assert!(oldest.expect_err("it is sent away").is_cancelled());
        tasks.push_back(next);
        assert!(tasks.iter().all(|task| !task.is_finished()));
    }
}
