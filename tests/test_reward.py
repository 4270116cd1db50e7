"""reward.py's parts: rows, tokens, order, the shared prefix, bounds, metrics, and the paper's settings."""

import dataclasses
import json
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
import transformers

import common
import reward
import toy_data
from reward import Pair, parse_pair

CPU = torch.device("cpu")


def make_pairs(tokenizer, *texts: tuple[str, str, str]) -> list[Pair]:
    dropped = Counter()
    kept = reward.tokenize([Pair(*t) for t in texts], tokenizer, 1000, dropped)
    assert not dropped
    return kept


# ---------------------------------------------------------------- rows


def test_alpaca_rows():
    row = {"instruction": "Name a bird.", "input": "", "output_1": "Owl", "output_2": "Cat", "preference": 2.0}
    assert parse_pair(row, "") == ("\n\nHuman: Name a bird.\n\nAssistant: ", "Cat", "Owl")
    assert parse_pair(row | {"preference": 1}, "")[1:] == ("Owl", "Cat")
    assert parse_pair(row | {"preference": 0}, "") == "tie"
    # The input follows the instruction, unless the instruction already ends with it.
    assert parse_pair(row | {"input": " Big."}, "")[0] == "\n\nHuman: Name a bird. Big.\n\nAssistant: "
    assert parse_pair(row | {"input": "bird."}, "")[0] == "\n\nHuman: Name a bird.\n\nAssistant: "


def test_summary_rows():
    row = {"info": {"post": "I lost it."}, "summaries": [{"text": "Lost."}, {"text": "Found."}], "choice": 1}
    prompt = (
        "\n\nHuman: Your task is to generate a short summary of a post.\n\nPost: I lost it.\n\nSummary: \n\nAssistant: "
    )
    assert parse_pair(row, "") == (prompt, "Found.", "Lost.")
    assert parse_pair(row | {"info": {"post": None, "article": "news"}}, "") == "missing text"


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"chosen": None}, "missing text"),
        ({"prompt": None}, "missing text"),
        ({"chosen": " \n"}, "empty response"),
        ({"chosen": "b"}, "identical responses"),
        ({}, ("p", "a", "b")),
    ],
)
def test_unusable_rows_are_named(change, reason):
    assert parse_pair({"prompt": "p", "chosen": "a", "rejected": "b"} | change, "") == reason


def test_tokens_are_those_that_generation_sees(tokenizer):
    """BOS once, prompt, response and EOS tokenized apart; special tokens written in the text are not doubled."""
    prompt, response = tokenizer("Where?\n", add_special_tokens=False).input_ids, tokenizer("Aisle 3.").input_ids[1:]
    plain, written = make_pairs(tokenizer, ("Where?\n", "Aisle 3.", "No."), ("<s>Where?\n", "Aisle 3.</s>", "No."))
    expected = [tokenizer.bos_token_id, *prompt, *response, tokenizer.eos_token_id]
    assert plain.chosen_ids.tolist() == written.chosen_ids.tolist() == expected


def test_no_bos_where_the_tokenizer_adds_none(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    plain = json.loads((tmp_path / "tokenizer.json").read_text()) | {"post_processor": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain))
    (pair,) = make_pairs(common.load_tokenizer(str(tmp_path), False), ("Where?\n", "Aisle 3.", "No."))
    assert pair.chosen_ids[0] == tokenizer("Where?\n", add_special_tokens=False).input_ids[0]


def test_dropped_by_length_and_after_tokenization(tokenizer):
    pairs = [Pair("p\n", "yes", "no"), Pair("p\n", "yes " * 50, "no"), Pair("p\n", "yes", "yes</s>")]
    kept = reward.tokenize(pairs, tokenizer, 20, dropped := Counter())
    assert [p.rejected for p in kept] == ["no"]
    assert dropped == {"longer than --max_length 20": 1, "identical responses": 1}


def test_the_prefix_is_the_longest_common_one(tokenizer):
    """The branches are what follows: "Aisle 3. Yes." and "Aisle 3. No." share prompt and "Aisle 3."."""
    first, second = make_pairs(
        tokenizer, ("Where?\n", "Aisle 3. Yes.", "Aisle 3. No."), ("Where?\n", "Aisle 3.", "Aisle 3. No.")
    )
    assert np.array_equal(first.chosen_ids[: first.prefix], first.rejected_ids[: first.prefix])
    assert tokenizer.decode(first.chosen_ids[: first.prefix]).strip() == "<s>Where?\nAisle 3."
    assert first.chosen_ids[first.prefix] != first.rejected_ids[first.prefix]
    assert second.branch_lengths[0] == 1  # one response begins the other: EOS is left to it
    assert first.branch_lengths == (len(first.chosen_ids) - first.prefix, len(first.rejected_ids) - first.prefix)


