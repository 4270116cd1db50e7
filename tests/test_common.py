"""common.py: batches, log-probabilities, drawn answers, metrics, an optimizer's step, caches, flags and ranks."""

import common

import contextlib
import functools
import json
import math
import os
import shutil
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import scipy.stats
import torch
import torch.distributed as dist
import transformers
from helpers import lines, rows_file
from ranks import on_two_ranks

import dpo
import reward

CPU = torch.device("cpu")
NONE = common.NO_LABEL


def test_order_is_a_function_of_seed_and_epoch():
    """1,003 rows in batches of 8: no row twice, 3 dropped, of any length; like lengths together, of 400 rows at a time:
    a batch then covers 190 / 50 = 3.8 of the lengths, of all rows at once it would 190 / 125 = 1.5."""
    lengths = np.random.default_rng(0).integers(10, 200, 1003)
    first = common.global_batches(lengths, 8, seed=1, epoch=0)
    assert first.shape == (125, 8) and len(set(first.flatten().tolist())) == 1000
    assert np.array_equal(first, common.global_batches(lengths, 8, seed=1, epoch=0))
    assert not np.array_equal(first, common.global_batches(lengths, 8, seed=1, epoch=1))
    assert not np.array_equal(first, common.global_batches(lengths, 8, seed=2, epoch=0))
    assert 3 < np.ptp(lengths[first], axis=1).mean() < 8
    window = common.global_batches(lengths[:400], 8, seed=1, epoch=0)  # one, which is not left sorted
    assert abs(np.corrcoef(lengths[window].mean(1), np.arange(50))[0, 1]) < 0.5
    dropped = [set(range(1003)) - set(common.global_batches(lengths, 8, 1, e).flatten().tolist()) for e in range(200)]
    assert np.mean([lengths[list(d)].mean() for d in dropped]) == pytest.approx(lengths.mean(), abs=10)


def test_what_rows_predict_by_hand():
    """Rows a b | c d and a | b, responses from 2 and from 1: c at the place of b, d at that of c; b at that of a."""
    batch = common.collate_rows([[5, 6, 7, 8], [5, 6]], [2, 1], 0, CPU)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 6, 0, 0]]
    assert batch["labels"].tolist() == [[NONE, 7, 8, NONE], [6, NONE, NONE, NONE]]


def collate(*pairs: tuple[list[int], list[int]], share: bool = True):
    """collate_pairs of (chosen, rejected), in 16 bits."""
    prefixes = [min(len(os.path.commonprefix(own)), *(len(ids) - 1 for ids in own)) for own in pairs]
    chosen, rejected = zip(*pairs)
    columns = dict(chosen_ids=chosen, rejected_ids=rejected, prefix=prefixes)
    return common.collate_pairs(columns, 0, share, torch.bfloat16, CPU)


