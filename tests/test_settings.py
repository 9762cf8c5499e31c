from pathlib import Path

import pytest
from pydantic import ValidationError

from app.errors import InvalidSettings, UnsafeExposure
from app.settings import Settings, read_settings


def test_the_defaults_keep_to_the_machine_and_out_of_the_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    settings = read_settings()
    assert (settings.host, settings.port, settings.provider) == ("127.0.0.1", 8000, "cpu")
    assert settings.store == str(tmp_path / "counterpart")
    assert settings.database_url == f"sqlite:///{tmp_path}/counterpart/jobs.sqlite"
    assert settings.origin("port") == "default"
    settings.check_exposure()


def test_nothing_is_erased_unless_the_operator_says_so() -> None:
    settings = read_settings()
    assert (settings.keep_days, settings.keep_gb) == (0, 0)


def test_arguments_go_before_the_environment_and_that_before_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
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


def test_it_is_frozen() -> None:
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
def test_a_wrong_value_names_its_variable(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"COUNTERPART_{name}", value)
    with pytest.raises(InvalidSettings, match=f"COUNTERPART_{name}: "):
        read_settings()


def test_a_misspelt_name_in_the_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "settings"
    file.write_text("COUNTERPART_PROT=1\n")
    monkeypatch.setenv("COUNTERPART_SETTINGS", str(file))
    with pytest.raises(InvalidSettings, match="COUNTERPART_PROT: "):
        read_settings()
    monkeypatch.setenv("COUNTERPART_SETTINGS", str(tmp_path / "none"))
    with pytest.raises(InvalidSettings, match="not there"):
        read_settings()


@pytest.mark.parametrize(
    ("host", "token", "refused"),
    [
        ("127.0.0.1", None, False),
        ("127.8.8.8", None, False),
        ("::1", None, False),
        ("localhost", None, False),
        ("0.0.0.0", None, True),  # noqa: S104
        ("::", None, True),
        ("scanner.example", None, True),
        ("0.0.0.0", "secret", False),  # noqa: S104
    ],
)
def test_other_machines_need_a_token(host: str, token: str | None, refused: bool) -> None:  # noqa: FBT001
    settings = Settings(host=host, token=token)
    if refused:
        with pytest.raises(UnsafeExposure, match="COUNTERPART_TOKEN"):
            settings.check_exposure()
    else:
        settings.check_exposure()


def test_secrets_are_hidden() -> None:
    settings = Settings(token="t0k3n", database="postgresql://user:p4ss@host/db")  # noqa: S106
    assert "t0k3n" not in repr(settings) + settings.shown("token")
    assert settings.shown("database") == "postgresql://user:**********@host/db"
    assert settings.shown("port") == "8000"
