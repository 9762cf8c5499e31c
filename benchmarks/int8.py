"""The bundle's networks in int8: static, per channel, calibrated on healthy training slices.

Cases are judged on validation subjects, so none of those is calibrated on. `python -m benchmarks.int8_variants`
measures what each choice of the layers that stay float32 costs and buys.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from app.manifest import Gate, Manifest, Range
from app.runtime.bundle import MANIFEST, Bundle, load_bundle
from app.runtime.session import as_callable, open_session
from app.volume import FloatArray

if TYPE_CHECKING:
    from benchmarks.worker import Measured

CACHE = Path(__file__).resolve().parents[1] / "runs" / "int8"
# Every score is inside.
EVERYTHING = Range(low=-1e30, high=1e30)
CALLS = {"encoder": "encode", "denoiser": "denoise", "decoder": "decode"}

Feed = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Kept:
    """Convolutions at either end of a graph that stay float32."""

    first: int
    last: int


@dataclass(frozen=True)
class Settings:
    """How a bundle is quantised: its convolutions, for everything between them stays float32.

    Attributes
    ----------
    encoder, denoiser, decoder : Kept or None
        None leaves the whole network in float32.
    method : str
        Of onnxruntime's calibration: MinMax, Percentile or Entropy.
    subjects, slices : int
        Healthy subjects, and evenly spread slices of each, that are calibrated on, at every noise level.
    """

    encoder: Kept | None = Kept(1, 1)
    denoiser: Kept | None = Kept(1, 4)
    decoder: Kept | None = Kept(1, 1)
    method: str = "MinMax"
    subjects: int = 6
    slices: int = 4

    @property
    def networks(self) -> dict[str, Kept]:
        """Those in int8."""
        asked = {"encoder": self.encoder, "denoiser": self.denoiser, "decoder": self.decoder}
        return {name: kept for name, kept in asked.items() if kept is not None}


CHOSEN = Settings()


@dataclass(frozen=True, eq=False)
class Healthy:
    """What the networks see in serving: slices, their latents, and those diffused to each noise level.

    Attributes
    ----------
    x, z0 : list of ndarray
        Slices and latents of each subject.
    z_t, t, epsilon : list of ndarray
        Of each subject and noise level: the denoiser's inputs, and the noise that it should find.
    """

    x: list[FloatArray] = field(default_factory=list)
    z0: list[FloatArray] = field(default_factory=list)
    z_t: list[FloatArray] = field(default_factory=list)
    t: list[npt.NDArray[np.int64]] = field(default_factory=list)
    epsilon: list[FloatArray] = field(default_factory=list)

    def feeds(self, network: str) -> list[Feed]:
        """A network's inputs by name, a batch at a time."""
        if network == "denoiser":
            return [{"z_t": z_t, "t": t} for z_t, t in zip(self.z_t, self.t, strict=True)]
        return [{"x": x} for x in self.x] if network == "encoder" else [{"z0": z0} for z0 in self.z0]


def noise_levels(manifest: Manifest) -> list[int]:
    """Every t at which serving evaluates the denoiser."""
    return sorted({*manifest.kl.timesteps, *manifest.gate.timesteps, *manifest.reverse.timesteps})


def healthy(bundle: Bundle, config: Path, part: str, subjects: int, slices: int) -> Healthy:
    """Some slices of the first subjects of a part of the split, never of `test`, at every noise level."""
    from app.pipeline.noise import KeyedNoise, Purpose
    from app.pipeline.prepare import analysed_slices, to_slices
    from app.pipeline.schedule import Schedule
    from benchmarks.worker import spread
    from training.config import Config
    from training.data import load_volume, subject_path
    from training.splits import load_split

    assert part in ("train", "validation"), part
    manifest, s = bundle.manifest, bundle.manifest.schedule
    schedule = Schedule.linear(s.steps, s.beta_start, s.beta_end)
    noise = KeyedNoise(manifest.seed, manifest.latent_shape)
    settings, found = Config.load(config), Healthy()
    for subject in getattr(load_split(settings.data.splits), part)[:subjects]:
        stack = to_slices(load_volume(subject_path(settings, subject)), manifest.preparation)
        some = spread(analysed_slices(stack, manifest.preparation), slices)
        found.x.append(stack.x[some])
        found.z0.append(bundle.models.encode(stack.x[some]))
        for t in noise_levels(manifest):
            found.epsilon.append(noise(Purpose.KL, some, t))
            found.z_t.append(schedule.diffuse(found.z0[-1], found.epsilon[-1], t))
            found.t.append(np.full(len(some), t, dtype=np.int64))
    return found


