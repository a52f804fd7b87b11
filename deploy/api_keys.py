"""API keys of a configuration, of which only digests are kept."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Final

_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_VALID_KEY: Final = re.compile(r"[\x21-\x7e]{8,512}")


def digest_of(key: str) -> str:
    """The digest of a key; a digest is returned unchanged. Raises ValueError, without the key in its message."""
    if _DIGEST.fullmatch(key):
        return key
    if not _VALID_KEY.fullmatch(key):
        raise ValueError("an API key has 8 to 512 visible ASCII characters and no space")
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


def read_keys(name: str, path: str) -> list[str]:
    """One per line; lines that begin with # are comments. `name` is the setting's. Raises ValueError."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ValueError(f"{name} {path!r} cannot be read: {reason}") from None
    if keys := [line for line in lines if line and not line.startswith("#")]:
        return keys
    raise ValueError(f"{name} {path!r} has no key")
