"""The contract between training and serving: what is read is what was written, or it is refused."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from app.manifest import Manifest, Range, Residual
from tests.support.bundle import tiny_manifest

Change = Callable[[dict[str, Any]], object]


def reread(change: Change) -> Manifest:
    """The tiny manifest's JSON, changed, read again."""
    data = json.loads(tiny_manifest().model_dump_json())
    change(data)
    return Manifest.model_validate_json(json.dumps(data))


def test_what_is_written_is_what_is_read() -> None:
    manifest = tiny_manifest()
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
    assert reread(lambda _: None) == manifest


def test_a_manifest_from_before_there_were_windows_is_read() -> None:
    before = reread(lambda m: m["preparation"].pop("window"))
    assert before == tiny_manifest()
    assert before.preparation.window is None


def test_a_ct_may_have_a_window_in_place_of_a_percentile() -> None:
    made = reread(lambda m: (m.update(modality="CT"), m["preparation"].update(WINDOW)))
    assert made.preparation.window == (0.0, 80.0)


def test_a_manifest_from_before_heads_were_fitted_is_read() -> None:
    before = reread(lambda m: (m["preparation"].pop("fit"), m["licence"].pop("non_commercial")))
    assert before == tiny_manifest()
    assert before.preparation.fit is None
    assert before.licence.non_commercial is False


def test_a_manifest_from_before_int8_is_read() -> None:
    before = reread(lambda m: m["files"].pop("denoiser_int8"))
    assert before == tiny_manifest()
    assert before.files.denoiser_int8 is None


def test_float16_has_no_int8_beside_it() -> None:
    other = {"name": "denoiser.int8.onnx", "sha256": "0" * 64}
    made = reread(lambda m: m["files"].update(denoiser_int8=other))
    assert made.files.denoiser_int8 is not None
    with pytest.raises(ValidationError, match="a bundle in float16 has no denoiser in int8"):
        reread(lambda m: (m["files"].update(denoiser_int8=other), m.update(precision="float16")))


def test_a_head_may_be_fitted() -> None:
    fit = reread(lambda m: m["preparation"].update(fit=FIT)).preparation.fit
    assert fit is not None
    assert (fit.rows, fit.columns, fit.reach_mm) == (48, 40, None)


def test_derived_numbers() -> None:
    manifest = tiny_manifest()
    assert manifest.id == "tiny-0.0.1"
    assert manifest.latent_shape == (3, 16, 14)
    assert manifest.preparation.voxel_ml == 0.027


def test_a_range_holds_its_ends() -> None:
    healthy = Range(low=1.0, high=2.0)
    assert [healthy.contains(v) for v in (0.999, 1.0, 1.5, 2.0, 2.001)] == [False, True, True, True, False]
    assert not healthy.contains(float("nan"))


def test_nothing_can_be_changed_after_reading() -> None:
    manifest = tiny_manifest()
    with pytest.raises(ValidationError, match="frozen"):
        manifest.kl.threshold = 1.0  # type: ignore[misc]


FIT = {"rows": 48, "columns": 40, "foreground_level": 0.3}
WINDOW = {"window": [0.0, 80.0], "intensity_percentile": None, "intensity_level": None}
REFUSED: dict[str, Change] = {
    "an unknown field": lambda m: m.update(colour="red"),
    "an unknown field of a part": lambda m: m["kl"].update(colour="red"),
    "another format": lambda m: m.update(format_version=2),
    "a missing part": lambda m: m.pop("gate"),
    "a name with a slash": lambda m: m.update(name="../tiny"),
    "a name in capitals": lambda m: m.update(name="Tiny"),
    "another modality": lambda m: m.update(modality="PET"),
    "a time step of 0": lambda m: m["kl"].update(timesteps=[0, 500]),
    "a time step of T": lambda m: m["kl"].update(timesteps=[500, 1000]),
    "a reverse time step of 0": lambda m: m["reverse"].update(timesteps=[500, 0]),
    "no noise level": lambda m: m["kl"].update(timesteps=[]),
    "no reverse step": lambda m: m["reverse"].update(timesteps=[]),
    "reverse steps that ascend": lambda m: m["reverse"].update(timesteps=[100, 500]),
    "a reverse step twice": lambda m: m["reverse"].update(timesteps=[500, 500, 100]),
    "a shape that latents do not divide": lambda m: m["preparation"].update(shape=[63, 56]),
    "a range upside down": lambda m: m["gate"].update(reconstruction={"low": 2.0, "high": 1.0}),
    "a gate without a range for each level": lambda m: m["gate"].update(timesteps=[400, 500]),
    "no intensity mapping": lambda m: m["preparation"].update(intensity_level=None),
    "a window beside a percentile": lambda m: (m.update(modality="CT"), m["preparation"].update(window=[0.0, 80.0])),
    "a window of an MR": lambda m: m["preparation"].update(WINDOW),
    "a fitted head larger than the slice": lambda m: m["preparation"].update(fit={**FIT, "rows": 65}),
    "a fitted head of no size": lambda m: m["preparation"].update(fit={**FIT, "columns": 0}),
    "a fitted brain": lambda m: m["preparation"].update(fit=FIT, brain_only=True),
    "a window upside down": lambda m: (m.update(modality="CT"), m["preparation"].update(WINDOW, window=[80.0, 0.0])),
    # Nothing is ever above it: every scan would read as healthy.
    "a threshold that is no number": lambda m: m["kl"].update(threshold=float("nan")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_manifest_that_contradicts_itself_is_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        reread(REFUSED[name])


def test_the_median_needs_a_middle() -> None:
    residual = tiny_manifest().residual.model_dump() | {"median_pixels": 4}
    with pytest.raises(ValidationError, match="an odd side"):
        Residual.model_validate(residual)
