"""Which file system holds a URI, and what the errors of the different stores mean."""

from __future__ import annotations

import asyncio
import errno
import http
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import fsspec

from ovss_ray.errors import InputError, OvssError, SettingError
from ovss_ray.images.addresses import FAMILIES, PROTOCOLS, family_of
from ovss_ray.images.addresses import is_local as is_local
from ovss_ray.images.addresses import local_path as local_path
from ovss_ray.images.addresses import protocol_of as protocol_of
from ovss_ray.images.guard import GuardedClient, RefusedHostError
from ovss_ray.images.reach import USERS_WORD, Reach
from ovss_ray.redaction import hide_options

StorageOptions = Mapping[str, Mapping[str, Any]]
StoreFailure = Literal[
    "not_found",
    "forbidden",
    "credentials",
    "unreachable",
    "throttled",
    "timeout",
    "disconnected",
    "truncated",
    "server_error",
    "rejected",
    "other",
]

_CREDENTIAL_ERRORS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "ProfileNotFound",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
    "DefaultCredentialsError",
    "ClientAuthenticationError",
}
_CONNECTION_ERRORS = {
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ClientConnectorError",
    "ServiceRequestError",
    "ConnectionRefusedError",
}
_TRUNCATION_ERRORS = {
    "TruncatedError",
    "ClientPayloadError",
    "IncompleteReadError",
    "IncompleteRead",
    "ResponseStreamingError",
    "HttpProcessingError",
}
_TIMEOUT_ERRORS = {"TimeoutError", "ReadTimeoutError", "ServiceResponseTimeoutError", "FSTimeoutError"}
_DISCONNECTION_ERRORS = {"ConnectionError", "ServerDisconnectedError", "ClientOSError", "ConnectionClosedError"}
_REDIRECTION_ERRORS = {"TooManyRedirects", "RedirectClientError"}
# Not every server says "slow down" with status 503 or 429.
_THROTTLING_CODES = {"SlowDown", "Throttling", "ThrottlingException", "TooManyRequests", "RequestLimitExceeded"}
_DAMAGE_CODES = {"IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "Md5Mismatch"}  # on the way, status 400
_REJECTED_STATUSES = (400, 405, 411, 414, 501)
_REJECTION_ERRORS = {"ParamValidationError", "InvalidEndpointURLError"}
_DRIVERS = {
    *("adlfs", "aiobotocore", "aiohttp", "azure", "botocore", "fsspec", "gcsfs", "google", "msal", "requests", "s3fs"),
    "urllib3",
}


_FAILURE_WORDS: dict[StoreFailure, str] = {
    "not_found": "there is no such file",
    "forbidden": "no permission",
    "credentials": "no usable credentials",
    "unreachable": "the store cannot be reached",
    "throttled": "the store is too busy to answer",
    "timeout": "no answer in time",
    "disconnected": "the server broke the connection",
    "truncated": "the answer is incomplete",
    "server_error": "the server failed",
    "rejected": "the store rejects the request",
}


class TruncatedError(OSError):
    """Fewer bytes arrived than there are."""


def open_store(
    uri: str | os.PathLike[str], storage_options: StorageOptions | None = None, reach: Reach = USERS_WORD
) -> tuple[fsspec.AbstractFileSystem, str]:
    """Open the file system that holds a URI.

    Args:
        uri: a local path (relative, `~`, `file://`) or an s3://, gs://, az://, abfs:// or http(s):// address.
        storage_options: fsspec options by protocol, e.g. `{"s3": {"endpoint_url": "http://minio:9000"}}`; the
            environment (AWS_PROFILE, AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS ...) works without them.
        reach: which internal hosts a web address may lead to; its protocol is checked by whoever has the address.

    Returns:
        The fsspec file system and the path inside it; the path of a local file is absolute.

    Raises:
        SettingError: an unknown protocol, a driver that is not installed, options not grouped by protocol, or that
            the driver refuses.
    """
    uri = os.fspath(uri)
    if not uri:
        raise SettingError("an empty path was given; name a file, a folder or a URI")
    hide_options(storage_options or {})
    options = _options_for(protocol_of(uri), storage_options or {})
    if is_local(uri):
        return fsspec.filesystem("file", **options), local_path(uri)
    token = options.get("token")
    if protocol_of(uri) in ("gs", "gcs") and isinstance(token, str) and "/" in token and not os.path.exists(token):  # noqa: PTH110
        # gcsfs would take it for the token itself, and send it to Google.
        raise SettingError(f"the file {token} of storage_options['gs']['token'] does not exist; check the path")
    if protocol_of(uri) in ("http", "https"):
        options = {"get_client": GuardedClient(reach), **options}
    driver = _driver(protocol_of(uri), options)
    try:
        return driver(**{**driver._get_kwargs_from_urls(uri), **options}), str(driver._strip_protocol(uri))
    except Exception as error:  # some drivers look at options and credentials here, each with exceptions of its own
        raise SettingError(
            f"{uri} cannot be opened: {brief(error)}; check storage_options[{protocol_of(uri)!r}] and the environment"
        ) from error


def _driver(protocol: str, options: Mapping[str, Any]) -> Any:
    extra = next(extra for names, extra in FAMILIES if protocol in names)
    try:
        if protocol in family_of("gs") and (options.get("endpoint_url") or os.environ.get("STORAGE_EMULATOR_HOST")):
            # The class that gcsfs registers asks the endpoint for the kind of each bucket over gRPC first. Servers
            # other than Google's speak JSON only, and each such question takes minutes to fail.
            from gcsfs.core import GCSFileSystem  # type: ignore[import-not-found, import-untyped, unused-ignore]

            return GCSFileSystem
        return fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise SettingError(
            f"{protocol}:// addresses need a driver that is not installed; "
            f'install it with: pip install "ovss-ray[{extra}]"'
        ) from error


def _options_for(protocol: str, storage_options: StorageOptions) -> dict[str, Any]:
    for key, value in storage_options.items():
        if key not in PROTOCOLS or not isinstance(value, Mapping):
            raise SettingError(
                f"storage_options[{key!r}] is not a group of options for a protocol; "
                f'write for example {{"s3": {{{key!r}: ...}}}} (protocols: {", ".join(PROTOCOLS)})'
            )
    family = next((names for names, _ in FAMILIES if protocol in names), None)
    if family is None:
        raise SettingError(
            f"unknown protocol {protocol}://; use a local path or one of "
            + ", ".join(f"{name}://" for name in PROTOCOLS)
        )
    return {name: value for alias in family for name, value in storage_options.get(alias, {}).items()}


def store_failure(error: BaseException) -> StoreFailure:
    """What an exception of any store means: the stores share neither types nor status codes.

    The innermost cause decides, because fsspec wraps the answer of the server in an exception that says less.
    """
    for cause in reversed(list(_causes(error))):
        failure = _failure_by_code(cause) or _failure_by_status(http_status(cause)) or _failure_by_type(cause)
        if failure is not None:
            return failure
    return "other"


FINAL_FAILURES = ("not_found", "forbidden", "credentials", "rejected")


def is_final(error: BaseException) -> bool:
    """Whether trying again cannot help: the store has understood and refuses."""
    return store_failure(error) in FINAL_FAILURES


def http_status(error: BaseException) -> int | None:
    """The HTTP status that an exception of aiohttp, botocore, gcsfs or Azure carries, if any."""
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status if isinstance(status, int) else None
    if "HttpProcessingError" in {kind.__name__ for kind in type(error).__mro__}:  # an answer that aiohttp cannot read
        return None
    for attribute in ("status", "status_code", "code"):  # aiohttp, Azure, gcsfs
        status = getattr(error, attribute, None)
        if isinstance(status, int):
            return status
    return None


def why_failed(error: BaseException) -> str:
    """What an exception of any store means, in a few words that hold nothing that a server has sent but its status.

    Whatever a server says may be the content of a file that the address was not meant to reach. The name that S3 has
    for the error is told beside the status: its endpoint is the user's choice, whatever a list says.
    """
    if isinstance(error, OSError) and error.strerror and not _is_answer(error):
        return error.strerror
    if is_redirect_astray(error):
        return "it is redirected without end, or to what is no web address"
    status = answered_status(error)
    failure = store_failure(error)
    if status is not None and failure != "truncated":
        words = ", ".join(filter(None, [_phrase(status), _s3_code(error)]))
        return f"the server answers {status}" + (f" ({words})" if words else "")
    if isinstance(error, (TruncatedError, TimeoutError, asyncio.TimeoutError)) and str(error):
        return str(error)
    return f"{_FAILURE_WORDS.get(failure, 'it cannot be read')} ({type(error).__name__})"


def _is_answer(error: BaseException) -> bool:
    """Whether an exception tells what a server has answered: some drivers put its words into an `OSError`."""
    return any(http_status(cause) is not None or getattr(cause, "response", None) for cause in _causes(error))


def refused_host(error: BaseException) -> str | None:
    """Why the guard of web addresses let an address go no further, if it is that what an exception comes from."""
    return next((str(cause.strerror) for cause in _causes(error) if isinstance(cause, RefusedHostError)), None)


def is_redirect_astray(error: BaseException) -> bool:
    """Whether a web server redirects without end, or to what is no web address."""
    return bool({kind.__name__ for kind in type(error).__mro__} & _REDIRECTION_ERRORS)


def _phrase(status: int) -> str:
    try:
        return http.HTTPStatus(status).phrase
    except ValueError:
        return ""


def _s3_code(error: BaseException) -> str:
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, Mapping):  # botocore
            code = str(response.get("Error", {}).get("Code", ""))
            return code if re.fullmatch("[A-Z][A-Za-z]{2,40}", code) else ""
    return ""


