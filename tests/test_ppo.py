"""ppo.py: rewards, advantages and losses by hand, log-probabilities and padding, the four models, runs, bad input."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
import transformers

import common
import dpo
import ppo
import reward
import sft
from helpers import launch, lines, rows_file

CPU = torch.device("cpu")
SHORT = [
    "--max_steps",
    "2",
    "--log_every",
    "1",
    "--global_batch_size",
    "16",
    "--generate",
    "6",
    "--max_new_tokens",
    "24",
]
KEYS = set(
    "step split lr policy_grad_norm critic_grad_norm score_mean score_std score_max score_growth kl entropy "
    "response_tokens ended_by_eos policy_loss value_loss policy_clipfrac value_clipfrac explained_variance ratio_mean "
    "returns_mean prompts_per_s seconds_sample seconds_score seconds_learn".split()
)
EVAL_KEYS = set(
    "step split score_mean score_std score_max score_growth kl response_tokens ended_by_eos judge_score win_rate".split()
)


@pytest.fixture(scope="module")
def models(process, tmp_path_factory) -> list[str]:
    """Flags that name a policy of some SFT and a reward model of some training."""
    out = tmp_path_factory.mktemp("models")
    for script, argv in (
        (sft, ["--max_steps", "60", "--generate", "0", "--output_dir", str(out / "sft")]),
        (reward, ["--max_steps", "5", "--model", str(out / "sft" / "model"), "--output_dir", str(out / "reward")]),
    ):
        script.main(common.parse_args(script.Args, script.preset, argv))
    return ["--policy_model", str(out / "sft" / "model"), "--reward_model", str(out / "reward" / "model")]


# ---------------------------------------------------------------- by hand

MASK = torch.tensor([[True, True, True], [True, False, False]])


def test_rewards_advantages_and_returns_by_hand():
    """Two responses, of 3 tokens and of 1; kl_coef = 0.1, scores 2 and -1, γ = 1, λ = 0.5.

    log π - log π_ref = (1, -2, 3) and (4): rewards (-0.1, 0.2, -0.3 + 2) = (-0.1, 0.2, 1.7) and (-0.4 - 1) = (-1.4).
    Values (1, 2, 3) and (0.5). First response, from its end, where nothing follows:
        δ3 = 1.7 - 3 = -1.3           A3 = -1.3
        δ2 = 0.2 + 3 - 2 = 1.2        A2 = 1.2 + 0.5 · -1.3 = 0.55
        δ1 = -0.1 + 2 - 1 = 0.9       A1 = 0.9 + 0.5 · 0.55 = 1.175
    returns A + V = (2.175, 2.55, 1.7). Second: A = -1.4 - 0.5 = -1.9, return -1.4. Past its end stand numbers that must
    not count: they are 100 in every input.
    """
    ref_logps = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, 0.0, 0.0]])
    logps = ref_logps + torch.tensor([[1.0, -2.0, 3.0], [4.0, 100.0, 100.0]])
    values = torch.tensor([[1.0, 2.0, 3.0], [0.5, 100.0, 100.0]])
    rewards = ppo.token_rewards(logps, ref_logps, torch.tensor([2.0, -1.0]), MASK, 0.1)
    assert torch.allclose(rewards, torch.tensor([[-0.1, 0.2, 1.7], [-1.4, 0.0, 0.0]]))
    advantages, returns = ppo.advantages_and_returns(rewards, values, MASK, 1.0, 0.5)
    assert torch.allclose(advantages, torch.tensor([[1.175, 0.55, -1.3], [-1.9, 0.0, 0.0]]))
    assert torch.allclose(returns, torch.tensor([[2.175, 2.55, 1.7], [-1.4, 0.0, 0.0]]))
    # γ = 0.5, λ = 1: the discounted rewards to the end. 1.7; 0.2 + 0.85 = 1.05; -0.1 + 0.525 = 0.425.
    _, returns = ppo.advantages_and_returns(rewards, values, MASK, 0.5, 1.0)
    assert torch.allclose(returns[0], torch.tensor([0.425, 1.05, 1.7]))


def test_losses_by_hand():
    """Ratios e^log: 1.5 with A = 1 is clipped to 1.2 (loss -1.2); 1.5 with A = -1 is not (loss 1.5, the worse one);
    0.5 with A = 1: -0.5, the worse of -0.5 and -0.8; 0.5 with A = -1: clipped to 0.8, loss 0.8."""
    old = torch.full((4,), -3.0)
    logps = old + torch.log(torch.tensor([1.5, 1.5, 0.5, 0.5]))
    loss, ratio, clipped = ppo.policy_losses(logps, old, torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.2)
    assert torch.allclose(loss, torch.tensor([-1.2, 1.5, -0.5, 0.8])) and clipped.tolist() == [True, False, False, True]
    assert torch.allclose(ratio, torch.tensor([1.5, 1.5, 0.5, 0.5]))
    # V_old = 0, target 1: at V = 0.5 the clipped 0.2 is farther, (0.8)² / 2 = 0.32; at -0.5 V itself, 1.5² / 2.
    loss, clipped = ppo.value_losses(torch.tensor([0.5, -0.5]), torch.zeros(2), torch.ones(2), 0.2)
    assert torch.allclose(loss, torch.tensor([0.32, 1.125])) and clipped.tolist() == [True, False]


def test_moments_are_of_the_masked_values(process):
    """1, 2, 3 and 6: mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5; what the mask leaves out is not a number."""
    values = torch.tensor([[1.0, 2.0, 3.0], [6.0, math.nan, math.nan]])
    mean, variance = ppo.moments(values, MASK)
    assert (mean.item(), variance.item()) == (3, pytest.approx(3.5))


def test_a_two_token_bandit_learns_the_better_token(process):
    """One-token responses, score 1 for token 1 and 0 for token 0: from 50 % to over 95 % by the file's own functions."""
    torch.manual_seed(0)
    logits = torch.zeros(2, requires_grad=True)
    optimizer, mask = torch.optim.Adam([logits], lr=0.1), torch.ones(64, 1, dtype=torch.bool)
    for _ in range(60):
        old = logits.detach().log_softmax(0)
        tokens = torch.multinomial(old.exp(), 64, replacement=True)
        rewards = ppo.token_rewards(old[tokens, None], old[tokens, None], tokens.float(), mask, 0.1)
        advantages, _ = ppo.advantages_and_returns(rewards, torch.zeros(64, 1), mask, 1.0, 0.95)
        mean, variance = ppo.moments(advantages, mask)
        advantages = (advantages - mean) / (variance + 1e-8).sqrt()
        loss, _, _ = ppo.policy_losses(logits.log_softmax(0)[tokens], old[tokens], advantages[:, 0], 0.2)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    assert logits.softmax(0)[1] > 0.95


