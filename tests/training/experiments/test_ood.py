"""Large lesions and the out-of-distribution check."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from app.manifest import Manifest
from app.volume import Volume
from tests.support.phantom import brain, grid
from tests.training.experiments.test_results_cache import NOW
from training.config import ROOT, Config
from training.data import load_split
from training.experiments import ood
from training.experiments.manifests import only_ood_check
from training.experiments.results import LargeLesion, OodProvenance

pytestmark = pytest.mark.training


def test_ball_has_its_volume_and_centre() -> None:
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = (-60, -80, -40)
    grid = np.zeros((60, 70, 60), np.float32)
    grid[0, 0, 0] = 1
    found = ood.make_ball(30.0, Volume(grid, affine))
    assert found.array.sum() * found.voxel_ml == pytest.approx(30, rel=0.03)
    centre = np.argwhere(found.array > 0).mean(axis=0) * 2 + affine[:3, 3]
    assert np.abs(centre - ood.CENTRE_MM).max() < 1


def test_check_alone_is_the_served_check() -> None:
    folder = next((ROOT / "models").glob("t1-[0-9]*"))
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_text())
    checked = only_ood_check(manifest)
    assert checked.ood == manifest.ood
    assert checked.kl.timesteps == manifest.kl.timesteps
    assert checked.kl.threshold > 1e30
    assert len(checked.views) == 1


def configured(name: str) -> Config:
    return Config.load(ROOT / "training" / "configs" / f"{name}.toml")


def test_ellipses_are_inserted_into_pictures() -> None:
    headct = configured("headct")
    found = ood.make_inserters(headct, load_split(headct.data.splits))
    assert list(found) == ["ellipses of 30 mm in one picture of 3", "ellipses of 30 mm in one picture of 2"]
    heads = brain((64, 64, 12), grid((64, 64, 12), (3.8, 3.8, 5.0)))
    heads = Volume(heads.array / heads.array.max() * 60, heads.affine)
    shown = [found[name](heads, 0.35, 0).truth.any(axis=(0, 1)).sum() for name in found]
    assert 0 < shown[0] < shown[1] <= 6


@pytest.mark.data
def test_shapes_and_balls_are_inserted_into_brains(real_scans: Path) -> None:
    assert real_scans.exists()
    t1 = configured("t1")
    names = list(ood.make_inserters(t1, load_split(t1.data.splits)))
    assert names == ["the two largest shapes", "all 5 shapes", "a ball of 30 ml", "a ball of 60 ml"]


def test_only_large_lesions_count() -> None:
    sizes = [25.0 + i for i in range(20)]
    rows = [
        LargeLesion(
            subject=f"sub-{i % 4}",
            shape="ball",
            contrast=0.35,
            truth_ml=ml,
            outcome="out_of_distribution" if i < 4 or ml < ood.LARGE_ML else "analysed",
        )
        for i, ml in enumerate([*sizes, 19.0])
    ]
    found = ood.summarise(rows, OodProvenance(**NOW.model_dump(), ood_sha256="0" * 64))
    assert (found.scans, found.too_small, found.refused) == (20, 1, 4)
    assert found.share.value == pytest.approx(0.2)
