"""Tokens of an OpenID Connect issuer: which are accepted, and what happens while the issuer changes or fails."""

import asyncio
import base64
import json
import time
from collections.abc import Iterator
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from app.api import oidc
from app.api.oidc import Issuer, OidcSettings, parse_mapping, read_oidc_settings
from app.errors import IdentityUnavailable, InvalidSettings, Unauthorised
from app.settings import Settings
from tests.support.issuer import AUDIENCE, TestIssuer, run_issuer


@pytest.fixture(scope="module")
def server() -> Iterator[TestIssuer]:
    with run_issuer() as server:
        yield server


@pytest.fixture
def issuer(server: TestIssuer) -> Iterator[Issuer]:
    settings = Settings(oidc_issuer=server.url, oidc_audience=AUDIENCE)
    found = read_oidc_settings(settings)
    assert found is not None
    server.requests.clear()
    keys = dict(server.keys)
    yield Issuer(found)
    server.keys, server.status, server.delay = keys, 200, 0.0


def verify(issuer: Issuer, *tokens: str) -> list[dict[str, Any]]:
    async def run() -> list[dict[str, Any]]:
        claims = [await issuer.verify(token) for token in tokens]
        if issuer._task:
            await issuer._task
        return claims

    return asyncio.run(run())


def test_valid_tokens_are_accepted_with_one_request_for_the_keys(issuer: Issuer, server: TestIssuer) -> None:
    server.keys["curve"] = ec.generate_private_key(ec.SECP256R1())
    tokens = [server.sign(), server.sign(aud=["other", AUDIENCE]), server.sign("curve", "ES256", iat=None)]
    assert [claims["sub"] for claims in verify(issuer, *tokens)] == ["reader-1"] * 3
    assert server.requests == ["/.well-known/openid-configuration", "/jwks"]


def test_clocks_may_differ_by_a_minute(issuer: Issuer, server: TestIssuer) -> None:
    now = int(time.time())
    verify(issuer, server.sign(exp=now - 30), server.sign(nbf=now + 30), server.sign(iat=now + 30))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"exp": int(time.time()) - 120}, "expired"),
        ({"nbf": int(time.time()) + 600}, "not valid yet"),
        ({"iat": int(time.time()) + 600}, "not valid yet"),
        ({"aud": "another-service"}, "another service"),
        ({"aud": None}, "lacks a claim"),
        ({"iss": "https://issuer.example"}, "another issuer"),
        ({"iss": None}, "lacks a claim"),
        ({"exp": None}, "lacks a claim"),
        ({"sub": None}, "lacks a claim"),
        ({"sub": ""}, "malformed"),
        ({"sub": "a\nb"}, "malformed"),
        ({"sub": "x" * 256}, "malformed"),
    ],
)
def test_invalid_claims_are_refused(issuer: Issuer, server: TestIssuer, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unauthorised, match=reason):
        verify(issuer, server.sign(**changes))


