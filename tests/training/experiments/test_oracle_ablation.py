"""Steps of the oracle ablation."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from training.data import load_split
from training.experiments import oracle_ablation
from training.experiments.cases import GRADES, ellipse_inserter, make_case
from training.experiments.experiment import Experiment
from training.experiments.segmentation import counterpart_map, mask_map

pytestmark = pytest.mark.training


def test_latent_with_any_lesion_pixel_is_a_lesion_latent() -> None:
    truth = np.zeros((2, 8, 12), np.bool_)
    truth[1, 3, 4] = True
    found = oracle_ablation.lesion_latents(truth, (2, 2, 3))
    assert np.argwhere(found).tolist() == [[1, 0, 1]]


def test_edge_is_a_pixel_on_either_side_in_plane() -> None:
    truth = np.zeros((3, 9, 9), np.bool_)
    truth[1, 2:7, 2:7] = True
    edge = oracle_ablation.edge_pixels(truth)
    assert not edge[[0, 2]].any()
    assert edge[1, 1:8, 1:8].sum() == 49 - 9
    assert not edge[1, 3:6, 3:6].any()


@pytest.mark.data
def test_first_step_is_the_served_map_and_later_ones_are_better(real_scans: Path) -> None:
    assert real_scans.exists()
    e = Experiment("headct")
    # One view of the four, for time.
    manifest = e.manifest.model_copy(update={"views": e.manifest.views[:1]})
    subject = load_split(e.config.data.splits).validation[0]
    made = ellipse_inserter(e.config)(subject, GRADES["grade 3"], 0)
    case = make_case(subject, "grade 3", made.volume, made.truth, manifest)
    healthy = oracle_ablation.load_healthy_slices(e.config, case, manifest)
    found = oracle_ablation.compute_maps(case, healthy, e.networks, manifest)
    served = counterpart_map(e.networks, manifest)(case)
    np.testing.assert_allclose(mask_map(found[oracle_ablation.SHIPPED], case), mask_map(served, case), atol=1e-5)
    kept = np.isfinite(found[oracle_ablation.NO_EDGES])
    np.testing.assert_array_equal(kept, ~oracle_ablation.edge_pixels(case.truth))
    np.testing.assert_array_equal(found[oracle_ablation.NO_EDGES][kept], found[oracle_ablation.SHIPPED][kept])
    left = oracle_ablation.truth_of(oracle_ablation.NO_EDGES, case)
    assert 0 < left.sum() < case.truth.sum()
    assert np.isfinite(mask_map(found[oracle_ablation.NO_EDGES], case)[left & case.evaluated]).all()
    assert oracle_ablation.truth_of(oracle_ablation.SHIPPED, case) is case.truth
    inside = case.truth & case.evaluated
    beside = case.evaluated & ~case.truth
    assert found[oracle_ablation.NO_FALSE_ALARMS][beside].sum() < found[oracle_ablation.SHIPPED][beside].sum()
    assert found[oracle_ablation.NO_MISSES][inside].sum() >= found[oracle_ablation.NO_FALSE_ALARMS][inside].sum()
    # Without a mask, the lesion is found because the healthy slices are those of the same patient.
    unmasked = found[oracle_ablation.NO_MASK]
    assert unmasked[inside].mean() > 3 * unmasked[beside].mean()
    others = oracle_ablation.compute_maps(case, healthy[::-1].copy(), e.networks, manifest)[oracle_ablation.NO_MASK]
    assert others[inside].mean() < 2 * others[beside].mean()
