"""The scripts with their default data and encoders and with models by id, read from a Hub by the real clients."""

import gzip
import json
import math
import shutil
from pathlib import Path

import hub
import pytest
import torch
import transformers
from datasets import Dataset
from helpers import ROOT, launch, lines, rows_file
from safetensors.torch import load_file

from priors import cosine_similarity, encode_texts

WORDS = "amber birch cedar delta ember fjord grove heron islet jetty knoll larch maple north otter pearl".split()
BERT = "google-bert/bert-base-uncased"
LM = "--model someone/tiny-lm"
RM = "--policy_model someone/tiny-lm --reward_model someone/tiny-rm"
SHORT = "--max_steps 1 --micro_batch_size 2 --global_batch_size 4"
# Each task of each script with its own data, encoder, precision and ZeRO stages: only the sizes are smaller.
TASKS = {
    "sft alpaca": f"{LM} --generate 3",
    "sft tldr": f"{LM} --generate 3",
    "reward alpaca": f"{LM} --constraint cos_sim",
    "reward tldr": f"{LM} --constraint cos_sim",
    "dpo alpaca": f"{LM} --constraint cos_sim --generate 0",
    "ppo alpaca": f"{RM} --generate 3 --max_new_tokens 8",
    "ppo tldr": f"{RM} --generate 3 --max_new_tokens 8",
}
# Data sets that many have, by id; the last two words of a name are the script and what is read.
CHAT = "--model someone/tiny-chat"
ULTRA, HH, TRL = "HuggingFaceH4/ultrafeedback_binarized", "Anthropic/hh-rlhf", "trl-lib/tldr"
LISTED = {
    "reward hh": f"{LM} --dataset {HH}:train --eval_dataset {HH}:test",
    "reward ultrafeedback": f"{CHAT} --dataset {ULTRA}:train_prefs --eval_dataset {ULTRA}:test_prefs",
    "dpo ultrafeedback": f"{CHAT} --dataset {ULTRA}:train_prefs --eval_dataset {ULTRA}:test_prefs --generate 2",
    "sft ultrafeedback": f"{CHAT} --dataset {ULTRA}:train_prefs --eval_dataset {ULTRA}:test_prefs --generate 2",
    "ppo ultrafeedback": "--policy_model someone/tiny-chat --reward_model someone/tiny-rm --max_new_tokens 8 "
    f"--dataset {ULTRA}:train_prefs --eval_dataset {ULTRA}:test_prefs",
    "reward trl": f"{LM} --dataset {TRL}-preference:train --eval_dataset {TRL}-preference:validation",
    "sft trl": f"{LM} --dataset {TRL}:train --eval_dataset {TRL}:test --generate 2",
}
ABSENT = [
    "sft --model nobody/nothing",
    "sft --dataset nobody/nothing",
    "sft --dataset hf://datasets/nobody/nothing/rows.jsonl",
    "reward --constraint cos_sim --encoder nobody/nothing",
    f"dpo {LM} --ref_model nobody/nothing",
    "ppo --policy_model someone/tiny-lm --reward_model nobody/nothing",
]
# Runs each `name: [script, *flags]` in one process, and writes how it ended.
DRIVER = """
import importlib, json, sys, traceback
import common
ends = {}
for name, (script, *flags) in json.loads(sys.argv[1]).items():
    script = importlib.import_module(script)
    try:
        script.main(common.parse_args(script.Args, script.preset, flags))
        ends[name] = "finished"
    except common.InputError as error:
        ends[name] = f"error: {error}"
    except BaseException:
        ends[name] = traceback.format_exc()
with open(sys.argv[2], "w") as file:
    json.dump(ends, file)
"""


# ---------------------------------------------------------------- what the Hub holds


