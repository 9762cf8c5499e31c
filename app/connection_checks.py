"""Checks of `counterpart doctor` on other systems: PACS, sources, callers, issuer and webhooks.

Nothing is sent but a C-ECHO, a search for one study whose answer is not read, and requests for the keys of the issuer.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import requests
from cryptography import x509

from app.api.oidc import KEY_ERRORS, Issuer, read_oidc_settings
from app.api.tokens import TokenFile
from app.check_output import Check
from app.errors import CounterpartError, InvalidSettings
from app.ingest.dicomweb_source import read_sources
from app.jobs.webhook_sender import DeliveryFault, find_addresses
from app.pacs.node import check_exposure, create_request
from app.pacs.routes import DimseTarget, Routes, Target, read_routes
from app.pacs.senders import NotSent, echo
from app.pacs.tls import server_context
from app.runtime.bundle import find_bundles, read_manifest, shipped_models
from app.settings import PREFIX, Settings, is_loopback

# Seconds for each connection and for each answer.
CONNECT_SECONDS = 5.0
PARALLEL = 8
# Days before the end of a certificate at which a warning begins.
CERTIFICATE_DAYS = 30

# Advice for codes of `app.pacs.senders.NotSent`.
ECHO_FIXES = {
    "unreachable": "Check its host, its port and TLS, the network, and that the PACS runs.",
    "rejected": "Make the AE titles in the file of routes equal to those that the PACS is configured with.",
}
OTHER_FIX = "Look at the log of the PACS."


@dataclass(frozen=True)
class WebService:
    """A DICOMweb service of the routes or of the sources."""

    url: str
    token_file: Path | None
    ca: Path | None
    certificate: Path | None = None
    key: Path | None = None


def check_connections(settings: Settings) -> Iterator[Check]:
    """Check each connection that the settings name."""
    yield from check_routes(settings)
    yield from check_sources(settings)
    yield from check_node(settings)
    yield from check_tokens(settings)
    yield from check_issuer(settings)
    yield from check_webhooks(settings)


# ---- targets and sources ----


def check_routes(settings: Settings) -> Iterator[Check]:
    """Check the file of routes, its models, and each of its targets."""
    if settings.routes is None:
        return
    try:
        routes = read_routes(settings.routes)
    except CounterpartError as error:
        yield Check("routes", "fail", error.found, error.advice)
        return
    yield _check_models(routes, settings.models or shipped_models())
    with ThreadPoolExecutor(PARALLEL) as pool:
        yield from pool.map(_check_target, routes.targets, routes.targets.values())


def _check_models(routes: Routes, models: Path) -> Check:
    ids = [path.name for path in find_bundles(models)]
    unknown = sorted({name for route in routes.routes for name in route.models if not _is_installed(name, ids)})
    targets = ", ".join(routes.targets) or "none"
    if unknown:
        fix = f"Correct `models` in the file of routes. Installed are: {', '.join(ids)}."
        return Check("routes", "warn", f"models that are not installed: {', '.join(unknown)}", fix)
    if not routes.routes:
        return Check("routes", "warn", f"targets: {targets}; no rule", "Add a table [[routes]], or nothing is sent.")
    return Check("routes", "ok", f"targets: {targets}; rules: {len(routes.routes)}")


def _is_installed(name: str, ids: list[str]) -> bool:
    return any(name in {model, model.rpartition("-")[0]} for model in ids)


def _check_target(name: str, target: Target) -> Check:
    check = f"target {name}"
    if isinstance(target, DimseTarget):
        return _check_dimse(check, target)
    service = WebService(str(target.url), target.token_file, target.ca, target.certificate, target.key)
    return _check_web(check, service)


def _check_dimse(check: str, target: DimseTarget) -> Check:
    found = f"{target.ae_title} at {target.address}"
    try:
        echo(target, CONNECT_SECONDS)
    except NotSent as failure:
        if failure.code == "unsupported":
            return Check(check, "ok", f"{found} accepts associations, but no C-ECHO")
        return Check(check, "warn", f"{found}: {failure.code}", ECHO_FIXES.get(failure.code, OTHER_FIX))
    except CounterpartError as error:
        return Check(check, "fail", error.found, error.advice)
    return Check(check, "ok", f"{found} answers C-ECHO")


def check_sources(settings: Settings) -> Iterator[Check]:
    """Check the file of sources, and each source."""
    try:
        sources = read_sources(settings.sources)
    except CounterpartError as error:
        yield Check("sources", "fail", error.found, error.advice)
        return
    services = [WebService(str(source.url), source.token_file, source.ca) for source in sources.values()]
    with ThreadPoolExecutor(PARALLEL) as pool:
        yield from pool.map(_check_web, [f"source {name}" for name in sources], services)


def _check_web(check: str, service: WebService) -> Check:
    """Search for one study. The answer may contain patient data, and is not read."""
    headers = {"Accept": "application/dicom+json"}
    try:
        if service.token_file:
            headers["Authorization"] = f"Bearer {service.token_file.read_text().strip()}"
        for path in filter(None, (service.ca, service.certificate, service.key)):
            path.read_bytes()
    except OSError as error:
        fix = "Correct the path in the file, or the rights of the token and of the PEM files."
        return Check(check, "fail", f"a file cannot be read ({error.strerror})", fix)
    with requests.Session() as session:
        session.trust_env = False
        session.verify = str(service.ca) if service.ca else True
        if service.certificate:
            key = service.key or service.certificate
            session.cert = (str(service.certificate), str(key))
        try:
            url = f"{service.url.rstrip('/')}/studies?limit=1"
            with session.get(
                url, headers=headers, timeout=CONNECT_SECONDS, allow_redirects=False, stream=True
            ) as answer:
                return _rate_status(check, urlsplit(url).netloc, answer.status_code)
        except requests.exceptions.SSLError:
            fix = "Set `ca` to the CA of the service (PEM). The host name of the URL must be in its certificate."
            return Check(check, "warn", f"{urlsplit(service.url).netloc}: no TLS connection", fix)
        except (requests.RequestException, OSError) as error:
            found = f"{urlsplit(service.url).netloc}: no answer ({type(error).__name__})"
            return Check(check, "warn", found, "Check its URL, the network, and that the service runs.")


def _rate_status(check: str, host: str, status: int) -> Check:
    found = f"{host} answers with status {status}"
    if status in {401, 403}:
        return Check(check, "warn", found, "Check `token_file`, `certificate`, and the rights of this account there.")
    if status >= 500 or 300 <= status < 400 or status == 404:
        return Check(check, "warn", found, "Check the URL: the base of the DICOMweb service, before /studies.")
    return Check(check, "ok", found)


# ---- the DICOM node ----


def check_node(settings: Settings) -> Iterator[Check]:
    """Check the callers, the model and the TLS files of the DICOM node, if one of its settings was changed."""
    if all(settings.origin(name) == "default" for name in type(settings).model_fields if name.startswith("node_")):
        return
    certificate = settings.node_tls_certificate
    try:
        check_exposure(settings)
        create_request(settings, [read_manifest(path) for path in find_bundles(settings.models or shipped_models())])
        if certificate is not None:
            server_context(certificate, settings.node_tls_key, settings.node_tls_ca)
    except CounterpartError as error:
        yield Check("DICOM node", "fail", error.found, error.advice)
        return
    callers = len(settings.accepted_peers)
    found = f"{settings.node_ae_title} at {settings.node_host}:{settings.node_port}, callers: {callers or 'all'}"
    yield Check("DICOM node", "ok", found)
    if certificate is not None:
        yield _check_certificate(certificate)
    elif not is_loopback(settings.node_host):
        fix = f"Set {PREFIX}NODE_TLS_CERTIFICATE and {PREFIX}NODE_TLS_CA, or use a network of its own."
        yield Check("node TLS", "warn", "no TLS: AE titles are no passwords, and images are not encrypted", fix)


def _check_certificate(path: Path) -> Check:
    """Check the period of a certificate, whose file was read before."""
    ends = x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
    found = f"the certificate ends on {ends:%Y-%m-%d}"
    if ends < datetime.now(UTC):
        return Check("node TLS", "fail", found, "Replace the certificate, and restart the node.")
    if ends < datetime.now(UTC) + timedelta(days=CERTIFICATE_DAYS):
        return Check("node TLS", "warn", found, "Replace the certificate soon, and restart the node.")
    return Check("node TLS", "ok", found)


# ---- callers, issuer, webhooks ----


def check_tokens(settings: Settings) -> Iterator[Check]:
    """Check the file of named tokens."""
    if settings.tokens is None:
        return
    try:
        tokens = TokenFile(settings.tokens).read()
    except CounterpartError as error:
        yield Check("tokens", "fail", error.found, error.advice)
        return
    valid = sum(token.revoked is None for token in tokens)
    found = f"{valid} valid, {len(tokens) - valid} revoked"
    if valid:
        yield Check("tokens", "ok", found)
    else:
        yield Check("tokens", "warn", found, "counterpart token create NAME --scope SCOPE, or correct the path.")


def check_issuer(settings: Settings) -> Iterator[Check]:
    """Check the settings of the issuer, its keys, and the end points of its login."""
    try:
        oidc = read_oidc_settings(settings)
        if oidc is None:
            return
        keys = Issuer(oidc).fetch_keys()
    except InvalidSettings as error:
        yield Check("issuer", "fail", error.found, error.advice)
        return
    except KEY_ERRORS as error:
        found = error.found if isinstance(error, CounterpartError) else f"no keys ({type(error).__name__})"
        fix = f"Check {PREFIX}OIDC_ISSUER, {PREFIX}OIDC_JWKS, the network, and SSL_CERT_FILE for a private CA."
        yield Check("issuer", "fail", found, fix)
        return
    if not keys:
        yield Check("issuer", "fail", "no key has an id", "Set a `kid` for each key of the issuer.")
    elif settings.oidc_client and not settings.public_url:
        fix = f"Set {PREFIX}PUBLIC_URL to the address of the service in the browser."
        yield Check("issuer", "fail", "the login has no public URL", fix)
    else:
        yield Check(
            "issuer", "ok" if keys else "fail", f"keys: {len(keys)}", "" if keys else "Check the issuer's keys."
        )


def check_webhooks(settings: Settings) -> Iterator[Check]:
    """Check the secret and the addresses of the webhooks. Nothing is sent."""
    if not settings.webhook_targets:
        return
    if settings.webhook_secret is None:
        fix = f'Set {PREFIX}WEBHOOK_SECRET to "whsec_$(openssl rand -base64 32)".'
        yield Check("webhooks", "fail", "there is no secret for their signatures", fix)
    private = [host.strip() for host in settings.webhook_private_hosts.split(",")]
    for url in settings.webhook_targets:
        parts = urlsplit(url)
        host = parts.hostname or ""
        try:
            find_addresses(host, parts.port or 443, private)
        except DeliveryFault as fault:
            fix = f"Correct {PREFIX}WEBHOOKS, or add the host to {PREFIX}WEBHOOK_PRIVATE_HOSTS."
            yield Check(f"webhook {host}", "warn", str(fault), fix)
        else:
            yield Check(f"webhook {host}", "ok", "its name has an accepted address")
