"""ppo.py where it stops or refuses, and what it leaves. Its numbers: test_ppo_oracle.py."""

import common

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import lines

import ppo

SHORT = "--max_steps 2 --log_every 1 --global_batch_size 16 --micro_batch_size 8 --generate 6 --max_new_tokens 24"


@pytest.fixture
def flags(toy, toy_reward, tmp_path) -> str:
    return f"--policy_model {toy} --reward_model {toy_reward} --output_dir {tmp_path}/out {SHORT}"


def watch(patch, name: str, found: list, module=ppo) -> None:
    """Append to `found` what a function returns."""
    real = getattr(module, name)
    patch.setattr(module, name, lambda *args, **rest: found.append(real(*args, **rest)) or found[-1])


def test_what_a_run_leaves(run, flags, toy_reward, tmp_path, monkeypatch):
    """Its files; and that reference, reward model and judge take no gradients, nor memory for them."""
    watch(monkeypatch, "make_engine", engines := [], common)
    run(ppo, f"{flags} --judge_model {toy_reward}")
    names = {"args.json", "metrics.jsonl", "ppo.png", "generations.json", "model", "tensorboard"}
    assert {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")} == names
    assert (tmp_path / "out" / "ppo.png").read_bytes().startswith(b"\x89PNG")
    gradients = [{p.requires_grad for p in engine.parameters()} for engine in engines]
    assert gradients == [{True}, {False}, {True}, {False}, {False}]


def test_a_reward_model_that_returns_nan_is_refused(process):
    """Before its scores become rewards, and by its name."""
    rollout = ppo.Rollout([[1, 5]], [[6, 2]], torch.ones(1, 2, dtype=torch.bool), torch.ones(1, dtype=torch.bool))

    def broken(**inputs):
        return SimpleNamespace(logits=torch.tensor([math.nan]))

    def collator(rollout, rows):
        return ppo.collate(rollout, rows, 0, process.device)

    with pytest.raises(common.InputError, match="a score that is not finite"):
        ppo.score(broken, rollout, ppo.Args(), collator, process)


def test_a_critic_whose_gradient_is_not_finite_ends_the_run(run, flags, tmp_path, monkeypatch):
    """In fp32 without ZeRO no engine looks at its gradients. Nothing of such a step is kept."""
    losses = ppo.value_losses

    def infinite_gradient(values, *rest):
        loss, clipped = losses(values, *rest)
        return loss + 1e30 * (values - values.detach()) * 1e30, clipped

    monkeypatch.setattr(ppo, "value_losses", infinite_gradient)
    with pytest.raises(common.InputError, match="step 1: the gradient is not finite: lower"):
        run(ppo, f"{flags} --generate 0 --save_every 1")
    assert not {"model", "checkpoints"} & {path.name for path in (tmp_path / "out").iterdir()}


def test_a_kl_above_the_limit_stops(run, flags, tmp_path, capsys):
    run(ppo, f"{flags} --max_kl 0.5 --policy_learning_rate 0.01 --max_steps 9")
    last = lines(tmp_path / "out" / "metrics.jsonl")[-2]
    assert last["step"] < 9 and last["kl"] > 0.5
    assert f"stopped at step {last['step']}: the KL is above --max_kl 0.5" in capsys.readouterr().out
