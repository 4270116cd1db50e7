"""What the user can mend ends a run early, in one line that names the flag, file, row or line."""

import common

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import transformers
from helpers import ROOT

import dpo
import ppo
import reward
import sft

SCRIPTS = {script.__name__: script for script in (sft, reward, dpo, ppo)}
ROW = {"prompt": "Go", "chosen": "a", "rejected": "b", "completion": "c"}
FARM = {"instruction": "i", "output_1": "a", "output_2": "b"}
FILES = {
    "five.jsonl": [ROW | {"prompt": f"Go {i}"} for i in range(5)],
    "text.jsonl": [{"text": "Go"}],
    "unread.jsonl": [ROW | {"messages": "Go"}, {"Prompt": "Go", "chosen": "a", "rejected": "b"}],
    "ties.jsonl": [FARM | {"preference": 0}] * 2,
    "three.jsonl": [FARM | {"preference": 1}, FARM | {"preference": 3}],
    "zero.jsonl": [ROW | {"similarity": 1}, ROW | {"similarity": 0}],
    "above.jsonl": [ROW | {"similarity": 1.5}],
    "nan.jsonl": [ROW | {"similarity": float("nan")}],
    "folder/train.jsonl": [ROW],
    "foreign/notes.txt": [],
    "another/args.json": [dataclasses.asdict(dpo.Args())],
    "finished/args.json": [dataclasses.asdict(sft.Args())],
    "finished/generations.json": [[]],
}
TEXTS = {
    "broken.jsonl": '{"prompt": "a", "completion": "b"}\n\n{"prompt": oops}\n',
    "shifted.csv": "prompt,completion\na,b\nc,d,e\n",
    "open.csv": 'prompt,completion\n"a,b\n',
}


