"""Conversations and implicit prompts: what is tokenized is what the chat template gives, and generation sees."""

import common

import csv
import io
import json

import datasets
import pyarrow
import pytest
import transformers
from helpers import rows_file
from test_families import SMALL, save_model

import dpo
import ppo
import reward
import sft

TURN = "{% for m in messages %}"
TEMPLATES = {  # name: template, EOS, further special tokens
    "llama-3": (
        "{{ bos_token }}" + TURN + "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
        "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|eot_id|>",
        ["<|start_header_id|>", "<|end_header_id|>"],
    ),
    "chatml": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
        + TURN
        + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
        ["<|im_start|>"],
    ),
    "zephyr": (
        TURN + "{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "</s>",
        [],
    ),
}
SYSTEM = {"role": "system", "content": "You sell fruit."}
ASK, ASK_AGAIN = ({"role": "user", "content": text} for text in ("Where is the bread?", "And the milk?"))
YES, NO, HELLO = ({"role": "assistant", "content": text} for text in ("Aisle 3.", "I do not know.", "Hello!"))


def chat_tokenizer(name: str):
    """The embedded task's tokenizer with a chat template and its special tokens."""
    template, eos, special = TEMPLATES[name]
    tokenizer = transformers.AutoTokenizer.from_pretrained(common.toy_model())
    tokenizer.add_special_tokens({"eos_token": eos, "additional_special_tokens": special})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(params=TEMPLATES)
def tokenizer(request):
    return chat_tokenizer(request.param)


def pair(tokenizer, row: dict) -> dict:
    return common.encode_pair(row, tokenizer, 1000)


def template_ids(tokenizer, turns: list[dict], ask: bool = False) -> list[int]:
    """What apply_chat_template gives; nothing after the last EOS, unless an answer is asked for."""
    ids = list(tokenizer.apply_chat_template(turns, add_generation_prompt=ask, tokenize=True, return_dict=False))
    return ids if ask else ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]


# ---------------------------------------------------------------- the template's own tokens


@pytest.mark.parametrize("prompt", [[ASK], [SYSTEM, ASK], [ASK, HELLO, ASK_AGAIN]], ids=["one", "system", "three"])
def test_pairs_are_tokenized_as_the_template_says(tokenizer, prompt):
    """Explicit prompt; implicit, the turns that both begin with; and with a text beside them that they repeat."""
    explicit = pair(tokenizer, dict(prompt=prompt, chosen=[YES], rejected=[NO]))
    assert explicit["prompt_ids"] == template_ids(tokenizer, prompt, ask=True)
    assert explicit["chosen_ids"] == template_ids(tokenizer, [*prompt, YES])
    assert explicit["rejected_ids"] == template_ids(tokenizer, [*prompt, NO])
    assert explicit["chosen_ids"].count(tokenizer.eos_token_id) == len(prompt) + 1 + ("Be kind" in explicit["prompt"])
    whole = dict(chosen=[*prompt, YES], rejected=[*prompt, NO])
    assert pair(tokenizer, whole) == explicit
    assert pair(tokenizer, whole | {"prompt": prompt}) == explicit
    assert pair(tokenizer, whole | {"prompt": prompt[-1]["content"]}) == explicit  # as ultrafeedback_binarized has it


def test_a_text_is_the_users_turn_where_answers_are_turns(tokenizer):
    expected = pair(tokenizer, dict(prompt=[ASK], chosen=[YES], rejected=[NO]))
    assert pair(tokenizer, dict(prompt=ASK["content"], chosen=[YES], rejected=[NO])) == expected


def test_answers_of_several_turns(tokenizer):
    """What both answers begin with is theirs alone to be judged by no more: it belongs to the prompt."""
    chosen, rejected = [HELLO, ASK_AGAIN, YES], [HELLO, ASK_AGAIN, NO]
    found = pair(tokenizer, dict(prompt=[ASK], chosen=chosen, rejected=rejected))
    assert found["prompt_ids"] == template_ids(tokenizer, [ASK, HELLO, ASK_AGAIN], ask=True)
    assert found["chosen_ids"] == template_ids(tokenizer, [ASK, *chosen])
    found = pair(tokenizer, dict(prompt=[ASK], chosen=[YES, ASK_AGAIN, NO], rejected=[NO]))
    assert found["prompt_ids"] == template_ids(tokenizer, [ASK], ask=True)
    assert found["chosen_ids"] == template_ids(tokenizer, [ASK, YES, ASK_AGAIN, NO])


