"""Writes the High-Throughput JPEG 2000 codestreams of `tests/ingest/data`.

No encoder comes with Counterpart or with its development packages, and the real files at hand are in
colour. Run it in an environment of its own: `pip install imagecodecs`, then
`python scripts/make_htj2k.py tests/ingest/data`. The picture is a formula, `picture`, which the tests
repeat.
"""

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from imagecodecs import htj2k_encode

SHAPE = (45, 38)


def picture(bits: int, signed: bool) -> npt.NDArray[np.generic]:  # noqa: FBT001
    """Waves over the whole range of the stored values."""
    row, column = np.indices(SHAPE)
    wave = np.sin(row / 5) * np.cos(column / 7) + 0.2 * np.sin(row * column / 11)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    scaled = (wave - wave.min()) / np.ptp(wave)
    stored: npt.NDArray[np.generic] = np.round(low + scaled * (high - low)).astype(
        f"{'i' if signed else 'u'}{1 if bits == 8 else 2}"
    )
    return stored


def main() -> None:
    """Encode each kind, without loss and with."""
    folder = Path(sys.argv[1])
    for bits, signed in ((8, False), (12, False), (16, False), (16, True)):
        name = f"{'s' if signed else 'u'}{bits}"
        (folder / f"{name}.j2c").write_bytes(htj2k_encode(picture(bits, signed), reversible=True))
    (folder / "u12-lossy.j2c").write_bytes(htj2k_encode(picture(12, signed=False), reversible=False, level=0.0001))


if __name__ == "__main__":
    main()
