"""The run: its parts one after the other, the JSON after each of them, then figures and page."""

import argparse
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from packaging.version import Version

import app
from app.runtime.bundle import read_manifest
from benchmarks.figures import draw_scaling, draw_waterfall
from benchmarks.missing import Missing
from benchmarks.parts import PARTS, Found, Plan
from benchmarks.report import render
from benchmarks.rows import FLOAT32, ROWS, Row
from benchmarks.worker import Job
from training.config import ROOT, Config, data_root

SCAN = "sub-61"
CT_CONFIG = ROOT / "training" / "configs" / "headct.toml"
WATERFALL, SCALING = "figures/waterfall.png", "figures/scaling.png"
# What parts of an earlier run must share with this one to stay.
SAME = ("machine", "bundle", "scan")

log = logging.getLogger(__name__)


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


def chosen(names: Sequence[str] | None, known: Sequence[str], what: str) -> list[str]:
    """Names in the order of those known; all of them where none is asked for.

    Raises
    ------
    SystemExit
        A name is none.
    """
    unknown = set(names or ()) - set(known)
    if unknown:
        raise SystemExit(f"No {what} {', '.join(sorted(unknown))}; there are {', '.join(known)}.")
    return [name for name in known if not names or name in names]


def chosen_rows(names: Sequence[str] | None) -> list[Row]:
    """Rows by name, in the table's order."""
    kept = chosen(names, [row.name for row in ROWS], "row")
    return [row for row in ROWS if row.name in kept]


def machine() -> str:
    """What it ran on, in words."""
    names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else platform.machine()
    return f"{len(os.sched_getaffinity(0))} cores of {name}"


def make_plan(options: argparse.Namespace, data: Path) -> tuple[Plan, list[str]]:
    """What can be measured here, and what is left out for want of data.

    Raises
    ------
    SystemExit
        There is no scan, or no bundle.
    """
    config = Config.load(options.config)
    healthy = data / config.data.folder
    scan = options.scan or healthy / config.data.pattern.format(subject=SCAN)
    if not scan.exists():
        raise SystemExit(
            f"No scan {scan.name}: name one with --scan, or set COUNTERPART_DATA to the folder of the data."
        )
    bundle = options.bundle or newest_bundle(config.name)
    rows, cases, notes = chosen_rows(options.rows), 0 if options.quick else options.cases, []
    if read_manifest(bundle).files.denoiser_int8 is None:
        rows = [row for row in rows if row.name != FLOAT32]
        notes.append("The bundle has no denoiser in int8: the service computes in float32, and has one row.")
    if not healthy.is_dir():
        cases = 0
        notes.append(
            f"The data of the configuration ({config.data.folder}) is not here: accuracy, which is judged on it, is "
            "not measured."
        )
    sample, repeats = (1, 1) if options.quick else (options.sample, options.repeats)
    try:
        ct = Job(newest_bundle("headct", bundle.parent), CT_CONFIG, scan, sample, 0)
    except SystemExit:
        ct = None
    job = Job(bundle, options.config, scan, sample, cases)
    return Plan(job, ct, data, tuple(rows), repeats, options.quick, options.thorough), notes


def measure(
    plan: Plan, names: Sequence[str], document: Found, keep: Callable[[Found], None], parts: Mapping[str, Any] = PARTS
) -> None:
    """Every part asked for; what it found goes into the document, which is kept after each.

    A part that fails leaves what an earlier run found, and says why.
    """
    states = document.setdefault("parts", {})
    for name in names:
        log.info("%s ...", name)
        start = time.perf_counter()
        try:
            document |= parts[name](plan)
        except Exception as error:  # the other parts are worth their minutes
            told = str(error) if isinstance(error, Missing) else f"{type(error).__name__}: {error}"
            states[name] = {**states.get(name, {}), "failed": told}
            log.warning("%s failed: %s", name, told, exc_info=not isinstance(error, Missing))
        else:
            when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
            states[name] = {"measured": when, "seconds": time.perf_counter() - start, "repeats": plan.repeats}
        keep(document)


def earlier(path: Path, same: Found) -> Found:
    """The document of an earlier run, where it was of the same machine, bundle and scan; else nothing."""
    if not path.is_file():
        return {}
    found: Found = json.loads(path.read_text())
    return found if all(found.get(key) == same[key] for key in SAME) else {}


def run(options: argparse.Namespace) -> None:
    """Measure, and write page, figures and JSON."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("benchmarks").setLevel(logging.INFO)
    names = chosen(options.parts, list(PARTS), "part")
    plan, notes = make_plan(options, data_root())
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "BENCHMARKS.json"
    same = {"machine": machine(), "bundle": plan.job.bundle.name, "scan": plan.job.scan.name}
    document = {**earlier(path, same), **same, "version": app.__version__, "notes": notes}

    def keep(document: Found) -> None:
        whole = path.with_suffix(".part")
        whole.write_text(json.dumps(document, indent=1, default=_plain) + "\n")
        whole.replace(path)

    if not options.render:
        measure(plan, names, document, keep)
    write_page(json.loads(json.dumps(document, default=_plain)), options.out)
    if any("failed" in document["parts"].get(name, {}) for name in names):
        raise SystemExit("Some parts failed: see the page; --parts measures them anew.")


def write_page(document: Found, out: Path) -> None:
    """Figures and page, of what was measured."""
    if "waterfall" in document:
        draw_waterfall(document["waterfall"], out / WATERFALL)
    if "scaling" in document:
        draw_scaling(document["scaling"], out / SCALING)
    (out / "BENCHMARKS.md").write_text(render(document, WATERFALL, SCALING))


def _plain(value: object) -> object:
    """numpy's numbers as Python's."""
    assert isinstance(value, np.generic), type(value)
    return value.item()
