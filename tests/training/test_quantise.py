"""Tests of the quantisation to int8 and of its place in the export."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("torch")

from app.runtime.session import as_callable, open_session
from training import export
from training import quantise as module
from training.config import ROOT, Config
from training.export import INT8, denoiser_graph, graphs_folder, int8_error, write_int8
from training.features import load_exported_networks
from training.quantise import (
    CalibrationData,
    Feed,
    Float32Layers,
    calibration_data,
    float32_layer_names,
    noise_error,
    noise_levels,
    quantise,
    share_weights,
)

pytestmark = pytest.mark.training

CHANNELS = 2
# Largest of each output channel is 0.64 and 6.4: steps of 0.01 and 0.1.
MIDDLE = np.array([[0.64, 0.25], [-1.5, 6.4]], np.float32)
IDENTITY = np.eye(CHANNELS, dtype=np.float32)


def chain(path: Path, weights: dict[str, npt.NDArray[np.float32]] | None = None) -> Path:
    """Write three convolutions of one pixel in sequence, by default identity, `MIDDLE`, identity."""
    weights = weights or {"first": IDENTITY, "middle": MIDDLE, "last": IDENTITY}
    names = ["z_t", "a", "b", "epsilon"]
    nodes = [
        helper.make_node("Conv", [names[i], f"{name}_w"], [names[i + 1]], name=name, kernel_shape=[1, 1])
        for i, name in enumerate(weights)
    ]
    image: list[str | int | None] = ["n", len(weights["first"]), 4, 4]
    graph = helper.make_graph(
        nodes,
        "chain",
        [
            helper.make_tensor_value_info("z_t", TensorProto.FLOAT, image),
            helper.make_tensor_value_info("t", TensorProto.INT64, ["n"]),
        ],
        [helper.make_tensor_value_info("epsilon", TensorProto.FLOAT, image)],
        [numpy_helper.from_array(w[..., None, None], f"{name}_w") for name, w in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def feed(count: int) -> dict[str, npt.NDArray[Any]]:
    """Return latents that fill [-1, 1]."""
    z_t = np.random.default_rng(count).uniform(-1, 1, (count, CHANNELS, 4, 4)).astype(np.float32)
    z_t[0, :, 0, 0], z_t[0, :, 0, 1] = -1, 1
    return {"z_t": z_t, "t": np.full(count, 10, np.int64)}


@pytest.fixture
def quantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Quantise from another working directory, which must stay empty, because onnxruntime writes files to it."""
    target, elsewhere = tmp_path / "int8.onnx", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    quantise(chain(tmp_path / "float32.onnx"), target, [feed(8), feed(4)], Float32Layers(1, 1))
    assert list(elsewhere.iterdir()) == []
    return target


def test_weights_are_int8_with_one_step_per_channel(quantised: Path) -> None:
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(quantised).graph.initializer}
    assert [name for name, t in tensors.items() if t.dtype == np.int8 and t.ndim == 4] == ["middle_w_quantized"]
    np.testing.assert_allclose(tensors["middle_w_scale"], [0.01, 0.1], rtol=1e-6)
    assert tensors["middle_w_quantized"][..., 0, 0].tolist() == [[64, 25], [-15, 64]]
    # [-1, 1] in 255 steps.
    np.testing.assert_allclose(tensors["a_scale"], 2 / 255, rtol=1e-6)


def test_error_is_below_the_steps_of_the_activations(quantised: Path, tmp_path: Path) -> None:
    inputs = list(feed(8).values())  # the calibration input, so nothing is clipped
    exact = as_callable(open_session(tmp_path / "float32.onnx", "cpu", 1))(*inputs)
    found = as_callable(open_session(quantised, "cpu", 1))(*inputs)
    # Half a step of each weighted input, and half a step of the output, whose range spans both channels.
    rows = np.abs(MIDDLE).sum(1)
    steps = rows / 255 + rows.max() / 255
    worst = np.abs(found - exact).max(axis=(0, 2, 3))
    assert (worst > 0).all()
    assert (worst < steps).all()


def test_both_ends_stay_in_float32(tmp_path: Path) -> None:
    model = onnx.load(chain(tmp_path / "float32.onnx"))
    assert float32_layer_names(model, Float32Layers(1, 1)) == ["first", "last"]
    assert float32_layer_names(model, Float32Layers(2, 0)) == ["first", "middle"]
    assert float32_layer_names(model, Float32Layers(0, 0)) == []
    with pytest.raises(ValueError, match=r"2 \+ 1 of 3 convolutions"):
        float32_layer_names(model, Float32Layers(2, 1))


def test_noise_error_is_relative_to_float32() -> None:
    noise = np.ones((2, 1, 1, 1), np.float32)
    times = [np.full(2, t, np.int64) for t in (10, 10, 50)]
    data = CalibrationData([0 * noise] * 3, times, [noise, noise, 3 * noise])
    # float32 is off by 1 and by 3; int8 adds 0.5 to that.
    found = noise_error(lambda z_t, t: z_t + 0.5 * (t > 0)[0], lambda z_t, t: z_t * (t > 0)[0], data)
    assert found == {10: 0.25, 50: pytest.approx(0.25 / 9)}


def test_noise_levels_are_those_of_serving() -> None:
    assert noise_levels(Config.load(ROOT / "training" / "configs" / "t1.toml")) == [5, 10, 20, 100, 400]


