"""sft.py: rows, which tokens are under the loss, the head in pieces, sampling, runs, the paper's settings."""

import dataclasses
import json
import math
import re
import shutil
from collections import Counter

import deepspeed
import numpy as np
import pytest
import torch
import transformers

import common
import reward
import sft
from helpers import launch, lines, rows_file
from sft import Row, parse_row

CPU = torch.device("cpu")
SHORT = ["--max_steps", "3", "--log_every", "1", "--micro_batch_size", "4", "--generate", "5"]


def make_rows(tokenizer, *texts: tuple[str, str]) -> list[Row]:
    dropped = Counter()
    kept = sft.tokenize([Row(*t) for t in texts], tokenizer, 1000, dropped)
    assert not dropped
    return kept


# ---------------------------------------------------------------- rows


def test_rows_of_every_format():
    assert parse_row({"prompt": "p", "completion": "c"}, "") == ("p", "c")
    alpaca = {"instruction": "Name a bird.", "input": "", "output": "Owl"}
    assert parse_row(alpaca, "") == ("\n\nHuman: Name a bird.\n\nAssistant: ", "Owl")
    assert parse_row(alpaca | {"input": " Big."}, "")[0] == "\n\nHuman: Name a bird. Big.\n\nAssistant: "
    task = "Your task is to generate a short summary of a post."
    expected = (f"\n\nHuman: {task}\n\nPost: I lost it.\n\nSummary: \n\nAssistant: ", "Lost.")
    assert parse_row({"id": 1, "title": "t", "post": "I lost it.", "summary": "Lost."}, "") == expected


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"prompt": None, "completion": "c"}, "missing text"),
        ({"prompt": "p", "completion": None}, "missing text"),
        ({"prompt": "p", "completion": " \n"}, "empty response"),
        ({"instruction": None, "input": "", "output": "o"}, "missing text"),
        ({"post": None, "summary": "s"}, "missing text"),
    ],
)
def test_unusable_rows_are_named(row, reason):
    assert parse_row(row, "") == reason


def test_dropped_and_counted(tokenizer, tmp_path):
    """Too long; and where a tokenizer sets no BOS, an empty prompt leaves nothing that predicts the first token."""
    kept = sft.tokenize([Row("p\n", "yes"), Row("p\n", "yes " * 50)], tokenizer, 20, dropped := Counter())
    assert [r.completion for r in kept] == ["yes"] and dropped == {"longer than --max_length 20": 1}
    tokenizer.save_pretrained(tmp_path)
    plain = json.loads((tmp_path / "tokenizer.json").read_text()) | {"post_processor": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain))
    kept = sft.tokenize([Row("", "yes")], common.load_tokenizer(str(tmp_path), False), 20, dropped := Counter())
    assert not kept and dropped == {"prompt without a token": 1}
    assert len(make_rows(tokenizer, ("", "yes"))) == 1  # BOS is there


def test_the_tokens_under_the_loss_by_hand():
    """Rows a b | c d and a | b, prompts of 2 and 1 tokens, width 4. Response: c from the place of b (1), d from the
    place of c (2); in the second row, whose first place is 4, b from the place of a (4). With the prompt also b from
    place 0; the second row's prompt has no token but the first, which nothing predicts."""
    rows = [Row("", "", np.array([5, 6, 7, 8]), 2), Row("", "", np.array([5, 6]), 1)]
    batch = sft.collate(rows, 0, False, CPU)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 6, 0, 0]]
    assert (batch["sources"].tolist(), batch["targets"].tolist()) == ([1, 2, 4], [7, 8, 6])
    batch = sft.collate(rows, 0, True, CPU)
    assert (batch["sources"].tolist(), batch["targets"].tolist()) == ([0, 1, 2, 4], [6, 7, 8, 6])


