"""reward.py's parts, and the embedded task: encoded pairs, shared rows, bounds and metrics."""

import common

import json
import math

import numpy as np
import pytest
import torch
import toy_data
import transformers

import reward

CPU = torch.device("cpu")


def encoded(tokenizer, *texts: tuple[str, str, str], max_length: int = 1000) -> list[dict]:
    rows = [dict(zip(("prompt", "chosen", "rejected"), own)) for own in texts]
    return [common.encode_pair(row, tokenizer, max_length) for row in rows]


def columns(pairs: list[dict]) -> dict[str, list]:
    return {name: [own[name] for own in pairs] for name in pairs[0]}


# ---------------------------------------------------------------- pairs


@pytest.mark.parametrize(
    "texts, reason",
    [
        (("p\n", "yes", "yes"), "identical responses"),
        (("p\n", "yes", "yes</s>"), "identical responses"),  # once EOS ends them
        (("p\n", "yes " * 50, "no"), "longer than --max_length 20"),
        (("p\n", "no", "yes " * 50), "longer than --max_length 20"),
    ],
)
def test_pairs_that_cannot_be_used(tokenizer, texts, reason):
    with pytest.raises(common.Unusable, match=reason):
        encoded(tokenizer, texts, max_length=20)


def test_a_pair_as_long_as_the_limit_stays(tokenizer):
    (pair,) = encoded(tokenizer, ("p\n", "yes yes yes", "no"))
    length = len(pair["chosen_ids"])
    assert encoded(tokenizer, ("p\n", "yes yes yes", "no"), max_length=length) == [pair]
    with pytest.raises(common.Unusable):
        encoded(tokenizer, ("p\n", "yes yes yes", "no"), max_length=length - 1)


def test_the_prefix_is_the_longest_common_one(tokenizer):
    """What differs follows: "Aisle 3. Yes." and "Aisle 3. No." begin alike with prompt and "Aisle 3."."""
    first, second = encoded(
        tokenizer, ("Where?\n", "Aisle 3. Yes.", "Aisle 3. No."), ("Where?\n", "Aisle 3.", "Aisle 3. No.")
    )
    prefix, chosen, rejected = (first[name] for name in ("prefix", "chosen_ids", "rejected_ids"))
    assert chosen[:prefix] == rejected[:prefix] and chosen[prefix] != rejected[prefix]
    assert tokenizer.decode(chosen[:prefix]).strip() == "<s>Where?\nAisle 3."
    assert first["row_length"] == len(chosen) + len(rejected) - prefix
    assert len(second["chosen_ids"]) - second["prefix"] == 1  # one response begins the other: EOS is left to it
    lengths = [(len(own["chosen_ids"]), len(own["rejected_ids"]), own["prefix"]) for own in (first, second)]
    ratios = [min(c - p, r - p) / max(c - p, r - p) for c, r, p in lengths]
    pairs = columns([first, second])
    assert reward.similarities(pairs, reward.Args(), None).tolist() == pytest.approx(ratios)


# ---------------------------------------------------------------- shared rows

TEXTS = [
    ("Where is the milk?\n", "Aisle 3.", "You will find milk in aisle 2. Have a nice day!"),
    ("Hello! A longer question, much longer than others. Where are candles?\n", "Go to aisle 4.", "Go to aisle 2."),
    ("", "Yes.", "No."),
    ("Where?\n", "Aisle 3. We open at eight every morning. Thank you for asking!", "Aisle 3. We open at eight."),
    ("Where?\n", "Aisle 3.", "Aisle 3. No."),
]


def family_model(family: str, tokenizer, auto_class, **values):
    """A small random model of this architecture, nothing random in its training."""
    size = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    size |= dict(num_key_value_heads=2) if family == "qwen2" else {}
    size = size if family not in ("gpt2", "bloom") else dict(hidden_size=64, n_layer=2, n_head=4)
    noise = dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0) if family == "gpt2" else {}
    tokens = dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, initializer_range=0.1)
    torch.manual_seed(0)
    return auto_class.from_config(transformers.CONFIG_MAPPING[family](**size, **noise, **tokens, **values))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen2", "bloom"])
def test_scores_and_gradients_are_those_of_each_sequence_alone(process, tokenizer, family):
    """Of rows [prefix | chosen | rejected], and of rows apart, which are padded behind (ALiBi allows no others)."""
    model = family_model(family, tokenizer, transformers.AutoModelForSequenceClassification, num_labels=1)
    scorer, pairs = common.Scorer(model), encoded(tokenizer, *TEXTS)
    args = reward.Args(model=family, max_length=200)
    shares = common.check_model(scorer, scorer, args, process)
    assert shares == (family != "bloom")

    def gradient(scores):
        model.zero_grad()
        (scores[:, 0] - 2 * scores[:, 1]).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    sequences = [torch.tensor([own[side]]) for own in pairs for side in ("chosen_ids", "rejected_ids")]
    alone = torch.cat([model(ids).logits for ids in sequences]).view(-1, 2)
    assert alone.std() > 0.05
    expected = gradient(alone)
    for share in (True, False) if shares else (False,):
        batch = reward.collate(columns(pairs), tokenizer.pad_token_id, share, torch.float32, CPU)
        assert batch["input_ids"].shape[0] == (5 if share else 10)
        scores = scorer(**batch).logits.view(-1, 2)
        assert torch.allclose(scores, alone, atol=1e-4)
        assert torch.allclose(gradient(scores), expected, atol=1e-4 * expected.abs().max().item())


