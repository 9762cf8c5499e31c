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
from contextlib import suppress
from ipaddress import ip_address, ip_network
from typing import Any
from urllib.parse import urlsplit

import structlog

from app.errors import error_location
from app.jobs.metrics import Metrics
from app.jobs.webhooks import Message, Outbox
from app.settings import is_loopback

# Seconds for each step of a request (the connection, a block of the answer), and for the whole attempt.
REQUEST_SECONDS, ATTEMPT_SECONDS = 10.0, 30.0
POLL_SECONDS = 2.0
# Seconds between two deletions of old rows.
CLEAN_SECONDS = 3600.0
PARALLEL = 4
GONE = 410
# Addresses of a target that an attempt tries.
MAX_ADDRESSES = 2
# Networks of IPv6 whose addresses contain one of IPv4, which may be private: NAT64 (RFC 6052) and 6to4 (RFC 3056).
TRANSLATED = (ip_network("64:ff9b::/96"), ip_network("2002::/16"))

log = structlog.get_logger("counterpart.webhooks")


class DeliveryFault(Exception):
    """A failed attempt. Its text names the cause, and contains nothing of the answer."""


def sign(secret: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """Return the value of `webhook-signature` (Standard Webhooks, symmetric signature v1)."""
    content = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(secret, content, hashlib.sha256).digest()).decode()


class CheckedConnection(http.client.HTTPConnection):
    """Connection to a host at one of its addresses, which were checked before, with TLS if a context is given.

    A second look-up of the name could give other addresses.

    Parameters
    ----------
    host : str
    port : int
    addresses : sequence of str
        An address that refuses the connection is left out, if another one follows.
    context : ssl.SSLContext, optional
    """

    def __init__(self, host: str, port: int, addresses: Sequence[str], context: ssl.SSLContext | None) -> None:
        super().__init__(host, port, timeout=REQUEST_SECONDS)
        self._addresses = addresses
        self._tls = context

    def connect(self) -> None:
        """Connect to the first address that accepts, and check the certificate against the name."""
        plain = self._open()
        try:
            self.sock = self._tls.wrap_socket(plain, server_hostname=self.host) if self._tls else plain
        except BaseException:
            plain.close()
            raise

    def _open(self) -> socket.socket:
        *others, last = self._addresses
        for address in others:
            with suppress(OSError):
                return socket.create_connection((address, self.port), self.timeout)
        return socket.create_connection((last, self.port), self.timeout)

    def abort(self) -> None:
        """End the request in the thread that waits for it, with an error."""
        if self.sock is not None:
            with suppress(OSError):  # it has ended already
                self.sock.shutdown(socket.SHUT_RDWR)


def find_addresses(host: str, port: int, private_hosts: Collection[str]) -> list[str]:
    """Return the addresses of a target: all of them if it may be private, otherwise the public ones.

    Raises
    ------
    DeliveryFault
        The name is unknown, or no address is public and the operator has not listed the host.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        raise DeliveryFault("the name of the target is unknown") from None
    may_be_private = is_loopback(host) or host in private_hosts
    addresses = dict.fromkeys(str(entry[4][0]) for entry in found)
    if allowed := [address for address in addresses if may_be_private or is_public(address)][:MAX_ADDRESSES]:
        return allowed
    raise DeliveryFault("the target has a private address, and is not in COUNTERPART_WEBHOOK_PRIVATE_HOSTS")


def is_public(address: str) -> bool:
    """Return whether an address belongs to one machine of the internet."""
    parsed = ip_address(address.partition("%")[0])
    mapped = any(parsed in network for network in TRANSLATED)
    return parsed.is_global and not parsed.is_multicast and not mapped


def post(url: str, body: bytes, headers: dict[str, str], private_hosts: Collection[str]) -> int:
    """Send a request and return the status of the answer. Redirects are not followed.

    Raises
    ------
    DeliveryFault
    """
    parts = urlsplit(url)
    host, secure = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    addresses = find_addresses(host, port, private_hosts)
    connection = CheckedConnection(host, port, addresses, ssl.create_default_context() if secure else None)
    # A target that sends one byte at a time would hold the thread.
    timer = threading.Timer(ATTEMPT_SECONDS, connection.abort)
    timer.daemon = True
    timer.start()
    try:
        connection.request("POST", parts.path or "/", body, headers)
        return connection.getresponse().status
    except ssl.SSLError:
        raise DeliveryFault("the certificate of the target is not valid") from None
    except (OSError, http.client.HTTPException) as error:
        raise DeliveryFault(f"no answer ({type(error).__name__})") from None
    finally:
        timer.cancel()
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
        """Start the thread. The tables of the outbox exist."""
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
