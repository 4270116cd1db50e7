"""Models unlike the embedded one: what they need is done, or refused in one line before anything is written."""

import common

import json
import math
import re
import shutil
import sys

import pytest
import safetensors.torch
import torch
import transformers
from helpers import launch, lines, rows_file
from test_families import PAIRS, SMALL, plain, save_model, scores, small_config

import dpo
import ppo
import reward
import sft

CLASSIFIER = transformers.AutoModelForSequenceClassification
SCRIPTS = dict(sft=sft, reward=reward, dpo=dpo, ppo=ppo)
SHORT = {reward: "--max_length 64".split(), ppo: "--max_new_tokens 8 --generate 2".split()}
SHORT[sft] = SHORT[dpo] = SHORT[reward] + ["--generate", "0"]


def llama(folder, tokenizer, **changes) -> str:
    return save_model(folder, transformers.LlamaConfig(**SMALL | changes), tokenizer)


def reward_llama(folder, tokenizer, **changes) -> str:
    config = transformers.LlamaConfig(**SMALL | dict(num_labels=1) | changes)
    return save_model(folder, config, tokenizer, CLASSIFIER)


def encoder(folder, tokenizer, positions: int, kind=transformers.BertConfig) -> str:
    """A model that looks both ways."""
    config = kind(**SMALL | dict(max_position_embeddings=positions))
    return save_model(folder, config, tokenizer, transformers.AutoModel)


def fresh_tokenizer(*added: str, **changes):
    """The embedded task's, with tokens added at ids 512, 513, …"""
    tokenizer = transformers.AutoTokenizer.from_pretrained(common.toy_model(), **changes)
    tokenizer.add_tokens(list(added))
    return tokenizer


def data_flags(folder, pairs=PAIRS) -> list[str]:
    path = rows_file(folder, *[dict(prompt=p, completion=c, chosen=c, rejected=r) for p, c, r in pairs])
    return ["--dataset", path, "--eval_dataset", path]


@pytest.fixture
def data(tmp_path) -> list[str]:
    return data_flags(tmp_path)


@pytest.fixture
def step(run):
    """step(script, "--flag", …): one step on four short rows, or what later flags say."""
    few = "--max_steps 1 --global_batch_size 4 --micro_batch_size 2".split()
    return lambda script, *argv: run(script, *few, *SHORT[script], *argv)


@pytest.fixture
def refuses(step, tmp_path):
    """refuses(script, argv, "regex", …): one line that each regex is found in, and nothing is written."""

    def call(script, argv, *facts: str) -> None:
        out = tmp_path / "refused"
        with pytest.raises(common.InputError) as caught:
            step(script, *argv, "--output_dir", str(out))
        message = str(caught.value).replace(str(tmp_path), "")  # which has the test's name in it
        assert "\n" not in message and len(message) < 1000
        for fact in facts:
            assert re.search(fact, message), (fact, message)
        assert not out.exists()

    return call


def models_for(name: str, model: str, reward_model: str = "") -> list[str]:
    """The flags that give a script its model."""
    return ["--policy_model", model, "--reward_model", reward_model] if name == "ppo" else ["--model", model]


