"""Fine-tune a language model on demonstrations: the first step of the road to a reward model, DPO or PPO.

    L = -(1/N) Σ log π(y_t | x, y_<t)        the N response tokens of the global batch, EOS included

1 process     deepspeed sft.py                                        (also: python sft.py ...)
8 GPUs        deepspeed --num_gpus 8 sft.py --task alpaca --model <language model>
evaluate      python sft.py --epochs 0 --model <SFT model> --eval_dataset demonstrations.jsonl

Input: demonstrations (JSON, JSONL, CSV, Parquet, a folder, a Hub id) with the columns prompt/completion, or messages,
or instruction/input/output (AlpacaFarm), or post/summary (TL;DR).
Output, in --output_dir: args.json, metrics.jsonl, tensorboard/, generations.json (sampled answers, for AlpacaEval) and
model/, which `AutoModelForCausalLM.from_pretrained` loads, and reward.py and dpo.py.

Shapes: R rows of a micro batch, T tokens of a row, N tokens under the loss.
"""

import common  # first: it sets what torch reads when it is loaded

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
import tyro


@dataclass
class Args:
    """Fine-tune a language model on demonstrations.

    A flag wins over what --task sets, which --help shows as the default. --dataset cancels the task's evaluation data.
    Held out are whole prompts, drawn by --seed.
    """

    task: Literal["toy", "alpaca", "tldr"] = "toy"  # Sets all defaults: embedded, or the paper's dialogue or summaries.
    model: str = ""  # Folder or Hub id of the starting model, a causal LM; toy: built when needed, with random weights.
    dataset: str = str(common.DATA / "sft_train.jsonl")  # Rows to train on: file, folder or Hub id[:SPLIT].
    eval_dataset: str = str(common.DATA / "sft_eval.jsonl")  # Held out; empty: 10 % of --dataset, at most 500.
    output_dir: str = ""  # Where results go; empty: runs/sft-<time>.
    overwrite: bool = False  # Replace the finished run in --output_dir.

    train_on_prompt: bool = False  # Put the prompt's tokens under the loss too.
    generate: int = 16  # Held-out prompts that are answered at the end, into generations.json; 0: none.

    max_length: int = 256  # Tokens of prompt + response + EOS; longer rows are dropped, longer answers cut.
    learning_rate: float = 2e-3  # Its peak; cosine to 0.
    weight_decay: float = 0.1  # AdamW's; none on biases and norm weights.
    epochs: int = 5  # Passes over the data; 0: evaluate only.
    max_steps: int = 0  # Optimizer steps at most; 0: no limit.
    micro_batch_size: int = 32  # Rows per rank and forward pass, at most.
    global_batch_size: int = 32  # Rows per optimizer step, over all ranks.
    zero_stage: Literal[0, 1, 2, 3] = 0  # Shards: 1 optimizer states, 2 + gradients, 3 + weights. bf16: 0 runs as 1.
    offload: bool = False  # Keep optimizer states (ZeRO-3: weights too) in CPU memory; stage 0 runs as 1.
    dtype: Literal["fp32", "bf16"] = "fp32"  # Of the model; bf16 keeps fp32 master weights.
    gradient_checkpointing: bool = False  # Recompute activations: less memory, a third more time.
    warmup_steps: int = 0  # Optimizer steps of linear warm-up.
    seed: int = 42  # Of the held-out split, the order of the rows and the sampled answers.
    log_every: int = 10  # Optimizer steps between lines of metrics.
    eval_every: int = 0  # Optimizer steps between evaluations; 0: before and after training.
    save_every: int = 0  # Optimizer steps between checkpoints; 0: only when a signal ends training.
    keep: int = 2  # Checkpoints that stay, the newest.
    resume: bool = False  # Go on from the newest checkpoint in --output_dir; begin where there is none.
    trust_remote_code: bool = False  # Run Python code that comes with a model.
    local_rank: int = -1  # Given by the launcher; LOCAL_RANK is used.


# The paper's settings; the embedded task's are the defaults above.
PAPER = dict(model=tyro.MISSING, weight_decay=0.0, epochs=3, micro_batch_size=4, zero_stage=2, dtype="bf16")
PAPER |= dict(gradient_checkpointing=True)
FARM = "hf://datasets/tatsu-lab/alpaca_farm@refs/convert/parquet/alpaca_instructions"
ALPACA = dict(dataset=f"{FARM}/sft/*.parquet", eval_dataset=f"{FARM}/val/*.parquet")
ALPACA |= dict(max_length=512, global_batch_size=128, learning_rate=2e-5)
REDDIT = "vwxyzjn/summarize_from_feedback_tldr_3_filtered"
TLDR = dict(dataset=f"{REDDIT}:train", eval_dataset=f"{REDDIT}:validation")
TLDR |= dict(max_length=1024, global_batch_size=64, learning_rate=1e-5)
TASKS = {"alpaca": PAPER | ALPACA, "tldr": PAPER | TLDR}
OUTPUTS = ("generations.json",)


