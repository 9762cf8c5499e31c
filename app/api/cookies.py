"""Signed, expiring values for cookies. Every process that shares the database can read them; none keeps a list."""

import base64
import hmac
import json
import time
from typing import Any

from app.jobs.idempotency import KeyHasher

SECRET_NAME = "session"  # noqa: S105  # the name of the secret in the database


class SignedValues:
    """Values with an HMAC-SHA256 and an end.

    Parameters
    ----------
    hasher : KeyHasher
        Keyed hash with the secret of the database. Its first call reads the secret, and blocks.
    """

    def __init__(self, hasher: KeyHasher) -> None:
        self._hasher = hasher

    def sign(self, purpose: str, fields: dict[str, Any], seconds: float) -> str:
        """Return the text of a cookie, valid for some seconds and for one purpose."""
        content = json.dumps({**fields, "end": time.time() + seconds}, separators=(",", ":")).encode()
        encoded = base64.urlsafe_b64encode(content).decode().rstrip("=")
        return f"{encoded}.{self._signature(purpose, encoded)}"

    def read(self, purpose: str, text: str) -> dict[str, Any] | None:
        """Return the fields of a cookie, None if its signature is wrong or its end has passed."""
        encoded, _, signature = text.rpartition(".")
        if not hmac.compare_digest(signature.encode(), self._signature(purpose, encoded).encode()):
            return None
        fields: dict[str, Any] = json.loads(base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)))
        return fields if fields["end"] > time.time() else None

    def hash(self, purpose: str, text: str) -> str:
        """Return a pseudonym of a text: 16 hexadecimal digits that only this database can compute."""
        return self._hasher.hash_key(f"{purpose}\0{text}")[:16]

    def _signature(self, purpose: str, encoded: str) -> str:
        return self._hasher.hash_key(f"{purpose}\0{encoded}")
