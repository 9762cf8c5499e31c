"""Real tumours of TCGA-LGG: all pictures of a patient as one scan, and what was outlined in them.

Real lesions choose nothing: this is for numbers alone, of test patients, and of validation patients beside an ablation.
No picture leaves it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from app.volume import BoolArray, Volume
from training.config import Config
from training.pictures import archive_path, load_stack

UInt8Array = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class TumourScan:
    """A patient's pictures, inferior to superior, and the tumour in them.

    Attributes
    ----------
    subject : str
    volume : Volume
        (X, Y, Z), all of the patient's pictures, as `load_scan` stacks them: pixel size and distance are guesses.
    truth : (X, Y, Z) ndarray of bool
        The outlined tumour, on the volume's own grid.
    healthy : (Z,) ndarray of bool
        Pictures without a tumour in them or beside them.
    """

    subject: str
    volume: Volume
    truth: BoolArray
    healthy: BoolArray


def load_tumour_scan(config: Config, subject: str) -> TumourScan:
    """All pictures of one patient of a configuration of kind "lgg", with the outlined tumour."""
    stack = load_stack(config, subject)
    truth = _outlines(archive_path(config))[subject].transpose(2, 1, 0)
    assert truth.shape == stack.volume.shape, "one outline a picture"
    return TumourScan(subject, stack.volume, truth, stack.healthy)


def tumour_scans(config: Config, subjects: Sequence[str]) -> Iterator[TumourScan]:
    """One patient after the other: `tumour_scans(config, load_split(config.data.splits).test)`."""
    return (load_tumour_scan(config, subject) for subject in subjects)


@cache
def _outlines(path: Path) -> dict[str, BoolArray]:
    """Of each patient, the outlines by slice number, (Z, H, W): in the archive they are packed bits."""
    with np.load(path, allow_pickle=False) as data:
        patients, numbers, packed = data["patient"], data["slice_no"], data["masks"]
        height, width = data["images"].shape[1:]
    order = np.lexsort((numbers, patients))
    patients, packed = patients[order], packed[order]
    return {
        str(patient): np.unpackbits(packed[patients == patient], axis=1, count=height * width)
        .reshape(-1, height, width)
        .astype(np.bool_)
        for patient in np.unique(patients)
    }
