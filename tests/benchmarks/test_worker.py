from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("torch")

from benchmarks.rows import BY_NAME, SERVICE
from benchmarks.worker import Inputs, RowProcess, choose_evenly
from tests.support.phantom import brain, grid
from training.config import ROOT


def test_row_runs_in_a_process_of_its_own(tiny_models: Path, tmp_path: Path) -> None:
    head = brain((52, 64, 48), grid((52, 64, 48)))
    nib.save(nib.Nifti1Image(head.array, head.affine), tmp_path / "scan.nii.gz")
    bundle = next(path.parent for path in tiny_models.glob("tiny-*/manifest.json"))
    process = RowProcess(BY_NAME[SERVICE], Inputs(bundle, ROOT / "training/configs/t1.toml", tmp_path / "scan.nii.gz"))
    try:
        assert process.call("warm_up") == {}
        measured = process.call("time")
        memory = process.call("memory")
    finally:
        process.close()
    assert measured["slices"] == measured["sample"] > 0
    assert measured["counts"]["encode"] >= measured["slices"]
    assert 0 < measured["seconds"] < 60
    assert measured["loop_seconds"] == 0
    assert memory["peak_bytes"] > 50e6
    assert process.cold_seconds > 0


def test_indices_are_chosen_evenly() -> None:
    assert choose_evenly(np.arange(10, 21), 3).tolist() == [10, 15, 20]
