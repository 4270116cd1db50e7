"""Fine-tune a language model on demonstrations: the first step of the road to a reward model, DPO or PPO.

    L = -(1/N) Σ log π(y_t | x, y_<t)        the N response tokens of the global batch, EOS included

1 process     deepspeed sft.py                                        (also: python sft.py ...)
8 GPUs        deepspeed --num_gpus 8 sft.py --task alpaca --model <language model>
evaluate      python sft.py --epochs 0 --model <SFT model> --eval_dataset demonstrations.jsonl

Input: demonstrations (JSON, JSONL, Parquet, a folder, a Hub id) with the columns prompt/completion, or
instruction/input/output (AlpacaFarm), or post/summary (TL;DR).
Output, in --output_dir: args.json, metrics.jsonl, tensorboard/, generations.json (sampled answers to held-out prompts,
as AlpacaEval reads them) and model/, which `AutoModelForCausalLM.from_pretrained` loads, and reward.py and dpo.py.

Symbols in the shapes: R rows of a micro batch, T tokens of a row, N tokens under the loss, H hidden size.
"""

import functools
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
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import common


@dataclass
class Args:
    """Fine-tune a language model on demonstrations.

    A flag given on the command line always wins over what --task sets; the defaults shown here are those of the --task
    on this command line.
    """

    task: Literal["toy", "alpaca", "tldr"] = "toy"
    """Sets data, lengths and every hyperparameter: the embedded task, or the paper's dialogue or summarization."""
    model: str = ""
    """Folder or Hub id of the starting model, a causal LM; toy: built when needed, with random weights."""
    dataset: str = str(common.DATA / "sft_train.jsonl")
    """Rows to train on: file, folder or Hub id, `:SPLIT` may follow. Cancels the task's own evaluation data."""
    eval_dataset: str = str(common.DATA / "sft_eval.jsonl")
    """Held-out demonstrations; empty: min(500, 10 %) of --dataset, drawn by --seed."""
    output_dir: str = ""
    """Where results go; empty: runs/sft-<time>."""
    overwrite: bool = False
    """Replace the finished run in --output_dir."""

    train_on_prompt: bool = False
    """Put the prompt's tokens under the loss too."""
    generate: int = 16
    """Held-out prompts that are answered at the end, into generations.json; 0: none."""

    max_length: int = 256
    """Tokens of prompt + response + EOS; longer demonstrations are dropped and counted, longer answers cut."""
    learning_rate: float = 2e-3
    """Peak learning rate; cosine to 0."""
    weight_decay: float = 0.1
    """AdamW's, on everything but biases and norm weights."""
    epochs: int = 5
    """Passes over the data; 0: evaluate only."""
    max_steps: int = 0
    """Optimizer steps at most; 0: no limit."""
    micro_batch_size: int = 32
    """Rows per rank and forward pass, at most: cut down to a rank's share of the global batch."""
    global_batch_size: int = 32
    """Rows per optimizer step, over all ranks and accumulated micro batches."""
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
    """Of the held-out split, the order of the rows and the sampled answers."""
    log_every: int = 10
    """Optimizer steps between lines of metrics; the first step always has one."""
    eval_every: int = 0
    """Optimizer steps between evaluations; 0: only before and after training."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model."""
    local_rank: int = -1
    """Given by the launcher, which also sets the LOCAL_RANK that is used."""


# The paper's settings; the embedded task's are the defaults above.
PAPER = dict(
    weight_decay=0.0, epochs=3, micro_batch_size=4, zero_stage=2, dtype="bf16", gradient_checkpointing=True,
)
ALPACA = "hf://datasets/tatsu-lab/alpaca_farm@refs/convert/parquet/alpaca_instructions"
TLDR = "vwxyzjn/summarize_from_feedback_tldr_3_filtered"
TASKS = {
    "toy": {},
    "alpaca": PAPER | dict(
        dataset=f"{ALPACA}/sft/*.parquet", eval_dataset=f"{ALPACA}/val/*.parquet",
        max_length=512, global_batch_size=128, learning_rate=2e-5,
    ),
    "tldr": PAPER | dict(
        dataset=f"{TLDR}:train", eval_dataset=f"{TLDR}:validation",
        max_length=1024, global_batch_size=64, learning_rate=1e-5,
    ),
}


