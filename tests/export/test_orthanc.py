"""Orthanc, a PACS, stores the source and the DICOM results and returns them unchanged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.export.conftest import DicomResults, write_results

SCRIPT = Path(__file__).parents[1] / "proofs" / "orthanc_round_trip.py"


def test_orthanc_returns_every_instance_unchanged(results: DicomResults, tmp_path: Path) -> None:
    healthy = write_results(tmp_path / "healthy", results.scan, ())
    paths = [results.scan.source.instances[0].parent, results.segmentation.parent, healthy.structured_report]
    done = subprocess.run([sys.executable, SCRIPT, *paths], capture_output=True, text=True, check=False)
    if done.returncode == 3 or "unshare failed" in done.stderr:
        pytest.skip((done.stdout + done.stderr).strip())
    assert done.returncode == 0, done.stdout + done.stderr
    count = len(results.scan.source.instances)
    # Two reports: with lesions, and of the same scan without a lesion.
    expected = {
        "WADO-RS": "identical",
        "C-GET": "identical",
        "patients": 1,
        "studies": 1,
        "series": [["MR", count], ["SEG", 1], ["SR", 1], ["SR", 1]],
    }
    assert json.loads(done.stdout) == {"instances": count + 3, "STOW-RS": expected, "C-STORE": expected}
