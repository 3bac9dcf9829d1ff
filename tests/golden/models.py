"""Tiny complete models in Hugging Face layout, with transformers' logits and greedy tokens."""

import json
import math
import shutil

import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from common import DTYPES, normal, seeded, write

PROMPT, NEW = 12, 24
ALPHABET = 20  # different tokens in a song: each occurs about twice, with different successors
MIN_MARGIN = 1.0  # best logit minus second, at every greedy step
MIN_MARGIN_RATIO = 8.0  # the same, in units of max |logits_native - logits_f32|
MIN_EFFECT = 1e-3  # least change of the logits if a config key is ignored: ten times the tests' tolerance


def llama3(theta, factor, original):
    return {
        "rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": original,
    }  # fmt: skip


def plain(theta):
    return {"rope_type": "default", "rope_theta": theta}


def longrope(pairs, original, **more):
    """Divides frequencies by one set of factors up to `original` positions, by another beyond."""
    short, long = ([1 + step * i for i in range(pairs)] for step in (0.05, 0.5))
    return {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": short, "long_factor": long,
        "original_max_position_embeddings": original,
    } | more  # fmt: skip


MODELS = {
    # name: (dtype, shard size, config, {error of a wrong reader: the config that it would use}).
    # model_type is llama unless the config names another.
    "gqa_tied_llama3_bf16": (
        "bf16",
        "80KB",
        dict(vocab_size=128, hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, tie_word_embeddings=True, rope_parameters=llama3(10000.0, 8.0, 32)),
        {"no llama3 scaling": dict(rope_parameters=plain(10000.0)),
         "factor 4": dict(rope_parameters=llama3(10000.0, 4.0, 32))},
    ),
    "bias_f32": (
        "f32",
        "1GB",
        dict(vocab_size=96, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
             attention_bias=True, mlp_bias=True, rope_parameters=plain(10000.0)),
        {"no attention bias": dict(attention_bias=False), "no mlp bias": dict(mlp_bias=False)},
    ),
    "odd_f16": (
        "f16",
        "1GB",
        dict(vocab_size=101, hidden_size=39, intermediate_size=91, num_hidden_layers=2, num_attention_heads=3,
             num_key_value_heads=1, head_dim=10, rms_norm_eps=1e-3, rope_parameters=plain(777.0)),
        {"rope_theta 10000": dict(rope_parameters=plain(10000.0)), "rms_norm_eps 1e-5": dict(rms_norm_eps=1e-5)},
    ),
    "gelu_tanh_f32": (
        "f32",
        "1GB",
        dict(vocab_size=64, hidden_size=24, intermediate_size=60, num_hidden_layers=2, num_attention_heads=2,
             hidden_act="gelu_pytorch_tanh", rope_parameters=plain(10000.0)),
        {"silu": dict(hidden_act="silu"), "gelu by erf": dict(hidden_act="gelu")},
    ),
    "new_rope_keys": (
        "f32",
        "1GB",
        dict(vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, rope_parameters=llama3(500000.0, 32.0, 16)),
        {"no llama3 scaling": dict(rope_parameters=plain(500000.0)),
         "rope_theta 10000": dict(rope_parameters=llama3(10000.0, 32.0, 16))},
    ),
    "mistral_window_f16": (
        "f16",
        "1GB",
        dict(model_type="mistral", vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, sliding_window=5, rope_parameters=plain(10000.0)),
        {"no window": dict(sliding_window=None), "window of 6": dict(sliding_window=6)},
    ),
    "qwen2_window_f32": (
        "f32",
        "1GB",
        dict(model_type="qwen2", vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
             num_attention_heads=4, num_key_value_heads=2, use_sliding_window=True, sliding_window=6, max_window_layers=1,
             rope_parameters=plain(10000.0)),
        {"no window": dict(layer_types=["full_attention"] * 3),
         "a window in every layer": dict(layer_types=["sliding_attention"] * 3)},
    ),
    "qwen3_tied_bf16": (
        "bf16",
        "1GB",
        dict(model_type="qwen3", vocab_size=100, hidden_size=40, intermediate_size=56, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, head_dim=12, tie_word_embeddings=True,
             rope_parameters=plain(1000.0)),
        {"rope_theta 10000": dict(rope_parameters=plain(10000.0)), "rms_norm_eps 1e-2": dict(rms_norm_eps=1e-2)},
    ),
    "smollm3_f32": (
        "f32",
        "1GB",
        dict(model_type="smollm3", vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
             num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, no_rope_layer_interval=2,
             use_sliding_window=True, sliding_window=7, pad_token_id=None, rope_parameters=plain(2000000.0)),
        {"rope in every layer": dict(no_rope_layers=[1] * 4), "rope in no layer": dict(no_rope_layers=[0] * 4),
         "no window": dict(layer_types=["full_attention"] * 4), "rope_theta 10000": dict(rope_parameters=plain(10000.0))},
    ),
    "granite_bf16": (
        "bf16",
        "1GB",
        dict(model_type="granite", vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, embedding_multiplier=12.0, attention_multiplier=0.3,
             residual_multiplier=0.22, logits_scaling=0.9, attention_bias=True, rope_parameters=plain(10000.0)),
        {"no embedding_multiplier": dict(embedding_multiplier=1.0), "no attention_multiplier": dict(attention_multiplier=8**-0.5),
         "no residual_multiplier": dict(residual_multiplier=1.0), "no logits_scaling": dict(logits_scaling=1.0)},
    ),
    "phi3_window_f32": (
        "f32",
        "1GB",
        dict(model_type="phi3", vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, sliding_window=9, pad_token_id=None, rope_parameters=plain(10000.0)),
        {"no window": dict(sliding_window=None), "rope_theta 777": dict(rope_parameters=plain(777.0) | {"partial_rotary_factor": 1.0})},
    ),
    "phi3_longrope_f16": (
        "f16",
        "1GB",
        dict(model_type="phi3", vocab_size=100, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
             num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=False, pad_token_id=None,
             original_max_position_embeddings=16, rope_parameters=longrope(6, 16, partial_rotary_factor=0.75)),
        {"short factors beyond 16 positions": dict(original_max_position_embeddings=200),
         "attention_factor 1": dict(rope_parameters=longrope(6, 16, partial_rotary_factor=0.75, attention_factor=1.0)),
         "the whole head turned": dict(rope_parameters=longrope(8, 16, partial_rotary_factor=1.0))},
    ),
}  # fmt: skip


