"""Train a policy by proximal policy optimization (PPO) against a reward model.

    r_t = -kl_coef (log π_old(y_t) - log π_ref(y_t)), and at a response's last token + its score, clipped
    A_t = δ_t + γ λ A_t+1,   δ_t = r_t + γ V_old(t+1) - V_old(t)                generalized advantage estimation (GAE)
    policy loss   mean of max(-ρ A, -clip(ρ, 1 - ε, 1 + ε) A),   ρ = π(y_t) / π_old(y_t),   A whitened
    value loss    mean of ½ max((V - R)², (clip(V, V_old - ε, V_old + ε) - R)²),   R_t = A_t + V_old(t), A not whitened

1 process     deepspeed ppo.py --policy_model runs/sft/model --reward_model runs/reward/model
8 GPUs        deepspeed --num_gpus 8 ppo.py --task alpaca --policy_model <SFT model> --reward_model <reward model>

Four models: policy and frozen reference from --policy_model, critic and frozen reward model from --reward_model, which
brings its constraint (reward.py --constraint). A step is one rollout: --global_batch_size prompts over all ranks are
answered once; each of its --minibatches is one optimizer step of both engines.
Input: prompts (JSON, JSONL, CSV, Parquet, a folder, a Hub id): a column prompt, messages, instruction/input, or post.
Output, in --output_dir: args.json, metrics.jsonl, tensorboard/, ppo.png (score, KL and length over steps),
generations.json (sampled answers, for AlpacaEval) and model/, which `AutoModelForCausalLM.from_pretrained` loads.

Shapes: P prompts of a rank, L tokens of the longest response, R rows, T tokens of a row, N response tokens in R rows.
"""

import common  # first: it sets what torch reads when it is loaded

import argparse
import functools
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro


@dataclass
class Args:
    """Train a policy by PPO against a reward model.

    A flag wins over what --task sets, which --help shows as the default. --dataset cancels the task's evaluation data.
    Held out are whole prompts, drawn by --seed.
    """

    task: Literal["toy", "alpaca", "tldr"] = "toy"  # Sets all defaults: embedded, or the paper's dialogue or summaries.
    policy_model: str = tyro.MISSING  # Folder or Hub id of the SFT model: the policy's start and frozen reference.
    reward_model: str = tyro.MISSING  # Folder or Hub id, with the same tokenizer: frozen, and where the critic starts.
    judge_model: str = ""  # A second reward model for evaluation: its score, and the win rate against the SFT answers.
    dataset: str = str(common.DATA / "prompts_train.jsonl")  # Prompts to train on: file, folder or Hub id[:SPLIT].
    eval_dataset: str = str(common.DATA / "prompts_eval.jsonl")  # Held out; empty: 10 % of --dataset, at most 500.
    output_dir: str = ""  # Where results go; empty: runs/ppo-<time>.
    overwrite: bool = False  # Replace the finished run in --output_dir.

    kl_coef: float = 0.1  # Reward taken for each nat of log π - log π_ref.
    max_kl: float = 100.0  # KL from the reference, in nats per response, above which the run stops; 0: no limit.
    score_clip: float = 5.0  # Scores are clipped to ± this before they become rewards; 0: no limit.
    missing_eos_penalty: float = 0.0  # Taken from the score of a response that does not end within --max_new_tokens.
    gamma: float = 1.0  # Discount γ per token.
    gae_lambda: float = 0.95  # λ of GAE: 1 trusts the rewards alone, 0 the critic.
    cliprange: float = 0.2  # ε of the policy loss.
    cliprange_value: float = 0.2  # ε of the value loss.
    ppo_epochs: int = 1  # Passes over the responses of a step.
    minibatches: int = 1  # Parts of each rank's responses, drawn anew; for each one optimizer step of both engines.
    temperature: float = 1.0  # Of sampling; log-probabilities are those of the distribution that is sampled.
    generate: int = 48  # Held-out prompts that are answered before and after training, into generations.json; 0: none.

    max_prompt_length: int = 64  # Tokens of a prompt; longer ones are dropped and counted.
    max_new_tokens: int = 96  # Tokens of a response at most, EOS included.
    policy_learning_rate: float = 3e-4  # Its peak; cosine to 0.
    critic_learning_rate: float = 1e-3  # Its peak; cosine to 0.
    weight_decay: float = 0.0  # AdamW's; none on biases and norm weights.
    epochs: int = 16  # Passes over the prompts; 0: evaluate only.
    max_steps: int = 0  # Steps (rollouts) at most; 0: no limit.
    micro_batch_size: int = 48  # Rows per rank and forward pass, at most.
    global_batch_size: int = 48  # Prompts per step, over all ranks.
    policy_zero_stage: Literal[0, 1, 2, 3] = 0  # Shards: 1 optimizer states, 2 + gradients, 3 + weights; bf16: 0 is 1.
    critic_zero_stage: Literal[0, 1, 2, 3] = 0  # The same of critic, reward and judge model.
    offload: bool = False  # Keep optimizer states (ZeRO-3: weights too) in CPU memory; stage 0 runs as 1.
    dtype: Literal["fp32", "bf16"] = "fp32"  # Of the model; bf16 keeps fp32 master weights.
    gradient_checkpointing: bool = False  # Recompute activations: less memory, a third more time.
    warmup_steps: int = 0  # Optimizer steps of linear warm-up.
    seed: int = 42  # Of the held-out split, the order of the prompts and the sampled responses.
    log_every: int = 5  # Steps between lines of metrics.
    eval_every: int = 0  # Steps between evaluations; 0: before and after training.
    save_every: int = 0  # Steps between checkpoints; 0: only when a signal ends training.
    keep: int = 2  # Checkpoints that stay, the newest.
    resume: bool = False  # Go on from the newest checkpoint in --output_dir; begin where there is none.
    trust_remote_code: bool = False  # Run Python code that comes with a model.
    local_rank: int = -1  # Given by the launcher; LOCAL_RANK is used.


