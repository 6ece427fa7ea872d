"""The broker's certificate: checks one from files, or makes one, signed by an authority for this site.

The openssl command does the work. Clients trust `ca.pem`. Anybody who has `ca.key` can pose as the broker.
"""

import ipaddress
import re
import ssl
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from edge_runtime.errors import AiflowError

AUTHORITY_DAYS, CERTIFICATE_DAYS = 3650, 825
RENEWAL_DAYS = 90  # a certificate that ends sooner is made anew
MAX_HOSTS = 16
NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


class CertificateError(AiflowError, ValueError):
    """A certificate cannot be used, or cannot be made."""


def checked(certificate: Path, key: Path) -> tuple[bytes, bytes]:
    """Both files, as they are. Raises CertificateError if they do not belong together."""
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key, password="")
        return certificate.read_bytes(), key.read_bytes()
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise CertificateError(
            f"{certificate} and {key}: not a certificate and its key ({error}): want two PEM files, the key without "
            "a passphrase"
        ) from error


def made(folder: Path, site: str, hosts: Sequence[str]) -> tuple[bytes, bytes]:
    """A certificate for these names and addresses, and its key, as PEM.

    ca.pem and ca.key in the folder are the authority: made if they are not there, otherwise used again. The key is
    needed only for a new certificate, so it may be kept elsewhere.
    broker/broker.pem and broker/broker.key in the folder are kept if they are for these names and last long enough.
    Raises CertificateError.
    """
    if len(hosts) > MAX_HOSTS:
        raise CertificateError(f"{len(hosts)} names of the broker, want at most {MAX_HOSTS}")
    names = [_alternative_name(host) for host in hosts]
    authority, authority_key = folder / "ca.pem", folder / "ca.key"
    present = folder / "broker" / "broker.pem", folder / "broker" / "broker.key"
    if authority.exists():
        if all(path.exists() for path in present) and _is_good(present[0], authority, names):
            return checked(*present)
        if not authority_key.exists():
            raise CertificateError(
                f"{authority_key}: is gone, and a new certificate needs it: put it back for this run, or delete "
                f"{authority} for a new authority, which every client then needs"
            )
    else:
        _openssl(
            *("req", "-x509", *NEW_KEY, "-days", str(AUTHORITY_DAYS), "-subj", f"/CN=aiflow site {site}"),
            *("-addext", "keyUsage=critical,keyCertSign,cRLSign", "-keyout", authority_key, "-out", authority),
        )
        authority_key.chmod(0o600)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".certificate-") as scratch:
        key, request, extensions, certificate = (Path(scratch) / name for name in ("key", "csr", "ext", "pem"))
        # Python 3.13 refuses a certificate without the two key identifiers.
        extensions.write_text(
            f"subjectAltName={','.join(names)}\nextendedKeyUsage=serverAuth\n"
            "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
        )
        _openssl("req", *NEW_KEY, "-subj", f"/CN=aiflow broker {site}", "-keyout", key, "-out", request)
        _openssl(
            *("x509", "-req", "-in", request, "-CA", authority, "-CAkey", authority_key, "-set_serial"),
            *(str(time.time_ns()), "-days", str(CERTIFICATE_DAYS), "-extfile", extensions, "-out", certificate),
        )
        return checked(certificate, key)


def hosts_of(certificate: Path) -> str:
    """The names and addresses that it is for, separated by commas; empty if openssl cannot read it."""
    try:
        text = _openssl("x509", "-in", certificate, "-noout", "-ext", "subjectAltName")
    except CertificateError:
        return ""
    return ", ".join(re.findall(r"(?:DNS|IP Address):([^,\s]+)", text))


def _alternative_name(host: str) -> str:
    """A name or address as openssl writes it into a certificate. Raises CertificateError."""
    try:
        return f"IP:{ipaddress.ip_address(host)}"
    except ValueError:
        label = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
        if not re.fullmatch(rf"(?=.{{1,253}}$){label}(\.{label})*", host):
            raise CertificateError(
                f"{host[:64]!r}: not a machine's name or address: want the one that clients connect to, as broker.lan"
            ) from None
    return f"DNS:{host}"


def _is_good(certificate: Path, authority: Path, names: Sequence[str]) -> bool:
    """Whether the authority has signed it, it lasts, and it is for all these names."""
    until = str(int(time.time()) + RENEWAL_DAYS * 86400)
    options = {"DNS": "-verify_hostname", "IP": "-verify_ip"}
    checks = [(options[kind], name) for kind, _, name in (name.partition(":") for name in names)]
    try:
        for check in checks:
            _openssl("verify", "-CAfile", authority, "-attime", until, *check, certificate)
    except CertificateError:
        return False
    return True


def _openssl(*arguments: str | Path) -> str:
    """What it writes."""
    command = ["openssl", *map(str, arguments)]
    try:
        return subprocess.run(
            command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=60
        ).stdout.decode(errors="replace")
    except FileNotFoundError as error:
        raise CertificateError("openssl is not installed: apt install openssl, or bring a certificate") from error
    except subprocess.SubprocessError as error:
        said = getattr(error, "stderr", None) or b""
        raise CertificateError(f"openssl {arguments[0]} failed: {said.decode(errors='replace')[-500:]}") from error
