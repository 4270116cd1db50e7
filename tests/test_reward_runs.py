"""reward.py as it is called: what it learns, writes, saves and caches."""

import common

import json
import math

import numpy as np
import pytest
import torch
import transformers
from helpers import launch, lines

import reward

SHORT = "--max_steps 3 --log_every 1 --micro_batch_size 4 --global_batch_size 16"
EVAL_KEYS = set(
    "step split loss rank_loss constraint_loss accuracy margin_mean margin_std margin_max bound_mean over_bound "
    "chosen_score rejected_score score_std length_accuracy spearman_similarity ranked_spearman ranked_kendall".split()
)
TRAIN_KEYS = EVAL_KEYS - set("length_accuracy spearman_similarity ranked_spearman ranked_kendall".split())
TRAIN_KEYS |= set("lr grad_norm pairs_per_s tokens_per_s".split())
CLASSIFIER = transformers.AutoModelForSequenceClassification


def sequences(pairs: list[dict]) -> list[str]:
    """The text of each pair's chosen and rejected sequence, as the README's lines score them."""
    return [pair["prompt"] + pair[side] + "</s>" for pair in pairs for side in ("chosen", "rejected")]


def scores(logged: list[dict]) -> torch.Tensor:
    return torch.tensor([line[side] for line in logged for side in ("chosen_score", "rejected_score")])


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("constraint", ["none", "len_rat", "cos_sim", "random", "fixed"])
def test_a_run_of_each_constraint(train, few, tmp_path, constraint):
    out, data = tmp_path / "out", few if constraint != "none" else ""
    train(f"{SHORT} {data} --constraint {constraint} --output_dir {out}")
    names = {path.name for path in out.iterdir()} - {".lock"}
    assert names == set("args.json metrics.jsonl eval.jsonl margins.png model tensorboard".split())
    arguments = json.loads((out / "args.json").read_text())
    assert arguments["constraint"] == constraint and arguments["max_steps"] == 3
    assert (out / "margins.png").read_bytes().startswith(b"\x89PNG")

    metrics = lines(out / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2, 3, 3]
    assert [m["split"] for m in metrics] == "eval train train train eval".split()
    for m in metrics:
        assert set(m) == (TRAIN_KEYS if m["split"] == "train" else EVAL_KEYS)
        bounded = constraint != "none"
        assert all((m[k] is not None) == bounded for k in ("constraint_loss", "bound_mean", "over_bound"))
        assert m["loss"] == pytest.approx(m["rank_loss"] + (m["constraint_loss"] or 0), abs=1e-5)
    rates = [1e-3 * (1 + math.cos(math.pi * i / 3)) / 2 for i in range(3)]
    assert [m["lr"] for m in metrics[1:4]] == pytest.approx(rates)

    pairs = lines(out / "eval.jsonl")
    assert len(pairs) == (12 if data else 400)
    for p in pairs:
        assert set(p) == set("chosen_score rejected_score margin similarity bound".split())
        assert p["margin"] == pytest.approx(p["chosen_score"] - p["rejected_score"], abs=1e-5)
        assert 0 < p["similarity"] <= 1
        if constraint in ("len_rat", "cos_sim"):
            assert p["bound"] == pytest.approx(20 / (p["similarity"] + 0.001) - 15, rel=1e-5)
    bounds = [p["bound"] for p in pairs]
    assert (constraint == "none") == (bounds == [None] * len(bounds))
    assert constraint != "fixed" or set(bounds) == {4.5}
    assert constraint != "random" or 4 <= min(bounds) < 4.3 and 4.7 < max(bounds) <= 5
    assert np.mean([p["margin"] > 0 for p in pairs]) == pytest.approx(metrics[-1]["accuracy"], abs=1e-6)
    assert np.mean([p["margin"] for p in pairs]) == pytest.approx(metrics[-1]["margin_mean"], abs=1e-5)
    margin, bound = np.array([p["margin"] for p in pairs]), np.array(bounds, float)
    assert metrics[-1]["rank_loss"] == pytest.approx(np.log1p(np.exp(-margin)).mean(), rel=1e-4)  # -log σ(m)
    if constraint != "none":  # -log σ(δ* - m)
        assert metrics[-1]["constraint_loss"] == pytest.approx(np.log1p(np.exp(margin - bound)).mean(), rel=1e-4)


def test_training_learns_and_the_bound_holds(train, tmp_path):
    """24 epochs on 16 pairs: the baseline's margins pass a bound of 1.5, those under it stay near its half."""
    rows = (common.DATA / "preference_train.jsonl").read_text().splitlines(True)[:16]
    (tmp_path / "few.jsonl").write_text("".join(rows))
    data, last = f"--dataset {tmp_path}/few.jsonl --eval_dataset {tmp_path}/few.jsonl", {}
    for constraint in ("none", "fixed"):
        out = tmp_path / constraint
        flags = f"--constraint {constraint} --fixed_bound 1.5 --epochs 24 --global_batch_size 16"
        train(f"{data} {flags} --output_dir {out}")
        last[constraint] = lines(out / "metrics.jsonl")[-1]
        assert last[constraint]["accuracy"] == 1
    assert last["none"]["margin_mean"] > 3
    assert last["fixed"]["margin_mean"] == pytest.approx(0.75, abs=0.15) and last["fixed"]["over_bound"] == 0


