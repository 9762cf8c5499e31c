"""Threads that send results to their targets, and record each outcome."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from app.errors import CounterpartError, NotFound, error_location
from app.jobs.audit import BEGUN, AuditEntry
from app.jobs.deliveries import Claim
from app.jobs.store import Store
from app.jobs.workflow import JobService
from app.pacs.metrics import DeliveryMetrics
from app.pacs.routes import Routes

log = structlog.get_logger("counterpart.deliveries")

# Seconds between two searches for deliveries to a target, and for those to targets that are not in the routes.
TICK_SECONDS, UNKNOWN_SECONDS = 1.0, 30.0
# Pause after a fault of the database.
FAULT_SECONDS = 10.0
# Seconds between two renewals of the claim of a result that is being sent. Their number is limited, so that another
# process tries again if a send never ends.
RENEW_SECONDS, MAX_RENEWALS = 60.0, 60
STOP_SECONDS = 5.0
# Codes of failures that only an operator can end.
UNKNOWN_TARGET, NO_RESULT, FAULT = "unknown_target", "no_such_result", "internal_error"

# Outcome of a success, and the actor in the audit trail.
SENT, ACTOR = "sent", "service"


class Deliverer:
    """Sends the results of all jobs to the targets of the routes.

    Each target has a thread, so that one that does not answer delays no other. One more thread records that a target
    is no longer in the routes.

    Parameters
    ----------
    routes : Routes
    jobs : JobService
        Its name marks the deliveries that are under way.
    store : Store
    metrics : DeliveryMetrics
    """

    def __init__(self, routes: Routes, jobs: JobService, store: Store, metrics: DeliveryMetrics) -> None:
        self._routes = routes
        self._jobs = jobs
        self._queue = jobs.queue
        self._store = store
        self._metrics = metrics
        self._stopped = threading.Event()
        self._threads = [self._create_thread(target, TICK_SECONDS) for target in routes.targets]
        self._threads.append(self._create_thread(tuple(routes.targets), UNKNOWN_SECONDS))

    def start(self) -> None:
        """Start the threads. The job service runs already."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop after the deliveries that are under way, or after `STOP_SECONDS`: they are then sent again."""
        self._stopped.set()
        deadline = time.monotonic() + STOP_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _create_thread(self, target: str | tuple[str, ...], seconds: float) -> threading.Thread:
        return threading.Thread(target=self._run, args=(target, seconds), name="deliveries", daemon=True)

    def _run(self, target: str | tuple[str, ...], seconds: float) -> None:
        pause = 0.0
        while not self._stopped.wait(pause):
            try:
                pause = 0.0 if self.run_once(target) else seconds
            except Exception as error:  # noqa: BLE001  # the row stays, and is claimed again
                log.warning("delivery not recorded", **error_location(error))
                pause = FAULT_SECONDS

    def run_once(self, target: str | tuple[str, ...]) -> bool:
        """Send one result that is due. Return False if there is none. For `target`, see `Deliveries.claim`."""
        claim = self._queue.deliveries.claim(self._jobs.process_name, target)
        if claim is None:
            return False
        if self._is_ready(claim):
            self._deliver(claim)
        return True

    def _is_ready(self, claim: Claim) -> bool:
        """Return whether the job has succeeded. Deliveries of a job that never will are removed."""
        job = claim.delivery.job
        try:
            state = self._queue.get(job).state
        except NotFound:
            state = "cancelled"
        if state in {"failed", "cancelled"}:
            self._queue.deliveries.erase(job)
        elif state != "succeeded":  # its last step is being recorded
            self._queue.deliveries.postpone(claim, TICK_SECONDS)
        return state == "succeeded"

    def _deliver(self, claim: Claim) -> None:
        delivery, deliveries = claim.delivery, self._queue.deliveries
        if not delivery.attempts:
            self._audit(claim, BEGUN)  # if this fails, nothing is sent
        with self._renew_claim(claim):
            code = self._send(claim)
        if code is None:
            is_recorded = deliveries.record_sent(claim)
        elif code == NO_RESULT:
            is_recorded = deliveries.record_refusal(claim, code)
        else:
            is_recorded = deliveries.record_failure(claim, code, self._routes.give_up_seconds)
        self._metrics.attempts.labels(delivery.target, code or SENT).inc()
        event = "result sent" if code is None else "result not sent"
        log.info(
            event if is_recorded else f"{event}; another process has the delivery, or the job was erased",
            job=delivery.job,
            target=delivery.target,
            result=delivery.result,
            attempts=delivery.attempts + 1,
            code=code,
        )
        self._audit_end(claim, code, is_recorded=is_recorded)

    @contextmanager
    def _renew_claim(self, claim: Claim) -> Iterator[None]:
        """Renew a claim while its result is sent, so that no other process sends it at the same time."""
        ended = threading.Event()

        def renew() -> None:
            for _ in range(MAX_RENEWALS):
                if ended.wait(RENEW_SECONDS):
                    return
                try:
                    if not self._queue.deliveries.renew(claim):
                        return
                except Exception as error:  # noqa: BLE001  # the database may answer again at the next renewal
                    log.warning("claim of a delivery not renewed", **error_location(error))

        thread = threading.Thread(target=renew, name="delivery-claim", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _audit_end(self, claim: Claim, code: str | None, *, is_recorded: bool) -> None:
        """Write the outcome of a delivery to the audit trail, unless it is tried again.

        After a failure that another process overtook, this process writes nothing, because the other one does.
        """
        key = (claim.delivery.target, claim.delivery.result)
        states = {
            (other.target, other.result): other.state for other in self._queue.deliveries.of_job(claim.delivery.job)
        }
        is_overtaken = not is_recorded and key in states
        if code is None or (states.get(key) != "pending" and not is_overtaken):
            self._audit(claim, code or SENT)

    def _audit(self, claim: Claim, outcome: str) -> None:
        target = self._routes.targets.get(claim.delivery.target)
        address = target.address if target is not None else None
        self._queue.audit(AuditEntry(ACTOR, "deliver", outcome, claim.delivery.job, address))

    def _send(self, claim: Claim) -> str | None:
        """Send a result, and return the code of a failure, or None."""
        from app.pacs.senders import NotSent, send

        delivery = claim.delivery
        target = self._routes.targets.get(delivery.target)
        if target is None:
            return UNKNOWN_TARGET
        file = None
        try:
            file = self._store.fetch(delivery.job, delivery.result)
            if file is None:
                return NO_RESULT
            send(file.path, target)
        except NotSent as failure:
            return failure.code
        except CounterpartError as error:
            return error.code
        except Exception as error:  # noqa: BLE001  # a library's error must not stop the other deliveries
            log.warning("delivery failed", job=delivery.job, target=delivery.target, **error_location(error))
            return FAULT
        finally:
            if file is not None:
                file.close()
        return None
