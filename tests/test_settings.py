"""Settings: defaults, precedence, validation, secrets, and docs/settings.md."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from app.errors import InvalidSettings, UnsafeExposure
from app.settings import OTHER_VARIABLES, PREFIX, Settings, mask_url, read_settings

ROOT = Path(__file__).resolve().parents[1]


def test_defaults_are_local_and_outside_the_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    settings = read_settings()
    assert (settings.host, settings.port, settings.provider) == ("127.0.0.1", 8000, "cpu")
    assert settings.store == str(tmp_path / "counterpart")
    assert settings.database_url == f"sqlite:///{tmp_path}/counterpart/jobs.sqlite"
    settings.check_exposure()


def test_nothing_is_erased_by_default() -> None:
    settings = read_settings()
    assert (settings.keep_days, settings.keep_gb) == (0, 0)


def test_precedence_is_argument_environment_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "settings"
    file.write_text("COUNTERPART_PORT=1\nCOUNTERPART_THREADS=1\nCOUNTERPART_QUEUE_LIMIT=1\n")
    monkeypatch.setenv("COUNTERPART_SETTINGS", str(file))
    monkeypatch.setenv("COUNTERPART_PORT", "2")
    monkeypatch.setenv("COUNTERPART_THREADS", "2")
    monkeypatch.setenv("COUNTERPART_MODELS", "")
    settings = read_settings(port=3, host=None)
    assert (settings.port, settings.threads, settings.queue_limit, settings.models) == (3, 2, 1, None)
    origins = [settings.origin(name) for name in ("port", "threads", "queue_limit", "models", "host")]
    assert origins == ["argument", "environment", "file", "default", "default"]


def test_settings_are_frozen() -> None:
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "many"),
        ("PROVIDER", "tpu"),
        ("STORE", "gs://bucket"),
        ("DATABASE", "mysql://host/db"),
        ("QUEUE_LIMIT", "0"),
    ],
)
def test_invalid_value_names_its_variable(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"COUNTERPART_{name}", value)
    with pytest.raises(InvalidSettings, match=f"COUNTERPART_{name}: "):
        read_settings()


def test_unknown_name_in_the_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "settings"
    file.write_text("COUNTERPART_PROT=1\n")
    monkeypatch.setenv("COUNTERPART_SETTINGS", str(file))
    with pytest.raises(InvalidSettings, match="COUNTERPART_PROT: "):
        read_settings()


def test_missing_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COUNTERPART_SETTINGS", str(tmp_path / "none"))
    with pytest.raises(InvalidSettings, match="COUNTERPART_SETTINGS"):
        read_settings()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_token(host: str) -> None:
    Settings(host=host).check_exposure()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "scanner.example"])  # noqa: S104
def test_other_hosts_need_a_token(host: str) -> None:
    Settings(host=host, token="secret").check_exposure()  # noqa: S106
    with pytest.raises(UnsafeExposure, match="COUNTERPART_TOKEN"):
        Settings(host=host).check_exposure()


def test_secrets_are_masked() -> None:
    settings = Settings(token="t0k3n", database="postgresql://user:p4ss@host/db")  # noqa: S106
    assert "t0k3n" not in repr(settings) + settings.format_value("token")
    assert settings.format_value("database") == "postgresql://user:**********@host/db"
    assert settings.format_value("port") == "8000"


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:geheim@host/db",
        "postgresql://user:geh@eim@host/db",
        "postgresql://user:geh/eim?x#@host:5432/db",
        "postgresql://:geheim@host/db",
        "postgresql://user:geheim@one,two:5432/db?sslmode=require",
        "postgresql://host/db?user=me&password=geheim",
        "postgresql://host/db?sslpassword=geheim&host=other",
        "postgresql://user:geheim@host/db?passw%6Frd=geheim;options=-c%20geheim",
        "s3://key:geheim@bucket/prefix",
        "s3://bucket/prefix?secret_access_key=geheim",
    ],
)
def test_password_is_masked_in_every_form_of_url(url: str) -> None:
    masked = mask_url(url)
    assert not {"geheim", "eim", "geh"} & set(re.split(r"[^a-z]", masked)), masked
    assert "**********" in masked


def test_url_without_a_password_is_unchanged() -> None:
    for url in ("sqlite:////var/lib/jobs.sqlite", "postgresql://user@host/db?sslmode=require", "s3://bucket/prefix"):
        assert mask_url(url) == url


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("COUNTERPART_PROT", "COUNTERPART_PORT"),
        ("COUNTERPART_TOKN", "COUNTERPART_TOKEN"),
        ("COUNTERPART_KEEP_DAY", "COUNTERPART_KEEP_DAYS"),
        ("counterpart_stores", "COUNTERPART_STORE"),
        ("COUNTERPART_XYZZY", "counterpart doctor"),
    ],
)
def test_unknown_variable_is_refused_with_the_nearest_name(
    monkeypatch: pytest.MonkeyPatch, name: str, nearest: str
) -> None:
    monkeypatch.setenv(name, "geheim")
    with pytest.raises(InvalidSettings, match=f"{name.upper()}: .*{nearest}") as error:
        read_settings()
    assert "geheim" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"), [("COUNTERPART_XYZZY", ""), ("COUNTERPART_DATA", "x"), ("COUNTERPART_SERVICE_HOST", "10.0.0.1")]
)
def test_variable_of_another_program_is_no_setting(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    read_settings()


def test_hosts_need_a_token() -> None:
    Settings(hosts="scanner.example", token="secret").check_exposure()  # noqa: S106
    with pytest.raises(UnsafeExposure, match="COUNTERPART_HOSTS"):
        Settings(hosts="scanner.example").check_exposure()


@pytest.mark.parametrize(
    ("name", "value"), [("HOSTS", "http://a"), ("HOSTS", "a:8000"), ("ROOT_PATH", "x"), ("ROOT_PATH", "http://a/b")]
)
def test_host_or_prefix_in_another_form_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"COUNTERPART_{name}", value)
    with pytest.raises(InvalidSettings, match=f"COUNTERPART_{name}: "):
        read_settings()


def test_every_setting_is_documented_with_its_default_and_description() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \| ([^|]*) \|$", page, re.MULTILINE)
    assert [(variable, description) for variable, _, description in rows] == [
        (f"{PREFIX}{name.upper()}", field.description) for name, field in Settings.model_fields.items()
    ]
    for (variable, text, _), (name, field) in zip(rows, Settings.model_fields.items(), strict=True):
        if field.default is not None and not field.default_factory:
            assert getattr(Settings(**{name: text.strip("`")}), name) == field.default, variable


def test_documents_name_no_other_setting() -> None:
    pages = (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
    named = {name for page in pages for name in re.findall(rf"{PREFIX}[A-Z_]+\b", page.read_text())}
    assert named - OTHER_VARIABLES <= {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}


def write_secrets(folder: Path, monkeypatch: pytest.MonkeyPatch, secrets: dict[str, str]) -> None:
    for name, value in secrets.items():
        (folder / name).write_text(value)
    monkeypatch.setenv("COUNTERPART_SECRETS", str(folder))


def test_secrets_come_from_files_of_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    url = "postgresql://counterpart:secret@database/counterpart"
    secrets = {"counterpart_token": "from a file\n", "counterpart_database": url, "other": "x"}
    write_secrets(tmp_path, monkeypatch, secrets)
    (tmp_path / "..data").mkdir()  # Kubernetes has such a folder in each mounted secret
    settings = read_settings()
    assert settings.token is not None
    assert settings.token.get_secret_value() == "from a file"
    assert settings.database_url == url
    assert [settings.origin(name) for name in ("token", "database", "port")] == ["secret", "secret", "default"]


def test_environment_precedes_secret_and_secret_precedes_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "settings"
    file.write_text("COUNTERPART_TOKEN=file\nCOUNTERPART_HOSTS=file\n")
    monkeypatch.setenv("COUNTERPART_SETTINGS", str(file))
    (tmp_path / "secrets").mkdir()
    secrets = {"counterpart_token": "secret", "counterpart_database": "sqlite:///a"}
    write_secrets(tmp_path / "secrets", monkeypatch, secrets)
    monkeypatch.setenv("COUNTERPART_DATABASE", "sqlite:///b")
    settings = read_settings()
    assert settings.token is not None
    assert (settings.token.get_secret_value(), settings.hosts, settings.database) == ("secret", "file", "sqlite:///b")
    assert [settings.origin(name) for name in ("token", "hosts", "database")] == ["secret", "file", "environment"]


def test_empty_secret_is_no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_secrets(tmp_path, monkeypatch, {"counterpart_token": "\n", "counterpart_database": ""})
    settings = read_settings(host="0.0.0.0")  # noqa: S104
    assert (settings.token, settings.database) == (None, None)
    with pytest.raises(UnsafeExposure):
        settings.check_exposure()


def test_unknown_secret_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_secrets(tmp_path, monkeypatch, {"counterpart_tokne": "secret"})
    with pytest.raises(InvalidSettings, match="COUNTERPART_TOKNE: no setting") as refused:
        read_settings()
    assert "COUNTERPART_TOKEN" in str(refused.value)


def test_missing_folder_of_secrets_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COUNTERPART_SECRETS", str(tmp_path / "none"))
    with pytest.raises(InvalidSettings, match="COUNTERPART_SECRETS"):
        read_settings()


def test_credentials_of_the_bucket_are_options_of_its_client() -> None:
    settings = Settings(bucket_key_id="id", bucket_key="key")
    assert settings.bucket_credentials == {"access_key_id": "id", "secret_access_key": "key"}
    assert "key" not in settings.format_value("bucket_key")
    assert Settings().bucket_credentials == {}
