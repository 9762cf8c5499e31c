"""Brain extractor: its folder, loaded and checked like a bundle."""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from app.errors import DamagedBundle
from app.manifest import ExtractorManifest, File
from app.pipeline.brain_extraction import ExtractionNetwork, ExtractionNetworks
from app.runtime.session import Provider, as_callable, check_sha256, open_session, run_concurrently

EXTRACTOR = "deepbet-1.0.2"
# The name differs from that of a bundle, because no scan can be analysed with only the extractor.
MANIFEST = "extractor.json"
CARD = "MODEL_CARD.md"
ADVICE = "Install counterpart again. If the error remains, report it with the output of `counterpart doctor`."
# Largest difference of the log odds from the golden pair. They span tens, and only their sign is used.
GOLDEN_TOLERANCE = 0.05


@dataclass(frozen=True, eq=False)
class Extractor:
    """Loaded brain extractor.

    Attributes
    ----------
    manifest : ExtractorManifest
    sha256 : str
        SHA-256 of the manifest file, which contains those of all other files.
    networks : ExtractionNetworks
    """

    manifest: ExtractorManifest
    sha256: str
    networks: ExtractionNetworks


def load_extractor(folder: Path, provider: Provider = "cpu", threads: int = 0) -> Extractor:
    """Load the brain extractor and compare its networks with the golden pair.

    Raises
    ------
    DamagedBundle
        A file is missing or changed, or an output differs from the golden pair.
    ProviderUnavailable
        The networks would not run on the requested provider.
    """
    try:
        text = (folder / MANIFEST).read_bytes()
        manifest = ExtractorManifest.model_validate_json(text)
    except (OSError, ValidationError) as error:
        raise _damaged(folder, f"{MANIFEST} is missing or invalid") from error
    files = manifest.files
    check_sha256(folder, files.golden, ADVICE)
    with np.load(folder / files.golden.name, allow_pickle=False) as golden:
        expected = dict(golden)

    def load(name: str, file: File) -> ExtractionNetwork:
        check_sha256(folder, file, ADVICE)
        run: ExtractionNetwork = as_callable(open_session(folder / file.name, provider, threads), shrink_arena=True)
        difference = float(np.abs(run(expected["x"]) - expected[name]).max())
        if not difference <= GOLDEN_TOLERANCE:
            raise _damaged(folder, f"The {name} network differs from the golden pair by {difference:.2g}")
        return run

    tasks = [partial(load, "coarse", files.coarse), partial(load, "fine", files.fine)]
    networks = ExtractionNetworks(*run_concurrently(provider, tasks))
    return Extractor(manifest, hashlib.sha256(text).hexdigest(), networks)


def _damaged(folder: Path, found: str) -> DamagedBundle:
    return DamagedBundle(
        f"{found} (brain extractor {folder.name}).",
        expected=f"{MANIFEST} and its files, unchanged, with the outputs of the golden pair.",
        advice=ADVICE,
    )
