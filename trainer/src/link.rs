//! The stream to the coordinator: re-opened after any error, for ever. A coordinator may be dead for minutes; ranks train on meanwhile.

use std::net::{SocketAddr, ToSocketAddrs, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result};
use proto::pb::{self, trainer_service_client::TrainerServiceClient};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Endpoint;
use tracing::warn;

/// For the connection, and for the answer to `Connect`.
const DEADLINE: Duration = Duration::from_secs(10);
/// Between attempts, at most.
const MOST_PAUSE: Duration = Duration::from_secs(5);
/// Messages that wait for the network.
const WAITING: usize = 256;

/// What becomes of the stream.
#[derive(Debug)]
pub(crate) enum Link {
    /// A stream is being opened; what is sent here goes over it, first of all a `Hello`.
    Opened(mpsc::Sender<pb::AgentMessage>),
    /// It has ended.
    Closed,
    /// The coordinator said something.
    Said(Box<pb::coordinator_message::Message>),
}

/// Where the coordinator is.
pub(crate) fn endpoint(coordinator: &str) -> Result<Endpoint> {
    let endpoint = Endpoint::from_shared(coordinator.to_owned())
        .with_context(|| format!("--coordinator {coordinator}: must be like http://HOST:PORT"))?;
    Ok(endpoint
        .connect_timeout(DEADLINE)
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(5))
        .keep_alive_while_idle(true))
}

/// The address of this machine from which the coordinator is reached.
pub(crate) fn own_address(endpoint: &Endpoint) -> Result<String> {
    let uri = endpoint.uri();
    let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    let to: SocketAddr = (host, uri.port_u16().unwrap_or(80))
        .to_socket_addrs()
        .with_context(|| format!("failed to look up {host}"))?
        .next()
        .with_context(|| format!("{host} has no address"))?;
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    // Connecting a datagram socket sends nothing; it only chooses the route.
    let socket = UdpSocket::bind(any)?;
    socket.connect(to)?;
    Ok(socket.local_addr()?.ip().to_string())
}

/// Keeps a stream open until nobody listens.
pub(crate) async fn keep(endpoint: Endpoint, links: mpsc::Sender<Link>) {
    let mut pause = Duration::from_millis(100);
    while !links.is_closed() {
        match stream(&endpoint, &links).await {
            Ok(()) => pause = Duration::from_millis(100),
            Err(error) => warn!(error = format!("{error:#}"), "no stream to the coordinator; trying again"),
        }
        if links.send(Link::Closed).await.is_err() {
            return;
        }
        // Spread out, so that not all agents come back at once.
        let spread = f64::from(uuid::Uuid::new_v4().as_bytes()[0]) / 255.0;
        tokio::time::sleep(pause.mul_f64(0.5 + spread)).await;
        pause = (pause * 2).min(MOST_PAUSE);
    }
}

/// One stream, until it ends. An error only if it never stood.
async fn stream(endpoint: &Endpoint, links: &mpsc::Sender<Link>) -> Result<()> {
    let mut client = TrainerServiceClient::new(endpoint.connect().await?);
    let (send, to_send) = mpsc::channel(WAITING);
    if links.send(Link::Opened(send)).await.is_err() {
        return Ok(());
    }
    let answer = tokio::time::timeout(DEADLINE, client.connect(ReceiverStream::new(to_send))).await;
    let mut said = answer.context("the coordinator did not answer")??.into_inner();
    loop {
        match said.message().await {
            Ok(Some(pb::CoordinatorMessage { message: Some(message) })) => {
                if links.send(Link::Said(Box::new(message))).await.is_err() {
                    return Ok(());
                }
            }
            Ok(Some(_)) => {}
            Ok(None) => return Ok(()),
            Err(status) => {
                warn!(%status, "stream to the coordinator ended");
                return Ok(());
            }
        }
    }
}