# ---------------------------------------------------------------- 16 bits and ZeRO stages


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> list[str]:
    """64 rows, and 8 held out."""
    folder, flags = tmp_path_factory.mktemp("many"), []
    for flag, count in (("--dataset", 64), ("--eval_dataset", 8)):
        (folder / flag).mkdir()
        prompts = [f"Where is the milk?{i % 3 * ' please'}\n" for i in range(count)]
        rows = [dict(prompt=p, completion=f"Aisle {i % 5}. Have a nice day!") for i, p in enumerate(prompts)]
        flags += [flag, rows_file(folder / flag, *rows)]
    return flags


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sixteen_bits_train_alike_at_every_stage(step, tokenizer, many, tmp_path, monkeypatch, dtype):
    """Stage 0 made an optimizer step on zero gradients before the first batch: Adam's first step was then 0.74 of the
    learning rate, and a weight decay came before it. In fp16 it divided gradients by a loss scale that was never there.
    fp32 is what all stages come near."""
    device = common.deepspeed.accelerator.get_accelerator()
    monkeypatch.setattr(device, "is_fp16_supported", lambda: True)
    model, losses = llama(tmp_path / "start", tokenizer), {}
    for name, stage in (("fp32", 0), (dtype, 0), (dtype, 1), (dtype, 2), (dtype, 3)):
        out = tmp_path / f"{name}-{stage}"
        flags = f"--dtype {name} --zero_stage {stage} --global_batch_size 8 --max_steps 6 --learning_rate 0.01".split()
        step(sft, "--model", model, *many, *flags, "--output_dir", str(out))
        losses[name, stage] = [line["loss"] for line in lines(out / "metrics.jsonl") if line["split"] == "eval"]
    before, after = losses["fp32", 0]
    assert before - after > 0.5
    for stage in range(4):
        assert losses[dtype, stage] == pytest.approx([before, after], abs=0.03), (stage, losses)


def test_ppo_in_bf16_trains_alike_at_every_stage(step, tokenizer, data, tmp_path):
    """As above, for PPO's two engines: what the critic explains after three steps is the same at stages 0 and 1."""
    policy, judge = llama(tmp_path / "policy", tokenizer), reward_llama(tmp_path / "reward", tokenizer)
    seen = []
    for stage in (0, 1):
        stages = f"--policy_zero_stage {stage} --critic_zero_stage {stage}".split()
        flags = "--dtype bf16 --max_steps 3 --log_every 1 --critic_learning_rate 0.01".split()
        out = tmp_path / str(stage)
        step(ppo, *models_for("ppo", policy, judge), *data, *stages, *flags, "--output_dir", str(out))
        seen.append([line["value_loss"] for line in lines(out / "metrics.jsonl") if line["split"] == "train"])
    assert seen[0] == pytest.approx(seen[1], rel=1e-2)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_says_what_stage_0_is_in_16_bits(name, capsys):
    with pytest.raises(SystemExit):
        common.parse_args(SCRIPTS[name].Args, SCRIPTS[name].preset, ["--help"])
    text = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    says = re.search(r"zero_stage \{.*?(?= --[a-z])", text)[0]
    assert re.search(r"16", says) and re.search(r"\b1\b", re.sub(r"\{.*?\}", "", says)), says


def test_kl_is_0_at_the_first_step_in_bf16(step, tokenizer, data, tmp_path):
    """Policy and reference are one model then: both log-probabilities must come from the same kind of pass, not one of
    them from decoding, which rounds differently."""
    policy, judge = llama(tmp_path / "policy", tokenizer), reward_llama(tmp_path / "reward", tokenizer)
    for minibatches in (1, 2):
        out = tmp_path / str(minibatches)
        flags = f"--dtype bf16 --max_new_tokens 24 --minibatches {minibatches}".split()
        step(ppo, *models_for("ppo", policy, judge), *data, *flags, "--output_dir", str(out))
        (first,) = (line for line in lines(out / "metrics.jsonl") if line["split"] == "train")
        assert first["kl"] == pytest.approx(0, abs=1e-3)


def test_without_one_dimensional_parameters(step, tokenizer, data, tmp_path):
    """OLMo's norms have no weight: DeepSpeed removes the empty group, and the schedule then had one rate too many, with
    each of DeepSpeed's optimizers."""
    model = save_model(tmp_path / "start", small_config("olmo"), tokenizer)
    assert all(p.dim() > 1 for p in transformers.AutoModelForCausalLM.from_pretrained(model).parameters())
    for flags in ("--zero_stage 0", "--zero_stage 2", "--zero_stage 0 --dtype bf16"):
        out = tmp_path / flags.replace(" ", "")
        step(sft, "--model", model, *data, *flags.split(), "--output_dir", str(out))
        before, _, after = lines(out / "metrics.jsonl")
        assert after["loss"] < before["loss"]


# ---------------------------------------------------------------- positions