# The paper's settings; the embedded task's are the defaults above.
PAPER = dict(policy_learning_rate=1e-5, critic_learning_rate=5e-6, weight_decay=0.1, epochs=1, warmup_steps=100)
PAPER |= dict(micro_batch_size=4, global_batch_size=128, policy_zero_stage=2, critic_zero_stage=3, dtype="bf16")
PAPER |= dict(gradient_checkpointing=True, generate=256, log_every=1)
FARM = "hf://datasets/tatsu-lab/alpaca_farm@refs/convert/parquet/alpaca_instructions"
ALPACA = dict(dataset=f"{FARM}/unlabeled/*.parquet", eval_dataset=f"{FARM}/val/*.parquet")
ALPACA |= dict(max_prompt_length=256, max_new_tokens=384, max_steps=50)  # half of the warm-up: the rate still rises
REDDIT = "vwxyzjn/summarize_from_feedback_tldr_3_filtered"
TLDR = dict(dataset=f"{REDDIT}:train", eval_dataset=f"{REDDIT}:validation", max_prompt_length=768, max_new_tokens=256)
TLDR |= dict(max_steps=250)  # Upstream: the cosine spans the epoch, here the learning rate is still near its peak
TASKS = {"alpaca": PAPER | ALPACA, "tldr": PAPER | TLDR}
OUTPUTS = ("ppo.png", "generations.json")


def preset(task: str, constraint: str) -> dict:
    return TASKS.get(task, {})


# -------- rewards, advantages, losses


def token_rewards(logps, ref_logps, scores, is_response, kl_coef: float) -> torch.Tensor:
    """-kl_coef (log π - log π_ref) at each token, plus the score at the last one: (P, L), 0 past the end. Scores are
    (P,), all else is (P, L), and is_response is True from a response's first token to its last."""
    rewards = torch.where(is_response, -kl_coef * (logps - ref_logps), 0.0)  # P L
    last = is_response.sum(1, keepdim=True) - 1  # P 1
    return rewards.scatter_add(1, last, scores[:, None])


def advantages_and_returns(rewards, values, is_response, gamma: float, gae_lambda: float):
    """GAE and the critic's targets, from rewards and values, all (P, L). Rewards and results are 0 past the end."""
    values = torch.where(is_response, values, 0.0)
    advantages = torch.zeros_like(values)
    advantage = next_value = torch.zeros_like(values[:, 0])  # P; nothing follows the last token
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # P
        advantage = delta + gamma * gae_lambda * advantage  # P
        advantages[:, t], next_value = advantage, values[:, t]
    return advantages, advantages + values


def policy_losses(logps, old_logps, advantages, cliprange: float):
    """The clipped loss, the ratio and whether it was clipped, of each token: (N,) each."""
    ratio = (logps - old_logps).exp()
    loss, clipped = -ratio * advantages, -ratio.clamp(1 - cliprange, 1 + cliprange) * advantages
    return torch.maximum(loss, clipped), ratio, clipped > loss


