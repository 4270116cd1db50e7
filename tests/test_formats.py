"""What rows say and how they become tokens, what is read of a data set and what is kept of it on disk.

Tokens are written as the toy's tokenizer spells them, with blanks between: Ġ is a blank before a word, Ċ a line break.
"""

import common

import csv
import datetime
import functools
import io
import json
import shutil
from types import SimpleNamespace

import datasets
import pyarrow
import pytest
import transformers
from helpers import rows_file
from tokenizers import normalizers

import ppo
import sft


def encode(script: str, row: dict, tokenizer, room: int = 1000) -> tuple[list[int], list[list[int]]]:
    """The tokens of a row's prompt and of its answers, as a script has them; reward.py and dpo.py are "pair"."""
    if script == "ppo":
        return ppo.encode_prompt(row, tokenizer, room)["prompt_ids"], []
    if script == "sft":
        found = sft.encode_row(row, tokenizer, room, train_on_prompt=False)
        return found["prompt_ids"], [found["ids"][found["start"] :]]
    found = common.encode_pair(row, tokenizer, room)
    prompt, both = found["prompt_ids"], (found["chosen_ids"], found["rejected_ids"])
    assert all(ids[: len(prompt)] == prompt for ids in both)
    return prompt, [ids[len(prompt) :] for ids in both]