LONG = "Where is the milk? " * 5
MIXED = [("Where?\n", "Yes.", "No."), (LONG, "Yes.", "No."), *[("Hello!\n", "A", "B")] * 2]


def answers(step, model: str, script, folder, size: int) -> dict[str, str]:
    """What a model with 48 positions answers to a long prompt and two short ones, `size` of them at a time."""
    flags = f"--micro_batch_size {size} --max_length 48 --generate 4 --learning_rate 0 --output_dir {folder}".split()
    step(script, "--model", model, *data_flags(folder.parent, MIXED), *flags)
    return {g["instruction"]: g["output"] for g in json.loads((folder / "generations.json").read_text())}


def model_of_48_positions(folder, tokenizer, family: str) -> str:
    config = small_config(family)
    setattr(config, config.attribute_map.get("max_position_embeddings", "max_position_embeddings"), 48)
    assert 36 < len(tokenizer(LONG).input_ids) < 42
    return save_model(folder, config, tokenizer)


@pytest.mark.parametrize("script", [sft, dpo])
@pytest.mark.parametrize("family", ["gpt2", "opt", "opt 350m"])
def test_answers_end_where_the_positions_do(step, tokenizer, tmp_path, script, family):
    """Prompts of a few tokens and of nearly 48 in one batch: the long one's answer ran out of the table."""
    model = model_of_48_positions(tmp_path / "start", tokenizer, family)
    found = answers(step, model, script, tmp_path / "out", 4)
    assert list(found) == ["Where?\n", LONG, "Hello!\n"] and all(found.values())


@pytest.mark.parametrize("script", [sft, dpo])
def test_answers_do_not_hang_on_their_batch(step, tokenizer, tmp_path, script):
    """A short prompt's answer is not cut to the tokens that a long one beside it leaves."""
    model = model_of_48_positions(tmp_path / "start", tokenizer, "gpt2")
    together, alone = (answers(step, model, script, tmp_path / str(size), size) for size in (4, 1))
    assert together == alone


@pytest.mark.parametrize("kind, usable", [(transformers.BertConfig, 16), (transformers.RobertaConfig, 15)])
def test_an_encoder_with_fewer_positions_than_texts(step, tokenizer, data, tmp_path, kind, usable):
    """16 positions (RoBERTa's begin behind that of padding), and a tokenizer that claims 1,024: a text loses its
    beginning, as it does beyond 512 tokens."""
    short, out = encoder(tmp_path / "short", tokenizer, 16, kind), tmp_path / "out"
    flags = ["--model", llama(tmp_path / "start", tokenizer), *data, "--constraint", "cos_sim", "--encoder", short]
    step(reward, *flags, "--output_dir", str(out))
    body = plain(transformers.AutoModel, short)
    for line, (prompt, *responses) in zip(lines(out / "eval.jsonl"), PAIRS, strict=True):
        ids = [tokenizer(prompt + response).input_ids for response in responses]
        ids = [row[:1] + row[1:][-(usable - 1) :] for row in ids]
        with torch.no_grad():
            chosen, rejected = (body(torch.tensor([row])).last_hidden_state[0].mean(0) for row in ids)
        assert line["similarity"] == pytest.approx(angular(chosen, rejected), abs=1e-4)


def angular(some: torch.Tensor, other: torch.Tensor) -> float:
    """s = (π - arccos(cos)) / π, the cosine not below 0."""
    return (math.pi - math.acos(torch.cosine_similarity(some, other, dim=0).clamp(0, 1).item())) / math.pi


# ---------------------------------------------------------------- OPT and other reward models


def test_opt_as_a_reward_model(step, tokenizer, data, tmp_path):
    """A new head is drawn with the deviation that OPT calls `init_std`: here 0.5, of 256 weights, so within 15 % of it
    (3.4 standard errors)."""
    config = transformers.OPTConfig(**SMALL | dict(hidden_size=256, word_embed_proj_dim=256, ffn_dim=64, init_std=0.5))
    model = save_model(tmp_path / "start", config, tokenizer)
    step(reward, "--model", model, *data, "--learning_rate", "0", "--output_dir", str(tmp_path / "out"))
    head = plain(CLASSIFIER, tmp_path / "out" / "model").score.weight
    assert head.std().item() == pytest.approx(0.5, rel=0.15)


