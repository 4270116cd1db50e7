"""The experiments that decide what the bound and its prior are worth. report.py makes tables and pictures of them.

    python tests/evidence.py                     makes what tests/evidence.jsonl lacks
    python tests/evidence.py --results new.jsonl --folder new                     all of it again, from nothing
    python tests/evidence.py --make real --model <language model> --encoder <text encoder> --data <pairs> ...

A run adds a line to the results: experiment, arm, seed, settings, figures. Runs are paired: all arms of a seed have the
same data, start, order, prompts and samples. No β was chosen by the gold score. Several of these processes may work at
once (--seeds, --make, --arms); they wait for each other where one needs another's model.

The task is the embedded one, made harder, and drawn anew for each seed. Gold is `toy_data.gold_score`, but "Have a nice
day!" costs a point each time; in all answers of the data it ends 80 % of those that name the right aisle and 10 % of
the others, so it goes with quality there, while a policy may say it anywhere. 15 % of the labels drawn from gold are
turned round. Of 4,000 pairs (800 held out) half are two answers drawn independently, a quarter near copies in which a
sentence that gold knows differs, a quarter near copies of equal gold (another wording), whose labels are coins.

Experiments
    embedded  the data of data/ as it is and reward.py's defaults (5 epochs), also with the loss on each token
    reward  8 ways to train x 1, 3, 5, 15 epochs: ranking, calibration, best-of-n, how often the bound binds
    ppo     reward model (none, cos_sim; 15 epochs) x units (its own; the other's spread σ₀), with the score clip and
            without; 160 steps
    spread  the question of ppo again, on seeds 6 to 15 and one machine: reward models none and cos_sim after 15 epochs,
            none after 5 (early stopping, the rival that costs nothing), each score divided by its model's own σ₀ over
            one pool of 4,608 answers; no score clip
    dpo     none, cos_sim, fixed 1, label smoothing, IPO; gold and KL at checkpoints
    real    a real language model on real pairs: none, cos_sim, cos_sim shuffled; 1 and 3 epochs

Predictions and outcomes are in EVIDENCE.md. Of `spread`, named before its runs:
    End points: gold, mean of the last 30 steps (it decides); gold at √KL 1.5 and at 2; growth of the score over σ₀ in
    the last 30. Intervals are Student's t over the paired differences of the seeds, 95 %. `cos_sim` is better (worse)
    than another arm where the interval of gold lies above (below) 0; a tie is an interval within ±1 that holds 0;
    all else is undecided. Prediction: undecided against `none` after 15 epochs, worse than `none` after 5. The phrase
    becomes more frequent and right aisles rarer wherever gold turns down.
"""

import argparse
import functools
import json
import os
import platform
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import common  # before torch

import deepspeed
import filelock
import numpy as np
import torch
import toy_data as toy
import transformers
from helpers import lines
from scipy.special import comb, expit
from scipy.stats import spearmanr
from torch.nn.utils.rnn import pad_sequence

import dpo
import ppo
import priors
import reward
import sft

FLIPPED = 0.15  # labels turned round
PAIRS = {"train": 4000, "eval": 800, "real": 1500}
HACK = "Have a nice day!"
FIXED, SMOOTHING = 4.5, float(expit(-4.5 / 2))  # label smoothing with the optimum of fixed 4.5
ARMS = {  # in the order of the tables
    "embedded": "none cos_sim none+token cos_sim+token".split(),
    "reward": "none len_rat cos_sim len_rat+shuffle cos_sim+shuffle fixed random smoothing".split(),
    "ppo": [arm + clip for clip in ("", "/no clip") for arm in "none/own none/other cos_sim/own cos_sim/other".split()],
    "spread": "none/15 cos_sim/15 none/5".split(),
    "dpo": "none cos_sim fixed smoothing IPO".split(),
    "real": "none cos_sim cos_sim+shuffle".split(),
}
EPOCHS, LONG = (1, 3, 5, 15), 15  # 15: until the model knows labels by heart; PPO's reward models
# Answers to a prompt: of SFT for best-of-n and for the spread of scores, of DPO.
BEST_OF, POOL, SPREAD_POOL, ANSWERS = [2**k for k in range(9)], 512, 96, 10
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---------------------------------------------------------------- the task


