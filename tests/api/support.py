"""An engine that does what the scan tells it to, and scans that tell it."""

import json
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from app import errors
from app.analysis import AnalysisRequest, Progress
from app.export.outputs import BRAIN_NAME, DICOM_NAMES, REQUIRED_NAMES
from app.export.report import Extent, Finding, Input, ModelUsed, Report, ScoreReport, Work
from app.jobs.engine import INFERRED
from app.manifest import Manifest, Range
from tests.support.bundle import tiny_manifest

NIFTI1_BYTES = 348
ALONE = errors.NoBrainMask("Found.", expected="expected.", advice="Advice.")
NOT_FROM_DICOM = errors.NotFromDicom("Found.", expected="expected.", advice="Advice.")
SECRET = "Zweistein-4711"  # noqa: S105  # a name


def scan(**orders: object) -> bytes:
    """Bytes that begin as a NIfTI file does, and go on with orders for `FakeEngine`.

    Parameters
    ----------
    **orders
        `seconds` of inference, `fail` (a class of `app.errors`), `crash` (text of a ValueError),
        `shout` (text on every stream that a library may write to), `die` (end the process), `hungry` (allocate so
        many bytes), `deaf` (seconds without a word), `die_late`, `crash_late` and `slow_export` (the same in the
        export), and anything else to make it another scan.
    """
    header = np.zeros(NIFTI1_BYTES, np.uint8)
    header[:4] = np.frombuffer(NIFTI1_BYTES.to_bytes(4, "little"), np.uint8)
    header[344:] = np.frombuffer(b"n+1\0", np.uint8)
    return header.tobytes() + json.dumps(orders).encode().ljust(300)


class FakeEngine:
    """Writes small files; keeps what it was asked."""

    provider = "cpu"

    def __init__(self) -> None:
        self.manifests: Sequence[Manifest] = [tiny_manifest()]
        self.seen: list[tuple[Path, AnalysisRequest]] = []
        self.exported: list[tuple[str, Path]] = []
        self.broken: errors.CounterpartError | None = None
        self.slow = False
        self.slow_export = True
        self.guarded = False
        self.held = np.zeros(0, np.uint8)

    def card(self, model: str) -> str | None:
        return f"# {model}"

    def warm_up(self) -> None:
        if self.broken:
            raise self.broken

    def guard(self, *, on: bool) -> None:
        self.guarded = on

    def close(self) -> None:
        pass

    def infer(self, scan: Path, out: Path, request: AnalysisRequest, progress: Progress) -> None:
        self.seen.append((scan, request))
        orders = read(scan)
        progress("read", 1.0)
        if "fail" in orders:
            raise getattr(errors, orders["fail"])("Found.", expected="expected.", advice="Advice.")
        if "shout" in orders:
            shout(orders["shout"])
        if "crash" in orders:
            raise ValueError(orders["crash"])
        if "hungry" in orders:
            self.held = np.zeros(orders["hungry"], np.uint8)  # asked for, not written to
        time.sleep(orders.get("deaf", 0))
        seconds = 60.0 if self.slow else orders.get("seconds", 0)
        steps = max(1, int(seconds / 0.05))
        for step in range(steps):
            progress("infer", step / steps)
            time.sleep(0.05 if seconds else 0)
        if "die" in orders:
            os._exit(9)
        (out / INFERRED).write_text(f"{out.parent.name} {len(self.seen)}")

    def export(self, scan: Path, inferred: Path, out: Path, request: AnalysisRequest, progress: Progress) -> Report:
        self.exported.append((inferred.read_text(), out))
        orders = read(scan)
        progress("export", 0.0)
        if "die_late" in orders:
            os._exit(9)
        if "crash_late" in orders:
            raise ValueError(orders["crash_late"])
        for _ in range(int(orders.get("slow_export", 0) / 0.05) if self.slow_export else 0):
            time.sleep(0.05)
            progress("export", 0.5)
        report = _report(request)
        for name in REQUIRED_NAMES:
            (out / name).write_bytes(name.encode() * 10)
        (out / "report.json").write_text(report.model_dump_json())
        progress("export", 1.0)
        return report


def read(scan: Path) -> dict[str, Any]:
    """The orders."""
    first = scan / "000000" if scan.is_dir() else scan
    orders: dict[str, Any] = json.loads(first.read_bytes()[NIFTI1_BYTES:])
    return orders


def shout(text: str) -> None:
    """Everything that puts words on a process's streams, the last one below Python."""
    sys.stdout.write(text)
    sys.stdout.flush()
    logging.getLogger("pydicom").error(text)
    warnings.warn(text, stacklevel=1)
    thread = threading.Thread(target=int, args=(text,))  # which ends with a traceback
    thread.start()
    thread.join()
    os.write(2, text.encode())


def _report(request: AnalysisRequest) -> Report:
    finding = Finding(
        label=1,
        volume_ml=2.5,
        peak_score=0.5,
        mean_score=0.25,
        centroid_mm=(1.0, -2.0, 3.0),
        box_mm=((0.0, -3.0, 2.0), (2.0, -1.0, 4.0)),
        key_slice=7,
    )
    wide = Range(low=0.0, high=1.0)
    return Report(
        code_version="test",
        model=ModelUsed(id="tiny-0.0.1", sha256="0" * 64, provider="cpu", seed=request.seed or 0, licence="none"),
        input=Input(format="nifti", modality=None, shape=(2, 2, 2), spacing_mm=(1.0, 1.0, 1.0), notes=()),
        analysed=Extent(volume_ml=8.0, slices=2, slices_not_analysed=(), z_mm=(0.0, 1.0)),
        scores=ScoreReport(
            scan=0.5, healthy_scan=wide, slices=(0.5, None), healthy_slice=wide, reconstruction=0.1, outlier_fraction=0.0
        ),
        threshold=0.2,
        extent_threshold=0.1,
        lesion_volume_ml=2.5,
        findings=(finding,),
        absent={BRAIN_NAME: ALONE.problem} | dict.fromkeys(DICOM_NAMES, NOT_FROM_DICOM.problem),
        work=Work(seconds={"read": 0.1, "infer": 2.0}, slices_reversed=1, network_evaluations=10),
    )
