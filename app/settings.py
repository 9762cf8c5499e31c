"""Settings of the service: environment variables with one prefix, or files with the same names.

`app.cli` reads them once. Every other module receives the frozen object.
"""

import os
import re
from collections.abc import Iterable
from difflib import get_close_matches
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SecretsSettingsSource, SettingsConfigDict

from app.errors import InvalidSettings, UnsafeExposure

PREFIX = "COUNTERPART_"
# This variable names the settings file. A file in the working folder is never read without it.
SETTINGS_FILE_VARIABLE = f"{PREFIX}SETTINGS"
# This variable names a folder with one file for each setting, as Docker and Kubernetes mount secrets.
SECRETS_FOLDER_VARIABLE = f"{PREFIX}SECRETS"
# Variables with the prefix that are no settings: the settings file, the scans of the tests, and those of compose.
OTHER_VARIABLES = frozenset(
    {
        *(SETTINGS_FILE_VARIABLE, SECRETS_FOLDER_VARIABLE),
        *(f"{PREFIX}{name}" for name in ("DATA", "BUCKET", "API_PORT", "ORTHANC_NAMESPACE")),
    }
)
# Kubernetes adds variables like these to a pod if a service has the name of the prefix.
SERVICE_LINKS = re.compile(rf"{PREFIX}(SERVICE_(HOST|PORT)|PORT_\d)\w*")
MASK = "**********"
# Parameters of a database URL that hold no secret.
HARMLESS_PARAMETERS = frozenset(
    {"application_name", "connect_timeout", "host", "hostaddr", "port", "sslmode", "target_session_attrs"}
)
Origin = Literal["default", "environment", "secret", "file", "argument"]


def default_data_folder() -> str:
    """Return the user's data folder for Counterpart (XDG).

    It does not depend on the working folder: in a checkout, scans could be committed by mistake.
    """
    home = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return str(Path(home) / "counterpart")


class SecretFiles(SecretsSettingsSource):
    """Folder of secrets. An empty file, like an empty variable, leaves the setting unset."""

    def __call__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__call__().items() if value}


class Settings(BaseSettings):
    """All settings. The order of precedence is: keyword argument, environment, folder of secrets, file, default."""

    # Compose files pass variables that are not set as empty strings.
    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix=PREFIX, env_ignore_empty=True)
    _origins: dict[str, Origin] = PrivateAttr(default_factory=dict)

    host: str = Field("127.0.0.1", description="Address to listen on. An address other than loopback needs a token.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on. 0 selects a free port.")
    token: SecretStr | None = Field(None, description="Bearer token for every call under /v1 and for /metrics.")
    hosts: str = Field(
        "",
        description="Accepted values of the Host header, separated by commas, if a token is set. Empty accepts all.",
    )
    root_path: str = Field(
        "", description="Path prefix under which a proxy publishes the service, such as /counterpart."
    )
    cors_origins: str = Field(
        "",
        description="Origins of web pages that may call the API and embed the viewer, such as "
        "https://dashboard.example, separated by commas.",
    )
    models: Path | None = Field(None, description="Folder of model bundles. By default, the shipped bundles are used.")
    store: str = Field(
        default_factory=default_data_folder,
        description="Folder for uploads and results, or s3://bucket/prefix.",
    )
    scratch: Path = Field(
        default_factory=lambda: Path(default_data_folder()),
        description="Local folder for unfinished work, if the store is a bucket.",
    )
    bucket_key_id: str | None = Field(
        None, description="Access key id of the bucket. By default, AWS_ACCESS_KEY_ID or the role of the machine."
    )
    bucket_key: SecretStr | None = Field(
        None,
        description="Secret key of the bucket. By default, AWS_SECRET_ACCESS_KEY or the role of the machine.",
    )
    database: str | None = Field(
        None, description="URL of the job database: postgresql://user:password@host/name. By default, SQLite is used."
    )
    provider: Literal["cpu", "cuda"] = Field(
        "cpu", description="Execution provider of the networks, cpu or cuda. There is no fallback to the other."
    )
    threads: int = Field(0, ge=0, description="Threads of one network evaluation. 0 uses all cores.")
    gpu_batch: int = Field(
        64,
        ge=0,
        description="Slices in one network evaluation on CUDA, captured as a CUDA graph. 0 disables CUDA graphs.",
    )
    allow_noncommercial: bool = Field(
        False, description="Allow models for non-commercial research. The caller must request them by name."
    )
    max_upload_mb: int = Field(2048, ge=1, description="Largest upload, in MiB.")
    max_files: int = Field(20_000, ge=1, description="Largest number of files in one upload.")
    queue_limit: int = Field(
        100, ge=1, description="Largest number of waiting scans. Further scans are refused with status 429."
    )
    max_streams: int = Field(
        1000,
        ge=1,
        description="Largest number of open event streams and waiting callers. Further streams get status 503.",
    )
    min_free_gb: float = Field(
        2.0,
        ge=0,
        description="Free disk space, in GB. Below it, new scans are refused with status 507.",
    )
    keep_days: float = Field(
        0.0, ge=0, description="Age, in days, at which finished jobs are erased with their scans. 0 keeps them."
    )
    keep_gb: float = Field(
        0.0, ge=0, description="Disk space, in GB, above which the oldest finished jobs are erased. 0 sets no limit."
    )
    profiles: Path | None = Field(
        None, description="Folder of site profiles, which `counterpart calibrate` writes. Each *.json file is loaded."
    )
    profile_key: SecretStr | None = Field(
        None, min_length=16, description="Key that signs site profiles. With it, profiles of another key are refused."
    )
    profile_any_scanner: bool = Field(
        False, description="Use the only site profile of a model for scans of other scanners as well."
    )
    deadline_seconds: int = Field(
        1800,
        ge=1,
        description="Seconds that reading and inference, or the export, of one scan may take. After them, it fails.",
    )
    drain_seconds: int = Field(
        5,
        ge=0,
        description="Seconds for a running scan to finish at shutdown. After that, it returns to the queue.",
    )

    traces: str | None = Field(
        None,
        description="URL of an OpenTelemetry collector (OTLP over HTTP). By default, no traces are recorded.",
    )

    def __init__(self, **arguments: Any) -> None:
        """Read all sources once. An argument of None counts as not given."""
        given = {name: value for name, value in arguments.items() if value is not None}
        super().__init__(_env_file=os.environ.get(SETTINGS_FILE_VARIABLE) or None, **given)
        secrets = list_secrets(os.environ.get(SECRETS_FOLDER_VARIABLE))
        for name in self.model_fields_set:
            self._origins[name] = "argument" if name in given else _find_origin(f"{PREFIX}{name.upper()}", secrets)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003  # `SecretFiles` replaces it
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources in the order of their precedence."""
        secrets = SecretFiles(settings_cls, os.environ.get(SECRETS_FOLDER_VARIABLE) or None)
        return init_settings, env_settings, secrets, dotenv_settings

    @field_validator("store")
    @classmethod
    def _check_store(cls, store: str) -> str:
        if store.startswith("s3://") and store != "s3://":
            return store.rstrip("/")
        if "://" in store:
            raise ValueError("the store must be a folder or s3://bucket/prefix")
        return str(Path(store).expanduser().absolute())

    @field_validator("database")
    @classmethod
    def _check_database(cls, database: str | None) -> str | None:
        if database is not None and not re.match(r"(sqlite|postgresql|postgres)(\+\w+)?://", database):
            raise ValueError("the database must be sqlite:///path or postgresql://user:password@host/name")
        return None if database is None else re.sub(r"^postgres(ql)?(\+\w+)?://", "postgresql://", database)

    @field_validator("traces")
    @classmethod
    def _check_traces(cls, traces: str | None) -> str | None:
        if traces is not None and not re.match(r"https?://[^/?#]", traces):
            raise ValueError("the collector must be a URL such as http://collector:4318")
        return traces

    @field_validator("root_path")
    @classmethod
    def _check_root_path(cls, root_path: str) -> str:
        if not re.fullmatch(r"(/[\w.~-]+)*/?", root_path):
            raise ValueError("the prefix must be a path such as /counterpart")
        return root_path.rstrip("/")

    @field_validator("hosts")
    @classmethod
    def _check_hosts(cls, hosts: str) -> str:
        names = [name.strip().lower() for name in hosts.split(",") if name.strip()]
        if not all(re.fullmatch(r"[\w.-]+|\[[0-9a-f:.]+\]", name) for name in names):
            raise ValueError("hosts are names or addresses without scheme and port, separated by commas")
        return ",".join(names)

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: str) -> str:
        names = [name.strip().lower() for name in origins.split(",") if name.strip()]
        if not all(re.fullmatch(r"https?://([\w-]+(\.[\w-]+)*|\[[0-9a-f:.]+\])(:\d{1,5})?", name) for name in names):
            raise ValueError(
                "origins are a scheme, a host and a port if it is not the default one, such as https://a.example, "
                "without path and without *, separated by commas"
            )
        # Browsers leave the default port out.
        return ",".join(re.sub(r"^(http(?=:.*:80$)|https(?=:.*:443$))(.*):\d+$", r"\1\2", name) for name in names)

    @property
    def allowed_origins(self) -> frozenset[str]:
        """Origins of `cors_origins`, as a browser writes them into the header Origin."""
        return frozenset(self.cors_origins.split(",")) - {""}

    @property
    def accepted_hosts(self) -> frozenset[str]:
        """Names of `hosts`, in lower case. An empty set accepts every name."""
        return frozenset(self.hosts.split(",")) - {""}

    @property
    def bucket(self) -> str | None:
        """URL of the store if it is a bucket, else None."""
        return self.store if self.store.startswith("s3://") else None

    @property
    def bucket_credentials(self) -> dict[str, str]:
        """Options of the S3 client for the credentials that are set."""
        key = self.bucket_key.get_secret_value() if self.bucket_key else None
        given = {"access_key_id": self.bucket_key_id, "secret_access_key": key}
        return {name: value for name, value in given.items() if value}

    @property
    def folder(self) -> Path:
        """Local folder: the store itself, or the scratch folder if the store is a bucket."""
        return self.scratch.expanduser().absolute() if self.bucket else Path(self.store)

    @property
    def database_url(self) -> str:
        """URL of the job database."""
        return self.database or f"sqlite:///{self.folder / 'jobs.sqlite'}"

    def origin(self, name: str) -> Origin:
        """Return the source of a setting's value."""
        return self._origins.get(name, "default")

    def format_value(self, name: str) -> str:
        """Return a setting's value as text. Secrets and passwords in URLs are masked."""
        return mask_url(str(getattr(self, name)))

    def check_exposure(self) -> None:
        """Refuse to listen for other machines if no token is set.

        Raises
        ------
        UnsafeExposure
            The host is not loopback, or other host names are listed, and no token is set.
        """
        if self.token is None and self.hosts:
            raise UnsafeExposure(
                f"{PREFIX}HOSTS is set, and no token is set.",
                expected="a token. Without it, only loopback names are accepted.",
                advice=f"Set {PREFIX}TOKEN to a long random value (openssl rand -hex 32), or unset {PREFIX}HOSTS.",
            )
        if self.token is None and not is_loopback(self.host):
            raise UnsafeExposure(
                f"The service was asked to listen on {self.host}, and no token is set.",
                expected="127.0.0.1, or a token.",
                advice=f"Set {PREFIX}TOKEN to a long random value (openssl rand -hex 32), or use 127.0.0.1.",
            )


def read_settings(**arguments: Any) -> Settings:
    """Read the settings.

    Parameters
    ----------
    **arguments
        Values from the command line. None counts as not given.

    Raises
    ------
    InvalidSettings
        A value is invalid, or the settings file or a secret cannot be read. The error names the variable.
    """
    file = os.environ.get(SETTINGS_FILE_VARIABLE)
    if file and not Path(file).is_file():
        raise InvalidSettings(
            f"{SETTINGS_FILE_VARIABLE} names a file that does not exist.",
            expected=f"a file with lines such as {PREFIX}PORT=8000.",
            advice="Correct the path, or unset the variable.",
        )
    _refuse_unknown(name for name, value in os.environ.items() if value)
    _refuse_unknown(_check_secrets(os.environ.get(SECRETS_FOLDER_VARIABLE)))
    try:
        return Settings(**arguments)
    except ValidationError as error:
        names = {f"{PREFIX}{str(e['loc'][0]).removeprefix(PREFIX.lower()).upper()}": e["msg"] for e in error.errors()}
        _refuse_unknown(names)
        invalid = "; ".join(f"{name}: {message}" for name, message in names.items())
        raise InvalidSettings(
            f"{invalid}.",
            expected="a value that fits the setting's description (see `counterpart doctor`).",
            advice="Correct the variable, or unset it.",
        ) from None


def list_secrets(folder: str | None) -> frozenset[str]:
    """Return the names of the settings in the folder of secrets, in upper case with their prefix."""
    if not folder:
        return frozenset()
    names = (path.name.upper() for path in Path(folder).iterdir() if path.is_file())
    return frozenset(name for name in names if name.startswith(PREFIX))


def _check_secrets(folder: str | None) -> frozenset[str]:
    """Return the names of the settings in the folder of secrets, and check that this user may read their files."""
    try:
        names = list_secrets(folder)
        for path in Path(folder).iterdir() if folder else ():
            if path.name.upper() in names:
                path.read_bytes()
    except OSError as error:
        raise InvalidSettings(
            f"{SECRETS_FOLDER_VARIABLE} names a folder that cannot be read ({type(error).__name__}).",
            expected=f"a folder with files such as {PREFIX.lower()}token that this user may read.",
            advice="Correct the path or the rights of the files, or unset the variable.",
        ) from None
    return names


def _find_origin(variable: str, secrets: frozenset[str]) -> Origin:
    """Return the source of a value that is no argument."""
    if os.environ.get(variable):
        return "environment"
    return "secret" if variable in secrets else "file"


def _refuse_unknown(names: Iterable[str]) -> None:
    """Refuse a variable with the prefix that is no setting: a setting with a typing error would have no effect."""
    known = {name.upper() for name in Settings.model_fields}
    for name in sorted(name.upper() for name in names):
        short = name.removeprefix(PREFIX)
        if short == name or short in known or name in OTHER_VARIABLES or SERVICE_LINKS.fullmatch(name):
            continue
        nearest = nearest_name(short, known)
        raise InvalidSettings(
            f"{name}: no setting has this name.",
            expected=f"{PREFIX}{nearest}." if nearest else "a setting that `counterpart doctor` lists.",
            advice="Correct the name, or unset the variable.",
        )


def mask_url(text: str) -> str:
    """Return a text with the secrets of a URL masked: the password, and all parameters that may hold one.

    A password may contain any character, and parameters of a driver may contain a second one. So everything up to the
    last @ is masked, and every parameter that is not known to be harmless.
    """
    text = re.sub(r"(://[^:@]*):.*@", rf"\1:{MASK}@", text, flags=re.DOTALL)
    return re.sub(
        r"([?&#;])([^=&#;]*)=([^&#;]*)",
        lambda m: m[0] if m[2].lower() in HARMLESS_PARAMETERS else f"{m[1]}{m[2]}={MASK}",
        text,
    )


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most similar to a name, None if no name is similar."""
    return next(iter(get_close_matches(name, list(known), n=1)), None)


def is_loopback(host: str) -> bool:
    """Return whether a host name or an address is that of the machine itself."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
