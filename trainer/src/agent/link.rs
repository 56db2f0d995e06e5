//! The stream to the coordinator. It is reconnected after every error for as long as the agent runs: a coordinator may
//! be dead for minutes, and ranks go on training meanwhile.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use proto::cluster::{ClusterRecord, OfCluster, OwnCluster, is_stranger};
use proto::dial::Dial;
use proto::pb::{self, trainer_service_client::TrainerServiceClient};
use proto::{Stored, keys};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tracing::{debug, warn};

/// Time limit of the response to `Connect`, and of reading which cluster this is.
const DEADLINE: Duration = Duration::from_secs(10);
/// The longest pause between two attempts to connect.
const MAX_PAUSE: Duration = Duration::from_secs(2);
/// How many messages may wait to be sent.
const SEND_BUFFER: usize = 256;

/// What happens to the stream.
#[derive(Debug)]
pub(crate) enum LinkEvent {
    /// A stream is being opened. It carries what is sent here, which must begin with a `Hello`.
    Opened(mpsc::Sender<pb::AgentMessage>),
    /// The store is that of another cluster than before.
    ClusterChanged,
    /// The stream has ended.
    Closed,
    /// A message of the coordinator.
    Message(Box<pb::coordinator_message::Message>),
}

/// The address at which other machines reach this one, and its network interface if that is known: the given `address`,
/// the first address of the given `interface`, or else the local address of the route to the coordinator. A given
/// address may be a host name.
pub(crate) fn advertised_address(
    coordinator: &Dial,
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
    // A link-local address of IPv6 is of no use to another machine: it is valid only together with an interface of that
    // machine.
    let reachable = |address: IpAddr| !matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local());
    Ok(all
        .into_iter()
        .map(|it| (it.ip(), it.name))
        .filter(|(ip, _)| reachable(*ip))
        .map(|(ip, name)| (name, ip))
        .collect())
}

/// The address of this machine from which the coordinator is reached.
fn own_address(coordinator: &Dial) -> Result<String> {
    let host = coordinator.host();
    let to: SocketAddr = (host, coordinator.port())
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

/// Keeps a stream open until the receiver of its events is dropped.
pub(crate) async fn keep_open(dial: Dial, store: Arc<dyn ObjectStore>, links: mpsc::Sender<LinkEvent>) {
    let mut pause = Duration::from_millis(100);
    let cluster = OwnCluster::default();
    let mut is_known = false;
    while !links.is_closed() {
        if !is_known {
            match timeout(DEADLINE, own_cluster(&*store)).await {
                Ok(Ok(id)) => {
                    is_known = true;
                    if cluster.set(id.clone()) {
                        warn!(cluster = id, "the store has been replaced: going on as an agent of its new cluster");
                        if links.send(LinkEvent::ClusterChanged).await.is_err() {
                            return;
                        }
                    }
                }
                // There is none until a coordinator has started.
                Ok(Err(error)) => debug!(%error, "cannot read which cluster this is"),
                Err(_) => debug!("the store does not say which cluster this is"),
            }
        }
        match stream(&dial, &cluster, &links).await {
            Ok(()) => pause = Duration::from_millis(100),
            Err(error) => {
                warn!(error = format!("{error:#}"), "no stream to the coordinator; trying again");
                // Whoever is refused as a stranger may be the one whose store has been replaced.
                is_known &= !error.downcast_ref().is_some_and(is_stranger);
            }
        }
        if links.send(LinkEvent::Closed).await.is_err() {
            return;
        }
        // Jitter, so that not all agents reconnect at the same time.
        let spread = f64::from(uuid::Uuid::new_v4().as_bytes()[0]) / 255.0;
        tokio::time::sleep(pause.mul_f64(0.5 + spread)).await;
        pause = (pause * 2).min(MAX_PAUSE);
    }
}

/// What the store says of which cluster this is.
async fn own_cluster(store: &dyn ObjectStore) -> Result<String> {
    let json = store.get(&Path::from(keys::CLUSTER)).await?.bytes().await?;
    Ok(ClusterRecord::from_json(&json)?.id)
}

/// Runs one stream until it ends.
///
/// # Errors
/// If it could not be opened.
async fn stream(dial: &Dial, cluster: &OwnCluster, links: &mpsc::Sender<LinkEvent>) -> Result<()> {
    let mut client = TrainerServiceClient::new(OfCluster::new(dial.connect().await?, cluster.clone()));
    let (send, to_send) = mpsc::channel(SEND_BUFFER);
    if links.send(LinkEvent::Opened(send)).await.is_err() {
        return Ok(());
    }
    let answer = timeout(DEADLINE, client.connect(ReceiverStream::new(to_send))).await;
    let mut messages = answer.context("the coordinator did not answer")??.into_inner();
    loop {
        match messages.message().await {
            Ok(Some(pb::CoordinatorMessage { message: Some(message) })) => {
                if links.send(LinkEvent::Message(Box::new(message))).await.is_err() {
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
        let coordinator = Dial::new("http://127.0.0.1:7070").expect("an address");
        let loopback = ("127.0.0.1".to_owned(), Some("lo".to_owned()));
        let place = |address: Option<&str>, interface: Option<&str>| {
            advertised_address(&coordinator, address.map(str::to_owned), interface.map(str::to_owned))
        };
        assert_eq!(place(None, None).expect("a route"), loopback);
        assert_eq!(place(None, Some("lo")).expect("it has one"), loopback);
        assert_eq!(place(Some("pod-1.trainer"), None).expect("told"), ("pod-1.trainer".to_owned(), None));
        let refused = format!("{:#}", place(None, Some("lo9")).expect_err("there is none"));
        assert!(refused.contains("--interface lo9") && refused.contains("lo"), "{refused}");
    }
}
