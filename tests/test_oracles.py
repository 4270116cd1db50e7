"""sft.py, reward.py and dpo.py against a plain PyTorch loop that shares nothing with them but the order of the rows.

The loop reads and tokenizes the rows itself, runs each sequence alone through a plain transformers model (fp32, no
shared prefix, no padding), and has losses, bounds, metrics, AdamW's groups and schedule written out. A real run's
weights, metrics.jsonl and eval.jsonl must be its own. Every coefficient is off its default.
"""

import common

import functools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import lines

import dpo
import reward
import sft

TRAINING = dict(learning_rate=0.001, weight_decay=0.7, warmup_steps=3, seed=7, epochs=2, max_steps=9, max_length=50)
TRAINING |= dict(global_batch_size=6, micro_batch_size=2, eval_every=5, log_every=2)
BOUNDS = dict(beta1=3, beta2=0.2, beta3=-1.5, random_low=1, random_high=3)
DPO = dict(label_smoothing=0.2, kl_beta=0.08)
SET = SimpleNamespace(**TRAINING, **BOUNDS, **DPO)
STD = 0.4  # the models' initializer_range, so large that every gradient is clipped
CAUSAL, CLASSIFIER = transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification
SIDES = ("chosen", "rejected")
TOKENIZER = transformers.AutoTokenizer.from_pretrained(common.DATA / "toy")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with some rows of data/, and `start` and `other`, Llamas with random weights, biases and norms."""
    folder = tmp_path_factory.mktemp("oracles")
    for name, count in dict(sft_train=37, sft_eval=9, preference_train=44, preference_eval=11, ranked_eval=4).items():
        rows = (common.DATA / f"{name}.jsonl").read_text().splitlines(True)[:count]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    size = dict(hidden_size=32, num_hidden_layers=2, head_dim=8, intermediate_size=64, initializer_range=STD)
    size |= dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
    config = transformers.LlamaConfig.from_pretrained(common.DATA / "toy", **size)
    for seed, name in enumerate(("start", "other")):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config)
        for parameter in model.parameters():
            parameter.data += STD * torch.randn_like(parameter) * (parameter.dim() == 1)
        model.save_pretrained(folder / name)
        TOKENIZER.save_pretrained(folder / name)
    return folder


# ---------------------------------------------------------------- the loop


def tokenized(prompt: str, *responses: str) -> tuple[int, list[list[int]]] | None:
    """The prompt's number of tokens, and each prompt + response + EOS; None where one is longer than --max_length."""
    start, eos = TOKENIZER(prompt).input_ids, [TOKENIZER.eos_token_id]
    rows = [start + TOKENIZER(text, add_special_tokens=False).input_ids + eos for text in responses]
    return (len(start), rows) if max(map(len, rows)) <= SET.max_length else None


def token_losses(model, ids: list[int], start: int) -> torch.Tensor:
    """-log π of the tokens from `start` on."""
    logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(ids[start:]), reduction="none")


