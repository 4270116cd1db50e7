"""Every decoder architecture gets the log-probabilities and scores that transformers gives, from all three scripts.

The oracle is the plain model on each sequence alone, in evaluation mode: no padding, no shared rows, all positions.
"""

import common

import json
import math
import re

import pytest
import torch
import transformers
from helpers import lines, rows_file
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS

import dpo
import reward
import sft

SMALL = dict(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    head_dim=8,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)  # each configuration takes those that it knows
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
LATENT = dict(
    q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, num_key_value_heads=4
)
ROUTED = EXPERTS | LATENT | dict(n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8, mamba_n_groups=1)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
WINDOW = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])  # rows have 20 to 40 tokens
# `model_type`, and after a blank a variant of it: what its configuration has beside SMALL.
FAMILIES = {
    "afmoe": EXPERTS | dict(num_dense_layers=1),
    "apertus": {},
    "arcee": {},
    "bamba": MAMBA | dict(attn_layer_indices=[1]),
    "biogpt": {},
    "bitnet": {},
    "blenderbot-small": dict(decoder_ffn_dim=64, encoder_ffn_dim=64, decoder_layers=2, decoder_attention_heads=4),
    "bloom": {},
    "codegen": dict(rotary_dim=4),
    "cohere": {},
    "cohere2": WINDOW,
    "ctrl": dict(dff=64),
    "cwm": WINDOW,
    "dbrx": dict(
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=128,
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4, attn_pdrop=0.3),
        ffn_config=dict(ffn_hidden_size=32, moe_num_experts=4, moe_top_k=2, moe_jitter_eps=0.3),
    ),
    "deepseek_v2": ROUTED,
    "deepseek_v3": ROUTED,
    "diffllama": {},
    "doge": {},
    "ernie4_5": {},
    "ernie4_5_moe": EXPERTS | dict(moe_num_experts=4, moe_k=2),
    "exaone4": WINDOW,
    "falcon": {},
    "falcon alibi": dict(alibi=True),
    "falcon new_decoder": dict(new_decoder_architecture=True, num_kv_heads=2),
    "falcon_mamba": dict(state_size=8),
    "gemma": {},
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
    "gemma3n_text": dict(
        num_hidden_layers=4,
        num_kv_shared_layers=1,
        layer_types=["sliding_attention", "full_attention"] * 2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=512,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "glm": {},
    "glm4": {},
    "glm4_moe": ROUTED,
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], window_size=8),
    "gpt_neox": {},
    "gpt_oss": WINDOW | dict(num_local_experts=4),
    "gptj": dict(rotary_dim=4),
    "granite": dict(logits_scaling=2.0, embedding_multiplier=3.0, residual_multiplier=0.5),
    "granitemoe": dict(num_local_experts=4, num_experts_per_tok=2),
    "granitemoehybrid": MAMBA | dict(layer_types=["mamba", "attention"], shared_intermediate_size=32),
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": dict(num_experts=4, moe_topk=2),
    "jamba": dict(
        attn_layer_offset=1,
        attn_layer_period=2,
        expert_layer_period=2,
        num_experts=4,
        mamba_d_state=8,
        use_mamba_kernels=False,
    ),
    "jetmoe": dict(num_local_experts=4),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "lfm3": dict(layer_types=["conv", "full_attention"]),
    "llama": {},
    "llama biased": dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama4_text": dict(
        num_local_experts=4,
        intermediate_size_mlp=64,
        interleave_moe_layer_step=2,
        attention_chunk_size=8,
        layer_types=["chunked_attention", "full_attention"],
    ),
    "mamba": dict(state_size=8),
    "mamba2": dict(num_heads=8, state_size=8, chunk_size=8, n_groups=1),
    "minicpm3": LATENT,
    "minimax": dict(num_local_experts=4, block_size=8, layer_types=["linear_attention", "full_attention"]),
    "ministral": WINDOW,
    "mistral": dict(sliding_window=None),
    "mistral window": dict(sliding_window=8),
    "mixtral": dict(num_local_experts=4),
    "modernbert-decoder": dict(local_attention=8),
    "mpt": {},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": dict(
        layers_block_type=["mamba", "attention", "mlp"],
        mamba_num_heads=8,
        mamba_head_dim=8,
        ssm_state_size=8,
        chunk_size=8,
        n_groups=1,
    ),
    "olmo": {},  # no parameter has one dimension
    "olmo2": {},
    "olmo3": WINDOW,
    "olmoe": EXPERTS,
    "openai-gpt": {},
    "opt": dict(ffn_dim=64, word_embed_proj_dim=32),
    "opt 350m": dict(ffn_dim=64, word_embed_proj_dim=16, do_layer_norm_before=False),
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": dict(num_local_experts=4),
    "qwen2": dict(vocab_size=513),  # its tokenizer's class adds <|endoftext|>
    "qwen2_moe": EXPERTS | dict(shared_expert_intermediate_size=32),
    "qwen3": {},
    "qwen3_5_text": LINEAR | dict(layer_types=["linear_attention", "full_attention"]),
    "qwen3_moe": EXPERTS,
    "qwen3_next": EXPERTS
    | LINEAR
    | dict(shared_expert_intermediate_size=32, layer_types=["linear_attention", "full_attention"]),
    "recurrent_gemma": dict(num_hidden_layers=3, lru_width=32, attention_window_size=8),
    "rwkv": {},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": dict(sliding_window=8),
    "vaultgemma": WINDOW,
    "xglm": dict(ffn_dim=64),
    "youtu": LATENT,
    "zamba2": dict(layers_block_type=["mamba", "hybrid"], mamba_d_state=8, n_mamba_heads=8, chunk_size=8),
}
# Not decoders that see the past alone, or no linear head named `score`: which script says what.
REFUSED = {
    "bert": {sft: "not causal", dpo: "not causal", reward: "no.* `score` head"},
    "xlm": {sft: "not causal", dpo: "not causal", reward: "no.* `score` head"},
    "ctrl": {reward: "no.* `score` head"},
    "modernbert-decoder": {reward: "no.* `score` head"},
}
# Positions of the mask and of the keys' own order differ in shared rows: states, convolutions, windows, ALiBi.
UNSHARED = (
    "bamba",
    "falcon alibi",
    "gpt_neo",
    "jamba",
    "lfm2",
    "lfm3",
    "llama4_text",
    "mamba2",
    "minimax",
    "mistral window",
    "mpt",
    "qwen3_5_text",
    "qwen3_next",
    "rwkv",
    "zamba2",
)
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
    return config if family == "diffllama" else set_noise(config, 0.3)  # it refuses dropout itself


