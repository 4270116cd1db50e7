"""The flags of the four scripts: --help, what wins over what, the paper's runs, batches on several ranks, readers."""

import common

import argparse
import dataclasses
import shlex

import pytest
import torch
from helpers import rows_file

import dpo
import ppo
import reward
import sft

SCRIPTS = {script.__name__: script for script in (sft, reward, dpo, ppo)}
every_script = pytest.mark.parametrize("name", SCRIPTS)


def parse(name: str, argv: str = ""):
    return common.parse_args(SCRIPTS[name].Args, SCRIPTS[name].preset, argv.split())


# ---------------------------------------------------------------- what a flag is


@every_script
def test_help_shows_every_flag_and_the_values_in_force(name, capsys):
    """Those of the task and constraint on the same command line."""
    script = SCRIPTS[name]
    constraint = "--constraint cos_sim" if name in ("reward", "dpo") else ""
    for argv, preset in (("", {}), (f"--task alpaca {constraint}", script.preset("alpaca", "cos_sim"))):
        with pytest.raises(SystemExit) as ended:
            parse(name, f"{argv} --help")
        assert ended.value.code == 0
        shown = capsys.readouterr().out.replace("│", " ")
        for field in dataclasses.fields(script.Args):
            assert f"--{field.name}" in shown.replace(",", " ").split(), field.name
            value = preset.get(field.name, field.default)
            if field.name not in ("task", "constraint"):
                shown_value = shlex.quote(value) if isinstance(value, str) else str(value)
                assert f"(default:{shown_value})".replace(" ", "") in "".join(shown.split()), field.name


@every_script
def test_flags_win_over_the_task(name):
    models = "--policy_model p --reward_model r" if name == "ppo" else "--model m"
    own = "--weight_decay 0.5 --no_gradient_checkpointing --micro_batch_size 3 --dtype fp32"
    first, last = parse(name, f"--task alpaca {models} {own}"), parse(name, f"{own} {models} --task alpaca")
    assert first == last
    found = (first.weight_decay, first.gradient_checkpointing, first.micro_batch_size, first.dtype, first.seed)
    assert found == (0.5, False, 3, "fp32", 42)
    preset = SCRIPTS[name].preset("alpaca", "none")
    assert first.global_batch_size == preset["global_batch_size"] and first.dataset == preset["dataset"]


@every_script
@pytest.mark.parametrize("form", ["--dataset {}", "--dataset={}", "--eval_dataset {}", "--eval-dataset={}"])
def test_own_data_cancels_the_tasks_own(name, form):
    """Held-out data of the task say nothing of a model that is trained on others', nor do its ranked responses."""
    models = "--policy_model p --reward_model r" if name == "ppo" else "--model m"
    for task in ("toy", "alpaca"):
        tasks, found = (parse(name, f"--task {task} {models} {flag}") for flag in ("", form.format("x.jsonl")))
        if form.startswith("--dataset"):
            assert (found.dataset, found.eval_dataset) == ("x.jsonl", "")
            both = parse(name, f"--task {task} {models} --eval_dataset y.jsonl {form.format('x.jsonl')}")
            assert (both.dataset, both.eval_dataset) == ("x.jsonl", "y.jsonl")
        else:
            assert (found.dataset, found.eval_dataset) == (tasks.dataset, "x.jsonl")
        if name in ("reward", "dpo"):
            assert found.ranked_dataset == ""
            assert parse(name, f"{form.format('x.jsonl')} --ranked-dataset z.jsonl").ranked_dataset == "z.jsonl"


@every_script
def test_one_command_line_does_not_reach_the_next(name):
    before = parse(name)
    parse(name, "--dataset own.jsonl --seed 7 --generate 3" if name != "reward" else "--dataset own.jsonl --seed 7")
    assert parse(name) == before and before.eval_dataset.endswith("_eval.jsonl")


