"""Data, files and environment: what is read and held out, what is written, and what other programs leave behind."""

import common

import contextlib
import dataclasses
import errno
import functools
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import typing
from fractions import Fraction
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from helpers import ROOT, lines

import dpo
import ppo
import reward
import sft

SCRIPTS = {"sft": sft, "reward": reward, "dpo": dpo, "ppo": ppo}
every_script = pytest.mark.parametrize("name", SCRIPTS)
ONE_STEP = "--max_steps 1 --micro_batch_size 8 --global_batch_size 8 --log_every 1".split()
PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.fixture(scope="module")
def tiny(toy, tokenizer, tmp_path_factory) -> dict[str, str]:
    """Folders of a language model, lm, and a reward model, rm, with the toy's tokenizer and one layer of width 16."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    rm = transformers.LlamaConfig(**config.to_dict() | dict(num_labels=1, problem_type="regression"))
    made = {"lm": transformers.LlamaForCausalLM(config), "rm": transformers.LlamaForSequenceClassification(rm)}
    root = tmp_path_factory.mktemp("tiny")
    for name, model in made.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: str(root / name) for name in made}


def flags(name: str, models: dict[str, str], evaluate: bool = False) -> list[str]:
    """The models of a script: `evaluate` asks for what --epochs 0 needs, no more."""
    if name == "ppo":
        models = ["--policy_model", models["lm"], "--reward_model", models["rm"], "--max_new_tokens", "4"]
    else:
        models = ["--model", models["rm" if evaluate and name == "reward" else "lm"], "--max_length", "80"]
    return models + (["--epochs", "0"] if evaluate else [])


def farm(instruction: str, extra: str | None = "", first: str = "yes", second: str = "no") -> dict:
    """A row that every script reads: a demonstration, a pair and a prompt."""
    pair = {"output_1": first, "output_2": second, "preference": 1}
    return {"instruction": instruction, "input": extra, "output": first, **pair}


def write_rows(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(name: str | Path) -> list[dict]:
    rows = common.read_rows("--dataset", str(name), "train")
    return [dict(rows[i]) for i in range(len(rows))]


def refused(call, *argv: str) -> str:
    """The message with which call(*argv) ends: one line, that a terminal shows without scrolling."""
    with pytest.raises(common.InputError) as caught:
        call(*argv)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    return message


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def environment(**extra: str) -> dict[str, str]:
    """This process's, without what common.start() or a batch system put into it."""
    own = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_WAIT_POLICY"}
    foreign = ("SLURM_", "OMPI_", "PMI_", "PMIX_")
    kept = {key: value for key, value in os.environ.items() if key not in own and not key.startswith(foreign)}
    return kept | extra


def start(folder: Path, label: str, command: list[str], **extra: str) -> subprocess.Popen:
    """A program that runs while a test does other things; folder/<label>.out and .err get what it prints."""
    with open(folder / f"{label}.out", "w") as out, open(folder / f"{label}.err", "w") as err:
        return subprocess.Popen(command, stdout=out, stderr=err, env=environment(**extra), cwd=folder)


def script(name: str, *argv: str) -> list[str]:
    return [sys.executable, str(ROOT / f"{name}.py"), *argv]


def wait_for(condition, process: subprocess.Popen, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.1)


