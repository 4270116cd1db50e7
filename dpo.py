"""Train a policy on preferences directly (DPO), its implicit margins bounded by a prior (PCRM, arXiv 2404.00978).

    z  = β [(log π(chosen|x) - log π_ref(chosen|x)) - (log π(rejected|x) - log π_ref(rejected|x))]      β: --kl_beta
    δ* = β1 / (s + β2) + β3                                its bound; s says how alike the two responses are
    L  = -log σ(z) - log σ(δ* - z)                         mean over the global batch

1 process     deepspeed dpo.py --constraint cos_sim --model <SFT model>       (also: python dpo.py ...)
8 GPUs        deepspeed --num_gpus 8 dpo.py --task alpaca --constraint cos_sim --model <SFT model>
evaluate      python dpo.py --epochs 0 --model <DPO model> --ref_model <SFT model> --eval_dataset pairs.jsonl

Input: preference pairs (JSON, JSONL, Parquet, a folder, a Hub id) with the columns prompt/chosen/rejected, or
instruction/input/output_1/output_2/preference (AlpacaFarm), or info/summaries/choice (summarize_from_feedback).
Output, in --output_dir: args.json, metrics.jsonl, tensorboard/, eval.jsonl (a line per held-out pair), margins.png,
generations.json (sampled answers to held-out prompts, as AlpacaEval reads them) and model/, which
`AutoModelForCausalLM.from_pretrained` loads.

Symbols in the shapes: B pairs of a micro batch, R rows, T tokens of a row, N response tokens of a micro batch, H hidden
size, V vocabulary, n pairs of a data set.
"""

import functools
import hashlib
import inspect
import json
import math
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from scipy.stats import kendalltau, spearmanr
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import common
from priors import (
    constrained_ranking_loss, cosine_similarity, encode_texts, fixed_bound, length_ratio, margin_bound, random_bound
)


@dataclass
class Args:
    """Train a policy on preference pairs with a prior constraint on its margins.

    A flag given on the command line always wins over what --task and --constraint set; the defaults shown here are
    those of the --task and --constraint on this command line.
    """

    task: Literal["toy", "alpaca"] = "toy"
    """Sets data, lengths and every hyperparameter: the embedded task, or the paper's dialogue."""
    constraint: Literal["none", "len_rat", "cos_sim", "random", "fixed"] = "none"
    """What bounds a margin: nothing, the length ratio, the cosine similarity, or a control without a prior."""
    model: str = ""
    """Folder or Hub id of the starting model, a causal LM (the SFT model); toy: built when needed, untrained."""
    ref_model: str = ""
    """Folder or Hub id of the reference π_ref, with the same vocabulary; empty: the starting model."""
    live_reference: bool = False
    """Run the reference in every step, beside the policy, instead of once before training."""
    dataset: str = str(common.DATA / "preference_train.jsonl")
    """Pairs to train on: file, folder or Hub id, `:SPLIT` may follow. Cancels the task's own evaluation data."""
    eval_dataset: str = str(common.DATA / "preference_eval.jsonl")
    """Held-out pairs; empty: min(500, 10 %) of --dataset, drawn by --seed."""
    ranked_dataset: str = str(common.DATA / "ranked_eval.jsonl")
    """Ranked responses (columns prompt, responses, scores) for rank correlation; empty: none."""
    output_dir: str = ""
    """Where results go; empty: runs/dpo-<constraint>-<time>."""
    overwrite: bool = False
    """Replace the finished run in --output_dir."""

    kl_beta: float = 0.1
    """DPO's own β: what a nat of distance from the reference costs, in units of the margin."""
    label_smoothing: float = 0.0
    """Share of labels taken to be wrong, in both terms of the loss; at most 0.5."""
    generate: int = 16
    """Held-out prompts that are answered at the end, into generations.json; 0: none."""

    beta1: float = 20.0
    """β1 of the bound: how fast it loosens as the responses differ."""
    beta2: float = 0.001
    """β2 of the bound: keeps the fraction finite."""
    beta3: float = -15.0
    """β3 of the bound: moves its floor δ*(1)."""
    fixed_bound: float = 4.5
    """The bound of every pair with --constraint fixed; --task alpaca has none and needs it given."""
    random_low: float = 4.0
    """Lower end of the bounds drawn with --constraint random; --task alpaca has none and needs it given."""
    random_high: float = 5.0
    """Upper end of the bounds drawn with --constraint random; --task alpaca has none and needs it given."""
    encoder: str = ""
    """Folder or Hub id of the text encoder of --constraint cos_sim; empty: the reference's hidden states."""
    encoder_pooling: Literal["cls", "mean"] = "mean"
    """A text's embedding: the encoder's last hidden state at the first token, or the mean over all tokens."""

    max_length: int = 256
    """Tokens of prompt + response + EOS; pairs with a longer side are dropped and counted, longer answers cut."""
    learning_rate: float = 2e-4
    """Peak learning rate; cosine to 0."""
    weight_decay: float = 0.1
    """AdamW's, on everything but biases and norm weights."""
    epochs: int = 2
    """Passes over the data; 0: evaluate only."""
    max_steps: int = 0
    """Optimizer steps at most; 0: no limit."""
    micro_batch_size: int = 32
    """Pairs per rank and forward pass, at most: cut down to a rank's share of the global batch."""
    global_batch_size: int = 32
    """Pairs per optimizer step, over all ranks and accumulated micro batches."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What DeepSpeed shards over the ranks: nothing, optimizer states, + gradients, + weights."""
    offload: bool = False
    """Keep optimizer states (ZeRO-3: weights too) in CPU memory."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of weights and activations; bf16 and fp16 keep fp32 master weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up."""
    seed: int = 42
    """Of the held-out split, the order of the pairs, random bounds and the sampled answers."""
    log_every: int = 10
    """Optimizer steps between lines of metrics; the first step always has one."""
    eval_every: int = 0
    """Optimizer steps between evaluations; 0: only before and after training."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model."""
    local_rank: int = -1
    """Given by the launcher, which also sets the LOCAL_RANK that is used."""


