"""A folder under models/ -> networks that were checked: hashes, provider, golden pair."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from app.errors import DamagedBundle
from app.manifest import Manifest
from app.pipeline.models import Models
from app.runtime.extractor import EXTRACTOR, Extractor, load_extractor
from app.runtime.files import check_hash
from app.runtime.session import Provider, as_callable, open_session

MANIFEST = "manifest.json"
CARD = "MODEL_CARD.md"
# Largest difference from the golden pair: float32 on another machine or provider sums in another
# order; a wrong graph is off by whole units.
GOLDEN_TOLERANCE = 2e-3
# Share of decoded pixels that may differ more: one latent on the border of two codes flips a patch.
GOLDEN_FLIPPED = 0.02


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
    """

    folder: Path
    manifest: Manifest
    sha256: str
    models: Models
    provider: Provider
    extractor: Extractor | None = None


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


def load_bundle(folder: Path, provider: Provider = "cpu", threads: int = 0) -> Bundle:
    """Load a bundle and see it work: every hash, the provider, and a real inference.

    Raises
    ------
    DamagedBundle
        A file is missing or changed, or the golden pair does not come out.
    ProviderUnavailable
        The networks would not run where they were asked to.
    """
    manifest = read_manifest(folder)
    files = manifest.files
    for file in (files.encoder, files.denoiser, files.decoder, files.golden):
        check_hash(folder, file, "Install the bundle again.")
    encode, denoise, decode = (
        as_callable(open_session(folder / file.name, provider, threads))
        for file in (files.encoder, files.denoiser, files.decoder)
    )
    models = Models(encode, denoise, decode)
    _check_golden(models, folder / files.golden.name)
    digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    extractor = None
    if manifest.preparation.brain_only:
        # Shipped with the code, wherever the bundles lie.
        extractor = load_extractor(shipped_models() / EXTRACTOR, provider, threads)
    return Bundle(folder, manifest, digest, models, provider, extractor)


def _check_golden(models: Models, path: Path) -> None:
    """A real inference of each network, compared with what training saw."""
    with np.load(path, allow_pickle=False) as golden:
        z0 = models.encode(golden["x"])
        epsilon = models.denoise(golden["z_t"], golden["t"])
        decoded = models.decode(golden["z0"])
        worst = max(_worst(z0, golden["z0"]), _worst(epsilon, golden["epsilon"]))
        flipped = float(np.mean(np.abs(decoded - golden["decoded"]) > GOLDEN_TOLERANCE))
    if not worst <= GOLDEN_TOLERANCE or not flipped <= GOLDEN_FLIPPED:
        raise DamagedBundle(
            f"The golden pair of {path.parent.name} comes out {worst:.2g} off, {flipped:.1%} of its pixels changed.",
            expected=f"at most {GOLDEN_TOLERANCE} and {GOLDEN_FLIPPED:.0%}.",
            advice="Report it with the output of `counterpart doctor`: this provider computes something else.",
        )


def _worst(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    return float(np.max(np.abs(found - expected)))
