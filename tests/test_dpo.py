"""dpo.py: where response tokens are predicted, the reference, loss and metrics, runs, the paper's settings."""

import dataclasses
import inspect
import json
import math
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
import transformers

import common
import dpo
import reward
import sft
from dpo import Pair
from helpers import launch, lines, rows_file
from test_sft import reward_folder

CPU = torch.device("cpu")
SHORT = [
    "--max_steps",
    "3",
    "--log_every",
    "1",
    "--micro_batch_size",
    "4",
    "--global_batch_size",
    "16",
    "--generate",
    "3",
]


def make_pairs(tokenizer, *texts: tuple[str, str, str]) -> list[Pair]:
    dropped = Counter()
    kept = dpo.tokenize([Pair(*t) for t in texts], tokenizer, 1000, dropped)
    assert not dropped
    return kept


@pytest.fixture(scope="module")
def small(process, tmp_path_factory) -> str:
    """A folder with a little SFT: a distribution that is not flat."""
    out = tmp_path_factory.mktemp("sft") / "out"
    argv = ["--max_steps", "40", "--generate", "0", "--output_dir", str(out)]
    sft.main(common.parse_args(sft.Args, sft.preset, argv))
    return str(out / "model")


# ---------------------------------------------------------------- siblings


@pytest.mark.parametrize(
    "other, names",
    [
        (
            reward,
            "parse_pair check_text read_pairs load_pairs global_batches can_share_prefix similarities model_version",
        ),
        (reward, "pair_bounds read_ranked"),
        (sft, "check_text global_batches TargetLogps load_policy sample"),
    ],
)
def test_what_siblings_repeat_is_the_same(other, names):
    """The scripts repeat these on purpose: each stands alone. A change in one is a change in all."""
    for name in names.split():
        assert inspect.getsource(getattr(dpo, name)) == inspect.getsource(getattr(other, name)), name


# ---------------------------------------------------------------- log-probabilities

TEXTS = [
    ("Where is the milk?\n", "Aisle 3.", "You will find milk in aisle 2. Have a nice day!"),
    (
        "Hello! A longer question, much longer than others. Where do I find candles?\n",
        "Go to aisle 4.",
        "Go to aisle 2.",
    ),
    ("", "Yes.", "No."),
    ("Where?\n", "Aisle 3. We open at eight every morning. Thank you for asking!", "Aisle 3. We open at eight."),
    ("Where?\n", "Aisle 3.", "Aisle 3. No."),
]


def test_where_tokens_are_predicted_by_hand():
    """Prompt a, chosen b c, rejected b d e: prefix a b, row [a b | c | d e], width 5.
    b counts for both, from the place of a (0); c from the place of b (1); d also from the place of b (1), e from the
    place of d (3). Parts of one pair: 0 both, 1 chosen, 2 rejected."""
    pair = Pair("", "", "", np.array([5, 6, 7], np.int32), np.array([5, 6, 8, 9], np.int32), prefix=2, prompt_length=1)
    batch = dpo.collate([pair], 0, True, CPU)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]] and batch["pairs"] == 1
    assert batch["position_ids"].tolist() == [[0, 1, 2, 2, 3]]
    places = list(zip(batch["sources"].tolist(), batch["targets"].tolist(), batch["parts"].tolist()))
    assert places == [(0, 6, 0), (1, 7, 1), (1, 8, 2), (3, 9, 2)]
    # Apart: rows [a b c] and [a b d e], width 4.
    batch = dpo.collate([pair], 0, False, CPU)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [5, 6, 8, 9]]
    places = list(zip(batch["sources"].tolist(), batch["targets"].tolist(), batch["parts"].tolist()))
    assert places == [(0, 6, 1), (1, 7, 1), (4, 6, 2), (5, 8, 2), (6, 9, 2)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen2"])
def test_shared_rows_give_the_log_probabilities_of_each_sequence(process, tokenizer, monkeypatch, family):
    """log π of both responses, and its gradient, from shared rows and from rows apart, against each sequence alone;
    the vocabulary head in many pieces."""
    monkeypatch.setattr(common, "LOGITS_AT_ONCE", 7 * 512)
    size = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    kind = dict(
        llama=transformers.LlamaConfig(**size, intermediate_size=96),
        gpt2=transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
        gpt_neox=transformers.GPTNeoXConfig(**size, intermediate_size=96),
        qwen2=transformers.Qwen2Config(**size, intermediate_size=96, num_key_value_heads=2),
    )[family]
    kind.update(dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, initializer_range=0.1))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind).eval()
    assert dpo.can_share_prefix(model, 200)
    pairs, policy = make_pairs(tokenizer, *TEXTS), dpo.Policy(model)

    def gradient(loss):
        model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    alone = []
    for ids, start in [(i, p.prompt_length) for p in pairs for i in (p.chosen_ids, p.rejected_ids)]:
        ids = torch.from_numpy(ids).long()
        logps = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        alone.append(logps[start - 1 :].sum())
    alone = torch.stack(alone).view(-1, 2).T
    expected = gradient((alone[0] - 2 * alone[1]).square().sum())
    for share in (True, False):
        batch = dpo.collate(pairs, tokenizer.pad_token_id, share, CPU)
        assert batch["input_ids"].shape[0] == (5 if share else 10)
        logps = policy(**batch)
        assert torch.allclose(logps, alone, rtol=1e-5, atol=1e-4)
        mine = gradient((logps[0] - 2 * logps[1]).square().sum())
        assert torch.allclose(mine, expected, atol=1e-4 * expected.abs().max().item())


