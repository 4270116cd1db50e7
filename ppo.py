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
Input: prompts (JSON, JSONL, Parquet, a folder, a Hub id) with the column prompt, or instruction/input, or post.
Output, in --output_dir: args.json, metrics.jsonl, tensorboard/, ppo.png (score, KL and length over steps),
generations.json (answers to held-out prompts, as AlpacaEval reads them) and model/, which
`AutoModelForCausalLM.from_pretrained` loads.

Symbols in the shapes: P prompts of a rank, each with one response; L tokens of the longest response; R rows of a micro
batch, T tokens of a row, N response tokens of a micro batch, H hidden size, V vocabulary.
"""

import argparse
import json
import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint

import common


@dataclass
class Args:
    """Train a policy by PPO against a reward model.

    A flag given on the command line always wins over what --task sets; the defaults shown here are those of the --task
    on this command line.
    """

    task: Literal["toy", "alpaca", "tldr"] = "toy"
    """Sets prompts, lengths and every hyperparameter: the embedded task, or the paper's dialogue or summarization."""
    policy_model: str = ""
    """Folder or Hub id of the SFT model: where the policy starts, and the frozen reference."""
    reward_model: str = ""
    """Folder or Hub id of the reward model, with the same tokenizer: frozen, and where the critic starts."""
    judge_model: str = ""
    """Folder or Hub id of a second reward model for evaluation: its score, and the win rate against the SFT answers."""
    dataset: str = str(common.DATA / "prompts_train.jsonl")
    """Prompts to train on: file, folder or Hub id, `:SPLIT` may follow. Cancels the task's own evaluation data."""
    eval_dataset: str = str(common.DATA / "prompts_eval.jsonl")
    """Held-out prompts; empty: min(500, 10 %) of --dataset, drawn by --seed."""
    output_dir: str = ""
    """Where results go; empty: runs/ppo-<time>."""
    overwrite: bool = False
    """Replace the finished run in --output_dir."""

    kl_coef: float = 0.1
    """Reward taken for each nat of log π - log π_ref."""
    max_kl: float = 100.0
    """KL from the reference, in nats per response, above which the run stops; 0: no limit."""
    score_clip: float = 5.0
    """Scores are clipped to ± this before they become rewards."""
    missing_eos_penalty: float = 0.0
    """Taken from the score of a response that does not end within --max_new_tokens."""
    gamma: float = 1.0
    """Discount γ per token."""
    gae_lambda: float = 0.95
    """λ of GAE: 1 trusts the rewards alone, 0 the critic."""
    cliprange: float = 0.2
    """ε of the policy loss."""
    cliprange_value: float = 0.2
    """ε of the value loss."""
    ppo_epochs: int = 1
    """Passes over the responses of a step."""
    minibatches: int = 1
    """Parts of a step's responses, each an optimizer step of both engines."""
    temperature: float = 1.0
    """Of sampling; log-probabilities are those of the distribution that is sampled."""
    generate: int = 48
    """Held-out prompts that are answered before and after training, into generations.json; 0: none."""

    max_prompt_length: int = 64
    """Tokens of a prompt; longer ones are dropped and counted."""
    max_new_tokens: int = 96
    """Tokens of a response at most, EOS included."""
    policy_learning_rate: float = 3e-4
    """Peak learning rate of the policy; cosine to 0."""
    critic_learning_rate: float = 1e-3
    """Peak learning rate of the critic; cosine to 0."""
    weight_decay: float = 0.0
    """AdamW's, on everything but biases and norm weights."""
    epochs: int = 16
    """Passes over the prompts; 0: evaluate only."""
    max_steps: int = 0
    """Steps (rollouts) at most; 0: no limit."""
    micro_batch_size: int = 48
    """Rows per rank and forward pass, at most: cut down to a rank's share of a minibatch."""
    global_batch_size: int = 48
    """Prompts per step, over all ranks and micro batches."""
    policy_zero_stage: Literal[0, 1, 2, 3] = 0
    """What DeepSpeed shards of the policy over the ranks: nothing, optimizer states, + gradients, + weights."""
    critic_zero_stage: Literal[0, 1, 2, 3] = 0
    """The same of the critic. At 3 the frozen model beside it is sharded too."""
    offload: bool = False
    """Keep optimizer states (ZeRO-3: weights too) in CPU memory."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of weights and activations; bf16 and fp16 keep fp32 master weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up."""
    seed: int = 42
    """Of the held-out split, the order of the prompts and the sampled responses."""
    log_every: int = 5
    """Steps between lines of metrics; the first step always has one."""
    eval_every: int = 0
    """Steps between evaluations; 0: only before and after training."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model."""
    local_rank: int = -1
    """Given by the launcher, which also sets the LOCAL_RANK that is used."""


