"""The README against the code: its commands parse, its files exist, its flags and keys are those of real runs."""

import common

import dataclasses
import importlib
import itertools
import re
import shlex
import subprocess
import sys

import pytest
from helpers import ROOT, lines, rows_file

import dpo
import ppo
import reward
import sft

SCRIPTS = {script.__name__: script for script in (sft, reward, dpo, ppo)}
README = (ROOT / "README.md").read_text(encoding="utf-8")
HEADERS = "".join(script.__doc__ for script in SCRIPTS.values())
WRITTEN = re.findall(r"(?:deepspeed|python)(?: --num_gpus \d+)? (\w+\.py)([^\n`]*)", README + HEADERS)


def expanded(rest: str) -> list[str]:
    """As a shell expands {a,b}."""
    parts = [part.split(",") for part in re.split(r"\{([^}]*)\}", rest)]
    parts[::2] = [[",".join(part)] for part in parts[::2]]
    return list(map("".join, itertools.product(*parts)))


COMMANDS = [(name, one) for name, rest in WRITTEN for one in expanded(rest)]


# ---------------------------------------------------------------- commands


def test_the_papers_runs_are_there():
    """2 of SFT, 10 of the reward model, 3 of DPO, and 6 of PPO."""
    runs = {(name, *shlex.split(rest)) for name, rest in COMMANDS if "--task" in rest and "<" not in rest}
    tasks, five = ("alpaca", "tldr"), ("none", "len_rat", "cos_sim", "random", "fixed")
    expected = [f"sft.py --task {task}" for task in tasks]
    expected += [f"reward.py --task {task} --constraint {constraint}" for task in tasks for constraint in five]
    expected += [f"dpo.py --task alpaca --constraint {constraint}" for constraint in five[:3]]
    expected += [
        f"ppo.py --task {task} --policy_model sft/model --reward_model {constraint}/model"
        for task in tasks
        for constraint in five[:3]
    ]
    assert runs == {tuple(run.split()) for run in expected} and len(runs) == 21


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


def test_size():
    """330 lines of at most 120 characters, 22 KB; what one reads, before the reference, 190 lines."""
    assert len(README.splitlines()) <= 330 and len(README.encode()) <= 22_000
    assert len(README[: README.index("\n## Reference")].splitlines()) <= 190
    assert max(map(len, README.splitlines())) <= 120


# ---------------------------------------------------------------- names


def quoted(text: str) -> set[str]:
    """What stands in backticks."""
    return set(re.findall(r"`([^`\n]+)`", text))


def test_files_are_there_and_named():
    named = {name for name in quoted(README) if re.fullmatch(r"(data|tests|assets)/[\w./]*|\w+\.py", name)}
    named |= set(re.findall(r"\]\((assets/[^)]+)\)", README)) | set(re.findall(r"tests/\w+\.py", README))
    for name in named:
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name
    assert {path.name for path in ROOT.glob("*.py")} | {"data/", "tests/"} <= named


def test_flags_are_there():
    """Of one of the scripts, of a program in tests/, or of the launcher, Slurm, pip and alpaca_eval."""
    known = {field.name for script in SCRIPTS.values() for field in dataclasses.fields(script.Args)}
    for path in (ROOT / "tests").glob("*.py"):
        known |= set(re.findall(r'add_argument\("--(\w+)"', path.read_text(encoding="utf-8")))
    known |= {"check", "help", "num_gpus", "num_nodes", "hostfile", "master_port", "index-url", "model_outputs"}
    known |= {"signal", "requeue", "open-mode", "ntasks-per-node", "gpus-per-node"}  # sbatch's
    assert set(re.findall(r"--([a-z][\w-]*)", README)) <= known


@pytest.fixture(scope="module")
def logged(run, toy, toy_reward, tmp_path_factory) -> dict[str, dict[str, set[str]]]:
    """Of a short run of each script the keys of its train and eval lines and of eval.jsonl, and its files."""
    out = tmp_path_factory.mktemp("runs")
    row = dict(prompt="Where?\n", completion="Aisle 3.", chosen="Aisle 3.", rejected="No.")
    data = rows_file(out, *[row | dict(responses=[f"{i}", "No.", "Go."], scores=[3, 2, 1]) for i in range(4)])
    models = f"--policy_model {toy} --reward_model {toy_reward} --judge_model {toy_reward} --max_new_tokens 4"
    flags = dict(sft="", reward=f"--constraint fixed --ranked_dataset {data}", ppo=models) | dict(
        dpo=f"--constraint fixed --ranked_dataset {data}"
    )
    found = {}
    for name, script in SCRIPTS.items():
        batch = "--max_steps 1 --global_batch_size 2"
        run(script, f"{flags[name]} {batch} --dataset {data} --eval_dataset {data} --output_dir {out}/{name}")
        found[name] = {"files": {path.name for path in (out / name).iterdir() if not path.name.startswith(".")}}
        for line in lines(out / name / "metrics.jsonl"):
            found[name].setdefault(line["split"], set()).update(line)
        if (out / name / "eval.jsonl").exists():
            found[name]["eval.jsonl"] = set(lines(out / name / "eval.jsonl")[0])
    return found


def test_every_key_and_file_of_a_run_is_named(logged):
    named = {name.rstrip("/") for name in quoted(README)}
    for script, parts in logged.items():
        for part, names in parts.items():
            assert names <= named, (script, part, names - named)


def test_every_key_of_the_table_is_logged(logged):
    """By the scripts that a row marks, and by no other; (eval): in no train line."""
    table = re.search(r"(?m)^\| key \|.*\n\|[ -|]*\n((?:\|.*\n)+)", README)[1]
    rows = [[cell.strip() for cell in line.split("|")[1:]] for line in table.splitlines()]
    assert len(rows) > 15
    for cell, *marks in rows:
        keys, each = quoted(cell), dict(zip(SCRIPTS, marks))
        train, evaluated = ({name: keys & logged[name][split] for name in SCRIPTS} for split in ("train", "eval"))
        found = evaluated if "(eval)" in cell else {name: train[name] | evaluated[name] for name in SCRIPTS}
        assert keys and set().union(*found.values()) == keys, cell
        assert {name for name in found if found[name]} == {name for name in each if each[name] == "x"}, cell
        assert not ("(eval)" in cell and any(train.values())), cell


@pytest.mark.parametrize("command", ["check", "format --check"])
def test_ruff(command):
    done = subprocess.run([sys.executable, "-m", "ruff", *command.split(), str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