@pytest.fixture(scope="module")
def folder(toy, toy_reward, tmp_path_factory):
    """The files above; the toy's reward model with tokenizers that differ; a model without gradient checkpointing."""
    folder = tmp_path_factory.mktemp("mistakes")
    rows = {name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in FILES.items()}
    for name, text in (rows | TEXTS).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for name in ("vocabulary", "EOS", "BOS"):
        shutil.copytree(toy_reward, folder / name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(toy)
        if name == "vocabulary":
            tokenizer.add_tokens(["another"])
        elif name == "EOS":
            tokenizer.eos_token = "~"
        else:
            tokenizer.backend_tokenizer.post_processor = None
        tokenizer.save_pretrained(folder / name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(toy)
    config = transformers.OpenAIGPTConfig(vocab_size=512, n_embd=16, n_layer=1, n_head=1, n_positions=512)
    transformers.OpenAIGPTLMHeadModel(config).save_pretrained(folder / "gpt")
    tokenizer.save_pretrained(folder / "gpt")
    return folder


# A script, its flags, what is said. F: the folder above; LM, RM: the toy's language model and a reward model.
MISTAKES = [
    ("sft --seed 4294967296", "--seed is 4294967296, but must be a number from 0 to 4294967295"),
    ("ppo --gamma 2", "--gamma is 2.0, but must be a number from 0 to 1"),
    ("ppo --temperature 0", "--temperature is 0.0, but must be a number from 0.001"),
    ("sft --learning_rate inf", "--learning_rate is inf, but must be"),
    ("reward --weight_decay nan", "--weight_decay is nan, but must be"),
    ("sft --log_every 0", "--log_every is 0, but must be a number from 1"),
    ("dpo --label_smoothing 0.7", "--label_smoothing is 0.7, but must be a number from 0 to 0.5"),
    ("reward --constraint nothing", "--constraint"),
    ("reward --beta1 many", "--beta1"),
    ("sft --unknown 1", "--unknown"),
    ("sft --task alpaca", "--model"),
    ("reward --task alpaca --constraint cos_sim", "--model"),
    ("ppo --policy_model LM", "--reward_model"),
    ("ppo --minibatches 5", r"--global_batch_size 48 is no multiple of 5, ranks x --minibatches"),
    ("ppo --global_batch_size 4 --minibatches 8", "--global_batch_size 4 is no multiple of 8"),
    ("sft --resume", "--resume needs the --output_dir"),
    ("sft --dataset=", "--dataset : .*Is a directory"),
    ("reward --dataset F/no.jsonl", "--dataset F/no.jsonl: .*No such file"),
    ("dpo --dataset F/no*.parquet", r"--dataset F/no\*.parquet: .*No such file"),
    ("ppo --dataset nobody/nothing", "--dataset nobody/nothing: "),
    ("reward --dataset F/folder:b", "--dataset F/folder:b: no split b, but train: write F/folder:SPLIT"),
    ("reward --dataset F/five.jsonl:b", "--dataset F/five.jsonl:b: no usable row is left"),
    ("sft --eval_dataset F/broken.jsonl", "--eval_dataset F/broken.jsonl: broken.jsonl: JSONDecodeError: .*line 3 "),
    ("sft --dataset F/shifted.csv", "--dataset F/shifted.csv: row 2: column '.no heading.' would not be read"),
    ("dpo --dataset F/unread.jsonl", "--dataset F/unread.jsonl: row 2: column 'Prompt' would not be read"),
    ("sft --dataset F/open.csv", "--dataset F/open.csv: .*unexpected end of data"),
    ("ppo --dataset F/text.jsonl", "--dataset F/text.jsonl: row 1: .*columns are text, but must be ch"),
    ("dpo --dataset F/three.jsonl", "--dataset F/three.jsonl: row 2: .*preference is 3"),
    ("reward --dataset F/ties.jsonl", r"--dataset F/ties.jsonl: no usable row is left \(2 tie\)"),
    ("sft --dataset F/five.jsonl --max_length 3", r"no usable row is left \(5 longer than --max_length 3\)"),
    ("dpo --dataset F/five.jsonl", "4 rows, without the held-out ones, do not fill a --global_batch_size 32"),
    ("reward --ranked_dataset F/five.jsonl", "--ranked_dataset F/five.jsonl: row 1: .*responses"),
    *[
        (f"{script} --constraint given --dataset F/{name}.jsonl", f"--dataset F/{name}.jsonl: row {row}: .*similarity")
        for script, name, row in (("dpo", "zero", 2), ("reward", "above", 1), ("dpo", "nan", 1), ("reward", "five", 1))
    ],
    ("reward --constraint len_rat --beta3 -30", "--constraint len_rat: .*positive"),
    ("dpo --constraint fixed --fixed_bound -1", "--constraint fixed: .*-1"),
    ("dpo --task alpaca --model LM --dataset F/five.jsonl --dtype fp32 --constraint random", "--constraint random: "),
    ("reward --constraint random --random_low 9", "--constraint random: .*9"),
    ("reward --shuffle_bounds --constraint fixed", "--constraint fixed: .*--shuffle_bounds deals"),
    ("sft --model F/gpt --gradient_checkpointing", "--model F/gpt: .*checkpointing"),
    ("sft --output_dir F/five.jsonl", "five.jsonl"),
    ("sft --output_dir F/foreign", "--output_dir F/foreign holds files of something else"),
    ("sft --overwrite --output_dir F/another", "--output_dir F/another holds files of something else"),
    ("sft --output_dir F/finished", "--output_dir F/finished holds a finished run: choose another, or pass"),
    ("sft --model F/nothing", "F/nothing"),
    ("reward --constraint none --model F/folder", "tokenizer F/folder: Unrecognized model in .*config.json"),
    ("dpo --model nobody/nothing", "nobody/nothing"),
    ("sft --model RM", "--model RM is no language model"),
    ("dpo --ref_model RM", "--ref_model RM is no language model"),
    ("ppo --reward_model LM", "--reward_model LM is no decoder with a `score` head; missing"),
    ("reward --epochs 0 --model LM", "--model LM is no decoder with a `score` head"),
    ("reward --epochs 0 --model RM --constraint cos_sim", "--constraint cos_sim .*--epochs 0 needs the --encoder"),
    ("reward --constraint cos_sim --encoder F/nothing", "encoder F/nothing"),
    ("ppo --reward_model F/vocabulary", "--reward_model F/vocabulary has another vocabulary, BOS or EOS token than LM"),
    ("ppo --judge_model F/EOS", "--judge_model F/EOS has another vocabulary, BOS or EOS token than LM"),
    ("ppo --reward_model F/BOS", "--reward_model F/BOS has another vocabulary, BOS or EOS token than LM"),
    ("dpo --ref_model F/vocabulary", "--ref_model F/vocabulary has another vocabulary, BOS or EOS token than"),
]


@pytest.mark.parametrize("argv, message", MISTAKES, ids=[argv for argv, _ in MISTAKES])
def test_mistakes(run, folder, toy, toy_reward, tmp_path, monkeypatch, capsys, argv, message):
    """A malformed command line ends with status 2 and a usage message."""
    monkeypatch.chdir(tmp_path)
    name, *argv = argv.split()
    paths = {"F/": f"{folder}/", "LM": toy, "RM": toy_reward}
    argv, message = (re.sub("F/|LM|RM", lambda found: paths[found[0]], text) for text in ("\n".join(argv), message))
    models = f"--policy_model {toy} --reward_model {toy_reward}" * (name == "ppo" and "--policy_model" not in argv)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises((common.InputError, OSError, SystemExit)) as caught:
        run(SCRIPTS[name], "--max_steps=1", *models.split(), *argv.split("\n"))
    if caught.type is SystemExit:
        assert caught.value.code == 2 and re.search(message, capsys.readouterr().err)
    else:
        said = common.said(caught.value)
        assert re.search(message, said) and "\n" not in said and len(said) < 1000
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_cache_that_cannot_be_written(run, folder, toy, tmp_path, monkeypatch):
    """It is said where it is, before any work."""
    monkeypatch.setenv("PCRM_CACHE", str(folder / "five.jsonl"))
    with pytest.raises((common.InputError, OSError), match="five.jsonl") as caught:
        run(sft, "--model", toy, "--output_dir", str(tmp_path / "out"))
    assert "\n" not in common.said(caught.value)


def test_what_the_shell_sees(toy, tmp_path):
    """Status 1 and one last line on stderr: for a mistake, and where the reader of the output has gone (| head -1). One
    process needs no other, wherever a job or torchrun says that a store is."""
    environment = {name: value for name, value in os.environ.items() if not re.search("RANK|WORLD|MASTER", name)}
    environment |= {"MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    runs = []
    for argv in (["--max_steps", "-1"], ["--model", toy, "--max_steps", "100000", "--epochs", "9999"]):
        script = ["timeout", "100", sys.executable, str(ROOT / "sft.py")]
        command = [*script, "--log_every", "1", *argv, "--output_dir", str(tmp_path / "o")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        runs.append(subprocess.Popen(command, text=True, env=environment, **pipes))
    runs[1].stdout.readline()
    runs[1].stdout.close()
    for process, said in zip(runs, ("--max_steps is -1, but", "Broken pipe")):
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1 and "Traceback" not in errors
        assert errors.splitlines()[-1].startswith("sft.py: error: ") and said in errors.splitlines()[-1]
        assert sum("error" in line for line in errors.splitlines()) == 1