@pytest.mark.parametrize("name", ["sft", "reward", "dpo"])
def test_a_task_of_the_paper_needs_a_model(name, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(name, "--task alpaca")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "error: --task alpaca needs --model" in said and said.count("\n") == 1


# ---------------------------------------------------------------- the paper's runs

BERT = dict(encoder="google-bert/bert-base-uncased", encoder_pooling="cls", ranked_dataset="")
ALL = dict(dtype="bf16", gradient_checkpointing=True, seed=42, micro_batch_size=4)
# The paper's settings. What is common to a script's runs; by task length, batch, learning rate; by task and constraint
# β1 to β3, or the control's values.
TABLE = {
    "sft": dict(weight_decay=0.0, epochs=3, warmup_steps=0, zero_stage=2, train_on_prompt=False),
    "reward": BERT | dict(weight_decay=0.1, epochs=1, warmup_steps=0, zero_stage=2),
    "dpo": BERT
    | dict(
        weight_decay=0.0, epochs=1, warmup_steps=0, zero_stage=2, kl_beta=0.1, label_smoothing=0.0, live_reference=False
    ),
    "ppo": dict(
        global_batch_size=128,
        policy_learning_rate=1e-5,
        critic_learning_rate=5e-6,
        weight_decay=0.1,
        epochs=1,
        ppo_epochs=1,
        minibatches=1,
        warmup_steps=100,
        policy_zero_stage=2,
        critic_zero_stage=3,
        kl_coef=0.1,
        score_clip=5.0,
        missing_eos_penalty=0.0,
        gamma=1.0,
        gae_lambda=0.95,
        cliprange=0.2,
        cliprange_value=0.2,
        temperature=1.0,
    ),
    ("sft", "alpaca"): dict(max_length=512, global_batch_size=128, learning_rate=2e-5),
    ("sft", "tldr"): dict(max_length=1024, global_batch_size=64, learning_rate=1e-5),
    ("reward", "alpaca"): dict(max_length=512, global_batch_size=16, learning_rate=3e-6),
    ("reward", "tldr"): dict(max_length=1024, global_batch_size=64, learning_rate=1e-6),
    ("dpo", "alpaca"): dict(max_length=512, global_batch_size=32, learning_rate=1e-6),
    ("ppo", "alpaca"): dict(max_prompt_length=256, max_new_tokens=384, max_steps=50),
    ("ppo", "tldr"): dict(max_prompt_length=768, max_new_tokens=256, max_steps=250),
    ("reward", "alpaca", "cos_sim"): dict(beta1=20, beta2=0.001, beta3=-15),
    ("reward", "alpaca", "len_rat"): dict(beta1=20, beta2=0.001, beta3=-15),
    ("reward", "alpaca", "random"): dict(random_low=4, random_high=5),
    ("reward", "alpaca", "fixed"): dict(fixed_bound=4.5),
    ("reward", "tldr", "cos_sim"): dict(beta1=30, beta2=0.001, beta3=-25),
    ("reward", "tldr", "len_rat"): dict(beta1=10, beta2=0.001, beta3=-5),
    ("reward", "tldr", "random"): dict(random_low=5, random_high=6),
    ("reward", "tldr", "fixed"): dict(fixed_bound=5),
    ("dpo", "alpaca", "cos_sim"): dict(beta1=30, beta2=0.001, beta3=-25),
    ("dpo", "alpaca", "len_rat"): dict(beta1=20, beta2=0.001, beta3=-15),
}
FARM = "hf://datasets/tatsu-lab/alpaca_farm"
SUMMARIES = "vwxyzjn/summarize_from_feedback_tldr_3_filtered"
# Script and task: what the names of the data begin with, and what else they hold. None are held out by us alone.
DATA = {
    ("sft", "alpaca"): ((FARM, "alpaca_instructions/sft/"), (FARM, "alpaca_instructions/val/")),
    ("sft", "tldr"): ((SUMMARIES, ":train"), (SUMMARIES, ":validation")),
    ("reward", "alpaca"): ((FARM, "/alpaca_human_preference.json"), ("", "")),
    ("reward", "tldr"): (("hf://datasets/openai/summarize_from_feedback", "comparisons"),) * 2,
    ("dpo", "alpaca"): ((FARM, "/alpaca_human_preference.json"), ("", "")),
    ("ppo", "alpaca"): ((FARM, "alpaca_instructions/unlabeled/"), (FARM, "alpaca_instructions/val/")),
    ("ppo", "tldr"): ((SUMMARIES, ":train"), (SUMMARIES, ":validation")),
}
FIVE, THREE = ("none", "len_rat", "cos_sim", "random", "fixed"), ("none", "len_rat", "cos_sim")
PAPER = [("sft", task, "") for task in ("alpaca", "tldr")]
PAPER += [("reward", task, constraint) for task in ("alpaca", "tldr") for constraint in FIVE]
PAPER += [("dpo", "alpaca", constraint) for constraint in THREE]
PAPER += [("ppo", task, constraint) for task in ("alpaca", "tldr") for constraint in THREE]  # the reward model's


@pytest.mark.parametrize("name, task, constraint", PAPER)
def test_the_papers_runs(name, task, constraint):
    """Every value of the paper's; the global batch is its own on 1, 2, 4 and 8 ranks."""
    flags = f"--model m --constraint {constraint}" if constraint else "--model m"
    if name == "ppo":
        flags = f"--policy_model runs/sft-{task}/model --reward_model runs/reward-{task}-{constraint}/model"
    args = parse(name, f"--task {task} {flags}")
    expected = ALL | TABLE[name] | TABLE[name, task] | TABLE.get((name, task, constraint), {})
    assert {key: getattr(args, key) for key in expected} == expected
    for found, (begin, part) in zip((args.dataset, args.eval_dataset), DATA[name, task]):
        assert found.startswith(begin) and part in found and bool(found) == bool(begin)
    if (name, task) == ("reward", "tldr"):
        assert args.dataset.endswith("/train/*.parquet:train")
        assert args.eval_dataset.endswith("/validation/*.parquet:valid2")
    for ranks in (1, 2, 4, 8):
        own = ppo.engine_args(args, "policy") if name == "ppo" else dataclasses.replace(args)
        accumulation = common.accumulation_steps(own, common.Process(0, ranks, torch.device("cpu")))
        assert ranks * accumulation * own.micro_batch_size == expected["global_batch_size"]
        assert own.micro_batch_size == min(4, expected["global_batch_size"] // ranks)
    if name == "ppo":
        policy, critic = (ppo.engine_args(args, which) for which in ("policy", "critic"))
        assert (policy.zero_stage, critic.zero_stage) == (2, 3)
        assert (policy.learning_rate, critic.learning_rate) == (1e-5, 5e-6)


def test_the_controls_need_their_values_in_dpo_on_dialogue():
    """The paper has no such run: no value is made up for it."""
    similarity = torch.tensor([0.5])
    for constraint, own in (("random", "--random_low 4 --random_high 5"), ("fixed", "--fixed_bound 4")):
        flags = f"--task alpaca --constraint {constraint} --model m"
        with pytest.raises(common.InputError, match=f"--constraint {constraint}: .* 0"):
            dpo.pair_bounds(similarity, parse("dpo", flags))
        assert 4 <= dpo.pair_bounds(similarity, parse("dpo", f"{flags} {own}")).item() <= 5


# ---------------------------------------------------------------- every flag has a reader


def recording(base, reads: set[str]):
    """A class like `base` that notes which attributes are read, by whatever code."""

    class Recording(base):
        def __getattribute__(self, name):
            reads.add(name)
            return super().__getattribute__(name)

    return Recording


@every_script
def test_every_flag_is_read(name, run, toy, toy_reward, tmp_path, monkeypatch):
    """By a run that needs it: checking its range or writing args.json does not count."""
    row = dict(prompt="Where?\n", completion="Aisle 3.", chosen="Aisle 3.", rejected="No.")
    data = rows_file(tmp_path, *[row | dict(responses=[f"{i}", "No.", "Go."], scores=[3, 2, 1]) for i in range(4)])
    short = (
        f"--dataset {data} --eval_dataset {data} --output_dir {tmp_path}/out --overwrite --epochs 2 --max_steps 1 "
        "--global_batch_size 2 --micro_batch_size 1 --save_every 1"
    )
    flags = {
        "sft": ["--generate 1"] * 2,  # the second time the folder has a finished run
        "ppo": [f"--policy_model {toy} --reward_model {toy_reward} --judge_model {toy_reward} --max_new_tokens 4"] * 2,
        "reward": [f"--constraint {c} --ranked_dataset {data}" for c in ("cos_sim", "random", "fixed")],
    }
    flags["dpo"] = [f"{own} --generate 1" for own in flags["reward"]]
    script, reads, real = SCRIPTS[name], set(), common.check_flags
    parsed = [parse(name, f"{short} {own}") for own in flags[name]]

    def check_flags(args, outputs):
        before = set(reads)
        real(args, outputs)
        reads.intersection_update(before)

    monkeypatch.setattr(common, "check_flags", check_flags)
    monkeypatch.setattr(argparse, "Namespace", recording(argparse.Namespace, reads))
    for args in parsed:
        script.main(recording(script.Args, reads)(**vars(args)))
    unread = {field.name for field in dataclasses.fields(script.Args)} - reads
    assert unread == {"task", "local_rank"}  # the first was read while parsing, the second is the launcher's
