"""A dozen model families that differ in kind get the log-probabilities and scores that transformers gives.

The oracle is the plain model on each sequence alone, in evaluation mode: no padding, no shared rows, all positions.
"""

import common

import functools
import json
import math
import re

import pytest
import torch
import transformers
from helpers import lines, rows_file

import dpo
import reward

CAUSAL, CLASSIFIER = transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification
SMALL = dict(
    vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
    num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
WINDOW = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])  # rows have 20 to 40 tokens
FAMILIES = {  # `model_type`, and after a blank a variant of it: what its configuration has beside SMALL
    "llama": {},
    "qwen3": {},
    "gpt_neox": {},
    "gpt2": {},  # learned positions, Conv1D
    "opt": dict(ffn_dim=64, word_embed_proj_dim=32),  # learned positions, two rows later
    "opt 350m": dict(ffn_dim=64, word_embed_proj_dim=16, do_layer_norm_before=False),  # a head on a projection
    "olmo": {},  # no parameter has one dimension
    "mixtral": dict(num_local_experts=4, sliding_window=None),
    "falcon": {},
    "bloom": {},  # ALiBi: the mask says where a token is
    "gemma2": WINDOW,  # caps on logits
    "mistral window": dict(sliding_window=8),
    "mamba": dict(state_size=8),  # recurrent
}
UNSHARED = ("bloom", "gemma2", "mistral window", "mamba")  # in one row a response would see the other before it
PAIRS = [
    ("Customer: Where is the milk?\nClerk:\n", "Aisle 3.", "You will find milk in aisle 2. Have a nice day!"),
    ("Where?\n", "Aisle 3. We open at eight.", "Aisle 3. We open at nine, and close at noon."),
    ("Hello! I am looking for candles.\n", "Go to aisle 4.", "Go to aisle 2."),
    ("Thank you.\n", "You are welcome! Goodbye.", "No."),
]
SHORT = "--max_steps 1 --global_batch_size 4 --micro_batch_size 2 --max_length 64".split()


def small_config(family: str):
    """A configuration with all that is random in training at 0.3."""
    kind = transformers.CONFIG_MAPPING[family.split()[0]]
    known = {**kind.attribute_map, **kind.__dataclass_fields__}
    config = kind(**{name: value for name, value in SMALL.items() if name in known} | FAMILIES.get(family, {}))
    for name, old in vars(config).items():
        if isinstance(old, float) and re.search("drop|jitter", name):
            setattr(config, name, 0.3)
    return config


def save_model(folder, config, tokenizer, auto_class=CAUSAL) -> str:
    """A random model whose every parameter, biases and norms too, matters."""
    torch.manual_seed(0)
    model = auto_class.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def plain(auto_class, folder):
    """The model as transformers loads it; the folder has all its weights, and no others."""
    model, info = auto_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert auto_class is transformers.AutoModel or not any(info.values()), info
    return model.eval()


def sequences(folder) -> list[list[tuple[int, torch.Tensor]]]:
    """(Tokens of the prompt, all tokens) of chosen and rejected of each pair."""
    tokenizer, pairs = transformers.AutoTokenizer.from_pretrained(folder), []
    for prompt, *responses in PAIRS:
        start = tokenizer(prompt).input_ids
        ids = [start + tokenizer(r, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] for r in responses]
        pairs.append([(len(start), torch.tensor([row])) for row in ids])
    return pairs


@torch.no_grad()
def response_logps(folder) -> torch.Tensor:
    """log π of each pair's chosen and rejected response, (n, 2)."""
    model = plain(CAUSAL, folder)

    def logp(start: int, ids: torch.Tensor) -> torch.Tensor:
        logits = model(ids, use_cache=False).logits[0, start - 1 : -1]
        return logits.log_softmax(-1).gather(1, ids[0, start:, None]).sum()

    return torch.tensor([[logp(*sequence) for sequence in pair] for pair in sequences(folder)])


