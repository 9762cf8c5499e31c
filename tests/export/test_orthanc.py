"""A real PACS: Orthanc takes source, segmentation and report, and gives them back as they were."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.export.conftest import Written, write

SCRIPT = Path(__file__).parents[2] / "scripts" / "orthanc_round_trip.py"


def test_orthanc_gives_back_what_it_took(written: Written, tmp_path: Path) -> None:
    healthy = write(tmp_path / "healthy", written.scan, ())
    paths = [written.scan.source.instances[0].parent, written.segmentation.parent, healthy.structured_report]
    done = subprocess.run([sys.executable, SCRIPT, *paths], capture_output=True, text=True, check=False)
    if done.returncode == 3 or "unshare failed" in done.stderr:
        pytest.skip((done.stdout + done.stderr).strip())
    assert done.returncode == 0, done.stdout + done.stderr
    count = len(written.scan.source.instances)
    # Two reports: one of them of the scan without a lesion. One patient and one study: they agree.
    seen = {
        "WADO-RS": "identical",
        "C-GET": "identical",
        "patients": 1,
        "studies": 1,
        "series": [["MR", count], ["SEG", 1], ["SR", 1], ["SR", 1]],
    }
    assert json.loads(done.stdout) == {"instances": count + 3, "STOW-RS": seen, "C-STORE": seen}
