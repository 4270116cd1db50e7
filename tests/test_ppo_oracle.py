"""ppo.py against a plain loop, which shares with it no code and nothing but the order of the rows.

The loop works on each sequence alone, without padding, micro batches, caches or shards: it samples token by token, and
writes out what METHOD.md and the head of ppo.py say. Every flag that changes a number is off its default.
"""

import common

import argparse
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers import lines
from ranks import on_two_ranks
from transformers import AutoTokenizer

import ppo

CAUSAL, CLASSIFIER = transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification
SET = argparse.Namespace(
    kl_coef=0.4, score_clip=1.5, missing_eos_penalty=0.7, gamma=0.9, gae_lambda=0.6, cliprange=0.1,
    cliprange_value=0.03, ppo_epochs=2, minibatches=2, temperature=0.8, policy_learning_rate=4e-3,
    critic_learning_rate=7e-3, weight_decay=0.3, warmup_steps=3, epochs=2, global_batch_size=8, max_new_tokens=8,
    generate=5, seed=9, eval_every=1, log_every=1,
)  # fmt: skip
CLOCK = {"prompts_per_s", "seconds_sample", "seconds_score", "seconds_learn"}


@pytest.fixture(scope="module")
def data(tokenizer, tmp_path_factory) -> dict[str, str]:
    """Flags: random models, a policy that ends some answers early, 17 prompts (one does not fill a batch), 7 held out.

    The policy has dropout, and settings by which `generate` would never end: training takes none of it.
    """
    folder, found = tmp_path_factory.mktemp("oracle"), {}
    for seed, name in enumerate(("policy_model", "reward_model", "judge_model")):
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_labels=1,
            num_attention_heads=4, initializer_range=0.3, attention_bias=True, attention_dropout=0.3, pad_token_id=0,
        )  # fmt: skip
        torch.manual_seed(seed)
        model = (CLASSIFIER if seed else CAUSAL).from_config(config)
        if not seed:
            model.generation_config = transformers.GenerationConfig(suppress_tokens=[tokenizer.eos_token_id])
            model.lm_head.weight.data[tokenizer.eos_token_id] *= 2.5
        found[name] = str(folder / name)
        model.save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    for flag, count in (("dataset", 17), ("eval_dataset", 7)):
        source = common.DATA / f"prompts_{'eval' if flag == 'eval_dataset' else 'train'}.jsonl"
        found[flag] = str(folder / f"{flag}.jsonl")
        Path(found[flag]).write_text("".join(source.read_text().splitlines(keepends=True)[:count]))
    return found


# ---------------------------------------------------------------- the loop


def logps_alone(model, prompt: list[int], response: list[int], temperature: float):
    """log π of each response token from the model's own logits, without padding."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


def scores_alone(classifier, prompt: list[int], response: list[int]) -> torch.Tensor:
    """The score head's output before each response token, and after the last."""
    hidden = classifier.base_model(torch.tensor([prompt + response])).last_hidden_state
    return classifier.score(hidden)[0, len(prompt) - 1 :, 0]


def values_alone(classifier, prompt: list[int], response: list[int]) -> torch.Tensor:
    return scores_alone(classifier, prompt, response)[:-1]


