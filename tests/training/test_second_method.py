"""A bundle is evaluated with the method that its manifest names, not with the default method."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from app.manifest import DEFAULT_METHOD, Manifest
from app.pipeline.detect import Detection
from app.pipeline.diffusion import Networks
from app.pipeline.methods import METHODS
from app.runtime.bundle import Bundle, load_bundle
from app.volume import Volume
from tests.support.phantom import brain
from training.bundle_runs import run_detection
from training.experiments.cases import make_case
from training.experiments.segmentation import counterpart_map

pytestmark = pytest.mark.training


@pytest.fixture
def bundle(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """Return the tiny bundle with a second method, whose anomaly map is 7 everywhere."""

    def second(volume: Volume, networks: Networks, manifest: Manifest, seed: int | None = None) -> Detection:
        detection = METHODS[DEFAULT_METHOD](volume, networks, manifest, seed)
        return replace(detection, anomaly=np.full_like(detection.anomaly, 7))

    monkeypatch.setitem(METHODS, "second", second)
    loaded = load_bundle(next(path.parent for path in tiny_models.glob("tiny-*/manifest.json")), threads=1)
    return replace(loaded, manifest=loaded.manifest.model_copy(update={"method": "second"}))


def test_evaluation_runs_the_method_of_the_bundle(bundle: Bundle) -> None:
    detection, result, _ = run_detection(brain(), bundle)
    assert (detection.anomaly == 7).all()
    assert np.nanmax(result.anomaly) == pytest.approx(7)


def test_experiments_run_the_method_of_the_bundle(bundle: Bundle) -> None:
    volume = brain()
    case = make_case("subject", "kind", volume, volume.array > volume.array.max(), bundle.manifest)
    values = counterpart_map(bundle.networks, bundle.manifest)(case)
    assert values.shape == case.truth.shape
    assert (values == 7).all()
