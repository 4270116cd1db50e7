"""common.py's tokenizers and models: what is refused, new, off, what ends an answer, what is measured."""

import common

import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

import reward

SMALL = dict(vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SMALL |= dict(num_key_value_heads=4, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
SMALL |= dict(initializer_range=0.1)
CAUSAL, SCORER = transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification


def build(kind: str = "llama", auto=CAUSAL, **values):
    torch.manual_seed(0)
    return auto.from_config(transformers.CONFIG_MAPPING[kind](**SMALL | values))


@pytest.fixture
def save(toy, tmp_path):
    """save(model, …) writes a folder: the toy's tokenizer and more tokens, more or other weights (None: removed)."""

    def call(model, tokens: tuple[str, ...] = (), **weights) -> str:
        tokenizer = transformers.AutoTokenizer.from_pretrained(toy)
        tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
        tokenizer.save_pretrained(tmp_path)
        model.save_pretrained(tmp_path)
        all_weights = safetensors.torch.load_file(tmp_path / "model.safetensors") | weights
        kept = {name: value for name, value in all_weights.items() if value is not None}
        safetensors.torch.save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return str(tmp_path)

    return call


def load(path: str, what: str = "language", **values):
    """As a script loads it: a "language" model, a "reward" model, or one with a "new" head."""
    args = reward.Args(**dict(max_length=64) | values)
    rest = "--model", path, args, common.load_tokenizer(path, args.trust_remote_code), common.engine_config(args, 1)
    if what == "language":
        return common.load_language_model(*rest)
    return common.load_reward_model(*rest, new_head=what == "new")


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize(
    "config, lent",
    [
        (dict(pad_token="<pad>"), "<pad>"),
        (dict(pad_token="</s>"), "<pad>"),
        (dict(pad_token="<s>"), "<pad>"),
        (dict(pad_token=None), "<pad>"),
        (dict(pad_token=None, unk_token="<pad>"), "<pad>"),  # as Llama-2's <unk>
        (dict(pad_token=None, chat_template="{{ '<pad>' }}"), "no padding token but EOS, and none to lend"),
        (dict(eos_token=None), "no EOS token"),
    ],
)
def test_padding_is_neither_eos_nor_a_token_of_texts(tokenizer, tmp_path, config, lent):
    """Else scores would be read before EOS. A special token that nothing uses is lent; none is added."""
    tokenizer.save_pretrained(tmp_path)
    transformers.LlamaConfig().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if lent != "<pad>":
        with pytest.raises(common.InputError, match=lent):
            common.load_tokenizer(str(tmp_path), False)
    else:
        other = common.load_tokenizer(str(tmp_path), False)
        assert other.pad_token == lent and len(other) == len(tokenizer)


TEMPLATE = """{% for turn in messages %}{{ turn.role + ": " + turn.content + "<|end|>\n" }}{% endfor %}"""


def test_what_ends_an_answer(save):
    """The tokenizer's EOS, what the folder lists (but no token of texts) and what the chat template writes behind an
    answer. Its other settings are not taken over: greedy, 8 answers would be one. Saved, the list is still there."""
    model = build(vocab_size=514)
    path = save(model, ("<|end|>", "<|stop|>"))
    settings = dict(do_sample=True, top_k=1, repetition_penalty=5.0, suppress_tokens=[*range(9, 500)])
    (Path(path) / "generation_config.json").write_text(json.dumps(settings | dict(eos_token_id=[2, 513, 400])))
    for template, ends in (("", [2, 513]), (TEMPLATE, [2, 512, 513]), ("{{ raise_exception('no') }}", [2, 513])):
        (Path(path) / "chat_template.jinja").write_text(template)
        model, tokenizer = load(path), common.load_tokenizer(path, False)
        assert model.generation_config.eos_token_id == ends
        model.reads_padding = False
        answers = common.sample(model, model, tokenizer, [[5, 6]] * 8, [20] * 8, [[n] for n in range(8)], 8)
        assert len({tuple(answer) for answer in answers}) == 8 and {*sum(answers, [])} & {*range(9, 500)}
    model.generation_config.save_pretrained(path)
    assert load(path).generation_config.eos_token_id == [2, 513]


# ---------------------------------------------------------------- what is refused

ONE = dict(auto=SCORER, num_labels=1)
TWO, DOWN = ONE | dict(num_labels=2), "model.layers.1.mlp.down_proj.weight"
BIAS, HEAD = {"score.bias": torch.zeros(1)}, {"v_head.summary.weight": torch.zeros(1, 32)}


@pytest.mark.parametrize(
    "what, kind, values, weights, message",
    [
        ("language", "llama", dict(tokens=("<new>",)), {}, "512 embeddings, but token 512 is '<new>'"),
        ("language", "gpt2", dict(max_position_embeddings=48), {}, "48 positions"),
        ("language", "llama", dict(max_position_embeddings=48), {}, "48 positions"),
        ("language", "llama", ONE, {}, "no language model: missing .*score.weight"),
        ("language", "llama", {}, {DOWN: None}, f"missing .*{DOWN}"),
        ("new", "llama", {}, {DOWN: None}, f"missing .*{DOWN}"),
        ("language", "llama", {}, {"model.norm.weight": torch.ones(40)}, r"norm.weight has the shape \(40,\)"),
        ("reward", "llama", TWO, {}, r"score.weight has the shape \(2, 32\)"),
        ("new", "llama", TWO, {}, r"score.weight has the shape \(2, 32\)"),
        ("reward", "llama", {}, {}, "no decoder with a `score` head"),
        ("reward", "llama", ONE, BIAS, "'score.bias'.* would not be used"),
        ("reward", "llama", ONE, HEAD, "'v_head.summary.weight'.* would not be used"),
        ("new", "llama", ONE | dict(auto=CAUSAL), HEAD, "'v_head.summary.weight'.* would not be used"),
        ("new", "bert", dict(max_position_embeddings=64), {}, "no decoder with a `score` head"),
        ("language", "llama", dict(file="adapter_config.json"), {}, "adapter_config.json: an adapter is not read"),
    ],
)
def test_models_that_would_be_read_wrongly_are_refused(save, what, kind, values, weights, message):
    """In one line, where Transformers draws weights anew, leaves some aside, or reads beyond a table."""
    values = dict(values)
    tokens, file = values.pop("tokens", ()), values.pop("file", "config.json")
    path = Path(save(build(kind, **values), tokens, **weights))
    (path / file).write_text((path / "config.json").read_text())
    with pytest.raises(common.InputError, match=message) as caught:
        load(str(path), what)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_what_is_no_fault(save, monkeypatch):
    """What a language model has beside its body: its own head, GPT-NeoX's under its name on disk, and what its class
    ignores, as heads for several tokens. Positions that rows fit into."""
    assert load(save(build("gpt2", max_position_embeddings=48)), max_length=48)
    for kind in ("llama", "gpt_neox"):
        assert load(save(build(kind, tie_word_embeddings=False)), "new").classifier.score.weight.std() > 0
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp\."])
    assert load(save(build(), **{"mtp.proj.weight": torch.zeros(2, 2)}), "new")


def test_code_of_a_model_runs_only_when_asked(save, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = Path(save(build()))
    code = "import transformers\nclass Config(transformers.LlamaConfig):\n    model_type = 'own'\n"
    (path / "own.py").write_text(code + "class Model(transformers.LlamaForCausalLM):\n    config_class = Config\n")
    names = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | names))
    with pytest.raises(common.InputError, match="trust_remote_code"):
        load(str(path))
    assert not (tmp_path / "modules").exists() and type(load(str(path), trust_remote_code=True)).__name__ == "Model"


# ---------------------------------------------------------------- what is new or off


def test_a_new_head_is_drawn_from_the_seed_and_said(save, capsys):
    """With the deviation of the model's other weights: 256 numbers, so within 15 % of it (3.4 standard errors). A head
    that is there stays, in silence."""
    for expected in (0.5, 0.1):
        path = save(build(hidden_size=256, initializer_range=expected))
        first, again, other = (load(path, "new", seed=seed).classifier for seed in (1, 1, 2))
        assert capsys.readouterr().out == "score head: new, drawn from --seed\n" * 3
        assert torch.equal(first.score.weight, again.score.weight)
        assert not torch.equal(first.score.weight, other.score.weight)
        assert first.score.weight.std().item() == pytest.approx(expected, rel=0.15)
    kept = load(save(first), "new", seed=3).classifier
    assert torch.equal(kept.score.weight, first.score.weight) and not capsys.readouterr().out


def test_nothing_is_random_in_training(save):
    """Dropping and jittering are off; other numbers and switches stay."""
    values = dict(resid_pdrop=0.5, router_jitter_noise=0.5, drop_last=True, layer_norm_epsilon=0.125)
    config = load(save(build("gpt2", **values))).config
    assert config.resid_pdrop == config.router_jitter_noise == 0 and config.drop_last is True
    assert config.layer_norm_epsilon == 0.125
    model, ids = load(save(build("gpt2", embd_pdrop=0.5))).train(), torch.arange(9)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)


