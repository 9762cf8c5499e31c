"""Run of the benchmark. It measures the parts in sequence, saves the JSON after each, then writes figure and page."""

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
from benchmarks.ct_series import MissingDataError
from benchmarks.parts import PARTS, Plan, Results
from benchmarks.report import render
from benchmarks.rows import BY_NAME, FLOAT32
from benchmarks.waterfall import draw_waterfall
from benchmarks.worker import Inputs
from training.config import ROOT, Config, data_root

SCAN = "sub-61"
CT_CONFIG = ROOT / "training" / "configs" / "headct.toml"
FIGURE = "figures/waterfall.png"
# Earlier results are kept only if they have the same values of these keys.
IDENTITY = ("machine", "bundle", "scan")

log = logging.getLogger(__name__)


def newest_bundle(name: str, models: Path = ROOT / "models") -> Path:
    """Return the folder of the latest version of a bundle.

    Raises
    ------
    SystemExit
        There is none.
    """
    # A version begins with a digit, so that "t1" does not match "t1-pinaya2022".
    found = [p for p in models.glob(f"{name}-[0-9]*") if (p / "manifest.json").is_file()]
    if not found:
        raise SystemExit(f"There is no bundle {name}-* in {models.name}/. Train one, or name one with --bundle.")
    return max(found, key=lambda p: Version(p.name.removeprefix(f"{name}-")))


def select(names: Sequence[str] | None, known: Sequence[str], kind: str) -> list[str]:
    """Return the requested names in the order of the known ones, or all known names if none is requested.

    Raises
    ------
    SystemExit
        A name is unknown.
    """
    if unknown := set(names or ()) - set(known):
        raise SystemExit(f"Unknown {kind}: {', '.join(sorted(unknown))}. Known: {', '.join(known)}.")
    return [name for name in known if not names or name in names]


def describe_machine() -> str:
    """Return the number of usable cores and the processor's name."""
    lines = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    name = lines[0].partition(":")[2].strip() if lines else platform.machine()
    return f"{len(os.sched_getaffinity(0))} cores of {name}"


def make_plan(options: argparse.Namespace, data: Path) -> tuple[Plan, list[str]]:
    """Return what can be measured here, and notes about what cannot.

    Raises
    ------
    SystemExit
        There is no scan or no bundle.
    """
    config = Config.load(options.config)
    healthy = data / config.data.folder
    scan = options.scan or healthy / config.data.pattern.format(subject=SCAN)
    if not scan.exists():
        raise SystemExit(f"Scan {scan.name} does not exist. Use --scan, or set COUNTERPART_DATA to the data folder.")
    bundle = options.bundle or newest_bundle(config.name)
    rows = [BY_NAME[name] for name in select(options.rows, list(BY_NAME), "row")]
    cases, notes = 0 if options.quick else options.cases, []
    if read_manifest(bundle).files.denoiser_int8 is None:
        rows = [row for row in rows if row.name != FLOAT32]
        notes.append("The bundle has no int8 denoiser, so there is no separate row for float32.")
    if not healthy.is_dir():
        cases = 0
        notes.append(f"Accuracy was not measured, because the data folder {config.data.folder} is missing.")
    sample, repeats = (1, 1) if options.quick else (options.sample, options.repeats)
    try:
        ct = Inputs(newest_bundle("headct", bundle.parent), CT_CONFIG, scan, sample)
    except SystemExit:
        ct = None
    inputs = Inputs(bundle, options.config, scan, sample, cases)
    return Plan(inputs, ct, data, tuple(rows), repeats, options.quick, options.thorough), notes


def measure(
    plan: Plan,
    names: Sequence[str],
    document: Results,
    save: Callable[[Results], None],
    parts: Mapping[str, Callable[[Plan], Results]] = PARTS,
) -> None:
    """Measure parts into the document and save it after each.

    If a part fails, its earlier result is kept and the error is stored.
    """
    states = document.setdefault("parts", {})
    for name in names:
        log.info("%s ...", name)
        start = time.perf_counter()
        try:
            document |= parts[name](plan)
        except Exception as error:  # the other parts take minutes and must not be lost
            message = str(error) if isinstance(error, MissingDataError) else f"{type(error).__name__}: {error}"
            states[name] = {**states.get(name, {}), "failed": message}
            log.warning("%s failed: %s", name, message, exc_info=not isinstance(error, MissingDataError))
        else:
            when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
            states[name] = {"measured": when, "seconds": time.perf_counter() - start, "repeats": plan.repeats}
        save(document)


def load_earlier(path: Path, identity: Results) -> Results:
    """Return the document of an earlier run on the same machine, bundle and scan, or an empty one."""
    if not path.is_file():
        return {}
    found: Results = json.loads(path.read_text())
    return found if all(found.get(key) == identity[key] for key in IDENTITY) else {}


def write_page(document: Results, out: Path) -> None:
    """Write figure and page."""
    if "waterfall" in document:
        draw_waterfall(document["waterfall"], out / FIGURE)
    (out / "BENCHMARKS.md").write_text(render(document, FIGURE))


def run(options: argparse.Namespace) -> None:
    """Measure if requested, and write JSON, figure and page.

    Raises
    ------
    SystemExit
        Something is missing, or a part failed.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("benchmarks").setLevel(logging.INFO)
    path = options.out / "BENCHMARKS.json"
    if options.render:
        if not path.is_file():
            raise SystemExit(f"{path.name} does not exist. Measure first.")
        write_page(json.loads(path.read_text()), options.out)
        return
    names = select(options.parts, list(PARTS), "part")
    plan, notes = make_plan(options, data_root())
    options.out.mkdir(parents=True, exist_ok=True)
    identity = {"machine": describe_machine(), "bundle": plan.inputs.bundle.name, "scan": plan.inputs.scan.name}
    document = {**load_earlier(path, identity), **identity, "version": app.__version__, "notes": notes}

    def save(document: Results) -> None:
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps(document, indent=1, default=_to_python) + "\n")
        unfinished.replace(path)

    measure(plan, names, document, save)
    write_page(json.loads(path.read_text()), options.out)
    if failed := [name for name in names if "failed" in document["parts"][name]]:
        raise SystemExit(f"Failed: {', '.join(failed)}. Use --parts to measure them again.")


def _to_python(value: object) -> Any:
    """Convert a NumPy scalar for JSON."""
    assert isinstance(value, np.generic), type(value)
    return value.item()
