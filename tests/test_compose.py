"""docker-compose.yml conforms to the compose specification, and names only settings, commands and secrets that exist.

No Docker engine is needed.
"""

import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose
from typer.main import get_command

from app.cli import app
from app.settings import PREFIX, SECRETS_FOLDER_VARIABLE, Settings, decode_webhook_secret, read_settings

ROOT = Path(__file__).resolve().parents[1]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
# Folder of the files that settings name.
CONFIG = "./config"
# Variables of obstore's S3 client that hold no secret.
AWS = {"AWS_ENDPOINT_URL", "AWS_ALLOW_HTTP", "AWS_REGION"}


def interpolate(text: str) -> str:
    """Replace ${NAME:-default} by the default, as compose does if the variable is not set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of secrets, made as documented."""
    folder = tmp_path_factory.mktemp("compose") / "secrets"
    environ = {"PATH": "/usr/bin:/bin", "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key"}
    subprocess.run([ROOT / "deploy" / "compose" / "make-secrets.sh", folder], env=environ, check=True)
    return folder


def test_file_conforms_to_the_compose_specification() -> None:
    parsed = PyCompose.from_yaml(yaml.safe_dump(yaml.safe_load(interpolate(yaml.safe_dump(COMPOSE)))))
    parsed.validate()
    broken = {**COMPOSE, "services": {**SERVICES, "api": {**SERVICES["api"], "secrets": ["unknown"]}}}
    with pytest.raises(ValueError, match="unknown"):
        PyCompose.from_yaml(yaml.safe_dump(yaml.safe_load(interpolate(yaml.safe_dump(broken))))).validate()


def image_environment(provider: str) -> dict[str, str]:
    """Return the settings in the stages of the image."""
    stages = re.split(r"^FROM .* AS ", DOCKERFILE, flags=re.MULTILINE)
    used = [stage for stage in stages if re.match(rf"(base-{provider}|runtime)\b", stage)]
    assert len(used) == 2
    return dict(re.findall(rf"({PREFIX}[A-Z_]+)=(\S+)", "\n".join(used)))


def environment(name: str) -> dict[str, str]:
    """Return the settings of a compose service."""
    service = SERVICES[name]
    provider = interpolate(service["build"]["args"]["PROVIDER"])
    own = {key: interpolate(str(value)) for key, value in service["environment"].items() if value is not None}
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
        "node": {"node"},
    }
    header = (ROOT / "docker-compose.yml").read_text().partition("x-image")[0]
    assert set(re.findall(r"--profile (\w+)", header)) == {"cluster", "gpu", "node"}
    assert "--scale worker=3" in header


