"""reward.py and dpo.py alike: each pair meets its own bound, and nothing about the machine changes what is learned."""

import common

import inspect
import json
import math
import os
from pathlib import Path

import pytest
import torch
import transformers
from helpers import lines, rows_file
from ranks import on_two_ranks
from safetensors.torch import load_file

import dpo
import reward

SCRIPTS = dict(reward=reward, dpo=dpo)
KEYS = dict(reward=("chosen_score", "rejected_score"), dpo=("chosen_logps", "rejected_logps"))
AUTO = dict(reward=transformers.AutoModelForSequenceClassification, dpo=transformers.AutoModelForCausalLM)


def first_rows(name: str, count: int) -> list[dict]:
    """The first different rows of an embedded file."""
    unique = dict.fromkeys((common.DATA / f"{name}.jsonl").read_text().splitlines())
    return [json.loads(line) for line in list(unique)[:count]]


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> str:
    """The flags of 48 pairs to train on, 12 held out, and 6 prompts with ranked responses."""
    files = dict(
        dataset=("preference_train", 48), eval_dataset=("preference_eval", 12), ranked_dataset=("ranked_eval", 6)
    )
    paths = {flag: rows_file(tmp_path_factory.mktemp(flag), *first_rows(*rows)) for flag, rows in files.items()}
    return " ".join(f"--{flag} {path}" for flag, path in paths.items())


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """They take longer than the rest."""
    monkeypatch.setattr(common, "plot_margins", lambda *_: None)


@pytest.mark.parametrize("name", ["similarities", "pair_bounds"])
def test_what_the_siblings_repeat_is_the_same(name):
    """They repeat these on purpose: each stands alone. A change in one is a change in both."""
    assert inspect.getsource(getattr(dpo, name)) == inspect.getsource(getattr(reward, name))


# ---------------------------------------------------------------- each pair's own bound


def ratio(chosen: list[int], rejected: list[int]) -> float:
    """The shorter of what follows the common beginning over the longer."""
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)) - 1)
    shorter, longer = sorted((len(chosen) - same, len(rejected) - same))
    return shorter / longer


@torch.no_grad()
def angular(tokenizer, model, prompt: str, chosen: str, rejected: str) -> float:
    """1 - angle / π between the mean hidden states of the two texts."""
    texts = [tokenizer(prompt + response, return_tensors="pt") for response in (chosen, rejected)]
    chosen, rejected = (model(**text).last_hidden_state[0].double().mean(0) for text in texts)
    return 1 - math.acos(torch.cosine_similarity(chosen, rejected, 0)) / math.pi