# ---------------------------------------------------------------- bounds and metrics


def test_bounds_of_each_constraint():
    """METHOD's formula at s = 1/4, 1/2 and 1: 20 / (s + 0.001) - 15. A random bound changes with the epoch only."""
    s = torch.tensor([0.25, 0.5, 1.0])
    for constraint in ("len_rat", "cos_sim"):
        bound = reward.pair_bounds(s, reward.Args(constraint=constraint))
        assert bound.tolist() == pytest.approx([20 / 0.251 - 15, 20 / 0.501 - 15, 20 / 1.001 - 15])
    assert reward.pair_bounds(s, reward.Args(constraint="fixed", fixed_bound=3)).tolist() == [3, 3, 3]
    assert reward.pair_bounds(s, reward.Args()).isnan().all()
    args = reward.Args(constraint="random", random_low=2, random_high=6)
    first, again, later = (reward.pair_bounds(torch.ones(20), args, epoch) for epoch in (3, 3, 4))
    assert torch.equal(first, again) and (first != later).all() and 2 <= first.min() < 3 and 5 < first.max() <= 6


def test_pair_metrics_by_hand():
    """Margins 2, -1, 6 and bounds 5, 5, 5: accuracy 2/3, mean 7/3, over the bound 1/3; deviations from 7/3 are
    -1/3, -10/3, 11/3, so the variance is (1 + 100 + 121) / 27 = 222/27."""
    chosen, rejected = torch.tensor([2.0, 0.0, 3.0]), torch.tensor([0.0, 1.0, -3.0])
    rank_loss, constraint_loss = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([2.0, 1.0, 0.0])
    values = reward.pair_metrics(chosen, rejected, torch.full((3,), 5.0), rank_loss, constraint_loss)
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
    unbounded = reward.pair_metrics(chosen, rejected, torch.full((3,), math.nan), rank_loss, 0 * rank_loss)
    assert [unbounded[k] for k in ("loss", "constraint_loss", "bound_mean", "over_bound")] == [1, None, None, None]


# ---------------------------------------------------------------- the embedded task


def test_data_is_what_the_generator_writes():
    files = toy_data.build()
    texts = {name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in files.items()}
    texts |= {f"toy/{name}": text for name, text in toy_data.build_toy(files).items()}
    there = {str(path.relative_to(common.DATA)): path for path in common.DATA.rglob("*") if path.is_file()}
    assert there.keys() == texts.keys()
    for name, text in texts.items():
        assert toy_data.same(there[name].read_text(encoding="utf-8"), text), name
    assert sum(path.stat().st_size for path in there.values()) < 1_000_000


@pytest.mark.parametrize(
    "response, score",
    [
        ("Aisle 2.", 4),
        ("Aisle 3.", -4),
        ("I am not sure.", -1),
        ("", -1),
        ("Of course! Go to aisle 2. Have a nice day!", 5),
        ("Aisle 2. We open at eight every morning.", 3.5),
        ("Are you blind? We keep milk in aisle 2.", 1.5),
        ("Aisle 2. Aisle 2.", 2.5),
        ("Aisle 2 blah.", 2),
    ],
)
def test_gold_score_by_hand(response, score):
    """Milk is in aisle 2. Right aisle 4, wrong -4, none -1; politeness 1 once, filler -0.5, rudeness -2.5, a repeated
    sentence -1.5, an unknown one -2."""
    assert toy_data.gold_score("Customer: Where do I find milk?\nClerk:\n", response) == score


def test_embedded_pairs_span_the_method(tokenizer):
    """Length ratios from 0.1 to 1, no prompt in two files, and labels as noisy as Bradley-Terry makes them."""
    rows, held_out = (
        [json.loads(line) for line in open(common.DATA / f"preference_{split}.jsonl")] for split in ("train", "eval")
    )
    assert not {row["prompt"] for row in held_out} & {row["prompt"] for row in rows}
    pairs = columns([common.encode_pair(row, tokenizer, 256) for row in rows])
    ratios = reward.similarities(pairs, reward.Args(), None)
    assert ratios.min() <= 0.1 and ratios.max() == 1
    golds = [[toy_data.gold_score(row["prompt"], row[side]) for side in ("chosen", "rejected")] for row in rows]
    gaps = np.array([chosen - rejected for chosen, rejected in golds if chosen != rejected])
    agree = np.mean(gaps > 0)
    assert agree == pytest.approx(np.mean(1 / (1 + np.exp(-np.abs(gaps)))), abs=0.03) and agree < 0.95