def test_demonstrations_and_prompts(tokenizer):
    expected = template_ids(tokenizer, [SYSTEM, ASK, YES])
    start = template_ids(tokenizer, [SYSTEM, ASK], ask=True)
    for row in (dict(messages=[SYSTEM, ASK, YES]), dict(prompt=[SYSTEM, ASK], completion=[YES])):
        found = sft.encode_row(row, tokenizer, 1000, False)
        assert (found["ids"], found["prompt_ids"], found["start"]) == (expected, start, len(start))
    for turns in ([ASK], [SYSTEM, ASK]):
        for row in (
            dict(prompt=turns),
            dict(messages=turns),
            dict(messages=[*turns, YES], prompt="a text beside them"),
        ):
            found = ppo.encode_prompt(row, tokenizer, 1000)["prompt_ids"]
            assert found == template_ids(tokenizer, turns, ask=True)


def test_plain_text_begins_as_before(tokenizer):
    """The template is for turns alone."""
    found = ppo.encode_prompt(dict(prompt="Where?"), tokenizer, 1000)["prompt_ids"]
    assert found == tokenizer("Where?").input_ids and found[0] == tokenizer.bos_token_id


# ---------------------------------------------------------------- implicit prompts of text


@pytest.mark.parametrize(
    "chosen, rejected, prompt",
    [
        ("\n\nHuman: Hi\n\nAssistant: Yes, a.", "\n\nHuman: Hi\n\nAssistant: Yes, b.", "\n\nHuman: Hi\n\nAssistant:"),
        (*(f"\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: {x}" for x in "DE"), None),
        ("Where is bread? In aisle 3.", "Where is bread? In aisle 30.", "Where is bread? In aisle "),
        ("yes", "no", ""),
    ],
)
def test_the_prompt_is_what_both_begin_with(chosen, rejected, prompt):
    prompt = "\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant:" if prompt is None else prompt
    expected = (prompt, chosen.removeprefix(prompt), rejected.removeprefix(prompt))
    assert common.preference_of(dict(chosen=chosen, rejected=rejected)) == expected


# ---------------------------------------------------------------- refusals


def test_a_tokenizer_without_a_template():
    plain = transformers.AutoTokenizer.from_pretrained(common.toy_model())
    with pytest.raises(ValueError, match="no chat template"):
        pair(plain, dict(prompt=[ASK], chosen=[YES], rejected=[NO]))


@pytest.mark.parametrize(
    "row, fault",
    [
        (dict(prompt=[ASK], chosen=[YES], rejected="no"), "some of its columns are text and some are turns"),
        (dict(prompt=[ASK], chosen=[{"role": "assistant"}], rejected=[NO]), "chosen is .* turns with role and content"),
        (dict(prompt=[ASK], chosen=[], rejected=[NO]), "chosen is"),
        (dict(prompt=[{"role": "user", "content": ["x"]}], chosen=[YES], rejected=[NO]), "prompt is"),
    ],
)
def test_broken_conversations(row, fault):
    with pytest.raises(ValueError, match=fault):
        pair(chat_tokenizer("chatml"), row)


@pytest.mark.parametrize(
    "row, fault",
    [
        (dict(prompt=[ASK], completion="Aisle 3."), "some of its columns are text and some are turns"),
        (dict(messages="Aisle 3."), "messages is 'Aisle 3.', but must be a list of turns"),
    ],
)
def test_broken_demonstrations(row, fault):
    with pytest.raises(ValueError, match=fault):
        sft.encode_row(row, chat_tokenizer("chatml"), 1000, False)


def test_a_column_of_another_format_does_not_meddle():
    """Sets of instructions also have a prompt or messages, which may hold the answer as well."""
    tokenizer, other = chat_tokenizer("chatml"), dict(prompt="### Output: 3", messages=[ASK])
    asked = dict(instruction="Add 1 and 2.", input="")
    expected = "\n\nHuman: Add 1 and 2.\n\nAssistant: "
    row = asked | dict(output_1="3", output_2="4", preference=2)
    assert common.preference_of(row | other, tokenizer) == (expected, "4", "3")
    row = asked | dict(output="3", prompt=other["prompt"])
    assert common.demonstration_of(row, tokenizer) == (expected, "3")
    assert ppo.encode_prompt(row, tokenizer, 1000)["prompt"] == expected
    row = dict(prompt="Where?", completion="There.", messages=[ASK, YES])
    assert common.demonstration_of(row, tokenizer) == ("Where?", "There.")