def spelled(tokenizer, ids: list[int]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


def rows_of(name, split="train") -> list[dict]:
    return [dict(row) for row in common.find_rows(str(name), split)[1]()]


load = transformers.AutoTokenizer.from_pretrained
FARM = {"instruction": "Add:", "input": " 1", "output": "2", "output_1": "a", "output_2": "b"}
ADD = "\n\nHuman: Add: 1\n\nAssistant: "
POST = "\n\nHuman: Your task is to generate a short summary of a post.\n\nPost: Hi\n\nSummary: \n\nAssistant: "
TALK = "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant:"
TLDR = {"info": {"post": "Hi"}, "summaries": [{"text": "a"}, {"text": "b"}]}
TEXTS = [  # scripts, a row, its prompt, its answers: of a pair first the chosen one
    ("pair ppo", {"prompt": "Go", "chosen": " a", "rejected": " b"}, "Go", " a", " b"),
    ("pair ppo", {"chosen": "Go to a.", "rejected": "Go to us."}, "Go to", " a.", " us."),  # the blank is the word's
    ("pair ppo", {"chosen": "Go\nA a", "rejected": "Go\nB a"}, "Go\n", "A a", "B a"),
    ("pair", {"chosen": "yes", "rejected": "no"}, "", "yes", "no"),
    ("pair ppo", {"chosen": f"{TALK} Yes, 1", "rejected": f"{TALK} Yes, 2"}, TALK, " Yes, 1", " Yes, 2"),
    *[("pair ppo", FARM | {"preference": first}, ADD, "a", "b") for first in (1, "1", 1.0, "1.0")],
    *[("pair", FARM | {"preference": second}, ADD, "b", "a") for second in (2, "2", 2.0)],
    ("pair ppo", {"instruction": "Add:", "input": " 1", "chosen": "x", "rejected": "y"}, ADD, "x", "y"),
    ("pair ppo", TLDR | {"choice": 0}, POST, "a", "b"),
    ("pair ppo", TLDR | {"choice": 1}, POST, "b", "a"),
    ("sft ppo", {"prompt": "Go", "completion": " a", "messages": [{"role": "user", "content": "?"}]}, "Go", " a"),
    ("sft ppo", {key: FARM[key] for key in ("instruction", "input", "output")}, ADD, "2"),
    ("sft ppo", {"instruction": "Add: 1", "input": "1", "output": "2"}, ADD, "2"),  # has its input as a whole word
    ("sft ppo", {"instruction": "Add: 11", "input": "1", "output": "2"}, ADD.replace("1", "111"), "2"),
    ("sft ppo", {"instruction": "Add: 1", "input": None, "output": "2"}, ADD, "2"),
    ("sft ppo", {"post": "Hi", "summary": "a"}, POST, "a"),
    ("ppo", {"prompt": "Go"}, "Go"),
    ("ppo", {"instruction": "Add:", "input": " 1"}, ADD),
    ("ppo", {"post": "Hi"}, POST),
    ("ppo", FARM | {"preference": 0}, ADD),
    ("sft", {"prompt": "<s>Go", "completion": "a</s>"}, "Go", "a"),  # neither BOS nor EOS twice
]


@pytest.mark.parametrize("scripts, row, prompt, answers", [(*case[:3], case[3:]) for case in TEXTS])
def test_texts(tokenizer, scripts, row, prompt, answers):
    """Prompt and answer are tokenized apart, BOS before and EOS behind; all scripts see the same prompt."""
    expected = [tokenizer(text, add_special_tokens=False).input_ids + [2] for text in answers]
    for script in scripts.split():
        found = encode(script, row, tokenizer)
        assert found == ([1, *tokenizer(prompt, add_special_tokens=False).input_ids], expected[: len(found[1])])
    told = common.read_example(row, tokenizer, "prompt")["instruction"]
    assert told == {ADD: "Add: 1", POST: POST[9:-13]}.get(prompt, told)  # the words that AlpacaEval knows


@pytest.mark.parametrize(
    "prompt, chosen, rejected, tokens, prefix, lengths",
    [  # by hand: as one text " all" and " are" would be a token each
        ("Go a", "ll", "re", "<s> Go Ġa ll </s> | <s> Go Ġa re </s>", 3, (2, 2)),
        ("Go", "Thank you.", "Thank", "<s> Go Thank Ġyou . </s> | <s> Go Thank </s>", 3, (3, 1)),
        ("Go", "You</s>We", "You", "<s> Go You </s> We </s> | <s> Go You </s>", 3, (3, 1)),  # one token of its own each
    ],
)
def test_tokens_and_lengths_of_a_pair(tokenizer, prompt, chosen, rejected, tokens, prefix, lengths):
    """Lengths are those of len_rat: from the first token that differs, EOS included."""
    found = common.encode_pair({"prompt": prompt, "chosen": chosen, "rejected": rejected}, tokenizer, 6)
    assert " | ".join(spelled(tokenizer, found[f"{side}_ids"]) for side in ("chosen", "rejected")) == tokens
    assert (found["prefix"], found["chosen_length"], found["rejected_length"]) == (prefix, *lengths)
    assert found["row_length"] == prefix + sum(lengths)


USER, SYSTEM, TOOL = ({"role": role, "content": "Go"} for role in ("user", "system", "tool"))
YES, NO, HI = ({"role": "assistant", "content": text} for text in ("You", "We", "Hi"))
PAIR = {"prompt": "Go", "chosen": "a", "rejected": "b"}
DROPPED = [
    ("pair", FARM | {"preference": 0}, "tie"),
    ("pair", PAIR | {"rejected": "a</s>"}, "identical responses"),
    ("pair", PAIR | {"chosen": None}, "missing text"),
    ("pair", PAIR | {"prompt": None}, "missing text"),
    ("sft", {"messages": []}, "missing text"),
    ("ppo", {"messages": None}, "missing text"),
    ("sft", {"messages": [YES]}, "missing text"),
    ("sft", {"prompt": "Go", "completion": " \n"}, "empty response"),
    ("pair", {"chosen": "Human: Go Assistant: a", "rejected": "Human: Go Assistant: "}, "empty response"),
    ("pair", {"prompt": [USER], "chosen": [YES], "rejected": [NO | {"content": None}]}, "empty response"),
    ("pair", {"prompt": [USER], "chosen": [YES], "rejected": [NO | {"content": []}]}, "empty response"),
    ("pair", {"prompt": [USER], "chosen": [YES, USER], "rejected": [NO, USER]}, "no answer at the end"),
    ("pair", PAIR | {"chosen": "a" + " a" * 17}, "longer than --max_length 20"),  # 2 + 18 + EOS
    ("sft", {"prompt": "Go", "completion": "a" + " a" * 17}, "longer than --max_length 20"),
    ("ppo", {"prompt": "Go" + " a" * 19}, "longer than --max_prompt_length 20"),
]
REFUSED = [
    *[("pair", FARM | {"preference": value}, "preference is") for value in (True, False, 3, "a", None)],
    *[("pair", TLDR | {"choice": value}, "choice is") for value in (True, 2, None)],
    ("pair", PAIR | {"chosen": 7}, "7 is neither plain text nor a list of turns"),
    ("pair", {"chosen": "a"}, "the columns are chosen, but must be chosen/rejected, or "),
    ("sft", {"messages": "Hi!"}, "nor a list of turns"),
    ("pair", {"chosen": [{"content": "a"}], "rejected": [YES]}, "nor a list of turns"),
    ("pair", {"chosen": json.dumps([USER, YES]), "rejected": "a"}, "neither plain text nor a list of turns"),
    ("ppo", {"prompt": str([USER])}, "neither plain text nor a list of turns"),
    ("pair", {"prompt": [SYSTEM, USER], "chosen": [YES], "rejected": [NO]}, "no system turn"),
]


@pytest.mark.parametrize("script, row, reason", DROPPED + REFUSED)
def test_rows_that_are_dropped_or_refused(script, row, reason):
    """What no one meant is Unusable, counted and left out; another format than the known ones ends the run."""
    with pytest.raises(common.Unusable if (script, row, reason) in DROPPED else Exception, match=reason):
        encode(script, row, chat("gemma"), 20)
    if reason.startswith("longer"):
        assert encode(script, row, chat("gemma"), 21)


def test_a_prompt_without_a_token(tokenizer):
    """Where the tokenizer has no BOS nothing predicts the first token, which a reward model does not need."""
    plain, row = load(tokenizer.name_or_path), {"chosen": "a", "rejected": "b", "completion": "a", "prompt": ""}
    plain.backend_tokenizer.post_processor = None
    assert common.encode_pair(row, plain, 9)["chosen_ids"] == [67, 2]
    needing = functools.partial(common.encode_pair, max_length=9, needs_prompt=True)
    for call in (needing, functools.partial(encode, "sft"), functools.partial(encode, "ppo")):
        with pytest.raises(common.Unusable, match="prompt without a token"):
            call(row=row, tokenizer=plain)


# ---------------------------------------------------------------- conversations

EACH, ASK, END = "{% for m in messages %}", "{% endfor %}{% if add_generation_prompt %}", "{% endif %}"
BAR = EACH + "{{ '<|' + m.role + '|>\n' + m.content }}"
TEMPLATES = {
    "chatml": "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nHi<|im_end|>\n' }}{% endif %}" + EACH
    + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}" + f"{ASK}<|im_start|>assistant\n{END}",
    "gemma": "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    + EACH + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    + f"{ASK}<start_of_turn>model\n{END}",
    "llama2": "{{ bos_token }}" + EACH + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "phi3": f"{BAR}<|end|>\n{ASK}<|assistant|>\n{{% else %}}{{{{ eos_token }}}}{END}",
    "glm": f"[gMASK]{BAR}{ASK}<|assistant|>\n{END}",
    "r1": f"{BAR}{ASK}<|assistant|>\n<think>\n{END}",
    "apart": EACH + "{{ m.role }}: {{ m.content }}{{ eos_token }}" + f"{ASK}assistant: {END}",
    "json": "{{ (tools or []) | tojson }}" + EACH + "<|turn|>{{ m | tojson }}" + f"{ASK}<|turn|>{END}",
}  # fmt: skip
CHATS = {  # special tokens, EOS first: a prompt's tokens | its answer's
    "chatml": "<|im_end|> <|im_start|>: <|im_start|> s y s te m Ċ H i <|im_end|> Ċ <|im_start|> us er Ċ Go <|im_end|> "
    "Ċ <|im_start|> as s is t an t Ċ | You <|im_end|>",
    "gemma": "</s> <start_of_turn> <end_of_turn>: <s> <start_of_turn> us er Ċ Go <end_of_turn> Ċ "
    "<start_of_turn> m o d el Ċ | You <end_of_turn>",
    # Its tokenizer puts a blank before each text: " You" alone would be Ġ ĠYou.
    "llama2": "</s>: <s> Ġ [ I N S T ] ĠGo Ġ [ / I N S T ] | ĠYou </s>",
    "phi3": "<|endoftext|> <|user|> <|assistant|> <|end|>: <|user|> Ċ Go <|end|> Ċ <|assistant|> Ċ | You <|end|>",
    "glm": "<|endoftext|> <|user|> <|assistant|> [gMASK]: [gMASK] <|user|> Ċ Go <|assistant|> Ċ | You <|endoftext|>",
    "apart": "</s>: us er : ĠGo </s> as s is t an t : Ġ | You </s>",  # the prompt's last token grows
}


