"""LoRA adapters that PEFT wrote, and what PEFT computes with them: base, the cases, rules.json.

Every case is a directory with one adapter (or two) as `save_pretrained` writes it, and a
reference.safetensors that was computed after loading it again with `from_pretrained`.
"""

import copy
import json
import math
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from transformers import AutoConfig, AutoModelForCausalLM

from common import normal, seeded, write

ROWS, TOKENS = 5, 9
MODEL = dict(vocab_size=37, hidden_size=21, intermediate_size=45, num_hidden_layers=2, num_attention_heads=3,
             num_key_value_heads=1, head_dim=6, attn_implementation="eager")  # fmt: skip
TARGETS = ["gate_proj", "up_proj", "down_proj", "q_proj", "o_proj"]
MLP = ("gate_proj", "up_proj", "down_proj")

CASES = {
    # name: {adapter: (the arguments of LoraConfig, dtype of the file)}
    "plain": {"": (dict(r=4, lora_alpha=12, lora_dropout=0.1), torch.float32)},
    "rslora": {"": (dict(r=5, lora_alpha=7, use_rslora=True), torch.float32)},
    "patterns": {
        "": (
            dict(r=3, lora_alpha=8, rank_pattern={"down_proj": 7, r"layers\.1\.mlp\.(gate|up)_proj": 2},
                 alpha_pattern={"gate_proj": 5, "^model.layers.0.mlp.up_proj": 11}),
            torch.float32,
        )
    },
    "down_only": {"": (dict(r=6, lora_alpha=9, target_modules=["down_proj"]), torch.float32)},
    "bf16": {"": (dict(r=4, lora_alpha=6), torch.bfloat16)},
    "two": {
        "first": (dict(r=4, lora_alpha=12), torch.float32),
        "second": (dict(r=2, lora_alpha=3, target_modules=["up_proj", "down_proj"]), torch.float32),
    },
}  # fmt: skip


def make_peft(out):
    base = make_base()
    base.save_pretrained(out / "base")
    (out / "base" / "generation_config.json").unlink()
    for name, adapters in CASES.items():
        for adapter, (arguments, dtype) in adapters.items():
            save_adapter(base, out / name / adapter, {"target_modules": TARGETS} | arguments, dtype)
        write(out / name / "reference.safetensors", *reference(base, out / name, list(adapters)))
    make_rules(out)


def make_base():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **MODEL))
    rng = seeded("peft", "base")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(1 + 0.1 * normal(p.shape, rng) if p.dim() == 1 else normal(p.shape, rng) / math.sqrt(p.shape[-1]))
    return model.eval()


def save_adapter(base, out, arguments, dtype):
    """A and B are both random: an untrained B is zero, and every mistake would go unnoticed."""
    config = LoraConfig(task_type="CAUSAL_LM", **arguments)
    model = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    config.base_model_name_or_path = "tiny-llama"
    rng = seeded("peft", out.parent.name, out.name)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = (normal(p.shape, rng) / math.sqrt(p.shape[-1])).to(dtype)
    model.save_pretrained(out)
    (out / "README.md").unlink()
    sort_lists(out / "adapter_config.json")


def sort_lists(path):
    """PEFT writes sets as lists, in an order that differs from run to run."""
    config = json.loads(path.read_text())
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config[key], list):
            config[key].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True))


# ---------------------------------------------------------------- references


def load(base, folder, adapters, dtype=torch.float32, adapter_dtype=torch.float32):
    """The base in `dtype` with all adapters active in `adapter_dtype`. (PEFT widens 16 bits to f32 by default.)"""
    model = PeftModel.from_pretrained(
        copy.deepcopy(base).to(dtype), folder / adapters[0], adapter_name=adapters[0] or "default", is_trainable=True
    )
    for adapter in adapters[1:]:
        model.load_adapter(folder / adapter, adapter, is_trainable=True)
    if len(adapters) > 1:
        model.base_model.set_adapter(adapters)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(adapter_dtype)
    return model.eval()  # no dropout


def reference(base, folder, adapters):
    rng = seeded("peft", folder.name, "x")
    x, dy = (normal((ROWS, MODEL["hidden_size"]), rng).float() for _ in range(2))
    tokens = torch.randint(MODEL["vocab_size"], (1, TOKENS), generator=rng)
    model = load(base, folder, adapters)
    mlp = base.model.layers[0].mlp
    tensors = {f"base.{name}": getattr(mlp, name).weight for name in MLP} | {"x": x, "dy": dy, "tokens": tokens}
    for suffix, m in (("", model), ("_f64", copy.deepcopy(model).double())):
        dtype = torch.float64 if suffix else torch.float32
        found = gradients(m.base_model.model.model.layers[0].mlp, x.to(dtype), dy.to(dtype))
        with torch.no_grad():
            found["logits"] = m(input_ids=tokens, use_cache=False).logits
        tensors |= {name + suffix: tensor for name, tensor in found.items()}
    tensors |= merged("merged", model)
    if folder.name == "bf16":
        for name, dtype, adapter_dtype in (
            ("merged_bf16_adapter", torch.float32, torch.bfloat16),
            ("merged_bf16_base", torch.bfloat16, torch.float32),
            ("merged_bf16_both", torch.bfloat16, torch.bfloat16),
        ):
            tensors |= merged(name, load(base, folder, adapters, dtype, adapter_dtype))
    return tensors, {"adapters": json.dumps(adapters)}


def gradients(mlp, x, dy):
    """y (M,H) and the gradients of <y, dy> for x and every lora_A and lora_B."""
    x = x.clone().requires_grad_()
    y = mlp(x)
    y.backward(dy)
    of_adapter = {f"d{name.removesuffix('.weight')}": p.grad for name, p in mlp.named_parameters() if "lora_" in name}
    return {"y": y, "dx": x.grad} | {name.replace(".default", ""): grad for name, grad in of_adapter.items()}


