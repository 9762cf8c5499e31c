"""Stage 3: export the networks as ONNX graphs, with a denoiser in int8 for CPUs, and compare them with torch."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from scipy import ndimage
from torch import nn

from app.pipeline.diffusion import Schedule
from app.runtime.bundle import GOLDEN_FLIPPED, GOLDEN_INT8, GOLDEN_TOLERANCE
from app.runtime.session import as_callable, open_session
from app.volume import FloatArray
from training.config import Config, parse_config
from training.data import UINT16_MAX, cached_slices
from training.latents import load_coders
from training.loop import load_modules
from training.networks import build_denoiser
from training.quantise import FLOAT32_LAYERS, calibration_data, noise_error, noise_levels, quantise, share_weights

OPSET = 18
PARITY_SLICES = 16
INT8 = "denoiser.int8.onnx"
# Largest number of time steps in a golden pair. Each takes about 0.1 MB of a bundle.
MAX_GOLDEN_LEVELS = 12
# Squared error that int8 may add to the predicted noise, relative to float32's own: both share their thresholds.
MAX_INT8_ERROR = 0.01
GRAPHS = {"encoder": (("x",), "z0"), "denoiser": (("z_t", "t"), "epsilon"), "decoder": (("z0",), "x")}

Provenance = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Parity:
    """Largest difference between onnxruntime and torch on validation slices.

    Attributes
    ----------
    encoder, denoiser : float
        Largest absolute difference.
    decoder_flipped : float
        Share of decoded pixels that differ: a latent between two codes may be assigned to either.
    int8 : float or None
        Squared error that int8 adds to the predicted noise, relative to float32's own.
    """

    encoder: float
    denoiser: float
    decoder_flipped: float
    int8: float | None = None


def trained_networks(config: Config) -> tuple[dict[str, nn.Module], Provenance]:
    """Load the three networks on the CPU, with the averaged denoiser, and the provenance of both stages."""
    encoder, decoder, coder_provenance = load_coders(config)
    averaged = torch.optim.swa_utils.AveragedModel(build_denoiser(config))
    denoiser_provenance = load_modules(config, "denoiser", {"averaged": averaged})
    networks: dict[str, nn.Module] = {
        "encoder": encoder,
        "denoiser": averaged.module,
        "decoder": decoder,
    }
    for network in networks.values():
        network.cpu().eval().requires_grad_(False)
    return networks, {"vqvae": coder_provenance, "denoiser": denoiser_provenance}


def graphs_folder(config: Config) -> Path:
    """Return the folder of the exported graphs in the run folder."""
    return config.run_folder / "onnx"


def denoiser_graph(config: Config) -> Path:
    """Return the denoiser that is served on a CPU."""
    return graphs_folder(config) / (INT8 if config.export.int8 else "denoiser.onnx")


def write_graph(name: str, network: nn.Module, example: tuple[torch.Tensor, ...], path: Path) -> None:
    """Export one network with a dynamic batch axis and the weights in the same file."""
    inputs, output = GRAPHS[name]
    batch = torch.export.Dim("n", min=1)
    torch.onnx.export(
        network,
        example,
        str(path),
        dynamo=True,
        external_data=False,
        opset_version=OPSET,
        input_names=list(inputs),
        output_names=[output],
        dynamic_shapes=tuple({0: batch} for _ in example),
        verbose=False,
    )
    strip_debug(path)


def strip_debug(path: Path) -> None:
    """Remove the exporter's debug information: stack traces contain the paths of the machine."""
    model = onnx.load(path)
    parts = [model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output]
    parts += [node for function in model.functions for node in function.node]
    for part in parts:
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    onnx.save(model, path)


def run_torch(
    config: Config, networks: dict[str, nn.Module], x: FloatArray, t: npt.NDArray[np.int64], rng: np.random.Generator
) -> dict[str, npt.NDArray[np.generic]]:
    """Run the three torch networks on slices x (N, 1, H, W) at time steps t (N,), with noise from `rng`."""
    with torch.no_grad():
        z0 = networks["encoder"](torch.from_numpy(x)).numpy()
        z_t = Schedule.from_settings(config.schedule).diffuse(z0, rng.standard_normal(z0.shape, dtype=np.float32), t)
        epsilon = networks["denoiser"](torch.from_numpy(z_t), torch.from_numpy(t)).numpy()
        decoded = networks["decoder"](torch.from_numpy(z0)).numpy()
    return {"x": x, "z0": z0, "z_t": z_t, "t": t, "epsilon": epsilon, "decoded": decoded}