def test_pad_token_is_not_eos(toy, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "</s>", "unk_token": None}))
    lent = common.load_tokenizer(str(tmp_path), False)
    assert lent.pad_token == "<pad>" and len(lent) == len(tokenizer)


# ---------------------------------------------------------------- order


def test_order_is_a_function_of_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(10, 200, 1003)
    first = reward.global_batches(lengths, 8, seed=1, epoch=0)
    assert first.shape == (125, 8)
    assert len(set(first.flatten().tolist())) == 1000  # no row twice; 3 of 1,003 dropped
    assert np.array_equal(first, reward.global_batches(lengths, 8, seed=1, epoch=0))
    assert not np.array_equal(first, reward.global_batches(lengths, 8, seed=1, epoch=1))
    assert not np.array_equal(first, reward.global_batches(lengths, 8, seed=2, epoch=0))
    spread = np.ptp(lengths[first], axis=1).mean()
    assert spread < 0.1 * np.ptp(lengths)  # like lengths come together
    dropped = [set(range(1003)) - set(reward.global_batches(lengths, 8, 1, e).flatten().tolist()) for e in range(200)]
    assert np.mean([lengths[list(d)].mean() for d in dropped]) == pytest.approx(lengths.mean(), abs=10)  # any length


def test_random_bounds_change_with_the_epoch_only(tokenizer):
    args = reward.Args(constraint="random")
    pairs = make_pairs(tokenizer, *[("p\n", f"yes {i}", "no") for i in range(20)])
    assert torch.equal(reward.pair_bounds(pairs, args, 3), reward.pair_bounds(pairs, args, 3))
    assert not torch.equal(reward.pair_bounds(pairs, args, 3), reward.pair_bounds(pairs, args, 4))
    assert reward.pair_bounds(pairs, reward.Args(constraint="none"), 0) is None


# ---------------------------------------------------------------- the shared prefix

TEXTS = [
    ("Where is the milk?\n", "Aisle 3.", "You will find milk in aisle 2. Have a nice day!"),
    (
        "Hello! A longer question, much longer than the others. Where do I find candles?\n",
        "Go to aisle 4.",
        "Go to aisle 2.",
    ),
    ("", "Yes.", "No."),
    ("Where?\n", "Aisle 3. We open at eight every morning. Thank you for asking!", "Aisle 3. We open at eight."),
]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen2"])
def test_shared_rows_give_the_unshared_scores(tokenizer, family):
    """Scores and gradients of [prefix | chosen | rejected] are those of each sequence alone, without any padding."""
    kind = dict(
        llama=transformers.LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4
        ),
        gpt2=transformers.GPT2Config(n_embd=64, n_layer=3, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
        gpt_neox=transformers.GPTNeoXConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4
        ),
        qwen2=transformers.Qwen2Config(
            hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
        ),
    )[family]
    kind.update(
        dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, num_labels=1, initializer_range=0.1)
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(kind).eval()
    assert reward.can_share_prefix(model, 200)
    scorer, pairs = reward.Scorer(model), make_pairs(tokenizer, *TEXTS)
    results, gradients = [], []
    for share in (True, False):
        batch = reward.collate(pairs, tokenizer.pad_token_id, share, CPU)
        assert batch["input_ids"].shape[0] == (4 if share else 8)
        scores = scorer(**batch)
        (scores[0] - scores[1]).square().sum().backward()
        results.append(scores.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        model.zero_grad()
    with torch.no_grad():
        alone = [
            [model(torch.from_numpy(ids)[None].long()).logits.item() for ids in (p.chosen_ids, p.rejected_ids)]
            for p in pairs
        ]
    alone = torch.tensor(alone).T
    assert results[0].std() > 0.05
    assert torch.allclose(results[0], alone, atol=1e-4)
    assert torch.allclose(results[1], alone, atol=1e-4)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-4 * gradients[1].abs().max().item())


def test_the_mask_by_hand(tokenizer):
    """prefix [a b], chosen [c], rejected [d e], one place of padding behind: who sees whom, and from which positions."""
    pair = Pair("", "", "", np.array([5, 6, 7], np.int32), np.array([5, 6, 8, 9], np.int32), prefix=2)
    longer = Pair("", "", "", np.array([5, 6, 7, 8], np.int32), np.array([5, 6, 8, 9], np.int32), prefix=2)
    batch = reward.collate([pair, longer], 0, True, CPU)
    assert batch["input_ids"][0].tolist() == [5, 6, 7, 8, 9, 0]
    assert batch["position_ids"][0, :5].tolist() == [0, 1, 2, 2, 3]
    assert batch["ends"].tolist() == [[2, 9], [4, 11]]
    sees = [[j for j in range(6) if batch["attention_mask"][0, 0, i, j]] for i in range(5)]
    assert sees == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 4]]
    assert batch["attention_mask"][0, 0, 5].any()  # a query that saw nothing would be NaN