# ---------------------------------------------------------------- log-probabilities, values, scores


@pytest.fixture(scope="module")
def four(models, process):
    """(args, tokenizer, policy, critic, scorer) and a rollout of prompts of different lengths."""
    args = common.parse_args(ppo.Args, ppo.preset, [*models, "--temperature", "0.7", "--micro_batch_size", "3"])
    tokenizer = common.load_tokenizer(args.policy_model, False)
    own, config = ppo.engine_args(args, "policy"), common.engine_config(ppo.engine_args(args, "policy"), 1)
    policy = ppo.Policy(ppo.load_policy(args.policy_model, own, tokenizer, config), args.temperature)
    critic = ppo.Critic(ppo.load_reward_model(args.reward_model, own, tokenizer, config))
    scorer = ppo.Scorer(ppo.load_reward_model(args.reward_model, own, tokenizer, config))
    texts = [
        "Customer: Do you sell milk?\nClerk:\n",
        "Where?\n",
        "Customer: Hello! I am looking for soap.\nClerk:\n",
    ] * 3
    prompts = [np.array(tokenizer(text).input_ids, np.int32) for text in texts]
    torch.manual_seed(0)
    return args, tokenizer, policy, critic, scorer, ppo.sample(policy, policy.model, tokenizer, prompts, args, process)


def test_padding_on_either_side_changes_nothing(four, process):
    """log π as sampling drew it (left-padded, token by token), as training computes it (right-padded, in micro batches)
    and of each sequence alone; values and scores likewise, the score from the last real token."""
    args, tokenizer, policy, critic, scorer, rollout = four
    lengths = rollout.is_response.sum(1)
    assert len(set(lengths.tolist())) > 2 and lengths.tolist() == [len(r) for r in rollout.responses]
    logps = ppo.per_token(policy, rollout, args, tokenizer, process)
    values = ppo.per_token(critic, rollout, args, tokenizer, process)
    scores = ppo.score(scorer, rollout, args, tokenizer, process)
    assert torch.allclose(rollout.logps[rollout.is_response], logps[rollout.is_response], atol=1e-4)  # ratio 1
    for i, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses)):
        ids = torch.from_numpy(np.concatenate([prompt, response])).long()[None]
        with torch.no_grad():
            logits = policy.model(ids).logits[0, len(prompt) - 1 : -1] / 0.7
            hidden = critic.classifier.base_model(ids).last_hidden_state[0, len(prompt) - 1 : -1]
            alone = scorer.classifier(ids).logits.item()
        own = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
        assert torch.allclose(logps[i, : len(response)], own, atol=1e-4)
        assert torch.allclose(values[i, : len(response)], critic.classifier.score(hidden)[:, 0], atol=1e-4)
        assert scores[i].item() == pytest.approx(alone, abs=1e-4)
        assert (response[:-1] != tokenizer.eos_token_id).all() and rollout.ended[i] == (response[-1] == 2)


