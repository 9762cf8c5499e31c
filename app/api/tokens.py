"""File of named tokens: one JSON object a line, with the SHA-256 of each token and never the token itself.

A token has 256 random bits. No salt and no slow hash is needed: nobody can try all of them.
"""

import fcntl
import hashlib
import json
import os
import re
import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, cast, get_args

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from app.errors import BadRequest, IdentityUnavailable

Scope = Literal["send", "read", "erase", "metrics", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
# Scanners for leaked secrets find tokens by their prefix.
TOKEN_PREFIX = "counterpart_"  # noqa: S105
TOKEN_BYTES = 32
# File mode: hashes are not secret, but names and scopes are private.
PRIVATE_MODE = 0o600


class NamedToken(BaseModel):
    """One line of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, StringConstraints(pattern=rf"^{NAME_PATTERN}$")]
    scopes: frozenset[Scope]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    created: datetime
    revoked: datetime | None = None

    def to_line(self) -> str:
        """Return the line of the file, with the scopes in their usual order."""
        fields = self.model_dump(mode="json") | {"scopes": sorted(self.scopes, key=SCOPES.index)}
        return json.dumps(fields) + "\n"


class TokenFile:
    """The named tokens of a file, which is read again when it has changed.

    Parameters
    ----------
    path : Path
        A file that does not exist contains no token.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._version: tuple[int, ...] | None = None
        self._by_hash: dict[str, NamedToken] = {}

    def find(self, token: str) -> NamedToken | None:
        """Return the token that was sent if it is valid, else None.

        Raises
        ------
        IdentityUnavailable
            The file cannot be read.
        """
        return self.find_hash(hash_token(token))

    def find_hash(self, sha256: str) -> NamedToken | None:
        """Return the valid token with a hash, else None. A wrong hash reveals nothing about the valid ones.

        Raises
        ------
        IdentityUnavailable
        """
        found = self._read_if_changed().get(sha256)
        return found if found is not None and found.revoked is None else None

    def read(self) -> tuple[NamedToken, ...]:
        """Return all tokens, the revoked ones included, in the order of the file.

        Raises
        ------
        IdentityUnavailable
        """
        return tuple(self._read_if_changed().values())

    def create(self, name: str, scopes: Sequence[str]) -> str:
        """Add a token and return it. It is shown this one time only.

        Raises
        ------
        BadRequest
            A scope is unknown, or the name is malformed or was used before. The audit trail needs unique names.
        IdentityUnavailable
        """
        if not re.fullmatch(NAME_PATTERN, name):
            raise BadRequest(
                "The name of the token is malformed.",
                expected="up to 64 letters, digits, dots, hyphens and underscores.",
                advice="Choose the name of the system that uses the token, such as pacs-gateway.",
            )
        if not scopes or not set(scopes) <= set(SCOPES):
            raise BadRequest(
                "A scope is missing or unknown.",
                expected=f"one or more of {', '.join(SCOPES)}.",
                advice="Correct the scope.",
            )
        token = TOKEN_PREFIX + secrets.token_urlsafe(TOKEN_BYTES)
        with self._locked():
            tokens = self.read()
            if any(known.name == name for known in tokens):
                raise BadRequest(
                    "A token has or had this name.",
                    expected="a name that no other token had.",
                    advice="Choose another name, such as the old one with a number.",
                )
            granted = cast("frozenset[Scope]", frozenset(scopes))
            added = NamedToken(name=name, scopes=granted, sha256=hash_token(token), created=datetime.now(UTC))
            self._write((*tokens, added))
        return token

    def revoke(self, name: str) -> None:
        """Revoke a token. Its line stays in the file. Revoking it again changes nothing.

        Raises
        ------
        BadRequest
            No token has this name.
        IdentityUnavailable
        """
        with self._locked():
            tokens = self.read()
            if all(known.name != name for known in tokens):
                raise BadRequest(
                    "No token has this name.",
                    expected="a name that `counterpart token list` shows.",
                    advice="Correct the name.",
                )
            now = datetime.now(UTC)
            self._write([t.model_copy(update={"revoked": t.revoked or now}) if t.name == name else t for t in tokens])

    def _read_if_changed(self) -> dict[str, NamedToken]:
        with self._lock:
            try:
                status = self._path.stat()
                # A replaced file has another inode, even if two changes have the same time.
                version = (status.st_mtime_ns, status.st_size, status.st_ino)
                if version != self._version:
                    self._by_hash = {token.sha256: token for token in _parse(self._path.read_text())}
                    self._version = version
            except FileNotFoundError:
                self._by_hash, self._version = {}, None
            except (OSError, ValueError) as error:
                self._version = None
                raise _unreadable(error) from None
            return self._by_hash

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Let one process at a time change the file."""
        with (self._path.parent / f".{self._path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write(self, tokens: Sequence[NamedToken]) -> None:
        """Replace the file by one rename, so that a reader sees the old or the new one."""
        draft = self._path.parent / f".{self._path.name}.new"
        draft.unlink(missing_ok=True)
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_MODE), "w") as file:  # noqa: PTH123
            file.writelines(token.to_line() for token in tokens)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self._path)


def hash_token(token: str) -> str:
    """Return the SHA-256 of a token: 64 hexadecimal digits."""
    return hashlib.sha256(token.encode()).hexdigest()


def _parse(text: str) -> Iterator[NamedToken]:
    for line in text.splitlines():
        if line.strip():
            yield NamedToken.model_validate_json(line)


def _unreadable(error: Exception) -> IdentityUnavailable:
    kind = "a line is not a token" if isinstance(error, ValidationError | ValueError) else type(error).__name__
    return IdentityUnavailable(
        f"The file of tokens cannot be read ({kind}).",
        expected="the file that `counterpart token` writes.",
        advice="The operator must check COUNTERPART_TOKENS: its lines, and whether this user may read it.",
    )
