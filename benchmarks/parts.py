"""The parts of the run, each on its own: what it measures is a key of the JSON, whatever the others do."""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from tqdm import tqdm

from benchmarks.ceiling import Ceiling
from benchmarks.gains import measure_gains
from benchmarks.missing import Missing
from benchmarks.profile import measure_profile
from benchmarks.rows import SERVED, Row
from benchmarks.scaling import measure_scaling
from benchmarks.series import make_series
from benchmarks.served import fresh
from benchmarks.startup import first_evaluations, help_seconds
from benchmarks.waterfall import measure_waterfall
from benchmarks.worker import Job, Worker

# Turns of what is only drawn: a figure needs no more.
FIGURE_REPEATS = 2

Found = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What the run measures.

    Attributes
    ----------
    job : Job
        Of the T1 volume.
    ct : Job or None
        Of the CT series, whose `scan` is made on the way; None where there is no bundle for it.
    data : Path
        Root of the real scans.
    rows : tuple of Row
    repeats : int
    quick : bool
        The least of everything: to see that it works.
    thorough : bool
        With the accuracy of rows that take minutes a case.
    """

    job: Job
    ct: Job | None
    data: Path
    rows: tuple[Row, ...]
    repeats: int = 3
    quick: bool = False
    thorough: bool = False


def apart(function: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Call it in a process of its own: its memory, and torch's threads, go with it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments, **options).result()


def measure_rows(plan: Plan) -> Found:
    """Every row, the ceiling and the start, once each turn."""
    job = plan.job
    workers: dict[str, Worker] = {}
    try:
        for row in tqdm(plan.rows, desc="starting rows"):
            workers[row.name] = Worker(row, job)
        return _turns(plan, workers)
    finally:
        for worker in workers.values():
            worker.end()


def _turns(plan: Plan, workers: dict[str, Worker]) -> Found:
    for worker in tqdm(workers.values(), desc="warming up"):
        worker.ask("prepare")
    ceiling = Ceiling()
    rows: Found = {name: {"repeats": [], "cold_seconds": w.cold_seconds} for name, w in workers.items()}
    turns: Found = {"ceiling": [], "start": {"help": [], "golden": [], "scan": []}}
    for _ in tqdm(range(plan.repeats), desc="turns"):
        for name, worker in tqdm(workers.items(), desc="rows", leave=False):
            rows[name]["repeats"].append(worker.ask("time"))
        turns["ceiling"].append(ceiling.time())
        turns["start"]["help"].append(help_seconds())
        for key, seconds in first_evaluations(plan.job.scan, plan.job.bundle.parent).items():
            turns["start"][key].append(seconds)
    for row in tqdm(plan.rows, desc="memory and accuracy"):
        worker = workers[row.name]
        rows[row.name] |= worker.ask("facts")
        judged = plan.job.cases != 0 and row.judged_as not in workers and (plan.thorough or not row.costly)
        rows[row.name]["accuracy"] = worker.ask("accuracy") if judged else None
        worker.end()
    for row in plan.rows:
        if row.judged_as in workers:
            rows[row.name]["accuracy"] = rows[row.judged_as]["accuracy"]
    return {"rows": rows, **turns}


def measure_before_and_after(plan: Plan) -> Found:
    """The waterfall."""
    job = plan.job
    return {"waterfall": apart(measure_waterfall, job.bundle, job.config, job.scan, plan.repeats, quick=plan.quick)}


def measure_operators(plan: Plan) -> Found:
    """What bounds the networks."""
    return {"profile": apart(measure_profile, plan.job.bundle)}


def measure_switches(plan: Plan) -> Found:
    """The gains."""
    job = plan.job
    return {"gains": apart(measure_gains, job.bundle, job.config, job.scan, plan.repeats)}


def measure_volume(plan: Plan) -> Found:
    """The whole T1 volume over HTTP."""
    return {"volume": fresh(plan.job.scan, plan.job.bundle.parent, plan.repeats)}


def measure_ct(plan: Plan) -> Found:
    """The CT series over HTTP; and once through each other row, on its prepared slices.

    Raises
    ------
    Missing
        There is no bundle for it, or no head to make it of.
    """
    if plan.ct is None:
        raise Missing("no bundle headct-* in the folder of bundles: train one")
    with TemporaryDirectory() as made:
        job = replace(plan.ct, scan=make_series(plan.data, Path(made)))
        found = fresh(job.scan, job.bundle.parent, plan.repeats)
        found["rows"] = {}
        others = [row for row in plan.rows if row.name not in SERVED and not plan.quick]
        for row in tqdm(others, desc="rows on the CT series"):
            worker = Worker(row, job)
            try:
                worker.ask("prepare")
                found["rows"][row.name] = {"repeats": [worker.ask("time")]}
            finally:
                worker.end()
        return {"ct": found}


def measure_growth(plan: Plan) -> Found:
    """Time against slices, resolution and scans at once."""
    repeats, models = min(FIGURE_REPEATS, plan.repeats), plan.job.bundle.parent
    return {"scaling": {**measure_scaling(plan.job.scan, models, repeats, quick=plan.quick), "cores": _cores()}}


def _cores() -> int:
    return len(os.sched_getaffinity(0))


PARTS: dict[str, Callable[[Plan], Found]] = {
    "rows": measure_rows,
    "waterfall": measure_before_and_after,
    "profile": measure_operators,
    "gains": measure_switches,
    "volume": measure_volume,
    "ct": measure_ct,
    "scaling": measure_growth,
}
