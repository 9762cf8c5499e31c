"""Each part of the experiments: what it needs is trained or loaded, every method runs, numbers are kept.

What a method found is kept below docs/results/ (`training.experiments.kept`): a run that was stopped goes on where it
was, and a method that is added later is paired with what is there.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from training.config import ROOT
from training.experiments import (
    ablation,
    bounds,
    curve,
    figure,
    fusion,
    gate,
    healing,
    imagewise,
    kept,
    methods,
    reliability,
    segmentation,
)
from training.experiments.cases import SEGMENTED, Case, Cases
from training.experiments.experiment import AUTOENCODERS, Document, Experiment
from training.experiments.methods import OURS
from training.experiments.opponents import budget, load, opponent_of, train

FIGURE = ROOT / "docs" / "figures" / "results.png"
CURVE = ROOT / "docs" / "figures" / "evaluations.png"


def segment(part: str, name: str, cases: Cases, wanted: list[str]) -> None:
    """Experiments 2 and 3: run the methods that are wanted, and write down all that are known."""
    e = Experiment(name)
    makers, now = e.makers(), e.provenance()
    test: list[Case] = []
    for method in kept.missing(part, wanted, list(makers), now, OURS):
        start = time.perf_counter()
        test = test or list(cases(e.config, e.manifest))
        outcome = segmentation.run_method(makers[method](), e.validation(), test, e.manifest)
        told = now | {"whole_seconds": time.perf_counter() - start, "learnt_from": budget(method, name)}
        kept.save_outcome(kept.outcome_path(part, method), outcome, told)
        kept.write(part, {"provenance": now, **kept.merged(part, makers, now)})
    kept.write(part, {"provenance": now, **kept.merged(part, makers, now)})


def pictures(part: str, name: str, wanted: list[str]) -> None:
    """Experiment 1."""
    e = Experiment(name)
    now = e.provenance()
    rows: Document = kept.known_rows(part, now)["methods"]
    order = [OURS, "vqvae", *AUTOENCODERS, "transformer"]
    chosen = wanted or order
    lacking = [m for m in chosen if m not in rows or (m == OURS and "reliability" not in rows[m])]
    if not lacking:
        return
    healthy, near = imagewise.healthy_and_near(e.config, e.manifest, "validation")
    test, near_test = imagewise.healthy_and_near(e.config, e.manifest, "test")
    anomalous = [near_test, *imagewise.foreign(e.config, e.manifest)]
    for method in lacking:
        start = time.perf_counter()
        scores = _scores(e, method)
        validation = [imagewise.score_all(scores, p) for p in (healthy, near)]
        tested = [imagewise.score_all(scores, p) for p in (test, *anomalous)]
        rows[method] = _judged(method, validation, tested)
        rows[method]["whole_seconds"] = time.perf_counter() - start
        rows[method]["provenance"] = {key: now[key] for key in kept.OF_A_ROW}
        kept.write(part, {"provenance": now, "methods": {m: rows[m] for m in order if m in rows}})


def _judged(method: str, validation: list[imagewise.Scored], tested: list[imagewise.Scored]) -> Document:
    if method == OURS:
        fused = fusion.Fused.of(validation[0].scores)
        validation, tested = ([s.also(fused(s.scores)) for s in part] for part in (validation, tested))
    chosen = imagewise.choose_score(*validation)
    row = imagewise.judge(chosen, tested[0], tested[1:])
    if method == OURS:
        row["reliability"] = reliability.judge(chosen, validation, tested)
        row["scales"] = {name: asdict(scale) for name, scale in fused.scales.items()}
        reliability.draw(row["reliability"], reliability.FIGURE)
    return row


def _scores(e: Experiment, method: str) -> imagewise.Scores:
    if method == OURS:
        return imagewise.our_scores(e.networks, e.manifest)
    if method == "vqvae":
        return imagewise.reconstruction_scores(lambda x: e.networks.decode(e.networks.encode(x)))
    opponent = opponent_of(method, e.config.name)
    train(opponent, e.config)
    if method == "transformer":
        networks = methods.vqvae_networks(e.config)
        network = load(opponent, e.config)
        return imagewise.likelihood_scores(healing.Transformer(networks, network, e.config.seed))
    return imagewise.reconstruction_scores(methods.reconstructing(method, e.config))


def show(_: list[str]) -> None:
    """The figure."""
    shown = []
    for name in figure.SHOWN:
        e = Experiment(name)
        shown += figure.panels(e.config, e.networks, e.manifest)
    figure.draw(shown, FIGURE)


def evaluations(_: list[str]) -> None:
    """The curve and its figure."""
    curve.run()
    figure.draw_curve(kept.read(curve.PART), CURVE)


PARTS: dict[str, Callable[[list[str]], None]] = {
    "imagewise": lambda wanted: pictures("imagewise", "headct", wanted),
    **{part: partial(segment, part, name, cases) for part, (name, cases) in SEGMENTED.items()},
    "curve": evaluations,
    ablation.PART: lambda _: ablation.run(),
    "bounds": lambda _: bounds.run(),
    "gate": lambda _: gate.run(),
    "figure": show,
}
