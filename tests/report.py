"""What the runs of evidence.py came to: the tables of README.md and EVIDENCE.md, and the pictures.

    python tests/report.py                                                              prints every table
    python tests/report.py --pages README.md tests/EVIDENCE.md --pictures assets        writes them anew

A table gives means over the seeds, and in brackets Student's 95 % interval of the paired difference to its first arm.
"""

import argparse
import functools
import re
from pathlib import Path

import numpy as np
import torch
from evidence import ARMS, BEST_OF, EPOCHS, FLIPPED, LONG, ROOT, lines, some
from matplotlib.figure import Figure
from scipy.stats import t

import priors

# ---------------------------------------------------------------- tables


def interval(differences: np.ndarray) -> tuple[float, float]:
    """Student's 95 % interval of a mean, from a value for each seed."""
    if len(differences) < 2:
        return np.nan, np.nan
    half = t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / len(differences) ** 0.5
    return differences.mean() - half, differences.mean() + half


def compared(records: list[dict], columns: dict) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """For each arm and column the values of the seeds, and their paired differences to those of the first arm."""
    values, result = {}, {}  # arm: seed: a value for each column
    for record in sorted(records, key=lambda record: ARMS[record["experiment"]].index(record["arm"])):
        row = np.array([column(record) for column in columns.values()], float)  # None: NaN
        values.setdefault(record["arm"], {})[record["seed"]] = row
    for arm, own in values.items():
        first = next(iter(values.values()))
        both = np.array([*own.values()]).T, np.array([row - first.get(seed, np.nan) for seed, row in own.items()]).T
        result[arm] = [(x[np.isfinite(x)], d[np.isfinite(d)]) for x, d in zip(*both)]
    return result


def markdown(head: list[str], rows: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *rows]
    text = "\n".join(f"| {' | '.join(row)} |".replace("|Δ|", "abs Δ") for row in rows)
    return re.sub(r"\|  (?=\|)", "| ", text)


def cell(own: np.ndarray, difference: np.ndarray, first: bool) -> str:
    """Mean over the seeds; of all arms but the first also the interval of how it differs from the first."""
    if not len(own):
        return ""
    low, high = interval(difference)
    return f"{own.mean():.3g}" + ("" if first or np.isnan(low) else f" ({low:+.2g} to {high:+.2g})")


def table(records: list[dict], columns: dict) -> str:
    """Arms over columns: means, and in brackets the interval of the paired difference to the first arm."""
    every, rows = compared(records, columns), []
    most = max((len(own) for cells in every.values() for own, _ in cells), default=0)
    for arm, cells in every.items():
        some = [f"{cell(*values, first=not rows)}{f', {len(values[0])} seeds' * (0 < len(values[0]) < most)}"
                for values in cells]  # fmt: skip
        rows.append([f"`{arm}`", *some])
    return markdown([f"{most} seeds", *columns], rows)


def figure(*path):
    """record -> record[path[0]][path[1]]..."""
    return lambda record: functools.reduce(lambda value, name: value[name], path, record)


def plain(*names):
    return {name: figure(name) for name in names}


def at(record: dict, root_kl: float, name: str) -> float:
    """A curve's value at a √KL, between its points; NaN beyond them."""
    x, y = np.sqrt(np.maximum(record["kl"], 0)), np.array(record[name])
    order = np.argsort(x)
    return float(np.interp(root_kl, x[order], y[order], right=np.nan))


def last(name: str):
    """Of PPO, the mean of the last 30 steps."""
    return lambda record: np.mean(record[name][-3:])


def summary(records: list[dict]) -> str:
    """The README's table: what a reader takes in at a glance."""
    reward, ppo_runs = some(records, experiment="reward", epochs=LONG), some(records, experiment="ppo")
    quantities = [  # words, runs, column, digits
        ("margin, 99th percentile", reward, figure("margin p99"), 1),
        ("spread of the scores, σ₀", reward, figure("σ₀"), 1),
        ("NLL of held-out labels", reward, figure("calibration", "raw", "nll"), 2),
        ("the same after one fitted temperature", reward, figure("calibration", "tempered", "nll"), 2),
        ("accuracy on gold, %", reward, lambda record: 100 * record["gold accuracy"], 1),
        ("Spearman with gold", reward, figure("Spearman"), 2),
        ("gold, best of 256", reward, figure("best of n", -1), 1),
        ("PPO: growth of the score", ppo_runs, last("growth"), 1),
        ("PPO: the same in units of σ₀", ppo_runs, last("G"), 1),
        ("PPO: gold at the end", ppo_runs, last("gold"), 1),
    ]
    rows = []
    for words, runs, column, digits in quantities:
        runs = [run | {"arm": run["arm"].removesuffix("/own")} for run in runs]
        arms = {arm: some(runs, arm=arm) for arm in ("none", "cos_sim", "cos_sim+shuffle", "smoothing")}
        values = {arm: {run["seed"]: column(run) for run in own} for arm, own in arms.items()}
        low, high = interval(np.array([x - values["none"][seed] for seed, x in values["cos_sim"].items()]))
        verdict = "lower" if high < 0 else "higher" if low > 0 else "no clear difference"
        texts = [f"{np.mean([*own.values()]):.{digits}f}" if own else "" for own in values.values()]
        rows.append([words, *texts, f"{verdict} ({low:+.{digits}f} to {high:+.{digits}f})"])
    head = f"after {LONG} epochs", "`none`", "`cos_sim`", "its bounds dealt to other pairs", "label smoothing"
    return markdown([*head, "`cos_sim` against `none`"], rows)


