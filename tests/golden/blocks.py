"""Single blocks and gates: mlp, glu, phi3, gemma, falcon_h1, gpt_oss, mixtral."""

import copy
import json
import math
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1MLP
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from common import DTYPES, normal, seeded, write


def fill(module, rng, gain=1.0, fan_in=-1):
    """Weights ~ N(0, gain^2 / fan_in), biases ~ N(0, 1/4); `fan_in` is the axis that is summed over."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            scale = 0.5 if "bias" in name else gain / math.sqrt(p.shape[fan_in])
            p.copy_(scale * normal(p.shape, rng))


def no_new_nan(values, inputs):
    """True where no value is NaN unless an input is NaN."""
    new = torch.stack([v.isnan() for v in values]).any(0)
    old = torch.stack([i.isnan() for i in inputs]).any(0)
    return ~new | old


# ---------------------------------------------------------------- 1. LlamaMLP

ALL = ("f64", "f32", "bf16", "f16")
MLP_CASES = [
    # H, I, M, hidden_act, bias, dtypes
    (33, 77, 5, "silu", False, ALL),
    (33, 77, 5, "silu", True, ("f32", "bf16", "f16")),
    (33, 77, 1, "silu", False, ("f32", "bf16", "f16")),
    (32, 64, 8, "silu", False, ("f32", "bf16")),
    (19, 45, 3, "gelu", False, ALL),
    (19, 45, 3, "gelu_pytorch_tanh", False, ALL),
    (19, 45, 3, "gelu_pytorch_tanh", True, ("f32",)),
    (19, 45, 3, "relu", False, ALL),
    (19, 45, 3, "sigmoid", False, ALL),
]


def gradients(module, x, dy, call):
    """Returns y (M,H) and the gradients of <y, dy> for x and every parameter."""
    x = x.clone().requires_grad_()
    y = call(module, x)
    y.backward(dy)
    return {"y": y, "dx": x.grad, **{f"d{name}": p.grad for name, p in module.named_parameters()}}


def block_tensors(module, dtype, rows, rng, call=lambda module, x: module(x)):
    """Inputs, weights and references of one block; `module` holds weights of `dtype`."""
    hidden = module.config.hidden_size
    x, dy = (normal((rows, hidden), rng).to(dtype) for _ in range(2))
    tensors = {"x": x, **dict(module.named_parameters())}
    with torch.no_grad():
        y_f64 = call(copy.deepcopy(module).double(), x.double())
    if dtype in (torch.bfloat16, torch.float16):
        with torch.no_grad():
            return tensors | {"y_eager": call(module, x), "y_f64": y_f64}
    tensors |= {"dy": dy, **gradients(module, x, dy, call)}
    return tensors if dtype == torch.float64 else tensors | {"y_f64": y_f64}


def block_metadata(config, dtype, keys):
    """Returns the fields that a reader needs, flat, and as JSON with the config.json's names."""
    found = {key: getattr(config, key) for key in ("model_type", "hidden_size", "intermediate_size", *keys)}
    flat = {key: json.dumps(v) if isinstance(v, (bool, list)) else v for key, v in found.items()}
    return flat | {"dtype": dtype, "config": json.dumps(found)}


def make_mlp(out):
    for hidden, inter, rows, act, bias, dtypes in MLP_CASES:
        for dtype in dtypes:
            name = f"{act}_h{hidden}_i{inter}_m{rows}{'_bias' if bias else ''}"
            rng = seeded("mlp", name)
            config = AutoConfig.for_model(
                "llama", hidden_size=hidden, intermediate_size=inter, hidden_act=act, mlp_bias=bias,
                num_attention_heads=1, head_dim=2,
            )  # fmt: skip
            module = LlamaMLP(config).to(DTYPES[dtype])
            fill(module, rng, gain=1.5)
            metadata = block_metadata(config, dtype, ("hidden_act", "mlp_bias")) | {"bias": json.dumps(bias)}
            write(out / f"{name}_{dtype}.safetensors", block_tensors(module, DTYPES[dtype], rows, rng), metadata)


# ---------------------------------------------------------------- 2. gates


def times(act):
    return lambda gate, up: act(gate) * up


