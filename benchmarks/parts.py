"""Parts of the benchmark. Each measures one key of the JSON and can be repeated separately."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from benchmarks.ct_series import MissingDataError, make_series
from benchmarks.rows import ONNX_ROWS, Row
from benchmarks.service import time_start, time_uploads
from benchmarks.waterfall import measure_waterfall
from benchmarks.worker import Inputs, RowProcess

Results = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Contents of a run.

    Attributes
    ----------
    inputs : Inputs
        Inputs of the T1 rows.
    ct : Inputs or None
        Inputs of the CT rows. `make_series` replaces the scan. None if there is no CT bundle.
    data : Path
        Folder of the real scans.
    rows : tuple of Row
    repeats : int
    quick : bool
        Measure as little as possible.
    thorough : bool
        Measure the accuracy of slow rows.
    """

    inputs: Inputs
    ct: Inputs | None
    data: Path
    rows: tuple[Row, ...]
    repeats: int = 3
    quick: bool = False
    thorough: bool = False


def measure_rows(plan: Plan) -> Results:
    """Time all rows and the start of the command line in turns, then measure memory and accuracy."""
    processes: dict[str, RowProcess] = {}
    try:
        for row in tqdm(plan.rows, desc="starting rows"):
            processes[row.name] = RowProcess(row, plan.inputs)
        return _time_in_turns(plan, processes)
    finally:
        for process in processes.values():
            process.close()


def _time_in_turns(plan: Plan, processes: dict[str, RowProcess]) -> Results:
    for process in tqdm(processes.values(), desc="warming up"):
        process.call("warm_up")
    rows: Results = {name: {"repeats": [], "cold_seconds": p.cold_seconds} for name, p in processes.items()}
    start: dict[str, list[float]] = {"help": [], "scan": []}
    for _ in tqdm(range(plan.repeats), desc="repeats"):
        for name, process in tqdm(processes.items(), desc="rows", leave=False):
            rows[name]["repeats"].append(process.call("time"))
        for key, seconds in time_start(plan.inputs.scan, plan.inputs.bundle.parent).items():
            start[key].append(seconds)
    for row in tqdm(plan.rows, desc="memory and accuracy"):
        process = processes[row.name]
        rows[row.name] |= process.call("memory")
        is_scored = plan.inputs.cases and row.is_trained and row.accuracy_of not in processes
        is_scored = is_scored and (plan.thorough or not row.is_slow)
        rows[row.name]["accuracy"] = process.call("accuracy") if is_scored else None
        process.close()
    for row in plan.rows:
        if row.accuracy_of in processes:
            rows[row.name]["accuracy"] = rows[row.accuracy_of]["accuracy"]
    return {"rows": rows, "start": start}


def measure_phases(plan: Plan) -> Results:
    """Measure the waterfall in a separate process, whose memory and torch threads end with it."""
    inputs = plan.inputs
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        arguments = (inputs.bundle, inputs.config, inputs.scan, plan.repeats)
        return {"waterfall": pool.submit(measure_waterfall, *arguments, quick=plan.quick).result()}


def measure_volume(plan: Plan) -> Results:
    """Send the T1 volume to the service."""
    return {"volume": time_uploads(plan.inputs.scan, plan.inputs.bundle.parent, plan.repeats)}


def measure_ct(plan: Plan) -> Results:
    """Send a CT series to the service, and time each other row once on its preprocessed slices.

    Raises
    ------
    MissingDataError
        There is no CT bundle, or no head to make the series from.
    """
    if plan.ct is None:
        raise MissingDataError("there is no bundle headct-*: train one")
    with TemporaryDirectory() as folder:
        inputs = replace(plan.ct, scan=make_series(plan.data, Path(folder)))
        measured = time_uploads(inputs.scan, inputs.bundle.parent, plan.repeats)
        measured["rows"] = {}
        others = [row for row in plan.rows if row.name not in ONNX_ROWS and not plan.quick]
        for row in tqdm(others, desc="rows on the CT series"):
            process = RowProcess(row, inputs)
            try:
                process.call("warm_up")
                measured["rows"][row.name] = {"repeats": [process.call("time")]}
            finally:
                process.close()
        return {"ct": measured}


PARTS: dict[str, Callable[[Plan], Results]] = {
    "rows": measure_rows,
    "waterfall": measure_phases,
    "volume": measure_volume,
    "ct": measure_ct,
}
