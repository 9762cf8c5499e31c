"""Keyed hashes with a secret of the database: of idempotency keys, and for the signatures of sessions.

A key can name a patient, and the id of a job begins with the hash of its key. With a hash that everybody can compute,
a reader of a log could try all names. The secret is random, and it is created by the first process that needs it.
"""

import hashlib
import hmac
import secrets
from contextlib import suppress

import sqlalchemy as sa

from app.jobs.database import create_tables

metadata = sa.MetaData()
secrets_table = sa.Table(
    "counterpart_secrets",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
NAME = "idempotency"


class KeyHasher:
    """Keyed hash, by default of idempotency keys. All processes that share the database compute the same hash.

    Parameters
    ----------
    database : sqlalchemy.Engine
    name : str
        Name of the secret. Each purpose has its own.
    """

    def __init__(self, database: sa.Engine, name: str = NAME) -> None:
        self._database = database
        self._name = name
        self._secret: bytes | None = None

    def hash_key(self, key: str) -> str:
        """Return the hash of a key: 64 hexadecimal digits."""
        if self._secret is None:
            self._secret = self._read_secret()
        return hmac.new(self._secret, key.encode(), hashlib.sha256).hexdigest()

    def _read_secret(self) -> bytes:
        """Return the secret of the database. Two processes may create it at once: the first one wins."""
        create_tables(self._database, metadata)
        # Another process may insert it, or lock the database, at the same time.
        with suppress(sa.exc.DBAPIError), self._database.begin() as connection:
            self._insert(connection)
        with self._database.connect() as connection:
            query = sa.select(secrets_table.c.value).where(secrets_table.c.name == self._name)
            return bytes.fromhex(connection.execute(query).scalar_one())

    def _insert(self, connection: sa.Connection) -> None:
        if connection.execute(sa.select(secrets_table).where(secrets_table.c.name == self._name)).first() is None:
            connection.execute(secrets_table.insert().values(name=self._name, value=secrets.token_hex(32)))
