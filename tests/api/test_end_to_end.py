"""The service with a real bundle: tiny ONNX graphs, a real scan in, its mask out."""

from pathlib import Path

import nibabel as nib
import numpy as np
from fastapi.testclient import TestClient
from nibabel.spatialimages import SpatialImage

from app.main import create_app
from app.settings import Settings
from tests.support.phantom import brain


def test_a_scan_becomes_its_mask(tmp_path: Path, tiny_models: Path) -> None:
    head = brain()
    sent = tmp_path / "head.nii.gz"
    nib.save(nib.Nifti1Image(head.array, head.affine), sent)
    settings = Settings(store=str(tmp_path / "store"), models=tiny_models, threads=1, drain_seconds=0)
    with TestClient(create_app(settings)) as client:
        answer = client.post("/v1/scans", content=sent.read_bytes(), headers={"Prefer": "wait=60"})
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == "tiny-0.0.1"
        links = answer.json()["links"]
        fetched = tmp_path / "mask.nii.gz"
        fetched.write_bytes(client.get(links["mask"]).content)
        report = client.get(links["report"]).json()
        assert client.get(links["preview"]).content.startswith(b"\x89PNG")
        assert client.get("/readyz").json()["models"] == ["tiny-0.0.1"]
    mask = nib.load(fetched)
    assert isinstance(mask, SpatialImage)
    assert mask.shape == head.shape
    assert np.array_equal(mask.affine, head.affine)
    assert report["lesion_volume_ml"] == answer.json()["lesion_volume_ml"]
    assert int(np.asarray(mask.dataobj).sum()) * head.voxel_ml == report["lesion_volume_ml"]
