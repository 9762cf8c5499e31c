"""Quantisation: weights per channel, ends that stay float32, made once, and judged with and without the gate."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from app.errors import OutOfDistribution
from app.pipeline.detect import Scores, check_gate
from app.runtime.session import as_callable, open_session
from benchmarks import accuracy, int8
from benchmarks.int8 import CALLS, Healthy, Kept, Settings, int8_graphs, judge_both, noise_levels, open_gate, quantise
from benchmarks.int8_variants import batch_of, line, noise_error
from benchmarks.statistics import Summary
from tests.support.bundle import tiny_manifest, write_tiny_bundle

CHANNELS = 2
# Largest of each output channel is 1.27 and 12.7: steps of 0.01 and 0.1.
MIDDLE = np.array([[1.27, 0.5], [-3.0, 12.7]], np.float32)
IDENTITY = np.eye(CHANNELS, dtype=np.float32)


def chain(path: Path) -> Path:
    """Three convolutions of one pixel, in a row: identity, `MIDDLE`, identity."""
    weights = {"first": IDENTITY, "middle": MIDDLE, "last": IDENTITY}
    names = ["z_t", "a", "b", "epsilon"]
    nodes = [
        helper.make_node("Conv", [names[i], f"{name}_w"], [names[i + 1]], name=name, kernel_shape=[1, 1])
        for i, name in enumerate(weights)
    ]
    image: list[str | int | None] = ["n", CHANNELS, 4, 4]
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
    """Latents that fill [-1, 1]."""
    z_t = np.random.default_rng(count).uniform(-1, 1, (count, CHANNELS, 4, 4)).astype(np.float32)
    z_t[0, :, 0, 0], z_t[0, :, 0, 1] = -1, 1
    return {"z_t": z_t, "t": np.full(count, 10, np.int64)}


@pytest.fixture
def quantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Made from another folder, which stays empty: onnxruntime leaves files where it is called."""
    target, elsewhere = tmp_path / "int8.onnx", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    quantise(chain(tmp_path / "float32.onnx"), target, [feed(8), feed(4)], Kept(1, 1))
    assert list(elsewhere.iterdir()) == []
    return target


def test_weights_are_int8_with_a_step_of_their_own_per_channel(quantised: Path) -> None:
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(quantised).graph.initializer}
    assert [name for name, t in tensors.items() if t.dtype == np.int8 and t.ndim == 4] == ["middle_w_quantized"]
    np.testing.assert_allclose(tensors["middle_w_scale"], [0.01, 0.1], rtol=1e-6)
    assert tensors["middle_w_quantized"][..., 0, 0].tolist() == [[127, 50], [-30, 127]]
    # [-1, 1] in 255 steps.
    np.testing.assert_allclose(tensors["a_scale"], 2 / 255, rtol=1e-6)


def test_the_result_is_off_by_steps_of_activations(quantised: Path, tmp_path: Path) -> None:
    inputs = list(feed(8).values())  # calibrated on: nothing is clipped
    exact = as_callable(open_session(tmp_path / "float32.onnx", "cpu", 1))(*inputs)
    found = as_callable(open_session(quantised, "cpu", 1))(*inputs)
    # Half a step of each input, weighed, and half a step of the output, whose range spans both channels.
    rows = np.abs(MIDDLE).sum(1)
    steps = rows / 255 + rows.max() / 255
    worst = np.abs(found - exact).max(axis=(0, 2, 3))
    assert (worst > 0).all()
    assert (worst < steps).all()


def test_the_ends_are_kept_and_something_is_left(tmp_path: Path) -> None:
    model = onnx.load(chain(tmp_path / "float32.onnx"))
    assert int8.kept_layers(model, Kept(1, 1)) == ["first", "last"]
    assert int8.kept_layers(model, Kept(2, 0)) == ["first", "middle"]
    assert int8.kept_layers(model, Kept(0, 0)) == []
    with pytest.raises(ValueError, match=r"2 \+ 1 of 3 convolutions would stay float32"):
        int8.kept_layers(model, Kept(2, 1))


def test_graphs_are_made_once_for_each_bundle_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, config = write_tiny_bundle(tmp_path), tmp_path / "tiny.toml"
    config.write_text("seed = 1")
    asked, made = [], []

    def healthy(_bundle: object, _config: object, *options: object) -> Healthy:
        asked.append(options)
        return Healthy()

    def quantise(source: Path, target: Path, *_: object) -> None:
        made.append(source.name)
        target.write_bytes(b"graph")

    monkeypatch.setattr(int8, "healthy", healthy)
    monkeypatch.setattr(int8, "quantise", quantise)
    wanted = Settings(encoder=None, decoder=None)
    first = int8_graphs(bundle, config, wanted, tmp_path / "cache")
    assert int8_graphs(bundle, config, wanted, tmp_path / "cache") == first
    assert (asked, made, list(first)) == ([("train", 6, 4)], ["denoiser.onnx"], ["denoiser"])
    assert first["denoiser"].read_bytes() == b"graph"
    others = [int8_graphs(bundle, config, replace(wanted, method="Entropy"), tmp_path / "cache")]
    config.write_text("seed = 2")
    others.append(int8_graphs(bundle, config, wanted, tmp_path / "cache"))
    assert len(made) == 3
    assert len({first["denoiser"], *(other["denoiser"] for other in others)}) == 3


def test_every_noise_level_of_serving_is_calibrated() -> None:
    assert noise_levels(tiny_manifest()) == [100, 200, 300, 400, 420, 500, 580]


def test_an_open_gate_passes_every_number_but_not_nan() -> None:
    gate = open_gate(tiny_manifest().gate)
    scores = Scores(1.0, np.ones(1, np.float32), ((5e9, 6e9),), 7e9, 1.0)
    check_gate(scores, gate)
    with pytest.raises(OutOfDistribution):
        check_gate(replace(scores, reconstruction=float("nan")), gate)


def test_what_the_gate_refused_is_judged_again_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: Any = SimpleNamespace(manifest=tiny_manifest())
    served = measured.manifest.gate

    def judge(measured: Any) -> dict[str, Any]:
        refused = int(measured.manifest.gate == served)
        return {"dice": [0.0 if refused else 0.5], "refused": refused}

    monkeypatch.setattr(accuracy, "judge", judge)
    assert judge_both(measured) == {"dice": [0.0], "refused": 1, "without_gate": {"dice": [0.5], "refused": 0}}
    assert measured.manifest.gate == served


def test_the_error_of_the_noise_is_a_share_of_float32s_own() -> None:
    noise = np.ones((2, 1, 1, 1), np.float32)
    times = [np.full(2, t, np.int64) for t in (10, 10, 50)]
    seen = Healthy([], [], [0 * noise] * 3, times, [noise, noise, 3 * noise])
    # float32 is off by 1 and by 3; int8 adds 0.5 to that.
    found = noise_error(lambda z_t, t: z_t + 0.5 * (t > 0)[0], lambda z_t, t: z_t * (t > 0)[0], seen)
    assert found == {10: 0.25, 50: pytest.approx(0.25 / 9)}
    assert batch_of(seen.feeds("denoiser"))[0].shape == (6, 1, 1, 1)
    told = line(
        "v", dict.fromkeys(CALLS, Summary(2, 1, 3)), found, 50, {"dice": [0.2, 0.4], "auprc": [1], "refused": 1}
    )
    assert told == "| v | 2 (1 to 3) | 2 (1 to 3) | 2 (1 to 3) | 2.8%; 25.0% | 0.300 | 1.000 | 1 |"
