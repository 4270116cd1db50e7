"""Train a reward model whose margins are bounded by a prior (PCRM, arXiv 2404.00978).

    m  = r(x, chosen) - r(x, rejected)                     margin of a pair
    δ* = β1 / (s + β2) + β3                                its bound; s says how alike the two responses are
    L  = -log σ(m) - log σ(δ* - m)                         mean over the global batch

1 process     deepspeed reward.py --constraint cos_sim                        (also: python reward.py ...)
8 GPUs        deepspeed --num_gpus 8 reward.py --task alpaca --constraint cos_sim --model <SFT model>
evaluate      python reward.py --epochs 0 --model <reward model> --eval_dataset pairs.jsonl

Input: preference pairs (JSON, JSONL, CSV, Parquet, a folder, a Hub id) with the columns [prompt/]chosen/rejected, or
instruction/input/output_1/output_2/preference (AlpacaFarm), or info/summaries/choice (summarize_from_feedback).
Output, in --output_dir: args.json, metrics.jsonl, tensorboard/, eval.jsonl (a line per held-out pair), margins.png and
model/, which `AutoModelForSequenceClassification.from_pretrained` loads.
r(x, y) is the score at the last token, EOS. The authors' own loss, L at each token, is --loss_on token.

Shapes: B pairs and R rows of a micro batch, T tokens of a row, K positions that the head sees, n pairs of a data set.
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
    """Train a reward model with a prior constraint on its margins.

    A flag wins over what --task and --constraint set, which --help shows as the defaults. --dataset cancels the task's
    evaluation data. Held out are whole prompts, drawn by --seed.
    """

    task: Literal["toy", "alpaca", "tldr"] = "toy"  # Sets all defaults: embedded, or the paper's dialogue or summaries.
    constraint: Literal["none", "len_rat", "cos_sim", "given", "random", "fixed"] = "none"
    """What bounds a margin: nothing; length ratio, cosine similarity or the data's own; a control without a prior."""
    model: str = ""  # Folder or Hub id of the SFT model, or of a reward model, to start from; toy: made when needed.
    dataset: str = str(common.DATA / "preference_train.jsonl")  # Pairs to train on: file, folder or Hub id[:SPLIT].
    eval_dataset: str = str(common.DATA / "preference_eval.jsonl")  # Held out; empty: 10 % of --dataset, at most 500.
    ranked_dataset: str = str(common.DATA / "ranked_eval.jsonl")  # Ranked responses, for rank correlation; or empty.
    output_dir: str = ""  # Where results go; empty: runs/reward-<constraint>-<time>.
    overwrite: bool = False  # Replace the finished run in --output_dir.

    beta1: float = 20.0  # How fast the bound loosens as the responses differ.
    beta2: float = 0.001  # Keeps the bound's fraction finite.
    beta3: float = -15.0  # Moves the bound's floor δ*(1).
    fixed_bound: float = 4.5  # The bound with --constraint fixed.
    random_low: float = 4.0  # Lowest bound with --constraint random.
    random_high: float = 5.0  # Highest bound with --constraint random.
    shuffle_bounds: bool = False  # Deal the bounds of a prior to other pairs: the control that has lost only the prior.
    encoder: str = ""  # Folder or Hub id of the text encoder of cos_sim; empty: the starting model's hidden states.
    encoder_pooling: Literal["cls", "mean"] = "mean"  # Of last hidden states: the first token's, or the mean of all.

    loss_on: Literal["last", "token"] = "last"
    """In training L at the last token; or, as in the authors' code, its mean over all from the first that differs."""
    max_length: int = 256  # Tokens of prompt + response + EOS; pairs with a longer side are dropped and counted.
    learning_rate: float = 1e-3  # Its peak; cosine to 0.
    weight_decay: float = 0.1  # AdamW's; none on biases and norm weights.
    epochs: int = 5  # Passes over the data; 0: evaluate only.
    max_steps: int = 0  # Optimizer steps at most; 0: no limit.
    micro_batch_size: int = 32  # Pairs per rank and forward pass, at most.
    global_batch_size: int = 32  # Pairs per optimizer step, over all ranks.
    zero_stage: Literal[0, 1, 2, 3] = 0  # Shards: 1 optimizer states, 2 + gradients, 3 + weights. bf16: 0 runs as 1.
    offload: bool = False  # Keep optimizer states (ZeRO-3: weights too) in CPU memory; stage 0 runs as 1.
    dtype: Literal["fp32", "bf16"] = "fp32"  # Of the model; bf16 keeps fp32 master weights.
    gradient_checkpointing: bool = False  # Recompute activations: less memory, a third more time.
    warmup_steps: int = 0  # Optimizer steps of linear warm-up.
    seed: int = 42  # Of the held-out split, the order of the pairs, random bounds and the new score head.
    log_every: int = 10  # Optimizer steps between lines of metrics.
    eval_every: int = 0  # Optimizer steps between evaluations; 0: before and after training.
    save_every: int = 0  # Optimizer steps between checkpoints; 0: only when a signal ends training.
    keep: int = 2  # Checkpoints that stay, the newest.
    resume: bool = False  # Go on from the newest checkpoint in --output_dir; begin where there is none.
    trust_remote_code: bool = False  # Run Python code that comes with a model.
    local_rank: int = -1  # Given by the launcher; LOCAL_RANK is used.


