"""The embedded task with every constraint and several seeds: the README's table and its figure.

    python tests/experiment.py --seeds 5            45 runs of under a minute; finished ones are kept and reused

An arm is a constraint, +shuffle with its bounds dealt to other pairs, +token with the loss at each token.

Held-out figures of each run, as mean ± standard deviation over the seeds: accuracy on the noisy labels; accuracy on the
true order, by the gold score that the labels were drawn from; Spearman correlation with the gold score among the
responses to one prompt; margins. A seed changes the order of the pairs, the score head and the random bounds.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import common
import reward
import toy_data
from helpers import lines

ARMS = "none len_rat cos_sim random fixed len_rat+shuffle cos_sim+shuffle none+token cos_sim+token".split()
FLAGS = {"shuffle": "--shuffle_bounds", "token": "--loss_on token"}


def figures(folder: Path, gold: np.ndarray, near: np.ndarray) -> dict[str, float]:
    """The held-out figures of one finished run. gold: true margin of each held-out pair; near: whether a near copy."""
    last = lines(folder / "metrics.jsonl")[-1]
    margin = np.array([line["margin"] for line in lines(folder / "eval.jsonl")])
    decided, args = gold != 0, reward.Args()
    floor = args.beta1 / (1 + args.beta2) + args.beta3  # δ*(1)
    return {
        "accuracy": last["accuracy"],
        "true order": ((margin > 0) == (gold > 0))[decided].mean(),
        "Spearman with gold": last["ranked_spearman"],
        "mean margin": margin.mean(),
        "largest margin": margin.max(),
        "near copies over δ*(1)": (margin[near] > floor).mean(),
    }


def plot(folder: Path, path: Path) -> None:
    """Margins of the baseline and of cos_sim against the same similarities."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bounded, free = lines(folder / "cos_sim-1" / "eval.jsonl"), lines(folder / "none-1" / "eval.jsonl")
    similarity, bound = np.array(sorted((line["similarity"], line["bound"]) for line in bounded)).T
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    runs = {"ranking loss alone (none)": free, "with the bound (cos_sim)": bounded}
    for axis, (title, run) in zip(axes, runs.items()):
        margin = [line["margin"] for line in run]
        axis.scatter([line["similarity"] for line in bounded], margin, s=8, alpha=0.5, linewidths=0)
        axis.plot(similarity, bound, color="C3", label="bound δ*(s)")
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.set(title=title, xlabel="similarity s of the two responses")
    axes[0].set_ylabel("margin m of held-out pairs")
    axes[1].legend()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--folder", type=Path, default=Path("runs/experiment"))
    parser.add_argument("--figure", type=Path, default=None, help="write the README's figure here")
    args = parser.parse_args()

    rows = lines(common.DATA / "preference_eval.jsonl")
    scores = [[toy_data.gold_score(row["prompt"], row[name]) for row in rows] for name in ("chosen", "rejected")]
    gold = np.subtract(*scores)
    near = np.arange(len(rows)) % 2 == 0  # as toy_data.build() makes them
    for seed in range(1, args.seeds + 1):
        for arm in args.arms.split(","):
            out, (constraint, *more) = args.folder / f"{arm}-{seed}", arm.split("+")
            if not (out / "eval.jsonl").exists():
                flags = " ".join([f"--constraint {constraint} --seed {seed}", *(FLAGS[name] for name in more)])
                reward.main(common.parse_args(reward.Args, reward.preset, ["--output_dir", str(out), *flags.split()]))

    table = {
        arm: [figures(args.folder / f"{arm}-{seed}", gold, near) for seed in range(1, args.seeds + 1)]
        for arm in args.arms.split(",")
    }
    names = list(next(iter(table.values()))[0])
    print("| arm | " + " | ".join(names) + " |\n|" + " --- |" * (len(names) + 1))
    for arm, runs in table.items():
        cells = []
        for name in names:
            values = np.array([run[name] for run in runs])
            cells.append(f"{values.mean():.3f} ± {values.std(ddof=1):.3f}" if len(values) > 1 else f"{values[0]:.3f}")
        print(f"| `{arm}` | " + " | ".join(cells) + " |")
    print(
        f"true margin of the pairs: mean {gold.mean():.2f}, largest {gold.max():.1f}; "
        f"the noisy labels agree with the true order in {(gold > 0)[gold != 0].mean():.3f} of the pairs"
    )
    if args.figure:
        plot(args.folder, args.figure)


if __name__ == "__main__":
    main()