def make_song(vocab, rng):
    """Returns the token sequence (1, P+N) that a model memorises. Ids 0..2 are kept for bos, eos."""
    letters = 3 + torch.randperm(vocab - 3, generator=rng)[:ALPHABET]
    return letters[torch.randint(ALPHABET, (1, PROMPT + NEW), generator=rng)]


def random_weights(model, rng):
    """Makes every tensor random: norms around 1, biases and embeddings well away from 0."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            draw = normal(p.shape, rng)
            if "norm" in name:
                p.copy_(1 + 0.2 * draw)
            else:
                p.copy_(draw * (0.3 if p.dim() == 1 or "embed" in name else 1.5 / math.sqrt(p.shape[1])))


def lengths(config):
    """Returns the lengths of the texts that a model memorises.

    These are the length of the song and, where longer texts use other rotation angles, the
    length up to which the shorter ones apply.
    """
    original = config.rope_parameters.get("original_max_position_embeddings")
    short = [original] if config.rope_parameters["rope_type"] == "longrope" else []
    return [*short, PROMPT + NEW]


def memorise(model, song):
    """Takes a few Adam steps: the greedy path becomes the song, by margins far above rounding."""
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    texts = [song[:, :length] for length in lengths(model.config)]
    for _ in range(60):
        loss = sum(F.cross_entropy(model(text).logits[0, :-1], text[0, 1:]) for text in texts)
        adam.zero_grad()
        loss.backward()
        adam.step()


def build(config, dtype, song, rng):
    """Returns a model in `dtype` that knows the song."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    random_weights(model, rng)
    memorise(model, song)
    native = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    with torch.no_grad():
        for p, q in zip(native.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    return native


def load(folder, dtype, **changes):
    """Returns the checkpoint as transformers reads it, with some config keys changed."""
    config = AutoConfig.from_pretrained(folder)
    for key, value in changes.items():
        setattr(config, key, value)
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, attn_implementation="eager").eval()


def logits(model, ids):
    """(1,P) -> (1,P,V), widened."""
    with torch.no_grad():
        found = model(ids).logits
    return found if found.dtype == torch.float64 else found.float()


def distance(a, b):
    """max |a - b|"""
    return (a - b).abs().max().item()


def greedy(model, prompt, eos=None):
    """Returns new tokens (1,N), and the best minus the second logit at each step (N,)."""
    model.generation_config.eos_token_id = eos
    model.generation_config.pad_token_id = 0
    found = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW, use_cache=True,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    best = torch.stack(found.logits, 1)[0].float().topk(2).values  # (N,2)
    return found.sequences[:, prompt.shape[1] :], best[:, 0] - best[:, 1]