def gold(prompt: str, answer: str) -> float:
    parts = toy.sentences(answer)
    return toy.gold_score(prompt, " ".join(part for part in parts if part != HACK)) - parts.count(HACK)


def answer(rng: random.Random, good: str, right: float = 0.5) -> list[str]:
    parts = [part for part in toy.answer(rng, good, right) if part != HACK]
    named = any(f"aisle {toy.AISLE_OF[good]}." in part.lower() for part in parts)
    return parts + [HACK] * (rng.random() < (0.8 if named else 0.1))


def reworded(rng: random.Random, good: str, parts: list[str]) -> list[str]:
    """The same answer with one sentence said in another way."""
    parts, i = list(parts), rng.randrange(len(parts))
    locations = [text.format(good=good, aisle="".join(filter(str.isdigit, parts[i]))) for text in toy.LOCATIONS]
    for alike in (toy.POLITE[:3], toy.RUDE, toy.FILLER, locations):
        if parts[i] in alike:
            parts[i] = rng.choice(alike)
    return parts


def pair(rng: random.Random, prompt: str, good: str, kind: str) -> dict:
    change = {"near": toy.edited, "equal": reworded}.get(kind, lambda rng, good, parts: answer(rng, good))
    a, b, difference = "", "", 0.0
    while a == b or kind != "far" and (difference == 0) != (kind == "equal"):
        a = answer(rng, good)
        a, b = " ".join(a), " ".join(change(rng, good, a))
        difference = gold(prompt, a) - gold(prompt, b)
    a_wins = (rng.random() < expit(difference)) != (rng.random() < FLIPPED)
    chosen, rejected, difference = (a, b, difference) if a_wins else (b, a, -difference)
    return dict(prompt=prompt, chosen=chosen, rejected=rejected, gold=difference, kind=kind)


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def build(folder: Path, seed: int) -> None:
    """Write the data of a seed."""
    rng = random.Random(seed)
    asked = [(toy.prompt_text(o, q, g), g) for o in toy.OPENINGS for q in toy.QUESTIONS for g in toy.AISLE_OF]
    rng.shuffle(asked)
    folder.mkdir(parents=True, exist_ok=True)
    for split, source, count in (("eval", asked[:48], 100), ("train", asked[48:], 1000)):
        kinds = ["far", "near", "far", "equal"] * (PAIRS[split] // 4)
        write(folder / f"pairs_{split}.jsonl", [pair(rng, *rng.choice(source), kind) for kind in kinds])
        chosen = [(prompt, " ".join(answer(rng, good, 0.75))) for prompt, good in rng.choices(source, k=count)]
        write(folder / f"sft_{split}.jsonl", [dict(prompt=prompt, completion=text) for prompt, text in chosen])
        write(folder / f"prompts_{split}.jsonl", [dict(prompt=prompt) for prompt, _ in source])


# ---------------------------------------------------------------- runs


class Seed:
    """The data and models of a seed."""

    def __init__(self, args, seed: int):
        self.args, self.seed, self.folder = args, seed, args.folder / f"seed-{seed}"
        self.once("prompts_train.jsonl", lambda _: build(self.folder, seed))

    def once(self, name: str, work, last: str = "") -> Path:
        """A file or folder; what is missing, or lacks its last file, work(path) makes, in one process at a time."""
        path = self.folder / name
        with filelock.FileLock(f"{path}.lock"):
            if not (path / last).exists():
                work(path)
        return path

    def run(self, script, name: str, flags: str, **patches) -> Path:
        """The folder of a finished run; patches replace functions of the script while it runs."""
        argv = f"--output_dir {self.folder / name} --seed {self.seed} --log_every 1 {flags}".split()
        args = common.parse_args(script.Args, script.preset, argv)
        with mock.patch.dict(vars(script), patches):
            return self.once(name, lambda _: script.main(args), script.OUTPUTS[-1])

    def data(self, name: str) -> str:
        return f"--dataset {self.folder}/{name}_train.jsonl --eval_dataset {self.folder}/{name}_eval.jsonl"

    def sft(self) -> Path:
        return self.run(sft, "sft", self.data("sft")) / "model"

    def reward(self, arm: str, epochs: int) -> Path:
        return self.arm(f"reward-{arm}-{epochs}", arm, f"--model {self.sft()} {self.data('pairs')} --epochs {epochs}")

    def arm(self, name: str, arm: str, flags: str = "") -> Path:
        """A run of reward.py; an arm is a constraint, +shuffle with bounds dealt to other pairs, +token per token."""
        constraint, *more = arm.replace("smoothing", "none+smoothing").split("+")
        flags += f" --constraint {constraint} --fixed_bound {FIXED}"
        flags += " --shuffle_bounds" * ("shuffle" in more) + " --loss_on token" * ("token" in more)
        smooth = functools.partial(priors.ranking_loss, label_smoothing=SMOOTHING)
        return self.run(reward, name, flags, **{"ranking_loss": smooth} if "smoothing" in more else {})

    def pool(self, count: int) -> list[dict]:
        """SFT answers to the held-out prompts, `count` to each, with their gold scores."""
        start, prompts = self.sft(), lines(self.folder / "prompts_eval.jsonl")
        prompts = [row["prompt"] for row in prompts for _ in range(count)]

        def work(path: Path) -> None:
            tokenizer = transformers.AutoTokenizer.from_pretrained(start, padding_side="left")
            model, answers = transformers.AutoModelForCausalLM.from_pretrained(start).eval().to(DEVICE), []
            torch.manual_seed(self.seed)
            for part in (prompts[i : i + 512] for i in range(0, len(prompts), 512)):
                inputs = tokenizer(part, return_tensors="pt", padding=True, return_token_type_ids=False).to(DEVICE)
                output = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=96)
                answers += tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
            write(path, [dict(prompt=p, answer=a, gold=gold(p, a)) for p, a in zip(prompts, answers)])

        return lines(self.once(f"pool-{count}.jsonl", work))


