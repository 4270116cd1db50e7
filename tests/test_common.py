"""common.py: rows and tokens, batches, caches, metrics, log-probabilities, models, an optimizer's step, sampling."""

import common

import functools
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import transformers
from helpers import lines, rows_file
from ranks import on_two_ranks
from tokenizers.processors import TemplateProcessing

CPU = torch.device("cpu")
NONE = common.NO_LABEL
PLAIN = dict(prompt="p", chosen="a", rejected="b")


# ---------------------------------------------------------------- rows

FARM = dict(instruction="Name a bird.", input="", output_1="Owl", output_2="Cat", preference=2.0)
POST = dict(info={"post": "I lost it."}, summaries=[{"text": "Lost."}, {"text": "Found."}], choice=1)
BIRD = "\n\nHuman: Name a bird.\n\nAssistant: "
TASK = "\n\nHuman: Your task is to generate a short summary of a post."
SUMMARY = f"{TASK}\n\nPost: I lost it.\n\nSummary: \n\nAssistant: "


def outcome(function, row: dict):
    """What the function makes of a row, or why the row cannot be used."""
    try:
        return function(row)
    except common.Unusable as error:
        return str(error)


@pytest.mark.parametrize(
    "row, expected",
    [
        (PLAIN, ("p", "a", "b")),
        (PLAIN | dict(prompt=""), ("", "a", "b")),
        (PLAIN | dict(prompt=None), "missing text"),
        (PLAIN | dict(chosen=None), "missing text"),
        (PLAIN | dict(chosen=" \n"), "empty response"),
        (PLAIN | dict(rejected=""), "empty response"),
        (FARM, (BIRD, "Cat", "Owl")),
        (FARM | dict(preference=1), (BIRD, "Owl", "Cat")),
        (FARM | dict(preference=0), "tie"),
        (FARM | dict(output_1=None), "missing text"),
        (FARM | dict(instruction=None), "missing text"),
        (POST, (SUMMARY, "Found.", "Lost.")),
        (POST | dict(choice=0), (SUMMARY, "Lost.", "Found.")),
        (POST | dict(info={"post": None, "article": "news"}), "missing text"),
    ],
)
def test_preferences_of_every_format(row, expected):
    assert outcome(common.preference_of, row) == expected


DEMONSTRATION = dict(instruction="Name a bird.", input=None, output="Owl")


@pytest.mark.parametrize(
    "row, expected",
    [
        (dict(prompt="p", completion="c"), ("p", "c")),
        (dict(prompt=None, completion="c"), "missing text"),
        (dict(prompt="p", completion=" "), "empty response"),
        (DEMONSTRATION, (BIRD, "Owl")),
        (DEMONSTRATION | dict(output=None), "missing text"),
        (dict(id="7", post="I lost it.", summary="Lost."), (SUMMARY, "Lost.")),
        (dict(post=None, summary="Lost."), "missing text"),
    ],
)
def test_demonstrations_of_every_format(row, expected):
    assert outcome(common.demonstration_of, row) == expected


@pytest.mark.parametrize(
    "instruction, extra, joined",
    [
        ("Name a bird.", None, "Name a bird."),
        ("Name a bird.", " Big.", "Name a bird. Big."),
        ("Name a bird.", "bird.", "Name a bird."),
        ("Name a\nbird.", "bird.", "Name a\nbird."),
        ("Name a bird.", "Name a bird.", "Name a bird."),
        ("Spell the word", "d", "Spell the wordd"),
        ("Is 4 even?", "?", "Is 4 even??"),
    ],
)
def test_an_input_follows_unless_the_instruction_repeats_it_as_a_whole(instruction, extra, joined):
    assert common.prompt_of(dict(instruction=instruction, input=extra)) == f"\n\nHuman: {joined}\n\nAssistant: "


def test_every_file_format(process, tmp_path):
    """A file may name its rows' splits in a column, a folder its files'; without :SPLIT the file is used whole."""
    rows = [PLAIN | dict(split=split) for split in ("train", "valid2", "valid2")]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "folder").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "folder" / "train.parquet"))
    datasets.Dataset.from_list(rows[:1]).to_parquet(str(tmp_path / "folder" / "test.parquet"))
    shutil.copy(tmp_path / "folder" / "train.parquet", tmp_path / "a.parquet")
    counts = {"a.json": 3, "a.jsonl": 3, "a.parquet": 3, "a.jsonl:valid2": 2, "?.jsonl": 3, "folder": 3}
    counts |= {"folder:test": 1}
    for name, count in counts.items():
        assert len(common.read_rows("--dataset", str(tmp_path / name), "train")) == count, name
    assert len(common.read_rows("--eval_dataset", str(tmp_path / "folder"), "test")) == 1


# ---------------------------------------------------------------- tokens


def changed(tokenizer, folder, processor=None, **config):
    """The tokenizer, loaded anew with another post-processor and other values in its tokenizer_config.json."""
    tokenizer.save_pretrained(folder)
    for name, values in (("tokenizer.json", dict(post_processor=processor)), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))
    return common.load_tokenizer(str(folder), False)


