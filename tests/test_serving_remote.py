"""Downloads for strangers: which hosts, which addresses, and what a name server or a redirect may say."""

import http.server
import ipaddress
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta

import pytest

from videollama2_hf.serving import remote
from videollama2_hf.serving.errors import RequestError
from videollama2_hf.serving.remote import fetch_remote, is_public


NAME = "clips.example.org"


class Site(http.server.BaseHTTPRequestHandler):
    """A file, and redirects."""

    def do_GET(self):
        self.server.requests.append((self.headers["Host"], self.path))
        if self.path.startswith("/to?"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to?"))
            self.end_headers()
        elif self.path == "/missing":
            self.send_error(404)
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"clip" * 1000)

    def log_message(self, *args):
        pass


@pytest.fixture
def site():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        server.requests = []
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def names(monkeypatch):
    """What the name server says, by name: a list of addresses, or an iterator of such lists."""
    found: dict = {}
    resolve = socket.getaddrinfo

    def find(host, port, *args, **kwargs):
        if host not in found:
            ipaddress.ip_address(host)  # no name leaves this machine
            return resolve(host, port, *args, **kwargs)
        addresses = found[host] if isinstance(found[host], list) else next(found[host])
        return [entry for address in addresses for entry in resolve(address, port, *args, **kwargs)]

    monkeypatch.setattr(socket, "getaddrinfo", find)
    return found


@pytest.fixture
def loopback_is_public(monkeypatch):
    """Lets the test's own server through; everything else is as it is."""
    monkeypatch.setattr(remote, "is_public", lambda address: address == "127.0.0.1" or is_public(address))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.9.9.9",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1%eth0",
        "fd00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "2002:7f00:1::",
        "64:ff9b::7f00:1",
    ],
)
def test_addresses_of_the_local_network(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.215.14", "2606:4700::1111", "64:ff9b::808:808"])
def test_public_addresses(address):
    assert is_public(address)


def test_download(site, names, loopback_is_public):
    port = site.server_port
    names[NAME] = ["127.0.0.1"]
    assert fetch_remote(f"http://{NAME}:{port}/a%20b.mp4?c=ü", [f"{NAME}:{port}"], 4000) == b"clip" * 1000
    assert site.requests == [(f"{NAME}:{port}", "/a%20b.mp4?c=%C3%BC")]
    with pytest.raises(RequestError, match="larger than 3999 bytes") as error:
        fetch_remote(f"http://{NAME}:{port}/", [f"{NAME}:{port}"], 3999)
    assert error.value.status == 413
    with pytest.raises(RequestError, match="status 404"):
        fetch_remote(f"http://{NAME}:{port}/missing", [f"{NAME}:{port}"], 4000)
    with pytest.raises(RequestError, match="has ended"):
        fetch_remote(f"http://{NAME}:{port}/", [f"{NAME}:{port}"], 4000, is_stopped=lambda: True)
    site.shutdown()
    site.server_close()
    with pytest.raises(RequestError, match="cannot be downloaded"):
        fetch_remote(f"http://{NAME}:{port}/", [f"{NAME}:{port}"], 4000)


@pytest.mark.parametrize(
    ("url", "allowed", "message"),
    [
        (f"http://{NAME}/", [], "no host is allowed"),
        (f"http://{NAME}/", ["example.org"], "the allowed hosts are example.org"),
        (f"http://{NAME}:8080/", [NAME], "does not download from"),
        (f"http://{NAME}.evil.example/", [NAME], "does not download from"),
        (f"http://{NAME}@evil.example/", [NAME], "does not download from"),
        (f"http://user@{NAME}/", [NAME], "does not download from"),
        (f"http://{NAME}:x/", [NAME], "is not a URL"),
        ("http:///a", [NAME], "is not an http or https URL"),
        ("gopher://clips.example.org/", [NAME], "is not an http or https URL"),
        ("http://127.0.0.1/", ["127.0.0.1"], "of the local network"),
        ("http://[::1]/", ["::1"], "of the local network"),
        ("http://2130706433/", ["2130706433"], "of the local network|cannot be found"),
    ],
)
def test_refused(names, url, allowed, message):
    names["2130706433"] = ["127.0.0.1"]  # as some name servers read it
    with pytest.raises(RequestError, match=message):
        fetch_remote(url, allowed, 4000)


def test_a_name_of_the_local_network(site, names):
    """Also if only one of its addresses is."""
    for names[NAME] in (["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["169.254.169.254"]):
        with pytest.raises(RequestError, match="of the local network"):
            fetch_remote(f"http://{NAME}/", [NAME], 4000)
    assert not site.requests


def test_a_name_whose_address_changes(site, names, monkeypatch):
    """DNS rebinding: checked is the first answer, and there the connection goes; nobody asks a second time."""
    names[NAME] = iter([["8.8.8.8"], ["127.0.0.1"]])
    targets = []

    def connect(address, *args, **kwargs):
        targets.append(address)
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(RequestError, match="cannot be downloaded"):
        fetch_remote(f"http://{NAME}:{site.server_port}/", [f"{NAME}:{site.server_port}"], 4000)
    assert targets == [("8.8.8.8", site.server_port)]
    assert next(names[NAME]) == ["127.0.0.1"]  # still there


def test_redirects_are_checked(site, names, loopback_is_public):
    port = site.server_port
    names[NAME], names["inner.example.org"] = ["127.0.0.1"], ["10.0.0.1"]
    allowed = [f"{NAME}:{port}", "inner.example.org", "169.254.169.254"]
    base = f"http://{NAME}:{port}"
    assert fetch_remote(f"{base}/to?/b", allowed, 4000) == b"clip" * 1000
    for target, message in (
        ("http://other.example.org/", "does not download from"),
        ("http://inner.example.org/", "of the local network"),
        ("http://169.254.169.254/latest/meta-data", "of the local network"),
        ("file:///etc/passwd", "is not an http or https URL"),
    ):
        with pytest.raises(RequestError, match=message):
            fetch_remote(f"{base}/to?{target}", allowed, 4000)
    with pytest.raises(RequestError, match="More than 5 redirects"):
        fetch_remote(f"{base}/to?" + "/to?" * 6, allowed, 4000)


def test_proxies_are_not_used(site, names, loopback_is_public, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    names[NAME] = ["127.0.0.1"]
    port = site.server_port
    assert fetch_remote(f"http://{NAME}:{port}/", [f"{NAME}:{port}"], 4000)


def test_https_proves_the_name(site, names, loopback_is_public, monkeypatch, tmp_path):
    """The connection goes to an address, but the certificate must be that of the name."""
    pem = tmp_path / "site.pem"
    pem.write_bytes(make_certificate(NAME))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    site.socket = context.wrap_socket(site.socket, server_side=True)
    trusting = ssl.create_default_context(cafile=pem)
    monkeypatch.setattr(ssl, "create_default_context", lambda: trusting)
    names[NAME] = names["other.example.org"] = ["127.0.0.1"]
    port = site.server_port
    allowed = [f"{NAME}:{port}", f"other.example.org:{port}"]
    assert fetch_remote(f"https://{NAME}:{port}/", allowed, 4000) == b"clip" * 1000
    with pytest.raises(RequestError, match="certificate"):
        fetch_remote(f"https://other.example.org:{port}/", allowed, 4000)


def make_certificate(name: str) -> bytes:
    """Key and self-signed certificate, PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    encoded = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return encoded + certificate.public_bytes(serialization.Encoding.PEM)
