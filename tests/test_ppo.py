"""ppo.py: rewards, advantages and losses by hand, log-probabilities and padding, what a token weighs, runs."""

import common

import functools
import json
import math
from dataclasses import replace

import pytest
import torch
import transformers
from helpers import lines, rows_file
from ranks import on_two_ranks

import ppo
import reward
import sft

SHORT = "--max_steps 2 --log_every 1 --global_batch_size 16 --generate 6 --max_new_tokens 24"
KEYS = set(
    "step split lr policy_grad_norm critic_grad_norm score_mean score_std score_max score_growth kl entropy "
    "response_tokens ended_by_eos policy_loss value_loss policy_clipfrac value_clipfrac explained_variance ratio_mean "
    "returns_mean prompts_per_s seconds_sample seconds_score seconds_learn".split()
)
EVAL_KEYS = set(
    "step split score_mean score_std score_max score_growth kl response_tokens ended_by_eos judge_score "
    "win_rate".split()
)


@pytest.fixture(scope="module")
def models(run, tmp_path_factory) -> str:
    """Flags that name a policy of some SFT and a reward model of some training."""
    out = tmp_path_factory.mktemp("models")
    few = rows_file(out, *lines(common.DATA / "preference_eval.jsonl")[:8])
    run(sft, f"--max_steps 60 --generate 0 --output_dir {out}/sft")
    run(reward, f"--max_steps 5 --model {out}/sft/model --eval_dataset {few} --output_dir {out}/reward")
    return f"--policy_model {out}/sft/model --reward_model {out}/reward/model"


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
    """One-token responses, score 1 for token 1 and 0 for token 0: from 50 % to over 95 % by ppo.py's own functions."""
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
    """What calls on a rollout need, the policy, the critic, the reward model, and a rollout of uneven prompts."""
    argv = f"{models} --temperature 0.7 --micro_batch_size 3".split()
    args = common.parse_args(ppo.Args, ppo.preset, argv)
    tokenizer = common.load_tokenizer(args.policy_model, False)
    own = ppo.engine_args(args, "policy")
    rest = own, tokenizer, common.engine_config(own, 1)
    policy = common.load_language_model("--policy_model", args.policy_model, *rest)
    critic, scorer = (common.load_reward_model("--reward_model", args.reward_model, *rest) for _ in range(2))
    texts = ["Customer: Do you sell milk?\nClerk:\n", "Where?\n", "Customer: Hello! I need soap.\nClerk:\n"] * 3
    prompts = [tokenizer(text).input_ids for text in texts]
    rollout = ppo.sample(policy, policy, tokenizer, prompts, [[0, row] for row in range(9)], args, process)
    collator = functools.partial(ppo.collate, pad_token_id=tokenizer.pad_token_id, device=process.device)
    return (args, collator, process), tokenizer, policy, critic, scorer, rollout


