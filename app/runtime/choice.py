"""Which bundle a scan is for, by stated rules; and whether that is sure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from packaging.version import Version

from app.errors import NonCommercialModel, UnknownModel, WrongModality, WrongSequence
from app.manifest import Manifest
from app.volume import Source

# Of a manifest's sequence: "T1c" is T1 with a contrast agent.
WITH_AGENT = "c"


@dataclass(frozen=True)
class Choice:
    """A bundle, and why this one.

    Attributes
    ----------
    manifest : Manifest
    by : {"caller", "sequence", "modality", "default"}
        What decided: the caller's name; what the scan says of its sequence; its modality, where that
        has one model only; or that no other model could be meant.
    doubt : str
        Why the scan may be none for this model; empty where the choice is sure. No patient data.
    """

    manifest: Manifest
    by: Literal["caller", "sequence", "modality", "default"]
    doubt: str = ""


def choose(manifests: Sequence[Manifest], source: Source, model: str | None) -> Choice:
    """The bundle for a scan: the one that was named, else the newest for its modality and sequence.

    One for non-commercial use is never chosen: it must be named, and `permit` must let it pass.

    Raises
    ------
    UnknownModel
        The name is none of the bundles', or several bundles could be meant.
    WrongModality
        The scan says that it is of another modality than the model, or than all of them.
    WrongSequence
        The scan says that it is of another sequence than all of them, and none was named.
    """
    known = sorted(manifests, key=lambda m: (m.name, Version(m.version)))
    if model:
        return _named(known, source, model)
    fits = _of_its_modality(known, source)
    if known and not fits:
        raise WrongModality(
            f"{_said(source)}, and no model knows it.",
            expected=f"a scan for one of {_listed(known)}.",
            advice="Send another series, or install a model for this one.",
        )
    fits = [m for m in fits if not m.licence.non_commercial]
    if fits and source.sequences:
        fits = _of_its_sequence(fits, source)
    if len({m.name for m in fits}) != 1:
        raise UnknownModel(
            f"{len({m.name for m in fits})} models fit the scan.",
            expected=f"one of {_listed(known)}.",
            advice="Name one with ?model= (or --model).",
        )
    chosen = fits[-1]
    by: Literal["sequence", "modality", "default"] = "default" if source.modality is None else "modality"
    return Choice(chosen, "sequence" if source.sequences else by, _doubt(chosen, source))


def permit(manifest: Manifest, *, noncommercial: bool) -> None:
    """Refuse a bundle whose licence the operator has not agreed to.

    Raises
    ------
    NonCommercialModel
        It is for non-commercial research only.
    """
    if manifest.licence.non_commercial and not noncommercial:
        raise NonCommercialModel(
            f"{manifest.id} is under {manifest.licence.licence}: for non-commercial research only.",
            expected="an operator who has said that this service is run for nothing else.",
            advice="Where that is so, set COUNTERPART_ALLOW_NONCOMMERCIAL=true; else choose another model.",
        )


def _of_its_modality(known: Sequence[Manifest], source: Source) -> list[Manifest]:
    """Those for what the scan says, or its values do; whatever there is for one that could be any MR."""
    modality = source.modality or ("CT" if source.hounsfield else "MR")
    fits = [m for m in known if m.modality == modality]
    silent = source.modality is None and not source.hounsfield
    return fits or [m for m in known if silent]


def _said(source: Source) -> str:
    if source.modality is None:
        return "The file does not say its modality, its values look like Hounsfield units: it is CT"
    return f"The scan's modality is {source.modality}"


def _named(known: Sequence[Manifest], source: Source, model: str) -> Choice:
    fits = [m for m in known if model in (m.name, m.id)]
    if not fits:
        raise UnknownModel(
            f"No model is called {model!r}.",
            expected=f"one of {_listed(known)}.",
            advice="Name one with ?model= (or --model).",
        )
    chosen = fits[-1]
    if source.modality not in (None, chosen.modality):
        raise WrongModality(
            f"The scan's modality is {source.modality}.",
            expected=f"{chosen.modality}, which {chosen.id} was trained on.",
            advice="Send another series, or choose another model.",
        )
    # Who names a model vouches for a scan that says nothing; one that says something else is told of.
    silent = source.modality is None or not source.sequences
    return Choice(chosen, "caller", "" if silent else _doubt(chosen, source))


def _of_its_sequence(fits: Sequence[Manifest], source: Source) -> list[Manifest]:
    """Those for the first of the scan's sequences that any model knows; with its contrast agent, if one does."""
    for name in source.sequences:
        known = [m for m in fits if m.sequence in (name, name + WITH_AGENT)]
        alike = [m for m in known if _knows_agent(m) == source.contrast_agent]
        if known:
            return alike or known
    raise WrongSequence(
        f"The scan says that it is {' or '.join(source.sequences)}, and no model knows that.",
        expected=f"a scan for one of {_listed(fits)}.",
        advice="Send that series of the examination; or, if the header is wrong, name the model (?model=, --model).",
    )


def _knows_agent(manifest: Manifest) -> bool:
    return manifest.modality == "MR" and manifest.sequence.endswith(WITH_AGENT)


def _doubt(chosen: Manifest, source: Source) -> str:
    """Why a scan may be none for a model."""
    said, knows = source.sequences, chosen.sequence
    if source.hounsfield:
        return "The file does not say its modality: its values look like Hounsfield units, so it was taken for CT."
    if source.modality is None:
        return f"The file says neither its modality nor its sequence: it was taken for {chosen.modality}, {knows}."
    doubts = []
    if source.modality == "MR" and not said:
        doubts.append(f"The series does not say its sequence: it was taken for {knows}.")
    elif said and knows not in {variant for name in said for variant in (name, name + WITH_AGENT)}:
        doubts.append(f"The series says that it is {' or '.join(said)}, and the model knows {knows}.")
    elif len(said) > 1:
        doubts.append(f"The series contradicts itself ({' or '.join(said)}): it was taken for {knows}.")
    if source.contrast_agent and not _knows_agent(chosen):
        doubts.append("The series states a contrast agent, and the model knows scans without one.")
    elif _knows_agent(chosen) and not source.contrast_agent:
        doubts.append("The series states no contrast agent, and the model knows scans with one.")
    return " ".join(doubts)


def _listed(manifests: Sequence[Manifest]) -> str:
    return (
        ", ".join(f"{m.id} ({m.modality}, {m.sequence}{_by_name(m)})" for m in manifests)
        or "no model: none is installed"
    )


def _by_name(manifest: Manifest) -> str:
    return "; only when asked for by name" if manifest.licence.non_commercial else ""