# The paper's settings; the embedded task's are the defaults above.
PAPER = dict(model=tyro.MISSING, ranked_dataset="", encoder="google-bert/bert-base-uncased", encoder_pooling="cls")
PAPER |= dict(weight_decay=0.1, epochs=1, micro_batch_size=4, zero_stage=2, dtype="bf16", gradient_checkpointing=True)
FARM = "hf://datasets/tatsu-lab/alpaca_farm/alpaca_human_preference.json"
ALPACA = dict(dataset=FARM, eval_dataset="", max_length=512, global_batch_size=16, learning_rate=3e-6)
ALPACA |= dict(random_low=4.0, random_high=5.0, fixed_bound=4.5)
REDDIT = "hf://datasets/openai/summarize_from_feedback@refs/convert/parquet/comparisons"
TLDR = dict(dataset=f"{REDDIT}/train/*.parquet:train", max_length=1024, global_batch_size=64, learning_rate=1e-6)
TLDR |= dict(eval_dataset=f"{REDDIT}/validation/*.parquet:valid2")  # Upstream: evaluated on valid1
TLDR |= dict(random_low=5.0, random_high=6.0, fixed_bound=5.0)
TASKS = {"alpaca": PAPER | ALPACA, "tldr": PAPER | TLDR}
BETAS = {
    ("alpaca", "cos_sim"): dict(beta1=20.0, beta2=0.001, beta3=-15.0),
    ("alpaca", "len_rat"): dict(beta1=20.0, beta2=0.001, beta3=-15.0),  # the paper swept β3 = -13, -17, -19
    ("tldr", "cos_sim"): dict(beta1=30.0, beta2=0.001, beta3=-25.0),
    ("tldr", "len_rat"): dict(beta1=10.0, beta2=0.001, beta3=-5.0),
}
OUTPUTS = ("margins.png", "eval.jsonl")


def preset(task: str, constraint: str) -> dict:
    return TASKS.get(task, {}) | BETAS.get((task, constraint), {})


# -------- data


def collate(batch: dict, pad_token_id: int, share_prefix: bool, dtype, device, loss_on: str = "last") -> tuple:
    """Inputs for B pairs (see common.collate_pairs), and each position's share in its pair's loss, (B, K). The head
    sees K positions of each response: the last token, EOS (K = 1); with loss_on "token" all of its row (K = T), where
    those from the first that differs to the end of the longer response have equal shares and the others none. The
    shorter response goes on with the scores at its padding, which no token sees."""
    if loss_on == "last":
        inputs, labels, branch, _ = common.collate_pairs(batch, pad_token_id, share_prefix, dtype, device)
        inputs["logits_to_keep"] = (labels == common.NO_LABEL) & (branch >= 0)  # R T, 2 B of them True
        return inputs, torch.ones(len(batch["prefix"]), 1, device=device)
    rows = [ids for pair in zip(batch["chosen_ids"], batch["rejected_ids"]) for ids in pair]
    ids = common.padded(rows, pad_token_id, device)  # 2B T
    is_text = common.padded([[1] * len(row) for row in rows], 0, device)  # 2B T
    inputs = {"input_ids": ids, "attention_mask": is_text, "logits_to_keep": torch.ones_like(ids, dtype=torch.bool)}
    start = torch.tensor(batch["prefix"], device=device)[:, None]  # B 1
    ends = is_text.sum(1).view(-1, 2).amax(1)[:, None]  # B 1
    places = torch.arange(ids.shape[1], device=device)  # T
    return inputs, ((places >= start) & (places < ends)) / (ends - start)


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


# -------- metrics


def pair_metrics(chosen, rejected, rank_loss, constraint_loss, bound) -> dict[str, float]:
    """The public metrics of some pairs, from their scores, bounds (NaN: none) and losses, each (n,). In training with
    --loss_on token a pair's scores are the means over the positions that the loss is on."""
    return common.margin_metrics(chosen - rejected, bound, rank_loss, constraint_loss) | {
        "chosen_score": chosen.mean().item(),
        "rejected_score": rejected.mean().item(),
        "score_std": torch.cat([chosen, rejected]).std(correction=0).item(),
    }


