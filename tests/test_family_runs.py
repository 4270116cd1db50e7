"""PPO on each decoder family, and all four scripts at ZeRO-3 on two ranks.

The oracle is the one of test_families.py: the plain model on each sequence alone. That file has the other scripts.
"""

import common

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers import lines
from ranks import on_two_ranks
from test_families import (
    CLASSIFIERS,
    REFUSED,
    SHORT,
    plain,
    run_dpo,
    run_reward,
    run_sft,
    save_model,
    small_config,
)
from test_faults_models import data_flags
from test_ppo import logps_alone, values_alone, watch

import dpo
import ppo
import reward
import sft

CAUSAL, CLASSIFIER = transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification
FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt_neox",
    "gpt2",
    "opt",
    "phi",
    "falcon",
    "falcon alibi",
    "olmo2",
    "cohere",
    "granite",
    "bloom",
)
SHARDED = ("gpt2", "gpt_neox", "gemma3_text", "falcon")  # tied and not, with and without biases, Conv1D
PPO = "--max_steps 1 --global_batch_size 4 --micro_batch_size 2 --max_new_tokens 8 --generate 3".split()


def ppo_models(folder, family: str, tokenizer) -> dict[str, str]:
    """A policy of the family, and a reward model of it too, where transformers has one: else a Llama."""
    own = family if family.split()[0] in CLASSIFIERS and family not in REFUSED else "llama"
    config = small_config(own)
    config.num_labels = 1
    return {
        "policy": save_model(folder / "policy", small_config(family), tokenizer),
        "reward": save_model(folder / "reward", config, tokenizer, CLASSIFIER),
    }


def check_saved(folder, start: str) -> None:
    """It has every weight that the architecture has and no other, all finite, and training has moved some."""
    model, info = CAUSAL.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    before = CAUSAL.from_pretrained(start).state_dict()
    moved = []
    for name, weight in model.state_dict().items():
        assert weight.isfinite().all(), name
        moved.append((weight - before[name]).abs().max().item())
    assert 1e-5 < max(moved) < 0.1


def check_drawn(model, tokenizer, calls: list) -> None:
    """Each sampled token is what the model draws that sees its own sequence alone: no padding, no cache, no batch.

    Of the cumulated distribution over the tokens that the tokenizer can name it is the one at the row's random number.
    """
    named = set(tokenizer.get_vocab().values())
    never = [token for token in range(model.config.get_text_config().vocab_size) if token not in named]
    for prompts, seeds, answers in calls:
        for prompt, seed, answer in zip(prompts, seeds, answers, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            logits[:, never] = -torch.inf
            below = logits.softmax(-1).double().cumsum(-1)
            above = torch.cat([torch.zeros(len(answer), 1), below], 1)
            for point, token, low, high in zip(np.random.default_rng(seed).random(8), answer, above, below):
                assert low[token] - 1e-3 <= point <= high[token] + 1e-3
            assert len(answer) == 8 or answer[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_ppo(run, tokenizer, data, tmp_path, monkeypatch, family):
    """What is sampled, its log-probabilities, values and scores are those of the models on each sequence alone."""
    models, out = ppo_models(tmp_path, family, tokenizer), tmp_path / "out"
    rollouts, calls, sample = [], [], common.sample

    def watched(engine, model, tokenizer, prompts, rooms, seeds, *rest):
        calls.append((prompts, seeds, sample(engine, model, tokenizer, prompts, rooms, seeds, *rest)))
        return calls[-1][-1]

    monkeypatch.setattr(common, "sample", watched)
    watch(monkeypatch, "sample", rollouts)
    argv = ["--policy_model", models["policy"], "--reward_model", models["reward"], *data, "--output_dir", str(out)]
    run(ppo, *argv, *PPO)
    policy, scorer = plain(CAUSAL, models["policy"]), plain(CLASSIFIER, models["reward"])
    own = common.load_tokenizer(models["policy"], False)
    check_drawn(policy, own, calls[:2])  # before training, and the step's
    check_drawn(plain(CAUSAL, out / "model"), own, calls[2:])
    assert len(calls) == 3 and [len(answers) for _, _, answers in calls] == [3, 4, 3]

    rollout = rollouts[1]
    named = torch.tensor(sorted(own.get_vocab().values()))
    for row, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
        with torch.no_grad():
            logps, ids = logps_alone(policy, prompt, response, 1.0), torch.tensor([prompt + response])
            logits = policy(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            logps = logps - logits[:, named].logsumexp(-1)
            values, score = values_alone(scorer, prompt, response), scorer(ids).logits.item()
        for found, expected in ((rollout.logps, logps), (rollout.ref_logps, logps), (rollout.values, values)):
            assert torch.allclose(found[row, : len(response)], expected, rtol=0, atol=1e-4)
        assert rollout.scores[row].item() == pytest.approx(score, abs=1e-4)
    (step,) = (line for line in lines(out / "metrics.jsonl") if line["split"] == "train")
    assert step["ratio_mean"] == pytest.approx(1, abs=1e-4) and step["critic_grad_norm"] > 0
    check_saved(out / "model", models["policy"])


def runs_on_two_ranks(runs: list) -> None:
    """[[script, flags], ...] one after the other; margins are not drawn."""
    scripts = dict(sft=sft, reward=reward, dpo=dpo, ppo=ppo)
    common.plot_margins = ppo.plot_steps = lambda *_: None
    for name, argv in runs:
        script = scripts[name]
        script.main(common.parse_args(script.Args, script.preset, argv))


@pytest.fixture(scope="module")
def sharded(tokenizer, tmp_path_factory) -> Path:
    """FAMILY/SCRIPT of each sharded family and script, its starting models in policy and reward beside them."""
    folder, runs = tmp_path_factory.mktemp("sharded"), []
    flags = data_flags(folder)
    for family in SHARDED:
        models = ppo_models(folder / family, family, tokenizer)
        zero = ["--zero_stage", "3", "--model", models["policy"], *flags, *SHORT]
        both = ["--policy_model", models["policy"], "--reward_model", models["reward"], *flags, *PPO]
        argv = dict(sft=[*zero, "--generate", "2"], dpo=[*zero, *"--generate 0 --constraint fixed".split()])
        argv |= dict(reward=zero, ppo=[*both, *"--policy_zero_stage 3 --critic_zero_stage 3".split()])
        runs += [[name, [*rest, "--output_dir", f"{folder}/{family}/{name}"]] for name, rest in argv.items()]
    on_two_ranks(runs_on_two_ranks, runs)
    return folder


def done(*_) -> None:
    """In place of the fixture `run`: the run is there."""


@pytest.mark.parametrize("family", SHARDED)
def test_zero_3_on_two_ranks(sharded, family):
    """As on one rank without: what is logged is what the plain models give, before and after, and what is saved."""
    folder = sharded / family
    policy = str(folder / "policy")
    run_sft(done, policy, [], folder / "sft")
    run_dpo(done, policy, [], folder / "dpo")
    run_reward(done, policy, [], folder / "reward")
    before, step, _ = lines(folder / "ppo" / "metrics.jsonl")
    assert before["kl"] == pytest.approx(0, abs=1e-4) and step["ratio_mean"] == pytest.approx(1, abs=1e-4)
    assert len(json.loads((folder / "ppo" / "generations.json").read_text())) == 3
    for name in ("sft", "dpo", "ppo"):
        check_saved(folder / name / "model", policy)
