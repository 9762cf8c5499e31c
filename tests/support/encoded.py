"""The transfer syntaxes that pydicom cannot write, written by GDCM, or made beforehand.

The HTJ2K codestreams come from `scripts/make_htj2k.py`, the twelve-bit JPEG of the same picture from dcmtk's
`dcmcjpeg +ee +q 98`.
"""

from pathlib import Path

import gdcm
import numpy as np
import numpy.typing as npt
from pydicom.dataset import FileDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID

DATA = Path(__file__).parents[1] / "ingest" / "data"
BY_GDCM = {
    "1.2.840.10008.1.2.2": gdcm.TransferSyntax.ExplicitVRBigEndian,
    "1.2.840.10008.1.2.4.50": gdcm.TransferSyntax.JPEGBaselineProcess1,
    "1.2.840.10008.1.2.4.57": gdcm.TransferSyntax.JPEGLosslessProcess14,
    "1.2.840.10008.1.2.4.70": gdcm.TransferSyntax.JPEGLosslessProcess14_1,
    "1.2.840.10008.1.2.4.80": gdcm.TransferSyntax.JPEGLSLossless,
    "1.2.840.10008.1.2.4.90": gdcm.TransferSyntax.JPEG2000Lossless,
    "1.2.840.10008.1.2.5": gdcm.TransferSyntax.RLELossless,
}


def recode(path: Path, syntax: str) -> None:
    """Write an uncompressed file anew in a transfer syntax."""
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(BY_GDCM[syntax]))
    change.SetInput(reader.GetImage())
    assert change.Change(), f"GDCM cannot write {syntax}"
    writer = gdcm.ImageWriter()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


def made_picture(name: str) -> npt.NDArray[np.int64]:
    """What was encoded beforehand as "u8", "u12", "u16" or "s16", (45, 38)."""
    bits, signed = int(name[1:]), name[0] == "s"
    row, column = np.indices((45, 38))
    wave = np.sin(row / 5) * np.cos(column / 7) + 0.2 * np.sin(row * column / 11)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return np.asarray(np.round(low + (wave - wave.min()) / np.ptp(wave) * (high - low)), dtype=np.int64)


def put_made(dataset: FileDataset, name: str, syntax: str) -> None:
    """Replace a data set's picture by a codestream made beforehand, a file of `tests/ingest/data` by its stem."""
    kind = name.partition("-")[0]
    stored(dataset, made_picture(kind), int(kind[1:]), signed=kind[0] == "s")
    dataset.file_meta.TransferSyntaxUID = UID(syntax)
    dataset.PixelData = encapsulate([next(DATA.glob(f"{name}.*")).read_bytes()])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True


def stored(dataset: FileDataset, picture: npt.NDArray[np.int64], bits: int, *, signed: bool) -> None:
    """Store whole numbers in 8 or 16 bits allocated."""
    dataset.BitsAllocated = 8 if bits <= 8 else 16 if bits <= 16 else 32
    dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = bits, bits - 1, int(signed)
    dataset.Rows, dataset.Columns = picture.shape
    dataset.PixelData = picture.astype(f"<{'i' if signed else 'u'}{dataset.BitsAllocated // 8}").tobytes()
    dataset["PixelData"].VR = "OB" if bits <= 8 else "OW"
