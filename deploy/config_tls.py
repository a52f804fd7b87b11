"""The tables of a service's configuration that name PEM files: of listeners for clients, and of our own processes.

A file is read by the processes that use it, each on its host, and a missing one is named there.
"""

from __future__ import annotations

from tensorweave.cluster.strict_model import Field, StrictBaseModel
from tensorweave.cluster.tls import TlsFiles


class ListenerTlsConfig(StrictBaseModel):
    """HTTPS instead of HTTP. PEM files, under the same paths on every host that has such a listener."""

    certificate: str = Field(status="prototype", min_length=1, description="The certificate chain that clients see.")
    key: str = Field(status="prototype", min_length=1, description="Its key, without a password.")


class PeerTlsConfig(StrictBaseModel):
    """PEM files, under the same paths on every host."""

    certificate: str = Field(
        status="prototype",
        min_length=1,
        description="The host's certificate chain; each host's own, or one for all. Both ends of a connection show it.",
    )
    key: str = Field(status="prototype", min_length=1, description="Its key, without a password.")
    authority: str = Field(
        status="prototype",
        min_length=1,
        description="The certificates of the authority that signed them. Whoever else has a certificate of it passes "
        "for a part of the cluster: make one for the cluster.",
    )

    def files(self) -> TlsFiles:
        return TlsFiles(self.certificate, self.key, self.authority)
