"""The folder of the brain extractor -> networks that were checked: hashes, provider, golden pair."""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from app.brain import Network, Networks
from app.errors import DamagedBundle
from app.manifest import ExtractorManifest, File
from app.runtime.files import check_hash, side_by_side
from app.runtime.session import Provider, as_callable, open_session

EXTRACTOR = "deepbet-1.0.2"
# Another name than a bundle's manifest: it is no model that a scan could be analysed with.
MANIFEST = "extractor.json"
CARD = "MODEL_CARD.md"
ADVICE = "Install counterpart again; if it stays, report it with the output of `counterpart doctor`."
# Largest difference of log odds from the golden pair; they span tens, and only their sign is used.
GOLDEN_TOLERANCE = 0.05


@dataclass(frozen=True, eq=False)
class Extractor:
    """Loaded networks, and what a report says of them.

    Attributes
    ----------
    manifest : ExtractorManifest
    sha256 : str
        Of the manifest file, which holds the hashes of all the others.
    networks : Networks
    """

    manifest: ExtractorManifest
    sha256: str
    networks: Networks


def load_extractor(folder: Path, provider: Provider = "cpu", threads: int = 0) -> Extractor:
    """Load the networks and see them work.

    Raises
    ------
    DamagedBundle
        A file is missing or changed, or the golden pair does not come out.
    ProviderUnavailable
        The networks would not run where they were asked to.
    """
    try:
        text = (folder / MANIFEST).read_bytes()
        manifest = ExtractorManifest.model_validate_json(text)
    except (OSError, ValidationError) as error:
        raise _damaged(folder, f"Its {MANIFEST} is missing or invalid") from error
    files = manifest.files
    check_hash(folder, files.golden, ADVICE)
    with np.load(folder / files.golden.name, allow_pickle=False) as golden:
        expected = dict(golden)

    def loaded(name: str, file: File) -> Network:
        check_hash(folder, file, ADVICE)
        run: Network = as_callable(open_session(folder / file.name, provider, threads), seldom=True)
        off = float(np.abs(run(expected["x"]) - expected[name]).max())
        if not off <= GOLDEN_TOLERANCE:
            raise _damaged(folder, f"The golden pair of its {name} network comes out {off:.2g} off")
        return run

    tasks = [partial(loaded, "coarse", files.coarse), partial(loaded, "fine", files.fine)]
    networks = Networks(*side_by_side(provider, tasks))
    return Extractor(manifest, hashlib.sha256(text).hexdigest(), networks)


def _damaged(folder: Path, found: str) -> DamagedBundle:
    return DamagedBundle(
        f"{found} (brain extractor {folder.name}).",
        expected=f"{MANIFEST} and the files that it names, unchanged, giving the numbers they were made with.",
        advice=ADVICE,
    )