def test_tokens_are_those_that_generation_sees(tokenizer):
    """BOS once, prompt, response and EOS tokenized apart; special tokens written in the text are not doubled."""
    texts = ["Where?\n", "Aisle 3.", "No."]
    prompt, first, second = tokenizer(texts, add_special_tokens=False).input_ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    expected = [[bos, *prompt], [*first, eos], [*second, eos]]
    assert common.tokenize(tokenizer, *texts) == expected
    assert common.tokenize(tokenizer, "<s>Where?\n", "Aisle 3.</s>", "No.") == expected


@pytest.mark.parametrize("template, before", [(None, []), ("<s> <pad> $A </s>", ["<s>", "<pad>"]), ("$A </s>", [])])
def test_before_a_prompt_stands_what_the_tokenizer_puts_there(tokenizer, tmp_path, template, before):
    """Nothing, BOS, or more than BOS; and never what it puts behind a text, which would stand before the response."""
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>", "<pad>")]
    processor = template and json.loads(TemplateProcessing(single=template, special_tokens=special).__getstate__())
    tokenizer = changed(tokenizer, tmp_path, processor)
    plain = tokenizer("Where?\n", add_special_tokens=False).input_ids
    prompt, _ = common.tokenize(tokenizer, "Where?\n", "No.")
    assert prompt == tokenizer.convert_tokens_to_ids(before) + plain


@pytest.mark.parametrize(
    "config, lent",
    [
        (dict(pad_token="</s>"), "<pad>"),
        (dict(pad_token=None), "<pad>"),
        (dict(pad_token=None, unk_token="<pad>"), "<pad>"),  # as Llama-2's <unk>
        (dict(pad_token="<pad>"), "<pad>"),
    ],
)
def test_padding_is_not_eos_and_no_token_is_added(tokenizer, tmp_path, config, lent):
    other = changed(tokenizer, tmp_path, **config)
    assert other.pad_token == lent and len(other) == len(tokenizer)


# ---------------------------------------------------------------- data sets


def pairs_of(*per_prompt: int) -> list[dict]:
    return [dict(prompt=f"{p}\n", chosen=f"yes {i}", rejected="no") for p, n in enumerate(per_prompt) for i in range(n)]


def load(process, tokenizer, data: str, eval_data: str = "", seed: int = 1, epochs: int = 1, encode=common.encode_pair):
    args = SimpleNamespace(dataset=data, eval_dataset=eval_data, seed=seed, epochs=epochs)
    encode = functools.partial(encode, tokenizer=tokenizer, max_length=40)
    return common.load_data(args, encode, process)


def test_prompts_are_held_out_not_rows(process, tokenizer, tmp_path):
    """10 % of the rows, as few more as their prompts have: all rows of a prompt are on one side, chosen by the seed."""
    data, splits = rows_file(tmp_path, *pairs_of(*[1, 7, 2] * 20)), []
    for seed in (1, 1, 2):
        train, held_out = load(process, tokenizer, data, seed=seed)
        assert len(train) + len(held_out) == 200 and 20 <= len(held_out) < 20 + 7
        assert not set(train["prompt"]) & set(held_out["prompt"])
        assert len(set(zip(*(train[c][:] + held_out[c][:] for c in ("prompt", "chosen"))))) == 200
        splits.append(held_out["prompt"][:])
    assert splits[0] == splits[1] != splits[2]
    train, held_out = load(process, tokenizer, data, epochs=0)  # evaluated alone: what training held out
    assert len(train) == 0 and held_out["prompt"][:] == splits[0]


def test_rows_are_encoded_once_and_again_when_something_changes(process, tokenizer, tmp_path, capsys):
    """A later start reads the encoded rows, and says of the dropped ones what the first said."""
    seen = []

    def encode(row, tokenizer, max_length):
        seen.append(row["prompt"])
        return common.encode_pair(row, tokenizer, max_length)

    rows = [PLAIN, PLAIN | dict(chosen="yes " * 50), PLAIN | dict(chosen="b"), PLAIN | dict(prompt="q")]
    data, said = rows_file(tmp_path, *rows), []
    for count in (8, 0):  # the file twice, as training and as held-out data
        seen.clear()
        capsys.readouterr()
        train, held_out = load(process, tokenizer, data, data, encode=encode)
        assert len(seen) == count and train["prompt"][:] == held_out["prompt"][:] == ["p", "q"]
        assert train.features["chosen_ids"].feature.dtype == "int32"
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "2 rows; dropped 2: 1 longer than --max_length 40, 1 identical" in said[0]
    rows_file(tmp_path, *rows, PLAIN | dict(prompt="r"))
    assert load(process, tokenizer, data, data, encode=encode)[0]["prompt"][:] == ["p", "q", "r"]
    other = changed(tokenizer, tmp_path / "other")  # no BOS
    assert load(process, other, data, data, encode=encode)[0]["chosen_ids"][0] == train["chosen_ids"][0][1:]
    assert len(seen) == 20


def test_where_nothing_can_be_kept_the_rows_are_the_same(process, tokenizer, tmp_path, monkeypatch, capsys):
    data = rows_file(tmp_path, *pairs_of(2, 1))
    kept = load(process, tokenizer, data, data)
    (tmp_path / "file").touch()
    monkeypatch.setenv("PCRM_CACHE", str(tmp_path / "file"))  # no folder can be made here
    again = load(process, tokenizer, data, data)
    assert [rows.to_list() for rows in again] == [rows.to_list() for rows in kept]
    assert "warning" in capsys.readouterr().out


