"""Identity against real peers: an OIDC provider from npm with a real browser, and mutual TLS behind nginx.

    python -m tests.proofs.identity

It needs node, npm (which fetches `oidc-provider` once), Chromium, nginx and openssl.
"""

import base64
import json
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from playwright.sync_api import sync_playwright

from app.api.tokens import TokenFile
from tests.api.service_process import API_ONLY, run_service
from tests.api.support import URL, fake_scan
from tests.support.servers import free_port

PROVIDER = "oidc-provider@8.8.1"
PROGRAMS = ("node", "npm", "chromium", "nginx", "openssl")
SCRIPT = Path(__file__).with_name("oidc_provider.mjs")
# More than the pause of the service between two requests for keys.
ROTATION_SECONDS = 45
START_SECONDS = 60


def missing_programs() -> list[str]:
    """Return the programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


def prove(folder: Path) -> bool:
    """Run both proofs. An `AssertionError` names the first failure."""
    prove_mutual_tls(folder / "tls")
    prove_oidc(folder / "oidc")
    return True


def check(name: str, found: object, expected: object) -> None:
    """Print a result, and fail if it is not the expected one."""
    print(f"{'ok  ' if found == expected else 'FAIL'} {name}: {found}", flush=True)
    assert found == expected, f"{name}: found {found}, expected {expected}"


def wait_for(port: int) -> None:
    """Wait until a process listens on a port of loopback."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            assert time.monotonic() < deadline, "the peer did not start"
            time.sleep(0.1)
        else:
            return


@contextmanager
def run_peer(command: list[str], folder: Path, port: int) -> Iterator[None]:
    """Run a program that listens on a port, with its output in a file."""
    with (folder / "peer.log").open("ab") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        wait_for(port)
        yield
    finally:
        process.terminate()
        process.wait(30)


# ---- OIDC ----


def prove_oidc(folder: Path) -> None:
    """Call with JWTs of the provider, log in with a browser, stop the provider, and rotate its keys."""
    node = folder / "node"
    node.mkdir(parents=True)
    install = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(node), PROVIDER]
    subprocess.run(install, check=True, stdout=subprocess.DEVNULL)
    shutil.copy(SCRIPT, node)
    port, service_port = free_port(), free_port()
    issuer, public_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{service_port}"
    provider = ["node", SCRIPT.name, str(port), f"{public_url}/login/callback"]
    settings = {
        "port": str(service_port),
        "public_url": public_url,
        "oidc_issuer": issuer,
        "oidc_audience": "counterpart",
        "oidc_client": "dashboard",
        "oidc_client_secret": "dashboard-secret",
        "oidc_login_scope": "openid roles",
        "oidc_scope_claim": "roles",
        "oidc_scopes": "radiologist=read,mtra=send+read",
    }
    with run_service(folder / "store", folder / "log", API_ONLY, None, **settings) as service:
        http = service.http
        with run_peer(provider, node, port):
            token = fetch_token(issuer, "urn:counterpart")
            check("JWT of the provider sends a scan", post(http, token), 202)
            check("actor", http.get("/session", headers=bearer(token)).json()["actor"], "oidc:gateway")
            check("without the scope erase", http.delete(f"{URL}/x", headers=bearer(token)).status_code, 403)
            for name, forged in forge(token).items():
                check(name, get(http, forged), 401)
            check("JWT for another service", get(http, fetch_token(issuer, "urn:another")), 401)
            log_in_with_browser(public_url)
        check("known key while the provider is down", get(http, token), 200)
        with run_peer(provider, node, port):
            new = fetch_token(issuer, "urn:counterpart")
            deadline = time.monotonic() + ROTATION_SECONDS
            while get(http, new) != 200 and time.monotonic() < deadline:
                time.sleep(1)
            check("JWT with the new key after a rotation", get(http, new), 200)
            check("JWT with the removed key", get(http, token), 401)
    assert "reader-7" not in (folder / "log").read_text()