# The paper's settings; the embedded task's are the defaults above.
PAPER = dict(
    policy_learning_rate=1e-5, critic_learning_rate=5e-6, weight_decay=0.1, epochs=1, warmup_steps=100, generate=256,
    micro_batch_size=4, global_batch_size=128, policy_zero_stage=2, critic_zero_stage=3, dtype="bf16",
    gradient_checkpointing=True, log_every=1,
)
ALPACA = "hf://datasets/tatsu-lab/alpaca_farm@refs/convert/parquet/alpaca_instructions"
TLDR = "vwxyzjn/summarize_from_feedback_tldr_3_filtered"
TASKS = {
    "toy": {},
    "alpaca": PAPER | dict(  # 50 steps of 100 of warm-up: the run ends while the learning rate still rises
        dataset=f"{ALPACA}/unlabeled/*.parquet", eval_dataset=f"{ALPACA}/val/*.parquet",
        max_prompt_length=256, max_new_tokens=384, max_steps=50,
    ),
    "tldr": PAPER | dict(
        dataset=f"{TLDR}:train", eval_dataset=f"{TLDR}:validation",
        max_prompt_length=768, max_new_tokens=256, max_steps=250,
    ),
}


def preset(task: str, constraint: str) -> dict:
    return TASKS.get(task, {})


# ---------------------------------------------------------------- rewards, advantages, losses


def token_rewards(logps, ref_logps, scores, is_response, kl_coef: float) -> torch.Tensor:
    """-kl_coef (log π - log π_ref) at each token, and the score at the last one: (P, L), 0 past the end.

    Args:
        logps, ref_logps: (P, L); scores: (P,); is_response: (P, L), True from the first token to the last.
    """
    rewards = torch.where(is_response, -kl_coef * (logps - ref_logps), 0.0)  # P L
    last = is_response.sum(1, keepdim=True) - 1  # P 1
    return rewards.scatter_add(1, last, scores[:, None])


def advantages_and_returns(rewards, values, is_response, gamma: float, gae_lambda: float):
    """GAE and the critic's targets, both (P, L) and 0 past the end, from rewards and values (P, L).

    Nothing follows a response's last token: its next value is 0.
    """
    values = torch.where(is_response, values, 0.0)
    advantage, advantages = torch.zeros_like(values[:, 0]), torch.zeros_like(values)
    next_value = torch.zeros_like(advantage)
    for t in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # P
        advantage = torch.where(is_response[:, t], delta + gamma * gae_lambda * advantage, 0.0)  # P
        advantages[:, t], next_value = advantage, values[:, t]
    return advantages, torch.where(is_response, advantages + values, 0.0)


def policy_losses(logps, old_logps, advantages, cliprange: float):
    """The clipped loss, the ratio and whether it was clipped, of each token: (N,) each."""
    ratio = (logps - old_logps).exp()
    loss, clipped = -ratio * advantages, -ratio.clamp(1 - cliprange, 1 + cliprange) * advantages
    return torch.maximum(loss, clipped), ratio, clipped > loss


def value_losses(values, old_values, returns, cliprange_value: float):
    """The clipped loss of each token and whether it was clipped: (N,) each."""
    loss = (values - returns).square()
    near = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    clipped = (near - returns).square()
    return torch.maximum(loss, clipped) / 2, clipped > loss


