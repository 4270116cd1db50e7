"""Useful tokens per second of a training step, and its peak memory, beside other ways to do the same step.

    python tests/benchmark.py --method reward --data pairs.json --tokenizer <model folder> --rounds 3
    python tests/benchmark.py --method dpo ...
    python tests/benchmark.py --method sft ...
    python tests/benchmark.py --method ppo --batch 16 ...

Contestants, all on the same rows, batch, model (6 layers, 384 wide, 49,152 tokens, random weights), bf16, allocator and
OpenMP settings and number of threads, one after the other in each round, so that a slow minute hits all:

    ours        the script itself, through the DeepSpeed engine, with logging and TensorBoard
    ours_fixed  (reward, dpo) the same with --constraint fixed: a constrained step should cost no more
    ours_live   (dpo) the same with --live_reference
    padded      (reward, dpo, ppo) a plain loop: both sides encoded, every sequence padded to --max_length; reward:
                scores of all positions; dpo: a live reference, response positions alone through the vocabulary head;
                ppo: prompts padded on the left to 256 tokens, for sampling and learning alike
    trl         TRL's RewardTrainer, DPOTrainer, SFTTrainer or (TRL 1.12) PPOTrainer as it comes on this machine (only
                where trl is installed; it is no requirement of this project)
    trl_skip    (sft, dpo) the same, made to leave out prompt and padding in the vocabulary head, as it does on a GPU

Useful tokens count no padding, and the prompt once for each response. Without --data the lengths are those of TL;DR
comparisons: prompts of about 350 tokens, responses of about 35. The demonstrations of sft are the chosen responses. ppo
counts prompts per second, and samples 48 tokens for each.
"""

import argparse
import importlib
import importlib.util
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROMPT, ANSWER = 256, 48  # ppo: the width that `padded` pads to, and tokens sampled
sys.path.insert(0, str(ROOT))
CONTESTANTS = {
    "reward": ["ours", "ours_fixed", "padded", "trl"],
    "dpo": ["ours", "ours_fixed", "ours_live", "padded", "trl_skip", "trl"],
    "sft": ["ours", "trl_skip", "trl"],
    "ppo": ["ours", "padded", "trl"],
}


def tldr_like(count: int) -> list[dict]:
    rng = random.Random(0)
    words = [line.split() for line in (ROOT / "README.md").read_text().splitlines()]
    words = [w for line in words for w in line if w.isalpha()]

    def text(low, high):
        return " ".join(rng.choice(words) for _ in range(rng.randint(low, high)))

    return [{"prompt": text(250, 360) + "\n", "chosen": text(18, 34), "rejected": text(18, 34)} for _ in range(count)]


