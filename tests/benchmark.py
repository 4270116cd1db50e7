"""Useful tokens per second of a training step, and its peak memory, beside other ways to do the same step.

    python tests/benchmark.py --method reward --data pairs.json --tokenizer <model folder> --rounds 3      (dpo, sft)
    python tests/benchmark.py --method ppo --batch 16 ...
    python tests/benchmark.py --method reward --root . --root ../old ...       `ours` of two checkouts of this project

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
import importlib.util
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # before torch

import torch
import torch.nn.functional as F
import transformers

import ppo

PROMPT, ANSWER = 256, 48  # ppo: the width that `padded` pads to, and tokens sampled
CONTESTANTS = {
    "reward": ["ours", "ours_fixed", "padded", "trl"],
    "dpo": ["ours", "ours_fixed", "ours_live", "padded", "trl_skip", "trl"],
    "sft": ["ours", "trl_skip", "trl"],
    "ppo": ["ours", "padded", "trl"],
}
FLAGS = {"ours_fixed": "--constraint fixed --fixed_bound 4.5", "ours_live": "--live_reference"}


# ---------------------------------------------------------------- what all contestants see


def tldr_like(count: int) -> list[dict]:
    rng, words = random.Random(0), [word for word in (ROOT / "README.md").read_text().split() if word.isalpha()]

    def text(low, high):
        return " ".join(rng.choice(words) for _ in range(rng.randint(low, high)))

    return [{"prompt": text(250, 360) + "\n", "chosen": text(18, 34), "rejected": text(18, 34)} for _ in range(count)]


def read(path: str) -> list[dict]:
    """Pairs with the columns prompt, chosen, rejected, or of AlpacaFarm; without ties."""
    text, pairs = Path(path).read_text(encoding="utf-8"), []
    for row in json.loads(text) if text.lstrip().startswith("[") else map(json.loads, text.splitlines()):
        if "preference" in row:
            row["prompt"] = f"\n\nHuman: {row['instruction']}{row.get('input') or ''}\n\nAssistant: "
            better = 2 if row["preference"] == 2 else 1
            row["chosen"], row["rejected"] = row[f"output_{better}"], row[f"output_{3 - better}"]
        if row.get("preference") != 0 and row["chosen"] != row["rejected"]:
            pairs.append({name: row[name] for name in ("prompt", "chosen", "rejected")})
    return pairs


def tokens_of(pair: dict, tokenizer) -> tuple[list[int], list[int], list[int]]:
    """The prompt, and prompt, response and EOS of both sides."""
    prompt = tokenizer(pair["prompt"]).input_ids
    chosen, rejected = tokenizer([pair["chosen"], pair["rejected"]], add_special_tokens=False).input_ids
    return prompt, prompt + chosen + [tokenizer.eos_token_id], prompt + rejected + [tokenizer.eos_token_id]


def prepare(args, folder: Path) -> int:
    """Write the models and the rows that all contestants see; returns how many useful tokens these hold."""
    tokenizer = common.load_tokenizer(args.tokenizer or common.toy_model(), False)
    sizes = dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6, vocab_size=49152)
    special = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, num_labels=1)
    config = transformers.LlamaConfig(**sizes, **special, max_position_embeddings=2048, tie_word_embeddings=True)
    transformers.set_seed(0)
    kinds = dict(policy=transformers.LlamaForCausalLM, scorer=transformers.LlamaForSequenceClassification)
    for name, kind in kinds.items():
        kind(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    pairs = read(args.data) if args.data else tldr_like(2 * args.pairs)
    random.Random(0).shuffle(pairs)
    tokens = [(pair, *tokens_of(pair, tokenizer)) for pair in pairs[: 2 * args.pairs]]
    tokens = [(pair, *ids) for pair, *ids in tokens if max(map(len, ids)) <= args.max_length]
    if args.method == "ppo":  # a prompt with two pairs is one prompt
        tokens = [each for each in {each[0]["prompt"]: each for each in tokens}.values() if len(each[1]) <= PROMPT]
    tokens = tokens[: args.pairs // args.batch * args.batch]
    if not tokens:
        sys.exit("no row fits: pass a --tokenizer of a larger vocabulary, or another --max_length")
    pairs = [pair for pair, *_ in tokens]
    rows = [dict(prompt=p["prompt"], completion=p["chosen"]) for p in pairs] if args.method == "sft" else pairs
    for name, some in (("rows", rows), ("eval", rows[:8])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    sides = [(chosen, rejected) for *_, chosen, rejected in tokens]
    useful = sum(len(chosen) + len(rejected) * (args.method != "sft") for chosen, rejected in sides)
    prefixes = [len(os.path.commonprefix(both)) for both in sides]
    longer = [max(map(len, both)) - prefix for both, prefix in zip(sides, prefixes)]
    print(
        f"{len(rows)} rows, {useful} useful tokens, {statistics.mean(prefixes):.0f} in the prefix, "
        f"{statistics.mean(longer):.0f} in the longer response"
    )
    return len(rows) if args.method == "ppo" else useful


# ---------------------------------------------------------------- contestants: useful tokens (ppo: prompts) per second


def load(folder: Path, *names: str) -> list:
    kinds = dict(policy=transformers.AutoModelForCausalLM, scorer=transformers.AutoModelForSequenceClassification)
    return [kinds[name].from_pretrained(folder / name, dtype=torch.bfloat16) for name in names]


def train(args, rows: list, loss_of, *models) -> float:
    """Steps on loss_of(batch)[0]; of loss_of(batch)[1] the sum per second, without the first batch."""
    optimizer = torch.optim.AdamW([p for model in models for p in model.parameters()], lr=1e-5, fused=True)
    done, since = 0, None
    for start in range(0, len(rows), args.batch):
        loss, count = loss_of(rows[start : start + args.batch])
        loss.backward()
        for model in models:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done += count * (since is not None)
        since = since or time.perf_counter()
    return done / (time.perf_counter() - since)


def padded(args, folder: Path, useful: int) -> float:
    model, reference = load(folder, *["scorer" if args.method == "reward" else "policy"] * 2)
    tokenizer, at = common.load_tokenizer(str(folder / "policy"), False), torch.arange(args.max_length)
    rows = [tokens_of(json.loads(line), tokenizer) for line in open(folder / "rows.jsonl")]

    def loss_of(batch: list) -> tuple[torch.Tensor, int]:
        prompts, chosen, rejected = zip(*batch)
        ids = [row + [tokenizer.pad_token_id] * (args.max_length - len(row)) for row in chosen + rejected]
        begins, ends = (torch.tensor([*map(len, some)])[:, None] for some in (prompts * 2, chosen + rejected))
        ids = torch.tensor(ids)

        def hidden(model):
            return model.base_model(ids, attention_mask=(at < ends).long()).last_hidden_state

        def logps(model):
            where = ((at[1:] >= begins) & (at[1:] < ends)).nonzero(as_tuple=True)  # response tokens
            logits = model.lm_head(hidden(model)[:, :-1][where]).float()
            own = -F.cross_entropy(logits, ids[:, 1:][where], reduction="none")
            return torch.zeros(len(ids)).index_add(0, where[0], own)

        if args.method == "reward":
            value = model.score(hidden(model)).squeeze(-1).gather(1, ends - 1).squeeze(1).float()
        else:
            with torch.no_grad():
                base = logps(reference)
            value = 0.1 * (logps(model) - base)
        chosen, rejected = value.chunk(2)
        return F.softplus(rejected - chosen).mean(), int(ends.sum())

    return train(args, rows, loss_of, model)


def padded_ppo(args, folder: Path, useful: int) -> float:
    tokenizer = common.load_tokenizer(str(folder / "policy"), False)
    tokenizer.padding_side = "left"
    policy, reference, critic, scorer = load(folder, "policy", "policy", "scorer", "scorer")
    rows = [json.loads(line)["prompt"] for line in open(folder / "rows.jsonl")]

    def hidden(model, ids, mask):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return model.base_model(ids, attention_mask=mask, position_ids=positions).last_hidden_state

    def logps(model, ids, mask):
        logits = model.lm_head(hidden(model, ids, mask)[:, PROMPT - 1 : -1].flatten(0, 1)).float()
        return -F.cross_entropy(logits, ids[:, PROMPT:].flatten(), reduction="none").view(len(ids), -1)

    def values(model, ids, mask):
        return model.score(hidden(model, ids, mask)[:, PROMPT - 1 : -1]).squeeze(-1).float()

    def loss_of(prompts: list[str]) -> tuple[torch.Tensor, int]:
        batch = tokenizer(prompts, padding="max_length", max_length=PROMPT, return_tensors="pt")
        with torch.no_grad():
            ids = policy.generate(**batch, do_sample=True, top_k=0, max_new_tokens=ANSWER, min_new_tokens=ANSWER)
            mask = torch.cat([batch.attention_mask, torch.ones_like(ids[:, PROMPT:])], 1)
            old, base, old_values = logps(policy, ids, mask), logps(reference, ids, mask), values(critic, ids, mask)
            scores = scorer.score(hidden(scorer, ids, mask)[:, -1]).squeeze(-1).float()
            all_true = torch.ones_like(old, dtype=torch.bool)
            rewards = ppo.token_rewards(old, base, scores, all_true, 0.1)
            advantages, returns = ppo.advantages_and_returns(rewards, old_values, all_true, 1.0, 0.95)
            advantages = (advantages - advantages.mean()) / advantages.std()
        policy_loss = ppo.policy_losses(logps(policy, ids, mask), old, advantages, 0.2)[0].mean()
        value_loss = ppo.value_losses(values(critic, ids, mask), old_values, returns, 0.2)[0].mean()
        return policy_loss + value_loss, len(prompts)

    return train(args, rows, loss_of, policy, critic)


def trl(args, folder: Path, useful: int) -> float:
    import datasets
    import trl

    times = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            times.append(time.perf_counter())

    settings = dict(
        output_dir=tempfile.mkdtemp(dir=folder), per_device_train_batch_size=args.batch, learning_rate=1e-5, bf16=True,
        use_cpu=True, gradient_checkpointing=False, save_strategy="no", report_to=["tensorboard"], disable_tqdm=True,
    )  # fmt: skip
    rows = datasets.load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
    if args.method == "ppo":
        from trl.experimental.ppo import PPOConfig, PPOTrainer

        tokenizer = common.load_tokenizer(str(folder / "policy"), False)
        tokenizer.padding_side = "left"
        rows = rows.map(lambda row: {"input_ids": tokenizer(row["prompt"]).input_ids}, remove_columns=rows.column_names)
        settings |= dict(local_rollout_forward_batch_size=args.batch, num_ppo_epochs=1, num_mini_batches=1)
        settings |= dict(response_length=ANSWER, total_episodes=len(rows), num_sample_generations=0, temperature=1.0)
        names = ("model", "ref_model", "value_model", "reward_model")
        parts = dict(zip(names, load(folder, "policy", "policy", "scorer", "scorer")), processing_class=tokenizer)
        make, parts["eval_dataset"] = PPOTrainer, rows.select(range(args.batch))
        config = PPOConfig(**settings)
    else:
        if args.worker[0] == "trl_skip":
            import trl.trainer.utils

            trl.trainer.utils._use_triton = lambda device: True  # read only where it decides which positions are scored
        name = {"reward": "Reward", "dpo": "DPO", "sft": "SFT"}[args.method]
        settings |= dict(max_length=args.max_length, num_train_epochs=1, logging_steps=5)
        make, parts = getattr(trl, f"{name}Trainer"), dict(model=str(folder / args.start))
        config = getattr(trl, f"{name}Config")(**settings)
    make(args=config, train_dataset=rows, callbacks=[Clock()], **parts).train()
    return useful * (len(times) - 1) / len(times) / (times[-1] - times[0])


def call(command: list[str], folder: Path) -> tuple[str, float]:
    """What a Python program says, and its peak memory in GiB."""
    same = dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(1 << 30))  # keep freed memory
    environment = os.environ | same | {"PCRM_CACHE": tempfile.mkdtemp(dir=folder)}
    with open(folder / "said", "w") as said:
        process = subprocess.Popen([sys.executable, *command], env=environment, stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    text = (folder / "said").read_text()
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{text[-5000:]}")
    return text, usage.ru_maxrss / 2**20


def ours(args, name: str, root: str, folder: Path) -> tuple[float, float]:
    """A script's speed over all steps but the first, as for the others, and its peak memory."""
    out = Path(tempfile.mkdtemp(dir=folder))
    flags = f"--dataset {folder}/rows.jsonl --eval_dataset {folder}/eval.jsonl --output_dir {out} --epochs 1 "
    flags += f"--dtype bf16 --global_batch_size {args.batch} --log_every 5 {FLAGS.get(name, '')} "
    flags += "--generate 0 " * (args.method != "reward") + "--learning_rate 1e-5 " * (args.method != "ppo")
    if args.method == "ppo":
        flags += f"--policy_model {folder}/policy --reward_model {folder}/scorer --max_prompt_length {PROMPT} "
        flags += f"--max_new_tokens {ANSWER} --micro_batch_size {args.batch // 4}"
    else:
        flags += f"--model {folder / args.start} --max_length {args.max_length} --micro_batch_size {args.batch}"
    _, peak = call([f"{root}/{args.method}.py", *flags.split()], folder)
    lines = [line for line in map(json.loads, open(out / "metrics.jsonl")) if line["split"] == "train"]
    rows = {"sft": "rows_per_s", "ppo": "prompts_per_s"}.get(args.method, "pairs_per_s")
    seconds = [(line["step"] - last["step"]) * args.batch / line[rows] for last, line in zip(lines, lines[1:])]
    rate = "prompts_per_s" if args.method == "ppo" else "tokens_per_s"
    return sum(s * line[rate] for s, line in zip(seconds, lines[1:])) / sum(seconds), peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=list(CONTESTANTS), default="reward")
    parser.add_argument("--data", default="", help="pairs, .json or .jsonl: prompt, chosen, rejected, or AlpacaFarm's")
    parser.add_argument("--tokenizer", default="", help="a model folder whose tokenizer is used; default: the toy's")
    parser.add_argument("--pairs", type=int, default=240)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="some contestants, the first compared with the others")
    parser.add_argument(
        "--root", action="append", help="the checkout that is `ours`; of two, new and old, `ours` alone"
    )
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.start = "scorer" if args.method == "reward" else "policy"
    if args.worker:
        name, folder, useful = args.worker
        work = trl if name != "padded" else padded_ppo if args.method == "ppo" else padded
        return print("SPEED", work(args, Path(folder), int(useful)))

    unit, roots = "prompts/s" if args.method == "ppo" else "tokens/s", args.root or [str(ROOT)]
    names = args.only.split(",") if args.only else CONTESTANTS[args.method] if len(roots) == 1 else ["ours"]
    names = [name for name in names if not name.startswith("trl") or importlib.util.find_spec("trl")]
    each = [(name, root) for name in names for root in (roots if name.startswith("ours") else roots[:1])]
    speeds, memory = ({one: [] for one in each} for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        useful = prepare(args, Path(folder))
        for number in range(args.rounds):
            for name, root in each if number % 2 == 0 else each[::-1]:
                if name.startswith("ours"):
                    speed, peak = ours(args, name, root, Path(folder))
                else:
                    text, peak = call([__file__, *sys.argv[1:], "--worker", name, folder, str(useful)], Path(folder))
                    speed = float(re.search(r"SPEED (\S+)", text)[1])
                speeds[name, root].append(speed)
                memory[name, root].append(peak)
                print(f"round {number + 1} {name:11} {speed:8.4g} {unit}" + f" {root}" * (len(roots) > 1), flush=True)
    for name, root in each:
        ratios = [ours / other for ours, other in zip(speeds[each[0]], speeds[name, root])]
        print(
            f"{name:11} median {statistics.median(speeds[name, root]):8.4g} {unit}; {names[0]} is "
            f"{statistics.median(ratios):.2f} x as fast ({min(ratios):.2f} to {max(ratios):.2f}); "
            f"peak memory {max(memory[name, root]):.1f} GiB" + f" {root}" * (len(roots) > 1)
        )
    for name in names if len(roots) > 1 else []:
        new, old = (statistics.mean(speeds[name, root]) for root in roots)
        print(f"{name}: mean rate of {roots[0]} / {roots[1]} {new / old:.3f}")


if __name__ == "__main__":
    main()
