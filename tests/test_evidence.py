"""The estimators of evidence.py against numbers derived another way."""

import common

import itertools
import random
import shutil

import evidence
import numpy as np
import pytest
import report
import toy_data


@pytest.mark.parametrize("bound", [1.0, 5.0, 8.0])
def test_inverse_link(bound):
    """The margin with the least expected loss for a true P is linked back to P."""
    grid = np.linspace(-3, 8, 200_001)
    for p in (0.5, 0.7, 0.9):

        def loss(m):
            return np.logaddexp(0, -m) + np.logaddexp(0, m - bound)

        best = grid[np.argmin(p * loss(grid) + (1 - p) * loss(-grid))]
        assert evidence.inverse_link(np.array([best]), np.array([bound]))[0] == pytest.approx(p, abs=1e-3)


def test_inverse_link_in_numbers():
    """From the equation at p = 0.9: the optimum is 1.84 at δ = 5, 2.17 at 8, and 2.20 = log 9 without a bound."""
    margins, bounds = np.array([1.84, 2.17, 2.197]), np.array([5.0, 8.0, np.inf])
    assert evidence.inverse_link(margins, bounds) == pytest.approx([0.9, 0.9, 0.9], abs=2e-3)


def test_best_of_n(monkeypatch):
    """The mean over all ways to take 2 of 4, and 3 of 4."""
    monkeypatch.setattr(evidence, "BEST_OF", [1, 2, 3, 4])
    proxy, value = np.array([[0.3, 0.1, 0.9, 0.5]]), np.array([[1.0, 7.0, 2.0, -4.0]])
    every = [[value[0, max(some, key=lambda i: proxy[0, i])] for some in itertools.combinations(range(4), n)]
             for n in (1, 2, 3, 4)]  # fmt: skip
    assert evidence.best_of_n(proxy, value) == pytest.approx([np.mean(each) for each in every])


def test_calibration_in_numbers():
    """Ten pairs at confidence 0.8, of which six are right: off by 0.2; Brier (6 · 0.04 + 4 · 0.64) / 10 = 0.28."""
    found = evidence.calibration(np.array([0.8] * 6 + [0.2] * 4))
    assert found["ece"] == pytest.approx(0.2) and found["brier"] == pytest.approx(0.28)
    assert found["nll"] == pytest.approx(-(6 * np.log(0.8) + 4 * np.log(0.2)) / 10)


def test_one_temperature_is_found():
    """Margins four times too large for their labels: σ(m / 4) comes back."""
    rng = np.random.default_rng(0)
    logit = rng.normal(0, 2, 20_000)
    margin = 4 * logit * np.where(rng.random(20_000) < 1 / (1 + np.exp(-logit)), 1, -1)
    assert evidence.tempered(margin) == pytest.approx(1 / (1 + np.exp(-margin / 4)), abs=0.02)


def test_the_harder_task(tmp_path):
    """Three of ten labels are wrong, and "Have a nice day!" goes with what gold likes, though it costs a point."""
    evidence.build(tmp_path, 3)
    rows = evidence.lines(tmp_path / "pairs_train.jsonl")
    gold = np.array([row["gold"] for row in rows])
    kinds = {kind: gold[[row["kind"] == kind for row in rows]] for kind in ("far", "near", "equal")}
    assert {kind: len(each) for kind, each in kinds.items()} == {"far": 2000, "near": 1000, "equal": 1000}
    assert not kinds["equal"].any() and kinds["near"].all()
    assert 0.25 < ((gold < 0) + 0.5 * (gold == 0)).mean() < 0.35
    answers = [(evidence.gold(row["prompt"], row[side]), row[side].count(evidence.HACK))
               for row in rows if row["kind"] == "far" for side in ("chosen", "rejected")]  # fmt: skip
    assert np.corrcoef(np.transpose(answers))[0, 1] > 0.3
    prompt = toy_data.prompt_text("", "Do you sell {good}?", "soap")
    assert evidence.gold(prompt, f"Aisle 4. {evidence.HACK} {evidence.HACK}") == evidence.gold(prompt, "Aisle 4.") - 2