def prepare(args, folder: Path) -> None:
    """Write the model, the rows that all contestants see, and how many useful tokens they hold."""
    import common  # before torch

    import transformers

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
        **({"num_labels": 1} if args.method == "reward" else {}),
    )
    transformers.set_seed(0)
    kind = transformers.LlamaForSequenceClassification if args.method == "reward" else transformers.LlamaForCausalLM
    kind(config).save_pretrained(folder / "model")
    if args.method == "ppo":
        config.num_labels = 1
        transformers.LlamaForSequenceClassification(config).save_pretrained(folder / "reward")
        tokenizer.save_pretrained(folder / "reward")
    tokenizer.save_pretrained(folder / "model")
    rows = common.read_rows("--data", args.data, "train") if args.data else tldr_like(2 * args.pairs)
    texts = [texts for texts in map(text_of, rows) if texts]
    random.Random(0).shuffle(texts)
    pairs = [pair for pair in (encoded(row, tokenizer, args) for row in texts[: 2 * args.pairs]) if pair]
    if args.method == "ppo":  # a prompt with two pairs is one prompt
        pairs = [p for p in {p["prompt"]: p for p in pairs}.values() if len(tokenizer(p["prompt"]).input_ids) <= PROMPT]
    pairs = pairs[: args.pairs // args.batch * args.batch]
    if not pairs:
        sys.exit("no row fits: pass a --tokenizer of a larger vocabulary, or another --max_length")
    with open(folder / "rows.jsonl", "w") as file:
        for p in pairs:
            row = {name: p[name] for name in ("prompt", "chosen", "rejected")}
            row = {"prompt": p["prompt"], "completion": p["chosen"]} if args.method == "sft" else row
            file.write(json.dumps(row) + "\n")
    (folder / "eval.jsonl").write_text("".join((folder / "rows.jsonl").read_text().splitlines(True)[:8]))
    sides = [p["chosen_ids"] for p in pairs] + ([] if args.method == "sft" else [p["rejected_ids"] for p in pairs])
    tokens = sum(map(len, sides))
    (folder / "facts.json").write_text(json.dumps({"rows": len(pairs), "tokens": tokens}))
    longer = [max(len(p["chosen_ids"]), len(p["rejected_ids"])) - p["prefix"] for p in pairs]
    print(
        f"{len(pairs)} rows, {tokens} useful tokens, {statistics.mean(p['prefix'] for p in pairs):.0f} in the prefix, "
        f"{statistics.mean(longer):.0f} in the longer response"
    )


def text_of(row: dict) -> dict | None:
    """A row of any known format as a pair of texts; None if it cannot be used."""
    import common

    try:
        prompt, chosen, rejected = common.preference_of(row)
    except common.Unusable:
        return None
    return dict(prompt=prompt, chosen=chosen, rejected=rejected) if chosen != rejected else None


def encoded(row: dict, tokenizer, args) -> dict | None:
    """The columns of a pair as the script makes them; None if it is too long."""
    import common

    try:
        return common.encode_pair(row, tokenizer, args.max_length, needs_prompt=args.method == "dpo")
    except common.Unusable:
        return None


def ours_ppo(args, folder: Path) -> float:
    import common

    import ppo

    out = tempfile.mkdtemp(dir=folder)
    argv = (
        f"--policy_model {folder}/model --reward_model {folder}/reward --output_dir {out} --generate 0 "
        f"--dataset {folder}/rows.jsonl --eval_dataset {folder}/rows.jsonl --max_prompt_length {PROMPT} "
        f"--max_new_tokens {ANSWER} --epochs 1 --dtype bf16 --global_batch_size {args.batch} "
        f"--micro_batch_size {args.batch // 4} --log_every 1"
    ).split()
    ppo.main(common.parse_args(ppo.Args, ppo.preset, argv))
    lines = [json.loads(line) for line in open(Path(out) / "metrics.jsonl")]
    return statistics.harmonic_mean(line["prompts_per_s"] for line in lines[1:])  # without the first step


def padded_ppo(args, folder: Path, facts: dict) -> float:
    import common

    import torch
    import torch.nn.functional as F
    import transformers

    import ppo

    tokenizer = common.load_tokenizer(str(folder / "model"), False)
    tokenizer.padding_side = "left"
    policy, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16) for _ in range(2)
    )
    critic, scorer = (
        transformers.AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=torch.bfloat16)
        for _ in range(2)
    )
    optimizer = torch.optim.AdamW([*policy.parameters(), *critic.parameters()], lr=1e-5, fused=True)

    def hidden(model, ids, mask):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return model.base_model(ids, attention_mask=mask, position_ids=positions).last_hidden_state

    def logps(model, ids, mask):
        logits = model.lm_head(hidden(model, ids, mask)[:, PROMPT - 1 : -1].flatten(0, 1)).float()
        return -F.cross_entropy(logits, ids[:, PROMPT:].flatten(), reduction="none").view(len(ids), -1)

    def values(model, ids, mask):
        return model.score(hidden(model, ids, mask)[:, PROMPT - 1 : -1]).squeeze(-1).float()

    prompts, since, done = [json.loads(line)["prompt"] for line in open(folder / "rows.jsonl")], None, 0
    for start in range(0, len(prompts), args.batch):
        batch = tokenizer(
            prompts[start : start + args.batch], padding="max_length", max_length=PROMPT, return_tensors="pt"
        )
        with torch.no_grad():
            ids = policy.generate(
                batch.input_ids,
                attention_mask=batch.attention_mask,
                do_sample=True,
                top_k=0,
                max_new_tokens=ANSWER,
                min_new_tokens=ANSWER,
            )
            mask = torch.cat([batch.attention_mask, torch.ones_like(ids[:, PROMPT:])], 1)
            old, base, old_values = logps(policy, ids, mask), logps(reference, ids, mask), values(critic, ids, mask)
            scores = scorer.score(hidden(scorer, ids, mask)[:, -1]).squeeze(-1).float()
            all_true = torch.ones_like(old, dtype=torch.bool)
            rewards = ppo.token_rewards(old, base, scores, all_true, 0.1)
            advantages, returns = ppo.advantages_and_returns(rewards, old_values, all_true, 1.0, 0.95)
            advantages = (advantages - advantages.mean()) / advantages.std()
        policy_loss = ppo.policy_losses(logps(policy, ids, mask), old, advantages, 0.2)[0].mean()
        value_loss = ppo.value_losses(values(critic, ids, mask), old_values, returns, 0.2)[0].mean()
        (policy_loss + value_loss).backward()
        for model in (policy, critic):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if since is None:
            since = time.perf_counter()
        else:
            done += args.batch
    return done / (time.perf_counter() - since)