def test_shared_weights_are_read_from_the_other_file(tmp_path: Path) -> None:
    """The layers in float32 are as large as the quantised one."""
    rng = np.random.default_rng(2)
    whole = chain(tmp_path / "denoiser.onnx", {n: wide(rng) for n in ("first", "middle", "last")})
    path = tmp_path / INT8
    z_t = rng.uniform(-1, 1, (2, WIDE, 4, 4)).astype(np.float32)
    inputs: Feed = {"z_t": z_t, "t": np.full(2, 10, np.int64)}
    quantise(whole, path, [inputs], Float32Layers(1, 1))
    before, alone = path.stat().st_size, as_callable(open_session(path, "cpu", 1))(*inputs.values())
    share_weights(path, whole)
    assert before - path.stat().st_size == pytest.approx(2 * 4 * WIDE**2, abs=400)
    np.testing.assert_array_equal(as_callable(open_session(path, "cpu", 1))(*inputs.values()), alone)
    assert {t.data_location for t in onnx.load(path, load_external_data=False).graph.initializer} == {0, 1}


WIDE = 64


def wide(rng: np.random.Generator) -> npt.NDArray[np.float32]:
    return rng.standard_normal((WIDE, WIDE), dtype=np.float32) / np.float32(WIDE)


# ---- export -----------------------------------------------------------------------------------


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Write a run with the graph of `chain` as denoiser, latents of two channels and slices of 4 x 4."""
    monkeypatch.setattr("training.config.ROOT", tmp_path)
    stack = (np.random.default_rng(3).uniform(0, 1, (40, 4, 4)) * 65535).astype(np.uint16)
    monkeypatch.setattr(module, "cached_slices", lambda _config, part: stack[: {"train": 40, "validation": 9}[part]])
    monkeypatch.setattr(export, "FLOAT32_LAYERS", Float32Layers(1, 1))
    config = Config.load(ROOT / "training" / "configs" / "headct.toml")
    config = config.model_copy(update={"export": config.export.model_copy(update={"int8": True})})
    folder = graphs_folder(config)
    folder.mkdir(parents=True)
    chain(folder / "denoiser.onnx")
    one_to_two(folder / "encoder.onnx", "x", "z0", (1, CHANNELS))
    one_to_two(folder / "decoder.onnx", "z0", "x", (CHANNELS, 1))
    return config


def one_to_two(path: Path, source: str, target: str, channels: tuple[int, int]) -> None:
    """Write a convolution of one pixel."""
    shapes: list[list[str | int | None]] = [["n", c, 4, 4] for c in channels]
    weight = np.ones((channels[1], channels[0], 1, 1), np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", [source, "w"], [target], kernel_shape=[1, 1])],
        "one",
        [helper.make_tensor_value_info(source, TensorProto.FLOAT, shapes[0])],
        [helper.make_tensor_value_info(target, TensorProto.FLOAT, shapes[1])],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


def test_calibration_slices_are_evenly_spaced_at_every_noise_level(exported: Config) -> None:
    data = calibration_data(exported, lambda x: np.repeat(x, CHANNELS, axis=1), "train", 10)
    assert [len(t) for t in data.t] == np.repeat([4, 4, 2], len(noise_levels(exported))).tolist()
    levels = noise_levels(exported)
    assert [int(t[0]) for t in data.t] == levels * 3
    assert data.z_t[0].shape == (4, CHANNELS, 4, 4)
    assert data.feeds()[-1]["z_t"] is data.z_t[-1]
    assert not np.array_equal(data.z_t[0][0], data.z_t[-1][-1])
    with pytest.raises(AssertionError, match="test"):
        calibration_data(exported, lambda x: x, "test")


def test_calibration_uses_the_served_denoiser(exported: Config) -> None:
    write_int8(exported)
    assert denoiser_graph(exported).name == INT8
    z_t, t = feed(8).values()
    exact = as_callable(open_session(graphs_folder(exported) / "denoiser.onnx", "cpu"))(z_t, t)
    found = load_exported_networks(exported).denoise(z_t, t)
    assert np.abs(found - exact).max() > 1e-4
    np.testing.assert_array_equal(found, as_callable(open_session(denoiser_graph(exported), "cpu"))(z_t, t))


def test_export_without_int8_removes_the_earlier_graph(exported: Config) -> None:
    write_int8(exported)
    plain = exported.model_copy(update={"export": exported.export.model_copy(update={"int8": False})})
    write_int8(plain)
    assert not (graphs_folder(exported) / INT8).exists()
    assert denoiser_graph(plain).name == "denoiser.onnx"
    assert int8_error(plain) is None


def test_int8_with_a_large_error_is_refused(exported: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    write_int8(exported)
    error = int8_error(exported)
    assert error is not None
    assert 0 < error < export.MAX_INT8_ERROR
    monkeypatch.setattr(export, "MAX_INT8_ERROR", error / 2)
    with pytest.raises(SystemExit, match="int8"):
        int8_error(exported)


def test_bundle_files_include_the_denoiser_in_int8(exported: Config) -> None:
    from training.bundle import FILES, bundle_files

    assert bundle_files(exported) == {**FILES, "denoiser_int8": INT8}
    plain = exported.model_copy(update={"export": exported.export.model_copy(update={"int8": False})})
    assert bundle_files(plain) == FILES
