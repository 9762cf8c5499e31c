"""Changes of the ablation, and rules for the thresholds."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from app.manifest import Manifest
from app.pipeline.diffusion import Networks
from app.volume import FloatArray, IntArray
from training.data import load_split
from training.experiments import ablation
from training.experiments.ablation import AS_SHIPPED, MemoisedNetworks
from training.experiments.cases import GRADES, Case, ellipse_inserter, make_case
from training.experiments.experiment import Experiment
from training.experiments.segmentation import counterpart_map, mask_map

pytestmark = pytest.mark.training


def test_networks_run_once_for_the_same_arrays() -> None:
    calls: list[int] = []

    def denoise(z_t: FloatArray, t: IntArray) -> FloatArray:
        calls.append(int(t[0]))
        return 2 * z_t

    memoised = MemoisedNetworks(Networks(lambda x: x, denoise, lambda z: z))
    z = np.ones((2, 3, 4, 4), np.float32)
    first = memoised.networks.denoise(z, np.full(2, 5, np.int64))
    first += 1  # a result may be written into
    again = memoised.networks.denoise(z.copy(), np.full(2, 5, np.int64))
    np.testing.assert_array_equal(again, 2 * z)
    assert calls == [5]
    memoised.networks.denoise(z, np.full(2, 20, np.int64))
    memoised.networks.denoise(z[:1], np.full(1, 5, np.int64))
    memoised.clear()
    memoised.networks.denoise(z, np.full(2, 5, np.int64))
    assert calls == [5, 20, 5, 5]


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return Experiment("headct")


@pytest.fixture(scope="module")
def case(experiment: Experiment, real_scans: Path) -> Case:
    assert real_scans.exists()
    subject = load_split(experiment.config.data.splits).validation[0]
    made = ellipse_inserter(experiment.config)(subject, GRADES["grade 3"], 0)
    return make_case(subject, "grade 3", made.volume, made.truth, experiment.manifest)


@pytest.fixture
def manifests(experiment: Experiment, real_scans: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Manifest]:
    assert real_scans.exists()
    split = load_split(experiment.config.data.splits)
    # Thresholds of one healthy scan, for time.
    one = split.model_copy(update={"validation": split.validation[:1]})
    monkeypatch.setattr(ablation, "load_split", lambda _: one)
    return ablation.make_changes(experiment.manifest, experiment.config, experiment.networks)


@pytest.mark.data
def test_every_change_gives_another_map(experiment: Experiment, case: Case, manifests: dict[str, Manifest]) -> None:
    assert manifests[AS_SHIPPED] == experiment.manifest
    _, maps = ablation.measure([case], {AS_SHIPPED: manifests[AS_SHIPPED]}, experiment.networks)
    memoised = MemoisedNetworks(experiment.networks)
    own = mask_map(maps[0], case)
    for name, manifest in manifests.items():
        values = mask_map(counterpart_map(memoised.networks, manifest)(case), case)
        assert np.isfinite(values[case.evaluated]).all(), name
        assert np.array_equal(values[case.evaluated], own[case.evaluated]) == (name == AS_SHIPPED), name


@pytest.mark.data
def test_stricter_rule_has_a_higher_threshold(experiment: Experiment, case: Case) -> None:
    rng = np.random.default_rng(1)
    shape = (6, *experiment.manifest.preprocessing.shape)
    healthy = [np.abs(rng.standard_normal(shape)).astype(np.float32) for _ in range(3)]
    found = np.where(case.truth, 10.0, 0.0).astype(np.float32)
    rows = ablation.measure_thresholds(experiment, healthy, [case], [found])
    rules = {(row.false_positive_ml, row.extent_share): row for row in rows}
    assert len(rules) == len(ablation.FALSE_POSITIVE_ML) * len(ablation.EXTENT_SHARES)
    assert rules[0.5, 0.6].threshold >= rules[2.0, 0.6].threshold
    assert all(row.dice["grade 3"].value > 0.8 for row in rows)
    assert [rule for rule, row in rules.items() if row.shipped] == [(1.0, 0.6)]
