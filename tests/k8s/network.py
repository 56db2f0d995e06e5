"""The network that pods of one node see: addresses, Services, policies, names.

Each pod has a network namespace with one address, and the node routes between them. What kube-proxy and a network's policies would do
are rules of iptables here, made anew from all that there is whenever something changes.
"""

import ipaddress
import itertools
import socket
import struct
import subprocess
import sys

from check import matches

PODS, GATEWAY, NAME_SERVER, DOMAIN = ipaddress.ip_network("10.244.0.0/24"), "169.254.1.1", "10.96.0.10", "cluster.local"


class Failed(Exception):
    """An expectation that does not hold."""


def run(*command, **options):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60, **options)
    if done.returncode:
        raise Failed(f"{' '.join(map(str, command))}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def understood(item, fields):
    if unknown := set(item or {}) - fields:
        raise Failed(f"not understood here: {sorted(unknown)}")


class Sandbox:
    """A network namespace with an address of the cluster. A pod's outlives its containers."""
    numbers = itertools.count(10)

    def __init__(self, name, namespace, labels):
        number = next(self.numbers)
        self.name, self.namespace, self.labels, self.ip, self.ready = name, namespace, labels, str(PODS[number]), True
        link, inside = f"pod{number}", ("ip", "-n", name)
        run("ip", "netns", "add", name)
        run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        for command in (
            (*inside, "link", "set", "lo", "up"),
            (*inside, "link", "set", "eth0", "up"),
            (*inside, "addr", "add", f"{self.ip}/32", "dev", "eth0"),
            (*inside, "route", "add", GATEWAY, "dev", "eth0", "scope", "link"),
            (*inside, "route", "add", "default", "via", GATEWAY),
            ("ip", "link", "set", link, "up"),
            ("ip", "addr", "add", f"{GATEWAY}/32", "dev", link, "scope", "link"),
            ("ip", "route", "add", f"{self.ip}/32", "dev", link),
        ):
            run(*command)

    def remove(self):
        run("ip", "netns", "del", self.name)

    def reaches(self, ip, port):
        program = f"import socket; socket.create_connection(({ip!r}, {port}), 2)"
        command = ["ip", "netns", "exec", self.name, sys.executable, "-c", program]
        return subprocess.run(command, capture_output=True, timeout=30).returncode == 0


def networks(block):
    """An ipBlock's networks but for its exceptions and the pods, for whom it does not hold."""
    left = [ipaddress.ip_network(block["cidr"])]
    if left[0].version == 6:
        return []
    for gone in [PODS, *map(ipaddress.ip_network, block.get("except", []))]:
        left = [part for net in left if not net.subnet_of(gone)
                for part in (net.address_exclude(gone) if gone.subnet_of(net) else [net])]
    return left


def peers(peer, namespace, namespaces, sandboxes):
    """Addresses that a policy's peer stands for. The name server counts as a pod of kube-system."""
    understood(peer, {"ipBlock", "namespaceSelector", "podSelector"})
    if "ipBlock" in peer:
        return networks(peer["ipBlock"])
    chosen = {namespace}
    if "namespaceSelector" in peer:
        chosen = {name for name, labels in namespaces.items() if matches(peer["namespaceSelector"], labels)}
    found = [s.ip for s in sandboxes if s.namespace in chosen and matches(peer.get("podSelector", {}), s.labels)]
    return found + [NAME_SERVER] * ("kube-system" in chosen and not peer.get("podSelector"))


def filters(policies, namespaces, sandboxes):
    """The policies as rules of the table `filter`. What is sent to a Service has been led to a pod before."""
    chains, rules = [], []
    for sandbox in sandboxes:
        for way, key, own, other in (("Egress", "to", "-s", "-d"), ("Ingress", "from", "-d", "-s")):
            holding = [policy for policy in policies if policy["metadata"]["namespace"] == sandbox.namespace
                       and way in policy["spec"]["policyTypes"] and matches(policy["spec"]["podSelector"], sandbox.labels)]
            if not holding:
                continue
            chain = f"{way}-{sandbox.ip}"
            chains.append(f":{chain} -")
            rules += [f"-A {hook} {own} {sandbox.ip} -j {chain}" for hook in ("FORWARD", "INPUT") if hook == "FORWARD" or way == "Egress"]
            for rule in (rule for policy in holding for rule in policy["spec"].get(way.lower(), [])):
                addresses = [a for peer in rule[key] for a in peers(peer, sandbox.namespace, namespaces, sandboxes)]
                for port in rule.get("ports", [{}]):
                    understood(port, {"protocol", "port"})
                    kind = f"-p {port.get('protocol', 'TCP').lower()}" if port else ""
                    number = f"--dport {int(port['port'])}" if "port" in port else ""
                    rules += [f"-A {chain} {other} {address} {kind} {number} -j RETURN" for address in addresses]
            rules.append(f"-A {chain} -j DROP")
    return chains, rules


def target_port(service_port, sandbox):
    """A Service's port in one of its pods, which may name it."""
    target = service_port.get("targetPort", service_port["port"])
    return target if isinstance(target, int) else sandbox.ports[target]


def tables(services, policies, namespaces, sandboxes):
    """All that iptables-restore has to know."""
    nat, refused = [], []
    for service in services:
        meta, spec = service["metadata"], service["spec"]
        ready = [s for s in sandboxes
                 if s.ready and s.namespace == meta["namespace"] and matches({"matchLabels": spec["selector"]}, s.labels)]
        for port in spec["ports"]:
            to = f"-d {spec['clusterIP']} -p tcp --dport {port['port']}"
            for left, sandbox in zip(range(len(ready), 0, -1), ready):
                share = f"-m statistic --mode random --probability {1 / left:.6f}" if left > 1 else ""
                nat.append(f"-A SERVICES {to} {share} -j DNAT --to-destination {sandbox.ip}:{target_port(port, sandbox)}")
            if not ready:
                refused += [f"-A {hook} {to} -j REJECT" for hook in ("FORWARD", "OUTPUT")]
    chains, rules = filters(policies, namespaces, sandboxes)
    answers = [f"-A {hook} -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT" for hook in ("FORWARD", "INPUT")]
    return "\n".join([
        "*nat", ":PREROUTING ACCEPT", ":OUTPUT ACCEPT", ":SERVICES -", "-A PREROUTING -j SERVICES", "-A OUTPUT -j SERVICES", *nat, "COMMIT",
        "*filter", ":INPUT ACCEPT", ":FORWARD ACCEPT", ":OUTPUT ACCEPT", *chains, *answers, *refused, *rules, "COMMIT", ""])


def answer(query, addresses):
    """The reply to one DNS question: an address, or that there is none, for as long as CoreDNS says so."""
    labels, at = [], 12
    while query[at]:
        labels.append(query[at + 1:at + 1 + query[at]].decode().lower())
        at += 1 + query[at]
    kind, ip = int.from_bytes(query[at + 1:at + 3], "big"), addresses.get(".".join(labels))
    found = ip and kind == 1
    if found:
        record = b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 30, 4) + socket.inet_aton(ip)
    else:
        domain = b"\x07cluster\x05local\0"
        soa = b"\x02ns\x03dns" + domain + b"\x0ahostmaster" + domain + struct.pack(">5I", 1, 7200, 1800, 86400, 30)
        record = domain + struct.pack(">HHIH", 6, 1, 30, len(soa)) + soa
    head = struct.pack(">2sHHHHH", query[:2], 0x8580 | (0 if ip else 3), 1, 1 if found else 0, 0 if found else 1, 0)
    return head + query[12:at + 5] + record
