"""A web client that looks at the address it is about to connect to, at each hop of a redirect."""

from __future__ import annotations

import errno
import socket
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ovss_ray.errors import SettingError
from ovss_ray.images.reach import INTERNAL, IPAddress, Reach, authority_of, is_internal, spelled_address

if TYPE_CHECKING:
    import aiohttp
    from yarl import URL


class RefusedHostError(PermissionError):
    """The address leads to an internal host, and nobody has allowed that."""

    def __init__(self, message: str = INTERNAL) -> None:
        super().__init__(errno.EACCES, message)


@dataclass
class _Hop:
    """Where a request goes next: the address itself, or what a redirect names.

    Attributes:
        follows_internal: whether that may be an internal host that is not allowed by name.
        host, port: as the client has read them from the address; no host until it asks for a connection.
        proxied: whether the connection leads to a proxy, which the user has named.
    """

    follows_internal: bool = False
    host: str = ""
    port: int = 0
    proxied: bool = False


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

        if options.get("connector") is not None:
            raise SettingError(
                "storage_options['http']['client_kwargs'] cannot hold a connector: connections would not be checked"
            )
        guard = _Guard(self.reach)
        trace = aiohttp.TraceConfig()
        trace.on_request_start.append(guard.begin)
        trace.on_request_redirect.append(guard.redirect)
        options["connector"] = _connector(guard)
        options["trace_configs"] = [*(options.get("trace_configs") or ()), trace]
        try:
            return aiohttp.ClientSession(**options)
        except TypeError as error:
            await options["connector"].close()
            raise SettingError(f"storage_options['http']['client_kwargs'] cannot be used: {error}") from error


def _connector(guard: _Guard) -> aiohttp.TCPConnector:
    import aiohttp

    class Connector(aiohttp.TCPConnector):
        """Shows the guard each request as the client has parsed it: a second parser would read some otherwise."""

        async def connect(self, req: Any, *arguments: Any, **options: Any) -> Any:
            guard.go_to(req.url, proxied=req.proxy is not None)
            return await super().connect(req, *arguments, **options)

    return Connector(socket_factory=guard.connect)


class _Guard:
    """The rules for one session."""

    def __init__(self, reach: Reach) -> None:
        self._reach = reach
        self._internal: dict[tuple[str, int], IPAddress | None] = {}  # hosts that there may be open connections to

    async def begin(self, _session: Any, _context: Any, _params: Any) -> None:
        _HOP.set(_Hop(self._reach.follows_internal))

    async def redirect(self, _session: Any, _context: Any, _params: Any) -> None:
        here = _HOP.get()
        # From an internal host that was allowed, redirects may lead to its neighbours.
        _HOP.set(_Hop(here.follows_internal and (here.host, here.port) in self._internal))

    def go_to(self, url: URL, *, proxied: bool) -> None:
        hop = _HOP.get()
        hop.host, hop.port = authority_of(url)
        hop.proxied = proxied
        if (hop.host, hop.port) in self._internal:  # a connection that is open already would be used as it is
            self._check(hop, self._internal[hop.host, hop.port])
        if proxied:
            self._check_spelling(hop)

    def connect(self, info: tuple[Any, Any, int, str, tuple[Any, ...]]) -> socket.socket:
        family, kind, protocol, _, place = info
        hop = _HOP.get()
        address = spelled_address(str(place[0]))
        if not hop.proxied and (address is None or is_internal(address)):
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
