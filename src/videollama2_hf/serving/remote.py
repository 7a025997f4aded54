"""
Media from other machines, for a server that strangers send addresses to.

Only hosts that are allowed by name, and never an address of the local network: each name is resolved once, all its
addresses are checked, and the connection goes to the one that was checked, so that a second answer of the name server
(DNS rebinding) has no effect. A redirect is checked as a new address.
"""

import http.client
import ipaddress
import socket
import ssl
import string
from collections.abc import Callable, Collection
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from .errors import RequestError


_MAX_REDIRECTS = 5
_TIMEOUT = 10.0  # seconds that a connection may be silent
_CHUNK = 1 << 16
_PORTS = {"http": 80, "https": 443}


def is_public(address: str) -> bool:
    """
    Whether an IP address is of the public internet: not private, loopback, link-local, multicast, reserved or shared,
    neither itself nor as the IPv4 address inside an IPv6 one (mapped, 6to4, NAT64, Teredo).
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner: list[ipaddress.IPv4Address | None] = []
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in ipaddress.ip_network("64:ff9b::/96"):
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    return all(part is None or (part.is_global and not part.is_multicast) for part in [ip, *inner])


def fetch_remote(
    url: str, allowed_hosts: Collection[str], max_bytes: int, is_stopped: Callable[[], bool] = lambda: False
) -> bytes:
    """
    Downloads a file over http or https.

    Args:
        allowed_hosts: Names of hosts, or `host:port` for another port than that of the scheme.
        max_bytes: Largest file, in bytes.
        is_stopped: Asked between pieces; the download ends when it says so.

    Raises:
        RequestError: The address is not allowed, is of the local network, or cannot be downloaded.
    """
    for _ in range(_MAX_REDIRECTS + 1):
        parts = _check_url(url, allowed_hosts)
        content, location = _get(parts, max_bytes, is_stopped)
        if location is None:
            return content
        url = urljoin(url, location)
    raise RequestError(f"More than {_MAX_REDIRECTS} redirects lead on from {_shorten(url)}. Send the last address.")


def _check_url(url: str, allowed_hosts: Collection[str]) -> SplitResult:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise RequestError(f"{_shorten(url)} is not a URL: {error}.") from error
    if parts.scheme not in _PORTS or not host:
        raise RequestError(f"{_shorten(url)} is not an http or https URL.")
    is_default_port = port is None or port == _PORTS[parts.scheme]
    names = {host, f"{host}:{_PORTS[parts.scheme]}"} if is_default_port else {f"{host}:{port}"}
    if parts.username is not None or not any(name.lower() in names for name in allowed_hosts):
        allowed = (
            f"the allowed hosts are {', '.join(sorted(allowed_hosts))}" if allowed_hosts else "no host is allowed"
        )
        raise RequestError(
            f"This server does not download from {_shorten(url)}: {allowed}. Send the medium as a data: URI, or start "
            "the server with --allow-host.",
            code="host_not_allowed",
        )
    return parts


def _resolve(host: str, port: int) -> str:
    """The address to connect to."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise RequestError(f"The host {host} cannot be found.", code="host_not_found") from error
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(map(is_public, addresses)):
        raise RequestError(
            f"The host {host} is of the local network, from which this server never downloads. Send the medium as a "
            "data: URI.",
            code="host_not_allowed",
        )
    return addresses[0]


def _get(parts: SplitResult, max_bytes: int, is_stopped: Callable[[], bool]) -> tuple[bytes, str | None]:
    """The file, or where a redirect leads."""
    host, port = str(parts.hostname), parts.port or _PORTS[parts.scheme]
    address = _resolve(host, port)
    connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT)
    try:
        # `http.client` would resolve the name again; it uses a socket that is there already.
        connection.sock = socket.create_connection((address, port), _TIMEOUT)
        if parts.scheme == "https":
            connection.sock = ssl.create_default_context().wrap_socket(connection.sock, server_hostname=host)
        target = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe=string.punctuation)
        default = port == _PORTS[parts.scheme]
        headers = {"Host": _bracket(host) if default else f"{_bracket(host)}:{port}", "User-Agent": "videollama2-hf"}
        connection.request("GET", target, headers={**headers, "Accept-Encoding": "identity"})
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308) and response.getheader("Location"):
            return b"", response.getheader("Location")
        if response.status != 200:
            raise RequestError(f"{_shorten(parts.geturl())} cannot be downloaded: status {response.status}.")
        return _read(response, parts, max_bytes, is_stopped), None
    except (OSError, http.client.HTTPException) as error:
        raise RequestError(f"{_shorten(parts.geturl())} cannot be downloaded: {error}.") from error
    finally:
        connection.close()


def _read(
    response: http.client.HTTPResponse, parts: SplitResult, max_bytes: int, is_stopped: Callable[[], bool]
) -> bytes:
    content = bytearray()
    while chunk := response.read1(_CHUNK):
        content += chunk
        if len(content) > max_bytes:
            raise RequestError(
                f"{_shorten(parts.geturl())} is larger than {max_bytes} bytes, the most that this server takes.",
                status=413,
                code="upload_too_large",
            )
        if is_stopped():
            raise RequestError("The request has ended.", status=503)
    return bytes(content)


def _bracket(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _shorten(url: str) -> str:
    return repr(url if len(url) <= 100 else url[:100] + "...")


__all__ = ["fetch_remote", "is_public"]
