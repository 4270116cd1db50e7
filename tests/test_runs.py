"""reward.py as it is called: what it writes, on one and two ranks, and what it says of bad input."""

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import common
import reward
from helpers import ROOT, launch, lines, rows_file

SHORT = ["--max_steps", "3", "--log_every", "1", "--micro_batch_size", "4", "--global_batch_size", "16"]
TRAIN_KEYS = {
    "step",
    "split",
    "loss",
    "rank_loss",
    "constraint_loss",
    "accuracy",
    "margin_mean",
    "margin_std",
    "margin_max",
    "bound_mean",
    "over_bound",
    "chosen_score",
    "rejected_score",
    "score_std",
    "lr",
    "grad_norm",
    "pairs_per_s",
    "tokens_per_s",
}
EVAL_KEYS = TRAIN_KEYS - {"lr", "grad_norm", "pairs_per_s", "tokens_per_s"} | {
    "length_accuracy",
    "spearman_similarity",
    "ranked_spearman",
    "ranked_kendall",
}


@pytest.mark.parametrize("constraint", ["none", "len_rat", "cos_sim", "random", "fixed"])
def test_a_run_of_each_constraint(train, tmp_path, constraint):
    out = tmp_path / "out"
    train("--constraint", constraint, "--output_dir", str(out), *SHORT)
    names = {"args.json", "metrics.jsonl", "eval.jsonl", "margins.png", "model", "tensorboard"}
    assert {path.name for path in out.iterdir()} == names
    arguments = json.loads((out / "args.json").read_text())
    assert arguments["constraint"] == constraint and arguments["max_steps"] == 3
    assert (out / "margins.png").read_bytes().startswith(b"\x89PNG")

    metrics = lines(out / "metrics.jsonl")
    assert [(m["step"], m["split"]) for m in metrics] == [
        (0, "eval"),
        (1, "train"),
        (2, "train"),
        (3, "train"),
        (3, "eval"),
    ]
    for m in metrics:
        assert set(m) == (TRAIN_KEYS if m["split"] == "train" else EVAL_KEYS)
        bounded = constraint != "none"
        assert all((m[k] is not None) == bounded for k in ("constraint_loss", "bound_mean", "over_bound"))
        assert m["loss"] == pytest.approx(m["rank_loss"] + (m["constraint_loss"] or 0), abs=1e-5)
    assert [m["lr"] for m in metrics if m["split"] == "train"] == pytest.approx(
        [1e-3 * (1 + math.cos(math.pi * i / 3)) / 2 for i in range(3)]
    )

    pairs = lines(out / "eval.jsonl")
    assert len(pairs) == len(lines(common.DATA / "preference_eval.jsonl"))
    for p in pairs:
        assert set(p) == {"chosen_score", "rejected_score", "margin", "similarity", "bound"}
        assert p["margin"] == pytest.approx(p["chosen_score"] - p["rejected_score"], abs=1e-5)
        assert 0 < p["similarity"] <= 1
        if constraint in ("len_rat", "cos_sim"):
            assert p["bound"] == pytest.approx(20 / (p["similarity"] + 0.001) - 15, rel=1e-5)
        else:
            assert {"none": p["bound"] is None, "fixed": p["bound"] == 4.5, "random": 4 <= (p["bound"] or 0) <= 5}[
                constraint
            ]
    assert np.mean([p["margin"] > 0 for p in pairs]) == pytest.approx(metrics[-1]["accuracy"], abs=1e-6)
    assert np.mean([p["margin"] for p in pairs]) == pytest.approx(metrics[-1]["margin_mean"], abs=1e-5)


