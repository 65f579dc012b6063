"""Ranges of files over HTTP by the standard library: kept connections, failures that pass, limits
that all threads keep.

Each answer to a range is checked to be that range of a file of the expected size: a proxy that
ignores `Range` sends other bytes without an error. Bytes go straight into the caller's buffer. What
may pass (a dropped connection, 429, 503, a truncated or ignored range) is tried again, from the
byte that was reached; where a server asks to wait, all threads wait.

The token goes to the one origin that it is for, and never along a redirect to another.
HTTP(S)_PROXY, NO_PROXY and SSL_CERT_FILE are honored.
"""

from __future__ import annotations

import base64
import http.client
import os
import random
import re
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from importlib import import_module
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote, urljoin, urlsplit

from merge_cli.errors import ChangedError, StoreError
from merge_cli.system.json_text import parse_json
from merge_cli.version import __version__

TIMEOUT_S = 60.0
MOST_TRIES = 8
MOST_PATIENCE_S = 600.0
MAX_JSON_BYTES = 256 << 20
_MOST_REDIRECTS = 5
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_EXPIRED = frozenset({400, 401, 403, 404, 410})  # of a signed link
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_T = TypeVar("_T")


class Answer(NamedTuple):
    """The status and headers of an answer, the URL that gave it, and the body where it was read."""

    status: int
    headers: http.client.HTTPMessage
    url: str
    body: bytes = b""


class _Failure(Exception):
    """A request failed in a way that may pass: how long the server asks to wait, whether bytes
    came, how often to try.
    """

    def __init__(self, text: str, wait_s: float = 0.0, progress: bool = False, tries: int = MOST_TRIES) -> None:
        super().__init__(text)
        self.wait_s = wait_s
        self.progress = progress
        self.tries = tries


class HttpClient:
    """Requests to any host, from several threads. `token` is sent to the origin of `endpoint`
    alone.
    """

    first_delay_s = 1.0

    def __init__(self, endpoint: str, token: str | None) -> None:
        self._origin = _origin(endpoint)
        self._token = token
        self._lock = threading.Lock()
        self._idle: dict[tuple[object, ...], list[http.client.HTTPConnection]] = {}
        self._resume_at = 0.0

    def close(self) -> None:
        """Close the connections that are kept for later requests."""
        with self._lock:
            for connection in (each for kept in self._idle.values() for each in kept):
                connection.close()
            self._idle.clear()

    def get_json(self, url: str) -> tuple[Answer, Any]:
        """The answer to a GET and, with status 200, its JSON. Raises StoreError."""
        answer = self._again(url, lambda: self._follow("GET", url), tries=4)
        if answer.status != 200:
            return answer, None
        try:
            return answer, parse_json(answer.body)
        except ValueError as error:
            raise StoreError(f"the answer of {_host(url)} is not JSON: {error}") from error

    def head(self, url: str) -> Answer:
        """The answer to a HEAD, redirects within the host followed; one to another host is the
        answer. Raises StoreError.
        """
        return self._again(url, lambda: self._follow("HEAD", url), tries=4)

    def read_range(self, locate: Callable[[str], str], offset: int, buffer: memoryview, num_bytes: int, what: str) -> None:
        """Fill `buffer` from byte `offset` of a file of `num_bytes` bytes. Raises ChangedError,
        StoreError.

        `locate(stale)` gives the link to the file: a new one where `stale` is the one that has
        expired. `what` is named in errors.
        """
        done, link, renewed = 0, locate(""), 0

        def work() -> None:
            nonlocal done, link, renewed
            before = done
            try:
                with self._exchange("GET", link, {"Range": f"bytes={offset + done}-{offset + len(buffer) - 1}"}) as response:
                    if response.status in _EXPIRED:
                        renewed, link = renewed + 1, locate(link)
                        text = f"the server answered {response.status} {response.reason}"
                        raise _Failure(text, progress=renewed == 1, tries=4)
                    _check_range(response, offset + done, offset + len(buffer), num_bytes, what)
                    while done < len(buffer):
                        count = response.readinto(buffer[done:])
                        if count == 0:
                            raise _Failure(f"the answer ended {len(buffer) - done} bytes early")
                        done += count
                    renewed = 0
            except (_Failure, OSError, http.client.HTTPException) as error:
                if done > before:
                    raise _Failure(str(error), progress=True) from error
                raise

        self._again(what, work, lambda: offset + done)

    def _again(self, what: str, work: Callable[[], _T], at: Callable[[], int] | None = None, tries: int = MOST_TRIES) -> _T:
        """`work()`, and again after failures that may pass. Raises StoreError once it has failed
        too often.
        """
        failed = 0
        while True:
            time.sleep(max(0.0, self._resume_at - time.monotonic()))
            try:
                return work()
            except ssl.SSLCertVerificationError as error:
                raise StoreError(
                    f"{what}: the certificate is not trusted: {error.verify_message}",
                    hint="SSL_CERT_FILE=/path/to/ca.pem names the certificates to trust",
                ) from error
            except (_Failure, OSError, http.client.HTTPException) as error:
                failure = error if isinstance(error, _Failure) else _Failure(str(error) or type(error).__name__)
                if failure.progress:
                    failed = 0
                    continue
                failed += 1
                if failed >= min(tries, failure.tries) or failure.wait_s > MOST_PATIENCE_S:
                    place = "" if at is None else f" at byte {at()}"
                    raise StoreError(
                        f"cannot read {what}{place}: {failure}",
                        details=[f"tried {failed} times"],
                        hint="run the same command again once the server answers",
                        offset=None if at is None else at(),
                    ) from error
                if failure.wait_s:
                    with self._lock:
                        self._resume_at = max(self._resume_at, time.monotonic() + failure.wait_s)
                else:
                    time.sleep(min(32.0, self.first_delay_s * 2 ** (failed - 1)) * random.uniform(0.5, 1.5))

    def _follow(self, method: str, url: str) -> Answer:
        """The answer, redirects followed that stay on the host. Raises _Failure for a status that
        may pass.
        """
        for _ in range(_MOST_REDIRECTS):
            with self._exchange(method, url, {}) as response:
                body = response.read(MAX_JSON_BYTES)
                answer = Answer(response.status, response.headers, url, body)
            if answer.status in _PASSING:
                raise _Failure(f"{_host(url)} answered {answer.status} {response.reason}", _wait_s(answer.headers))
            location = urljoin(url, answer.headers.get("Location") or "")
            if answer.status not in _REDIRECTS or _origin(location) != _origin(url):
                return answer
            url = location
        raise StoreError(f"{_host(url)} redirects in circles")

    # --- connections

    @contextmanager
    def _exchange(self, method: str, url: str, headers: Mapping[str, str]) -> Iterator[http.client.HTTPResponse]:
        """Send a request; the connection is kept if the answer is read to its end."""
        origin, parts = _origin(url), urlsplit(url)
        headers = {"User-Agent": f"pmerge/{__version__}", "Accept-Encoding": "identity", **headers}
        if self._token and origin == self._origin:
            headers["Authorization"] = f"Bearer {self._token}"
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        proxy = _proxy(origin)
        if proxy is not None and origin[0] == "http":
            target = url
            headers |= _proxy_authorization(proxy)
        while True:
            connection, is_new = self._connection(origin, proxy)
            try:
                connection.request(method, target, headers=headers)
                response = connection.getresponse()
                break
            except (OSError, http.client.HTTPException):
                connection.close()
                if is_new:  # one that was kept may have been closed meanwhile
                    raise
        try:
            yield response
        finally:
            if response.isclosed() and not response.will_close:
                with self._lock:
                    self._idle.setdefault((*origin, proxy), []).append(connection)
            else:
                connection.close()

    def _connection(self, origin: tuple[str, str, int], proxy: str | None) -> tuple[http.client.HTTPConnection, bool]:
        """A connection that was kept, or a new one, and which of the two."""
        with self._lock:
            if kept := self._idle.get((*origin, proxy)):
                return kept.pop(), False
        scheme, host, port = origin
        to = urlsplit(proxy) if proxy is not None else None
        where = (host, port) if to is None else (to.hostname or "", to.port or (443 if to.scheme == "https" else 80))
        if scheme == "http":
            return http.client.HTTPConnection(*where, timeout=TIMEOUT_S), True
        connection = http.client.HTTPSConnection(*where, timeout=TIMEOUT_S, context=self._tls)
        if proxy is not None:
            connection.set_tunnel(host, port, _proxy_authorization(proxy))
        return connection, True

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        if not os.environ.get("SSL_CERT_FILE"):
            with suppress(ImportError):  # the certificates that huggingface_hub brings along, for systems without
                context.load_verify_locations(import_module("certifi").where())
        return context