def some(records: list[dict], **wanted) -> list[dict]:
    return [record for record in records if all(record[name] == value for name, value in wanted.items())]


def held_out(run: Path, *names: str) -> list[np.ndarray]:
    """Columns of a run's eval.jsonl."""
    rows = lines(run / "eval.jsonl")
    return [np.array([row[name] for row in rows], float) for name in names]


@torch.no_grad()
def scores(folder: Path, rows: list[dict]) -> np.ndarray:
    """A reward model's scores of rows with `prompt` and `answer`."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval().to(DEVICE)
    texts, ids, result, eos = [(row["prompt"], row["answer"]) for row in rows], {}, {}, [tokenizer.eos_token_id]
    for prompt, text in dict.fromkeys(texts):
        ids[prompt, text] = tokenizer(prompt).input_ids + tokenizer(text, add_special_tokens=False).input_ids + eos
    order = sorted(ids, key=lambda text: len(ids[text]))
    for part in (order[i : i + 64] for i in range(0, len(order), 64)):  # twice as fast as 512 on a CPU
        batch = tokenizer.pad({"input_ids": [ids[text] for text in part]}, padding_side="right", return_tensors="pt")
        result |= zip(part, model(**batch.to(DEVICE)).logits[:, 0].tolist())
    return np.array([result[text] for text in texts])


# ---------------------------------------------------------------- figures of a run


def inverse_link(margin: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """P(chosen is better) at which a margin is the optimum of the bounded loss, without a bound (inf) σ(m): where
    p L'(m) = (1 - p) L'(-m), with L' = -σ(-m) + σ(m - δ*)."""
    upper, lower = expit(margin - bound), expit(-margin - bound)
    return (expit(margin) - lower) / (1 - upper - lower)