def test_training_learns_and_the_bound_holds(train, tmp_path):
    """40 epochs on 16 pairs: the baseline's margins pass a bound of 1.5, those under it stay near its half."""
    rows = (common.DATA / "preference_train.jsonl").read_text().splitlines(True)[:16]
    (tmp_path / "few.jsonl").write_text("".join(rows))
    data = ["--dataset", str(tmp_path / "few.jsonl"), "--eval_dataset", str(tmp_path / "few.jsonl"), "--epochs", "40"]
    last = {}
    for constraint in ("none", "fixed"):
        out = tmp_path / constraint
        train(
            "--constraint",
            constraint,
            "--fixed_bound",
            "1.5",
            "--global_batch_size",
            "16",
            "--output_dir",
            str(out),
            *data,
        )
        last[constraint] = lines(out / "metrics.jsonl")[-1]
        assert last[constraint]["accuracy"] == 1
    assert last["none"]["margin_mean"] > 3
    assert last["fixed"]["margin_mean"] == pytest.approx(0.75, abs=0.3) and last["fixed"]["over_bound"] < 0.1


def test_the_saved_model_gives_the_scores_of_training(train, tmp_path, tokenizer):
    """Loaded as neighbours load it, left- and right-padded, and through the bare pipeline: the scores of eval.jsonl."""
    train("--output_dir", str(tmp_path / "out"), *SHORT)
    folder, logged = tmp_path / "out" / "model", lines(tmp_path / "out" / "eval.jsonl")[:12]
    assert list(folder.glob("*.safetensors")) and not list(folder.glob("*.bin"))
    rows = lines(common.DATA / "preference_eval.jsonl")[:12]
    pairs = [reward.Pair(r["prompt"], r["chosen"], r["rejected"]) for r in rows]
    assert len(reward.tokenize(pairs, tokenizer, 256, Counter())) == 12
    texts = [p.prompt + r + tokenizer.eos_token for p in pairs for r in (p.chosen, p.rejected)]
    ids = [i.tolist() for p in pairs for i in (p.chosen_ids, p.rejected_ids)]
    expected = torch.tensor([s for row in logged for s in (row["chosen_score"], row["rejected_score"])])
    assert expected.std() > 0.05

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    for side in ("left", "right"):
        loaded = transformers.AutoTokenizer.from_pretrained(folder, padding_side=side)
        assert loaded(texts).input_ids == ids
        with torch.no_grad():
            scores = model(**loaded(texts, padding=True, return_tensors="pt")).logits.squeeze(-1)
        assert torch.allclose(scores, expected, atol=1e-4)
    scores = [result["score"] for result in transformers.pipeline("text-classification", str(folder))(texts)]
    assert torch.allclose(torch.tensor(scores), expected, atol=1e-4)

    # An earlier reward model goes on from its own head; --epochs 0 evaluates only and writes no model.
    train(
        "--model",
        str(folder),
        "--epochs",
        "0",
        "--eval_dataset",
        str(common.DATA / "preference_eval.jsonl"),
        "--output_dir",
        str(tmp_path / "again"),
    )
    (metrics,) = lines(tmp_path / "again" / "metrics.jsonl")
    assert (
        set(metrics) == EVAL_KEYS and metrics["ranked_spearman"] is None
    )  # data of one's own: not the task's ranked ones
    again = lines(tmp_path / "again" / "eval.jsonl")
    assert len(again) == 400 and not (tmp_path / "again" / "model").exists()
    assert again[5]["margin"] == pytest.approx(logged[5]["margin"], abs=1e-4)