@contextlib.contextmanager
def ended(process: subprocess.Popen):
    """No process outlives its test."""
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture(scope="module", autouse=True)
def left_alone(request, tmp_path_factory):
    """One of two ranks, started first because it has a minute to end in: label -> (process, its .err, its start)."""
    if not any(item.name == "test_ranks_that_never_arrive" for item in request.session.items):
        yield
        return
    folder = tmp_path_factory.mktemp("alone")
    whole = dict(RANK="0", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    started = {}
    with contextlib.ExitStack() as stack:
        for label, extra in (("WORLD_SIZE", {}), ("rank 0", whole)):
            command = script("sft", *ONE_STEP, "--output_dir", str(folder / label))
            process = stack.enter_context(ended(start(folder, label, command, WORLD_SIZE="2", **extra)))
            started[label] = process, folder / f"{label}.err", time.monotonic()
        yield started


# ---------------------------------------------------------------- held-out prompts

PROMPTS, EACH = 30, 7  # 210 rows, of which 10 % are 3 prompts with 7 rows each
RATIOS = sorted({Fraction(p, q) for q in range(3, 30) for p in range(2, q)})
RATIOS = [ratio for ratio in RATIOS if ratio.numerator > 1][: PROMPTS * EACH]


def several_a_prompt(path: Path) -> list[dict]:
    """Rows in random order, each known by its length ratio alone. No merge of the toy's tokenizer holds ~ or ^."""
    assert len(RATIOS) == PROMPTS * EACH
    rows = [  # EOS is a token more
        farm(f"Question {i % PROMPTS}", first="~" * (s.numerator - 1), second="^" * (s.denominator - 1))
        for i, s in enumerate(random.Random(0).sample(RATIOS, len(RATIOS)))
    ]
    random.Random(1).shuffle(rows)
    write_rows(path, rows)
    return rows


def held_out_rows(out: Path, rows: list[dict]) -> list[int]:
    """Row numbers of the pairs in eval.jsonl."""
    ratios = [(len(row["output_1"]) + 1) / (len(row["output_2"]) + 1) for row in rows]
    found = []
    for line in lines(out / "eval.jsonl"):
        (number,) = [i for i, s in enumerate(ratios) if abs(s - line["similarity"]) < 1e-5]
        found.append(number)
    return found


@every_script
def test_prompts_are_held_out_with_all_their_rows(name, run, tiny, tmp_path, capsys):
    """Pairs of one prompt on both sides make a held-out accuracy of what was learned by heart."""
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows = several_a_prompt(data)
    generate = [] if name == "reward" else ["--generate", "1000"]
    argv = [*flags(name, tiny), *ONE_STEP, *generate, "--dataset", str(data), "--output_dir", str(out)]
    run(SCRIPTS[name], *argv)
    if generate:
        answered = {line["instruction"] for line in json.loads((out / "generations.json").read_text())}
        assert len(answered) == 3 and answered < {row["instruction"] for row in rows}
    if name in ("reward", "dpo"):
        held_out = held_out_rows(out, rows)
        assert len(set(held_out)) == len(held_out) == 21
        assert len({rows[i]["instruction"] for i in held_out}) == 3  # so all 7 of each
    said = capsys.readouterr().out
    assert re.search(r"\b189\b", said)  # the rest is trained on
    said = [line for line in said.splitlines() if re.search(r"\bh[eo]ld", line)]
    assert any({"3", "21"} <= set(re.findall(r"\d+", line)) and "prompt" in line for line in said), said


def test_the_held_out_prompts_follow_the_seed(run, tiny, tmp_path):
    """Evaluated alone, a model must meet the prompts that its training held out; another seed holds out others."""
    data, found = tmp_path / "rows.jsonl", {}
    rows = several_a_prompt(data)
    for label, seed, evaluate in (("trained", 5, False), ("evaluated", 5, True), ("other", 6, True)):
        argv = [*flags("reward", tiny, evaluate), *([] if evaluate else ONE_STEP), "--seed", str(seed)]
        run(reward, *argv, "--dataset", str(data), "--output_dir", str(tmp_path / label))
        found[label] = {rows[i]["instruction"] for i in held_out_rows(tmp_path / label, rows)}
    assert found["trained"] == found["evaluated"] != found["other"]


def test_500_of_many_pairs_are_held_out(run, tiny, tmp_path):
    """The paper's split is of 500 pairs, not of 500 prompts, and whole prompts come close to it."""
    counts = [1 + i % 5 for i in range(2000)]  # 6,000 pairs
    rows = [PAIR | {"prompt": f"Question {i}", "chosen": f"a{j}"} for i, n in enumerate(counts) for j in range(n)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    run(reward, *flags("reward", tiny, True), "--dataset", data, "--output_dir", str(tmp_path / "out"))
    assert 495 <= len(lines(tmp_path / "out" / "eval.jsonl")) <= 505


@every_script
def test_a_single_prompt_cannot_be_held_out(name, run, tiny, tmp_path):
    """All rows on one prompt leave nothing to train on or nothing to hold out: said, and no row is on both sides."""
    data = write_rows(tmp_path / "rows.jsonl", [farm("The only one", first=f"yes {i}") for i in range(40)])
    argv = [*flags(name, tiny), *ONE_STEP, "--dataset", data, "--output_dir", str(tmp_path / "out")]
    assert "prompt" in refused(run, SCRIPTS[name], *argv)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- flags

HOME_FLAGS = {
    "sft": "--model=~/lm --dataset=~/rows.jsonl:train --eval_dataset=~/rows.jsonl --output_dir=~/out",
    "reward": "--model=~/rm --dataset=~/rows.jsonl:train --eval_dataset=~/rows.jsonl --ranked_dataset=~/ranked.jsonl "
    "--constraint=cos_sim --encoder=~/lm --output_dir=~/out",
    "dpo": "--model=~/lm --ref_model=~/lm --dataset=~/rows.jsonl:train --eval_dataset=~/rows.jsonl "
    "--ranked_dataset=~/ranked.jsonl --constraint=cos_sim --encoder=~/lm --output_dir=~/out",
    "ppo": "--policy_model=~/lm --reward_model=~/rm --judge_model=~/rm --dataset=~/rows.jsonl:train "
    "--eval_dataset=~/rows.jsonl --output_dir=~/out --max_new_tokens=4",
}


@every_script
def test_home_is_expanded_in_every_path(name, run, tiny, tmp_path, monkeypatch):
    """A shell leaves the ~ of --flag=~/x alone: it was taken for a Hub id, or for a folder of that name."""
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    for kind, folder in tiny.items():
        shutil.copytree(folder, home / kind)
    write_rows(home / "rows.jsonl", [farm(f"Question {i}") | {"split": "train"} for i in range(8)])
    write_rows(home / "ranked.jsonl", [{"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 2, 3]}])
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    argv = HOME_FLAGS[name].split()
    names = {field.name for field in dataclasses.fields(SCRIPTS[name].Args)}
    paths = {name for name in names if re.search("model$|dataset$|dir$|^encoder$", name)}
    assert paths == {re.match(r"--(\w+)=~", flag)[1] for flag in argv if "~" in flag}  # none is forgotten here
    run(SCRIPTS[name], *argv, *([] if name == "reward" else ["--generate", "1"]), *ONE_STEP)
    assert lines(home / "out" / "metrics.jsonl")[-1]["step"] == 1 and (home / "out" / "model").is_dir()
    assert not list(here.iterdir())


def spelled(args_class, hyphens: bool) -> list[str]:
    """Every flag of a script, with a value that is not its default."""
    argv = []
    for field in dataclasses.fields(args_class):
        choices = typing.get_args(field.type)
        values = {bool: "", int: "7", float: "0.25", str: "x"}
        argv.append("--" + (field.name.replace("_", "-") if hyphens else field.name))
        argv += filter(None, [str(choices[-1]) if choices else values[field.type]])
    return argv


@every_script
def test_hyphens_and_underscores_mean_the_same(name):
    """--eval-dataset did not cancel the ranked responses that belong to the task's own data."""
    module = SCRIPTS[name]

    def parse(*argv):
        return dataclasses.asdict(common.parse_args(module.Args, module.preset, list(argv)))

    assert parse(*spelled(module.Args, True)) == parse(*spelled(module.Args, False))
    expected = parse("--eval_dataset", "mine.jsonl")
    assert expected["eval_dataset"] == "mine.jsonl" and expected.get("ranked_dataset", "") == ""
    for argv in (["--eval-dataset", "mine.jsonl"], ["--eval-dataset=mine.jsonl"], ["--eval_dataset=mine.jsonl"]):
        assert parse(*argv) == expected
    assert parse("--dataset=mine.jsonl")["eval_dataset"] == ""


# ---------------------------------------------------------------- JSON

FILLER = "x" * 100_000  # 110 rows with it pass the 10 MB after which a column's type was settled
LATER = [farm(f"Question {i}", None) | {"note": FILLER} for i in range(110)] + [farm("Add", "1 and 2")]
VALID = {
    "null for 10 MB, then text": LATER,
    "absent for 10 MB, then there": [{k: v for k, v in row.items() if v is not None} for row in LATER],
    "dates": [{"prompt": "2024-01-02", "chosen": "2024-01-03T04:05:06", "rejected": "2023-12-31"}] * 3,
    "numbers as text": [{"prompt": "007", "chosen": "1e3", "rejected": "true"}] * 3,
    "columns of mixed types": [PAIR | {"note": note} for note in ("text", 1, None, [1], ["a"], {"a": 1}, {"a": "b"})],
    "a great number": [PAIR | {"id": 10**30}, PAIR | {"id": 1.5}],
    "line separators": [PAIR | {"chosen": "one\u2028two\u2029three\u0085four\u000bfive"}] * 2,
    "an emoji": [PAIR | {"chosen": "\U0001f600 é 日本"}] * 2,
}


@pytest.mark.parametrize("escaped", [True, False])
@pytest.mark.parametrize("case", VALID)
def test_what_json_holds_is_read_as_it_is(case, escaped, tmp_path):
    """Types were guessed block by block: valid files did not load, and texts that look like dates became dates."""
    rows = VALID[case]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=escaped) + "\n" for row in rows), encoding="utf-8")
    found = read(path)
    assert len(found) == len(rows)
    for mine, row in zip(found, rows):
        assert {key: mine.get(key) for key in row} == row
        assert all(value is None for key, value in mine.items() if key not in row)


def jsonl(*rows: dict, end: str = "\n") -> str:
    return end.join(map(json.dumps, rows)) + end


TWO = [PAIR, PAIR | {"chosen": "ü"}]
FORMS = {
    "a.jsonl": {
        "a BOM": "\ufeff" + jsonl(*TWO),
        "blank lines": "\n" + jsonl(*TWO).replace("\n", "\n\n \n"),
        "CRLF": jsonl(*TWO, end="\r\n"),
        "no last line break": jsonl(*TWO).rstrip(),
        "an array": json.dumps(TWO),
    },
    "a.json": {
        "an array": json.dumps(TWO),
        "an indented array": "\n" + json.dumps(TWO, indent=4) + "\n",
        "a BOM": "\ufeff" + json.dumps(TWO, ensure_ascii=False),
        "lines": jsonl(*TWO),
    },
}


@pytest.mark.parametrize("name, form", [(name, form) for name in FORMS for form in FORMS[name]])
def test_forms_of_json(name, form, tmp_path):
    """Whatever JSON reader wrote it: a BOM is no fault, and the suffix does not decide between lines and an array."""
    (tmp_path / name).write_bytes(FORMS[name][form].encode())
    assert read(tmp_path / name) == TWO


def test_late_inputs_reach_the_prompt(run, tiny, tmp_path):
    """A column that comes late is not only read, but used."""
    data, out = write_rows(tmp_path / "rows.jsonl", LATER), tmp_path / "out"
    run(sft, *flags("sft", tiny, True), "--eval_dataset", data, "--generate", "200", "--output_dir", str(out))
    answered = [line["instruction"] for line in json.loads((out / "generations.json").read_text())]
    assert len(answered) == 111 and answered[-1] == "Add1 and 2" and "Question 0" in answered


LONG = "word " * 600
TEXT = json.dumps(PAIR | {"chosen": LONG})
HALF = TEXT.replace('"b"', '"\\ud83d"')
NESTED = json.dumps({"info": {"post": LONG}, "summaries": [{"text": "a"}, {"text": "?"}], "choice": 0})
SYNTAX = "JSON|Expecting|Unterminated"
BROKEN = {
    "half a surrogate pair": (f"{TEXT}\n\n{HALF}\n", r"line 3\b", "surrogate"),
    "half a pair, nested": (f"{NESTED}\n{NESTED.replace('?', chr(92) + 'udc00')}\n", r"line 2\b", "surrogate"),
    "half a pair in an array": (f"[{TEXT},\n{HALF},\n{TEXT}]", r"(line|row) 2\b", "surrogate"),
    "another encoding": (f"{TEXT}\n\n{TEXT.replace('b', 'é')}\n".encode("latin-1"), r"line 3\b", "(?i)utf-?8"),
    "cut off": (f"{TEXT}\n{TEXT}\n{TEXT[:-20]}", r"line 3\b", SYNTAX),
    "no JSON": (f"{TEXT}\n{{'prompt': {LONG}}}\n{TEXT}", r"line 2\b", SYNTAX),
    "a list among lines": (f'{TEXT}\n["{LONG}"]\n', r"line 2\b", "object"),
    "a text among lines": (f'{TEXT}\n{TEXT}\n"{LONG}"\n', r"line 3\b", "object"),
    "a text in an array": (f'[{TEXT},\n"{LONG}"]', r"(line|row) 2\b", "object"),
    "a number": ("3", "", "object"),
    "behind line separators": (TEXT.replace("b", "\u2028\u0085\u2029") + f"\n\n{TEXT[:-1]}\n", r"line 3\b", SYNTAX),
    "behind a BOM": (f"\ufeff{TEXT}\n{TEXT[:-1]}\n", r"line 2\b", SYNTAX),
    "in an array": (f"[{TEXT},\n{TEXT},\n{TEXT[:-1]}]", r"line 3\b", SYNTAX),
    "behind CRLF": (f"{TEXT}\r\n\r\n{TEXT[:-1]}\r\n", r"line 3\b", SYNTAX),
    "nothing": ("", "", "no rows|empty"),
    "blank lines alone": ("\n \n", "", "no rows|empty"),
    "an empty array": ("[]", "", "no rows|empty"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_where_json_is_broken(case, tmp_path):
    """The line that an editor shows and what is wrong there, in a line of its own that does not repeat the row."""
    text, where, what = BROKEN[case]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refused(read, path)
    assert "rows.jsonl" in message and re.search(where, message) and re.search(what, message)
    assert LONG[:600] not in message and "BOM" not in message


# ---------------------------------------------------------------- file names

NAMES = {  # name -> another file, which the name as a pattern would find
    "pairs[v2].jsonl": "pairsv.jsonl",
    "pairs[1].jsonl": "pairs1.jsonl",
    "pairs[1].parquet": "pairs1.parquet",
    "pairs*.json": "pairs of another.json",
    "pairs?.parquet": "pairs9.parquet",
    "two words [a-z].parquet": "two words q.parquet",
    "folder[12]/pairs.jsonl": "folder1/pairs.jsonl",
    "folder[12]/pairs.parquet": "folder2/pairs.parquet",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("other", [False, True])
def test_a_name_is_no_pattern(name, other, tmp_path):
    """With brackets in it a file was not found, or another one was read in silence."""
    write_rows(tmp_path / name, [PAIR | {"chosen": "mine", "split": s} for s in ("train", "valid", "valid")])
    if other:
        write_rows(tmp_path / NAMES[name], [PAIR | {"chosen": "other", "split": "valid"}] * 5)
    assert [row["chosen"] for row in read(tmp_path / name)] == ["mine"] * 3
    assert [row["chosen"] for row in read(f"{tmp_path / name}:valid")] == ["mine"] * 2


def test_a_folders_name_is_no_pattern(tmp_path):
    """The same for a folder of Parquet files, whose splits are its files."""
    for folder, chosen in (("run[1]", "mine"), ("run1", "other")):
        write_rows(tmp_path / folder / "train.parquet", [PAIR | {"chosen": chosen}] * 3)
        write_rows(tmp_path / folder / "test.parquet", [PAIR | {"chosen": f"{chosen} test"}])
    assert [row["chosen"] for row in read(tmp_path / "run[1]")] == ["mine"] * 3
    assert [row["chosen"] for row in read(f"{tmp_path / 'run[1]'}:test")] == ["mine test"]


def test_a_folders_files_are_its_splits(run, tiny, tmp_path):
    """Two files that change names hold the same bytes, yet what was held out is now to be trained on."""
    folder = tmp_path / "folder"
    for split in ("train", "validation"):
        write_rows(folder / f"{split}.parquet", [PAIR | {"chosen": f"{split} {i}"} for i in range(4)])
    encode = functools.partial(common.encode_pair, tokenizer=common.load_tokenizer(tiny["lm"], False), max_length=99)

    def chosen() -> str:
        process = common.Process(0, 1, torch.device("cpu"))
        return common.load_rows("--dataset", str(folder), "train", encode, process)["chosen"][0]

    assert chosen() == "train 0"
    (folder / "train.parquet").rename(folder / "test.parquet")
    (folder / "validation.parquet").rename(folder / "train.parquet")
    assert chosen() == "validation 0"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "folder/train.parquet"])
def test_a_file_replaced_under_its_time_stamp_is_read_anew(name, run, tiny, tmp_path):
    """`cp -p` and `rsync -t` keep the time: rows of the file that was there before came from a cache."""
    data = tmp_path / name if "/" not in name else (tmp_path / name).parent
    for label, texts in (("first", ["first"] * 20), ("fewer", ["other"] * 13), ("as many", ["third"] * 13)):
        rows = [PAIR | {"prompt": f"Question {i}", "chosen": text} for i, text in enumerate(texts)]
        write_rows(tmp_path / name, rows)
        os.utime(tmp_path / name, (1_700_000_000, 1_700_000_000))
        assert [row["chosen"] for row in read(data)] == texts
        run(reward, *flags("reward", tiny, True), "--eval_dataset", str(data), "--output_dir", str(tmp_path / label))
        assert len(lines(tmp_path / label / "eval.jsonl")) == len(texts)


# ---------------------------------------------------------------- inputs of instructions

INPUTS = [  # instruction, input, what is asked
    ("Spell the word", "d", "Spell the wordd"),
    ("Is this number even?", "?", "Is this number even??"),
    ("Count to ten", "n", "Count to tenn"),
    ("Translate: hello", "lo", "Translate: hellolo"),
    ("Name the opposite of: hot", "hot", "Name the opposite of: hot"),
    ("Mend this.\nI goes home.", "I goes home.", "Mend this.\nI goes home."),
    ("Sum up:\n\none\ntwo", "one\ntwo", "Sum up:\n\none\ntwo"),
    ("Why?", "Why?", "Why?"),
    ("Tell a joke.", "", "Tell a joke."),
    ("Tell a story.", None, "Tell a story."),
    ("Add:", " 1 and 2", "Add: 1 and 2"),
]


@pytest.mark.parametrize("name", ["sft", "dpo", "ppo"])
def test_an_input_is_left_out_only_where_it_is_repeated(name, run, tiny, tmp_path):
    """An instruction that happens to end with the input's letters swallowed it."""
    data, out = write_rows(tmp_path / "rows.jsonl", [farm(*row[:2]) for row in INPUTS]), tmp_path / "out"
    argv = ["--eval_dataset", data, "--generate", "99", "--output_dir", str(out)]
    run(SCRIPTS[name], *flags(name, tiny, True), *argv)
    answered = [line["instruction"] for line in json.loads((out / "generations.json").read_text())]
    assert answered == [row[2] for row in INPUTS]


def test_an_input_is_scored_only_where_it_is_not_repeated(run, tiny, tmp_path):
    """The same for a reward model, which shows its prompts by their scores."""
    asked = [{"prompt": f"\n\nHuman: {row[2]}\n\nAssistant: ", "chosen": "yes", "rejected": "no"} for row in INPUTS]
    scores = {}
    for label, rows in (("farm", [farm(*row[:2]) for row in INPUTS]), ("asked", asked)):
        data = write_rows(tmp_path / f"{label}.jsonl", rows)
        run(reward, *flags("reward", tiny, True), "--eval_dataset", data, "--output_dir", str(tmp_path / label))
        scores[label] = [line["chosen_score"] for line in lines(tmp_path / label / "eval.jsonl")]
    assert scores["farm"] == pytest.approx(scores["asked"], abs=1e-5)
    assert min(abs(a - b) for i, a in enumerate(scores["asked"]) for b in scores["asked"][:i]) > 1e-4  # so told apart


# ---------------------------------------------------------------- lines that stay short

PAIRS, OTHERS = ("reward", "dpo"), ("sft", "reward", "dpo")
LONG_ROWS = {
    "a list": ({"prompt": "p", "completion": "c", "chosen": [LONG], "rejected": "b"}, PAIRS),
    "an object": ({"prompt": "p", "completion": {"a": LONG}, "chosen": {"a": LONG}, "rejected": "b"}, OTHERS),
    "many numbers": ({"prompt": list(range(2000)), "completion": "c", "chosen": "a", "rejected": "b"}, SCRIPTS),
    "an instruction": (farm("?") | {"instruction": [LONG]}, SCRIPTS),
    "an input": (farm("?", {"a": LONG}), SCRIPTS),
    "a preference": (farm("?") | {"preference": LONG}, PAIRS),
    "a choice": ({"info": {"post": "p"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": LONG}, PAIRS),
    "a post": ({"post": [LONG], "summary": "a"}, ("sft", "ppo")),
    "unknown columns": ({f"column {i} of a wide table": 1 for i in range(200)}, SCRIPTS),
    "a column's long name": ({LONG: 1}, SCRIPTS),
}


@pytest.mark.parametrize("case, name", [(case, name) for case in LONG_ROWS for name in LONG_ROWS[case][1]])
def test_no_line_shows_a_whole_row(case, name, run, tiny, tmp_path):
    """The row's number and the fault, not its 3,000 characters."""
    data = write_rows(tmp_path / "rows.jsonl", [LONG_ROWS[case][0]])
    message = refused(run, SCRIPTS[name], *flags(name, tiny), "--dataset", data, "--output_dir", str(tmp_path / "out"))
    assert re.search(r"row 1\b", message) and LONG[:600] not in message


def test_no_line_shows_all_splits(tmp_path):
    """Nor all 200 values that a column `split` has, where the one asked for is not among them."""
    data = write_rows(tmp_path / "rows.jsonl", [PAIR | {"split": f"part {i} of the collection"} for i in range(200)])
    assert "valid" in refused(read, f"{data}:valid")


# ---------------------------------------------------------------- caches

CACHED = ("reward", "dpo")  # similarities; and of dpo.py the reference's log-probabilities


def train_cached(name: str, run, tiny, out: Path) -> list[dict]:
    data = write_rows(out.parent / "rows.jsonl", [farm(f"Question {i}") for i in range(40)])
    generate = [] if name == "reward" else ["--generate", "0"]
    argv = [*flags(name, tiny), "--constraint", "cos_sim", *ONE_STEP, *generate]
    run(SCRIPTS[name], *argv, "--dataset", data, "--eval_dataset", data, "--output_dir", str(out))
    return [{key: value for key, value in line.items() if "_per_s" not in key} for line in lines(out / "metrics.jsonl")]


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("damage", ["empty", "half", "other"])
def test_a_broken_cache_is_made_again(name, damage, run, tiny, tmp_path, monkeypatch, capsys):
    """A file that was cut short ended every later run, until its owner found and removed it."""
    monkeypatch.setenv("PCRM_CACHE", str(tmp_path / "cache"))
    first = train_cached(name, run, tiny, tmp_path / "first")
    before = contents(tmp_path / "cache")
    before = {path: content for path, content in before.items() if content}
    assert before
    for path, content in before.items():
        broken = {"empty": b"", "half": content[: len(content) // 2], "other": b"not what it should be\n"}[damage]
        (tmp_path / "cache" / path).write_bytes(broken)
    said = {}
    for label in ("second", "third"):
        capsys.readouterr()
        assert train_cached(name, run, tiny, tmp_path / label) == first
        said[label] = set(capsys.readouterr().out.replace(str(tmp_path / label), "").splitlines())
        after = contents(tmp_path / "cache")
        assert all(len(after[path]) == len(content) for path, content in before.items())  # whole again
    told = said["second"] - said["third"]  # with a word, and only once
    assert any(re.search(r"(?i)\b(again|anew|cache|remade|rebuilt|read)\b", line) for line in told), told


def test_a_broken_toy_model_is_made_again(run, tmp_path, monkeypatch):
    """The embedded task's model lies in the same folder, and is cut short by the same programs."""
    monkeypatch.setenv("PCRM_CACHE", str(tmp_path / "cache"))
    (weights,) = Path(common.toy_model()).glob("*.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    data = write_rows(tmp_path / "rows.jsonl", [farm("Question")])
    run(sft, "--epochs", "0", "--generate", "0", "--eval_dataset", data, "--output_dir", str(tmp_path / "out"))
    assert weights.read_bytes() == whole


FULL = {"below": None}  # audit hooks cannot be taken away: this one does nothing while this is None


@pytest.fixture(scope="module")
def full_disk():
    """FULL["below"] = folder: no file below it can be opened for writing, as on a full or read-only disk."""

    def hook(event, args):
        if FULL["below"] is None or event not in ("open", "os.mkdir", "os.rename"):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if isinstance(args[0], str | Path) and str(args[0]).startswith(FULL["below"]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))

    sys.addaudithook(hook)
    yield
    FULL["below"] = None


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("kind", ["full", "no folder"])
def test_a_cache_that_cannot_be_written_ends_no_run(name, kind, run, tiny, tmp_path, monkeypatch, full_disk):
    """A full disk, or a home that is read-only or no folder at all, costs time, not the run."""
    expected = train_cached(name, run, tiny, tmp_path / "expected")
    cache = tmp_path / "cache"
    if kind == "no folder":
        cache.write_text("a file")
        cache = cache / "below"
    else:
        cache.mkdir()
        monkeypatch.setitem(FULL, "below", str(cache))
    monkeypatch.setenv("PCRM_CACHE", str(cache))
    assert train_cached(name, run, tiny, tmp_path / "out") == expected


# ---------------------------------------------------------------- disk full

TOY_BYTES = 4 * (512 * 128 + 4 * (4 * 128 * 128 + 3 * 128 * 384 + 2 * 128) + 128)  # fp32: 3.7 MB


@contextlib.contextmanager
def small_files(limit: int):
    """No file may grow beyond `limit` bytes: the operating system refuses, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def sizes(message: str) -> list[float]:
    """The sizes that a message names, in bytes."""
    found = re.findall(r"(\d[\d.,]*) ?([kKMG]?)(i?)(?:B|bytes?)\b", message)
    return [float(n.replace(",", "")) * (1024 if i else 1000) ** " kmg".index(u.lower() or " ") for n, u, i in found]


@every_script
def test_a_full_disk_at_the_end(name, run, toy, tiny, tmp_path):
    """One line with the path and the space that is needed; no half of a model, and all else is still there."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    data = write_rows(tmp_path / "rows.jsonl", [farm(f"Question {i}") for i in range(24)])
    argv = ["--dataset", data, "--eval_dataset", data, *ONE_STEP, "--output_dir", str(out)]
    argv += flags(name, {"lm": toy, "rm": tiny["rm"]})
    with small_files(1 << 20):
        message = refused(run, SCRIPTS[name], *argv)
    assert str(out) in message
    assert any(0.9 * TOY_BYTES < size < 1.15 * TOY_BYTES for size in sizes(message)), message
    assert (out / "notes.txt").read_text() == "mine" and json.loads((out / "args.json").read_text())
    assert lines(out / "metrics.jsonl")[0]["step"] == 0
    assert not (out / "model").exists()
    assert sum(map(len, contents(out).values())) < 1 << 20  # a part of a model takes no room on a full disk


def test_a_full_disk_leaves_the_model_that_was_there(run, toy, tiny, tmp_path):
    """--overwrite replaces a model by a whole one, or not at all."""
    data, out = write_rows(tmp_path / "rows.jsonl", [farm(f"Question {i}") for i in range(16)]), tmp_path / "out"
    argv = [*ONE_STEP, "--generate", "0", "--dataset", data, "--eval_dataset", data, "--output_dir", str(out)]
    run(sft, "--model", tiny["lm"], *argv)
    before = contents(out / "model")
    with small_files(1 << 20):
        refused(run, sft, "--model", toy, "--overwrite", *argv)
    assert contents(out / "model") == before


def test_a_full_disk_on_two_ranks(toy, tmp_path):
    """The rank that does not write hears of it too: one line, where it said "Connection closed by peer"."""
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    mount = 'mount -t tmpfs -o size=2m tmpfs "$0" || exit 99; "$@"; status=$?; cp -r "$0" "$COPY"; exit $status'
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", free_port()]
    command += [str(ROOT / "sft.py"), "--model", toy, *ONE_STEP, "--generate", "0", "--output_dir", str(disk / "out")]

    def mounted(command):
        return subprocess.run(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, str(disk), *command],
            capture_output=True,
            text=True,
            env=environment(COPY=str(copy)),
            timeout=200,
        )

    if shutil.which("unshare") and mounted(["true"]).returncode == 0:
        shutil.rmtree(copy)
        done, out = mounted(command), copy / "out"
    else:  # no file systems of one's own here: files that may not grow
        limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=200, preexec_fn=limit)
        out = disk / "out"
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("sft.py: error:")]
    assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout
    assert str(disk / "out") in message and any(0.9 * TOY_BYTES < size < 1.15 * TOY_BYTES for size in sizes(message))
    assert lines(out / "metrics.jsonl")[0]["step"] == 0 and not (out / "model").exists()


# ---------------------------------------------------------------- what belongs to others

OUTPUTS = ["args.json", "metrics.jsonl", "generations.json", "model/config.json", "tensorboard/events"]
FOREIGN_ARGS = {
    "none": None,
    "of another program": '{"model": "resnet", "lr": 0.1}\n',
    "no object": "[1, 2]\n",
    "no JSON": "batch = 3\n",
    "of dpo.py": json.dumps(dataclasses.asdict(dpo.Args())),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("case", FOREIGN_ARGS)
def test_files_of_another_program_stay(case, overwrite, run, tiny, tmp_path):
    """An args.json or a model/ that no run of this script wrote is nobody's to delete, whatever the flags."""
    out = tmp_path / "out"
    for name in OUTPUTS:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("theirs")
    (out / "args.json").write_text(FOREIGN_ARGS[case] or "")
    if FOREIGN_ARGS[case] is None:
        (out / "args.json").unlink()
    before = contents(out)
    argv = [*flags("sft", tiny), *ONE_STEP, "--output_dir", str(out)] + ["--overwrite"] * overwrite
    message = refused(run, sft, *argv)
    assert str(out) in message and any(name.split("/")[0] in message for name in OUTPUTS)
    after = contents(out)
    assert {name: after.get(name) for name in before} == before


@pytest.mark.parametrize("name", OUTPUTS)
def test_each_file_of_another_program_is_seen(name, run, tiny, tmp_path):
    """One such file is enough, and --overwrite speaks of this script's runs alone. It is named."""
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("{}")
    argv = [*flags("sft", tiny), *ONE_STEP, "--output_dir", str(out), "--overwrite"]
    assert name.split("/")[0] in refused(run, sft, *argv).replace(str(out), "")
    assert (out / name).read_text() == "{}"


def test_own_files_are_replaced(run, tiny, tmp_path):
    """A run that was cut off begins anew, a finished one asks for --overwrite; what is the user's stays beside both."""
    data, out = write_rows(tmp_path / "rows.jsonl", [farm(f"Question {i}") for i in range(24)]), tmp_path / "out"
    argv = [*flags("sft", tiny), "--dataset", data, "--eval_dataset", data, "--output_dir", str(out), *ONE_STEP]
    run(sft, *argv, "--generate", "2")
    (out / "notes.txt").write_text("mine")
    assert "--overwrite" in refused(run, sft, *argv)
    run(sft, *argv, "--overwrite", "--generate", "3")
    assert len(json.loads((out / "generations.json").read_text())) == 3
    shutil.rmtree(out / "model")
    (out / "generations.json").unlink()  # as if cut off
    run(sft, *argv, "--generate", "4")
    assert len(json.loads((out / "generations.json").read_text())) == 4 and len(lines(out / "metrics.jsonl")) == 3
    assert (out / "notes.txt").read_text() == "mine"


def test_default_folders_are_unique(run, tiny, tmp_path, monkeypatch):
    """Two runs that start in the same second wrote into one folder, the second after deleting the first's files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda *_: "20260102-030405")
    data = write_rows(tmp_path / "rows.jsonl", [farm(f"Question {i}") for i in range(24)])
    for generate in (2, 3):
        run(sft, *flags("sft", tiny), *ONE_STEP, "--dataset", data, "--eval_dataset", data, "--generate", str(generate))
    found = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("sft-*/generations.json")]
    assert sorted(map(len, found)) == [2, 3]


def test_a_folder_in_use_is_locked(run, tiny, tmp_path):
    """A second run with one --output_dir deleted the first's files under it. A run that was killed holds nothing."""
    data, out = write_rows(tmp_path / "rows.jsonl", [farm(f"Question {i}") for i in range(24)]), tmp_path / "out"
    argv = [*flags("sft", tiny), "--dataset", data, "--eval_dataset", data, "--output_dir", str(out), "--generate", "2"]
    endless = script("sft", *argv, "--epochs", "1000000", "--global_batch_size", "8")
    with ended(start(tmp_path, "first", endless)) as first:
        metrics = out / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 1, first)
        written, number = metrics.read_text(), metrics.stat().st_ino
        for extra in ([], ["--overwrite"]):
            assert str(out) in refused(run, sft, *argv, *ONE_STEP, *extra)
        assert first.poll() is None and metrics.stat().st_ino == number and metrics.read_text().startswith(written)
        assert json.loads((out / "args.json").read_text())["epochs"] == 1000000
        first.send_signal(signal.SIGKILL)
        first.wait()
        run(sft, *argv, *ONE_STEP)
        assert metrics.read_text().count("\n") == 3 and (out / "generations.json").exists()


@pytest.mark.parametrize("place", ["a cache that both fill", "no home"])
def test_two_runs_at_once_without_a_model(tmp_path, place):
    """Both make the embedded model and the rows, in one cache or, where there is no home, in the temporary folder."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "file").write_text("")
    home = str(tmp_path / "file" / "home")  # no folder can be made here
    variables = {"HOME": home, "PCRM_CACHE": "" if place == "no home" else str(tmp_path / "cache")}
    variables |= {"TMPDIR": str(tmp_path / "tmp"), "MPLCONFIGDIR": str(tmp_path / "tmp"), "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        tasks = []
        for label in ("a", "b"):
            command = script("sft", "--output_dir", str(tmp_path / label), "--generate", "0", *ONE_STEP)
            tasks.append(stack.enter_context(ended(start(tmp_path, label, command, **variables))))
        assert [task.wait(timeout=150) for task in tasks] == [0, 0], (tmp_path / "a.err").read_text()
    first, second = (lines(tmp_path / label / "metrics.jsonl") for label in ("a", "b"))
    assert [line["loss"] for line in first] == [line["loss"] for line in second]


# ---------------------------------------------------------------- processes

SLURM = dict(SLURM_STEP_NUM_TASKS="2", SLURM_NTASKS="2", SLURM_STEP_NUM_NODES="1", SLURM_NNODES="1", SLURM_JOB_ID="1")
OPENMPI = dict(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_LOCAL_SIZE="2")


def two_tasks(folder: Path, command: list[str], common_variables: dict, rank_names: list[str]) -> list[tuple]:
    """(status, stdout, stderr) of two processes that srun or mpirun started on this machine."""
    variables = common_variables | {"MASTER_PORT": free_port()}
    with contextlib.ExitStack() as stack:
        tasks = []
        for i in range(2):
            task = start(folder, f"task {i}", command, **variables, **dict.fromkeys(rank_names, str(i)))
            tasks.append(stack.enter_context(ended(task)))
        status = [task.wait(timeout=150) for task in tasks]
    return [(status[i], *((folder / f"task {i}.{end}").read_text() for end in ("out", "err"))) for i in range(2)]


def test_two_tasks_of_slurm_are_two_ranks(tiny, tmp_path):
    """srun -n 2 python sft.py: one run on two ranks, not two runs in one folder."""
    data, out = write_rows(tmp_path / "rows.jsonl", [farm(f"Question {i}") for i in range(24)]), tmp_path / "out"
    argv = [*flags("sft", tiny), "--dataset", data, "--eval_dataset", data, "--output_dir", str(out), *ONE_STEP]
    tasks = two_tasks(tmp_path, script("sft", *argv), SLURM, ["SLURM_PROCID", "SLURM_LOCALID"])
    assert [task[0] for task in tasks] == [0, 0], tasks
    assert "finished" in tasks[0][1] and not re.search("finished|step", tasks[1][1])  # rank 0 alone speaks
    assert [line["step"] for line in lines(out / "metrics.jsonl")] == [0, 1, 1]


def test_two_tasks_of_openmpi_are_two_ranks(tmp_path):
    """mpirun -n 2 python sft.py: three rows do not go into two ranks, and both know it."""
    command = script("sft", "--global_batch_size", "3", "--output_dir", str(tmp_path / "out"))
    tasks = two_tasks(tmp_path, command, OPENMPI, ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"])
    assert [task[0] for task in tasks] == [1, 1]
    assert all(re.search(r"^sft.py: error: .*\b3 .*\b2 ranks", task[2], re.MULTILINE) for task in tasks), tasks


INCOMPLETE = {  # what is there of a second task, and what is missing
    "Slurm without a local rank": SLURM | {"SLURM_PROCID": "0"},
    "Slurm without a rank": SLURM | {"SLURM_LOCALID": "0"},
    "Slurm on two machines": SLURM | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "2"},
    "OpenMPI without a local rank": OPENMPI | {"OMPI_COMM_WORLD_RANK": "0"},
    "OpenMPI without a rank": OPENMPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "0"},
}
DRIVER = """
import json, os, sys
import common, sft
base = dict(os.environ)
for label, variables in json.loads(sys.argv[1]).items():
    os.environ.clear()
    os.environ.update(base | variables)
    try:
        sft.main(common.parse_args(sft.Args, sft.preset, ["--epochs", "0"]))
        print(json.dumps([label, None]))
    except common.InputError as error:
        print(json.dumps([label, str(error)]))
"""


def test_incomplete_ranks_are_refused():
    """A task that cannot know its rank must not begin a run of its own beside the others, nor wait for ever."""
    command = [sys.executable, "-c", DRIVER, json.dumps(INCOMPLETE)]
    done = subprocess.run(command, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=150)
    said = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith('["'))
    assert said.keys() == INCOMPLETE.keys(), done.stderr
    for label, message in said.items():
        names = "SLURM|MASTER_ADDR" if "Slurm" in label else "OMPI|MASTER_ADDR"
        assert message and re.search(names, message) and "\n" not in message, (label, message)


def test_the_launchers_port_is_taken(tmp_path):
    """A second launcher on one machine met a long traceback with EADDRINUSE: one line that names the flag."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", port]
        command += [str(ROOT / "sft.py"), *ONE_STEP, "--output_dir", str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=150)
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("sft.py: error:")]
    assert done.returncode == 1 and "--master_port" in message and port in message
    assert "Traceback" not in done.stderr


IMPORTS = """
import os, runpy, sys
def hook(event, args):
    if event == "import" and args[0] == "torch":
        print(os.environ.get("OMP_WAIT_POLICY"), flush=True)
        os._exit(0)
sys.addaudithook(hook)
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@every_script
@pytest.mark.parametrize("users", [None, "ACTIVE"])
def test_threads_wait_without_spinning(name, users):
    """Beside other work spinning threads cost ten times the time; OpenMP reads this once, when torch is loaded."""
    extra = {} if users is None else {"OMP_WAIT_POLICY": users}
    command = [sys.executable, "-c", IMPORTS, str(ROOT / f"{name}.py")]
    done = subprocess.run(command, env=environment(**extra), capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == (users or "PASSIVE"), done.stderr


POOR_TERMINAL = """
import json, sys
import common, dpo, ppo, reward, sft
for module in (sft, reward, dpo, ppo):
    try:
        common.parse_args(module.Args, module.preset, ["--help"])
    except SystemExit as end:
        assert end.code == 0
for name, argv in json.loads(sys.argv[1]).items():
    module = sys.modules[name]
    module.main(common.parse_args(module.Args, module.preset, argv))
    print("finished", name)
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_unicode(encoding, tiny, tmp_path):
    """A batch system's LANG=C: neither --help nor a sample that is only shown may end a run.

    The job's variables, of a batch script that starts a single process, do not make ranks of it either.
    """
    texts = ["Qué? 日本 \U0001f600", "ß\u2028", "δ* ≤ 5"]
    rows = [farm(f"{texts[i % 3]} {i}", first=f"{texts[i % 3]} yes") for i in range(24)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    runs = {
        name: [*flags(name, tiny), *ONE_STEP, "--dataset", str(data), "--eval_dataset", str(data)]
        + ["--output_dir", str(tmp_path / name), *([] if name == "reward" else ["--generate", "3"])]
        for name in SCRIPTS
    }
    job = dict(SLURM_JOB_ID="1", SLURM_NTASKS="8", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NNODES="1")
    done = subprocess.run(
        [sys.executable, "-c", POOR_TERMINAL, json.dumps(runs if encoding == "ascii" else {})],
        capture_output=True,
        timeout=200,
        env=environment(
            LANG="C",
            LC_ALL="C",
            PYTHONIOENCODING=encoding,
            PYTHONUTF8="0",
            PYTHONCOERCECLOCALE="0",
            PYTHONPATH=str(ROOT),
            **job,
        ),
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    out = done.stdout.decode(encoding)
    assert out.count("usage:") == 4
    if encoding == "ascii":
        assert all(f"finished {name}" in out for name in SCRIPTS)
        for name in ("sft", "dpo", "ppo"):
            answered = json.loads((tmp_path / name / "generations.json").read_text(encoding="utf-8"))
            assert f"{texts[0]} 0" in [line["instruction"] for line in answered]  # in files the text is whole


def test_ranks_that_never_arrive(left_alone):
    """A WORLD_SIZE that an earlier job left behind, or a rank whose partner died, hung for ever. Last: it may wait."""
    for label, (process, err, since) in left_alone.items():
        status = process.wait(timeout=max(1, since + 100 - time.monotonic()))
        message = err.read_text()
        assert status == 1 and "Traceback" not in message, label
        (said,) = [line for line in message.splitlines() if line.startswith("sft.py: error:")]
        assert re.search(r"WORLD_SIZE|\branks?\b", said)
