"""Writes the golden files: results of PyTorch, transformers and PEFT, without this crate.

    python make.py                 rewrites every file beside this script
    python make.py --check         makes them again elsewhere and compares byte for byte
    python make.py --out DIR       writes them under DIR

README.md beside this file describes each file. Notation, here and in the modules beside it: rows M,
hidden_size H, intermediate_size I, vocabulary V, prompt length P, new tokens N. The gradient of
NAME is called dNAME; gradients are those of the scalar <y, dy>.
"""

import argparse
import filecmp
import importlib.metadata
import os
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def check_versions():
    """Stops unless the pinned versions are installed, because others may compute other numbers."""
    for line in (HERE / "requirements.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        name, wanted = line.split("==")
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "nothing"
        if found.split("+")[0] != wanted:
            sys.exit(f"make.py: expected {name}=={wanted}, found {found}: pip install -r {HERE / 'requirements.txt'}")


check_versions()
os.environ["HF_HUB_OFFLINE"] = "1"
sys.dont_write_bytecode = True

import torch
import transformers

import adapters
import blocks
import models
import parallel

MAKERS = {
    # folder: the function that fills it
    "mlp": blocks.make_mlp,
    "glu": blocks.make_glu,
    "phi3": blocks.make_phi3,
    "gemma": blocks.make_gemma,
    "falcon_h1": blocks.make_falcon_h1,
    "gpt_oss": blocks.make_gpt_oss,
    "mixtral": blocks.make_mixtral,
    "models": models.make_models,
    "parallel": parallel.make_parallel,
    "peft": adapters.make_peft,
}


def make(out):
    for folder, maker in MAKERS.items():
        shutil.rmtree(out / folder, ignore_errors=True)
        maker(out / folder)


def files(root):
    return sorted(p.relative_to(root) for folder in MAKERS for p in (root / folder).rglob("*") if p.is_file())


def check():
    """Makes all files again in a temporary folder and exits with 1 if a byte differs."""
    with tempfile.TemporaryDirectory() as other:
        make(Path(other))
        made, kept = files(Path(other)), files(HERE)
        same, _, _ = filecmp.cmpfiles(HERE, other, made, shallow=False)
    bad = sorted(set(made) ^ set(kept) | (set(made) - set(same)))
    print(f"{len(made)} files, different: {', '.join(map(str, bad)) or 'none'}")
    sys.exit(bool(bad))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare the files with those of a new run")
    parser.add_argument("--out", type=Path, default=HERE, help="where to write (default: beside this script)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    check() if args.check else make(args.out)


if __name__ == "__main__":
    main()