def tables(records: list[dict]) -> dict[str, str]:
    """Of the README and of EVIDENCE.md, by their names there."""
    of, made = functools.partial(some, records), {}
    columns = plain("accuracy", "gold accuracy", "Spearman", "largest margin", "near copies, m > 5")
    made["embedded"] = table(of(experiment="embedded"), columns)
    columns = {"m > δ*/2 in training": figure("binds in training", "half")} | plain("margin p99", "σ₀", "gold accuracy")
    columns |= plain("Spearman", "|Δ|/σ₀ at equal gold") | {"best of 256": figure("best of n", -1)}
    columns |= {"NLL": figure("calibration", "raw", "nll")}
    for n in EPOCHS:
        made[f"reward {n}"] = table(of(experiment="reward", epochs=n), columns)
    rows, kept = [], plain("gold accuracy", "Spearman", "|Δ|/σ₀ at equal gold")
    for prior, n in ((prior, n) for prior in ("len_rat", "cos_sim") for n in EPOCHS):
        both = [run for run in of(experiment="reward", epochs=n) if run["arm"] in (prior, f"{prior}+shuffle")]
        if cells := compared(both, kept).get(f"{prior}+shuffle"):
            rows.append([f"`{prior}`", str(n), *(cell(-d, -d, first=False) for _, d in cells)])
    made["prior"] = markdown(["", "epochs", *kept], rows)
    names = [(score, kind) for score in ("nll", "brier", "ece") for kind in ("raw", "linked", "tempered")]
    columns = {f"{score} {kind}": figure("calibration", kind, score) for score, kind in names}
    made["calibration"] = table(of(experiment="reward", epochs=LONG), columns)
    columns = {f"n = {BEST_OF[i]}": figure("best of n", i) for i in range(0, len(BEST_OF), 2)}
    made["best of n"] = table(of(experiment="reward", epochs=LONG), columns)
    columns = {f"at √KL {x}": lambda r, x=x: at(r, x, "gold") for x in (1, 1.5, 2)}
    columns = {f"{name}, last 30": last(name) for name in ("growth", "G", "kl", "gold")} | columns
    runs = of(experiment="ppo")
    made["ppo"], made["ppo no clip"] = (
        table([run for run in runs if ("no clip" in run["arm"]) == off], columns) for off in (False, True)
    )
    columns = {f"{name}, last 30": last(name) for name in ("gold", "growth", "kl", "right aisle", "phrase")}
    columns |= {f"gold at √KL {x}": lambda r, x=x: at(r, x, "gold") for x in (1.5, 2)}
    runs = of(experiment="spread")
    made["spread"], rows = table(runs, columns), []
    for arm, rival in (("cos_sim/15", "none/15"), ("cos_sim/15", "none/5"), ("none/5", "none/15")):
        ours, theirs = ({run["seed"]: run for run in some(runs, arm=name)} for name in (arm, rival))
        both = sorted(ours.keys() & theirs.keys())
        differences = ([column(ours[seed]) - column(theirs[seed]) for seed in both] for column in columns.values())
        known = [np.array([x for x in each if np.isfinite(x)]) for each in differences]
        rows.append([f"`{arm}` - `{rival}`", *(cell(d, d, first=False) for d in known)])
    made["spread differences"] = markdown(["", *columns], rows)
    seeds = sorted({run["seed"] for run in runs})
    value = {(run["arm"], run["seed"]): f"{last('gold')(run):.1f}" for run in runs}
    rows = [[f"`{arm}`", *(value.get((arm, seed), "") for seed in seeds)] for arm in ARMS["spread"]]
    made["spread seeds"] = markdown(["gold, seed", *map(str, seeds)], rows)
    columns = {"KL": figure("kl", -1), "gold": figure("gold", -1), "best gold": lambda r: max(r["gold"])}
    columns |= {f"gold at √KL {x}": lambda r, x=x: at(r, x, "gold") for x in (0.8, 1)}
    made["dpo"] = table(of(experiment="dpo"), columns)
    columns = plain("accuracy", "Spearman", "Kendall", "margin p99", "σ₀")
    columns |= {"m > δ*/2": figure("binds held out", "half"), "NLL": figure("calibration", "raw", "nll")}
    made["real"] = table(of(experiment="real", epochs=1), columns)
    places = {}
    for run in records:
        place = (run["experiment"], run["epochs"] or "", run.get("machine", "see below"), run.get("date", ""))
        places.setdefault((*place, run.get("commit", "")), []).append(run)
    rows = [[*map(str, place), str(len({r["arm"] for r in runs})), str(len(runs))] for place, runs in places.items()]
    made["runs"] = markdown("experiment epochs machine date commit arms runs".split(), rows)
    return made | {"summary": summary(records)}


