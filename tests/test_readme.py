"""The README against the code: its commands parse, its keys are the ones that are logged, its files exist."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

import common
import dpo
import ppo
import reward
import sft

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
HEADERS = "".join(script.__doc__ for script in (sft, reward, dpo, ppo))
COMMANDS = re.findall(r"(?:deepspeed|python)(?: --num_gpus \d+)? (\w+\.py)([^\n`]*)", README + HEADERS)


def test_the_papers_runs_are_there():
    """2 of SFT, 10 of the reward model, 3 of DPO, and 6 of PPO."""
    runs = {(name, *shlex.split(rest)) for name, rest in COMMANDS if "--task" in rest and "<" not in rest}
    five = ("none", "len_rat", "cos_sim", "random", "fixed")
    assert runs == (
        {("sft.py", "--task", task) for task in ("alpaca", "tldr")}
        | {("reward.py", "--task", task, "--constraint", c) for task in ("alpaca", "tldr") for c in five}
        | {("dpo.py", "--task", "alpaca", "--constraint", c) for c in five[:3]}
        | {
            (
                *("ppo.py", "--task", task, "--policy_model", f"runs/sft-{task}/model"),
                *("--reward_model", f"runs/reward-{task}-{c}/model"),
            )
            for task in ("alpaca", "tldr")
            for c in five[:3]
        }
    )


@pytest.mark.parametrize("name, rest", sorted(set(COMMANDS)))
def test_commands_parse(name, rest):
    script = importlib.import_module(name.removesuffix(".py"))
    argv = shlex.split(re.sub(r"\s{2,}.*|<[^>]*>|\.\.\.\)?", lambda m: "m" if m[0].startswith("<") else "", rest))
    if "--task" in argv and "--model" not in argv and name != "ppo.py":
        argv += ["--model", "m"]
    assert common.parse_args(script.Args, script.preset, argv)


def test_the_two_commands():
    install = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && "
    assert README.count("    " + install) == 2
    run = (ROOT / ".ci" / "run").read_text()
    assert re.search(r"-m pytest [^\n]*", README)[0] in run


def test_files_and_keys_are_named():
    for name in ("sft.py", "reward.py", "dpo.py", "ppo.py", "priors.py", "common.py", "assets/margins.png"):
        assert (ROOT / name).exists() and name in README
    for key in (
        "loss rank_loss constraint_loss accuracy margin_mean margin_std margin_max bound_mean over_bound chosen_score "
        "rejected_score score_std lr grad_norm pairs_per_s tokens_per_s length_accuracy spearman_similarity "
        "ranked_spearman ranked_kendall perplexity rows_per_s chosen_reward rejected_reward chosen_logps rejected_logps kl "
        "policy_grad_norm critic_grad_norm score_mean score_max score_growth entropy response_tokens ended_by_eos "
        "policy_loss value_loss policy_clipfrac value_clipfrac explained_variance ratio_mean returns_mean prompts_per_s "
        "seconds_sample seconds_score seconds_learn judge_score win_rate"
    ).split():
        assert f"`{key}`" in README, key
