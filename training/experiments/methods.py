"""Names, definitions and training budgets of all methods that are compared. Needs no torch."""

from dataclasses import dataclass, replace
from typing import Literal

COUNTERPART, TRANSFORMER, ENSEMBLE = "counterpart", "transformer", "transformer-ensemble"

# The part of a bundle that a method's anomaly map depends on. Each part includes the ones after it.
DependsOn = Literal["detection", "codes", "cases"]


@dataclass(frozen=True)
class MethodInfo:
    """Method of the tables.

    Attributes
    ----------
    title, definition : str
        For the page. The definition cites its source.
    depends_on : str
        Everything that decides Counterpart's map, the codes of the bundle's VQ-VAE, or only the slices.
    """

    title: str
    definition: str
    depends_on: DependsOn = "cases"


METHOD_INFO = {
    COUNTERPART: MethodInfo(
        "Counterpart",
        "the shipped bundle. A latent diffusion model trained with coarse noise patches "
        "([decision 8](../decisions/0008-coarse-noise.md)), a KL map at one low noise level, one reverse step and four "
        "views of a slice. It is a variant of Pinaya et al. 2022 "
        "([arXiv 2206.03461](https://arxiv.org/abs/2206.03461)).",
        "detection",
    ),
    "intensity": MethodInfo(
        "intensity threshold",
        "the slice's own intensity: bright, dark, or far from the slice's median. On FLAIR only bright is used.",
    ),
    "mean": MethodInfo("mean healthy slice", "the difference between a slice and the mean healthy training slice."),
    "vqvae": MethodInfo(
        "VQ-VAE",
        "the difference between a slice and its reconstruction by the bundle's VQ-VAE, without diffusion.",
        "codes",
    ),
    "dense-ae": MethodInfo(
        "dense autoencoder",
        "reconstruction error of an autoencoder with a vector bottleneck (Baur et al. 2021, "
        "[arXiv 2004.03271](https://arxiv.org/abs/2004.03271)).",
    ),
    "spatial-ae": MethodInfo(
        "spatial autoencoder",
        "reconstruction error of an autoencoder with a convolutional bottleneck (the same paper).",
    ),
    "vae": MethodInfo(
        "variational autoencoder", "reconstruction error of a VAE with a vector bottleneck (the same paper)."
    ),
    TRANSFORMER: MethodInfo(
        "transformer",
        "an autoregressive transformer on the bundle's VQ-VAE codes. Unlikely codes are resampled and the difference "
        "from the decoded slice is the map (Pinaya et al. 2021, [arXiv 2102.11650](https://arxiv.org/abs/2102.11650)).",
        "codes",
    ),
    ENSEMBLE: MethodInfo(
        "transformer ensemble", "the mean map of four such resamplings: two draws, as is and mirrored.", "codes"
    ),
}


@dataclass(frozen=True)
class Budget:
    """Training of a baseline: `steps` batches, with a cosine schedule from `learning_rate`."""

    name: str
    steps: int
    batch: int
    learning_rate: float

    def __str__(self) -> str:
        return f"{self.steps} x {self.batch} slices"


BUDGETS = {name: Budget(name, 1500, 32, 1e-3) for name in ("dense-ae", "spatial-ae", "vae", TRANSFORMER)}
# On a CPU, 1,500 batches of 32 T1 slices of 1,920 codes take four hours (decision 20).
SMALLER_BATCHES = {(TRANSFORMER, "t1"): 8}


def budget_of(name: str, bundle: str) -> Budget:
    """Return the training budget of a baseline for a bundle."""
    usual = BUDGETS[name]
    return replace(usual, batch=SMALLER_BATCHES.get((name, bundle), usual.batch))


def describe_budget(method: str, bundle: str) -> str:
    """Return a method's training budget as text. It is empty if the method is not trained here."""
    name = TRANSFORMER if method == ENSEMBLE else method
    return str(budget_of(name, bundle)) if name in BUDGETS else ""