def test_a_template_that_refuses_a_role():
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = "{{ raise_exception('no system turn here') }}"
    with pytest.raises(ValueError, match="no system turn here"):
        pair(tokenizer, dict(prompt=[SYSTEM, ASK], chosen=[YES], rejected=[NO]))
    tokenizer.chat_template = TURN + "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}?{% endif %}"
    with pytest.raises(ValueError, match="does not go on"):
        pair(tokenizer, dict(prompt=[ASK], chosen=[YES], rejected=[NO]))


@pytest.mark.parametrize("turns, reason", [([ASK], "no answer at the end"), ([YES], "missing text")])
def test_demonstrations_that_cannot_be_used(turns, reason):
    with pytest.raises(common.Unusable, match=reason):
        sft.encode_row(dict(messages=turns), chat_tokenizer("chatml"), 1000, False)


def test_an_empty_answer_cannot_be_used():
    with pytest.raises(common.Unusable, match="empty response"):
        pair(chat_tokenizer("chatml"), dict(prompt=[ASK], chosen=[YES], rejected=[NO | {"content": " "}]))


# ---------------------------------------------------------------- files

ROWS = [
    {"instruction": f'Say "{i}",\nthen 2020-01-0{i}', "input": "", "output_1": f"{i}", "output_2": "x, y"}
    for i in range(1, 4)
]
ROWS = [row | {"preference": i} for i, row in enumerate(ROWS)]  # the first is a tie


def written(path, rows: list[dict]) -> str:
    """The rows in the form that the file's name says."""
    if ".csv" in path.name:
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        content = file.getvalue()
    else:
        content = json.dumps(rows) if ".json." in path.name else "".join(json.dumps(row) + "\n" for row in rows)
    with pyarrow.output_stream(str(path), compression="detect") as stream:
        stream.write(content.encode())
    return str(path)


@pytest.mark.parametrize(
    "name", "a.ndjson a.jsonl.gz a.json.gz a.jsonl.zst a.ndjson.bz2 a.csv a.csv.gz a.csv.zst saved splits:train".split()
)
def test_files_of_every_form(run, tmp_path, name):
    """All hold the same pairs, with line breaks, quotes and dates as text; of a tie none is left."""
    if name == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / name)
    elif name == "splits:train":
        train, test = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[1:])
        datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "splits")
    else:
        written(tmp_path / name, ROWS)
    rows = list(common.read_rows("--dataset", str(tmp_path / name), "train"))
    with pytest.raises(common.Unusable, match="tie"):
        common.preference_of(rows[0])
    assert [common.preference_of(row) for row in rows[1:]] == [common.preference_of(row) for row in ROWS[1:]]


def test_a_broken_csv_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,chosen,rejected\n"Hi,a,b\n')
    with pytest.raises(common.InputError, match="a.csv: .*unexpected end of data"):
        common.read_rows("--dataset", str(tmp_path / "a.csv"), "train")


# ---------------------------------------------------------------- runs


def test_a_step_of_each_script(run, tmp_path):
    tokenizer = chat_tokenizer("chatml")
    sizes = SMALL | dict(vocab_size=len(tokenizer))
    model = save_model(tmp_path / "model", transformers.LlamaConfig(**sizes), tokenizer)
    config = transformers.LlamaConfig(**sizes | dict(num_labels=1))
    scorer = save_model(tmp_path / "scorer", config, tokenizer, transformers.AutoModelForSequenceClassification)
    row = dict(prompt=[SYSTEM, ASK], chosen=[YES], rejected=[NO], completion=[YES])
    rows = [row | dict(chosen=[YES | {"content": f"Aisle {i}."}]) for i in range(4)]
    data = rows_file(tmp_path, *rows)
    few = f"--dataset {data} --eval_dataset {data} --max_steps 1 --global_batch_size 2"
    for script in (sft, reward, dpo, ppo):
        models = f"--policy_model {model} --reward_model {scorer}" if script is ppo else f"--model {model}"
        run(script, f"{few} {models} --output_dir {tmp_path}/{script.__name__}")
    answers = json.loads((tmp_path / "ppo" / "generations.json").read_text())
    assert len(answers) == 4 and {"instruction", "output", "generator", "dataset"} <= answers[0].keys()
