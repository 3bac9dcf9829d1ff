"""Code that all cases share: the file writer, seeds, random tensors."""

import json
import struct

import torch
from safetensors.torch import save

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def write(path, tensors, metadata):
    """Writes one safetensors file with sorted metadata (the library's own order is random)."""
    data = save({name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()})
    (size,) = struct.unpack("<Q", data[:8])
    header = {"__metadata__": {k: str(v) for k, v in sorted(metadata.items())}, **json.loads(data[8 : 8 + size])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def seeded(*key):
    """Returns a generator whose seed depends only on the case, not on the cases before it."""
    seed = 0
    for byte in "/".join(map(str, key)).encode():
        seed = (seed * 257 + byte) % (2**61 - 1)
    return torch.Generator().manual_seed(seed)


def normal(shape, rng):
    return torch.randn(shape, generator=rng, dtype=torch.float64)
