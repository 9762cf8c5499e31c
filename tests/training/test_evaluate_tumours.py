"""Tests of tumour scores from histograms, against values computed by hand."""

import numpy as np
import pytest

pytest.importorskip("torch")

from app.runtime.bundle import read_manifest
from training.config import ROOT, Config
from training.evaluate_tumours import (
    count_voxels,
    manifest_of_stacks,
    patient_intervals,
    pooled_dice,
    pooled_precision,
    slice_dice,
)

pytestmark = pytest.mark.training

# Two slices of four voxels. The first has two tumour voxels, one of them with the highest value. The second has none.
VALUES = np.array([[0.9, 0.8, 0.5, np.nan], [0.7, 0.1, 0.0, 0.0]], np.float32).T[:, None, :]
TRUTH = np.array([[True, False, True, False], [False] * 4]).T[:, None, :]


def test_every_voxel_is_counted_and_nan_counts_as_zero() -> None:
    counts = count_voxels(VALUES, TRUTH)
    assert counts.sum(axis=2).tolist() == [[2, 2], [4, 0]]
    assert counts[0, 0, 0] == 1


def test_best_dice_and_average_precision() -> None:
    counts = count_voxels(VALUES, TRUTH)
    # In order: hit, miss, miss (second slice), hit. Best: only the first, 2 / (1 + 2), or all four, 4 / (4 + 2).
    assert pooled_dice(counts) == pytest.approx(2 / 3)
    assert pooled_precision(counts) == pytest.approx(0.5 * 1 + 0.5 * 2 / 4)
    assert slice_dice(counts) == pytest.approx(4 / 5)  # hit, miss, hit: 2 * 2 / (3 + 2)


def test_values_above_one_keep_their_order() -> None:
    assert pooled_precision(count_voxels(VALUES * 20, TRUTH)) == pooled_precision(count_voxels(VALUES, TRUTH))
    assert count_voxels(np.where(VALUES > 0.85, np.inf, VALUES), TRUTH).sum(axis=2).tolist() == [[2, 2], [4, 0]]
    assert pooled_dice(count_voxels(VALUES * 20, TRUTH)) == pooled_dice(count_voxels(VALUES, TRUTH))


def test_intervals_are_over_patients() -> None:
    perfect = count_voxels(TRUTH.astype(np.float32), TRUTH)
    blind = count_voxels(np.zeros_like(VALUES), TRUTH)
    draws = np.array([[0, 0], [1, 1]])
    found = patient_intervals([perfect, blind], draws)
    assert found["auprc"][1] == pytest.approx(0.25 + 0.025 * 0.75)  # only blind: the tumour's share, 2 of 8
    assert found["auprc"][2] == pytest.approx(1 - 0.025 * 0.75)


def test_analysed_height_of_a_stack_does_not_count_the_missing_top_of_the_head() -> None:
    config = Config.load(ROOT / "training" / "configs" / "flair.toml")
    manifest = read_manifest(config.bundle_folder)
    before, after = manifest.preprocessing.head_box, manifest_of_stacks(manifest, config).preprocessing.head_box
    assert before is not None
    assert after is not None
    assert (before.reach_mm, after.reach_mm) == (115.0, 96.0)
    headct = Config.load(ROOT / "training" / "configs" / "headct.toml")
    whole = read_manifest(headct.bundle_folder)
    assert manifest_of_stacks(whole, headct) == whole, "headct analyses whole stacks"