@functools.cache
def chat(name: str):
    tokenizer, (eos, *special) = load(common.toy_model()), CHATS.get(name, "</s> <|turn|>").split(": ")[0].split()
    tokenizer.chat_template = TEMPLATES[name]
    tokenizer.add_special_tokens({"eos_token": eos, "additional_special_tokens": special})
    if name == "llama2":
        tokenizer.backend_tokenizer.normalizer = normalizers.Prepend(" ")
    return tokenizer


@pytest.mark.parametrize("name", CHATS)
def test_conversations(name):
    """The tokens of the rendered whole, to the first special one behind the answer, whichever way turns are given."""
    tokenizer, (prompt, answer) = chat(name), CHATS[name].split(": ", 1)[1].split(" | ")
    turns = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}
    texts = {"prompt": [USER], "chosen": "You", "rejected": "We"}
    pairs = [turns, turns | {"prompt": "Go"}, texts, {"chosen": [USER, YES], "rejected": [USER, NO]}]
    demonstrations = [{"messages": [USER, YES]}, turns | {"completion": "You"}, {"prompt": "Go", "completion": [YES]}]
    rows = {"pair": pairs, "sft": demonstrations}
    rows["ppo"] = [*pairs, *demonstrations, {"prompt": [USER]}, {"messages": [USER]}]
    for script, row in [(script, row) for script, some in rows.items() for row in some]:
        ids, answers = encode(script, row, tokenizer)
        expected = [answer, answer.replace("You", "We")][: len(answers)]
        assert (spelled(tokenizer, ids), [spelled(tokenizer, ids) for ids in answers]) == (prompt, expected), row