@pytest.mark.parametrize("family", ["opt 350m", "opt"])
def test_opt_with_its_own_hidden_states_as_encoder(step, tokenizer, data, tmp_path, family):
    """OPT-350m projects its 32 hidden numbers to 16 before the head: scores are those of the whole model, and a text's
    embedding is the mean of what its body gives."""
    model, out = save_model(tmp_path / "start", small_config(family), tokenizer), tmp_path / "out"
    step(reward, "--model", model, *data, "--constraint", "cos_sim", "--output_dir", str(out))
    saved = lines(out / "eval.jsonl")
    expected = scores(out / "model")
    assert [line["chosen_score"] for line in saved] == pytest.approx(expected[:, 0].tolist(), abs=1e-4)
    assert [line["rejected_score"] for line in saved] == pytest.approx(expected[:, 1].tolist(), abs=1e-4)
    body = plain(transformers.AutoModel, model)
    for line, (prompt, *responses) in zip(saved, PAIRS, strict=True):
        with torch.no_grad():
            texts = [body(**tokenizer(prompt + r, return_tensors="pt")).last_hidden_state[0].mean(0) for r in responses]
        assert line["similarity"] == pytest.approx(angular(*texts), abs=1e-4)


def test_two_labels_are_refused(refuses, tokenizer, data, tmp_path):
    """A classifier of two classes has no score."""
    model = llama(tmp_path / "start", tokenizer)
    two = reward_llama(tmp_path / "pair", tokenizer, num_labels=2)
    facts = (r"labels?|outputs?|score\.weight", r"\b(2|two)\b", "pair")
    refuses(reward, ["--model", two, *data], *facts)
    refuses(reward, ["--model", two, *data, "--epochs", "0"], *facts)
    refuses(ppo, [*models_for("ppo", model, two), *data], *facts)


@pytest.mark.parametrize("head", ["value_head.weight", "v_head.summary.weight"])
def test_a_head_of_another_name_is_refused(refuses, tokenizer, data, tmp_path, head):
    """It was left aside, and a new random head trained, in silence."""
    model = reward_llama(tmp_path / "named", tokenizer)
    weights = safetensors.torch.load_file(tmp_path / "named" / "model.safetensors")
    weights[head] = weights.pop("score.weight")
    safetensors.torch.save_file(weights, tmp_path / "named" / "model.safetensors", metadata={"format": "pt"})
    refuses(reward, ["--model", model, *data], re.escape(head), "named")
    refuses(ppo, [*models_for("ppo", llama(tmp_path / "p", tokenizer), model), *data], "named")


# ---------------------------------------------------------------- tokens and vocabularies


@pytest.mark.parametrize("name", SCRIPTS)
def test_tokens_beyond_the_embeddings_are_refused(refuses, tmp_path, name):
    """Three tokens were added to the tokenizer, and the model was not resized: 515 against 512."""
    tokenizer = fresh_tokenizer("<new1>", "<new2>", "<new3>")
    data = data_flags(tmp_path, [*PAIRS[:3], ("Where is the <new1>?\n", "Here.", "There.")])
    models = models_for(name, llama(tmp_path / "m", tokenizer), reward_llama(tmp_path / "r", tokenizer, vocab_size=515))
    refuses(SCRIPTS[name], [*models, *data], r"\b512\b", r"\b515\b", "<new1>")