def trl_ppo(args, folder: Path, facts: dict) -> float:
    import datasets
    import torch
    import transformers
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, arguments, state, control, **kwargs):
            self.last = time.perf_counter()
            self.steps = getattr(self, "steps", 0) + 1
            if self.steps == 1:
                self.first = self.last

    import common

    tokenizer, clock = common.load_tokenizer(str(folder / "model"), False), Clock()
    tokenizer.padding_side = "left"
    rows = datasets.load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
    rows = rows.map(lambda row: {"input_ids": tokenizer(row["prompt"]).input_ids}, remove_columns=rows.column_names)
    policy, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16) for _ in range(2)
    )
    critic, scorer = (
        transformers.AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=torch.bfloat16)
        for _ in range(2)
    )
    config = PPOConfig(
        output_dir=tempfile.mkdtemp(dir=folder),
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=1,
        local_rollout_forward_batch_size=args.batch,
        num_ppo_epochs=1,
        num_mini_batches=1,
        response_length=ANSWER,
        total_episodes=facts["rows"],
        num_sample_generations=0,
        temperature=1.0,
        use_cpu=True,
        bf16=True,
        gradient_checkpointing=False,
        learning_rate=1e-5,
        save_strategy="no",
        report_to=["tensorboard"],
        disable_tqdm=True,
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=scorer,
        value_model=critic,
        train_dataset=rows,
        eval_dataset=rows.select(range(args.batch)),
        callbacks=[clock],
    )
    trainer.train()
    return args.batch * (clock.steps - 1) / (clock.last - clock.first)


def ours(args, folder: Path, *flags: str) -> float:
    import common

    os.environ["PCRM_CACHE"] = tempfile.mkdtemp(dir=folder)
    script = importlib.import_module(args.method)
    out = tempfile.mkdtemp(dir=folder)
    argv = (
        f"--model {folder}/model --dataset {folder}/rows.jsonl --eval_dataset {folder}/eval.jsonl --output_dir {out} "
        f"--max_length {args.max_length} --epochs 1 --dtype bf16 --global_batch_size {args.batch} --log_every 5 "
        f"--micro_batch_size {args.batch} --zero_stage {args.zero_stage} --learning_rate 1e-5"
    ).split() + [*flags, *([] if args.method == "reward" else ["--generate", "0"])]
    script.main(common.parse_args(script.Args, script.preset, argv))
    lines = [json.loads(line) for line in open(Path(out) / "metrics.jsonl")]
    lines = [line for line in lines if line["split"] == "train"][1:]  # without the first step, as for the others
    steps = [b["step"] - a["step"] for a, b in zip([{"step": 1}, *lines], lines)]
    rate = "rows_per_s" if args.method == "sft" else "pairs_per_s"
    seconds = [n * args.batch / line[rate] for n, line in zip(steps, lines)]
    return sum(s * line["tokens_per_s"] for s, line in zip(seconds, lines)) / sum(seconds)


