"""What the README promises of a run: its files, their fields and keys, and how flags act that other tests leave out."""

import common

import inspect
import json
import math
import re
from pathlib import Path

import pytest
import torch
import toy_data
import transformers
from helpers import ROOT, lines, rows_file

import dpo
import ppo
import reward
import sft

SCRIPTS = dict(sft=sft, reward=reward, dpo=dpo, ppo=ppo)
README = (ROOT / "README.md").read_text(encoding="utf-8")
BATCH = "--max_steps 2 --log_every 1 --global_batch_size 8"


def first_rows(name: str, count: int) -> list[dict]:
    return lines(common.DATA / f"{name}.jsonl")[:count]


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> str:
    """The flags of 16 pairs to train on, 8 held out, and 4 prompts with ranked responses."""
    files = dict(
        dataset=("preference_train", 16), eval_dataset=("preference_eval", 8), ranked_dataset=("ranked_eval", 4)
    )
    paths = {flag: rows_file(tmp_path_factory.mktemp(flag), *first_rows(*rows)) for flag, rows in files.items()}
    return " ".join(f"--{flag} {path}" for flag, path in paths.items())


@pytest.fixture(scope="module")
def runs(run, few, tmp_path_factory) -> dict[str, Path]:
    """The road: the folders of two steps of each script, each from the model of the one before."""
    out = tmp_path_factory.mktemp("runs")
    demonstrations = f"--dataset {common.DATA}/sft_eval.jsonl --eval_dataset {common.DATA}/sft_eval.jsonl"
    prompts = common.DATA / "prompts_eval.jsonl"
    models = f"--policy_model {out}/sft/model --reward_model {out}/reward/model --judge_model {out}/reward/model"
    flags = dict(
        sft=f"{demonstrations} --generate 3 --max_length 64",
        reward=f"{few} --model {out}/sft/model --constraint len_rat",
        dpo=f"{few} --model {out}/sft/model --constraint fixed --generate 3 --max_length 96",
        ppo=f"--dataset {prompts} --eval_dataset {prompts} {models} --generate 3 --max_new_tokens 8",
    )
    for name, script in SCRIPTS.items():
        run(script, f"{flags[name]} {BATCH} --output_dir {out}/{name}")
    return {name: out / name for name in SCRIPTS}


def test_files(runs):
    """The README's list: these and no others."""
    for name, folder in runs.items():
        pairs = {"eval.jsonl", "margins.png"} if name in ("reward", "dpo") else set()
        answers, steps = {"generations.json"} if name != "reward" else set(), {"ppo.png"} if name == "ppo" else set()
        own = pairs | answers | steps | {"args.json", "metrics.jsonl", "tensorboard", "model"}
        assert {path.name for path in folder.iterdir()} == own, name
        assert json.loads((folder / "args.json").read_text())["global_batch_size"] == 8
        for picture in own & {"margins.png", "ppo.png"}:
            assert (folder / picture).read_bytes().startswith(b"\x89PNG")
        assert list((folder / "model").glob("*.safetensors")) and not list((folder / "model").glob("*.bin"))


def test_keys_are_those_of_the_readmes_table(runs):
    """By script, and (eval): in evaluations alone. eval.jsonl has the fields that stand below the table."""
    table = re.search(r"(?m)^\| key \|.*\n\|[ -|]*\n((?:\|.*\n)+)", README)[1]
    rows = [[cell.strip() for cell in line.split("|")[1:]] for line in table.splitlines()]
    for number, (name, unit) in enumerate(zip(SCRIPTS, ("rows", "pairs", "pairs", "prompts"))):
        others = {f"{other}_per_s" for other in ("rows", "pairs", "prompts") if other != unit}
        others |= {"perplexity"} if name != "sft" else set()  # as its row says
        marked = {False: set(), True: set()}
        for cell, *marks in rows:
            if marks[number] == "x":
                marked["(eval)" in cell] |= set(re.findall(r"`(\w+)`", cell)) - others
        logged = lines(runs[name] / "metrics.jsonl")
        train, evaluated = (
            {key for line in logged if line["split"] == split for key in line} for split in ("train", "eval")
        )
        assert train | evaluated == marked[False] | marked[True] and evaluated - train == marked[True]
        assert all(line.keys() == (train if line["split"] == "train" else evaluated) for line in logged)
    shown = {"margin", "similarity", "bound"}
    scores, rewards, logps = (
        {f"{side}_{what}" for side in ("chosen", "rejected")} for what in ("score", "reward", "logps")
    )
    for name, fields in (("reward", scores | shown), ("dpo", rewards | logps | shown)):
        pairs = lines(runs[name] / "eval.jsonl")
        assert len(pairs) == 8 and all(pair.keys() == fields for pair in pairs)


TEMPLATE = "{% for turn in messages %}[{{ turn.role }}] {{ turn.content }}</s>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}[assistant] {% endif %}"


