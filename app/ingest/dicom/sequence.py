"""Classify the MR sequence of an image: its weighting, and if a contrast agent was given.

Three sources are used in this order: the coded contrast of an enhanced image (PS3.3 C.8.13.3), the names given by
people and scanners, and the echo, repetition and inversion times. If the sources agree, there is one weighting. If
they contradict each other, there are several, and the selection of a model reports that. The names are searched for
words and never repeated, because they can contain a patient's name.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import pydicom

from app.dicom_attributes import functional_group, optional_numbers, text, texts
from app.volume import Scanner

_SCANNER_KEYWORDS = ("Manufacturer", "ManufacturerModelName", "MagneticFieldStrength")
_NAMES = ("SeriesDescription", "ProtocolName", "SequenceName", "PulseSequenceName")
_KEYWORDS = (
    *_NAMES,
    "Modality",
    "AcquisitionContrast",
    "ScanningSequence",
    "EchoPulseSequence",
    "EchoPlanarPulseSequence",
    "EchoTime",
    "RepetitionTime",
    "InversionTime",
    "ContrastBolusAgent",
    "ContrastBolusAgentSequence",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)

# Acquisition Contrast (0008,9209) -> weighting.
CONTRAST_CODES = {
    "T1": "T1",
    "T2": "T2",
    "T2_STAR": "T2*",
    "PROTON_DENSITY": "PD",
    "FLUID_ATTENUATED": "FLAIR",
    "STIR": "STIR",
    "DIFFUSION": "DWI",
    "PERFUSION": "perfusion",
    "TOF": "TOF",
}
# Patterns for names in lower case in which every separator is a blank.
NAME_PATTERNS = {
    "T1": r"\bt1(?!\d|rho)|\bmp2?rage|\bbravo\b|\bf?spgr\b|\btfl3d",
    "T2*": r"\bt2(w|w )?( ?\*| ?star)|\bswi\b",
    "T2": r"\bt2(?!\d|(w|w )?( ?\*| ?star))",
    "FLAIR": r"flair|dark ?fluid",
    "PD": r"\bpdw?\b|proton ?density",
    "STIR": r"\bstir\b",
    "DWI": r"\bdwi\b|\bdti\b|\bdiff(usion)?\b|\badc\b|\btracew?\b",
    "perfusion": r"\basl\b|\bperf(usion)?\b|\bdsc\b",
    "TOF": r"\btof\b|\bmra\b|\bangio",
    "EPI": r"\bbold\b|\bfmri\b|\bepi\b|\bepfid|\bep2d",
}
# If a name matches the key, the listed weightings are ignored: "T1 FLAIR" is T1, "T2 FLAIR" is FLAIR, and EPI is a
# readout that many sequences use.
TAKES_PRECEDENCE_OVER = {
    "T1": {"FLAIR"},
    "FLAIR": {"T2"},
    "DWI": {"EPI"},
    "perfusion": {"EPI"},
    "T2*": {"T2", "EPI"},
}
CONTRAST_AGENT_PATTERN = r"\bgd\b|\bgad[oa]|\bpost ?(contrast|gd|km)\b|\bkm\b|\+ ?c\b|\bc ?\+"
# Values of ContrastBolusAgent that are written if no agent was given.
NO_AGENT_VALUES = {"", "no", "none", "n", "0", "nein", "ohne", "without"}

# Milliseconds. Times between these ranges do not determine a weighting.
MAX_SHORT_ECHO, MIN_LONG_ECHO, MIN_T2_STAR_ECHO = 40, 60, 12
MAX_SHORT_REPETITION, MIN_LONG_REPETITION = 1000, 1800
STIR_INVERSION, T1_INVERSION, MIN_FLAIR_INVERSION = (80, 250), (300, 1399), 1400


@dataclass(frozen=True)
class SequenceInfo:
    """Sequence of an image, as its header states it.

    Attributes
    ----------
    weightings : tuple of str
        "T1", "T2", "FLAIR", ..., the most trusted first. Several if the header contradicts itself, none if it
        states nothing.
    contrast_agent : bool
        True if an attribute or a name states that a contrast agent was given.
    """

    weightings: tuple[str, ...] = ()
    contrast_agent: bool = False


def classify_sequence_file(path: Path, frame: int) -> SequenceInfo:
    """Classify the sequence of one frame (index from 0) of a DICOM file."""
    try:
        dataset = pydicom.dcmread(path, force=True, stop_before_pixels=True, specific_tags=list(_KEYWORDS))
        return classify_sequence(dataset, frame)
    except Exception:  # noqa: BLE001 - an invalid name or time does not make an image unusable
        return SequenceInfo()


def read_scanner(path: Path) -> Scanner | None:
    """Return the scanner that the header of a DICOM file names, or None."""
    try:
        dataset = pydicom.dcmread(path, force=True, stop_before_pixels=True, specific_tags=list(_SCANNER_KEYWORDS))
        maker, model = (text(dataset, keyword).upper() for keyword in _SCANNER_KEYWORDS[:2])
        strength = optional_numbers(dataset, "MagneticFieldStrength")
    except Exception:  # noqa: BLE001 - an invalid name does not make an image unusable
        return None
    return Scanner(maker, model, round(strength[0], 1) if strength else None) if maker and model else None


def classify_sequence(dataset: pydicom.Dataset, frame: int = 0) -> SequenceInfo:
    """Classify the sequence of one frame (index from 0) from a header."""
    names = _normalised_names(dataset)
    agent = text(dataset, "ContrastBolusAgent").lower() not in NO_AGENT_VALUES
    agent |= bool(dataset.get("ContrastBolusAgentSequence")) or bool(re.search(CONTRAST_AGENT_PATTERN, names))
    if text(dataset, "Modality") != "MR":
        return SequenceInfo((), agent)
    code = text(functional_group(dataset, frame, "MRImageFrameTypeSequence"), "AcquisitionContrast").upper()
    found = [
        *filter(None, [CONTRAST_CODES.get(code)]),
        *_weightings_from_names(names),
        *_weightings_from_times(dataset, frame),
    ]
    # EPI is only a readout: a weighting is more specific.
    weightings = [name for name in found if name != "EPI"] or found
    return SequenceInfo(tuple(dict.fromkeys(weightings)), agent)


def _normalised_names(dataset: pydicom.Dataset) -> str:
    words = " ".join(text(dataset, keyword) for keyword in _NAMES).lower()
    return re.sub(r"[^a-z0-9*+]+", " ", words)


def _weightings_from_names(names: str) -> list[str]:
    found = [weighting for weighting, pattern in NAME_PATTERNS.items() if re.search(pattern, names)]
    ignored = set[str]().union(*(TAKES_PRECEDENCE_OVER.get(weighting, set()) for weighting in found))
    return [weighting for weighting in found if weighting not in ignored]


def _weightings_from_times(dataset: pydicom.Dataset, frame: int) -> list[str]:
    """Return the weighting that the times determine, or an empty list."""
    kinds = {*texts(dataset, "ScanningSequence"), *texts(dataset, "EchoPulseSequence")}
    if "EP" in kinds or text(dataset, "EchoPlanarPulseSequence") == "YES":
        return ["EPI"]
    times = functional_group(dataset, frame, "MRTimingAndRelatedParametersSequence")
    echoes = functional_group(dataset, frame, "MREchoSequence")
    modifier = functional_group(dataset, frame, "MRModifierSequence")
    echo = _first_number(echoes, "EffectiveEchoTime", "EchoTime")
    repetition = _first_number(times, "RepetitionTime")
    inversion = _first_number(modifier, "InversionTimes", "InversionTime")
    if echo <= 0:
        return []
    weighting = ""
    if inversion > 0:
        weighting = _inversion_recovery_weighting(echo, inversion)
    elif kinds & {"SE", "SPIN"}:
        weighting = _spin_echo_weighting(echo, repetition)
    elif kinds & {"GR", "GRADIENT"} and echo >= MIN_T2_STAR_ECHO:
        weighting = "T2*"
    return [weighting] if weighting else []


def _first_number(dataset: pydicom.Dataset, *keywords: str) -> float:
    """Return the first value of the first attribute that has one, or 0."""
    return next((values[0] for values in (optional_numbers(dataset, keyword) for keyword in keywords) if values), 0.0)


def _inversion_recovery_weighting(echo: float, inversion: float) -> str:
    if STIR_INVERSION[0] <= inversion <= STIR_INVERSION[1]:
        return "STIR"
    if echo <= MAX_SHORT_ECHO and T1_INVERSION[0] <= inversion <= T1_INVERSION[1]:
        return "T1"
    return "FLAIR" if echo >= MIN_LONG_ECHO and inversion >= MIN_FLAIR_INVERSION else ""


def _spin_echo_weighting(echo: float, repetition: float) -> str:
    if echo >= MIN_LONG_ECHO and repetition >= MIN_LONG_REPETITION:
        return "T2"
    if echo <= MAX_SHORT_ECHO and repetition >= MIN_LONG_REPETITION:
        return "PD"
    return "T1" if echo <= MAX_SHORT_ECHO and 0 < repetition <= MAX_SHORT_REPETITION else ""
