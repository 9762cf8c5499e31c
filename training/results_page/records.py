"""Records that the page is written from, each with the bundle that it was measured with."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from app.runtime.bundle import MANIFEST
from training.config import ROOT, Config

DOCS = ROOT / "docs"
MODELS = ("t1", "flair", "headct", "ct")
# `headct` on the patients of `ct`: `python -m training.evaluate training/configs/ct.toml haemorrhage --bundle
# models/headct-VERSION --output docs/evaluation/headct-on-ct-ich`.
HEADCT_ON_CT_ICH = Path("evaluation", "headct-on-ct-ich", "ct.json")
EARLIER_VERSION, EARLIER_FILE = "earlier version", "earlier file"

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Bundles:
    """Names of bundles.

    Attributes
    ----------
    ids : dict of str to str
        Id of each bundle whose manifest has the hash that is the key.
    shipped : dict of str to str
        Hash of the shipped bundle of each model.
    """

    ids: dict[str, str]
    shipped: dict[str, str]

    @classmethod
    def load(cls, docs: Path = DOCS) -> "Bundles":
        """Read the manifests in models/, and the provenance of docs/results, which also has earlier bundles."""
        ids = {
            digest: bundle
            for path in sorted((docs / "results").glob("*.json"))
            for digest, bundle in _bundles_of(json.loads(path.read_text()))
        }
        present = {_hash_of(path): path.parent.name for path in (ROOT / "models").glob(f"*/{MANIFEST}")}
        folders = {
            model: Config.load(ROOT / "training" / "configs" / f"{model}.toml").bundle_folder.name for model in MODELS
        }
        hashes = {bundle: digest for digest, bundle in present.items()}
        return cls(ids | present, {model: hashes.get(folder, "") for model, folder in folders.items()})

    def label(self, model: str, digest: str) -> str:
        """Name the bundle that a hash belongs to, and state whether it is an earlier one."""
        shipped = self.shipped[model]
        if digest == shipped:
            return self.ids[digest]
        bundle = self.ids.get(digest, model)
        return f"{bundle} ({EARLIER_FILE if bundle == self.ids.get(shipped) else EARLIER_VERSION})"

    def label_id(self, bundle: str) -> str:
        """State whether a bundle, named by its id, is an earlier one."""
        model = bundle.rpartition("-")[0]
        return bundle if bundle == self.ids.get(self.shipped[model]) else f"{bundle} ({EARLIER_VERSION})"


def _hash_of(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def _bundles_of(value: Any) -> Iterator[tuple[str, str]]:
    """Yield the hash and the id of each bundle in the provenance of a document."""
    if isinstance(value, list):
        for each in value:
            yield from _bundles_of(each)
    elif isinstance(value, dict):
        if {"bundle", "bundle_sha256"} <= value.keys():
            yield value["bundle_sha256"], value["bundle"]
        for each in value.values():
            yield from _bundles_of(each)


@dataclass(frozen=True)
class Part:
    """Measured rows, with the label and the hash of their bundle."""

    model: str
    label: str
    digest: str
    rows: Rows


@dataclass(frozen=True)
class Records:
    """All records of the page. A part that was not measured is missing.

    Attributes
    ----------
    evaluation : dict of (str, str) to Part
        Parts of docs/evaluation by model and name.
    stripped : dict of str to Part
        Dice of `flair` in skull-stripped FLAIR by the kind of lesion, from docs/results.
    benchmarks : dict
        docs/BENCHMARKS.json; empty if there is none.
    bundles : Bundles
    """

    evaluation: dict[tuple[str, str], Part]
    stripped: dict[str, Part]
    benchmarks: dict[str, Any]
    bundles: Bundles

    @classmethod
    def load(cls, docs: Path = DOCS) -> "Records":
        """Read all records below docs/."""
        bundles = Bundles.load(docs)
        files = [(model, docs / "evaluation" / f"{model}.json") for model in MODELS]
        evaluation = {
            (model, name): Part(model, bundles.label(model, part["bundle_sha256"]), part["bundle_sha256"], part["rows"])
            for model, path in [*files, ("headct", docs / HEADCT_ON_CT_ICH)]
            for name, part in _read(path).items()
        }
        return cls(
            evaluation,
            _stripped(_read(docs / "results" / "stripped.json"), bundles),
            _read(docs / "BENCHMARKS.json"),
            bundles,
        )

    def find(self, name: str) -> list[Part]:
        """Return a part of every model that has it."""
        return [self.evaluation[model, name] for model in MODELS if (model, name) in self.evaluation]


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _stripped(document: dict[str, Any], bundles: Bundles) -> dict[str, Part]:
    """Return the shipped Dice of each scan with the label of the bundle, by the kind of lesion."""
    if not document:
        return {}
    digest = document["provenance"]["bundle_sha256"]
    label = bundles.label("flair", digest)
    return {
        kind: Part("flair", label, digest, [{"dice": dice} for dice in scores["counterpart"]["scans"]["shipped"]])
        for kind, scores in document["kinds"].items()
    }
