"""The experiments that decide what the bound and its prior are worth: the README's tables and pictures.

    python tests/evidence.py                     makes what tests/evidence.jsonl lacks, then prints every table
    python tests/evidence.py --results new.jsonl --folder new                     all of it again, from nothing
    python tests/evidence.py --make real --model <language model> --encoder <text encoder> --data <pairs> ...
    python tests/evidence.py --make "" --pictures assets                          tables and pictures of what is there

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
    dpo     none, cos_sim, fixed 1, label smoothing, IPO; gold and KL at checkpoints
    real    a real language model on real pairs: none, cos_sim, cos_sim shuffled; 1 and 3 epochs

Predictions, written before these runs and left as they were. Pilots of one seed had been seen, of none, cos_sim and
fixed: with 2,000 pairs and 25 % of the labels turned round a reward model hardly learned (Spearman with gold 0.1),
hence 4,000 and 15 %; after 5 epochs under 3 % of the pairs had m > δ*/2, hence the 15 epochs; PPO's gold turned down by
step 80 of 240, hence 160.
    reward  After 1, 3 and 5 epochs all arms tie (the bound binds for under 5 % of the pairs). After 15, `none` has
            learned labels by heart: p99 of its margins is over 8, the bounds halve that. Accuracy on gold differs by
            under 2 points; `fixed` and label smoothing, the tight ones, gain most; `cos_sim` and `len_rat` tie with
            their own bounds shuffled. |Δscore| / σ₀ on near copies of equal gold is lower with `cos_sim` than shuffled,
            by a little.
    calibration  Raw, `none` is overconfident after 15 epochs, and the bounded arms less so; the inverse link is better
            than the raw margin for these; after one temperature all tie.
    best-of-n  Ties: intervals of the differences at n = 256 hold 0. Gold turns down for none of them.
    ppo     The raw score grows half as far with cos_sim in its own units; G grows alike. The units decide how far the
            policy goes: with the other's, the curves of gold over √KL change places. At equal √KL both tie.
    dpo     `cos_sim` is `none`. `fixed` 1 and IPO stop at a smaller KL, on the same curve of gold over √KL.
    real    Ties within the interval of 800 pairs (3.4 points), both after 1 and after 3 epochs; margins differ after 3.
"""

import argparse
import functools
import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import common  # before torch

import filelock
import numpy as np
import torch
import toy_data
import transformers
from helpers import lines
from scipy.special import expit, gammaln
from scipy.stats import pearsonr, spearmanr

import dpo
import ppo
import priors
import reward
import sft

FLIPPED = 0.15  # labels turned round
PAIRS = {"train": 4000, "eval": 800}
HACK = "Have a nice day!"
FIXED, SMOOTHING = 4.5, float(expit(-4.5 / 2))  # label smoothing with the optimum of fixed 4.5
EXPERIMENTS = "embedded reward ppo dpo real".split()
REWARD_ARMS = "none len_rat cos_sim len_rat+shuffle cos_sim+shuffle fixed random smoothing".split()
PPO_ARMS = [f"{loss}/{units}{clip}" for clip in ("", "/no clip") for loss in ("none", "cos_sim")
            for units in ("own", "other")]  # fmt: skip
EMBEDDED_ARMS = "none cos_sim none+token cos_sim+token".split()
DPO_ARMS = "none cos_sim fixed smoothing IPO".split()
REAL_ARMS = "none cos_sim cos_sim+shuffle".split()
ARMS = list(dict.fromkeys([*REWARD_ARMS, *EMBEDDED_ARMS, *PPO_ARMS, *DPO_ARMS]))  # in the order of the tables
EPOCHS, LONG = (1, 3, 5, 15), 15  # 15: until the model knows labels by heart; PPO's reward models
BEST_OF, POOL = [2**k for k in range(9)], 512
ANSWERS = 10  # to each held-out prompt at a checkpoint of DPO
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---------------------------------------------------------------- the task


def gold(prompt: str, answer: str) -> float:
    parts = toy_data.sentences(answer)
    return toy_data.gold_score(prompt, " ".join(part for part in parts if part != HACK)) - parts.count(HACK)


def answer(rng: random.Random, good: str, right: float) -> list[str]:
    parts = [part for part in toy_data.answer(rng, good, right) if part != HACK]
    named = any(f"aisle {toy_data.AISLE_OF[good]}." in part.lower() for part in parts)
    return parts + [HACK] * (rng.random() < (0.8 if named else 0.1))


def reworded(rng: random.Random, good: str, parts: list[str]) -> list[str]:
    """The same answer with one sentence said in another way."""
    parts, i = list(parts), rng.randrange(len(parts))
    digits = [c for c in parts[i] if c.isdigit()]
    for kind in (toy_data.POLITE[:3], toy_data.RUDE, toy_data.FILLER):
        if parts[i] in kind:
            parts[i] = rng.choice(kind)
            return parts
    if digits:
        parts[i] = rng.choice(toy_data.LOCATIONS).format(good=good, aisle=digits[0])
    return parts


