"""What this machine can do at most: one large matrix product, float32 and int8, through onnxruntime."""

import time

import numpy as np
from onnx import TensorProto, helper

SIDE = 2048
# The best of so many: a ceiling that was disturbed would be none.
TRIES = 4
OPSET, IR_VERSION = 18, 10


def _graph(kind: str) -> bytes:
    types = {"float32": ("MatMul", TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.FLOAT)}
    types["int8"] = ("MatMulInteger", TensorProto.UINT8, TensorProto.INT8, TensorProto.INT32)
    operator, a, b, y = types[kind]
    sides = (SIDE, SIDE)
    graph = helper.make_graph(
        [helper.make_node(operator, ["a", "b"], ["y"])],
        "ceiling",
        [helper.make_tensor_value_info("a", a, sides), helper.make_tensor_value_info("b", b, sides)],
        [helper.make_tensor_value_info("y", y, sides)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    packed: bytes = model.SerializeToString()
    return packed


class Ceiling:
    """Both products, ready to be timed beside the rows."""

    def __init__(self) -> None:
        import onnxruntime

        rng = np.random.default_rng(0)
        whole = rng.integers(0, 127, (SIDE, SIDE))
        self._inputs = {
            "float32": {name: whole.astype(np.float32) for name in "ab"},
            "int8": {"a": whole.astype(np.uint8), "b": whole.astype(np.int8)},
        }
        self._sessions = {
            kind: onnxruntime.InferenceSession(_graph(kind), providers=["CPUExecutionProvider"])
            for kind in self._inputs
        }
        self.time()

    def time(self) -> dict[str, float]:
        """Thousand million operations a second of each, an add and a multiply counting two."""
        reached = {}
        for kind, session in self._sessions.items():
            seconds = []
            for _ in range(TRIES):
                start = time.perf_counter()
                session.run(None, self._inputs[kind])
                seconds.append(time.perf_counter() - start)
            reached[kind] = 2 * SIDE**3 / min(seconds) / 1e9
        return reached
