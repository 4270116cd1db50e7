"""What the user can mend is said in one line before anything is written, by every script that it concerns."""

import common

import dataclasses
import json
import shutil

import deepspeed
import pytest
import torch
import transformers
from helpers import ROOT, launch

import dpo
import ppo
import reward
import sft

SCRIPTS = {script.__name__: script for script in (sft, reward, dpo, ppo)}
ROW = dict(prompt="p", chosen="a", rejected="b", completion="c")
FARM = dict(instruction="i", input="", output="o", output_1="a", output_2="b")
POST = dict(info={"post": "p"}, summaries=[{"text": "a"}, {"text": "b"}], choice=0)
RANKED = dict(prompt="p", responses=["a", "b", "c"], scores=[1, 2, 3])
FILES = {
    "good": [ROW],
    "five": [ROW | dict(prompt=f"p {i}") for i in range(5)],
    "columns": [dict(prompt="p", chosen="a")],
    "text": [dict(text="p")],
    "ties": [FARM | dict(preference=0)] * 2,
    "three": [FARM | dict(preference=1), FARM | dict(preference=3)],
    "number": [ROW, ROW | dict(chosen=7, completion=7, prompt="q")],
    "prompt": [ROW | dict(prompt=1)],
    "empty": [ROW | dict(completion="", chosen="", rejected="")] * 3,
    "alike": [ROW | dict(rejected="a")],
    "split": [ROW | dict(split="a")],
    "strings": [POST | dict(summaries=["a", "b"])],
    "choice": [POST | dict(choice=2)],
    "words": [RANKED | dict(scores=["1", "2", "3"])],
    "fewer": [RANKED | dict(scores=[1, 2])],
    "nan": [RANKED | dict(scores=[1, 2, float("nan")])],
}


@pytest.fixture(scope="module")
def folder(toy, toy_reward, tokenizer, tmp_path_factory):
    """The files above, and models that cannot be used."""
    folder = tmp_path_factory.mktemp("bad")
    for name, rows in FILES.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "broken.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": oops}\n')
    (folder / "run" / "model").mkdir(parents=True)
    for name in ("pickled", "nopad", "remote", "other"):
        shutil.copytree(toy, folder / name)
    shutil.copytree(toy_reward, folder / "other_reward")
    (folder / "pickled" / "model.safetensors").unlink()
    torch.save({}, folder / "pickled" / "pytorch_model.bin")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / "nopad" / name
        path.write_text(path.read_text().replace('"<pad>"', '"</s>"'))
    config = json.loads(path.with_name("tokenizer.json").read_text())
    config["added_tokens"], config["model"]["vocab"]["</s>"] = config["added_tokens"][1:], 2
    path.with_name("tokenizer.json").write_text(json.dumps(config))
    config = json.loads((folder / "remote" / "config.json").read_text())
    own = {"AutoConfig": "own.C", "AutoModelForSequenceClassification": "own.M", "AutoModelForCausalLM": "own.M"}
    (folder / "remote" / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": own}))
    (folder / "remote" / "own.py").write_text("raise SystemExit('this code must not run')\n")
    tokens = transformers.AutoTokenizer.from_pretrained(toy)
    tokens.add_tokens(["another"])
    for name in ("other", "other_reward"):
        tokens.save_pretrained(folder / name)
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, vocab_size=512)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "short")
    tokenizer.save_pretrained(folder / "short")
    return folder


