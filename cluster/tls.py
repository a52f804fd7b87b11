"""TLS between our own processes: the operator's files, and what both ends of a connection make of them.

Both ends show a certificate of the cluster's authority, and accept no other. Names in certificates are not compared:
whoever has a certificate of this authority belongs to the cluster. The secret of each socket is asked for as without
TLS. Used by the leader's socket (`wire`, `SocketLink`) and the KV carriers.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from pathlib import Path

from tensorweave.cluster.errors import WireError


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files, under the same paths on every host: a host's certificate chain, its key without a password, and the
    certificates of the authority."""

    certificate: str
    key: str
    authority: str

    def accepting(self) -> ssl.SSLContext:
        """For the end that listens. Raises ValueError if a file is missing or wrong."""
        return self._fill(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))

    def connecting(self) -> ssl.SSLContext:
        """For the end that connects. Raises ValueError if a file is missing or wrong."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        return self._fill(context)

    def _fill(self, context: ssl.SSLContext) -> ssl.SSLContext:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        _check_readable("network.tls.authority", self.authority)
        try:
            context.load_verify_locations(self.authority)
        except ssl.SSLError as error:
            raise ValueError(
                f"network.tls.authority is no PEM file of certificates: {self.authority}: {error}"
            ) from None
        _load_chain(context, "network.tls", self.certificate, self.key)
        return context


def check_listener_files(table: str, certificate: str, key: str) -> None:
    """Raises ValueError unless a server can use these files; `table` names the keys that have them."""
    _load_chain(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), table, certificate, key)


def _load_chain(context: ssl.SSLContext, table: str, certificate: str, key: str) -> None:
    _check_readable(f"{table}.certificate", certificate)
    _check_readable(f"{table}.key", key)

    def refuse() -> str:
        raise ValueError(f"{table}.key has a password: give a key without one")

    try:
        context.load_cert_chain(certificate, key, password=refuse)
    except ssl.SSLError as error:
        files = f"{certificate} and {key}"
        raise ValueError(f"{table}.certificate and key are no PEM files that match: {files}: {error}") from None


def _check_readable(name: str, path: str) -> None:
    try:
        Path(path).open("rb").close()
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {path}: {error.strerror}") from None


def pinned_context(certificate: str) -> ssl.SSLContext:
    """For clients of a server of our own: it must show this certificate, whoever has signed it, at whatever address."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(certificate)
    return context


def tls_reason(error: OSError) -> str:
    """What OpenSSL says of a handshake or a record, or the error itself, in one sentence."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the peer's certificate is refused: {error.verify_message}"
    if isinstance(error, ssl.SSLError) and error.reason:
        return f"TLS: {error.reason.lower().replace('_', ' ')}"
    return str(error) or type(error).__name__


async def accept_tls(writer: asyncio.StreamWriter, context: ssl.SSLContext) -> None:
    """The listening end's handshake, before anything else is awaited on this connection. Raises WireError."""
    try:
        await writer.start_tls(context)
    except OSError as error:
        raise WireError(f"no TLS connection: {tls_reason(error)}") from None