def set_noise(config, value: float):
    """Set every dropout, layer drop and router noise of a configuration, nested ones too."""
    for name, old in vars(config).items():
        if isinstance(old, transformers.PreTrainedConfig):
            set_noise(old, value)
        elif isinstance(old, float) and re.search("drop|jitter", name):
            setattr(config, name, value)
    return config


def save_model(folder, config, tokenizer, auto_class=transformers.AutoModelForCausalLM) -> str:
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
    """The model as transformers loads it, but PhiMoE's router reads its noise in evaluation, too: without any."""
    config = set_noise(transformers.AutoConfig.from_pretrained(folder), 0.0)
    return auto_class.from_pretrained(folder, config=config, dtype=torch.float32).eval()


def sequences(folder) -> list[list[tuple[int, torch.Tensor]]]:
    """(Tokens of the prompt, all tokens) of chosen and rejected of each pair."""
    tokenizer, pairs = transformers.AutoTokenizer.from_pretrained(folder), []  # of the architecture: Qwen's differs
    for prompt, *responses in PAIRS:
        start = tokenizer(prompt).input_ids
        ids = [start + tokenizer(r, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] for r in responses]
        pairs.append([(len(start), torch.tensor([row])) for row in ids])
    return pairs


@torch.no_grad()
def response_logps(folder) -> torch.Tensor:
    """log π of each pair's chosen and rejected response, (n, 2)."""
    model = plain(transformers.AutoModelForCausalLM, folder)

    def logp(start: int, ids: torch.Tensor) -> torch.Tensor:
        logits = model(ids, use_cache=False).logits[0, start - 1 : -1]
        return logits.log_softmax(-1).gather(1, ids[0, start:, None]).sum()

    return torch.tensor([[logp(*sequence) for sequence in pair] for pair in sequences(folder)])


@torch.no_grad()
def scores(folder) -> torch.Tensor:
    """The score of each pair's chosen and rejected sequence, (n, 2)."""
    model = plain(transformers.AutoModelForSequenceClassification, folder)
    return torch.tensor([[model(ids).logits.item() for _, ids in pair] for pair in sequences(folder)])


@pytest.fixture
def data(tmp_path) -> list[str]:
    """The pairs, as training and as held-out data."""
    rows = [dict(prompt=p, completion=c, chosen=c, rejected=r) for p, c, r in PAIRS]
    path = rows_file(tmp_path, *rows)
    return ["--dataset", path, "--eval_dataset", path]


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """They take longer than the rest."""
    import matplotlib.figure

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda *_, **__: None)


