"""The experiments that decide what the bound and its prior are worth: the README's tables and pictures.

    python tests/evidence.py                     makes what tests/evidence.jsonl lacks, then prints every table
    python tests/evidence.py --results new.jsonl --folder new                     all of it again, from nothing
    python tests/evidence.py --make real --model <language model> --encoder <text encoder> --data <pairs> ...
    python tests/evidence.py --make "" --pages README.md tests/EVIDENCE.md --pictures assets     of what is there

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

Predictions and outcomes of all but `spread` are in EVIDENCE.md. Of `spread`, named before its runs:
    End points: gold, mean of the last 30 steps (it decides); gold at √KL 1.5 and at 2;
    growth of the score over σ₀ in the last 30. Intervals are Student's t over the paired differences of the
    seeds, 95 %. `cos_sim` is better (worse) than another arm where the interval of gold lies above (below) 0; a
    tie is an interval within ±1; all else is undecided. Prediction: undecided against `none` after 15 epochs,
    worse than `none` after 5. The phrase becomes more frequent and right aisles rarer wherever gold turns down.
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
from matplotlib.figure import Figure
from scipy.special import comb, expit
from scipy.stats import spearmanr, t
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


# ---------------------------------------------------------------- tables


def interval(differences: np.ndarray) -> tuple[float, float]:
    """Student's 95 % interval of a mean, from a value for each seed."""
    if len(differences) < 2:
        return np.nan, np.nan
    half = t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / len(differences) ** 0.5
    return differences.mean() - half, differences.mean() + half


def compared(records: list[dict], columns: dict) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """For each arm and column the values of the seeds, and their paired differences to those of the first arm."""
    values, result = {}, {}  # arm: seed: a value for each column
    for record in sorted(records, key=lambda record: ARMS[record["experiment"]].index(record["arm"])):
        row = np.array([column(record) for column in columns.values()], float)  # None: NaN
        values.setdefault(record["arm"], {})[record["seed"]] = row
    for arm, own in values.items():
        first = next(iter(values.values()))
        both = np.array([*own.values()]).T, np.array([row - first.get(seed, np.nan) for seed, row in own.items()]).T
        result[arm] = [(x[np.isfinite(x)], d[np.isfinite(d)]) for x, d in zip(*both)]
    return result


def markdown(head: list[str], rows: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *rows]
    text = "\n".join(f"| {' | '.join(row)} |".replace("|Δ|", "abs Δ") for row in rows)
    return re.sub(r"\|  (?=\|)", "| ", text)


def cell(own: np.ndarray, difference: np.ndarray, first: bool) -> str:
    """Mean over the seeds; of all arms but the first also the interval of how it differs from the first."""
    if not len(own):
        return ""
    low, high = interval(difference)
    return f"{own.mean():.3g}" + ("" if first or np.isnan(low) else f" ({low:+.2g} to {high:+.2g})")


def table(records: list[dict], columns: dict) -> str:
    """Arms over columns: means, and in brackets the interval of the paired difference to the first arm."""
    every, rows = compared(records, columns), []
    most = max((len(own) for cells in every.values() for own, _ in cells), default=0)
    for arm, cells in every.items():
        some = [f"{cell(*values, first=not rows)}{f', {len(values[0])} seeds' * (0 < len(values[0]) < most)}"
                for values in cells]  # fmt: skip
        rows.append([f"`{arm}`", *some])
    return markdown([f"{most} seeds", *columns], rows)


def figure(*path):
    """record -> record[path[0]][path[1]]..."""
    return lambda record: functools.reduce(lambda value, name: value[name], path, record)


def plain(*names):
    return {name: figure(name) for name in names}


def at(record: dict, root_kl: float, name: str) -> float:
    """A curve's value at a √KL, between its points; NaN beyond them."""
    x, y = np.sqrt(np.maximum(record["kl"], 0)), np.array(record[name])
    order = np.argsort(x)
    return float(np.interp(root_kl, x[order], y[order], right=np.nan))


def last(name: str):
    """Of PPO, the mean of the last 30 steps."""
    return lambda record: np.mean(record[name][-3:])