def test_ranked_responses(process, tokenizer, tmp_path):
    """Each response is the chosen one of a pair once; prompts with two responses, or with one that cannot be used, are
    left out whole."""
    ranked = [
        dict(prompt="p", responses=["a", "b", "c"], scores=[1, 2, 3]),
        dict(prompt="q", responses=["a", "b"], scores=[1, 2]),
        dict(prompt="r", responses=["a", "b " * 50, "c"], scores=[1, 2, 3]),
        dict(prompt="s", responses=["d", "e", "f", "g"], scores=[2, 2, 2, 1.5]),
    ]
    args = SimpleNamespace(ranked_dataset=rows_file(tmp_path, *ranked))
    encode = functools.partial(common.encode_pair, tokenizer=tokenizer, max_length=40)
    rows, human = common.load_ranked(args, encode, process)
    assert human == [[1, 2, 3], [2, 2, 2, 1.5]]
    assert list(zip(rows["prompt"], rows["chosen"])) == [("p", r) for r in "abc"] + [("s", r) for r in "defg"]
    assert common.load_ranked(SimpleNamespace(ranked_dataset=""), encode, process) == (None, [])


def test_rank_correlations_by_hand():
    """Ranks 1 2 3 against 1 3 2: Spearman 1 - 6 · 2 / 24 = 1/2, Kendall (2 - 1) / 3. Reversed: -1 both. Equal human
    scores order nothing and do not count. The means of 1/2 and -1, and of 1/3 and -1: -1/4 and -1/3."""
    values = common.rank_correlations([0.1, 5, 4, 1, 2, 3, 9, 8, 7], [[1, 2, 3], [5, 5, 5], [10, 20, 30]])
    assert values == pytest.approx(dict(ranked_spearman=-1 / 4, ranked_kendall=-1 / 3))
    assert common.rank_correlations([], []) == dict(ranked_spearman=None, ranked_kendall=None)


# ---------------------------------------------------------------- batches


def test_order_is_a_function_of_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(10, 200, 1003)
    first = common.global_batches(lengths, 8, seed=1, epoch=0)
    assert first.shape == (125, 8)
    assert len(set(first.flatten().tolist())) == 1000  # no row twice; 3 of 1,003 dropped
    assert np.array_equal(first, common.global_batches(lengths, 8, seed=1, epoch=0))
    assert not np.array_equal(first, common.global_batches(lengths, 8, seed=1, epoch=1))
    assert not np.array_equal(first, common.global_batches(lengths, 8, seed=2, epoch=0))
    assert np.ptp(lengths[first], axis=1).mean() < 0.1 * np.ptp(lengths)  # like lengths come together
    means = lengths[first].mean(1)
    assert abs(np.corrcoef(means, np.arange(125))[0, 1]) < 0.3  # and are not ordered by length
    dropped = [set(range(1003)) - set(common.global_batches(lengths, 8, 1, e).flatten().tolist()) for e in range(200)]
    assert np.mean([lengths[list(d)].mean() for d in dropped]) == pytest.approx(lengths.mean(), abs=10)  # any length


def test_steps_and_micro_batches():
    """3 epochs of 35 rows in batches of 8 are 3 · 4 steps. Of a batch of 16, 2 ranks get 8 each, in 2 micro batches of
    4; a micro batch is no larger than a rank's share."""
    args = SimpleNamespace(epochs=3, global_batch_size=8, max_steps=0)
    assert common.total_steps(args, 35) == 12
    assert common.total_steps(SimpleNamespace(epochs=3, global_batch_size=8, max_steps=5), 35) == 5
    assert common.total_steps(SimpleNamespace(epochs=0, global_batch_size=8, max_steps=0), 0) == 0
    for micro, ranks, expected in ((4, 2, (4, 2)), (32, 2, (8, 1)), (16, 1, (16, 1)), (3, 16, (1, 1))):
        args = SimpleNamespace(global_batch_size=16, micro_batch_size=micro)
        accumulation = common.accumulation_steps(args, common.Process(0, ranks, CPU))
        assert (args.micro_batch_size, accumulation) == expected


def test_what_rows_predict_by_hand():
    """Rows a b | c d and a | b, responses from 2 and from 1: c at the place of b, d at that of c; b at that of a."""
    batch = common.collate_rows([[5, 6, 7, 8], [5, 6]], [2, 1], 0, CPU)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 6, 0, 0]]
    assert batch["labels"].tolist() == [[NONE, 7, 8, NONE], [6, NONE, NONE, NONE]]


def pair(chosen, rejected) -> dict:
    prefix = min(len(os.path.commonprefix([chosen, rejected])), len(chosen) - 1, len(rejected) - 1)
    return dict(chosen_ids=chosen, rejected_ids=rejected, prefix=prefix)


def collate(*pairs: dict, share: bool = True, dtype=torch.float32):
    columns = {name: [own[name] for own in pairs] for name in pairs[0]}
    return common.collate_pairs(columns, 0, share, dtype, CPU)


