"""Which servers an image may be fetched from. Called by fetch.py, for each address it comes to.

A request says where the function connects to, and the function stands inside an AWS account. So an
address is read once, strictly; its name is resolved once; and what `resolve` has checked is what
fetch.py connects to. A name that changes its answer changes nothing after that.

Environment, both empty by default (parameters AllowedHosts and AllowPrivateHosts of the template):
    ALLOWED_HOSTS        images come from these names only: `a.example.com,*.example.org`
    ALLOW_PRIVATE_HOSTS  `host:port,…` that may have a private address; for the embedded AWS
"""

import ipaddress
import os
import re
import socket
import threading
import time
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from errors import RequestError

MAX_LENGTH = 8192  # characters of an address; presigned ones have up to about 2,500
PORTS = {"http": 80, "https": 443}

# IANA's registries of special-purpose addresses, https://www.iana.org/assignments/
# iana-ipv4-special-registry and iana-ipv6-special-registry: all that is no public unicast address.
# `ipaddress.is_global` answers the same question, differently in each version of Python.
PUBLIC = {4: ipaddress.ip_network("0.0.0.0/0"), 6: ipaddress.ip_network("2000::/3")}
SPECIAL = [
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # shared by carriers; a cloud's metadata
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # a cloud's metadata
        "169.254.0.0/16",  # link-local: AWS's metadata and credentials
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments; a cloud's metadata
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
        # Of IPv6 only 2000::/3 is public: not ::ffff:0:0/96 (IPv4-mapped), 64:ff9b::/96 and
        # 64:ff9b:1::/48 (NAT64), fc00::/7 (private; fd00:ec2::254 is AWS's metadata), fe80::/10.
        "2001::/23",  # protocol assignments, Teredo
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: an IPv4 address inside
        "3fff::/20",  # documentation
    )
]
# What ALLOW_PRIVATE_HOSTS can open. Never a metadata endpoint.
PRIVATE = [
    ipaddress.ip_network(network)
    for network in (
        *("10.0.0.0/8", "127.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"),
        *("::1/128", "fd00::/16"),
    )
]
# Names that the public DNS does not have, and somebody's private one may.
PRIVATE_NAMES = re.compile(
    r"(.*\.)?(localhost|localdomain|local|internal|intranet|private|corp|home|lan|home\.arpa)"
)
HOST_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")

NUMBER = re.compile(r"\d+|0x[0-9a-f]*")
ZONE = re.compile(r"[\w.~%-]*", re.ASCII)  # of an IPv6 address, after its percent sign


@dataclass(frozen=True)
class Address:
    """An http(s) address. `host` is in lower case, ASCII, without brackets or a final dot."""

    scheme: str
    host: str
    port: int
    target: str  # path and query, as they are sent

    @property
    def place(self) -> str:
        """`host:port`."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse(url: str) -> Address:
    """Read an address; raises RequestError: 400 if it is none, 403 if policy forbids it."""
    if len(url) > MAX_LENGTH:
        raise _bad(f"is longer than {MAX_LENGTH:,} characters")
    if re.search(r"[\x00-\x1f\x7f\\]|^\s|\s$|[\ud800-\udfff]", url):  # urlsplit would drop some
        raise _bad("has characters that no address has")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _bad("is not a valid address") from None
    if parts.scheme not in PORTS:
        raise _bad("is not an http:// or https:// address")
    if "@" in parts.netloc:
        raise forbidden("has a user name in it")
    host = _host(parts.hostname or "")
    port = PORTS[parts.scheme] if port is None else port
    target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
    if parts.query:
        target += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~?[]")
    address = Address(parts.scheme, host, port, target)
    _check_policy(address)
    return address


def resolve(address: Address, deadline: float) -> list[tuple[socket.AddressFamily, tuple]]:
    """The socket addresses behind an address, all of them public, in the system's order.

    Raises RequestError: 400 if there is no such name, 403 if one of them is not public, 502 if the
    name service fails, 504 if it does not answer by `deadline` (of time.monotonic).
    """
    found = _lookup(address.host, address.port, deadline)
    excepted = address.place in _listed("ALLOW_PRIVATE_HOSTS")
    for _, place in found:
        ip = ipaddress.ip_address(place[0].split("%")[0])
        if not is_public(ip) and not (excepted and is_private(ip)):
            raise forbidden("does not lead to a public server", f"{address.host} is {ip}")
    return found


def is_public(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether it is a unicast address of the public internet, with no other address inside it."""
    return ip in PUBLIC[ip.version] and not any(ip in network for network in SPECIAL)