class Loop:
    """A run on `ranks` ranks; on their number depends only which rows share a minibatch."""

    def __init__(self, data: dict[str, str], ranks: int = 1, epochs: int = SET.epochs):
        self.ranks, self.epochs, self.updates, self.lines, self.rows, self.optimizers = ranks, epochs, 0, [], [], []
        self.prompts, held_out = ([row["prompt"] for row in lines(Path(data[k]))] for k in ("dataset", "eval_dataset"))
        self.held_out, self.tokenizer = held_out[: SET.generate], AutoTokenizer.from_pretrained(data["policy_model"])
        self.policy, self.reference = (CAUSAL.from_pretrained(data["policy_model"]) for _ in range(2))
        self.critic, self.scorer, self.judge = (
            CLASSIFIER.from_pretrained(data[f"{name}_model"]) for name in ("reward", "reward", "judge")
        )
        for model, peak in ((self.policy, SET.policy_learning_rate), (self.critic, SET.critic_learning_rate)):
            groups = [
                dict(params=[p for p in model.parameters() if (p.dim() > 1) == matrices], weight_decay=decay)
                for matrices, decay in ((True, SET.weight_decay), (False, 0.0))
            ]
            self.optimizers.append((torch.optim.AdamW(groups, betas=(0.9, 0.95)), model, peak))

    def logps(self, model, row: dict) -> torch.Tensor:
        return logps_alone(model, row["prompt"], row["response"], SET.temperature)

    @torch.no_grad()
    def answer(self, prompt: str, seed: list[int]) -> dict:
        """A response, and what all models say of it. A token is the one at which the policy's cumulated probability
        passes a uniform number."""
        ids, response, eos = self.tokenizer(prompt).input_ids, [], self.tokenizer.eos_token_id
        for point in np.random.default_rng(seed).random(SET.max_new_tokens):
            logits = self.policy(torch.tensor([ids + response])).logits[0, -1]
            below = (logits.double() / SET.temperature).softmax(0).cumsum(0)
            response.append(int((below <= point).sum()))
            if response[-1] == eos:
                break
        row = dict(prompt=ids, response=response, ended=response[-1] == eos)
        row["logps"], row["ref_logps"] = (self.logps(m, row).tolist() for m in (self.policy, self.reference))
        row["kl"] = sum(row["logps"]) - sum(row["ref_logps"])
        row["values"] = values_alone(self.critic, ids, response).tolist()
        row["score"], row["judge"] = (scores_alone(m, ids, response)[-1].item() for m in (self.scorer, self.judge))
        return row

    def write(self, step: int, split: str, rows: list[dict], **rest) -> None:
        """A line of metrics.jsonl. Scores grow from those of the first line of the same split."""
        scores = [row["score"] for row in rows]
        first = next((line["score_mean"] for line in self.lines if line["split"] == split), np.mean(scores))
        self.lines.append(rest | dict(
            step=step,
            split=split,
            score_mean=np.mean(scores),
            score_std=np.std(scores),
            score_max=max(scores),
            score_growth=np.mean(scores) - first,
            kl=np.mean([row["kl"] for row in rows]),
            response_tokens=np.mean([len(row["response"]) for row in rows]),
            ended_by_eos=np.mean([row["ended"] for row in rows]),
        ))  # fmt: skip

    def evaluate(self, step: int) -> None:
        rows = [self.answer(prompt, [SET.seed, number]) for number, prompt in enumerate(self.held_out)]
        now = [row["judge"] for row in rows]
        self.first = now if step == 0 else self.first
        wins = [1 if a > b else 0.5 if a == b else 0 for a, b in zip(now, self.first)]
        self.write(step, "eval", rows, judge_score=np.mean(now), win_rate=np.mean(wins))
        self.answers = [self.tokenizer.decode(row["response"], skip_special_tokens=True) for row in rows]

    def reward(self, row: dict) -> None:
        """Rewards of each token; from the end of the response, after which nothing comes, advantages and returns."""
        row["clipped"] = max(-SET.score_clip, min(SET.score_clip, row["score"]))
        rewards = [-SET.kl_coef * (logp - ref) for logp, ref in zip(row["logps"], row["ref_logps"])]
        rewards[-1] += row["clipped"] - (0 if row["ended"] else SET.missing_eos_penalty)
        row["advantages"], advantage, next_value = [], 0.0, 0.0
        for reward, value in zip(rewards[::-1], row["values"][::-1]):
            advantage = reward + SET.gamma * next_value - value + SET.gamma * SET.gae_lambda * advantage
            row["advantages"].insert(0, advantage)
            next_value = value
        row["returns"] = [advantage + value for advantage, value in zip(row["advantages"], row["values"])]

    def rate(self, peak: float) -> float:
        """Of the next update: linear warm-up, then a cosine to 0 at the last of all updates."""
        last = self.epochs * (len(self.prompts) // SET.global_batch_size) * SET.ppo_epochs * SET.minibatches
        if self.updates < SET.warmup_steps:
            return peak * self.updates / SET.warmup_steps
        return peak * (1 + math.cos(math.pi * (self.updates - SET.warmup_steps) / (last - SET.warmup_steps))) / 2

    def update(self, rows: list[dict]) -> tuple[list[list], list[float]]:
        """One optimizer step of both models on a minibatch: what it says of each token, and both gradients' norms."""
        tokens, total = [], 0.0
        for row in rows:
            logps, values = self.logps(self.policy, row), values_alone(self.critic, row["prompt"], row["response"])
            columns = ("logps", "values", "whitened", "returns")
            for logp, value, old_logp, old_value, advantage, target in zip(logps, values, *(row[c] for c in columns)):
                ratio = (logp - old_logp).exp()
                kept = min(max(ratio.item(), 1 - SET.cliprange), 1 + SET.cliprange)  # a number, without a gradient
                policy_clipped = kept != ratio.item() and -kept * advantage > -ratio.item() * advantage
                policy_loss = -kept * advantage if policy_clipped else -ratio * advantage
                near = min(max(value.item(), old_value - SET.cliprange_value), old_value + SET.cliprange_value)
                value_clipped = near != value.item() and abs(near - target) > abs(value.item() - target)
                value_loss = ((near if value_clipped else value) - target) ** 2 / 2
                total = total + policy_loss + value_loss
                each = (policy_loss, value_loss, policy_clipped, value_clipped, ratio)
                tokens.append([torch.as_tensor(x).item() for x in each])
        (total / len(tokens)).backward()
        norms = []
        for optimizer, model, peak in self.optimizers:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
            for group in optimizer.param_groups:
                group["lr"] = self.rate(peak)
            optimizer.step()
            optimizer.zero_grad()
        self.updates += 1
        return tokens, norms

    def step(self, step: int, batch: list[int]) -> None:
        rows = [self.answer(self.prompts[row], [SET.seed, step, row]) for row in batch]
        for row in rows:
            self.reward(row)
        advantages, returns, values, logps = (
            np.concatenate([row[name] for row in rows]) for name in ("advantages", "returns", "values", "logps")
        )
        for row in rows:
            row["whitened"] = ((row["advantages"] - advantages.mean()) / math.sqrt(advantages.var() + 1e-8)).tolist()
        rate, tokens, norms = self.rate(SET.policy_learning_rate), [], []
        shares = np.split(np.arange(len(rows)), self.ranks)
        for ppo_epoch in range(SET.ppo_epochs):
            order = np.random.default_rng([SET.seed, step, ppo_epoch]).permutation(len(shares[0]))
            for part in np.split(order, SET.minibatches):
                found, norm = self.update([rows[i] for share in shares for i in share[part]])
                tokens, norms = tokens + found, [*norms, norm]
        names = ("policy_loss", "value_loss", "policy_clipfrac", "value_clipfrac", "ratio_mean")
        means = dict(zip(names, np.mean(tokens, 0))) | dict(
            lr=rate,
            policy_grad_norm=np.mean(norms, 0)[0],
            critic_grad_norm=np.mean(norms, 0)[1],
            entropy=-logps.mean(),
            returns_mean=returns.mean(),
            explained_variance=1 - np.var(returns - values) / np.var(returns),
            score_clipfrac=np.mean([abs(row["score"]) > SET.score_clip for row in rows]),
        )
        self.write(step, "train", rows, **means)
        self.rows += rows

    def train(self) -> None:
        self.evaluate(step := 0)
        for epoch in range(self.epochs):
            order = np.random.default_rng([SET.seed, epoch]).permutation(len(self.prompts))
            for start in range(0, len(order) - SET.global_batch_size + 1, SET.global_batch_size):
                step += 1
                self.step(step, order[start : start + SET.global_batch_size].tolist())
                self.evaluate(step)


# ---------------------------------------------------------------- agreement


def argv(data: dict[str, str], out: Path, more: str) -> str:
    return " ".join(f"--{name} {value}" for name, value in (vars(SET) | data).items()) + f" --output_dir {out} {more}"


def check(loop: Loop, data: dict[str, str], out: Path) -> None:
    """The metrics to 4 digits, the answers, and the policy's weights to a thousandth of their mean move."""
    found = lines(out / "metrics.jsonl")
    assert [(line["step"], line["split"]) for line in found] == [(m["step"], m["split"]) for m in loop.lines]
    for line, expected in zip(found, loop.lines):
        numbers = {name: value for name, value in expected.items() if name != "split"}
        own = {name: line[name] for name in line if name not in CLOCK | {"split"}}
        assert own == pytest.approx(numbers, rel=1e-4, abs=1e-5), (out.name, line)
    generations = json.loads((out / "generations.json").read_text())
    answers = [{"instruction": prompt, "output": answer} for prompt, answer in zip(loop.held_out, loop.answers)]
    assert [{key: g[key] for key in ("instruction", "output")} for g in generations] == answers
    before, after = (CAUSAL.from_pretrained(path).state_dict() for path in (data["policy_model"], out / "model"))
    for name, weight in loop.policy.state_dict().items():
        moved, error = ((after[name] - other).abs().mean().item() for other in (before[name], weight))
        assert error < 1e-3 * moved, (name, error, moved)


def test_values_past_the_end_count_for_nothing():
    """γ = λ = 0.5, rewards 0 3, values 1 2. Last token: 3 - 2 = 1. First: 0 + 0.5 · 2 - 1 + 0.25 · 1 = 0.25."""
    values, is_response = torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[True, True, False]])
    found = ppo.advantages_and_returns(torch.tensor([[0.0, 3.0, 0.0]]), values, is_response, 0.5, 0.5)
    assert [part.tolist() for part in found] == [[[0.25, 1, 0]], [[1.25, 3, 0]]]