def tenths(confidence: np.ndarray) -> list[np.ndarray]:
    """Which of the confidences are in each tenth of 0.5 to 1."""
    return [(confidence * 20 - 10).astype(int).clip(0, 9) == tenth for tenth in range(10)]


def calibration(p: np.ndarray) -> dict[str, float]:
    """Of P(chosen is better) for pairs whose chosen one is the label's: negative log-likelihood, Brier score, and the
    expected calibration error, over the confidence of the side that the model prefers."""
    p = p.clip(1e-6, 1 - 1e-6)
    confidence, right = np.maximum(p, 1 - p), p > 0.5
    error = sum(abs(confidence[part].sum() - right[part].sum()) for part in tenths(confidence)) / len(p)
    return {"nll": -np.log(p).mean(), "brier": ((1 - p) ** 2).mean(), "ece": error}


def tempered(margin: np.ndarray) -> np.ndarray:
    """σ(m / T), T fitted on one half of the pairs for the other."""
    result = np.empty(len(margin))
    for half in (0, 1):
        best = min(np.geomspace(0.1, 20, 200), key=lambda t: np.logaddexp(0, -margin[half::2] / t).mean())
        result[1 - half :: 2] = expit(margin[1 - half :: 2] / best)
    return result


def best_of_n(proxy: np.ndarray, value: np.ndarray) -> list[float]:
    """Unbiased estimate of the mean value of the best of n by proxy, for each n, from prompts x POOL samples."""
    ranked = np.take_along_axis(value, proxy.argsort(1, kind="stable"), 1).mean(0)  # worst first
    worse, count = np.arange(len(ranked)), len(ranked)
    # With n - 1 of those that are worse, one is the best of n: in so many of all ways to take n.
    return [float(comb(worse, n - 1) / comb(count, n) @ ranked) for n in BEST_OF]


def over(margin: np.ndarray, bound: np.ndarray) -> dict[str, float]:
    """The shares of pairs with m > δ*/2 and m > δ*; NaN where there is no bound."""
    known = np.nan if np.isnan(bound).any() else 1.0
    return {"half": known * (margin > bound / 2).mean(), "whole": known * (margin > bound).mean()}


def embedded_record(seed: Seed, arm: str, _) -> dict:
    out, rows = seed.arm(f"embedded-{arm}", arm), lines(common.DATA / "preference_eval.jsonl")
    last, (similarity, margin, bound) = lines(out / "metrics.jsonl")[-1], held_out(out, "similarity", "margin", "bound")
    true = np.subtract(*([toy.gold_score(row["prompt"], row[side]) for row in rows] for side in ("chosen", "rejected")))
    figures = {"accuracy": last["accuracy"], "gold accuracy": ((margin > 0) == (true > 0))[true != 0].mean()}
    figures |= {"Spearman": last["ranked_spearman"], "largest margin": margin.max()}  # each second pair is a near copy:
    return figures | {"near copies, m > 5": (margin[::2] > 5).mean(), "points": [similarity, margin, bound]}