def test_answers_of_several_turns():
    """The end is that of the last turn. A template that does not go on from its own prompt (R1's) is refused."""
    row = {"prompt": [USER], "chosen": [YES, USER, NO], "rejected": [NO]}
    ids, (chosen, _) = encode("pair", row, chat("gemma"))
    turns = "You <end_of_turn> Ċ <start_of_turn> us er Ċ Go <end_of_turn> Ċ <start_of_turn> m o d el Ċ We <end_of_turn>"
    assert spelled(chat("gemma"), chosen) == turns and f": {spelled(chat('gemma'), ids)} |" in CHATS["gemma"]
    with pytest.raises(ValueError, match="does not go on with an answer where it asks for one"):
        encode("pair", row, chat("r1"))


CALL, CALLED = ({"function": {"name": "f", "arguments": {"x": "Go"} | more}} for more in ({"y": None}, {}))
NULLS = {"name": None, "reasoning_content": None, "tool_calls": None}
DO, THOUGHT = {"role": "user", "content": "Do"}, YES | {"reasoning_content": "Hm"}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
WHOLE = [USER, {"role": "assistant", "tool_calls": [CALLED]}, TOOL | {"name": "stock"}, THOUGHT, DO]
TURNS = [  # prompt, what both answers begin with, the prompt's turns
    ([SYSTEM, USER], [USER | {"content": " Go\n"}], [SYSTEM, USER | {"content": " Go\n"}]),
    ([SYSTEM, USER], [SYSTEM, USER], [SYSTEM, USER]),
    ([SYSTEM, USER], [USER, HI, DO], [SYSTEM, USER, HI, DO]),
    ([USER], [USER | {"name": "Al"}], [USER, USER | {"name": "Al"}]),  # another's
    ("Go", [SYSTEM, USER, HI, DO], [SYSTEM, USER, HI, DO]),
    ([USER | {"at": datetime.date(2026, 1, 2)}], [HI, DO], [USER | {"at": "2026-01-02"}, HI, DO]),  # of Parquet
    ("Do", [SYSTEM, USER], [DO, SYSTEM, USER]),
    ([USER | NULLS, CALLING, TOOL | {"name": "stock"}], [THOUGHT | NULLS | THOUGHT, DO | NULLS], WHOLE),
]