def test_similarity_is_cached_and_stays_with_its_pair(train, tmp_path, monkeypatch):
    """In another order the pairs have the similarities that they had; the same data again encode nothing."""
    rows = (common.DATA / "preference_eval.jsonl").read_text().splitlines(True)[:40]
    for name, order in (("a", rows), ("b", rows[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(order))

    def similarities(name: str, out: str) -> list[float]:
        data, output = str(tmp_path / f"{name}.jsonl"), str(tmp_path / out)
        step = ["--max_steps", "1", "--global_batch_size", "8"]
        train("--constraint", "cos_sim", "--dataset", data, "--eval_dataset", data, "--output_dir", output, *step)
        return [line["similarity"] for line in lines(tmp_path / out / "eval.jsonl")]

    first = similarities("a", "first")
    assert first == pytest.approx(similarities("b", "reversed")[::-1], abs=1e-6) and len(set(first)) > 30

    def fail(*_, **__):
        raise AssertionError("encoded again")

    monkeypatch.setattr(reward, "encode_texts", fail)
    assert similarities("a", "again") == first


def test_each_training_pair_meets_its_own_bound(train, tmp_path, monkeypatch):
    """METHOD: the bound of a pair is that of its own similarity, in whatever order and micro batch it comes."""
    similarities, bounds = [], []
    collate, loss = reward.collate, reward.constrained_ranking_loss

    def spy_collate(pairs, **rest):
        similarities.append([p.similarity for p in pairs])
        return collate(pairs, **rest)

    def spy_loss(margin, bound=None):
        if margin.requires_grad and bound is not None:
            bounds.append((similarities[-1], bound.tolist()))
        return loss(margin, bound)

    monkeypatch.setattr(reward, "collate", spy_collate)
    monkeypatch.setattr(reward, "constrained_ranking_loss", spy_loss)
    train("--constraint", "len_rat", "--output_dir", str(tmp_path / "out"), *SHORT)
    assert len(bounds) == 12  # 3 steps of 4 micro batches
    for similarity, bound in bounds:
        assert len(set(similarity)) > 1
        assert bound == pytest.approx([20 / (s + 0.001) - 15 for s in similarity], rel=1e-5)


def test_held_out_by_seed(train, tmp_path, process, tokenizer):
    """10 % without --eval_dataset, other pairs with another seed, none of them trained on."""
    data = str(common.DATA / "preference_eval.jsonl")
    splits = []
    for seed in (1, 1, 2):
        args = reward.Args(dataset=data, eval_dataset="", seed=seed)
        kept, held_out = reward.load_pairs(args, tokenizer, process)
        assert len(held_out) == 40 and len(kept) == 360
        assert not {id(p) for p in kept} & {id(p) for p in held_out}
        assert len({p.prompt + p.chosen + p.rejected for p in kept + held_out}) > 390  # 400 rows, some of them alike
        splits.append([p.prompt + p.chosen for p in held_out])
    assert splits[0] == splits[1] != splits[2]


def test_every_file_format(process, tmp_path):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "split": s} for s in ("train", "valid2", "valid2")]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    import datasets

    (tmp_path / "folder").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "folder" / "train.parquet"))
    datasets.Dataset.from_list(rows[:1]).to_parquet(str(tmp_path / "folder" / "test.parquet"))
    shutil.copy(tmp_path / "folder" / "train.parquet", tmp_path / "a.parquet")
    for name, count in [
        ("a.json", 3),
        ("a.jsonl", 3),
        ("a.parquet", 3),
        ("a.jsonl:valid2", 2),
        ("folder", 3),
        ("folder:test", 1),
    ]:
        assert len(common.read_rows("--dataset", str(tmp_path / name), "train")) == count, name
    assert len(common.read_rows("--eval_dataset", str(tmp_path / "folder"), "test")) == 1


