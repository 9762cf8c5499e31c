"""Rows of the table: the compared methods, and how much of a volume each is timed on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes
    ----------
    name : str
        Key in the JSON and on the command line.
    title : str
    sample : int or None
        Number of slices that are timed. Their time is scaled to all slices. None times the whole volume.
    batch : int
        Slices in one network evaluation.
    is_trained : bool
        Methods with untrained weights are only timed.
    accuracy_of : str or None
        Row with the same algorithm in other batches. Its accuracy is shown.
    stride : int
        One noise level (or member of an ensemble) in `stride` is timed and the time of the loop multiplied, because
        all cost the same.
    is_slow : bool
        The accuracy takes minutes per case and is measured only with --thorough.
    """

    name: str
    title: str
    sample: int | None
    batch: int
    is_trained: bool
    accuracy_of: str | None = None
    stride: int = 1
    is_slow: bool = False

    @property
    def family(self) -> str:
        """First word of the name, which the variants of one method share."""
        return self.name.partition("-")[0]


SERVICE, FLOAT32, TORCH, TRANSFORMER = "service", "service-float32", "torch-own", "transformer"
ENSEMBLE, KNOWN = "transformer-ensemble", "transformer-known"
PUBLISHED, PUBLISHED_ENSEMBLE = "transformer-published", "transformer-published-ensemble"
PUBLISHED_KNOWN, PUBLISHED_KNOWN_ENSEMBLE = "transformer-published-known", "transformer-published-known-ensemble"
# As in `training.experiments.transformer`, which imports torch.
MEMBERS = 4
# Eight orderings, according to a public summary of arXiv 2102.11650. The full text was not available.
PUBLISHED_MEMBERS = 8
DDIM, ANCESTRAL = "200 KL + 50 DDIM steps", "200 KL + 500 ancestral steps"
# These rows run through onnxruntime, as in the service.
ONNX_ROWS = (SERVICE, FLOAT32)

ROWS = (
    Row(SERVICE, "Counterpart (onnxruntime)", None, 16, is_trained=True),
    Row(FLOAT32, "Counterpart in float32", None, 16, is_trained=True),
    Row(TORCH, "Counterpart's method in torch", None, 16, is_trained=True),
    Row("ddim-batch", f"paper, {DDIM}, torch, in batches", 16, 16, is_trained=True, stride=10),
    Row("ddim-slice", f"paper, {DDIM}, torch, slice by slice", 4, 1, True, "ddim-batch", stride=10),
    Row("ancestral-batch", f"paper, {ANCESTRAL}, torch, in batches", 16, 16, True, stride=20, is_slow=True),
    Row("ancestral-slice", f"paper, {ANCESTRAL}, torch, slice by slice", 2, 1, True, "ancestral-batch", stride=20),
    Row("pixel-250", "pixel-space diffusion, 250 steps", 8, 8, is_trained=False, stride=25),
    Row("pixel-500", "pixel-space diffusion, 500 steps", 8, 8, is_trained=False, stride=50),
    Row(TRANSFORMER, "small transformer", 16, 16, is_trained=False),
    Row(ENSEMBLE, f"small transformer, ensemble of {MEMBERS}", 16, 16, is_trained=False, stride=MEMBERS),
    Row(KNOWN, "small transformer, known codes at once", 8, 1, is_trained=False),
    Row(PUBLISHED, "published transformer", 8, 8, is_trained=False),
    Row(
        PUBLISHED_ENSEMBLE, f"published transformer, ensemble of {PUBLISHED_MEMBERS}", 8, 8, False,
        stride=PUBLISHED_MEMBERS,
    ),
    Row(PUBLISHED_KNOWN, "published transformer, known codes at once", 4, 1, is_trained=False),
    Row(
        PUBLISHED_KNOWN_ENSEMBLE, f"published transformer, ensemble of {PUBLISHED_MEMBERS}, known codes at once", 4, 1,
        False, stride=PUBLISHED_MEMBERS,
    ),
)  # fmt: skip
BY_NAME = {row.name: row for row in ROWS}