def fetch_token(issuer: str, resource: str) -> str:
    """Return an access token for a program (client credentials)."""
    form = {"grant_type": "client_credentials", "resource": resource, "scope": "roles"}
    answer = httpx2.post(f"{issuer}/token", data=form, auth=("gateway", "gateway-secret"))
    token: str = answer.raise_for_status().json()["access_token"]
    return token


def bearer(token: str) -> dict[str, str]:
    """Return the header with a token."""
    return {"Authorization": f"Bearer {token}"}


def get(http: httpx2.Client, token: str) -> int:
    """Return the status of a list with a token."""
    return http.get(URL, headers=bearer(token)).status_code


def post(http: httpx2.Client, token: str) -> int:
    """Return the status of a scan that is sent with a token."""
    return http.post(URL, content=fake_scan(), headers=bearer(token)).status_code


def forge(token: str) -> dict[str, str]:
    """Return changed copies of a real token."""
    head, claims, signature = token.split(".")
    header, payload = decode(head), decode(claims)
    return {
        "alg none": f"{encode({**header, 'alg': 'none'})}.{claims}.",
        "no signature": f"{head}.{claims}.",
        "later end": f"{head}.{encode({**payload, 'exp': payload['exp'] + 3600})}.{signature}",
        "other roles": f"{head}.{encode({**payload, 'roles': ['admin']})}.{signature}",
        "HS256": f"{encode({**header, 'alg': 'HS256'})}.{claims}.{signature}",
    }


def decode(part: str) -> dict[str, Any]:
    """Return the JSON object of a part of a token."""
    found: dict[str, Any] = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return found


def encode(part: dict[str, Any]) -> str:
    """Return a part of a token."""
    return base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=")