# The paper's settings; the embedded task's are the defaults above.
TASKS = {
    "toy": {},
    "alpaca": dict(
        dataset="hf://datasets/tatsu-lab/alpaca_farm/alpaca_human_preference.json", eval_dataset="", ranked_dataset="",
        encoder="google-bert/bert-base-uncased", encoder_pooling="cls", max_length=512, global_batch_size=32,
        learning_rate=1e-6, weight_decay=0.0, epochs=1, micro_batch_size=4, zero_stage=2, dtype="bf16",
        gradient_checkpointing=True, random_low=0.0, random_high=0.0, fixed_bound=0.0,  # the paper has no such runs
    ),
}
BETAS = {
    ("alpaca", "cos_sim"): dict(beta1=30.0, beta2=0.001, beta3=-25.0),  # Upstream: of the raw cosine; here angular
    ("alpaca", "len_rat"): dict(beta1=20.0, beta2=0.001, beta3=-15.0),
}


def preset(task: str, constraint: str) -> dict:
    return TASKS.get(task, {}) | BETAS.get((task, constraint), {})


# ---------------------------------------------------------------- data


@dataclass
class Pair:
    """A row of the data: two responses to one prompt, as text and as tokens, and how alike they are."""

    prompt: str
    chosen: str
    rejected: str
    chosen_ids: np.ndarray = None  # int32: (BOS,) prompt, response, EOS
    rejected_ids: np.ndarray = None
    prefix: int = 0  # tokens that the two sequences begin with alike; what follows are the two branches
    prompt_length: int = 0  # tokens, BOS included
    similarity: float = math.nan
    ref_logps: tuple[float, float] = (math.nan, math.nan)  # log π_ref of chosen and rejected

    @property
    def row_length(self) -> int:
        """Tokens of the shared row [prefix | chosen | rejected]."""
        return len(self.chosen_ids) + len(self.rejected_ids) - self.prefix

    @property
    def branch_lengths(self) -> tuple[int, int]:
        return len(self.chosen_ids) - self.prefix, len(self.rejected_ids) - self.prefix


def parse_pair(row: dict, where: str) -> tuple[str, str, str] | str:
    """(prompt, chosen, rejected) of a row in any known format, or the reason why it cannot be used."""
    if {"prompt", "chosen", "rejected"} <= row.keys():
        prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    elif {"instruction", "output_1", "output_2", "preference"} <= row.keys():
        instruction, extra = row["instruction"], row.get("input") or ""
        check_text(where, instruction=instruction, input=extra)
        outputs, preference = (row["output_1"], row["output_2"]), row["preference"]
        if preference not in (0, 1, 2):
            raise common.InputError(f"{where}: preference is {preference!r}, but must be 1, 2 or 0 (a tie)")
        if preference == 0:
            return "tie"
        chosen, rejected = outputs if preference == 1 else outputs[::-1]
        if instruction is None:
            return "missing text"
        question = instruction if instruction.endswith(extra) else instruction + extra
        prompt = f"\n\nHuman: {question}\n\nAssistant: "
    elif {"info", "summaries", "choice"} <= row.keys():
        choice, two = row["choice"], [s.get("text") for s in row["summaries"] or () if isinstance(s, dict)]
        if choice not in (0, 1) or len(two) != 2 or not isinstance(row["info"], dict):
            raise common.InputError(f"{where}: info must hold a post, choice (here {choice!r}) be 0 or 1 of 2 texts")
        post, chosen, rejected = row["info"].get("post"), two[int(choice)], two[1 - int(choice)]
        check_text(where, post=post)
        if post is None:  # a news article, not from Reddit
            return "missing text"
        task = "Your task is to generate a short summary of a post."
        prompt = f"\n\nHuman: {task}\n\nPost: {post}\n\nSummary: \n\nAssistant: "
    else:
        raise common.InputError(
            f"{where}: the columns are {', '.join(row)}, but must be prompt/chosen/rejected, or "
            "instruction/input/output_1/output_2/preference, or info/summaries/choice"
        )
    check_text(where, prompt=prompt, chosen=chosen, rejected=rejected)
    if prompt is None or chosen is None or rejected is None:
        return "missing text"
    if not chosen.strip() or not rejected.strip():
        return "empty response"
    if chosen == rejected:
        return "identical responses"
    return prompt, chosen, rejected


def check_text(where: str, **values) -> None:
    for name, value in values.items():
        if value is not None and not isinstance(value, str):
            raise common.InputError(f"{where}: {name} is {value!r}, but must be text")


