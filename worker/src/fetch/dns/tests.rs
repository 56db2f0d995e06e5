use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::net::UdpSocket;

use super::*;

/// A double of a name server. It knows what a name stands for by its first word, and counts questions.
struct NameServerDouble {
    address: SocketAddr,
    asked: Arc<AtomicUsize>,
}

impl NameServerDouble {
    async fn start() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").await.expect("loopback");
        let (address, asked) = (socket.local_addr().expect("bound"), Arc::new(AtomicUsize::new(0)));
        let count = Arc::clone(&asked);
        tokio::spawn(async move {
            let mut packet = [0; 1024];
            while let Ok((length, from)) = socket.recv_from(&mut packet).await {
                let before = count.fetch_add(1, Ordering::SeqCst);
                if let Some(answer) = answer(&packet[..length], before) {
                    socket.send_to(&answer, from).await.ok();
                }
            }
        });
        Self { address, asked }
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    fn resolver(&self, others: &[NameServer]) -> GuardedResolver {
        let servers = [&[NameServer(self.address)], others].concat();
        GuardedResolver::new(AddressRules::default(), &servers).expect("name servers are named")
    }
}

/// RFC 1035, by hand: the header, the question repeated, and at most one address.
fn answer(question: &[u8], before: usize) -> Option<Vec<u8>> {
    let end = 12 + question.get(12..)?.iter().position(|&byte| byte == 0)? + 5;
    let word = question.get(13..13 + usize::from(question[12]))?.to_ascii_lowercase();
    let in_cluster = question.windows(7).any(|part| part == b"cluster");
    let is_a = question.get(end - 4..end - 2)? == [0, 1];
    let (code, address): (u8, Option<[u8; 4]>) = match word.split(|byte| matches!(byte, b'-' | b'_')).next()? {
        b"good" => (0, Some([93, 184, 216, 34])),
        // A public address at first, a private one later; neither is to be remembered.
        b"rebinding" => (0, Some(if before < 2 { [93, 184, 216, 34] } else { [10, 0, 0, 1] })),
        b"private" => (0, Some([192, 168, 1, 1])),
        b"inside" if in_cluster => (0, Some([10, 0, 0, 7])),
        // As a whole a cluster that cannot ask the world does not know it.
        b"broken" | b"inside" => (2, None),
        // Whatever its IPv4 address is, it has none of IPv6.
        b"half" => (if is_a { 2 } else { 0 }, None),
        b"silent" => return None,
        _ => (3, None),
    };
    let address = address.filter(|_| is_a);
    let mut packet = question[..end].to_vec();
    let empty = code == 0 && address.is_none();
    packet[2..12].copy_from_slice(&[0x81, 0x80 | code, 0, 1, 0, u8::from(address.is_some()), 0, u8::from(empty), 0, 0]);
    if empty {
        // RFC 2308: for how long there is no such record is what the root's SOA says.
        packet.extend([0, 0, 6, 0, 1, 0, 0, 1, 44, 0, 22, 0, 0]);
        packet.extend([[0, 0, 0, 1], [0, 0, 1, 44], [0, 0, 1, 44], [0, 0, 1, 44], [0, 0, 1, 44]].concat());
    }
    if let Some(address) = address {
        packet.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4]);
        packet.extend(address);
    }
    Some(packet)
}

async fn resolve(resolver: &GuardedResolver, name: &str) -> Result<Vec<IpAddr>, String> {
    let found = resolver.resolve(name.parse().expect("a name")).await;
    found.map(|found| found.map(|to| to.ip()).collect()).map_err(|error| error.to_string())
}

