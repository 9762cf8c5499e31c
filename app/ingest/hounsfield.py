"""Whether a file that does not say its modality holds Hounsfield units."""

import numpy as np

from app.volume import FloatArray

# Air around the patient, as scanners give it; what they pad a round field of view with lies below.
AIR_HU = (-1050.0, -900.0)
LEAST_AIR = 0.02


def looks_hounsfield(array: FloatArray) -> bool:
    """Whether at least one voxel in fifty is air at about -1000: no other image that hospitals keep has such values.

    A CT without its air, skull-stripped or clipped at 0 say, is not recognised.
    """
    low, high = AIR_HU
    return bool(np.mean((array >= low) & (array <= high)) >= LEAST_AIR)