def test_a_shared_row_by_hand():
    """a b c and a b d e fork one token before they differ: row a b c b d e, where b c is chosen and b d e rejected, and
    one place of padding behind. Who sees whom, what each predicts, and from which positions."""
    inputs, labels, branch, positions = collate(pair([5, 6, 7], [5, 6, 8, 9]), pair([5, 6, 7, 7], [5, 6, 8, 9]))
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 6, 8, 9, 0], [5, 6, 7, 7, 6, 8, 9]]
    assert labels.tolist() == [[6, 7, NONE, 8, 9, NONE, NONE], [6, 7, 7, NONE, 8, 9, NONE]]
    assert branch[0].tolist() == [0, 1, 1, 2, 2, 2, -1]
    assert positions[0, :6].tolist() == inputs["position_ids"][0, :6].tolist() == [0, 1, 2, 1, 2, 3]
    mask = inputs["attention_mask"]
    assert mask.shape == (2, 1, 7, 7) and set(mask.unique().tolist()) == {0, torch.finfo(torch.float32).min}
    sees = [[j for j in range(7) if mask[0, 0, i, j] == 0] for i in range(7)]
    assert sees[:6] == [[0], [0, 1], [0, 1, 2], [0, 3], [0, 3, 4], [0, 3, 4, 5]]
    assert sees[6]  # a query that saw nothing would be NaN


