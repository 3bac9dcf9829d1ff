"""Computes every gated MLP class of transformers with the config that transformers saves for it.

    python families.py            rewrites families/blocks.safetensors and families/classes.json
    python families.py --check    compares byte for byte instead

Classes are found by their structure: two or three weights, and a forward that multiplies an
activation. Each is built small from its own config class, with random weights, and run in f32 and
in f64. The variants set those biases and other activations that the class reads.
"""

import argparse
import importlib
import inspect
import json
import os
import re
import sys
import warnings
from pathlib import Path

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
warnings.filterwarnings("ignore")

import numpy as np
import torch
import transformers
from torch import nn

ROOT = Path(__file__).parent / "families"
H, I, EXPERT, SHARED, ROWS = 8, 12, 10, 14, 3

SIZES = {
    H: ["hidden_size", "d_model", "n_embd", "dim", "embed_dim"],
    I: ["intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "dense_intermediate_size",
        "n_inner", "block_ff_dim", "intermediate_size_mlp"],
    EXPERT: ["moe_intermediate_size", "expert_ffn_hidden_size"],
    SHARED: ["shared_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"],
    2: ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok", "n_group", "topk_group"],
}
# Sets of parameter names of gated blocks: separate gate, up and down, or fused gate and up, and
# down.
LAYOUTS = [
    {"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"}, {"wi_0", "wi_1", "wo"}, {"w1", "w3", "w2"},
    {"w1", "w2", "w3"}, {"input_linear", "output_linear"}, {"Wi", "Wo"}, {"weights_in", "weights_out"}, {"w12", "w3"},
    {"fc11", "fc12", "fc2"}, {"fc1", "fc2"}, {"w1", "v1", "w2"}, {"linear_in", "linear_out"}, {"linear_fc1", "linear_fc2"},
    {"gate_and_up_proj", "down_proj"}, {"gate", "up", "down"}, {"ff_proj", "ff_out"}, {"gate_proj", "up_proj", "down_proj", "act"},
    {"dense_h_to_4h", "dense_4h_to_h"}, {"w_0", "w_1"}, {"up_gate_proj", "down_proj"}, {"gated_layers", "wo"}, {"l1", "l2", "l3"},
]


def classes():
    """Returns (model folder, class) of every candidate, sorted by name."""
    models = Path(transformers.__file__).parent / "models"
    for folder in sorted(p.name for p in models.iterdir() if p.is_dir()):
        for file in sorted((models / folder).glob("modeling_*.py")):
            text = file.read_text()
            if "*" not in text or not re.search(r"MLP|Mlp|FFN|FeedForward|GatedAct|Experts|GLU|Glu", text):
                continue
            try:
                module = importlib.import_module(f"transformers.models.{folder}.{file.stem}")
            except ImportError:  # its package is not needed by any gated block
                continue
            for name in re.findall(r"^class (\w+)\(", text, re.M):
                cls = getattr(module, name, None)
                if not (inspect.isclass(cls) and issubclass(cls, nn.Module)) or "Config" in name:
                    continue
                if re.search(r"MLP|Mlp|FFN|FeedForward|GatedAct|GatedACT|Experts$|GLU|Glu|SharedExpert", name):
                    yield folder, module, cls


def configurations(folder):
    """Returns the definitions in the configuration files of a folder."""
    directory = Path(transformers.__file__).parent / "models" / folder
    for file in sorted(directory.glob("configuration_*.py")):
        yield from sorted(vars(importlib.import_module(f"transformers.models.{folder}.{file.stem}")).items())


def config_classes(folder, module, cls):
    """Returns the class that the annotation names, otherwise those of the folder."""
    found = []
    annotation = inspect.signature(cls.__init__).parameters.get("config")
    annotation = annotation.annotation if annotation is not None else None
    if inspect.isclass(annotation) and hasattr(annotation, "to_dict"):
        return [annotation]
    for name in re.findall(r"\w+Config", str(annotation)):
        found.append(getattr(module, name, None))
    found += [value for name, value in configurations(folder) if name.endswith("Config") and hasattr(value, "to_dict")]
    found = [c for c in found if inspect.isclass(c) and c.__module__.startswith("transformers.models")]
    return list(dict.fromkeys(found))


