from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("torch")

from app.export.outputs import write_nifti
from app.runtime.bundle import load_bundle, shipped_models
from benchmarks import gpu
from benchmarks.device import move_to_device
from benchmarks.gpu import Variant, compare, reason_to_skip
from benchmarks.pack import write_scan_with_lesion
from training.config import ROOT, Config
from training.networks import load_networks

pytestmark = pytest.mark.training


@pytest.mark.parametrize(("float16", "allowed"), [(False, 2e-3), (True, 2e-2)])
def test_torch_in_fixed_batches_equals_the_bundle(*, float16: bool, allowed: float) -> None:
    folder = next(shipped_models().glob("headct-[0-9]*"))
    expected = load_bundle(folder, threads=1, quantised=False).networks
    networks = load_networks(folder, Config.load(ROOT / "training" / "configs" / "headct.toml"))
    found = move_to_device(networks, "cpu", 2, graphs=False, float16=float16, channels_last=float16)
    with np.load(folder / "golden.npz") as golden:
        x, z_t, t = (
            np.concatenate([golden[name]] * 2)[:3] for name in ("x", "z_t", "t")
        )  # a full batch and a partial one
    np.testing.assert_allclose(found.encode(x), expected.encode(x), atol=2e-3)
    predicted = found.denoise(z_t, t)
    assert predicted.shape == z_t.shape
    difference = np.abs(predicted - expected.denoise(z_t, t)).max()
    assert difference <= allowed
    assert (difference > 1e-4) == float16  # float16 was used


def test_results_are_compared_by_mask_map_and_extent() -> None:
    rng = np.random.default_rng(0)
    anomaly = rng.random((20, 20, 20), dtype=np.float32)
    anomaly[0] = np.nan
    mask = np.zeros(anomaly.shape, np.uint8)
    mask[5:10, 5:10, 5:10] = 1
    expected = {"mask": mask, "anomaly": anomaly}
    same = compare(expected, expected)
    assert (same["dice"], same["voxels"], same["difference_max"], same["agrees"]) == (1.0, [125, 125], 0.0, True)
    other = mask.copy()
    other[5:7] = 0
    assert compare({"mask": other, "anomaly": anomaly}, expected)["dice"] == pytest.approx(0.75)
    assert not compare({"mask": other, "anomaly": anomaly}, expected)["agrees"]
    assert not compare({"mask": mask, "anomaly": anomaly + np.float32(0.03)}, expected)["agrees"]
    assert not compare({"mask": mask, "anomaly": np.nan_to_num(anomaly)}, expected)["agrees"]


def test_variants_that_cannot_run_are_skipped() -> None:
    assert reason_to_skip(Variant("torch"), "cpu") is None
    assert "GPU" in str(reason_to_skip(Variant("torch", graphs=True), "cpu"))
    assert "reference" in str(reason_to_skip(Variant("onnxruntime"), "cpu"))


def test_missing_modules_and_files_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "MODULES", ("numpy", "no_such_module"))
    assert gpu.main(["--scan", str(tmp_path / "scan.nii.gz")]) == 1
    problems = capsys.readouterr().err
    assert all(word in problems for word in ("no_such_module", "scan.nii.gz", "--out"))


def test_packed_scan_has_a_lesion(tmp_path: Path) -> None:
    array = np.zeros((60, 60, 40), np.int16)
    array[5:-5, 5:-5, 5:-5] = np.random.default_rng(0).integers(80, 120, (50, 50, 30))
    affine = np.diag([-2.0, 2.0, 3.0, 1.0])
    write_nifti(tmp_path / "healthy.nii.gz", array, affine, 1, "tests")
    write_scan_with_lesion(tmp_path / "healthy.nii.gz", tmp_path / "scan.nii.gz")
    image = nib.load(tmp_path / "scan.nii.gz")
    assert isinstance(image, nib.Nifti1Image)
    np.testing.assert_array_equal(image.affine, affine)
    changed = np.asarray(image.dataobj) - array
    assert image.get_data_dtype() == np.int16
    volume_mm3 = int((changed > 8).sum()) * 12  # half of 0.5 * 40
    assert volume_mm3 == pytest.approx(4 / 3 * np.pi * 8**3, rel=0.15)
    # 30 mm to the right of the centre. The first axis points to the left.
    assert np.argwhere(changed > 8).mean(axis=0) == pytest.approx([29.5 - 15, 29.5, 19.5], abs=0.5)
