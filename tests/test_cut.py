"""A run that is cut off anywhere goes on with --resume to the same bits, or is refused in one line that says why.

A kill leaves what is on the disk: so one run that nobody kills is copied at named moments, and each copy goes on.
"""

import common

import contextlib
import errno
import functools
import os
import re
import resource
import shutil
import signal
import sys
from pathlib import Path
from unittest import mock

import kill
import pytest
import safetensors.torch
import torch
from ranks import on_two_ranks

import dpo
import ppo
import reward
import sft

SCRIPTS = {script.__name__: script for script in (sft, reward, dpo, ppo)}
SIGNALS = (signal.SIGTERM, signal.SIGINT)
SFT, REWARD, DPO, PPO = map(kill.Config, SCRIPTS)
REWARD_2, PPO_2 = kill.Config("reward", 2, 2, "bf16"), kill.Config("ppo", 2, 3, "bf16")
MOMENTS = {  # the newest whole checkpoint then, and what is called next with which arguments: of 2, 4, 6 one is kept
    "before the first checkpoint": (0, common, "optimizer_step", "2 "),
    "in a save": (2, torch, "save", r"step-4\.part"),
    "in a save, but for state.json": (2, Path, "write_text", r"step-4\.part/state.json"),
    "before the rename": (2, Path, "rename", r"step-4\.part "),
    "in the removal": (4, shutil, "rmtree", "step-2"),
    "in a step": (4, common, "optimizer_step", "6 "),
    "in the last save": (4, torch, "save", r"step-6\.part"),
    "before the model": (6, os, "replace", "model "),
    "at the end": (6, os, "replace", "eval.jsonl |generations.json "),
}
OVERWRITE = {"in the removal": (0, shutil, "rmtree", "checkpoints"), "at the end": (0, os, "replace", "args.json ")}
TABLE = {SFT: list(MOMENTS), REWARD: ["in a save", "in the removal", "at the end"], DPO: ["before the rename"]}
TABLE |= {REWARD_2: ["in a save", "in the removal"], PPO_2: ["in a save, but for state.json"]}


@contextlib.contextmanager
def before(module, name: str, pattern: str, action):
    """Inside, action() comes just before each call whose numbers and texts are like the pattern."""
    real = getattr(module, name)

    def call(*args, **options):
        if re.search(pattern, "".join(f"{arg} " for arg in args if isinstance(arg, int | str | Path))):
            action(*args)
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, call)
        yield


@contextlib.contextmanager
def copied(folder: Path, moments: dict, to: Path):
    """Inside, a run's folder is copied to to/MOMENT/run at each moment; in a removal one file is gone by then."""

    def copy(moment: str, first, *_) -> None:
        if not (to / moment).exists():
            for file in sorted(first.rglob("state.json"))[-1:] if moment == "in the removal" else ():
                file.unlink()
            shutil.copytree(folder, to / moment / "run")

    with contextlib.ExitStack() as stack:
        for moment, (_, *call) in moments.items():
            stack.enter_context(before(*call, functools.partial(copy, moment)))
        yield


def train(config: kill.Config, work: Path, folder: Path, flags: str = "") -> list[int]:
    """Run a configuration here, without pictures; returns its steps, in which signals are kept, and after them not."""
    script, taken = SCRIPTS[config.script], []

    def step_begins(step: int, *_) -> None:
        taken.append(step)
        assert signal.SIG_DFL not in map(signal.getsignal, SIGNALS)

    def model_is_written(*_) -> None:
        assert list(map(signal.getsignal, SIGNALS)) == [signal.SIG_DFL] * 2

    handlers = list(map(signal.getsignal, SIGNALS))
    steps_seen = before(common, "optimizer_step", "", step_begins)
    with pytest.MonkeyPatch.context() as patch, steps_seen, before(common, "writing", "/model ", model_is_written):
        patch.setattr(common, "plot_margins", lambda *_: None)
        patch.setattr(ppo, "plot_steps", lambda *_: None)
        argv = [*config.flags(work), "--output_dir", str(folder), *flags.split()]
        try:
            script.main(common.parse_args(script.Args, script.preset, argv))
        finally:
            list(map(signal.signal, SIGNALS, handlers))
    return taken


def signalled(number: int, at: int, *run) -> None:
    """A run whose last rank alone gets the signal in a step: all ranks end after it, with its checkpoint."""
    last = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
    send = before(common, "optimizer_step", f"^{at} ", lambda *_: last and os.kill(os.getpid(), number))
    with send, pytest.raises(SystemExit) as ended:
        train(*run)
    assert ended.value.code == 128 + number and steps(run[2])[-1] == at