def preset(task: str, constraint: str) -> dict:
    return TASKS.get(task, {})


# ---------------------------------------------------------------- data


@dataclass
class Row:
    """A row of the data: a prompt and its demonstration, as text and as tokens."""

    prompt: str
    completion: str
    ids: np.ndarray = None  # int32: (BOS,) prompt, completion, EOS
    prompt_length: int = 0  # tokens, BOS included


def parse_row(row: dict, where: str) -> tuple[str, str] | str:
    """(prompt, completion) of a row in any known format, or the reason why it cannot be used."""
    if {"prompt", "completion"} <= row.keys():
        prompt, completion = row["prompt"], row["completion"]
    elif {"instruction", "output"} <= row.keys():
        instruction, extra, completion = row["instruction"], row.get("input") or "", row["output"]
        check_text(where, instruction=instruction, input=extra)
        if instruction is None:
            return "missing text"
        question = instruction if instruction.endswith(extra) else instruction + extra
        prompt = f"\n\nHuman: {question}\n\nAssistant: "
    elif {"post", "summary"} <= row.keys():
        post, completion = row["post"], row["summary"]
        check_text(where, post=post)
        if post is None:
            return "missing text"
        task = "Your task is to generate a short summary of a post."
        prompt = f"\n\nHuman: {task}\n\nPost: {post}\n\nSummary: \n\nAssistant: "
    else:
        raise common.InputError(
            f"{where}: the columns are {', '.join(row)}, but must be prompt/completion, or instruction/input/output, "
            "or post/summary"
        )
    check_text(where, prompt=prompt, completion=completion)
    if prompt is None or completion is None:
        return "missing text"
    if not completion.strip():
        return "empty response"
    return prompt, completion


def check_text(where: str, **values) -> None:
    for name, value in values.items():
        if value is not None and not isinstance(value, str):
            raise common.InputError(f"{where}: {name} is {value!r}, but must be text")


def tokenize(rows: list[Row], tokenizer, max_length: int, dropped: Counter) -> list[Row]:
    """Fill in the tokens: (BOS,) prompt, completion, EOS, each tokenized apart, as generation will see them.

    Returns the rows that fit; the others are counted in `dropped` by reason.
    """
    # BOS only where the tokenizer itself begins a text with it.
    bos = [tokenizer.bos_token_id] if tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] else []
    eos = [tokenizer.eos_token_id]
    texts = [text for row in rows for text in (row.prompt, row.completion)]
    ids = tokenizer(texts, add_special_tokens=False).input_ids if texts else []
    kept = []
    for row, prompt, completion in zip(rows, ids[0::2], ids[1::2], strict=True):
        prompt = prompt if prompt[:1] == bos else bos + prompt  # neither BOS nor EOS twice
        completion = completion if completion[-1:] == eos else completion + eos
        row.ids, row.prompt_length = np.array(prompt + completion, np.int32), len(prompt)
        if not prompt:
            dropped["prompt without a token"] += 1  # nothing would predict the response's first one
        elif len(row.ids) > max_length:
            dropped[f"longer than --max_length {max_length}"] += 1  # Upstream: truncated
        else:
            kept.append(row)
    return kept


def read_rows(flag: str, name: str, split: str, tokenizer, args: Args, process: common.Process) -> list[Row]:
    """The usable rows of a data set with their tokens; the others are counted by reason."""
    kept, chunk, dropped = [], [], Counter()
    rows = common.read_rows(flag, name, split)
    for number, row in enumerate(rows, 1):
        parsed = parse_row(row, f"{flag} {name}, row {number}")
        if isinstance(parsed, str):
            dropped[parsed] += 1
        else:
            chunk.append(Row(*parsed))
        if len(chunk) == 1000 or number == len(rows):  # in chunks: a tokenizer's lists take more room than arrays
            kept += tokenize(chunk, tokenizer, args.max_length, dropped)
            chunk = []
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    if not kept:
        raise common.InputError(f"{flag} {name}: no usable row is left ({reasons})")
    process.print(f"{flag}: {len(kept)} rows" + (f"; dropped {dropped.total()}: {reasons}" if dropped else ""))
    return kept


