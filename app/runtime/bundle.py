"""A folder under models/ -> networks that were checked: hashes, provider, golden pair."""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from app.errors import DamagedBundle
from app.manifest import File, Manifest, Precision
from app.pipeline.models import Models
from app.runtime.extractor import EXTRACTOR, Extractor, load_extractor
from app.runtime.files import check_hash, side_by_side
from app.runtime.fixed import FixedBatch
from app.runtime.session import Provider, as_callable, open_session

MANIFEST = "manifest.json"
CARD = "MODEL_CARD.md"
# Of the golden pair: what the denoiser in int8 gave.
GOLDEN_INT8 = "epsilon_int8"
ADVICE = "Install the bundle again."
# Largest difference from the golden pair: float32 on another machine or provider sums in another
# order; a wrong graph is off by whole units.
GOLDEN_TOLERANCE = 2e-3
# Of the predicted noise, which has unit variance, where the denoiser computes in float16.
FLOAT16_TOLERANCE = 1e-2
# Where its convolutions compute in int8. Another CPU rounds the float parts in between otherwise, and the last digit
# decides between two steps of a quantised activation: then half of the pixels move, by up to 0.04 (decision 17). Sums
# that overflow, or weights that were read wrongly, are off by much more.
INT8_TOLERANCE = 0.1
# Share of decoded pixels that may differ more: one latent on the border of two codes flips a patch.
GOLDEN_FLIPPED = 0.02
# Slices in one network evaluation: on two cores enough to keep them busy, and more only costs memory; on a GPU, where
# they are padded to this number, unless the operator says another.
CPU_BATCH, GPU_BATCH = 16, 64


@dataclass(frozen=True, eq=False)
class Bundle:
    """A loaded model.

    Attributes
    ----------
    folder : Path
    manifest : Manifest
    sha256 : str
        Of the manifest file, which holds the hashes of all the others.
    models : Models
        Its networks.
    provider : {"cpu", "cuda"}
        Where they run.
    extractor : Extractor or None
        What takes a brain out of its head, for a model that knows brains alone.
    batch : int
        Slices in one network evaluation.
    precision : {"float32", "float16", "int8"}
        In which its denoiser computes.
    """

    folder: Path
    manifest: Manifest
    sha256: str
    models: Models
    provider: Provider
    extractor: Extractor | None = None
    batch: int = CPU_BATCH
    precision: Precision = "float32"


def shipped_models() -> Path:
    """Folder of the bundles that came with this installation, or lie in this checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_models"
    return installed if installed.is_dir() else package.parent / "models"


def find_bundles(folder: Path) -> list[Path]:
    """Folders with a manifest, sorted by name."""
    return sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))


def read_manifest(folder: Path) -> Manifest:
    """Read and validate a bundle's manifest.

    Raises
    ------
    DamagedBundle
        There is none, or it is not what this version of the code obeys.
    """
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValidationError) as error:
        what = f"{error.error_count()} invalid fields" if isinstance(error, ValidationError) else "it cannot be read"
        raise DamagedBundle(
            f"The manifest of {folder.name}: {what}.",
            expected="a manifest.json of format 1.",
            advice="Install the bundle again, with the version of counterpart that it was made for.",
        ) from error


def load_bundle(
    folder: Path, provider: Provider = "cpu", threads: int = 0, gpu_batch: int = GPU_BATCH, *, quantised: bool = True
) -> Bundle:
    """Load a bundle and see it work: every hash, the provider, and a real inference.

    On a CPU the denoiser in int8 is loaded, where the bundle has one (decision 17).

    Parameters
    ----------
    folder : Path
    provider : {"cpu", "cuda"}
    threads : int
        As of `app.runtime.session.open_session`.
    gpu_batch : int
        Slices in one evaluation on CUDA, captured as a CUDA graph; 0 does without, and takes batches as they come.
    quantised : bool
        Whether the denoiser may be the one in int8; else it is that of CUDA, to compare them.

    Raises
    ------
    DamagedBundle
        A file is missing or changed, or the golden pair does not come out.
    ProviderUnavailable
        The networks would not run where they were asked to.
    """
    manifest = read_manifest(folder)
    files = manifest.files
    fixed = gpu_batch if provider == "cuda" else 0
    in_int8 = files.denoiser_int8 if quantised and provider == "cpu" else None
    denoiser = in_int8 or files.denoiser
    precision: Precision = "int8" if in_int8 else manifest.precision

    def opened(file: File) -> Any:
        # What the denoiser in int8 has in common with the other one it reads from that one's file.
        for each in (file, files.denoiser) if file is in_int8 else (file,):
            check_hash(folder, each, ADVICE)
        path = folder / file.name
        if not fixed:
            # The denoiser is called over and over in between and keeps its memory; the other two let go of theirs.
            return as_callable(open_session(path, provider, threads), seldom=file is not denoiser)
        network = FixedBatch(lambda size: open_session(path, provider, threads, batch=size, graphs=True), fixed)
        network.open()
        return network

    def extractor() -> Extractor | None:
        # Shipped with the code, wherever the bundles lie.
        alone = manifest.preparation.brain_only
        return load_extractor(shipped_models() / EXTRACTOR, provider, threads) if alone else None

    def not_opened() -> None:
        for file in (files.golden, files.denoiser_int8):
            if file is not None and file is not in_int8:
                check_hash(folder, file, ADVICE)

    networks = (partial(opened, file) for file in (files.encoder, denoiser, files.decoder))
    *made, brain, _ = side_by_side(provider, [*networks, extractor, not_opened])
    models = Models(*made)
    _check_golden(models, folder / files.golden.name, precision)
    digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    return Bundle(folder, manifest, digest, models, provider, brain, fixed or CPU_BATCH, precision)


def _check_golden(models: Models, path: Path, precision: Precision) -> None:
    """A real inference of each network, compared with what training saw."""
    allowed = {"float32": GOLDEN_TOLERANCE, "float16": FLOAT16_TOLERANCE, "int8": INT8_TOLERANCE}[precision]
    noise = GOLDEN_INT8 if precision == "int8" else "epsilon"
    with np.load(path, allow_pickle=False) as golden:
        if noise not in golden:
            raise DamagedBundle(
                f"The golden pair of {path.parent.name} has no `{noise}`.",
                expected="what each of its networks gave when it was exported.",
                advice=ADVICE,
            )
        encoded = _worst(models.encode(golden["x"]), golden["z0"])
        predicted = _worst(models.denoise(golden["z_t"], golden["t"]), golden[noise])
        decoded = models.decode(golden["z0"])
        flipped = float(np.mean(np.abs(decoded - golden["decoded"]) > GOLDEN_TOLERANCE))
    if not encoded <= GOLDEN_TOLERANCE or not predicted <= allowed or not flipped <= GOLDEN_FLIPPED:
        raise DamagedBundle(
            f"The golden pair of {path.parent.name} comes out {encoded:.2g} and {predicted:.2g} off, {flipped:.1%} of "
            "its pixels changed.",
            expected=f"at most {GOLDEN_TOLERANCE}, {allowed} and {GOLDEN_FLIPPED:.0%}.",
            advice="Report it with the output of `counterpart doctor`: this provider computes something else.",
        )


def _worst(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    return float(np.max(np.abs(found - expected)))
