"""What other programs make of the files of a run: transformers, TRL, AlpacaEval and the Hub's model card."""

import common

import importlib.util
import json
import re
import shutil

import datasets
import huggingface_hub
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
    assert saved["eos_token_id"] == eos == transformers.AutoTokenizer.from_pretrained(folder).eos_token_id
    assert not saved.keys() & {"do_sample", "top_k", "max_length", "suppress_tokens"}

    model, said = CAUSAL.from_pretrained(folder), [9, 7, eos, 11, 12]  # 7 ended the starting model's texts, 9 was never

    def speaks(module, inputs, logits):
        logits[..., said[len(heard)]] = 1e4
        heard.append(logits.shape)

    heard = []
    model.get_output_embeddings().register_forward_hook(speaks)
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=5)[0, ids.shape[1] :].tolist() == said[:3]


# ---------------------------------------------------------------- the model card


def card_tables(text: str) -> dict[str, dict[str, str]]:
    """{heading: {name: value}} of a card's tables."""
    tables = re.findall(r"(?m)^\| (.+?) \| \|\n\| --- \| --- \|\n((?:\|.*\n)*)", text)
    return {head: dict(re.findall(r"(?m)^\| (.+?) \| (.*) \|$", rows)) for head, rows in tables}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_model_card(runs, name):
    """It can be read as the Hub reads it, and says what trained the model, on what, how it did, and how to load it."""
    out = runs / name
    card = huggingface_hub.ModelCard.load(out / "model" / "README.md")
    assert card.data.to_dict() == {"library_name": "transformers", "tags": ["pcrm"]}
    assert f"`{name}.py`" in card.text and "2404.00978" in card.text
    tables = card_tables(card.text)

    first, *_, last = [line for line in lines(out / "metrics.jsonl") if line["split"] == "eval"]
    last = {key: value for key, value in last.items() if key != "split" and value is not None}
    found = {key: float(value) for key, value in tables["on held-out rows"].items()}
    assert found == pytest.approx(last, rel=1e-3) and found != pytest.approx(first, rel=1e-3)
    assert name not in ("dpo", "reward") or found["over_bound"] == 0

    flags = {key: str(value) for key, value in json.loads((out / "args.json").read_text()).items() if value != ""}
    assert tables["trained with"] == flags
    assert flags["dataset"] == str(runs / "rows.jsonl") and flags["max_steps"] == "2"
    assert flags.get("constraint") == ("fixed" if name in ("dpo", "reward") else None)

    (auto_class,) = re.findall(r"`transformers\.(\w+)\.from_pretrained\(folder\)`", card.text)
    model, info = getattr(transformers, auto_class).from_pretrained(out / "model", output_loading_info=True)
    assert not any(info.values()) and model.config.pad_token_id is not None
    assert transformers.AutoTokenizer.from_pretrained(out / "model").eos_token == "</s>"


def test_a_card_says_whole_numbers_and_zeros_as_they_are(process, tmp_path):
    """Steps beyond four digits, and a figure of 0, which is one: none over the bound. One that is null is left out."""
    evaluated = dict(step=123456, split="eval", loss=1.23456789, over_bound=0.0, ranked_spearman=None)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(evaluated) + "\n")
    (tmp_path / "model").mkdir()
    common.write_card(tmp_path, reward.Args(), "AutoModelForSequenceClassification", process)
    found = card_tables((tmp_path / "model" / "README.md").read_text())["on held-out rows"]
    assert found == {"step": "123456", "loss": "1.235", "over_bound": "0"}


# ---------------------------------------------------------------- AlpacaEval


@pytest.mark.parametrize("name", LANGUAGE)
def test_answers_as_alpaca_eval_reads_them(runs, name):
    """A list of flat rows of text, each instruction once: the judge joins them to its own by it."""
    rows = json.loads((runs / name / "generations.json").read_text(encoding="utf-8"))
    assert [row["instruction"] for row in rows] == PROMPTS[:3]
    for row in rows:
        assert row.keys() == {"instruction", "output", "generator", "dataset"}
        assert isinstance(row["output"], str) and not re.search("</?s>|<pad>", row["output"])
        assert row["generator"] == name and row["dataset"] == "rows.jsonl"


@pytest.mark.parametrize("name", LANGUAGE)
def test_alpaca_evals_own_loader(runs, name):
    utils = neighbour("alpaca_eval.utils")
    path = runs / name / "generations.json"
    table = utils.load_or_convert_to_dataframe(str(path))
    assert list(table.columns) == ["instruction", "output", "generator", "dataset"]
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


@pytest.mark.parametrize("kind", ["RLOO", "GRPO"])
def test_a_reward_model_in_trl(alone, runs, tokenizer, tmp_path, kind):
    """The policy of sft.py, and reward.py's folder as the reward: it gets the text without BOS and EOS, and TRL logs
    the score of that. A function of the README's lines gives the score with both, that of training."""
    trl = neighbour("trl")
    folder, seen = str(runs / "reward" / "model"), []
    model = CLASSIFIER.from_pretrained(folder)

    def with_both_ends(prompts, completions, completion_ids, **_):
        rows = [tokenizer(prompt).input_ids + ids for prompt, ids in zip(prompts, completion_ids)]
        seen.extend(zip(prompts, completions, completion_ids))
        with torch.no_grad():
            return [model(torch.tensor([row])).logits.item() for row in rows]

    config = settings(
        getattr(trl, f"{kind}Config"), tmp_path, num_generations=2, max_completion_length=8, temperature=1.0
    )
    trainer = getattr(trl, f"{kind}Trainer")(
        model=str(runs / "sft" / "model"),
        reward_funcs=[folder, with_both_ends],
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": PROMPTS}),
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert len(seen) == 4
    as_text = [tokenizer(p + c, add_special_tokens=False).input_ids for p, c, _ in seen]
    as_trained = [tokenizer(p).input_ids + ids for p, _, ids in seen]
    for name, rows in (("model", as_text), ("with_both_ends", as_trained)):
        scores = torch.tensor([score(folder, row) for row in rows])
        assert logged[f"rewards/{name}/mean"] == pytest.approx(scores.mean().item(), abs=1e-5)
        assert logged[f"rewards/{name}/std"] == pytest.approx(scores.std().item(), abs=1e-5)
        assert scores.std() > 1e-3


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