@pytest.mark.parametrize("share", [True, False])
def test_each_token_once_from_its_own_context_and_position(share):
    """1,000 random pairs, 1 to 4 a batch: every token but a sequence's first is predicted once (a common beginning once
    for both, in a shared row), from all tokens before it, in order, at its own position."""
    rng, shared = np.random.default_rng(0), 0
    for _ in range(400):
        pairs = []
        while len(pairs) < rng.integers(1, 5):
            first, *rest = (rng.integers(1, 4, rng.integers(1, 12)).tolist() for _ in range(3))
            chosen, rejected = (first + own for own in rest) if rng.random() < 0.8 else rest
            if chosen != rejected:
                pairs.append(pair(chosen, rejected))
        inputs, labels, branch, positions = collate(*pairs, share=share, dtype=torch.bfloat16)
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        shared += mask is not None
        assert mask is None or mask.dtype == torch.bfloat16 and torch.equal(inputs["position_ids"], positions)
        each, found = len(labels) // len(pairs), []
        for row, place in (labels != NONE).nonzero().tolist():
            seen = range(place + 1) if mask is None else (mask[row, 0, place] == 0).nonzero().flatten().tolist()
            assert positions[row, seen].tolist() == list(range(len(seen)))
            text = ids[row, seen].tolist() + labels[row, [place]].tolist()
            for side in {0: (1, 2), 1: (1,), 2: (2,)}[branch[row, place].item()]:
                found.append((row // each, side, text))
        expected = [
            (number, side, ids[:end])
            for number, own in enumerate(pairs)
            for side, ids in ((1, own["chosen_ids"]), (2, own["rejected_ids"]))
            for end in range(2, len(ids) + 1)
        ]
        assert sorted(found) == sorted(expected)
        ends = (labels == NONE) & (branch >= 0)  # where a reward model's head looks
        last = [own[side][-1] for own in pairs for side in ("chosen_ids", "rejected_ids")]
        assert ids[ends].tolist() == last and branch[ends].tolist() == [1, 2] * len(pairs)
    assert shared > 200 if share else shared == 0


def test_the_cheaper_form_is_taken():
    """Prefix 1, branches 30 and 2: shared at most 34 places, apart 2 · 31. Prefix 2 and two branches of 29: shared 61,
    apart 2 · 31. No prefix: 62 and 62, apart, which needs no mask. A batch pads to its longest row."""
    ids = list(range(1, 100))
    wide, even = pair(ids[:31], ids[:1] + ids[50:52]), pair(ids[:31], ids[:2] + ids[50:79])
    none = pair(ids[:31], ids[50:81])
    assert len(collate(wide)[1]) == 1 and collate(wide)[1].shape[1] <= 34
    shapes = [tuple(collate(*pairs)[1].shape) for pairs in ([even], [none], [wide, none], [wide, even])]
    assert shapes == [(1, 61), (2, 31), (4, 31), (2, 61)]


def test_values_of_all_rows_come_in_their_order(process):
    """Batches are of like lengths, the longest first; 5 rows in micro batches of 2, whose results are put back."""
    rows = datasets.Dataset.from_dict(dict(number=[1.0, 2.0, 3.0, 4.0, 5.0], row_length=[3, 9, 1, 9, 4]))
    module, sizes = torch.nn.Linear(1, 1), []

    def forward(columns):
        assert not module.training
        sizes.append(columns["row_length"])
        return torch.tensor([[n, n * n] for n in columns["number"]], dtype=torch.bfloat16)

    found = common.over_rows(module, forward, rows, SimpleNamespace(micro_batch_size=2), process)
    assert found.dtype == torch.float32 and found.tolist() == [[n, n * n] for n in (1, 2, 3, 4, 5)]
    assert sizes == [[9, 9], [4, 3], [1]] and module.training
    with pytest.raises(common.InputError, match="not finite"):
        broken = SimpleNamespace(micro_batch_size=1)
        common.over_rows(module, lambda _: torch.tensor([[math.nan]]), rows, broken, process)


# ---------------------------------------------------------------- caches and metrics


def test_what_is_cached_is_computed_once(process, tmp_path, monkeypatch, capsys):
    """For the same kind, content and libraries; a file that was cut short is made again, with a word."""
    monkeypatch.setenv("PCRM_CACHE", str(tmp_path))
    computed = []

    def compute():
        computed.append(1)
        return torch.tensor([[0.1, math.nan], [3.0, 4.0]])

    def calls(kind: str = "kind", content=("a", 1)) -> int:
        before = len(computed)
        found = common.cached(kind, lambda: list(content), compute, process)
        assert found.dtype == torch.float32 and torch.equal(found.nan_to_num(7), compute().nan_to_num(7))
        return len(computed) - before - 1

    assert [calls(), calls(), calls(content=("a", 2)), calls("other"), calls()] == [1, 0, 1, 1, 0]
    for library in (torch, transformers):
        with monkeypatch.context() as patch:
            patch.setattr(library, "__version__", "0")
            assert [calls(), calls()] == [1, 0]
    for path in tmp_path.rglob("*.npy"):
        path.write_bytes(path.read_bytes()[:20])
    capsys.readouterr()
    assert [calls(), calls()] == [1, 0]
    assert capsys.readouterr().out.count("made again") == 1
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("name, tokens", [("model.safetensors", False), ("tokenizer.json", True), ("own.py", True)])
def test_a_models_version_is_that_of_its_files(toy, tmp_path, name, tokens):
    """Other weights are another model with the same tokenizer; its tokenizer's files and its own code change both."""
    shutil.copytree(toy, tmp_path / "a")
    (tmp_path / "a" / "own.py").write_text("# code\n")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.copytree(tmp_path / "a", tmp_path / "same")
    with open(tmp_path / "b" / name, "ab") as file:
        file.write(b"\n")
    for weights, differs in ((True, True), (False, tokens)):
        a, b, same = (common.model_version(str(tmp_path / folder), weights=weights) for folder in ("a", "b", "same"))
        assert a == same and (a != b) == differs


def test_metrics_are_means_since_the_last_line_and_rates_without_pauses(process, tmp_path, monkeypatch):
    """Lines at step 1, at every second and at the last. A step takes 2 seconds, the pause after step 3 takes 100."""
    now = [0.0]
    monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    args = SimpleNamespace(log_every=2)
    metrics = common.Metrics(tmp_path, process, args, 5, ("loss",), derived=lambda v: {"double": 2 * v["loss"]})
    wrote = []
    for step, loss in enumerate((1.0, 2.0, 4.0, 8.0, math.inf), 1):
        now[0] += 2
        values = dict(loss=torch.tensor(loss), bound=None if step == 4 else 3)
        wrote.append(metrics.add(step, values, pairs=step, tokens=10 * step))
        if step == 3:
            with metrics.paused():
                now[0] += 100
                metrics.write(step, "eval", dict(loss=9.0))
    metrics.close()
    assert wrote == [True, True, False, True, True]
    expected = [
        dict(step=1, split="train", loss=1, bound=3, pairs_per_s=1 / 2, tokens_per_s=5, double=2),
        dict(step=2, split="train", loss=2, bound=3, pairs_per_s=2 / 2, tokens_per_s=10, double=4),
        dict(step=3, split="eval", loss=9, double=18),
        dict(step=4, split="train", loss=6, bound=None, pairs_per_s=7 / 4, tokens_per_s=17.5, double=12),
        dict(step=5, split="train", loss=None, bound=3, pairs_per_s=5 / 2, tokens_per_s=25, double=None),
    ]
    assert lines(tmp_path / "metrics.jsonl") == expected and list((tmp_path / "tensorboard").iterdir())


# ---------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype, error", [(torch.float32, 2e-6), (torch.bfloat16, 3 * 2**-8)])
def test_target_logps(dtype, error, temperature):
    """log softmax(x / t) of the target, and its gradient (onehot - π) / t, in 64 bits from the same logits; 70 rows are
    more than two pieces of 32.

    bf16 has 8 bits and rounds π, the weight and their product, each to 2^-8 of itself. In row 0 the target has nearly
    all probability (1 - π = 3e-4, lost where π is rounded first), in row 1 nearly none (log π = -200).
    """
    torch.manual_seed(0)
    logits, targets = torch.randn(70, 50).mul(3), torch.randint(50, (70,))
    logits[0], logits[0, targets[0]] = 0, 8 + math.log(49)
    logits[1], logits[1, targets[1]] = 0, -200 + math.log(49)
    logits, weights = logits.mul(temperature).to(dtype), torch.randn(70)
    exact = logits.double().requires_grad_()
    expected = (exact / temperature).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    (expected * weights).sum().backward()
    leaf = logits.clone().requires_grad_()
    logps = common.TargetLogps.apply(leaf * 1, targets, temperature)
    assert logps.dtype == torch.float32 and torch.allclose(logps.double(), expected, rtol=1e-6, atol=1e-6)
    (logps * weights).sum().backward()
    assert leaf.grad.dtype == dtype and torch.allclose(leaf.grad.double(), exact.grad, rtol=error, atol=2e-6)
    with torch.no_grad():  # nothing to keep: the logits stay as they are
        kept = logits.clone()
        assert torch.equal(common.TargetLogps.apply(kept, targets, temperature), logps.detach())
        assert torch.equal(kept, logits)


def small(tokenizer, auto_class=transformers.AutoModelForCausalLM, kind=transformers.LlamaConfig, **values):
    """A random model whose distributions are far from flat."""
    values = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3) | values
    tokens = dict(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    return auto_class.from_config(kind(**tokens | values))


def test_token_logps_are_those_of_each_row_alone(tokenizer):
    """Rows of different lengths, padded behind; the head computes the labelled positions and no other. Of what is left
    where some tokens are never drawn."""
    model = small(tokenizer)
    ids = [torch.randint(3, 512, (n,)).tolist() for n in (9, 4, 6)]
    heads = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: heads.append(output[..., 0].numel()))
    batch = common.collate_rows(ids, [3, 1, 5], tokenizer.pad_token_id, CPU)
    found = common.token_logps(model, batch["labels"], 0.7, input_ids=batch["input_ids"])
    hook.remove()
    assert heads == [6 + 3 + 1]
    without = [token for token in range(400) if token not in sum(ids, [])]
    for logps, never in ((found, []), (common.token_logps(model, **batch, never=torch.tensor(without)), without)):
        expected, temperature = [], 1.0 if never else 0.7
        for row, start in zip(ids, (3, 1, 5)):
            logits = model(torch.tensor([row])).logits[0, start - 1 : -1] / temperature
            logits[:, never] = -math.inf
            expected.append(logits.log_softmax(-1).gather(1, torch.tensor(row[start:])[:, None])[:, 0])
        assert torch.allclose(logps, torch.cat(expected), atol=1e-5)


# ---------------------------------------------------------------- what a model is checked for


@pytest.mark.parametrize("scorer", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "kind, values, shares",
    [
        ("llama", {}, True),
        ("gpt_neox", {}, True),
        ("bloom", {}, False),  # ALiBi: places by order, whatever the positions
        ("mistral", dict(sliding_window=64), True),
        ("mistral", dict(sliding_window=63), False),  # the window would count the other response's tokens
        ("gemma3_text", dict(use_bidirectional_attention=True), "not causal"),
        ("llama", dict(attention_dropout=0.5), "random"),
        ("gpt2", dict(embd_pdrop=0.5), "random"),
    ],
)
def test_a_model_is_tried_before_training(process, tokenizer, kind, values, shares, dtype, scorer):
    classifier = transformers.AutoModelForSequenceClassification
    known = dict(intermediate_size=48, head_dim=8, num_key_value_heads=4)
    if kind in ("gpt2", "bloom"):
        known = dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0) if kind == "gpt2" else {}
    if scorer:
        known["num_labels"] = 1
    auto_class = classifier if scorer else transformers.AutoModelForCausalLM
    model = small(tokenizer, auto_class, transformers.CONFIG_MAPPING[kind], **known | values)
    model = model.to(torch.float32 if dtype == "fp32" else torch.bfloat16)
    model = common.Scorer(model) if scorer else model
    model.config.name_or_path = "a model"
    args = SimpleNamespace(max_length=64, dtype=dtype)
    if isinstance(shares, bool):
        assert common.check_model(model, model, args, process) == shares
    else:
        with pytest.raises(common.InputError, match=f"a model.* {shares}"):
            common.check_model(model, model, args, process)


