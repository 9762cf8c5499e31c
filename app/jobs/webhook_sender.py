"""Delivery of webhooks: the signature of Standard Webhooks, the checked address, and the thread that sends."""

import base64
import hashlib
import hmac
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import structlog

from app.errors import error_location
from app.jobs.metrics import Metrics
from app.jobs.webhooks import Message, Outbox
from app.settings import is_loopback

# Seconds for each step of a request: the connection, the answer.
REQUEST_SECONDS = 10.0
POLL_SECONDS = 2.0
# Seconds between two deletions of old rows.
CLEAN_SECONDS = 3600.0
PARALLEL = 4
GONE = 410

log = structlog.get_logger("counterpart.webhooks")


class DeliveryFault(Exception):
    """A failed attempt. Its text names the cause, and contains nothing of the answer."""


def sign(secret: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """Return the value of `webhook-signature` (Standard Webhooks, symmetric signature v1)."""
    content = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(secret, content, hashlib.sha256).digest()).decode()


class CheckedConnection(http.client.HTTPConnection):
    """Connection to one address of a host, which was checked before, with TLS if a context is given.

    A second look-up of the name could give another address.

    Parameters
    ----------
    host : str
    port : int
    address : str
    context : ssl.SSLContext, optional
    """

    def __init__(self, host: str, port: int, address: str, context: ssl.SSLContext | None) -> None:
        super().__init__(host, port, timeout=REQUEST_SECONDS)
        self._address = address
        self._tls = context

    def connect(self) -> None:
        """Connect to the address, and check the certificate against the name."""
        plain = socket.create_connection((self._address, self.port), self.timeout)
        try:
            self.sock = self._tls.wrap_socket(plain, server_hostname=self.host) if self._tls else plain
        except BaseException:
            plain.close()
            raise


def find_address(host: str, port: int, private_hosts: Collection[str]) -> str:
    """Return the address of a target.

    Raises
    ------
    DeliveryFault
        The name is unknown, or the address is not public and the operator has not listed the host.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        raise DeliveryFault("the name of the target is unknown") from None
    address = str(found[0][4][0])
    if is_loopback(host) or host in private_hosts or ip_address(address.partition("%")[0]).is_global:
        return address
    raise DeliveryFault("the target has a private address, and is not in COUNTERPART_WEBHOOK_PRIVATE_HOSTS")


def post(url: str, body: bytes, headers: dict[str, str], private_hosts: Collection[str]) -> int:
    """Send a request and return the status of the answer. Redirects are not followed.

    Raises
    ------
    DeliveryFault
    """
    parts = urlsplit(url)
    host, secure = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    address = find_address(host, port, private_hosts)
    connection = CheckedConnection(host, port, address, ssl.create_default_context() if secure else None)
    try:
        connection.request("POST", parts.path or "/", body, headers)
        return connection.getresponse().status
    except ssl.SSLError:
        raise DeliveryFault("the certificate of the target is not valid") from None
    except (OSError, http.client.HTTPException) as error:
        raise DeliveryFault(f"no answer ({type(error).__name__})") from None
    finally:
        connection.close()


class WebhookSender:
    """A thread that collects the events of ended jobs and sends them.

    Parameters
    ----------
    outbox : Outbox
    targets : sequence of str
    secret : bytes
    private_hosts : collection of str
        Hosts that may have private addresses.
    metrics : Metrics
    """

    def __init__(
        self, outbox: Outbox, targets: Sequence[str], secret: bytes, private_hosts: Collection[str], metrics: Metrics
    ) -> None:
        self.outbox = outbox
        self._targets = targets
        self._secret = secret
        self._private_hosts = private_hosts
        self._metrics = metrics
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)
        self._cleaned = -CLEAN_SECONDS

    def start(self) -> None:
        """Create the tables and start the thread."""
        self.outbox.create_tables()
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread. An attempt that runs is repeated by another process, or at the next start."""
        self._stopped.set()
        self._thread.join(REQUEST_SECONDS / 2)

    def deliver(self, message: Message) -> None:
        """Send one message, and record the outcome."""
        fault, give_up = self._try(message)
        if fault is None:
            self.outbox.mark_delivered(message)
            self._metrics.webhooks.labels("delivered").inc()
            return
        is_dead = self.outbox.mark_failed(message, fault, give_up=give_up)
        self._metrics.webhooks.labels("dead" if is_dead else "failed").inc()
        log.warning("webhook given up" if is_dead else "webhook failed", job=message.job)

    def _try(self, message: Message) -> tuple[str | None, bool]:
        """Return the fault of an attempt, None if it succeeded, and whether no further attempt makes sense."""
        if message.target not in self._targets:
            return "the target is no longer in COUNTERPART_WEBHOOKS", True
        timestamp = int(time.time())
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "counterpart",
            "webhook-id": message.id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": sign(self._secret, message.id, timestamp, message.body),
        }
        try:
            status = post(message.target, message.body, headers, self._private_hosts)
        except DeliveryFault as fault:
            return str(fault), False
        return (None if 200 <= status < 300 else f"status {status}"), status == GONE

    def _run(self) -> None:
        with ThreadPoolExecutor(PARALLEL, "webhook") as pool:
            while not self._stopped.wait(POLL_SECONDS):
                try:
                    self._work(pool)
                except Exception as error:  # noqa: BLE001  # the database may answer again
                    log.warning("webhooks not processed", **error_location(error))

    def _work(self, pool: Any) -> None:
        self.outbox.collect(self._targets)
        while (messages := self.outbox.claim(PARALLEL)) and not self._stopped.is_set():
            list(pool.map(self.deliver, messages))
        self._metrics.dead_webhooks.set(self.outbox.count_failed())
        if time.monotonic() - self._cleaned > CLEAN_SECONDS:
            self._cleaned = time.monotonic()
            self.outbox.delete_expired()