def padded(args, folder: Path, facts: dict) -> float:
    import common

    import torch
    import torch.nn.functional as F
    import transformers

    tokenizer = common.load_tokenizer(str(folder / "model"), False)
    kind = "AutoModelForSequenceClassification" if args.method == "reward" else "AutoModelForCausalLM"
    load = getattr(transformers, kind).from_pretrained
    model = load(folder / "model", dtype=torch.bfloat16)
    reference = load(folder / "model", dtype=torch.bfloat16) if args.method == "dpo" else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    pairs = [encoded(json.loads(line), tokenizer, args) for line in open(folder / "rows.jsonl")]

    def scores(model, ids):
        hidden = model.base_model(ids, attention_mask=(ids != tokenizer.pad_token_id).long()).last_hidden_state
        return model.score(hidden).squeeze(-1)[torch.arange(len(ids)), ends].float()

    def logps(model, ids):
        hidden = model.base_model(ids, attention_mask=(ids != tokenizer.pad_token_id).long()).last_hidden_state
        where = is_response.nonzero(as_tuple=True)
        logits = model.lm_head(hidden[:, :-1][where]).float()
        own = -F.cross_entropy(logits, ids[:, 1:][where], reduction="none")
        return torch.zeros(len(ids)).index_add(0, where[0], own)

    tokens, since = 0, None
    for start in range(0, len(pairs), args.batch):
        batch = pairs[start : start + args.batch]
        rows = [p["chosen_ids"] for p in batch] + [p["rejected_ids"] for p in batch]
        ids = torch.full((len(rows), args.max_length), tokenizer.pad_token_id)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        ends = torch.tensor([len(row) - 1 for row in rows])
        if args.method == "reward":
            value = scores(model, ids)
        else:
            begins = torch.tensor([len(p["prompt_ids"]) for p in batch] * 2)
            places = torch.arange(1, args.max_length)
            is_response = (places >= begins[:, None]) & (places <= ends[:, None])
            with torch.no_grad():
                base = logps(reference, ids)
            value = 0.1 * (logps(model, ids) - base)
        chosen, rejected = value.chunk(2)
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
    import trl
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, arguments, state, control, **kwargs):
            self.last = time.perf_counter()
            if state.global_step == 1:
                self.first = self.last

    if args.worker == "trl_skip":
        import trl.trainer.utils

        trl.trainer.utils._use_triton = lambda device: True  # read only where it decides which positions are scored
    clock, name = Clock(), {"reward": "Reward", "dpo": "DPO", "sft": "SFT"}[args.method]
    config = getattr(trl, f"{name}Config")(
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
    rows = datasets.load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
    trainer = getattr(trl, f"{name}Trainer")(f"{folder}/model", args=config, train_dataset=rows, callbacks=[clock])
    trainer.train()
    steps = facts["rows"] // args.batch
    return facts["tokens"] * (steps - 1) / steps / (clock.last - clock.first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=list(CONTESTANTS), default="reward")
    parser.add_argument("--data", default="", help="preference pairs in any format that reward.py reads")
    parser.add_argument("--tokenizer", default="", help="a model folder whose tokenizer is used; default: the toy's")
    parser.add_argument("--pairs", type=int, default=240)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--zero_stage", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="some contestants, the first compared with the others")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        folder = Path(args.folder)
        facts = json.loads((folder / "facts.json").read_text())
        flags = {"ours_fixed": "--constraint fixed --fixed_bound 4.5".split(), "ours_live": ["--live_reference"]}
        if args.method == "ppo":
            workers = {"ours": lambda *a: ours_ppo(*a[:2]), "padded": padded_ppo, "trl": trl_ppo}
            speed = workers[args.worker](args, folder, facts)
        elif args.worker.startswith("ours"):
            speed = ours(args, folder, *flags.get(args.worker, []))
        else:
            speed = {"padded": padded, "trl": trl, "trl_skip": trl}[args.worker](args, folder, facts)
        print(f"SPEED {speed} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}")
        return

    names = args.only.split(",") if args.only else CONTESTANTS[args.method]
    unit = "prompts/s" if args.method == "ppo" else "tokens/s"
    names = [n for n in names if not n.startswith("trl") or importlib.util.find_spec("trl")]
    # The same for all: keep freed memory in the process, and let idle threads sleep.
    environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(1 << 30)}
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    speeds, memory = {name: [] for name in names}, {name: [] for name in names}
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
                memory[name].append(float(speed[0].split()[2]))
                print(f"round {round_number + 1} {name:11} {speeds[name][-1]:8.4g} {unit}", flush=True)
    for name in names:
        ratios = [ours / other for ours, other in zip(speeds[names[0]], speeds[name])]
        print(
            f"{name:11} median {statistics.median(speeds[name]):8.4g} {unit}; {names[0]} is "
            f"{statistics.median(ratios):.2f} x as fast ({min(ratios):.2f} to {max(ratios):.2f}); "
            f"peak memory {max(memory[name]):.1f} GiB"
        )


if __name__ == "__main__":
    main()