def fill(path: Path, made: dict[str, str]) -> str:
    """A page with the tables of its marks: what stands between <!-- NAME --> and <!-- end -->."""

    def put(found: re.Match) -> str:
        return f"{found[1]}\n{made[found[2]]}\n{found[3]}"

    return re.sub(r"(?s)(<!-- ([\w ]+) -->)\n.*?\n(<!-- end -->)", put, path.read_text(encoding="utf-8"))


# ---------------------------------------------------------------- pictures

COLORS = dict(zip("none cos_sim len_rat fixed smoothing IPO".split(), "C0 C1 C2 C4 C5 C6".split()))


def draw(axis, runs: list[dict], name: str, label: str, x: str = "kl", thin: bool = True, **style) -> None:
    """The mean of some runs, thick, over √KL or the step; each seed thin."""

    def abscissa(value) -> np.ndarray:
        return np.sqrt(np.maximum(value, 0)) if x == "kl" else np.array(value)

    for run in runs if thin else ():
        axis.plot(abscissa(run[x]), run[name], linewidth=0.5, alpha=0.4, **style)
    if runs:
        mean_x, mean = (np.mean([run[key] for run in runs], 0) for key in (x, name))
        axis.plot(abscissa(mean_x), mean, linewidth=2, label=label, **style)


