"""COUNTERPART_SEG_TYPE reaches the export of a served process."""

import sys
from io import BytesIO
from pathlib import Path

import pydicom

from tests.api.service_process import run_service
from tests.api.support import URL, WAIT
from tests.support.dicom import write_series, zip_files
from tests.support.phantom import brain, with_lesion

SERVE = (sys.executable, "-m", "app.cli", "serve")


def test_segmentation_is_a_label_map_by_setting(tiny_models: Path, tmp_path: Path) -> None:
    paths = write_series(tmp_path / "series", with_lesion(brain(), (25.0, 10.0, 20.0)))
    archive = zip_files(tmp_path / "series.zip", paths)
    settings = {"models": str(tiny_models), "threads": "1", "drain_seconds": "0", "seg_type": "labelmap"}
    with run_service(tmp_path / "store", tmp_path / "log", SERVE, {}, **settings) as service:
        job = service.http.post(URL, content=archive.read_bytes(), headers=WAIT).json()
        made = pydicom.dcmread(BytesIO(service.http.get(job["links"]["segmentation"]).content))
    assert (made.SegmentationType, made.SOPClassUID) == ("LABELMAP", "1.2.840.10008.5.1.4.1.1.66.7")