def say(number: int) -> str:
    """Four words, others for each number below 256."""
    return " ".join(WORDS[i % 16] for i in (number, number // 16, number * 7, number * 3))


def instructions(first: int, count: int) -> list[dict]:
    numbers = range(first, first + count)
    return [{"instruction": f"Say {say(i)}: ", "input": say(i + 1) * (i % 2), "output": say(i + 2)} for i in numbers]


def posts(first: int, count: int) -> list[dict]:
    numbers = range(first, first + count)
    rows = [{"title": say(i), "post": f"My {say(i)}.", "summary": say(i + 9)} for i in numbers]
    return [{"id": f"t3_{i}", "subreddit": "tifu", **row} for i, row in enumerate(rows)]


def alpaca_pairs() -> list[dict]:
    """20 pairs and 2 ties, the ties last."""
    rows = instructions(0, 22)
    return [
        {"instruction": row["instruction"], "input": row["input"], "output_1": row["output"], "output_2": say(90 + i)}
        | {"preference": 1 + i % 2 if i < 20 else 0, "raw_preference": 1 + i % 4}
        for i, row in enumerate(rows)
    ]


def comparisons(split: str, first: int, count: int) -> list[dict]:
    """Pairs of summaries of posts, and last of a news article."""
    news = {"id": "n", "post": None, "title": None, "subreddit": None, "site": "cnn", "article": "News."}
    infos = [news | {"id": p["id"], "post": p["post"], "site": None, "article": None} for p in posts(first, count)]
    return [
        {"info": info, "choice": i % 2, "split": split, "worker": "w", "batch": "b", "extra": {"confidence": 5}}
        | {"summaries": [{"text": say(n), "policy": "sup", "note": None} for n in (first + i, 90 + 3 * i)]}
        for i, info in enumerate([*infos, news])
    ]


def write_parquet(folder: Path, rows: list[dict], name: str = "0000") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).to_parquet(folder / f"{name}.parquet")


def write_data(root: Path) -> None:
    """A few rows of each default data set, in the files and revisions of the Hub's."""
    farm, converted = root / "tatsu-lab/alpaca_farm", "refs/convert/parquet"
    for split, (first, count) in {"sft": (0, 8), "preference": (40, 6), "unlabeled": (80, 8), "val": (120, 5)}.items():
        write_parquet(farm / converted / "alpaca_instructions" / split, instructions(first, count))
    (farm / "main").mkdir()
    (farm / "main/alpaca_human_preference.json").write_text(json.dumps(alpaca_pairs(), indent=2))
    (farm / "main/alpaca_farm.py").write_text("raise RuntimeError('a loading script was run')\n")

    feedback = root / "openai/summarize_from_feedback" / converted / "comparisons"
    write_parquet(feedback / "train", comparisons("train", 0, 9))
    write_parquet(feedback / "validation", comparisons("valid1", 40, 4) + comparisons("valid2", 120, 5))

    tldr, card = root / "vwxyzjn/summarize_from_feedback_tldr_3_filtered/main", "---\nconfigs:\n- data_files:\n"
    for split, (first, count) in {"train": (0, 8), "validation": (120, 5), "test": (40, 3)}.items():
        write_parquet(tldr / "data", posts(first, count), f"{split}-00000-of-00001")
        card += f"  - split: {split}\n    path: data/{split}-*\n"
    (tldr / "README.md").write_text(card + "  config_name: default\n---\n")


def write_listed(root: Path) -> None:
    """A few rows of each listed data set, as the Hub stores them: compressed JSON lines, and Parquet by split."""

    def turns(*texts: str) -> list[dict]:
        return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts)]

    def asked(i: int) -> str:
        return f"\n\nHuman: {say(i)}?\n\nAssistant: {say(i + 1)}\n\nHuman: {say(i + 2)}?\n\nAssistant:"

    for split, (first, count) in {"train": (0, 8), "test": (120, 4)}.items():
        numbers = range(first, first + count)
        folder = root / HH / "main/harmless-base"
        folder.mkdir(parents=True, exist_ok=True)
        with gzip.open(folder / f"{split}.jsonl.gz", "wt") as file:
            for i in numbers:
                both = {name: f"{asked(i)} {say(i + shift)}." for name, shift in (("chosen", 3), ("rejected", 90))}
                file.write(json.dumps(both) + "\n")
        rows = [
            {"prompt": say(i), "prompt_id": str(i), "score_chosen": 8.0, "score_rejected": 4.0}
            | {"chosen": turns(say(i), say(i + 3)), "rejected": turns(say(i), say(i + 90))}
            | {"messages": turns(say(i), say(i + 3))}
            for i in numbers
        ]
        write_parquet(root / ULTRA / "main/data", rows, f"{split}_prefs-00000-of-00001")
        texts = [{"prompt": f"POST: {say(i)}\n\nTL;DR:", "completion": f" {say(i + 3)}"} for i in numbers]
        pairs = [{"prompt": t["prompt"], "chosen": t["completion"], "rejected": " no"} for t in texts]
        write_parquet(root / TRL / "main/data", texts, f"{split}-00000-of-00001")
        other = {"train": "train", "test": "validation"}[split]
        write_parquet(root / f"{TRL}-preference/main/data", pairs, f"{other}-00000-of-00001")
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    card += "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in ("train_prefs", "test_prefs"))
    (root / ULTRA / "main/README.md").write_text(card + "---\n")