@pytest.mark.parametrize("flag", ["reward_model", "judge_model", "ref_model"])
def test_a_table_too_small_for_the_tokenizer_is_refused(refuses, data, tmp_path, flag):
    """The other model's table ends before ids that the first one may sample, or that its tokenizer may give."""
    tokenizer = fresh_tokenizer("<new1>", "<new2>", "<new3>")
    model = llama(tmp_path / "m", tokenizer, vocab_size=515)
    right, small = reward_llama(tmp_path / "r", tokenizer, vocab_size=515), reward_llama(tmp_path / "small", tokenizer)
    argv = {
        "reward_model": (ppo, models_for("ppo", model, small)),
        "judge_model": (ppo, [*models_for("ppo", model, right), "--judge_model", small]),
        "ref_model": (dpo, ["--model", model, "--ref_model", llama(tmp_path / "small_ref", tokenizer)]),
    }
    script, models = argv[flag]
    refuses(script, [*models, *data], r"\b512\b", r"\b515\b", "small", "<new1>")


def padded_policy(folder, tokenizer) -> str:
    """A model with 64 rows that no text uses, and a bias that all but always chooses one of them."""
    config = transformers.PhiConfig(**SMALL | dict(vocab_size=576))
    model = save_model(folder, config, tokenizer)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["lm_head.bias"][512:] = 12
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return model


def test_ppo_samples_what_the_tokenizer_can_name(step, tokenizer, data, tmp_path):
    """The reward model's table has the tokenizer's 512 rows and no more. log π is that of the distribution which is
    sampled: at most log 512 nats a token, where the whole softmax would give about 16, and its ratio is 1 while nothing
    moves."""
    policy, judge = padded_policy(tmp_path / "policy", tokenizer), reward_llama(tmp_path / "reward", tokenizer)
    still = "--policy_learning_rate 0 --critic_learning_rate 0 --minibatches 2 --generate 4 --max_new_tokens 8".split()
    step(
        ppo,
        *models_for("ppo", policy, judge),
        "--judge_model",
        judge,
        *data,
        *still,
        "--output_dir",
        str(tmp_path / "out"),
    )
    _, first, _ = lines(tmp_path / "out" / "metrics.jsonl")
    assert 0 < first["entropy"] < math.log(512) + 0.5
    assert first["ratio_mean"] == pytest.approx(1, abs=1e-3) and first["kl"] == pytest.approx(0, abs=1e-3)
    assert first["policy_clipfrac"] == 0 and first["response_tokens"] > 2
    assert all(g["output"] for g in json.loads((tmp_path / "out" / "generations.json").read_text()))


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_answers_are_what_the_tokenizer_can_name(step, tokenizer, data, tmp_path, name):
    model, out = padded_policy(tmp_path / "policy", tokenizer), tmp_path / "out"
    step(SCRIPTS[name], "--model", model, *data, *"--learning_rate 0 --generate 4".split(), "--output_dir", str(out))
    generations = json.loads((out / "generations.json").read_text())
    assert len(generations) == 4 and all(len(g["output"]) > 8 for g in generations)


@pytest.mark.parametrize("flag", ["reward_model", "judge_model"])
def test_another_eos_is_refused(refuses, data, tmp_path, flag):
    """One vocabulary, two ends: the score would be read at another last token than in training."""
    tokenizer, other = fresh_tokenizer("<end>"), fresh_tokenizer("<end>", eos_token="<end>")
    assert tokenizer.get_vocab() == other.get_vocab() and other.eos_token_id == 512
    policy = llama(tmp_path / "policy", tokenizer, vocab_size=513)
    same = reward_llama(tmp_path / "same", tokenizer, vocab_size=513)
    different = reward_llama(tmp_path / "different", other, vocab_size=513)
    models = models_for("ppo", policy, different if flag == "reward_model" else same)
    models += ["--judge_model", different] if flag == "judge_model" else []
    refuses(ppo, [*models, *data], "EOS", "</s>", "<end>", f"{flag}|different")


