"""Micro batches, ranks and ZeRO stages change nothing but the order of sums: one table for the four scripts."""

import common

from pathlib import Path

import kill
import pytest
import safetensors.torch
import torch
from helpers import lines
from ranks import on_two_ranks

import dpo
import ppo
import reward
import sft

SCRIPTS = dict(sft=sft, reward=reward, dpo=dpo, ppo=ppo)
ONE = {"fp32": (1, 0, 8, "fp32"), "bf16": (1, 0, 8, "bf16")}  # ranks, ZeRO stage, micro batch, precision
OTHERS = [(1, 2, 2, "fp32"), (2, 0, 4, "fp32"), (2, 3, 1, "fp32"), (2, 2, 2, "bf16")]
# Four steps of 8 of the 24 rows are an epoch and one of the next. PPO's minibatches are cut from each rank's own rows.
FLAGS = "--max_steps 4 --log_every 1 --save_every 0 --eval_every 0"
FLAGS_OF = dict(sft="", reward="", dpo="", ppo="--minibatches 1 --ppo_epochs 2")
# How far the weights may be apart, as a share of their way. In fp32 sums in another order differ by some 1e-7 of their
# terms, and AdamW divides by gradients that may be small: 1e-5 was seen, where another row is 1e-2 or more. bf16 keeps
# 8 bits of a gradient: 0.07 was seen.
FAR = {"fp32": 1e-4, "bf16": 0.15}


def runs(name: str, every: list) -> list:
    """Those of a script. In bf16 PPO soon samples another token, and then has other data."""
    return [run for run in every if name != "ppo" or run[3] == "fp32"]


def folder_of(work: Path, name: str, run: tuple) -> Path:
    return Path(work) / "-".join(map(str, (name, *run))) / "out"  # as answers name it


def run_all(work: str, ranks: str) -> None:
    """The runs of the table on so many ranks, without their pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "plot_margins", lambda *_: None)
        patch.setattr(ppo, "plot_steps", lambda *_: None)
        for name, script in SCRIPTS.items():
            for run in runs(name, [*ONE.values(), *OTHERS]):
                if run[0] == int(ranks):
                    argv = kill.Config(name, run[0], run[1], run[3]).flags(Path(work)) + FLAGS.split()
                    argv += [*FLAGS_OF[name].split(), "--micro_batch_size", str(run[2])]
                    argv += ["--output_dir", str(folder_of(work, name, run))]
                    script.main(common.parse_args(script.Args, script.preset, argv))


@pytest.fixture(scope="module")
def work(process, tmp_path_factory) -> Path:
    work = kill.prepare(tmp_path_factory.mktemp("work"))
    run_all(str(work), "1")
    on_two_ranks(run_all, str(work), "2")
    return work


def weights(folder: Path) -> torch.Tensor:
    """All weights below the head, which reward.py draws."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    return torch.cat([tensors[name].flatten().float() for name in sorted(tensors) if name.startswith("model.")])


@pytest.mark.parametrize("name, run", [(name, run) for name in SCRIPTS for run in runs(name, OTHERS)], ids=str)
def test_the_same_results(work, name, run):
    """Weights by the way that they have gone; metrics of each step; held-out rows in their order; answers."""
    one, other, far = folder_of(work, name, ONE[run[3]]), folder_of(work, name, run), FAR[run[3]]
    here, there, start = weights(one / "model"), weights(other / "model"), weights(work / "CausalLM")
    assert (there - here).norm() < far * (here - start).norm()
    exact, close = run[3] == "fp32", min(far, 0.03)
    for mine, theirs in zip(lines(other / "metrics.jsonl"), lines(one / "metrics.jsonl"), strict=True):
        assert mine.keys() == theirs.keys() and mine["split"] == theirs["split"]
        for key in mine.keys() & ({*mine} if exact else {"step", "lr", "bound_mean", "loss", "grad_norm"}) - {"split"}:
            if (mine["step"], key) == (0, "spearman_similarity"):  # of DPO's margins: 0, or what rounding leaves
                continue
            near = 0.02 if key.endswith("clipfrac") else close / 10  # two tokens of a hundred, at the edge of the clip
            same = pytest.approx(theirs[key] or 0, rel=close, abs=near)
            assert kill.is_rate(key) or (mine[key] or 0) == same, (mine["step"], key)
    if exact and name in ("reward", "dpo"):
        pairs = [pytest.approx(line, rel=far, abs=far) for line in lines(one / "eval.jsonl")]
        assert len(pairs) == 4 and lines(other / "eval.jsonl") == pairs
    if exact and name != "reward":
        assert (other / "generations.json").read_text() == (one / "generations.json").read_text()