def test_a_run_is_that_of_a_plain_loop(run, data, tmp_path):
    """On one rank. What can go wrong must be there: answers of all lengths that end, and that do not; scores and tokens
    of both kinds, clipped and not; gradients that are clipped."""
    loop = Loop(data)
    loop.train()
    run(ppo, argv(data, tmp_path / "out", "--micro_batch_size 2"))
    check(loop, data, tmp_path / "out")
    ends = {(row["ended"], len(row["response"]) == SET.max_new_tokens) for row in loop.rows}
    assert ends == {(True, False), (True, True), (False, True)}
    assert {row["clipped"] == row["score"] for row in loop.rows} == {True, False}
    for line in loop.lines:
        if line["split"] == "train":
            assert 0 < line["policy_clipfrac"] != line["value_clipfrac"] < 1
            assert min(line["policy_grad_norm"], line["critic_grad_norm"]) > 1


STAGES = {
    "3-0": "--policy_zero_stage 3 --critic_zero_stage 0 --gradient_checkpointing",
    "2-3": "--policy_zero_stage 2 --critic_zero_stage 3 --offload",
}


def run_each(*runs: str) -> None:
    for flags in runs:
        ppo.main(common.parse_args(ppo.Args, ppo.preset, flags.split()))


def test_two_ranks_at_any_stage_are_that_loop(data, tmp_path):
    """5 prompts held out: one rank answers one of them twice. A minibatch has a part of each rank's answers."""
    loop, same = Loop(data, ranks=2, epochs=1), "--micro_batch_size 1 --epochs 1"
    loop.train()
    on_two_ranks(run_each, *(argv(data, tmp_path / name, f"{same} {flags}") for name, flags in STAGES.items()))
    for name in STAGES:
        check(loop, data, tmp_path / name)