def preset(task: str, constraint: str) -> dict:
    return TASKS.get(task, {})


# -------- data


def encode_row(row: dict, tokenizer, max_length: int, train_on_prompt: bool) -> dict:
    """The columns of a demonstration: its prompt, the tokens, and the first of them that is under the loss (start)."""
    columns = common.read_example(row, tokenizer, "demonstration")
    prompt_ids, ids = columns["prompt_ids"], columns["prompt_ids"] + columns.pop("answer_ids")[0]
    if not prompt_ids:
        raise common.Unusable("prompt without a token")  # nothing would predict the response's first one
    if len(ids) > max_length:
        raise common.Unusable(f"longer than --max_length {max_length}")  # Upstream: truncated
    start = 1 if train_on_prompt else len(prompt_ids)  # no token predicts the very first
    del columns["answers"]
    return columns | {"ids": ids, "start": start, "row_length": len(ids), "under_loss": len(ids) - start}


def collate(batch: dict[str, list], pad_token_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Inputs for R rows (see common.collate_rows), their N tokens under the loss as labels."""
    return common.collate_rows(batch["ids"], batch["start"], pad_token_id, device)


# -------- metrics


def evaluate(engine, rows, args: Args, collator) -> dict[str, float]:
    """The loss over all held-out tokens under it, on all ranks."""

    def row_losses(batch):
        logps = common.token_logps(engine, **collator(batch)).split(batch["under_loss"])  # of each row
        return -torch.stack([row.sum() for row in logps])[:, None]  # R 1

    losses = common.over_rows(engine, row_losses, rows, args)  # n 1
    return with_perplexity(losses.double().sum().item() / common.column(rows, "under_loss").sum())


def with_perplexity(loss: float) -> dict[str, float]:
    return {"loss": loss, "perplexity": math.exp(min(loss, 700))}


def main(args: Args):
    process = common.start(args.seed)
    accumulation = common.accumulation_steps(args)
    config = common.engine_config(args, accumulation)
    args.model = args.model or common.on_rank_0(common.toy_model, each_machine=True)
    output_dir = common.open_output(args, OUTPUTS)
    tokenizer = common.load_tokenizer(args.model, args.trust_remote_code)

    settings = {"max_length": args.max_length, "train_on_prompt": args.train_on_prompt}
    encode = functools.partial(encode_row, tokenizer=tokenizer, **settings)
    train_rows, eval_rows = common.load_data(args, encode)
    total_steps = common.total_steps(args, len(train_rows))

    model = common.load_language_model("--model", args.model, args, tokenizer, config)
    engine = common.make_engine(model, args, config, total_steps, process)
    common.check_model(engine, model, args, process)
    collator = functools.partial(collate, pad_token_id=tokenizer.pad_token_id, device=process.device)
    metrics = common.Metrics(args, total_steps, ("loss", "perplexity"))
    checkpoints = common.Checkpoints(metrics, args, (train_rows, eval_rows), engine=engine)
    common.say(f"{total_steps} steps on {len(train_rows)} rows, {len(eval_rows)} held out -> {output_dir}")

    def evaluate_now(step):
        metrics.write(step, "eval", evaluate(engine, eval_rows, args, collator))

    if not checkpoints.step:
        evaluate_now(0)
    lengths, counted = (common.column(train_rows, name) for name in ("row_length", "under_loss"))
    for epoch in range(args.epochs):
        batches = common.global_batches(lengths, args.global_batch_size, args.seed, epoch)
        for step, batch in checkpoints.rest_of(epoch, batches):
            losses = []
            # Each token of the global batch counts alike, in whatever micro batch it is: the engine's mean over ranks
            # and micro batches becomes the mean over tokens.
            weight = process.world_size * accumulation / counted[batch].sum()
            for i, rows in enumerate(batch.reshape(accumulation, process.world_size, -1)[:, process.rank]):
                logps = common.token_logps(engine, **collator(train_rows[rows]))  # N
                loss = -logps.sum() * weight
                engine.backward(loss)
                losses.append(loss.detach())
                if i < accumulation - 1:
                    engine.step()  # counts the micro batch
            rate = engine.get_lr()[0]
            (norm,) = common.optimizer_step(step, (engine, args))
            loss = common.gather(torch.stack(losses)[None]).mean().item()
            values = with_perplexity(loss) | {"lr": rate, "grad_norm": norm}
            metrics.add(step, values, rows=len(batch), tokens=lengths[batch].sum())
            if args.eval_every and step % args.eval_every == 0 and step < total_steps:
                evaluate_now(step)
            checkpoints.step_done(step)

    if total_steps:
        common.save_model(engine, model, tokenizer, output_dir / "model")
        evaluate_now(total_steps)
    common.answer_prompts(engine, model, tokenizer, eval_rows, args)  # last: the run is finished
    common.say(f"finished: look at {output_dir}/generations.json")


if __name__ == "__main__":
    common.run(main, Args, preset)
