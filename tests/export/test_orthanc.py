"""Orthanc, a PACS, stores the source and the DICOM results and returns them unchanged."""

import json
import sys
from pathlib import Path
from typing import Any

from tests.export.conftest import DicomResults, write_results
from tests.support.external_tools import run_or_skip

SCRIPT = Path(__file__).parents[1] / "proofs" / "orthanc_round_trip.py"


def test_orthanc_returns_every_instance_unchanged(results: DicomResults, tmp_path: Path) -> None:
    healthy = write_results(tmp_path / "healthy", results.scan, ())
    paths = [results.scan.source.instances[0].parent, results.segmentation.parent, healthy.structured_report]
    count = len(results.scan.source.instances)
    # Two reports: with lesions, and of the same scan without a lesion.
    expected = {
        "WADO-RS": "identical",
        "C-GET": "identical",
        "patients": 1,
        "studies": 1,
        "series": [["MR", count], ["OT", 1], ["OT", 1], ["SEG", 1], ["SR", 1], ["SR", 1]],
    }
    assert round_trip(*paths) == {"instances": count + 5, "STOW-RS": expected, "C-STORE": expected}


def test_orthanc_returns_a_label_map_unchanged(results: DicomResults, tmp_path: Path) -> None:
    """Orthanc 1.10 and dcmtk 3.6.7 do not know the class for C-STORE and C-GET."""
    made = write_results(tmp_path, results.scan, segmentation_type="labelmap")
    outcome = {"WADO-RS": "identical", "patients": 1, "studies": 1, "series": [["SEG", 1]]}
    assert round_trip("--web-only", made.segmentation) == {"instances": 1, "STOW-RS": outcome}


def round_trip(*arguments: str | Path) -> dict[str, Any]:
    """Run the script, or skip the test if a program is not installed."""
    outcome: dict[str, Any] = json.loads(run_or_skip([sys.executable, SCRIPT, *arguments]).stdout)
    return outcome