# Scripts, a command line, what is said. F: the folder above. LM, RM: the embedded task's language model, and a reward
# model. OUT: --output_dir. --M: the script's flag for its language model; --S: for that model's ZeRO stage.
BAD = [
    ("sft reward dpo ppo", "--dataset F/no.jsonl", r"--dataset .*no.jsonl: there is no such file"),
    ("sft reward dpo ppo", "--dataset nobody/nothing", r"nobody/nothing: .*download it and pass --dataset"),
    ("reward", f"--dataset {ROOT}/README.md", r"ends with .json, .jsonl, .ndjson, .csv"),
    ("sft reward dpo ppo", "--dataset F/text.jsonl", r"row 1: the columns are text, but must be "),
    ("sft reward", "--dataset F/columns.jsonl", r"row 1: the columns are prompt, chosen, but"),
    ("sft reward dpo ppo", "--eval_dataset F/broken.jsonl", r"--eval_dataset .*broken.jsonl: line 2 is not JSON"),
    ("reward dpo", "--dataset F/ties.jsonl", r"no usable row is left \(2 tie\)"),
    ("sft reward dpo", "--dataset F/empty.jsonl", r"empty.jsonl: no usable row is left \(3 empty response\)"),
    ("dpo reward", "--dataset F/alike.jsonl", r"no usable row is left \(1 identical responses\)"),
    ("sft reward dpo", "--dataset F/good.jsonl --max_length 3", r"no usable row .* \(1 longer than --max_length 3\)"),
    ("ppo", "--max_prompt_length 3", r"no usable row is left \(\d+ longer than --max_prompt_length 3\)"),
    ("reward dpo", "--dataset F/three.jsonl", r"row 2: preference is 3"),
    ("sft", "--dataset F/number.jsonl", r"row 2: completion is 7, but must be text"),
    ("reward dpo", "--dataset F/number.jsonl", r"row 2: chosen is 7, but must be text"),
    ("sft reward ppo", "--dataset F/prompt.jsonl", r"row 1: prompt is 1, but"),
    ("reward dpo", "--dataset F/strings.jsonl", r"row 1: info must"),
    ("reward dpo", "--dataset F/choice.jsonl", r"row 1: .*choice \(here 2\)"),
    ("sft", "--dataset F/split.jsonl:b", r"no row has split 'b'; there are \['a'\]"),
    ("sft reward dpo ppo", "--dataset F/five.jsonl", r"4 .*, without the held-out ones, do not fill a --global_batch"),
    ("reward dpo", "--ranked_dataset F/good.jsonl", r"row 1: .*, but must be prompt/responses/scores"),
    ("reward dpo", "--ranked_dataset F/words.jsonl", r"row 1: prompt must be text, responses a list"),
    ("reward dpo", "--ranked_dataset F/fewer.jsonl", r"row 1: prompt must be text, .*scores a number each"),
    ("reward dpo", "--ranked_dataset F/nan.jsonl", r"row 1: prompt must be text, .*scores a number each"),
    ("sft reward dpo ppo", "--M F/nothing", r"nothing: there is no such folder"),
    ("sft reward dpo ppo", "--M nobody", r"nobody: .*nor could the Hub give it; download it and pass"),
    ("sft reward dpo ppo", "--M F/nopad", r"nopad: its tokenizer has no padding token that differs from EOS"),
    ("sft reward dpo ppo", "--M F/run", r"it is the folder of a run: pass .*run/model"),
    ("sft reward dpo ppo", "--M F/pickled", r"only pickled weights"),
    ("sft reward dpo ppo", "--M F/remote", r"remote: it needs code of its own: read .* pass --trust_remote_code"),
    ("sft dpo", "--M F/short --max_length 65", r"short has 64 learned positions, but a row may have 65 tokens: lower"),
    ("sft dpo ppo", "--M RM", r"is a reward model, but a language model is needed"),
    ("dpo", "--ref_model RM", r"--ref_model .*reward is a reward model, but a language model is needed"),
    ("dpo", "--ref_model F/other", r"--ref_model .*other has another vocabulary than --model"),
    ("ppo", "--reward_model F/other_reward", r"--reward_model .*other_reward has another vocabulary than --policy_m"),
    ("ppo", "--judge_model F/other_reward", r"--judge_model .*other_reward has another vocabulary than --policy_m"),
    ("ppo", "--reward_model LM", r"is no reward model: pass what"),
    ("ppo", "--policy_model=", r"are needed. `deepspeed sft.py .*runs/sft/model; `deepspeed reward.py"),
    ("reward", "--epochs 0", r"is no reward model"),
    ("reward dpo", "--constraint cos_sim --encoder F/nothing", r"cannot load the encoder .*nothing: there is no"),
    ("reward dpo", "--constraint len_rat --beta3 -30", r"len_rat: .*positive.*beta3=-30.0 give: -10"),
    ("reward dpo", "--constraint fixed --fixed_bound -1", r"--constraint fixed: .*not -1"),
    ("reward dpo", "--constraint random --random_low 9", r"--constraint random: .*low=9.0, high=5.0"),
    ("sft reward dpo ppo", "--global_batch_size 16 --micro_batch_size 3", r"16 is not a multiple of 1 ranks x .*3"),
    ("ppo", "--minibatches 5", r"48 is not a multiple of 1 ranks x --minibatches 5: change one"),
    ("ppo", "--global_batch_size 4 --minibatches 8", r"4 is not a multiple of 1 ranks x --minibatches 8: change one"),
    ("sft reward dpo ppo", "--max_steps -1", r"--max_steps is -1, but must be at least 0"),
    ("sft reward dpo ppo", "--seed -1", r"--seed is -1, but must be at least 0"),
    ("sft reward dpo ppo", "--log_every 0", r"--log_every is 0, but must be at least 1"),
    ("sft dpo ppo", "--generate -1", r"--generate is -1, but must be at least 0"),
    ("sft reward dpo", "--learning_rate nan", r"--learning_rate is nan, but must be a finite number"),
    ("ppo", "--score_clip inf", r"--score_clip is inf, but must be a finite number"),
    ("sft reward dpo", "--max_length 0", r"--max_length is 0, but must be at least 1"),
    ("dpo", "--label_smoothing 0.7", r"--label_smoothing is 0.7, but must be at most 0.5"),
    ("dpo", "--kl_beta -1", r"--kl_beta is -1.0, but must be at least 0"),
    ("ppo", "--max_new_tokens 0", r"--max_new_tokens is 0, but must be at least 1"),
    ("ppo", "--temperature 0", r"--temperature is 0.0, but must be at least 0.001"),
    ("ppo", "--gamma 2", r"--gamma is 2.0, but must be at most 1"),
    ("sft reward dpo ppo", "--offload --S 0", r"needs ZeRO stage 1, 2 or 3"),
    ("sft reward dpo ppo", "--output_dir F/good.jsonl", r"good.jsonl"),
    ("sft reward dpo ppo", "--overwrite --M OUT/model", r"OUT holds --\w*model .* itself"),
    ("dpo", "--overwrite --ref_model OUT/model", r"OUT holds --ref_model .* itself"),
    ("ppo", "--overwrite --reward_model OUT/model", r"OUT holds --reward_model .* itself"),
]
CASES = [(name, argv, message) for names, argv, message in BAD for name in names.split()]


