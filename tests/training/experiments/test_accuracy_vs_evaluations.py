"""Settings and cases of the accuracy against evaluations."""

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

pytest.importorskip("torch")

from app.manifest import KlMap, Manifest
from app.pipeline.diffusion import Networks
from training.config import ROOT
from training.experiments import accuracy_vs_evaluations as curve
from training.experiments.ablation import KlCalibration
from training.experiments.cases import Case
from training.experiments.manifests import changed

pytestmark = pytest.mark.training


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    folder = next((ROOT / "models").glob("t1-[0-9]*"))
    return Manifest.model_validate_json((folder / "manifest.json").read_text())


class Calibration:
    """Records the noise levels that need another threshold."""

    def __init__(self, manifest: Manifest) -> None:
        self.kl = manifest.kl
        self.levels: list[tuple[int, ...]] = []

    def change(self, *, timesteps: tuple[int, ...]) -> KlMap:
        self.levels.append(timesteps)
        return changed(self.kl, timesteps=timesteps, threshold=0.5)


def test_point_changes_views_levels_and_steps_only(manifest: Manifest) -> None:
    calibration = cast("KlCalibration", Calibration(manifest))
    own = curve.shipped_point(manifest)
    assert curve.apply_point(manifest, own, calibration) == manifest
    made = curve.apply_point(manifest, curve.Point(1, (5, 20), (200, 50)), calibration)
    assert cast("Calibration", calibration).levels == [(5, 20)]
    assert (made.kl.timesteps, made.kl.threshold, made.reverse.timesteps) == ((5, 20), 0.5, (200, 50))
    assert made.views == manifest.views[:1]
    assert changed(made, views=manifest.views, kl=manifest.kl, reverse=manifest.reverse) == manifest


def test_shipped_setting_is_measured(manifest: Manifest) -> None:
    assert curve.shipped_point(manifest) in curve.POINTS
    assert len(set(curve.POINTS)) == len({p.label for p in curve.POINTS}) == len(curve.POINTS)


def test_evaluations_are_counted_by_slices() -> None:
    counting = curve.CountingNetworks(Networks(lambda x: x, lambda z, _: 2 * z, lambda z: z))
    z = np.ones((5, 3, 2, 2), np.float32)
    assert counting.networks.denoise(z, np.zeros(5, np.int64))[0, 0, 0, 0] == 2
    counting.networks.denoise(z[:2], np.zeros(2, np.int64))
    assert counting.evaluations == 7


def test_cases_are_spread_over_subjects_and_grades() -> None:
    empty: Any = None
    none = np.zeros((0, 1, 1), bool)
    plain = Case("", "", empty, empty, np.zeros(0, np.int64), none, none)
    kinds = ("grade 1", *curve.GRADES)
    every = [replace(plain, subject=str(i), kind=kind) for kind in kinds for i in range(29)]
    chosen = curve.choose_cases(every, 8)
    assert [c.kind for c in chosen] == ["grade 2"] * 4 + ["grade 3"] * 4
    for kind in curve.GRADES:
        assert len({c.subject for c in chosen if c.kind == kind}) == 4
    assert chosen == curve.choose_cases(every, 8)