def merged(prefix, model):
    layer = copy.deepcopy(model).merge_and_unload().model.layers[0].mlp
    return {f"{prefix}.{name}": getattr(layer, name).weight for name in MLP}


# ---------------------------------------------------------------- rules

RULES = [
    dict(target_modules=["q_proj", "down_proj"]),
    dict(target_modules=["proj"]),  # a suffix after a dot, no substring; only in EXTRA
    dict(target_modules=["mlp.down_proj", "model.layers.3.self_attn.v_proj"]),
    dict(target_modules="all-linear"),
    dict(target_modules="ALL-Linear", exclude_modules=["o_proj", "lm_head"]),
    dict(target_modules=r".*\.mlp\.(gate|up)_proj"),
    dict(target_modules=r"model\.layers\.(?!1\b)\d+\.self_attn\.[qk]_proj"),
    dict(target_modules=r"(?i).*\.(DOWN|up)_proj$"),
    dict(target_modules=r".*\.layers\.(\d)\1?\.mlp\.up_proj"),
    dict(target_modules=["up_proj"], exclude_modules=r".*layers\.1.*"),
    dict(target_modules=["up_proj", "down_proj"], exclude_modules=["layers.0.mlp.up_proj", "down_proj"]),
    dict(target_modules=["up_proj"], layers_to_transform=1),
    dict(target_modules=["up_proj", "q_proj"], layers_to_transform=[0, 10]),
    dict(target_modules=["up_proj"], layers_to_transform=[]),
    dict(target_modules=["up_proj"], layers_to_transform=[1, 2], layers_pattern="layers"),
    dict(target_modules=["w1", "up_proj"], layers_to_transform=[1, 2], layers_pattern=["h", "lay[e]rs"]),
    dict(target_modules=["w1"], layers_to_transform=[0]),
    dict(target_modules=["model.layers.2.mlp.up_proj"], layers_to_transform=[7]),
    dict(target_modules=["up_proj", "gate_proj"], r=16, lora_alpha=24, rank_pattern={"up_proj": 3},
         alpha_pattern={"gate_proj": 5}),
    dict(target_modules=["up_proj"], use_rslora=True, r=7, rank_pattern={r"layers.1.mlp.up_proj": 3}),
    dict(target_modules=["up_proj"], rank_pattern={r"^model.layers.1.mlp.up_proj": 3, r"layers.\d.mlp.up_proj": 5}),
    dict(target_modules=["up_proj"],
         rank_pattern={r".*\.1\.mlp\.up_proj": 3, "p_proj": 4, "mlp": 5, "10.mlp.up_proj": 6}),
    dict(target_modules=["up_proj", "q_proj"],
         alpha_pattern={"up_proj|q_proj": 1.5, r"(a|layers)\.2\.(mlp|b)\.up_proj": 3}),
    dict(target_modules=["up_proj"], rank_pattern={r"layers\.([13579]|10)\.mlp\.up_proj": 4}, lora_alpha=2.5),
    dict(target_modules=["up_proj"], rank_pattern={r"(layers)\.\d\.mlp\.up_proj(?<=up_proj)": 4, "layers.10.*": 6}),
]  # fmt: skip
# Names that the model lacks; they are answered by the functions that PEFT applies to each module.
EXTRA = ["up_proj", "q_proj", "w1", "lm_head", "layers.1.up_proj", "layers.1.mlp.up_proj",
         "model.layers.1.experts.0.w1",
         "x.h.1.w1", "h.2.w1", "proj", "a.proj", "a.b.0.c.1.w1", "b.0.w1", "modelXlayers.1.mlp.up_proj",
         "model.layers.1.mlp.up_proj.x",
         "vision.layers.2.mlp.up_proj", "model.layers.3.mlp.Xup_proj"]  # fmt: skip


def make_rules(out):
    """rules.json: every config as PEFT saves it, with [module, rank, scaling] of what it targets."""
    arguments = MODEL | dict(num_hidden_layers=11, hidden_size=4, num_attention_heads=2,
                             intermediate_size=4, head_dim=2)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **arguments))
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    rules = []
    for rule in RULES:
        with tempfile.TemporaryDirectory() as folder:
            LoraConfig(task_type="CAUSAL_LM", **rule).save_pretrained(folder)
            sort_lists(Path(folder) / "adapter_config.json")
            saved = json.loads((Path(folder) / "adapter_config.json").read_text())
            config = LoraConfig.from_pretrained(folder)
        targeted = [] if rule["target_modules"] in (["proj"], ["w1"]) else targeted_in(model, copy.deepcopy(config))
        extra = None if str(config.target_modules).lower() == "all-linear" else targeted_extra(config)
        rules.append({"config": saved, "targeted": targeted, "extra": extra})
    lines = ",\n".join(json.dumps(rule, sort_keys=True, separators=(",", ":")) for rule in rules)
    names = json.dumps({"modules": linear, "extra": EXTRA})
    (out / "rules.json").write_text(f'{names[:-1]},\n"rules": [\n{lines}\n]}}\n')


def targeted_in(model, config):
    model = get_peft_model(copy.deepcopy(model), config).base_model.model
    layers = [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]
    return [[name, module.r["default"], module.scaling["default"]] for name, module in layers]


def targeted_extra(config):
    found = []
    for name in EXTRA:
        if check_target_module_exists(config, name):
            r = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
            alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
            found.append([name, r, alpha / (math.sqrt(r) if config.use_rslora else r)])
    return found