@pytest.mark.parametrize("prompt, begun, turns", TURNS)
def test_turns(prompt, begun, turns):
    """Each comes once, whole but for what is null; `tools` as a list or as JSON; a call is an answer."""
    tools, row = [{"name": "f"}], {"prompt": prompt, "chosen": [*begun, CALLING], "rejected": [*begun, NO]}
    for given in (json.dumps(tools), [tools[0] | {"strict": None}], None):
        found = common.encode_pair(row | {"tools": given}, chat("json"), 5000)
        expected = json.dumps(tools if given else []) + "".join(f"<|turn|>{json.dumps(turn)}" for turn in turns)
        said = found["prompt"].replace('"thinking": "Hm", ', "")  # the library itself adds it
        assert said == expected + "<|turn|>" and found["instruction"] == turns[-1]["content"]
        assert (json.loads(found["chosen"]), json.loads(found["rejected"])) == (WHOLE[1], NO)
        assert ppo.encode_prompt(row | {"tools": given}, chat("json"), 5000)["prompt_ids"] == found["prompt_ids"]


@pytest.mark.parametrize(
    "name, eos, listed, ends",
    [
        ("gemma", "</s>", "", "</s> <end_of_turn>"),
        ("phi3", "<|endoftext|>", "<|end|>", "<|endoftext|> <|end|>"),
        ("glm", "<|endoftext|>", "<|user|> <pad> a", "<|endoftext|> <|user|>"),  # never padding, nor a word
        ("chatml", "<|endoftext|>", "<|endoftext|>", "<|endoftext|> <|im_end|>"),  # a base model of Qwen
        ("llama2", "</s>", "</s>", "</s>"),
    ],
)
def test_what_ends_an_answer(process, tmp_path, name, eos, listed, ends):
    """The tokenizer's EOS, the folder's list and what the template writes: a saved model names them again, and PPO sees
    each as the end. The head gives all probability to one token."""
    flags = dict(dtype="fp32", zero_stage=0, trust_remote_code=False, gradient_checkpointing=False, max_length=64)
    args = SimpleNamespace(**flags, max_new_tokens=2, micro_batch_size=4, temperature=1.0)
    tokenizer = chat.__wrapped__(name)  # one of its own
    tokenizer.add_special_tokens({"eos_token": eos})
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes))
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(listed.split()) or None
    model.save_pretrained(tmp_path)
    model = common.load_language_model("--model", str(tmp_path), args, tokenizer, {})
    model.save_pretrained(tmp_path / "again")
    again = transformers.GenerationConfig.from_pretrained(tmp_path / "again").eos_token_id
    assert sorted(tokenizer.convert_ids_to_tokens(again)) == sorted(ends.split())
    model.reads_padding = False
    model.model.embed_tokens.weight.data.fill_(1)
    for token in tokenizer.convert_tokens_to_ids([*ends.split(), "a"]):
        model.lm_head.weight.data.zero_()[token] = 100
        rollout = ppo.sample(model, model, tokenizer, [[5, 6], [7]], [[1], [2]], args, process)
        assert rollout.ended.tolist() == [token in again] * 2
        assert rollout.responses == [[token] * (1 if token in again else 2)] * 2


# ---------------------------------------------------------------- files

ROWS = [
    {"prompt": "2024-01-02", "chosen": "None", "rejected": 'a "b",\r\nc\u2028d', "note": None},
    {"prompt": "007", "chosen": "NA", "rejected": "1e3"},
    {"prompt": "true", "chosen": "\U0001f600 é", "rejected": "{}", "note": "late"},
]