#[tokio::test]
async fn thousands_of_dead_names_are_each_asked_for_once_and_stall_nobody() {
    let server = NameServerDouble::start().await;
    let resolver = server.resolver(&[]);
    let begun = Instant::now();
    for _ in 0..2 {
        let mut lookups = tokio::task::JoinSet::new();
        for n in 0..3000 {
            let resolver = resolver.clone();
            lookups.spawn(async move {
                loop {
                    match resolve(&resolver, &format!("dead-{n}.example")).await {
                        // On a slow machine.
                        Err(error) if error.contains("turn") => {}
                        found => return found,
                    }
                }
            });
        }
        assert!(lookups.join_all().await.iter().all(|found| found.as_ref().is_err_and(|e| e.contains("no address"))));
    }
    // Both kinds of address of each name, once; some more if the machine is so slow that questions are repeated.
    assert!((6000..6600).contains(&server.asked()), "{}", server.asked());
    assert!(begun.elapsed() < Duration::from_secs(60));
}

#[tokio::test]
async fn names_that_nobody_answers_for_fail_in_time_while_others_are_resolved() {
    let server = NameServerDouble::start().await;
    let resolver = server.resolver(&[]);
    let begun = Instant::now();
    let silent = async {
        let mut lookups = tokio::task::JoinSet::new();
        for n in 0..MAX_LOOKUPS / 2 {
            let resolver = resolver.clone();
            lookups.spawn(async move { resolve(&resolver, &format!("silent-{n}.example")).await });
        }
        assert!(lookups.join_all().await.iter().all(|found| found.as_ref().is_err_and(|e| e.contains("could tell"))));
    };
    let good = async {
        let found = resolve(&resolver, "good-1.example").await.expect("it is asked for beside them");
        assert_eq!(found, [Ipv4Addr::new(93, 184, 216, 34)]);
        assert!(begun.elapsed() < ASK_TIMEOUT);
    };
    tokio::join!(silent, good);
    assert!(begun.elapsed() < LOOKUP_TIMEOUT + Duration::from_secs(4));
    let asked = server.asked();
    resolve(&resolver, "silent-1.example").await.expect_err("remembered");
    assert_eq!(server.asked(), asked);
}

#[tokio::test]
async fn a_name_that_has_no_turn_beside_many_others_has_not_failed() {
    let server = NameServerDouble::start().await;
    let resolver = server.resolver(&[]);
    let turns = resolver.0.lookups.acquire_many(MAX_LOOKUPS as u32).await.expect("it is open");
    let error = resolve(&resolver, "good-3.example").await.expect_err("all turns are taken");
    assert!(error.contains("turn"), "{error}");
    drop(turns);
    resolve(&resolver, "good-3.example").await.expect("nothing was remembered of it");
}

#[tokio::test]
async fn a_name_without_an_ipv6_address_whose_other_answer_fails_is_not_taken_for_dead() {
    let server = NameServerDouble::start().await;
    let error = resolve(&server.resolver(&[]), "half-1.example").await.expect_err("nobody could tell");
    assert!(error.contains("could tell"), "{error}");
}

#[tokio::test]
async fn a_second_name_server_answers_when_the_first_does_not() {
    let server = NameServerDouble::start().await;
    let deaf = std::net::UdpSocket::bind("127.0.0.1:0").expect("loopback");
    let other = NameServer(deaf.local_addr().expect("bound"));
    let resolver = GuardedResolver::new(AddressRules::default(), &[other, NameServer(server.address)]);
    let found = resolve(&resolver.expect("name servers are named"), "good-2.example").await;
    assert_eq!(found.expect("the second one knows"), [Ipv4Addr::new(93, 184, 216, 34)]);
}

#[tokio::test]
async fn names_that_no_host_should_have_are_looked_up_all_the_same() {
    let server = NameServerDouble::start().await;
    let resolver = server.resolver(&[]);
    for name in ["good_cube.example", "good-.example", "good--x.my_blog.example", "good-1._.example", "GOOD-1.example."]
    {
        assert!(resolve(&resolver, name).await.is_ok(), "{name}");
    }
    let asked = server.asked();
    for name in ["good..example", &format!("good-{}.example", "x".repeat(60))] {
        let error = resolve(&resolver, name).await.expect_err("no name at all");
        assert!(error.contains("no address"), "{name}: {error}");
    }
    assert_eq!(server.asked(), asked);
}

