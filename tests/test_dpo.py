"""dpo.py: where response tokens are predicted, the reference, loss and metrics, and its runs."""

import common

import json
import math

import numpy as np
import pytest
import torch
import transformers
from helpers import lines
from test_reward import TEXTS, family_model

import dpo
import sft

CPU = torch.device("cpu")
NONE = common.NO_LABEL
NAMES = ("prompt", "chosen", "rejected")
SHORT = "--max_steps 3 --log_every 1 --micro_batch_size 4 --global_batch_size 16 --generate 3"


@pytest.fixture(scope="module")
def small(run, tmp_path_factory) -> str:
    """A folder with a little SFT: a distribution that is not flat."""
    out = tmp_path_factory.mktemp("sft") / "out"
    run(sft, f"--max_steps 20 --generate 0 --output_dir {out}")
    return str(out / "model")


def encoded(tokenizer, *texts: tuple[str, str, str]) -> list[dict]:
    return [common.encode_pair(dict(zip(NAMES, own)), tokenizer, 1000, needs_prompt=True) for own in texts]


def collate(pairs: list[dict], share: bool = True, pad: int = 0) -> dict:
    return dpo.collate({name: [own[name] for own in pairs] for name in pairs[0]}, pad, share, torch.float32, CPU)


# ---------------------------------------------------------------- log-probabilities


def test_where_tokens_are_predicted_by_hand():
    """Prompt a, chosen b c, rejected b d e. Shared row a b c b d e: b counts for both, at the place of a; c is chosen,
    d and e rejected. Apart, a b c and a b d e, each predicts its own. Parts of pair i: 3 i both, 3 i + 1 chosen and
    3 i + 2 rejected. In the second pair the prompt is a b, whose b nothing counts."""
    first = dict(chosen_ids=[5, 6, 7], rejected_ids=[5, 6, 8, 9], prefix=2, prompt_ids=[5])
    batch = collate([first, first | dict(prompt_ids=[5, 6])])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 6, 8, 9]] * 2 and batch["pairs"] == 2
    assert batch["labels"].tolist() == [[6, 7, NONE, 8, 9, NONE], [NONE, 7, NONE, 8, 9, NONE]]
    assert batch["parts"].tolist() == [0, 1, 2, 2, 4, 5, 5]
    batch = collate([first, first | dict(prompt_ids=[5, 6])], share=False)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [5, 6, 8, 9]] * 2
    labels = [[6, 7, NONE, NONE], [6, 8, 9, NONE], [NONE, 7, NONE, NONE], [NONE, 8, 9, NONE]]
    assert batch["labels"].tolist() == labels and batch["parts"].tolist() == [1, 1, 2, 2, 2, 4, 5, 5]


@pytest.mark.parametrize("share", [True, False])
def test_each_response_token_counts_once_for_its_own_response(tokenizer, share):
    """Whatever the batch: the labels of both + chosen and of both + rejected are the two responses, EOS included."""
    pairs = encoded(tokenizer, *TEXTS)
    batch = collate(pairs, share)
    labels = batch["labels"][batch["labels"] != NONE]
    for number, own in enumerate(pairs):
        both, *sides = (labels[batch["parts"] == 3 * number + part].tolist() for part in range(3))
        assert share or not both
        for side, ids in zip(sides, (own["chosen_ids"], own["rejected_ids"])):
            assert both + side == ids[len(own["prompt_ids"]) :]
    assert len(batch["parts"]) == len(labels)


def test_a_prompt_without_a_token_cannot_be_used(tokenizer, tmp_path):
    """Where a tokenizer sets no BOS, nothing would predict the first token of the response."""
    tokenizer.save_pretrained(tmp_path)
    plain = json.loads((tmp_path / "tokenizer.json").read_text()) | {"post_processor": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain))
    with pytest.raises(common.Unusable, match="prompt without a token"):
        encoded(common.load_tokenizer(str(tmp_path), False), ("", "Yes.", "No."))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen2", "bloom"])
def test_log_probabilities_and_gradients_are_those_of_each_sequence_alone(process, tokenizer, family):
    """From shared rows, and from rows apart, which are padded behind (ALiBi allows no others)."""
    model = family_model(family, tokenizer, transformers.AutoModelForCausalLM)
    pairs = encoded(tokenizer, *TEXTS)
    shares = common.check_model(model, model, dpo.Args(model=family, max_length=200), process)
    assert shares == (family != "bloom")

    def gradient(logps):
        model.zero_grad()
        (logps[:, 0] - 2 * logps[:, 1]).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    alone = []
    for own in pairs:
        for ids in (torch.tensor(own["chosen_ids"]), torch.tensor(own["rejected_ids"])):
            logps = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            alone.append(logps[len(own["prompt_ids"]) - 1 :].sum())
    alone = torch.stack(alone).view(-1, 2)
    expected = gradient(alone)
    for share in (True, False) if shares else (False,):
        batch = collate(pairs, share, tokenizer.pad_token_id)
        assert batch["input_ids"].shape[0] == (5 if share else 10)
        logps = dpo.pair_logps(model, **batch)
        assert torch.allclose(logps, alone, rtol=1e-5, atol=1e-4)
        assert torch.allclose(gradient(logps), expected, atol=1e-4 * expected.abs().max().item())


