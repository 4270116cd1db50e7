"""No run is lost: what is killed, stopped or refused room goes on with --resume to the same bits, or says why not."""

import json
import os
import resource
import shutil
import signal

import pytest

import common
import dpo
import kill
import ppo
import reward
import sft
from helpers import lines

SCRIPTS = dict(sft=sft, reward=reward, dpo=dpo, ppo=ppo)
SFT = kill.Config("sft")


class Cut(Exception):
    """Ends a run where a kill would."""


@pytest.fixture(scope="module")
def work(run, tmp_path_factory):
    """The folder of the runs that nobody cuts, and of the models that PPO starts from."""
    folder = tmp_path_factory.mktemp("work")
    for name in ("sft", "reward"):
        run(SCRIPTS[name], *kill.Config(name).flags(folder), "--output_dir", str(folder / name))
    return folder


@pytest.fixture
def train(run, work):
    """train(config, folder, "--flag value ...") runs a configuration in this process."""

    def call(config, folder, flags: str = "") -> None:
        run(SCRIPTS[config.script], *config.flags(work), "--output_dir", str(folder), *flags.split())

    return call


@pytest.fixture
def whole(train, work):
    """whole(config) is the folder of a run that nobody cuts."""

    def call(config):
        folder = work / f"whole-{config}"
        if not folder.exists():
            train(config, folder)
        return folder

    return call


@pytest.fixture
def cut(train, monkeypatch):
    """cut(config, folder, step, "--flag value ...") ends a run after a step, before its checkpoint."""

    def call(config, folder, step: int, flags: str = "") -> None:
        real = common.Checkpoints.step_done

        def step_done(self, now: int, **state) -> None:
            if now == step:
                raise Cut
            real(self, now, **state)

        with monkeypatch.context() as patch, pytest.raises(Cut):
            patch.setattr(common.Checkpoints, "step_done", step_done)
            train(config, folder, flags)

    return call


def steps(folder) -> list[int]:
    return [int(path.name[5:]) for path in common.whole(folder)]


# ---------------------------------------------------------------- the same bits


CONFIGS = ("sft 0 fp32", "sft 3 bf16", "reward 1 bf16", "reward 2 fp16", "dpo 2 bf16", "ppo 0 fp32", "ppo 2 bf16")


@pytest.mark.parametrize("name", CONFIGS)
def test_cut_twice_a_run_comes_to_the_same(train, whole, cut, tmp_path, monkeypatch, name):
    """Once with lines written since the checkpoint, once with steps that no line has yet; epochs of three steps."""
    device = common.deepspeed.accelerator.get_accelerator()
    monkeypatch.setattr(device, "is_fp16_supported", lambda: True)
    script, stage, dtype = name.split()
    config = kill.Config(script, 1, int(stage), dtype)
    cut(config, tmp_path / "run", 6)
    assert steps(tmp_path / "run") == [2, 4] and metrics_step(tmp_path / "run") == 6
    cut(config, tmp_path / "run", 5, "--resume")
    assert steps(tmp_path / "run") == [2, 4] and metrics_step(tmp_path / "run") == 3
    train(config, tmp_path / "run", "--resume")
    assert kill.differences(tmp_path / "run", whole(config)) == []


def metrics_step(folder) -> int:
    return lines(folder / "metrics.jsonl")[-1]["step"]


def test_a_checkpoint_between_the_cut_and_the_next_line(train, whole, cut, tmp_path):
    """Its note of how long metrics.jsonl is must not count the lines that were cut off."""
    for step, flags in ((7, "--save_every 4"), (6, "--save_every 5 --resume")):
        cut(SFT, tmp_path / "run", step, flags)
    cut(SFT, tmp_path / "run", 7, "--save_every 0 --resume")
    train(SFT, tmp_path / "run", "--resume")
    assert kill.differences(tmp_path / "run", whole(SFT)) == []


def test_cut_after_the_last_evaluation(train, whole, tmp_path, monkeypatch):
    """The checkpoint of the last step is older than that evaluation, which is not there twice in the end."""

    def stop(*_):
        raise Cut

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(common, "answer_prompts", stop)
        train(SFT, tmp_path / "run")
    train(SFT, tmp_path / "run", "--resume")
    assert kill.differences(tmp_path / "run", whole(SFT)) == []
