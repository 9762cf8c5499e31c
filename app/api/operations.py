"""Identity, audit trail and webhooks of one process: their creation, start and stop."""

import threading

import structlog
from fastapi import FastAPI

from app.api.cookies import SECRET_NAME, SignedValues
from app.api.dependencies import Calls
from app.api.identity import AuditMiddleware, Identity, RequestAuditor
from app.errors import InvalidSettings, error_location
from app.jobs.audit import AuditTrail
from app.jobs.database import connect
from app.jobs.idempotency import KeyHasher
from app.jobs.metrics import Metrics
from app.jobs.webhook_sender import WebhookSender
from app.jobs.webhooks import Outbox
from app.settings import Settings, decode_webhook_secret

# Seconds between two deletions of old rows of the audit trail.
RETENTION_SECONDS = 6 * 3600.0

log = structlog.get_logger("counterpart.audit")


class Operations:
    """Parts for identity, audit trail and webhooks. They share one connection pool, apart from that of the queue.

    Parameters
    ----------
    settings : Settings
    calls : Calls
    metrics : Metrics
    api : bool
        Whether this process serves the whole API. Only such a process sends webhooks.

    Raises
    ------
    InvalidSettings
        The settings of the issuer or of the webhooks are incomplete.
    IdentityUnavailable
        The file of tokens is malformed.
    """

    def __init__(self, settings: Settings, calls: Calls, metrics: Metrics, *, api: bool) -> None:
        self._database = connect(settings.database_url)
        self._audit_days = settings.audit_days
        self._stopped = threading.Event()
        self.identity = Identity(settings, calls, SignedValues(KeyHasher(self._database, SECRET_NAME)))
        self.auditor = RequestAuditor(AuditTrail(self._database), metrics)
        self.outbox = Outbox(self._database)
        self._sender = create_webhook_sender(settings, self.outbox, metrics) if api else None

    def attach(self, app: FastAPI) -> None:
        """Give the parts to the routes, and audit each request."""
        app.state.identity = self.identity
        app.state.auditor = self.auditor
        app.state.outbox = self.outbox
        app.add_middleware(AuditMiddleware, auditor=self.auditor)

    def start(self) -> None:
        """Create the tables, and start the threads."""
        self.auditor.trail.create_tables()
        self.outbox.create_tables()
        threading.Thread(target=self._enforce_retention, name="audit-retention", daemon=True).start()
        if self._sender:
            self._sender.start()

    def stop(self) -> None:
        """Stop the threads, and close the connections."""
        self._stopped.set()
        if self._sender:
            self._sender.stop()
        self._database.dispose()

    def _enforce_retention(self) -> None:
        while True:
            try:
                self.auditor.trail.delete_expired(self._audit_days)
            except Exception as error:  # noqa: BLE001  # the database may answer at the next time
                log.warning("old audit rows not deleted", **error_location(error))
            if self._stopped.wait(RETENTION_SECONDS):
                return


def create_webhook_sender(settings: Settings, outbox: Outbox, metrics: Metrics) -> WebhookSender | None:
    """Create the sender of webhooks, None if the settings name no target.

    Raises
    ------
    InvalidSettings
        There are targets, and no secret.
    """
    if not settings.webhook_targets:
        return None
    if settings.webhook_secret is None:
        raise InvalidSettings(
            "COUNTERPART_WEBHOOKS is set, and COUNTERPART_WEBHOOK_SECRET is not.",
            expected="a secret. Without it, a receiver cannot check the sender of a webhook.",
            advice='Set it to "whsec_$(openssl rand -base64 32)", here and at the receivers.',
        )
    secret = decode_webhook_secret(settings.webhook_secret.get_secret_value())
    private_hosts = frozenset(host.strip() for host in settings.webhook_private_hosts.split(","))
    return WebhookSender(outbox, settings.webhook_targets, secret, private_hosts, metrics)