def test_sampling_samples_what_it_says(four, process):
    """The mean of log π over many draws of a first token is its entropy, at the temperature asked for, within 4 standard
    errors; a model's own greedy settings are not obeyed."""
    args, tokenizer, policy, *_ = four
    policy.model.generation_config.top_k = 1
    one = dataclasses.replace(args, max_new_tokens=1, micro_batch_size=500)
    prompt = np.array(tokenizer("Customer: Do you sell milk?\nClerk:\n").input_ids, np.int32)
    drawn = ppo.sample(policy, policy.model, tokenizer, [prompt] * 2000, one, process).logps[:, 0]
    with torch.no_grad():
        logps = (policy.model(torch.from_numpy(prompt).long()[None]).logits[0, -1] / 0.7).log_softmax(0)
    entropy = -(logps.exp() * logps).sum().item()
    assert entropy > 0.5
    assert -drawn.mean().item() == pytest.approx(entropy, abs=4 * drawn.std().item() / 2000**0.5)


def test_a_reward_model_that_returns_nan_is_refused(four, process):
    args, tokenizer, _, _, scorer, rollout = four

    class Broken(torch.nn.Module):
        def forward(self, **batch):
            return scorer(**batch) * math.nan

    with pytest.raises(common.InputError, match="a score that is not finite"):
        ppo.score(Broken(), rollout, args, tokenizer, process)


# ---------------------------------------------------------------- runs