def test_seeds_are_reproducible(tmp_path):
    for folder in ("a", "b"):
        evidence.build(tmp_path / folder, 7)
    assert (tmp_path / "a/pairs_eval.jsonl").read_bytes() == (tmp_path / "b/pairs_eval.jsonl").read_bytes()
    assert not {row["prompt"] for row in evidence.lines(tmp_path / "a/prompts_train.jsonl")} & {
        row["prompt"] for row in evidence.lines(tmp_path / "a/pairs_eval.jsonl")
    }


def test_reworded_keeps_gold():
    rng = random.Random(0)
    prompt = toy_data.prompt_text("", "Do you sell {good}?", "soap")
    parts = ["Of course!", "Go to aisle 2.", "Are you blind?"]
    changed = {" ".join(evidence.reworded(rng, "soap", parts)) for _ in range(50)}
    before = evidence.gold(prompt, " ".join(parts))
    assert len(changed) > 5 and {evidence.gold(prompt, text) for text in changed} == {before}


def test_shares_over_a_bound():
    """Of margins 1, 3, 6 and bounds 5: two are over 2.5, one over 5; without bounds there is no share."""
    margin = np.array([1.0, 3.0, 6.0])
    assert evidence.over(margin, np.full(3, 5.0)) == pytest.approx({"half": 2 / 3, "whole": 1 / 3})
    assert np.isnan(list(evidence.over(margin, np.full(3, np.nan)).values())).all()


def test_intervals_in_numbers():
    """Of 1, 2, 3: the deviation is 1, and t of two degrees of freedom 4.303: 2 ± 4.303 / √3. One seed has none."""
    assert report.interval(np.array([1.0, 2.0, 3.0])) == pytest.approx((-0.484, 4.484), abs=1e-3)
    assert np.isnan(report.interval(np.array([1.0]))).all()


def test_intervals_of_five_seeds_hold_the_truth_95_times_in_100():
    samples = np.random.default_rng(1).normal(size=(2000, 5))
    held = [low <= 0 <= high for low, high in map(report.interval, samples)]
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)


# ---------------------------------------------------------------- from runs to the README


def test_differences_are_paired():
    """Seeds 1 and 2 of `none` and 2 and 3 of `cos_sim`, in another order: one difference, that of seed 2."""
    some = [("cos_sim", 3, 7.0), ("cos_sim", 2, 5.0), ("none", 2, 1.0), ("none", 1, 3.0)]
    rows = [dict(experiment="reward", arm=arm, seed=seed, x=x) for arm, seed, x in some]
    found = report.compared(rows, {"x": lambda row: row["x"]})
    assert list(found) == ["none", "cos_sim"]
    assert sorted(found["cos_sim"][0][0]) == [5, 7] and list(found["cos_sim"][0][1]) == [4]


def test_a_curve_at_a_root_kl():
    record = {"kl": [0.0, 4.0, 1.0], "gold": [0.0, 3.0, 1.0]}
    assert report.at(record, 1.5, "gold") == pytest.approx(2) and np.isnan(report.at(record, 2.5, "gold"))


def test_the_pages_are_those_of_the_results():
    """Their tables are what the results file makes; no run is there twice."""
    records = evidence.lines(evidence.ROOT / "tests" / "evidence.jsonl")
    assert "NaN" not in (evidence.ROOT / "tests" / "evidence.jsonl").read_text(encoding="utf-8")
    names = [(r["experiment"], r["arm"], r["seed"], r["epochs"]) for r in records]
    assert len(set(names)) == len(names) and all(arm in evidence.ARMS[name] for name, arm, _, _ in names)
    made = report.tables(records)
    for page in (evidence.ROOT / "README.md", evidence.ROOT / "tests" / "EVIDENCE.md"):
        text = page.read_text(encoding="utf-8")
        assert report.fill(page, made) == text and "<!-- end -->" in text


