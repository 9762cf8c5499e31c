"""docker-compose.yml, read as compose reads it: no Docker engine is needed to see that what it names exists."""

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
# What obstore's S3 client reads: `app.jobs.bucket`.
AWS = {"AWS_ENDPOINT_URL", "AWS_ALLOW_HTTP", "AWS_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}


def interpolate(text: str, given: dict[str, str]) -> str:
    """${NAME:-default} and ${NAME:?message}, as compose puts them in."""

    def put(match: re.Match[str]) -> str:
        name, kind, rest = match[1], match[2], match[3]
        if not given.get(name) and kind == "?":
            raise KeyError(f"{name}: {rest}")
        return given.get(name) or rest

    return re.sub(r"\$\{(\w+):([-?])([^}]*)\}", put, text)


def image_environment(provider: str) -> dict[str, str]:
    """What the image's stages set."""
    stages = re.split(r"^FROM .* AS ", DOCKERFILE, flags=re.MULTILINE)
    wanted = [stage for stage in stages if re.match(rf"(base-{provider}|runtime)\b", stage)]
    assert len(wanted) == 2
    return dict(re.findall(rf"({PREFIX}[A-Z_]+)=(\S+)", "\n".join(wanted)))


def environment(name: str) -> dict[str, str]:
    """What a service's process sees of ours."""
    service = SERVICES[name]
    provider = interpolate(service["build"]["args"]["PROVIDER"], {})
    own = {key: interpolate(str(value), GIVEN) for key, value in service["environment"].items() if value is not None}
    return image_environment(provider) | own


def test_the_profiles_are_the_default_a_cluster_and_a_gpu() -> None:
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
def test_every_setting_exists_and_is_understood(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = environment(name)
    assert {key for key in seen if key.startswith(PREFIX)} <= {
        f"{PREFIX}{field.upper()}" for field in Settings.model_fields
    }
    assert {key for key in seen if not key.startswith(PREFIX)} <= AWS
    for key, value in seen.items():
        monkeypatch.setenv(key, value)
    settings = read_settings()
    settings.check_exposure()  # it listens on every address of its container, with a token
    assert settings.host == "0.0.0.0"  # noqa: S104
    cluster = name in {"api", "worker"}
    assert (settings.bucket is not None) == cluster
    assert settings.database_url.startswith(
        "postgresql://counterpart:secret@database/counterpart" if cluster else "sqlite:///"
    )
    assert settings.provider == ("cuda" if name == "counterpart-gpu" else "cpu")
    grace = int(OURS[name]["stop_grace_period"].removesuffix("s"))
    assert grace >= settings.drain_seconds + 20


def test_the_bucket_finds_its_endpoint_and_credentials() -> None:
    for name in ("api", "worker"):
        assert {key for key, value in SERVICES[name]["environment"].items() if value is None} == AWS


@pytest.mark.parametrize("name", OURS)
def test_every_command_and_option_exists(name: str) -> None:
    command, *options = SERVICES[name].get("command", ["serve"])
    known = get_command(app).commands[command]  # type: ignore[attr-defined]
    known.make_context(command, [str(option) for option in options])  # raises where an option is unknown
    assert SERVICES[name].get("command", ["serve"])[0] in {"serve", "worker"}


@pytest.mark.parametrize("name", OURS)
def test_a_token_is_demanded_and_loopback_alone_is_published(name: str) -> None:
    service = SERVICES[name]
    with pytest.raises(KeyError, match="COUNTERPART_TOKEN"):
        interpolate(service["environment"]["COUNTERPART_TOKEN"], {})
    ports = [interpolate(port, {}) for port in service.get("ports", [])]
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:8000", port) for port in ports)
    # Where its health is asked for is where it listens.
    listens = service["command"][-1] if name == "worker" else environment(name)["COUNTERPART_PORT"]
    assert f"127.0.0.1:{listens}/readyz" in service["healthcheck"]["test"][-1]


def test_what_services_refer_to_is_there() -> None:
    assert f"ARG {'PROVIDER'}" in DOCKERFILE
    for name, service in SERVICES.items():
        for other, wanted in service.get("depends_on", {}).items():
            assert wanted == {"condition": "service_healthy"}
            assert "healthcheck" in SERVICES[other], name
        for volume in service["volumes"]:
            source, _, target = volume.partition(":")
            assert source.startswith("/") or source in COMPOSE["volumes"]
            if name in OURS:
                assert (target or source) in {"/var/lib/counterpart", "/tmp"}  # noqa: S108
    # A scratch of its own for every process of the cluster; the root is read-only.
    assert all("/var/lib/counterpart" in SERVICES[name]["volumes"] for name in ("api", "worker"))
    devices = SERVICES["counterpart-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]
    assert SERVICES["counterpart-gpu"]["image"] == "counterpart:gpu"