def clamped(gate, up):
    """gpt-oss: the factor that multiplies (up + 1) is gate * sigmoid(1.702 * gate), both clamped at 7."""
    gate, up = gate.clamp(max=7.0), up.clamp(min=-7.0, max=7.0)
    return (up + 1) * (gate * torch.sigmoid(1.702 * gate))


PAIR_OPS = {
    # name: (gate, up -> out, metadata)
    "silu": (times(F.silu), {}),
    "swish": (times(lambda g: g * torch.sigmoid(1.5 * g)), {"beta": 1.5}),
    "sigmoid": (times(torch.sigmoid), {}),
    "relu": (times(F.relu), {}),
    "gelu": (times(F.gelu), {}),
    "gelu_tanh": (times(lambda g: F.gelu(g, approximate="tanh")), {}),
    "identity": (times(lambda g: g), {}),
    "gpt_oss": (clamped, {"alpha": 1.702, "limit": 7.0}),
}
INF, NAN = float("inf"), float("nan")
POSITIVE_GATES = (0.0, 1e-30, 1e-3, 0.5, 1.0, 7.0, 7.5, 11.09, 12.0, 20.0, 88.0, 89.0, 100.0, 1e4)
SPECIAL_UPS = (1.0, -1.5, -0.0, 7.5, -8.0, NAN)
INF_GATES, INF_UPS = (INF, -INF, 1.0, -1.0, 0.0), (INF, -INF, 1.0, -1.5, 0.0)


def grid(gates, ups, dtype):
    """Returns all pairs of a gate and an up, flat: (gates * ups,) each."""
    gate, up = torch.meshgrid(torch.tensor(gates).double(), torch.tensor(ups).double(), indexing="ij")
    return gate.flatten().to(dtype), up.flatten().to(dtype)


def pair(op, gate, up, dy):
    """Returns out, dgate, dup by autograd, in the dtype of the arguments."""
    gate, up = (t.clone().requires_grad_() for t in (gate, up))
    out = op(gate, up)
    out.backward(dy)
    return {"out": out.detach(), "dgate": gate.grad, "dup": up.grad}


def special_pairs(op, dtype, suffix):
    """Edge values with references in f64.

    Pairs for which autograd itself makes NaN out of numbers (inf * 0) are omitted.
    """
    largest = torch.finfo(dtype).max
    gate, up = grid([s * g for g in (*POSITIVE_GATES, largest) for s in (1, -1)] + [NAN], SPECIAL_UPS, dtype)
    dy = torch.tensor([1.0, -0.75], dtype=dtype).repeat(len(gate))[: len(gate)]
    found = pair(op, gate.double(), up.double(), dy.double())
    keep = no_new_nan(found.values(), (gate, up))
    tensors = {"gate": gate, "up": up, "dy": dy} | {name + suffix: t for name, t in found.items()}
    return {f"special_{name}": t[keep] for name, t in tensors.items()}


def infinite_pairs(op, dtype, suffix):
    """Infinities, forward only.

    Gates where PyTorch's activation misses its limit (its silu(-inf) is NaN) are omitted.
    """
    gate, up = grid(INF_GATES, INF_UPS, dtype)
    keep = no_new_nan([op(gate.double(), torch.ones_like(up).double())], (gate,))
    gate, up = gate[keep], up[keep]
    return {"inf_gate": gate, "inf_up": up, f"inf_out{suffix}": op(gate.double(), up.double())}


def make_glu(out):
    for name, (op, extra) in PAIR_OPS.items():
        for dtype, torch_dtype in DTYPES.items():
            rng = seeded("glu", name)
            gate, up, dy = ((s * normal((7, 33), rng)).to(torch_dtype) for s in (4.0, 4.0, 1.0))
            tensors = {"gate": gate, "up": up, "dy": dy}
            if dtype in ("f64", "f32"):
                tensors |= pair(op, gate, up, dy)
            suffix = "" if dtype == "f64" else "_f64"
            if suffix:
                tensors |= {k + suffix: t for k, t in pair(op, gate.double(), up.double(), dy.double()).items()}
            tensors |= special_pairs(op, torch_dtype, suffix) | infinite_pairs(op, torch_dtype, suffix)
            write(out / f"{name}_{dtype}.safetensors", tensors, {"activation": name, "dtype": dtype, **extra})


# ---------------------------------------------------------------- 3. blocks of other families