def test_the_cheaper_form_is_taken():
    """Prefix 1, branches 30 and 2: shared 33 places in one row, apart 2 x 31 = 62. With a second pair of 2 and 30, both
    forms pad: shared 2 x 33, apart 4 x 31. A single token of prefix and two branches of 30: 61 against 62, shared; an
    empty prefix: 60 against 60, apart, which needs no mask."""
    ids = np.arange(1, 100, dtype=np.int32)
    wide = Pair("", "", "", ids[:31], np.concatenate([ids[:1], ids[50:52]]), prefix=1)
    even = Pair("", "", "", ids[:31], np.concatenate([ids[:1], ids[50:80]]), prefix=1)
    empty = Pair("", "", "", ids[:30], ids[50:80], prefix=0)
    shapes = [reward.collate(pairs, 0, True, CPU)["input_ids"].shape for pairs in ([wide], [even], [empty])]
    assert [tuple(s) for s in shapes] == [(1, 33), (1, 61), (2, 30)]


def test_models_that_cannot_share_do_not(tokenizer):
    def can(config, max_length=200):
        config.num_labels = 1
        with torch.device("meta"):
            return reward.can_share_prefix(
                transformers.AutoModelForSequenceClassification.from_config(config), max_length
            )

    small = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    assert not can(transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2))  # ALiBi, no positions
    mistral = transformers.MistralConfig(**small, num_key_value_heads=2, intermediate_size=64, sliding_window=100)
    assert can(mistral, 100) and not can(mistral, 101)


# ---------------------------------------------------------------- metrics


def test_pair_metrics_by_hand():
    """Margins 2, -1, 6 and bounds 5, 5, 5: accuracy 2/3, mean 7/3, over the bound 1/3; deviations from 7/3 are
    -1/3, -10/3, 11/3, so the variance is (1 + 100 + 121) / 27 = 222/27."""
    chosen, rejected = torch.tensor([2.0, 0.0, 3.0]), torch.tensor([0.0, 1.0, -3.0])
    loss, rank_loss = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([1.0, 1.0, 1.0])
    values = reward.pair_metrics(chosen, rejected, torch.full((3,), 5.0), loss, rank_loss)
    assert values == pytest.approx(
        dict(
            loss=2,
            rank_loss=1,
            constraint_loss=1,
            accuracy=2 / 3,
            margin_mean=7 / 3,
            margin_std=math.sqrt(222 / 27),
            margin_max=6,
            bound_mean=5,
            over_bound=1 / 3,
            chosen_score=5 / 3,
            rejected_score=-2 / 3,
            score_std=math.sqrt((4 + 0 + 9 + 0 + 1 + 9) / 6 - (3 / 6) ** 2),
        )
    )
    unbounded = reward.pair_metrics(chosen, rejected, torch.full((3,), math.nan), rank_loss, rank_loss)
    assert [unbounded[k] for k in ("constraint_loss", "bound_mean", "over_bound")] == [None] * 3


# ---------------------------------------------------------------- the paper's runs

# METHOD: β1, β2, β3 or the control's values; the rest by task.
RUNS = {
    ("alpaca", "none"): {},
    ("alpaca", "cos_sim"): dict(beta1=20, beta2=0.001, beta3=-15),
    ("alpaca", "len_rat"): dict(beta1=20, beta2=0.001, beta3=-15),
    ("alpaca", "random"): dict(random_low=4, random_high=5),
    ("alpaca", "fixed"): dict(fixed_bound=4.5),
    ("tldr", "none"): {},
    ("tldr", "cos_sim"): dict(beta1=30, beta2=0.001, beta3=-25),
    ("tldr", "len_rat"): dict(beta1=10, beta2=0.001, beta3=-5),
    ("tldr", "random"): dict(random_low=5, random_high=6),
    ("tldr", "fixed"): dict(fixed_bound=5),
}
TABLE = {
    "alpaca": dict(max_length=512, global_batch_size=16, learning_rate=3e-6),
    "tldr": dict(max_length=1024, global_batch_size=64, learning_rate=1e-6),
}
ALL = dict(
    weight_decay=0.1,
    epochs=1,
    warmup_steps=0,
    seed=42,
    dtype="bf16",
    zero_stage=2,
    gradient_checkpointing=True,
    encoder="google-bert/bert-base-uncased",
    encoder_pooling="cls",
)