def _check_range(response: http.client.HTTPResponse, begin: int, end: int, num_bytes: int, what: str) -> None:
    """Raise unless the body is bytes `begin` to `end` of a file of `num_bytes` bytes, with nothing
    encoded.
    """
    status, headers = response.status, response.headers
    if status in _PASSING:
        raise _Failure(f"the server answered {status} {response.reason}", _wait_s(headers))
    if status == 200 and (begin, end) == (0, num_bytes) and headers.get("Content-Length") == str(num_bytes):
        return
    if status == 200:
        raise _Failure("the server, or a proxy before it, ignores ranges: it sent the whole file", tries=3)
    if status not in (206, 416):
        raise StoreError(f"cannot read {what}: the server answered {status} {response.reason}", offset=begin)
    expected = f"bytes {begin}-{end - 1}/{num_bytes}" if status == 206 else f"bytes */{num_bytes}"
    found = headers.get("Content-Range", "none")
    if found.rpartition("/")[2] not in (str(num_bytes), "*") or status == 416:
        raise ChangedError(
            f"{what} changed during the run",
            details=[f"expected  {num_bytes} bytes, as when the run began", f"found     Content-Range: {found}"],
            offset=begin,
        )
    if found != expected or headers.get("Content-Encoding", "identity") != "identity":
        raise _Failure(f"the server sent another range: {found}, not {expected}", tries=3)


def _wait_s(headers: http.client.HTTPMessage) -> float:
    """The seconds that a server asks to wait: `Retry-After`, or the time left of an exhausted
    `RateLimit` (`"api";r=0;t=42`).
    """
    if (after := headers.get("Retry-After", "")).isdigit():
        return float(after)
    limit = re.search(r"\br=0\s*;\s*t=(\d+)", headers.get("RateLimit", ""))
    return float(limit[1]) if limit else 0.0


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise StoreError(f"not the address of a server: {url:.200}")
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def _host(url: str) -> str:
    return urlsplit(url).hostname or url


def _proxy(origin: tuple[str, str, int]) -> str | None:
    scheme, host, port = origin
    proxy = urllib.request.getproxies().get(scheme)
    if not proxy or urllib.request.proxy_bypass(f"{host}:{port}"):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _proxy_authorization(proxy: str) -> dict[str, str]:
    parts = urlsplit(proxy)
    if not parts.username:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}