@pytest.mark.parametrize("share", [True, False])
def test_each_token_once_from_its_own_context_and_position(share):
    """200 random batches of 1 to 4 pairs: every token but a sequence's first is predicted once (a common beginning once
    for both, in a shared row), from all tokens before it, in order, at its own position. A mask is worth it."""
    rng, shared = np.random.default_rng(0), 0
    for size in rng.integers(1, 5, 200):
        pairs = []
        while len(pairs) < size:
            first, *rest = (rng.integers(1, 4, rng.integers(1, 12)).tolist() for _ in range(3))
            chosen, rejected = (first + own for own in rest) if rng.random() < 0.8 else rest
            pairs += [(chosen, rejected)] * (chosen != rejected)
        inputs, labels, branch, positions = collate(*pairs, share=share)
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        shared += mask is not None
        assert mask is None or ids.numel() < collate(*pairs, share=False)[1].numel()
        if mask is not None:  # added to scores; a query that saw nothing, also in padding, would be NaN
            assert mask.dtype == torch.bfloat16 and set(mask.unique().tolist()) <= {0, torch.finfo(mask.dtype).min}
            assert mask.amax(-1).eq(0).all() and torch.equal(inputs["position_ids"], positions)
        each, found = len(labels) // len(pairs), []
        for row, place in (labels != NONE).nonzero().tolist():
            seen = range(place + 1) if mask is None else (mask[row, 0, place] == 0).nonzero().flatten().tolist()
            assert positions[row, seen].tolist() == list(range(len(seen)))
            text = ids[row, seen].tolist() + labels[row, [place]].tolist()
            found += [(row // each, side, text) for side in ((0, 1), (0,), (1,))[branch[row, place]]]
        texts = [(i, side, ids) for i, own in enumerate(pairs) for side, ids in enumerate(own)]
        expected = [(i, side, ids[:end]) for i, side, ids in texts for end in range(2, len(ids) + 1)]
        assert sorted(found) == sorted(expected)
        ends = (labels == NONE) & (branch >= 0)  # where a reward model's head looks
        assert list(zip(branch[ends] - 1, ids[ends])) == [(side, ids[-1]) for _, side, ids in texts]
    assert shared > 100 if share else shared == 0


def test_the_token_loss_is_on_what_differs():
    """Rows of chosen and rejected are as wide as the longest; equal shares from the fork to the longer one's end."""
    columns = dict(chosen_ids=[[1, 2, 3], [4, 5]], rejected_ids=[[1, 2, 6, 7], [8, 5]], prefix=[2, 0])
    inputs, share = reward.collate(columns, 0, True, torch.float32, CPU, loss_on="token")
    assert inputs["input_ids"].tolist() == [[1, 2, 3, 0], [1, 2, 6, 7], [4, 5, 0, 0], [8, 5, 0, 0]]
    assert torch.equal(inputs["attention_mask"], (inputs["input_ids"] > 0).long()) and inputs["logits_to_keep"].all()
    assert share.tolist() == [[0, 0, 0.5, 0.5], [0.5, 0.5, 0, 0]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logps(dtype, temperature):
    """log softmax(x / t) of each label, in 64 bits from the same logits; a sum of 32 bits in 16 too, and also
    where a model gives the logits of all positions."""
    torch.manual_seed(0)
    table, ids = torch.randn(50, 50).mul(3).to(dtype), torch.randint(50, (4, 9))  # the logits behind each token
    labels = torch.randint(50, (4, 9)).masked_fill(torch.rand(4, 9) < 0.4, NONE)

    def model(input_ids, logits_to_keep, use_cache):
        return SimpleNamespace(logits=table[input_ids] if temperature == 1 else table[input_ids][logits_to_keep])

    found = common.token_logps(model, labels, temperature, input_ids=ids)
    places = (labels != NONE).nonzero().tolist()
    expected = (table[ids].double() / temperature).log_softmax(-1)
    expected = torch.stack([expected[row, place, labels[row, place]] for row, place in places])
    assert found.dtype == torch.float32 and torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-6)


def small(kind=transformers.LlamaConfig, **values):
    """A random model whose distributions are far from flat."""
    values = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3) | values
    torch.manual_seed(0)
    config = kind(vocab_size=512, pad_token_id=0, bos_token_id=1, eos_token_id=2, **values)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.generation_config = transformers.GenerationConfig(pad_token_id=0, eos_token_id=[2])
    model.reads_padding = False
    return model


def test_answers_follow_the_models_distribution(tokenizer):
    """2,000 first tokens at temperature 0.7, with seeds of their own: a chi-square test against softmax(x / 0.7), the
    rare ones (fewer than 5 expected) as one class. A tenth more or less of a temperature fails it."""
    model, prompt = small(initializer_range=0.12), [5, 6, 7]
    with torch.no_grad():
        p = (model(torch.tensor([prompt])).logits[0, -1].double() / 0.7).softmax(-1).numpy()
    seeds = [[n] for n in range(2000)]
    drawn = common.sample(model, model, tokenizer, [prompt] * 2000, [1] * 2000, seeds, 500, 0.7)
    counts, often = np.bincount(np.array(drawn)[:, 0], minlength=512), 2000 * p >= 5
    found, expected = (np.append(own[often], own[~often].sum()) for own in (counts, 2000 * p))
    assert often.sum() > 20 and scipy.stats.chisquare(found, expected).pvalue > 0.01


def test_an_answer_is_a_function_of_its_prompt_and_its_seed(tokenizer):
    """Whatever stands beside it: prompts of 1 to 40 tokens, with room to 48, before a table of 64 positions. It ends
    with EOS, once, or where its room does; another seed draws another. A model that reads padding gets none."""
    model, rng, widths = small(transformers.GPT2Config, n_positions=64), np.random.default_rng(0), []
    model.lm_head.weight.data[2] = 2 * model.lm_head.weight.data[7]  # EOS now and then
    generate = model.generate
    model.generate = lambda **named: widths.append(named["attention_mask"].float().mean().item()) or generate(**named)
    prompts = [rng.integers(3, 512, n).tolist() for n in (3, 40, 3, 7, 1, 25)] * 2
    rooms, seeds = [48 - len(prompt) for prompt in prompts], [[9, n] for n in range(12)]
    first = common.sample(model, model, tokenizer, prompts, rooms, seeds, 12)
    assert min(widths) < 1
    for size, order, reads in ((1, range(12), False), (5, rng.permutation(12), False), (12, range(12), True)):
        shuffled, model.reads_padding = ([own[i] for i in order] for own in (prompts, rooms, seeds)), reads
        widths.clear()
        assert common.sample(model, model, tokenizer, *shuffled, size) == [first[i] for i in order]
    assert set(widths) == {1.0} and len(widths) == 5
    assert all(first[i] != first[i + 6] for i in range(6)) and 0 < sum(answer[-1] == 2 for answer in first) < 12
    for answer, room in zip(first, rooms):
        assert 2 not in answer[:-1] and (len(answer) == room or len(answer) < room and answer[-1] == 2)


def test_metrics_are_means_and_rates_since_the_last_line(process, tmp_path, monkeypatch):
    """Lines at step 1, at every second and at the last. A step takes 2 seconds, the evaluation after step 3 takes 100,
    which no rate counts. What is not finite, or applies to one step only, is null."""
    now = [0.0]
    monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    metrics = common.Metrics(SimpleNamespace(log_every=2, output_dir=tmp_path), 5, ("loss",))
    for step, loss in enumerate((1.0, 2.0, 4.0, 8.0, math.inf), 1):
        now[0] += 2
        values = dict(loss=torch.tensor(loss), bound=math.nan if step == 4 else 3)
        assert metrics.add(step, values, pairs=step, tokens=10 * step) == (step != 3)
        if step == 3:
            now[0] += 100
            metrics.write(step, "eval", dict(loss=9.0))
    expected = [
        dict(step=1, split="train", loss=1, bound=3, pairs_per_s=1 / 2, tokens_per_s=5),
        dict(step=2, split="train", loss=2, bound=3, pairs_per_s=2 / 2, tokens_per_s=10),
        dict(step=3, split="eval", loss=9),
        dict(step=4, split="train", loss=6, bound=None, pairs_per_s=4 / 2, tokens_per_s=20),
        dict(step=5, split="train", loss=None, bound=3, pairs_per_s=5 / 2, tokens_per_s=25),
    ]
    assert lines(tmp_path / "metrics.jsonl") == expected and list((tmp_path / "tensorboard").iterdir())


def line_engine(process, bias: bool = False, **values):
    """An engine around w · x (+ b), both 1/2, and its args: four steps, the first two of warm-up."""
    known = dict(micro_batch_size=1, zero_stage=0, offload=False, dtype="fp32", learning_rate=0.125, weight_decay=0.5)
    args, module = SimpleNamespace(**known | dict(warmup_steps=2) | values), torch.nn.Linear(1, 1, bias=bias)
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    module.to(torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    return common.make_engine(module, args, common.engine_config(args, 1 + bias), 4, process), args


def weights_of(engine) -> list[float]:
    with common.deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return [parameter.item() for parameter in engine.module.parameters()]


def backward(engine, x: float, scale: float = 1.0) -> None:
    """Back through a loss whose gradient is scale · (x, 1)."""
    engine.backward(scale * engine(torch.tensor([[x]], dtype=engine.module.weight.dtype)).sum())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage, offload", [(0, False), (0, True), (1, True), (2, False), (3, True)])
def test_steps_by_hand(process, dtype, stage, offload):
    """Three steps of two micro batches. Mean gradients (3, 1), (1/4, 1/8), (-2, 2): the first and the last are clipped
    to norm 1. Learning rates 0, 1/2, 1 of the peak. AdamW with β 0.9 and 0.95 in numbers; w decays, b does not."""
    engine, args = line_engine(process, bias=True, dtype=dtype, zero_stage=stage, offload=offload)
    assert engine.zero_optimization_stage() == args.zero_stage == max(stage, offload or dtype == "bf16")
    means, m, v, expected = np.array([(3, 1), (0.25, 0.125), (-2, 2)]), 0, 0, np.array([0.5, 0.5])
    for step, (mean, rate) in enumerate(zip(means, (0, 0.0625, 0.125)), 1):
        x, scale, norm = mean[0] / mean[1], mean[1], np.hypot(*mean)
        assert engine.get_lr() == pytest.approx([rate, rate])
        backward(engine, x, 3 * scale)
        engine.step()
        backward(engine, x, -scale)
        assert common.optimizer_step(step, (engine, args)) == pytest.approx([norm], rel=1e-2)
        gradient = mean / max(norm, 1)
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        expected = expected * (1 - rate * np.array([0.5, 0]))
        expected = expected - rate * (m / (1 - 0.9**step)) / np.sqrt(v / (1 - 0.95**step))
        assert weights_of(engine) == pytest.approx(expected.tolist(), abs=1e-5 if dtype == "fp32" else 3e-3)
    assert engine.get_lr() == pytest.approx([0.0625, 0.0625])  # the cosine's half


@pytest.mark.parametrize("dtype, stage", [("fp32", 0), ("bf16", 2)])
@pytest.mark.parametrize("x", [math.nan, math.inf])
def test_what_is_not_finite_stops_the_run(process, dtype, stage, x):
    """Of the second engine, be it the loss too."""
    first, second = (line_engine(process, dtype=dtype, zero_stage=stage, warmup_steps=0) for _ in range(2))
    backward(first[0], 3)
    backward(second[0], x)
    with pytest.raises(common.InputError, match="step 7: the gradient is not finite.*0.125"):
        common.optimizer_step(7, first, second)


def test_a_cache_knows_what_its_values_hang_on(process, toy, tmp_path, monkeypatch):
    """Similarities: the encoder's files, its pooling, the pairs. References: the model's files, the precision, the
    pairs. Both: libraries and code. Beside each other 2 are computed, where one thing changes for one of them 1."""
    monkeypatch.setenv("PCRM_CACHE", str(tmp_path / "cache"))
    calls, other, code = [], str(shutil.copytree(toy, tmp_path / "other")), tmp_path / "priors.py"
    for path in (code, tmp_path / "other" / "own.py"):
        path.touch()
    monkeypatch.setattr(common, "over_rows", lambda *rest: calls.append(1) or torch.tensor([[1.0, math.nan]]))
    monkeypatch.setattr(reward, "encode_texts", lambda *rest, **named: calls.append(1) or torch.eye(2))
    a, b = (datasets.Dataset.from_dict(dict(prompt=["p"], chosen=["c"], rejected=[r])) for r in "ab")

    def computed(pairs=a, model=toy, pooling="mean", dtype="fp32") -> int:
        calls.clear()
        args = reward.Args(constraint="cos_sim", encoder=model, encoder_pooling=pooling)
        assert reward.similarities(pairs, args, process).tolist() == [0.5]
        found = dpo.reference_logps(None, pairs, dpo.Args(ref_model=model, dtype=dtype), None, process)
        assert found.nan_to_num(7).tolist() == [[1], [7]]
        return len(calls)

    found = [computed(), computed(), computed(b), computed(model=other), computed(pooling="cls")]
    assert [*found, computed(dtype="bf16"), computed()] == [2, 0, 2, 2, 1, 1, 0]
    for module, name in ((torch, "__version__"), (transformers, "__version__"), (common, "__file__")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, str(code))
            assert [computed(), computed()] == [2, 0]


def test_a_second_start_encodes_nothing_and_holds_no_lists(process, toy, tmp_path, capsys):
    """20,000 pairs: the second time no row is encoded, the same line is said, and all that a start reads takes less
    than 2 MB (a list of numbers beyond 256 takes 36 bytes each). Another chat template or setting encodes again."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"number": i}) + "\n" for i in range(20000)))
    few, seen = rows_file(Path(shutil.copytree(toy, tmp_path / "m")), *[{"number": i} for i in range(5)]), []

    def encode(row, tokenizer, max_length):
        seen.append(row["number"])
        if row["number"] == 3:
            raise common.Unusable("a three")
        lengths = dict(prefix=10, chosen_length=270 + row["number"] % 300, rejected_length=280, row_length=560)
        return dict(chosen_ids=[7] * 40, rejected_ids=[8] * 40, prompt="p") | lengths

    def start(max_length: int = 40) -> tuple[int, str]:
        """How many rows were encoded, and what was said."""
        common.model_version.cache_clear()
        seen.clear()
        args = SimpleNamespace(dataset=str(tmp_path / "rows.jsonl"), eval_dataset=few, seed=1, epochs=1)
        tokenizer = common.load_tokenizer(str(tmp_path / "m"), False)
        encoder = functools.partial(encode, tokenizer=tokenizer, max_length=max_length)
        train, held_out = common.load_data(args, encoder)
        bound = reward.bounds_of(reward.similarities(train, reward.Args(), process), reward.Args(constraint="len_rat"))
        batches = common.global_batches(common.column(train, "row_length"), 32, 1, 0)
        assert (len(train), len(held_out), len(bound), batches.size) == (19999, 4, 19999, 19968)
        assert train[0]["chosen_ids"] == [7] * 40 and train.features["chosen_ids"].feature.dtype == "int32"
        return len(seen), capsys.readouterr().out

    first = start()
    tracemalloc.start()
    again, peak = start(), tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "--dataset: 19999 rows; dropped: 1 a three; columns: number" in first[1]
    assert first[0] == 20005 and again == (0, first[1]) and peak < 2e6
    (tmp_path / "m" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert [start()[0], start(41)[0], start(41)[0]] == [20005, 20005, 0]


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    for text in ("old", "new", None):
        with contextlib.suppress(TypeError), common.writing(tmp_path / "file") as part:
            part.write_text("half")
            part.write_text(text)
    common.write_file(tmp_path / "other", "é")
    assert (tmp_path / "file").read_text() == "new" and (tmp_path / "other").read_bytes() == "é".encode()
    assert {path.name for path in tmp_path.iterdir()} == {"file", "other"}


def test_the_toy_model_is_made_once(tmp_path, monkeypatch):
    """The same weights whatever was drawn before; then a folder that is only read."""
    found = []
    for name in ("a", "b", "b"):
        monkeypatch.setenv("PCRM_CACHE", str(tmp_path / name))
        torch.manual_seed(len(found))
        path = Path(common.toy_model()) / "model.safetensors"
        found.append((path.read_bytes(), path.stat().st_mtime_ns))
    assert found[0][0] == found[1][0] and found[1] == found[2]


def test_flags_win_over_the_presets_of_task_and_constraint(capsys):
    """METHOD's numbers, whatever the order of flags; own data cancel the task's evaluation data, and with them the
    ranked ones; one command line does not reach the next. The paper's tasks have no model of their own."""
    names = "dataset eval_dataset ranked_dataset beta1 beta3 max_length".split()
    toy = [getattr(reward.Args(), name) for name in names]
    for flags, changed in (
        ("--dataset x", ["x", "", "", *toy[3:]]),
        ("--dataset=x --eval-dataset=y", ["x", "y", "", *toy[3:]]),
        ("--eval_dataset y --ranked_dataset z --beta1 7", [toy[0], "y", "z", 7, *toy[4:]]),
        (
            "--task=tldr --eval_dataset y --model m --constraint cos_sim",
            [reward.TLDR["dataset"], "y", "", 30, -25, 1024],
        ),
        ("--beta1 7 --dataset x --model m --constraint len_rat --task tldr", ["x", "", "", 7, -5, 1024]),
        ("", toy),
    ):
        args = common.parse_args(reward.Args, reward.preset, flags.split())
        assert [getattr(args, name) for name in names] == changed, flags
    with pytest.raises(SystemExit) as ended:
        common.parse_args(dpo.Args, dpo.preset, ["--task", "alpaca"])
    assert ended.value.code == 2 and "--model" in capsys.readouterr().err


SLURM = dict(SLURM_PROCID="3", SLURM_STEP_NUM_TASKS="4", SLURM_LOCALID="1", SLURM_STEP_TASKS_PER_NODE="2(x2)")
MPI = {f"OMPI_COMM_WORLD_{name}": value for name, value in zip("RANK SIZE LOCAL_RANK LOCAL_SIZE".split(), "1212")}
TORCHRUN = dict(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4", MASTER_ADDR="a", MASTER_PORT="1")


@pytest.mark.parametrize(
    "given, expected, address, threads",
    [
        ({}, "0101", "127.0.0.1", 8),
        (dict(SLURM_NTASKS="8", SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="1"), "0101", "127.0.0.1", 8),  # sbatch's own
        (SLURM, "3412", None, 4),  # two machines: the user names the first
        (SLURM | dict(SLURM_STEP_TASKS_PER_NODE="3,1"), "3413", None, 2),
        (SLURM | dict(SLURM_STEP_TASKS_PER_NODE="4"), "3414", "127.0.0.1", 2),
        (MPI | dict(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="1"), "1212", "127.0.0.1", 4),  # mpirun within sbatch
        (TORCHRUN | SLURM, "5814", "a", 2),
        (TORCHRUN | dict(LOCAL_SIZE="1"), "5814", "a", 8),  # the deepspeed launcher's
        (TORCHRUN | dict(OMP_NUM_THREADS="3"), "5814", "a", None),  # the user's, or of --bind_cores_to_rank
    ],
)
def test_ranks_and_threads_under_every_launcher(process, monkeypatch, given, expected, address, threads):
    """Ranks of one machine share its cores, here 8, unless the user says how many each has."""
    found = []
    monkeypatch.setattr(os, "environ", dict(given))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    started = common.start(0)
    assert "".join(os.environ[name] for name in list(TORCHRUN)[:4]) == expected and found == [threads] * bool(threads)
    assert f"{started.rank}{started.world_size}" == expected[:2] and os.environ.get("MASTER_ADDR") == address


def test_alone_nothing_goes_through_a_backend(process, monkeypatch):
    """Gloo would start OpenMP in a thread of its own, which slows every operation from then on."""
    monkeypatch.setattr(dist, "all_gather_object", None)
    assert common.gather_objects("a") == ["a"] and common.on_rank_0(lambda: 3) == 3


def test_values_of_all_rows_come_in_their_order(process):
    """Batches of like lengths, the longest first; 5 rows in micro batches of 2, whose results are put back. On two
    ranks one has nothing to do at the end, but runs as often."""
    rows = datasets.Dataset.from_dict(dict(number=[1.0, 2.0, 3.0, 4.0, 5.0], row_length=[3, 9, 1, 9, 4]))
    args, module, sizes = SimpleNamespace(micro_batch_size=2), torch.nn.Linear(1, 1), []

    def forward(columns):
        assert not module.training
        sizes.append(columns["row_length"])
        return torch.tensor([[n, n * n] for n in columns["number"]], dtype=torch.bfloat16)

    found = common.over_rows(module, forward, rows, args)
    assert found.dtype == torch.float32 and found.tolist() == [[n, n * n] for n in (1, 2, 3, 4, 5)] and module.training
    order = [[9, 9], [4, 3], [1]]
    assert sizes == (order if process.world_size == 1 else [order[process.rank], order[2]])
    with pytest.raises(common.InputError, match="not finite"):
        common.over_rows(module, lambda columns: forward(columns) * math.nan, rows, args)


def of_two_ranks() -> None:
    process = common.start(0)
    rank = process.rank
    test_values_of_all_rows_come_in_their_order(process)
    mine = torch.arange(3.0) + 10 * rank + torch.tensor([[0.0], [100.0]])
    assert common.gather(mine).tolist() == [[0, 1, 2, 10, 11, 12], [100, 101, 102, 110, 111, 112]]
    assert common.interleaved([[0, 2, 4], [1, 3]][rank]) == [0, 1, 2, 3, 4]
    assert common.on_rank_0(lambda: f"from {rank}") == "from 0"

    def fail(error):
        assert rank == 0
        raise error("by what")

    for error in (common.InputError, ZeroDivisionError, OSError, SystemExit):
        theirs = error if rank == 0 or error is SystemExit else common.InputError
        with pytest.raises(theirs, match="by what"):  # and none waits
            common.on_rank_0(functools.partial(fail, error))
    for stage in (0, 2):  # what one rank cannot use stops both
        engine, args = line_engine(process, zero_stage=stage, warmup_steps=0)
        backward(engine, math.nan if rank else 1)
        with pytest.raises(common.InputError, match="step 1: the gradient"):
            common.optimizer_step(1, (engine, args))


def test_two_ranks():
    """What is gathered, computed and refused is the same on both; an error of the first ends both."""
    on_two_ranks(of_two_ranks)