def summary(records: list[dict]) -> str:
    """The README's table: what a reader takes in at a glance."""
    reward, ppo_runs = some(records, experiment="reward", epochs=LONG), some(records, experiment="ppo")
    quantities = [  # words, runs, column, digits
        ("margin, 99th percentile", reward, figure("margin p99"), 1),
        ("spread of the scores, σ₀", reward, figure("σ₀"), 1),
        ("NLL of held-out labels", reward, figure("calibration", "raw", "nll"), 2),
        ("the same after one fitted temperature", reward, figure("calibration", "tempered", "nll"), 2),
        ("accuracy on gold, %", reward, lambda record: 100 * record["gold accuracy"], 1),
        ("Spearman with gold", reward, figure("Spearman"), 2),
        ("gold, best of 256", reward, figure("best of n", -1), 1),
        ("PPO: growth of the score", ppo_runs, last("growth"), 1),
        ("PPO: the same in units of σ₀", ppo_runs, last("G"), 1),
        ("PPO: gold at the end", ppo_runs, last("gold"), 1),
    ]
    rows = []
    for words, runs, column, digits in quantities:
        runs = [run | {"arm": run["arm"].removesuffix("/own")} for run in runs]
        arms = {arm: some(runs, arm=arm) for arm in ("none", "cos_sim", "cos_sim+shuffle", "smoothing")}
        values = {arm: {run["seed"]: column(run) for run in own} for arm, own in arms.items()}
        low, high = interval(np.array([x - values["none"][seed] for seed, x in values["cos_sim"].items()]))
        verdict = "lower" if high < 0 else "higher" if low > 0 else "no clear difference"
        texts = [f"{np.mean([*own.values()]):.{digits}f}" if own else "" for own in values.values()]
        rows.append([words, *texts, f"{verdict} ({low:+.{digits}f} to {high:+.{digits}f})"])
    head = f"after {LONG} epochs", "`none`", "`cos_sim`", "its bounds dealt to other pairs", "label smoothing"
    return markdown([*head, "`cos_sim` against `none`"], rows)


def tables(records: list[dict]) -> dict[str, str]:
    """Of the README and of EVIDENCE.md, by their names there."""
    of, made = functools.partial(some, records), {}
    columns = plain("accuracy", "gold accuracy", "Spearman", "largest margin", "near copies, m > 5")
    made["embedded"] = table(of(experiment="embedded"), columns)
    columns = {"m > δ*/2 in training": figure("binds in training", "half")} | plain("margin p99", "σ₀", "gold accuracy")
    columns |= plain("Spearman", "|Δ|/σ₀ at equal gold") | {"best of 256": figure("best of n", -1)}
    columns |= {"NLL": figure("calibration", "raw", "nll")}
    for n in EPOCHS:
        made[f"reward {n}"] = table(of(experiment="reward", epochs=n), columns)
    rows, kept = [], plain("gold accuracy", "Spearman", "|Δ|/σ₀ at equal gold")
    for prior, n in ((prior, n) for prior in ("len_rat", "cos_sim") for n in EPOCHS):
        both = [run for run in of(experiment="reward", epochs=n) if run["arm"] in (prior, f"{prior}+shuffle")]
        if cells := compared(both, kept).get(f"{prior}+shuffle"):
            rows.append([f"`{prior}`", str(n), *(cell(-d, -d, first=False) for _, d in cells)])
    made["prior"] = markdown(["", "epochs", *kept], rows)
    names = [(score, kind) for score in ("nll", "brier", "ece") for kind in ("raw", "linked", "tempered")]
    columns = {f"{score} {kind}": figure("calibration", kind, score) for score, kind in names}
    made["calibration"] = table(of(experiment="reward", epochs=LONG), columns)
    columns = {f"n = {BEST_OF[i]}": figure("best of n", i) for i in range(0, len(BEST_OF), 2)}
    made["best of n"] = table(of(experiment="reward", epochs=LONG), columns)
    columns = {f"at √KL {x}": lambda r, x=x: at(r, x, "gold") for x in (1, 1.5, 2)}
    columns = {f"{name}, last 30": last(name) for name in ("growth", "G", "kl", "gold")} | columns
    runs = of(experiment="ppo")
    made["ppo"], made["ppo no clip"] = (
        table([run for run in runs if ("no clip" in run["arm"]) == off], columns) for off in (False, True)
    )
    columns = {f"{name}, last 30": last(name) for name in ("gold", "growth", "kl", "right aisle", "phrase")}
    columns |= {f"gold at √KL {x}": lambda r, x=x: at(r, x, "gold") for x in (1.5, 2)}
    runs = of(experiment="spread")
    made["spread"] = table(runs, columns)
    seeds = sorted({run["seed"] for run in runs})
    value = {(run["arm"], run["seed"]): f"{last('gold')(run):.1f}" for run in runs}
    rows = [[f"`{arm}`", *(value.get((arm, seed), "") for seed in seeds)] for arm in ARMS["spread"]]
    made["spread seeds"] = markdown(["gold, seed", *map(str, seeds)], rows)
    columns = {"KL": figure("kl", -1), "gold": figure("gold", -1), "best gold": lambda r: max(r["gold"])}
    columns |= {f"gold at √KL {x}": lambda r, x=x: at(r, x, "gold") for x in (0.8, 1)}
    made["dpo"] = table(of(experiment="dpo"), columns)
    columns = plain("accuracy", "Spearman", "Kendall", "margin p99", "σ₀")
    columns |= {"m > δ*/2": figure("binds held out", "half"), "NLL": figure("calibration", "raw", "nll")}
    made["real"] = table(of(experiment="real", epochs=1), columns)
    places = {}
    for run in records:
        place = (run["experiment"], run["epochs"] or "", run.get("machine", "see below"), run.get("date", ""))
        places.setdefault((*place, run.get("commit", "")), []).append(run)
    rows = [[*map(str, place), str(len({r["arm"] for r in runs})), str(len(runs))] for place, runs in places.items()]
    made["runs"] = markdown("experiment epochs machine date commit arms runs".split(), rows)
    return made | {"summary": summary(records)}


