"""Large lesions are as large as they say, and the gate is asked as it is served."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from app.manifest import Manifest
from app.volume import Volume
from tests.support.phantom import brain, grid
from training.config import ROOT, Config
from training.experiments import gate
from training.experiments.pages import large_lines
from training.splits import load_split

pytestmark = pytest.mark.training


def test_a_ball_has_its_volume_and_place() -> None:
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = (-60, -80, -40)
    grid = np.zeros((60, 70, 60), np.float32)
    grid[0, 0, 0] = 1
    found = gate.ball(30.0, Volume(grid, affine))
    assert found.array.sum() * found.voxel_ml == pytest.approx(30, rel=0.03)
    centre = np.argwhere(found.array > 0).mean(axis=0) * 2 + affine[:3, 3]
    assert np.abs(centre - gate.CENTRE_MM).max() < 1


def test_the_gate_alone_is_the_gate_that_is_served() -> None:
    folder = next((ROOT / "models").glob("t1-*"))
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_text())
    asked = gate.alone(manifest)
    assert asked.ood == manifest.ood
    assert asked.kl.timesteps == manifest.kl.timesteps
    assert asked.kl.threshold > 1e30
    assert len(asked.views) == 1


def configured(name: str) -> Config:
    return Config.load(ROOT / "training" / "configs" / f"{name}.toml")


def test_pictures_get_ellipses() -> None:
    headct = configured("headct")
    found = gate.inserts(headct, load_split(headct.data.splits))
    assert list(found) == ["ellipses of 30 mm in one picture of 3", "ellipses of 30 mm in one picture of 2"]
    heads = brain((64, 64, 12), grid((64, 64, 12), (3.8, 3.8, 5.0)))
    heads = Volume(heads.array / heads.array.max() * 60, heads.affine)
    shown = [found[name](heads, 0.35, 0).truth.any(axis=(0, 1)).sum() for name in found]
    assert 0 < shown[0] < shown[1] <= 6


@pytest.mark.data
def test_brains_get_shapes_and_balls(real_scans: Path) -> None:
    assert real_scans.exists()
    t1 = configured("t1")
    names = list(gate.inserts(t1, load_split(t1.data.splits)))
    assert names == ["the two largest shapes", "all 5 shapes", "a ball of 30 ml", "a ball of 60 ml"]


def rows(refused: int) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [
        {"subject": f"sub-{i % 4}", "shape": "ball", "truth_ml": 25.0 + i, "outcome": "analysed"} for i in range(20)
    ]
    for row in made[:refused]:
        row["outcome"] = "out_of_distribution"
    return [*made, {"subject": "sub-0", "shape": "ball", "truth_ml": 19.0, "outcome": "out_of_distribution"}]


def test_only_large_lesions_count() -> None:
    found = gate.summary(rows(refused=4))
    assert (found["scans"], found["too_small"], found["refused"]) == (20, 1, 4)
    assert found["share"]["value"] == pytest.approx(0.2)


@pytest.mark.parametrize(("refused", "told"), [(1, "5%, which is reached"), (4, "5%, which is missed")])
def test_the_page_compares_with_the_aim(refused: int, told: str) -> None:
    hashes = dict.fromkeys(("bundle_sha256", "detection_sha256", "split_sha256", "data_sha256"), "0" * 64)
    p = {"bundle": "t1-9.9.9", "split": "s.json", "seed": 1, "code": "abc", "threads": 1, **hashes}
    made = rows(refused)
    page = "\n".join(large_lines({"bundles": {"t1": {"provenance": p, "summary": gate.summary(made), "rows": made}}}))
    assert told in page
    assert "of 20 healthy test scans with a synthetic lesion of 25 to 44 ml (ball; bright and dark, grade 3)" in page
    assert f"{refused} are refused" in page
    assert large_lines(None) == []