def pair(rng: random.Random, prompt: str, good: str, kind: str) -> dict:
    while True:
        a = answer(rng, good, 0.5)
        change = {"near": toy_data.edited, "equal": reworded}.get(kind)
        a, b = (" ".join(parts) for parts in (a, change(rng, good, a) if change else answer(rng, good, 0.5)))
        difference = gold(prompt, a) - gold(prompt, b)
        if a != b and (kind == "far" or (difference == 0) == (kind == "equal")):
            break
    a_wins = (rng.random() < expit(difference)) != (rng.random() < FLIPPED)
    chosen, rejected, difference = (a, b, difference) if a_wins else (b, a, -difference)
    return dict(prompt=prompt, chosen=chosen, rejected=rejected, gold=difference, kind=kind)


def build(folder: Path, seed: int) -> None:
    """Write the data of a seed."""
    rng = random.Random(seed)
    asked = [(toy_data.prompt_text(o, q, g), g) for o in toy_data.OPENINGS for q in toy_data.QUESTIONS
             for g in toy_data.AISLE_OF]  # fmt: skip
    rng.shuffle(asked)
    folder.mkdir(parents=True, exist_ok=True)
    for split, source, demonstrations in (("eval", asked[:48], 100), ("train", asked[48:], 1000)):
        kinds = ["far", "near", "far", "equal"] * (PAIRS[split] // 4)
        files = {
            "pairs": [pair(rng, *rng.choice(source), kind) for kind in kinds],
            "sft": [dict(prompt=p, completion=" ".join(answer(rng, g, 0.75)))
                    for p, g in rng.choices(source, k=demonstrations)],
            "prompts": [dict(prompt=p) for p, _ in source],
        }  # fmt: skip
        for name, rows in files.items():
            (folder / f"{name}_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------- runs


class Seed:
    """The data and models of a seed; what is missing is made, by one process at a time."""

    def __init__(self, folder: Path, seed: int, records: list[dict]):
        self.folder, self.seed, self.records = folder / f"seed-{seed}", seed, records
        with self.alone("data"):
            if not (self.folder / "prompts_train.jsonl").exists():
                build(self.folder, seed)

    def alone(self, name: str):
        self.folder.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(self.folder / f"{name}.lock")

    def run(self, script, name: str, last: str, flags: str, **patches) -> Path:
        """The folder of a finished run; patches replace functions of the script while it runs."""
        out, before = self.folder / name, {key: getattr(script, key) for key in patches}
        with self.alone(name):
            if not (out / last).exists():
                for key, value in patches.items():
                    setattr(script, key, value)
                argv = f"--output_dir {out} --seed {self.seed} --log_every 1 {flags}".split()
                script.main(common.parse_args(script.Args, script.preset, argv))
                for key, value in before.items():
                    setattr(script, key, value)
        return out

    def data(self, name: str) -> str:
        return f"--dataset {self.folder}/{name}_train.jsonl --eval_dataset {self.folder}/{name}_eval.jsonl"

    def sft(self) -> Path:
        return self.run(sft, "sft", "generations.json", self.data("sft")) / "model"

    def reward(self, arm: str, epochs: int) -> Path:
        flags = f"--model {self.sft()} {self.data('pairs')} --epochs {epochs}"
        return self.arm(f"reward-{arm}-{epochs}", arm, flags)

    def arm(self, name: str, arm: str, flags: str = "") -> Path:
        """A run of reward.py; an arm is a constraint, +shuffle with bounds dealt to other pairs, +token per token."""
        constraint, *more = arm.replace("smoothing", "none+smoothing").split("+")
        flags += f" --constraint {constraint}" + " --shuffle_bounds" * ("shuffle" in more)
        flags += f" --fixed_bound {FIXED}" + " --loss_on token" * ("token" in more)
        smooth = functools.partial(priors.ranking_loss, label_smoothing=SMOOTHING)
        return self.run(reward, name, "eval.jsonl", flags, **{"ranking_loss": smooth} if "smoothing" in more else {})

    def pool(self) -> list[dict]:
        """SFT answers to the held-out prompts, POOL to each, with their gold scores."""
        path = self.folder / "pool.jsonl"
        start = self.sft()
        with self.alone("pool"):
            if not path.exists():
                prompts = [row["prompt"] for row in lines(self.folder / "prompts_eval.jsonl")]
                rows = sampled(start, [prompt for prompt in prompts for _ in range(POOL)], self.seed)
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return lines(path)

    def spread(self, arm: str) -> float:
        """σ₀ of a reward model: the deviation of its scores over SFT samples."""
        known = [r["σ₀"] for r in self.records if (r["arm"], r["seed"], r["epochs"]) == (arm, self.seed, LONG)
                 and r["experiment"] == "reward"]  # fmt: skip
        return known[0] if known else float(scores(self.reward(arm, LONG) / "model", self.pool()).std())


@torch.no_grad()
def sampled(folder: Path, prompts: list[str], seed: int) -> list[dict]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    model, answers = transformers.AutoModelForCausalLM.from_pretrained(folder).eval().to(DEVICE), []
    torch.manual_seed(seed)
    for part in (prompts[i : i + 512] for i in range(0, len(prompts), 512)):
        inputs = tokenizer(part, return_tensors="pt", padding=True).to(DEVICE)
        output = model.generate(
            inputs.input_ids, attention_mask=inputs.attention_mask, do_sample=True, top_k=0, max_new_tokens=96
        )
        answers += tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return [dict(prompt=p, answer=a, gold=gold(p, a)) for p, a in zip(prompts, answers)]


@torch.no_grad()
def scores(folder: Path, rows: list[dict], answer: str = "answer") -> np.ndarray:
    """A reward model's scores of rows with `prompt` and an answer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval().to(DEVICE)
    texts, result = [(row["prompt"], row[answer]) for row in rows], {}
    ids = {text: sum(common.tokenize(tokenizer, *text), []) for text in dict.fromkeys(texts)}
    order = sorted(ids, key=lambda text: len(ids[text]))
    for part in (order[i : i + 64] for i in range(0, len(order), 64)):  # twice as fast as 512 on a CPU
        batch = tokenizer.pad({"input_ids": [ids[text] for text in part]}, padding_side="right", return_tensors="pt")
        result |= zip(part, model(**batch.to(DEVICE)).logits[:, 0].tolist())
    return np.array([result[text] for text in texts])


# ---------------------------------------------------------------- figures of a reward model


def inverse_link(margin: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """P(chosen is better) at which a margin is the optimum of the bounded loss; without a bound (inf) σ(m).

    Where p L'(m) = (1 - p) L'(-m), with L' = -σ(-m) + σ(m - δ*).
    """
    upper, lower = expit(margin - bound), expit(-margin - bound)
    return (expit(margin) - lower) / (1 - upper - lower)


def calibration(p: np.ndarray, bins: int = 10) -> dict[str, float]:
    """Of P(chosen is better) for pairs whose chosen one is the label's: negative log-likelihood, Brier score, and the
    expected calibration error, over the confidence of the side that the model prefers."""
    p = p.clip(1e-6, 1 - 1e-6)
    confidence, right = np.maximum(p, 1 - p), p > 0.5
    which = ((confidence - 0.5) * 2 * bins).astype(int).clip(0, bins - 1)
    error = sum(abs(confidence[which == b].sum() - right[which == b].sum()) for b in range(bins)) / len(p)
    return {"nll": -np.log(p).mean(), "brier": ((1 - p) ** 2).mean(), "ece": error}


def tempered(margin: np.ndarray) -> np.ndarray:
    """σ(m / T), T fitted on one half of the pairs for the other."""
    result, halves = np.empty(len(margin)), (np.arange(len(margin)) % 2 == 0, np.arange(len(margin)) % 2 == 1)
    for fit, use in (halves, halves[::-1]):
        grid = np.geomspace(0.1, 20, 200)
        best = min(grid, key=lambda t: np.logaddexp(0, -margin[fit] / t).mean())
        result[use] = expit(margin[use] / best)
    return result


def best_of_n(proxy: np.ndarray, value: np.ndarray) -> list[float]:
    """Unbiased estimate of the mean value of the best of n by proxy, for each n, from prompts x POOL samples."""
    count = proxy.shape[1]
    ranked = np.take_along_axis(value, proxy.argsort(1, kind="stable"), 1)  # worst first
    i, means = np.arange(1, count + 1), []
    for n in BEST_OF:
        with np.errstate(invalid="ignore", divide="ignore"):  # C(i-1, n-1) / C(count, n): the i-th is the best of n
            log = gammaln(i) - gammaln(n) - gammaln(i - n + 1)
            log -= gammaln(count + 1) - gammaln(n + 1) - gammaln(count - n + 1)
        means.append(float((np.where(i >= n, np.exp(log), 0) * ranked).sum(1).mean()))
    return means


def over(margin: np.ndarray, bound: np.ndarray) -> dict[str, float]:
    """The shares of pairs with m > δ*/2 and m > δ*; NaN where there is no bound."""
    some = np.nan if np.isnan(bound).any() else 1.0
    return {"half": some * float((margin > bound / 2).mean()), "whole": some * float((margin > bound).mean())}


def embedded_record(seed: Seed, arm: str) -> dict:
    out, rows = seed.arm(f"embedded-{arm}", arm), lines(common.DATA / "preference_eval.jsonl")
    last, held_out = lines(out / "metrics.jsonl")[-1], lines(out / "eval.jsonl")
    true = np.subtract(*([toy_data.gold_score(row["prompt"], row[k]) for row in rows] for k in ("chosen", "rejected")))
    names = ("similarity", "margin", "bound")
    similarity, margin, bound = (np.array([line[name] for line in held_out], float) for name in names)
    near, decided = np.arange(len(rows)) % 2 == 0, true != 0  # near copies: as toy_data.build makes them
    return {
        "accuracy": last["accuracy"], "gold accuracy": ((margin > 0) == (true > 0))[decided].mean(),
        "Spearman": last["ranked_spearman"], "largest margin": margin.max(),
        "near copies, m > 5": (margin[near] > 5).mean(),
        **({"points": [similarity.tolist(), margin.tolist(), bound.tolist()]}
           if seed.seed == 1 and arm in ("none", "cos_sim") else {}),
    }  # fmt: skip


def reward_record(seed: Seed, arm: str, epochs: int) -> dict:
    out = seed.reward(arm, epochs)
    rows, held_out = lines(seed.folder / "pairs_eval.jsonl"), lines(out / "eval.jsonl")
    assert len(rows) == len(held_out)
    margin = np.array([line["margin"] for line in held_out])
    true, kind = np.array([row["gold"] for row in rows]), np.array([row["kind"] for row in rows])
    # The bounds of cos_sim, which are also those by which `none` and smoothing are judged.
    reference = lines(seed.reward("cos_sim", epochs) / "eval.jsonl")
    similarity = np.array([line["similarity"] for line in reference])
    own = arm not in ("none", "smoothing")
    bound = np.array([line["bound"] for line in (held_out if own else reference)])
    training = lines(seed.folder / "pairs_train.jsonl")
    train_margin = scores(out / "model", training, "chosen") - scores(out / "model", training, "rejected")
    train_bound = bound.mean()  # of the constant ones; else:
    if arm not in ("fixed", "random"):
        train_bound = training_bounds(out if own else seed.reward("cos_sim", epochs), training)
    pool = seed.pool()
    score, value = (np.array(x).reshape(-1, POOL) for x in (scores(out / "model", pool), [row["gold"] for row in pool]))
    spread = score.std()
    decided, quarters = true != 0, np.argsort(np.argsort(similarity, kind="stable"), kind="stable") * 4 // len(margin)
    agrees = (margin > 0) == (true > 0)
    fair = {"raw": expit(margin), "tempered": tempered(margin)}
    fair["linked"] = inverse_link(margin, bound) if own else expit(margin)
    if arm == "smoothing":
        fair["linked"] = ((expit(margin) - SMOOTHING) / (1 - 2 * SMOOTHING)).clip(0, 1)
    which = (expit(np.abs(margin)) * 20 - 10).astype(int).clip(0, 9)
    reliability = [[float(expit(np.abs(margin[which == b])).mean()), float((margin[which == b] > 0).mean())]
                   for b in range(10) if (which == b).sum() >= 8]  # fmt: skip
    kinds = {name: kind == name for name in ("far", "near", "equal")}
    return {
        "accuracy": (margin > 0).mean(),
        "gold accuracy": agrees[decided].mean(),
        **{f"gold accuracy, {name}": agrees[decided & kinds[name]].mean() for name in ("far", "near")},
        **{f"gold accuracy, quarter {q + 1}": agrees[decided & (quarters == q)].mean() for q in range(4)},
        **{f"accuracy, quarter {q + 1}": (margin > 0)[quarters == q].mean() for q in range(4)},
        "Spearman": np.nanmean([spearmanr(s, v).statistic for s, v in zip(score, value)]),
        "margin p99": np.quantile(margin, 0.99), "σ₀": spread,
        "score and length": pearsonr(score.ravel(), [len(row["answer"]) for row in pool]).statistic,
        "|Δ|/σ₀ at equal gold": np.abs(margin[kinds["equal"]]).mean() / spread,
        "|Δ|/σ₀ of near copies": np.abs(margin[kinds["near"]]).mean() / spread,
        "binds in training": over(train_margin, train_bound), "binds held out": over(margin, bound),
        "calibration": {name: calibration(p) for name, p in fair.items()}, "reliability": reliability,
        "best of n": best_of_n(score, value), "proxy": [x / spread for x in best_of_n(score - score.mean(), score)],
        **({"points": [similarity.tolist(), margin.tolist(), bound.tolist()]}
           if seed.seed == 1 and epochs == LONG and arm in ("none", "cos_sim") else {}),
    }  # fmt: skip


def training_bounds(run: Path, rows: list[dict]) -> np.ndarray:
    """The bounds that the training pairs of a run had: reward.py's own functions on its own rows."""
    args = reward.Args(**json.loads((run / "args.json").read_text()))
    tokenizer, process = common.load_tokenizer(args.model, False), common.start(args.seed)
    encode = functools.partial(common.encode_pair, tokenizer=tokenizer, max_length=args.max_length)
    pairs, _ = common.load_data(args, encode, process)
    assert len(pairs) == len(rows)
    return reward.pair_bounds(reward.similarities(pairs, args, process), args).numpy()


# ---------------------------------------------------------------- policies


def ppo_record(seed: Seed, arm: str) -> dict:
    loss, units, *clip = arm.split("/")
    made, other = seed.reward(loss, LONG) / "model", {"none": "cos_sim", "cos_sim": "none"}[loss]
    own = spread = seed.spread(loss)
    if units == "other":
        spread = seed.spread(other)
        scaled = seed.folder / f"reward-{loss}-scaled"
        with seed.alone(scaled.name):
            if not scaled.exists():
                model = transformers.AutoModelForSequenceClassification.from_pretrained(made)
                model.score.weight.data *= spread / own
                with common.writing(scaled) as part:
                    model.save_pretrained(part)
                    transformers.AutoTokenizer.from_pretrained(made).save_pretrained(part)
        made = scaled
    name, sample = f"ppo-{arm}".replace("/", "-").replace(" ", "-"), ppo.sample

    def spy(engine, model, tokenizer, prompts, seeds, *rest):
        rollout = sample(engine, model, tokenizer, prompts, seeds, *rest)
        if len(seeds[0]) == 3:  # of a training step
            texts = [tokenizer.batch_decode(x, skip_special_tokens=True) for x in (rollout.prompts, rollout.responses)]
            with open(seed.folder / f"gold-{name}.jsonl", "a") as file:
                file.write(json.dumps([seeds[0][1], np.mean([gold(p, a) for p, a in zip(*texts)])]) + "\n")
        return rollout

    flags = f"--policy_model {seed.sft()} --reward_model {made} {seed.data('prompts')} --epochs 32 --max_kl 0"
    flags += " --score_clip 1e9" * bool(clip)
    out = seed.run(ppo, name, "generations.json", flags, sample=spy)
    steps = [line for line in lines(out / "metrics.jsonl") if line["split"] == "train"]
    found = dict(json.loads(line) for line in (seed.folder / f"gold-{name}.jsonl").read_text().splitlines())
    windows = [steps[i : i + 10] for i in range(0, len(steps), 10)]
    mean = {name: [float(np.mean([s[name] for s in w])) for w in windows] for name in ("score_growth", "kl")}
    return {
        "steps": [w[-1]["step"] for w in windows],
        "kl": mean["kl"],
        "growth": mean["score_growth"],
        "G": [x / spread for x in mean["score_growth"]],
        "σ₀": spread,
        "gold": [float(np.mean([found[s["step"]] for s in w])) for w in windows],
    }


def ipo_loss(margin: torch.Tensor, label_smoothing: float = 0.0, kl_beta: float = 0.1) -> torch.Tensor:
    """IPO's: the difference of the log ratios, z / β, is drawn to 1 / (2 β)."""
    return (margin / kl_beta - 1 / (2 * kl_beta)).square()


def dpo_record(seed: Seed, arm: str) -> dict:
    start, found, evaluate = seed.sft(), [], dpo.evaluate
    tokenizer = common.load_tokenizer(str(start), False)
    reference = transformers.AutoModelForCausalLM.from_pretrained(start).eval().to(DEVICE)
    prompts = [row["prompt"] for row in lines(seed.folder / "prompts_eval.jsonl")] * ANSWERS
    ids = [common.tokenize(tokenizer, prompt)[0] for prompt in prompts]

    @torch.no_grad()
    def spy(engine, pairs, similarity, ref_logps, ranked, args, collator, process):
        seeds, policy = [[seed.seed, i] for i in range(len(ids))], engine.module
        answers = common.sample(engine, policy, tokenizer, ids, [96] * len(ids), seeds, 480, process)
        batch = common.collate_rows([p + a for p, a in zip(ids, answers)], [*map(len, ids)], 0, process.device)
        kl = common.token_logps(policy, **batch) - common.token_logps(reference, **batch)
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        found.append([kl.sum().item() / len(ids), float(np.mean([gold(p, a) for p, a in zip(prompts, texts)]))])
        return evaluate(engine, pairs, similarity, ref_logps, ranked, args, collator, process)

    flags = f"--model {start} {seed.data('pairs')} --eval_every 20 --generate 0 --overwrite"
    flags += {"cos_sim": " --constraint cos_sim", "fixed": " --constraint fixed --fixed_bound 1",
              "smoothing": " --label_smoothing 0.1"}.get(arm, "")  # fmt: skip
    patches = {"evaluate": spy} | ({"ranking_loss": ipo_loss} if arm == "IPO" else {})
    path = seed.folder / f"dpo-{arm}" / "curve.json"
    if not path.exists():
        seed.run(dpo, f"dpo-{arm}", "curve.json", flags, **patches)
        path.write_text(json.dumps(found))
    found = json.loads(path.read_text())
    return {"kl": [kl for kl, _ in found], "gold": [value for _, value in found]}


# ---------------------------------------------------------------- real text


def real_record(args, seed: int, arm: str, epochs: int) -> dict:
    """--model, after training on --pairs of the --data of a seed, on --eval_data and --ranked_data."""
    folder = args.folder / f"real-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / "data.lock"):
        if not (folder / "train.jsonl").exists():
            rows = common.read_rows("--data", args.data, "train")
            chosen = random.Random(seed).sample(rows, min(args.pairs, len(rows)))
            (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    constraint = "none" if arm == "none" else "cos_sim" if args.encoder else "given"
    flags = f"--model {args.model} --dataset {folder}/train.jsonl --eval_dataset {args.eval_data} --seed {seed} "
    flags += f"--ranked_dataset {args.ranked_data} " * bool(args.ranked_data) + f"--constraint {constraint} "
    flags += f"--encoder {args.encoder} " * (constraint == "cos_sim") + "--shuffle_bounds " * arm.endswith("shuffle")
    flags += f"--epochs {epochs} --dtype bf16 --global_batch_size 16 --micro_batch_size 8 --learning_rate 2e-5 "
    flags += f"--warmup_steps 10 --max_length 512 --log_every 1 --output_dir {folder}/{arm}-{epochs}"
    out = folder / f"{arm}-{epochs}"
    if not (out / "eval.jsonl").exists():
        reward.main(common.parse_args(reward.Args, reward.preset, flags.split()))
    metrics, held_out = lines(out / "metrics.jsonl"), lines(out / "eval.jsonl")
    margin, bound = (np.array([line[name] for line in held_out], float) for name in ("margin", "bound"))
    last, training = metrics[-1], [line for line in metrics if line["split"] == "train"]
    chosen, rejected = (np.array([line[f"{side}_score"] for line in held_out]) for side in ("chosen", "rejected"))
    return {
        "accuracy": last["accuracy"],
        "Spearman": last.get("ranked_spearman", np.nan),
        "Kendall": last.get("ranked_kendall", np.nan),
        "margin p99": np.quantile(margin, 0.99),
        "largest margin": margin.max(),
        "σ₀": np.concatenate([chosen, rejected]).std(),
        "binds held out": over(margin, bound),
        "train accuracy, last steps": np.mean([line["accuracy"] for line in training[-20:]]),
        "calibration": {"raw": calibration(expit(margin)), "tempered": calibration(tempered(margin))},
        "tokens_per_s": float(np.median([line["tokens_per_s"] for line in training[5:]])),
    }


# ---------------------------------------------------------------- results


def rounded(value):
    """For the results file: four digits, null for what is NaN."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.4g}") if np.isfinite(value) else None
    return value


def jobs(args) -> list[tuple]:
    """(experiment, arm, seed, epochs) of all runs that --make, --arms, --seeds and --epochs leave."""
    each = [("embedded", arm, seed, 5) for seed in args.seeds for arm in EMBEDDED_ARMS]
    each += [("reward", arm, seed, epochs) for seed in args.seeds for epochs in args.epochs for arm in REWARD_ARMS]
    each += [("ppo", arm, seed, LONG) for seed in args.seeds for arm in PPO_ARMS]
    each += [("dpo", arm, seed, 0) for seed in args.seeds for arm in DPO_ARMS]
    if args.model:
        some = [epochs for epochs in args.epochs if epochs in (1, 3)]
        each += [("real", arm, seed, epochs) for seed in args.seeds[:3] for epochs in some for arm in REAL_ARMS]
    return [job for job in each if job[0] in args.make.split(",") and (not args.arms or job[1] in args.arms.split(";"))]


def make(args) -> None:
    for experiment, arm, seed, epochs in jobs(args):
        records = lines(args.results)
        if (experiment, arm, seed, epochs) in {(r["experiment"], r["arm"], r["seed"], r["epochs"]) for r in records}:
            continue
        if experiment == "real":
            record = real_record(args, seed, arm, epochs)
        else:
            figures = {"embedded": embedded_record, "ppo": ppo_record, "dpo": dpo_record,
                       "reward": functools.partial(reward_record, epochs=epochs)}[experiment]  # fmt: skip
            record = figures(Seed(args.folder, seed, records), arm)
        record = {"experiment": experiment, "arm": arm, "seed": seed, "epochs": epochs, **rounded(record)}
        with filelock.FileLock(f"{args.results}.lock"), open(args.results, "a") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------- tables and pictures


def bootstrap(values: np.ndarray) -> tuple[float, float]:
    """The interval of the mean over the seeds: 95 % of the draws. It is narrow: of five seeds 84 % hold the truth."""
    draws = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(1)
    return tuple(np.quantile(draws, (0.025, 0.975)))


def compared(records: list[dict], columns: dict) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """For each arm and column the values of the seeds, and their paired differences to those of the first arm."""
    values = {}  # arm: for each column {seed: value}
    for record in sorted(records, key=lambda record: ARMS.index(record["arm"])):
        each = values.setdefault(record["arm"], [{} for _ in columns])
        for column, known in zip(columns.values(), each):
            value = column(record)
            known[record["seed"]] = np.nan if value is None else value
    first, result = next(iter(values.values()), None), {}
    for arm, each in values.items():
        differences = [np.array([own[s] - base.get(s, np.nan) for s in own]) for own, base in zip(each, first)]
        result[arm] = [(np.array([*own.values()]), d[np.isfinite(d)]) for own, d in zip(each, differences)]
    return result


def table(title: str, records: list[dict], columns: dict) -> None:
    """Mean of each column over the seeds; behind it, of all arms but the first, the paired difference to the first."""
    if not records:
        return
    head = " | ".join(columns).replace("|Δ|", "abs Δ")
    print(f"\n{title}\n\n| arm | {head}" + " |\n|" + " --- |" * (len(columns) + 1))
    for place, (arm, cells) in enumerate(compared(records, columns).items()):
        texts = [f"{np.nanmean(own):.3g}" if np.isfinite(own).any() else "" for own, _ in cells]
        for i, (_, difference) in enumerate(cells):
            if place and len(difference):
                low, high = bootstrap(difference)
                texts[i] += f" ({difference.mean():+.3g} [{low:+.2g}, {high:+.2g}])"
        print(f"| `{arm}` ({len(cells[0][0])}) | " + " | ".join(texts) + " |")


def summary(records: list[dict]) -> str:
    """The README's table of models that know labels by heart: values; from column 3, differences to `none`."""
    columns = {
        "m > δ*/2": ("{:.0%}", lambda r: r["binds in training"]["half"]),
        "m, p99": ("{:.1f}", lambda r: r["margin p99"]),
        "gold accuracy, %": ("{:.1f}", lambda r: 100 * r["gold accuracy"]),
        "NLL of labels": ("{:.2f}", lambda r: r["calibration"]["raw"]["nll"]),
        "alike: m/σ₀": ("{:.2f}", lambda r: r["|Δ|/σ₀ at equal gold"]),
        "gold, best of 256": ("{:.1f}", lambda r: r["best of n"][-1]),
    }
    text = "| | " + " | ".join(columns) + " |\n|" + " --- |" * (len(columns) + 1) + "\n"
    runs = [r for r in records if (r["experiment"], r["epochs"]) == ("reward", LONG)]
    for place, (arm, cells) in enumerate(compared(runs, {key: f for key, (_, f) in columns.items()}).items()):
        texts = [form.format(own.mean()) for (form, _), (own, _) in zip(columns.values(), cells)]
        if place:
            signed = [form.replace(":", ":+") for form, _ in columns.values()]
            texts[2:] = [
                f"{form.format(d.mean())} [{', '.join(map(form.format, bootstrap(d)))}]"
                for form, (_, d) in zip(signed[2:], cells[2:])
            ]
        text += f"| `{arm}` | " + " | ".join(texts) + " |\n"
    return text


def at(record: dict, root_kl: float, name: str) -> float:
    """A curve's value at a √KL, between its points; NaN beyond them."""
    x, y = np.sqrt(np.maximum(record["kl"], 0)), np.array(record[name])
    order = np.argsort(x)
    return float(np.interp(root_kl, x[order], y[order], right=np.nan))


def tables(records: list[dict]) -> None:
    of = {name: [r for r in records if r["experiment"] == name] for name in EXPERIMENTS}
    names = ["accuracy", "gold accuracy", "Spearman", "largest margin", "near copies, m > 5"]
    table("Embedded task, 5 epochs", of["embedded"], {name: lambda r, n=name: r[n] for name in names})
    for epochs in sorted({r["epochs"] for r in of["reward"]}):
        runs = [r for r in of["reward"] if r["epochs"] == epochs]
        binds = {
            f"m > {part}, {where}": lambda r, k=key, w=where: r[f"binds {w}"][k]
            for key, part in (("half", "δ*/2"), ("whole", "δ*"))
            for where in ("in training", "held out")
        }
        table(f"How often the bound binds (none, smoothing: cos_sim's), {epochs} epochs", runs, binds)
        share = np.mean([r["binds in training"]["half"] for r in runs if r["arm"] == "none"])
        state = "idle" if share < 0.05 else "at work"
        print(f"\nThe bound is {state}: `none` has m > δ*/2 in {share:.1%} of the training pairs.")
        names = ["accuracy", "gold accuracy", "gold accuracy, far", "gold accuracy, near", "Spearman", "margin p99",
                 "σ₀", "score and length", "|Δ|/σ₀ at equal gold", "|Δ|/σ₀ of near copies"]  # fmt: skip
        columns = {name: lambda r, n=name: r[n] for name in names}
        table(f"Reward models, {epochs} epochs", runs, columns)
        columns |= {"best of 256": lambda r: r["best of n"][-1], "nll": lambda r: r["calibration"]["raw"]["nll"]}
        for prior in ("len_rat", "cos_sim"):  # what the prior itself does
            both = [r for r in runs if r["arm"].removesuffix("+shuffle") == prior]
            table(f"{prior} and its own bounds, dealt to other pairs, {epochs} epochs", both, columns)
        quarters = {f"{kind}, quarter {q} of s": lambda r, n=f"{kind}, quarter {q}": r.get(n, np.nan)
                    for kind in ("accuracy", "gold accuracy") for q in (1, 2, 3, 4)}  # fmt: skip
        table(f"Accuracy by similarity, {epochs} epochs", runs, quarters)
        kinds = {
            f"{figure} {kind}": lambda r, k=kind, f=figure: r["calibration"][k][f]
            for figure in ("nll", "brier", "ece")
            for kind in ("raw", "linked", "tempered")
        }
        table(f"Calibration on held-out labels, {epochs} epochs", runs, kinds)
        best = {f"{what}, n = {n}": lambda r, w=what, n=n: r[w][BEST_OF.index(n)]
                for what in ("best of n", "proxy") for n in BEST_OF[2::2]}  # fmt: skip
        table(f"Best of n: gold, and the model's own score / σ₀, {epochs} epochs", runs, best)
    last = {name: lambda r, n=name: float(np.mean(r[n][-3:])) for name in ("growth", "G", "kl", "gold")}
    last |= {"best gold": lambda r: max(r["gold"]), "at step": lambda r: r["steps"][int(np.argmax(r["gold"]))]}
    last |= {f"gold at √KL {x}": lambda r, x=x: at(r, x, "gold") for x in (1, 2, 3)}
    table("PPO, last 30 of 160 steps", of["ppo"], last)
    pairs = {"in cos_sim's units": ("none/other", "cos_sim/own"), "in none's units": ("none/own", "cos_sim/other"),
             "in their own units": ("none/own", "cos_sim/own")}  # fmt: skip
    pairs |= {f"{how}, without the clip": [f"{arm}/no clip" for arm in both] for how, both in pairs.items()}
    for how, both in pairs.items():
        table(f"PPO {how}", [r for r in of["ppo"] if r["arm"] in both], last)
    last = {name: lambda r, n=name: r[n][-1] for name in ("kl", "gold")} | {"best gold": lambda r: max(r["gold"])}
    last |= {f"gold at √KL {x}": lambda r, x=x: at(r, x, "gold") for x in (1, 2)}
    table("DPO", of["dpo"], last)
    for epochs in sorted({r["epochs"] for r in of["real"]}):
        runs = [r for r in of["real"] if r["epochs"] == epochs]
        names = ["accuracy", "Spearman", "Kendall", "margin p99", "σ₀", "train accuracy, last steps"]
        columns = {name: lambda r, n=name: r[n] for name in names}
        columns |= {f"m > {part}": lambda r, k=key: r["binds held out"][k] for key, part in
                    (("half", "δ*/2"), ("whole", "δ*"))}  # fmt: skip
        columns |= {f"nll {kind}": lambda r, k=kind: r["calibration"][k]["nll"] for kind in ("raw", "tempered")}
        table(f"Real text, {epochs} epochs", runs, columns)


def pictures(records: list[dict], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def runs(experiment, arm, epochs):
        return [r for r in records if (r["experiment"], r["arm"], r["epochs"]) == (experiment, arm, epochs)]

    def named(arm):
        return arm.replace("/own", ", own units").replace("/other", ", the other's units")

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    free, bounded = (runs("embedded", arm, 5)[0]["points"] for arm in ("none", "cos_sim"))
    similarity, bound = np.array(sorted(zip(bounded[0], bounded[2]))).T
    titles = {"ranking loss alone (none)": free[1], "with the bound (cos_sim)": bounded[1]}
    for axis, (title, margin) in zip(axes, titles.items()):
        axis.scatter(bounded[0], margin, s=8, alpha=0.5, linewidths=0)
        axis.plot(similarity, bound, color="C3", label="bound δ*(s)")
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.set(title=title, xlabel="similarity s of the two responses")
    axes[0].set_ylabel("margin m of held-out pairs")
    axes[1].legend()
    figure.savefig(folder / "margins.png", dpi=110)

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for arm, color in (("none", "C0"), ("cos_sim", "C1")):
        for record in runs("reward", arm, LONG)[:1]:
            similarity, margin, bound = map(np.array, record["points"])
            left.scatter(similarity, margin, s=6, alpha=0.5, linewidths=0, color=color, label=arm)
    order = np.argsort(similarity)
    left.plot(similarity[order], bound[order], color="C3", label="δ*")
    left.set(xlabel="similarity s", ylabel="margin m, held out", title=f"After {LONG} epochs")
    left.set_ylim(None, margin.max() * 2)
    curves = [(f"{loss}/{units}", color, style) for loss, color in (("none", "C0"), ("cos_sim", "C1"))
              for units, style in (("own", "-"), ("other", "--")) if runs("ppo", f"{loss}/{units}", LONG)]  # fmt: skip
    for arm, color, style in curves:
        some = runs("ppo", arm, LONG)
        root = np.sqrt(np.maximum(np.mean([r["kl"] for r in some], 0), 0))
        for axis, name in ((middle, "G"), (right, "gold")):
            axis.plot(root, np.mean([r[name] for r in some], 0), style, color=color, label=named(arm))
    middle.set(xlabel="√KL", title="PPO: growth of the score / σ₀")
    right.set(xlabel="√KL", title="PPO: gold score")
    for axis in (left, middle):
        axis.legend(markerscale=2)
    figure.savefig(folder / "evidence.png", dpi=110)

    figure, axes = plt.subplots(2, 2, figsize=(10, 7.6), layout="constrained")
    (sure, best), (score, direct) = axes
    for color, arm in enumerate(("none", "cos_sim", "len_rat", "fixed", "smoothing")):
        if not (some := runs("reward", arm, LONG)):
            continue
        points = np.array(sorted(point for r in some for point in r["reliability"]))
        means = np.array([part.mean(0) for part in np.array_split(points, 10)])
        sure.plot(*means.T, "o-", markersize=3, color=f"C{color}", label=arm)
        n = np.array(BEST_OF)
        best.plot(np.log(n) - (n - 1) / n, np.mean([r["best of n"] for r in some], 0), color=f"C{color}", label=arm)
    sure.plot([0.5, 1], [0.5, 1], color="0.6", linewidth=0.8)
    sure.set(xlabel="σ(|m|)", ylabel="share that the label agrees with", title=f"Reliability, {LONG} epochs")
    best.set(xlabel="KL = log n - (n - 1) / n", title=f"Gold score of the best of n, {LONG} epochs")
    for arm, color, style in curves:
        some = runs("ppo", arm, LONG)
        score.plot(some[0]["steps"], np.mean([r["growth"] for r in some], 0), style, color=color, label=named(arm))
    score.set(xlabel="PPO step", title="PPO: growth of the score, as it is")
    for color, arm in enumerate(DPO_ARMS):
        if some := runs("dpo", arm, 0):
            root = np.sqrt(np.maximum(np.mean([r["kl"] for r in some], 0), 0))
            direct.plot(root, np.mean([r["gold"] for r in some], 0), "o-", markersize=3, color=f"C{color}", label=arm)
    direct.set(xlabel="√KL", title="DPO: gold score")
    for axis in (sure, score, direct):
        axis.legend()
    figure.savefig(folder / "details.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", default=",".join(EXPERIMENTS), help="experiments whose missing runs are made")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--epochs", type=int, nargs="+", default=EPOCHS, help="of the reward models that are compared")
    parser.add_argument("--arms", default="", help="some arms, with ; between them")
    parser.add_argument("--results", type=Path, default=ROOT / "tests" / "evidence.jsonl")
    parser.add_argument("--folder", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--pictures", type=Path, default=None, help="draw the README's pictures into this folder")
    parser.add_argument("--model", default="", help="real: the language model to start from")
    parser.add_argument("--encoder", default="", help="real: the text encoder; none: the data's column similarity")
    parser.add_argument("--data", default="", help="real: pairs, in any format that reward.py reads")
    parser.add_argument("--eval_data", default="", help="real: held-out pairs")
    parser.add_argument("--ranked_data", default="", help="real: ranked responses")
    parser.add_argument("--pairs", type=int, default=1500, help="real: pairs of each seed")
    args = parser.parse_args()
    args.results.touch()
    make(args)
    records = lines(args.results)
    tables(records)
    print("\n" + summary(records))
    if args.pictures:
        pictures(records, args.pictures)


if __name__ == "__main__":
    main()