def steps(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in common.whole(folder)]


def cut_everywhere(config: kill.Config, work: Path) -> None:
    """Below work/CONFIG: the whole run; a copy at each moment, and a run that a signal ends, both gone on with."""
    folder, first = work / str(config), os.environ["RANK"] == "0"
    with copied(folder / "whole", {moment: MOMENTS[moment] for moment in TABLE[config] if first}, folder):
        train(config, work, folder / "whole", "--keep 1")
    if first:
        assert steps(folder / "whole") == [6]
        files = [{file.relative_to(path) for file in path.rglob("*")} for path in folder.rglob("checkpoints/step-?")]
        assert all(some == files[0] for some in files)  # what looks whole is whole
    for moment in TABLE[config]:
        again = {"again": MOMENTS["in the last save"]} if moment == "in a save" and first else {}
        with copied(folder / moment / "run", again, folder):
            taken = train(config, work, folder / moment / "run", "--keep 1 --resume")
        assert sorted({*taken}) == list(range(MOMENTS[moment][0] + 1, 7)), moment
    if (folder / "again").exists():
        train(config, work, folder / "again" / "run", "--resume")
    signalled(SIGNALS[config in (REWARD, PPO_2)], 3, config, work, folder / "signal" / "run", "--save_every 0")
    train(config, work, folder / "signal" / "run", "--resume --save_every 0")


def check_cuts(config: kill.Config, work: Path) -> None:
    folder = work / str(config)
    assert {path.parent.name for path in folder.glob("*/run")} >= {*TABLE[config], "signal"}
    for run in folder.glob("*/run"):
        assert kill.differences(run, folder / "whole") == [], run


@pytest.fixture(scope="module")
def work(process, tmp_path_factory) -> Path:
    return kill.prepare(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def whole(work) -> Path:
    """A run that is neither cut nor writes a checkpoint."""
    train(SFT, work, work / "whole", "--save_every 0")
    return work / "whole"


@pytest.mark.parametrize("config", [SFT, REWARD, DPO], ids=str)
def test_cut_anywhere_a_run_comes_to_the_same_bits(work, whole, config):
    cut_everywhere(config, work)
    check_cuts(config, work)
    assert config != SFT or kill.differences(work / str(SFT) / "whole", whole) == []


NO_ROOM = pytest.raises(common.InputError, match="^no checkpoint at step 4 .*$")
FULL_DISK = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(work, whole, tmp_path):
    """A file of which a thousand bytes can be written, then a rename for which there is no room."""
    run, (soft, hard) = (SFT, work, tmp_path / "run"), resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE)
    try:
        with before(torch, "save", "step-4", lambda *_: limit((1000, hard))), NO_ROOM:
            train(*run)
    finally:
        limit((soft, hard))
    with before(Path, "rename", "step-4.part ", FULL_DISK), NO_ROOM:
        train(*run, "--resume")
    assert steps(run[2]) == [2] and train(*run, "--resume") == [3, 4, 5, 6]
    assert kill.differences(run[2], whole) == []


def test_killed_while_an_old_run_is_removed(work, left, tmp_path):
    """What is left of it is neither refused nor gone on from, under other flags."""
    flags = "--seed 7 --generate 1 --max_steps 3"
    train(SFT, work, tmp_path / "new", flags)
    (shutil.copytree(left, tmp_path / "run") / "generations.json").write_text("[]")
    with copied(tmp_path / "run", OVERWRITE, tmp_path):
        train(SFT, work, tmp_path / "run", f"{flags} --overwrite")
    for moment in OVERWRITE:
        assert train(SFT, work, tmp_path / moment / "run", f"{flags} --resume") == [1, 2, 3]
    for run in tmp_path.glob("**/run"):
        assert kill.differences(run, tmp_path / "new") == []


def test_ppo_stopped_by_its_kl_and_by_a_signal_trains_no_further(work, tmp_path):
    """Both in the second step, before which the first has moved the policy far."""
    flags = "--max_kl 1e-3 --policy_learning_rate 0.03"
    signalled(signal.SIGINT, 2, PPO, work, tmp_path, flags)
    assert train(PPO, work, tmp_path, f"{flags} --resume") == []
    assert (tmp_path / "generations.json").exists()


@pytest.fixture(scope="module")
def left(work) -> Path:
    """A run that a signal ended in step 5."""
    signalled(signal.SIGTERM, 5, SFT, work, work / "left", "--save_every 1 --keep 3")
    assert steps(work / "left") == [3, 4, 5]
    return work / "left"


