"""sft.py: which rows are kept, which tokens are under the loss, the sampled answers, runs on one and two ranks."""

import common

import json
import math
import re
import shutil

import pytest
import torch
import transformers
from helpers import lines, rows_file
from ranks import on_two_ranks

import reward
import sft

CPU = torch.device("cpu")
SHORT = "--max_steps 3 --log_every 1 --micro_batch_size 4 --generate 5"


def encode(tokenizer, prompt: str, completion: str, max_length=1000, train_on_prompt=False) -> dict:
    return sft.encode_row(dict(prompt=prompt, completion=completion), tokenizer, max_length, train_on_prompt)


def logps_alone(model, ids: list[int], start: int) -> torch.Tensor:
    """log π of a row's tokens from `start` on, from the model's own logits, without padding."""
    ids = torch.tensor(ids)
    return model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[start - 1 :, 0]


# ---------------------------------------------------------------- rows


def test_a_row_that_is_too_long_or_has_nothing_before_the_response(tokenizer, tmp_path):
    """A prompt of 1 + n tokens, a response of m and EOS: 1 + n + m + 1 in all. Where a tokenizer sets no BOS, an empty
    prompt leaves nothing that predicts the first token."""
    n, m = (len(tokenizer(text, add_special_tokens=False).input_ids) for text in ("p\n", "yes"))
    row = encode(tokenizer, "p\n", "yes", max_length=n + m + 2)
    assert row["start"] == len(row["prompt_ids"]) == n + 1 and row["row_length"] == len(row["ids"]) == n + m + 2
    with pytest.raises(common.Unusable, match=f"longer than --max_length {n + m + 1}"):
        encode(tokenizer, "p\n", "yes", max_length=n + m + 1)
    assert encode(tokenizer, "", "yes")["start"] == 1  # BOS is there
    tokenizer.save_pretrained(tmp_path)
    plain = json.loads((tmp_path / "tokenizer.json").read_text()) | {"post_processor": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain))
    with pytest.raises(common.Unusable, match="prompt without a token"):
        encode(common.load_tokenizer(str(tmp_path), False), "", "yes")


def test_the_tokens_under_the_loss_by_hand(tokenizer):
    """<s> a b | c EOS and <s> | a EOS, the second row padded: c and EOS at the places of b and c, a and EOS at those of
    <s> and a. With --train_on_prompt also a and b; the first token is predicted by none."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    a, b, c = (tokenizer(letter, add_special_tokens=False).input_ids[0] for letter in "#$%")  # no merge joins them
    for train_on_prompt, start, first in ((False, 3, [-100, -100, c, eos, -100]), (True, 1, [a, b, c, eos, -100])):
        rows = [encode(tokenizer, prompt, answer, 9, train_on_prompt) for prompt, answer in (("#$", "%"), ("", "#"))]
        assert [row["start"] for row in rows] == [start, 1]
        batch = sft.collate({name: [row[name] for row in rows] for name in rows[0]}, tokenizer.pad_token_id, CPU)
        assert batch["input_ids"].tolist() == [[bos, a, b, c, eos], [bos, a, eos, 0, 0]]
        assert batch["labels"].tolist() == [first, [a, eos, -100, -100, -100]]


# ---------------------------------------------------------------- sampling


def test_sampling_samples(process, toy, tokenizer, tmp_path):
    """Whatever the model's own generation settings say: here greedy ones, under which 8 answers would be one."""
    shutil.copytree(toy, tmp_path / "greedy")
    settings = dict(do_sample=True, top_k=1, temperature=0.01, repetition_penalty=5.0, suppress_tokens=[*range(9, 500)])
    (tmp_path / "greedy" / "generation_config.json").write_text(json.dumps(settings))
    args = sft.Args(model=str(tmp_path / "greedy"))
    model = common.load_language_model("--model", args.model, args, tokenizer, common.engine_config(args, 1))
    prompts = [encode(tokenizer, "Where?\n", "a")["prompt_ids"]] * 8

    def answers(seed: int) -> list[list[int]]:
        seeds = [[seed, number] for number in range(8)]
        return common.sample(model, model, tokenizer, prompts, [20] * 8, seeds, 8, process)

    assert len(set(map(tuple, answers(0)))) > 4 and len({token for row in answers(0) for token in row}) > 20
    assert answers(0) == answers(0) != answers(1)


# ---------------------------------------------------------------- runs