def tokenize(pairs: list[Pair], tokenizer, max_length: int, dropped: Counter) -> list[Pair]:
    """Fill in the tokens: (BOS,) prompt, response, EOS, each tokenized apart, as generation will see them.

    Returns the pairs that fit; the others are counted in `dropped` by reason.
    """
    # BOS only where the tokenizer itself begins a text with it.
    bos = [tokenizer.bos_token_id] if tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] else []
    eos = [tokenizer.eos_token_id]
    texts = [text for pair in pairs for text in (pair.prompt, pair.chosen, pair.rejected)]
    ids = tokenizer(texts, add_special_tokens=False).input_ids if texts else []
    kept = []
    for pair, prompt, chosen, rejected in zip(pairs, ids[0::3], ids[1::3], ids[2::3], strict=True):
        prompt = prompt if prompt[:1] == bos else bos + prompt  # neither BOS nor EOS twice
        chosen, rejected = (response if response[-1:] == eos else response + eos for response in (chosen, rejected))
        pair.chosen_ids = np.array(prompt + chosen, np.int32)
        pair.rejected_ids = np.array(prompt + rejected, np.int32)
        shorter = min(len(pair.chosen_ids), len(pair.rejected_ids))
        differs = np.flatnonzero(pair.chosen_ids[:shorter] != pair.rejected_ids[:shorter])
        pair.prefix = int(differs[0]) if len(differs) else shorter - 1
        pair.prompt_length = len(prompt)
        if chosen == rejected:
            dropped["identical responses"] += 1
        elif not prompt:
            dropped["prompt without a token"] += 1  # nothing would predict the response's first one
        elif max(len(pair.chosen_ids), len(pair.rejected_ids)) > max_length:
            dropped[f"longer than --max_length {max_length}"] += 1  # Upstream: truncated
        else:
            kept.append(pair)
    return kept


def read_pairs(flag: str, name: str, split: str, tokenizer, args: Args, process: common.Process) -> list[Pair]:
    """The usable pairs of a data set with their tokens; the others are counted by reason."""
    pairs, chunk, dropped = [], [], Counter()
    rows = common.read_rows(flag, name, split)
    for number, row in enumerate(rows, 1):
        parsed = parse_pair(row, f"{flag} {name}, row {number}")
        if isinstance(parsed, str):
            dropped[parsed] += 1
        else:
            chunk.append(Pair(*parsed))
        if len(chunk) == 1000 or number == len(rows):  # in chunks: a tokenizer's lists take much more room than arrays
            pairs += tokenize(chunk, tokenizer, args.max_length, dropped)
            chunk = []
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    if not pairs:
        raise common.InputError(f"{flag} {name}: no usable pair is left ({reasons})")
    process.print(f"{flag}: {len(pairs)} pairs" + (f"; dropped {dropped.total()}: {reasons}" if dropped else ""))
    return pairs


def load_pairs(args: Args, tokenizer, process: common.Process) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, none with --epochs 0, and held-out pairs."""
    pairs = []
    if args.epochs or not args.eval_dataset:
        pairs = read_pairs("--dataset", args.dataset, "train", tokenizer, args, process)
    if args.eval_dataset:
        return pairs, read_pairs("--eval_dataset", args.eval_dataset, "test", tokenizer, args, process)
    order = np.random.default_rng(args.seed).permutation(len(pairs))
    count = min(500, math.ceil(len(pairs) / 10))
    return [pairs[i] for i in order[count:] if args.epochs], [pairs[i] for i in order[:count]]


def global_batches(lengths: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: steps x size row numbers, a function of (seed, epoch) and the data alone.

    Like lengths come together: the shuffled rows are sorted in windows of 50 global batches and cut, and the batches
    are shuffled. A global batch is then cut to ranks and micro batches, so their number changes nothing.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    order = order[: len(order) // size * size]  # the incomplete batch is dropped before sorting, else the longest were
    windows = [order[i : i + 50 * size] for i in range(0, len(order), 50 * size)]
    order = np.concatenate([window[np.argsort(lengths[window], kind="stable")] for window in windows])
    return rng.permutation(order.reshape(-1, size))


def collate(pairs: list[Pair], pad_token_id: int, share_prefix: bool, device: torch.device) -> dict[str, torch.Tensor]:
    """Model inputs for B pairs, their N response tokens, and where these are predicted.

    With a shared prefix, R = B rows [prefix | chosen | rejected]: rejected does not see chosen, and its positions
    restart after the prefix. Without, R = 2B rows, padded on the right; causal attention then needs no mask at all.
    The cheaper form is taken, by the tokens that the model would have to read. Where the two responses begin alike,
    their common tokens are in the prefix and count for both.

    Returns:
        input_ids (R, T); pairs, B; targets (N,), the response tokens; sources (N,), the index in the flattened (R * T)
        rows of the position that predicts each; parts (N,), whose it is: part * B + pair, with part 0 both, 1 chosen,
        2 rejected; if shared also position_ids (R, T) and attention_mask (R, 1, T, T), True where a query sees a key.
    """
    width = max(max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs)
    shared_width = max(p.row_length for p in pairs)
    shared = share_prefix and shared_width < 2 * width
    width, count = shared_width if shared else width, len(pairs)
    input_ids = np.full((count if shared else 2 * count, width), pad_token_id)  # R T
    sources, targets, parts = [], [], []

    def predict(row: int, before: range | list[int], ids: np.ndarray, part: int, pair: int) -> None:
        sources.append(np.array(before, np.int64) + row * width)
        targets.append(ids)
        parts.append(np.full(len(ids), part * count + pair))

    positions, branch = np.zeros((2, count, width), np.int64)  # each R T, for shared rows
    branch[:] = -1  # padding; 0 is the prefix, 1 chosen, 2 rejected
    for i, p in enumerate(pairs):
        middle, end = len(p.chosen_ids), p.row_length
        if not shared:
            for row, part, ids in ((i, 1, p.chosen_ids), (count + i, 2, p.rejected_ids)):
                input_ids[row, : len(ids)] = ids
                predict(row, range(p.prompt_length - 1, len(ids) - 1), ids[p.prompt_length :], part, i)
            continue
        input_ids[i, :middle], input_ids[i, middle:end] = p.chosen_ids, p.rejected_ids[p.prefix :]
        positions[i, :middle], positions[i, middle:end] = np.arange(middle), np.arange(p.prefix, len(p.rejected_ids))
        branch[i, : p.prefix], branch[i, p.prefix : middle], branch[i, middle:end] = 0, 1, 2
        predict(i, range(p.prompt_length - 1, p.prefix - 1), p.chosen_ids[p.prompt_length : p.prefix], 0, i)
        predict(i, range(p.prefix - 1, middle - 1), p.chosen_ids[p.prefix :], 1, i)
        # The prefix's last position predicts the first token of both branches.
        predict(i, [p.prefix - 1, *range(middle, end - 1)], p.rejected_ids[p.prefix :], 2, i)
    batch = {"input_ids": torch.tensor(input_ids, device=device), "pairs": count}
    for name, arrays in (("sources", sources), ("targets", targets), ("parts", parts)):
        batch[name] = torch.tensor(np.concatenate(arrays), dtype=torch.long, device=device)  # N
    if shared:
        branch = torch.tensor(branch, device=device)
        visible = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])  # R T T
        batch |= {"position_ids": torch.tensor(positions, device=device), "attention_mask": visible.tril()[:, None]}
    return batch


def can_share_prefix(model, max_length: int) -> bool:
    """Whether the model attends by the mask and the positions that it is given, and by nothing else."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) or max_length
    takes_positions = "position_ids" in inspect.signature(model.base_model.forward).parameters
    recurrent = getattr(model, "_is_stateful", False) or not kinds <= {"full_attention", "sliding_attention"}
    return takes_positions and not recurrent and not getattr(config, "alibi", False) and window >= max_length


