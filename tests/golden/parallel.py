"""One decoder layer of Cohere, whose attention and feed-forward block read the same norm."""

import copy
import json

import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.cohere.modeling_cohere import CohereDecoderLayer, CohereRotaryEmbedding
from transformers.models.cohere2.modeling_cohere2 import Cohere2DecoderLayer, Cohere2RotaryEmbedding

from blocks import fill, gradients
from common import normal, seeded, write

BATCH, POSITIONS = 2, 7
BASE = {
    "hidden_size": 36,
    "intermediate_size": 77,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "layer_norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 777.0},
}
CASES = {
    # file: (model_type, further config)
    "cohere": ("cohere", {}),
    "cohere_qk_norm": ("cohere", {"use_qk_norm": True}),
    "cohere2_window": ("cohere2", {"layer_types": ["sliding_attention"], "sliding_window": 3}),
    "cohere2_full": ("cohere2", {"layer_types": ["full_attention"], "sliding_window": 3}),
}
CLASSES = {
    "cohere": (CohereDecoderLayer, CohereRotaryEmbedding),
    "cohere2": (Cohere2DecoderLayer, Cohere2RotaryEmbedding),
}
READ_KEYS = ("model_type", "hidden_act", "attention_bias", "logit_scale", "tie_word_embeddings")


class Double(TorchFunctionMode):
    """Replaces float32 with float64 in every call.

    Without it a float64 layer of transformers computes norms, softmax and rope in float32.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        result = func(*args, **kwargs)
        assert getattr(result, "dtype", None) != torch.float32, f"{func} returned float32"
        return result


def make_layer(config, rng):
    """Projections are filled as in single blocks; the weights of norms are ~ N(1, 1/16)."""
    layer = CLASSES[config.model_type][0](config, layer_idx=0)
    fill(layer, rng)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if "norm" in name:
                p.copy_(1 + 0.25 * normal(p.shape, rng))
    return layer


def make_mask(config, x):
    """Returns the additive mask (B,1,P,P) that the model makes for this layer, in x's dtype."""
    sliding = getattr(config, "layer_types", None) == ["sliding_attention"]
    make = create_sliding_window_causal_mask if sliding else create_causal_mask
    return make(config, x, attention_mask=None, past_key_values=None)


def y_and_dx(config, layer, mask, x, dy):
    """Returns y and dx (B,P,H)."""
    positions = torch.arange(POSITIONS)[None]
    rope = CLASSES[config.model_type][1](config)(x, positions)
    found = gradients(
        layer, x, dy, lambda layer, x: layer(x, attention_mask=mask, position_embeddings=rope)
    )
    return {"y": found["y"], "dx": found["dx"]}


def layer_tensors(config, rng):
    layer = make_layer(config, rng)
    x, dy = (normal((BATCH, POSITIONS, config.hidden_size), rng).float() for _ in range(2))
    tensors = {"x": x, "dy": dy, **dict(layer.named_parameters())}
    tensors |= y_and_dx(config, layer, make_mask(config, x), x, dy)
    layer, x, dy = copy.deepcopy(layer).double(), x.double(), dy.double()
    mask = make_mask(config, x)
    with Double():
        exact = y_and_dx(config, layer, mask, x, dy)
    return tensors | {f"{name}_f64": t for name, t in exact.items()}


def make_parallel(out):
    for name, (model_type, further) in CASES.items():
        given = BASE | further
        config = AutoConfig.for_model(model_type, attn_implementation="eager", **given)
        keys = {key: getattr(config, key) for key in (*READ_KEYS, *given)}
        metadata = {"dtype": "f32", "config": json.dumps(keys)}
        tensors = layer_tensors(config, seeded("parallel", name))
        write(out / f"{name}_f32.safetensors", tensors, metadata)