#[tokio::test]
async fn answers_are_remembered_and_each_is_checked_however_often_it_was_right_before() {
    let server = NameServerDouble::start().await;
    let resolver = server.resolver(&[]);
    assert!(resolve(&resolver, "rebinding-1.example").await.is_ok());
    assert!(resolve(&resolver, "rebinding-1.example").await.is_ok());
    assert_eq!(server.asked(), 2, "A and AAAA, once");
    resolver.0.resolver.clear_cache();
    let error = resolve(&resolver, "rebinding-1.example").await.expect_err("it is private now");
    assert!(error.contains("may reach"), "{error}");
    assert!(resolve(&resolver, "private-1.example").await.is_err());
}

#[tokio::test]
async fn the_hosts_file_and_localhost_count_and_a_search_list_does_where_private_nets_are_allowed() {
    let server = NameServerDouble::start().await;
    let loopback = AddressRules { allowed: vec!["127.0.0.0/8".parse().expect("a net")] };
    let resolver = GuardedResolver::new(loopback, &[NameServer(server.address)]).expect("named");
    let found = resolve(&resolver, "localhost").await.expect("allowed");
    assert!(!found.is_empty() && found.iter().all(|ip| *ip == Ipv4Addr::LOCALHOST));
    let error = resolve(&server.resolver(&[]), "localhost").await.expect_err("loopback is forbidden");
    assert!(error.contains("may reach"), "{error}");
    assert_eq!(server.asked(), 0);

    // As in a pod, where resolv.conf has ndots:5 and four domains to search.
    let mut config = ResolverConfig::from_name_servers(vec![]);
    for domain in ["ns.svc.cluster.local.", "svc.cluster.local.", "cluster.local.", "corp.example."] {
        config.add_search(domain.parse().expect("a name"));
    }
    let mut connection = ConnectionConfig::udp();
    connection.port = server.address.port();
    config.add_name_server(NameServerConfig::new(server.address.ip(), true, vec![connection]));
    let mut options = ResolverOpts::default();
    options.ndots = 5;
    let public = GuardedResolver::with(AddressRules::default(), config.clone(), options.clone()).expect("good options");
    resolve(&public, "dead-1.example").await.expect_err("dead");
    assert_eq!(server.asked(), 2, "no question is multiplied");
    resolve(&public, "inside.pictures").await.expect_err("no public name");
    let private = AddressRules { allowed: vec!["10.0.0.0/8".parse().expect("a net")] };
    for ndots in [5, 1] {
        options.ndots = ndots;
        let private = GuardedResolver::with(private.clone(), config.clone(), options.clone()).expect("good options");
        assert_eq!(resolve(&private, "inside.pictures").await.expect("a service"), [Ipv4Addr::new(10, 0, 0, 7)]);
    }
}

#[tokio::test]
async fn without_name_servers_the_hosts_file_counts_and_other_names_fail_at_once() {
    let loopback = AddressRules { allowed: vec!["127.0.0.0/8".parse().expect("a net")] };
    let none = ResolverConfig::from_name_servers(Vec::new());
    let resolver = GuardedResolver::with(loopback, none, ResolverOpts::default()).expect("good options");
    assert!(resolve(&resolver, "localhost").await.is_ok());
    let begun = Instant::now();
    resolve(&resolver, "good-1.example").await.expect_err("nobody can be asked");
    assert!(begun.elapsed() < ASK_TIMEOUT);
}

#[test]
fn name_servers_are_addresses_with_or_without_a_port() {
    for (text, address) in [("9.9.9.9", "9.9.9.9:53"), ("::1", "[::1]:53"), ("[::1]:5353", "[::1]:5353")] {
        assert_eq!(text.parse::<NameServer>().expect(text).0.to_string(), address);
    }
    assert!("dns.example".parse::<NameServer>().is_err());
}
