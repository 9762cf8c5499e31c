"""Bundles: a folder under models/, loaded and checked by its hashes and its golden pair."""

import hashlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from app.errors import DamagedBundle
from app.manifest import File, Manifest, Precision
from app.pipeline.diffusion import Networks
from app.pipeline.methods import METHODS
from app.runtime.extractor import EXTRACTOR, Extractor, load_extractor
from app.runtime.fixed_batch import FixedBatch
from app.runtime.session import Provider, as_callable, check_sha256, open_session, run_concurrently
from app.site_profile import SiteProfiles
from app.volume import FloatArray

MANIFEST = "manifest.json"
CARD = "MODEL_CARD.md"
# Entry of the golden pair with the output of the denoiser in int8.
GOLDEN_INT8 = "epsilon_int8"
ADVICE = "Install the bundle again."
# Largest difference from the golden pair. Another machine or provider sums float32 in another order. A wrong graph
# differs by whole units.
GOLDEN_TOLERANCE = 2e-3
# The same for a denoiser in float16. The predicted noise has unit variance.
FLOAT16_TOLERANCE = 1e-2
# The same for a denoiser in int8. Another CPU rounds the float operations in between differently. The last digit then
# selects another step of a quantised activation, and half of the pixels change by up to 0.04 (decision 17). Overflowing
# sums or wrong weights cause much larger differences.
INT8_TOLERANCE = 0.1
# Largest fraction of decoded pixels with a larger difference. A latent between two codes can change a whole patch.
GOLDEN_FLIPPED = 0.02
# Slices in one network evaluation. On two cores 16 slices use both, and more only take memory. On a GPU, batches are
# padded to 64 unless the operator sets another number.
CPU_BATCH, GPU_BATCH = 16, 64


@dataclass(frozen=True, eq=False)
class Bundle:
    """Loaded bundle.

    Attributes
    ----------
    folder : Path
    manifest : Manifest
    sha256 : str
        SHA-256 of the manifest file, which contains those of all other files.
    networks : Networks
    provider : {"cpu", "cuda"}
    extractor : Extractor or None
        Brain extractor, if the model takes skull-stripped brains.
    batch : int
        Slices in one network evaluation.
    precision : {"float32", "float16", "int8"}
        Arithmetic of the denoiser.
    site_profiles : SiteProfiles
        Profiles of the service, for any model.
    """

    folder: Path
    manifest: Manifest
    sha256: str
    networks: Networks
    provider: Provider
    extractor: Extractor | None = None
    batch: int = CPU_BATCH
    precision: Precision = "float32"
    site_profiles: SiteProfiles = field(default_factory=SiteProfiles)