def reward_record(seed: Seed, arm: str, epochs: int) -> dict:
    out, rows, pool = seed.reward(arm, epochs), lines(seed.folder / "pairs_eval.jsonl"), seed.pool(POOL)
    true, kind = np.array([row["gold"] for row in rows]), np.array([row["kind"] for row in rows])
    margin, bound = held_out(out, "margin", "bound")
    similarity, reference = held_out(seed.reward("cos_sim", epochs), "similarity", "bound")
    by, fair = arm, {"raw": expit(margin), "linked": inverse_link(margin, bound), "tempered": tempered(margin)}
    if arm in ("none", "smoothing"):  # without a bound: judged by those of cos_sim
        by, bound, fair["linked"] = "cos_sim", reference, fair["raw"]
    if arm == "smoothing":
        fair["linked"] = ((fair["raw"] - SMOOTHING) / (1 - 2 * SMOOTHING)).clip(0, 1)
    flags = f"--epochs 0 --model {out}/model --encoder {seed.sft()} --eval_dataset {seed.folder}/pairs_train.jsonl"
    training = held_out(seed.arm(f"training-{arm}-{epochs}", by, flags), "margin", "bound")
    score, value = (np.array(x).reshape(-1, POOL) for x in (scores(out / "model", pool), [row["gold"] for row in pool]))
    right, agrees, spread, sure = margin > 0, (margin > 0) == (true > 0), score.std(), expit(np.abs(margin))
    decided = true != 0
    figures = {f"gold accuracy, {name}": agrees[decided & (kind == name)].mean() for name in ("far", "near")}
    figures |= {"accuracy": right.mean(), "gold accuracy": agrees[decided].mean(), "σ₀": spread}
    figures["Spearman"] = np.nanmean([spearmanr(s, v).statistic for s, v in zip(score, value)])
    figures["|Δ|/σ₀ at equal gold"] = np.abs(margin[kind == "equal"]).mean() / spread
    figures |= {"binds in training": over(*training), "binds held out": over(margin, bound)}
    figures |= {"margin p99": np.quantile(margin, 0.99), "calibration": {k: calibration(p) for k, p in fair.items()}}
    figures["reliability"] = [[sure[ten].mean(), right[ten].mean()] for ten in tenths(sure) if ten.sum() >= 8]
    return figures | {"best of n": best_of_n(score, value), "points": [similarity, margin, bound]}


def scaled(model: Path, factor: float, path: Path) -> None:
    """Write the reward model with scores times a factor."""
    scorer = transformers.AutoModelForSequenceClassification.from_pretrained(model)
    scorer.score.weight.data *= factor
    for part in (scorer, transformers.AutoTokenizer.from_pretrained(model)):
        part.save_pretrained(path)


def seen(prompt: str, answer: str) -> list[float]:
    """Gold score; whether the first aisle named is the right one; whether the phrase is there."""
    named = re.search(r"\baisle (\d+)", answer, re.IGNORECASE)
    right = named and int(named[1]) == next(
        aisle for good, aisle in toy.AISLE_OF.items() if re.search(rf"\b{good}\b", prompt)
    )
    return [gold(prompt, answer), float(bool(right)), float(HACK in answer)]


def curves(seed: Seed, name: str, model: Path, flags: str) -> dict:
    """A run of ppo.py against a reward model: means of ten steps each."""
    sample, path = ppo.sample, seed.folder / f"gold-{name}.jsonl"

    def spy(engine, model, tokenizer, prompts, seeds, *rest):
        rollout = sample(engine, model, tokenizer, prompts, seeds, *rest)
        if len(seeds[0]) == 3:  # of a training step
            texts = [tokenizer.batch_decode(x, skip_special_tokens=True) for x in (rollout.prompts, rollout.responses)]
            means = np.mean([seen(*each) for each in zip(*texts)], axis=0).tolist()
            with open(path, "a") as file:
                file.write(json.dumps([seeds[0][1], means]) + "\n")
        return rollout

    path.unlink(missing_ok=True)  # of a run that was cut
    flags += f" --policy_model {seed.sft()} --reward_model {model} {seed.data('prompts')} --epochs 32 --max_kl 0"
    steps = some(lines(seed.run(ppo, name, flags, sample=spy) / "metrics.jsonl"), split="train")
    found, names = dict(lines(path)), ("growth", "kl", "gold", "right aisle", "phrase")
    rows = np.array([[step["score_growth"], step["kl"], *found[step["step"]]] for step in steps])
    ends = [*range(10, len(rows), 10), len(rows)]
    means = np.transpose([ten.mean(0) for ten in np.split(rows, ends[:-1])])
    return {"steps": ends, **dict(zip(names, means))}