def write_models(root: Path, toy: str) -> None:
    """The embedded language model, a reward model made of it, and a small random BERT that knows letters."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(toy)
    reward_model = transformers.AutoModelForSequenceClassification.from_pretrained(toy, num_labels=1)
    for name in ("tiny-lm", "tiny-chat"):
        shutil.copytree(toy, root / f"someone/{name}/main")
    turn = "{{ '[' + m['role'] + ']' + m['content'] + eos_token + '\n' }}"
    ask = "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    template = "{% for m in messages %}" + turn + "{% endfor %}" + ask
    (root / "someone/tiny-chat/main/chat_template.jinja").write_text(template)
    letters = [chr(i) for i in range(33, 127) if not chr(i).isupper()]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    bert = transformers.BertForMaskedLM(transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3,
    ))  # fmt: skip
    wordpiece = transformers.BertTokenizer({token: i for i, token in enumerate(vocabulary)}, model_max_length=512)
    tokenizer.chat_template = template
    for name, parts in {"someone/tiny-rm": (tokenizer, reward_model), BERT: (wordpiece, bert)}.items():
        for part in parts:
            part.save_pretrained(root / name / "main")


# ---------------------------------------------------------------- runs that read from it


class Runs:
    """Runs of the scripts as subprocesses: which Hub and caches they use is settled when its clients are imported."""

    def __init__(self, folder: Path, url: str):
        self.folder, self.models = folder, folder / "hub/models"
        caches = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "PCRM_CACHE")
        self.environment = {name: str(folder / name) for name in caches} | {
            "HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "no_proxy": "127.0.0.1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        rows = ({"prompt": f"Say {say(i)}.", "chosen": say(i), "rejected": say(80 + 3 * i)} for i in range(8))
        pairs = rows_file(folder, *rows)
        self.pairs = f"--dataset {pairs} --eval_dataset {pairs}"

    def launch(self, script: str, ranks: int, *argv: str, **environment: str):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (self.environment | environment).items():
                patch.setenv(name, value)
            return launch(script, ranks, *argv)

    def flags(self, name: str, flags: str) -> list[str]:
        return [*SHORT.split(), *flags.split(), "--output_dir", str(self.folder / name)]

    def together(self, runs: dict[str, str], **environment: str) -> dict[str, str]:
        """{name: "SCRIPT FLAGS"} in one process; gives how each ended: finished, error: ..., or a traceback."""
        driver, ends = self.folder / "driver.py", self.folder / "ends.json"
        driver.write_text(DRIVER)
        commands = {name: [line.split()[0], *self.flags(name, line.partition(" ")[2])] for name, line in runs.items()}
        done = self.launch(str(driver), 0, json.dumps(commands), str(ends), **environment)
        assert done.returncode == 0, done.stderr
        return json.loads(ends.read_text())


@pytest.fixture(scope="module")
def runs(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    write_data(folder / "hub/datasets")
    write_listed(folder / "hub/datasets")
    write_models(folder / "hub/models", toy)
    with hub.serving(folder / "hub") as url:
        yield Runs(folder, url)


@pytest.fixture(scope="module")
def ends(runs) -> dict[str, str]:
    tasks = {name: f"{name.replace(' ', ' --task ')} {flags}" for name, flags in TASKS.items()}
    tasks |= {name: f"{name.split()[0]} {flags}" for name, flags in LISTED.items()}
    own = {"dpo": f"dpo {LM} --constraint cos_sim --generate 0 --ranked_dataset= {runs.pairs}"}
    return runs.together(tasks | own | dict(zip(ABSENT, ABSENT)))


@pytest.mark.parametrize("name", TASKS)
def test_a_step_of_each_task(runs, ends, name):
    """Its data are found and understood, whatever is not the Hub's main revision or has a loading script beside it."""
    assert ends[name] == "finished"
    out = runs.folder / name
    metrics = lines(out / "metrics.jsonl")
    assert [(m["step"], m["split"]) for m in metrics] == [(0, "eval"), (1, "train"), (1, "eval")]
    assert all(math.isfinite(m["policy_loss" if "ppo" in name else "loss"]) for m in metrics if m["split"] == "train")
    assert list((out / "model").glob("*.safetensors"))
    if name.startswith(("sft", "ppo")):  # three of the held-out prompts are answered
        held_out = [row["post"] for row in posts(120, 5)]
        if "alpaca" in name:
            held_out = [row["instruction"] + row["input"] for row in instructions(120, 5)]
        asked = [row["instruction"] for row in json.loads((out / "generations.json").read_text())]
        assert len(asked) == 3 and sum(any(text in prompt for prompt in asked) for text in held_out) == 3