@torch.no_grad()
def token_logps(model: str, prompt: list[int], response: list[int]) -> torch.Tensor:
    """log π of each token of the response, from the model that is saved there."""
    logits = plain(transformers.AutoModelForCausalLM, model)(torch.tensor([prompt + response])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


TEMPLATES = {
    "before": ("[gMASK] <sop> $A", ["[gMASK]", "<sop>"], []),
    "after": ("<s> $A </s>", ["<s>"], ["</s>"]),
    "both": ("<s> [gMASK] <sop> $A </s>", ["<s>", "[gMASK]", "<sop>"], ["</s>"]),
    "nothing": ("$A", [], []),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_a_tokenizer_puts_around_a_text(step, data, tmp_path, template):
    """Before the prompt stands what the tokenizer puts before a text, and never what it puts after. The README's
    lines give the score of each response exactly, with the tokenizer that is saved beside the model."""
    from tokenizers.processors import TemplateProcessing

    single, before, after = TEMPLATES[template]
    tokenizer = fresh_tokenizer("[gMASK]", "<sop>")
    names = ["<s>", "</s>", "[gMASK]", "<sop>"]
    special = list(zip(names, tokenizer.convert_tokens_to_ids(names)))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    model = llama(tmp_path / "start", tokenizer, vocab_size=514)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    around = [tokenizer.convert_tokens_to_ids(tokens) for tokens in (before, after)]
    text = tokenizer("Where?", add_special_tokens=False).input_ids
    assert tokenizer("Where?").input_ids == around[0] + text + around[1]
    for script in (reward, dpo, sft):
        step(script, "--model", model, *data, "--output_dir", str(tmp_path / script.__name__))

    def parts(prompt: str, response: str) -> tuple[list[int], list[int]]:
        prompt, response = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, response))
        return around[0] + prompt, response + [tokenizer.eos_token_id]

    saved = tmp_path / "reward" / "model"
    classifier, tokenizer = (auto.from_pretrained(saved) for auto in (CLASSIFIER, transformers.AutoTokenizer))
    (block,) = re.findall(r"```python\n([^`]*\nscore = [^`]*)```", (common.DATA.parent / "README.md").read_text())
    for line, (prompt, *responses) in zip(lines(tmp_path / "reward" / "eval.jsonl"), PAIRS, strict=True):
        for side, response in zip(("chosen", "rejected"), responses):
            names = dict(tokenizer=tokenizer, prompt=prompt, response=response, model=classifier.eval(), torch=torch)
            with torch.no_grad():
                expected = classifier(torch.tensor([sum(parts(prompt, response), [])])).logits.item()
                exec(block, names)
            assert line[f"{side}_score"] == pytest.approx(expected, abs=1e-4)
            assert names["score"] == pytest.approx(expected, abs=1e-4)

    logps = {side: [token_logps(model, *parts(pair[0], pair[side])) for pair in PAIRS] for side in (1, 2)}
    before = {name: lines(tmp_path / name / "metrics.jsonl")[0] for name in ("dpo", "sft")}
    for side, key in ((1, "chosen_logps"), (2, "rejected_logps")):
        assert before["dpo"][key] == pytest.approx(sum(own.sum().item() for own in logps[side]) / len(PAIRS), abs=1e-3)
    assert before["sft"]["loss"] == pytest.approx(-torch.cat(logps[1]).mean().item(), abs=1e-4)


# ---------------------------------------------------------------- encoders


@pytest.mark.parametrize("script", [reward, dpo])
def test_the_first_token_of_a_causal_encoder_is_refused(refuses, step, tokenizer, data, tmp_path, script):
    """It sees only itself, so that every pair would have similarity 1. An encoder that looks both ways is welcome."""
    model = llama(tmp_path / "start", tokenizer)
    flags = ["--model", model, *data, *"--constraint cos_sim --encoder_pooling cls".split()]
    refuses(script, flags, "causal", "mean")
    refuses(script, [*flags, "--encoder", llama(tmp_path / "other", tokenizer)], "causal", "mean")
    gpt = save_model(tmp_path / "gpt", small_config("gpt2"), tokenizer)
    refuses(script, [*flags, "--encoder", gpt], "causal", "mean")
    step(script, *flags, "--encoder", encoder(tmp_path / "bert", tokenizer, 128), "--output_dir", str(tmp_path / "out"))
    assert max(line["similarity"] for line in lines(tmp_path / "out" / "eval.jsonl")) < 1


