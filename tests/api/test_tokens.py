"""Named tokens: the file, its changes while the service runs, and `counterpart token`."""

import json
import threading
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from app.api.tokens import TokenFile, hash_token
from app.cli import app as command_line
from app.errors import BadRequest, IdentityUnavailable
from app.main import create_app
from app.settings import Settings
from tests.api.support import BASE_URL, URL, FakeEngine, fake_scan


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_file_holds_the_hash_and_never_the_token(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    token = TokenFile(path).create("gateway", ["read", "send"])
    text = path.read_text()
    assert token not in text
    assert json.loads(text)["sha256"] == hash_token(token)
    assert json.loads(text)["scopes"] == ["send", "read"]
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(token.removeprefix("counterpart_")) == 43  # 256 bits


def test_token_is_found_until_it_is_revoked_by_another_process(tmp_path: Path) -> None:
    service, command = TokenFile(tmp_path / "tokens"), TokenFile(tmp_path / "tokens")
    token = command.create("gateway", ["send"])
    found = service.find(token)
    assert found is not None
    assert found.name == "gateway"
    assert service.find(token + "x") is None
    assert service.find(found.sha256) is None
    command.revoke("gateway")
    assert service.find(token) is None
    first = service.read()[0].revoked
    command.revoke("gateway")
    assert service.read()[0].revoked == first


def test_name_is_used_once_even_after_its_revocation(tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "tokens")
    file.create("gateway", ["send"])
    file.revoke("gateway")
    with pytest.raises(BadRequest, match="has or had"):
        file.create("gateway", ["send"])
    for name in ("", "a b", "a\n", "../x", "x" * 65):
        with pytest.raises(BadRequest, match="malformed"):
            file.create(name, ["send"])
    with pytest.raises(BadRequest, match="No token"):
        file.revoke("other")


@pytest.mark.parametrize("line", ["{", '{"name": "x"}', '{"name":"x","scopes":["all"],"sha256":"0","created":"now"}'])
def test_damaged_file_is_refused_as_a_whole(tmp_path: Path, line: str) -> None:
    path = tmp_path / "tokens"
    token = TokenFile(path).create("gateway", ["send"])
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(IdentityUnavailable) as error:
        TokenFile(path).find(token)
    assert line not in str(error.value)


def test_parallel_creations_lose_no_token(tmp_path: Path) -> None:
    names = [f"system-{number}" for number in range(12)]
    threads = [
        threading.Thread(target=lambda name=name: TokenFile(tmp_path / "tokens").create(name, ["read"]))
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(token.name for token in TokenFile(tmp_path / "tokens").read()) == sorted(names)


def test_service_notices_new_revoked_and_damaged_tokens_without_a_restart(tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "tokens")
    settings = Settings(store=str(tmp_path / "store"), tokens=tmp_path / "tokens", drain_seconds=0)
    with TestClient(create_app(settings, FakeEngine()), BASE_URL) as client:
        token = file.create("gateway", ["read"])
        assert client.get(URL, headers=bearer(token)).status_code == 200
        refused = client.post(URL, content=fake_scan(), headers=bearer(token))
        assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
        assert "`send`" in refused.json()["expected"]
        file.revoke("gateway")
        assert client.get(URL, headers=bearer(token)).status_code == 401
        (tmp_path / "tokens").write_text("no JSON\n")
        answer = client.get(URL, headers=bearer(token))
        assert (answer.status_code, answer.json()["code"]) == (503, "identity_unavailable")
        (tmp_path / "tokens").unlink()
        assert client.get(URL, headers=bearer(token)).status_code == 401


def test_operators_list_the_tokens_without_their_hashes(tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "tokens")
    token = file.create("operator", ["admin"])
    file.create("gateway", ["read", "send"])
    file.revoke("gateway")
    settings = Settings(store=str(tmp_path / "store"), tokens=tmp_path / "tokens", drain_seconds=0)
    with TestClient(create_app(settings, FakeEngine()), BASE_URL) as client:
        answer = client.get("/v1/tokens", headers=bearer(token))
        found = [(t["name"], t["scopes"], t["revoked"] is not None) for t in answer.json()["tokens"]]
        assert found == [("operator", ["admin"], False), ("gateway", ["send", "read"], True)]
        assert not any(known.sha256 in answer.text for known in file.read())


def test_static_token_works_beside_named_tokens(tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "tokens")
    named = file.create("scraper", ["metrics"])
    settings = Settings(store=str(tmp_path / "s"), tokens=tmp_path / "tokens", token="static", drain_seconds=0)  # noqa: S106
    with TestClient(create_app(settings, FakeEngine()), BASE_URL) as client:
        assert client.get("/metrics", headers=bearer("static")).status_code == 200
        assert client.get("/metrics", headers=bearer(named)).status_code == 200
        assert client.get(URL, headers=bearer(named)).status_code == 403


def test_commands_create_list_and_revoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COUNTERPART_TOKENS", str(tmp_path / "tokens"))
    run = CliRunner()
    created = run.invoke(command_line, ["token", "create", "gateway", "--scope", "send", "--scope", "read"])
    assert created.exit_code == 0
    token = created.output.strip()
    assert TokenFile(tmp_path / "tokens").find(token)
    listed = run.invoke(command_line, ["token", "list"]).output
    assert "gateway\tread,send\tcreated" in listed
    assert "valid" in listed
    assert token not in listed
    assert run.invoke(command_line, ["token", "revoke", "gateway"]).exit_code == 0
    assert "revoked" in run.invoke(command_line, ["token", "list"]).output
    assert run.invoke(command_line, ["token", "revoke", "other"]).exit_code == 1
    monkeypatch.delenv("COUNTERPART_TOKENS")
    assert "invalid_settings: COUNTERPART_TOKENS" in run.invoke(command_line, ["token", "list"]).output
