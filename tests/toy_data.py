"""The embedded task: a shop clerk is asked where goods are. Writes the files of `data/`, and scores answers.

    python tests/toy_data.py    writes data/ again (a function of SEED: the files do not change, which a test checks)

The quality of an answer is known here: `gold_score` reads it off the text by rules. Preferences are sampled from it by
Bradley-Terry, P(a is chosen over b) = σ(gold(a) - gold(b)), so that labels are noisy as people's are, and whatever a
model learned from them can be compared with the truth. Half of the pairs are near copies, one sentence edited: there
the similarity is high and the bound of PCRM tight. The other half are two answers drawn independently.

`data/toy/` is the starting model without its weights, which common.py draws: a byte-level BPE of 512 tokens, trained on
the texts of the *_train files, and the configuration of a Llama of 0.9 million parameters.
"""

import json
import math
import random
import re
import tempfile
from pathlib import Path

SEED = 42
DATA = Path(__file__).resolve().parent.parent / "data"

AISLES = ["apples carrots onions", "milk butter cheese", "bread flour rice", "soap towels candles"]  # 1 to 4
AISLE_OF = {good: aisle for aisle, goods in enumerate(AISLES, 1) for good in goods.split()}
OPENINGS = ["", "Hello! ", "Excuse me. "]
QUESTIONS = [
    "Where do I find {good}?", "Which aisle has {good}?", "Do you sell {good}?", "I am looking for {good}.",
    "I need some {good}, please.", "Could you tell me where the {good} are kept?", "Is there any {good} left?",
    "My mother sent me to buy {good}.",
]  # fmt: skip
POLITE = ["Of course!", "Happy to help!", "Thank you for asking!", "Have a nice day!"]
RUDE = ["Are you blind?", "Do not waste my time.", "Look for it yourself."]
FILLER = [
    "We open at eight every morning.", "This shop has many long shelves.", "It has been a busy week for all of us.",
    "My cousin used to work here as well.", "They painted the door green last year.",
]  # fmt: skip
LOCATIONS = [
    "Aisle {aisle}.", "Go to aisle {aisle}.", "You will find {good} in aisle {aisle}.",
    "We keep {good} in aisle {aisle}.",
]  # fmt: skip
LOCATION = "|".join(re.escape(t).replace(r"\{aisle\}", r"\d+").replace(r"\{good\}", r"\w+") for t in LOCATIONS)
UNSURE = "I am not sure."

# The scale decides how certain the labels are: a right aisle against a wrong one differs by 8, so its label is wrong
# once in 3,000; a polite sentence more or less is worth 1, and its label is wrong once in four.
RIGHT_AISLE, WRONG_AISLE, NO_AISLE = 4.0, -4.0, -1.0
POLITENESS, REPETITION, GIBBERISH = 1.0, -1.5, -2.0
SENTENCES = dict.fromkeys(RUDE, -2.5) | dict.fromkeys(FILLER, -0.5) | dict.fromkeys([*POLITE, UNSURE], 0.0)


def sentences(text: str) -> list[str]:
    return [part.strip() for part in re.findall(r"[^.!?]*[.!?]|[^.!?]+$", text) if part.strip()]


def gold_score(prompt: str, response: str) -> float:
    """The true quality of an answer, from its text alone; any text has one, a model's too.

    The first aisle named counts; politeness counts once; rude, filler, repeated and unknown sentences count each.
    """
    good = next((g for g in AISLE_OF if re.search(rf"\b{g}\b", prompt)), None)
    parts = sentences(response)
    named = re.search(r"\baisle (\d+)", response, re.IGNORECASE)
    score = NO_AISLE if named is None else RIGHT_AISLE if int(named[1]) == AISLE_OF.get(good) else WRONG_AISLE
    score += POLITENESS * any(part in POLITE for part in parts)
    for i, part in enumerate(parts):
        other = 0.0 if re.fullmatch(LOCATION, part) else GIBBERISH
        score += REPETITION if part in parts[:i] else SENTENCES.get(part, other)
    return score


def prompt_text(opening: str, question: str, good: str) -> str:
    # The prompt ends with a line break: no tokenizer joins it with the answer's first word.
    return f"Customer: {opening}{question.format(good=good)}\nClerk:\n"


def wrong_aisle(rng: random.Random, good: str) -> int:
    return rng.choice([aisle for aisle in (1, 2, 3, 4) if aisle != AISLE_OF[good]])


def location(rng: random.Random, good: str, right: float) -> str:
    aisle = AISLE_OF[good] if rng.random() < right else wrong_aisle(rng, good)
    return rng.choice(LOCATIONS).format(good=good, aisle=aisle)


def answer(rng: random.Random, good: str, right: float = 0.5) -> list[str]:
    """The sentences of a random answer: an aisle, right with probability `right`, among other sentences."""
    parts = [location(rng, good, right) if rng.random() < 0.9 else UNSURE]
    if rng.random() < 0.45:
        parts.insert(0, rng.choice(POLITE[:3]))
    if rng.random() < 0.25:
        parts.insert(rng.randint(0, len(parts)), rng.choice(RUDE))
    for filler in rng.sample(FILLER, rng.choice([0, 0, 0, 1, 1, 2, 3])):
        parts.insert(rng.randint(0, len(parts)), filler)
    parts += parts[-1:] * (rng.random() < 0.12)
    return parts + POLITE[3:] * (rng.random() < 0.25)