def moments(values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of the values where the mask is True, over all ranks."""
    chosen = values[mask].double()
    sums = torch.stack([torch.full_like(chosen.sum(), chosen.numel()), chosen.sum(), chosen.square().sum()])
    dist.all_reduce(sums)
    mean = sums[1] / sums[0]
    return mean.float(), (sums[2] / sums[0] - mean.square()).clamp(min=0).float()


# ---------------------------------------------------------------- data


@dataclass
class Prompt:
    """A row of the data."""

    text: str
    ids: np.ndarray = None  # int32: (BOS,) prompt


@dataclass
class Rollout:
    """The P responses of this rank to its prompts, and what the four models say of them.

    logps, ref_logps and values are (P, L), meaningless where is_response is False.
    """

    prompts: list[np.ndarray]
    responses: list[np.ndarray]  # int32, EOS included where the response ended
    is_response: torch.Tensor  # P L
    ended: torch.Tensor  # P, whether with EOS
    logps: torch.Tensor
    ref_logps: torch.Tensor = None
    values: torch.Tensor = None
    scores: torch.Tensor = None  # P


def parse_prompt(row: dict, where: str) -> str | None:
    """The prompt of a row in any known format, or None where it has no text."""
    if "prompt" in row:
        prompt = row["prompt"]
    elif "instruction" in row:
        instruction, extra = row["instruction"], row.get("input") or ""
        check_text(where, instruction=instruction, input=extra)
        if instruction is None:
            return None
        question = instruction if instruction.endswith(extra) else instruction + extra
        prompt = f"\n\nHuman: {question}\n\nAssistant: "
    elif "post" in row:
        check_text(where, post=row["post"])
        if row["post"] is None:
            return None
        task = "Your task is to generate a short summary of a post."
        prompt = f"\n\nHuman: {task}\n\nPost: {row['post']}\n\nSummary: \n\nAssistant: "
    else:
        raise common.InputError(
            f"{where}: the columns are {', '.join(row)}, but must hold prompt, or instruction/input, or post"
        )
    check_text(where, prompt=prompt)
    return prompt


def check_text(where: str, **values) -> None:
    for name, value in values.items():
        if value is not None and not isinstance(value, str):
            raise common.InputError(f"{where}: {name} is {value!r}, but must be text")


def read_prompts(flag: str, name: str, split: str, tokenizer, args: Args, process: common.Process) -> list[Prompt]:
    """The usable prompts of a data set with their tokens; the others are counted by reason."""
    dropped = Counter()
    rows = common.read_rows(flag, name, split)
    texts = [parse_prompt(row, f"{flag} {name}, row {number}") for number, row in enumerate(rows, 1)]
    dropped["missing text"] = texts.count(None)
    prompts = [Prompt(text) for text in texts if text is not None]
    # BOS only where the tokenizer itself begins a text with it.
    bos = [tokenizer.bos_token_id] if tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] else []
    for start in range(0, len(prompts), 1000):  # in chunks: a tokenizer's lists take much more room than arrays
        chunk = prompts[start : start + 1000]
        ids = tokenizer([p.text for p in chunk], add_special_tokens=False).input_ids
        for prompt, own in zip(chunk, ids, strict=True):
            prompt.ids = np.array(own if own[:1] == bos else bos + own, np.int32)
    kept = []
    for prompt in prompts:
        if not len(prompt.ids):
            dropped["prompt without a token"] += 1
        elif len(prompt.ids) > args.max_prompt_length:
            dropped[f"longer than --max_prompt_length {args.max_prompt_length}"] += 1  # Upstream: truncated
        else:
            kept.append(prompt)
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
    if not kept:
        raise common.InputError(f"{flag} {name}: no usable prompt is left ({reasons})")
    process.print(f"{flag}: {len(kept)} prompts" + (f"; dropped {dropped.total()}: {reasons}" if reasons else ""))
    return kept


def load_prompts(args: Args, tokenizer, process: common.Process) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on, none with --epochs 0, and held-out prompts."""
    prompts = []
    if args.epochs or not args.eval_dataset:
        prompts = read_prompts("--dataset", args.dataset, "train", tokenizer, args, process)
    if args.eval_dataset:
        return prompts, read_prompts("--eval_dataset", args.eval_dataset, "test", tokenizer, args, process)
    order = np.random.default_rng(args.seed).permutation(len(prompts))
    count = min(500, math.ceil(len(prompts) / 10))
    return [prompts[i] for i in order[count:] if args.epochs], [prompts[i] for i in order[:count]]


def collate(prompts, responses, pad_token_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Model inputs for R rows of prompt and response, padded on the right; causal attention then needs no mask.

    Returns:
        input_ids (R, T); targets (N,), the response tokens, row after row; sources (N,), the index in the flattened
        (R * T) rows of the position before each; ends (R,), the index of each row's last token.
    """
    rows = [np.concatenate(both) for both in zip(prompts, responses)]
    width = max(map(len, rows))
    input_ids = np.full((len(rows), width), pad_token_id)  # R T
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = row
    sources = [np.arange(len(p) - 1, len(row) - 1) + i * width for i, (p, row) in enumerate(zip(prompts, rows))]
    arrays = {
        "input_ids": input_ids, "sources": np.concatenate(sources), "targets": np.concatenate(responses),
        "ends": np.array([i * width + len(row) - 1 for i, row in enumerate(rows)]),
    }
    return {name: torch.tensor(array, dtype=torch.long, device=device) for name, array in arrays.items()}


# ---------------------------------------------------------------- models


class Policy(torch.nn.Module):
    """The language model, but its head sees only the positions that predict a response token, some at a time."""

    def __init__(self, model, temperature: float):
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.at_once = common.LOGITS_AT_ONCE // model.config.get_text_config().vocab_size + 1

    def forward(self, input_ids, sources, targets, **_) -> torch.Tensor:
        """log π of each target, (N,) fp32, under the distribution that is sampled."""
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state.flatten(0, 1)  # R*T H
        hidden = hidden[sources]  # N H
        chunks = torch.tensor(-(-len(sources) // self.at_once), device=hidden.device)
        dist.all_reduce(chunks, dist.ReduceOp.MAX)  # at ZeRO-3 each rank must call the head equally often
        cuts = [i * self.at_once for i in range(1, chunks.item())]  # one size: an allocator can use its blocks again
        pieces = list(zip(hidden.tensor_split(cuts), targets.tensor_split(cuts)))
        # The backward pass makes the logits again, but for the last pieces: so many are held, however long the rows.
        early, late = pieces[: -common.LOGITS_HELD], pieces[-common.LOGITS_HELD :]
        logps = [checkpoint(self.logps, *piece, use_reentrant=False) for piece in early]
        return torch.cat(logps + [self.logps(*piece) for piece in late])  # N

    def logps(self, hidden, targets) -> torch.Tensor:
        logits = self.model.get_output_embeddings()(hidden).float() / self.temperature  # n V
        return -F.cross_entropy(logits, targets, reduction="none")  # n


class Critic(torch.nn.Module):
    """The sequence classifier as a value function: its head at the positions before each response token."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, input_ids, sources, **_) -> torch.Tensor:
        hidden = self.classifier.base_model(input_ids=input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
        return self.classifier.score(hidden[sources]).squeeze(-1).float()  # N


class Scorer(torch.nn.Module):
    """The sequence classifier as a reward model: its head at the last token of each row, never at padding."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, input_ids, ends, **_) -> torch.Tensor:
        hidden = self.classifier.base_model(input_ids=input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
        return self.classifier.score(hidden[ends]).squeeze(-1).float()  # R


def engine_args(args: Args, which: str) -> argparse.Namespace:
    """The flags as common.py reads them, with the ZeRO stage and the learning rate of the policy or the critic."""
    own = dict(
        zero_stage=getattr(args, f"{which}_zero_stage"), learning_rate=getattr(args, f"{which}_learning_rate"),
        global_batch_size=args.global_batch_size // args.minibatches,
        max_length=args.max_prompt_length + args.max_new_tokens,
    )
    return argparse.Namespace(**vars(args) | own)


def load_policy(path: str, args: Args, tokenizer, config: dict):
    """A causal language model whose logits are its head's output and nothing more."""
    model, info = common.load_model(
        transformers.AutoModelForCausalLM, path, args, config, pad_token_id=tokenizer.pad_token_id
    )
    if any(name.startswith("score.") for name in info["unexpected_keys"]):
        raise common.InputError(f"{path} is a reward model, but a language model is needed: pass the SFT model")
    if info["missing_keys"]:
        raise common.InputError(f"{path}: no language model; missing {sorted(info['missing_keys'])}")
    changes = [
        name for name, part in model.named_children() if part not in (model.base_model, model.get_output_embeddings())
    ]
    for name in (
        "final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap", "softcap", "logit_scale",
        "logits_scaling", "logits_mup_width_multiplier", "lm_head_multiplier", "output_multiplier",
    ):
        if getattr(model.config.get_text_config(), name, None) not in (None, 1):
            changes.append(name)
    if changes:
        raise common.InputError(f"{path}: its {changes[0]} changes the logits before or after the head; not supported")
    # Else `generate` would take the model's own suppressed tokens, top-p and the like over.
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def load_reward_model(path: str, args: Args, tokenizer, config: dict):
    """A sequence classifier with one label and a trained head."""
    model, info = common.load_model(
        transformers.AutoModelForSequenceClassification, path, args, config,
        num_labels=1, problem_type="regression", pad_token_id=tokenizer.pad_token_id,
    )
    if info["missing_keys"]:
        raise common.InputError(f"{path} is no reward model: pass what reward.py wrote")
    return model


# ---------------------------------------------------------------- rollout and metrics


class Sampling(transformers.LogitsProcessor):
    """Draws the next tokens, keeps their log π, and leaves greedy decoding no other choice.

    torch.multinomial, which `generate` would draw with, makes a random number for each token of the vocabulary; here
    one for each row is looked up in the cumulated probabilities.
    """

    def __init__(self, temperature: float):
        self.temperature, self.logps = temperature, []

    def __call__(self, input_ids, scores):
        logps = (scores.float() / self.temperature).log_softmax(-1)  # R V
        cumulated = logps.double().exp_().cumsum(-1)  # R V
        point = torch.rand_like(cumulated[:, :1]) * cumulated[:, -1:]  # R 1
        drawn = torch.searchsorted(cumulated, point, right=True).clamp(max=scores.shape[1] - 1)  # R 1
        self.logps.append(logps.gather(1, drawn))
        return torch.full_like(scores, -math.inf).scatter_(1, drawn, 0.0)


@torch.no_grad()
def sample(engine, model, tokenizer, prompts: list[np.ndarray], args: Args, process: common.Process) -> Rollout:
    """A response to each of this rank's prompts, drawn from the policy's own distribution: no top-k, no top-p."""
    engine.eval()
    responses, logps = [None] * len(prompts), [None] * len(prompts)
    with common.unsharded(engine):
        order = np.argsort([len(p) for p in prompts], kind="stable")
        size = 4 * args.micro_batch_size  # generation keeps no activations
        for rows in (order[i : i + size] for i in range(0, len(order), size)):
            batch = [prompts[row] for row in rows]
            width = max(map(len, batch))
            input_ids = np.full((len(batch), width), tokenizer.pad_token_id)  # R T, padded on the left
            for i, prompt in enumerate(batch):
                input_ids[i, width - len(prompt) :] = prompt
            is_text = np.arange(width) >= width - np.array([[len(prompt)] for prompt in batch])  # R T
            sampling = Sampling(args.temperature)
            output = model.generate(
                torch.tensor(input_ids, device=process.device),
                attention_mask=torch.tensor(is_text, device=process.device).long(),
                logits_processor=transformers.LogitsProcessorList([sampling]),
                generation_config=transformers.GenerationConfig(
                    do_sample=False, num_beams=1, repetition_penalty=1.0, max_new_tokens=args.max_new_tokens,
                    eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
                ),
            )  # R T + answer
            drawn = torch.cat(sampling.logps, 1)  # R answer
            for i, (row, answer) in enumerate(zip(rows, output[:, width:].cpu().numpy())):
                eos = np.flatnonzero(answer == tokenizer.eos_token_id)
                length = int(eos[0]) + 1 if len(eos) else len(answer)
                responses[row], logps[row] = answer[:length].astype(np.int32), drawn[i, :length]
    engine.train()
    lengths = torch.tensor([len(response) for response in responses], device=process.device)
    return Rollout(
        prompts, responses,
        is_response=torch.arange(int(lengths.max()), device=process.device) < lengths[:, None],
        ended=torch.tensor([r[-1] == tokenizer.eos_token_id for r in responses], device=process.device),
        logps=torch.nn.utils.rnn.pad_sequence(logps, True),
    )


def micro_batches(rollout: Rollout, rows, args: Args, tokenizer, process: common.Process):
    """(rows, model inputs) of some of a rollout's rows, like lengths together."""
    lengths = np.array([len(rollout.prompts[row]) + len(rollout.responses[row]) for row in rows])
    rows = np.asarray(rows)[np.argsort(lengths, kind="stable")]
    for own in (rows[i : i + args.micro_batch_size] for i in range(0, len(rows), args.micro_batch_size)):
        prompts, responses = ([part[row] for row in own] for part in (rollout.prompts, rollout.responses))
        yield torch.as_tensor(own, device=process.device), collate(
            prompts, responses, tokenizer.pad_token_id, process.device
        )


@torch.no_grad()
def per_token(module, rollout: Rollout, args: Args, tokenizer, process: common.Process) -> torch.Tensor:
    """A policy's log π or a critic's values of all response tokens, (P, L)."""
    module.eval()
    result = torch.zeros(rollout.is_response.shape, device=process.device)  # P L
    for rows, batch in micro_batches(rollout, range(len(result)), args, tokenizer, process):
        own = torch.zeros_like(result[rows])  # R L
        own[rollout.is_response[rows]] = module(**batch)
        result[rows] = own
    module.train()
    return result


@torch.no_grad()
def score(module, rollout: Rollout, args: Args, tokenizer, process: common.Process) -> torch.Tensor:
    """A reward model's scores of all responses, (P,)."""
    module.eval()
    result = torch.zeros(len(rollout.responses), device=process.device)
    for rows, batch in micro_batches(rollout, range(len(result)), args, tokenizer, process):
        result[rows] = module(**batch)
    finite = result.isfinite().all().float()
    dist.all_reduce(finite, dist.ReduceOp.MIN)
    if not finite:
        raise common.InputError("the reward model returned a score that is not finite: look at --reward_model")
    return result


def evaluate(policy, model, reference, scorer, judge, prompts, args, tokenizer, process) -> list[dict]:
    """For each held-out prompt an answer and what it is worth, on every rank."""
    torch.manual_seed(args.seed + process.rank)
    own = [i % len(prompts) for i in range(process.rank, len(prompts) + process.world_size - 1, process.world_size)]
    own = own[: math.ceil(len(prompts) / process.world_size)]  # each rank as many: some prompts may come twice
    rollout = sample(policy, model, tokenizer, [prompts[i].ids for i in own], args, process)
    logps = per_token(policy, rollout, args, tokenizer, process)  # P L
    ratio = logps - per_token(reference, rollout, args, tokenizer, process)
    kl = torch.where(rollout.is_response, ratio, 0.0).sum(1)  # P
    scores = score(scorer, rollout, args, tokenizer, process)  # P
    judged = score(judge, rollout, args, tokenizer, process) if judge else scores  # P
    columns = zip(own, rollout.responses, rollout.ended.tolist(), scores.tolist(), judged.tolist(), kl.tolist())
    lines = {
        i: {
            "prompt": prompts[i].text, "answer": tokenizer.decode(response, skip_special_tokens=True),
            "response_tokens": len(response), "ended": ended, "score": own_score, "judge": judge_score, "kl": own_kl,
        }
        for i, response, ended, own_score, judge_score, own_kl in columns
    }
    parts = [None] * process.world_size
    dist.all_gather_object(parts, lines)
    merged = {i: line for part in parts for i, line in part.items()}
    return [merged[i] for i in range(len(prompts))]


def eval_metrics(lines: list[dict], first: list[dict], judged: bool) -> dict[str, float | None]:
    """Means over the held-out prompts; `first` are the answers before training."""
    scores = np.array([line["score"] for line in lines])
    judge, before = (np.array([line["judge"] for line in some]) for some in (lines, first))
    wins = float(np.mean((judge > before) + 0.5 * (judge == before))) if judged else None
    return {
        "score_mean": float(scores.mean()), "score_std": float(scores.std()), "score_max": float(scores.max()),
        "score_growth": float(scores.mean() - np.mean([line["score"] for line in first])),
        "kl": float(np.mean([line["kl"] for line in lines])),
        "response_tokens": float(np.mean([line["response_tokens"] for line in lines])),
        "ended_by_eos": float(np.mean([line["ended"] for line in lines])),
        "judge_score": float(judge.mean()) if judged else None, "win_rate": wins,
    }


def write_generations(lines: list[dict], args: Args) -> None:
    """The answers to the held-out prompts as AlpacaEval reads them."""
    generator, dataset = Path(args.output_dir).name, args.eval_dataset or args.dataset
    dataset = Path(dataset).name if Path(dataset).exists() else dataset
    results = [
        {
            "instruction": line["prompt"].removeprefix("\n\nHuman: ").removesuffix("\n\nAssistant: "),
            "output": line["answer"], "generator": generator, "dataset": dataset,
        }
        for line in lines
    ]
    text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    common.write_file(Path(args.output_dir) / "generations.json", text)


def plot_steps(path: Path, output: Path) -> None:
    """Score, KL and response length over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in path.read_text().splitlines()]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    titles = {"score_mean": "score", "kl": "KL from the reference, nats", "response_tokens": "response, tokens"}
    for axis, (name, title) in zip(axes, titles.items()):
        for split, style in (("train", "-"), ("eval", "o")):
            points = [(line["step"], line[name]) for line in lines if line["split"] == split]
            if points:
                axis.plot(*zip(*points), style, label=split)
        axis.set(xlabel="step", title=title)
    axes[0].legend()
    figure.savefig(output, dpi=120)
    plt.close(figure)


# ---------------------------------------------------------------- training


def main(args: Args) -> None:
    common.check_flags(args)
    if not args.policy_model or not args.reward_model:
        raise common.InputError(
            "--policy_model and --reward_model are needed. `deepspeed sft.py --output_dir runs/sft` makes "
            "runs/sft/model; `deepspeed reward.py --model runs/sft/model --output_dir runs/reward` makes "
            "runs/reward/model"
        )
    process = common.start(args.seed)
    if args.global_batch_size % (args.minibatches * process.world_size):
        raise common.InputError(
            f"--global_batch_size {args.global_batch_size} is not a multiple of {process.world_size} ranks x "
            f"--minibatches {args.minibatches}: change one of them"
        )
    policy_args, critic_args = engine_args(args, "policy"), engine_args(args, "critic")
    accumulation = common.accumulation_steps(policy_args, process)
    args.micro_batch_size = critic_args.micro_batch_size = policy_args.micro_batch_size
    policy_config = common.engine_config(policy_args, accumulation)
    critic_config = common.engine_config(critic_args, accumulation)

    tokenizer = common.load_tokenizer(args.policy_model, args.trust_remote_code)
    for flag, path in (("reward_model", args.reward_model), ("judge_model", args.judge_model)):
        if path and common.load_tokenizer(path, args.trust_remote_code).get_vocab() != tokenizer.get_vocab():
            raise common.InputError(f"--{flag} {path} has another tokenizer than --policy_model {args.policy_model}")
    train_prompts, eval_prompts = load_prompts(args, tokenizer, process)
    eval_prompts = eval_prompts[: args.generate]

    steps_per_epoch = len(train_prompts) // args.global_batch_size
    total_steps = args.epochs * steps_per_epoch
    if args.epochs and not total_steps:
        raise common.InputError(
            f"{len(train_prompts)} prompts, without the held-out ones, do not fill a --global_batch_size of "
            f"{args.global_batch_size}: pass a smaller one"
        )
    if args.max_steps:
        total_steps = min(total_steps, args.max_steps)
    updates = total_steps * args.ppo_epochs * args.minibatches

    def load(kind: str, path: str, steps: int):
        """A module in its engine (0 steps: frozen), and the model in it."""
        own, config = (critic_args, critic_config) if kind in ("critic", "scorer") else (policy_args, policy_config)
        if kind in ("policy", "reference"):
            model = load_policy(path, own, tokenizer, config)
            module = Policy(model, args.temperature)
        else:
            model = load_reward_model(path, own, tokenizer, config)
            module = Critic(model) if kind == "critic" else Scorer(model)
        if not steps:
            module.requires_grad_(False)
        return common.make_engine(module, own, config, steps, process), model

    policy, model = load("policy", args.policy_model, updates)
    reference, _ = load("reference", args.policy_model, 0)
    critic = load("critic", args.reward_model, updates)[0] if updates else None
    scorer, _ = load("scorer", args.reward_model, 0)
    judge = load("scorer", args.judge_model, 0)[0] if args.judge_model else None
    output_dir = common.open_output(args, process, "ppo")
    metrics = common.Metrics(output_dir, process, total_steps)
    process.print(f"{total_steps} steps on {len(train_prompts)} prompts, {len(eval_prompts)} held out -> {output_dir}")

    def evaluate_now(step: int, first: list[dict] | None) -> list[dict]:
        if not eval_prompts:
            return []
        lines = evaluate(policy, model, reference, scorer, judge, eval_prompts, args, tokenizer, process)
        metrics.write(step, "eval", eval_metrics(lines, first or lines, judge is not None))
        return lines

    lines = first_lines = evaluate_now(0, None)
    step, history, first_score, below_zero = 0, [], None, 0
    for epoch in range(args.epochs):
        order = np.random.default_rng([args.seed, epoch]).permutation(len(train_prompts))
        batches = order[: steps_per_epoch * args.global_batch_size].reshape(-1, args.global_batch_size)
        for batch in batches[: total_steps - step]:
            step += 1
            torch.manual_seed(int(np.random.SeedSequence([args.seed, step, process.rank]).generate_state(1)[0]))
            clock = [time.perf_counter()]

            # 1 sample: each rank answers its share of the prompts
            own = batch.reshape(process.world_size, -1)[process.rank]
            rollout = sample(policy, model, tokenizer, [train_prompts[i].ids for i in own], args, process)
            is_response = rollout.is_response  # P L
            clock.append(time.perf_counter())

            # 2 score: the four models' word on the responses
            # Decoding and training round differently in 16 bits: ρ would not begin at 1. With a single optimizer step
            # π_old is that step's own π, and ρ is 1.
            single = args.ppo_epochs * args.minibatches == 1
            if args.dtype != "fp32" and not single:
                rollout.logps = per_token(policy, rollout, args, tokenizer, process)  # P L
            rollout.ref_logps = per_token(reference, rollout, args, tokenizer, process)  # P L
            rollout.values = per_token(critic, rollout, args, tokenizer, process)  # P L
            rollout.scores = score(scorer, rollout, args, tokenizer, process)  # P
            clock.append(time.perf_counter())

            # 3 per-token reward: KL at each token, the score on the last one
            penalty = torch.where(rollout.ended, 0.0, args.missing_eos_penalty)  # P
            clipped = rollout.scores.clamp(-args.score_clip, args.score_clip) - penalty  # P
            rewards = token_rewards(rollout.logps, rollout.ref_logps, clipped, is_response, args.kl_coef)  # P L

            # 4 GAE, then whitening over the response tokens of all ranks
            advantages, returns = advantages_and_returns(
                rewards, rollout.values, is_response, args.gamma, args.gae_lambda
            )  # P L, P L
            mean, variance = moments(advantages, is_response)
            advantages = (advantages - mean) / (variance + 1e-8).sqrt()

            # 5 learn: several minibatches x epochs of both clipped losses
            sums, norms, rates = torch.zeros(6, device=process.device), [], policy.get_lr()[0]
            for ppo_epoch in range(args.ppo_epochs):
                shuffled = np.random.default_rng([args.seed, step, ppo_epoch]).permutation(len(own))
                for rows in shuffled.reshape(args.minibatches, -1):
                    # Each token of the minibatch counts alike, on whatever rank and in whatever micro batch it is.
                    count = is_response[rows].sum().float()
                    dist.all_reduce(count)
                    weight = process.world_size * accumulation / count
                    losses = []
                    for i, (part, inputs) in enumerate(micro_batches(rollout, rows, args, tokenizer, process)):
                        mask = is_response[part]
                        logps = policy(**inputs)  # N
                        old_logps = logps.detach() if single else rollout.logps[part][mask]  # N
                        old_values = rollout.values[part][mask]  # N
                        policy_loss, ratio, policy_clipped = policy_losses(
                            logps, old_logps, advantages[part][mask], args.cliprange
                        )
                        policy.backward(policy_loss.sum() * weight)  # frees its activations before the critic's
                        values = critic(**inputs)  # N
                        value_loss, value_clipped = value_losses(
                            values, old_values, returns[part][mask], args.cliprange_value
                        )
                        critic.backward(value_loss.sum() * weight)
                        losses.append(torch.stack([policy_loss.detach().sum(), value_loss.detach().sum()]))
                        tokens = torch.ones_like(ratio)
                        each = [policy_loss, value_loss, policy_clipped, value_clipped, ratio, tokens]
                        sums += torch.stack([x.detach().float().sum() for x in each])
                        if i < accumulation - 1:
                            policy.step(), critic.step()  # count the micro batch
                    norms.append([
                        common.optimizer_step(policy, policy_args, step, losses),
                        common.optimizer_step(critic, critic_args, step, losses),
                    ])
            clock.append(time.perf_counter())

            # 6 log
            dist.all_reduce(sums)
            kl = torch.where(is_response, rollout.logps - rollout.ref_logps, 0.0).sum(1)  # P
            everyone = common.gather(torch.stack([
                rollout.scores, kl, is_response.sum(1).float(), rollout.ended.float()
            ])).transpose(0, 1).flatten(1)  # 4, global batch
            score_mean = everyone[0].mean().item()
            first_score = score_mean if first_score is None else first_score
            residual, spread = moments(returns - rollout.values, is_response)[1], moments(returns, is_response)[1]
            means = (sums[:5] / sums[5]).tolist()
            sampled = moments(rollout.logps, is_response)[0].item()
            seconds = np.diff(clock).tolist()
            policy_norm, critic_norm = np.mean(norms, axis=0).tolist()
            history.append({
                "lr": rates, "policy_grad_norm": policy_norm, "critic_grad_norm": critic_norm,
                "score_mean": score_mean, "score_std": everyone[0].std(correction=0).item(),
                "score_max": everyone[0].max().item(), "score_growth": score_mean - first_score,
                "kl": everyone[1].mean().item(), "entropy": -sampled,
                "response_tokens": everyone[2].mean().item(), "ended_by_eos": everyone[3].mean().item(),
                "policy_loss": means[0], "value_loss": means[1],
                "policy_clipfrac": means[2], "value_clipfrac": means[3], "ratio_mean": means[4],
                "explained_variance": 1 - (residual / spread).item(),
                "returns_mean": moments(returns, is_response)[0].item(),
                "prompts_per_s": args.global_batch_size / sum(seconds), "seconds_sample": seconds[0],
                "seconds_score": seconds[1], "seconds_learn": seconds[2],
            })
            metrics.bar.update()
            below_zero = below_zero + 1 if history[-1]["kl"] < -1e-3 else 0
            if below_zero == 5:
                process.print(f"warning: step {step}: the mean KL has been below 0 for 5 steps, which a KL cannot be: "
                              "the responses are not drawn from the policy's own distribution")
            too_far = 0 < args.max_kl < history[-1]["kl"]
            last = step == total_steps or too_far
            if step == 1 or step % args.log_every == 0 or last:
                metrics.write(step, "train", {k: float(np.mean([h[k] for h in history])) for k in history[0]})
                first = (rollout.prompts[0], rollout.responses[0])
                prompt, answer = (tokenizer.decode(ids, skip_special_tokens=True) for ids in first)
                process.print(f"sample: {prompt!r} -> {answer!r} (score {rollout.scores[0]:.2f})")
                history = []
            if args.eval_every and step % args.eval_every == 0 and not last:
                evaluate_now(step, first_lines)
            if too_far:
                break
        if step and too_far:
            process.print(f"stopped at step {step}: the KL is above --max_kl {args.max_kl:g}")
            break

    if step:
        common.save_model(policy, model, tokenizer, output_dir / "model", process)
        lines = evaluate_now(step, first_lines)
    metrics.close()
    if process.rank == 0:
        plot_steps(output_dir / "metrics.jsonl", output_dir / "ppo.png")
        write_generations(lines, args)  # last: the run is finished
    process.print(f"finished: look at {output_dir}/ppo.png and {output_dir}/generations.json")


if __name__ == "__main__":
    common.run(main, common.parse_args(Args, preset))
