"""The authors' loss at each token, a similarity that comes with the data, and bounds that are dealt to other pairs."""

import common

import functools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import launch, lines, rows_file
from test_reward import CPU, TEXTS, columns, encoded, family_model

import dpo
import reward

SHORT = "--max_steps 2 --log_every 1 --global_batch_size 8 --micro_batch_size 4"


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


# ---------------------------------------------------------------- --loss_on token


def test_margins_at_each_token_by_hand():
    """Two pairs: one of three positions, one of two. L is averaged within a pair, then over the pairs."""
    scores = torch.tensor([[9.0, 1, 2, 3], [9, 0, 2, -1], [9, 9, 4, 0.5], [9, 9, 1, 0]], requires_grad=True)
    where = torch.tensor([[False, True, True, True], [False, False, True, True]])
    margin, share = reward.token_margins(scores, where)
    assert margin[where].tolist() == [1, 0, 4, 3, 0.5]
    assert share.tolist() == pytest.approx(np.array([[0, 1 / 3, 1 / 3, 1 / 3], [0, 0, 0.5, 0.5]]))
    bound = torch.tensor([5.0, 6.0])
    losses = (share * (F.softplus(-margin) + F.softplus(margin - bound[:, None]))).sum(1)
    first = sum(softplus(-m) + softplus(m - 5) for m in (1, 0, 4)) / 3
    second = sum(softplus(-m) + softplus(m - 6) for m in (3, 0.5)) / 2
    assert losses.tolist() == pytest.approx([first, second])
    losses.mean().backward()
    assert not scores.grad[:, 0].any() and not scores.grad[2:, 1].any()  # no loss before the first that differs


def test_the_positions_of_the_loss(tokenizer):
    """From the first token that differs to the end of the longer response; padding is no key for any token."""
    pairs = columns(encoded(tokenizer, *TEXTS))
    inputs, where, last = reward.collate_tokens(pairs, 7, CPU)
    for i, (chosen, rejected, prefix) in enumerate(zip(pairs["chosen_ids"], pairs["rejected_ids"], pairs["prefix"])):
        assert where[i].nonzero().flatten().tolist() == list(range(prefix, max(len(chosen), len(rejected))))
        for row, ids in ((2 * i, chosen), (2 * i + 1, rejected)):
            width = inputs["input_ids"].shape[1]
            assert inputs["input_ids"][row].tolist() == ids + [7] * (width - len(ids))
            assert inputs["attention_mask"][row].tolist() == [1] * len(ids) + [0] * (width - len(ids))
            assert last[row] == len(ids) - 1


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_scores_at_each_token_are_those_of_the_plain_model(tokenizer, family):
    """Of transformers' own classifier on each padded pair alone, at the padding of the shorter response too."""
    model = family_model(family, tokenizer, transformers.AutoModelForSequenceClassification, num_labels=1).eval()
    pairs, pad = encoded(tokenizer, *TEXTS), tokenizer.pad_token_id
    collator = functools.partial(reward.collate, pad_token_id=pad, share_prefix=True, dtype=torch.float32, device=CPU)
    args = reward.Args(loss_on="token")
    with torch.no_grad():
        chosen, rejected, margin, share = reward.training_scores(common.Scorer(model), columns(pairs), args, collator)
        for i, pair in enumerate(pairs):
            both = [pair["chosen_ids"], pair["rejected_ids"]]
            width = max(map(len, both))
            ids = torch.tensor([one + [pad] * (width - len(one)) for one in both])
            mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in both])
            scores = model.score(model.base_model(ids, attention_mask=mask).last_hidden_state).squeeze(-1)
            own = (scores[0] - scores[1])[pair["prefix"] :]
            assert margin[i][share[i] > 0].tolist() == pytest.approx(own.tolist(), abs=1e-5)
            ends = [scores[row, len(one) - 1].item() for row, one in enumerate(both)]
            assert [chosen[i].item(), rejected[i].item()] == pytest.approx(ends, abs=1e-5)


def test_the_last_token_is_one_position(tokenizer):
    model = family_model("llama", tokenizer, transformers.AutoModelForSequenceClassification, num_labels=1).eval()
    pairs = columns(encoded(tokenizer, *TEXTS))
    collator = functools.partial(reward.collate, pad_token_id=2, share_prefix=True, dtype=torch.float32, device=CPU)
    (chosen, rejected, margin, share), others = (
        reward.training_scores(common.Scorer(model), pairs, reward.Args(loss_on=place), collator)
        for place in ("last", "token")
    )
    assert torch.equal(margin, (chosen - rejected)[:, None]) and share.eq(1).all() and share.shape == margin.shape
    for own, other in zip((chosen, rejected), others):  # what is logged is the score at the last token all the same
        assert own.tolist() == pytest.approx(other.tolist(), abs=1e-5)


