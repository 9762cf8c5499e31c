"""Bundle that needs no training: the exact Gaussian networks of `oracle`, as ONNX graphs."""

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from app.manifest import (
    Calibration,
    File,
    Files,
    KlMap,
    Latent,
    Licence,
    Manifest,
    NoiseSchedule,
    OodCheck,
    Preprocessing,
    Provenance,
    Range,
    Residual,
    Reverse,
)
from app.pipeline.diffusion import Schedule
from app.pipeline.preprocess import to_slices
from app.volume import FloatArray
from tests.support.oracle import CELL, MEANS, SCALE, SDS, SHIFT, SIGNS, TISSUE_LEVEL
from tests.support.phantom import brain

OPSET, IR_VERSION = 17, 9
SHAPE = (64, 56)
LATENT = (SHAPE[0] // CELL, SHAPE[1] // CELL)
CHANNELS = len(SIGNS)
SCHEDULE = NoiseSchedule(steps=1000, beta_start=0.0015, beta_end=0.0195)
GOLDEN_TIMES = (450, 550)

INT8 = "denoiser.int8.onnx"
# The noise in int8 covers [-8, 8) in 256 steps. In int8 weights of 7 bits, 1 is 64 steps of 1 / 64.
INT8_STEP, INT8_ZERO, INT8_ONE = 16 / 256, 128, 64
FILES = {"encoder": "encoder.onnx", "denoiser": "denoiser.onnx", "decoder": "decoder.onnx", "golden": "golden.npz"}

Array = npt.NDArray[np.generic]


def tiny_manifest(files: Files | None = None) -> Manifest:
    """Return settings for `phantom.brain`: 3 mm slices, three noise levels, unlimited healthy ranges."""
    schedule = Schedule.from_settings(SCHEDULE)
    levels = (420, 500, 580)
    wide = Range(low=0.0, high=1e6)
    no_file = File(name="none", sha256="0" * 64)
    return Manifest(
        name="tiny",
        version="0.0.1",
        title="Tiny Gaussian model",
        intended_use="Tests.",
        modality="MR",
        sequence="T1",
        preprocessing=Preprocessing(
            subject="a skull-stripped brain",
            advice="Send the phantom of the tests.",
            spacing_mm=(3.0, 3.0, 3.0),
            shape=SHAPE,
            extent_mm=((90.0, 110.0, 0.0), (165.0, 198.0, 175.0)),
            intensity_percentile=98.0,
            intensity_level=0.75,
            min_foreground_cm2=25.0,
        ),
        latent=Latent(channels=CHANNELS, downsampling=CELL),
        schedule=SCHEDULE,
        seed=7,
        kl=KlMap(
            timesteps=levels,
            alpha_bar=(float(schedule.alpha_bar[levels[0]]), float(schedule.alpha_bar[levels[-1]])),
            percentile=99.5,
            threshold=0.008,
            min_component=2,
            grow=1,
        ),
        reverse=Reverse(timesteps=(500, 400, 300, 200, 100)),
        residual=Residual(
            smoothing_mm=0.0,
            threshold=0.22,
            extent_threshold=0.22,
            healthy_false_positive_ml=0.0,
            min_lesion_ml=1.0,
        ),
        ood=OodCheck(
            timesteps=(500,),
            median_kl_range=(wide,),
            reconstruction_range=wide,
            latent_kl_range=wide,
            max_outlier_fraction=1.0,
        ),
        calibration=Calibration(subjects=("phantom",), slice_score=wide, scan_score=wide),
        files=files or Files(encoder=no_file, denoiser=no_file, decoder=no_file, golden=no_file),
        licence=Licence(data="synthetic", licence="Apache-2.0", attribution="none needed"),
        provenance=Provenance(
            code_version="tests",
            config_sha256="0" * 64,
            data_sha256="0" * 64,
            split="none",
            train_subjects=0,
            validation_subjects=1,
            seed=7,
            vqvae_steps=0,
            denoiser_steps=0,
        ),
    )


def with_part(manifest: Manifest, part: str, **values: object) -> Manifest:
    """Copy a manifest with some values of one part changed."""
    return manifest.model_copy(update={part: getattr(manifest, part).model_copy(update=values)})


def write_tiny_bundle(folder: Path) -> Path:
    """Write `folder`/tiny-0.0.1 (manifest, three graphs, golden pair) and return its path."""
    bundle = folder / tiny_manifest().id
    bundle.mkdir(parents=True)
    for name, graph in (("encoder", _encoder()), ("denoiser", _denoiser()), ("decoder", _decoder())):
        onnx.checker.check_model(graph, full_check=True)
        (bundle / f"{name}.onnx").write_bytes(graph.SerializeToString(deterministic=True))
    np.savez(bundle / "golden.npz", allow_pickle=False, **_golden(bundle))
    parts = {name: File(name=file, sha256=_sha256(bundle / file)) for name, file in FILES.items()}
    (bundle / "manifest.json").write_text(tiny_manifest(Files(**parts)).model_dump_json(indent=2))
    return bundle


def add_int8(bundle: Path) -> Path:
    """Add a denoiser in int8 to a tiny bundle. It rounds the noise to steps of `INT8_STEP`."""
    path = bundle / "manifest.json"
    manifest = Manifest.model_validate_json(path.read_bytes())
    graph = _denoiser(int8=True)
    onnx.checker.check_model(graph, full_check=True)
    (bundle / INT8).write_bytes(graph.SerializeToString(deterministic=True))
    with np.load(bundle / "golden.npz") as golden:
        arrays = dict(golden)
    session = onnxruntime.InferenceSession(bundle / INT8, providers=["CPUExecutionProvider"])
    arrays["epsilon_int8"] = session.run(None, {name: arrays[name] for name in ("z_t", "t")})[0]
    np.savez(bundle / "golden.npz", allow_pickle=False, **arrays)
    names = {"denoiser_int8": INT8, "golden": "golden.npz"}
    files = {part: File(name=name, sha256=_sha256(bundle / name)) for part, name in names.items()}
    path.write_text(with_part(manifest, "files", **files).model_dump_json(indent=2))
    return bundle


def _golden(bundle: Path) -> dict[str, Array]:
    """Return two slices of the phantom and the outputs of the graphs for them."""

    def run(name: str, **inputs: Array) -> FloatArray:
        session = onnxruntime.InferenceSession(bundle / f"{name}.onnx", providers=["CPUExecutionProvider"])
        return np.asarray(session.run(None, inputs)[0], dtype=np.float32)

    manifest = tiny_manifest()
    schedule = Schedule.from_settings(SCHEDULE)
    stack = to_slices(brain(), manifest.preprocessing).x
    x = stack[[len(stack) // 3, len(stack) // 2]]
    z0 = run("encoder", x=x)
    t = np.array(GOLDEN_TIMES, dtype=np.int64)
    z_t = schedule.diffuse(z0, np.random.default_rng(0).standard_normal(z0.shape, dtype=np.float32), t)
    return {
        "x": x,
        "z0": z0,
        "z_t": z_t,
        "t": t,
        "epsilon": run("denoiser", z_t=z_t, t=t),
        "decoded": run("decoder", z0=z0),
    }


def _encoder() -> onnx.ModelProto:
    """Build `oracle.encode`: mean of the tissue pixels of each cell, shifted, scaled, signed."""

    def pool(source: str, target: str) -> onnx.NodeProto:
        return helper.make_node("AveragePool", [source], [target], kernel_shape=[CELL, CELL], strides=[CELL, CELL])

    weight = (np.array(SIGNS) / SCALE).reshape(CHANNELS, 1, 1, 1)
    return _model(
        [
            helper.make_node("Greater", ["x", "level"], ["is_tissue"]),
            helper.make_node("Cast", ["is_tissue"], ["tissue"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["x", "tissue"], ["bright"]),
            pool("bright", "sum"),
            pool("tissue", "share"),
            helper.make_node("Max", ["share", "one_pixel"], ["divisor"]),
            helper.make_node("Div", ["sum", "divisor"], ["mean"]),
            helper.make_node("Conv", ["mean", "weight", "bias"], ["z0"]),
        ],
        [("x", 1, *SHAPE)],
        ("z0", CHANNELS, *LATENT),
        {
            "level": np.array(TISSUE_LEVEL, dtype=np.float32),
            "one_pixel": np.array(1 / CELL**2, dtype=np.float32),
            "weight": weight.astype(np.float32),
            "bias": (-SHIFT * weight.ravel()).astype(np.float32),
        },
    )


def _denoiser(*, int8: bool = False) -> onnx.ModelProto:
    """Build E[eps | z_t] of the prior N(MEANS, SDS^2): eps = slope_t (z_t - mean_t), slope and mean by t.

    In int8 an identity convolution follows, which only rounds.
    """
    a = Schedule.from_settings(SCHEDULE).alpha_bar[:, None]
    slope = np.sqrt(1 - a) / (a * np.array(SDS) ** 2 + 1 - a)  # (T, C)
    mean = np.sqrt(a) * np.array(MEANS)  # (T, C)
    return _model(
        [
            helper.make_node("Gather", ["slopes", "t"], ["slope"], axis=0),
            helper.make_node("Gather", ["means", "t"], ["mean"], axis=0),
            helper.make_node("Sub", ["z_t", "mean"], ["centred"]),
            helper.make_node("Mul", ["centred", "slope"], ["exact" if int8 else "epsilon"]),
            *(_int8_nodes() if int8 else []),
        ],
        [("z_t", CHANNELS, *LATENT), ("t",)],
        ("epsilon", CHANNELS, *LATENT),
        {
            "slopes": slope.astype(np.float32)[:, :, None, None],
            "means": mean.astype(np.float32)[:, :, None, None],
            **(_int8_constants() if int8 else {}),
        },
    )


def _int8_nodes() -> list[onnx.NodeProto]:
    """Build a convolution in int8 as onnxruntime's quantisation writes it, between roundings that it fuses."""
    steps = ["step", "zero"]
    return [
        helper.make_node("QuantizeLinear", ["exact", *steps], ["exact_steps"]),
        helper.make_node("DequantizeLinear", ["exact_steps", *steps], ["exact_rounded"]),
        helper.make_node("DequantizeLinear", ["weight", "weight_step", "weight_zero"], ["weight_rounded"], axis=0),
        helper.make_node("Conv", ["exact_rounded", "weight_rounded"], ["same"], kernel_shape=[1, 1]),
        helper.make_node("QuantizeLinear", ["same", *steps], ["same_steps"]),
        helper.make_node("DequantizeLinear", ["same_steps", *steps], ["epsilon"]),
    ]


def _int8_constants() -> dict[str, Array]:
    """Return the constants of `_int8_nodes`."""
    return {
        "step": np.array(INT8_STEP, dtype=np.float32),
        "zero": np.array(INT8_ZERO, dtype=np.uint8),
        "weight": (INT8_ONE * np.eye(CHANNELS)).astype(np.int8)[:, :, None, None],
        "weight_step": np.full(CHANNELS, 1 / INT8_ONE, dtype=np.float32),
        "weight_zero": np.zeros(CHANNELS, dtype=np.int8),
    }


def _decoder() -> onnx.ModelProto:
    """Build `oracle.decode`: signs undone, channels averaged, nearest neighbours up-sampled, clipped."""
    weight = (np.array(SIGNS) * SCALE / CHANNELS).reshape(1, CHANNELS, 1, 1)
    return _model(
        [
            helper.make_node("Conv", ["z0", "weight", "bias"], ["tissue"]),
            helper.make_node(
                "Resize",
                ["tissue", "", "scales"],
                ["large"],
                mode="nearest",
                coordinate_transformation_mode="asymmetric",
                nearest_mode="floor",
            ),
            helper.make_node("Clip", ["large", "zero", "one"], ["x"]),
        ],
        [("z0", CHANNELS, *LATENT)],
        ("x", 1, *SHAPE),
        {
            "weight": weight.astype(np.float32),
            "bias": np.array([SHIFT], dtype=np.float32),
            "scales": np.array([1, 1, CELL, CELL], dtype=np.float32),
            "zero": np.array(0, dtype=np.float32),
            "one": np.array(1, dtype=np.float32),
        },
    )


def _model(
    nodes: list[onnx.NodeProto],
    inputs: list[tuple[str | int, ...]],
    output: tuple[str | int, ...],
    constants: dict[str, Array],
) -> onnx.ModelProto:
    """Build a graph with a dynamic batch axis. The first entry of a shape is the name of the tensor."""

    def value(shape: tuple[str | int, ...]) -> onnx.ValueInfoProto:
        kind = TensorProto.INT64 if shape[0] == "t" else TensorProto.FLOAT
        return helper.make_tensor_value_info(str(shape[0]), kind, ["n", *shape[1:]])

    graph = helper.make_graph(
        nodes,
        f"tiny_{output[0]}",
        [value(shape) for shape in inputs],
        [value(output)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
