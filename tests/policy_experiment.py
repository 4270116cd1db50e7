"""SFT, then DPO or PPO with each constraint, several seeds, on the embedded task: the README's tables and PPO figure.

    python tests/policy_experiment.py --method dpo --seeds 3                    12 runs of half a minute
    python tests/policy_experiment.py --method ppo --seeds 3 --figure assets/ppo.png     21 runs of about a minute

Finished runs are kept and reused. Each held-out prompt is answered ten times by sampling, and the answers are scored by
the gold score that the preferences were drawn from. A seed changes the order of the rows in all steps and what PPO
samples; each run starts from its seed's SFT, and PPO is rewarded by its seed's reward model under the constraint.
During PPO the held-out prompts are answered once every 16 steps, for the figure.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import common  # before torch

import numpy as np
import torch
import transformers

import dpo
import ppo
import reward
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


def run_dpo(folder: Path, start: Path, constraint: str, seed: int) -> dict[str, float]:
    out = folder / f"dpo-{constraint}-{seed}"
    model = run(dpo, out, "--model", str(start), *f"--constraint {constraint} --seed {seed}".split())
    last = lines(out / "metrics.jsonl")[-1]
    return gold(model, seed) | {name: last[name] for name in ("accuracy", "margin_mean", "margin_max", "kl")}


def run_ppo(folder: Path, start: Path, constraint: str, seed: int) -> dict[str, float]:
    made = folder / f"reward-{constraint}-{seed}"
    if not (made / "eval.jsonl").exists():
        argv = ["--model", str(start), "--output_dir", str(made), *f"--constraint {constraint} --seed {seed}".split()]
        reward.main(common.parse_args(reward.Args, reward.preset, argv))
    out, answers, evaluate = folder / f"ppo-{constraint}-{seed}", [], ppo.evaluate

    def spy(*arguments):
        answers.append(evaluate(*arguments))
        return answers[-1]

    ppo.evaluate = spy
    models = ["--policy_model", str(start), "--reward_model", str(made / "model")]
    model = run(ppo, out, *models, *f"--eval_every 16 --seed {seed} --log_every 1".split())
    ppo.evaluate = evaluate
    if answers:  # gold score of the answers at each evaluation
        scores = [np.mean([toy_data.gold_score(a["prompt"], a["answer"]) for a in each]) for each in answers]
        (out / "gold.json").write_text(json.dumps([float(s) for s in scores]))
    train = [m for m in lines(out / "metrics.jsonl") if m["split"] == "train"]
    values = gold(model, seed)
    for name in ("score_mean", "score_std", "score_growth", "kl", "response_tokens", "entropy"):
        values[name] = float(np.mean([m[name] for m in train[-10:]]))
    return values


def plot(folder: Path, seeds: int, path: Path) -> None:
    """Score, KL and gold score over the steps of PPO; a line for each constraint, the mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for color, constraint in enumerate(CONSTRAINTS):
        outs = [folder / f"ppo-{constraint}-{seed}" for seed in range(1, seeds + 1)]
        metrics = [[m for m in lines(out / "metrics.jsonl") if m["split"] == "train"] for out in outs]
        golds = np.array([json.loads((out / "gold.json").read_text()) for out in outs])
        steps = [m["step"] for m in lines(outs[0] / "metrics.jsonl") if m["split"] == "eval"]
        curves = [
            ([m["step"] for m in metrics[0]], np.array([[m["score_mean"] for m in each] for each in metrics])),
            ([m["step"] for m in metrics[0]], np.array([[m["kl"] for m in each] for each in metrics])),
            (steps, golds),
        ]
        for axis, (x, y) in zip(axes, curves):
            axis.plot(x, y.mean(0), color=f"C{color}", label=constraint)
            axis.fill_between(x, y.min(0), y.max(0), color=f"C{color}", alpha=0.15, linewidth=0)
    for axis, title in zip(axes, ("score of the reward model", "KL from the reference, nats", "gold score")):
        axis.set(xlabel="PPO step", title=title)
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["dpo", "ppo"], default="dpo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/policy_experiment"))
    parser.add_argument("--figure", type=Path, default=None, help="(ppo) write the README's figure here")
    args = parser.parse_args()
    table = {}
    for seed in range(1, args.seeds + 1):
        start = run(sft, args.folder / f"sft-{seed}", "--seed", str(seed))
        table.setdefault("SFT", []).append(gold(start, seed))
        for constraint in CONSTRAINTS:
            one = {"dpo": run_dpo, "ppo": run_ppo}[args.method](args.folder, start, constraint, seed)
            table.setdefault(f"{args.method.upper()} `{constraint}`", []).append(one)
    names = list(one)
    print("| | " + " | ".join(names) + " |\n|" + " --- |" * (len(names) + 1))
    for row, runs in table.items():
        cells = []
        for name in names:
            values = np.array([r.get(name, np.nan) for r in runs])
            cells.append(f"{values.mean():.2f} ± {values.std(ddof=1):.2f}" if np.isfinite(values).all() else "")
        print(f"| {row} | " + " | ".join(cells) + " |")
    if args.figure:
        plot(args.folder, args.seeds, args.figure)
    print(json.dumps({row: [round(float(r["gold score"]), 2) for r in runs] for row, runs in table.items()}))


if __name__ == "__main__":
    main()
