"""Changed copies of a bundle's manifest, and hashes of the values in it that determine a result."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel

from app.manifest import DEFAULT_METHOD, Manifest, Range, View

ModelT = TypeVar("ModelT", bound=BaseModel)

LARGEST = float(np.finfo(np.float32).max)
EVERYTHING = Range(low=-LARGEST, high=LARGEST)
ANY_EXTENT_MM = ((0.0, 0.0, 0.0), (1e6, 1e6, 1e6))


def changed(model: ModelT, **changes: Any) -> ModelT:
    """Return a copy with some fields changed. `model_copy` would also accept a field that does not exist."""
    unknown = changes.keys() - type(model).model_fields.keys()
    assert not unknown, f"{type(model).__name__} has no {', '.join(sorted(unknown))}"
    return model.model_copy(update=changes)


def without_ood_check(manifest: Manifest) -> Manifest:
    """Return a manifest that accepts every scan, because the experiments compare maps."""
    check = manifest.ood
    accepting = changed(
        check,
        median_kl_range=(EVERYTHING,) * len(check.median_kl_range),
        reconstruction_range=EVERYTHING,
        max_outlier_fraction=1.0,
        max_outlier_slice_fraction=None,
        min_solidity=None,
        min_white_matter_contrast=None,
    )
    return changed(manifest, ood=accepting)


def only_ood_check(manifest: Manifest) -> Manifest:
    """Return a manifest that stops after the out-of-distribution check: one view, no latent masked, none reversed."""
    return changed(manifest, kl=changed(manifest.kl, threshold=LARGEST), views=(View(),))


def without_size_check(manifest: Manifest) -> Manifest:
    """Return a manifest that prepares images of any size, so that every image is scored."""
    preparation = changed(manifest.preprocessing, extent_mm=ANY_EXTENT_MM, min_foreground_cm2=0.0)
    return changed(manifest, preprocessing=preparation)


# Part of every hash. Raise it when the lists below change, and migrate what is stored.
HASH_VERSION = 1
# Fields that decide slices and maps, each with the value that has no effect. Names, advice, records of calibration
# and the out-of-distribution check are left out. A field that a later manifest no longer has counts as no effect.
SLICES: Mapping[str, Any] = {
    "spacing_mm": None,
    "shape": None,
    "extent_mm": None,
    "intensity_percentile": None,
    "intensity_level": None,
    "window": None,
    "min_foreground_cm2": None,
    "intracranial": False,
}
HEAD_BOX: Mapping[str, Any] = {"rows": None, "columns": None, "foreground_level": None, "reach_mm": None}
LATENT: Mapping[str, Any] = {"channels": None, "downsampling": None}
SCHEDULE: Mapping[str, Any] = {"steps": None, "beta_start": None, "beta_end": None}
KL_MAP: Mapping[str, Any] = {
    "timesteps": None,
    "mean": "arithmetic",
    "smoothing_mm": 0.0,
    "threshold": None,
    "min_component": 1,
    "grow": 0,
}
REVERSE: Mapping[str, Any] = {"timesteps": None}
RESIDUAL: Mapping[str, Any] = {
    "reference": "image",
    "contrast_floor": 0.0,
    "weighted_by_kl": False,
    "weighted_by_intensity": False,
    "erosion": 0,
    "median_pixels": 1,
    "smoothing_mm": 0.0,
    "threshold": None,
    "extent_threshold": None,
    "min_lesion_ml": None,
}
NETWORKS = ("encoder", "denoiser", "denoiser_int8", "decoder")


def _effective(part: BaseModel | None, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a part that have an effect."""
    values = {} if part is None else part.model_dump(mode="json")
    return {name: values[name] for name, inert in fields.items() if values.get(name, inert) not in (None, inert)}


def _sha256(*values: Any) -> str:
    return hashlib.sha256(json.dumps([HASH_VERSION, *values], sort_keys=True).encode()).hexdigest()


def cases_hash(manifest: Manifest) -> str:
    """Return the SHA-256 of the settings that determine the slices of every method and the evaluated pixels."""
    preparation = manifest.preprocessing
    slices, box = _effective(preparation, SLICES), _effective(preparation.head_box, HEAD_BOX)
    return _sha256(slices, box, manifest.residual.erosion)


def codes_hash(manifest: Manifest) -> str:
    """Return the SHA-256 of the settings that determine those slices and their codes in the VQ-VAE of the bundle."""
    return _sha256(cases_hash(manifest), manifest.files.encoder.sha256, manifest.files.decoder.sha256)


def detection_hash(manifest: Manifest) -> str:
    """Return the SHA-256 of the settings that determine the anomaly map and the mask of an accepted scan."""
    files = {name: getattr(manifest.files, name, None) for name in NETWORKS}
    return _sha256(
        cases_hash(manifest),
        {name: file.sha256 for name, file in files.items() if file is not None},
        _effective(manifest.latent, LATENT),
        _effective(manifest.schedule, SCHEDULE),
        manifest.seed,
        [view.model_dump(mode="json") for view in manifest.views],
        _effective(manifest.kl, KL_MAP),
        _effective(manifest.reverse, REVERSE),
        _effective(manifest.residual, RESIDUAL),
        manifest.precision,
        *([manifest.method] if manifest.method != DEFAULT_METHOD else []),
    )


def ood_hash(manifest: Manifest) -> str:
    """Return the SHA-256 of the settings that determine if a scan is accepted, without those of its KL map."""
    decides = list(manifest.ood.model_dump(mode="json").values())
    return _sha256(decides, manifest.calibration.slice_score.model_dump(mode="json"))
