"""The diagnosis begins with the map that is served, and gives each step what it says."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from training.experiments import bounds, methods
from training.experiments.cases import GRADES, make_case, sprites
from training.experiments.experiment import Experiment
from training.experiments.pages import bounds_section
from training.experiments.segmentation import judged
from training.splits import load_split

pytestmark = pytest.mark.training


def test_a_latent_is_touched_by_any_of_its_pixels() -> None:
    truth = np.zeros((2, 8, 12), np.bool_)
    truth[1, 3, 4] = True
    found = bounds.touched(truth, (2, 2, 3))
    assert np.argwhere(found).tolist() == [[1, 0, 1]]


def test_an_edge_is_a_pixel_on_either_side_within_a_slice() -> None:
    truth = np.zeros((3, 9, 9), np.bool_)
    truth[1, 2:7, 2:7] = True
    edge = bounds.edges(truth)
    assert not edge[[0, 2]].any()
    assert edge[1, 1:8, 1:8].sum() == 49 - 9
    assert not edge[1, 3:6, 3:6].any()


@pytest.mark.data
def test_the_first_step_is_what_is_served_and_the_others_know_more(real_scans: Path) -> None:
    assert real_scans.exists()
    e = Experiment("headct")
    # One view of the four, for time.
    manifest = e.manifest.model_copy(update={"views": e.manifest.views[:1]})
    subject = load_split(e.config.data.splits).validation[0]
    made = sprites(e.config)(subject, GRADES["grade 3"], 0)
    case = make_case(subject, "grade 3", made.volume, made.truth, manifest)
    healthy = bounds.healthy_slices(e.config, case, manifest)
    found = bounds.maps(case, healthy, e.networks, manifest)
    served = methods.ours(e.networks, manifest)(case)
    np.testing.assert_allclose(judged(found[bounds.SHIPPED], case), judged(served, case), atol=1e-5)
    apart = np.isfinite(found[bounds.NO_EDGES])
    np.testing.assert_array_equal(apart, ~bounds.edges(case.truth))
    np.testing.assert_array_equal(found[bounds.NO_EDGES][apart], found[bounds.SHIPPED][apart])
    left = bounds.truth_of(bounds.NO_EDGES, case)
    assert 0 < left.sum() < case.truth.sum()
    assert np.isfinite(judged(found[bounds.NO_EDGES], case)[left & case.judged]).all()
    assert bounds.truth_of(bounds.SHIPPED, case) is case.truth
    inside = case.truth & case.judged
    beside = case.judged & ~case.truth
    assert found[bounds.NO_FALSE][beside].sum() < found[bounds.SHIPPED][beside].sum()
    assert found[bounds.NO_MISSED][inside].sum() >= found[bounds.NO_FALSE][inside].sum()
    # Without a mask, it is the healthy slices that tell where the lesion is: another patient's do not.
    told = found[bounds.UNMASKED]
    assert told[inside].mean() > 3 * told[beside].mean()
    others = bounds.maps(case, healthy[::-1].copy(), e.networks, manifest)[bounds.UNMASKED]
    assert others[inside].mean() < 2 * others[beside].mean()


def test_the_page_has_a_row_for_each_step_and_a_column_for_each_grade() -> None:
    number = {"value": 0.5, "low": 0.4, "high": 0.6}
    rows = {step: {"auprc": number, "dice": number, "cases": 6} for step in bounds.STEPS}
    hashes = dict.fromkeys(("bundle_sha256", "detection_sha256", "split_sha256", "data_sha256"), "0" * 64)
    told = {"bundle": "t1-9.9.9", "split": "s.json", "seed": 1, "code": "abc", "threads": 1, **hashes}
    document = {"bundles": {"t1": {"provenance": told, "grades": dict.fromkeys(GRADES, rows)}}}
    table = [line for line in bounds_section(document) if line.startswith("|")]
    assert len(table) == 2 + len(bounds.STEPS)
    assert {line.count("|") for line in table} == {2 + len(GRADES)}
    assert bounds_section(None) == []