# ---------------------------------------------------------------- loss and metrics


def test_pair_metrics_by_hand():
    """Two pairs, β = 0.5. log π - log π_ref: chosen 2 and -4, rejected -2 and 2. Rewards 1, -2 and -1, 1; margins z 2
    and -3, so accuracy 1/2, mean -1/2, deviation 5/2; kl is minus the mean log-ratio: -(2 - 4 - 2 + 2) / 4 = 1/2."""
    chosen, rejected = torch.tensor([-8.0, -14.0]), torch.tensor([-12.0, -18.0])
    ref_chosen, ref_rejected = torch.tensor([-10.0, -10.0]), torch.tensor([-10.0, -20.0])
    losses, bound = (torch.tensor([1.0, 4.0]), torch.tensor([2.0, 1.0])), torch.tensor([1.0, 1.0])
    values = dpo.pair_metrics(chosen, rejected, ref_chosen, ref_rejected, bound, *losses, 0.5)
    assert values == pytest.approx(
        dict(
            loss=4,
            rank_loss=2.5,
            constraint_loss=1.5,
            accuracy=0.5,
            margin_mean=-0.5,
            margin_std=2.5,
            margin_max=2,
            bound_mean=1,
            over_bound=0.5,
            chosen_reward=-0.5,
            rejected_reward=0,
            chosen_logps=-11,
            rejected_logps=-15,
            kl=0.5,
        )
    )
    unbounded = dpo.pair_metrics(chosen, rejected, ref_chosen, ref_rejected, bound * math.nan, *losses, 0.5)
    assert [unbounded[k] for k in ("constraint_loss", "bound_mean", "over_bound")] == [None] * 3


@pytest.mark.parametrize("dtype, close", [("fp32", 1e-5), ("bf16", 1e-2)])
def test_the_first_step_is_log_2(run, small, few, tmp_path, dtype, close):
    """Policy and reference are one, z = 0, dropout is off: -log σ(0) = log 2, and 1 - 1 = 0 nats between them."""
    out = tmp_path / "out"
    run(dpo, f"{few} {SHORT} --model {small} --dtype {dtype} --constraint fixed --output_dir {out}")
    first = lines(out / "metrics.jsonl")[1]
    assert (first["step"], first["split"]) == (1, "train")
    assert first["rank_loss"] == pytest.approx(math.log(2), abs=close)
    assert first["constraint_loss"] == pytest.approx(math.log(1 + math.exp(-4.5)), abs=close)  # -log σ(4.5 - 0)
    assert first["margin_mean"] == pytest.approx(0, abs=2 * close) and first["kl"] == pytest.approx(0, abs=100 * close)


def test_the_loss_by_hand(run, small, few, tmp_path):
    """With another reference z is not 0: it, and the smoothed loss, from eval.jsonl's log-probabilities and the models
    themselves. ε = 0.1 mixes both terms: 0.9 · -log σ(z) + 0.1 · -log σ(-z), likewise with δ* - z."""
    out, ref, beta = tmp_path / "out", common.toy_model(), 0.02
    flags = f"--model {small} --ref_model {ref} --constraint fixed --fixed_bound 2 --epochs 0 --generate 2"
    run(dpo, f"{few} {flags} --label_smoothing 0.1 --kl_beta {beta} --output_dir {out}")
    (metrics,) = lines(out / "metrics.jsonl")
    logged, tokenizer = lines(out / "eval.jsonl"), common.load_tokenizer(small, False)
    models = [transformers.AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (small, ref)]
    pairs = [tuple(row.values()) for row in lines(common.DATA / "preference_eval.jsonl")[:3]]
    for own, line in zip(encoded(tokenizer, *pairs), logged):
        ratios = []
        for name in ("chosen", "rejected"):
            ids, both = torch.tensor(own[f"{name}_ids"]), []
            for model in models:
                with torch.no_grad():
                    logps = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
                both.append(logps[len(own["prompt_ids"]) - 1 :].sum().item())
            assert line[f"{name}_logps"] == pytest.approx(both[0], abs=1e-3)
            assert line[f"{name}_reward"] == pytest.approx(beta * (both[0] - both[1]), abs=1e-3)
            ratios.append(both[0] - both[1])
        assert line["margin"] == pytest.approx(beta * (ratios[0] - ratios[1]), abs=1e-3)
    z = np.array([line["margin"] for line in logged])
    assert z.std() > 0.1

    def smoothed(x):
        return 0.9 * np.log1p(np.exp(-x)) + 0.1 * np.log1p(np.exp(x))

    assert metrics["rank_loss"] == pytest.approx(smoothed(z).mean(), rel=1e-4)
    assert metrics["loss"] == pytest.approx((smoothed(z) + smoothed(2 - z)).mean(), rel=1e-4)


# ---------------------------------------------------------------- runs

