"""Files of the Hugging Face Hub: from its cache on this machine, else downloaded; one sentence if neither can be."""

from __future__ import annotations

import errno
import logging
import socket
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

_PORTS = {"https": 443, "socks5": 1080, "socks5h": 1080}
_CONNECT_S = 5.0
_PROBE_S = 8.0
"""How long a connection may take to come about: name servers that are out of reach answer after half a minute."""


class NotHereError(Exception):
    """A file is not on this machine and cannot be downloaded; the message says why, the attribute where it is.

    Attributes:
        url: the address of the file, for a browser on another machine.
    """

    def __init__(self, reason: str, url: str) -> None:
        super().__init__(reason)
        self.url = url


def hub_file(repository: str, names: Sequence[str]) -> Path:
    """The first of several files of a repository that there is: in the cache, else on the hub.

    A cached file needs no network and is taken without asking whether there is a newer one. `HF_HOME`, `HF_ENDPOINT`,
    `HF_TOKEN` and `HF_HUB_OFFLINE` hold as everywhere. Servers that are busy are asked again; where there is plainly no
    network, that is found out in seconds.

    Args:
        repository: "organisation/name".
        names: the files, the preferred one first.

    Raises:
        NotHereError: none can be had.
    """
    for name in names:
        cached = try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            return Path(cached)
    url = hf_hub_url(repository, names[0])
    if constants.HF_HUB_OFFLINE:
        raise NotHereError("HF_HUB_OFFLINE is set", url)
    problem = unreachable(constants.ENDPOINT)
    if problem is not None:
        raise NotHereError(problem, url)
    with _without_chatter():
        for name in names:
            try:
                return Path(hf_hub_download(repository, name))
            except LocalEntryNotFoundError as error:  # that is: not in the cache either
                raise NotHereError(_reason(error.__cause__ or error), url) from None
            except EntryNotFoundError:
                continue
            except Exception as error:  # the hub's, the HTTP library's and the file system's
                raise NotHereError(_reason(error), url) from None
    raise NotHereError(f"{repository} has no file {' or '.join(names)}", url)


def unreachable(url: str) -> str | None:
    """Why no connection comes about, to the host of an address or to the proxy that leads there; None if one does."""
    host, port = _first_hop(url)
    found: list[str | None] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=_CONNECT_S).close()
            found.append(None)
        except OSError as error:
            found.append(_words(error))

    for pause_s in (0.0, 1.0):  # a name server may lose one question
        time.sleep(pause_s)
        probe = threading.Thread(target=connect, daemon=True)
        probe.start()
        probe.join(_PROBE_S)
        if not found:  # a firewall that drops everything: a second try would take as long
            return f"{host} cannot be reached (no answer)"
        reason = found.pop()
        if reason is None:
            return None
    return f"{host} cannot be reached ({reason})"


def _first_hop(url: str) -> tuple[str, int]:
    target = urlsplit(url)
    proxies = getproxies()
    proxy = proxies.get(target.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(target.netloc):
        target = urlsplit(proxy if "//" in proxy else f"//{proxy}", scheme="http")
    return target.hostname or "", target.port or _PORTS.get(target.scheme, 80)


def _words(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return "its name is not known here"
    if isinstance(error, TimeoutError):
        return "no answer"
    if error.errno == errno.ECONNREFUSED:
        return "connection refused"
    return error.strerror or type(error).__name__


def _reason(error: BaseException) -> str:
    if isinstance(error, GatedRepoError):
        return "it is given only to those who accepted its terms on the hub, and HF_TOKEN names none of them"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        host = urlsplit(constants.ENDPOINT).hostname
        return f"{host} answers {status}" + (", is HF_TOKEN right?" if status in (401, 403) else "")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left for {constants.HF_HUB_CACHE}; HF_HOME moves it"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; HF_HOME moves the cache"
    lines = str(error).splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextmanager
def _without_chatter() -> Iterator[None]:
    """The hub's library logs every retry, and recommends tokens; its bar is left where somebody watches it."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