@pytest.mark.parametrize("constraint", ["len_rat", "cos_sim", "random"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_each_training_pair_meets_its_own_bound(run, few, toy, tokenizer, tmp_path, monkeypatch, name, constraint):
    """The bound that follows from the pair's own similarity, or was drawn for its row and the epoch, in whatever order
    and micro batch the pair comes."""
    script, rows = SCRIPTS[name], [tuple(row.values()) for row in first_rows("preference_train", 48)]
    encoder = transformers.AutoModel.from_pretrained(toy)
    batches, arguments, collate, loss = [], [], script.collate, script.ranking_loss

    def spy_collate(batch, **rest):
        batches.append(batch)
        return collate(batch, **rest)

    def spy_loss(argument, *smoothing):
        if argument.requires_grad:
            arguments.append((batches[-1], argument.detach()))
        return loss(argument, *smoothing)

    monkeypatch.setattr(script, "collate", spy_collate)
    monkeypatch.setattr(script, "ranking_loss", spy_loss)
    flags = f"{few} --constraint {constraint} --epochs 2 --micro_batch_size 4 --global_batch_size 16"
    run(script, flags + " --generate 0" * (name == "dpo") + f" --output_dir {tmp_path}/out")
    draws = [script.pair_bounds(torch.empty(48), script.Args(constraint="random"), epoch) for epoch in (0, 1)]
    assert len(set(torch.cat(draws).tolist())) > 90

    def expected(batch: dict, i: int, epoch: int) -> float:
        texts = tuple(batch[column][i] for column in ("prompt", "chosen", "rejected"))
        if constraint == "random":
            return draws[epoch][rows.index(texts)].item()
        if constraint == "len_rat":
            return 20 / (ratio(batch["chosen_ids"][i], batch["rejected_ids"][i]) + 0.001) - 15
        return 20 / (angular(tokenizer, encoder, *texts) + 0.001) - 15

    assert len(arguments) == 2 * 2 * 48 / 4  # m, then δ* - m, of 12 micro batches in each of 2 epochs
    for i in range(0, len(arguments), 2):
        (batch, margin), (_, rest) = arguments[i : i + 2]
        bounds = [expected(batch, number, i // 24) for number in range(4)]
        assert len(set(bounds)) > 1 and (margin + rest).flatten().tolist() == pytest.approx(bounds, rel=1e-4)


# ---------------------------------------------------------------- ranks, precision, ZeRO, offload, checkpointing


def start_folder(folder: Path, seed: int) -> str:
    """A Llama with weights of over 100,000 numbers, under which ZeRO-3 would not shard them."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=1600,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    common.load_tokenizer(common.toy_model(), False).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def base(few, toy, tmp_path_factory) -> dict[str, str]:
    """The flags of three steps on 16 pairs each, whose first bounds, margins and rewards are not 0."""
    folder = tmp_path_factory.mktemp("start")
    policy, reference = (start_folder(folder / name, seed) for seed, name in enumerate(("policy", "reference")))
    flags = f"{few} --model {policy} --constraint random --max_steps 3 --log_every 1 --global_batch_size 16"
    flags += " --learning_rate 0.001 --max_length 128"
    return dict(reward=flags, dpo=f"{flags} --generate 3 --label_smoothing 0.1 --ref_model {reference}")


@pytest.fixture(scope="module")
def whole(run, base, tmp_path_factory) -> dict[str, Path]:
    """What one rank learns in fp32 at ZeRO-0, each step in one micro batch."""
    folder = tmp_path_factory.mktemp("whole")
    for name, flags in base.items():
        run(SCRIPTS[name], f"{flags} --micro_batch_size 16 --output_dir {folder}/{name}")
    return {name: folder / name for name in base}


def same_training(mine: Path, other: Path) -> None:
    """Every figure of every step, the gradient's norm among them, the sampled answers and the resulting weights."""
    for a, b in zip(lines(mine / "metrics.jsonl"), lines(other / "metrics.jsonl"), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"split", "pairs_per_s", "tokens_per_s"}:
            assert a[key] == pytest.approx(b[key], rel=2e-5, abs=2e-5), (a["step"], a["split"], key)
    if (other / "generations.json").exists():
        a, b = (json.loads((folder / "generations.json").read_text()) for folder in (mine, other))
        assert [line["output"] for line in a] == [line["output"] for line in b]
    mine, other = (load_file(folder / "model" / "model.safetensors") for folder in (mine, other))
    assert mine.keys() == other.keys()
    for key, weight in other.items():  # Adam's steps are of 1e-3, whole ones where a gradient is nearly 0
        assert (mine[key] - weight).abs().mean() < 1e-6, key


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_step_says_of_its_pairs_what_evaluation_says(run, few, base, tmp_path, name):
    """The first step on all pairs, in 3 micro batches of 16, before any weight has moved."""
    flags = f"--eval_dataset {few.split()[1]} --global_batch_size 48 --micro_batch_size 16 --max_steps 1"
    run(SCRIPTS[name], f"{base[name]} {flags} --output_dir {tmp_path}/out")
    before, step, _ = lines(tmp_path / "out" / "metrics.jsonl")
    shared = before.keys() & step.keys() - {"step", "split"}
    assert {"loss", "rank_loss", "constraint_loss", "margin_std", "over_bound"} <= shared
    for key in shared:
        assert step[key] == pytest.approx(before[key], rel=2e-5, abs=2e-5), key


ONE_RANK = """
    reward --zero_stage 0 --micro_batch_size 4 --gradient_checkpointing
    reward --zero_stage 1 --micro_batch_size 16 --offload
    reward --zero_stage 2 --micro_batch_size 8
    reward --zero_stage 3 --micro_batch_size 2 --offload --gradient_checkpointing
    dpo --zero_stage 0 --micro_batch_size 2 --live_reference
    dpo --zero_stage 1 --micro_batch_size 8 --gradient_checkpointing
    dpo --zero_stage 2 --micro_batch_size 4 --offload --gradient_checkpointing
    dpo --zero_stage 3 --micro_batch_size 16
"""
TWO_RANKS = """
    reward --zero_stage 0 --micro_batch_size 8
    reward --zero_stage 1 --micro_batch_size 4 --offload
    reward --zero_stage 2 --micro_batch_size 2 --gradient_checkpointing
    reward --zero_stage 3 --micro_batch_size 8
    dpo --zero_stage 0 --micro_batch_size 4 --gradient_checkpointing
    dpo --zero_stage 2 --micro_batch_size 2 --offload
    dpo --zero_stage 3 --micro_batch_size 4 --offload --gradient_checkpointing
    dpo --zero_stage 3 --micro_batch_size 8 --live_reference
"""
ONE_RANK, TWO_RANKS = ([line.strip() for line in text.strip().splitlines()] for text in (ONE_RANK, TWO_RANKS))


@pytest.mark.parametrize("line", ONE_RANK)
def test_micro_batches_zero_offload_and_checkpointing_change_nothing(run, base, whole, tmp_path, monkeypatch, line):
    monkeypatch.setenv("PCRM_CACHE", str(tmp_path / "cache"))  # the reference is computed anew
    name, flags = line.split(maxsplit=1)
    run(SCRIPTS[name], f"{base[name]} {flags} --output_dir {tmp_path}/out")
    same_training(tmp_path / "out", whole[name])


def of_two_ranks(base: dict[str, str], whole: dict[str, str], folder: str) -> None:
    common.plot_margins = lambda *_: None
    for number, line in enumerate(TWO_RANKS):
        os.environ["PCRM_CACHE"] = f"{folder}/cache{number}"
        name, flags = line.split(maxsplit=1)
        script, flags = SCRIPTS[name], f"{base[name]} {flags} --output_dir {folder}/{number}"
        script.main(common.parse_args(script.Args, script.preset, flags.split()))
    for name, script in SCRIPTS.items():
        flags = f"{base[name]} --epochs 0 --zero_stage 3 --micro_batch_size 4 --model {whole[name]}/model"
        script.main(common.parse_args(script.Args, script.preset, f"{flags} --output_dir {folder}/{name}".split()))


@pytest.fixture(scope="module")
def two(base, whole, tmp_path_factory) -> Path:
    """What two ranks make of all that, started once."""
    folder = tmp_path_factory.mktemp("two")
    on_two_ranks(of_two_ranks, base, {name: str(path) for name, path in whole.items()}, str(folder))
    return folder


@pytest.mark.parametrize("line", TWO_RANKS)
def test_a_second_rank_changes_nothing(whole, two, line):
    same_training(two / str(TWO_RANKS.index(line)), whole[line.split()[0]])


@pytest.mark.parametrize("name", SCRIPTS)
def test_evaluation_alone_on_two_ranks(whole, two, name):
    (found,) = lines(two / name / "metrics.jsonl")
    expected = lines(whole[name] / "metrics.jsonl")[-1]
    for key in expected.keys() - {"step", "split"}:
        assert found[key] == pytest.approx(expected[key], rel=2e-5, abs=2e-5), key


@torch.no_grad()
def reloaded(name: str, model) -> torch.Tensor:
    """Score or log-probability of each held-out pair's responses, each sequence alone: (n, 2)."""
    tokenizer, values = transformers.AutoTokenizer.from_pretrained(model.name_or_path), []
    for row in first_rows("preference_eval", 12):
        for side in ("chosen", "rejected"):
            ids = tokenizer(row["prompt"] + row[side] + "</s>", return_tensors="pt").input_ids
            value = model(ids).logits[0].float()
            if name == "dpo":
                logps = value[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])
                value = logps[len(tokenizer(row["prompt"]).input_ids) - 1 :].sum()
            values.append(value.item())
    return torch.tensor(values).view(-1, 2)


@pytest.mark.parametrize(
    "name, dtype, error",
    [
        ("reward", "fp32", 1e-5),
        ("reward", "bf16", 0.05),
        ("reward", "fp16", 0.01),
        ("dpo", "fp32", 3e-4),
        ("dpo", "bf16", 0.2),
    ],
)
def test_what_is_saved_is_what_was_trained(run, base, whole, tmp_path, monkeypatch, name, dtype, error):
    """At each ZeRO stage the module's own weights, bit by bit and in its precision, that give what was logged from the
    texts alone (log-probabilities are about -300); and all stages train alike, in 16 bits much as in 32."""
    monkeypatch.setattr(common.deepspeed.accelerator.get_accelerator(), "is_fp16_supported", lambda: True)
    save, trained, losses = common.save_model, {}, {}

    def spy(engine, model, *rest):
        sharded = [not own.ds_persist for own in model.parameters() if hasattr(own, "ds_persist")]
        assert any(sharded) == (stage == 3)
        save(engine, model, *rest)
        with common.deepspeed.zero.GatheredParameters(list(model.parameters())):
            trained.update((key, value.detach().clone()) for key, value in model.named_parameters())

    monkeypatch.setattr(common, "save_model", spy)
    for stage in range(4) if dtype != "fp16" else (0, 3):  # fp16 is slow on a CPU
        out = tmp_path / str(stage)
        flags = f"{base[name]} --dtype {dtype} --zero_stage {stage} --output_dir {out}"
        run(SCRIPTS[name], flags + " --generate 0" * (name == "dpo") + " --max_steps 1" * (dtype == "fp16"))
        model = AUTO[name].from_pretrained(out / "model")
        assert model.dtype == dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)[dtype]
        for key, weight in model.named_parameters():
            assert torch.equal(weight, trained[key]), key
        logged = [[line[key] for key in KEYS[name]] for line in lines(out / "eval.jsonl")]
        assert torch.allclose(reloaded(name, model), torch.tensor(logged), rtol=0, atol=error)
        losses[stage] = [line["loss"] for line in lines(out / "metrics.jsonl")]
        assert losses[stage] == pytest.approx(losses[0], abs=1e-5)
    in_fp32 = [line["loss"] for line in lines(whole[name] / "metrics.jsonl")]
    same = slice(2 if dtype == "fp16" else None)  # its schedule is over after a step
    assert losses[0][same] == pytest.approx(in_fp32[same], abs=1e-5 if dtype == "fp32" else 0.02)
