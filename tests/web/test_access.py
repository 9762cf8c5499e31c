"""A service with a token and one listed origin: login, and calls of pages from two other origins."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from app.api.tokens import TokenFile
from tests.api.service_process import RunningService, run_service
from tests.web.browser import TIMEOUT, Recorder
from tests.web.conftest import COMMAND, run_scan

# The login of browsers. Without this module, a service with a token has no page to log in.
pytest.importorskip("app.api.identity")

TOKEN = "a-token-of-32-characters-for-test"  # noqa: S105 - of the test
OTHER_VIEWERS = Path(__file__).resolve().parents[2] / "docs" / "other-viewers.md"
CALL = """async ([url, token]) => {
  try {
    return (await fetch(`${url}/v1/models`, { headers: { Authorization: `Bearer ${token}` } })).status;
  } catch (error) {
    return "blocked";
  }
}"""


class OtherSite(BaseHTTPRequestHandler):
    """A page of another origin. Its query is the address of a frame."""

    def do_GET(self) -> None:
        frame = f'<iframe src="{self.path.partition("?")[2]}" title="viewer" width="900" height="600"></iframe>'
        content = f"<!doctype html><title>Other site</title>{frame}".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - name of the base class
        """Write nothing."""


@pytest.fixture(scope="module")
def sites() -> Iterator[tuple[str, str]]:
    """Return two origins on loopback: the first one is listed."""
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), OtherSite) for _ in range(2)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    listed, foreign = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    yield listed, foreign
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def named_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("web-tokens") / "tokens"


@pytest.fixture(scope="module")
def second_token(named_tokens: Path) -> str:
    """Return the token of a second reader."""
    return TokenFile(named_tokens).create("second", ["read"])


@pytest.fixture(scope="module")
def protected(
    browser: Browser,
    sites: tuple[str, str],
    tiny_models: Path,
    named_tokens: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RunningService]:
    assert browser.is_connected()
    folder = tmp_path_factory.mktemp("web-protected")
    store, log = folder / "store", folder / "log"
    models, tokens, (listed, _) = str(tiny_models), str(named_tokens), sites
    with run_service(store, log, COMMAND, models=models, token=TOKEN, tokens=tokens, cors_origins=listed) as running:
        running.http.headers["Authorization"] = f"Bearer {TOKEN}"
        yield running


@pytest.fixture(scope="module")
def job(protected: RunningService, phantom: Path) -> str:
    return run_scan(protected.http, phantom)


@pytest.fixture
def stranger(browser: Browser, protected: RunningService) -> Iterator[Page]:
    """Return a page of the protected service without a session."""
    recorder = Recorder()
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(TIMEOUT)
    recorder.watch(context)
    yield context.new_page()
    assert recorder.foreign(f"http://127.0.0.1:{protected.port}") == []
    assert recorder.faults == []
    context.close()


def test_login_with_a_token_opens_all_pages_and_logout_closes_them(
    stranger: Page, protected: RunningService, job: str
) -> None:
    url = f"http://127.0.0.1:{protected.port}"
    stranger.goto(url)
    expect(stranger.get_by_role("dialog")).to_be_visible()
    assert stranger.locator("#scans tr").count() == 0
    stranger.get_by_label("Access token").fill("wrong")
    stranger.get_by_role("button", name="Log in").click()
    expect(stranger.locator("#login .fault")).not_to_be_empty()
    stranger.get_by_label("Access token").fill(TOKEN)
    stranger.get_by_role("button", name="Log in").click()
    row = stranger.locator(f'tr[data-id="{job}"]')
    expect(row.locator("img")).to_have_js_property("complete", value=True)
    assert row.locator("img").evaluate("image => image.naturalWidth") > 0
    assert TOKEN not in stranger.evaluate("document.cookie + JSON.stringify({...localStorage, ...sessionStorage})")

    stranger.goto(f"{url}/scans/{job}")
    stranger.wait_for_selector("body[data-ready]")
    stranger.get_by_role("button", name="unsure").click()
    expect(stranger.locator("#findings tr").first).to_contain_text("? unsure")

    stranger.goto(url)
    stranger.get_by_role("button", name="Log out").click()
    expect(stranger.get_by_role("dialog")).to_be_visible()
    assert stranger.locator("#scans tr").count() == 0


def test_a_logged_in_reader_withdraws_only_the_own_verdict(
    stranger: Page, protected: RunningService, job: str, second_token: str
) -> None:
    path = f"/v1/scans/{job}/reviews"
    review = {"verdict": "right", "note": "A note of another reader."}
    protected.http.put(f"{path}/1", json=review)
    stranger.goto(f"http://127.0.0.1:{protected.port}/scans/{job}")
    stranger.get_by_label("Access token").fill(second_token)
    stranger.get_by_role("button", name="Log in").click()
    stranger.wait_for_selector("body[data-ready]")
    withdraw, others = stranger.get_by_role("button", name="Withdraw"), stranger.locator("#other-reviews li")
    expect(others).to_have_text(["right by token: A note of another reader."])
    expect(withdraw).to_have_count(0)
    expect(stranger.locator("#review-note")).to_have_value("")

    stranger.get_by_role("button", name="wrong").click()
    withdraw.wait_for()
    answer = protected.http.get(path).json()["reviews"]
    assert [(r["reader"], r["verdict"], r["note"]) for r in answer] == [
        ("token", "right", "A note of another reader."),
        ("token:second", "wrong", ""),
    ]
    withdraw.click()
    expect(withdraw).to_have_count(0)
    assert [r["reader"] for r in protected.http.get(path).json()["history"]][-1] == "token"
    expect(others).to_have_count(1)


def test_a_login_in_the_frame_names_the_reader(
    browser: Browser, protected: RunningService, job: str, sites: tuple[str, str], second_token: str
) -> None:
    page = browser.new_page()
    page.set_default_timeout(TIMEOUT)
    page.goto(f"{sites[0]}/?http://127.0.0.1:{protected.port}/embed/{job}")
    viewer = page.frame_locator("iframe")
    viewer.locator("#login-token").fill(second_token)
    viewer.get_by_role("button", name="Log in").click()
    viewer.locator("body[data-ready]").wait_for()
    viewer.get_by_role("button", name="unsure").click()
    expect(viewer.locator("#finding-detail")).to_contain_text("Marked as unsure by token:second.")
    viewer.get_by_role("button", name="Withdraw").click()
    expect(viewer.get_by_role("button", name="Withdraw")).to_have_count(0)
    page.close()


def test_only_pages_of_listed_origins_may_call_and_embed(
    browser: Browser, protected: RunningService, job: str, sites: tuple[str, str]
) -> None:
    url = f"http://127.0.0.1:{protected.port}"
    page = browser.new_page()
    page.set_default_timeout(TIMEOUT)
    listed, foreign = sites
    page.goto(f"{listed}/?{url}/embed/{job}")
    assert page.evaluate(CALL, [url, TOKEN]) == 200
    # The parent sends the token into the frame, whose browser sends it no cookie.
    page.evaluate("([token, url]) => frames[0].postMessage({ counterpartToken: token }, url)", [TOKEN, url])
    viewer = page.frame_locator("iframe")
    viewer.locator("#login-token").or_(viewer.locator("#findings tr")).first.wait_for()
    if viewer.locator("#login-token").count():  # the frame did not wait for its parent
        viewer.locator("#login-token").fill(TOKEN)
        viewer.get_by_role("button", name="Log in").click()
    expect(viewer.locator("#findings tr")).to_have_count(1)

    page.goto(f"{foreign}/?{url}/embed/{job}")
    assert page.evaluate(CALL, [url, TOKEN]) == "blocked"
    expect(page.frame_locator("iframe").locator("#findings-title")).to_have_count(0)
    page.close()


def test_documented_script_gives_the_frame_a_token(
    browser: Browser, protected: RunningService, job: str, sites: tuple[str, str]
) -> None:
    url = f"http://127.0.0.1:{protected.port}"
    script = OTHER_VIEWERS.read_text().partition("<script>")[2].partition("</script>")[0]
    assert "https://counterpart.example" in script
    page = browser.new_page()
    page.set_default_timeout(TIMEOUT)
    page.add_init_script(f'const token = "{TOKEN}"; {script.replace("https://counterpart.example", url)}')
    page.goto(f"{sites[0]}/?{url}/embed/{job}")
    viewer = page.frame_locator("iframe")
    expect(viewer.locator("#findings tr")).to_have_count(1)
    assert viewer.locator("#login-token").count() == 0
    page.close()