# ---------------------------------------------------------------- an optimizer's step


def engine_args(**values) -> SimpleNamespace:
    values = dict(micro_batch_size=1, zero_stage=0, offload=False, dtype="fp32", learning_rate=0.125) | values
    return SimpleNamespace(**dict(weight_decay=0.0, warmup_steps=0) | values)


def line_engine(process, weights=(0.5, -0.5), accumulation: int = 1, steps: int = 4, **values):
    """An engine around w · x, and its args."""
    args, module = engine_args(**values), torch.nn.Linear(2, 1, bias=False)
    module.weight.data = torch.tensor([weights])
    module.to(torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    return common.make_engine(module, args, common.engine_config(args, accumulation), steps, process), args


def weights_of(engine) -> list[float]:
    with common.deepspeed.zero.GatheredParameters(engine.module.weight):
        return engine.module.weight.flatten().tolist()


def backward(engine, *gradient: float) -> torch.Tensor:
    """Back through a loss whose gradient by the weights is this."""
    loss = engine(torch.tensor([gradient], dtype=engine.module.weight.dtype)).sum()
    engine.backward(loss)
    return loss.detach()


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_by_hand(process, dtype, stage, offload):
    """Gradients (3, 4) and (3, -4) of two micro batches: mean (3, 0), norm 3 before clipping. Adam's first step is the
    learning rate's whole 1/8 against the gradient's sign, whatever its size, behind a decay by 1 - 1/8 · 1/2: 1/2 falls
    to 15/32 - 1/8 = 11/32, -1/2 rises to -15/32, and nothing else has moved them."""
    if offload and stage == 0 and dtype == "fp32":
        with pytest.raises(common.InputError, match="--offload"):
            line_engine(process, zero_stage=0, offload=True)
        return
    engine, args = line_engine(
        process, accumulation=2, dtype=dtype, zero_stage=stage, offload=offload, weight_decay=0.5
    )
    losses = [backward(engine, 3, 4)]
    engine.step()
    assert weights_of(engine) == [0.5, -0.5]
    losses.append(backward(engine, 3, -4))
    assert common.optimizer_step(1, losses, (engine, args)) == pytest.approx([3], rel=1e-6)
    assert weights_of(engine) == pytest.approx([11 / 32, -15 / 32], abs=1e-5 if dtype == "fp32" else 2e-3)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("loss, gradient, what", [(math.nan, (1, 1), "loss"), (1.0, (math.inf, 1), "gradient")])
def test_what_is_not_finite_stops_the_run_with_the_weights_as_they_were(process, dtype, stage, loss, gradient, what):
    engine, args = line_engine(process, dtype=dtype, zero_stage=stage)
    backward(engine, *gradient)
    with pytest.raises(common.InputError, match=f"step 7: the {what} is not finite.*0.125") as caught:
        common.optimizer_step(7, [torch.tensor(1.0), torch.tensor(loss)], (engine, args))
    assert "\n" not in str(caught.value) and weights_of(engine) == [0.5, -0.5]


def test_no_engine_steps_where_another_cannot(process):
    """In fp32 without ZeRO, PPO's policy had stepped when its critic's gradient was found not to be finite."""
    policy, critic = line_engine(process), line_engine(process)
    losses = [backward(policy[0], 1, 1), backward(critic[0], math.inf, 1)]
    with pytest.raises(common.InputError, match="step 1: the gradient"):
        common.optimizer_step(1, losses[:1], policy, critic)
    assert weights_of(critic[0]) == weights_of(policy[0]) == [0.5, -0.5]


@pytest.mark.parametrize("stages", [(0, 2), (2, 0)])
def test_the_norms_of_two_engines_come_in_their_order(process, stages):
    policy, critic = (line_engine(process, zero_stage=stage) for stage in stages)
    losses = [backward(policy[0], 3, 4), backward(critic[0], 0, 2)]
    assert common.optimizer_step(1, losses, policy, critic) == pytest.approx([5, 2])


def test_schedule_and_optimizer(process, tokenizer):
    """Cosine from the peak to 0 behind the last step, with and without warm-up; no decay on biases and norm weights."""
    for warmup, expected in ((0, [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(5)]), (2, [0, 0.5, 1, 0.5, 0])):
        args = engine_args(weight_decay=0.1, warmup_steps=warmup)
        engine = common.make_engine(small(tokenizer), args, common.engine_config(args, 1), 4, process)
        assert [engine.lr_scheduler.lr_lambdas[0](i) for i in range(5)] == pytest.approx(expected)
    groups = engine.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0] and groups[0]["betas"] == (0.9, 0.95)
    assert [{p.ndim for p in group["params"]} for group in groups] == [{2}, {1}]


