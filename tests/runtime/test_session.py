"""Memory that runs out for real: the process's address space is limited, and onnxruntime asks for more."""

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
# A slice becomes so many MiB on its way through the graph.
SLICE_MIB = 64

LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np
from app.errors import OutOfMemory
from app.pipeline.networks import Models
from app.runtime.session import as_callable, open_session

run = as_callable(open_session(Path(sys.argv[1]), "cpu", 1))
run(np.zeros((1, 1), np.float32))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]) * 2**20, resource.RLIM_INFINITY))
sizes = []
try:
    models = Models(run, run, run).in_batches(16, sizes.append)
    print(*models.encode(np.arange(40, dtype=np.float32)[:, None]).ravel().astype(int))
    models.decode(np.zeros((9, 1), np.float32))
except OutOfMemory as error:
    print(error.code, error.found)
print(*sizes)
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph that gives back its input by way of a large array."""
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
    ("mib", "told"),
    [
        # Room for 8 slices and not for 16: halved once, and for all networks.
        (12 * SLICE_MIB, [" ".join(map(str, range(40))), "8 8 8 8 8 8 1"]),
        # Not for 8 either: halved no further.
        (
            6 * SLICE_MIB,
            ["out_of_memory A network evaluation of 8 slices needs more memory than there is.", ""],
        ),
    ],
)
def test_memory_that_runs_out_halves_the_batch_once(wide: Path, mib: int, told: list[str]) -> None:
    command = [sys.executable, "-c", LIMITED, str(wide), str(mib)]
    ended = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == told


def test_another_fault_of_the_runtime_stays_what_it_is(wide: Path) -> None:
    run = as_callable(open_session(wide, "cpu", 1))
    with pytest.raises(Exception, match="INVALID_ARGUMENT") as caught:
        run(np.zeros((1, 2), np.float32))
    assert not isinstance(caught.value, OutOfMemory)