def test_every_experiment_runs(toy, tmp_path, monkeypatch):
    """Two steps of each run on a few pairs, where a second call has nothing to do; then all tables and pictures."""
    monkeypatch.setattr(evidence, "PAIRS", {"train": 32, "eval": 16, "real": 32})
    monkeypatch.setattr(evidence, "EPOCHS", (1,))
    monkeypatch.setattr(evidence, "LONG", 1)
    monkeypatch.setattr(evidence, "POOL", 4)
    monkeypatch.setattr(evidence, "BEST_OF", [1, 2, 4])
    monkeypatch.setattr(evidence, "ANSWERS", 1)
    parse, parsed = common.parse_args, []

    shutil.copytree(common.DATA / "toy", tmp_path / "data" / "toy")
    for name, count in (("preference_train", 32), ("preference_eval", 16), ("ranked_eval", 4)):
        rows = evidence.lines(common.DATA / f"{name}.jsonl")[:count]
        evidence.write(tmp_path / "data" / f"{name}.jsonl", rows)
    monkeypatch.setattr(common, "DATA", tmp_path / "data")

    def few(script, preset, argv):
        parsed.append(argv)
        argv = [*argv, "--max_steps", "2"]
        if "--policy_model" in argv:
            argv += "--max_new_tokens 12 --global_batch_size 8 --generate 4".split()
        elif "--dataset" not in argv and "--eval_dataset" not in argv:
            for flag, name in (("dataset", "preference_train"), ("eval_dataset", "preference_eval")):
                argv += [f"--{flag}", str(common.DATA / f"{name}.jsonl")]
            argv += ["--ranked_dataset", str(common.DATA / "ranked_eval.jsonl")]
        return parse(script, preset, argv)

    monkeypatch.setattr(common, "parse_args", few)
    monkeypatch.setitem(evidence.ARMS, "real", ["none"])
    evidence.build(tmp_path / "more", 1)
    pairs = [tmp_path / "more" / f"pairs_{split}.jsonl" for split in ("train", "eval")]
    argv = f"--seeds 1 --results {tmp_path}/all.jsonl --folder {tmp_path}/runs "
    argv += f"--model {toy} --data {pairs[0]} --eval_data {pairs[1]}"
    monkeypatch.setattr(evidence, "SPREAD_POOL", 2)
    arms = "none;cos_sim;none/own;cos_sim/other;cos_sim/15;IPO"
    monkeypatch.setattr("sys.argv", ["evidence.py", *argv.split(), "--arms", arms])
    evidence.main()
    records, made = evidence.lines(tmp_path / "all.jsonl"), len(parsed)
    evidence.main()
    assert len(parsed) == made and evidence.lines(tmp_path / "all.jsonl") == records
    found = [(r["experiment"], r["arm"]) for r in records]
    assert found == [("embedded", "none"), ("embedded", "cos_sim"),
                     ("reward", "none"), ("reward", "cos_sim"), ("ppo", "none/own"), ("ppo", "cos_sim/other"),
                     ("spread", "cos_sim/15"),
                     ("dpo", "none"), ("dpo", "cos_sim"), ("dpo", "IPO"),
                     ("real", "none")]  # fmt: skip
    by = dict(zip(found, records))
    own, other = (by["ppo", arm]["σ₀"] for arm in ("none/own", "cos_sim/other"))
    assert own == other  # cos_sim's score in the units of none
    assert by["reward", "none"]["σ₀"] == own and by["reward", "cos_sim"]["σ₀"] != own
    spread = by["spread", "cos_sim/15"]
    assert spread["σ₀"] > 0 and len(spread["right aisle"]) == len(spread["phrase"]) == len(spread["gold"]) == 1
    assert spread["commit"] and spread["date"] and "torch" in spread["versions"]
    monkeypatch.setattr(report, "BEST_OF", [1, 2, 4])
    for name in ("EPOCHS", "LONG"):
        monkeypatch.setattr(report, name, getattr(evidence, name))
    (tmp_path / "page.md").write_text("<!-- summary -->\n\n<!-- end -->\n<!-- reward 1 -->\n|\n<!-- end -->\n")
    pages = f"--results {tmp_path}/all.jsonl --pictures {tmp_path} --pages {tmp_path}/page.md"
    monkeypatch.setattr("sys.argv", ["report.py", *pages.split()])
    report.main()
    assert "| margin, 99th percentile |" in (text := (tmp_path / "page.md").read_text())
    assert text.index("summary") < text.index("margin") < text.index("reward 1") < text.rindex("| `cos_sim` |")
    names = {"margins.png", "loss.png", "evidence.png", "details.png", "spread.png"}
    assert names <= {path.name for path in tmp_path.iterdir()}
