"""Train a policy on preferences directly (DPO), its implicit margins bounded by a prior (PCRM, arXiv 2404.00978).

    z  = β [(log π(chosen|x) - log π_ref(chosen|x)) - (log π(rejected|x) - log π_ref(rejected|x))]      β: --kl_beta
    δ* = β1 / (s + β2) + β3                                its bound; s says how alike the two responses are
    L  = -log σ(z) - log σ(δ* - z)                         mean over the global batch

1 process     deepspeed dpo.py --constraint cos_sim --model <SFT model>       (also: python dpo.py ...)
8 GPUs        deepspeed --num_gpus 8 dpo.py --task alpaca --constraint cos_sim --model <SFT model>
evaluate      python dpo.py --epochs 0 --model <DPO model> --ref_model <SFT model> --eval_dataset pairs.jsonl

Input: preference pairs (JSON, JSONL, CSV, Parquet, a folder, a Hub id) with the columns [prompt/]chosen/rejected, or
instruction/input/output_1/output_2/preference (AlpacaFarm), or info/summaries/choice (summarize_from_feedback).
Output, in --output_dir: args.json, metrics.jsonl, tensorboard/, eval.jsonl (a line per held-out pair), margins.png,
generations.json (sampled answers, for AlpacaEval) and model/, which `AutoModelForCausalLM.from_pretrained` loads.

Shapes: B pairs, R rows and N response tokens of a micro batch, T tokens of a row, n pairs of a data set.
"""

import common  # first: it sets what torch reads when it is loaded

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

from priors import cosine_similarity, encode_texts, length_ratio, pair_bounds, ranking_loss


@dataclass
class Args:
    """Train a policy on preference pairs with a prior constraint on its margins.

    A flag wins over what --task and --constraint set, which --help shows as the defaults. --dataset cancels the task's
    evaluation data. Held out are whole prompts, drawn by --seed.
    """

    task: Literal["toy", "alpaca"] = "toy"  # Sets data and hyperparameters: the embedded task, or the paper's dialogue.
    constraint: Literal["none", "len_rat", "cos_sim", "given", "random", "fixed"] = "none"
    """What bounds a margin: nothing; length ratio, cosine similarity or the data's own; a control without a prior."""
    model: str = ""  # Folder or Hub id of a causal LM to start from (the SFT model); toy: made when needed, untrained.
    ref_model: str = ""  # Folder or Hub id of the reference π_ref, with the same vocabulary; empty: the starting model.
    live_reference: bool = False  # Run the reference in every step, beside the policy, instead of once before training.
    dataset: str = str(common.DATA / "preference_train.jsonl")  # Pairs to train on: file, folder or Hub id[:SPLIT].
    eval_dataset: str = str(common.DATA / "preference_eval.jsonl")  # Held out; empty: 10 % of --dataset, at most 500.
    ranked_dataset: str = str(common.DATA / "ranked_eval.jsonl")  # Ranked responses, for rank correlation; or empty.
    output_dir: str = ""  # Where results go; empty: runs/dpo-<constraint>-<time>.
    overwrite: bool = False  # Replace the finished run in --output_dir.

    kl_beta: float = 0.1  # DPO's own β: what a nat of distance from the reference costs, in units of the margin.
    label_smoothing: float = 0.0  # Share of labels taken to be wrong, in both terms of the loss; at most 0.5.
    generate: int = 16  # Held-out prompts that are answered at the end, into generations.json; 0: none.

    beta1: float = 20.0  # How fast the bound loosens as the responses differ.
    beta2: float = 0.001  # Keeps the bound's fraction finite.
    beta3: float = -15.0  # Moves the bound's floor δ*(1).
    fixed_bound: float = 4.5  # The bound with --constraint fixed; alpaca needs it given.
    random_low: float = 4.0  # Lowest bound with --constraint random; alpaca needs it given.
    random_high: float = 5.0  # Highest bound with --constraint random; alpaca needs it given.
    shuffle_bounds: bool = False  # Deal the bounds of a prior to other pairs: the control that has lost only the prior.
    encoder: str = ""  # Folder or Hub id of the text encoder of cos_sim; empty: the reference's hidden states.
    encoder_pooling: Literal["cls", "mean"] = "mean"  # Of last hidden states: the first token's, or the mean of all.

    max_length: int = 256  # Tokens of prompt + response + EOS; longer pairs are dropped, longer answers cut.
    learning_rate: float = 2e-4  # Its peak; cosine to 0.
    weight_decay: float = 0.1  # AdamW's; none on biases and norm weights.
    epochs: int = 2  # Passes over the data; 0: evaluate only.
    max_steps: int = 0  # Optimizer steps at most; 0: no limit.
    micro_batch_size: int = 32  # Pairs per rank and forward pass, at most.
    global_batch_size: int = 32  # Pairs per optimizer step, over all ranks.
    zero_stage: Literal[0, 1, 2, 3] = 0  # Shards: 1 optimizer states, 2 + gradients, 3 + weights. bf16: 0 runs as 1.
    offload: bool = False  # Keep optimizer states (ZeRO-3: weights too) in CPU memory; stage 0 runs as 1.
    dtype: Literal["fp32", "bf16"] = "fp32"  # Of the model; bf16 keeps fp32 master weights.
    gradient_checkpointing: bool = False  # Recompute activations: less memory, a third more time.
    warmup_steps: int = 0  # Optimizer steps of linear warm-up.
    seed: int = 42  # Of the held-out split, the order of the pairs, random bounds and the sampled answers.
    log_every: int = 10  # Optimizer steps between lines of metrics.
    eval_every: int = 0  # Optimizer steps between evaluations; 0: before and after training.
    save_every: int = 0  # Optimizer steps between checkpoints; 0: only when a signal ends training.
    keep: int = 2  # Checkpoints that stay, the newest.
    resume: bool = False  # Go on from the newest checkpoint in --output_dir; begin where there is none.
    trust_remote_code: bool = False  # Run Python code that comes with a model.
    local_rank: int = -1  # Given by the launcher; LOCAL_RANK is used.