def encode(part: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=")


def hmac_token(server: TestIssuer, secret: bytes) -> str:
    import hashlib
    import hmac

    content = f"{encode({'alg': 'HS256', 'kid': 'first'})}.{encode(server.claims())}"
    signature = hmac.new(secret, content.encode(), hashlib.sha256).digest()
    return f"{content}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"


def test_forged_signatures_are_refused(issuer: Issuer, server: TestIssuer) -> None:
    other = rsa.generate_private_key(65537, 2048)
    public = server.keys["first"].public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    head, claims, signature = server.sign().split(".")
    forged = {
        "another key": jwt.encode(server.claims(), other, "RS256", {"kid": "first"}),
        "alg none": f"{encode({'alg': 'none', 'kid': 'first'})}.{claims}.",
        "alg none in capitals": f"{encode({'alg': 'nOnE', 'kid': 'first'})}.{claims}.",
        "no alg": f"{encode({'kid': 'first'})}.{claims}.{signature}",
        "HS256 with the public key": hmac_token(server, pem),
        "HS256 with the JWKS": hmac_token(server, json.dumps(server.jwks()["keys"][0]).encode()),
        "changed claims": f"{head}.{encode(server.claims(scope='admin'))}.{signature}",
        "no signature": f"{head}.{claims}.",
        "key in the header": jwt.encode(
            server.claims(), other, "RS256", {"kid": "first", "jwk": oidc_jwk(other), "jku": "http://127.0.0.1:9/"}
        ),
        "no key id": jwt.encode(server.claims(), server.keys["first"], "RS256"),
        "no JWT": "a.b.c",
        "empty": "",
    }
    verify(issuer, server.sign())
    for name, token in forged.items():
        with pytest.raises(Unauthorised):
            pytest.fail(f"{name} was accepted: {verify(issuer, token)}")


def oidc_jwk(key: rsa.RSAPrivateKey) -> dict[str, Any]:
    found: dict[str, Any] = jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
    return found


def test_secret_key_in_the_jwks_is_never_used(
    issuer: Issuer, server: TestIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = b"a-secret-of-thirty-two-bytes----"
    keys = {"keys": [{"kty": "oct", "kid": "first", "k": base64.urlsafe_b64encode(secret).decode().rstrip("=")}]}
    monkeypatch.setattr(server, "jwks", lambda: keys)
    with pytest.raises(Unauthorised):
        verify(issuer, hmac_token(server, secret))


def test_flood_of_unknown_keys_leads_to_one_request(issuer: Issuer, server: TestIssuer) -> None:
    verify(issuer, server.sign())
    server.requests.clear()
    issuer._tried -= oidc.REFRESH_PAUSE_SECONDS
    stranger = rsa.generate_private_key(65537, 2048)

    async def flood() -> list[BaseException | dict[str, Any]]:
        tokens = [jwt.encode(server.claims(), stranger, "RS256", {"kid": f"unknown-{n}"}) for n in range(50)]
        return await asyncio.gather(*(issuer.verify(token) for token in tokens), return_exceptions=True)

    assert all(isinstance(answer, Unauthorised) for answer in asyncio.run(flood()))
    assert server.requests == ["/jwks"]


def test_new_key_is_accepted_and_the_removed_one_refused(issuer: Issuer, server: TestIssuer) -> None:
    old = server.sign()
    verify(issuer, old)
    server.keys = {"second": rsa.generate_private_key(65537, 2048)}
    issuer._tried -= oidc.REFRESH_PAUSE_SECONDS
    verify(issuer, server.sign("second"))
    with pytest.raises(Unauthorised, match="unknown key"):
        verify(issuer, old)


def test_without_an_answer_of_the_issuer_known_keys_work_and_others_get_503(issuer: Issuer, server: TestIssuer) -> None:
    server.status = 500
    with pytest.raises(IdentityUnavailable):
        verify(issuer, server.sign())
    server.status = 200
    issuer._tried -= oidc.REFRESH_PAUSE_SECONDS
    verify(issuer, server.sign())
    server.status = 500
    # The keys are old enough to be fetched again, which fails.
    issuer._fetched -= oidc.FRESH_SECONDS + 1
    issuer._tried -= oidc.REFRESH_PAUSE_SECONDS
    verify(issuer, server.sign())
    assert issuer._failed
    verify(issuer, server.sign())
    server.keys["second"] = rsa.generate_private_key(65537, 2048)
    with pytest.raises(IdentityUnavailable):
        verify(issuer, server.sign("second"))
    # After a day, a key that the issuer may have withdrawn is no longer used.
    issuer._fetched -= oidc.KEEP_SECONDS
    with pytest.raises(IdentityUnavailable):
        verify(issuer, server.sign())


def test_hanging_issuer_delays_no_known_key(
    issuer: Issuer, server: TestIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify(issuer, server.sign())
    monkeypatch.setattr(oidc, "ISSUER_SECONDS", 1.0)
    server.delay = 5.0
    issuer._tried -= oidc.REFRESH_PAUSE_SECONDS
    server.keys["second"] = rsa.generate_private_key(65537, 2048)

    async def run() -> float:
        unknown = asyncio.create_task(issuer.verify(server.sign("second")))
        await asyncio.sleep(0.2)
        start = time.monotonic()
        await issuer.verify(server.sign())
        seconds = time.monotonic() - start
        with pytest.raises(IdentityUnavailable):
            await unknown
        return seconds

    assert asyncio.run(run()) < 0.5


def test_redirected_keys_and_a_foreign_discovery_document_are_refused(issuer: Issuer, server: TestIssuer) -> None:
    other = Issuer(OidcSettings(f"{server.url}/", AUDIENCE, None, "scope", {}))
    with pytest.raises(IdentityUnavailable):
        verify(other, server.sign(iss=f"{server.url}/"))
    server.status = 302
    with pytest.raises(IdentityUnavailable):
        verify(issuer, server.sign())


@pytest.mark.parametrize(
    ("claim", "mapping", "claims", "scopes"),
    [
        ("scope", "", {"scope": "openid read send other"}, {"read", "send"}),
        ("scope", "", {"scope": ["read"]}, {"read"}),
        ("scope", "", {"scope": 5}, set()),
        ("scope", "", {}, set()),
        ("realm_access.roles", "mtra=send,head=admin+read", {"realm_access": {"roles": ["mtra", "read"]}}, {"send"}),
        ("https://x.example/roles", "head=admin+read", {"https://x.example/roles": ["head"]}, {"admin", "read"}),
        ("groups.x", "", {"groups": ["read"]}, set()),
    ],
)
def test_scopes_come_from_the_configured_claim(
    claim: str, mapping: str, claims: dict[str, Any], scopes: set[str]
) -> None:
    settings = OidcSettings("https://i.example", AUDIENCE, None, claim, parse_mapping(mapping))
    assert Issuer(settings).find_scopes(claims) == scopes


@pytest.mark.parametrize("mapping", ["reader", "=read", "reader=all", "reader=read,,"])
def test_malformed_mapping_is_refused(mapping: str) -> None:
    with pytest.raises(InvalidSettings, match="OIDC_SCOPES"):
        parse_mapping(mapping)


def test_issuer_without_an_audience_is_refused() -> None:
    with pytest.raises(InvalidSettings, match="OIDC_AUDIENCE"):
        read_oidc_settings(Settings(oidc_issuer="https://issuer.example"))
