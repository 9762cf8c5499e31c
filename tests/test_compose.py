"""docker-compose.yml names only settings, commands, services and volumes that exist. No Docker engine is needed."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from app.cli import app
from app.settings import PREFIX, Settings, read_settings

ROOT = Path(__file__).resolve().parents[1]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
GIVEN = {"COUNTERPART_TOKEN": "a-long-random-value", "POSTGRES_PASSWORD": "secret"}
# Variables of obstore's S3 client.
AWS = {"AWS_ENDPOINT_URL", "AWS_ALLOW_HTTP", "AWS_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}


def interpolate(text: str, given: dict[str, str]) -> str:
    """Replace ${NAME:-default} and ${NAME:?message}, as compose does."""

    def replace(match: re.Match[str]) -> str:
        name, kind, rest = match[1], match[2], match[3]
        if not given.get(name) and kind == "?":
            raise KeyError(f"{name}: {rest}")
        return given.get(name) or rest

    return re.sub(r"\$\{(\w+):([-?])([^}]*)\}", replace, text)


def image_environment(provider: str) -> dict[str, str]:
    """Return the settings in the stages of the image."""
    stages = re.split(r"^FROM .* AS ", DOCKERFILE, flags=re.MULTILINE)
    used = [stage for stage in stages if re.match(rf"(base-{provider}|runtime)\b", stage)]
    assert len(used) == 2
    return dict(re.findall(rf"({PREFIX}[A-Z_]+)=(\S+)", "\n".join(used)))


def environment(name: str) -> dict[str, str]:
    """Return the settings of a compose service."""
    service = SERVICES[name]
    provider = interpolate(service["build"]["args"]["PROVIDER"], {})
    own = {key: interpolate(str(value), GIVEN) for key, value in service["environment"].items() if value is not None}
    return image_environment(provider) | own


def test_profiles_are_default_cluster_and_gpu() -> None:
    by_profile: dict[str, set[str]] = {}
    for name, service in SERVICES.items():
        for profile in service.get("profiles", ["default"]):
            by_profile.setdefault(profile, set()).add(name)
    assert by_profile == {
        "default": {"counterpart"},
        "cluster": {"api", "worker", "database"},
        "gpu": {"counterpart-gpu"},
    }
    header = (ROOT / "docker-compose.yml").read_text().partition("x-image")[0]
    assert set(re.findall(r"--profile (\w+)", header)) == {"cluster", "gpu"}
    assert "--scale worker=3" in header


@pytest.mark.parametrize("name", OURS)
def test_every_setting_is_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = environment(name)
    assert {key for key in variables if key.startswith(PREFIX)} <= {
        f"{PREFIX}{field.upper()}" for field in Settings.model_fields
    }
    assert {key for key in variables if not key.startswith(PREFIX)} <= AWS
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    settings = read_settings()
    settings.check_exposure()
    assert settings.host == "0.0.0.0"  # noqa: S104
    cluster = name in {"api", "worker"}
    assert (settings.bucket is not None) == cluster
    assert settings.database_url.startswith(
        "postgresql://counterpart:secret@database/counterpart" if cluster else "sqlite:///"
    )
    assert settings.provider == ("cuda" if name == "counterpart-gpu" else "cpu")
    grace = int(OURS[name]["stop_grace_period"].removesuffix("s"))
    assert grace >= settings.drain_seconds + 20


def test_cluster_passes_the_variables_of_the_bucket() -> None:
    for name in ("api", "worker"):
        assert {key for key, value in SERVICES[name]["environment"].items() if value is None} == AWS


@pytest.mark.parametrize("name", OURS)
def test_command_and_options_exist(name: str) -> None:
    command, *options = SERVICES[name].get("command", ["serve"])
    known = get_command(app).commands[command]  # type: ignore[attr-defined]
    known.make_context(command, [str(option) for option in options])  # raises if an option is unknown
    assert SERVICES[name].get("command", ["serve"])[0] in {"serve", "worker"}


@pytest.mark.parametrize("name", OURS)
def test_token_is_required_and_only_loopback_is_published(name: str) -> None:
    service = SERVICES[name]
    with pytest.raises(KeyError, match="COUNTERPART_TOKEN"):
        interpolate(service["environment"]["COUNTERPART_TOKEN"], {})
    ports = [interpolate(port, {}) for port in service.get("ports", [])]
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:8000", port) for port in ports)
    port = service["command"][-1] if name == "worker" else environment(name)["COUNTERPART_PORT"]
    assert f"127.0.0.1:{port}/readyz" in service["healthcheck"]["test"][-1]


def test_dependencies_and_volumes_exist() -> None:
    assert "ARG PROVIDER" in DOCKERFILE
    for name, service in SERVICES.items():
        for other, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"}
            assert "healthcheck" in SERVICES[other], name
        for volume in service["volumes"]:
            source, _, target = volume.partition(":")
            assert source.startswith("/") or source in COMPOSE["volumes"]
            if name in OURS:
                assert (target or source) in {"/var/lib/counterpart", "/tmp"}  # noqa: S108
    # The root file system is read-only, so each process of the cluster needs a volume for its scratch folder.
    assert all("/var/lib/counterpart" in SERVICES[name]["volumes"] for name in ("api", "worker"))
    devices = SERVICES["counterpart-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]
    assert SERVICES["counterpart-gpu"]["image"] == "counterpart:gpu"