# ---------------------------------------------------------------- loss and metrics


def test_pair_metrics_by_hand():
    """Two pairs, β = 0.5. log π - log π_ref: chosen 2 and -4, rejected -2 and 2. Rewards 1, -2 and -1, 1; margins z 2 and
    -3, so accuracy 1/2, mean -1/2, deviation 5/2; kl is minus the mean log-ratio: -(2 - 4 - 2 + 2) / 4 = 1/2."""
    chosen, rejected = torch.tensor([-8.0, -14.0]), torch.tensor([-12.0, -18.0])
    ref_chosen, ref_rejected = torch.tensor([-10.0, -10.0]), torch.tensor([-10.0, -20.0])
    loss, rank_loss, bound = torch.tensor([3.0, 5.0]), torch.tensor([1.0, 4.0]), torch.tensor([1.0, 1.0])
    values = dpo.pair_metrics(chosen, rejected, ref_chosen, ref_rejected, bound, loss, rank_loss, 0.5)
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


@pytest.mark.parametrize("dtype, close", [("fp32", 1e-5), ("bf16", 1e-2)])
def test_the_first_step_is_log_2(run, small, tmp_path, dtype, close):
    """Policy and reference are one, z = 0, dropout is off: -log σ(0) = log 2, and 1 - 1 = 0 nats between them."""
    out = tmp_path / "out"
    run(dpo, "--model", small, "--dtype", dtype, "--constraint", "fixed", "--output_dir", str(out), *SHORT)
    first = lines(out / "metrics.jsonl")[1]
    assert (first["step"], first["split"]) == (1, "train")
    assert first["rank_loss"] == pytest.approx(math.log(2), abs=close)
    assert first["constraint_loss"] == pytest.approx(math.log(1 + math.exp(-4.5)), abs=close)  # -log σ(4.5 - 0)
    assert first["margin_mean"] == pytest.approx(0, abs=2 * close) and first["kl"] == pytest.approx(0, abs=100 * close)


def test_the_loss_by_hand(run, small, tmp_path, monkeypatch):
    """With another reference z is not 0: it, and the smoothed loss, from eval.jsonl's log-probabilities and the models
    themselves. ε = 0.1 mixes both terms: 0.9 · -log σ(z) + 0.1 · -log σ(-z), likewise with δ* - z."""
    out, ref, beta = tmp_path / "out", common.toy_model(), 0.02
    flags = ["--model", small, "--ref_model", ref, "--constraint", "fixed", "--fixed_bound", "2", "--epochs", "0"]
    run(dpo, *flags, "--label_smoothing", "0.1", "--kl_beta", str(beta), "--generate", "2", "--output_dir", str(out))
    (metrics,) = lines(out / "metrics.jsonl")
    logged = lines(out / "eval.jsonl")
    rows = lines(common.DATA / "preference_eval.jsonl")[:3]
    tokenizer = common.load_tokenizer(small, False)
    pairs = make_pairs(tokenizer, *[(r["prompt"], r["chosen"], r["rejected"]) for r in rows])
    for pair, line in zip(pairs, logged):
        ratios = []
        for ids, name in ((pair.chosen_ids, "chosen"), (pair.rejected_ids, "rejected")):
            ids, both = torch.from_numpy(ids).long(), []
            for folder in (small, ref):
                with torch.no_grad():
                    logits = transformers.AutoModelForCausalLM.from_pretrained(folder)(ids[None]).logits[0, :-1]
                logps = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
                both.append(logps[pair.prompt_length - 1 :].sum().item())
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
EVAL_KEYS = TRAIN_KEYS - {"lr", "grad_norm", "pairs_per_s", "tokens_per_s"} | set(
    "length_accuracy spearman_similarity ranked_spearman ranked_kendall".split()
)


