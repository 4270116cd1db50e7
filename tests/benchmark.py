"""Useful tokens per second of reward.py beside two other ways to do the same step, on this machine.

    python tests/benchmark.py --data pairs.json --tokenizer <model folder> --rounds 3

Contestants, all on the same pairs, batch, model (6 layers, 384 wide, 49,152 tokens, random weights), bf16, allocator
settings and number of threads, one after the other in each round, so that a slow minute hits all:

    ours        python reward.py, through the DeepSpeed engine, with logging and TensorBoard
    ours_fixed  the same with --constraint fixed: a constrained step should cost no more
    padded      a plain loop: both sides encoded, every sequence padded to --max_length, scores of all positions
    trl         trl.RewardTrainer (only where trl is installed; it is no requirement of this project)

Useful tokens count no padding, and the prompt once for each response. Without --data the lengths are those of TL;DR
comparisons: prompts of about 350 tokens, responses of about 35.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def tldr_like(count: int) -> list[dict]:
    rng = random.Random(0)
    words = [line.split() for line in (ROOT / "README.md").read_text().splitlines()]
    words = [w for line in words for w in line if w.isalpha()]

    def text(low, high):
        return " ".join(rng.choice(words) for _ in range(rng.randint(low, high)))

    return [{"prompt": text(250, 360) + "\n", "chosen": text(18, 34), "rejected": text(18, 34)} for _ in range(count)]


def prepare(args, folder: Path) -> None:
    """Write the model, the pairs that all contestants see, and how many useful tokens they hold."""
    import transformers

    import common
    import reward

    tokenizer = common.load_tokenizer(args.tokenizer or common.toy_model(), False)
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        num_labels=1,
    )
    transformers.set_seed(0)
    transformers.LlamaForSequenceClassification(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = list(common.read_rows("--data", args.data, "train")) if args.data else tldr_like(2 * args.pairs)
    pairs = [reward.Pair(*p) for p in (reward.parse_pair(row, "") for row in rows) if not isinstance(p, str)]
    random.Random(0).shuffle(pairs)
    pairs = reward.tokenize(pairs[: 2 * args.pairs], tokenizer, args.max_length, Counter())
    pairs = pairs[: args.pairs // args.batch * args.batch]
    with open(folder / "pairs.jsonl", "w") as file:
        for p in pairs:
            file.write(json.dumps({"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected}) + "\n")
    (folder / "eval.jsonl").write_text("".join((folder / "pairs.jsonl").read_text().splitlines(True)[:8]))
    tokens = sum(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    (folder / "facts.json").write_text(json.dumps({"pairs": len(pairs), "tokens": tokens}))
    print(
        f"{len(pairs)} pairs, {tokens} useful tokens, {statistics.mean(p.prefix for p in pairs):.0f} in the prefix, "
        f"{statistics.mean(max(p.branch_lengths) for p in pairs):.0f} in the longer response"
    )


def ours(args, folder: Path, constraint: str) -> float:
    import common
    import reward

    out = tempfile.mkdtemp(dir=folder)
    argv = [
        "--model",
        str(folder / "model"),
        "--dataset",
        str(folder / "pairs.jsonl"),
        "--eval_dataset",
        str(folder / "eval.jsonl"),
        "--output_dir",
        out,
        "--constraint",
        constraint,
        "--fixed_bound",
        "4.5",
        "--max_length",
        str(args.max_length),
        "--epochs",
        "1",
        "--global_batch_size",
        str(args.batch),
        "--micro_batch_size",
        str(args.batch),
        "--dtype",
        "bf16",
        "--log_every",
        "5",
        "--zero_stage",
        str(args.zero_stage),
        "--learning_rate",
        "1e-5",
    ]
    reward.main(common.parse_args(reward.Args, reward.preset, argv))
    lines = [json.loads(line) for line in open(Path(out) / "metrics.jsonl")]
    lines = [line for line in lines if line["split"] == "train"][1:]  # without the first step, as for the others
    steps = [b["step"] - a["step"] for a, b in zip([{"step": 1}, *lines], lines)]
    seconds = sum(n * args.batch / line["pairs_per_s"] for n, line in zip(steps, lines))
    return sum(n * args.batch / line["pairs_per_s"] * line["tokens_per_s"] for n, line in zip(steps, lines)) / seconds


def padded(args, folder: Path, facts: dict) -> float:
    import torch
    import torch.nn.functional as F
    import transformers

    import common
    import reward

    tokenizer = common.load_tokenizer(str(folder / "model"), False)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    pairs = [reward.Pair(**json.loads(line)) for line in open(folder / "pairs.jsonl")]
    reward.tokenize(pairs, tokenizer, args.max_length, Counter())
    tokens, since = 0, None
    for start in range(0, len(pairs), args.batch):
        batch = pairs[start : start + args.batch]
        rows = [p.chosen_ids for p in batch] + [p.rejected_ids for p in batch]
        ids = torch.full((len(rows), args.max_length), tokenizer.pad_token_id)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.from_numpy(row)
        hidden = model.base_model(ids, attention_mask=(ids != tokenizer.pad_token_id).long()).last_hidden_state
        scores = model.score(hidden).squeeze(-1)
        scores = scores[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])].float()
        chosen, rejected = scores.chunk(2)
        F.softplus(rejected - chosen).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if since is None:
            since = time.perf_counter()
        else:
            tokens += sum(len(row) for row in rows)
    return tokens / (time.perf_counter() - since)


def trl(args, folder: Path, facts: dict) -> float:
    import datasets
    from transformers import TrainerCallback
    from trl import RewardConfig, RewardTrainer

    class Clock(TrainerCallback):
        def on_step_end(self, arguments, state, control, **kwargs):
            self.last = time.perf_counter()
            if state.global_step == 1:
                self.first = self.last

    clock = Clock()
    config = RewardConfig(
        output_dir=tempfile.mkdtemp(dir=folder),
        per_device_train_batch_size=args.batch,
        max_length=args.max_length,
        bf16=True,
        use_cpu=True,
        num_train_epochs=1,
        learning_rate=1e-5,
        logging_steps=5,
        save_strategy="no",
        gradient_checkpointing=False,
        report_to=["tensorboard"],
        disable_tqdm=True,
    )
    rows = datasets.load_dataset("json", data_files=str(folder / "pairs.jsonl"), split="train")
    trainer = RewardTrainer(str(folder / "model"), args=config, train_dataset=rows, callbacks=[clock])
    trainer.train()
    steps = facts["pairs"] // args.batch
    return facts["tokens"] * (steps - 1) / steps / (clock.last - clock.first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="preference pairs in any format that reward.py reads")
    parser.add_argument("--tokenizer", default="", help="a model folder whose tokenizer is used; default: the toy's")
    parser.add_argument("--pairs", type=int, default=240)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--zero_stage", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="ours,ours_fixed,padded,trl")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        folder = Path(args.folder)
        facts = json.loads((folder / "facts.json").read_text())
        if args.worker.startswith("ours"):
            speed = ours(args, folder, "fixed" if args.worker == "ours_fixed" else "none")
        else:
            speed = {"padded": padded, "trl": trl}[args.worker](args, folder, facts)
        print(f"SPEED {speed}")
        return

    import importlib.util

    names = [n for n in args.only.split(",") if n != "trl" or importlib.util.find_spec("trl")]
    # The same for all: keep freed memory in the process.
    environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}
    speeds = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        prepare(args, Path(folder))
        for round_number in range(args.rounds):
            for name in names if round_number % 2 == 0 else names[::-1]:
                command = [sys.executable, __file__, *sys.argv[1:], "--worker", name, "--folder", folder]
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                speed = [line for line in done.stdout.splitlines() if line.startswith("SPEED")]
                if not speed:
                    sys.exit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
                speeds[name].append(float(speed[0].split()[1]))
                print(f"round {round_number + 1} {name:11} {speeds[name][-1]:8.0f} tokens/s", flush=True)
    for name in names:
        ratios = [ours / other for ours, other in zip(speeds[names[0]], speeds[name])]
        print(
            f"{name:11} median {statistics.median(speeds[name]):8.0f} tokens/s; {names[0]} is "
            f"{statistics.median(ratios):.2f} x as fast ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