# ---------------------------------------------------------------- the head in pieces


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen2"])
@pytest.mark.parametrize("at_once, held", [(1 << 24, 4), (3 * 512, 2)])
def test_logps_are_those_of_the_whole_model(process, tokenizer, monkeypatch, family, at_once, held):
    """Log-probabilities and gradients equal log-softmax of the model's own logits, in one piece or in many."""
    monkeypatch.setattr(common, "LOGITS_AT_ONCE", at_once)
    monkeypatch.setattr(common, "LOGITS_HELD", held)
    small = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    kind = dict(
        llama=transformers.LlamaConfig(**small, intermediate_size=96),
        gpt2=transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
        gpt_neox=transformers.GPTNeoXConfig(**small, intermediate_size=96),
        qwen2=transformers.Qwen2Config(**small, intermediate_size=96, num_key_value_heads=2, tie_word_embeddings=True),
    )[family]
    kind.update(dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, initializer_range=0.1))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind)
    rows = make_rows(
        tokenizer, ("Where?\n", "Aisle 3. Have a nice day!"), ("", "No."), ("Hello! Where is milk?\n", "I")
    )
    batch = sft.collate(rows, tokenizer.pad_token_id, False, CPU)
    policy = sft.Policy(model)
    assert (-(-len(batch["sources"]) // policy.at_once) > held) == (at_once == 3 * 512)
    logps = policy(**batch)
    logps.square().sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    expected = []
    for row in rows:  # each alone, without padding
        ids = torch.from_numpy(row.ids).long()
        own = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        expected.append(own[row.prompt_length - 1 :])
    expected = torch.cat(expected)
    expected.square().sum().backward()
    assert torch.allclose(logps, expected, atol=1e-5)
    whole = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert torch.allclose(gradient, whole, atol=1e-4 * whole.abs().max().item())


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_target_logps(dtype, error):
    """log π and d log π / d logits = onehot - π, in 64 bits from the same logits; 70 rows are more than two pieces of 32.

    bf16 rounds π and the weight, each to 2^-9 of itself, and their product: together under 2^-7. In row 0 the target
    has nearly all probability (1 - π = 3e-4, lost where π is rounded first), in row 1 nearly none (log π = -200).
    """
    torch.manual_seed(0)
    logits, targets = torch.randn(70, 50).mul(3), torch.randint(50, (70,))
    logits[0], logits[0, targets[0]] = 0, 8 + math.log(49)
    logits[1], logits[1, targets[1]] = 0, -200 + math.log(49)
    logits, weights = logits.to(dtype), torch.randn(70)
    exact = logits.double().requires_grad_()
    expected = exact.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    (expected * weights).sum().backward()
    leaf = logits.clone().requires_grad_()
    logps = sft.TargetLogps.apply(leaf * 1, targets)
    assert logps.dtype == torch.float32 and torch.allclose(logps.double(), expected, rtol=1e-6, atol=1e-6)
    (logps * weights).sum().backward()
    assert leaf.grad.dtype == dtype and torch.allclose(leaf.grad.double(), exact.grad, rtol=error, atol=2e-6)
    with torch.no_grad():  # nothing to keep: the logits stay as they are
        kept = logits.clone()
        assert torch.equal(sft.TargetLogps.apply(kept, targets), logps.detach()) and torch.equal(kept, logits)


# ---------------------------------------------------------------- sampling


def test_sampling_samples(process, toy, tmp_path):
    """Whatever the model's own generation settings say: here greedy ones, under which 8 answers would be one."""
    shutil.copytree(toy, tmp_path / "greedy")
    settings = {"do_sample": True, "top_k": 1, "temperature": 0.01, "repetition_penalty": 5.0}
    (tmp_path / "greedy" / "generation_config.json").write_text(json.dumps(settings))
    tokenizer = common.load_tokenizer(toy, False)
    args = sft.Args(model=str(tmp_path / "greedy"), max_length=20, micro_batch_size=8)
    policy = sft.Policy(sft.load_policy(args.model, args, tokenizer, common.engine_config(args, 1)))
    prompts = [row.ids[: row.prompt_length] for row in make_rows(tokenizer, ("Where?\n", "a"))] * 8
    answers = sft.sample(policy, policy.model, tokenizer, prompts, args, process)
    assert len(set(answers)) > 4
    assert answers == sft.sample(policy, policy.model, tokenizer, prompts, args, process)  # by --seed


def test_padding_does_not_change_the_sampled_distribution(process, toy, monkeypatch):
    """The logits from which a padded batch draws its first tokens are those of each prompt alone."""
    tokenizer, args, seen = common.load_tokenizer(toy, False), sft.Args(model=toy, max_length=60), []
    policy = sft.Policy(sft.load_policy(toy, args, tokenizer, common.engine_config(args, 1)))
    rows = make_rows(tokenizer, ("Where?\n", "a"), ("Hello! I am looking for candles, please.\n", "a"))
    prompts = [row.ids[: row.prompt_length] for row in rows]
    generate = policy.model.generate

    def spy(*positional, **named):
        named["generation_config"].update(output_logits=True, return_dict_in_generate=True)
        result = generate(*positional, **named)
        seen.append(result.logits[0])
        return result.sequences

    monkeypatch.setattr(policy.model, "generate", spy)
    sft.sample(policy, policy.model, tokenizer, prompts, args, process)
    for prompt, logits in zip(prompts, seen[0]):
        alone = policy.model(torch.from_numpy(prompt).long()[None]).logits[0, -1]
        assert torch.allclose(logits, alone, atol=1e-4)


# ---------------------------------------------------------------- runs


def test_a_run(run, tmp_path):
    """What is written; perplexity falls; the saved model gives the logged loss, and AlpacaEval's format is met."""
    out = tmp_path / "out"
    run(sft, "--output_dir", str(out), "--max_steps", "20", "--generate", "5")
    names = {"args.json", "metrics.jsonl", "generations.json", "model", "tensorboard"}
    assert {path.name for path in out.iterdir()} == names
    metrics = lines(out / "metrics.jsonl")
    assert [(m["step"], m["split"]) for m in metrics] == [
        (0, "eval"),
        (1, "train"),
        (10, "train"),
        (20, "train"),
        (20, "eval"),
    ]
    keys = {"step", "split", "loss", "perplexity"}
    for m in metrics:
        train_keys = {"lr", "grad_norm", "rows_per_s", "tokens_per_s"} if m["split"] == "train" else set()
        assert set(m) == keys | train_keys
        assert m["perplexity"] == pytest.approx(math.exp(m["loss"]))
    assert metrics[-1]["perplexity"] < metrics[0]["perplexity"] / 50

    model = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    total, count = 0.0, 0
    for row in lines(common.DATA / "sft_eval.jsonl"):
        prompt = tokenizer(row["prompt"]).input_ids
        ids = torch.tensor(prompt + tokenizer(row["completion"], add_special_tokens=False).input_ids + [2])
        with torch.no_grad():
            logps = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        total, count = total - logps[len(prompt) - 1 :].sum().item(), count + len(ids) - len(prompt)
    assert total / count == pytest.approx(metrics[-1]["loss"], abs=1e-4)

    generations = json.loads((out / "generations.json").read_text())
    assert len(generations) == len({g["instruction"] for g in generations}) == 5
    held_out = {json.loads(line)["prompt"] for line in open(common.DATA / "sft_eval.jsonl")}
    for g in generations:
        assert set(g) == {"instruction", "output", "generator", "dataset"} and all(
            isinstance(v, str) for v in g.values()
        )
        assert g["instruction"] in held_out and g["generator"] == "out" and "</s>" not in g["output"]

    # The result is evaluated alone, and is where the next step starts.
    again = tmp_path / "again"
    run(sft, "--model", str(out / "model"), "--epochs", "0", "--output_dir", str(again), "--generate", "0")
    (evaluated,) = lines(again / "metrics.jsonl")
    assert evaluated["loss"] == pytest.approx(metrics[-1]["loss"], abs=1e-5)
    run(reward, "--model", str(out / "model"), "--output_dir", str(tmp_path / "reward"), "--max_steps", "1")


def test_the_dialogue_wrapper_is_taken_off_for_alpaca_eval(run, tmp_path):
    data = rows_file(tmp_path, *[{"instruction": f"Say {i}.", "input": "", "output": f"{i}"} for i in range(40)])
    out = tmp_path / "out"
    run(sft, "--dataset", data, "--output_dir", str(out), "--max_steps", "1", "--generate", "2", "--max_length", "64")
    for generation in json.loads((out / "generations.json").read_text()):
        assert re.fullmatch(r"Say \d+\.", generation["instruction"]) and generation["dataset"] == "rows.jsonl"


def test_each_token_counts_alike(run, tmp_path):
    """The first step's loss is the mean over the response tokens of the whole global batch, not the mean of the rows' or
    micro batches' means: with untrained weights computed here from the rows themselves."""
    data = rows_file(tmp_path, *[{"prompt": "p\n", "completion": "yes " * (1 + 5 * i)} for i in range(8)])
    toy = common.toy_model()
    tokenizer = common.load_tokenizer(toy, False)
    model = transformers.AutoModelForCausalLM.from_pretrained(toy)
    rows = make_rows(tokenizer, *[(r["prompt"], r["completion"]) for r in lines(tmp_path / "rows.jsonl")])
    for flags, start in (([], rows[0].prompt_length), (["--train_on_prompt"], 1)):
        losses = []
        for row in rows:
            ids = torch.from_numpy(row.ids).long()
            with torch.no_grad():
                logps = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            losses.append(-logps[start - 1 :])
        for micro in ("8", "2"):
            out = tmp_path / f"{start}-{micro}"
            batch = ["--micro_batch_size", micro, "--global_batch_size", "8", "--max_steps", "1", "--generate", "0"]
            run(sft, "--dataset", data, "--eval_dataset", data, "--output_dir", str(out), *batch, *flags)
            before, step, _ = lines(out / "metrics.jsonl")
            assert step["loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-4)
            assert before["loss"] == pytest.approx(step["loss"], abs=1e-4)
        assert abs(torch.cat(losses).mean() - torch.stack([own.mean() for own in losses]).mean()) > 1e-3


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "out"
    done = launch("sft.py", 0, "--output_dir", str(out), *SHORT)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("ranks, stage, extra", [(2, 2, []), (2, 3, ["--gradient_checkpointing"])])
def test_ranks_and_zero_stages_change_nothing(one_process, tmp_path, ranks, stage, extra):
    out = tmp_path / "out"
    done = launch("sft.py", ranks, "--zero_stage", str(stage), "--output_dir", str(out), *SHORT, *extra)
    assert done.returncode == 0, done.stderr
    for mine, other in zip(lines(out / "metrics.jsonl"), lines(one_process / "metrics.jsonl"), strict=True):
        for key in ("loss", "perplexity", "grad_norm", "lr"):
            assert (mine.get(key) or 0) == pytest.approx(other.get(key) or 0, rel=1e-3), (mine["step"], key)
    mine, other = (transformers.AutoModelForCausalLM.from_pretrained(o / "model") for o in (out, one_process))
    for (name, a), (_, b) in zip(mine.named_parameters(), other.named_parameters(), strict=True):
        assert (a - b).abs().mean() < 1e-4, name  # Adam takes whole steps where a gradient is nearly 0
    assert len(json.loads((out / "generations.json").read_text())) == 5


# ---------------------------------------------------------------- bad input and the paper's runs


def reward_folder(folder) -> str:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(common.toy_model(), num_labels=1)
    model.save_pretrained(folder / "reward")
    common.load_tokenizer(common.toy_model(), False).save_pretrained(folder / "reward")
    return str(folder / "reward")


def short_model(folder) -> str:
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, vocab_size=512)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "short")
    common.load_tokenizer(common.toy_model(), False).save_pretrained(folder / "short")
    return str(folder / "short")


BAD = {
    "learned positions": (
        lambda f: ["--model", short_model(f), "--max_length", "65"],
        r"short has 64 learned positions, but a row may have 65 tokens: lower --max_length",
    ),
    "a split that no row has": (
        lambda f: ["--dataset", rows_file(f, {"prompt": "p", "completion": "c", "split": "a"}) + ":b"],
        r"no row has split 'b'; there are \['a'\]",
    ),
    "completions empty throughout": (
        lambda f: ["--dataset", rows_file(f, *[{"prompt": "p", "completion": ""}] * 3)],
        r"rows.jsonl: no usable row is left \(3 empty response\)",
    ),
    "a reward model": (lambda f: ["--model", reward_folder(f)], r"is a reward model, but a language model is needed"),
    "columns": (
        lambda f: ["--dataset", rows_file(f, {"prompt": "p", "chosen": "a"})],
        r"row 1: the columns are prompt",
    ),
    "no text": (lambda f: ["--dataset", rows_file(f, {"prompt": 1, "completion": "c"})], r"row 1: prompt is 1, but"),
    "too few": (
        lambda f: ["--dataset", rows_file(f, *[{"prompt": "p", "completion": "c"}] * 5)],
        r"4 rows, without the held-out ones, do not fill a --global_batch_size of 32: pass",
    ),
    "generate": (lambda f: ["--generate", "-1"], r"--generate is -1, but must be at least 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(run, tmp_path, name):
    make, message = BAD[name]
    argv = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(common.InputError, match=message) as caught:
        run(sft, "--output_dir", str(tmp_path / "out"), *argv)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-written


def test_a_dtype_that_the_device_lacks_is_refused(monkeypatch):
    """On whatever device the test runs: some CPUs have fp16."""
    device = deepspeed.accelerator.get_accelerator()
    monkeypatch.setattr(device, "is_fp16_supported", lambda: False)
    monkeypatch.setattr(device, "is_bf16_supported", lambda: True)
    with pytest.raises(common.InputError, match="--dtype fp16 is not supported on this device: use fp32 or bf16"):
        common.engine_config(sft.Args(dtype="fp16"), 1)


SIZE = dict(
    pad_token_id=0, vocab_size=512, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
)


@pytest.mark.parametrize(
    "config, part",
    [
        (transformers.CohereConfig(**SIZE, logit_scale=0.5), "logit_scale"),
        (transformers.RecurrentGemmaConfig(**SIZE), "logits_soft_cap"),
        (transformers.ModernBertDecoderConfig(**SIZE), "lm_head"),  # a layer between the model and its `decoder`
    ],
)
def test_logits_that_are_not_the_heads_are_refused(process, tokenizer, tmp_path, config, part):
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    args = sft.Args(model=str(tmp_path))
    with pytest.raises(common.InputError, match=f"its {part} changes the logits"):
        sft.load_policy(str(tmp_path), args, tokenizer, common.engine_config(args, 1))


def test_architectures_without_sdpa_are_refused(process, tokenizer, tmp_path):
    config = transformers.BloomConfig(vocab_size=512, hidden_size=32, n_layer=1, n_head=2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    args = sft.Args(model=str(tmp_path))
    with pytest.raises(common.InputError, match="transformers has no `sdpa` attention for this architecture"):
        sft.load_policy(str(tmp_path), args, tokenizer, common.engine_config(args, 1))


# METHOD: data; length, global batch, learning rate, weight decay, epochs.
TABLE = {
    "alpaca": dict(max_length=512, global_batch_size=128, learning_rate=2e-5),
    "tldr": dict(max_length=1024, global_batch_size=64, learning_rate=1e-5),
}
ALL = dict(weight_decay=0.0, epochs=3, warmup_steps=0, seed=42, dtype="bf16", zero_stage=2, gradient_checkpointing=True)


@pytest.mark.parametrize("task", TABLE)
def test_the_papers_runs(task):
    args = dataclasses.asdict(common.parse_args(sft.Args, sft.preset, ["--task", task, "--model", "m"]))
    expected = ALL | TABLE[task] | {"train_on_prompt": False}
    assert {k: args[k] for k in expected} == expected
    assert ("alpaca_instructions/sft/" in args["dataset"]) == ("alpaca_instructions/val/" in args["eval_dataset"])
    for ranks in (1, 2, 4, 8):
        resolved = sft.Args(**args)
        accumulation = common.accumulation_steps(resolved, common.Process(0, ranks, CPU))
        assert ranks * accumulation * resolved.micro_batch_size == args["global_batch_size"]


def test_one_command_line_does_not_reach_the_next():
    common.parse_args(sft.Args, sft.preset, ["--dataset", "own.jsonl"])
    assert common.parse_args(sft.Args, sft.preset, []).eval_dataset.endswith("sft_eval.jsonl")


def test_every_flag_is_read():
    source = open(sft.__file__).read() + open(common.__file__).read()
    unread = [f.name for f in dataclasses.fields(sft.Args) if not re.search(rf"args\.{f.name}\b", source)]
    assert unread == ["local_rank"]