def logps_alone(model, prompt: list[int], response: list[int], temperature: float) -> torch.Tensor:
    """log π of each response token, from the model's own logits, without padding."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


def values_alone(classifier, prompt: list[int], response: list[int]) -> torch.Tensor:
    hidden = classifier.base_model(torch.tensor([prompt + response])).last_hidden_state
    return classifier.score(hidden)[0, len(prompt) - 1 : -1, 0]


def test_padding_on_either_side_changes_nothing(four):
    """log π as training computes it (padded, in micro batches) and of each sequence alone; values and scores likewise,
    the score from the last real token."""
    rest, tokenizer, policy, critic, scorer, rollout = four
    lengths = rollout.is_response.sum(1)
    assert len(set(lengths.tolist())) > 2 and lengths.tolist() == [len(r) for r in rollout.responses]
    log_policy = functools.partial(common.token_logps, temperature=rest[0].temperature)
    logps = ppo.per_token(policy, log_policy, rollout, *rest)
    values, scores = ppo.per_token(critic, ppo.critic_values, rollout, *rest), ppo.score(scorer, rollout, *rest)
    for i, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses)):
        with torch.no_grad():
            own, value = logps_alone(policy, prompt, response, 0.7), values_alone(critic.classifier, prompt, response)
            alone = scorer.classifier(torch.tensor([prompt + response])).logits.item()
        assert torch.allclose(logps[i, : len(response)], own, atol=1e-4)
        assert torch.allclose(values[i, : len(response)], value, atol=1e-4)
        assert scores[i].item() == pytest.approx(alone, abs=1e-4)
        assert tokenizer.eos_token_id not in response[:-1]
        assert rollout.ended[i] == (response[-1] == tokenizer.eos_token_id)


def test_sampling_samples_what_it_says(four):
    """The mean of log π over many draws of a first token is minus its entropy, at the temperature asked for, within 4
    standard errors; a model's own greedy settings are not obeyed."""
    (args, collator, process), tokenizer, policy, *_ = four
    policy.generation_config.top_k = 1
    one = replace(args, max_new_tokens=1, micro_batch_size=500)
    prompts = [tokenizer("Customer: Do you sell milk?\nClerk:\n").input_ids] * 2000
    drawn = ppo.sample(policy, policy, tokenizer, prompts, [[1, row] for row in range(2000)], one, process)
    log_policy = functools.partial(common.token_logps, temperature=one.temperature)
    logp = ppo.per_token(policy, log_policy, drawn, one, collator, process)[:, 0]
    with torch.no_grad():
        logps = (policy(torch.tensor(prompts[:1])).logits[0, -1] / 0.7).log_softmax(0)
    entropy = -(logps.exp() * logps).sum().item()
    assert entropy > 0.5
    assert -logp.mean().item() == pytest.approx(entropy, abs=4 * logp.std().item() / 2000**0.5)


def test_a_reward_model_that_returns_nan_is_refused(four):
    rest, _, _, _, scorer, rollout = four

    def broken(**inputs):
        output = scorer(**inputs)
        output.logits *= math.nan
        return output

    with pytest.raises(common.InputError, match="a score that is not finite"):
        ppo.score(broken, rollout, *rest)


# ---------------------------------------------------------------- the weight of a token


def watch(patch, name: str, found: list, module=ppo) -> None:
    """Append to `found` what a function returns."""
    real = getattr(module, name)
    patch.setattr(module, name, lambda *args, **rest: found.append(real(*args, **rest)) or found[-1])


def check_first_step(flags: str, ranks: int = 1) -> list[list[int]]:
    """The norms of both gradients are those of the mean over the response tokens of each minibatch, of all ranks.

    Computed from the starting models, a row at a time, at rates of 0, so that ρ is 1 and V is V_old throughout:

        d policy loss = -(1/N) Σ A dlog π       d value loss = (1/N) Σ (V - R) dV

    Returns the responses, rank after rank.
    """
    rollouts, gae, norms, minibatches = [], [], [], []
    real = ppo.micro_batches

    def micro_batches(rollout, rows, *rest):
        if not isinstance(rows, range):  # those are scored
            minibatches.append([int(row) for row in rows])
        return real(rollout, rows, *rest)

    args = common.parse_args(ppo.Args, ppo.preset, flags.split())
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, "sample", rollouts)
        watch(patch, "advantages_and_returns", gae)
        watch(patch, "optimizer_step", norms, common)
        patch.setattr(ppo, "micro_batches", micro_batches)
        ppo.main(args)
    (rollout,), ((advantages, returns),) = rollouts, gae
    lengths = [len(response) for response in rollout.responses]
    columns = [[row[:n] for row, n in zip(column, lengths)] for column in (advantages, returns)]
    mine = [*zip(rollout.prompts, rollout.responses, *columns)]
    everyone = common.gather_objects([[mine[row] for row in rows] for rows in minibatches])
    assert len(everyone) == ranks
    advantages = torch.cat([row[2] for part in everyone for rows in part for row in rows])
    policy = transformers.AutoModelForCausalLM.from_pretrained(args.policy_model)
    critic = transformers.AutoModelForSequenceClassification.from_pretrained(args.reward_model)
    for number, found in enumerate(norms):
        rows = [row for part in everyone for row in part[number]]
        count = sum(len(row[1]) for row in rows)
        policy.zero_grad(), critic.zero_grad()
        for prompt, response, advantage, target in rows:
            whitened = (advantage - advantages.mean()) / advantages.std(correction=0)
            (-(whitened * logps_alone(policy, prompt, response, args.temperature)).sum() / count).backward()
            ((values_alone(critic, prompt, response) - target).square().sum() / 2 / count).backward()
        grads = [[p.grad for p in model.parameters() if p.grad is not None] for model in (policy, critic)]
        assert found == pytest.approx([torch.nn.utils.get_total_norm(grad).item() for grad in grads], rel=1e-3)
    return [row[1] for part in everyone for rows in part for row in rows]