def to_one_expert(experts, x):
    """Routes every row to expert 0 with the weight 1."""
    rows = x.shape[0]
    return experts(x, torch.zeros(rows, 1, dtype=torch.long), torch.ones(rows, 1, dtype=x.dtype))


def make_phi3(out):
    config = AutoConfig.for_model("phi3", hidden_size=21, intermediate_size=45, num_attention_heads=1)
    module, rng = Phi3MLP(config), seeded("phi3")
    fill(module, rng, gain=1.5)
    metadata = block_metadata(config, "f32", ("hidden_act",))
    write(out / "mlp_f32.safetensors", block_tensors(module, torch.float32, 5, rng), metadata)


def make_gemma(out):
    config = AutoConfig.for_model("gemma2", hidden_size=21, intermediate_size=45, num_attention_heads=1)
    module, rng = Gemma2MLP(config), seeded("gemma2")
    fill(module, rng, gain=1.5)
    metadata = block_metadata(config, "f32", ("hidden_activation",))
    write(out / "gemma2_f32.safetensors", block_tensors(module, torch.float32, 5, rng), metadata)


def make_falcon_h1(out):
    for bias in (False, True):
        config = AutoConfig.for_model(
            "falcon_h1", hidden_size=21, intermediate_size=45, mlp_multipliers=[0.6875, 1.375], mlp_bias=bias
        )
        module, rng = FalconH1MLP(config), seeded("falcon_h1", bias)
        fill(module, rng, gain=1.5)
        metadata = block_metadata(config, "f32", ("hidden_act", "mlp_bias", "mlp_multipliers"))
        name = f"mlp{'_bias' if bias else ''}_f32.safetensors"
        write(out / name, block_tensors(module, torch.float32, 5, rng), metadata)


def make_gpt_oss(out):
    config = AutoConfig.for_model(
        "gpt_oss", hidden_size=22, intermediate_size=46, num_local_experts=1, num_experts_per_tok=1,
        experts_implementation="eager",
    )  # fmt: skip
    experts, rng = GptOssExperts(config), seeded("gpt_oss")
    fill(experts, rng, gain=4.0, fan_in=-2)
    tensors = block_tensors(experts, torch.float32, 6, rng, to_one_expert)
    tensors["gate_up_proj.weight"] = experts.gate_up_proj[0].T  # (2I,H), gate in even rows
    tensors["gate_up_proj.bias"] = experts.gate_up_proj_bias[0]
    tensors["down_proj.weight"] = experts.down_proj[0].T  # (H,I)
    tensors["down_proj.bias"] = experts.down_proj_bias[0]
    gate_up = F.linear(tensors["x"], tensors["gate_up_proj.weight"], tensors["gate_up_proj.bias"])  # (M,2I)
    gate, up = gate_up[:, ::2], gate_up[:, 1::2]
    assert (gate > 7).any() and (up > 7).any() and (up < -7).any(), "the limit is never reached"
    metadata = block_metadata(config, "f32", ("hidden_act", "swiglu_limit", "swiglu_alpha"))
    write(out / "expert_f32.safetensors", tensors, metadata)


def make_mixtral(out):
    """Two experts under the names that transformers itself writes into a Mixtral checkpoint."""
    config = AutoConfig.for_model(
        "mixtral", vocab_size=8, hidden_size=20, intermediate_size=46, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1, experts_implementation="eager",
    )  # fmt: skip
    rng = seeded("mixtral")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fill(model, rng, gain=1.5)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = load_file(Path(folder) / "model.safetensors")
    prefix = "model.layers.0.block_sparse_moe."  # as in the checkpoints on the hub
    tensors = {k.removeprefix(prefix): t for k, t in saved.items() if k.startswith(prefix + "experts.")}
    experts, x = model.model.layers[0].mlp.experts, normal((5, 20), rng).float()
    for index, name in enumerate(("y", "y_expert1")):
        route = torch.full((5, 1), index), torch.ones(5, 1)
        with torch.no_grad():
            tensors[name] = experts(x, *route)
            tensors[name + "_f64"] = copy.deepcopy(experts).double()(x.double(), route[0], route[1].double())
    metadata = block_metadata(config, "f32", ("hidden_act", "num_local_experts"))
    write(out / "experts_f32.safetensors", tensors | {"x": x}, metadata)
