"""One bundle of the experiments: its networks, all methods that are compared with it, and what numbers belong to."""

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from app.manifest import Manifest
from app.runtime.bundle import Bundle, load_bundle
from training.config import NOT_OF_THE_SLICES, ROOT, Config
from training.data import data_hash
from training.experiments import healing, methods
from training.experiments.cases import Case, Part, for_choices
from training.experiments.methods import BATCH, OURS, Method
from training.experiments.opponents import bundle_folder, opponent_of, train
from training.splits import FOLDER, load_split

AUTOENCODERS = ("dense-ae", "spatial-ae", "vae")
# Healthy validation scans that the transformer's threshold comes from.
CALIBRATION_SCANS = 4

# What of a manifest decides an anomaly map and its mask; the gate, which the experiments leave open, and words do not.
OF_A_MAP = ("preparation", "latent", "schedule", "seed", "views", "kl", "reverse", "residual", "precision")
NETWORKS = ("encoder", "denoiser", "denoiser_int8", "decoder")

# What decides a number, beside data and bundle.
CODE = ("app", "training", "pyproject.toml")

Document = dict[str, Any]


def code_version(root: Path = ROOT) -> str:
    """The commit, and "-dirty" where code was changed since; a document that an experiment has just written is none."""
    git = shutil.which("git")

    def tell(*words: str) -> str:
        told = subprocess.run([git or "", *words], cwd=root, capture_output=True, check=False)  # noqa: S603
        return told.stdout.decode().strip()

    commit = tell("rev-parse", "--short", "HEAD") if git else ""
    return commit + ("-dirty" if tell("status", "--porcelain", "--", *CODE) else "") if commit else "unknown"


def detection_hash(manifest: Manifest) -> str:
    """SHA-256 over all of a bundle that decides what it finds in a scan that the gate lets in."""
    # Without defaults: a setting that is new, and that this bundle does not use, changes nothing that was measured.
    told = manifest.model_dump(mode="json", include={*OF_A_MAP}, exclude_defaults=True)
    told["files"] = {name: file.sha256 for name, file in manifest.files if name in NETWORKS and file is not None}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def cases_hash(manifest: Manifest) -> str:
    """SHA-256 over what of a bundle decides the slices that every method sees, and where it is judged."""
    told = manifest.preprocessing.model_dump(mode="json", exclude=NOT_OF_THE_SLICES, exclude_defaults=True)
    return hashlib.sha256(json.dumps([told, manifest.residual.erosion], sort_keys=True).encode()).hexdigest()


def codes_hash(manifest: Manifest) -> str:
    """SHA-256 over what decides those slices and their codes in the bundle's VQ-VAE."""
    told = [cases_hash(manifest), manifest.files.encoder.sha256, manifest.files.decoder.sha256]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


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
        self.networks = self.bundle.networks.in_batches(BATCH, lambda _: None)
        self.choices: list[Case] = []

    def makers(self) -> dict[str, Callable[[], Method]]:
        """Every method by name, made when it is asked for: an opponent that is not trained yet is trained then."""
        plain = methods.without_model
        made: dict[str, Callable[[], Method]] = {
            OURS: lambda: Method(
                OURS, "Counterpart", {"": methods.ours(self.networks, self.manifest)}, (methods.AS_IT_IS,), self._size()
            ),
            "intensity": lambda: plain(self.config)["intensity"],
            "mean": lambda: plain(self.config)["mean"],
            "vqvae": lambda: methods.plain_vqvae(methods.vqvae_networks(self.config)),
        }
        made |= {name: partial(self._autoencoder, name) for name in AUTOENCODERS}
        return made | {name: partial(self._transformer, name) for name in ("transformer", "transformer-ensemble")}

    def _size(self) -> int:
        networks = methods.vqvae_networks(self.config)
        return sum(methods.network_size(n) for n in (networks.encoder, networks.denoiser, networks.decoder))

    def _autoencoder(self, name: str) -> Method:
        train(opponent_of(name, self.config.name), self.config)
        return methods.autoencoder(name, self.config)

    def _transformer(self, name: str) -> Method:
        train(opponent_of("transformer", self.config.name), self.config)
        healthy = [c.x.copy() for c in self.validation()[:CALIBRATION_SCANS]]
        return healing.transformers(self.config, methods.vqvae_networks(self.config), healthy)[name]

    def validation(self) -> list[Case]:
        """What an opponent's post-processing is chosen by; made once."""
        self.choices = self.choices or for_choices(self.config, self.manifest)
        return self.choices

    def provenance(self, part: Part = "test") -> Document:
        """What numbers on a part of the split belong to."""
        split = load_split(self.config.data.splits)
        subjects = split.test if part == "test" else split.validation
        return {
            "bundle": self.manifest.id,
            "bundle_sha256": self.bundle.sha256,
            "cases_sha256": cases_hash(self.manifest),
            "codes_sha256": codes_hash(self.manifest),
            "detection_sha256": detection_hash(self.manifest),
            "data_sha256": data_hash(self.config, subjects),
            "split": self.config.data.splits,
            "split_sha256": hashlib.sha256((FOLDER / self.config.data.splits).read_bytes()).hexdigest(),
            "seed": self.config.seed,
            "code": code_version(),
            "threads": torch.get_num_threads(),
        }