def ppo_record(seed: Seed, arm: str, epochs: int) -> dict:
    loss, units, *clip = arm.split("/")
    model, pool = seed.reward(loss, epochs) / "model", seed.pool(POOL)
    name, spread = f"ppo-{arm}".replace("/", "-").replace(" ", "-"), scores(model, pool).std()  # σ₀
    if units == "other":
        other = "cos_sim" if loss == "none" else "none"
        own, spread = spread, scores(seed.reward(other, epochs) / "model", pool).std()
        scale = functools.partial(scaled, model, spread / own)
        model = seed.once(f"reward-{loss}-scaled", scale, "tokenizer.json")
    record = curves(seed, name, model, "--score_clip 1e9" * bool(clip))
    return record | {"G": record["growth"] / spread, "σ₀": spread}


def spread_record(seed: Seed, arm: str, _) -> dict:
    loss, epochs = arm.split("/")
    model = seed.reward(loss, int(epochs)) / "model"
    spread = scores(model, seed.pool(SPREAD_POOL)).std()  # σ₀
    name = arm.replace("/", "-")
    model = seed.once(f"reward-{name}-unit", functools.partial(scaled, model, 1 / spread), "tokenizer.json")
    return curves(seed, f"spread-{name}", model, "--score_clip 0") | {"σ₀": spread}


def dpo_record(seed: Seed, arm: str, _) -> dict:
    start, path, found, evaluate = seed.sft(), seed.folder / f"dpo-{arm}.json", [], dpo.evaluate
    tokenizer, process = common.load_tokenizer(str(start), False), common.start(seed.seed)
    reference = transformers.AutoModelForCausalLM.from_pretrained(start).eval().to(DEVICE)
    prompts = [row["prompt"] for row in lines(seed.folder / "prompts_eval.jsonl")] * ANSWERS
    ids, seeds = tokenizer(prompts).input_ids, [[seed.seed, i] for i in range(len(prompts))]
    settings = argparse.Namespace(max_new_tokens=96, micro_batch_size=120, temperature=1.0)

    @torch.no_grad()
    def spy(engine, *rest):
        answers = ppo.sample(engine, engine.module, tokenizer, ids, seeds, settings, process).responses
        inputs = pad_sequence([torch.tensor(p + a) for p, a in zip(ids, answers)], True, 0).to(DEVICE)
        labels = pad_sequence([torch.tensor([-100] * len(p) + a) for p, a in zip(ids, answers)], True, -100).to(DEVICE)
        means = [model(inputs, labels=labels).loss.item() for model in (reference, engine.module)]  # of -log π
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        kl = (means[0] - means[1]) * sum(map(len, answers)) / len(answers)
        found.append([kl, np.mean([gold(p, a) for p, a in zip(prompts, texts)])])
        path.write_text(json.dumps(found))
        return evaluate(engine, *rest)

    own = {"cos_sim": "--constraint cos_sim", "fixed": "--constraint fixed --fixed_bound 1"}
    own["smoothing"] = "--label_smoothing 0.1"
    flags = f"--model {start} {seed.data('pairs')} --eval_every 20 --generate 0 {own.get(arm, '')}"
    # IPO draws the difference of the log ratios, z / β, to 1 / (2 β); β is 0.1.
    ipo = {"ranking_loss": lambda margin, *_: (margin / 0.1 - 1 / 0.2).square()} if arm == "IPO" else {}
    seed.run(dpo, f"dpo-{arm}", flags, evaluate=spy, **ipo)
    return dict(zip(("kl", "gold"), zip(*json.loads(path.read_text()))))