def evaluate(engine, pairs, similarity, ranked, args: Args, collator) -> tuple[dict, list[dict]]:
    """Metrics over all held-out pairs, and a line per pair. ranked: see common.load_ranked."""

    def scores(batch):
        return engine(**collator(batch)[0]).logits.view(-1, 2)  # B 2

    chosen, rejected = common.over_rows(engine, scores, pairs, args).T  # n, n
    margin, bound = chosen - rejected, bounds_of(similarity, args)  # n, n
    rank_loss = ranking_loss(margin)
    constraint_loss = ranking_loss(bound - margin) if args.constraint != "none" else 0 * margin
    metrics = pair_metrics(chosen, rejected, rank_loss, constraint_loss, bound)
    rows, human = ranked
    own = common.over_rows(engine, scores, rows, args)[:, 0].tolist() if human else []
    metrics |= common.correlations(margin, similarity, pairs, own, human)
    columns = dict(chosen_score=chosen, rejected_score=rejected, margin=margin, similarity=similarity, bound=bound)
    lines = [dict(zip(columns, values)) for values in zip(*(column.tolist() for column in columns.values()))]
    return metrics, lines


def main(args: Args):
    process = common.start(args.seed)
    accumulation = common.accumulation_steps(args)
    config = common.engine_config(args, accumulation)
    args.model = args.model or common.on_rank_0(common.toy_model, each_machine=True)
    args.encoder = common.encoder_of(args, start=args.model)
    output_dir = common.open_output(args, OUTPUTS)
    tokenizer = common.load_tokenizer(args.model, args.trust_remote_code)

    settings = {"max_length": args.max_length, "given": args.constraint == "given"}
    encode = functools.partial(common.encode_pair, tokenizer=tokenizer, **settings)
    train_pairs, eval_pairs = common.load_data(args, encode)
    ranked = common.load_ranked(args, encode)
    train_similarity, eval_similarity = (similarities(pairs, args, process) for pairs in (train_pairs, eval_pairs))
    bounds_of(torch.cat([train_similarity, eval_similarity]), args)  # a bad one is refused before the model is loaded
    total_steps = common.total_steps(args, len(train_pairs))

    model = common.load_reward_model("--model", args.model, args, tokenizer, config, new_head=args.epochs > 0)
    engine = common.make_engine(model, args, config, total_steps, process)
    share_prefix = common.check_model(engine, model, args, process)
    options = {"share_prefix": share_prefix, "dtype": model.dtype, "device": process.device}
    collator = functools.partial(collate, pad_token_id=tokenizer.pad_token_id, **options)
    shown = ("loss", "accuracy", "margin_mean", "margin_max")
    metrics = common.Metrics(args, total_steps, shown)
    checkpoints = common.Checkpoints(metrics, args, (train_pairs, eval_pairs), engine=engine)
    common.say(f"{total_steps} steps on {len(train_pairs)} pairs, {len(eval_pairs)} held out -> {output_dir}")

    def evaluate_now(step):
        values, lines = evaluate(engine, eval_pairs, eval_similarity, ranked, args, collator)
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
                inputs, share = collator(train_pairs[rows], loss_on=args.loss_on)  # share: B K
                chosen, rejected = engine(**inputs).logits.view(-1, 2, share.shape[1]).unbind(1)  # B K    r(x, y)
                margin = chosen - rejected  # B K    m
                bound = bounds[rows]  # B    δ*
                rank_loss = ranking_loss(margin)  # B K    -log σ(m)
                constraint_loss = 0 * margin
                if args.constraint != "none":
                    constraint_loss = ranking_loss(bound[:, None] - margin)  # B K    -log σ(δ* - m)
                loss = (share * (rank_loss + constraint_loss)).sum(1).mean()
                engine.backward(loss)
                record = [(share * part).sum(1) for part in (chosen, rejected, rank_loss, constraint_loss)]
                records.append(torch.stack([*record, bound]).detach())  # 5 B
                if i < accumulation - 1:
                    engine.step()  # counts the micro batch
            rate = engine.get_lr()[0]
            (norm,) = common.optimizer_step(step, (engine, args))
            values = pair_metrics(*common.gather(torch.cat(records, 1))) | {"lr": rate, "grad_norm": norm}
            metrics.add(step, values, pairs=len(batch), tokens=tokens[batch].sum())
            if args.eval_every and step % args.eval_every == 0 and step < total_steps:
                evaluate_now(step)
            checkpoints.step_done(step)

    if total_steps:
        common.save_model(engine, model.classifier, tokenizer, output_dir / "model")
        lines = evaluate_now(total_steps)
    if process.rank == 0:
        common.plot_margins(lines, args, output_dir / "margins.png")
        common.write_file(output_dir / "eval.jsonl", "".join(map(common.json_line, lines)))  # last: the run is finished
    common.say(f"finished: look at {output_dir}/margins.png")


if __name__ == "__main__":
    common.run(main, Args, preset)
