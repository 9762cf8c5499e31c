"""Orthanc stores a series at the service, the service pulls it from Orthanc, and Orthanc retrieves the results."""

import json
import sys
from pathlib import Path

from tests.support.dicom import write_series
from tests.support.external_tools import run_or_skip
from tests.support.phantom import brain, with_lesion

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "tests.proofs.orthanc_dicomweb")


def test_orthanc_and_the_service_exchange_a_scan_and_its_results(tiny_models: Path, tmp_path: Path) -> None:
    paths = write_series(tmp_path / "series", with_lesion(brain(), (25.0, 10.0, 20.0)))
    command = [*COMMAND, str(tmp_path / "series"), "--models", str(tiny_models)]
    done = run_or_skip(command, cwd=ROOT)
    # The pulled series has the bytes of the pushed one, so it is the same job.
    assert json.loads(done.stdout) == {
        "instances": len(paths),
        "pushed": "succeeded",
        "jobs": 1,
        "pulled": "succeeded",
        "series before": [["MR", len(paths)]],
        "series after": [["MR", len(paths)], ["OT", 1], ["OT", 1], ["SEG", 1], ["SR", 1]],
    }