# ---------------------------------------------------------------- sampling


def draws(scores: list[float], points: np.ndarray, temperature: float = 1.0, never=()) -> list[int]:
    """The token that each point draws."""
    never = torch.tensor(never, dtype=torch.long)
    sampling = common.Sampling(torch.tensor(points)[:, None], 5, temperature, never)
    left = sampling(torch.zeros(len(points), 5, dtype=torch.long), torch.tensor([scores] * len(points)))
    assert (left > -math.inf).sum(1).tolist() == [1] * len(points)  # greedy decoding has no other choice
    return left.argmax(1).tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_drawn_by_their_probability(temperature):
    """10,000 points evenly from 0 to 1 draw each token as often as p says, give or take one: p ∝ 1, 4, 3, 0 and 2, at
    temperature 1/2 ∝ their squares."""
    weights = np.array([1, 4, 3, 0, 2]) ** (1 / temperature)
    found = draws([0.0, math.log(4), math.log(3), -math.inf, math.log(2)], (np.arange(10000) + 0.5) / 1e4, temperature)
    assert np.bincount(found, minlength=5) == pytest.approx(weights / weights.sum() * 1e4, abs=1)


def test_a_token_without_a_name_is_never_drawn():
    """Not at the ends of [0, 1) either, and though it has nearly all probability; the others share what is left."""
    points = np.concatenate([[0.0, 1 - 2**-53], (np.arange(1000) + 0.5) / 1000])
    found = draws([50.0, 1.0, 50.0, 1.0, 50.0], points, never=[0, 2, 4])
    assert found[:2] == [1, 3] and np.bincount(found[2:], minlength=5).tolist() == [0, 500, 0, 500, 0]


def answers(model, tokenizer, process, prompts, rooms, seeds, size: int, temperature: float = 1.0) -> list[list[int]]:
    return common.sample(model, model, tokenizer, prompts, rooms, seeds, size, process, temperature)


def test_an_answer_is_a_function_of_its_prompt_and_its_seed(process, tokenizer):
    """Whatever stands beside it, behind whatever padding; another seed draws another. It ends with EOS or its room."""
    model, eos = small(tokenizer, initializer_range=0.1), tokenizer.eos_token_id
    model.lm_head.weight.data[eos] = 3 * model.lm_head.weight.data[7]  # now and then
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 512, n).tolist() for n in (3, 11, 3, 7, 1, 5)] * 2
    rooms, seeds = [4, 12, 12, 1, 12, 12] * 2, [[9, n] for n in range(12)]
    first = answers(model, tokenizer, process, prompts, rooms, seeds, 12)
    for size, order in ((1, range(12)), (5, rng.permutation(12))):
        again = answers(model, tokenizer, process, *([own[i] for i in order] for own in (prompts, rooms, seeds)), size)
        assert again == [first[i] for i in order]
    assert all(first[i] != first[i + 6] for i in (1, 2, 4, 5))  # the same prompt with another seed
    for answer, room in zip(first, rooms):
        assert eos not in answer[:-1] and (len(answer) == room or answer[-1] == eos and len(answer) < room)