def run_sft(run, model: str, data, out) -> None:
    tokens = sum(ids.shape[1] - start for (start, ids), _ in sequences(model))
    run(sft, "--model", model, *data, "--output_dir", str(out), *SHORT, "--generate", "2")
    before, step, after = lines(out / "metrics.jsonl")
    expected = -response_logps(model)[:, 0].sum() / tokens
    assert before["loss"] == pytest.approx(expected.item(), abs=2e-5)
    assert step["loss"] == pytest.approx(before["loss"], abs=2e-5)  # all rows, in training mode
    trained = -response_logps(out / "model")[:, 0].sum() / tokens
    assert after["loss"] == pytest.approx(trained.item(), abs=2e-5)
    assert abs(after["loss"] - before["loss"]) > 1e-3
    assert len(json.loads((out / "generations.json").read_text())) == 2


def run_dpo(run, model: str, data, out) -> None:
    run(dpo, "--model", model, *data, "--output_dir", str(out), *SHORT, *"--generate 0 --constraint fixed".split())
    before, step, _ = lines(out / "metrics.jsonl")
    expected = response_logps(model)
    means = [before["chosen_logps"], before["rejected_logps"]]
    assert means == pytest.approx(expected.mean(0).tolist(), abs=1e-3)
    assert step["rank_loss"] == pytest.approx(math.log(2), abs=1e-5)  # policy = reference, in training mode
    trained = response_logps(out / "model")
    saved = [[line["chosen_logps"], line["rejected_logps"]] for line in lines(out / "eval.jsonl")]
    assert torch.allclose(torch.tensor(saved), trained, rtol=0, atol=1e-3)
    assert (trained - expected).abs().max() > 1e-2


def run_reward(run, model: str, data, out) -> None:
    run(reward, "--model", model, *data, "--output_dir", str(out), *SHORT)
    before, step, _ = lines(out / "metrics.jsonl")
    for side in ("chosen_score", "rejected_score"):
        assert step[side] == pytest.approx(before[side], abs=2e-5)  # all pairs, in training mode
    trained = scores(out / "model")
    saved = [[line["chosen_score"], line["rejected_score"]] for line in lines(out / "eval.jsonl")]
    assert torch.allclose(torch.tensor(saved), trained, rtol=0, atol=1e-4) and trained.std() > 1e-2
    start = plain(transformers.AutoModelForCausalLM, model).base_model.state_dict()
    classifier = plain(transformers.AutoModelForSequenceClassification, out / "model")
    for name, weight in classifier.base_model.named_parameters():  # the language model's, one step on
        assert (weight - start[name]).abs().max() < 2e-3, name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_scripts_agree_with_transformers(run, tokenizer, data, tmp_path, family):
    """Before and after a step, saved and loaded; and training is as evaluation is, with 0.3 of any noise configured."""
    model = save_model(tmp_path / "start", small_config(family), tokenizer)
    run_sft(run, model, data, tmp_path / "sft")
    run_dpo(run, model, data, tmp_path / "dpo")
    if family.split()[0] in CLASSIFIERS and family not in REFUSED:
        run_reward(run, model, data, tmp_path / "reward")


@pytest.mark.parametrize("family", ["llama", *UNSHARED])
def test_no_response_sees_the_other_in_16_bits(run, tokenizer, data, tmp_path, family):
    """Rounding moves log π of these responses by less than 1 nat, the other response before it by 2 to 6."""
    model, out = save_model(tmp_path / "start", small_config(family), tokenizer), tmp_path / "out"
    run(dpo, "--model", model, *data, "--output_dir", str(out), *"--epochs 0 --dtype bf16 --generate 0".split(), *SHORT)
    saved = [[line["chosen_logps"], line["rejected_logps"]] for line in lines(out / "eval.jsonl")]
    assert torch.allclose(torch.tensor(saved), response_logps(model), rtol=0, atol=1.0)


@pytest.mark.parametrize("family", REFUSED)
def test_what_is_no_such_model_is_refused(run, tokenizer, data, tmp_path, family):
    model = save_model(tmp_path / "start", small_config(family), tokenizer)
    for script, reason in REFUSED[family].items():
        with pytest.raises(common.InputError, match=f"start.*{reason}") as caught:
            run(script, "--model", model, *data, "--output_dir", str(tmp_path / "out"), *SHORT)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
