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
    """

    name: str
    title: str
    sample: int | None
    batch: int
    trained: bool
    judged_as: str | None = None


SERVICE, INT8, OWN = "service", "service-int8", "torch-own"
# Measured as served, through onnxruntime.
SERVED = (SERVICE, INT8)

ROWS = (
    Row(SERVICE, "this service (onnxruntime)", None, 16, trained=True),
    Row(INT8, "this service in int8", None, 16, trained=True),
    Row(OWN, "the service's method in torch", None, 16, trained=True),
    Row("ddim-batch", "the paper, 200 KL + 50 DDIM steps, torch, batched", 16, 16, trained=True),
    Row(
        "ddim-slice",
        "the paper, 200 KL + 50 DDIM steps, torch, slice by slice",
        4,
        1,
        trained=True,
        judged_as="ddim-batch",
    ),
    Row("ancestral-batch", "the paper, 200 KL + 500 ancestral steps, torch, batched", 16, 16, trained=True),
    Row(
        "ancestral-slice",
        "the paper, 200 KL + 500 ancestral steps, torch, slice by slice",
        2,
        1,
        trained=True,
        judged_as="ancestral-batch",
    ),
    Row("pixel-250", "diffusion in pixel space, 250 steps, torch, batched", 8, 8, trained=False),
    Row("pixel-500", "diffusion in pixel space, 500 steps, torch, batched", 8, 8, trained=False),
    Row("transformer", "autoregressive transformer on the codes, cached, torch, batched", 16, 16, trained=False),
)
