"""A fake engine that obeys orders inside the scan, fake scans with such orders, and helpers for API tests."""

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

import httpx2
import numpy as np

from app import errors
from app.analysis import AnalysisRequest, Progress
from app.export.outputs import BRAIN_NAME, DICOM_NAMES, REQUIRED_NAMES
from app.export.report import Cost, Extent, Finding, Input, ModelUsed, Report, ScoreReport
from app.jobs.engine import INFERENCE_FILE
from app.manifest import Manifest, Range
from app.runtime.session import Provider
from app.site_profile import SiteProfile
from tests.support.bundle import tiny_manifest

URL = "/v1/scans"
# Without a token, the service accepts loopback names only.
BASE_URL = "http://127.0.0.1"
WAIT = {"Prefer": "wait=120"}
# Seconds. Far more than any test needs, because the machine may be busy.
TIMEOUT_SECONDS = 180

NIFTI1_BYTES = 348
NO_BRAIN_MASK = errors.NoBrainMask("Found.", expected="expected.", advice="Advice.")
NOT_FROM_DICOM = errors.NotFromDicom("Found.", expected="expected.", advice="Advice.")
PATIENT_NAME = "Zweistein-4711"


def fake_scan(**orders: object) -> bytes:
    """Return bytes that begin like a NIfTI file and contain orders for `FakeEngine`.

    Parameters
    ----------
    **orders
        During inference, in this order:
        `raise_error` (name of a class in `app.errors`), `log_text` (text for every output stream),
        `raise_value_error` (text of a ValueError), `allocate_bytes`, `ignore_messages_seconds` (sleep without
        progress), `seconds` (sleep with progress), `exit_process`.
        During export: `exit_process_in_export`, `raise_in_export` (text of a ValueError), `export_seconds`.
        Any other keyword only makes the bytes different.
    """
    header = np.zeros(NIFTI1_BYTES, np.uint8)
    header[:4] = np.frombuffer(NIFTI1_BYTES.to_bytes(4, "little"), np.uint8)
    header[344:] = np.frombuffer(b"n+1\0", np.uint8)
    return header.tobytes() + json.dumps(orders).encode().ljust(300)


def send(http: httpx2.Client, *, wait: bool = True, query: str = "", **orders: object) -> httpx2.Response:
    """Post a fake scan, and wait for its end by default."""
    return http.post(f"{URL}{query}", content=fake_scan(**orders), headers=WAIT if wait else {})


def send_running(http: httpx2.Client, **orders: object) -> str:
    """Post a fake scan that takes a minute, wait until it runs, and return the id of its job."""
    job: str = http.post(URL, content=fake_scan(**{"seconds": 60, **orders})).json()["id"]
    wait_for_state(http, job, "running")
    return job


