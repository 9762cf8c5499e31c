"""Quantisation of the denoiser's convolutions to int8 for CPUs.

It is static and per channel, and is calibrated on healthy training slices. Encoder and decoder stay in float32, because
rounded latents would be assigned to other codes (decision 17).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from app.pipeline.diffusion import Denoiser, Encoder, KeyedNoise, Purpose, Schedule
from app.volume import FloatArray
from training.config import Config
from training.data import UINT16_MAX, cached_slices

# Number of training slices in the calibration, and slices per batch: the memory of the calibration grows with a batch.
SLICES, BATCH = 24, 4
# Smaller tensors are not worth a reference to another file.
MIN_SHARED_BYTES = 1024

Feed = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Float32Layers:
    """Numbers of convolutions at the start and at the end of a graph that stay in float32."""

    first: int
    last: int


# Fewer layers would increase the error, because the layers at both ends process the noise itself (decision 17).
FLOAT32_LAYERS = Float32Layers(4, 7)


@dataclass(frozen=True, eq=False)
class CalibrationData:
    """Inputs of the denoiser and the added noise, for each batch and noise level."""

    z_t: list[FloatArray] = field(default_factory=list)
    t: list[npt.NDArray[np.int64]] = field(default_factory=list)
    epsilon: list[FloatArray] = field(default_factory=list)

    def feeds(self) -> list[Feed]:
        """Return the inputs of the denoiser by name, one entry per batch and noise level."""
        return [{"z_t": z_t, "t": t} for z_t, t in zip(self.z_t, self.t, strict=True)]


def noise_levels(config: Config) -> list[int]:
    """Return every time step at which serving runs the denoiser."""
    d = config.detection
    return sorted({*d.kl_timesteps, *d.ood_timesteps, *d.reverse_timesteps})


def calibration_data(config: Config, encode: Encoder, part: str, slices: int = SLICES) -> CalibrationData:
    """Return evenly spaced slices of the `train` or `validation` part of the split, at every noise level."""
    assert part in ("train", "validation"), part
    schedule = Schedule.from_settings(config.schedule)
    stack, data = cached_slices(config, part), CalibrationData()
    chosen = np.unique(np.linspace(0, len(stack) - 1, slices).round().astype(int))
    for indices in np.split(chosen, range(BATCH, len(chosen), BATCH)):
        z0 = encode(stack[indices].astype(np.float32)[:, None] / UINT16_MAX)
        _, channels, rows, columns = z0.shape
        noise = KeyedNoise(config.seed, (channels, rows, columns))
        for t in noise_levels(config):
            data.epsilon.append(noise(Purpose.KL, indices, t))
            data.z_t.append(schedule.diffuse(z0, data.epsilon[-1], t))
            data.t.append(np.full(len(indices), t, dtype=np.int64))
    return data


def noise_error(denoise: Denoiser, float32: Denoiser, data: CalibrationData) -> dict[int, float]:
    """Return the mean squared difference from float32, relative to float32's own squared error, by time step."""
    added: dict[int, list[float]] = {}
    own: dict[int, list[float]] = {}
    for z_t, t, epsilon in zip(data.z_t, data.t, data.epsilon, strict=True):
        expected = float32(z_t, t)
        added.setdefault(int(t[0]), []).append(float(np.mean((denoise(z_t, t) - expected) ** 2)))
        own.setdefault(int(t[0]), []).append(float(np.mean((expected - epsilon) ** 2)))
    return {t: float(np.mean(added[t]) / np.mean(own[t])) for t in added}


def quantise(source: Path, target: Path, feeds: Iterable[Feed], layers: Float32Layers) -> None:
    """Write a graph whose convolutions compute in int8.

    Weights use 7 bits: without VNNI, onnxruntime adds two products of 8 bits in 16 bits, which overflow.

    Parameters
    ----------
    source : Path
        Graph in float32.
    target : Path
        Graph to write.
    feeds : iterable of dict
        Inputs that determine the ranges of the activations.
    layers : Float32Layers

    Raises
    ------
    ValueError
        No convolution would be quantised.
    """
    from onnxruntime import quantization  # noqa: PLC0415 - takes half a second that an export in float32 does not need
    from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: PLC0415

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._remaining = iter(feeds)

        def get_next(self) -> Feed | None:
            return next(self._remaining, None)

    with TemporaryDirectory() as scratch:
        shaped = Path(scratch) / "shaped.onnx"
        # Symbolic shape inference is incomplete for the denoiser. Plain shape inference is sufficient.
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
            nodes_to_exclude=float32_layer_names(onnx.load(shaped), layers),
            calibrate_method=quantization.CalibrationMethod.MinMax,
        )


def float32_layer_names(model: onnx.ModelProto, layers: Float32Layers) -> list[str]:
    """Return the names of the convolutions that stay in float32.

    Raises
    ------
    ValueError
        No convolution would be quantised.
    """
    names = [node.name for node in model.graph.node if node.op_type == "Conv"]
    if layers.first + layers.last >= len(names):
        raise ValueError(
            f"{layers.first} + {layers.last} of {len(names)} convolutions would stay in float32. Expected fewer. "
            "Lower `first` or `last`."
        )
    return names[: layers.first] + names[len(names) - layers.last :]


def share_weights(path: Path, other: Path) -> None:
    """Replace the weights that a graph shares with another one in the same folder by references to that file."""
    model, content = onnx.load(path), other.read_bytes()
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.raw_data) < MIN_SHARED_BYTES:
            continue
        if (offset := content.find(tensor.raw_data)) < 0:
            continue
        reference = {"location": other.name, "offset": str(offset), "length": str(len(tensor.raw_data))}
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in reference.items():
            tensor.external_data.append(onnx.StringStringEntryProto(key=key, value=value))
    path.write_bytes(model.SerializeToString(deterministic=True))