TRAIN_KEYS = set(
    "step split loss rank_loss constraint_loss accuracy margin_mean margin_std margin_max bound_mean over_bound "
    "chosen_reward rejected_reward chosen_logps rejected_logps kl lr grad_norm pairs_per_s tokens_per_s".split()
)
EVAL_KEYS = TRAIN_KEYS - set("lr grad_norm pairs_per_s tokens_per_s".split())
EVAL_KEYS |= set("length_accuracy spearman_similarity ranked_spearman ranked_kendall".split())
LINE_KEYS = "chosen_reward rejected_reward chosen_logps rejected_logps margin similarity bound".split()


@pytest.mark.parametrize("constraint", ["none", "len_rat", "cos_sim", "random", "fixed"])
def test_a_run_of_each_constraint(run, small, few, tmp_path, constraint):
    out = tmp_path / "out"
    run(dpo, f"{few} {SHORT} --model {small} --constraint {constraint} --output_dir {out}")
    names = {path.name for path in out.iterdir()} - {".lock"}
    assert names == set("args.json metrics.jsonl eval.jsonl margins.png generations.json model tensorboard".split())
    metrics = lines(out / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2, 3, 3]
    for m in metrics:
        assert set(m) == (TRAIN_KEYS if m["split"] == "train" else EVAL_KEYS)
        bounded = constraint != "none"
        assert all((m[k] is not None) == bounded for k in ("constraint_loss", "bound_mean", "over_bound"))
        assert m["loss"] == pytest.approx(m["rank_loss"] + (m["constraint_loss"] or 0), abs=1e-5)
        rewards = m["chosen_reward"] + m["rejected_reward"]
        assert m["kl"] == pytest.approx(-rewards / 2 / 0.1, abs=1e-3)
        assert m["margin_mean"] == pytest.approx(m["chosen_reward"] - m["rejected_reward"], abs=1e-4)
    assert metrics[-1]["ranked_spearman"] is not None
    pairs = lines(out / "eval.jsonl")
    assert len(pairs) == 12
    for p in pairs:
        assert list(p) == LINE_KEYS
        if constraint in ("len_rat", "cos_sim"):
            assert p["bound"] == pytest.approx(20 / (p["similarity"] + 0.001) - 15, rel=1e-5)
    bounds = [p["bound"] for p in pairs]
    assert (constraint == "none") == (bounds == [None] * len(bounds))
    assert constraint != "fixed" or set(bounds) == {4.5}
    assert constraint != "random" or 4 <= min(bounds) < max(bounds) <= 5
    assert np.mean([p["margin"] for p in pairs]) == pytest.approx(metrics[-1]["margin_mean"], abs=1e-5)
    margin, bound = np.array([p["margin"] for p in pairs]), np.array(bounds, float)
    assert metrics[-1]["rank_loss"] == pytest.approx(np.log1p(np.exp(-margin)).mean(), rel=1e-4)  # -log σ(z)
    if constraint != "none":  # -log σ(δ* - z)
        assert metrics[-1]["constraint_loss"] == pytest.approx(np.log1p(np.exp(margin - bound)).mean(), rel=1e-4)
    assert transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    assert len(json.loads((out / "generations.json").read_text())) == 3


def test_the_reference_is_cached_and_live_is_the_same(run, small, few, tmp_path, monkeypatch):
    """The same run again computes nothing for the reference; with --live_reference the losses are equal."""

    def metrics(name: str, flags: str = "") -> list[dict]:
        run(dpo, f"{few} {SHORT} --model {small} {flags} --output_dir {tmp_path}/{name}")
        return lines(tmp_path / name / "metrics.jsonl")

    first, real, passes = metrics("first"), common.over_rows, []
    monkeypatch.setattr(common, "over_rows", lambda *rest: passes.append(len(rest[2])) or real(*rest))
    again = metrics("again")
    assert 48 not in passes and 12 in passes  # the training pairs; the held-out ones are evaluated
    live = metrics("live", "--live_reference")
    for a, b, c in zip(first, again, live, strict=True):
        assert a["loss"] == b["loss"] and c["loss"] == pytest.approx(a["loss"], abs=1e-5)
        assert c["kl"] == pytest.approx(a["kl"], abs=1e-3)
    # Another reference is not taken from the cache of this one.
    assert metrics("other", f"--ref_model {common.toy_model()}")[1]["margin_std"] > 0.1


def test_each_pair_meets_its_own_reference(run, small, few, tmp_path, monkeypatch):
    """Policy and reference are one and do not move: z is 0 for each pair alone, in every micro batch of every step."""
    margins, loss = [], dpo.ranking_loss

    def spy(margin, label_smoothing=0.0):
        if margin.requires_grad:
            margins.append(margin.detach())
        return loss(margin, label_smoothing)

    monkeypatch.setattr(dpo, "ranking_loss", spy)
    run(dpo, f"{few} {SHORT} --model {small} --learning_rate 0 --output_dir {tmp_path}/out")
    assert len(margins) == 12 and all(len(m) == 4 and m.abs().max() < 1e-4 for m in margins)