@pytest.mark.parametrize("name", LISTED)
def test_a_step_on_each_listed_data_set(runs, ends, name):
    assert ends[name] == "finished"
    script, _, kind = name.partition(" ")
    metrics = lines(runs.folder / name / "metrics.jsonl")
    assert [(m["step"], m["split"]) for m in metrics] == [(0, "eval"), (1, "train"), (1, "eval")]
    if script in ("reward", "dpo"):
        assert len(lines(runs.folder / name / "eval.jsonl")) == 4
    if kind == "ultrafeedback" and script != "reward":
        asked = [row["instruction"] for row in json.loads((runs.folder / name / "generations.json").read_text())]
        assert asked[0] == say(120)


# β1 and β3 are the paper's. Held out: 10 % of AlpacaFarm's 20 pairs, for a tie is none, and the 5 posts of valid2.
@pytest.mark.parametrize(
    ("name", "count", "beta1", "beta3"),
    [("reward alpaca", 2, 20, -15), ("dpo alpaca", 2, 30, -25), ("reward tldr", 5, 30, -25)],
)
def test_bounds_come_from_the_default_encoder(runs, ends, name, count, beta1, beta3):
    """Each held-out pair has the similarity of its two texts at BERT's [CLS], and the bound that follows from it."""
    assert ends[name] == "finished"
    if "alpaca" in name:
        rows = alpaca_pairs()[:20]
        questions = [row["instruction"] + row["input"] for row in rows]
        responses = [(row["output_1"], row["output_2"]) for row in rows]
    else:
        rows, task = comparisons("valid2", 120, 5)[:5], "Your task is to generate a short summary of a post."
        questions = [f"{task}\n\nPost: {row['info']['post']}\n\nSummary: " for row in rows]
        responses = [[summary["text"] for summary in row["summaries"]] for row in rows]
    texts = [f"\n\nHuman: {q}\n\nAssistant: {response}" for q, both in zip(questions, responses) for response in both]
    embeddings = encode_texts(texts, str(runs.models / BERT / "main"), "cls")
    possible = cosine_similarity(embeddings[0::2], embeddings[1::2])
    pairs = lines(runs.folder / name / "eval.jsonl")
    nearest = {int((possible - pair["similarity"]).abs().argmin()) for pair in pairs}
    assert len(pairs) == len(nearest) == count
    for pair in pairs:
        assert (possible - pair["similarity"]).abs().min() < 1e-4
        assert pair["bound"] == pytest.approx(beta1 / (pair["similarity"] + 0.001) + beta3, rel=1e-5)


@pytest.mark.parametrize("line", ABSENT)
def test_what_the_hub_does_not_have_is_named_in_one_line(ends, line):
    assert ends[line].startswith("error: ") and "nobody/nothing" in ends[line] and "\n" not in ends[line]


def test_two_ranks_and_a_new_commit(runs, ends):
    """The model's id now stands for other weights: those are trained, and no cached number of the old ones is used.

    At step 0 the policy is its own reference: every margin is 0. With a learning rate of 0 the weights stay.
    """
    assert ends["dpo"] == "finished"
    folder = runs.models / "someone/tiny-lm/main"
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    model.save_pretrained(folder)
    flags = f"{LM} --constraint cos_sim --generate 0 --ranked_dataset= --learning_rate 0 {runs.pairs}"
    done = runs.launch("dpo.py", 2, *runs.flags("two ranks", flags))
    assert done.returncode == 0, done.stderr
    start = lines(runs.folder / "two ranks/metrics.jsonl")[0]
    assert start["step"] == 0 and start["margin_mean"] == pytest.approx(0, abs=1e-5) == start["margin_std"]
    saved, served = (load_file(path / "model.safetensors") for path in (runs.folder / "two ranks/model", folder))
    assert all(torch.equal(saved[name], value) for name, value in served.items())


def test_a_filled_cache_is_enough(runs, ends):
    """What the Hub gave once needs no network: models, encoder, data by id and at hf://. What was not read is named."""
    commands = {
        "offline sft": f"sft --task tldr {LM} --generate 0",
        "offline ppo": f"ppo --task tldr {TASKS['ppo tldr']}",
        "offline reward": f"reward --task alpaca {LM} --constraint cos_sim {runs.pairs}",
        "offline dpo": f"dpo {LM} --constraint cos_sim --generate 0 {runs.pairs}",
        "offline hf": f"reward --task tldr {TASKS['reward tldr']}",
        "offline other": "sft --model someone/unread",
    }
    offline = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9", "PCRM_CACHE": str(runs.folder / "empty")}
    found = runs.together(commands, **offline)
    other = found.pop("offline other")
    assert found == dict.fromkeys(found, "finished")
    assert other.startswith("error: ") and "someone/unread" in other and "\n" not in other