# The paper's settings; the embedded task's are the defaults above.
PAPER = dict(model=tyro.MISSING, ranked_dataset="", encoder="google-bert/bert-base-uncased", encoder_pooling="cls")
PAPER |= dict(weight_decay=0.0, epochs=1, micro_batch_size=4, zero_stage=2, dtype="bf16", gradient_checkpointing=True)
FARM = "hf://datasets/tatsu-lab/alpaca_farm/alpaca_human_preference.json"
ALPACA = dict(dataset=FARM, eval_dataset="", max_length=512, global_batch_size=32, learning_rate=1e-6)
ALPACA |= dict(random_low=0.0, random_high=0.0, fixed_bound=0.0)  # the paper has no such runs
TASKS = {"alpaca": PAPER | ALPACA}
BETAS = {
    ("alpaca", "cos_sim"): dict(beta1=30.0, beta2=0.001, beta3=-25.0),  # Upstream: of the raw cosine; here angular
    ("alpaca", "len_rat"): dict(beta1=20.0, beta2=0.001, beta3=-15.0),
}
OUTPUTS = ("margins.png", "eval.jsonl", "generations.json")


def preset(task: str, constraint: str) -> dict:
    return TASKS.get(task, {}) | BETAS.get((task, constraint), {})


# -------- data


