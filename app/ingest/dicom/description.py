"""Describe a series in words that tell it apart from others of the same study, without free text of the header.

People choose a series by its number, its kernel and its description. The number is a number, the kernel is repeated
only if it is the name of a known kernel, and the description is only searched for words.
"""

import re
from pathlib import Path

import pydicom

from app.dicom_attributes import text, texts

_NAMES = ("SeriesDescription", "ProtocolName", "SequenceName")
_KEYWORDS = (*_NAMES, "SeriesNumber", "ConvolutionKernel")
# Largest value of an integer string (PS3.5 table 6.2-1).
MAX_SERIES_NUMBER = 2**31 - 1

# Words in a series' names (lower case, separators are blanks) -> what the message calls it.
DESCRIPTION_CLASSES = {
    "first inversion": r"\binv ?1\b",
    "second inversion": r"\binv ?2\b",
    "uniform": r"\buni\b|\buniform",
    "MP2RAGE": r"mp2rage",
    "MPRAGE": r"\bmprage|\bmp rage|\btfl3d",
    "fast spin echo": r"\btse\b|\bfse\b|\bspace\b|\bcube\b",
    "bone": r"\bbone|\bknochen|\bos(seux)?\b",
    "soft tissue": r"\bsoft|\bbrain\b|\bweichteil|\bparenchym",
    "lung": r"\blung",
    "angiography": r"\bangio|\bcta\b|\bmra\b|\btof\b",
    "reformatted": r"\bmpr\b|\bmip\b|\breformat",
}
# Siemens, Canon, GE and Philips. Any other text may be a comment.
_KERNELS = re.compile(
    r"[BHJTUQ][a-z]?\d{2}[a-z]?|FC\d{2}|STANDARD|SOFT|DETAIL|BONE|BONEPLUS|EDGE|LUNG|CHST|ULTRA|[A-EL]|[UYE][A-D]"
)


def describe_series_file(path: Path) -> list[str]:
    """Return what the header of a DICOM file states about its series: number, kernel, and known words of its names."""
    try:
        dataset = pydicom.dcmread(path, force=True, stop_before_pixels=True, specific_tags=list(_KEYWORDS))
        return [*_number(dataset), *_kernel(dataset), *_description_classes(dataset)]
    except Exception:  # noqa: BLE001 - an invalid name does not make an image unusable
        return []


def _number(dataset: pydicom.Dataset) -> list[str]:
    number = text(dataset, "SeriesNumber")
    return [f"series {int(number)}"] if number.isdecimal() and int(number) <= MAX_SERIES_NUMBER else []


def _kernel(dataset: pydicom.Dataset) -> list[str]:
    return [f"kernel {value}" for value in texts(dataset, "ConvolutionKernel")[:1] if _KERNELS.fullmatch(value)]


def _description_classes(dataset: pydicom.Dataset) -> list[str]:
    names = re.sub(r"[^a-z0-9]+", " ", " ".join(text(dataset, keyword) for keyword in _NAMES).lower())
    return [name for name, pattern in DESCRIPTION_CLASSES.items() if re.search(pattern, names)]