def quantise(source: Path, target: Path, feeds: Iterable[Feed], kept: Kept, method: str = "MinMax") -> None:
    """Write a graph whose convolutions are in int8.

    Parameters
    ----------
    source, target : Path
        The float32 graph; the int8 one.
    feeds : iterable of dict
        Inputs that the ranges of activations are taken from.
    kept : Kept
    method : str
        Of `Settings`.

    Raises
    ------
    ValueError
        As many layers are kept as there are.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rest = iter(feeds)

        def get_next(self) -> Feed | None:
            return next(self._rest, None)

    with TemporaryDirectory() as scratch:
        shaped = Path(scratch) / "shaped.onnx"
        # Symbolic shapes come out incomplete on the denoiser; the plain ones are all there.
        quant_pre_process(source, shaped, skip_symbolic_shape=True)
        quantization.quantize_static(
            shaped,
            target,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=["Conv"],
            nodes_to_exclude=kept_layers(onnx.load(shaped), kept),
            calibrate_method=quantization.CalibrationMethod[method],
        )


def kept_layers(model: Any, kept: Kept) -> list[str]:
    """Names of the convolutions that stay float32.

    Raises
    ------
    ValueError
        As many are kept as there are.
    """
    names = [node.name for node in model.graph.node if node.op_type == "Conv"]
    if kept.first + kept.last >= len(names):
        raise ValueError(
            f"{kept.first} + {kept.last} of {len(names)} convolutions would stay float32, expected fewer: "
            "set `first` and `last` lower"
        )
    return names[: kept.first] + names[len(names) - kept.last :]


def int8_graphs(bundle: Path, config: Path, settings: Settings = CHOSEN, cache: Path = CACHE) -> dict[str, Path]:
    """A bundle's networks in int8; made once for each bundle, configuration, settings and onnxruntime."""
    import onnxruntime

    key = hashlib.sha256((bundle / MANIFEST).read_bytes() + config.read_bytes())
    key.update(f"{settings} {onnxruntime.__version__}".encode())
    folder = cache / f"{bundle.name}-{key.hexdigest()[:16]}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        loaded = load_bundle(bundle)
        seen = healthy(loaded, config, "train", settings.subjects, settings.slices)
        with TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            for name, kept in settings.networks.items():
                source = bundle / getattr(loaded.manifest.files, name).name
                quantise(source, made / f"{name}.onnx", seen.feeds(name), kept, settings.method)
            made.rename(folder)
    return {name: folder / f"{name}.onnx" for name in settings.networks}


def in_int8(bundle: Bundle, graphs: dict[str, Path]) -> Bundle:
    """The bundle, with these networks in place of its own."""
    calls = {CALLS[name]: as_callable(open_session(path, bundle.provider)) for name, path in graphs.items()}
    return replace(bundle, models=replace(bundle.models, **calls))


def open_gate(gate: Gate) -> Gate:
    """A gate that every number passes, and NaN does not."""
    typical = (EVERYTHING,) * len(gate.typical)
    return gate.model_copy(update={"typical": typical, "reconstruction": EVERYTHING, "max_fraction_out": 1.0})


def judge_both(measured: "Measured") -> dict[str, Any]:
    """Accuracy as served; and without the gate, whose ranges are float32's, where it refused."""
    from benchmarks.accuracy import judge

    found = judge(measured)
    if found["refused"]:
        gate = measured.manifest.gate
        measured.manifest = measured.manifest.model_copy(update={"gate": open_gate(gate)})
        found["without_gate"] = judge(measured)
        measured.manifest = measured.manifest.model_copy(update={"gate": gate})
    return found
