"""The run: workers are started, asked in turns, and told of."""

import argparse
import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from packaging.version import Version
from tqdm import tqdm

from benchmarks.ceiling import Ceiling
from benchmarks.figures import draw_waterfall
from benchmarks.int8 import int8_graphs
from benchmarks.report import render
from benchmarks.rows import INT8, OWN, ROWS, Row
from benchmarks.startup import first_evaluations, help_seconds
from benchmarks.trace import Span, totals, trace_scan
from benchmarks.worker import Job, Worker
from training.config import ROOT, Config, data_root

FIGURE = "figures/waterfall.png"
SCAN = "sub-61"


def newest_bundle(name: str, models: Path = ROOT / "models") -> Path:
    """The latest version of a bundle.

    Raises
    ------
    SystemExit
        There is none.
    """
    found = [p for p in models.glob(f"{name}-*") if (p / "manifest.json").is_file()]
    if not found:
        raise SystemExit(f"No bundle {name}-* in {models.name}/: train one, or name one with --bundle.")
    return max(found, key=lambda p: Version(p.name.removeprefix(f"{name}-")))


def chosen_rows(names: list[str] | None) -> list[Row]:
    """Rows by name, in the table's order.

    Raises
    ------
    SystemExit
        A name is none.
    """
    unknown = set(names or ()) - {row.name for row in ROWS}
    if unknown:
        raise SystemExit(f"No row {', '.join(sorted(unknown))}; there are {', '.join(row.name for row in ROWS)}.")
    return [row for row in ROWS if not names or row.name in names]


def measure(rows: list[Row], job: Job, repeats: int) -> dict[str, Any]:
    """Every row, the ceiling, a trace and the start, once each turn.

    Each row works once before it is timed: first calls allocate and compile.
    """
    if INT8 in (row.name for row in rows):
        int8_graphs(job.bundle, job.config)  # made here, so that calibration is in no row's start or memory
    workers = {row.name: Worker(row, job) for row in rows}
    for worker in tqdm(workers.values(), desc="warming up"):
        worker.ask("time")
    ceiling = Ceiling()
    found: dict[str, Any] = {name: {"repeats": [], "cold_seconds": w.cold_seconds} for name, w in workers.items()}
    turns: dict[str, Any] = {"ceiling": [], "traces": [], "start": {"help": [], "golden": [], "scan": []}}
    for _ in tqdm(range(repeats), desc="turns"):
        for name, worker in tqdm(workers.items(), desc="rows", leave=False):
            found[name]["repeats"].append(worker.ask("time"))
        turns["ceiling"].append(ceiling.time())
        turns["traces"].append(trace_scan(job.bundle, job.scan))
        turns["start"]["help"].append(help_seconds())
        for key, seconds in first_evaluations(job.scan, job.bundle.parent).items():
            turns["start"][key].append(seconds)
    for row in tqdm(rows, desc="memory and accuracy"):
        worker = workers[row.name]
        found[row.name] |= worker.ask("facts")
        judged = job.cases != 0 and row.judged_as not in workers
        found[row.name]["accuracy"] = worker.ask("accuracy") if judged else None
        worker.close()
    for row in rows:
        if row.judged_as in workers:
            found[row.name]["accuracy"] = found[row.judged_as]["accuracy"]
    return {"rows": found, **turns}


def median_trace(traces: list[list[Span]]) -> list[Span]:
    """The repeat that took the median time: its parts belong together."""
    return sorted(traces, key=lambda spans: spans[-1].end)[(len(traces) - 1) // 2]


def machine() -> str:
    """What it ran on, in words."""
    names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else platform.machine()
    return f"{len(os.sched_getaffinity(0))} cores of {name}"


def run(options: argparse.Namespace) -> None:
    """Measure, and write page, figure and JSON."""
    config = Config.load(options.config)
    name = config.data.pattern.format(subject=SCAN)
    scan = options.scan or data_root() / config.data.folder / name
    bundle = options.bundle or newest_bundle(config.name)
    rows = chosen_rows(options.rows)
    document = measure(rows, Job(bundle, options.config, scan, options.sample, options.cases), options.repeats)
    spans = median_trace(document.pop("traces"))
    document |= {
        "machine": machine(),
        "bundle": bundle.name,
        "scan": scan.name,
        "repeats": options.repeats,
        "gigaflops": document["rows"].get(OWN, {}).get("gigaflops", {}),
        "phases": totals(spans),
        "spans": [asdict(span) for span in spans],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "BENCHMARKS.json").write_text(json.dumps(document, indent=1, default=_plain) + "\n")
    draw_waterfall(spans, options.out / FIGURE)
    (options.out / "BENCHMARKS.md").write_text(render(document, FIGURE))


def _plain(value: object) -> object:
    """numpy's numbers as Python's."""
    assert isinstance(value, np.generic), type(value)
    return value.item()