def trained(model, lengths: list[int], loss_of, evaluate) -> list[tuple[str, dict]]:
    """Train it. The lines of metrics.jsonl, null as NaN. loss_of(rows, epoch): the values of a global batch, of which
    "loss" has a gradient; evaluate(): of the held-out rows."""

    def evaluated(step: int) -> tuple[str, dict]:
        with torch.no_grad():
            return "eval", {name: float(value) for name, value in evaluate().items()} | {"step": step}

    vectors, others = ([p for p in model.parameters() if (p.dim() == 1) == is_one] for is_one in (True, False))
    groups = [dict(params=vectors, weight_decay=0.0), dict(params=others, weight_decay=SET.weight_decay)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    epochs = [common.global_batches(np.array(lengths), SET.global_batch_size, SET.seed, i) for i in range(SET.epochs)]
    steps = [(rows, i) for i, batches in enumerate(epochs) for rows in batches][: SET.max_steps]
    assert len(epochs[0]) + 2 < len(steps) == SET.max_steps and len(lengths) % SET.global_batch_size  # some left out
    expected, history, counts, warm = [evaluated(0)], [], [], SET.warmup_steps
    for done, (rows, epoch) in enumerate(steps):
        share = done / warm if done < warm else (1 + math.cos(math.pi * (done - warm) / (len(steps) - warm))) / 2
        for group in optimizer.param_groups:
            group["lr"] = SET.learning_rate * share
        optimizer.zero_grad()
        values = loss_of(rows, epoch)
        values["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert norm > 1  # clipping acts
        optimizer.step()
        counts.append(values.pop("tokens"))  # since the last line, as rates are
        values |= {"lr": group["lr"], "grad_norm": norm}
        history.append([torch.as_tensor(value).item() for value in values.values()])
        step = done + 1
        if step in (1, len(steps)) or step % SET.log_every == 0:
            expected.append(
                ("train", dict(zip(values, np.mean(history, 0))) | {"step": step, "tokens": np.mean(counts)})
            )
            history, counts = [], []
        if step % SET.eval_every == 0 or step == len(steps):
            expected.append(evaluated(step))
            counts = []
    return expected


def same(line: dict, own: dict[str, float]) -> None:
    line = {name: math.nan if value is None else value for name, value in line.items()}
    assert line == pytest.approx(own, rel=1e-4, abs=2e-5, nan_ok=True)
    assert line.get("lr", 0) == pytest.approx(own.get("lr", 0), rel=1e-6)


@pytest.fixture
def agree(run, files, tmp_path):
    """A run's lines of metrics are the loop's to 4 digits; each tensor has moved as the loop's, to 1e-3 of its move."""

    def call(script, flags: str, model, *loop) -> None:
        data, start = "sft" if script is sft else "preference", {k: v.clone() for k, v in model.state_dict().items()}
        settings = TRAINING | dict(model=files / "start", output_dir=tmp_path)
        settings |= dict(dataset=files / f"{data}_train.jsonl", eval_dataset=files / f"{data}_eval.jsonl")
        settings |= dict(generate=0) if script is not reward else {}
        settings |= BOUNDS | dict(ranked_dataset=files / "ranked_eval.jsonl") if script is not sft else {}
        settings |= DPO | dict(ref_model=files / "other") if script is dpo else {}
        run(script, *[word for name, value in settings.items() for word in (f"--{name}", str(value))], *flags.split())
        for line, (split, own) in zip(lines(tmp_path / "metrics.jsonl"), trained(model, *loop), strict=True):
            assert line.pop("split") == split
            rates = [line.pop(name) for name in ("tokens_per_s", "pairs_per_s", "rows_per_s") if name in line]
            line |= {"tokens": rates[0] / rates[1]} if rates else {}  # of a row or pair
            same(line, own)
        weights = type(model).from_pretrained(tmp_path / "model").state_dict()
        for name, own in model.state_dict().items():
            assert torch.dist(weights[name], own) < 1e-3 * torch.dist(own, start[name]), name

    return call


# ---------------------------------------------------------------- sft.py


@pytest.mark.parametrize("flags", ["", "--train_on_prompt"])
def test_sft(agree, files, flags):
    """-1/N Σ log π of the N response tokens of the global batch; with the flag of all but each row's first."""
    model, data = CAUSAL.from_pretrained(files / "start"), {}
    for name in ("train", "eval"):
        rows = [tokenized(row["prompt"], row["completion"]) for row in lines(files / f"sft_{name}.jsonl")]
        data[name] = [(ids, 1 if flags else start) for start, (ids,) in filter(None, rows)]
        assert len(data[name]) < len(rows)  # some are too long

    def values(rows: list) -> dict:
        loss = torch.cat([token_losses(model, *row) for row in rows]).mean()
        return {"loss": loss, "perplexity": loss.detach().exp()}

    def loss_of(rows, epoch: int) -> dict:
        rows = [data["train"][i] for i in rows]
        return values(rows) | {"tokens": np.mean([len(ids) for ids, _ in rows])}

    lengths = [len(ids) for ids, _ in data["train"]]
    agree(sft, flags, model, lengths, loss_of, lambda: values(data["eval"]))


# ---------------------------------------------------------------- pairs


def pairs_of(files, name: str) -> list[SimpleNamespace]:
    """Texts, both sequences, where the responses start, and the first token that differs, of each pair that fits."""
    pairs = []
    for row in (rows := lines(files / f"preference_{name}.jsonl")):
        if found := tokenized(*(texts := [row[column] for column in ("prompt", *SIDES)])):
            start, both = found
            first = next(i for i, (a, b) in enumerate(zip(*both)) if a != b)
            pairs.append(SimpleNamespace(texts=texts, start=start, both=both, first=first, lengths=[*map(len, both)]))
    assert len(pairs) < len(rows)  # some are too long
    return pairs


def similarity_of(encoder, pairs, constraint: str) -> torch.Tensor:
    """Shorter over longer length from the first token that differs on; cos_sim: (π - arccos(cos)) / π of the means of
    the encoder's last hidden states, the cosine clamped to [0, 1]."""
    if constraint != "cos_sim":
        return torch.tensor([(min(p.lengths) - p.first) / (max(p.lengths) - p.first) for p in pairs])
    model, angles = transformers.AutoModel.from_pretrained(encoder), []
    for prompt, *responses in (pair.texts for pair in pairs):
        texts = [torch.tensor([TOKENIZER(prompt + response).input_ids]) for response in responses]
        with torch.no_grad():
            a, b = (model(ids).last_hidden_state[0].double().mean(0) for ids in texts)
        angles.append(math.acos(min(max((a @ b / a.norm() / b.norm()).item(), 0), 1)))
    return 1 - torch.tensor(angles) / math.pi


def bounds_of(similarity: torch.Tensor, flags: str, epoch: int = 0) -> torch.Tensor:
    """δ* = β1 / (s + β2) + β3, or U(low, high) from (seed, epoch); NaN: none."""
    if "random" in flags:
        seed = int(np.random.SeedSequence([SET.seed, epoch]).generate_state(1)[0])
        drawn = torch.rand(len(similarity), generator=torch.Generator().manual_seed(seed))
        return SET.random_low + (SET.random_high - SET.random_low) * drawn
    bound = SET.beta1 / (similarity + SET.beta2) + SET.beta3
    bound = bound[np.random.default_rng(SET.seed).permutation(len(bound))] if "shuffle" in flags else bound
    return bound * math.nan if "none" in flags else bound


def terms(margin: torch.Tensor, bound: torch.Tensor, smoothing: float = 0) -> torch.Tensor:
    """The means of -log σ(m) and -log σ(δ* - m), each mixed with its mirrored one; without a bound the second is 0."""
    both = [-(1 - smoothing) * F.logsigmoid(x) - smoothing * F.logsigmoid(-x) for x in (margin, bound - margin)]
    return torch.stack([both[0].mean(), margin.new_zeros(()) if bound.isnan() else both[1].mean()])


def margin_values(margin: torch.Tensor, bound: torch.Tensor, losses: list[torch.Tensor]) -> dict:
    """Of n pairs' margins, bounds and two terms of the loss."""
    rank, constraint = torch.stack(losses).mean(0)
    values = dict(loss=rank + constraint, rank_loss=rank, constraint_loss=constraint, bound_mean=bound.mean())
    values |= dict(accuracy=(margin > 0).double().mean(), over_bound=(margin > bound).double().mean())
    values |= dict(margin_mean=margin.mean(), margin_std=margin.std(correction=0), margin_max=margin.max())
    return values | (dict.fromkeys(("constraint_loss", "over_bound"), math.nan) if bound.isnan().any() else {})


def correlations(a: list[float], b: list[float]) -> tuple[float, float]:
    """Spearman's and Kendall's, of the signs of all differences: their sums are the ranks, ties at their mean."""
    signs = [np.sign(np.subtract.outer(each, each)) for each in (a, b)]
    spearman = np.corrcoef(signs[0].sum(1), signs[1].sum(1))[0, 1]
    return spearman, (signs[0] * signs[1]).sum() / math.sqrt((signs[0] ** 2).sum() * (signs[1] ** 2).sum())


def pairs_agree(agree, files, out, script, flags: str, model, values_of, scores_of=None) -> None:
    """agree() of reward.py or dpo.py, and its eval.jsonl. values_of(ids, start): what the script logs of a response,
    (k,), margins being differences of the first; scores_of(pair), (2, K): those under the loss in training, where they
    are others, and whose means are then logged."""
    train, held_out = (pairs_of(files, name) for name in ("train", "eval"))
    names, encoder, smoothing = ["score"], "start", 0
    if script is dpo:
        names, encoder, smoothing = ["reward", "logps"], "other", SET.label_smoothing
    similarity, seen = (similarity_of(files / encoder, pairs, flags.split()[0]) for pairs in (train, held_out))
    rows = [(tokenized(row["prompt"], *row["responses"]), row["scores"]) for row in lines(files / "ranked_eval.jsonl")]
    ranked = [(*found, human) for found, human in rows if found]
    longer = [np.sign(np.subtract(*pair.lengths)) for pair in held_out]
    assert longer.count(0) > 1 and sum(longer) and 1 < len(ranked) < len(rows)  # some tie; some are too long
    logged = {}

    def metrics_of(pairs: list, bound: torch.Tensor, scores_of) -> dict:
        if scores_of:
            scores = [scores_of(pair) for pair in pairs]
            values = torch.stack([each.mean(1, keepdim=True) for each in scores])  # n 2 1
        else:
            values = torch.stack([torch.stack([values_of(ids, p.start) for ids in p.both]) for p in pairs])  # n 2 k
        columns = {f"{side}_{name}": values[:, i, k] for k, name in enumerate(names) for i, side in enumerate(SIDES)}
        margin = values[:, 0, 0] - values[:, 1, 0]
        logged.update(columns, margin=margin, bound=bound)
        losses = [terms(*each, smoothing) for each in zip([a - b for a, b in scores] if scores_of else margin, bound)]
        found = {name: column.mean() for name, column in columns.items()} | margin_values(margin, bound, losses)
        own = {"kl": -values[..., 0].mean() / SET.kl_beta} if script is dpo else {"score_std": values.std(correction=0)}
        return found | own

    def loss_of(rows, epoch: int) -> dict:
        pairs, bound = [train[i] for i in rows], bounds_of(similarity, flags, epoch)[rows]
        return metrics_of(pairs, bound, scores_of) | {"tokens": np.mean([sum(pair.lengths) for pair in pairs])}

    def evaluate() -> dict:
        values = metrics_of(held_out, bounds_of(seen, flags), None)
        own = [([values_of(ids, start)[0].item() for ids in both], human) for start, both, human in ranked]
        values |= zip(("ranked_spearman", "ranked_kendall"), np.mean([correlations(*each) for each in own], 0))
        values |= dict(spearman_similarity=correlations(logged["margin"].tolist(), seen.tolist())[0])
        return values | dict(length_accuracy=np.mean([(1 + sign) / 2 for sign in longer]))  # a tie counts a half

    agree(script, f"--constraint {flags}", model, [sum(p.lengths) - p.first for p in train], loss_of, evaluate)
    columns = logged | {"similarity": seen}
    for line, *values in zip(lines(out / "eval.jsonl"), *(column.tolist() for column in columns.values()), strict=True):
        same(line, dict(zip(columns, values)))


# ---------------------------------------------------------------- reward.py and dpo.py


@pytest.mark.parametrize(
    "flags", [*"len_rat random".split(), "none --loss_on token", "cos_sim --shuffle_bounds --loss_on token"]
)
def test_reward(agree, files, tmp_path, flags):
    """m is of the scores at EOS; on tokens L is the mean over all positions from the first that differs to the longer
    one's end, the shorter one going on with padding that no token sees. The new head is N(0, STD) from --seed."""
    model = CLASSIFIER.from_pretrained(files / "start", num_labels=1)
    head = torch.randn(model.score.weight.shape, generator=torch.Generator().manual_seed(SET.seed))
    model.score.weight.data = STD * head

    def values_of(ids: list[int], start: int) -> torch.Tensor:
        return model(torch.tensor([ids])).logits[0]  # 1

    def token_scores(pair) -> torch.Tensor:
        width, scores = max(pair.lengths), []
        for ids in pair.both:
            padding, pad = width - len(ids), model.config.pad_token_id
            mask = torch.tensor([[1] * len(ids) + [0] * padding])
            hidden = model.model(torch.tensor([ids + [pad] * padding]), attention_mask=mask).last_hidden_state
            scores.append(model.score(hidden)[0, pair.first :, 0])
        return torch.stack(scores)  # 2 K

    pairs_agree(agree, files, tmp_path, reward, flags, model, values_of, token_scores if "token" in flags else None)


@pytest.mark.parametrize("flags", ["len_rat --live_reference", "random"])
def test_dpo(agree, files, tmp_path, flags):
    """z = β [(log π - log π_ref)(chosen) - (log π - log π_ref)(rejected)], sums over a response, EOS included; π_ref
    is another model. kl is the mean of log π_ref - log π over all responses."""
    model, reference = (CAUSAL.from_pretrained(files / name) for name in ("start", "other"))

    @functools.cache
    @torch.no_grad()
    def before(start: int, *ids: int) -> torch.Tensor:
        return -token_losses(reference, ids, start).sum()

    def values_of(ids: list[int], start: int) -> torch.Tensor:
        own = -token_losses(model, ids, start).sum()
        return torch.stack([SET.kl_beta * (own - before(start, *ids)), own])

    pairs_agree(agree, files, tmp_path, dpo, flags, model, values_of)


# ---------------------------------------------------------------- sampled answers


@pytest.mark.parametrize("script", [sft, dpo], ids=["sft", "dpo"])
def test_an_answer_ends_at_the_maximum_length(run, files, tmp_path, script):
    """Of a model that says # whatever comes before, never EOS: prompt and answer have --max_length tokens together."""
    model = CAUSAL.from_pretrained(files / "start")
    for name, parameter in model.named_parameters():
        parameter.data.fill_("embed" in name or name.endswith("norm.weight"))  # each hidden state is all ones
    model.lm_head.weight.data[TOKENIZER("#", add_special_tokens=False).input_ids] = 1  # a logit of 32, others 0
    for part in (model, TOKENIZER):
        part.save_pretrained(tmp_path / "model")
    data = f"--eval_dataset {files}/{'sft' if script is sft else 'preference'}_eval.jsonl --max_length {SET.max_length}"
    flags = f"{data} --epochs 0 --generate 5 --micro_batch_size 2 --output_dir {tmp_path}/out"
    run(script, f"--model {tmp_path}/model {flags}")
    answers = json.loads((tmp_path / "out" / "generations.json").read_text())
    prompts = [len(TOKENIZER(answer["instruction"]).input_ids) for answer in answers]
    assert len(answers) == 5 and len(set(prompts)) > 1 and {*"".join(answer["output"] for answer in answers)} == {"#"}
    assert {len(answer["output"]) + prompt for answer, prompt in zip(answers, prompts)} == {SET.max_length}