FIRST_STEP = (
    "--policy_learning_rate 0 --critic_learning_rate 0 --max_steps 1 --log_every 1 --generate 0 --global_batch_size 16 "
    "--max_new_tokens 24"
)


def test_each_token_counts_alike(models, tmp_path):
    """Whatever the micro batch and minibatch; and the responses are the same."""
    found = []
    for micro, minibatches in ((16, 1), (4, 1), (4, 2)):
        out = f"--output_dir {tmp_path}/{micro}-{minibatches}"
        flags = f"{models} {out} {FIRST_STEP} --micro_batch_size {micro} --minibatches {minibatches} --temperature 0.8"
        found.append(check_first_step(flags))
        (line,) = lines(tmp_path / f"{micro}-{minibatches}" / "metrics.jsonl")
        assert line["policy_grad_norm"] > 0 and line["critic_grad_norm"] > 0
    assert len({tuple(map(tuple, sorted(responses))) for responses in found}) == 1 and len(found[0]) == 16


# ---------------------------------------------------------------- runs


def test_a_run(run, models, tmp_path, monkeypatch):
    """What is written; the first step starts from ratio 1 and no KL; reference and reward model stay as they were."""
    kept, real = [], common.make_engine

    def make_engine(module, *rest):
        kept.append((module, [p.detach().clone() for p in module.parameters()]))
        return real(module, *rest)

    monkeypatch.setattr(common, "make_engine", make_engine)
    out, judge = tmp_path / "out", models.split()[-1]
    run(ppo, f"{models} --judge_model {judge} --minibatches 2 --micro_batch_size 4 --output_dir {out} {SHORT}")
    names = {"args.json", "metrics.jsonl", "ppo.png", "generations.json", "model", "tensorboard"}
    assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == names
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
    assert moved == {"LlamaForCausalLM": [True, False], "Scorer": [True, False, False]}
    assert transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    assert len(json.loads((out / "generations.json").read_text())) == 6


def test_the_first_minibatch_has_ratio_1(run, models, tmp_path, monkeypatch):
    watch(monkeypatch, "policy_losses", found := [])
    run(ppo, f"{models} --output_dir {tmp_path}/out {SHORT} --max_steps 1 --minibatches 2 --temperature 1.3")
    first, second = (ratio.detach() for _, ratio, _ in found)
    assert torch.allclose(first, torch.ones_like(first), atol=1e-4)
    assert not torch.allclose(second, torch.ones_like(second), atol=1e-4)  # after an update


def test_the_score_is_clipped_and_a_missing_end_costs(run, models, tmp_path, monkeypatch):
    """Scores from -1 to 1: the rewards of a response sum to its score, in ± 0.5, less 0.7 where it did not end, since
    there is no KL at the start."""
    watch(monkeypatch, "sample", rollouts := [])
    watch(monkeypatch, "token_rewards", found := [])
    monkeypatch.setattr(ppo, "score", lambda scorer, rollout, *rest: torch.linspace(-1, 1, len(rollout.responses)))
    flags = "--max_steps 1 --generate 0 --score_clip 0.5 --missing_eos_penalty 0.7"
    run(ppo, f"{models} --output_dir {tmp_path}/out {SHORT} {flags}")
    (rollout,), (rewards,) = rollouts, found
    ended = rollout.ended.tolist()
    assert any(ended) and not all(ended)
    scores = [-1 + 2 * row / 15 for row in range(16)]
    expected = [max(-0.5, min(0.5, score)) - (0 if end else 0.7) for score, end in zip(scores, ended)]
    assert rewards.sum(1).tolist() == pytest.approx(expected, abs=1e-4)


