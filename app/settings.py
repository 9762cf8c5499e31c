"""What an operator decides: environment variables with one prefix, and an optional file of the same.

The object is frozen and read once, in `app.cli`; everything else receives it.
"""

import os
import re
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from app.errors import InvalidSettings, UnsafeExposure

PREFIX = "COUNTERPART_"
# Names the file: lines of COUNTERPART_NAME=value. Never found by chance in a working folder.
SETTINGS_FILE = f"{PREFIX}SETTINGS"
Origin = Literal["default", "environment", "file", "argument"]


def default_store() -> str:
    """The user's data folder (XDG).

    The same from any working folder, and never inside a checkout, where scans might be committed.
    """
    home = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return str(Path(home) / "counterpart")


class Settings(BaseSettings):
    """Every setting of the service: a keyword argument, else the environment, else the file, else the default."""

    # An empty variable counts as not set, as compose files write it.
    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix=PREFIX, env_ignore_empty=True)
    _origins: dict[str, Origin] = PrivateAttr(default_factory=dict)

    host: str = Field("127.0.0.1", description="Address to listen on; anything but loopback needs a token.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    token: SecretStr | None = Field(None, description="Bearer token that every call under /v1 must carry.")
    models: Path | None = Field(None, description="Folder of model bundles; by default the shipped ones.")
    store: str = Field(
        default_factory=default_store, description="Folder of uploads and results, or s3://bucket/prefix."
    )
    scratch: Path = Field(
        default_factory=lambda: Path(default_store()),
        description="Folder for what is under way, where the store is a bucket.",
    )
    database: str | None = Field(None, description="URL of the jobs, as postgresql://...; by default SQLite.")
    provider: Literal["cpu", "cuda"] = Field("cpu", description="Where networks run; there is no fall-back.")
    threads: int = Field(0, ge=0, description="Threads of one network evaluation; 0 takes every core.")
    gpu_batch: int = Field(
        64, ge=0, description="Slices in one evaluation on CUDA, captured as a CUDA graph; 0 does without graphs."
    )
    allow_noncommercial: bool = Field(
        False, description="Whether bundles for non-commercial research may be used, when asked for by name."
    )
    max_upload_mb: int = Field(2048, ge=1, description="Largest upload, in MiB.")
    max_files: int = Field(20_000, ge=1, description="Most files in one upload.")
    queue_limit: int = Field(100, ge=1, description="Waiting scans above which new ones are answered 429.")
    min_free_gb: float = Field(2.0, ge=0, description="Free disk, in GB, below which new scans are answered 507.")
    keep_days: float = Field(0.0, ge=0, description="Age at which jobs that ended are erased; 0 keeps them.")
    keep_gb: float = Field(
        0.0, ge=0, description="Disk of scans and results above which the oldest are erased; 0 sets no limit."
    )
    drain_seconds: int = Field(
        5,
        ge=0,
        description="At shutdown, how long a running scan may take to finish; then it waits for the next start.",
    )

    def __init__(self, **arguments: Any) -> None:
        """Read every source once; an argument of None counts as not given."""
        given = {name: value for name, value in arguments.items() if value is not None}
        super().__init__(_env_file=os.environ.get(SETTINGS_FILE) or None, **given)
        for name in self.model_fields_set:
            in_environment = bool(os.environ.get(f"{PREFIX}{name.upper()}"))
            self._origins[name] = "argument" if name in given else "environment" if in_environment else "file"

    @field_validator("store")
    @classmethod
    def _is_a_folder_or_a_bucket(cls, store: str) -> str:
        if store.startswith("s3://") and store != "s3://":
            return store.rstrip("/")
        if "://" in store:
            raise ValueError("only a folder or s3://bucket/prefix can hold the store")
        return str(Path(store).expanduser().absolute())

    @field_validator("database")
    @classmethod
    def _is_of_a_known_kind(cls, database: str | None) -> str | None:
        if database is not None and not re.match(r"(sqlite|postgresql|postgres)(\+\w+)?://", database):
            raise ValueError("only sqlite:///path and postgresql://user:password@host/name are known")
        return None if database is None else re.sub(r"^postgres(ql)?(\+\w+)?://", "postgresql://", database)

    @property
    def bucket(self) -> str | None:
        """URL of the store, where it is a bucket."""
        return self.store if self.store.startswith("s3://") else None

    @property
    def folder(self) -> Path:
        """The local folder: the store itself, or what is under way on its way to a bucket."""
        return self.scratch.expanduser().absolute() if self.bucket else Path(self.store)

    @property
    def database_url(self) -> str:
        """Where jobs are kept."""
        return self.database or f"sqlite:///{self.folder / 'jobs.sqlite'}"

    def origin(self, name: str) -> Origin:
        """Where the value of a setting came from."""
        return self._origins.get(name, "default")

    def shown(self, name: str) -> str:
        """A value for people: secrets and passwords in URLs hidden."""
        return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:**********@", str(getattr(self, name)))

    def check_exposure(self) -> None:
        """Refuse to be reachable from other machines with no lock on the door.

        Raises
        ------
        UnsafeExposure
            The host is not loopback and there is no token.
        """
        if self.token is None and not _is_loopback(self.host):
            raise UnsafeExposure(
                f"The service was asked to listen on {self.host}, and no token is set.",
                expected="127.0.0.1, or a token that callers must show.",
                advice=f"Set {PREFIX}TOKEN to a long random value (openssl rand -hex 32), or keep to loopback.",
            )


def read_settings(**arguments: Any) -> Settings:
    """Settings, or an error that names the variable that is wrong.

    Parameters
    ----------
    **arguments
        From the command line; None counts as not given.

    Raises
    ------
    InvalidSettings
        A value does not fit its setting, or the named file is not there.
    """
    named = os.environ.get(SETTINGS_FILE)
    if named and not Path(named).is_file():
        raise InvalidSettings(
            f"{SETTINGS_FILE} names a file that is not there.",
            expected=f"a file with lines such as {PREFIX}PORT=8000.",
            advice="Correct the path, or unset the variable.",
        )
    try:
        return Settings(**arguments)
    except ValidationError as error:
        wrong = "; ".join(
            f"{PREFIX}{str(e['loc'][0]).removeprefix(PREFIX.lower()).upper()}: {e['msg']}" for e in error.errors()
        )
        raise InvalidSettings(
            f"{wrong}.",
            expected="what `counterpart doctor` lists for each setting.",
            advice="Correct the variable, or unset it.",
        ) from None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
