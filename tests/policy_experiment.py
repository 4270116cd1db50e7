"""SFT, then DPO with each constraint, several seeds, on the embedded task: the README's second table.

    python tests/policy_experiment.py --seeds 3            12 runs of half a minute; finished ones are kept and reused

Each held-out prompt is answered ten times by sampling, and the answers are scored by the gold score that the
preferences were drawn from. A seed changes the order of the rows in both steps; each DPO run starts from its seed's SFT.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import common
import dpo
import sft
import toy_data
from helpers import lines

CONSTRAINTS = ["none", "cos_sim", "len_rat"]
ANSWERS = 10


def run(script, folder: Path, *argv: str) -> Path:
    """The model of a run, which is made if it is not there."""
    if not (folder / "generations.json").exists():
        script.main(common.parse_args(script.Args, script.preset, [*argv, "--output_dir", str(folder)]))
    return folder / "model"


@torch.no_grad()
def gold(folder: Path, seed: int) -> dict[str, float]:
    """Mean gold score of sampled answers, and their length in characters."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = [row["prompt"] for row in lines(common.DATA / "prompts_eval.jsonl")] * ANSWERS
    torch.manual_seed(seed)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    output = model.generate(
        inputs.input_ids, attention_mask=inputs.attention_mask, do_sample=True, top_k=0, max_new_tokens=200
    )
    answers = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    scores = np.array([toy_data.gold_score(prompt, answer) for prompt, answer in zip(prompts, answers)])
    return {"gold score": scores.mean(), "characters": np.mean([len(answer) for answer in answers])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/policy_experiment"))
    args = parser.parse_args()
    table = {}
    for seed in range(1, args.seeds + 1):
        start = run(sft, args.folder / f"sft-{seed}", "--seed", str(seed))
        table.setdefault("SFT", []).append(gold(start, seed))
        for constraint in CONSTRAINTS:
            folder = args.folder / f"dpo-{constraint}-{seed}"
            model = run(dpo, folder, "--constraint", constraint, "--model", str(start), "--seed", str(seed))
            last = lines(folder / "metrics.jsonl")[-1]
            logged = {name: last[name] for name in ("accuracy", "margin_mean", "margin_max", "kl")}
            table.setdefault(f"DPO `{constraint}`", []).append(gold(model, seed) | logged)
    names = list(table[f"DPO `{CONSTRAINTS[0]}`"][0])
    print("| | " + " | ".join(names) + " |\n|" + " --- |" * (len(names) + 1))
    for row, runs in table.items():
        cells = []
        for name in names:
            values = np.array([r.get(name, np.nan) for r in runs])
            cells.append(f"{values.mean():.2f} ± {values.std(ddof=1):.2f}" if np.isfinite(values).all() else "")
        print(f"| {row} | " + " | ".join(cells) + " |")
    print(json.dumps({row: [round(float(r["gold score"]), 2) for r in runs] for row, runs in table.items()}))


if __name__ == "__main__":
    main()