@pytest.mark.parametrize("name", OURS)
def test_every_setting_and_secret_is_valid(
    name: str, secrets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = environment(name)
    known = {f"{PREFIX}{field.upper()}" for field in Settings.model_fields} | {SECRETS_FOLDER_VARIABLE}
    assert {key for key in variables if key.startswith(PREFIX)} <= known
    assert {key for key in variables if not key.startswith(PREFIX)} <= AWS
    for secret in SERVICES[name]["secrets"]:
        file = interpolate(COMPOSE["secrets"][secret]["file"]).removeprefix("./secrets/")
        (tmp_path / secret).write_bytes((secrets / file).read_bytes())
    for key, value in {**variables, SECRETS_FOLDER_VARIABLE: str(tmp_path)}.items():
        monkeypatch.setenv(key, value)
    assert variables[SECRETS_FOLDER_VARIABLE] == "/run/secrets"
    settings = read_settings()
    assert settings.token is not None
    assert len(settings.token.get_secret_value()) == 64
    settings.check_exposure()
    assert settings.host == "0.0.0.0"  # noqa: S104
    cluster = name in {"api", "worker"}
    assert (settings.bucket is not None) == cluster
    password = (secrets / "postgres_password").read_text().strip()
    assert settings.database_url.startswith(
        f"postgresql://counterpart:{password}@database/counterpart" if cluster else "sqlite:///"
    )
    assert settings.bucket_credentials == ({"access_key_id": "id", "secret_access_key": "key"} if cluster else {})
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
    assert SERVICES[name].get("command", ["serve"])[0] in {"serve", "worker", "node"}


def test_secrets_are_made_once_and_only_for_their_owner(secrets: Path) -> None:
    assert {path.name for path in secrets.iterdir()} == set(COMPOSE["secrets"])
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    before = {path.name: path.read_bytes() for path in secrets.iterdir()}
    subprocess.run([ROOT / "deploy" / "compose" / "make-secrets.sh", secrets], check=True)
    assert {path.name: path.read_bytes() for path in secrets.iterdir()} == before


def test_no_secret_is_a_variable() -> None:
    for service in SERVICES.values():
        for key, value in service["environment"].items():
            assert not re.search(r"TOKEN|PASSWORD|SECRET_|KEY", key) or str(value).startswith("/run/secrets/"), key


def test_every_service_has_limits_and_rotates_its_log() -> None:
    for service in SERVICES.values():
        limits = service["deploy"]["resources"]["limits"]
        assert {"cpus", "memory", "pids"} <= set(limits)
        assert set(service["logging"]["options"]) == {"max-size", "max-file"}
        assert "no-new-privileges:true" in service["security_opt"]
    for service in OURS.values():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        # Every setting can be a line of this file.
        assert service["env_file"] == [{"path": "counterpart.env", "required": False}]


@pytest.mark.parametrize("name", OURS)
def test_only_loopback_is_published(name: str) -> None:
    service = SERVICES[name]
    ports = [interpolate(port) for port in service.get("ports", [])]
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:(8000|11112)", port) for port in ports)
    port = service["command"][-1] if name in {"worker", "node"} else environment(name)["COUNTERPART_PORT"]
    assert f"127.0.0.1:{port}/readyz" in service["healthcheck"]["test"][-1]


def test_files_of_routes_and_certificates_are_mounted() -> None:
    for service in OURS.values():
        assert f"{CONFIG}:/etc/counterpart:ro" in [interpolate(volume) for volume in service["volumes"]]
    # A worker needs the token of a target, an API process that of a source, and a node its key.
    for name, service in OURS.items():
        assert ("pacs_token" in service["secrets"]) == (name != "node")
        assert ("node_tls_key" in service["secrets"]) == (name == "node")
        # Only a process with the API logs people in and sends webhooks.
        is_api = service.get("command", ["serve"])[0] == "serve"
        for secret in ("counterpart_oidc_client_secret", "counterpart_webhook_secret"):
            assert (secret in service["secrets"]) == is_api


def test_secrets_of_webhooks_and_login_are_made(secrets: Path, tmp_path: Path) -> None:
    decode_webhook_secret((secrets / "counterpart_webhook_secret").read_text().strip())
    for name in ("counterpart_oidc_client_secret", "pacs_token", "node_tls_key"):
        assert (secrets / name).read_text().strip() == ""
    environ = {"PATH": "/usr/bin:/bin", "OIDC_CLIENT_SECRET": "client", "PACS_TOKEN": "pacs"}
    command = [ROOT / "deploy" / "compose" / "make-secrets.sh", tmp_path / "given"]
    subprocess.run(command, env=environ, check=True)
    assert (tmp_path / "given" / "counterpart_oidc_client_secret").read_text() == "client\n"
    assert (tmp_path / "given" / "pacs_token").read_text() == "pacs\n"


def test_dependencies_and_volumes_exist() -> None:
    assert "ARG PROVIDER" in DOCKERFILE
    for name, service in SERVICES.items():
        for other, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"}
            assert "healthcheck" in SERVICES[other], name
        for volume in service["volumes"]:
            source, _, target = interpolate(volume).partition(":")
            if source != CONFIG:
                assert source.startswith("/") or source in COMPOSE["volumes"]
            if name in OURS and source != CONFIG:
                assert (target or source) == "/var/lib/counterpart"
    # The root file system is read-only, so each process of the cluster needs a volume for its scratch folder.
    assert all("/var/lib/counterpart" in SERVICES[name]["volumes"] for name in ("api", "worker"))
    devices = SERVICES["counterpart-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]
    assert SERVICES["counterpart-gpu"]["image"] == "counterpart:gpu"
