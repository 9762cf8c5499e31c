"""The denoiser's convolutions in int8, for CPUs: static, per channel, from healthy training slices.

Encoder and decoder stay float32: rounded, latents would fall on other codes. Decision 17 has the numbers, and
`python -m benchmarks.int8_variants` measures what other choices cost and buy.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from app.pipeline.diffusion import KeyedNoise, Purpose, Schedule
from app.pipeline.networks import Denoiser, Encoder
from app.volume import FloatArray
from training.config import Config
from training.data import UINT16_MAX, cached_slices

# Of the training slices, evenly spread, that the ranges of activations are taken from; the memory of calibration grows
# with a batch.
SLICES, BATCH = 24, 4
# Bytes of a tensor that is worth a reference to another file.
WORTHWHILE = 1024

Feed = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Kept:
    """Convolutions at either end of a graph that stay float32."""

    first: int
    last: int


# Less would be faster by a tenth, and off by ten times as much: both ends see the noise itself.
KEPT = Kept(4, 7)


@dataclass(frozen=True, eq=False)
class Healthy:
    """What the networks see in serving: slices, their latents, and those diffused to each noise level.

    Attributes
    ----------
    x, z0 : list of ndarray
        Slices and latents of each batch.
    z_t, t, epsilon : list of ndarray
        Of each batch and noise level: the denoiser's inputs, and the noise that it should find.
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


def noise_levels(config: Config) -> list[int]:
    """Every t at which serving evaluates the denoiser."""
    d = config.detection
    return sorted({*d.kl_timesteps, *d.gate_timesteps, *d.reverse_timesteps})


def healthy(config: Config, encode: Encoder, part: str, slices: int = SLICES) -> Healthy:
    """Evenly spread slices of a part of the split, never of `test`, at every noise level."""
    assert part in ("train", "validation"), part
    s = config.schedule
    schedule = Schedule.linear(s.steps, s.beta_start, s.beta_end)
    stack, found = cached_slices(config, part), Healthy()
    chosen = np.unique(np.linspace(0, len(stack) - 1, slices).round().astype(int))
    for some in np.split(chosen, range(BATCH, len(chosen), BATCH)):
        found.x.append(stack[some].astype(np.float32)[:, None] / UINT16_MAX)
        found.z0.append(encode(found.x[-1]))
        _, channels, rows, columns = found.z0[-1].shape
        noise = KeyedNoise(config.seed, (channels, rows, columns))
        for t in noise_levels(config):
            found.epsilon.append(noise(Purpose.KL, some, t))
            found.z_t.append(schedule.diffuse(found.z0[-1], found.epsilon[-1], t))
            found.t.append(np.full(len(some), t, dtype=np.int64))
    return found


def noise_error(denoise: Denoiser, exact: Denoiser, seen: Healthy) -> dict[int, float]:
    """Squared difference from float32's noise as a share of float32's own squared error, by noise level."""
    added: dict[int, list[float]] = {}
    own: dict[int, list[float]] = {}
    for z_t, t, epsilon in zip(seen.z_t, seen.t, seen.epsilon, strict=True):
        expected = exact(z_t, t)
        added.setdefault(int(t[0]), []).append(float(np.mean((denoise(z_t, t) - expected) ** 2)))
        own.setdefault(int(t[0]), []).append(float(np.mean((expected - epsilon) ** 2)))
    return {t: float(np.mean(added[t]) / np.mean(own[t])) for t in added}


def quantise(source: Path, target: Path, feeds: Iterable[Feed], kept: Kept, method: str = "MinMax") -> None:
    """Write a graph whose convolutions are in int8.

    Weights have 7 bits: on a processor without VNNI, onnxruntime adds two products of 8 bits in 16, which overflow.

    Parameters
    ----------
    source, target : Path
        The float32 graph; the int8 one.
    feeds : iterable of dict
        Inputs that the ranges of activations are taken from.
    kept : Kept
    method : str
        Of onnxruntime's calibration: MinMax, Percentile or Entropy.

    Raises
    ------
    ValueError
        As many layers are kept as there are.
    """
    from onnxruntime import quantization  # noqa: PLC0415 - half a second that a float32 export does without
    from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: PLC0415

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
            reduce_range=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=["Conv"],
            nodes_to_exclude=kept_layers(onnx.load(shaped), kept),
            calibrate_method=quantization.CalibrationMethod[method],
        )


def kept_layers(model: onnx.ModelProto, kept: Kept) -> list[str]:
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


def share_weights(path: Path, whole: Path) -> None:
    """Have a graph read the weights that it has in common with another one from that one's file, in the same folder."""
    model, held = onnx.load(path), whole.read_bytes()
    for tensor in _large(model):
        if (offset := held.find(tensor.raw_data)) < 0:
            continue
        where = {"location": whole.name, "offset": str(offset), "length": str(len(tensor.raw_data))}
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in where.items():
            tensor.external_data.append(onnx.StringStringEntryProto(key=key, value=value))
    path.write_bytes(model.SerializeToString(deterministic=True))


def _large(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.raw_data) >= WORTHWHILE:
            yield tensor