def test_a_critic_whose_gradient_is_not_finite_leaves_the_policy(run, models, tmp_path, monkeypatch):
    """In fp32 without ZeRO no engine looks at its gradients: neither may step before both were looked at."""
    engines, losses = [], ppo.value_losses

    def infinite_gradient(values, *rest):
        loss, clipped = losses(values, *rest)
        return loss + 1e30 * (values - values.detach()) * 1e30, clipped

    monkeypatch.setattr(ppo, "value_losses", infinite_gradient)
    watch(monkeypatch, "make_engine", engines, common)
    with pytest.raises(common.InputError, match="step 1: the gradient is not finite, and has changed no weight"):
        run(ppo, f"{models} --output_dir {tmp_path}/out {SHORT} --generate 0")
    before = transformers.AutoModelForCausalLM.from_pretrained(models.split()[1])
    after = engines[0].module
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert not (tmp_path / "out" / "model").exists()


def test_a_kl_above_the_limit_stops(run, models, tmp_path, capsys):
    flags = "--max_kl 0.5 --policy_learning_rate 0.01 --max_steps 9"
    run(ppo, f"{models} --output_dir {tmp_path}/out {SHORT} {flags}")
    last = lines(tmp_path / "out" / "metrics.jsonl")[-2]
    assert last["step"] < 9 and last["kl"] > 0.5
    assert f"stopped at step {last['step']}: the KL is above --max_kl 0.5" in capsys.readouterr().out


RUNS = {
    "00": "--policy_zero_stage 0 --critic_zero_stage 0",
    "33": "--policy_zero_stage 3 --critic_zero_stage 3 --gradient_checkpointing",
}


def runs_on_two_ranks(models: str, folder: str) -> None:
    for name, flags in RUNS.items():
        argv = f"{models} {flags} --output_dir {folder}/{name} {SHORT} --micro_batch_size 4"
        ppo.main(common.parse_args(ppo.Args, ppo.preset, argv.split()))
    flags = "--policy_zero_stage 2 --critic_zero_stage 3 --offload --micro_batch_size 2 --minibatches 2"
    check_first_step(f"{models} --output_dir {folder}/first {FIRST_STEP} {flags}", ranks=2)


def test_ranks_and_zero_stages_change_nothing(run, models, tmp_path):
    """The first step and what is sampled before it, on two ranks at any stage as on one; then the policy has moved."""
    on_two_ranks(runs_on_two_ranks, models, str(tmp_path))
    run(ppo, f"{models} --output_dir {tmp_path}/one {SHORT} --micro_batch_size 8")
    start = transformers.AutoModelForCausalLM.from_pretrained(models.split()[1])
    for out in (tmp_path / name for name in RUNS):
        found, one = lines(out / "metrics.jsonl"), lines(tmp_path / "one" / "metrics.jsonl")
        assert [m["step"] for m in found] == [m["step"] for m in one] == [0, 1, 2, 2]
        for mine, other in zip(found[:2], one):
            for key in set(mine) - {"split", "prompts_per_s", "seconds_sample", "seconds_score", "seconds_learn"}:
                assert (mine[key] or 0) == pytest.approx(other[key] or 0, rel=1e-3, abs=1e-4), (out.name, key)
        assert found[1]["kl"] == pytest.approx(0, abs=1e-3) and found[1]["ratio_mean"] == pytest.approx(1, abs=1e-3)
        assert found[2]["kl"] != found[1]["kl"] and found[1]["policy_grad_norm"] > 0
        saved = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
        assert any(not torch.equal(a, b) for a, b in zip(saved.parameters(), start.parameters(), strict=True))
