"""Selection of the bundle for a scan, by modality and sequence."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from packaging.version import Version

from app.errors import CounterpartError, NonCommercialModel, UnknownModel, WrongModality, WrongSequence
from app.manifest import Manifest
from app.volume import WITH_AGENT, Source


@dataclass(frozen=True)
class ModelSelection:
    """Selected bundle, and the reason for it.

    Attributes
    ----------
    manifest : Manifest
    by : {"caller", "sequence", "modality", "default"}
        Reason: the caller named the model, the scan states its sequence, there is only one model for the modality of
        the scan, or no other model fits.
    warning : str
        Reason why the model may not fit the scan, without patient data. It is empty if the selection is certain.
    """

    manifest: Manifest
    by: Literal["caller", "sequence", "modality", "default"]
    warning: str = ""


def select_model(manifests: Sequence[Manifest], source: Source, model: str | None) -> ModelSelection:
    """Select the bundle that the caller names, or the newest one for the modality and sequence of the scan.

    An early version, and a bundle for non-commercial use, is selected only by name. `check_licence` must accept the
    latter as well.

    Parameters
    ----------
    manifests : sequence of Manifest
        Installed bundles.
    source : Source
    model : str or None
        `name` or `name-version` from the caller.

    Raises
    ------
    UnknownModel
        No bundle has that name, or several bundles fit the scan.
    WrongModality
        The scan has another modality than the named bundle, or than all bundles.
    WrongSequence
        The scan has another sequence than all bundles, and the caller named none.
    """
    installed = sorted(manifests, key=lambda m: (m.name, Version(m.version)))
    if model:
        return _select_by_name(installed, source, model)
    fitting = _with_modality(installed, source)
    if installed and not fitting:
        raise WrongModality(
            f"{_describe_modality(source)}, and no model was trained on it.",
            expected=f"a scan that one of these models accepts: {list_models(installed)}.",
            advice="Send another series, or install a model for this modality.",
        )
    fitting = [m for m in fitting if not m.is_only_named]
    if fitting and source.sequences:
        fitting = _with_sequence(fitting, source)
    names = {m.name for m in fitting}
    if len(names) != 1:
        raise UnknownModel(
            "Several models are suitable for the scan." if names else "No model is suitable for the scan.",
            expected=f"one of {list_models(installed)}.",
            advice="Name one with ?model= (or --model).",
        )
    selected = fitting[-1]
    by: Literal["sequence", "modality", "default"] = "default" if source.modality is None else "modality"
    return ModelSelection(selected, "sequence" if source.sequences else by, _warning(selected, source))


def trained_sequences(manifests: Sequence[Manifest], model: str | None) -> frozenset[str]:
    """Return the sequences of MR for which `select_model` can select a bundle; that of a named bundle alone."""
    available = [m for m in manifests if m.modality == "MR"]
    if model:
        return frozenset(m.sequence for m in available if model in (m.name, m.id))
    return frozenset(m.sequence for m in available if not m.is_only_named)


def explain_selection(
    error: CounterpartError, selection: ModelSelection, source: Source, manifests: Sequence[Manifest]
) -> CounterpartError:
    """Return the refusal of a scan with what was assumed to read it and to select its model, and the way out.

    If nothing was assumed, the error is returned unchanged.
    """
    assumptions = " ".join(filter(None, (source.position_warning, *source.warnings, selection.warning)))
    if not assumptions:
        return error
    return type(error)(
        f"{error.found} {assumptions} The model is {selection.manifest.id}.",
        expected=error.expected,
        advice=f"{error.advice} If another model fits the scan, name it with ?model= (or --model): "
        f"{list_models(manifests)}.",
    )


def check_licence(manifest: Manifest, *, noncommercial: bool) -> None:
    """Raise an error if the operator has not accepted the licence of a bundle.

    Raises
    ------
    NonCommercialModel
        The bundle is for non-commercial research only.
    """
    if manifest.licence.non_commercial and not noncommercial:
        raise NonCommercialModel(
            f"{manifest.id} is licensed under {manifest.licence.licence}, for non-commercial research only.",
            expected="an operator who confirms that this service is not used commercially.",
            advice="If that is the case, set COUNTERPART_ALLOW_NONCOMMERCIAL=true. Otherwise choose another model.",
        )


def _select_by_name(installed: Sequence[Manifest], source: Source, model: str) -> ModelSelection:
    named = [m for m in installed if model in (m.name, m.id)]
    if not named:
        raise UnknownModel(
            f"No model has the name {model!r}.",
            expected=f"one of {list_models(installed)}.",
            advice="Name one with ?model= (or --model).",
        )
    selected = named[-1]
    if source.modality not in (None, selected.modality):
        raise WrongModality(
            f"The scan's modality is {source.modality}.",
            expected=f"{selected.modality}, which {selected.id} was trained on.",
            advice="Send another series, or choose another model.",
        )
    # If the scan does not state its sequence, the caller's choice is accepted without a warning.
    unstated = source.modality is None or not source.sequences
    return ModelSelection(selected, "caller", "" if unstated else _warning(selected, source))


def _with_modality(installed: Sequence[Manifest], source: Source) -> list[Manifest]:
    """Return the models for the modality of a scan.

    If the file does not state its modality, CT is recognised by its values. If there is no model for MR, any model may
    fit, because a CT is not always recognised.
    """
    modality = source.modality or ("CT" if source.looks_hounsfield else "MR")
    fitting = [m for m in installed if m.modality == modality]
    unstated = source.modality is None and not source.looks_hounsfield
    return fitting or [m for m in installed if unstated]


def _with_sequence(fitting: Sequence[Manifest], source: Source) -> list[Manifest]:
    """Return the models for the first stated sequence that any model has, if possible with the same contrast agent."""
    for name in source.sequences:
        known = [m for m in fitting if m.sequence in (name, name + WITH_AGENT)]
        same_agent = [m for m in known if _has_agent(m) == source.contrast_agent]
        if known:
            return same_agent or known
    raise WrongSequence(
        f"The sequence of the scan is {' or '.join(source.sequences)}, and no model was trained on it.",
        expected=f"a scan that one of these models accepts: {list_models(fitting)}.",
        advice="Send that series of the examination. If the header is wrong, name the model (?model=, --model).",
    )


def _has_agent(manifest: Manifest) -> bool:
    return manifest.modality == "MR" and manifest.sequence.endswith(WITH_AGENT)


def _warning(selected: Manifest, source: Source) -> str:
    """Return the reason why a model may not fit a scan, or an empty string."""
    stated, sequence = source.sequences, selected.sequence
    if source.looks_hounsfield:
        return "The file does not state its modality. Its values look like Hounsfield units, so CT was assumed."
    if source.modality is None:
        return f"The file states neither its modality nor its sequence. {selected.modality}, {sequence} was assumed."
    reasons = []
    if source.modality == "MR" and not stated:
        reasons.append(f"The series does not state its sequence. {sequence} was assumed.")
    elif stated and sequence not in {variant for name in stated for variant in (name, name + WITH_AGENT)}:
        reasons.append(f"The sequence of the series is {' or '.join(stated)}, but the model was trained on {sequence}.")
    elif len(stated) > 1:
        reasons.append(f"The series contradicts itself ({' or '.join(stated)}). {sequence} was assumed.")
    if source.contrast_agent and not _has_agent(selected):
        reasons.append("The series states a contrast agent, but the model was trained on scans without one.")
    elif _has_agent(selected) and not source.contrast_agent:
        reasons.append("The series states no contrast agent, but the model was trained on scans with one.")
    return " ".join(reasons)


def _describe_modality(source: Source) -> str:
    if source.modality is None:
        return "The file does not state its modality, but its values look like Hounsfield units (CT)"
    return f"The scan's modality is {source.modality}"


def list_models(manifests: Sequence[Manifest]) -> str:
    """Return the ids, modalities and sequences of models for an error message."""
    if not manifests:
        return "no model: none is installed"

    def describe(manifest: Manifest) -> str:
        restriction = "; only if named" if manifest.is_only_named else ""
        return f"{manifest.id} ({manifest.modality}, {manifest.sequence}{restriction})"

    return ", ".join(map(describe, manifests))