def greedy_paths(name, f32, native, song):
    """Returns the tensors of both prompts (P tokens, one) and each dtype's smallest margin."""
    tensors, margins = {}, {"f32": math.inf, "native": math.inf}
    for prefix, length in (("", PROMPT), ("single_", 1)):
        prompt, expected = song[:, :length], song[:, length : length + NEW]
        tensors[f"{prefix}prompt"] = prompt
        for kind, model in (("f32", f32), ("native", native)):
            tokens, margin = greedy(model, prompt)
            assert torch.equal(tokens, expected), f"{name}: the greedy path in {kind} is not the song"
            margins[kind] = min(margins[kind], margin.min().item())
            tensors |= {f"{prefix}logits_{kind}": logits(model, prompt), f"{prefix}greedy_{kind}": tokens}
    return tensors, margins


def reference(folder, dtype, song, wrong):
    """Returns tensors and figures of one checkpoint as read back.

    Fails if a comparison of tokens would not be a fair test.
    """
    f32, native = load(folder, torch.float32), load(folder, DTYPES[dtype])
    right = logits(f32, song)
    difference = distance(logits(native, song), right)
    tensors, margins = greedy_paths(folder.name, f32, native, song)
    bound = max(MIN_MARGIN, MIN_MARGIN_RATIO * difference)
    assert min(margins.values()) >= bound, f"{folder.name}: margins {margins} below {bound}"
    if f32.config.model_type != "llama":
        tensors |= {"whole_prompt": song, "whole_logits_f32": right}
    effects = {name: distance(logits(load(folder, torch.float32, **keys), song), right) for name, keys in wrong.items()}
    assert min(effects.values()) >= MIN_EFFECT, f"{folder.name}: {effects}"
    return tensors, {
        "dtype": dtype,
        "margin_f32": f"{margins['f32']:.4f}",
        "margin_native": f"{margins['native']:.4f}",
        "margin_bound": f"{bound:.4f}",
        "max_abs_native_minus_f32": f"{difference:.6f}",
        "max_abs_f32_minus_f64": f"{distance(logits(load(folder, torch.float64), song), right):.2e}",
        "max_abs_logit": f"{right.abs().max().item():.3f}",
        "effects": json.dumps({name: float(f"{e:.3g}") for name, e in effects.items()}),
    }


def stop_tokens(song):
    """Returns two eos ids: one that never occurs, and one that occurs within the continuation."""
    new = song[0, PROMPT:].tolist()
    index = next(i for i in range(NEW // 3, NEW - 1) if new[i] not in new[:i])
    return [2, new[index]], song[:, PROMPT : PROMPT + index + 1]


def rewrite_as_old_config(folder):
    """Rewrites config.json as transformers 4 did.

    It has rope_theta and rope_scaling at the top level, torch_dtype, and no head_dim.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"], config["rope_scaling"] = rope.pop("rope_theta"), rope
    config["torch_dtype"], config["transformers_version"] = config.pop("dtype"), "4.45.0"
    assert config.pop("head_dim") == config["hidden_size"] // config["num_attention_heads"]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def make_model(out, name, dtype, shard, keys, wrong):
    rng, folder = seeded("models", name), out / name
    common = dict(max_position_embeddings=256, bos_token_id=1, eos_token_id=2, rms_norm_eps=1e-5)
    config = AutoConfig.for_model(**({"model_type": "llama"} | common | keys))
    song = make_song(config.vocab_size, rng)
    stops = name == "new_rope_keys"
    if stops:
        config.eos_token_id, stopped = stop_tokens(song)
    build(config, DTYPES[dtype], song, rng).save_pretrained(folder, max_shard_size=shard)
    tensors, figures = reference(folder, dtype, song, wrong)
    if stops:
        tensors["greedy_stopped"], _ = greedy(load(folder, torch.float32), song[:, :PROMPT], eos=config.eos_token_id)
        assert torch.equal(tensors["greedy_stopped"], stopped)
    write(folder / "reference.safetensors", tensors, figures)
    print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in figures.items()))


def make_models(out):
    for name, case in MODELS.items():
        make_model(out, name, *case)
    assert len(list((out / "gqa_tied_llama3_bf16").glob("model-*.safetensors"))) >= 3, "too few shards"
    new, old = out / "new_rope_keys", out / "old_rope_keys"
    shutil.copytree(new, old)
    rewrite_as_old_config(old)
    prompt = load_file(new / "reference.safetensors")["prompt"]
    assert torch.equal(logits(load(new, torch.float32), prompt), logits(load(old, torch.float32), prompt))
