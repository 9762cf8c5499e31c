"""Checks of `counterpart doctor` on other systems, against servers on loopback."""

import base64
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path

import pytest
from pynetdicom import AE
from pynetdicom.sop_class import MRImageStorage, Verification  # type: ignore[attr-defined]
from rich.console import Console

from app import connection_checks
from app.api.tokens import TokenFile
from app.check_output import Check, print_checks
from app.connection_checks import check_connections
from app.settings import Settings
from tests.pacs.certificates import Authority
from tests.support.issuer import AUDIENCE, run_issuer
from tests.support.servers import free_port

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
SECRET = "whsec_" + base64.b64encode(b"0" * 32).decode()


@pytest.fixture
def check(tiny_models: Path, tmp_path: Path) -> Callable[..., dict[str, Check]]:
    def run(**arguments: object) -> dict[str, Check]:
        found = list(check_connections(Settings(**{"models": tiny_models, "store": str(tmp_path), **arguments})))
        screen = StringIO()
        print_checks(found, Console(file=screen, width=80))
        assert all(len(line) <= 80 for line in screen.getvalue().splitlines())
        assert all(bool(one.fix) == (one.status != "ok") for one in found)
        return {one.name: one for one in found}

    return run


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "file.toml"
    path.write_text(text)
    return path


def dimse(port: int, title: str = "ARCHIVE", **options: object) -> str:
    lines = "".join(f"{name} = {value}\n" for name, value in options.items())
    return (
        f'[targets.archive]\nkind = "dimse"\nhost = "127.0.0.1"\nport = {port}\nae_title = "{title}"\n{lines}'
        '[[routes]]\ntarget = "archive"\nresults = ["capture.dcm"]\n'
    )


@contextmanager
def scp(sop_class: str) -> Iterator[int]:
    entity = AE("ARCHIVE")
    entity.require_called_aet = True
    entity.add_supported_context(sop_class)
    server = entity.start_server(("127.0.0.1", 0), block=False)
    assert server is not None
    try:
        yield server.server_address[1]
    finally:
        entity.shutdown()


@contextmanager
def web(*statuses: int) -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """Run a server that answers each GET with the next status, and yield its URL and its requests."""
    answers, requests = list(statuses), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append((self.path, self.headers["Authorization"]))
            self.send_response(answers.pop(0))
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Write nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/dicom-web/", requests
    finally:
        server.shutdown()
        server.server_close()


def test_nothing_is_checked_that_is_not_set(check: Callable[..., dict[str, Check]]) -> None:
    assert check() == {}


def test_a_damaged_file_of_routes_fails(check: Callable[..., dict[str, Check]], tmp_path: Path) -> None:
    found = check(routes=write(tmp_path, dimse(1).replace("capture.dcm", "mask.nii.gz")))
    assert list(found) == ["routes"]
    assert (found["routes"].status, "mask.nii.gz is no DICOM result" in found["routes"].found) == ("fail", True)


def test_a_target_is_called_by_echo(check: Callable[..., dict[str, Check]], tmp_path: Path) -> None:
    with scp(Verification) as port:
        found = check(routes=write(tmp_path, dimse(port)))
        assert (found["routes"].status, found["routes"].found) == ("ok", "targets: archive; rules: 1")
        assert found["target archive"] == Check("target archive", "ok", f"ARCHIVE at 127.0.0.1:{port} answers C-ECHO")
        rejected = check(routes=write(tmp_path, dimse(port, "OTHER")))["target archive"]
        assert (rejected.status, rejected.found.endswith("rejected"), "AE titles" in rejected.fix) == (
            "warn",
            True,
            True,
        )
    with scp(MRImageStorage) as port:
        assert check(routes=write(tmp_path, dimse(port)))["target archive"].status == "ok"
    closed = check(routes=write(tmp_path, dimse(free_port())))["target archive"]
    assert (closed.status, closed.found.endswith("unreachable")) == ("warn", True)
    unread = check(routes=write(tmp_path, dimse(port, tls="true", ca='"none.pem"')))["target archive"]
    assert (unread.status, "TLS" in unread.found) == ("fail", True)


def test_routes_of_models_that_are_not_installed_are_a_warning(
    check: Callable[..., dict[str, Check]], tmp_path: Path
) -> None:
    for models, status in (('["tiny"]', "ok"), ('["tiny-0.0.1"]', "ok"), ('["tiny", "tni"]', "warn")):
        text = dimse(free_port()) + f"models = {models}\n"
        assert check(routes=write(tmp_path, text))["routes"].status == status
    assert "tni" in check(routes=write(tmp_path, text))["routes"].found
    without_rule = dimse(free_port()).partition("[[")[0]
    assert check(routes=write(tmp_path, without_rule))["routes"].found == "targets: archive; no rule"


