"""What other programs make of the files of a run: transformers, TRL, AlpacaEval."""

import common

import importlib.util
import json
import re
import shutil

import datasets
import pytest
import torch
import transformers
from helpers import ROOT, lines, rows_file

import dpo
import ppo
import reward
import sft
from priors import constrained_ranking_loss

CAUSAL, CLASSIFIER = transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification
SCRIPTS = dict(sft=sft, dpo=dpo, reward=reward, ppo=ppo)
LANGUAGE = ("sft", "dpo", "ppo")
PROMPTS = ["Customer: Do you sell milk?\nClerk:\n", "Where?\n", "Customer: Hello! I need soap.\nClerk:\n", "Soap?\n"]
PAIRS = [
    dict(prompt=prompt, completion="Aisle 3.", chosen="Aisle 3. " + "Have a nice day! " * n, rejected="No idea, go.")
    for n, prompt in enumerate(PROMPTS)
]


@pytest.fixture(scope="module")
def runs(run, toy, toy_reward, tmp_path_factory):
    """SCRIPT: the folder of a run of two steps, whose starting model would end at another token than the tokenizer's
    EOS, sample greedily and never say some tokens."""
    folder = tmp_path_factory.mktemp("neighbours")
    shutil.copytree(toy, folder / "start")
    settings = dict(eos_token_id=7, do_sample=True, top_k=1, max_length=9, suppress_tokens=[*range(9, 200)])
    (folder / "start" / "generation_config.json").write_text(json.dumps(settings))
    data = rows_file(folder, *PAIRS)
    few = f"--dataset {data} --eval_dataset {data} --max_steps 2 --global_batch_size 4"
    flags = {name: f"--model {folder}/start" for name in ("sft", "dpo", "reward")}
    flags["ppo"] = f"--policy_model {folder}/start --reward_model {toy_reward} --max_new_tokens 8"
    for name in ("dpo", "reward"):
        flags[name] += " --constraint fixed --fixed_bound 50"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "plot_margins", lambda *_: None)
        patch.setattr(ppo, "plot_steps", lambda *_: None)
        for name, script in SCRIPTS.items():
            generate = "--generate 3" if name in LANGUAGE else ""
            run(script, f"{flags[name]} {few} {generate} --output_dir {folder}/{name}")
    return folder