def answered_status(error: BaseException) -> int | None:
    """The HTTP status that an exception or one of its causes carries, if any."""
    return next((status for cause in _causes(error) if (status := http_status(cause)) is not None), None)


def retry_after(error: BaseException) -> str | None:
    """The Retry-After header of the answer that an exception stands for, if the server sent one."""
    for cause in _causes(error):
        headers = getattr(cause, "headers", None)
        response = getattr(cause, "response", None)
        if isinstance(response, Mapping):
            headers = response.get("ResponseMetadata", {}).get("HTTPHeaders")
        if isinstance(headers, Mapping):
            value = headers.get("Retry-After") or headers.get("retry-after")
            if value is not None:
                return str(value)
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _failure_by_code(error: BaseException) -> StoreFailure | None:
    """By the error code in the answer of an S3 server."""
    response = getattr(error, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, Mapping) else None
    if code in _THROTTLING_CODES:
        return "throttled"
    if code in _DAMAGE_CODES:
        return "truncated"
    if code == "NoSuchUpload":  # status 404, but of an upload in parts that was lost, not of a file
        return "other"
    return "timeout" if code == "RequestTimeout" else None


def _failure_by_status(status: int | None) -> StoreFailure | None:
    if status in (404, 410):
        return "not_found"
    if status in (401, 403):
        return "forbidden"
    if status in (429, 503):
        return "throttled"
    if status in _REJECTED_STATUSES:
        return "rejected"
    if status is not None and 500 <= status < 600:
        return "server_error"
    return None