def test_evaluation_uses_the_encoder_of_training(step, refuses, tokenizer, data, tmp_path):
    """The trained reward model as encoder gives other bounds than those of training: the run's own encoder is taken, or
    asked for; away from its run, where nothing names it, it is asked for."""
    model, out = llama(tmp_path / "start", tokenizer), tmp_path / "out"
    cosine = ["--constraint", "cos_sim"]
    step(reward, "--model", model, *data, *cosine, "--learning_rate", "0.05", "--output_dir", str(out))
    trained = [line["bound"] for line in lines(out / "eval.jsonl")]
    evaluate = [*data, *cosine, "--epochs", "0", "--output_dir"]
    try:
        step(reward, "--model", str(out / "model"), *evaluate, str(tmp_path / "again"))
    except common.InputError as error:
        assert "--encoder" in str(error)
    else:
        assert [line["bound"] for line in lines(tmp_path / "again" / "eval.jsonl")] == trained
    shutil.copytree(out / "model", tmp_path / "moved")
    refuses(reward, ["--model", str(tmp_path / "moved"), *evaluate[:-1]], "--encoder")
    step(reward, "--model", str(tmp_path / "moved"), "--encoder", model, *evaluate, str(tmp_path / "named"))
    assert [line["bound"] for line in lines(tmp_path / "named" / "eval.jsonl")] == trained


@pytest.mark.parametrize("script", [reward, dpo])
def test_evaluation_pools_as_training_did(step, tokenizer, data, tmp_path, script):
    """The first token of the encoder of training, not the mean, gave the bounds; the flags are not repeated."""
    model, out = llama(tmp_path / "start", tokenizer), tmp_path / "out"
    own = ["--encoder", encoder(tmp_path / "bert", tokenizer, 128), "--encoder_pooling", "cls"]
    cosine, reference = ["--constraint", "cos_sim"], ["--ref_model", model] * (script is dpo)
    step(script, "--model", model, *data, *cosine, *own, "--output_dir", str(out))
    evaluate = [*data, *cosine, *reference, "--epochs", "0", "--model", str(out / "model"), "--output_dir"]
    step(script, *evaluate, str(tmp_path / "again"))
    trained, again = ([line["bound"] for line in lines(folder / "eval.jsonl")] for folder in (out, tmp_path / "again"))
    assert again == trained and len(set(trained)) > 1


def test_broken_weights_are_named(refuses, tokenizer, data, tmp_path):
    """NaN differs from itself, but is not what a random model gives."""
    model = transformers.AutoModelForCausalLM.from_pretrained(llama(tmp_path / "start", tokenizer))
    model.model.layers[0].mlp.down_proj.weight.data[0] = float("nan")
    model.save_pretrained(tmp_path / "start")
    for script in (sft, reward):
        refuses(script, ["--model", str(tmp_path / "start"), *data], "not finite", "weights are broken")


CODE = """
import transformers

class Config(transformers.LlamaConfig):
    model_type = "shifted"

class Model(transformers.LlamaModel):
    config_class = Config

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.last_hidden_state = outputs.last_hidden_state + SHIFT
        return outputs

class CausalLM(transformers.LlamaForCausalLM):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.model = Model(config)
        self.post_init()
"""