# ---------------------------------------------------------------- what a model is measured for


class Changed(torch.nn.Module):
    """A model whose forward pass is given other inputs."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, **inputs):
        return self.model(**self.change(dict(inputs)))


def blind(inputs: dict) -> dict:
    return inputs | {"attention_mask": None, "position_ids": None}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "kind, values, change, shares, reads_padding",
    [
        ("llama", {}, dict, True, False),
        ("llama", ONE, dict, True, False),
        ("gpt_neox", {}, dict, True, False),
        ("mistral", dict(sliding_window=64), dict, True, False),
        ("mistral", dict(sliding_window=63), dict, False, False),  # it would count the other response's tokens
        ("bloom", {}, dict, False, False),  # ALiBi: places by order, whatever the positions
        ("mamba", {}, dict, False, False),
        ("rwkv", dict(attention_hidden_size=32, context_length=64), dict, False, True),
        ("llama", {}, blind, False, True),
    ],
)
def test_a_model_is_measured(process, kind, values, change, shares, reads_padding, dtype):
    """Whether a pair may share a row, of up to 64 tokens: chosen and rejected must be as apart, in bf16 too;
    and whether padding before a prompt changes it."""
    model = build(kind, **values).to(torch.float32 if dtype == "fp32" else torch.bfloat16)
    model = common.Scorer(model) if values == ONE else model
    engine = Changed(model, change)
    assert common.check_model(engine, model, reward.Args(max_length=64, dtype=dtype), process) == shares
    assert model.reads_padding == reads_padding and engine.training


def test_a_window_longer_than_what_is_measured(process):
    """64 tokens a response do not show it."""
    model = build("mistral", sliding_window=100)
    shares = [common.check_model(model, model, reward.Args(max_length=length), process) for length in (100, 101)]
    assert shares == [True, False]


def test_broken_weights_are_refused(process):
    model = build()
    model.model.layers[0].mlp.down_proj.weight.data[0] = float("nan")
    with pytest.raises(common.InputError, match="not finite: broken weights"):
        common.check_model(model, model, reward.Args(max_length=64), process)


def test_measuring_costs_the_same_at_any_length(process):
    model, tokens = build(), {}

    def count(module, arguments, inputs):
        tokens[length].append(inputs["input_ids"].numel())

    model.register_forward_pre_hook(count, with_kwargs=True)
    for length in (64, 16384):
        tokens[length] = []
        assert common.check_model(model, model, reward.Args(max_length=length), process)
    assert tokens[64] == tokens[16384] and 0 < max(tokens[64]) <= 128