def test_answers_follow_the_models_distribution(process, tokenizer):
    """600 first tokens at temperature 1.5, with seeds of their own: their mean log-probability is minus the entropy,
    within 4 standard errors. Tokens beyond the tokenizer, here half of the probability, are not among them."""
    model = small(tokenizer, vocab_size=600, initializer_range=0.15)
    prompt = [5, 6, 7]
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(600))
        gap = logits[:512].logsumexp(0) - logits[512:].logsumexp(0)
        model.lm_head.bias[512:] = gap
        logps = (logits[:512] / 1.5).log_softmax(-1)
    drawn = answers(model, tokenizer, process, [prompt] * 600, [1] * 600, [[n] for n in range(600)], 200, 1.5)
    drawn = torch.tensor(drawn).flatten()
    assert drawn.max() < 512
    mean = (logps.exp() * logps).sum()
    deviation = ((logps.exp() * logps.square()).sum() - mean.square()).sqrt()
    assert abs(logps[drawn].mean() - mean) < 4 * deviation / 600**0.5 < 0.3


# ---------------------------------------------------------------- two ranks


def of_two_ranks(folder: str) -> None:
    process = common.start(0)
    assert process.world_size == 2
    rank = process.rank
    mine = torch.arange(3.0) + 10 * rank + torch.tensor([[0.0], [100.0]])
    assert common.gather(mine).tolist() == [[0, 1, 2, 10, 11, 12], [100, 101, 102, 110, 111, 112]]
    assert common.on_rank_0(process, lambda: f"from {rank}") == "from 0"

    def fail(error):
        assert rank == 0
        raise error

    with pytest.raises(common.InputError, match="mend me"):
        common.on_rank_0(process, lambda: fail(common.InputError("mend me")))
    with pytest.raises(ZeroDivisionError if rank == 0 else common.InputError, match="by what"):  # and none waits
        common.on_rank_0(process, lambda: fail(ZeroDivisionError("by what")))

    # Three micro batches on two ranks: one has nothing to do at the end, but runs as often.
    rows, runs = datasets.Dataset.from_dict(dict(number=[1.0, 2.0, 3.0, 4.0, 5.0], row_length=[3, 9, 1, 9, 4])), []
    values = common.over_rows(
        torch.nn.Linear(1, 1),
        lambda columns: runs.append(1) or torch.tensor(columns["number"])[:, None],
        rows,
        SimpleNamespace(micro_batch_size=2),
        process,
    )
    assert values.flatten().tolist() == [1, 2, 3, 4, 5] and len(runs) == 2

    # The first rank encodes the rows, and both have them.
    tokenizer, seen = common.load_tokenizer(common.toy_model(), False), []

    def encode(row, tokenizer, max_length):
        seen.append(row)
        return common.encode_pair(row, tokenizer, max_length)

    train, held_out = load(process, tokenizer, str(Path(folder) / "rows.jsonl"), encode=encode)
    assert len(seen) == (20 if rank == 0 else 0)
    both = common.gather_objects([train["prompt"][:], held_out["prompt"][:]])
    assert both[0] == both[1] and len(train) + len(held_out) == 20

    # What one rank cannot use stops both, and the mean over ranks is what steps.
    for stage in (0, 2):
        engine, args = line_engine(process, zero_stage=stage)
        backward(engine, 1, 1)
        with pytest.raises(common.InputError, match="step 1: the loss"):
            common.optimizer_step(1, [torch.tensor(math.nan if rank else 1.0)], (engine, args))
        assert weights_of(engine) == [0.5, -0.5]
        engine, args = line_engine(process, zero_stage=stage)
        loss = backward(engine, 3, 4 - 8 * rank)
        assert common.optimizer_step(1, [loss], (engine, args)) == pytest.approx([3])
        assert weights_of(engine) == pytest.approx([0.375, -0.5])


def test_two_ranks(tmp_path):
    """What is gathered, read, encoded, computed and refused is the same on both."""
    rows_file(tmp_path, *pairs_of(*[2] * 10))
    on_two_ranks(of_two_ranks, str(tmp_path))


# ---------------------------------------------------------------- process


def test_deepspeeds_groups_wait_as_long_as_ours(process):
    """A slow disk keeps one rank in a save for longer than the 10 minutes that NCCL's groups wait by themselves."""
    group = common.deepspeed.comm.new_group([0])
    assert group._get_backend(CPU).options._timeout.total_seconds() == 7200


@pytest.mark.parametrize("name, value", [
    ("LOCAL_SIZE", "4"), ("LOCAL_WORLD_SIZE", "4"), ("OMPI_COMM_WORLD_LOCAL_SIZE", "4"),
    ("SLURM_STEP_TASKS_PER_NODE", "4(x2)"), ("", ""),
])  # fmt: skip
def test_ranks_share_the_cores_of_their_machine(process, monkeypatch, name, value):
    """8 cores that all 4 ranks may use are 2 threads for each, whatever started them; one process takes all."""
    for known in "LOCAL_SIZE LOCAL_WORLD_SIZE OMPI_COMM_WORLD_LOCAL_SIZE SLURM_STEP_TASKS_PER_NODE".split():
        monkeypatch.delenv(known, raising=False)
    monkeypatch.setenv(name, value) if name else None
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    common.start(0)
    assert threads == [2 if name else 8]