def is_private(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether ALLOW_PRIVATE_HOSTS can make an exception for it."""
    metadata = ip in ipaddress.ip_network("fd00:ec2::/32")
    return not metadata and any(ip in network for network in PRIVATE)


def forbidden(why: str, detail: str = "") -> RequestError:
    return RequestError(403, "address_not_allowed", f"The url {why}.", detail)


def _bad(why: str) -> RequestError:
    return RequestError(400, "bad_url", f"The url {why}.")


def _host(name: str) -> str:
    """One spelling of a host: lower-case ASCII, no final dot. Raises RequestError(400)."""
    if ":" in name:
        if not ZONE.fullmatch(name.partition("%")[2]):
            raise _bad("has no valid host")
        try:
            return str(ipaddress.IPv6Address(name))
        except ValueError:
            raise _bad("has no valid host") from None
    if not name.isascii():
        import idna  # for the few that need it

        try:
            name = idna.encode(name, uts46=True).decode()
        except (idna.IDNAError, ValueError):
            raise _bad("has no valid host") from None
    name = name.lower().removesuffix(".")
    if len(name) > 253 or not HOST_NAME.fullmatch(name):
        raise _bad("has no valid host")
    # What ends in a number is an IPv4 address or nothing, https://url.spec.whatwg.org/#host-parsing;
    # the resolver would ask the name service for 256.1.1.1, and wait.
    if NUMBER.fullmatch(name.rpartition(".")[2]):
        try:
            socket.inet_aton(name)
        except OSError:
            raise _bad("has no valid host") from None
    return name


def _check_policy(address: Address) -> None:
    """What can be said before the name is resolved. Raises RequestError(403)."""
    excepted = address.place in _listed("ALLOW_PRIVATE_HOSTS")
    allowed = _listed("ALLOWED_HOSTS")
    if allowed and not excepted and not any(_matches(address.host, entry) for entry in allowed):
        raise forbidden("is of a server that is not on this function's list")
    if excepted:
        return
    if address.port not in PORTS.values():
        raise forbidden("has a port other than 80 and 443")
    single_label = "." not in address.host and not re.match(r"\d", address.host)
    if ":" not in address.host and (single_label or PRIVATE_NAMES.fullmatch(address.host)):
        raise forbidden("does not lead to a public server", address.host)


def _matches(host: str, entry: str) -> bool:
    return host.endswith(entry[1:]) if entry.startswith("*.") else host == entry


def _listed(variable: str) -> list[str]:
    entries = (entry.strip().lower() for entry in os.environ.get(variable, "").split(","))
    return [entry for entry in entries if entry]


def _lookup(host: str, port: int, deadline: float) -> list[tuple[socket.AddressFamily, tuple]]:
    """getaddrinfo, but not for longer than `deadline`: it has no timeout of its own."""
    answer: list = []

    def ask() -> None:
        try:
            answer.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(max(0.0, deadline - time.monotonic()))
    if not answer:
        raise RequestError(504, "fetch_timeout", "The image's server is too slow.", "name service")
    if isinstance(answer[0], UnicodeError) or getattr(answer[0], "errno", None) in NO_SUCH_NAME:
        raise RequestError(400, "host_not_found", "The url's server does not exist.", host)
    if isinstance(answer[0], OSError):
        sentence = "The image's server cannot be reached."
        raise RequestError(502, "fetch_failed", sentence, f"name service: {answer[0]}")
    return [(family, place) for family, _, _, _, place in answer[0]]


NO_SUCH_NAME = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}