def load_rows(args: Args, tokenizer, process: common.Process) -> tuple[list[Row], list[Row]]:
    """Rows to train on, none with --epochs 0, and held-out rows."""
    rows = []
    if args.epochs or not args.eval_dataset:
        rows = read_rows("--dataset", args.dataset, "train", tokenizer, args, process)
    if args.eval_dataset:
        return rows, read_rows("--eval_dataset", args.eval_dataset, "test", tokenizer, args, process)
    order = np.random.default_rng(args.seed).permutation(len(rows))
    count = min(500, math.ceil(len(rows) / 10))
    return [rows[i] for i in order[count:] if args.epochs], [rows[i] for i in order[:count]]


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


def loss_start(row: Row, train_on_prompt: bool) -> int:
    """The first token under the loss; no token predicts the very first."""
    return 1 if train_on_prompt else row.prompt_length


def collate(rows: list[Row], pad_token_id: int, train_on_prompt: bool, device: torch.device) -> dict[str, torch.Tensor]:
    """Model inputs for R rows, padded on the right (causal attention then needs no mask), and what is under the loss.

    Returns:
        input_ids (R, T); targets (N,), the tokens under the loss; sources (N,), the index in the flattened (R * T) rows
        of the position before each.
    """
    width = max(len(row.ids) for row in rows)
    input_ids = np.full((len(rows), width), pad_token_id)  # R T
    for i, row in enumerate(rows):
        input_ids[i, : len(row.ids)] = row.ids
    starts = [loss_start(row, train_on_prompt) for row in rows]
    sources = [np.arange(start - 1, len(row.ids) - 1) + i * width for i, (row, start) in enumerate(zip(rows, starts))]
    targets = [row.ids[start:] for row, start in zip(rows, starts)]
    return {
        "input_ids": torch.tensor(input_ids, device=device),
        "sources": torch.tensor(np.concatenate(sources), device=device),
        "targets": torch.tensor(np.concatenate(targets), dtype=torch.long, device=device),
    }


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
    """The language model, but its head sees only the positions that predict a target, some at a time."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.at_once = common.LOGITS_AT_ONCE // model.config.get_text_config().vocab_size + 1

    def forward(self, input_ids, sources, targets, **attention) -> torch.Tensor:
        """log π of each target, (N,) fp32."""
        outputs = self.model.base_model(input_ids=input_ids, use_cache=False, **attention)
        hidden = outputs.last_hidden_state.flatten(0, 1)[sources]  # R*T H -> N H
        chunks = torch.tensor(-(-len(sources) // self.at_once), device=hidden.device)
        dist.all_reduce(chunks, dist.ReduceOp.MAX)  # at ZeRO-3 each rank must call the head equally often
        cuts = [i * self.at_once for i in range(1, chunks.item())]  # one size: an allocator can use its blocks again
        pieces = list(zip(hidden.tensor_split(cuts), targets.tensor_split(cuts)))
        # The backward pass makes the logits again, but for the last pieces: so many are held, however long the rows.
        early, late = pieces[: -common.LOGITS_HELD], pieces[-common.LOGITS_HELD :]
        logps = [checkpoint(self.logps, *piece, use_reentrant=False) for piece in early]
        return torch.cat(logps + [self.logps(*piece) for piece in late])  # N

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


@torch.no_grad()
def evaluate(engine, rows: list[Row], args: Args, collator, process: common.Process) -> dict[str, float]:
    """Loss and perplexity over all held-out tokens under the loss, on all ranks."""
    engine.eval()
    order = np.argsort([-len(row.ids) for row in rows], kind="stable")
    batches = [order[i : i + args.micro_batch_size] for i in range(0, len(order), args.micro_batch_size)]
    total = torch.zeros(2, dtype=torch.float64, device=process.device)  # of -log π; tokens
    for start in range(0, len(batches), process.world_size):
        own = start + process.rank  # at ZeRO-3 each rank must run equally many batches: the last ones may idle
        logps = engine(**collator([rows[i] for i in batches[min(own, len(batches) - 1)]]))  # N
        if own < len(batches):
            total += torch.stack([-logps.double().sum(), torch.tensor(len(logps), device=process.device)])
    dist.all_reduce(total)
    engine.train()
    if not total.isfinite().all():
        raise common.InputError("evaluation: the loss is not finite; the model has diverged or its weights are broken")
    return loss_metrics((total[0] / total[1]).item())


def loss_metrics(loss: float) -> dict[str, float]:
    return {"loss": loss, "perplexity": math.exp(min(loss, 700))}


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


def write_generations(engine, model, tokenizer, rows: list[Row], args: Args, process: common.Process) -> None:
    """Answer the first --generate different held-out prompts: print some, and write all as AlpacaEval reads them."""
    prompts = {row.prompt: row.ids[: row.prompt_length] for row in rows}
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
    args.model = args.model or common.on_rank_0(process, common.toy_model)

    tokenizer = common.load_tokenizer(args.model, args.trust_remote_code)
    train_rows, eval_rows = load_rows(args, tokenizer, process)

    steps_per_epoch = len(train_rows) // args.global_batch_size
    total_steps = args.epochs * steps_per_epoch
    if args.epochs and not total_steps:
        raise common.InputError(
            f"{len(train_rows)} rows, without the held-out ones, do not fill a --global_batch_size of "
            f"{args.global_batch_size}: pass a smaller one"
        )
    if args.max_steps:
        total_steps = min(total_steps, args.max_steps)

    model = load_policy(args.model, args, tokenizer, config)
    engine = common.make_engine(Policy(model), args, config, total_steps, process)
    collator = functools.partial(
        collate, pad_token_id=tokenizer.pad_token_id, train_on_prompt=args.train_on_prompt, device=process.device
    )
    output_dir = common.open_output(args, process, "sft")
    metrics = common.Metrics(output_dir, process, total_steps)
    process.print(f"{total_steps} steps on {len(train_rows)} rows, {len(eval_rows)} held out -> {output_dir}")

    metrics.write(0, "eval", evaluate(engine, eval_rows, args, collator, process))
    lengths = np.array([len(row.ids) for row in train_rows])
    starts = np.array([loss_start(row, args.train_on_prompt) for row in train_rows])
    step, history, rates, norms, tokens, since = 0, [], [], [], 0, time.perf_counter()
    for epoch in range(args.epochs):
        for batch in global_batches(lengths, args.global_batch_size, args.seed, epoch)[: total_steps - step]:
            step += 1
            losses = []
            # Each token of the global batch counts alike, in whatever micro batch it is: the engine's mean over ranks
            # and micro batches becomes the mean over tokens.
            weight = process.world_size * accumulation / (lengths[batch] - starts[batch]).sum()
            for i, ranks in enumerate(batch.reshape(accumulation, process.world_size, -1)):
                logps = engine(**collator([train_rows[row] for row in ranks[process.rank]]))  # N
                loss = -logps.sum() * weight
                engine.backward(loss)
                losses.append(loss.detach())
                if i < accumulation - 1:
                    engine.step()  # counts the micro batch
            rates.append(engine.get_lr()[0])
            norms.append(common.optimizer_step(engine, args, step, losses))
            history.append(torch.stack(losses).mean())
            tokens += lengths[batch].sum()
            metrics.bar.update()

            if step == 1 or step % args.log_every == 0 or step == total_steps:
                loss = common.gather(torch.stack(history)).mean().item()  # over ranks and steps
                seconds = time.perf_counter() - since
                values = loss_metrics(loss) | {
                    "lr": float(np.mean(rates)), "grad_norm": float(np.mean(norms)),
                    "rows_per_s": len(history) * args.global_batch_size / seconds, "tokens_per_s": tokens / seconds,
                }
                metrics.write(step, "train", values)
                history, rates, norms, tokens, since = [], [], [], 0, time.perf_counter()
            if args.eval_every and step % args.eval_every == 0 and step < total_steps:
                paused = time.perf_counter()
                metrics.write(step, "eval", evaluate(engine, eval_rows, args, collator, process))
                since += time.perf_counter() - paused

    if step:
        common.save_model(engine, model, tokenizer, output_dir / "model", process)
        metrics.write(step, "eval", evaluate(engine, eval_rows, args, collator, process))
    metrics.close()
    write_generations(engine, model, tokenizer, eval_rows, args, process)  # last: the run is finished
    process.print(f"finished: look at {output_dir}/generations.json")


if __name__ == "__main__":
    common.run(main, common.parse_args(Args, preset))