def collate(batch: dict, pad_token_id: int, share_prefix: bool, dtype, device) -> dict[str, torch.Tensor]:
    """Inputs for B pairs (see common.collate_pairs), their N response tokens as labels (R, T), elsewhere -100; of each
    of these tokens its pair (N,) and branch (N,): 0 what both responses begin with, 1 chosen, 2 rejected."""
    inputs, labels, branch, positions = common.collate_pairs(batch, pad_token_id, share_prefix, dtype, device)
    each = len(labels) // len(batch["prefix"])  # rows of a pair
    starts = torch.tensor([len(ids) - 1 for ids in batch["prompt_ids"] for _ in range(each)], device=device)  # R
    labels[positions < starts[:, None]] = common.NO_LABEL
    pair = (torch.arange(len(labels), device=device) // each)[:, None].expand_as(labels)  # R T
    kept = labels != common.NO_LABEL  # R T
    return inputs | {"labels": labels, "pair": pair[kept], "branch": branch[kept], "pairs": len(batch["prefix"])}


# -------- prior


def similarities(pairs, args: Args, process) -> torch.Tensor:
    """How alike the responses of each pair are, (n,) in (0, 1]: once, before training, cached on disk by content."""
    if args.constraint == "given":
        return torch.tensor(common.column(pairs, "similarity")).float()
    if args.constraint != "cos_sim" or not len(pairs):  # for none and the controls a diagnostic
        return length_ratio(*(torch.tensor(common.column(pairs, f"{side}_length")) for side in ("chosen", "rejected")))

    def compute():
        mine = pairs[range(process.rank, len(pairs), process.world_size)]
        texts = [p + text for p, *both in zip(mine["prompt"], mine["chosen"], mine["rejected"]) for text in both]
        progress = functools.partial(tqdm, desc="similarity", unit="batch", mininterval=2, disable=process.rank > 0)
        options = {"progress": progress, "trust_remote_code": args.trust_remote_code}
        embeddings = encode_texts(texts, args.encoder, args.encoder_pooling, device=process.device, **options)
        return torch.tensor(common.interleaved(cosine_similarity(embeddings[0::2], embeddings[1::2]).tolist()))

    with common.naming(f"encoder {args.encoder}"):
        content = [common.model_version(args.encoder), args.encoder_pooling, pairs._fingerprint]
        return common.cached("similarity", content, compute)


def bounds_of(similarity: torch.Tensor, args: Args, epoch: int = 0) -> torch.Tensor:
    """The bound δ* of each pair, (n,); NaN where there is none. A random one is a function of (seed, epoch, row)."""
    seed = int(np.random.SeedSequence([args.seed, epoch]).generate_state(1)[0])
    betas, low_high = (args.beta1, args.beta2, args.beta3), (args.random_low, args.random_high)
    with common.naming(f"--constraint {args.constraint}"):
        bound = pair_bounds(similarity, args.constraint, betas, args.fixed_bound, low_high, seed)
        if args.shuffle_bounds and args.constraint in ("none", "random", "fixed"):
            raise ValueError("--shuffle_bounds deals the bounds of a prior, which this has not")
    return bound[np.random.default_rng(args.seed).permutation(len(bound))] if args.shuffle_bounds else bound


# -------- loss and metrics


def pair_logps(model, pairs: int, pair: torch.Tensor, branch: torch.Tensor, **inputs) -> torch.Tensor:
    """log π of each pair's chosen and rejected response, summed over its tokens: (B, 2) fp32."""
    logps = common.token_logps(model, **inputs)  # N
    sums = [logps.new_zeros(pairs).index_add(0, pair, logps * (branch != other)) for other in (2, 1)]  # each B
    return torch.stack(sums, 1)


def reference_logps(reference, pairs, args: Args, collator, process) -> torch.Tensor:
    """log π_ref of the responses of all pairs, (2, n): once, before training, cached on disk by content."""

    def compute():
        return common.over_rows(reference, lambda batch: pair_logps(reference, **collator(batch)), pairs, args)

    content = [args.dtype, process.device.type, pairs._fingerprint]
    version = common.on_rank_0(lambda: common.model_version(args.ref_model))
    return common.cached("reference", [version, *content], compute).T


def pair_metrics(chosen, rejected, ref_chosen, ref_rejected, bound, rank_loss, constraint_loss, kl_beta) -> dict:
    """The public metrics of some pairs, from log π and log π_ref of their responses, bounds (NaN: none) and losses, all
    (n,). kl estimates KL(π_ref || π), as if the pairs' responses were the reference's own."""
    chosen_reward, rejected_reward = kl_beta * (chosen - ref_chosen), kl_beta * (rejected - ref_rejected)
    return common.margin_metrics(chosen_reward - rejected_reward, bound, rank_loss, constraint_loss) | {
        "chosen_reward": chosen_reward.mean().item(),
        "rejected_reward": rejected_reward.mean().item(),
        "chosen_logps": chosen.mean().item(),
        "rejected_logps": rejected.mean().item(),
        "kl": (ref_chosen - chosen + ref_rejected - rejected).mean().item() / 2,
    }


def evaluate(engine, pairs, similarity, ref_logps, ranked, args: Args, collator) -> tuple[dict, list[dict]]:
    """Metrics over all held-out pairs, and a line per pair. ranked: see common.load_ranked, and their log π_ref."""

    def logps_of(batch):
        return pair_logps(engine, **collator(batch))  # B 2

    logps = common.over_rows(engine, logps_of, pairs, args).T  # 2 n
    chosen, rejected = args.kl_beta * (logps - ref_logps)  # n, n
    margin, bound = chosen - rejected, bounds_of(similarity, args)  # n, n
    rank_loss = ranking_loss(margin, args.label_smoothing)
    constraint_loss = ranking_loss(bound - margin, args.label_smoothing) if args.constraint != "none" else 0 * margin
    metrics = pair_metrics(*logps, *ref_logps, bound, rank_loss, constraint_loss, args.kl_beta)
    rows, human, ranked_ref = ranked
    own = (common.over_rows(engine, logps_of, rows, args).T - ranked_ref)[0].tolist() if human else []
    metrics |= common.correlations(margin, similarity, pairs, own, human)
    columns = dict(chosen_reward=chosen, rejected_reward=rejected, margin=margin, similarity=similarity)
    columns |= dict(chosen_logps=logps[0], rejected_logps=logps[1], bound=bound)
    lines = [dict(zip(columns, values)) for values in zip(*(column.tolist() for column in columns.values()))]
    return metrics, lines


def main(args: Args):
    process = common.start(args.seed)
    accumulation = common.accumulation_steps(args)
    config = common.engine_config(args, accumulation)
    if not args.model:
        common.say("warning: no --model: this starts from random weights; sft.py makes a model to start from")
    args.model = args.model or common.on_rank_0(common.toy_model, each_machine=True)
    args.ref_model = args.ref_model or args.model
    if not args.epochs and args.ref_model == args.model:
        common.say("warning: the policy is its own reference, so every margin is 0: pass --ref_model")
    args.encoder = common.encoder_of(args, start=args.ref_model)
    output_dir = common.open_output(args, OUTPUTS)
    tokenizer = common.load_tokenizer(args.model, args.trust_remote_code)
    common.check_tokenizer("--ref_model", args.ref_model, tokenizer, args.trust_remote_code)

    settings = {"max_length": args.max_length, "given": args.constraint == "given", "needs_prompt": True}
    encode = functools.partial(common.encode_pair, tokenizer=tokenizer, **settings)
    train_pairs, eval_pairs = common.load_data(args, encode)
    ranked_pairs, human = common.load_ranked(args, encode)
    train_similarity, eval_similarity = (similarities(pairs, args, process) for pairs in (train_pairs, eval_pairs))
    bounds_of(torch.cat([train_similarity, eval_similarity]), args)  # a bad one is refused before the model is loaded
    total_steps = common.total_steps(args, len(train_pairs))

    model = common.load_language_model("--model", args.model, args, tokenizer, config)
    engine = common.make_engine(model, args, config, total_steps, process)
    share_prefix = common.check_model(engine, model, args, process)
    options = {"share_prefix": share_prefix, "dtype": model.dtype, "device": process.device}
    collator = functools.partial(collate, pad_token_id=tokenizer.pad_token_id, **options)
    reference = engine  # before the first step the policy is its own reference
    if args.live_reference or args.ref_model != args.model:
        reference = common.load_language_model("--ref_model", args.ref_model, args, tokenizer, config)
        reference = common.make_engine(reference, args, config, 0, process)

    def reference_of(rows):
        return reference_logps(reference, rows, args, collator, process) if rows else None  # 2 n

    eval_ref, ranked = reference_of(eval_pairs), (ranked_pairs, human, reference_of(ranked_pairs))
    train_ref = None if args.live_reference or not len(train_pairs) else reference_of(train_pairs).to(process.device)
    if not args.live_reference:
        del reference  # its memory is free now
    shown = ("loss", "accuracy", "margin_mean", "margin_max", "kl")
    metrics = common.Metrics(args, total_steps, shown)
    checkpoints = common.Checkpoints(metrics, args, (train_pairs, eval_pairs), engine=engine)
    common.say(f"{total_steps} steps on {len(train_pairs)} pairs, {len(eval_pairs)} held out -> {output_dir}")

    def evaluate_now(step):
        values, lines = evaluate(engine, eval_pairs, eval_similarity, eval_ref, ranked, args, collator)
        metrics.write(step, "eval", values)
        return lines

    lines = [] if checkpoints.step else evaluate_now(0)
    lengths = common.column(train_pairs, "row_length")
    tokens = lengths + common.column(train_pairs, "prefix")  # the prompt counted once for each response
    for epoch in range(args.epochs):
        bounds = bounds_of(train_similarity, args, epoch).to(process.device)  # n
        batches = common.global_batches(lengths, args.global_batch_size, args.seed, epoch)
        for step, batch in checkpoints.rest_of(epoch, batches):
            records = []
            for i, rows in enumerate(batch.reshape(accumulation, process.world_size, -1)[:, process.rank]):
                inputs = collator(train_pairs[rows])
                logps = pair_logps(engine, **inputs).T  # 2 B    log π
                with torch.no_grad():
                    ref_logps = pair_logps(reference, **inputs).T if args.live_reference else train_ref[:, rows]  # 2 B
                chosen, rejected = args.kl_beta * (logps - ref_logps)  # B, B    r(x, y), the implicit reward
                margin = chosen - rejected  # B    z
                bound = bounds[rows]  # B    δ*
                rank_loss = ranking_loss(margin, args.label_smoothing)  # B    -log σ(z)
                constraint_loss = 0 * margin
                if args.constraint != "none":
                    constraint_loss = ranking_loss(bound - margin, args.label_smoothing)  # B    -log σ(δ* - z)
                loss = (rank_loss + constraint_loss).mean()
                engine.backward(loss)
                records.append(torch.stack([*logps, *ref_logps, bound, rank_loss, constraint_loss]).detach())  # 7 B
                if i < accumulation - 1:
                    engine.step()  # counts the micro batch
            rate = engine.get_lr()[0]
            (norm,) = common.optimizer_step(step, (engine, args))
            values = pair_metrics(*common.gather(torch.cat(records, 1)), args.kl_beta) | {"lr": rate, "grad_norm": norm}
            metrics.add(step, values, pairs=len(batch), tokens=tokens[batch].sum())
            if args.eval_every and step % args.eval_every == 0 and step < total_steps:
                evaluate_now(step)
            checkpoints.step_done(step)

    if total_steps:
        common.save_model(engine, model, tokenizer, output_dir / "model")
        lines = evaluate_now(total_steps)
    if process.rank == 0:
        common.plot_margins(lines, args, output_dir / "margins.png")
        common.write_file(output_dir / "eval.jsonl", "".join(map(common.json_line, lines)))
    common.answer_prompts(engine, model, tokenizer, eval_pairs, args)  # last: the run is finished
    common.say(f"finished: look at {output_dir}/margins.png and {output_dir}/generations.json")


if __name__ == "__main__":
    common.run(main, Args, preset)
