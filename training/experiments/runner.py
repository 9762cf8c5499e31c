"""Each part of the experiments: what it needs is trained or loaded, every method runs, numbers are kept.

What a method found on a part is kept below `runs/`, so that a run that was stopped goes on where it was.
"""

import hashlib
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from app.runtime.bundle import Bundle, load_bundle
from training.config import ROOT, Config
from training.data import data_hash
from training.experiments import figure, imagewise, methods, segmentation
from training.experiments.cases import Case, brats, for_choices, multiple_sclerosis, synthetic, tumours
from training.experiments.methods import BATCH, OURS, Method
from training.experiments.opponents import OPPONENTS, bundle_folder, load, train
from training.experiments.segmentation import Outcome
from training.splits import FOLDER, load_split

RESULTS = ROOT / "docs" / "results"
FIGURE = ROOT / "docs" / "figures" / "results.png"
AUTOENCODERS = ("dense-ae", "spatial-ae", "vae")
# Healthy validation scans that the transformer's threshold comes from.
CALIBRATION_SCANS = 4

Document = dict[str, Any]


def code_version() -> str:
    """The commit, and whether anything was changed since."""
    git = shutil.which("git")
    if git is None:
        return "unknown"
    told = subprocess.run(  # noqa: S603
        [git, "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, check=False
    )
    return told.stdout.decode().strip() or "unknown"


class Experiment:
    """One bundle and all that is compared with it.

    Parameters
    ----------
    name : str
        Of the bundle.
    """

    def __init__(self, name: str) -> None:
        self.config = Config.load(ROOT / "training" / "configs" / f"{name}.toml")
        self.bundle: Bundle = load_bundle(bundle_folder(self.config))
        self.manifest = self.bundle.manifest
        self.models = self.bundle.models.in_batches(BATCH, lambda _: None)
        self.choices: list[Case] = []

    def makers(self) -> dict[str, Callable[[], Method]]:
        """Every method by name, made when it is asked for: an opponent that is not trained yet is trained then."""
        plain = methods.without_model
        made: dict[str, Callable[[], Method]] = {
            OURS: lambda: Method(
                OURS, "Counterpart", {"": methods.ours(self.models, self.manifest)}, (0.0,), self._size()
            ),
            "intensity": lambda: plain(self.config)["intensity"],
            "mean": lambda: plain(self.config)["mean"],
            "vqvae": lambda: methods.plain_vqvae(methods.vqvae_networks(self.config)),
        }
        made |= {name: partial(self._autoencoder, name) for name in AUTOENCODERS}
        return made | {name: partial(self._transformer, name) for name in ("transformer", "transformer-ensemble")}

    def _size(self) -> int:
        networks = methods.vqvae_networks(self.config)
        return sum(p.numel() for n in (networks.encoder, networks.denoiser, networks.decoder) for p in n.parameters())

    def _autoencoder(self, name: str) -> Method:
        train(OPPONENTS[name], self.config)
        return methods.autoencoder(name, self.config)

    def _transformer(self, name: str) -> Method:
        train(OPPONENTS["transformer"], self.config)
        healthy = [c.x.copy() for c in self.validation()[:CALIBRATION_SCANS]]
        return methods.transformers(self.config, methods.vqvae_networks(self.config), healthy)[name]

    def validation(self) -> list[Case]:
        """What an opponent's post-processing is chosen by; made once."""
        self.choices = self.choices or for_choices(self.config, self.manifest)
        return self.choices

    def provenance(self) -> Document:
        """What the numbers belong to."""
        split = load_split(self.config.data.splits)
        return {
            "bundle": self.manifest.id,
            "bundle_sha256": self.bundle.sha256,
            "data_sha256": data_hash(self.config, split.test),
            "split": self.config.data.splits,
            "split_sha256": hashlib.sha256((FOLDER / self.config.data.splits).read_bytes()).hexdigest(),
            "seed": self.config.seed,
            "code": code_version(),
            "threads": torch.get_num_threads(),
        }

    def kept(self, part: str, method: str) -> Path:
        """Where a method's outcome lies: another bundle, another file."""
        return self.config.run_folder / "experiments" / f"{part}-{method}-{self.bundle.sha256[:8]}.npz"


def segment(part: str, name: str, cases: Callable[[Experiment], Iterable[Case]], wanted: list[str]) -> None:
    """Experiments 2 and 3: run the methods that are wanted, and write down all that are known."""
    e = Experiment(name)
    makers = e.makers()
    test: list[Case] = []
    for method in wanted or list(makers):
        path = e.kept(part, method)
        if not path.exists():
            test = test or list(cases(e))
            segmentation.run_method(makers[method](), e.validation(), test, e.manifest).save(path)
        outcomes = {m: Outcome.load(e.kept(part, m)) for m in makers if e.kept(part, m).exists()}
        write(part, e, {"kinds": segmentation.table(outcomes), "methods": {m: _facts(o) for m, o in outcomes.items()}})


def _facts(outcome: Outcome) -> Document:
    return {
        "choice": asdict(outcome.choice),
        "seconds_per_slice": outcome.seconds_per_slice,
        "parameters": outcome.parameters,
    }


def write(part: str, e: Experiment, document: Document) -> None:
    """The numbers of a part."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    whole = {"provenance": e.provenance(), **document}
    (RESULTS / f"{part}.json").write_text(json.dumps(whole, indent=1) + "\n")


def pictures(part: str, name: str, wanted: list[str]) -> None:
    """Experiment 1."""
    e = Experiment(name)
    target = RESULTS / f"{part}.json"
    known: Document = json.loads(target.read_text()) if target.exists() else {}
    current = known.get("provenance", {}).get("bundle_sha256") == e.bundle.sha256
    rows: Document = known["methods"] if current else {}
    healthy, near = imagewise.healthy_and_near(e.config, e.manifest, "validation")
    test, near_test = imagewise.healthy_and_near(e.config, e.manifest, "test")
    anomalous = [near_test, *imagewise.foreign(e.config, e.manifest)]
    for method in wanted or [OURS, "vqvae", *AUTOENCODERS, "transformer"]:
        if method in rows:
            continue
        start = time.perf_counter()
        scores = _scores(e, method)
        chosen = imagewise.choose_score(scores, healthy, near)
        rows[method] = imagewise.judge(scores, chosen, test, anomalous)
        rows[method]["whole_seconds"] = time.perf_counter() - start
        write(part, e, {"methods": rows})


def _scores(e: Experiment, method: str) -> imagewise.Scores:
    if method == OURS:
        return imagewise.our_scores(e.models, e.manifest)
    if method == "vqvae":
        return imagewise.reconstruction_scores(lambda x: e.models.decode(e.models.encode(x)))
    train(OPPONENTS[method], e.config)
    if method == "transformer":
        networks = methods.vqvae_networks(e.config)
        network = load(OPPONENTS[method], e.config)
        return imagewise.likelihood_scores(methods.Transformer(networks, network, e.config.seed))
    return imagewise.reconstruction_scores(methods.reconstructing(method, e.config))


def show(_: list[str]) -> None:
    """The figure."""
    shown = []
    for name in figure.SHOWN:
        e = Experiment(name)
        shown += figure.panels(e.config, e.models, e.manifest)
    figure.draw(shown, FIGURE)


PARTS: dict[str, Callable[[list[str]], None]] = {
    "imagewise": lambda wanted: pictures("imagewise", "headct", wanted),
    "sprites": lambda wanted: segment("sprites", "headct", lambda e: synthetic(e.config, e.manifest, "test"), wanted),
    "shapes": lambda wanted: segment("shapes", "t1", lambda e: synthetic(e.config, e.manifest, "test"), wanted),
    "tumours": lambda wanted: segment("tumours", "flair", lambda e: tumours(e.config, e.manifest), wanted),
    "ms-t1": lambda wanted: segment("ms-t1", "t1", lambda e: multiple_sclerosis(e.manifest, "T1"), wanted),
    "stripped": lambda wanted: segment(
        "stripped", "flair", lambda e: [*multiple_sclerosis(e.manifest, "FLAIR"), *brats(e.manifest)], wanted
    ),
    "figure": show,
}