@torch.no_grad()
def scores(folder) -> torch.Tensor:
    """The score of each pair's chosen and rejected sequence, (n, 2)."""
    model = plain(CLASSIFIER, folder)
    return torch.tensor([[model(ids).logits.item() for _, ids in pair] for pair in sequences(folder)])


def saved(out, *names: str) -> torch.Tensor:
    return torch.tensor([[line[name] for name in names] for line in lines(out / "eval.jsonl")])


@pytest.fixture
def step(run, tmp_path, monkeypatch):
    """step(script, name, "--flag", "value", ...): on the pairs, to train on and held out; the folder of the run."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)  # takes longer than the rest
    path = rows_file(tmp_path, *[dict(prompt=p, chosen=c, rejected=r) for p, c, r in PAIRS])

    def call(script, name: str, *flags: str):
        data = ["--dataset", path, "--eval_dataset", path, *SHORT, "--output_dir", str(tmp_path / name)]
        run(script, *data, *flags)
        return tmp_path / name

    return call


@pytest.fixture
def shared(monkeypatch, request) -> list[bool]:
    """Of each call of the language model but those of generation, whether pairs share rows: they have a mask of four
    dimensions then, else none."""
    kind, found = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(small_config(request.getfixturevalue("family")))], []
    forward = kind.forward

    @functools.wraps(forward)
    def watched(*args, **inputs):
        if inputs.get("past_key_values") is None:
            found.append(inputs.get("attention_mask") is not None)
        return forward(*args, **inputs)

    monkeypatch.setattr(kind, "forward", watched)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_dpo(step, tokenizer, tmp_path, shared, family):
    """Log-probabilities before and after a step, saved and loaded; pairs share rows where they can, in 16 bits too. An
    answer does not hang on its batch. Policy and reference are alike: in spite of dropout the first loss is log 2."""
    model = save_model(tmp_path / "start", small_config(family), tokenizer)
    out = step(dpo, "out", "--model", model)
    assert shared[-1] == (family not in UNSHARED)
    before, first, _ = lines(out / "metrics.jsonl")
    expected, trained = response_logps(model), response_logps(out / "model")
    assert [before["chosen_logps"], before["rejected_logps"]] == pytest.approx(expected.mean(0).tolist(), abs=1e-3)
    assert first["rank_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert torch.allclose(saved(out, "chosen_logps", "rejected_logps"), trained, rtol=0, atol=1e-3)
    assert (trained - expected).abs().max() > 1e-2
    alone = step(dpo, "alone", "--model", f"{out}/model", *"--epochs 0 --micro_batch_size 1".split())
    answers = [(folder / "generations.json").read_text().replace("alone", "out") for folder in (out, alone)]
    assert answers[0] == answers[1] and len(json.loads(answers[0])) == 4
    step(dpo, "16 bits", "--model", model, *"--epochs 0 --generate 0 --dtype bf16".split())
    assert shared[-1] == (family not in UNSHARED)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mamba"])
def test_reward(step, tokenizer, tmp_path, family):
    """Scores as saved and loaded; those of the step are those before it, in spite of dropout; the body is that of the
    language model, one step on."""
    model = save_model(tmp_path / "start", small_config(family), tokenizer)
    out = step(reward, "out", "--model", model)
    before, first, _ = lines(out / "metrics.jsonl")
    for side in ("chosen_score", "rejected_score"):
        assert first[side] == pytest.approx(before[side], abs=2e-5)
    trained = scores(out / "model")
    assert torch.allclose(saved(out, "chosen_score", "rejected_score"), trained, rtol=0, atol=1e-4)
    start = plain(CAUSAL, model).base_model.state_dict()
    for name, weight in plain(CLASSIFIER, out / "model").base_model.named_parameters():
        assert (weight - start[name]).abs().max() < 2e-3, name
    assert trained.std() > 1e-2


def test_what_is_no_decoder_is_refused(step, tokenizer, tmp_path):
    model = save_model(tmp_path / "start", small_config("bert"), tokenizer)
    with pytest.raises(common.InputError, match="start.*no.* `score` head"):
        step(reward, "out", "--model", model)