def two_ranks(folder: str) -> None:
    """All that two ranks do, in one start of the launcher."""
    common.start(0)
    work = Path(folder)

    for fault, kinds in ((FULL_DISK, (OSError, common.InputError)), (functools.partial(sys.exit, 7), SystemExit)):
        with pytest.raises(kinds, match="No space|7"):
            common.on_rank_0(fault)
    with before(Path, "rename", "step-4.part ", FULL_DISK), NO_ROOM:  # only rank 0 renames
        train(REWARD_2, work, work / "two")
    cut_everywhere(REWARD_2, work)
    cut_everywhere(PPO_2, work)


def test_two_ranks(work):
    """Whatever rank 0 raises reaches both; both come to the same bits; one rank does not go on where two were."""
    on_two_ranks(two_ranks, str(work))
    check_cuts(REWARD_2, work)
    check_cuts(PPO_2, work)
    with pytest.raises(common.InputError, match="the number of ranks is 1, but was 2"):
        train(REWARD_2, work, work / "two", "--resume")


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """The files of `work` elsewhere; and in `changed` others under their names."""
    folder = tmp_path_factory.mktemp("other")
    kill.prepare(folder / "same")
    for file in (changed := kill.prepare(folder / "changed")).glob("*_train.jsonl"):
        file.write_text(file.read_text().replace("a", "e", 1))
    weights = safetensors.torch.load_file(changed / "CausalLM" / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    safetensors.torch.save_file(weights, changed / "CausalLM" / "model.safetensors", {"format": "pt"})
    return folder


REFUSED = {
    "": "holds checkpoints of a run: choose another, or pass --resume or --overwrite",
    "--resume --seed 7": "--seed is 7, but was 42",
    "--resume --dataset {}/changed/sft_train.jsonl": "the rows is ",
    "--resume --model {}/changed/CausalLM": "--model is ",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_refused(work, left, other, flags):
    """And the run is as it was."""
    before = (left / "args.json").read_bytes()
    with pytest.raises(common.InputError) as caught:
        train(SFT, work, left, flags.format(other))
    assert REFUSED[flags] in str(caught.value) and len(str(caught.value)) < 900
    assert steps(left) == [3, 4, 5] and (left / "args.json").read_bytes() == before


def test_another_encoder_is_refused(work, other, tmp_path):
    """But not the same one elsewhere; nor is a held-out part of the same rows taken for another."""
    flags = "--constraint cos_sim --encoder {}/CausalLM --eval_dataset= --save_every 0"
    signalled(signal.SIGINT, 1, REWARD, work, tmp_path, flags.format(work))
    with pytest.raises(common.InputError, match="--encoder is "):
        train(REWARD, work, tmp_path, f"--resume {flags}".format(other / "changed"))
    assert train(REWARD, work, tmp_path, f"--resume {flags}".format(other / "same")) == [2, 3, 4]


def test_the_same_elsewhere_and_free_flags_are_not_refused(work, whole, left, other, tmp_path, monkeypatch):
    """Model and data at other places, written in other ways; what changes no result changes the lines alone."""
    run = shutil.copytree(left, tmp_path / "run")
    monkeypatch.chdir(other)
    files = "--model ./same/CausalLM --dataset same/sft_train.jsonl"
    assert train(SFT, work, run, f"--resume {files} --log_every 1 --eval_every 0 --save_every 0 --keep 1") == [6]
    for name in ("model/model.safetensors", "generations.json"):
        assert (run / name).read_bytes().replace(b'"run"', b'"whole"') == (whole / name).read_bytes()


def test_a_finished_run_says_so(work, whole, capsys):
    with pytest.raises(SystemExit) as ended:
        train(SFT, work, whole, "--resume")
    assert not ended.value.code and f"{whole} holds this run, finished" in capsys.readouterr().out
    for flags, said in ("", "holds a finished run: .* pass --resume or --overwrite"), ("--resume --seed 7", "was 42"):
        with pytest.raises(common.InputError, match=said):
            train(SFT, work, whole, flags)


def test_the_status_of_a_process(monkeypatch, capsys):
    """And the one line that is said of what the user can mend."""
    ends, ended = [KeyboardInterrupt(), SystemExit(143), SystemExit(None), common.InputError("a\nfault")], []
    main = mock.Mock(side_effect=ends)
    monkeypatch.setattr(sys, "argv", ["x.py"])
    for name, instead in {"dist.is_initialized": bool, "signal.signal": max, "os._exit": ended.append}.items():
        monkeypatch.setattr(f"common.{name}", instead)
    for _ in ends:
        common.run(main, sft.Args, sft.preset)
    assert ended == [130, 143, 0, 1] and capsys.readouterr().err == "x.py: error: a fault\n"
