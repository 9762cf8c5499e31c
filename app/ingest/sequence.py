"""What a DICOM image says of its MR sequence: by code, by its names, by its times.

Three witnesses are heard in this order: the coded contrast of an enhanced image (PS3.3 C.8.13.3),
the names that people and scanners give, and echo, repetition and inversion times. Where they agree
there is one answer, where they do not there are several, and the choice of a model says so. The
names are searched for words and never repeated: they can hold a patient's.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import pydicom

from app.ingest.attributes import functional_group, numbers, text, texts

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

CODED = {
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
# Words, looked for in lower case with every separator a blank.
WORDS = {
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
# A name that holds both is one of the first: T1 FLAIR is a T1, T2 FLAIR a FLAIR, and EPI reads many.
OVERRULES = {"T1": {"FLAIR"}, "FLAIR": {"T2"}, "DWI": {"EPI"}, "perfusion": {"EPI"}, "T2*": {"T2", "EPI"}}
AGENT = r"\bgd\b|\bgad[oa]|\bpost ?(contrast|gd|km)\b|\bkm\b|\+ ?c\b|\bc ?\+"
# What is written where no agent was given.
NO_AGENT = {"", "no", "none", "n", "0", "nein", "ohne", "without"}

# Milliseconds. Between these ranges a time says nothing.
SHORT_ECHO, LONG_ECHO, LATE_GRADIENT_ECHO = 40, 60, 12
SHORT_REPETITION, LONG_REPETITION = 1000, 1800
FAT_NULLED, T1_INVERSION, FLUID_NULLED = (80, 250), (300, 1399), 1400


@dataclass(frozen=True)
class Said:
    """What an image says of its sequence.

    Attributes
    ----------
    weightings : tuple of str
        "T1", "T2", "FLAIR", ...: the most trusted first. Several where the image contradicts
        itself; none where it says nothing.
    contrast_agent : bool
        One was given, by its attribute or by a name.
    """

    weightings: tuple[str, ...] = ()
    contrast_agent: bool = False


def said_by(path: Path, frame: int) -> Said:
    """Ask the header of an image, and a frame of it, counted from 0."""
    try:
        dataset = pydicom.dcmread(path, force=True, stop_before_pixels=True, specific_tags=list(_KEYWORDS))
        return said(dataset, frame)
    except Exception:  # noqa: BLE001 - a name or a time that is none is no reason to refuse an image
        return Said()


def said(dataset: pydicom.Dataset, frame: int = 0) -> Said:
    """Ask a header that was read."""
    names = _names(dataset)
    agent = text(dataset, "ContrastBolusAgent").lower() not in NO_AGENT
    agent |= bool(dataset.get("ContrastBolusAgentSequence")) or bool(re.search(AGENT, names))
    if text(dataset, "Modality") != "MR":
        return Said((), agent)
    coded = text(functional_group(dataset, frame, "MRImageFrameTypeSequence"), "AcquisitionContrast").upper()
    found = [*filter(None, [CODED.get(coded)]), *_by_name(names), *_by_times(dataset, frame)]
    # That it was read by echo planar imaging says little, where more is said.
    weightings = [name for name in found if name != "EPI"] or found
    return Said(tuple(dict.fromkeys(weightings)), agent)


def _names(dataset: pydicom.Dataset) -> str:
    words = " ".join(text(dataset, keyword) for keyword in _NAMES).lower()
    return re.sub(r"[^a-z0-9*+]+", " ", words)


def _by_name(names: str) -> list[str]:
    found = [weighting for weighting, pattern in WORDS.items() if re.search(pattern, names)]
    overruled = set[str]().union(*(OVERRULES.get(weighting, set()) for weighting in found))
    return [weighting for weighting in found if weighting not in overruled]


def _by_times(dataset: pydicom.Dataset, frame: int) -> list[str]:
    """What the times can only be, by the textbook; [] between the ranges."""
    kinds = {*texts(dataset, "ScanningSequence"), *texts(dataset, "EchoPulseSequence")}
    if "EP" in kinds or text(dataset, "EchoPlanarPulseSequence") == "YES":
        return ["EPI"]
    times = functional_group(dataset, frame, "MRTimingAndRelatedParametersSequence")
    echoes = functional_group(dataset, frame, "MREchoSequence")
    modifier = functional_group(dataset, frame, "MRModifierSequence")
    echo = (numbers(echoes, "EffectiveEchoTime") or numbers(echoes, "EchoTime") or (0.0,))[0]
    repetition = (numbers(times, "RepetitionTime") or (0.0,))[0]
    inversion = (numbers(modifier, "InversionTimes") or numbers(modifier, "InversionTime") or (0.0,))[0]
    if echo <= 0:
        return []
    found = ""
    if inversion > 0:
        found = _inverted(echo, inversion)
    elif kinds & {"SE", "SPIN"}:
        found = _spin_echo(echo, repetition)
    elif kinds & {"GR", "GRADIENT"} and echo >= LATE_GRADIENT_ECHO:
        found = "T2*"
    return [found] if found else []


def _inverted(echo: float, inversion: float) -> str:
    if FAT_NULLED[0] <= inversion <= FAT_NULLED[1]:
        return "STIR"
    if echo <= SHORT_ECHO and T1_INVERSION[0] <= inversion <= T1_INVERSION[1]:
        return "T1"
    return "FLAIR" if echo >= LONG_ECHO and inversion >= FLUID_NULLED else ""


def _spin_echo(echo: float, repetition: float) -> str:
    if echo >= LONG_ECHO and repetition >= LONG_REPETITION:
        return "T2"
    if echo <= SHORT_ECHO and repetition >= LONG_REPETITION:
        return "PD"
    return "T1" if echo <= SHORT_ECHO and 0 < repetition <= SHORT_REPETITION else ""