def written(path, rows: list[dict]):
    """The rows in the form that the file's name says, with a BOM where there may be one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
        return path
    text = io.StringIO(newline="")
    if ".csv" in path.suffixes:
        writer = csv.DictWriter(text, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    else:
        dump = functools.partial(json.dumps, ensure_ascii=False)
        text.write(dump(rows, indent=1) if ".json" in path.suffixes else "\r\n\n  ".join(map(dump, rows)))
    with pyarrow.output_stream(str(path), compression="detect") as stream:
        stream.write(text.getvalue().encode("utf-8-sig"))
    return path


def test_every_kind_of_file(tmp_path):
    """All hold the same rows: texts stay texts, a column may come late, a folder is read as the file in it."""
    kinds = "json jsonl ndjson csv parquet json.gz jsonl.bz2 ndjson.zst csv.gz csv.zst".split()
    names = [written(tmp_path / f"a.{kind}", ROWS) for kind in kinds]
    names += [written(tmp_path / kind / f"train.{kind}", ROWS).parent for kind in kinds]
    names += [tmp_path / "jsonl" / "t*.jsonl", tmp_path / "saved", f"{tmp_path}/two:test"]
    saved, other = (datasets.Dataset.from_list(rows) for rows in (ROWS, [{"prompt": "other"}]))
    saved.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=other, test=saved).save_to_disk(tmp_path / "two")
    for name in names:
        found = [{key: value or None for key, value in row.items()} for row in rows_of(name)]
        assert [{"note": None} | row for row in found] == [{"note": None} | row for row in ROWS], name


def test_splits(tmp_path, capsys):
    """--dataset reads train and --eval_dataset test, or the only split; :SPLIT wins; nothing else is guessed."""
    for name in ("odd/preferences", "odd/test", "only/data", "two/train", "two/validation"):
        written(tmp_path / f"{name}.jsonl", [{"prompt": name}])
    with pytest.raises(common.InputError, match="no split train, but test: write"):
        rows_of(tmp_path / "odd")
    assert capsys.readouterr().out == f"{tmp_path}/odd: of no split, and not read: preferences.jsonl\n"
    with pytest.raises(common.InputError, match="no split test, but train, validation: write"):
        rows_of(tmp_path / "two", "test")
    cases = "odd test odd/test,odd:test train odd/test,only test only/data,only train only/data,two train two/train"
    for name, split, found in map(str.split, f"{cases},two:validation train two/validation".split(",")):
        assert rows_of(tmp_path / name, split) == [{"prompt": found}]
    file = written(tmp_path / "rows.jsonl", [{"split": "train"}, {"split": "test"}])
    assert rows_of(f"{file}:test") == [{"split": "test"}] and len(rows_of(file, "test")) == 2


def test_rows_are_kept(process, toy, tmp_path, capsys, monkeypatch):
    """A second start encodes nothing, wherever the files lie; each says what it dropped and which columns it read."""
    encoded, home = [], tmp_path / "home"
    bare = {name: value for name, value in FARM.items() if name != "input"}
    rows = [bare | {"preference": i, "split": "train" if i else "test", "note": "?"} for i in (0, 1, 2)]
    file = written(home / "train.jsonl", rows)
    for name in ("one", "copy", "chat"):
        shutil.copytree(toy, tmp_path / name)
    (tmp_path / "chat" / "chat_template.jinja").write_text("{{ messages }}")

    def encode_row(row: dict, tokenizer, max_length: int) -> dict:
        encoded.append(row)
        return common.encode_pair(row, tokenizer, max_length)

    def made(name, model: str = "one", max_length: int = 60) -> int:
        """How many rows had to be encoded."""
        encoded.clear()
        encode = functools.partial(encode_row, tokenizer=load(tmp_path / model), max_length=max_length)
        assert common.load_rows("--dataset", str(name), "train", encode)["chosen"] == ["a", "b"]
        return len(encoded)

    columns = "instruction, output_1, output_2, preference; not read: note, output, split\n"
    for name, number, said in ((file, 3, "; dropped: 1 tie"), (f"{file}:train", 2, "")):
        for again in (number, 0):
            capsys.readouterr()
            assert made(name) == again
            assert capsys.readouterr().out == f"--dataset: 2 rows{said}; columns: {columns}"
    (tmp_path / "linked").symlink_to(home)
    shutil.copytree(home, tmp_path / "moved")
    for elsewhere in ("home", "linked", "linked/train.jsonl", "moved/train.jsonl"):
        assert made(tmp_path / elsewhere, "copy") == 0
    assert [made(file, "chat"), made(file, max_length=61), made(file), made(f"{file}:train")] == [3, 3, 0, 0]
    written(file, [*rows, rows[0]])
    assert [made(file), made(home), made(file)] == [4, 0, 0]
    (tmp_path / "common.py").write_text("# changed")
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    assert [made(file), made(file)] == [4, 0]


def test_columns_that_would_not_be_read(process, tokenizer, tmp_path):
    """What may belong to the prompt ends the run where it says something, beside a prompt too."""
    encode = functools.partial(common.encode_pair, tokenizer=tokenizer, max_length=60)
    for name in "question query input system history context".split():
        for row in (PAIR, {"chosen": "a", "rejected": "b"}):
            file = rows_file(tmp_path, row | {name: ""}, row | {name: "Go"})
            with pytest.raises(common.InputError, match=f"--dataset {file}: row 2: .*'{name}' would not .* rename it"):
                common.load_rows("--dataset", file, "train", encode)


OTHERS, SEVEN_EACH = [f"Question {i}" for i in range(20)], [f"Question {i % 30}" for i in range(210)]
HELD_OUT = [(["big"] * 180 + OTHERS, 20), (SEVEN_EACH, 21), ([""] * 6000, 500), (OTHERS[:3], 1)]


@pytest.mark.parametrize("prompts, held_out", [*HELD_OUT, (["a", "b"] * 100, None)])
def test_held_out_prompts(process, monkeypatch, prompts, held_out):
    """min(500, a tenth) of the rows, by whole prompts, none on both sides; "" is no prompt; a function of the seed."""
    rows = datasets.Dataset.from_dict({"prompt": prompts, "number": range(len(prompts))})
    monkeypatch.setattr(common, "load_rows", lambda *_: rows)

    def split(seed: int, epochs: int = 1) -> list:
        args = SimpleNamespace(dataset="d", eval_dataset="", epochs=epochs, seed=seed)
        return [part.to_list() for part in common.load_data(args, None)]

    if held_out is None:
        with pytest.raises(common.InputError, match="--dataset d: .* pass --eval_dataset"):
            split(0)
        return
    train, test = split(0)
    assert sorted(row["number"] for row in train + test) == list(range(len(prompts))) and len(test) == held_out
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test} - {""}
    assert split(0, epochs=0) == [[], test]
    assert any(split(seed)[1] != test for seed in (1, 2, 3)) == ("big" not in prompts)


def test_ranked_rows(process, tokenizer, tmp_path, capsys):
    """Of prompts with more than two responses that all can be used, each response is the chosen one of a pair."""
    rows = [("Go", "abc", [1, 2.5, "3"]), ("Do", "ab", [1, 2]), ("My", "a b", [1, 2, 3]), ("We", "abcd", [4, 3, 2, 1])]
    rows = [{"prompt": prompt, "responses": list(text), "scores": scores} for prompt, text, scores in rows]
    encode = functools.partial(common.encode_pair, tokenizer=tokenizer, max_length=20, given=True)
    pairs, human = common.load_ranked(SimpleNamespace(ranked_dataset=rows_file(tmp_path, *rows)), encode)
    assert human == [[1, 2.5, 3], [4, 3, 2, 1]] and capsys.readouterr().out == "--ranked_dataset: 2 prompts\n"
    expected = [f"<s> Go {letter} </s>" for letter in "abc"] + [f"<s> We {letter} </s>" for letter in "abcd"]
    assert [spelled(tokenizer, ids) for ids in pairs["chosen_ids"]] == expected
    assert common.load_ranked(SimpleNamespace(ranked_dataset=""), encode) == (None, [])
    for broken in ({"scores": [1, 2]}, {"scores": [1, 2, float("nan")]}, {"scores": ["a", 1, 2]}, {"scores": None}):
        file = rows_file(tmp_path, rows[0], rows[0] | broken)
        with pytest.raises(common.InputError, match="--ranked_dataset .*rows.jsonl: row 2: "):
            common.load_ranked(SimpleNamespace(ranked_dataset=file), encode)