def small(config):
    for size, names in SIZES.items():
        for name in names:
            value = getattr(config, name, None)
            if isinstance(value, bool) or not isinstance(value, (int, list, tuple)):
                continue
            if isinstance(value, (list, tuple)):
                setattr(config, name, [size] * len(value))
            else:
                setattr(config, name, size)
    if getattr(config, "num_experts_per_tok", None) is not None:
        config.num_experts_per_tok = 1
    if getattr(config, "swiglu_limit", None) is not None:
        config.swiglu_limit = 0.75  # within the range of the projections
    if getattr(config, "activation_sparsity_pattern", None) is not None:
        config.activation_sparsity_pattern = [0.0] * len(config.activation_sparsity_pattern)
    if getattr(config, "feed_forward_proj", None) == "relu":
        config.feed_forward_proj = "gated-gelu"
        config.is_gated_act, config.dense_act_fn = True, "gelu_new"
    for switch in ["use_swiglu_ffn", "use_gated_mlp"]:
        if getattr(config, switch, None) is False:
            setattr(config, switch, True)
    return reloaded(config)


def reloaded(config):
    """Returns the config as saved and read by transformers, which recomputes derived fields."""
    try:
        return type(config).from_dict(config.to_dict())
    except Exception:  # the small sizes fail a check of other parts
        return config


def build(cls, config):
    """Builds the module, whichever arguments its constructor takes."""
    names = list(inspect.signature(cls.__init__).parameters)[1:]
    attempts = [dict(config=config), dict(config=config, layer_idx=0), dict(config=config, intermediate_size=EXPERT)]
    if "config" not in names:
        attempts = [dict(hidden_size=H, intermediate_size=I, hidden_act="silu"), {n: config for n in names[:1]}]
    for kwargs in attempts:
        if set(kwargs) - set(names) and "kwargs" not in names:
            continue
        try:
            with torch.random.fork_rng():
                module = cls(**kwargs)
            return module, kwargs
        except Exception:
            continue
    return None, None


