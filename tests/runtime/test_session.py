"""Sessions that run out of memory, in a process with a limited address space."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from app.errors import OutOfMemory
from app.runtime.session import as_callable, open_session

CHECKOUT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
# Memory of one slice in the graph.
SLICE_MIB = 64

LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np
from app.errors import OutOfMemory
from app.pipeline.diffusion import Networks
from app.runtime.session import as_callable, open_session

run = as_callable(open_session(Path(sys.argv[1]), "cpu", 1))
run(np.zeros((1, 1), np.float32))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]) * 2**20, resource.RLIM_INFINITY))
sizes = []
try:
    networks = Networks(run, run, run).in_batches(16, sizes.append)
    print(*networks.encode(np.arange(40, dtype=np.float32)[:, None]).ravel().astype(int))
    networks.decode(np.zeros((9, 1), np.float32))
except OutOfMemory as error:
    print(error.code, error.found)
print(*sizes)
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a graph that computes its input from a large array."""
    width = SLICE_MIB * MIB // 4
    graph = helper.make_graph(
        [
            helper.make_node("Expand", ["x", "shape"], ["large"]),
            helper.make_node("ReduceMax", ["large"], ["y"], axes=[1], keepdims=1),
        ],
        "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 1])],
        [numpy_helper.from_array(np.array([1, width], dtype=np.int64), "shape")],
    )
    path = tmp_path_factory.mktemp("graph") / "wide.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.mark.parametrize(
    ("mib", "printed"),
    [
        # Memory for 8 slices but not for 16: the batch of all networks is halved once.
        (12 * SLICE_MIB, [" ".join(map(str, range(40))), "8 8 8 8 8 8 1"]),
        # Not enough memory for 8 slices: the batch is not halved again.
        (
            6 * SLICE_MIB,
            ["out_of_memory A network evaluation of 8 slices needs more memory than there is.", ""],
        ),
    ],
)
def test_batch_is_halved_once_if_memory_runs_out(wide: Path, mib: int, printed: list[str]) -> None:
    command = [sys.executable, "-c", LIMITED, str(wide), str(mib)]
    result = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == printed


def test_other_errors_of_onnxruntime_pass(wide: Path) -> None:
    run = as_callable(open_session(wide, "cpu", 1))
    with pytest.raises(Exception, match="INVALID_ARGUMENT") as caught:
        run(np.zeros((1, 2), np.float32))
    assert not isinstance(caught.value, OutOfMemory)