def _failure_by_type(error: BaseException) -> StoreFailure | None:
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & _CREDENTIAL_ERRORS:
        return "credentials"
    if names & _CONNECTION_ERRORS:
        return "unreachable"
    if names & _REJECTION_ERRORS:
        return "rejected"
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
        return "not_found"
    if isinstance(error, OSError) and error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
        return "not_found"
    if isinstance(error, PermissionError) or (type(error) is OSError and str(error).startswith("Forbidden: ")):  # gcsfs
        return "forbidden"
    if type(error) in (TypeError, ValueError) and _origin(error) in _DRIVERS:  # an option or address of a wrong form
        return "rejected"
    if names & _TRUNCATION_ERRORS:
        return "truncated"
    if names & _TIMEOUT_ERRORS:
        return "timeout"
    return "disconnected" if names & _DISCONNECTION_ERRORS else None


@contextmanager
def explained(uri: str, what: str = "read") -> Iterator[None]:
    """Turn whatever a store says into one sentence, an `InputError`.

    Files that are not there pass unchanged, as `FileNotFoundError`, and so does what comes from no store.

    Args:
        uri: the place that is used inside the context.
        what: how it is used, for the sentence.
    """
    reasons = {
        "forbidden": f"access is denied; check the {'permissions' if is_local(uri) else 'credentials'}",
        "credentials": "there are no usable credentials; set them in the environment or in storage_options",
        "unreachable": "the store cannot be reached; check the endpoint and the network",
        "throttled": "the store is too busy to answer; try again later",
        "timeout": "the store does not answer in time; check the network, or try again later",
        "disconnected": "the store breaks the connection; check the endpoint and the network",
        "server_error": "the store answers with an error of its own; try again later",
        "truncated": "its answers break off; check the network, or try again later",
        "rejected": "the store rejects the request; check the address and storage_options",
        "not_found": "there is no such bucket or container; check the address",
    }
    try:
        yield
    except OvssError:
        raise
    except Exception as error:
        failure = store_failure(error)
        # Who writes knows what to do about errors of the system.
        passes = ("not_found", "other") if what == "written" else ("not_found",)
        if not _is_of_store(error) or (failure in passes and isinstance(error, OSError)):
            raise
        said = f" ({brief(error)})" if failure in ("rejected", "server_error", "not_found") else ""
        raise InputError(f"{uri} cannot be {what}: {reasons.get(failure, brief(error))}{said}") from error


def brief(error: BaseException) -> str:
    """What an exception says, in one line: without the page of XML that stores add, and at most 200 characters."""
    if isinstance(error, FileNotFoundError) and "://" in str(error):  # drivers give the address alone
        return "there is no such file or bucket"
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    line = re.split(r" ?<[?!a-zA-Z]| (?:RequestId|Content|ErrorCode): ?", " ".join(text.split()))[0][:200].rstrip(".!")
    return line or type(error).__name__


def _is_of_store(error: BaseException) -> bool:
    """Whether an exception comes from a driver or the system, and not from a mistake in this package."""
    if isinstance(error, OSError) or store_failure(error) != "other":
        return True
    kinds = (kind for cause in _causes(error) for kind in type(cause).__mro__)
    return _origin(error) in _DRIVERS or any(kind.__module__.partition(".")[0] in _DRIVERS for kind in kinds)


def _origin(error: BaseException) -> str:
    """The package whose code has raised an exception."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return "" if place is None else str(place.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