def golden_pair(config: Config, networks: dict[str, nn.Module]) -> dict[str, npt.NDArray[np.generic]]:
    """Return synthetic slices (no patient data) and the outputs of the networks.

    The pair has one slice for each served time step, but at most `MAX_GOLDEN_LEVELS` slices. Their time steps are then
    evenly spaced and include the first and the last one.
    """
    served = np.array(noise_levels(config), dtype=np.int64)
    count = min(len(served), MAX_GOLDEN_LEVELS)
    levels = served[np.linspace(0, len(served) - 1, count).round().astype(int)]
    rng = np.random.default_rng(config.seed)
    height, width = config.preprocessing.shape
    rows, columns = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    head = (rows**2 / 0.8 + columns**2 / 0.7) < 1
    texture = ndimage.gaussian_filter(rng.standard_normal((len(levels), height, width)), (0, 2, 2))
    x = (np.clip(0.5 + 0.8 * texture, 0, 1) * head)[:, None].astype(np.float32)
    return run_torch(config, networks, x, levels, rng)


def write_int8(config: Config) -> None:
    """Quantise the exported denoiser if the configuration requests it, else remove an earlier one."""
    folder, target = graphs_folder(config), graphs_folder(config) / INT8
    if not config.export.int8:
        target.unlink(missing_ok=True)
        return
    encode = as_callable(open_session(folder / "encoder.onnx", "cpu"))
    feeds = calibration_data(config, encode, "train").feeds()
    quantise(folder / "denoiser.onnx", target, feeds, FLOAT32_LAYERS)
    share_weights(target, folder / "denoiser.onnx")


def int8_error(config: Config) -> float | None:
    """Return the error that int8 adds at the worst noise level of serving (see `Parity`).

    Return None if the bundle has no int8 denoiser.

    Raises
    ------
    SystemExit
        The error is larger than `MAX_INT8_ERROR`.
    """
    if not config.export.int8:
        return None
    folder = graphs_folder(config)
    encode, float32, denoise = (
        as_callable(open_session(path, "cpu"))
        for path in (folder / "encoder.onnx", folder / "denoiser.onnx", denoiser_graph(config))
    )
    data = calibration_data(config, encode, "validation", PARITY_SLICES)
    worst = max(noise_error(denoise, float32, data).values())
    if worst > MAX_INT8_ERROR:
        raise SystemExit(
            f"In int8, the denoiser adds {worst:.1%} to the squared error of the noise. Expected at most "
            f"{MAX_INT8_ERROR:.0%}. Keep more convolutions in float32 (`training.quantise.FLOAT32_LAYERS`)."
        )
    return worst


def check_parity(config: Config, networks: dict[str, nn.Module], folder: Path) -> Parity:
    """Compare onnxruntime with torch on validation slices.

    Raises
    ------
    SystemExit
        A graph and its network differ by more than the tolerance.
    """
    stack = cached_slices(config, "validation")
    chosen = np.linspace(0, len(stack) - 1, PARITY_SLICES).astype(int)
    x = stack[chosen].astype(np.float32)[:, None] / UINT16_MAX
    t = np.linspace(10, 990, PARITY_SLICES).astype(np.int64)
    run = {name: as_callable(open_session(folder / f"{name}.onnx", "cpu")) for name in GRAPHS}
    expected = run_torch(config, networks, x, t, np.random.default_rng(0))
    difference = {
        "encoder": np.abs(run["encoder"](x) - expected["z0"]),
        "denoiser": np.abs(run["denoiser"](expected["z_t"], t) - expected["epsilon"]),
        "decoder": np.abs(run["decoder"](expected["z0"]) - expected["decoded"]),
    }
    parity = Parity(
        encoder=float(difference["encoder"].max()),
        denoiser=float(difference["denoiser"].max()),
        decoder_flipped=float(np.mean(difference["decoder"] > GOLDEN_TOLERANCE)),
        int8=int8_error(config),
    )
    if max(parity.encoder, parity.denoiser) > GOLDEN_TOLERANCE or parity.decoder_flipped > GOLDEN_FLIPPED:
        raise SystemExit(
            f"onnxruntime {onnxruntime.__version__} and torch {torch.__version__} give different results: {parity}. "
            f"Expected at most {GOLDEN_TOLERANCE:g}, and {GOLDEN_FLIPPED:.1%} of decoded pixels."
        )
    return parity


def export(config: Config) -> Parity:
    """Write the graphs and the golden pair, and compare the graphs with torch."""
    networks, _ = trained_networks(config)
    golden = golden_pair(config, networks)
    folder = graphs_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (inputs, _) in GRAPHS.items():
        example = tuple(torch.from_numpy(golden[i]) for i in inputs)
        write_graph(name, networks[name], example, folder / f"{name}.onnx")
    write_int8(config)
    if config.export.int8:
        golden[GOLDEN_INT8] = as_callable(open_session(denoiser_graph(config), "cpu"))(golden["z_t"], golden["t"])
    np.savez_compressed(folder / "golden.npz", allow_pickle=False, **golden)
    return check_parity(config, networks, folder)


if __name__ == "__main__":
    sys.stdout.write(f"{export(parse_config(__doc__))}\n")