def test_the_saved_model_gives_the_scores_of_training(train, few, tmp_path, tokenizer):
    """Loaded as neighbours load it, left- and right-padded, and through the bare pipeline: the scores of eval.jsonl."""
    train(f"{SHORT} {few} --output_dir {tmp_path}/out")
    folder, logged = tmp_path / "out" / "model", lines(tmp_path / "out" / "eval.jsonl")
    assert list(folder.glob("*.safetensors")) and not list(folder.glob("*.bin"))
    rows = lines(common.DATA / "preference_eval.jsonl")[:12]
    pairs = [common.encode_pair(row, tokenizer, 256) for row in rows]
    ids = [pair[side] for pair in pairs for side in ("chosen_ids", "rejected_ids")]
    texts, expected = sequences(rows), scores(logged)
    assert expected.std() > 0.05

    model = CLASSIFIER.from_pretrained(folder)
    for side in ("left", "right"):
        loaded = transformers.AutoTokenizer.from_pretrained(folder, padding_side=side)
        assert loaded(texts).input_ids == ids
        with torch.no_grad():
            found = model(**loaded(texts, padding=True, return_tensors="pt")).logits.squeeze(-1)
        assert torch.allclose(found, expected, atol=1e-4)
    found = [result["score"] for result in transformers.pipeline("text-classification", str(folder))(texts)]
    assert torch.allclose(torch.tensor(found), expected, atol=1e-4)

    # An earlier reward model goes on from its own head; --epochs 0 evaluates only and writes no model.
    data = f"--eval_dataset {common.DATA}/preference_eval.jsonl"
    train(f"--model {folder} --epochs 0 {data} --output_dir {tmp_path}/again")
    (metrics,) = lines(tmp_path / "again" / "metrics.jsonl")
    assert set(metrics) == EVAL_KEYS and metrics["ranked_spearman"] is None  # not the task's own ranked data
    again = lines(tmp_path / "again" / "eval.jsonl")
    assert len(again) == 400 and not (tmp_path / "again" / "model").exists()
    assert torch.allclose(scores(again[:12]), expected, atol=1e-4)


def test_similarity_is_cached_and_stays_with_its_pair(train, tmp_path, monkeypatch):
    """In another order the pairs have the similarities that they had; the same data again encode nothing."""
    rows = (common.DATA / "preference_eval.jsonl").read_text().splitlines(True)[:40]
    for name, order in (("a", rows), ("b", rows[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(order))

    def similarities(name: str, out: str) -> list[float]:
        data = f"--dataset {tmp_path}/{name}.jsonl --eval_dataset {tmp_path}/{name}.jsonl --output_dir {tmp_path}/{out}"
        train(f"{data} --constraint cos_sim --max_steps 1 --global_batch_size 8")
        return [line["similarity"] for line in lines(tmp_path / out / "eval.jsonl")]

    first = similarities("a", "first")
    assert first == pytest.approx(similarities("b", "reversed")[::-1], abs=1e-6) and len(set(first)) > 30

    def fail(*_, **__):
        raise AssertionError("encoded again")

    monkeypatch.setattr(reward, "encode_texts", fail)
    assert similarities("a", "again") == first


# ---------------------------------------------------------------- what is not finite


def test_what_is_not_finite_stops_the_run(train, few, tmp_path, monkeypatch):
    """A loss that is NaN, and an infinite gradient of a finite loss: stopped at the step, the weights as they were."""
    kept, real, loss = {}, common.make_engine, reward.ranking_loss

    def make_engine(module, *rest):
        kept["engine"], kept["before"] = real(module, *rest), [p.detach().clone() for p in module.parameters()]
        return kept["engine"]

    def nan_loss(margin):
        return loss(margin) * (math.nan if margin.requires_grad else 1)

    def infinite_gradient(margin):
        return loss(margin) + (1e30 * (margin - margin.detach()) * 1e30 if margin.requires_grad else 0)

    monkeypatch.setattr(common, "make_engine", make_engine)
    for change, what in ((nan_loss, "loss"), (infinite_gradient, "gradient")):
        monkeypatch.setattr(reward, "ranking_loss", change)
        with pytest.raises(common.InputError, match=f"step 1: the {what} is"):
            train(f"{few} {SHORT} --output_dir {tmp_path}/{what}")
        for before, after in zip(kept["before"], kept["engine"].module.parameters(), strict=True):
            assert torch.equal(before, after)


def test_under_plain_python(few, tmp_path):
    done = launch("reward.py", 0, f"{few} {SHORT} --output_dir {tmp_path}/out")
    assert done.returncode == 0, done.stderr
    assert "3 steps on 48 pairs, 12 held out" in done.stdout and len(lines(tmp_path / "out" / "eval.jsonl")) == 12


def test_overwrite_replaces_what_a_run_wrote_and_nothing_else(train, few, tmp_path):
    out = tmp_path / "out"
    train(f"{few} {SHORT} --output_dir {out}")
    for name in ("notes.txt", "model/old.bin", "eval.jsonl"):
        (out / name).write_text("old")
    train(f"{few} {SHORT} --output_dir {out} --overwrite")
    assert (out / "notes.txt").read_text() == "old" and not (out / "model" / "old.bin").exists()
    assert len(lines(out / "eval.jsonl")) == 12
