"""What the addresses in a list may lead to: which protocols, and which hosts that are not public.

A list that lies on the local disk is trusted as the command line is. One in a bucket or on a web server is written by
whoever can write there, and must not be a way to the files, the credentials and the network of the workers.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ovss_ray.errors import nearest
from ovss_ray.images.addresses import PROTOCOLS, family_of, is_local, protocol_of

if TYPE_CHECKING:
    from yarl import URL

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

ALL_HOSTS = "*"
_WEB = family_of("https")
# Not public, though Python has them among the global addresses, or had until 3.12: local NAT64 (RFC 8215), IPv4 as
# translators write it (RFC 2765), site-local (RFC 3879) and segment routing (RFC 9602).
_NOT_PUBLIC = tuple(map(ipaddress.ip_network, ("64:ff9b:1::/48", "::ffff:0:0:0/96", "fec0::/10", "5f00::/16")))
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True)
class Reach:
    """What the addresses that were found in one place may lead to.

    Attributes:
        source: the list, folder or file that holds the addresses; None for an address that is the user's own word.
        schemes: the protocols that they may have; None leaves it to the place of the source.
        hosts: the hosts that are not public and may be asked: names (with `:port`, if only that one is meant),
            addresses, networks, or "*" for all; None leaves it to the place of the source.
        within: what led to the source, where that is a file of many images; both have to allow an address.
    """

    source: str | None = None
    schemes: tuple[str, ...] | None = None
    hosts: tuple[str, ...] | None = None
    within: Reach | None = None

    def inside(self, file: str) -> Reach:
        """What the addresses inside a file may lead to, that is itself an address of the source."""
        if is_local(file):
            return self
        protocol, _, rest = file.partition("://")
        host = rest.partition("/")[0] if protocol.lower() in _WEB else ""  # all files there are one place
        return Reach(f"{protocol}://{host}", self.schemes, self.hosts, within=self)

    @property
    def trusted(self) -> bool:
        """Whether the source is as good as the user's word."""
        return self.source is None or is_local(self.source)

    def refusal(self, uri: str) -> str | None:
        """Why an address may not be opened, by its protocol and by a host that is written as an IP address.

        None if it may, as far as can be told: what a name resolves to is looked at when it is connected to.
        """
        refusal = None if self.within is None else self.within.refusal(uri)
        return refusal or self._own_refusal(uri)

    def _own_refusal(self, uri: str) -> str | None:
        protocol = protocol_of(uri)
        if not uri or protocol not in PROTOCOLS:
            return None
        if self._may_have(protocol):
            return INTERNAL if protocol in _WEB and not self._may_ask(uri) else None
        meant = "local files" if protocol in ("file", "local") else f"{protocol}:// addresses"
        place = "this list" if self.schemes is not None else "a list in a bucket or on a web server"
        return f"{place} may not name {meant}; --allow-schemes can allow it"

    def _may_have(self, protocol: str) -> bool:
        if self.schemes is not None:
            return bool(set(family_of(protocol)) & set(self.schemes))
        if self.source is None or self.trusted:
            return True
        return protocol in (*_WEB, *family_of(protocol_of(self.source)))

    def _may_ask(self, uri: str) -> bool:
        try:
            host, port = authority(uri)
        except ValueError:
            return True  # no usable address
        address = spelled_address(host)
        internal = address is not None and is_internal(address)
        return not internal or self.follows_internal or self.names(host, port, address)

    def names(self, host: str, port: int, address: IPAddress | None) -> bool:
        """Whether an internal host is the one that the source lies on, or allowed by name or address."""
        outer = self.within
        if outer is not None and not (outer.follows_internal or outer.names(host, port, address)):
            return False
        if self.source is not None and protocol_of(self.source) in _WEB:
            with suppress(ValueError):
                if authority(self.source) == (host, port):
                    return True
        return any(_is_meant(given, host, port, address) for given in self.hosts or ())

    @property
    def follows_internal(self) -> bool:
        """Whether addresses may name internal hosts that nobody has allowed by name."""
        return self.hosts is None and self.trusted and (self.within is None or self.within.follows_internal)


USERS_WORD = Reach()
INTERNAL = "it leads to a host that is not public; --allow-hosts can allow it"


def authority(url: str) -> tuple[str, int]:
    """Host and port of a web address as the web client reads them; the host as names are compared.

    Raises:
        ValueError: it is not a usable address.
    """
    from yarl import URL

    return authority_of(URL(url))


def authority_of(url: URL) -> tuple[str, int]:
    """Host and port of an address that is parsed; the host as names are compared."""
    return comparable(url.raw_host or ""), url.port or 0


def comparable(host: str) -> str:
    """A host name in lower case and without the dot that may end it."""
    return host.lower().rstrip(".")


def spelled_address(host: str) -> IPAddress | None:
    """The address that a host is written as, in any spelling that a socket takes; None for a name.

    `127.0.0.1`, `2130706433`, `0x7f.1`, `::1`, `fe80::1%eth0`; `localhost` counts as one, too.
    """
    if host == "localhost" or host.endswith(".localhost"):
        return ipaddress.IPv4Address("127.0.0.1")
    with suppress(ValueError):
        return ipaddress.ip_address(host.partition("%")[0])
    with suppress(OSError, UnicodeError):
        return ipaddress.IPv4Address(socket.inet_aton(host))
    return None


def is_internal(address: IPAddress) -> bool:
    """Whether an address is not one of the public internet, also as IPv4 that is wrapped in IPv6."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in _NAT64 or int(address) >> 32 == 0:  # NAT64, and the compatible form of old
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if any(address in network for network in _NOT_PUBLIC):
            return True
        if any(is_internal(wrapped) for wrapped in inner if wrapped is not None):
            return True
        if address.ipv4_mapped is not None:
            return False
    return not address.is_global or address.is_multicast


def check_schemes(schemes: Sequence[str]) -> tuple[str, ...]:
    """Protocols that a user allows, in lower case.

    Raises:
        ValueError: there is no such protocol.
    """
    names = tuple(name.strip().lower().removesuffix("://") for name in schemes)
    for name in names:
        if name not in PROTOCOLS:
            hint = nearest(name, PROTOCOLS) or f"; there are {', '.join(PROTOCOLS)}"
            raise ValueError(f"{name!r} is no protocol of addresses{hint}")
    return names


def check_hosts(hosts: Sequence[str]) -> tuple[str, ...]:
    """Hosts that a user allows, as names are compared.

    Raises:
        ValueError: what is no name, address or network.
    """
    names = tuple(_as_asked(comparable(name.strip())) for name in hosts)
    for name in names:
        if "://" in name or (name.count("/") and _network(name) is None) or not name:
            raise ValueError(f"{name!r} is no host; write names, addresses or networks, as images.corp,10.1.0.0/16")
    return names


def _as_asked(name: str) -> str:
    """A name as name servers are asked for it: "bücher.example" is "xn--bcher-kva.example"."""
    if name.isascii() or "/" in name:
        return name
    from yarl import URL

    return URL(f"//{name}").raw_authority


def _is_meant(given: str, host: str, port: int, address: IPAddress | None) -> bool:
    if given in (ALL_HOSTS, host, f"{host}:{port}", f"[{host}]:{port}"):
        return True
    network = _network(given)
    inner = getattr(address, "ipv4_mapped", None)
    return network is not None and any(form is not None and form in network for form in (address, inner))


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text.strip("[]"), strict=False)
    except ValueError:
        return None