def test_a_run(run, tmp_path):
    """What is written; perplexity falls; the saved model gives the logged loss, and AlpacaEval's format is met."""
    out = tmp_path / "out"
    run(sft, f"--output_dir {out} --max_steps 20 --generate 5")
    names = {"args.json", "metrics.jsonl", "generations.json", "model", "tensorboard"}
    assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == names
    metrics = lines(out / "metrics.jsonl")
    steps = [(0, "eval"), (1, "train"), (10, "train"), (20, "train"), (20, "eval")]
    assert [(m["step"], m["split"]) for m in metrics] == steps
    for m in metrics:
        train_keys = {"lr", "grad_norm", "rows_per_s", "tokens_per_s"} if m["split"] == "train" else set()
        assert set(m) == {"step", "split", "loss", "perplexity"} | train_keys
        assert m["perplexity"] == pytest.approx(math.exp(m["loss"]))
    assert metrics[-1]["perplexity"] < metrics[0]["perplexity"] / 50

    model = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    losses = []
    for row in lines(common.DATA / "sft_eval.jsonl"):
        prompt = tokenizer(row["prompt"]).input_ids
        ids = prompt + tokenizer(row["completion"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        losses.append(-logps_alone(model, ids, len(prompt)).detach())
    assert torch.cat(losses).mean().item() == pytest.approx(metrics[-1]["loss"], abs=1e-4)

    generations = json.loads((out / "generations.json").read_text())
    assert len(generations) == len({g["instruction"] for g in generations}) == 5
    held_out = {row["prompt"] for row in lines(common.DATA / "sft_eval.jsonl")}
    for g in generations:
        assert set(g) == {"instruction", "output", "generator", "dataset"}
        assert all(isinstance(value, str) for value in g.values())
        assert g["instruction"] in held_out and g["generator"] == "out" and "</s>" not in g["output"]

    # The result is evaluated alone, and is where the next step starts.
    run(sft, f"--model {out}/model --epochs 0 --output_dir {tmp_path}/again --generate 0")
    (evaluated,) = lines(tmp_path / "again" / "metrics.jsonl")
    assert evaluated["loss"] == pytest.approx(metrics[-1]["loss"], abs=1e-5)
    few = rows_file(tmp_path, *lines(common.DATA / "preference_eval.jsonl")[:8])
    run(reward, f"--model {out}/model --eval_dataset {few} --output_dir {tmp_path}/reward --max_steps 1")


def test_the_dialogue_wrapper_is_taken_off_for_alpaca_eval(run, tmp_path):
    data = rows_file(tmp_path, *[dict(instruction=f"Say {i}.", input="", output=f"{i}") for i in range(40)])
    run(sft, f"--dataset {data} --output_dir {tmp_path}/out --max_steps 1 --generate 2 --max_length 64")
    for generation in json.loads((tmp_path / "out" / "generations.json").read_text()):
        assert re.fullmatch(r"Say \d+\.", generation["instruction"]) and generation["dataset"] == "rows.jsonl"


def test_each_token_counts_alike(run, toy, tokenizer, tmp_path):
    """The first step's loss and gradient are those of the mean over the response tokens of the whole global batch, not
    of the mean of the rows' or micro batches' means: with untrained weights, computed here from each row alone."""
    data = rows_file(tmp_path, *[dict(prompt="p\n", completion="yes " * (1 + 5 * i)) for i in range(8)])
    model = transformers.AutoModelForCausalLM.from_pretrained(toy)
    for flag in ("", "--train_on_prompt"):
        rows = [encode(tokenizer, **row, train_on_prompt=bool(flag)) for row in lines(tmp_path / "rows.jsonl")]
        losses, count = [], sum(len(row["ids"]) - row["start"] for row in rows)
        model.zero_grad()
        for row in rows:
            logps = logps_alone(model, row["ids"], row["start"])
            (-logps.sum() / count).backward()
            losses.append(-logps.detach())
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
        for micro in (8, 2):
            out = tmp_path / f"{flag}{micro}"
            batch = f"--micro_batch_size {micro} --global_batch_size 8 --max_steps 1 --generate 0"
            run(sft, f"--dataset {data} --eval_dataset {data} --output_dir {out} {batch} {flag}")
            before, step, _ = lines(out / "metrics.jsonl")
            assert step["loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-4)
            assert before["loss"] == pytest.approx(step["loss"], abs=1e-4)
            assert step["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert abs(torch.cat(losses).mean() - torch.stack([own.mean() for own in losses]).mean()) > 1e-3


RUNS = {"2": "--zero_stage 2", "3": "--zero_stage 3 --gradient_checkpointing --offload"}


def runs_on_two_ranks(folder: str) -> None:
    for name, flags in RUNS.items():
        argv = f"--output_dir {folder}/{name} {flags} {SHORT}".split()
        sft.main(common.parse_args(sft.Args, sft.preset, argv))


def test_ranks_and_zero_stages_change_nothing(run, tmp_path):
    on_two_ranks(runs_on_two_ranks, str(tmp_path))
    run(sft, f"--output_dir {tmp_path}/one {SHORT}")
    one = tmp_path / "one"
    for out in (tmp_path / name for name in RUNS):
        for mine, other in zip(lines(out / "metrics.jsonl"), lines(one / "metrics.jsonl"), strict=True):
            for key in ("loss", "perplexity", "grad_norm", "lr"):
                assert (mine.get(key) or 0) == pytest.approx(other.get(key) or 0, rel=1e-3), (mine["step"], key)
        mine, other = (transformers.AutoModelForCausalLM.from_pretrained(folder / "model") for folder in (out, one))
        for (name, a), (_, b) in zip(mine.named_parameters(), other.named_parameters(), strict=True):
            assert (a - b).abs().mean() < 1e-4, name  # Adam takes whole steps where a gradient is nearly 0
        mine, other = (json.loads((folder / "generations.json").read_text()) for folder in (out, one))
        assert [g["instruction"] for g in mine] == [g["instruction"] for g in other] and len(mine) == 5