def fill(path: Path, made: dict[str, str]) -> str:
    """A page with the tables of its marks: what stands between <!-- NAME --> and <!-- end -->."""

    def put(found: re.Match) -> str:
        return f"{found[1]}\n{made[found[2]]}\n{found[3]}"

    return re.sub(r"(?s)(<!-- ([\w ]+) -->)\n.*?\n(<!-- end -->)", put, path.read_text(encoding="utf-8"))


# ---------------------------------------------------------------- pictures

COLORS = dict(zip("none cos_sim len_rat fixed smoothing IPO".split(), "C0 C1 C2 C4 C5 C6".split()))


def draw(axis, runs: list[dict], name: str, label: str, x: str = "kl", thin: bool = True, **style) -> None:
    """The mean of some runs, thick, over √KL or the step; each seed thin."""

    def abscissa(value) -> np.ndarray:
        return np.sqrt(np.maximum(value, 0)) if x == "kl" else np.array(value)

    for run in runs if thin else ():
        axis.plot(abscissa(run[x]), run[name], linewidth=0.5, alpha=0.4, **style)
    if runs:
        mean_x, mean = (np.mean([run[key] for run in runs], 0) for key in (x, name))
        axis.plot(abscissa(mean_x), mean, linewidth=2, label=label, **style)


