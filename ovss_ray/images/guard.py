"""A web client that looks at the address it is about to connect to, at each hop of a redirect."""

from __future__ import annotations

import errno
import socket
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

from ovss_ray.errors import SettingError
from ovss_ray.images.reach import INTERNAL, IPAddress, Reach, authority, is_internal, spelled_address

if TYPE_CHECKING:
    import aiohttp


class RefusedHostError(PermissionError):
    """The address leads to an internal host, and nobody has allowed that."""

    def __init__(self, message: str = INTERNAL) -> None:
        super().__init__(errno.EACCES, message)


@dataclass
class _Hop:
    """Where a request goes next: the address itself, or what a redirect names.

    Attributes:
        host, port: as the address spells them.
        follows_internal: whether that may be an internal host that is not allowed by name.
    """

    host: str
    port: int
    follows_internal: bool


_HOP: ContextVar[_Hop] = ContextVar("hop")  # a request is one task, and so are the hops that it is redirected


@dataclass(frozen=True)
class GuardedClient:
    """Makes sessions for fsspec's file system of the web (its `get_client`).

    The address of every connection is checked when its socket is made, after the name was resolved, so that it does not
    matter how a host is spelled, nor what its name resolves to at another time. Behind a proxy, which resolves
    names itself, only addresses that are written out can be checked.
    """

    reach: Reach

    async def __call__(self, **options: Any) -> aiohttp.ClientSession:
        """A session with the options that users may give aiohttp's."""
        import aiohttp

        guard = _Guard(self.reach)
        trace = aiohttp.TraceConfig()
        trace.on_request_start.append(guard.begin)
        trace.on_request_redirect.append(guard.redirect)
        if options.get("trust_env") or options.get("proxy"):
            guard.proxied = True
        elif options.get("connector") is None:
            options["connector"] = aiohttp.TCPConnector(socket_factory=guard.connect)
        options["trace_configs"] = [*(options.get("trace_configs") or ()), trace]
        try:
            return aiohttp.ClientSession(**options)
        except TypeError as error:
            raise SettingError(f"storage_options['http']['client_kwargs'] cannot be used: {error}") from error


class _Guard:
    """The rules for one session."""

    def __init__(self, reach: Reach) -> None:
        self._reach = reach
        self._internal: dict[tuple[str, int], IPAddress | None] = {}  # hosts that there may be open connections to
        self.proxied = False

    async def begin(self, _session: Any, _context: Any, params: Any) -> None:
        self._go_to(str(params.url), self._reach.follows_internal)

    async def redirect(self, _session: Any, _context: Any, params: Any) -> None:
        location = params.response.headers.get("Location") or params.response.headers.get("URI")
        if location is None:
            return
        here = _HOP.get()
        # From an internal host that was allowed, redirects may lead to its neighbours.
        may_follow = here.follows_internal and (here.host, here.port) in self._internal
        self._go_to(urljoin(str(params.url), location), may_follow)

    def _go_to(self, url: str, follows_internal: bool) -> None:
        try:
            hop = _Hop(*authority(url), follows_internal)
        except ValueError:
            return  # aiohttp refuses it, too
        _HOP.set(hop)
        if (hop.host, hop.port) in self._internal:  # a connection that is open already would be used as it is
            self._check(hop, self._internal[hop.host, hop.port])
        if self.proxied:
            self._check_spelling(hop)

    def connect(self, info: tuple[Any, Any, int, str, tuple[Any, ...]]) -> socket.socket:
        family, kind, protocol, _, place = info
        address = spelled_address(str(place[0]))
        if address is None or is_internal(address):
            hop = _HOP.get()
            self._check(hop, address)
            self._internal[hop.host, hop.port] = address
        return socket.socket(family, kind, protocol)

    def _check(self, hop: _Hop, address: IPAddress | None) -> None:
        if not (hop.follows_internal or self._reach.names(hop.host, hop.port, address)):
            raise RefusedHostError

    def _check_spelling(self, hop: _Hop) -> None:
        address = spelled_address(hop.host)
        if address is not None and is_internal(address):
            self._check(hop, address)