@pytest.mark.parametrize("task, constraint", RUNS)
def test_the_papers_runs(task, constraint):
    argv = ["--task", task, f"--constraint={constraint}", "--model", "m"]
    args = dataclasses.asdict(common.parse_args(reward.Args, reward.preset, argv))
    expected = ALL | TABLE[task] | RUNS[task, constraint] | {"task": task, "constraint": constraint}
    assert {k: args[k] for k in expected} == expected
    assert args["ranked_dataset"] == ""
    # The table's global batch on any usual number of ranks.
    for ranks in (1, 2, 4, 8):
        resolved = reward.Args(**args)
        accumulation = common.accumulation_steps(resolved, common.Process(0, ranks, CPU))
        assert ranks * accumulation * resolved.micro_batch_size == args["global_batch_size"]


def test_flags_win_over_the_task():
    argv = ["--task", "tldr", "--constraint", "cos_sim", "--model", "m", "--beta1", "7", "--no_gradient_checkpointing"]
    args = common.parse_args(reward.Args, reward.preset, argv + ["--dataset", "x.jsonl"])
    assert (args.beta1, args.beta3, args.gradient_checkpointing) == (7, -25, False)
    assert (args.dataset, args.eval_dataset, args.ranked_dataset) == ("x.jsonl", "", "")  # the task's own is cancelled
    args = common.parse_args(reward.Args, reward.preset, ["--dataset", "x.jsonl", "--eval_dataset", "y.jsonl"])
    assert (args.eval_dataset, args.ranked_dataset) == ("y.jsonl", "")
    args = common.parse_args(reward.Args, reward.preset, ["--eval_dataset", "y.jsonl"])
    assert args.dataset.endswith("preference_train.jsonl") and args.ranked_dataset == ""


def test_schedule_and_optimizer(process, toy):
    """Cosine from the peak to 0 at the last step that is run; no decay on biases and norm weights."""
    args = reward.Args(model=toy, learning_rate=1.0, weight_decay=0.1, micro_batch_size=1, global_batch_size=1)
    config = common.engine_config(args, 1)
    model = reward.load_reward_model(args, common.load_tokenizer(toy, False), config)
    engine = common.make_engine(reward.Scorer(model), args, config, 4, process)
    assert [engine.lr_scheduler.lr_lambdas[0](i) for i in range(5)] == pytest.approx(
        [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(5)]
    )
    groups = engine.optimizer.param_groups
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0] and groups[0]["betas"] == (0.9, 0.95)
    assert {p.ndim for p in groups[0]["params"]} == {2} and {p.ndim for p in groups[1]["params"]} == {1}


# ---------------------------------------------------------------- the embedded task


def test_data_is_what_the_generator_writes():
    for name, rows in toy_data.build().items():
        assert (common.DATA / name).read_text() == "".join(json.dumps(row) + "\n" for row in rows), name
    assert sum(path.stat().st_size for path in common.DATA.iterdir()) < 1_000_000


def test_gold_score_by_hand():
    """Milk is in aisle 2. Right aisle 4, wrong -4, none -1; politeness 1 once, filler -0.5, rudeness -2.5, a repeated
    sentence -1.5, an unknown one -2."""
    prompt = "Customer: Where do I find milk?\nClerk:\n"
    for response, score in [
        ("Aisle 2.", 4),
        ("Aisle 3.", -4),
        ("I am not sure.", -1),
        ("", -1),
        ("Of course! Go to aisle 2. Have a nice day!", 5),
        ("Aisle 2. We open at eight every morning.", 3.5),
        ("Are you blind? We keep milk in aisle 2.", 1.5),
        ("Aisle 2. Aisle 2.", 2.5),
        ("Aisle 2 blah.", 2),
    ]:
        assert toy_data.gold_score(prompt, response) == score, response


def test_embedded_pairs_span_the_method(tokenizer):
    """Half near copies, length ratios from 0.1 to 1, no prompt in two files, noisy labels."""
    rows = [json.loads(line) for line in open(common.DATA / "preference_train.jsonl")]
    held_out = {json.loads(line)["prompt"] for line in open(common.DATA / "preference_eval.jsonl")}
    assert not held_out & {row["prompt"] for row in rows}
    pairs = make_pairs(tokenizer, *[(r["prompt"], r["chosen"], r["rejected"]) for r in rows])
    ratios = [min(p.branch_lengths) / max(p.branch_lengths) for p in pairs]
    assert min(ratios) <= 0.1 and max(ratios) == 1
    golds = [
        toy_data.gold_score(r["prompt"], r["chosen"]) - toy_data.gold_score(r["prompt"], r["rejected"]) for r in rows
    ]
    agree = np.mean([g > 0 for g in golds if g != 0])
    expected = np.mean([1 / (1 + math.exp(-abs(g))) for g in golds if g != 0])  # Bradley-Terry
    assert agree == pytest.approx(expected, abs=0.03) and agree < 0.95


def test_every_flag_is_read():
    source = open(reward.__file__).read() + open(common.__file__).read()
    unread = [f.name for f in dataclasses.fields(reward.Args) if not re.search(rf"args\.{f.name}\b", source)]
    assert unread == ["local_rank"]
