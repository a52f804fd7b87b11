"""Authorities and the certificates that they sign, for tests of TLS."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tensorweave.cluster.tls import TlsFiles

_LOOPBACK = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
_DAY = datetime.timedelta(days=1)


def make_files(folder: Path, *, days_left: int = 7) -> TlsFiles:
    """A new authority, and a certificate of it that is valid for so many days (negative: it has expired), for
    127.0.0.1."""
    folder.mkdir(parents=True, exist_ok=True)
    authority_key, host_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority = _name("test authority")
    root = _certificate(authority, authority_key, authority, authority_key, 7, is_authority=True)
    host = _certificate(_name("test host"), host_key, authority, authority_key, days_left, is_authority=False)
    files = TlsFiles(*(str(folder / name) for name in ("host.pem", "host.key", "ca.pem")))
    Path(files.certificate).write_bytes(host.public_bytes(serialization.Encoding.PEM))
    Path(files.authority).write_bytes(root.public_bytes(serialization.Encoding.PEM))
    Path(files.key).write_bytes(
        host_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return files


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _certificate(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    days_left: int,
    *,
    is_authority: bool,
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 30 * _DAY)
        .not_valid_after(now + days_left * _DAY)
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost"), _LOOPBACK]), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )
