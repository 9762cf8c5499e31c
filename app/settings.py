"""Settings of the service: environment variables with one prefix, or files with the same names.

`app.cli` reads them once. Every other module receives the frozen object.
"""

import base64
import os
import re
from collections.abc import Iterable
from difflib import get_close_matches
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, PrivateAttr, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SecretsSettingsSource, SettingsConfigDict

from app.errors import InvalidSettings, UnsafeExposure

PREFIX = "COUNTERPART_"
# This variable names the settings file. A file in the working folder is never read without it.
SETTINGS_FILE_VARIABLE = f"{PREFIX}SETTINGS"
# This variable names a folder with one file for each setting, as Docker and Kubernetes mount secrets.
SECRETS_FOLDER_VARIABLE = f"{PREFIX}SECRETS"
# Variables with the prefix that are not settings: the settings file, the scans of the tests, and those of compose.
OTHER_VARIABLES = frozenset(
    {
        *(SETTINGS_FILE_VARIABLE, SECRETS_FOLDER_VARIABLE),
        *(f"{PREFIX}{name}" for name in ("DATA", "BUCKET", "API_PORT", "ORTHANC_NAMESPACE")),
    }
)
# Kubernetes adds variables like these to a pod if a service has the name of the prefix.
SERVICE_LINKS = re.compile(rf"{PREFIX}(SERVICE_(HOST|PORT)|PORT_\d)\w*")
# PS3.5 6.2: the default repertoire without the backslash, and no blanks at the ends.
AE_TITLE = re.compile(r"[\x21-\x5b\x5d-\x7e]([\x20-\x5b\x5d-\x7e]{0,14}[\x21-\x5b\x5d-\x7e])?")
# Triggers of the database refuse to delete younger rows.
MIN_AUDIT_DAYS = 30
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
    public_url: str | None = Field(
        None,
        description="URL of the service for browsers, with its prefix. The login by OIDC needs it, and the URLs of "
        "DICOMweb begin with it.",
    )
    trusted_proxies: str = Field(
        "",
        description="Addresses or networks of proxies, separated by commas. Only their X-Forwarded headers count.",
    )
    tokens: Path | None = Field(None, description="File of named tokens. `counterpart token` writes it.")
    oidc_issuer: str | None = Field(None, description="Issuer of accepted JWTs, as in their claim `iss`.")
    oidc_audience: str | None = Field(None, description="Audience of accepted JWTs, as in their claim `aud`.")
    oidc_jwks: str | None = Field(
        None, description="URL of the keys of the issuer. By default, its discovery document names it."
    )
    oidc_scope_claim: str = Field(
        "scope", description="Claim with the scopes or roles of the caller. A dot leads into an object."
    )
    oidc_scopes: str = Field(
        "",
        description="Scopes of each value of the claim, such as reader=read,physicist=read+send. "
        "Empty takes the values as scopes.",
    )
    oidc_client: str | None = Field(None, description="Client id of the login in the browser. Empty disables it.")
    oidc_login_scope: str = Field(
        "openid", description="Scopes that the login in the browser requests, separated by spaces."
    )
    oidc_client_secret: SecretStr | None = Field(None, description="Secret of the client, if the issuer requires one.")
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
    seg_type: Literal["binary", "labelmap"] = Field(
        "binary", description="Type of the DICOM segmentations, binary or labelmap. Many viewers open only binary."
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
    sources: Path | None = Field(
        None, description="TOML file that names the DICOMweb services from which series may be retrieved."
    )
    keep_days: float = Field(
        0.0, ge=0, description="Age, in days, at which finished jobs are erased with their scans. 0 keeps them."
    )
    keep_gb: float = Field(
        0.0, ge=0, description="Disk space, in GB, above which the oldest finished jobs are erased. 0 sets no limit."
    )
    audit_days: float = Field(
        0.0, ge=0, description="Age, in days, at which rows of the audit trail are deleted, at least 30. 0 keeps them."
    )
    webhooks: str = Field(
        "",
        description="URLs that get a webhook at the end of each job, separated by commas: https, or http on loopback.",
    )
    webhook_secret: SecretStr | None = Field(
        None, description="Key of the signatures of webhooks: whsec_ and 24 to 64 bytes as base64."
    )
    webhook_private_hosts: str = Field(
        "", description="Hosts of webhooks that may have private addresses, separated by commas."
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
    node_ae_title: str = Field("COUNTERPART", description="AE title of the DICOM node.")
    node_host: str = Field(
        "127.0.0.1",
        description="Address of the DICOM node. An address other than loopback needs COUNTERPART_NODE_PEERS.",
    )
    node_port: int = Field(11112, ge=0, le=65535, description="Port of the DICOM node. 0 selects a free port.")
    node_peers: str = Field(
        "",
        description="AE titles that may call the DICOM node, separated by commas, each with or without @address. "
        "Empty accepts all.",
    )
    node_quiet_seconds: float = Field(
        30.0, gt=0, description="Seconds without an instance after which a series at the DICOM node is complete."
    )
    node_complete: Literal["quiet", "association"] = Field(
        "quiet",
        description="End of a series at the DICOM node: quiet, or association if it also ends when its sender releases "
        "the association.",
    )
    node_model: str | None = Field(
        None,
        description="Name or id of the model for series at the DICOM node. By default, their header selects it.",
    )
    node_geometry: Literal["refuse", "resample"] = Field(
        "refuse",
        description="Series at the DICOM node with missing, tilted or unevenly spaced slices: refuse, or resample.",
    )
    node_tls_certificate: Path | None = Field(
        None, description="Certificate of the DICOM node (PEM). With it, the node accepts TLS only."
    )
    node_tls_key: Path | None = Field(None, description="Key of the certificate (PEM), if it is in another file.")
    node_tls_ca: Path | None = Field(
        None, description="CA (PEM) of the callers of the DICOM node. With it, they need a certificate."
    )
    routes: Path | None = Field(
        None, description="TOML file that names the targets of results, and which results go there (see docs/pacs.md)."
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

    @field_validator("node_ae_title")
    @classmethod
    def _check_ae_title(cls, title: str) -> str:
        if not AE_TITLE.fullmatch(title):
            raise ValueError("an AE title has 1 to 16 printable characters without a backslash")
        return title

    @field_validator("node_peers")
    @classmethod
    def _check_peers(cls, peers: str) -> str:
        for entry in filter(None, map(str.strip, peers.split(","))):
            title, at, address = entry.partition("@")
            if not AE_TITLE.fullmatch(title) or (at and not _is_address(address)):
                raise ValueError("peers are AE titles, or title@address with an IP address, separated by commas")
        return peers

    @property
    def accepted_peers(self) -> tuple[tuple[str, str | None], ...]:
        """AE title and address of each caller of the DICOM node. None stands for every address."""
        entries = (entry.strip().partition("@") for entry in self.node_peers.split(",") if entry.strip())
        return tuple((title, address or None) for title, _, address in entries)

    @field_validator("public_url", "oidc_issuer", "oidc_jwks")
    @classmethod
    def _check_web_address(cls, url: str | None) -> str | None:
        if url is not None:
            check_web_address(url)
        return url

    @field_validator("webhooks")
    @classmethod
    def _check_webhooks(cls, webhooks: str) -> str:
        urls = [url.strip() for url in webhooks.split(",") if url.strip()]
        for url in urls:
            check_web_address(url)
        return ",".join(urls)

    @field_validator("webhook_secret")
    @classmethod
    def _check_webhook_secret(cls, secret: SecretStr | None) -> SecretStr | None:
        if secret is not None:
            decode_webhook_secret(secret.get_secret_value())
        return secret

    @field_validator("audit_days")
    @classmethod
    def _check_audit_days(cls, days: float) -> float:
        if 0 < days < MIN_AUDIT_DAYS:
            raise ValueError(f"rows of the audit trail are kept for at least {MIN_AUDIT_DAYS} days")
        return days

    @field_validator("trusted_proxies")
    @classmethod
    def _check_proxies(cls, proxies: str) -> str:
        return ",".join(str(ip_network(proxy.strip())) for proxy in proxies.split(",") if proxy.strip())

    @property
    def has_access_control(self) -> bool:
        """True if callers need a token or a login. If it is false, only programs on this machine may call."""
        return self.token is not None or self.tokens is not None or self.oidc_issuer is not None

    @property
    def webhook_targets(self) -> tuple[str, ...]:
        """URLs of `webhooks`."""
        return tuple(url for url in self.webhooks.split(",") if url)

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
        """Refuse to listen for other machines if callers need no token.

        Raises
        ------
        UnsafeExposure
            The host is not loopback, or other host names are listed, and no token is set.
        """
        if not self.has_access_control and self.hosts:
            raise UnsafeExposure(
                f"{PREFIX}HOSTS is set, and no token is set.",
                expected="a token. Without it, only loopback names are accepted.",
                advice=f"Set {PREFIX}TOKEN to a long random value (openssl rand -hex 32), or unset {PREFIX}HOSTS.",
            )
        if not self.has_access_control and not is_loopback(self.host):
            raise UnsafeExposure(
                f"The service is set to listen on {self.host}, and no token is set.",
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
    """Return the source of a value that is not an argument."""
    if os.environ.get(variable):
        return "environment"
    return "secret" if variable in secrets else "file"


def _refuse_unknown(names: Iterable[str]) -> None:
    """Refuse an unknown variable with the prefix: a setting with a typing error would have no effect."""
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


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def decode_webhook_secret(secret: str) -> bytes:
    """Return the key of the signatures (Standard Webhooks).

    Raises
    ------
    ValueError
    """
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except ValueError:
        key = b""
    if not secret.startswith("whsec_") or not 24 <= len(key) <= 64:
        raise ValueError('the secret must be whsec_ and 24 to 64 bytes as base64: "whsec_$(openssl rand -base64 32)"')
    return key


def check_web_address(url: str) -> None:
    """Check that a URL is https, or http of this machine, and has no user, query and fragment.

    Raises
    ------
    ValueError
    """
    parts = urlsplit(url)
    secure = parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))
    if not secure or not parts.hostname or "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError("the URL must begin with https:// (http:// on loopback), without user, query and fragment")


def is_loopback(host: str) -> bool:
    """Return whether a host name or an address is that of the machine itself."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
