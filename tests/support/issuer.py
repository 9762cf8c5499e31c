"""A small OpenID Connect issuer on loopback for the quick tests, whose keys and faults a test controls."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa

AUDIENCE = "counterpart"
CLIENT = "dashboard"
PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


class TestIssuer:
    """State of the issuer.

    Attributes
    ----------
    url : str
    keys : dict of str to private key
        The keys of the JWKS by id.
    requests : list of str
        Paths of all requests.
    status : int
        Status of every answer; 200 is a working issuer.
    delay : float
        Seconds before each answer.
    tokens : dict
        Answer of the token endpoint.
    forms : list of dict
        Forms that the token endpoint received.
    """

    __test__ = False

    def __init__(self) -> None:
        self.url = ""
        self.keys: dict[str, PrivateKey] = {"first": rsa.generate_private_key(65537, 2048)}
        self.requests: list[str] = []
        self.status = 200
        self.delay = 0.0
        self.tokens: dict[str, Any] = {}
        self.forms: list[dict[str, str]] = []

    def claims(self, **changes: object) -> dict[str, Any]:
        """Return valid claims with changes. A claim of None is left out."""
        now = int(time.time())
        claims = {"iss": self.url, "aud": AUDIENCE, "sub": "reader-1", "iat": now, "exp": now + 300, "scope": "read"}
        return {name: value for name, value in {**claims, **changes}.items() if value is not None}

    def sign(self, key: str = "first", algorithm: str = "RS256", **changes: object) -> str:
        """Return a token that a key of the issuer has signed."""
        return jwt.encode(self.claims(**changes), self.keys[key], algorithm, {"kid": key})

    def jwks(self) -> dict[str, Any]:
        """Return the public keys."""
        return {"keys": [_to_jwk(name, key) for name, key in self.keys.items()]}

    def answer(self, path: str, body: str) -> dict[str, Any] | None:
        """Return the answer to a request, None if the path does not exist."""
        self.requests.append(path)
        if path == "/token":
            self.forms.append({name: values[0] for name, values in parse_qs(body).items()})
            return self.tokens
        if path == "/.well-known/openid-configuration":
            endpoints = {"jwks_uri": "jwks", "authorization_endpoint": "authorize", "token_endpoint": "token"}
            return {"issuer": self.url} | {name: f"{self.url}/{end}" for name, end in endpoints.items()}
        return self.jwks() if path == "/jwks" else None


def _to_jwk(name: str, key: PrivateKey) -> dict[str, Any]:
    algorithm: Any = jwt.algorithms.RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else jwt.algorithms.ECAlgorithm
    return {**algorithm.to_jwk(key.public_key(), as_dict=True), "kid": name, "use": "sig"}


@contextmanager
def run_issuer() -> Iterator[TestIssuer]:
    """Run the issuer on a free port of loopback."""
    issuer = TestIssuer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer("")

        def do_POST(self) -> None:
            self._answer(self.rfile.read(int(self.headers["Content-Length"])).decode())

        def _answer(self, body: str) -> None:
            time.sleep(issuer.delay)
            answer = issuer.answer(self.path, body)
            content = json.dumps(answer or {}).encode()
            self.send_response(404 if answer is None else issuer.status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Write nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    issuer.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield issuer
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