@pytest.mark.parametrize("constraint", ["none", "len_rat", "cos_sim", "random", "fixed"])
def test_a_run_of_each_constraint(run, small, tmp_path, constraint):
    out = tmp_path / "out"
    run(dpo, "--model", small, "--constraint", constraint, "--output_dir", str(out), *SHORT)
    names = {"args.json", "metrics.jsonl", "eval.jsonl", "margins.png", "generations.json", "model", "tensorboard"}
    assert {path.name for path in out.iterdir()} == names
    metrics = lines(out / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2, 3, 3]
    for m in metrics:
        assert set(m) == (TRAIN_KEYS if m["split"] == "train" else EVAL_KEYS)
        assert all(
            (m[k] is not None) == (constraint != "none") for k in ("constraint_loss", "bound_mean", "over_bound")
        )
        assert m["loss"] == pytest.approx(m["rank_loss"] + (m["constraint_loss"] or 0), abs=1e-5)
        rewards = m["chosen_reward"] + m["rejected_reward"]
        assert m["kl"] == pytest.approx(-rewards / 2 / 0.1, abs=1e-3)
        assert m["margin_mean"] == pytest.approx(m["chosen_reward"] - m["rejected_reward"], abs=1e-4)
    pairs = lines(out / "eval.jsonl")
    assert len(pairs) == len(lines(common.DATA / "preference_eval.jsonl"))
    for p in pairs:
        if constraint in ("len_rat", "cos_sim"):
            assert p["bound"] == pytest.approx(20 / (p["similarity"] + 0.001) - 15, rel=1e-5)
    assert np.mean([p["margin"] for p in pairs]) == pytest.approx(metrics[-1]["margin_mean"], abs=1e-5)
    assert transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    assert len(json.loads((out / "generations.json").read_text())) == 3


def test_the_reference_is_cached_and_live_is_the_same(run, small, tmp_path, monkeypatch):
    """The same run again computes nothing for the reference; with --live_reference the losses are equal."""
    run(dpo, "--model", small, "--output_dir", str(tmp_path / "first"), *SHORT)
    real, counted = dpo.pair_logps, []
    monkeypatch.setattr(
        dpo, "pair_logps", lambda engine, pairs, *rest: counted.append(len(pairs)) or real(engine, pairs, *rest)
    )
    run(dpo, "--model", small, "--output_dir", str(tmp_path / "again"), *SHORT)
    once = list(counted)
    assert 2000 not in once  # the training pairs
    run(dpo, "--model", small, "--live_reference", "--output_dir", str(tmp_path / "live"), *SHORT)
    first, again, live = (lines(tmp_path / name / "metrics.jsonl") for name in ("first", "again", "live"))
    for a, b, c in zip(first, again, live, strict=True):
        assert a["loss"] == b["loss"] and c["loss"] == pytest.approx(a["loss"], abs=1e-5)
        assert c["kl"] == pytest.approx(a["kl"], abs=1e-3)
    # Another reference is not taken from the cache of this one.
    run(dpo, "--model", small, "--ref_model", common.toy_model(), "--output_dir", str(tmp_path / "other"), *SHORT)
    assert lines(tmp_path / "other" / "metrics.jsonl")[1]["margin_std"] > 0.1


def test_each_pair_meets_its_own_reference_and_bound(run, small, tmp_path, monkeypatch):
    """In the first micro batch of every step z follows from that batch's own pairs: at step 1, 0 for each pair alone."""
    margins, loss = [], dpo.constrained_ranking_loss

    def spy(margin, bound=None, label_smoothing=0.0):
        if margin.requires_grad:
            margins.append(margin.detach())
        return loss(margin, bound, label_smoothing)

    monkeypatch.setattr(dpo, "constrained_ranking_loss", spy)
    run(dpo, "--model", small, "--output_dir", str(tmp_path / "out"), "--learning_rate", "0", *SHORT)
    assert len(margins) == 2 * 12 and all(m.abs().max() < 1e-4 for m in margins)  # weights do not move: 0 throughout


