"""Measures PyTorch's SwiGLU block on one GPU, with the columns of benches/gpu/main.rs.

    python3 peers.py CSV BUDGET_SECONDS

The results are appended to the csv that the Rust benchmark has written. The systems are

- torch: eager, three F.linear, silu and *;
- torch-merged: one product for gate and up;
- torch-gemms: two products without an activation;
- liger: its fused silu * up, if it can be imported;
- torch-compile: max-autotune, one shape at a time, while the budget lasts.

The floors follow from the ceilings in CSV. The samples of the systems alternate, the weights rotate
over 600 MB, and y is checked against f64.
"""

import csv, math, statistics, sys, time

import torch
import torch.nn.functional as F

SHAPES = {"1b": (2048, 8192), "8b": (4096, 14336), "70b": (8192, 28672)}
ROWS = (1, 4, 8, 16, 32, 64, 128, 512, 2048, 4096)
COMPILED = [("8b", 1), ("8b", 16), ("8b", 512), ("70b", 1), ("8b", 4096), ("8b", 64), ("70b", 16), ("70b", 512), ("70b", 4096), ("1b", 1), ("1b", 512)]
SAMPLES, SAMPLE_US = 15, 2000.0
START = time.monotonic()


def eager(x, gate_up, down):
    i = gate_up.shape[0] // 2
    return F.linear(F.silu(F.linear(x, gate_up[:i])) * F.linear(x, gate_up[i:]), down)


def merged(x, gate_up, down):
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down)


def liger():
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def block(x, gate_up, down):
        i = gate_up.shape[0] // 2
        return F.linear(LigerSiLUMulFunction.apply(F.linear(x, gate_up[:i]), F.linear(x, gate_up[i:])), down)

    return block


class Case:
    def __init__(self, shape, rows, sets):
        self.shape, self.rows, self.sets = shape, rows, sets
        self.h, self.i = SHAPES[shape]
        self.x = torch.randn(rows, self.h, device="cuda", dtype=torch.bfloat16)
        self.hidden = torch.randn(rows, self.i, device="cuda", dtype=torch.bfloat16)
        gate_up, down = sets[0]
        product = self.x[:256].double() @ gate_up.double().t()
        gate, up = product.chunk(2, -1)
        self.exact = (gate / (1 + torch.exp(-gate)) * up) @ down.double().t()

    def gemms(self, x, gate_up, down):
        F.linear(x, gate_up)
        return F.linear(self.hidden, down)

    def error(self, block):
        y = block(self.x, *self.sets[0])[:256].double()
        return ((y - self.exact).pow(2).mean() / self.exact.pow(2).mean()).sqrt().item()


def batch(call, sets, calls, graph):
    """Returns a function that makes `calls` calls, one after the other."""

    def body():
        for n in range(calls):
            call(*sets[n % len(sets)])

    if not graph:
        return body
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        body()
    torch.cuda.current_stream().wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        body()
    recorded.replay()
    torch.cuda.synchronize()
    return recorded.replay


def elapsed(work):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3


def measure(case, systems, ceilings, write):
    batches = []
    for name, block in systems:
        error = math.nan if name == "torch-gemms" else case.error(block)
        call = lambda gate_up, down, block=block: block(case.x, gate_up, down)
        for _ in range(3):
            call(*case.sets[0])
        first = elapsed(lambda: [call(*case.sets[n % len(case.sets)]) for n in range(4)]) / 4
        calls = min(200, max(1, math.ceil(SAMPLE_US / first)))
        calls = math.ceil(calls / len(case.sets)) * len(case.sets)
        for graph in (False, True):
            try:
                batches.append((name + ("+graph" if graph else ""), batch(call, case.sets, calls, graph), calls, error, []))
            except Exception as failure:  # a system that cannot be captured must not stop the others
                print(f"failed {name} {case.shape} M = {case.rows}: {type(failure).__name__} {str(failure)[:200]}", flush=True)
    for _ in range(SAMPLES):
        for _, work, calls, _, samples in batches:
            samples.append(elapsed(work) / calls)
    bytes_ = (3 * case.h * case.i + 2 * case.rows * case.h) * 2
    operations = 6 * case.rows * case.h * case.i
    floor = max(bytes_ / ceilings["read"] * 1e-3, operations / ceilings["cublas"] * 1e-6)
    for name, _, _, error, samples in batches:
        us = statistics.median(samples)
        numbers = [f"{us:.2f}", f"{min(samples):.2f}", f"{max(samples):.2f}", f"{bytes_ / us * 1e-3:.0f}", f"{operations / us * 1e-6:.1f}"]
        write([name, "bf16", case.shape, case.h, case.i, case.rows, *numbers, f"{floor:.2f}", f"{floor / us:.3f}", f"{error:.2e}", ""])
        print(f"{name:>20}  bf16 {case.shape:>5} {case.rows:>5} {us:>10.2f} {floor / us:>8.3f} {error:>18.1e}", flush=True)


def weights(shape):
    h, i = SHAPES[shape]
    count = max(2, math.ceil(600e6 / (6 * h * i)))
    random = lambda rows, k: torch.randn(rows, k, device="cuda", dtype=torch.bfloat16) * k**-0.5
    return [(random(2 * i, h), random(h, i)) for _ in range(count)]


def main():
    path, budget = sys.argv[1], float(sys.argv[2])
    left = lambda: budget - (time.monotonic() - START)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    ceilings = {
        "read": next(float(row["gb_per_s"]) for row in rows if (row["system"], row["shape"]) == ("read", "4gib")),
        "cublas": next(float(row["tflops"]) for row in rows if row["system"] == "cublas"),
    }
    out = open(path, "a", newline="")

    def write(row):
        csv.writer(out, lineterminator="\n").writerow(row)
        out.flush()

    systems = [("torch", eager), ("torch-merged", merged)]
    try:
        systems.append(("liger", liger()))
    except Exception as failure:
        print(f"no liger: {type(failure).__name__}", flush=True)
    # Half of the budget is reserved for the compiled systems, because their tuning takes long.
    for shape in ("8b", "70b", "1b"):
        sets = weights(shape)
        for m in ROWS:
            if left() < budget / 2:
                print(f"skipped torch {shape} M = {m}: out of time", flush=True)
                continue
            case = Case(shape, m, sets)
            measure(case, [*systems, ("torch-gemms", case.gemms)], ceilings, write)
            del case
        del sets
        torch.cuda.empty_cache()
    took, sets, current = [20.0], None, None
    for shape, m in COMPILED:
        if left() < 1.3 * max(took):
            print(f"skipped torch-compile {shape} M = {m}: {left():.0f} s left", flush=True)
            continue
        start = time.monotonic()
        if current != shape:
            sets = None
            torch.cuda.empty_cache()
            sets, current = weights(shape), shape
        try:
            torch._dynamo.reset()
            case = Case(shape, m, sets)
            compiled = torch.compile(eager, mode="max-autotune-no-cudagraphs", dynamic=False)
            measure(case, [("torch-compile", compiled)], ceilings, write)
        except Exception as failure:
            print(f"failed torch-compile {shape} M = {m}: {type(failure).__name__} {str(failure)[:300]}", flush=True)
        took.append(time.monotonic() - start)


if __name__ == "__main__":
    main()