def wait_for_state(http: httpx2.Client, job: str, state: str) -> dict[str, Any]:
    """Poll a job until it has a state, and return it."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        shown: dict[str, Any] = http.get(f"{URL}/{job}").json()
        if shown["state"] == state:
            return shown
        time.sleep(0.03)
    raise AssertionError(f"{job} did not reach {state}: {shown}")


class FakeEngine:
    """Engine that writes small files and records its calls.

    Attributes
    ----------
    inferences : list of (Path, Request)
        Arguments of each call of `infer`.
    exports : list of (str, Path)
        Text of the inference file and output folder of each call of `export`.
    warm_up_error : CounterpartError or None
        Raised by `warm_up`.
    is_slow : bool
        Each inference takes a minute, whatever the scan orders.
    export_seconds : float or None
        Used instead of the order `export_seconds`.
    """

    provider: Provider = "cpu"

    def __init__(self) -> None:
        self.manifests: Sequence[Manifest] = [tiny_manifest()]
        self.inferences: list[tuple[Path, AnalysisRequest]] = []
        self.exports: list[tuple[str, Path]] = []
        self.warm_up_error: errors.CounterpartError | None = None
        self.is_slow = False
        self.export_seconds: float | None = None
        self._allocated = np.zeros(0, np.uint8)

    def card(self, model: str) -> str | None:
        return f"# {model}"

    settings_key = ""

    def profiles(self, model: str) -> Sequence[SiteProfile]:  # noqa: ARG002
        return ()

    def warm_up(self) -> None:
        if self.warm_up_error:
            raise self.warm_up_error

    def close(self) -> None:
        pass

    def infer(self, scan: Path, out: Path, request: AnalysisRequest, progress: Progress) -> None:
        self.inferences.append((scan, request))
        orders = read_orders(scan)
        progress("read", 1.0)
        if "raise_error" in orders:
            raise getattr(errors, orders["raise_error"])("Found.", expected="expected.", advice="Advice.")
        if "log_text" in orders:
            write_to_all_streams(orders["log_text"])
        if "raise_value_error" in orders:
            raise ValueError(orders["raise_value_error"])
        if "allocate_bytes" in orders:
            self._allocated = np.zeros(orders["allocate_bytes"], np.uint8)
        time.sleep(orders.get("ignore_messages_seconds", 0))
        seconds = 60.0 if self.is_slow else orders.get("seconds", 0)
        steps = max(1, int(seconds / 0.05))
        for step in range(steps):
            progress("infer", step / steps)
            time.sleep(0.05 if seconds else 0)
        if "exit_process" in orders:
            os._exit(9)
        (out / INFERENCE_FILE).write_text(f"{out.parent.name} {len(self.inferences)}")

    def export(self, scan: Path, inferred: Path, out: Path, request: AnalysisRequest, progress: Progress) -> Report:
        self.exports.append((inferred.read_text(), out))
        orders = read_orders(scan)
        progress("export", 0.0)
        if "exit_process_in_export" in orders:
            os._exit(9)
        if "raise_in_export" in orders:
            raise ValueError(orders["raise_in_export"])
        seconds = orders.get("export_seconds", 0) if self.export_seconds is None else self.export_seconds
        for _ in range(int(seconds / 0.05)):
            time.sleep(0.05)
            progress("export", 0.5)
        report = _create_report(request)
        for name in REQUIRED_NAMES:
            (out / name).write_bytes(name.encode() * 10)
        (out / "report.json").write_text(report.model_dump_json())
        progress("export", 1.0)
        return report


def read_orders(scan: Path) -> dict[str, Any]:
    """Return the orders in a fake scan, or in the first file of a folder of them."""
    first = scan / "000000" if scan.is_dir() else scan
    orders: dict[str, Any] = json.loads(first.read_bytes()[NIFTI1_BYTES:])
    return orders


def write_to_all_streams(text: str) -> None:
    """Write a text in every way that a library can: print, log, warning, traceback of a thread, and from C."""
    sys.stdout.write(text)
    sys.stdout.flush()
    logging.getLogger("pydicom").error(text)
    warnings.warn(text, stacklevel=1)
    thread = threading.Thread(target=int, args=(text,))  # prints a traceback
    thread.start()
    thread.join()
    os.write(2, text.encode())


def _create_report(request: AnalysisRequest) -> Report:
    finding = Finding(
        label=1,
        volume_ml=2.5,
        peak_score=0.5,
        mean_score=0.25,
        centroid_mm=(1.0, -2.0, 3.0),
        box_mm=((0.0, -3.0, 2.0), (2.0, -1.0, 4.0)),
        key_slice=7,
    )
    unit_range = Range(low=0.0, high=1.0)
    return Report(
        code_version="test",
        model=ModelUsed(id="tiny-0.0.1", sha256="0" * 64, provider="cpu", seed=request.seed or 0, licence="none"),
        input=Input(format="nifti", modality=None, shape=(2, 2, 2), spacing_mm=(1.0, 1.0, 1.0), notes=()),
        analysed=Extent(volume_ml=8.0, slices=2, slices_not_analysed=(), z_mm=(0.0, 1.0)),
        scores=ScoreReport(
            scan=0.5,
            healthy_scan=unit_range,
            slices=(0.5, None),
            healthy_slice=unit_range,
            reconstruction=0.1,
            outlier_fraction=0.0,
        ),
        threshold=0.2,
        extent_threshold=0.1,
        lesion_volume_ml=2.5,
        findings=(finding,),
        absent={BRAIN_NAME: NO_BRAIN_MASK.problem} | dict.fromkeys(DICOM_NAMES, NOT_FROM_DICOM.problem),
        work=Cost(seconds={"read": 0.1, "infer": 2.0}, slices_reversed=1, network_evaluations=10),
    )