def test_caches_know_a_models_own_code(step, tokenizer, data, tmp_path, monkeypatch):
    """Two folders that differ in their Python file alone: the second's similarities and reference log-probabilities are
    not taken from the cache of the first."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    policy, results = llama(tmp_path / "policy", tokenizer), []
    for shift in ("0.0", "0.5"):
        folder = tmp_path / f"shifted{shift[-1]}"
        llama(folder, tokenizer)
        config = json.loads((folder / "config.json").read_text())
        names = {"AutoConfig": "own.Config", "AutoModel": "own.Model", "AutoModelForCausalLM": "own.CausalLM"}
        config |= {"model_type": "shifted", "architectures": ["CausalLM"], "auto_map": names}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "own.py").write_text(CODE.replace("SHIFT", shift))
        out = tmp_path / f"out{shift[-1]}"
        flags = "--trust_remote_code --constraint cos_sim".split()
        step(dpo, "--model", policy, "--ref_model", str(folder), *data, *flags, "--output_dir", str(out))
        results.append(lines(out / "eval.jsonl"))
    for first, second in zip(*results, strict=True):
        for key in ("similarity", "chosen_reward"):
            assert abs(first[key] - second[key]) > 1e-3, key


# ---------------------------------------------------------------- attention and sampling


@pytest.mark.parametrize("name, role", [*dict.fromkeys(SCRIPTS, "model").items(), ("ppo", "reward"), ("ppo", "judge")])
def test_attention_that_looks_ahead_is_refused(refuses, tokenizer, data, tmp_path, name, role):
    """Gemma 3 can be told to see later tokens, as its embedding models do: no token would then be predicted, and a
    score would change with the padding behind it."""
    kind = dict(auto_class=CLASSIFIER) if role != "model" else {}
    config = transformers.Gemma3TextConfig(**SMALL | dict(use_bidirectional_attention=True, num_labels=1))
    both = save_model(tmp_path / "both", config, tokenizer, **kind)
    policy, judge = llama(tmp_path / "policy", tokenizer), reward_llama(tmp_path / "judge", tokenizer)
    argv = {
        "model": models_for(name, both, judge),
        "reward": models_for(name, policy, both),
        "judge": [*models_for(name, policy, judge), "--judge_model", both],
    }
    refuses(SCRIPTS[name], [*argv[role], *data], "both", "causal|later|ahead")


def test_llama_4_lacks_a_classifier(step, refuses, tokenizer, data, tmp_path):
    """It trains as a language model; Transformers has no score head for it, which is what the refusal says."""
    sizes = dict(
        intermediate_size_mlp=32, num_local_experts=2, head_dim=8, num_key_value_heads=2, num_attention_heads=2
    )
    config = transformers.Llama4TextConfig(**SMALL | sizes)
    model = save_model(tmp_path / "llama4", config, tokenizer)
    step(sft, "--model", model, *data, "--output_dir", str(tmp_path / "out"))
    assert (tmp_path / "out" / "model" / "config.json").exists()
    refuses(reward, ["--model", model, *data], "Llama4TextConfig", "AutoModelForSequenceClassification")


def sampled(out) -> tuple[dict, dict, list]:
    """What hangs on the responses: a step's figures and its evaluation's, and the answers."""
    keys = "score_mean score_std score_max kl entropy response_tokens ended_by_eos".split()
    before, trained, _ = ({k: line.get(k) for k in keys} for line in lines(out / "metrics.jsonl"))
    return before, trained, [g["output"] for g in json.loads((out / "generations.json").read_text())]


def test_responses_do_not_hang_on_batches_or_ranks(run, tokenizer, tmp_path):
    """A response is drawn by its prompt's row and the step, whatever it is batched with, on any number of ranks."""
    prompts = [f"{start} {i}?\n" for i, start in enumerate(["Where is aisle", "Hello! What about number", "And"] * 3)]
    data = rows_file(tmp_path, *[{"prompt": prompt} for prompt in prompts[:8]])
    policy, judge = llama(tmp_path / "policy", tokenizer), reward_llama(tmp_path / "reward", tokenizer)
    still = "--policy_learning_rate 0 --critic_learning_rate 0 --max_steps 1 --global_batch_size 8 --max_new_tokens 8"
    argv = [*models_for("ppo", policy, judge), "--dataset", data, "--eval_dataset", data, *still.split()]
    results = []
    for size in ("8", "2", "1"):
        run(ppo, *argv, "--micro_batch_size", size, "--output_dir", str(tmp_path / size))
        results.append(sampled(tmp_path / size))
    done = launch("ppo.py", 2, *argv, "--micro_batch_size", "4", "--output_dir", str(tmp_path / "ranks"))
    assert done.returncode == 0, done.stderr
    results.append(sampled(tmp_path / "ranks"))
    assert len(set(results[0][2])) == 8
    for *figures, answers in results[1:]:
        assert answers == results[0][2]
        for mine, first in zip(figures, results[0]):
            assert mine == pytest.approx(first, abs=1e-4)