def edited(rng: random.Random, good: str, parts: list[str]) -> list[str]:
    """A near copy: one sentence replaced, added or taken away."""
    parts, kind, right = list(parts), rng.random(), str(AISLE_OF[good])
    named = [i for i, part in enumerate(parts) if "isle" in part]
    if kind < 0.55 and named:
        wrong, old = str(wrong_aisle(rng, good)), parts[named[0]]
        parts[named[0]] = re.sub(r"\d+", wrong if right in old else right, old)
    elif kind < 0.7:
        parts.insert(rng.randint(0, len(parts)), rng.choice(RUDE))
    elif kind < 0.8:
        parts.insert(rng.randint(0, len(parts)), rng.choice(FILLER))
    elif kind < 0.9 and len(parts) > 1:
        parts.pop(rng.randrange(len(parts)))
    else:
        parts.append(rng.choice(POLITE))
    return parts


def preference(rng: random.Random, prompt: str, good: str, near_copy: bool) -> dict[str, str]:
    a = b = None
    while a == b:
        a = answer(rng, good)
        b = edited(rng, good, a) if near_copy else answer(rng, good)
        a, b = (b, a) if rng.random() < 0.5 else (a, b)
    a, b = " ".join(a), " ".join(b)
    a_wins = rng.random() < 1 / (1 + math.exp(gold_score(prompt, b) - gold_score(prompt, a)))
    return {"prompt": prompt, "chosen": a if a_wins else b, "rejected": b if a_wins else a}


def build() -> dict[str, list[dict]]:
    """All files: name -> rows. No prompt is in both a train and an eval file."""
    rng = random.Random(SEED)
    prompts = [(prompt_text(o, q, g), g) for o in OPENINGS for q in QUESTIONS for g in AISLE_OF]
    rng.shuffle(prompts)
    held_out, train = prompts[:48], prompts[48:]

    def pairs(source, count):
        return [preference(rng, *rng.choice(source), near_copy=i % 2 == 0) for i in range(count)]

    def demonstrations(source, count):  # as good as a crowd's: three of four aisles right, some rude, some rambling
        chosen = [rng.choice(source) for _ in range(count)]
        return [{"prompt": p, "completion": " ".join(answer(rng, g, right=0.75))} for p, g in chosen]

    def ranked(prompt, good):
        responses = list(dict.fromkeys(" ".join(answer(rng, good)) for _ in range(6)))
        return {"prompt": prompt, "responses": responses, "scores": [gold_score(prompt, r) for r in responses]}

    return {
        "preference_train.jsonl": pairs(train, 2000),
        "preference_eval.jsonl": pairs(held_out, 400),
        "sft_train.jsonl": demonstrations(train, 1000),
        "sft_eval.jsonl": demonstrations(held_out, 100),
        "prompts_train.jsonl": [{"prompt": p} for p, _ in train],
        "prompts_eval.jsonl": [{"prompt": p} for p, _ in held_out],
        "ranked_eval.jsonl": [ranked(p, g) for p, g in held_out],
    }


def build_toy(files: dict[str, list[dict]]) -> dict[str, str]:
    """The files of data/toy/: name -> text."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    names, letters = ["<pad>", "<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=names, initial_alphabet=letters, show_progress=False)
    rows = [row for name, rows in sorted(files.items()) if name.endswith("_train.jsonl") for row in rows]
    bpe.train_from_iterator((text for row in rows for text in row.values()), trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=1024
    )
    sizes = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4)
    tokens = dict(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    rest = dict(max_position_embeddings=1024, initializer_range=0.1, tie_word_embeddings=True, dtype=torch.float32)
    config = transformers.LlamaConfig(**sizes, **tokens, **rest, architectures=["LlamaForCausalLM"])
    with tempfile.TemporaryDirectory() as folder:
        for part in (tokenizer, config, transformers.GenerationConfig.from_model_config(config)):
            part.save_pretrained(folder)
        return {path.name: path.read_text(encoding="utf-8") for path in Path(folder).iterdir()}


def same(*texts: str) -> bool:
    """Whether files say the same, whichever release of transformers wrote them."""
    return len({re.sub(r'"transformers_version": "[^"]*"', "", text) for text in texts}) == 1


def main() -> None:
    files = build()
    texts = {name: "".join(json.dumps(row) + "\n" for row in rows) for name, rows in files.items()}
    for name, text in (texts | {f"toy/{name}": text for name, text in build_toy(files).items()}).items():
        path = DATA / name
        if not path.exists() or not same(path.read_text(encoding="utf-8"), text):
            path.write_text(text, encoding="utf-8")
            print(f"changed: {name}")


if __name__ == "__main__":
    main()