# ---------------------------------------------------------------- prior


def similarities(pairs: list[Pair], args: Args, process: common.Process) -> torch.Tensor:
    """How alike the responses of each pair are, (n,) in (0, 1]: once, before training, cached on disk by content."""
    if args.constraint != "cos_sim":  # for none and the controls a diagnostic
        return length_ratio(*torch.tensor([p.branch_lengths for p in pairs]).unbind(1))
    encoder = args.encoder or args.model
    texts = [p.prompt + response for p in pairs for response in (p.chosen, p.rejected)]  # 2n, in turn
    try:
        content = [model_version(encoder, args.trust_remote_code), args.encoder_pooling, texts]
        name = hashlib.sha256(json.dumps(content).encode()).hexdigest() + ".npy"
        cached = common.cache_root() / "similarity" / name
        found = common.on_rank_0(process, lambda: np.load(cached) if cached.exists() else None)
        if found is not None:
            return torch.from_numpy(found)
        own = [text for i, text in enumerate(texts) if i // 2 % process.world_size == process.rank]
        progress = functools.partial(tqdm, desc="similarity", unit="batch", mininterval=2, disable=process.rank > 0)
        embeddings = encode_texts(
            own, encoder, args.encoder_pooling, device=process.device, trust_remote_code=args.trust_remote_code,
            progress=progress,
        )
        own_similarity = cosine_similarity(embeddings[0::2], embeddings[1::2])  # n / ranks
    except common.InputError:
        raise
    except Exception as error:  # of the encoder's loading, by what is missing, and of its embeddings
        raise common.model_error("encoder", encoder, error) from error
    parts = [None] * process.world_size
    dist.all_gather_object(parts, own_similarity)
    similarity = torch.empty(len(pairs))  # n
    for rank, part in enumerate(parts):
        similarity[rank :: process.world_size] = part
    common.on_rank_0(process, lambda: common.save_array(cached, similarity.numpy()))
    return similarity


@functools.cache
def model_version(path: str, trust_remote_code: bool) -> str:
    """What changes when the model does: the Hub's commit, or a digest of the folder's files."""
    if not Path(path).is_dir():
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        return f"{path}@{config._commit_hash}"
    digest = hashlib.sha256()
    for path in sorted(Path(path).iterdir()):
        if path.suffix in (".safetensors", ".json", ".txt", ".model"):
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def pair_bounds(pairs: list[Pair], args: Args, epoch: int) -> torch.Tensor | None:
    """The bound δ* of each pair, (n,), or None. A random one is a function of (seed, epoch, row)."""
    try:
        if args.constraint == "random":
            seed = int(np.random.SeedSequence([args.seed, epoch]).generate_state(1)[0])
            return random_bound(len(pairs), args.random_low, args.random_high, seed)
        if args.constraint == "fixed":
            return fixed_bound(len(pairs), args.fixed_bound)
        if args.constraint in ("len_rat", "cos_sim"):
            similarity = torch.tensor([p.similarity for p in pairs])
            return margin_bound(similarity, args.beta1, args.beta2, args.beta3)
    except ValueError as error:
        raise common.InputError(f"--constraint {args.constraint}: {error}") from error
    return None


# ---------------------------------------------------------------- model and metrics


class TargetLogps(torch.autograd.Function):
    """log π of n targets, fp32, from their logits (n, V), whose place the softmax takes, in their own precision.

    The backward pass needs nothing else: in bf16 half of what `cross_entropy` keeps, and no buffer for gradients.
    In fp16 a π under 6e-8 becomes 0.
    """

    @staticmethod
    def forward(ctx, logits, targets):
        logps = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
        # Few rows at a time: their fp32 copies stay in a cache.
        for rows, target, logp in zip(logits.split(32), targets.split(32), logps.split(32)):
            logp.copy_(-F.cross_entropy(rows.float(), target, reduction="none"))
            if ctx.needs_input_grad[0]:
                rows.copy_(rows.softmax(-1))
        ctx.save_for_backward(logits, targets, logps)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        softmax, targets, logps = ctx.saved_tensors
        own = -torch.expm1(logps) * grad  # d log π / d logits = 1 - π at the target, and -π elsewhere
        grads = softmax.mul_(-grad.to(softmax.dtype)[:, None])  # n V
        return grads.scatter_(1, targets[:, None], own.to(grads.dtype)[:, None]), None


class Policy(torch.nn.Module):
    """The language model, but its head sees only the positions that predict a response token, some at a time."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.at_once = common.LOGITS_AT_ONCE // model.config.get_text_config().vocab_size + 1

    def forward(self, input_ids, sources, targets, parts, pairs, **attention) -> torch.Tensor:
        """log π of each pair's chosen and rejected response, (2, B) fp32."""
        outputs = self.model.base_model(input_ids=input_ids, use_cache=False, **attention)
        hidden = outputs.last_hidden_state.flatten(0, 1)[sources]  # R*T H -> N H
        chunks = torch.tensor(-(-len(sources) // self.at_once), device=hidden.device)
        dist.all_reduce(chunks, dist.ReduceOp.MAX)  # at ZeRO-3 each rank must call the head equally often
        cuts = [i * self.at_once for i in range(1, chunks.item())]  # one size: an allocator can use its blocks again
        pieces = list(zip(hidden.tensor_split(cuts), targets.tensor_split(cuts)))
        # The backward pass makes the logits again, but for the last pieces: so many are held, however long the rows.
        early, late = pieces[: -common.LOGITS_HELD], pieces[-common.LOGITS_HELD :]
        logps = [checkpoint(self.logps, *piece, use_reentrant=False) for piece in early]
        logps = torch.cat(logps + [self.logps(*piece) for piece in late])  # N
        both, chosen, rejected = logps.new_zeros(3 * pairs).index_add(0, parts, logps).view(3, pairs)  # each B
        return torch.stack([both + chosen, both + rejected])  # 2 B

    def logps(self, hidden, targets) -> torch.Tensor:
        return TargetLogps.apply(self.model.get_output_embeddings()(hidden), targets)  # n


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


def pair_metrics(chosen, rejected, ref_chosen, ref_rejected, bound, loss, rank_loss, kl_beta) -> dict:
    """The public metrics of some pairs, from log π and log π_ref of their responses, bounds (NaN: none) and losses.

    All of shape (n,). kl estimates KL(π_ref || π), as if the pairs' responses were the reference's own.
    """
    chosen_reward, rejected_reward = kl_beta * (chosen - ref_chosen), kl_beta * (rejected - ref_rejected)
    margin = chosen_reward - rejected_reward
    bounded = not bound.isnan().any()
    return {
        "loss": loss.mean().item(),
        "rank_loss": rank_loss.mean().item(),
        "constraint_loss": (loss - rank_loss).mean().item() if bounded else None,
        "accuracy": (margin > 0).float().mean().item(),
        "margin_mean": margin.mean().item(),
        "margin_std": margin.std(correction=0).item(),
        "margin_max": margin.max().item(),
        "bound_mean": bound.mean().item() if bounded else None,
        "over_bound": (margin > bound).float().mean().item() if bounded else None,
        "chosen_reward": chosen_reward.mean().item(),
        "rejected_reward": rejected_reward.mean().item(),
        "chosen_logps": chosen.mean().item(),
        "rejected_logps": rejected.mean().item(),
        "kl": (ref_chosen - chosen + ref_rejected - rejected).mean().item() / 2,
    }


@torch.no_grad()
def pair_logps(engine, pairs: list[Pair], args: Args, collator, process: common.Process) -> torch.Tensor:
    """log π of the responses of all pairs, (2, n) fp32 on the CPU of every rank: chosen, rejected."""
    engine.eval()
    order = np.argsort([-p.row_length for p in pairs], kind="stable")
    batches = [order[i : i + args.micro_batch_size] for i in range(0, len(order), args.micro_batch_size)]
    logps = torch.zeros(2, len(pairs), device=process.device)
    for start in range(0, len(batches), process.world_size):
        own = start + process.rank  # at ZeRO-3 each rank must run equally many batches: the last ones may idle
        rows = batches[min(own, len(batches) - 1)]
        result = engine(**collator([pairs[i] for i in rows]))  # 2 B
        if own < len(batches):
            logps[:, torch.as_tensor(rows, device=process.device)] = result
    dist.all_reduce(logps)
    engine.train()
    if not logps.isfinite().all():
        raise common.InputError("evaluation: a log-probability is not finite; the model has diverged or is broken")
    return logps.cpu()


def reference_logps(reference, pairs: list[Pair], args: Args, collator, process: common.Process) -> torch.Tensor:
    """log π_ref of the responses of all pairs, (2, n): once, before training, cached on disk by content."""

    def path() -> Path:
        version = model_version(args.ref_model, args.trust_remote_code)
        digest = hashlib.sha256(json.dumps([version, args.dtype, process.device.type]).encode())
        for p in pairs:
            digest.update(np.array([len(p.chosen_ids), len(p.rejected_ids), p.prompt_length]).tobytes())
            digest.update(p.chosen_ids.tobytes() + p.rejected_ids.tobytes())
        return common.cache_root() / "reference" / f"{digest.hexdigest()}.npy"

    cached = common.on_rank_0(process, path)
    found = common.on_rank_0(process, lambda: np.load(cached) if cached.exists() else None)
    if found is not None:
        return torch.from_numpy(found)
    logps = pair_logps(reference, pairs, args, collator, process)  # 2 n
    common.on_rank_0(process, lambda: common.save_array(cached, logps.numpy()))
    return logps


def evaluate(engine, pairs, ranked, args, collator, process) -> tuple[dict, list[dict]]:
    """Metrics over all held-out pairs, and a line per pair."""
    chosen, rejected = pair_logps(engine, pairs, args, collator, process)  # n, n
    ref_chosen, ref_rejected = torch.tensor([p.ref_logps for p in pairs]).T  # n, n
    chosen_reward, rejected_reward = args.kl_beta * (chosen - ref_chosen), args.kl_beta * (rejected - ref_rejected)
    margin = chosen_reward - rejected_reward  # n
    bound = pair_bounds(pairs, args, epoch=0)  # n
    rank_loss = constrained_ranking_loss(margin, None, args.label_smoothing)
    loss = constrained_ranking_loss(margin, bound, args.label_smoothing)
    bound = torch.full_like(margin, math.nan) if bound is None else bound
    metrics = pair_metrics(chosen, rejected, ref_chosen, ref_rejected, bound, loss, rank_loss, args.kl_beta)
    similarity = torch.tensor([p.similarity for p in pairs])
    longer = np.sign([len(p.chosen_ids) - len(p.rejected_ids) for p in pairs])
    metrics["length_accuracy"] = float((longer + 1).mean() / 2)  # a tie counts half
    metrics |= {"ranked_spearman": None, "ranked_kendall": None}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(constant|empty).*")  # the correlation is NaN then, written null
        metrics["spearman_similarity"] = float(spearmanr(margin, similarity).statistic)
        if ranked:
            ranked_pairs = [pair for prompt_pairs, _ in ranked for pair in prompt_pairs]
            logps = pair_logps(engine, ranked_pairs, args, collator, process).T  # n 2
            rewards = iter((logps - torch.tensor([p.ref_logps for p in ranked_pairs])).tolist())  # two at a time
            own = [[reward for _ in prompt_pairs for reward in next(rewards)] for prompt_pairs, _ in ranked]
            for name, correlation in (("spearman", spearmanr), ("kendall", kendalltau)):
                each = [correlation(mine[: len(human)], human).statistic for mine, (_, human) in zip(own, ranked)]
                metrics[f"ranked_{name}"] = float(np.nanmean(each))
    columns = dict(
        chosen_reward=chosen_reward, rejected_reward=rejected_reward, chosen_logps=chosen, rejected_logps=rejected,
        margin=margin, similarity=similarity, bound=bound,
    )
    lines = [dict(zip(columns, values)) for values in zip(*(c.tolist() for c in columns.values()))]
    return metrics, lines


def read_ranked(args: Args, tokenizer, process: common.Process) -> list[tuple[list[Pair], list[float]]]:
    """For each prompt with more than two responses: the responses, two by two as pairs, and their human scores."""
    if not args.ranked_dataset:
        return []
    ranked, flag = [], "--ranked_dataset"
    rows = common.read_rows(flag, args.ranked_dataset, "test")
    for number, row in enumerate(rows, 1):
        where = f"{flag} {args.ranked_dataset}, row {number}"
        if not {"prompt", "responses", "scores"} <= row.keys():
            raise common.InputError(f"{where}: the columns are {', '.join(row)}, but must be prompt/responses/scores")
        prompt, *lists = row["prompt"], row["responses"], row["scores"]
        responses, scores = (list(values) if isinstance(values, list) else [None] for values in lists)
        numbers = [isinstance(score, int | float) and math.isfinite(score) for score in scores]
        strings = [isinstance(text, str) for text in (prompt, *responses)]
        if not all(numbers + strings) or len(responses) != len(scores):
            raise common.InputError(f"{where}: prompt must be text, responses a list of texts, scores a number each")
        padded = responses + responses[:1] * (len(responses) % 2)
        pairs = [Pair(prompt, a, b) for a, b in zip(padded[0::2], padded[1::2])]
        kept = tokenize(pairs, tokenizer, args.max_length, Counter())
        if len(responses) > 2 and len(kept) == len(pairs):
            ranked.append((pairs, scores))
    process.print(f"{flag}: {len(ranked)} of {len(rows)} prompts have more than two responses, none too long")
    return ranked


def plot_margins(lines: list[dict], args: Args, path: Path) -> None:
    """Margin against similarity with the bound's curve, and the margins' histogram."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    similarity, margin = (np.array([line[name] for line in lines]) for name in ("similarity", "margin"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, width_ratios=(2, 1), layout="constrained")
    left.scatter(similarity, margin, s=8, alpha=0.5, linewidths=0, label="margin z")
    left.axhline(0, color="0.6", linewidth=0.8)
    if args.constraint in ("len_rat", "cos_sim"):
        curve = np.linspace(min(similarity.min(), 0.95), 1, 200)
        left.plot(curve, args.beta1 / (curve + args.beta2) + args.beta3, color="C3", label="bound δ*(s)")
    elif args.constraint != "none":
        left.scatter(similarity, [line["bound"] for line in lines], s=3, color="C3", label="bound")
    left.legend()
    top = max(margin.max(), 6)
    left.set(
        xlabel="similarity s (cosine, angular)" if args.constraint == "cos_sim" else "similarity s (length ratio)",
        ylabel="margin z", title=f"{args.constraint}: held-out pairs", ylim=(margin.min() - 0.5, top * 1.6),
    )
    right.hist(margin, bins=40, orientation="horizontal")
    right.set(xlabel="pairs", title=f"largest margin {margin.max():.1f}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


@torch.no_grad()
def sample(engine, model, tokenizer, prompts: list[np.ndarray], args: Args, process: common.Process) -> list[str]:
    """An answer to each prompt, on every rank, drawn from the model's own distribution: no top-k, no top-p."""
    engine.eval()
    answers = {}
    with common.unsharded(engine):
        size = args.micro_batch_size
        for number, start in enumerate(range(0, len(prompts), size)):
            if number % process.world_size != process.rank:
                continue
            batch = prompts[start : start + size]
            width = max(map(len, batch))
            input_ids = np.full((len(batch), width), tokenizer.pad_token_id)  # R T, padded on the left
            for i, prompt in enumerate(batch):
                input_ids[i, width - len(prompt) :] = prompt
            is_text = np.arange(width) >= width - np.array([[len(prompt)] for prompt in batch])  # R T
            torch.manual_seed(args.seed + number)
            output = model.generate(
                torch.tensor(input_ids, device=process.device),
                attention_mask=torch.tensor(is_text, device=process.device).long(),
                generation_config=transformers.GenerationConfig(
                    do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0,
                    max_new_tokens=args.max_length - min(map(len, batch)),
                    eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
                ),
            )  # R T + answer
            rows = [row[width:][: args.max_length - len(prompt)] for row, prompt in zip(output, batch)]
            texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
            answers |= {start + i: text for i, text in enumerate(texts)}
    engine.train()
    parts = [None] * process.world_size
    dist.all_gather_object(parts, answers)
    answers = {i: text for part in parts for i, text in part.items()}
    return [answers[i] for i in range(len(prompts))]


def write_generations(engine, model, tokenizer, pairs: list[Pair], args: Args, process: common.Process) -> None:
    """Answer the first --generate different held-out prompts: print some, and write all as AlpacaEval reads them."""
    prompts = {p.prompt: p.chosen_ids[: p.prompt_length] for p in pairs}
    prompts = dict(list(prompts.items())[: args.generate])
    answers = sample(engine, model, tokenizer, list(prompts.values()), args, process)
    generator, dataset = Path(args.output_dir).name, args.eval_dataset or args.dataset
    dataset = Path(dataset).name if Path(dataset).exists() else dataset
    results = [
        {
            "instruction": prompt.removeprefix("\n\nHuman: ").removesuffix("\n\nAssistant: "),
            "output": answer, "generator": generator, "dataset": dataset,
        }
        for prompt, answer in zip(prompts, answers)
    ]
    for result in results[:3]:
        process.print(f"sample: {result['instruction']!r} -> {result['output']!r}")
    if process.rank == 0:
        text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
        common.write_file(Path(args.output_dir) / "generations.json", text)


# ---------------------------------------------------------------- training


def main(args: Args) -> None:
    common.check_flags(args)
    process = common.start(args.seed)
    accumulation = common.accumulation_steps(args, process)
    config = common.engine_config(args, accumulation)
    if not args.model:
        process.print("warning: no --model: this starts from random weights; sft.py makes a model to start from")
        args.model = common.on_rank_0(process, common.toy_model)
    args.ref_model = args.ref_model or args.model
    if not args.epochs and args.ref_model == args.model:
        process.print("warning: the policy is its own reference, so every margin is 0: pass --ref_model")
    args.encoder = args.encoder or args.ref_model  # not the policy: in evaluation alone that is the trained one

    tokenizer = common.load_tokenizer(args.model, args.trust_remote_code)
    if common.load_tokenizer(args.ref_model, args.trust_remote_code).get_vocab() != tokenizer.get_vocab():
        raise common.InputError(f"--ref_model {args.ref_model} has another vocabulary than --model {args.model}")
    train_pairs, eval_pairs = load_pairs(args, tokenizer, process)
    ranked = read_ranked(args, tokenizer, process)
    for pairs in filter(None, (train_pairs, eval_pairs)):
        for pair, similarity in zip(pairs, similarities(pairs, args, process).tolist(), strict=True):
            pair.similarity = similarity
        pair_bounds(pairs, args, epoch=0)  # a bound that is not positive is found before anything is written

    steps_per_epoch = len(train_pairs) // args.global_batch_size
    total_steps = args.epochs * steps_per_epoch
    if args.epochs and not total_steps:
        raise common.InputError(
            f"{len(train_pairs)} pairs, without the held-out ones, do not fill a --global_batch_size of "
            f"{args.global_batch_size}: pass a smaller one"
        )
    if args.max_steps:
        total_steps = min(total_steps, args.max_steps)

    model = load_policy(args.model, args, tokenizer, config)
    share_prefix = can_share_prefix(model, args.max_length)
    engine = common.make_engine(Policy(model), args, config, total_steps, process)
    collator = functools.partial(
        collate, pad_token_id=tokenizer.pad_token_id, share_prefix=share_prefix, device=process.device
    )
    reference = engine  # before the first step the policy is its own reference
    if args.live_reference or args.ref_model != args.model:
        reference = Policy(load_policy(args.ref_model, args, tokenizer, config))
        reference = common.make_engine(reference, args, config, 0, process)
    ranked_pairs = [pair for prompt_pairs, _ in ranked for pair in prompt_pairs]
    for pairs in filter(None, (eval_pairs, ranked_pairs, [] if args.live_reference else train_pairs)):
        logps = reference_logps(reference, pairs, args, collator, process)  # 2 n
        for pair, ref_logps in zip(pairs, logps.T.tolist(), strict=True):
            pair.ref_logps = ref_logps
    ref_logps = torch.tensor([p.ref_logps for p in train_pairs], device=process.device).view(-1, 2).T  # 2 n
    if not args.live_reference:
        del reference  # its memory is free now
    output_dir = common.open_output(args, process, "dpo")
    metrics = common.Metrics(output_dir, process, total_steps)
    process.print(f"{total_steps} steps on {len(train_pairs)} pairs, {len(eval_pairs)} held out -> {output_dir}")

    def evaluate_now(step: int) -> list[dict]:
        values, lines = evaluate(engine, eval_pairs, ranked, args, collator, process)
        metrics.write(step, "eval", values)
        return lines

    lines = evaluate_now(0)
    lengths = np.array([p.row_length for p in train_pairs])
    step, history, rates, norms, tokens, since = 0, [], [], [], 0, time.perf_counter()
    for epoch in range(args.epochs):
        bounds = pair_bounds(train_pairs, args, epoch)  # n
        bounds = None if bounds is None else bounds.to(process.device)
        for batch in global_batches(lengths, args.global_batch_size, args.seed, epoch)[: total_steps - step]:
            step += 1
            losses = []
            for i, ranks in enumerate(batch.reshape(accumulation, process.world_size, -1)):
                rows = ranks[process.rank]
                batch_inputs = collator([train_pairs[row] for row in rows])
                own = torch.as_tensor(rows, device=process.device)  # B
                chosen, rejected = engine(**batch_inputs)  # B, B    log π
                with torch.no_grad():
                    ref_chosen, ref_rejected = reference(**batch_inputs) if args.live_reference else ref_logps[:, own]
                margin = args.kl_beta * ((chosen - ref_chosen) - (rejected - ref_rejected))  # B    z
                bound = None if bounds is None else bounds[own]  # B
                rank_loss = constrained_ranking_loss(margin, None, args.label_smoothing)  # B    -log σ(z)
                loss = constrained_ranking_loss(margin, bound, args.label_smoothing)  # B    -log σ(z) - log σ(δ* - z)
                engine.backward(loss.mean())
                losses.append(loss.detach())
                bound = torch.full_like(margin, math.nan) if bound is None else bound
                record = [chosen, rejected, ref_chosen, ref_rejected, bound, loss, rank_loss]
                history.append(torch.stack(record).detach())  # 7 B
                if i < accumulation - 1:
                    engine.step()  # counts the micro batch
            rates.append(engine.get_lr()[0])
            norms.append(common.optimizer_step(engine, args, step, losses))
            tokens += sum(len(train_pairs[i].chosen_ids) + len(train_pairs[i].rejected_ids) for i in batch)
            metrics.bar.update()

            if step == 1 or step % args.log_every == 0 or step == total_steps:
                records = common.gather(torch.stack(history)).cpu()  # ranks, steps * accumulation, 7, B
                records = records.unflatten(1, (-1, accumulation)).permute(1, 3, 2, 0, 4)  # steps, 7, acc., ranks, B
                records = records.flatten(2)  # steps, 7, global batch
                means = [pair_metrics(*record, args.kl_beta) for record in records]
                values = {k: v if v is None else float(np.mean([m[k] for m in means])) for k, v in means[0].items()}
                seconds = time.perf_counter() - since
                values |= {
                    "lr": float(np.mean(rates)), "grad_norm": float(np.mean(norms)),
                    "pairs_per_s": len(records) * args.global_batch_size / seconds, "tokens_per_s": tokens / seconds,
                }
                metrics.write(step, "train", values)
                history, rates, norms, tokens, since = [], [], [], 0, time.perf_counter()
            if args.eval_every and step % args.eval_every == 0 and step < total_steps:
                paused = time.perf_counter()
                evaluate_now(step)
                since += time.perf_counter() - paused

    if step:
        common.save_model(engine, model, tokenizer, output_dir / "model", process)
        lines = evaluate_now(step)
    metrics.close()
    if process.rank == 0:
        plot_margins(lines, args, output_dir / "margins.png")
        common.write_file(output_dir / "eval.jsonl", "".join(map(common.json_line, lines)))
    write_generations(engine, model, tokenizer, eval_pairs, args, process)  # last: the run is finished
    process.print(f"finished: look at {output_dir}/margins.png and {output_dir}/generations.json")


if __name__ == "__main__":
    common.run(main, common.parse_args(Args, preset))