def log_in_with_browser(public_url: str) -> None:
    """Log in as a radiologist and as a guest without a role, in Chromium."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, actor, scopes in (("reader-7", "oidc:reader-7", ["read"]), ("guest", None, [])):
            page = browser.new_context().new_page()
            page.goto(f"{public_url}/login")
            page.fill("input[name=login]", name)
            page.fill("input[name=password]", "any")
            page.click("button[type=submit]")
            page.wait_for_selector("text=Authorize")
            page.click("button[type=submit]")
            page.wait_for_url(f"{public_url}/" if actor else f"{public_url}/login/callback?*")
            script = "(path) => fetch(path).then(async r => [r.status, await r.json()])"
            state = page.evaluate(script, "/session")[1]
            check(f"session of {name} in the browser", (state["actor"], state["scopes"]), (actor, scopes))
            check(f"list of {name}", page.evaluate(script, URL)[0], 200 if actor else 401)
            sent = (
                "() => fetch('/session', {method: 'DELETE', headers: {'X-Counterpart-CSRF': '1'}}).then(r => r.status)"
            )
            check(f"logout of {name}", page.evaluate(sent), 204)
            check(f"list of {name} after it", page.evaluate(script, URL)[0], 401)
        browser.close()


# ---- mutual TLS ----

NGINX = """
daemon off; pid {folder}/pid; error_log stderr; worker_processes 1;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    # A certificate is a token: the subject selects it. Other certificates send their own token, or none.
    map $ssl_client_s_dn $authorization {{
        default $http_authorization;
        "CN=pacs-gateway" "Bearer {token}";
    }}
    server {{
        listen 127.0.0.1:{port} ssl;
        ssl_certificate {folder}/server.pem; ssl_certificate_key {folder}/server.key;
        ssl_client_certificate {folder}/ca.pem; ssl_verify_client on;
        client_max_body_size 2g;
        location / {{
            proxy_pass http://127.0.0.1:{service};
            proxy_http_version 1.1; proxy_request_buffering off; proxy_buffering off; proxy_read_timeout 360s;
            proxy_set_header Host $host;
            proxy_set_header Authorization $authorization;
            proxy_set_header X-Forwarded-For $remote_addr;
            proxy_set_header X-Forwarded-Proto https;
        }}
    }}
}}
"""


def prove_mutual_tls(folder: Path) -> None:
    """Call the service through nginx with a certificate, without one, and with one of another authority."""
    folder.mkdir(parents=True)
    make_certificates(folder)
    file = TokenFile(folder / "tokens")
    token, other = file.create("pacs-gateway", ["send", "read", "admin"]), file.create("reader", ["read"])
    port, service_port = free_port(), free_port()
    settings = {
        "port": str(service_port),
        "tokens": str(folder / "tokens"),
        "trusted_proxies": "127.0.0.1",
        "hosts": "localhost",
    }
    config = NGINX.format(folder=folder, token=token, port=port, service=service_port)
    (folder / "nginx.conf").write_text(config)
    (folder / "nginx.conf").chmod(0o600)
    command = ["nginx", "-c", str(folder / "nginx.conf"), "-p", str(folder)]
    with (
        run_service(folder / "store", folder / "log", API_ONLY, None, **settings) as service,
        run_peer(command, folder, port),
    ):
        url = f"https://127.0.0.1:{port}"
        with connect(folder, url, "gateway") as http:
            answer = http.post(URL, content=fake_scan())
            check("certificate alone sends a scan", answer.status_code, 202)
            check("actor of the certificate", http.get("/session").json()["actor"], "token:pacs-gateway")
            cookie = http.post("/session", json={"token": other}, headers={"X-Counterpart-CSRF": "1"})
            check("cookie behind TLS is Secure", "; Secure" in cookie.headers["set-cookie"], True)
            row = json.loads(http.get("/v1/audit").text.splitlines()[0])
            check(
                "audit row", (row["actor"], row["action"], row["address"]), ("token:pacs-gateway", "send", "127.0.0.1")
            )
            file.revoke("pacs-gateway")
            check("certificate with a revoked token", http.post(URL, content=fake_scan()).status_code, 401)
        with connect(folder, url, "reader") as http:
            check("certificate without a token", http.get(URL).status_code, 401)
            check("certificate with a token", http.get(URL, headers=bearer(other)).status_code, 200)
        with connect(folder, url, None) as http:
            check("no certificate", http.get("/livez").status_code, 400)
        with connect(folder, url, "stranger") as http:
            check("certificate of another authority", http.get("/livez").status_code, 400)
        check("past nginx, without a token", service.http.get(URL).status_code, 401)


def make_certificates(folder: Path) -> None:
    """Make an authority, certificates of it for the server and two clients, and a certificate of its own."""
    run_openssl(folder, "req", "-x509", *new_key("ca"), "-subj", "/CN=hospital", "-out", "ca.pem")
    run_openssl(folder, "req", "-x509", *new_key("stranger"), "-subj", "/CN=pacs-gateway", "-out", "stranger.pem")
    (folder / "extension").write_text("subjectAltName=IP:127.0.0.1\n")
    for name, subject in (("server", "127.0.0.1"), ("gateway", "pacs-gateway"), ("reader", "reader")):
        run_openssl(folder, "req", *new_key(name)[:-2], "-subj", f"/CN={subject}", "-out", f"{name}.csr")
        signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "extension"]
        run_openssl(folder, "x509", "-req", "-in", f"{name}.csr", *signed, "-out", f"{name}.pem")


def new_key(name: str) -> list[str]:
    """Return the options of openssl for a new key and two days of validity."""
    return ["-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key", "-days", "2"]


def run_openssl(folder: Path, *arguments: str) -> None:
    """Run openssl in a folder."""
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


def connect(folder: Path, url: str, name: str | None) -> httpx2.Client:
    """Return a client that trusts the authority, with the certificate of a name."""
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    if name:
        context.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
    return httpx2.Client(base_url=url, verify=context, timeout=60)


if __name__ == "__main__":
    if missing_programs():
        sys.exit(f"not installed: {', '.join(missing_programs())}")
    with tempfile.TemporaryDirectory(prefix="counterpart-identity-") as scratch:
        prove(Path(scratch))
