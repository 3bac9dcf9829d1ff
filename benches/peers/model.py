#!/usr/bin/env python3
"""Measures examples/llama beside transformers on PyTorch, with a model of random bf16 weights.

README.md in this folder and --help explain it.
"""

import argparse
import csv
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import run

STORY = "Once upon a time there was a little girl named Lily. She liked to play outside in the sunshine with her friend, a big brown dog. "
COLUMNS = ["round", "read_gb_s", "ours_prompt", "ours_generation", "theirs_prompt", "theirs_generation"]


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--preset", default="1b", help="shape of the model, a preset of examples/make_checkpoint")
    parser.add_argument("--tokens", type=int, default=64, help="tokens generated per sample")
    parser.add_argument("--stories", type=int, default=16, help="number of times the prompt repeats its text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--max-busy", type=float, default=0.05,
                        help="share of the cores that other processes may use before a sample")
    parser.add_argument("--patience", type=float, default=10, help="minutes to wait for an idle machine")
    parser.add_argument("--record", metavar="MACHINE/NAME", help="write benches/record/MACHINE/NAME-model.csv and .txt")
    return parser.parse_args()


def checkpoint(preset):
    """Returns the directory of a model of random weights with the tokenizer of weights/."""
    directory = run.TARGET / f"model-{preset}"
    if not (directory / "tokenizer.json").exists():
        maker = run.build("--example", "make_checkpoint")
        subprocess.run([maker, "--preset", preset, "--out", directory, "--force"], check=True)
        for name in ("tokenizer_config.json", "tokenizer.json"):
            directory.joinpath(name).write_bytes((run.ROOT / "weights" / name).read_bytes())
    return directory


def decode_bytes(directory):
    """Returns the bytes of weights that a decode step reads.

    An embedding that is not tied to the output projection is not read as a whole.
    """
    config = json.loads((directory / "config.json").read_text())
    total = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    return total if config.get("tie_word_embeddings") else total - 2 * config["vocab_size"] * config["hidden_size"]


def ours(llama, directory, prompt, args):
    """Runs examples/llama -> prompt tokens, tokens per second of the prompt and of the generation"""
    command = [llama, "--cpu", "--model-id", directory, "--prompt", prompt, "--temperature", "0", "-n", str(args.tokens)]
    log = subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", env=run.environment("ours", args.threads)).stderr
    words = re.search(r"(\d+) prompt tokens \(([\d.]+) token/s\)", log), re.search(r"(\d+) tokens generated \(([\d.]+) token/s\)", log)
    if not all(words) or int(words[1][1]) != args.tokens:
        sys.exit(f"expected {args.tokens} tokens from examples/llama, found\n{log}")
    return int(words[0][1]), float(words[0][2]), float(words[1][2])


def read_speed(bench, args):
    """Returns the GB/s of a read of the block's packed weights (4096, 14336 in bf16).

    `cargo bench --bench ffn` measures it.
    """
    command = [bench, "--bench", "--kernels", "best", "--dtypes", "bf16", "--shapes", "8b", "--rows", "1", "--no-candle", "--seconds", "1"]
    case = subprocess.run(command, check=True, capture_output=True, text=True, env=run.environment("ours", args.threads)).stderr
    milliseconds = float(case.split()[5])  # kernel, dtype, shape, rows, ms, read ms, ..
    return 3 * 4096 * 14336 * 2 / milliseconds / 1e6


class Transformers:
    """A process of generate.py, which sleeps until it receives a line."""

    def __init__(self, directory, args):
        command = [run.venv_python("torch"), run.HERE / "generate.py", directory, str(args.threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
                                        env=run.environment("torch", args.threads))
        self.versions = self.process.stdout.readline().strip()

    def generate(self, prompt, prompt_tokens, args):
        """-> tokens per second of the prompt and of the generation"""
        self.process.stdin.write(json.dumps([prompt, prompt_tokens, args.tokens]) + "\n")
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"transformers ended with {self.process.wait()}")
        return json.loads(answer)


def main():
    args = options()
    run.install("torch")
    llama, bench = run.build("--example", "llama"), run.build("--bench", "ffn")
    directory = checkpoint(args.preset)
    run.RUN.mkdir(parents=True, exist_ok=True)
    worker = run.Worker("ours", run.build(), args.threads)
    facts = run.machine_facts(worker)
    worker.close()
    prompt, weights = (STORY * args.stories).strip(), decode_bytes(directory)
    prompt_tokens, _, _ = ours(llama, directory, prompt, args)
    theirs = Transformers(directory, args)
    theirs.generate(prompt, prompt_tokens, args)
    facts += f"model: {args.preset}, {weights / 1e9:.2f} GB read per token, {prompt_tokens} prompt tokens, {args.tokens} generated\n"
    facts += f"{theirs.versions}\noptions: {' '.join(sys.argv[1:])}\n"
    print(facts, " ".join(f"{name:>18}" for name in COLUMNS), sep="")
    table = []
    for number in range(1, args.rounds + 1):
        turns = []
        for turn in (lambda: [read_speed(bench, args)], lambda: ours(llama, directory, prompt, args)[1:],
                     lambda: theirs.generate(prompt, prompt_tokens, args)):
            run.wait_idle(args)
            turns += turn()
        table.append([number, *(f"{value:.2f}" for value in turns)])
        print(" ".join(f"{value:>18}" for value in table[-1]), flush=True)
    read, prompt_ours, generation_ours, prompt_theirs, generation_theirs = ([float(v) for v in column] for column in list(zip(*table))[1:])
    paired = lambda a, b: statistics.median(x / y for x, y in zip(a, b))
    summary = (f"prompt: {paired(prompt_ours, prompt_theirs):.2f} times transformers' speed\n"
               f"generation: {paired(generation_ours, generation_theirs):.2f} times transformers' speed, "
               f"{paired(generation_ours, read) * weights / 1e9:.3f} of reading the weights\n")
    print(summary, end="")
    theirs.process.kill()
    if args.record:
        path = run.ROOT / "benches" / "record" / f"{args.record}-model"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{path}.csv", "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *table])
        Path(f"{path}.txt").write_text(facts + summary)


if __name__ == "__main__":
    main()