def test_a_run_with_the_loss_on_tokens(run, few, tmp_path):
    """Its margins are those of the last token, its loss is another; ranks and micro batches change nothing."""
    logged, token = {}, "--loss_on token"
    for name, flags in {"last": "", "token": token, "parts": f"{token} --micro_batch_size 2"}.items():
        run(reward, f"--constraint len_rat {SHORT} {few} {flags} --output_dir {tmp_path}/{name}")
        logged[name] = lines(tmp_path / name / "metrics.jsonl")
    done = launch("reward.py", 2, f"--constraint len_rat {SHORT} {few} --loss_on token --output_dir {tmp_path}/2")
    assert done.returncode == 0, done.stderr
    first, token, parts, ranks = (line[1] for line in (*logged.values(), lines(tmp_path / "2" / "metrics.jsonl")))
    assert token["margin_mean"] == pytest.approx(first["margin_mean"], abs=1e-5)
    assert abs(token["rank_loss"] - first["rank_loss"]) > 1e-3
    for other in (parts, ranks):
        assert other["loss"] == pytest.approx(token["loss"], abs=1e-5)
        assert other["grad_norm"] == pytest.approx(token["grad_norm"], rel=1e-3)


# ---------------------------------------------------------------- --constraint given


def given_rows(folder, values: list, name: str = "rows.jsonl") -> str:
    rows = [
        dict(prompt=f"Where is item {i}?\n", chosen=f"Aisle {i}.", rejected="No.", similarity=value)
        for i, value in enumerate(values)
    ]
    return rows_file(folder, *rows)


@pytest.mark.parametrize("script", [reward, dpo], ids=["reward", "dpo"])
def test_a_similarity_that_comes_with_the_data(run, tmp_path, script):
    """It is the pair's own, whatever order the rows are trained in; its bound is that of the formula."""
    values = [0.1 * i + 0.05 for i in range(8)]
    data = given_rows(tmp_path, values)
    flags = f"--constraint given --beta1 10 --beta3 -4 --dataset {data} --eval_dataset {data} {SHORT}"
    flags += " --generate 0" if script is dpo else ""
    run(script, f"{flags} --output_dir {tmp_path}/out")
    found = lines(tmp_path / "out" / "eval.jsonl")
    assert [line["similarity"] for line in found] == pytest.approx(values)
    assert [line["bound"] for line in found] == pytest.approx([10 / (value + 0.001) - 4 for value in values])
    train = [line for line in lines(tmp_path / "out" / "metrics.jsonl") if line["split"] == "train"]
    assert train[0]["bound_mean"] == pytest.approx(np.mean([line["bound"] for line in found]))


@pytest.mark.parametrize("value", [0, 1.5, -0.1, "close", None, math.nan, [0.5]])
def test_a_similarity_out_of_range_is_refused(run, tmp_path, value):
    data = given_rows(tmp_path, [0.5, value])
    with pytest.raises(common.InputError, match=r"row 2: similarity is .*, but .* \(0, 1\]"):
        run(reward, f"--constraint given --dataset {data} --eval_dataset {data} --output_dir {tmp_path}/out")


def test_without_the_column_given_is_refused(run, tmp_path):
    with pytest.raises(common.InputError, match="row 1: similarity is None"):
        run(reward, f"--constraint given --output_dir {tmp_path}/out")


# ---------------------------------------------------------------- --shuffle_bounds


@pytest.mark.parametrize("script", [reward, dpo], ids=["reward", "dpo"])
def test_shuffled_bounds_are_the_same_bounds_of_other_pairs(script):
    similarity = torch.linspace(0.1, 1, 200)
    plain = script.Args(constraint="len_rat")
    own = script.pair_bounds(similarity, plain)
    dealt = script.pair_bounds(similarity, script.Args(constraint="len_rat", shuffle_bounds=True))
    again = script.pair_bounds(similarity, script.Args(constraint="len_rat", shuffle_bounds=True), epoch=3)
    other = script.pair_bounds(similarity, script.Args(constraint="len_rat", shuffle_bounds=True, seed=43))
    assert torch.equal(dealt.sort().values, own.sort().values) and torch.equal(dealt, again)
    assert (dealt != own).float().mean() > 0.9 and not torch.equal(dealt, other)
    assert abs(np.corrcoef(dealt, own)[0, 1]) < 0.2  # the prior is gone


def test_a_run_with_shuffled_bounds(run, tmp_path):
    data = given_rows(tmp_path, [0.1 * i + 0.05 for i in range(8)])
    flags = f"--constraint given --dataset {data} --eval_dataset {data} {SHORT}"
    bounds = {}
    for name, more in (("own", ""), ("dealt", "--shuffle_bounds")):
        run(reward, f"{flags} {more} --output_dir {tmp_path}/{name}")
        bounds[name] = [line["bound"] for line in lines(tmp_path / name / "eval.jsonl")]
    assert sorted(bounds["own"]) == sorted(bounds["dealt"]) and bounds["own"] != bounds["dealt"]
    assert json.loads((tmp_path / "dealt" / "args.json").read_text())["shuffle_bounds"] is True


@pytest.mark.parametrize("constraint", ["none", "fixed", "random"])
def test_only_the_bounds_of_a_prior_can_be_shuffled(run, constraint):
    with pytest.raises(common.InputError, match=f"--shuffle_bounds .* --constraint {constraint}"):
        run(reward, f"--constraint {constraint} --shuffle_bounds")
