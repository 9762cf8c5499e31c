"""Pixel data in transfer syntaxes that pydicom cannot write: encoded by GDCM, or beforehand by other tools.

The files in `tests/ingest/data` encode `reference_picture`. HTJ2K (.j2c) is from the Python package imagecodecs:
`htj2k_encode(image, reversible=True)`, and with loss `htj2k_encode(image, reversible=False, level=0.0001)`. The
12-bit JPEG is from dcmtk: `dcmcjpeg +ee +q 98`.
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
    """Rewrite an uncompressed file in another transfer syntax."""
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


def reference_picture(name: str) -> npt.NDArray[np.int64]:
    """Return the image in the encoded files of a number type, "u8", "u12", "u16" or "s16", (45, 38)."""
    bits, signed = int(name[1:]), name[0] == "s"
    row, column = np.indices((45, 38))
    wave = np.sin(row / 5) * np.cos(column / 7) + 0.2 * np.sin(row * column / 11)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return np.asarray(np.round(low + (wave - wave.min()) / np.ptp(wave) * (high - low)), dtype=np.int64)


def set_encoded_file(dataset: FileDataset, name: str, syntax: str) -> None:
    """Replace the pixel data of a data set by an encoded file of `tests/ingest/data`, named by its stem."""
    number_type = name.partition("-")[0]
    store_pixels(dataset, reference_picture(number_type), int(number_type[1:]), signed=number_type[0] == "s")
    dataset.file_meta.TransferSyntaxUID = UID(syntax)
    dataset.PixelData = encapsulate([next(DATA.glob(f"{name}.*")).read_bytes()])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True


def store_pixels(dataset: FileDataset, image: npt.NDArray[np.int64], bits: int, *, signed: bool) -> None:
    """Store whole numbers with 8, 16 or 32 bits allocated."""
    dataset.BitsAllocated = 8 if bits <= 8 else 16 if bits <= 16 else 32
    dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = bits, bits - 1, int(signed)
    dataset.Rows, dataset.Columns = image.shape
    dataset.PixelData = image.astype(f"<{'i' if signed else 'u'}{dataset.BitsAllocated // 8}").tobytes()
    dataset["PixelData"].VR = "OB" if bits <= 8 else "OW"