def test_generations_are_what_alpaca_eval_reads(run, runs, toy, tmp_path, monkeypatch):
    """Four texts each; `instruction` is what the user said last, by which it joins. An answer has the room that its
    prompt leaves of --max_length, and uses all of it where it does not end."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(toy, chat_template=TEMPLATE)
    transformers.AutoModelForCausalLM.from_pretrained(toy).save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    turns = [
        dict(role=role, content=text)
        for role, text in zip(("user", "assistant") * 2, ("Hello!", "Hi.", "Milk?", "No."))
    ]
    farm = dict(instruction="Name", input=" a bird.", output="Owl")
    data = rows_file(tmp_path, dict(messages=turns), farm, dict(prompt="Where?\n", completion="Here."))
    sampled, sample = [], common.sample
    monkeypatch.setattr(common, "sample", lambda *rest: sampled.append((rest[3], sample(*rest))) or sampled[-1][1])
    run(sft, f"--model {tmp_path}/chat --epochs 0 --eval_dataset {data} --max_length 60 --output_dir {tmp_path}/out")
    found = json.loads((tmp_path / "out" / "generations.json").read_text())
    assert [line["instruction"] for line in found] == ["Milk?", "Name a bird.", "Where?\n"]
    ((prompts, answers),) = sampled
    assert max(len(p) + len(a) for p, a in zip(prompts, answers)) == 60
    assert [line["output"] for line in found] == tokenizer.batch_decode(answers, skip_special_tokens=True)
    for name, count in (("sft", 3), ("dpo", 3), ("ppo", 3)):
        found = json.loads((runs[name] / "generations.json").read_text())
        assert len({line["instruction"] for line in found}) == count
        for line in found:
            assert line.keys() == {"instruction", "output", "generator"} and line["generator"] == name
            assert all(isinstance(value, str) for value in line.values()) and "</s>" not in line["output"]


def test_the_readmes_lines_give_the_scores_of_a_run(runs):
    """With the saved folder alone, loaded as others load it."""
    (block,) = re.findall(r"```python\n(ids, eos = [^`]*)```", README)
    folder = runs["reward"] / "model"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer, pairs = transformers.AutoTokenizer.from_pretrained(folder), first_rows("preference_eval", 8)
    for line, row in zip(lines(runs["reward"] / "eval.jsonl"), pairs, strict=True):
        for side in ("chosen", "rejected"):
            names = dict(tokenizer=tokenizer, prompt=row["prompt"], response=row[side], model=model, torch=torch)
            exec(block, names)
            assert line[f"{side}_score"] == pytest.approx(names["score"], abs=1e-4)


def test_what_the_siblings_repeat_is_the_same():
    """They repeat these on purpose: each stands alone. A change in one is a change in both."""
    for name in ("similarities", "bounds_of"):
        assert inspect.getsource(getattr(dpo, name)) == inspect.getsource(getattr(reward, name))


def test_bounds_of_evaluated_pairs(run, runs, tmp_path):
    """δ* = 10 / (s + 0.001) - 4 of the data's own similarity; dealt, the same to other pairs; the controls'
    values, of which random ones are drawn anew in each epoch."""
    values = [0.1 * i + 0.05 for i in range(9)]
    rows = [row | dict(similarity=value) for row, value in zip(first_rows("preference_eval", 9), values)]
    data, found = rows_file(tmp_path, *rows), {}
    betas = "--constraint given --beta1 10 --beta3 -4"
    kinds = dict(
        given=betas, dealt=f"{betas} --shuffle_bounds", none="", length="--constraint len_rat --beta1 10 --beta3 -4"
    )
    kinds |= dict(
        fixed="--constraint fixed --fixed_bound 2.5", random="--constraint random --random_low 2 --random_high 3"
    )
    for name, flags in kinds.items():
        flags = (
            f"{flags} --epochs 0 --model {runs['reward']}/model --eval_dataset {data} --output_dir {tmp_path}/{name}"
        )
        run(reward, flags)
        found[name] = {
            key: [line[key] for line in lines(tmp_path / name / "eval.jsonl")] for key in ("similarity", "bound")
        }
        (metrics,) = lines(tmp_path / name / "metrics.jsonl")
        bounded = [metrics[key] is not None for key in ("bound_mean", "over_bound", "constraint_loss")]
        assert bounded == [name != "none"] * 3 and not (tmp_path / name / "model").exists()
    given, dealt = found["given"]["bound"], found["dealt"]["bound"]
    assert found["given"]["similarity"] == pytest.approx(values) and given == pytest.approx(
        [10 / (s + 0.001) - 4 for s in values]
    )
    assert sorted(dealt) == pytest.approx(sorted(given)) and sum(a != b for a, b in zip(dealt, given)) > 4
    assert found["length"]["bound"] == pytest.approx([10 / (s + 0.001) - 4 for s in found["length"]["similarity"]])
    assert found["fixed"]["bound"] == [2.5] * 9 and found["none"]["bound"] == [None] * 9
    assert found["none"]["similarity"] == found["length"]["similarity"] and len(set(found["random"]["bound"])) == 9
    assert 2 <= min(found["random"]["bound"]) < max(found["random"]["bound"]) <= 3
    for flags, anew in ((dict(constraint="random"), True), (dict(constraint="len_rat", shuffle_bounds=True), False)):
        first, later = (reward.bounds_of(torch.linspace(0.1, 1, 50), reward.Args(**flags), epoch) for epoch in (3, 4))
        assert bool((first != later).all()) == anew != torch.equal(first, later)


def test_evaluation_needs_the_encoder_of_training(run, few, tokenizer, tmp_path):
    """The model itself would give other bounds than those of training, in silence."""
    sizes = dict(vocab_size=512, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, initializer_range=1.0)
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    bounds, evaluation = [], f"--epochs 0 --model {tmp_path}/a/model"
    encoder = f"--encoder {tmp_path}/bert --encoder_pooling"
    for name, flags in (("a", "cls --max_steps 1"), ("b", f"cls {evaluation}"), ("c", f"mean {evaluation}")):
        run(reward, f"{few} --constraint cos_sim {BATCH} {encoder} {flags} --output_dir {tmp_path}/{name}")
        bounds.append([line["bound"] for line in lines(tmp_path / name / "eval.jsonl")])
    assert bounds[0] == bounds[1] != bounds[2]
    with pytest.raises(common.InputError, match="--encoder of training"):
        run(reward, f"{few} --constraint cos_sim {evaluation} --output_dir {tmp_path}/d")


def test_the_first_step_of_dpo_is_log_2(runs):
    """Policy and reference are one: z = 0, -log σ(0) = log 2, and -log σ(4.5 - 0) for the bound. No dropout."""
    first = lines(runs["dpo"] / "metrics.jsonl")[1]
    assert first["rank_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["constraint_loss"] == pytest.approx(math.log1p(math.exp(-4.5)), abs=1e-5)
    assert first["kl"] == pytest.approx(0, abs=1e-3) and first["margin_std"] < 1e-4


def test_a_live_reference_is_the_cached_one(run, runs, few, tmp_path):
    flags = f"{few} {BATCH} --model {runs['sft']}/model --ref_model {common.toy_model()} --generate 0"
    for name, more in (("cached", ""), ("live", "--live_reference")):
        run(dpo, f"{flags} {more} --output_dir {tmp_path}/{name}")
    for a, b in zip(*(lines(tmp_path / name / "metrics.jsonl") for name in ("cached", "live")), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and abs(b["margin_std"]) > 1e-2


def test_the_score_clip_of_ppo(run, runs, tmp_path):
    """Without KL and with λ = 1 a token's return is its response's clipped score: within ± the clip, or with 0 any."""
    models = f"--policy_model {runs['sft']}/model --reward_model {runs['reward']}/model"
    data = f"--dataset {common.DATA}/prompts_eval.jsonl --generate 0 --max_new_tokens 4 --kl_coef 0 --gae_lambda 1"
    for clip, share in (("0.001", 1), ("0", 0)):
        run(ppo, f"{models} {data} {BATCH} --max_steps 1 --score_clip {clip} --output_dir {tmp_path}/{clip}")
        (line,) = (line for line in lines(tmp_path / clip / "metrics.jsonl") if line["split"] == "train")
        assert line["score_clipfrac"] == share and (abs(line["returns_mean"]) <= 0.001) == share
        assert abs(line["score_mean"]) > 0.002


def test_whose_settings_these_are_is_said(process, capsys):
    """Once, for a model that is larger than the toy, where no task is given."""
    for width, task, said in ((2300, "toy", 1), (2300, "alpaca", 0), (300, "toy", 0)):
        args = sft.Args(task=task)
        common.make_engine(torch.nn.Linear(width, width), args, common.engine_config(args, 1), 1, process)
        found = capsys.readouterr().out
        assert found.count("those of --task toy, learning rate 0.002: pass --task") == said == found.count("\n")


def test_training_learns(run, tmp_path):
    """200 pairs, 4 epochs: from chance (0.5) to most of them."""
    data = rows_file(tmp_path, *first_rows("preference_train", 200))
    run(reward, f"--dataset {data} --eval_dataset {data} --epochs 4 --output_dir {tmp_path}/out")
    before, *_, after = (line["accuracy"] for line in lines(tmp_path / "out" / "metrics.jsonl"))
    assert abs(before - 0.5) < 0.15 and after > 0.8


def test_data_is_what_the_generator_writes():
    files = toy_data.build()
    texts = {name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in files.items()}
    texts |= {f"toy/{name}": text for name, text in toy_data.build_toy(files).items()}
    there = {str(path.relative_to(common.DATA)): path for path in common.DATA.rglob("*") if path.is_file()}
    assert there.keys() == texts.keys()
    for name, text in texts.items():
        assert toy_data.same(there[name].read_text(encoding="utf-8"), text), name