@pytest.mark.parametrize("name, argv, message", CASES, ids=[f"{name} {argv}" for name, argv, _ in CASES])
def test_bad_input(run, folder, toy, toy_reward, tmp_path, name, argv, message):
    out = tmp_path / "out"
    words = {"--M": "--policy_model" if name == "ppo" else "--model", "LM": toy, "RM": toy_reward}
    words["--S"] = "--policy_zero_stage" if name == "ppo" else "--zero_stage"
    models = f"--policy_model {toy} --reward_model {toy_reward}" if name == "ppo" else ""
    argv = [words.get(word, word).replace("F/", f"{folder}/").replace("OUT", str(out)) for word in argv.split()]
    before = sorted(folder.rglob("*")) + sorted(tmp_path.rglob("*"))
    with pytest.raises(common.InputError, match=message.replace("OUT", str(out))) as caught:
        run(SCRIPTS[name], *models.split(), "--output_dir", str(out), *argv)
    assert "\n" not in str(caught.value)
    assert sorted(folder.rglob("*")) + sorted(tmp_path.rglob("*")) == before  # nothing half-written


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_finished_run_is_not_replaced(run, toy, toy_reward, tmp_path, name):
    script, out = SCRIPTS[name], tmp_path / "out"
    out.mkdir()
    (out / "args.json").write_text(json.dumps(dataclasses.asdict(script.Args())))
    (out / script.OUTPUTS[-1]).write_text("{}\n")
    models = f"--policy_model {toy} --reward_model {toy_reward}" if name == "ppo" else ""
    with pytest.raises(common.InputError, match="out holds a finished run: choose another, or pass --overwrite"):
        run(script, f"{models} --output_dir {out}")
    assert (out / script.OUTPUTS[-1]).read_text() == "{}\n" and len(list(out.iterdir())) == 2


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_dtype_that_the_device_lacks_is_refused(run, toy, toy_reward, tmp_path, monkeypatch, name):
    """On whatever device the test runs: some CPUs have fp16."""
    device = deepspeed.accelerator.get_accelerator()
    monkeypatch.setattr(device, "is_fp16_supported", lambda: False)
    monkeypatch.setattr(device, "is_bf16_supported", lambda: True)
    models = f"--policy_model {toy} --reward_model {toy_reward}" if name == "ppo" else ""
    with pytest.raises(common.InputError, match="--dtype fp16 is not supported on this device: use fp32 or bf16"):
        run(SCRIPTS[name], f"{models} --dtype fp16 --output_dir {tmp_path}/out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ranks, argv", [(0, "--max_steps -1"), (2, "--dataset no.jsonl")])
def test_errors_reach_the_shell(ranks, argv):
    """One line on stderr and status 1: before the ranks meet, and from rank 0 alone where both know."""
    done = launch("reward.py", ranks, argv)
    said = [line for line in done.stderr.splitlines() if line.startswith("reward.py: error:")]
    assert done.returncode == 1 and len(said) == 1 and argv.split()[0] in said[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("argv", ["--constraint nothing", "--unknown 1", "--beta1 many", "--epochs 1.5"])
def test_a_malformed_command_line(argv, capsys):
    """Status 2, and the word that is wrong."""
    with pytest.raises(SystemExit) as ended:
        common.parse_args(reward.Args, reward.preset, argv.split())
    said = capsys.readouterr().err
    assert ended.value.code == 2 and argv.split()[0] in said