def pictures(records: list[dict], folder: Path) -> None:
    of = functools.partial(some, records)
    picture = Figure(figsize=(10, 3.8), layout="constrained")
    axes = picture.subplots(1, 2, sharey=True)
    free, bounded = (of(experiment="embedded", arm=arm, seed=1)[0]["points"] for arm in ("none", "cos_sim"))
    order = np.argsort(bounded[0])
    similarity, bound = np.array(bounded)[::2, order]
    for axis, points, arm in zip(axes, (free, bounded), ("none", "cos_sim")):
        axis.scatter(bounded[0], points[1], s=8, alpha=0.5, linewidths=0, color=COLORS[arm])
        applied = arm != "none"
        label = "bound δ*(s)" if applied else "bound δ*(s), not applied"
        axis.plot(similarity, bound, "-" if applied else "--", color="C3", label=label)
        axis.plot(similarity, bound / 2, ":", color="C3", label="half of it")
        axis.axhline(0, color="0.6", linewidth=0.8)
        title = "with the bound (cos_sim)" if applied else "ranking loss alone (none)"
        axis.set(title=title, xlabel="similarity s of the two responses", ylabel="margin m of held-out pairs")
        axis.legend()
    picture.savefig(folder / "margins.png", dpi=110)

    picture = Figure(figsize=(6, 3), layout="constrained")
    axis, m = picture.subplots(), np.linspace(-4, 24, 400)
    for s, color in ((1.0, "C3"), (0.8, "C1"), (0.6, "C2")):
        delta = float(priors.margin_bound(torch.tensor([s]), 20, 0.001, -15))
        axis.plot(
            m, np.logaddexp(0, -m) + np.logaddexp(0, m - delta), color=color, label=f"s = {s:g}, δ* = {delta:.1f}"
        )
        axis.axvline(delta, color=color, linestyle="--", linewidth=0.8)
    axis.plot(m, np.logaddexp(0, -m), color="0.6", label="no bound")
    axis.set(xlabel="margin m (dashed: the bound δ*)", ylabel="L", ylim=(0, 6))
    axis.legend(fontsize="small")
    picture.savefig(folder / "loss.png", dpi=110)

    picture, more = Figure(figsize=(12, 3.8), layout="constrained"), Figure(figsize=(10, 7.6), layout="constrained")
    left, middle, right = picture.subplots(1, 3)
    (sure, best), (score, direct) = more.subplots(2, 2)
    for arm in ("none", "cos_sim"):
        points = np.array(of(experiment="reward", arm=arm, epochs=LONG, seed=1)[0]["points"])
        left.scatter(*points[:2], s=6, alpha=0.5, linewidths=0, color=COLORS[arm], label=arm)
    left.plot(*points[::2, np.argsort(points[0])], color="C3", label="bound δ*(s) of cos_sim")
    left.set(xlabel="similarity s", ylabel="margin m, held out", title=f"Reward models after {LONG} epochs")
    left.set_ylim(None, max(points[1]) * 3)
    for arm in ARMS["ppo"][:4]:
        loss, units = arm.split("/")
        other = "cos_sim" if loss == "none" else "none"
        words = f"{loss}, scores as they are" if units == "own" else f"{loss}, scores scaled to the spread of {other}"
        style = dict(color=COLORS[loss], linestyle="-" if units == "own" else "--")
        draw(score, of(experiment="ppo", arm=arm), "growth", words, x="steps", **style)
        if units == "own":
            draw(middle, of(experiment="ppo", arm=arm), "G", loss, **style)
            draw(right, of(experiment="ppo", arm=arm), "gold", loss, **style)
    middle.set(xlabel="√KL", ylabel="growth / σ₀", title="PPO: growth of the score")
    right.set(xlabel="√KL", ylabel="gold score", title="PPO: what the answers are worth")
    x = np.log(BEST_OF) - (np.array(BEST_OF) - 1) / BEST_OF
    for arm in ("none", "cos_sim", "len_rat", "fixed", "smoothing"):
        runs = [run | {"x": x} for run in of(experiment="reward", arm=arm, epochs=LONG)]
        points = np.array(sorted(point for run in runs for point in run["reliability"]))
        style = dict(color=COLORS[arm], marker="o", markersize=3)
        means = [part.mean(0) for part in np.array_split(points, 10)] if runs else np.empty((1, 2))
        sure.plot(*np.transpose(means), label=arm, **style)
        draw(best, runs, "best of n", arm, x="x", thin=False, **style)
    sure.plot([0.5, 1], [0.5, 1], color="0.6", linewidth=0.8, label="calibrated")
    sure.axhline(1 - FLIPPED, color="0.6", linestyle=":", label="the most that labels allow")
    sure.set(xlabel="σ(|m|)", ylabel="share that the label agrees with", title=f"Reliability, {LONG} epochs")
    best.set(xlabel="KL = log n - (n - 1) / n", ylabel="gold score", title=f"Best of n, {LONG} epochs")
    score.set(xlabel="PPO step", ylabel="growth of the score", title="PPO: the score as it is")
    for arm in ARMS["dpo"]:
        runs = of(experiment="dpo", arm=arm)
        draw(direct, runs, "gold", arm, thin=False, color=COLORS[arm], marker="o", markersize=3)
    direct.set(xlabel="√KL", ylabel="gold score", title="DPO")
    for axis in (left, middle, right, sure, best, score, direct):
        axis.legend(markerscale=2, fontsize="small")
    picture.savefig(folder / "evidence.png", dpi=110)
    more.savefig(folder / "details.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", default=",".join(ARMS), help="experiments whose missing runs are made")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="default: the experiment's own")
    parser.add_argument("--arms", default="", help="some arms, with ; between them")
    parser.add_argument("--results", type=Path, default=ROOT / "tests" / "evidence.jsonl")
    parser.add_argument("--folder", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--pictures", type=Path, default=None, help="draw the pictures into this folder")
    parser.add_argument("--pages", type=Path, nargs="+", default=[], help="pages whose tables are written anew")
    parser.add_argument("--model", default="", help="real: the language model to start from")
    parser.add_argument("--encoder", default="", help="real: the text encoder; none: the data's column similarity")
    parser.add_argument("--data", default="", help="real: pairs, a .jsonl file that reward.py reads")
    parser.add_argument("--eval_data", default="", help="real: held-out pairs")
    parser.add_argument("--ranked_data", default="", help="real: ranked responses")
    args = parser.parse_args()
    args.results.touch()
    make(args)
    records = lines(args.results)
    made = tables(records)
    for page in args.pages:
        page.write_text(fill(page, made), encoding="utf-8")
    if not args.pages:
        print(*(f"{name}\n\n{text}\n" for name, text in made.items()), sep="\n")
    if args.pictures:
        pictures(records, args.pictures)


if __name__ == "__main__":
    main()