def shipped_models() -> Path:
    """Return the folder of the bundles in this installation or checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_models"
    return installed if installed.is_dir() else package.parent / "models"


def find_bundles(folder: Path) -> list[Path]:
    """Return the subfolders with a manifest, sorted by name."""
    return sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))


def read_manifest(folder: Path) -> Manifest:
    """Read and validate the manifest of a bundle.

    Raises
    ------
    DamagedBundle
        The manifest is missing or invalid, or names a method that this version does not have.
    """
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except OSError as error:
        raise _invalid_manifest(folder, "cannot be read") from error
    except ValidationError as error:
        raise _invalid_manifest(folder, f"has {error.error_count()} invalid fields") from error
    if manifest.method not in METHODS:
        raise _invalid_manifest(folder, f"names the unknown method {manifest.method!r}")
    return manifest


def load_bundle(
    folder: Path, provider: Provider = "cpu", threads: int = 0, gpu_batch: int = GPU_BATCH, *, quantised: bool = True
) -> Bundle:
    """Load a bundle and check the hash of each file, the provider and the golden pair.

    On a CPU the denoiser in int8 is loaded if the bundle has one (decision 17).

    Parameters
    ----------
    folder : Path
    provider : {"cpu", "cuda"}
    threads : int
        See `app.runtime.session.open_session`.
    gpu_batch : int
        Slices in one evaluation on CUDA, captured as a CUDA graph. 0 disables CUDA graphs, and batches have any size.
    quantised : bool
        Allow the denoiser in int8. If False, load the one of CUDA on any provider, to compare them.

    Raises
    ------
    DamagedBundle
        A file is missing or changed, or an output differs from the golden pair.
    ProviderUnavailable
        The networks would not run on the requested provider.
    """
    manifest = read_manifest(folder)
    files = manifest.files
    fixed = gpu_batch if provider == "cuda" else 0
    int8 = files.denoiser_int8 if quantised and provider == "cpu" else None
    denoiser = int8 or files.denoiser
    precision: Precision = "int8" if int8 else manifest.precision

    def load(file: File) -> Any:
        # The graph in int8 reads the weights that it shares with the other denoiser from the file of that one.
        for each in (file, files.denoiser) if file is int8 else (file,):
            check_sha256(folder, each, ADVICE)
        path = folder / file.name
        if not fixed:
            # The denoiser has many calls and keeps its memory. The other two networks have few.
            return as_callable(open_session(path, provider, threads), shrink_arena=file is not denoiser)
        network = FixedBatch(lambda size: open_session(path, provider, threads, batch=size, cuda_graphs=True), fixed)
        network.open()
        return network

    def load_extractor_if_needed() -> Extractor | None:
        # The extractor is shipped with the code. The bundles may be in another folder.
        needed = manifest.preprocessing.brain_only
        return load_extractor(shipped_models() / EXTRACTOR, provider, threads) if needed else None

    def check_other_files() -> None:
        for file in (files.golden, files.denoiser_int8):
            if file is not None and file is not int8:
                check_sha256(folder, file, ADVICE)

    tasks = [partial(load, file) for file in (files.encoder, denoiser, files.decoder)]
    *loaded, extractor, _ = run_concurrently(provider, [*tasks, load_extractor_if_needed, check_other_files])
    networks = Networks(*loaded)
    _check_golden(networks, folder / files.golden.name, precision)
    digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    return Bundle(folder, manifest, digest, networks, provider, extractor, fixed or CPU_BATCH, precision)


def _check_golden(networks: Networks, path: Path, precision: Precision) -> None:
    """Evaluate each network on the golden inputs and compare with the outputs at export."""
    tolerance = {"float32": GOLDEN_TOLERANCE, "float16": FLOAT16_TOLERANCE, "int8": INT8_TOLERANCE}[precision]
    noise = GOLDEN_INT8 if precision == "int8" else "epsilon"
    with np.load(path, allow_pickle=False) as golden:
        if noise not in golden:
            raise DamagedBundle(
                f"The golden pair of {path.parent.name} has no `{noise}`.",
                expected="the output of each network at export.",
                advice=ADVICE,
            )
        encoded = _max_difference(networks.encode(golden["x"]), golden["z0"])
        predicted = _max_difference(networks.denoise(golden["z_t"], golden["t"]), golden[noise])
        decoded = networks.decode(golden["z0"])
        flipped = float(np.mean(np.abs(decoded - golden["decoded"]) > GOLDEN_TOLERANCE))
    if not encoded <= GOLDEN_TOLERANCE or not predicted <= tolerance or not flipped <= GOLDEN_FLIPPED:
        raise DamagedBundle(
            f"The outputs of {path.parent.name} differ from its golden pair: latents by {encoded:.2g}, predicted noise "
            f"by {predicted:.2g}, {flipped:.1%} of the decoded pixels.",
            expected=f"at most {GOLDEN_TOLERANCE}, {tolerance} and {GOLDEN_FLIPPED:.0%}.",
            advice="Report it with the output of `counterpart doctor`. This provider computes other values.",
        )


def _max_difference(found: FloatArray, expected: FloatArray) -> float:
    return float(np.max(np.abs(found - expected)))


def _invalid_manifest(folder: Path, what: str) -> DamagedBundle:
    return DamagedBundle(
        f"The manifest of {folder.name} {what}.",
        expected="a manifest.json of format 1.",
        advice="Install the bundle again, with the version of counterpart that it was made for.",
    )