def value_losses(values, old_values, returns, cliprange_value: float):
    """The clipped loss of each token and whether it was clipped: (N,) each."""
    near = values.clamp(old_values - cliprange_value, old_values + cliprange_value)  # inside: V itself, not rounded
    loss, clipped = (values - returns).square(), (near - returns).square()
    return torch.maximum(loss, clipped) / 2, clipped > loss


def moments(values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of the values where the mask is True, over all ranks."""
    values = values[mask].double()
    sums = torch.stack([torch.ones_like(values), values, values.square()]).sum(1)
    dist.all_reduce(sums)
    _, mean, square = sums / sums[0]
    return mean.float(), (square - mean.square()).clamp(min=0).float()


# -------- data


@dataclass
class Rollout:
    """The P responses of this rank to its prompts."""

    prompts: list[list[int]]
    responses: list[list[int]]  # EOS included where the response ended
    is_response: torch.Tensor  # P L
    ended: torch.Tensor  # P, whether with EOS or another token that ends an answer


def encode_prompt(row: dict, tokenizer, max_prompt_length: int) -> dict:
    """The columns of a prompt: its text and its tokens, those that the other scripts would read."""
    columns = common.read_example(row, tokenizer, "prompt")
    if not columns["prompt_ids"]:
        raise common.Unusable("prompt without a token")
    if len(columns["prompt_ids"]) > max_prompt_length:
        raise common.Unusable(f"longer than --max_prompt_length {max_prompt_length}")  # Upstream: truncated
    return {name: columns[name] for name in ("prompt", "prompt_ids", "instruction")}


def collate(rollout: Rollout, rows, pad_token_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Inputs for R rows of prompt and response (see common.collate_rows), the N response tokens as labels."""
    ids = [rollout.prompts[row] + rollout.responses[row] for row in rows]
    starts = [len(rollout.prompts[row]) for row in rows]
    return common.collate_rows(ids, starts, pad_token_id, device)


def micro_batches(rollout: Rollout, rows, args: Args, collator, process):
    """(rows, model inputs) of some of a rollout's rows, like lengths together."""
    rows = sorted(map(int, rows), key=lambda row: len(rollout.prompts[row]) + len(rollout.responses[row]))
    for part in (rows[i : i + args.micro_batch_size] for i in range(0, len(rows), args.micro_batch_size)):
        yield torch.tensor(part, device=process.device), collator(rollout, part)


# -------- models and rollout


def engine_args(args: Args, which: str) -> argparse.Namespace:
    """The flags as common.py reads them, with the ZeRO stage and the learning rate of the policy or the critic."""
    own = {name: getattr(args, f"{which}_{name}") for name in ("zero_stage", "learning_rate")}
    return argparse.Namespace(**vars(args) | own, max_length=args.max_prompt_length + args.max_new_tokens)


def critic_values(critic, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The critic's value before each response token, (N,)."""
    return critic(input_ids=input_ids, logits_to_keep=labels != common.NO_LABEL).logits


def sample(engine, model, tokenizer, prompts: list[list[int]], seeds: list, args: Args, process) -> Rollout:
    """A response to each of this rank's prompts, drawn from the policy's own distribution."""
    rooms, size = [args.max_new_tokens] * len(prompts), 4 * args.micro_batch_size  # generation keeps no activations
    responses = common.sample(engine, model, tokenizer, prompts, rooms, seeds, size, args.temperature)
    lengths = torch.tensor([len(response) for response in responses], device=process.device)
    ends = model.generation_config.eos_token_id
    is_response = torch.arange(int(lengths.max()), device=process.device) < lengths[:, None]  # P L
    ended = torch.tensor([response[-1] in ends for response in responses], device=process.device)  # P
    return Rollout(prompts, responses, is_response, ended)


@torch.no_grad()
def per_token(module, forward, rollout: Rollout, args: Args, collator, process) -> torch.Tensor:
    """forward(module, **inputs), (N,), for all response tokens: (P, L)."""
    module.eval()
    result = torch.zeros(rollout.is_response.shape, device=process.device)  # P L
    for rows, inputs in micro_batches(rollout, range(len(result)), args, collator, process):
        values, where = forward(module, **inputs), rollout.is_response[rows]  # N, R L
        result[rows] = torch.zeros_like(result[rows]).masked_scatter(where, values)
    module.train()
    return result


@torch.no_grad()
def score(scorer, rollout: Rollout, args: Args, collator, process) -> torch.Tensor:
    """A reward model's scores of all responses, (P,)."""
    result = torch.zeros(len(rollout.responses), device=process.device)
    for rows, inputs in micro_batches(rollout, range(len(result)), args, collator, process):
        before_last = inputs["labels"] != common.NO_LABEL  # R T
        last = before_last.roll(1, 1) & ~before_last  # R T, the last token of each row, never padding
        result[rows] = scorer(input_ids=inputs["input_ids"], logits_to_keep=last).logits
    finite = result.isfinite().all().float()
    dist.all_reduce(finite, dist.ReduceOp.MIN)
    if not finite:
        raise common.InputError("the reward model returned a score that is not finite: look at --reward_model")
    return result


def evaluate(models, prompts, log_policy, args: Args, tokenizer, collator, process) -> list[dict]:
    """For each held-out prompt an answer and what it is worth, on every rank."""
    policy, model, reference, scorer, judge = models
    padded = math.ceil(len(prompts) / process.world_size) * process.world_size  # each rank as many: some come twice
    mine = [i % len(prompts) for i in range(process.rank, padded, process.world_size)]
    seeds = [[args.seed, row] for row in mine]
    rollout = sample(policy, model, tokenizer, prompts["prompt_ids"][mine], seeds, args, process)
    logps, ref_logps = (per_token(m, log_policy, rollout, args, collator, process) for m in (policy, reference))  # P L
    kl = torch.where(rollout.is_response, logps - ref_logps, 0.0).sum(1)  # P
    scores = score(scorer, rollout, args, collator, process)  # P
    judged = score(judge, rollout, args, collator, process) if judge else scores  # P
    numbers = dict(score=scores, judge=judged, kl=kl)
    numbers |= dict(response_tokens=rollout.is_response.sum(1), ended_by_eos=rollout.ended)
    columns = {name: column.tolist() for name, column in numbers.items()}
    columns["instruction"] = prompts["instruction"][mine]
    columns["answer"] = tokenizer.batch_decode(rollout.responses, skip_special_tokens=True)
    return common.interleaved([dict(zip(columns, line)) for line in zip(*columns.values())])[: len(prompts)]


def eval_metrics(lines: list[dict], first: list[dict], judged: bool) -> dict[str, float]:
    """Means over the held-out prompts; `first` are the answers before training."""
    scores, before = (np.array([line["score"] for line in some]) for some in (lines, first))
    margins = [(line["answer"] != old["answer"]) * (line["judge"] - old["judge"]) for line, old in zip(lines, first)]
    wins = (np.sign(margins) + 1) / 2  # equal answers tie, also where another batch has rounded otherwise
    return {
        "score_mean": scores.mean(),
        "score_std": scores.std(),
        "score_max": scores.max(),
        "score_growth": scores.mean() - before.mean(),
        **{name: np.mean([line[name] for line in lines]) for name in ("kl", "response_tokens", "ended_by_eos")},
        "judge_score": np.mean([line["judge"] for line in lines]) if judged else math.nan,
        "win_rate": wins.mean() if judged else math.nan,
    }


def plot_steps(path: Path, output: Path):
    """Score, KL and response length over the steps."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in path.read_text().splitlines()]
    figure = Figure(figsize=(12, 3.5), dpi=120, layout="constrained")
    titles = {"score_mean": "score", "kl": "KL from the reference, nats", "response_tokens": "response, tokens"}
    axes = figure.subplots(1, 3)
    for axis, (name, title) in zip(axes, titles.items()):
        for split, style in (("train", "-"), ("eval", "o")):
            points = [(line["step"], line[name]) for line in lines if line["split"] == split]
            if points:
                axis.plot(*zip(*points), style, label=split)
        axis.set(xlabel="step", title=title)
    axes[0].legend()
    figure.savefig(output)


def main(args: Args):
    process = common.start(args.seed)
    accumulation = common.accumulation_steps(args)
    policy_args, critic_args = engine_args(args, "policy"), engine_args(args, "critic")
    policy_config = common.engine_config(policy_args, accumulation)
    critic_config = common.engine_config(critic_args, accumulation)
    output_dir = common.open_output(args, OUTPUTS)

    tokenizer = common.load_tokenizer(args.policy_model, args.trust_remote_code)
    for flag, path in (("--reward_model", args.reward_model), ("--judge_model", args.judge_model)):
        if path:
            common.check_tokenizer(flag, path, tokenizer, args.trust_remote_code)
    encode = functools.partial(encode_prompt, tokenizer=tokenizer, max_prompt_length=args.max_prompt_length)
    train_prompts, eval_prompts = common.load_data(args, encode)
    eval_prompts = eval_prompts.select(range(min(args.generate, len(eval_prompts))))
    total_steps = common.total_steps(args, len(train_prompts))
    updates = total_steps * args.ppo_epochs * args.minibatches

    def language_model():
        return common.load_language_model("--policy_model", args.policy_model, policy_args, tokenizer, policy_config)

    def reward_model(flag, path, steps):
        module = common.load_reward_model(flag, path, critic_args, tokenizer, critic_config)
        engine = common.make_engine(module, critic_args, critic_config, steps, process)
        common.check_model(engine, module, critic_args, process)
        return engine

    model = language_model()
    policy = common.make_engine(model, policy_args, policy_config, updates, process)
    common.check_model(policy, model, policy_args, process)
    reference = common.make_engine(language_model(), policy_args, policy_config, 0, process)
    critic = reward_model("--reward_model", args.reward_model, updates) if updates else None
    scorer = reward_model("--reward_model", args.reward_model, 0)
    judge = reward_model("--judge_model", args.judge_model, 0) if args.judge_model else None
    collator = functools.partial(collate, pad_token_id=tokenizer.pad_token_id, device=process.device)
    log_policy = functools.partial(common.token_logps, temperature=args.temperature)  # what is sampled
    metrics = common.Metrics(args, total_steps, shown=("score_mean", "kl"))
    rows = (train_prompts, eval_prompts)
    checkpoints = common.Checkpoints(metrics, args, rows, policy=policy, critic=critic)
    common.say(f"{total_steps} steps on {len(train_prompts)} prompts, {len(eval_prompts)} held out -> {output_dir}")

    def evaluate_now(step, first):
        if not len(eval_prompts):
            return []
        models = (policy, model, reference, scorer, judge)
        lines = evaluate(models, eval_prompts, log_policy, args, tokenizer, collator, process)
        metrics.write(step, "eval", eval_metrics(lines, first or lines, judge is not None))
        return lines

    state = checkpoints.state or dict(first_lines=evaluate_now(0, None), below_zero=0, too_far=False)
    step, lines = checkpoints.step, state["first_lines"]
    for epoch in range(args.epochs):
        if state["too_far"]:
            break
        order = np.random.default_rng([args.seed, epoch]).permutation(len(train_prompts))
        batches = order[: len(order) // args.global_batch_size * args.global_batch_size]
        for step, batch in checkpoints.rest_of(epoch, batches.reshape(-1, args.global_batch_size)):
            clock = [time.perf_counter()]

            # 1 sample: each rank answers its share of the prompts
            mine = batch.reshape(process.world_size, -1)[process.rank]
            seeds = [[args.seed, step, row] for row in mine.tolist()]
            prompts = train_prompts["prompt_ids"][mine]
            rollout = sample(policy, model, tokenizer, prompts, seeds, args, process)
            is_response = rollout.is_response  # P L
            clock.append(time.perf_counter())

            # 2 score the responses with the four models
            # Decoding rounds differently: both log-probabilities are from a pass like that of training.
            old_logps = per_token(policy, log_policy, rollout, args, collator, process)  # P L
            ref_logps = per_token(reference, log_policy, rollout, args, collator, process)  # P L
            old_values = per_token(critic, critic_values, rollout, args, collator, process)  # P L
            scores = score(scorer, rollout, args, collator, process)  # P
            clock.append(time.perf_counter())

            # 3 per-token reward: KL at each token, the score on the last one
            penalty = torch.where(rollout.ended, 0.0, args.missing_eos_penalty)  # P
            limit = args.score_clip or math.inf
            clipped = scores.clamp(-limit, limit)  # P
            rewards = token_rewards(old_logps, ref_logps, clipped - penalty, is_response, args.kl_coef)  # P L

            # 4 GAE, each P L, then whitening over the response tokens of all ranks
            advantages, returns = advantages_and_returns(rewards, old_values, is_response, args.gamma, args.gae_lambda)
            mean, variance = moments(advantages, is_response)
            advantages = (advantages - mean) / (variance + 1e-8).sqrt()

            # 5 learn: several minibatches x epochs of both clipped losses
            sums, tokens, norms, rate = torch.zeros(5, device=process.device), 0, [], policy.get_lr()[0]
            for ppo_epoch in range(args.ppo_epochs):
                shuffled = np.random.default_rng([args.seed, step, ppo_epoch]).permutation(len(mine))
                for rows in shuffled.reshape(args.minibatches, -1):
                    # Each token of the minibatch counts alike, on whatever rank and in whatever micro batch it is.
                    count = is_response[rows].sum().float()
                    dist.all_reduce(count)
                    weight = process.world_size * accumulation / count
                    tokens = tokens + count
                    for i, (part, inputs) in enumerate(micro_batches(rollout, rows, args, collator, process)):
                        here = is_response[part]  # R L
                        old_logp, old_value = old_logps[part][here], old_values[part][here]  # N, N
                        advantage, target = advantages[part][here], returns[part][here]  # N, N
                        logps = log_policy(policy, **inputs)  # N
                        policy_loss, ratio, policy_clipped = policy_losses(logps, old_logp, advantage, args.cliprange)
                        policy.backward(policy_loss.sum() * weight)  # frees its activations before the critic's
                        values = critic_values(critic, **inputs)  # N
                        value_loss, value_clipped = value_losses(values, old_value, target, args.cliprange_value)
                        critic.backward(value_loss.sum() * weight)
                        seen = {"policy_loss": policy_loss, "value_loss": value_loss, "ratio_mean": ratio}
                        seen |= {"policy_clipfrac": policy_clipped, "value_clipfrac": value_clipped}
                        sums += torch.stack([per_token.detach().float().sum() for per_token in seen.values()])
                        if i < accumulation - 1:
                            policy.step()  # counts the micro batch
                            critic.step()
                    norms.append(common.optimizer_step(step, (policy, policy_args), (critic, critic_args)))
            clock.append(time.perf_counter())

            # 6 log
            dist.all_reduce(sums)
            kl = torch.where(is_response, old_logps - ref_logps, 0.0).sum(1)  # P
            own = torch.stack([scores, kl, is_response.sum(1).float(), rollout.ended.float()])  # 4 P
            scores, kl, response_tokens, ended = common.gather(own)  # each (global batch,)
            first_score = state.setdefault("first_score", scores.mean().item())
            residual, spread = moments(returns - old_values, is_response)[1], moments(returns, is_response)[1]
            seconds = zip(("seconds_sample", "seconds_score", "seconds_learn"), np.diff(clock))
            policy_norm, critic_norm = np.mean(norms, axis=0)
            values = {
                "lr": rate,
                "policy_grad_norm": policy_norm,
                "critic_grad_norm": critic_norm,
                "score_mean": scores.mean(),
                "score_std": scores.std(correction=0),
                "score_max": scores.max(),
                "score_growth": scores.mean() - first_score,
                "score_clipfrac": (scores.abs() > limit).float().mean(),
                "kl": kl.mean(),
                "entropy": -moments(old_logps, is_response)[0],
                "response_tokens": response_tokens.mean(),
                "ended_by_eos": ended.mean(),
                "explained_variance": 1 - residual / spread,
                "returns_mean": moments(returns, is_response)[0],
                **dict(zip(seen, sums / tokens)),
                **dict(seconds),
            }
            state["below_zero"] = state["below_zero"] + 1 if kl.mean() < -1e-3 else 0
            if state["below_zero"] == 5:
                common.say(f"warning: step {step}: KL below 0 for 5 steps: the samples are not the policy's own")
            state["too_far"] = bool(0 < args.max_kl < kl.mean())
            if metrics.add(step, values, last=state["too_far"], prompts=len(batch)):
                first = [rollout.prompts[0], rollout.responses[0]]
                prompt, answer = tokenizer.batch_decode(first, skip_special_tokens=True)
                common.say(f"sample: {prompt!r} -> {answer!r} (score {scores[0]:.2f})")
            if state["too_far"]:
                common.say(f"stopped at step {step}: the KL is above --max_kl {args.max_kl:g}")
            elif args.eval_every and step % args.eval_every == 0 and step < total_steps:
                evaluate_now(step, state["first_lines"])
            checkpoints.step_done(step, **state)
            if state["too_far"]:
                break

    if step:
        common.save_model(policy, model, tokenizer, output_dir / "model")
        lines = evaluate_now(step, state["first_lines"])
    if process.rank == 0:
        plot_steps(output_dir / "metrics.jsonl", output_dir / "ppo.png")
    common.write_generations([(line["instruction"], line["answer"]) for line in lines], args)  # last: finished
    common.say(f"finished: look at {output_dir}/ppo.png and {output_dir}/generations.json")


if __name__ == "__main__":
    common.run(main, Args, preset)
