"""Writes transformers' greedy continuations with the checkpoint in weights/, for the tests.

    python tests/golden/stories.py          # writes tests/golden/stories.json

Tokenizer and model are loaded from the directory as a user loads them, with the weights widened to
float32. The smallest margin between the best and the second logit is recorded. The prompts are
chosen so that it is far above 1e-4, by which two programs may differ in float32. With smaller
margins equal texts would be a matter of chance.
"""

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE.parent.parent / "weights"
PROMPTS = [
    "Once upon a time",
    "Once upon a time, there was a brave little fox",
    "Once there was a little bird who",
    'The dog said, "Café?"',
]
NEW_TOKENS = 240


def continuation(model, tokenizer, prompt):
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, output_scores=True
        )
    best = [torch.topk(scores[0].float(), 2).values for scores in out.scores]
    ids = out.sequences[0].tolist()
    return {
        "prompt": prompt,
        "ids": ids,
        "text": tokenizer.decode(ids, skip_special_tokens=True),
        "smallest_margin": round(min(float(a - b) for a, b in best), 5),
    }


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    model = AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32).eval()
    stories = [continuation(model, tokenizer, prompt) for prompt in PROMPTS]
    (HERE / "stories.json").write_text(json.dumps(stories, indent=1, ensure_ascii=False) + "\n")
    for story in stories:
        print(f"margin {story['smallest_margin']}: {story['text']}\n")


if __name__ == "__main__":
    main()
