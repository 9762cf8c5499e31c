"""What is kept and for how long: jobs that have ended, by their age and by the disk they take."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from app.errors import StoreFull
from app.jobs.job import Job
from app.jobs.store import Store

GIGABYTE = 10**9


@dataclass(frozen=True)
class Limits:
    """What an operator allows.

    Attributes
    ----------
    queue : int
        Waiting jobs above which no other is taken.
    free_gb : float
        Free disk below which no scan is taken.
    keep_days : float
        Age at which a job that has ended is erased; 0 keeps it.
    keep_gb : float
        What scans and results may take, above which the oldest that have ended are erased; 0 sets no limit.
    """

    queue: int = 100
    free_gb: float = 0.0
    keep_days: float = 0.0
    keep_gb: float = 0.0

    def check_disk(self, store: Store, size: int) -> None:
        """Refuse an upload that would fill the disk.

        Parameters
        ----------
        store : Store
        size : int
            Bytes, as far as they are known.

        Raises
        ------
        StoreFull
        """
        free = shutil.disk_usage(store.root).free - size
        if free < self.free_gb * GIGABYTE:
            raise StoreFull(
                f"{max(free, 0) / GIGABYTE:.1f} GB of disk would be left.",
                expected=f"at least {self.free_gb:g} GB (COUNTERPART_MIN_FREE_GB).",
                advice="Send it again later; the operator frees some disk, or lets scans be kept for less time.",
            )


def surplus(ended: Sequence[Job], sizes: dict[str, int], limits: Limits, now: datetime | None = None) -> list[str]:
    """Jobs to be erased, the oldest first.

    Parameters
    ----------
    ended : sequence of Job
        Oldest first.
    sizes : dict
        Bytes of each job in the store.
    limits : Limits
    now : datetime, optional
        UTC.
    """
    now = now or datetime.now(UTC)
    old = now - timedelta(days=limits.keep_days)
    erased = [job.id for job in ended if limits.keep_days and (job.ended or job.created) < old]
    if limits.keep_gb:
        total = sum(sizes.values()) - sum(sizes.get(job, 0) for job in erased)
        for job in ended:
            if total <= limits.keep_gb * GIGABYTE:
                break
            if job.id in sizes and job.id not in erased:
                erased.append(job.id)
                total -= sizes[job.id]
    return erased
