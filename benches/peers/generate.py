"""Runs a checkpoint in transformers for model.py, in bf16: `generate.py MODEL THREADS`.

The first line on standard output states the versions. Each line [prompt, its number of tokens,
tokens to generate] on standard input is answered by [tokens per second of the prompt, of the
generation].
"""

import json
import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import tokenizers
import torch
import transformers


def main():
    directory, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    tokenizer = tokenizers.Tokenizer.from_file(f"{directory}/tokenizer.json")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {model.config._attn_implementation} attention", flush=True)
    for line in sys.stdin:
        prompt, expected, tokens = json.loads(line)
        ids = tokenizer.encode(prompt).ids
        if len(ids) == expected - 1:
            ids = [model.config.bos_token_id, *ids]
        assert len(ids) == expected, f"{len(ids)} prompt tokens, expected {expected}"
        seconds = [generate(model, ids, number) for number in (1, tokens)]
        print(json.dumps([len(ids) / seconds[0], (tokens - 1) / (seconds[1] - seconds[0])]), flush=True)


@torch.inference_mode()
def generate(model, ids, tokens):
    """Returns the seconds of a greedy generation of exactly `tokens` tokens."""
    x = torch.tensor([ids])
    start = time.perf_counter()
    y = model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                       pad_token_id=0)
    elapsed = time.perf_counter() - start
    assert y.shape[1] == len(ids) + tokens
    return elapsed


if __name__ == "__main__":
    main()