@pytest.fixture(scope="module")
def one_process(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "out"
    done = launch("dpo.py", 0, "--model", small, "--constraint", "len_rat", "--output_dir", str(out), *SHORT)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize(
    "ranks, stage, extra", [(2, 2, []), (2, 3, ["--gradient_checkpointing"]), (2, 3, ["--live_reference"])]
)
def test_ranks_and_zero_stages_change_nothing(small, one_process, tmp_path, ranks, stage, extra, monkeypatch):
    monkeypatch.setenv("PCRM_CACHE", str(tmp_path / "cache"))  # the reference is computed on these ranks
    out, flags = tmp_path / "out", ["--model", small, "--constraint", "len_rat", *SHORT, *extra]
    done = launch("dpo.py", ranks, "--zero_stage", str(stage), "--output_dir", str(out), *flags)
    assert done.returncode == 0, done.stderr
    for mine, other in zip(lines(out / "metrics.jsonl"), lines(one_process / "metrics.jsonl"), strict=True):
        for key in ("loss", "margin_mean", "chosen_logps", "kl", "grad_norm", "ranked_kendall"):
            assert (mine.get(key) or 0) == pytest.approx(other.get(key) or 0, rel=1e-3, abs=1e-3), (mine["step"], key)
    assert transformers.AutoModelForCausalLM.from_pretrained(out / "model")


# ---------------------------------------------------------------- bad input and the paper's runs


def other_vocabulary(folder) -> str:
    shutil.copytree(common.toy_model(), folder / "other")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "other")
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(folder / "other")
    return str(folder / "other")


BAD = {
    "another vocabulary": (
        lambda f: ["--ref_model", other_vocabulary(f)],
        r"other has another vocabulary than --model",
    ),
    "a reward model": (lambda f: ["--model", reward_folder(f)], r"is a reward model, but a language model is needed"),
    "a reward model as reference": (
        lambda f: ["--ref_model", reward_folder(f)],
        r"reward is a reward model, but a lang",
    ),
    "smoothing": (lambda f: ["--label_smoothing", "0.7"], r"--label_smoothing is 0.7, but must be at most 0.5"),
    "kl_beta": (lambda f: ["--kl_beta", "-1"], r"--kl_beta is -1.0, but must be at least 0"),
    "no usable pair": (
        lambda f: ["--dataset", rows_file(f, {"prompt": "p", "chosen": "a", "rejected": "a"})],
        r"no usable pair is left \(1 identical responses\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(run, tmp_path, name):
    make, message = BAD[name]
    argv = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(common.InputError, match=message) as caught:
        run(dpo, "--output_dir", str(tmp_path / "out"), *argv)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-written


def test_the_output_may_not_hold_the_reference(run, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(common.InputError, match="holds --ref_model .* itself"):
        run(dpo, "--overwrite", "--ref_model", str(out / "model"), "--output_dir", str(out))


# METHOD: β1, β2, β3 of dialogue; the rest is common to all three.
RUNS = {
    "none": {},
    "cos_sim": dict(beta1=30, beta2=0.001, beta3=-25),
    "len_rat": dict(beta1=20, beta2=0.001, beta3=-15),
}
ALL = dict(
    max_length=512,
    global_batch_size=32,
    learning_rate=1e-6,
    weight_decay=0.0,
    epochs=1,
    warmup_steps=0,
    seed=42,
    dtype="bf16",
    zero_stage=2,
    gradient_checkpointing=True,
    encoder="google-bert/bert-base-uncased",
    encoder_pooling="cls",
    kl_beta=0.1,
    label_smoothing=0.0,
    micro_batch_size=4,
)


@pytest.mark.parametrize("constraint", RUNS)
def test_the_papers_runs(constraint):
    argv = ["--task", "alpaca", "--constraint", constraint, "--model", "m"]
    args = dataclasses.asdict(common.parse_args(dpo.Args, dpo.preset, argv))
    expected = ALL | RUNS[constraint]
    assert {k: args[k] for k in expected} == expected
    for ranks in (1, 2, 4, 8):
        resolved = dpo.Args(**args)
        accumulation = common.accumulation_steps(resolved, common.Process(0, ranks, CPU))
        assert ranks * accumulation * resolved.micro_batch_size == 32


def test_the_controls_need_their_values_on_dialogue(tokenizer):
    """The paper has no DPO run with a control: no value is made up for it."""
    pairs = make_pairs(tokenizer, TEXTS[0])
    for constraint, flags in (
        ("random", ["--random_low", "4", "--random_high", "5"]),
        ("fixed", ["--fixed_bound", "4"]),
    ):
        argv = ["--task", "alpaca", "--constraint", constraint, "--model", "m"]
        with pytest.raises(common.InputError, match=f"--constraint {constraint}: .* 0"):
            dpo.pair_bounds(pairs, common.parse_args(dpo.Args, dpo.preset, argv), 0)
        assert 4 <= dpo.pair_bounds(pairs, common.parse_args(dpo.Args, dpo.preset, argv + flags), 0).item() <= 5


def test_every_flag_is_read():
    source = open(dpo.__file__).read() + open(common.__file__).read()
    unread = [f.name for f in dataclasses.fields(dpo.Args) if not re.search(rf"args\.{f.name}\b", source)]
    assert unread == ["local_rank"]
