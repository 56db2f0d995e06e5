//! The stream to the coordinator: re-opened after any error, for ever. A coordinator may be dead for minutes; ranks train on meanwhile.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket};
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
const MOST_PAUSE: Duration = Duration::from_secs(2);
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

/// Where other machines reach this one, and the network interface of that address, if it is known: as told, or else the address from which
/// the coordinator is reached. What is told need not be this machine's own (a host name, an address in front of it).
pub(crate) fn own_place(
    coordinator: &Endpoint,
    address: Option<String>,
    interface: Option<String>,
) -> Result<(String, Option<String>)> {
    let all = interfaces()?;
    let address = match (address, &interface) {
        (Some(address), _) => address,
        (None, Some(name)) => {
            let of_it = all.iter().filter(|(of, _)| of == name).map(|(_, address)| address);
            let address = of_it.min_by_key(|address| address.is_ipv6()).with_context(|| {
                let names: BTreeSet<&str> = all.iter().map(|(name, _)| name.as_str()).collect();
                let names: Vec<&str> = names.into_iter().collect();
                format!("--interface {name}: no interface of that name has an address; there are {}", names.join(", "))
            })?;
            address.to_string()
        }
        (None, None) => own_address(coordinator)?,
    };
    let has_it = |(_, own): &&(String, IpAddr)| address.parse().is_ok_and(|address: IpAddr| address == *own);
    let interface = interface.or_else(|| all.iter().find(has_it).map(|(name, _)| name.clone()));
    Ok((address, interface))
}

/// This machine's network interfaces by name, each as often as it has addresses.
fn interfaces() -> Result<Vec<(String, IpAddr)>> {
    let all = if_addrs::get_if_addrs().context("failed to list this machine's network interfaces")?;
    // A link-local address of IPv6 is of no use to another machine: it is valid only together with an interface of that machine.
    let reachable = |address: IpAddr| !matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local());
    Ok(all
        .into_iter()
        .map(|it| (it.ip(), it.name))
        .filter(|(ip, _)| reachable(*ip))
        .map(|(ip, name)| (name, ip))
        .collect())
}

/// The address of this machine from which the coordinator is reached.
fn own_address(endpoint: &Endpoint) -> Result<String> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_advertised_address_is_told_or_that_of_an_interface_or_of_the_way_to_the_coordinator() {
        let coordinator = endpoint("http://127.0.0.1:7070").expect("an address");
        let loopback = ("127.0.0.1".to_owned(), Some("lo".to_owned()));
        let place = |address: Option<&str>, interface: Option<&str>| {
            own_place(&coordinator, address.map(str::to_owned), interface.map(str::to_owned))
        };
        assert_eq!(place(None, None).expect("a route"), loopback);
        assert_eq!(place(None, Some("lo")).expect("it has one"), loopback);
        assert_eq!(place(Some("pod-1.trainer"), None).expect("told"), ("pod-1.trainer".to_owned(), None));
        let refused = format!("{:#}", place(None, Some("lo9")).expect_err("there is none"));
        assert!(refused.contains("--interface lo9") && refused.contains("lo"), "{refused}");
    }
}