def pictures(records: list[dict], folder: Path) -> None:
    of = functools.partial(some, records)
    picture = Figure(figsize=(10, 3.8), layout="constrained")
    axes = picture.subplots(1, 2, sharey=True)
    free, bounded = (of(experiment="embedded", arm=arm, seed=1)[0]["points"] for arm in ("none", "cos_sim"))
    order = np.argsort(bounded[0])
    similarity, bound = np.array(bounded)[::2, order]
    for axis, points, arm in zip(axes, (free, bounded), ("none", "cos_sim")):
        axis.scatter(bounded[0], points[1], s=8, alpha=0.5, linewidths=0, color=COLORS[arm])
        applied = arm != "none"
        label = "bound δ*(s)" if applied else "bound δ*(s), not applied"
        axis.plot(similarity, bound, "-" if applied else "--", color="C3", label=label)
        axis.plot(similarity, bound / 2, ":", color="C3", label="half of it")
        axis.axhline(0, color="0.6", linewidth=0.8)
        title = "with the bound (cos_sim)" if applied else "ranking loss alone (none)"
        axis.set(title=title, xlabel="similarity s of the two responses", ylabel="margin m of held-out pairs")
        axis.legend()
    picture.savefig(folder / "margins.png", dpi=110)

    picture = Figure(figsize=(6, 3), layout="constrained")
    axis, m = picture.subplots(), np.linspace(-4, 24, 400)
    for s, color in ((1.0, "C3"), (0.8, "C1"), (0.6, "C2")):
        delta = float(priors.margin_bound(torch.tensor([s]), 20, 0.001, -15))
        axis.plot(
            m, np.logaddexp(0, -m) + np.logaddexp(0, m - delta), color=color, label=f"s = {s:g}, δ* = {delta:.1f}"
        )
        axis.axvline(delta, color=color, linestyle="--", linewidth=0.8)
    axis.plot(m, np.logaddexp(0, -m), color="0.6", label="no bound")
    axis.set(xlabel="margin m (dashed: the bound δ*)", ylabel="L", ylim=(0, 6))
    axis.legend(fontsize="small")
    picture.savefig(folder / "loss.png", dpi=110)

    picture, more = Figure(figsize=(12, 3.8), layout="constrained"), Figure(figsize=(10, 7.6), layout="constrained")
    left, middle, right = picture.subplots(1, 3)
    (sure, best), (score, direct) = more.subplots(2, 2)
    for arm in ("none", "cos_sim"):
        points = np.array(of(experiment="reward", arm=arm, epochs=LONG, seed=1)[0]["points"])
        left.scatter(*points[:2], s=6, alpha=0.5, linewidths=0, color=COLORS[arm], label=arm)
    left.plot(*points[::2, np.argsort(points[0])], color="C3", label="bound δ*(s) of cos_sim")
    left.set(xlabel="similarity s", ylabel="margin m, held out", title=f"Reward models after {LONG} epochs")
    left.set_ylim(None, max(points[1]) * 3)
    for arm in ARMS["ppo"][:4]:
        loss, units = arm.split("/")
        other = "cos_sim" if loss == "none" else "none"
        words = f"{loss}, scores as they are" if units == "own" else f"{loss}, scores scaled to the spread of {other}"
        style = dict(color=COLORS[loss], linestyle="-" if units == "own" else "--")
        draw(score, of(experiment="ppo", arm=arm), "growth", words, x="steps", **style)
        if units == "own":
            draw(middle, of(experiment="ppo", arm=arm), "G", loss, **style)
            draw(right, of(experiment="ppo", arm=arm), "gold", loss, **style)
    middle.set(xlabel="√KL", ylabel="growth / σ₀", title="PPO: growth of the score")
    right.set(xlabel="√KL", ylabel="gold score", title="PPO: what the answers are worth")
    x = np.log(BEST_OF) - (np.array(BEST_OF) - 1) / BEST_OF
    for arm in ("none", "cos_sim", "len_rat", "fixed", "smoothing"):
        runs = [run | {"x": x} for run in of(experiment="reward", arm=arm, epochs=LONG)]
        points = np.array(sorted(point for run in runs for point in run["reliability"]))
        style = dict(color=COLORS[arm], marker="o", markersize=3)
        means = [part.mean(0) for part in np.array_split(points, 10)] if runs else np.empty((1, 2))
        sure.plot(*np.transpose(means), label=arm, **style)
        draw(best, runs, "best of n", arm, x="x", thin=False, **style)
    sure.plot([0.5, 1], [0.5, 1], color="0.6", linewidth=0.8, label="calibrated")
    sure.axhline(1 - FLIPPED, color="0.6", linestyle=":", label="the most that labels allow")
    sure.set(xlabel="σ(|m|)", ylabel="share that the label agrees with", title=f"Reliability, {LONG} epochs")
    best.set(xlabel="KL = log n - (n - 1) / n", ylabel="gold score", title=f"Best of n, {LONG} epochs")
    score.set(xlabel="PPO step", ylabel="growth of the score", title="PPO: the score as it is")
    for arm in ARMS["dpo"]:
        runs = of(experiment="dpo", arm=arm)
        draw(direct, runs, "gold", arm, thin=False, color=COLORS[arm], marker="o", markersize=3)
    direct.set(xlabel="√KL", ylabel="gold score", title="DPO")
    for axis in (left, middle, right, sure, best, score, direct):
        axis.legend(markerscale=2, fontsize="small")
    picture.savefig(folder / "evidence.png", dpi=110)
    more.savefig(folder / "details.png", dpi=110)

    picture = Figure(figsize=(12, 3.8), layout="constrained")
    panels = {"growth": "growth of the score / σ₀", "gold": "gold score", "phrase": "share with the phrase"}
    for axis, (name, label) in zip(picture.subplots(1, 3), panels.items()):
        for arm in ARMS["spread"]:
            loss, epochs = arm.split("/")
            style = dict(color=COLORS[loss], linestyle="-" if int(epochs) == LONG else "--")
            draw(axis, of(experiment="spread", arm=arm), name, f"{loss}, {epochs} epochs", **style)
        axis.set(xlabel="√KL", ylabel=label, title="PPO on new seeds")
        axis.legend(fontsize="small")
    picture.savefig(folder / "spread.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "tests" / "evidence.jsonl")
    parser.add_argument("--pages", type=Path, nargs="+", default=[], help="pages whose tables are written anew")
    parser.add_argument("--pictures", type=Path, default=None, help="draw the pictures into this folder")
    args = parser.parse_args()
    records = lines(args.results)
    made = tables(records)
    for page in args.pages:
        page.write_text(fill(page, made), encoding="utf-8")
    if args.pictures:
        pictures(records, args.pictures)
    if not args.pages and not args.pictures:
        print(*(f"{name}\n\n{text}\n" for name, text in made.items()), sep="\n")


if __name__ == "__main__":
    main()