def neighbour(name: str):
    """A module of a package that the tests do not install; what is installed but cannot be imported is a failure."""
    package = name.split(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return importlib.import_module(name)


# ---------------------------------------------------------------- transformers


@pytest.mark.parametrize("name", LANGUAGE)
def test_generation_ends_at_eos(runs, tokenizer, name):
    """`generate` without a setting of ours: a row ends where the model says EOS first, and not at any other token."""
    folder, eos = runs / name / "model", tokenizer.eos_token_id
    saved = json.loads((folder / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [eos] == [transformers.AutoTokenizer.from_pretrained(folder).eos_token_id]
    assert not saved.keys() & {"do_sample", "top_k", "max_length", "suppress_tokens"}

    model, said = CAUSAL.from_pretrained(folder), [9, 7, eos, 11, 12]  # 7 ended the starting model's texts, 9 was never

    def speaks(module, inputs, logits):
        logits[..., said[len(heard)]] = 1e4
        heard.append(logits.shape)

    heard = []
    model.get_output_embeddings().register_forward_hook(speaks)
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=5)[0, ids.shape[1] :].tolist() == said[:3]


# ---------------------------------------------------------------- scores by the README's lines

EACH, ASK = "{% for m in messages %}", "{% endfor %}{% if add_generation_prompt %}"
TEMPLATES = {  # what stands before a turn, what ends it, and what is written behind a whole conversation
    "chatml": ("<|im_start|>", "<|im_end|>\\n", ""),
    "gemma": ("<start_of_turn>", "<end_of_turn>\\n", ""),
    "phi3": ("<|turn|>", "<|end|>\\n", "{{ eos_token }}"),
    "glm": ("<|turn|>", "", ""),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_score_of_a_conversation(train, toy, tmp_path, name):
    """The README's lines give the scores of eval.jsonl, where another token would give another score."""
    before, end, last = TEMPLATES[name]
    tokenizer = transformers.AutoTokenizer.from_pretrained(toy)
    special = [token for token in (before, end.removesuffix("\\n")) if token]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    turn = "{{ '" + before + "' + m['role'] + '\\n' + m['content'] + '" + end + "' }}"
    ask = "{{ '" + before + "assistant\\n' }}"
    tokenizer.chat_template = EACH + turn + ASK + ask + ("{% else %}" + last if last else "") + "{% endif %}"
    config = transformers.AutoConfig.from_pretrained(
        toy, num_labels=1, vocab_size=len(tokenizer), initializer_range=0.5
    )
    CLASSIFIER.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    asked = [{"role": "user", "content": "Where is the milk?"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("Aisle 3.", "No idea, go. ")]
    data = rows_file(tmp_path, {"prompt": asked, "chosen": answers[0], "rejected": answers[1]})
    train(f"--epochs 0 --model {tmp_path}/model --eval_dataset {data} --output_dir {tmp_path}/out")
    (line,) = lines(tmp_path / "out" / "eval.jsonl")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(ids = tokenizer\(tokenizer[^`]*)```", readme)
    for side, answer in zip(("chosen_score", "rejected_score"), answers):
        names = {"tokenizer": tokenizer, "torch": torch, "turns": asked + answer}
        names["model"] = CLASSIFIER.from_pretrained(tmp_path / "model")
        exec(code, names)
        assert names["score"] == pytest.approx(line[side], abs=1e-4)
        assert names["ids"][-1:] != [names["tokenizer"].pad_token_id]


# ---------------------------------------------------------------- AlpacaEval


@pytest.mark.parametrize("name", LANGUAGE)
def test_answers_as_alpaca_eval_reads_them(runs, name):
    """A list of flat rows of text, each instruction once: the judge joins them to its own by it."""
    rows = json.loads((runs / name / "generations.json").read_text(encoding="utf-8"))
    assert [row["instruction"] for row in rows] == PROMPTS[:3]
    for row in rows:
        assert row.keys() == {"instruction", "output", "generator"}
        assert isinstance(row["output"], str) and not re.search("</?s>|<pad>", row["output"])
        assert row["generator"] == name


@pytest.mark.parametrize("name", LANGUAGE)
def test_alpaca_evals_own_loader(runs, name):
    utils = neighbour("alpaca_eval.utils")
    path = runs / name / "generations.json"
    table = utils.load_or_convert_to_dataframe(str(path))
    assert list(table.columns) == ["instruction", "output", "generator"]
    assert table.to_dict("records") == json.loads(path.read_text(encoding="utf-8"))
    assert utils.get_generator_name(None, table) == name


# ---------------------------------------------------------------- TRL


@pytest.fixture
def alone(monkeypatch):
    """Without the ranks of this process: TRL is started as one that has none."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def settings(config, folder, **rest):
    """A trainer's, of one step on four rows on the CPU in fp32, each step logged."""
    return config(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        **rest,
    )


def score(folder, ids: list[int]) -> float:
    """The reward model's, read at the last token."""
    with torch.no_grad():
        return CLASSIFIER.from_pretrained(folder)(torch.tensor([ids])).logits.item()


def test_the_readmes_trainer_in_trl(alone, runs, tokenizer, tmp_path):
    """The example as it stands, its last line too: the loss that TRL logs is the mean of -log σ(m) - log σ(δ* - m)."""
    trl = neighbour("trl")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import torch\nfrom trl[^`]*)```", readme)
    folder = str(runs / "reward" / "model")
    names = dict(
        model=CLASSIFIER.from_pretrained(folder),
        args=settings(trl.RewardConfig, tmp_path),
        dataset=datasets.Dataset.from_list(
            [{side: row[side] for side in ("prompt", "chosen", "rejected")} for row in PAIRS]
        ),
    )
    exec(code.replace("# trainer =", "trainer ="), names)
    names["trainer"].train()
    margins, bounds = [], []
    for row in PAIRS:
        texts = [row["prompt"] + row[side] + tokenizer.eos_token for side in ("chosen", "rejected")]
        chosen, rejected = (score(folder, tokenizer(text).input_ids) for text in texts)
        shorter, longer = sorted(len(row[side].split()) + 1 for side in ("chosen", "rejected"))
        margins.append(chosen - rejected)
        bounds.append(20 / (shorter / longer + 0.001) - 15)
    expected = constrained_ranking_loss(torch.tensor(margins), torch.tensor(bounds)).mean().item()
    assert names["trainer"].state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-5)
    assert abs(expected - constrained_ranking_loss(torch.tensor(margins)).mean().item()) > 1e-3
