"""Limits on the queue and on disk use, and the choice of ended jobs to erase."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from app.errors import StoreFull
from app.jobs.job import Job
from app.jobs.store import Store

GIGABYTE = 10**9


@dataclass(frozen=True)
class StorageLimits:
    """Limits set by the operator.

    Attributes
    ----------
    queue_limit : int
        Number of waiting jobs at which new jobs are refused.
    min_free_gb : float
        Free disk space in GB (10^9 bytes) below which new scans are refused.
    keep_days : float
        Age in days at which an ended job is erased. 0 keeps all jobs.
    keep_gb : float
        Size of scans and results in GB above which the oldest ended jobs are erased. 0 sets no limit.
    """

    queue_limit: int = 100
    min_free_gb: float = 0.0
    keep_days: float = 0.0
    keep_gb: float = 0.0

    def check_disk(self, store: Store, size: int) -> None:
        """Refuse an upload that would leave too little free disk space.

        Parameters
        ----------
        store : Store
        size : int
            Size of the upload in bytes, as far as it is known.

        Raises
        ------
        StoreFull
        """
        free = shutil.disk_usage(store.root).free - size
        if free < self.min_free_gb * GIGABYTE:
            raise StoreFull(
                f"The scan would leave {max(free, 0) / GIGABYTE:.1f} GB of free disk space.",
                expected=f"at least {self.min_free_gb:g} GB (COUNTERPART_MIN_FREE_GB).",
                advice="Send the scan again later. The operator can free disk space, or keep scans for a shorter time.",
            )


def select_expired(
    ended: Sequence[Job], sizes: dict[str, int], limits: StorageLimits, now: datetime | None = None
) -> list[str]:
    """Return the ids of the jobs to erase, the oldest first.

    Parameters
    ----------
    ended : sequence of Job
        Ended jobs, the oldest first.
    sizes : dict
        Size in bytes of each job in the store.
    limits : StorageLimits
    now : datetime, optional
        UTC time, by default the current time.
    """
    now = now or datetime.now(UTC)
    oldest_kept = now - timedelta(days=limits.keep_days)
    expired = [job.id for job in ended if limits.keep_days and (job.ended or job.created) < oldest_kept]
    if limits.keep_gb:
        total = sum(sizes.values()) - sum(sizes.get(job, 0) for job in expired)
        for job in ended:
            if total <= limits.keep_gb * GIGABYTE:
                break
            if job.id in sizes and job.id not in expired:
                expired.append(job.id)
                total -= sizes[job.id]
    return expired
