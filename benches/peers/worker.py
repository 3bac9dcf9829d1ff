"""The peers' side of run.py: builds and times another system's SwiGLU block on request.

`worker.py SYSTEM THREADS` reads the lines of worker.rs and gives the same answers:
`load M [train]`, `time SECONDS`, `quit`. The system `reference` computes in f64 the result that all others are
compared with.
"""

import contextlib
import json
import os
import statistics
import sys
import time

import numpy as np

CASE = "case.safetensors"
PROCESS = contextlib.ExitStack()  # contexts that last until the process ends
NUMPY_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.int16}


def read_case(rows):
    """Returns the case's dtype and gate_proj, up_proj (I,H), down_proj (H,I), x (M,H) as arrays.

    bf16 values are returned as their bits in int16.
    """
    with open(CASE, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))

    def array(name):
        entry = header[name]
        offset = 8 + header_bytes + entry["data_offsets"][0]
        dtype = NUMPY_DTYPES[entry["dtype"]]
        return np.fromfile(CASE, dtype, np.prod(entry["shape"]), offset=offset).reshape(entry["shape"])

    gate_proj, up_proj, down_proj, x = map(array, ("gate_proj", "up_proj", "down_proj", "x"))
    return header["x"]["dtype"], gate_proj, up_proj, down_proj, x[:rows]


def widen(array):
    """Returns the same numbers in f64. An int16 holds the bits of a bf16."""
    if array.dtype == np.int16:
        array = (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


def reference(rows, threads, train):
    """-> (call, result, description): y (M,H) = (silu(x gateᵀ) * x upᵀ) downᵀ, every step in f64.

    With `train` the result is dx (M,H) under dy = 1.
    """
    _, gate_proj, up_proj, down_proj, x = read_case(rows)
    x = widen(x)
    gate_proj, up_proj, down_proj = map(widen, (gate_proj, up_proj, down_proj))
    gate, up = x @ gate_proj.T, x @ up_proj.T
    sigmoid = 1 / (1 + np.exp(-gate))
    if train:
        dh = down_proj.sum(axis=0)
        dgate = dh * up * sigmoid * (1 + gate * (1 - sigmoid))
        y = dgate @ gate_proj + (dh * gate * sigmoid) @ up_proj
    else:
        y = (gate * sigmoid * up) @ down_proj.T
    return lambda: y, lambda: y, f"numpy {np.__version__} f64"


def torch_block(compiled, freezing=False, max_autotune=False, backend="inductor"):
    """A system: LLaMA's MLP in PyTorch, eager or compiled."""

    def prepare(rows, threads, train):
        import torch
        import torch.nn.functional as F

        if backend == "zentorch":
            import zentorch
        torch.set_num_threads(threads)
        if not train:
            PROCESS.enter_context(torch.inference_mode())

        class Mlp(torch.nn.Module):
            def __init__(self, weights):
                super().__init__()
                self.gate_proj, self.up_proj, self.down_proj = map(linear, weights)

            def forward(self, x):
                return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

        def tensor(array):
            # The copy has PyTorch's own alignment.
            shared = torch.from_numpy(array)
            return (shared.view(torch.bfloat16) if array.dtype == np.int16 else shared).clone()

        def linear(weight):
            layer = torch.nn.Linear(*reversed(weight.shape), bias=False, device="meta")
            layer.weight = torch.nn.Parameter(tensor(weight), requires_grad=train)
            return layer

        _, *weights, x = read_case(rows)
        model, x = Mlp(weights).train(train), tensor(x).requires_grad_(train)
        if compiled:
            import torch._inductor.config as config

            config.freezing = freezing and not train
            config.max_autotune = max_autotune
            model = torch.compile(model, backend=backend, dynamic=False)

        description = f"torch {torch.__version__}"
        if backend == "zentorch":
            description += f", zentorch {zentorch.__version__}"
        if not train:
            return lambda: model(x), lambda: model(x).double().numpy(), description
        ones = torch.ones_like(x)

        def step():
            x.grad = None
            model.zero_grad(set_to_none=True)
            model(x).backward(ones)
            return x.grad

        return step, lambda: step().double().numpy(), description

    return prepare


def openvino(rows, threads, train):
    """A system: the block as an OpenVINO model, with weights, input and output in the case's dtype.

    The plugin computes in that dtype too, except for f16, which it computes in f32: it interprets
    a hint of f16 as bf16 on CPUs without f16 products.
    """
    if train:
        raise ValueError("OpenVINO does not train")
    import openvino as ov
    from openvino import opset15 as ops

    name, *weights, x = read_case(rows)
    dtype = {"F32": ov.Type.f32, "F16": ov.Type.f16, "BF16": ov.Type.bf16}[name]

    def tensor(array):
        owned = ov.Tensor(dtype, ov.Shape(array.shape))
        owned.data.view(array.dtype)[...] = array
        return owned

    def linear(x, weight):
        constant = ov.op.Constant(tensor(weight), shared_memory=True)
        return ops.matmul(x, ops.convert(constant, "f32"), False, True)

    input = ops.parameter(list(x.shape), dtype)
    wide = ops.convert(input, "f32")
    gate_proj, up_proj, down_proj = weights
    h = ops.multiply(ops.swish(linear(wide, gate_proj)), linear(wide, up_proj))
    output = ops.convert(linear(h, down_proj), dtype.to_string())
    request = ov.Core().compile_model(ov.Model([output], [input]), "CPU", {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if name == "BF16" else "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
    }).create_infer_request()
    request.set_input_tensor(tensor(x))

    def result():
        request.infer()
        y = request.get_output_tensor().data
        return widen(y.view(np.int16) if name == "BF16" else y)

    return lambda: request.infer(share_outputs=True), result, f"openvino {ov.__version__}"


SYSTEMS = {
    "reference": reference,
    "torch-eager": torch_block(compiled=False),
    "torch-compile": torch_block(compiled=True, freezing=True),
    "torch-max-autotune": torch_block(compiled=True, freezing=True, max_autotune=True),
    "zentorch": torch_block(compiled=True, freezing=True, backend="zentorch"),
    "openvino": openvino,
}


def timed(call, seconds):
    """Returns the median and minimum seconds per call, and the number of calls, like worker.rs."""

    def sample(calls):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    sample(1)
    group = max(1, min(1000, -int(-2e-4 // sample(1))))
    samples, end = [], time.perf_counter() + seconds
    while len(samples) < 3 or time.perf_counter() < end:
        samples.append(sample(group))
    return f"{statistics.median(samples):e} {min(samples):e} {len(samples) * group}"


def serve(system, threads):
    # Output of libraries is sent to the log, because standard output carries the answers.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    call = None
    for line in sys.stdin:
        word, *values = line.split()
        if word == "quit":
            break
        try:
            if word == "load":
                call, result, description = SYSTEMS[system](int(values[0]), threads, values[1:] == ["train"])
                result().astype("<f8").tofile(f"y-{system}.f64")
                print("ok", description, file=channel)
            elif word == "time":
                print("ok", timed(call, float(values[0])), file=channel)
            else:
                print(f"error unknown line `{line.strip()}`", file=channel)
        except Exception as error:
            print("error", type(error).__name__, " ".join(str(error).split())[:300], file=channel)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
