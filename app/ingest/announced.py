"""What the header of a NIfTI or MGH file announces, checked before it is believed."""

import math
from typing import Any, BinaryIO

import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from app.errors import InvalidHeader, NotAVolume, TooManyVoxels, TruncatedFile, UnsupportedPixels
from app.ingest.limits import Limits

# What nibabel raises for a header that cannot be; its text repeats the header's values.
HEADER_FAULTS = (HeaderDataError, ImageFileError, ValueError, KeyError, OverflowError)


def check_kind(dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """One grey value a voxel, one volume a file."""
    if dtype.fields is not None or dtype.kind == "c":
        raise NotAVolume(
            "The voxels are colours." if dtype.fields is not None else "The voxels are complex numbers.",
            expected="one grey value a voxel.",
            advice="Convert the image to grey values (the magnitude of complex data) and send that.",
        )
    if dtype.kind not in "iuf":
        raise UnsupportedPixels(
            "The voxels have a type that is not a number.",
            expected="integers or floating-point numbers.",
            advice="Save the image as int16 or float32.",
        )
    if len(shape) < 2 or min(shape) < 1 or math.prod(shape[3:]) != 1:
        raise NotAVolume(
            f"The image has the shape {tuple(shape)}.",
            expected="three non-empty axes, or a fourth of length one.",
            advice="Send one volume: split a time series, and pick one.",
        )


def check_size(count: int, size: int, limits: Limits) -> None:
    """Refuse what is larger than the limits, before anything of that size is allocated or written."""
    if count > limits.max_voxels or size > limits.max_inflated_bytes:
        raise TooManyVoxels(
            f"The header announces {count} voxels in {size / 1e6:.0f} MB.",
            expected=f"at most {limits.max_voxels} voxels and {limits.max_inflated_bytes / 1e6:.0f} MB.",
            advice="Crop the scan to the head, or resample it.",
        )


def check_present(file: BinaryIO, announced: int) -> None:
    """Refuse a file that ends before its last voxel; leaves it at its start."""
    present = file.seek(0, 2)
    if present < announced:
        raise truncated(f"The file holds {present} of the {announced} bytes that its header announces.")
    file.seek(0)


def truncated(found: str) -> TruncatedFile:
    """A file that ends too early."""
    return TruncatedFile(
        found,
        expected="a complete file.",
        advice="Send it again, and compare its size with the original.",
    )


def unreadable_header() -> InvalidHeader:
    """A header that nibabel cannot follow."""
    return InvalidHeader(
        "The header contradicts itself or holds values that the standard does not allow.",
        expected="a valid data type, shape, scaling and orientation.",
        advice="Convert the original again with a current tool.",
    )
