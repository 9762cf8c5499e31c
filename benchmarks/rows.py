"""The rows of the table: what is measured, on how much of a volume, and whether its weights were trained."""

from dataclasses import dataclass

UNTRAINED = "untrained weights: time only"


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes
    ----------
    name : str
        Key in the JSON.
    title : str
    sample : int or None
        Slices that are measured and scaled by the slice count; None where the whole volume is.
    batch : int
        Slices in one evaluation.
    trained : bool
        Else there is nothing to say of its accuracy.
    judged_as : str or None
        The row whose accuracy it has: the same algorithm in other batches.
    every : int
        Of its loop over noise levels, or over the members of its ensemble, one in so many is measured, and the loop's
        seconds are multiplied: all cost alike.
    costly : bool
        Its accuracy takes minutes a case: measured only where it is asked for.
    """

    name: str
    title: str
    sample: int | None
    batch: int
    trained: bool
    judged_as: str | None = None
    every: int = 1
    costly: bool = False


SERVICE, FLOAT32, OWN, TRANSFORMER = "service", "service-float32", "torch-own", "transformer"
# As many as `training.experiments.transformer` has, which imports torch.
ENSEMBLE, MEMBERS = "transformer-ensemble", 4
# Names say it: of the published size, the known codes fed at once, an ensemble.
KNOWN, PUBLISHED = "transformer-known", "transformer-published"
PUBLISHED_KNOWN = "transformer-published-known"
# Eight orderings, by a public summary of the full text of arXiv 2102.11650, which was not at hand itself.
PUBLISHED_ENSEMBLE, PUBLISHED_MEMBERS = "transformer-published-ensemble", 8
PUBLISHED_KNOWN_ENSEMBLE = "transformer-published-known-ensemble"
DDIM, ANCESTRAL = "200 KL + 50 DDIM steps", "200 KL + 500 ancestral steps"
# Measured as served, through onnxruntime.
SERVED = (SERVICE, FLOAT32)

ROWS = (
    Row(SERVICE, "this service (onnxruntime)", None, 16, trained=True),
    Row(FLOAT32, "this service in float32", None, 16, trained=True),
    Row(OWN, "the service's method in torch", None, 16, trained=True),
    Row("ddim-batch", f"the paper, {DDIM}, torch, batched", 16, 16, trained=True, every=10),
    Row("ddim-slice", f"the paper, {DDIM}, torch, slice by slice", 4, 1, True, "ddim-batch", every=10),
    Row("ancestral-batch", f"the paper, {ANCESTRAL}, torch, batched", 16, 16, trained=True, every=20, costly=True),
    Row("ancestral-slice", f"the paper, {ANCESTRAL}, torch, slice by slice", 2, 1, True, "ancestral-batch", every=20),
    Row("pixel-250", "diffusion in pixel space, 250 steps, torch, batched", 8, 8, trained=False, every=25),
    Row("pixel-500", "diffusion in pixel space, 500 steps, torch, batched", 8, 8, trained=False, every=50),
    Row(TRANSFORMER, "autoregressive transformer on the codes, cached, torch, batched", 16, 16, trained=False),
    Row(ENSEMBLE, f"the same, its ensemble of {MEMBERS}", 16, 16, trained=False, every=MEMBERS),
    Row(KNOWN, "the transformer, known codes fed at once", 8, 1, trained=False),
    Row(PUBLISHED, "the transformer in the published size, cached, batched", 8, 8, trained=False),
    Row(PUBLISHED_ENSEMBLE, f"the same, an ensemble of {PUBLISHED_MEMBERS}", 8, 8, False, every=PUBLISHED_MEMBERS),
    Row(PUBLISHED_KNOWN, "the published size, known codes fed at once", 4, 1, trained=False),
    Row(
        PUBLISHED_KNOWN_ENSEMBLE, f"the same, an ensemble of {PUBLISHED_MEMBERS}", 4, 1, False, every=PUBLISHED_MEMBERS
    ),
)


def kind_of(row: Row) -> str:
    """What its variants have in common."""
    return row.name.partition("-")[0]