def test_a_run(run, models, tmp_path, monkeypatch):
    """What is written; the first step starts from ratio 1 and no KL; reference and reward model stay as they were."""
    kept, real = [], common.make_engine

    def make_engine(module, *rest):
        kept.append((module, [p.detach().clone() for p in module.parameters()]))
        return real(module, *rest)

    monkeypatch.setattr(common, "make_engine", make_engine)
    out = tmp_path / "out"
    judge = ["--judge_model", models[3], "--minibatches", "2", "--micro_batch_size", "4"]
    run(ppo, *models, *judge, "--output_dir", str(out), *SHORT)
    names = {"args.json", "metrics.jsonl", "ppo.png", "generations.json", "model", "tensorboard"}
    assert {path.name for path in out.iterdir()} == names
    metrics = lines(out / "metrics.jsonl")
    assert [(m["step"], m["split"]) for m in metrics] == [(0, "eval"), (1, "train"), (2, "train"), (2, "eval")]
    for m in metrics:
        assert set(m) == (KEYS if m["split"] == "train" else EVAL_KEYS)
        assert all(v is not None for v in m.values())
    assert metrics[1]["kl"] == pytest.approx(0, abs=1e-3) and metrics[1]["score_growth"] == 0
    assert metrics[0]["win_rate"] == 0.5 and metrics[0]["kl"] == pytest.approx(0, abs=1e-3)
    assert metrics[0]["judge_score"] == pytest.approx(metrics[0]["score_mean"])
    moved = {}
    for module, before in kept:
        changed = any(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
        moved.setdefault(type(module).__name__, []).append(changed)
        frozen = all(p.grad is None and not p.requires_grad for p in module.parameters())
        assert frozen != changed
    assert moved == {"Policy": [True, False], "Critic": [True], "Scorer": [False, False]}
    assert transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    assert len(json.loads((out / "generations.json").read_text())) == 6


def test_the_first_minibatch_has_ratio_1(run, models, tmp_path, monkeypatch):
    ratios, losses = [], ppo.policy_losses

    def spy(*arguments):
        result = losses(*arguments)
        ratios.append(result[1].detach())
        return result

    monkeypatch.setattr(ppo, "policy_losses", spy)
    run(ppo, *models, "--output_dir", str(tmp_path / "out"), *SHORT, "--minibatches", "2", "--temperature", "1.3")
    assert torch.allclose(ratios[0], torch.ones_like(ratios[0]), atol=1e-4)
    assert not torch.allclose(ratios[1], torch.ones_like(ratios[1]), atol=1e-4)  # the second, after an update


def test_a_kl_above_the_limit_stops(run, models, tmp_path, capsys):
    flags = ["--max_kl", "0.5", "--policy_learning_rate", "0.01", "--max_steps", "9"]
    run(ppo, *models, "--output_dir", str(tmp_path / "out"), *SHORT, *flags)
    last = lines(tmp_path / "out" / "metrics.jsonl")[-2]
    assert last["step"] < 9 and last["kl"] > 0.5
    assert f"stopped at step {last['step']}: the KL is above --max_kl 0.5" in capsys.readouterr().out


@pytest.mark.parametrize("ranks, policy_stage, critic_stage", [(2, 3, 3), (2, 0, 0), (2, 2, 3)])
def test_ranks_and_zero_stages(models, tmp_path, ranks, policy_stage, critic_stage):
    """Each rank samples answers of its own, so figures differ; what is exact is: no KL and no growth at the start."""
    out = tmp_path / "out"
    stages = ["--policy_zero_stage", str(policy_stage), "--critic_zero_stage", str(critic_stage)]
    done = launch("ppo.py", ranks, *models, *stages, "--output_dir", str(out), *SHORT, "--micro_batch_size", "4")
    assert done.returncode == 0, done.stderr
    metrics = lines(out / "metrics.jsonl")
    assert metrics[1]["kl"] == pytest.approx(0, abs=1e-3) and metrics[1]["ratio_mean"] == pytest.approx(1, abs=1e-3)
    assert metrics[2]["kl"] != metrics[1]["kl"] and metrics[1]["policy_grad_norm"] > 0
    saved = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    start = transformers.AutoModelForCausalLM.from_pretrained(models[1])
    assert any(not torch.equal(a, b) for a, b in zip(saved.parameters(), start.parameters(), strict=True))


# ---------------------------------------------------------------- bad input and the paper's runs

BAD = {
    "no models": (lambda m, f: [], r"are needed. `deepspeed sft.py .*runs/sft/model; `deepspeed reward.py"),
    "an SFT model as reward model": (lambda m, f: [*m[:2], "--reward_model", m[1]], r"is no reward model: pass what"),
    "a reward model as policy": (lambda m, f: ["--policy_model", m[3], *m[2:]], r"is a reward model, but a language"),
    "an answer of no token": (
        lambda m, f: [*m, "--max_new_tokens", "0"],
        r"--max_new_tokens is 0, but must be at least",
    ),
    "prompts too long": (
        lambda m, f: [*m, "--max_prompt_length", "3"],
        r"no usable prompt is left \(240 longer than --max_prompt_length 3\)",
    ),
    "columns": (lambda m, f: [*m, "--dataset", rows_file(f, {"text": "p"})], r"row 1: the columns are text, but"),
    "batches": (lambda m, f: [*m, "--minibatches", "5"], r"48 is not a multiple of 1 ranks x --minibatches 5"),
    "another tokenizer": (lambda m, f: [*m[:2], "--reward_model", other(m[3], f)], r"has another tokenizer than"),
}


def other(model: str, folder) -> str:
    transformers.AutoModelForSequenceClassification.from_pretrained(model).save_pretrained(folder / "other")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(folder / "other")
    return str(folder / "other")


@pytest.mark.parametrize("name", BAD)
def test_bad_input(run, models, tmp_path, name):
    make, message = BAD[name]
    argv = make(models, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(common.InputError, match=message) as caught:
        run(ppo, "--output_dir", str(tmp_path / "out"), *argv)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


# METHOD: prompt and answer length, optimizer steps; the rest is common to both.
TABLE = {
    "alpaca": dict(max_prompt_length=256, max_new_tokens=384, max_steps=50),
    "tldr": dict(max_prompt_length=768, max_new_tokens=256, max_steps=250),
}
ALL = dict(
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
    gamma=1.0,
    gae_lambda=0.95,
    cliprange=0.2,
    cliprange_value=0.2,
    temperature=1.0,
    dtype="bf16",
    seed=42,
    gradient_checkpointing=True,
)


@pytest.mark.parametrize("task", TABLE)
def test_the_papers_runs(task):
    argv = ["--task", task, "--policy_model", "p", "--reward_model", "r"]
    args = dataclasses.asdict(common.parse_args(ppo.Args, ppo.preset, argv))
    expected = ALL | TABLE[task]
    assert {k: args[k] for k in expected} == expected
    assert ("unlabeled" in args["dataset"]) == (task == "alpaca")
    for ranks in (1, 2, 4, 8):
        own = ppo.engine_args(ppo.Args(**args), "policy")
        accumulation = common.accumulation_steps(own, common.Process(0, ranks, CPU))
        assert ranks * accumulation * own.micro_batch_size == 128


def test_what_siblings_repeat_is_the_same():
    import inspect

    assert inspect.getsource(ppo.check_text) == inspect.getsource(dpo.check_text)
    assert inspect.getsource(ppo.load_policy) == inspect.getsource(dpo.load_policy)


def test_every_flag_is_read():
    source = open(ppo.__file__).read() + open(common.__file__).read()
    unread = [f.name for f in dataclasses.fields(ppo.Args) if not re.search(rf"args\.{f.name}\b", source)]
    assert [n for n in unread if not re.fullmatch(r"(policy|critic)_(zero_stage|learning_rate)", n)] == ["local_rank"]
