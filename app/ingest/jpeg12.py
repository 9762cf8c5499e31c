"""Twelve-bit JPEG Extended, which GDCM decodes and pydicom's plugin for GDCM declines.

A decoder plugin in pydicom's form; it is asked after pydicom's own have declined. Compared with dcmtk
on the real files of the archives: equal in every pixel.
"""

import gdcm
from pydicom.pixels.decoders.base import DecodeRunner, JPEGExtended12BitDecoder
from pydicom.uid import JPEGExtended12Bit

# What pydicom asks of the module of a plugin.
DECODER_DEPENDENCIES = {JPEGExtended12Bit: ("gdcm>=3.0",)}
_LABEL = "gdcm, 12 bits"


def is_available(uid: str) -> bool:
    """Whether this plugin decodes a transfer syntax."""
    return uid in DECODER_DEPENDENCIES


def register() -> None:
    """Make the plugin known to pydicom; once is enough, more do no harm."""
    if _LABEL not in JPEGExtended12BitDecoder.available_plugins:
        JPEGExtended12BitDecoder.add_plugin(_LABEL, (__name__, "decode_frame"))


def decode_frame(src: bytes, runner: DecodeRunner) -> bytes:
    """One grey frame, little endian.

    Raises
    ------
    NotImplementedError
        Colour, or another depth than 9 to 12 bits.
    ValueError
        GDCM finds no picture of the header's size in it.
    """
    if runner.samples_per_pixel != 1 or runner.bits_allocated != 16 or not 8 < runner.bits_stored <= 12:
        raise NotImplementedError("grey frames of 9 to 12 bits")
    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(src)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((runner.columns, runner.rows, 1))
    image.SetDataElement(element)
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(gdcm.PhotometricInterpretation.MONOCHROME2))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGExtendedProcess2_4))
    bits, signed = runner.bits_stored, runner.pixel_representation
    image.SetPixelFormat(gdcm.PixelFormat(1, 16, bits, bits - 1, signed))
    # GDCM gives char* as text.
    frame: bytes = image.GetBuffer().encode("utf-8", "surrogateescape")
    if len(frame) != 2 * runner.rows * runner.columns:
        raise ValueError("no frame of this size")
    return frame