def filled(module, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            fan = parameter.shape[-1] if parameter.dim() > 1 else 16
            scale = 1.2 * (3.0 / fan) ** 0.5 if parameter.dim() > 1 else 0.5
            values = (torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 2 - 1) * scale
            parameter.copy_(values.float())
    return module.eval()


def bare(name):
    return name.rsplit(".", 1)[0] if name.endswith((".weight", ".bias")) else name


def run(module, x):
    """Returns the output. Experts route all rows to their first expert."""
    names = list(inspect.signature(module.forward).parameters)
    args = [x]
    if any("top_k" in n or "routing" in n or "router" in n for n in names):
        index = torch.zeros(x.shape[0], 1, dtype=torch.long)
        args = [x, index, torch.ones(x.shape[0], 1, dtype=x.dtype)]
    y = module(*args)
    return y[0] if isinstance(y, tuple) else y


def first_expert(parameters):
    """Returns one expert of 3-D parameters, with the names and shapes (out, in) of a checkpoint."""
    out = {}
    for name, value in parameters.items():
        name = bare(name)
        if value.dim() == 3:
            out[f"{name}.weight"] = value[0]
        elif value.dim() == 2 and name.endswith("_bias"):
            out[f"{name.removesuffix('_bias')}.bias"] = value[0]
        elif value.dim() >= 2:
            return None
    return out


def pair(folder, cls, config, outer, seed):
    module, kwargs = build(cls, config)
    if module is None:
        return None
    parameters = dict(module.named_parameters())
    if {bare(n).split("_bias")[0] for n in parameters if "norm" not in n} not in LAYOUTS or len(list(module.modules())) > 12:
        return None
    filled(module, seed)
    experts = any(p.dim() == 3 for p in parameters.values())
    tensors = first_expert(parameters) if experts else {k: v for k, v in parameters.items()}
    if tensors is None:
        return None
    with torch.no_grad():
        x = torch.rand(ROWS, H, generator=torch.Generator().manual_seed(99), dtype=torch.float64).float() * 6 - 3
        try:
            y = run(module, x)
            y64 = run(module.double(), x.double())
            module.float()
        except Exception:
            return None
        if y.shape != x.shape:
            return None
    tensors = {k: v.detach().float() for k, v in tensors.items()}
    if experts and any(k.startswith("gate_up_proj") and v.dim() == 2 and v.shape[0] == H and v.shape[1] != H for k, v in tensors.items()):
        tensors = {k: v.t() if v.dim() == 2 else v for k, v in tensors.items()}
    down = [v for k, v in tensors.items() if v.dim() == 2 and v.shape[0] == H]
    sizes = {v.shape[1] for v in down}
    # With a gate, gate and up together have twice as many rows as down has columns.
    if len(sizes) != 1 or sum(v.shape[0] for v in tensors.values() if v.dim() == 2 and v.shape[1] == H) != 2 * max(sizes):
        return None
    kind = "expert" if experts or "Expert" in cls.__name__ or "intermediate_size" in kwargs else "dense"
    saved = json.loads((outer or config).to_json_string(use_diff=False))
    return {
        "folder": folder, "class": cls.__name__, "kind": kind, "intermediate_size": sizes.pop(), "config": saved,
        "tensors": {k: np.ascontiguousarray(v.contiguous().numpy()) for k, v in tensors.items()},
        "y": y.numpy().astype(np.float64), "y_f64": y64.numpy(), "x": x.numpy(),
    }


def activation_fields(cls):
    return sorted(set(re.findall(r"ACT2FN\[\s*(?:self\.)?config\.(\w+)", inspect.getsource(cls))))


def variants(cls, make):
    """Yields (name, config): the default, with biases, with other activations."""
    yield "", make()
    text = inspect.getsource(cls)
    for field in ["mlp_bias", "use_bias", "bias", "mlp_fc1_bias"]:
        config = make()
        if f"config.{field}" in text and getattr(config, field, None) is False:
            setattr(config, field, True)
            if field == "mlp_fc1_bias":
                config.mlp_fc2_bias = True
            yield f"{field}", reloaded(config)
    for field in activation_fields(cls):
        config = make()
        found = getattr(config, field, None)
        if isinstance(found, str):
            other = "relu" if found == "gelu" else "gelu"
            setattr(config, field, other)
            yield f"{field}={other}", reloaded(config)


def outer_of(folder, module, config_class):
    """Returns the composite config that contains this one as text_config, if one exists."""
    for name, value in configurations(folder):
        subs = getattr(value, "sub_configs", None) if inspect.isclass(value) else None
        if isinstance(subs, dict) and subs.get("text_config") is config_class:
            return value
    return None


def pairs():
    seen = set()
    seed = 0
    for folder, module, cls in classes():
        for config_class in config_classes(folder, module, cls):
            make = lambda: small(config_class())
            try:
                made = list(variants(cls, make))
            except Exception:
                continue
            done = False
            for variant, config in made:
                seed += 1
                try:
                    entry = pair(folder, cls, config, None, seed)
                except Exception as error:
                    entry = None
                if entry is None:
                    continue
                key = (cls.__name__, variant)
                if key in seen:
                    continue
                seen.add(key)
                entry["variant"] = variant
                done = True
                yield entry
            if done:
                outer = outer_of(folder, module, config_class)
                if outer is not None:
                    try:
                        whole = outer()
                        whole.text_config = make()
                        entry = pair(folder, cls, whole.text_config, whole, seed)
                    except Exception:
                        entry = None
                    if entry is not None and (cls.__name__, "composite") not in seen:
                        seen.add((cls.__name__, "composite"))
                        entry["variant"] = "composite"
                        yield entry
                break


def small_config(value):
    """Returns the saved config without the long lists and label tables that no block needs."""
    drop = {"id2label", "label2id", "transformers_version", "layer_types", "vision_config", "audio_config"}
    return {k: small_config(v) if isinstance(v, dict) else v for k, v in value.items() if k not in drop}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT)
    args = parser.parse_args()
    entries = list(pairs())
    tensors, listing = {}, []
    for n, entry in enumerate(entries):
        name = f"{n:03}"
        for key, value in entry.pop("tensors").items():
            tensors[f"{name}.block.{key}"] = value
        tensors[f"{name}.y"] = entry.pop("y").astype(np.float32)
        tensors[f"{name}.y_f64"] = entry.pop("y_f64")
        x = entry.pop("x")
        entry["config"] = small_config(entry["config"])
        listing.append({"pair": name, **entry})
    tensors["x"] = x
    from safetensors.numpy import save
    data = save({k: tensors[k] for k in sorted(tensors)})
    text = "[\n" + ",\n".join(json.dumps(e, sort_keys=True) for e in listing) + "\n]\n"
    args.out.mkdir(exist_ok=True)
    for name, new in [("blocks.safetensors", data), ("classes.json", text.encode())]:
        path = args.out / name
        if args.check:
            if path.read_bytes() != new:
                sys.exit(f"{path} differs")
        else:
            path.write_bytes(new)
    print(len(listing), "pairs,", len(data), "bytes")


if __name__ == "__main__":
    main()