def real_record(seed: Seed, arm: str, epochs: int) -> dict:
    """--model, after training on some of --data, of the seed's choice, on --eval_data and --ranked_data."""
    args, rows = seed.args, lines(Path(seed.args.data))
    data = seed.once("real.jsonl", lambda path: write(path, random.Random(seed.seed).sample(rows, PAIRS["real"])))
    flags = f"--model {args.model} --dataset {data} --eval_dataset {args.eval_data} --epochs {epochs} --dtype bf16 "
    flags += "--global_batch_size 16 --micro_batch_size 8 --learning_rate 2e-5 --warmup_steps 10 --max_length 512"
    flags += f" --ranked_dataset {args.ranked_data}" * bool(args.ranked_data)
    flags += f" --encoder {args.encoder}" * bool(args.encoder)
    out = seed.arm(f"real-{arm}-{epochs}", arm if args.encoder else arm.replace("cos_sim", "given"), flags)
    *metrics, last = lines(out / "metrics.jsonl")
    margin, bound, *sides = held_out(out, "margin", "bound", "chosen_score", "rejected_score")
    training = some(metrics, split="train")
    figures = {"accuracy": last["accuracy"], "Spearman": last["ranked_spearman"], "Kendall": last["ranked_kendall"]}
    figures |= {"margin p99": np.quantile(margin, 0.99), "largest margin": margin.max(), "σ₀": np.std(sides)}
    figures["calibration"] = {"raw": calibration(expit(margin)), "tempered": calibration(tempered(margin))}
    figures["train accuracy, last steps"] = np.mean([line["accuracy"] for line in training[-20:]])
    return figures | {"binds held out": over(margin, bound)}


def made_by() -> dict[str, str]:
    """Where and when a record is made, of what code and versions."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    machine = f"{os.cpu_count()} x {cpu[1] if cpu else platform.machine()}"
    machine = f"{torch.cuda.get_device_name()} beside {machine}" if DEVICE.type == "cuda" else machine
    commit = subprocess.run(
        "git describe --always --dirty --exclude *".split(), cwd=ROOT, capture_output=True, text=True
    )
    versions = " ".join(f"{module.__name__} {module.__version__}" for module in (torch, transformers, deepspeed))
    return dict(machine=machine, date=time.strftime("%Y-%m-%d"), commit=commit.stdout.strip(), versions=versions)


def make(args) -> None:
    """Add the runs that --make, --arms and --seeds leave, and that the results lack."""
    figures = {name: globals()[f"{name}_record"] for name in ARMS}
    epochs = dict(embedded=[5], reward=EPOCHS, ppo=[LONG], spread=[0], dpo=[0], real=EPOCHS[:2] if args.model else ())
    seeds = {name: args.seeds or range(6, 16) if name == "spread" else args.seeds or range(1, 6) for name in ARMS}
    jobs = [(name, arm, seed, n) for name in ARMS for seed in seeds[name] for n in epochs[name] for arm in ARMS[name]]
    for experiment, arm, seed, n in jobs:
        job = dict(experiment=experiment, arm=arm, seed=seed, epochs=n)
        left = experiment in args.make.split(",") and (not args.arms or arm in args.arms.split(";"))
        if not left or some(lines(args.results), **job):
            continue
        record = figures[experiment](Seed(args, seed), arm, n)
        if not (seed == 1 and arm in ("none", "cos_sim") and (experiment, n) in (("embedded", 5), ("reward", LONG))):
            record.pop("points", None)  # else for the pictures
        text = json.dumps(record, default=lambda array: array.tolist())
        digits = dict(parse_float=lambda x: float(f"{float(x):.4g}"), parse_constant=lambda _: None)  # NaN is null
        with filelock.FileLock(f"{args.results}.lock"), open(args.results, "a") as file:
            record = job | json.loads(text, **digits) | made_by()
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", default=",".join(ARMS), help="experiments whose missing runs are made")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="default: the experiment's own")
    parser.add_argument("--arms", default="", help="some arms, with ; between them")
    parser.add_argument("--results", type=Path, default=ROOT / "tests" / "evidence.jsonl")
    parser.add_argument("--folder", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--model", default="", help="real: the language model to start from")
    parser.add_argument("--encoder", default="", help="real: the text encoder; none: the data's column similarity")
    parser.add_argument("--data", default="", help="real: pairs, a .jsonl file that reward.py reads")
    parser.add_argument("--eval_data", default="", help="real: held-out pairs")
    parser.add_argument("--ranked_data", default="", help="real: ranked responses")
    args = parser.parse_args()
    args.results.touch()
    make(args)


if __name__ == "__main__":
    main()
