"""The diagnosis begins with the map that is served, and gives each step what it says."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from app.pipeline.prepare import to_slices
from training.data import load_scan
from training.experiments import bounds, methods
from training.experiments.cases import synthetic
from training.experiments.experiment import Experiment
from training.experiments.pages import bounds_section
from training.experiments.segmentation import judged

pytestmark = pytest.mark.training


def test_a_latent_is_touched_by_any_of_its_pixels() -> None:
    truth = np.zeros((2, 8, 12), np.bool_)
    truth[1, 3, 4] = True
    found = bounds.touched(truth, (2, 2, 3))
    assert np.argwhere(found).tolist() == [[1, 0, 1]]


@pytest.mark.data
def test_the_first_step_is_what_is_served_and_the_others_know_more(real_scans: Path) -> None:
    assert real_scans.exists()
    e = Experiment("headct")
    (case,) = islice(synthetic(e.config, e.manifest, "validation"), 1)
    healthy = to_slices(load_scan(e.config, case.subject).volume, e.manifest.preparation).x[case.known]
    found = bounds.maps(case, healthy, e.models, e.manifest)
    served = methods.ours(e.models, e.manifest)(case)
    np.testing.assert_allclose(judged(found[bounds.SHIPPED], case), judged(served, case), atol=1e-5)
    inside = case.truth & case.judged
    beside = case.judged & ~case.truth
    for step in (bounds.MASK, bounds.COUNTERPART):
        assert found[step][inside].mean() > 5 * found[step][beside].mean()
    assert found[bounds.UNMASKED][beside].mean() > found[bounds.COUNTERPART][beside].mean()


def test_nothing_is_told_before_it_was_measured() -> None:
    assert bounds_section(None) == []
