"""The README against the code: its commands parse, its keys are the ones that are logged, its files exist."""

import re
import shlex
from pathlib import Path

import pytest

import common
import reward

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"(?:deepspeed|python)(?: --num_gpus \d+)? (\w+\.py)([^\n`]*)", README + reward.__doc__)


def test_there_are_ten_runs_of_the_paper():
    runs = {tuple(shlex.split(rest)) for name, rest in COMMANDS if "--task" in rest and "--num_gpus" not in rest}
    assert {r for r in runs if len(r) == 4} == {
        ("--task", task, "--constraint", constraint)
        for task in ("alpaca", "tldr")
        for constraint in ("none", "len_rat", "cos_sim", "random", "fixed")
    }


@pytest.mark.parametrize("name, rest", sorted(set(COMMANDS)))
def test_commands_parse(name, rest):
    assert name == "reward.py"
    argv = shlex.split(re.sub(r"\s{2,}.*|<[^>]*>|\.\.\.\)?", lambda m: "m" if m[0].startswith("<") else "", rest))
    if "--task" in argv and "--model" not in argv:
        argv += ["--model", "m"]
    assert common.parse_args(reward.Args, reward.preset, argv)


def test_the_two_commands():
    install = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && "
    assert README.count("    " + install) == 2
    run = (ROOT / ".ci" / "run").read_text()
    assert re.search(r"-m pytest [^\n]*", README)[0] in run


def test_files_and_keys_are_named():
    for name in ("reward.py", "priors.py", "common.py", "assets/margins.png"):
        assert (ROOT / name).exists() and name in README
    for key in (
        "loss rank_loss constraint_loss accuracy margin_mean margin_std margin_max bound_mean over_bound chosen_score "
        "rejected_score score_std lr grad_norm pairs_per_s tokens_per_s length_accuracy spearman_similarity ranked_spearman "
        "ranked_kendall"
    ).split():
        assert f"`{key}`" in README, key