@pytest.mark.parametrize(
    ("status", "rating"),
    [(200, "ok"), (204, "ok"), (400, "ok"), (401, "warn"), (403, "warn"), (404, "warn"), (302, "warn"), (503, "warn")],
)
def test_web_services_are_searched(
    check: Callable[..., dict[str, Check]], tmp_path: Path, status: int, rating: str
) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    with web(status, status) as (url, requests):
        fields = f'url = "{url}"\ntoken_file = "{tmp_path}/token"\n'
        source = check(sources=write(tmp_path, f"[sources.pacs]\n{fields}"))["source pacs"]
        target = check(routes=write(tmp_path, f'[targets.pacs]\nkind = "stow"\n{fields}'))["target pacs"]
    assert (source.status, target.status) == (rating, rating)
    assert requests == [("/dicom-web/studies?limit=1", "Bearer s3cret")] * 2
    assert "s3cret" not in repr([source, target])


def test_web_services_without_answer_or_files_are_reported(
    check: Callable[..., dict[str, Check]], tmp_path: Path
) -> None:
    url = f"https://127.0.0.1:{free_port()}/web"
    assert check(sources=write(tmp_path, f'[sources.pacs]\nurl = "{url}"\n'))["source pacs"].status == "warn"
    missing = write(tmp_path, f'[sources.pacs]\nurl = "{url}"\ntoken_file = "{tmp_path}/none"\n')
    found = check(sources=missing)["source pacs"]
    assert (found.status, found.found) == ("fail", "a file cannot be read (No such file or directory)")
    assert check(sources=write(tmp_path, "[sources.PACS]\n"))["sources"].status == "fail"


def test_a_node_for_other_machines_needs_callers_and_should_have_tls(check: Callable[..., dict[str, Check]]) -> None:
    open_node = check(node_host="0.0.0.0")["DICOM node"]  # noqa: S104
    assert (open_node.status, "COUNTERPART_NODE_PEERS" in open_node.fix) == ("fail", True)
    found = check(node_host="10.0.0.5", node_peers="PACS,CT@10.0.0.7")
    assert found["DICOM node"] == Check("DICOM node", "ok", "COUNTERPART at 10.0.0.5:11112, callers: 2")
    assert (found["node TLS"].status, "no TLS" in found["node TLS"].found) == ("warn", True)
    assert "node TLS" not in check(node_peers="PACS")
    assert check(node_model="tiny")["DICOM node"].status == "ok"
    unknown = check(node_model="tni")["DICOM node"]
    assert (unknown.status, "COUNTERPART_NODE_MODEL" in unknown.found) == ("fail", True)


def test_tls_files_of_the_node_must_be_readable_fit_and_not_end(
    check: Callable[..., dict[str, Check]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority.create(tmp_path / "ca")
    certificate, key = authority.issue("node")
    _, other_key = authority.issue("other")
    files = {"node_tls_certificate": certificate, "node_tls_key": key, "node_tls_ca": authority.path}
    found = check(**files)  # valid for one day
    assert found["DICOM node"].status == "ok"
    assert (found["node TLS"].status, "soon" in found["node TLS"].fix) == ("warn", True)
    for changes in ({"node_tls_key": other_key}, {"node_tls_ca": tmp_path / "none"}, {"node_tls_certificate": None}):
        assert check(**{**files, **changes})["DICOM node"].status == "fail"
    monkeypatch.setattr(connection_checks, "CERTIFICATE_DAYS", 0)
    assert check(**files)["node TLS"].status == "ok"


def test_the_file_of_tokens_is_read(check: Callable[..., dict[str, Check]], tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    assert check(tokens=path)["tokens"].status == "warn"
    tokens = TokenFile(path)
    for name in ("one", "two"):
        tokens.create(name, ["read"])
    tokens.revoke("one")
    assert check(tokens=path)["tokens"] == Check("tokens", "ok", "1 valid, 1 revoked")
    path.write_text("{")
    assert check(tokens=path)["tokens"].status == "fail"


def test_the_issuer_is_asked_for_its_keys(check: Callable[..., dict[str, Check]]) -> None:
    with run_issuer() as issuer:
        oidc = {"oidc_issuer": issuer.url, "oidc_audience": AUDIENCE}
        assert check(**oidc)["issuer"] == Check("issuer", "ok", "keys: 1")
        assert check(**oidc, oidc_client="dashboard")["issuer"].found == "the login has no public URL"
        assert "AUDIENCE" in check(oidc_issuer=issuer.url)["issuer"].found
        another = check(**{**oidc, "oidc_issuer": f"{issuer.url}/"})["issuer"]
        assert (another.status, "names another issuer" in another.found) == ("fail", True)
        assert check(**oidc, oidc_jwks=f"{issuer.url}/none")["issuer"].status == "fail"
        issuer.status = 503
        assert check(**oidc)["issuer"].status == "fail"
    assert check(**oidc)["issuer"].status == "fail"


def test_webhooks_need_a_secret_and_an_accepted_address(check: Callable[..., dict[str, Check]]) -> None:
    here = {"webhooks": "http://127.0.0.1:9/hook"}
    assert check(**here)["webhooks"].status == "fail"
    found = check(**here, webhook_secret=SECRET)
    assert found == {"webhook 127.0.0.1": Check("webhook 127.0.0.1", "ok", "its name has an accepted address")}
    private = {"webhooks": "https://10.0.0.9/hook", "webhook_secret": SECRET}
    assert check(**private)["webhook 10.0.0.9"].status == "warn"
    assert check(**private, webhook_private_hosts="10.0.0.9")["webhook 10.0.0.9"].status == "ok"