# ---------------------------------------------------------------- ranks and ZeRO


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The results of three steps with a random bound under plain Python at ZeRO-0."""
    out = tmp_path_factory.mktemp("one") / "out"
    done = launch("reward.py", 0, "--constraint", "random", "--output_dir", str(out), *SHORT)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize(
    "ranks, stage, extra",
    [
        (1, 3, []),
        (2, 0, []),
        (2, 1, ["--offload"]),
        (2, 2, []),
        (2, 3, ["--gradient_checkpointing"]),
    ],
)
def test_ranks_and_zero_stages_change_nothing(one_process, tmp_path, ranks, stage, extra):
    out = tmp_path / "out"
    done = launch(
        "reward.py",
        ranks,
        "--constraint",
        "random",
        "--zero_stage",
        str(stage),
        "--output_dir",
        str(out),
        *SHORT,
        *extra,
    )
    assert done.returncode == 0, done.stderr
    for mine, other in zip(lines(out / "metrics.jsonl"), lines(one_process / "metrics.jsonl"), strict=True):
        for key in ("loss", "accuracy", "margin_max", "bound_mean", "chosen_score", "grad_norm", "ranked_kendall"):
            assert mine.get(key) == pytest.approx(other.get(key), abs=2e-4), (mine["step"], key)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out / "model")
    first = lines(out / "eval.jsonl")[0]["chosen_score"]
    row = lines(common.DATA / "preference_eval.jsonl")[0]
    tokens = transformers.AutoTokenizer.from_pretrained(out / "model")(
        row["prompt"] + row["chosen"] + "</s>", return_tensors="pt"
    )
    assert model(**tokens).logits.item() == pytest.approx(first, abs=1e-4)


def test_evaluation_alone_at_zero_3(one_process, tmp_path):
    out = tmp_path / "out"
    model = ["--model", str(one_process / "model"), "--constraint", "random"]
    done = launch("reward.py", 2, *model, "--epochs", "0", "--zero_stage", "3", "--output_dir", str(out))
    assert done.returncode == 0, done.stderr
    (metrics,) = lines(out / "metrics.jsonl")
    before = lines(one_process / "metrics.jsonl")[-1]
    assert metrics["loss"] == pytest.approx(before["loss"], abs=2e-4)
    assert metrics["ranked_spearman"] == pytest.approx(before["ranked_spearman"], abs=2e-4)


@pytest.mark.parametrize("stage", [0, 2])
def test_bf16(train, tmp_path, stage):
    out = tmp_path / "out"
    train("--dtype", "bf16", "--zero_stage", str(stage), "--constraint", "len_rat", "--output_dir", str(out), *SHORT)
    assert all(m["grad_norm"] > 0 for m in lines(out / "metrics.jsonl") if m["split"] == "train")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out / "model")
    assert model.dtype == torch.bfloat16


# ---------------------------------------------------------------- bad input

GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}


def alpaca(preference) -> dict:
    return {"instruction": "i", "input": "", "output_1": "a", "output_2": "b", "preference": preference}


def broken_json(folder: Path) -> list[str]:
    (folder / "broken.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": oops}\n')
    return ["--dataset", str(folder / "broken.jsonl")]


def pickled_model(folder: Path) -> list[str]:
    shutil.copytree(common.toy_model(), folder / "pickled")
    (folder / "pickled" / "model.safetensors").unlink()
    torch.save({}, folder / "pickled" / "pytorch_model.bin")
    return ["--model", str(folder / "pickled")]


def no_pad_token(folder: Path) -> list[str]:
    shutil.copytree(common.toy_model(), folder / "nopad")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / "nopad" / name
        path.write_text(path.read_text().replace('"<pad>"', '"</s>"'))
    config = json.loads((folder / "nopad" / "tokenizer.json").read_text())
    config["added_tokens"] = config["added_tokens"][1:]
    config["model"]["vocab"]["</s>"] = 2
    (folder / "nopad" / "tokenizer.json").write_text(json.dumps(config))
    return ["--model", str(folder / "nopad")]


def remote_code(folder: Path) -> list[str]:
    shutil.copytree(common.toy_model(), folder / "remote")
    config = json.loads((folder / "remote" / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForSequenceClassification": "own.M"}}
    (folder / "remote" / "config.json").write_text(json.dumps(config))
    (folder / "remote" / "own.py").write_text("raise SystemExit('this code must not run')\n")
    return ["--model", str(folder / "remote")]


def finished_run(folder: Path) -> list[str]:
    (folder / "out").mkdir()
    (folder / "out" / "eval.jsonl").write_text("{}\n")
    return []


BAD = {
    "unknown dataset file": (
        lambda f: ["--dataset", str(f / "no.jsonl")],
        r"--dataset .*no.jsonl: there is no such file",
    ),
    "unknown dataset name": (
        lambda f: ["--dataset", "nobody/nothing"],
        r"nobody/nothing: .*download it and pass --dataset",
    ),
    "not a data file": (lambda f: ["--dataset", str(ROOT / "README.md")], r"ends with .json, .jsonl or .parquet"),
    "unknown model": (lambda f: ["--model", str(f / "nothing")], r"nothing: there is no such folder"),
    "unknown model name": (
        lambda f: ["--model", "nobody"],
        r"nobody: .*nor could the Hub give it; download it and pass",
    ),
    "a column is missing": (
        lambda f: ["--dataset", rows_file(f, {"prompt": "p", "chosen": "a"})],
        r"row 1: the columns are prompt, chosen, but",
    ),
    "not JSON": (broken_json, r"broken.jsonl: line 2 is not JSON"),
    "no usable pair": (
        lambda f: ["--dataset", rows_file(f, alpaca(0), alpaca(0))],
        r"no usable pair is left \(2 tie\)",
    ),
    "too long": (
        lambda f: ["--dataset", rows_file(f, GOOD), "--max_length", "3"],
        r"no usable pair is left \(1 longer than",
    ),
    "a preference out of range": (
        lambda f: ["--dataset", rows_file(f, alpaca(1), alpaca(3))],
        r"row 2: preference is 3",
    ),
    "a response is no string": (
        lambda f: ["--dataset", rows_file(f, GOOD, GOOD | {"chosen": 7})],
        r"row 2: chosen is 7, but must be text",
    ),
    "a bound is not positive": (
        lambda f: ["--constraint", "len_rat", "--beta3", "-30"],
        r"len_rat: .*positive.*beta3=-30.0 give: -10.0",
    ),
    "a fixed bound is not positive": (lambda f: ["--constraint", "fixed", "--fixed_bound", "-1"], r"not -1"),
    "a random bound is empty": (lambda f: ["--constraint", "random", "--random_low", "9"], r"low=9.0, high=5.0"),
    "batches do not divide": (
        lambda f: ["--global_batch_size", "16", "--micro_batch_size", "3"],
        r"16 is not a multiple of 1 ranks x --micro_batch_size 3",
    ),
    "too few pairs": (
        lambda f: ["--dataset", rows_file(f, *[GOOD | {"chosen": f"a {i}"} for i in range(5)])],
        r"4 pairs, without the held-out ones, do not fill a --global_batch_size of 32: pass",
    ),
    "a finished run": (finished_run, r"out holds a finished run: choose another, or pass --overwrite"),
    "no pad token": (no_pad_token, r"nopad: its tokenizer has no padding token that differs from EOS"),
    "an unknown encoder": (
        lambda f: ["--constraint", "cos_sim", "--encoder", str(f / "nothing")],
        r"cannot load the encoder .*nothing: there is no",
    ),
    "pickled weights": (pickled_model, r"only pickled weights"),
    "remote code": (remote_code, r"remote: it needs code of its own: read that code, then pass --trust_remote_code"),
    "the model is in the output folder": (
        lambda f: ["--overwrite", "--model", str(f / "out" / "model")],
        r"out holds --model .* itself",
    ),
    "no limit as -1": (lambda f: ["--max_steps", "-1"], r"--max_steps is -1, but must be at least 0"),
    "the folder of a run as the model": (
        lambda f: (f / "run" / "model").mkdir(parents=True) or ["--model", str(f / "run")],
        r"it is the folder of a run: pass .*run/model",
    ),
    "the output folder is a file": (lambda f: ["--output_dir", rows_file(f, GOOD)], r"rows.jsonl is a file: choose"),
    "a negative seed": (lambda f: ["--seed", "-1"], r"--seed is -1, but must be at least 0"),
    "never log": (lambda f: ["--log_every", "0"], r"--log_every is 0, but must be at least 1"),
    "a summary is no object": (
        lambda f: ["--dataset", rows_file(f, {"info": {"post": "p"}, "summaries": ["a", "b"], "choice": 0})],
        r"row 1: info must",
    ),
    "a choice out of range": (
        lambda f: [
            "--dataset",
            rows_file(f, {"info": {"post": "p"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 2}),
        ],
        r"choice \(here 2\)",
    ),
    "ranked scores are no numbers": (
        lambda f: ["--ranked_dataset", rows_file(f, {"prompt": "p", "responses": ["a", "b"], "scores": ["1", "2"]})],
        r"row 1: prompt must be text, responses a list",
    ),
    "a language model is evaluated": (lambda f: ["--epochs", "0"], r"is no reward model, but --epochs 0"),
    "offload without ZeRO": (lambda f: ["--offload"], r"needs ZeRO stage 1, 2 or 3"),
    "ranked columns": (lambda f: ["--ranked_dataset", rows_file(f, GOOD)], r"but must be prompt/responses/scores"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(train, tmp_path, name):
    make, message = BAD[name]
    argv = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(common.InputError, match=message) as caught:
        train("--output_dir", str(tmp_path / "out"), *argv)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-written


def test_what_is_not_finite_stops_the_run(train, tmp_path, monkeypatch):
    """A loss that is NaN, and an infinite gradient of a finite loss: stopped at the step, the weights as they were."""
    kept = {}
    real = common.make_engine

    def make_engine(module, *rest):
        kept["engine"], kept["before"] = real(module, *rest), [p.detach().clone() for p in module.parameters()]
        return kept["engine"]

    monkeypatch.setattr(common, "make_engine", make_engine)
    loss = reward.constrained_ranking_loss

    def nan_loss(margin, bound=None):
        return loss(margin, bound) * (math.nan if margin.requires_grad else 1)

    def infinite_gradient(margin, bound=None):
        return loss(margin, bound) + (1e30 * (margin - margin.detach()) * 1e30 if margin.requires_grad else 0)

    for number, (change, message) in enumerate(
        [(nan_loss, "step 1: the loss is not"), (infinite_gradient, "step 1: the gradient is")]
    ):
        for stage in (0, 2):
            monkeypatch.setattr(reward, "constrained_ranking_loss", change)
            with pytest.raises(common.InputError, match=message):
                train("--output_dir", str(tmp_path / f"{number}{stage}"), "--zero_stage", str(stage), *SHORT)
            for before, after in zip(kept["before"], kept["engine"].module.parameters(), strict=True):
                assert torch.equal(before, after)


def test_errors_reach_the_shell():
    """One line on stderr and status 1, alone and on two ranks; status 2 for a malformed command line."""
    for ranks in (0, 2):
        done = launch("reward.py", ranks, "--constraint", "len_rat", "--beta3", "-30")
        assert done.returncode == 1
        said = [line for line in done.stderr.splitlines() if line.startswith("reward.py: error:")]
        assert len(said) == 1 and "beta3=-30" in said[0]
        assert "Traceback" not in done.stderr
    assert "--task alpaca needs --model" in launch("reward.py", 0, "--task", "alpaca").stderr
    for argv in (["--task", "alpaca"], ["--constraint", "nothing"], ["--unknown", "1"], ["--beta1", "many"]):
        done = launch("reward.py", 0, *argv)
        assert done.returncode == 2 and "Traceback" not in done.stderr


def test_overwrite_replaces_what_a_run_writes_and_nothing_else(train, tmp_path):
    out = tmp_path / "out"
    (out / "model").mkdir(parents=True)
    for name in ("eval.jsonl", "notes.txt", "model/old.bin"):
        (out / name).write_text("old")
    train("--output_dir", str(out), "--overwrite", *SHORT)
    assert (out / "notes.txt").read_text() == "old" and not (out / "model" / "old.bin").exists()
    assert lines(out / "eval.jsonl")
