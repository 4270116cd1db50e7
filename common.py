"""What is the same for any loss: process, flags, rows, batches, models, the DeepSpeed engine, metrics and files.

What the user can mend is an `InputError`: one line on stderr. Shapes: R rows of a micro batch, T tokens of a row,
N chosen positions, B pairs, V vocabulary, n rows of a data set.
"""

import os
from pathlib import Path

# Read when libraries are loaded, so scripts import this file first. Waiting threads spin for a moment: without it a
# small model loses a fifth of its rate, and with four times as much two runs at once are half as fast.
intel = (cpu := Path("/proc/cpuinfo")).exists() and "GenuineIntel" in cpu.read_text()
OURS = {"GOMP_SPINCOUNT": "5000" if intel else "2500", "TOKENIZERS_PARALLELISM": "true"}
OURS |= {"TRANSFORMERS_VERBOSITY": "error", "DATASETS_VERBOSITY": "critical"}
OURS |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
os.environ |= OURS | os.environ

import csv
import ctypes
import dataclasses
import datetime
import functools
import glob
import hashlib
import io
import json
import math
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, UserDict, defaultdict
from contextlib import contextmanager, suppress

import datasets
import deepspeed
import huggingface_hub
import numpy as np
import pyarrow.parquet
import torch
import torch.distributed as dist
import transformers
import tyro
from scipy.stats import kendalltau, spearmanr
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

warnings.filterwarnings("ignore", category=RuntimeWarning)  # a correlation or mean of nothing is NaN
DATA = Path(__file__).resolve().parent / "data"  # the embedded data set
NO_LABEL, MAX_GRAD_NORM = -100, 1.0
MODELS = "model policy_model reward_model ref_model judge_model encoder"
# Flags that --resume does not compare. Of models and data it compares the content.
FREE = "dataset eval_dataset ranked_dataset resume overwrite output_dir save_every keep log_every eval_every local_rank"


class InputError(Exception):
    """Something that the user can mend: what, where and how."""


class Unusable(Exception):
    """Why a row is left out, and counted."""


def said(error: BaseException) -> str:
    """What an exception says, in one line; of a chain the innermost, which has the reason."""
    while not isinstance(error, InputError) and error.__cause__:
        error = error.__cause__
    plain = isinstance(error, OSError) or type(error) in (InputError, ValueError)
    text = " ".join((str(error) if plain else f"{type(error).__name__}: {error}").split())
    return text if len(text) < 900 else f"{text[:600]} ... {text[-200:]}"


@contextmanager
def naming(what: str):
    """Whatever a library raises inside becomes one line that begins with `what`."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{what}: {said(error)}") from error


# -------- flags and process


def parse_args(args_class, preset, argv: list[str] | None = None):
    """Flags over `preset(task, constraint)` over the dataclass's own defaults; `--help` shows both. Data of the user's
    own cancel the evaluation data of the task."""
    options = {"args": argv, "console_outputs": os.environ.get("RANK", "0") == "0"}  # one usage message
    first = [("task", str, "toy"), ("constraint", str, "none"), ("dataset", str, ""), ("eval_dataset", str, "")]
    given, _ = tyro.cli(dataclasses.make_dataclass("Args", first), add_help=False, return_unknown_args=True, **options)
    values = preset(given.task, given.constraint)
    if given.dataset or given.eval_dataset:  # flags win over these
        values |= dict.fromkeys(vars(args_class).keys() & {"eval_dataset", "ranked_dataset"}, "")
    args = tyro.cli(args_class, default=args_class(**values), use_underscores=True, **options)
    counts = "max_new_tokens micro_batch_size log_every keep minibatches ppo_epochs"
    at_least = dict.fromkeys(counts.split(), 1) | {"temperature": 1e-3, "local_rank": -1}
    at_most = {"label_smoothing": 0.5, "gamma": 1, "gae_lambda": 1, "seed": 2**32 - 1}
    for name, value in vars(args).items():
        least, most = at_least.get(name, 0), at_most.get(name, sys.float_info.max)
        number = isinstance(value, int | float) and not re.match("beta|fixed_|random_", name)  # priors.py checks bounds
        if number and not least <= value <= most:
            raise InputError(f"--{name} is {value}, but must be a number from {least} to {most}")
    return args


@dataclasses.dataclass(frozen=True)
class Process:
    rank: int
    world_size: int
    device: torch.device


def say(message: str):
    """Print, on rank 0."""
    if dist.get_rank() == 0:
        tqdm.write(message)


def run(main, args_class, preset):
    """main(args). What ends a run early is its last line on the screen; the status is then 1, or 128 + the signal."""
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # a ? for what it lacks
    status = 0
    try:
        try:
            find_ranks()
            main(parse_args(args_class, preset))
        except SystemExit as end:  # on all ranks: wrong usage, a signal after its checkpoint, or nothing to do
            status = end.code or 0
        if dist.is_initialized():
            dist.barrier()  # rank 0 may still write
            dist.destroy_process_group()
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        status = 1
        on_signals(signal.SIG_DFL)  # the launcher's ends the sleep
        known = isinstance(error, InputError | OSError)
        lost = not known and re.search(r"(?i)by peer|broken pipe|gloo|nccl", str(error))
        time.sleep(10 * (os.environ.get("RANK", "0") != "0") + 10 * bool(lost))  # first the rank that knows why
        if not known:
            traceback.print_exc()
        tqdm.write(f"{Path(sys.argv[0]).name}: error: {said(error)}", file=sys.stderr)
    # Not sys.exit: a Gloo thread that still wants the GIL would abort the process (2 of 50, on busy cores).
    os._exit(status)


def find_ranks():
    """RANK, WORLD_SIZE and so on, also from srun's and mpirun's names; else of one process."""
    env, ours = os.environ, ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    slurm = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
    for theirs in (slurm, [f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]):
        if "RANK" not in env and int(env.get(theirs[1], 1)) > 1:
            env |= {name: re.match(r"\d+", env[their])[0] for name, their in zip(ours, theirs)}  # Slurm: "8(x2),4"
    env |= dict(zip(ours, "0101")) | env
    if env["WORLD_SIZE"] == "1":  # a port of its own, whatever started it
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "TORCHELASTIC_USE_AGENT_STORE": "False"}
    elif env["WORLD_SIZE"] == env["LOCAL_WORLD_SIZE"]:  # one machine
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"} | env


def start(seed: int) -> Process:
    """Join the other ranks, or be the only process."""
    find_ranks()
    rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    deepspeed.utils.logger.setLevel("ERROR")
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        deepspeed.ops.__compatible_ops__ = {}  # else a C++ all-reduce is compiled, for a minute
        if "OMP_NUM_THREADS" not in os.environ:  # ranks share the cores
            local_ranks = os.environ.get("LOCAL_SIZE") or os.environ["LOCAL_WORLD_SIZE"]  # deepspeed's, torchrun's
            torch.set_num_threads(max(1, torch.get_num_threads() // int(local_ranks)))
        if sys.platform == "linux":
            for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
                ctypes.CDLL(None).mallopt(parameter, 1 << 30)  # keep what is freed: mapping is slow
    deepspeed.init_distributed(verbose=False, timeout=datetime.timedelta(hours=2))  # rank 0 may work for long
    transformers.set_seed(seed)
    return Process(rank, world_size, device)


def on_rank_0(function, each_machine: bool = False):
    """function() on rank 0, or on the first rank of each machine; every rank gets rank 0's result, or the error."""
    result = failure = None
    if dist.get_rank() == 0 or each_machine and os.environ["LOCAL_RANK"] == "0":
        try:
            result = function()
        except (Exception, SystemExit) as error:  # the other ranks must not wait for ever
            failure = error
    message = failure if isinstance(failure, SystemExit | None) else InputError(said(failure))
    results, messages = zip(*gather_objects((result, message)))
    for error in filter(None, (failure, *messages)):
        raise error
    return results[0]


def gather_objects(item) -> list:
    """One object of each rank, in order."""
    # Alone without Gloo, whose threads cost a small model 40 %.
    items = [item] * dist.get_world_size()
    if len(items) > 1:
        dist.all_gather_object(items, item)
    return items


def interleaved(mine: list) -> list:
    """All ranks' items in order, of which a rank has every world_size-th."""
    parts = gather_objects(mine)
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """(k, share of the rank) of all ranks as (k, global batch), on the CPU."""
    return torch.cat(gather_objects(tensor.cpu()), 1)


def accumulation_steps(args) -> int:
    """Micro batches per step, of the largest size up to --micro_batch_size that divides a rank's share."""
    size, parts = args.global_batch_size, dist.get_world_size() * getattr(args, "minibatches", 1)
    share, rest = divmod(size, parts)
    if rest or not share:
        raise InputError(f"--global_batch_size {size} is no multiple of {parts}, ranks x --minibatches: change one")
    args.micro_batch_size = next(size for size in range(min(share, args.micro_batch_size), 0, -1) if share % size == 0)
    return share // args.micro_batch_size


# -------- files and caches


@contextmanager
def writing(path: Path):
    """A name to write to, which becomes `path` at the end: a file or folder is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(".part", dir=path.parent) as folder:
        yield Path(folder, path.name)
        shutil.rmtree(path, ignore_errors=True)  # of a folder
        os.replace(Path(folder, path.name), path)


def remove(path: Path):
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_file(path: Path, content: str):
    with writing(path) as part:
        part.write_text(content, encoding="utf-8")


def json_line(values: dict) -> str:
    """One line of JSON; a number that is not finite is null."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(clean) + "\n"


def digest(files) -> str:
    total = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


@functools.cache
def model_version(path: str, weights: bool = True) -> str:
    """What changes when the model does (without weights: its tokenizer): the Hub's commit, or a digest of its files."""
    if not Path(path).is_dir():
        return f"{path}@{Path(transformers.utils.cached_file(path, 'config.json')).parent.name}"
    files = sorted(file for file in Path(path).iterdir() if file.is_file())
    return digest(file for file in files if weights or file.suffix != ".safetensors")


def cache_path(kind: str, *content) -> Path:
    """Where what follows from `content` and the code is kept: below $PCRM_CACHE or ~/.cache/pcrm."""
    root = Path(os.environ.get("PCRM_CACHE") or Path.home() / ".cache" / "pcrm")
    code = digest(sorted(Path(__file__).parent.glob("*.py")))
    key = json.dumps([content, code, torch.__version__, transformers.__version__])
    return root / kind / hashlib.sha256(key.encode()).hexdigest()[:32]


def cached(kind: str, content: list, compute) -> torch.Tensor:
    """compute(), on all ranks; or what it gave when `content` was last the same."""
    path = cache_path(kind, *content).with_suffix(".npy")
    found = on_rank_0(lambda: np.load(path) if path.exists() else None)
    if found is None:
        found = compute().numpy()
        if dist.get_rank() == 0:
            with writing(path) as part:
                np.save(part, found)
    return torch.from_numpy(found)


# -------- results and checkpoints


def open_output(args, outputs: tuple[str, ...]) -> Path:
    """--output_dir with args.json in it. `outputs`: what the script writes there, at its end the last. Only a run with
    neither that nor a checkpoint is replaced unasked."""

    def make():
        if args.resume and not args.output_dir:
            raise InputError("--resume needs the --output_dir of the run that goes on")
        parts = (Path(sys.argv[0]).stem, getattr(args, "constraint", ""), f"{datetime.datetime.now():%Y%m%d-%H%M%S-%f}")
        folder = Path(args.output_dir or f"runs/{'-'.join(filter(None, parts))}")
        folder.mkdir(parents=True, exist_ok=True)
        args.output_dir, old = str(folder), folder / "args.json"
        theirs = json.loads(old.read_text(encoding="utf-8")) if old.exists() else {}
        if theirs.keys() != vars(args).keys() and any(path.suffix != ".part" for path in folder.iterdir()):
            raise InputError(f"--output_dir {folder} holds files of something else: choose another folder")
        for part in (*folder.glob("*.part"), *folder.glob("checkpoints/*.part")):  # of a run that was killed
            remove(part)
        finished = (folder / outputs[-1]).exists()
        what = "a finished run" if finished else "checkpoints of a run" if whole(folder) else ""
        if what and not args.resume and not args.overwrite:
            raise InputError(f"--output_dir {folder} holds {what}: choose another, or pass --resume or --overwrite")
        for name in sorted(theirs.keys() - f"{FREE} {MODELS}".split()) if what and args.resume else ():
            if (now := vars(args)[name]) != (then := theirs[name]):
                raise InputError(f"--resume: --{name} is {now}, but was {then} in {folder}")
        if args.resume and finished:
            say(f"{folder} holds this run, finished")
            sys.exit(0)
        if not what or not args.resume:
            for name in (*outputs[::-1], "checkpoints", "metrics.jsonl", "tensorboard"):
                if (folder / name).exists():  # after a kill nothing looks whole
                    remove((folder / name).rename(folder / f"{name}.part"))
            write_file(old, json.dumps(vars(args), indent=2) + "\n")
        return str(folder)

    args.output_dir = on_rank_0(make)
    return Path(args.output_dir)


def whole(folder: Path) -> list[Path]:
    """A run's whole checkpoints, the newest last."""
    return sorted(folder.glob("checkpoints/step-*[0-9]"), key=lambda path: int(path.name[5:]))


def on_signals(handler):
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


class Checkpoints:
    """checkpoints/step-N, every --save_every steps and after SIGTERM or SIGINT. --resume goes on to the same bits from
    `step`, 0 without a checkpoint, with the script's own `state`."""

    def __init__(self, metrics, args, rows, **engines):
        self.metrics, self.args, self.engines, self.folder = metrics, args, engines, Path(args.output_dir)
        self.step, self.state, self.signal = 0, {}, 0

        def read():  # now: files may change while the run goes on
            paths = {name: path for name, path in vars(args).items() if name in MODELS.split()}
            models = {f"--{name}": path and model_version(path) for name, path in paths.items()}
            files = [digest(file["filename"] for file in part.cache_files) for part in rows]
            same = models | {"the rows": files, "the number of ranks": dist.get_world_size()}
            newest = next(reversed(whole(self.folder)), None)
            return same, newest, newest and json.loads((newest / "state.json").read_text())

        if not metrics.total_steps:
            return
        self.same, newest, saved = on_rank_0(read)
        if newest:
            for name, now in self.same.items():
                if (then := saved["same"][name]) != now:
                    raise InputError(f"--resume: {name} is {now}, but was {then} in {newest}")
            with naming(f"{newest} cannot be read, delete it to go on from the one before"):
                for tag, engine in engines.items():
                    engine.load_checkpoint(str(newest), tag=tag)
            self.step, self.state = saved["step"], saved["state"]
            metrics.go_on(self.step, **saved["metrics"])
            say(f"resumed from {newest}")
        on_signals(lambda number, frame: setattr(self, "signal", number))  # step_done() reads it

    def rest_of(self, epoch: int, batches: np.ndarray) -> list[tuple]:
        """An epoch's (step, batch) that are still to be trained on."""
        steps = enumerate(batches, epoch * len(batches) + 1)
        return [(step, batch) for step, batch in steps if self.step < step <= self.metrics.total_steps]

    def step_done(self, step: int, **state):
        """After a step and its evaluation: a checkpoint if one is due; after a signal to any rank all end."""
        number = max(gather_objects(self.signal))
        if number or self.args.save_every and step % self.args.save_every == 0:
            self.save(step, state)
        if number:
            say(f"stopped after step {step}; to go on, add --resume --output_dir {self.folder}")
            sys.exit(128 + number)

    def save(self, step: int, state: dict):
        """The folder gets its name when all is in it."""
        path = self.folder / "checkpoints" / f"step-{step}"
        part = Path(f"{path}.part")

        def finish():
            metrics = {"history": self.metrics.history, "size": self.metrics.path.stat().st_size}
            saved = {"step": step, "state": state, "metrics": metrics, "same": self.same}
            (part / "state.json").write_text(json.dumps(saved))
            part.rename(path)
            for old in whole(self.folder)[: -self.args.keep]:
                remove(old.rename(f"{old}.part"))

        with naming(f"no checkpoint at step {step} (is the disk full?)"):
            for tag, engine in self.engines.items():
                engine.save_checkpoint(str(part), tag=tag, save_latest=False)
            on_rank_0(finish)


# -------- rows

DATA_FILE = re.compile(r"\.((json|jsonl|ndjson|csv)(\.(gz|bz2|zst))?|parquet)$")
# Columns that are never left out in silence, the second where none of them is read.
ASKING = "question", "query", "input", "system", "history", "context", "(no heading)"
PROMPTS = "prompt", "instruction", "messages", "post"


def find_rows(name: str, split: str):
    """What identifies rows by content, and a function that reads them. `name` is a file or pattern, here or at hf://, a
    folder, or a Hub id, and :SPLIT may follow: of a file the rows whose column `split` says so. Without it folders and
    the Hub give `split`, for evaluation else their only one."""
    path, wanted = (name, None) if Path(name).exists() else re.fullmatch(r"(.*?)(?::([\w.-]+))?", name).groups()
    if address := re.fullmatch(r"hf://datasets/([^/]+/[^/@]+)(?:@(refs/\w+/[^/]+|[^/]+))?/(.+)", path):
        repo, revision, pattern = address.groups()
        here = huggingface_hub.snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=pattern)
        path = f"{glob.escape(here)}/{pattern}"
    if not path or Path(path).is_file() or DATA_FILE.search(path):
        files = [Path(path)] if Path(path).is_file() else sorted(map(Path, glob.glob(path) or [path]))
    else:
        splits = find_splits(path)
        chosen = wanted or ([*splits][0] if len(splits) == 1 and split == "test" else split)
        if chosen not in splits:
            raise InputError(f"no split {chosen}, but {', '.join(splits)}: write {path}:SPLIT")
        files, wanted = splits[chosen], None
        if isinstance(files, datasets.Dataset):
            return [files._fingerprint], lambda: files
    content = [digest(files), [file.name for file in files], wanted]
    return content, lambda: [row for file in files for row in read_file(file) if wanted in (None, row.get("split"))]


def find_splits(path: str) -> dict:
    """The splits of a Hub id or a folder, each a data set or its files."""
    if not Path(path).is_dir():
        return datasets.load_dataset(path)
    if any(Path(path, saved).exists() for saved in ("state.json", "dataset_dict.json")):  # by save_to_disk
        splits = datasets.load_from_disk(path)
        return splits if isinstance(splits, dict) else {"train": splits}
    found = datasets.load_dataset_builder(path).config.data_files  # by their names, or as a README.md there says
    splits = {str(key): [Path(f) for f in files if DATA_FILE.search(f)] for key, files in found.items()}
    others = {file.name for file in Path(path).rglob("*") if DATA_FILE.search(file.name)}
    if others := others - {file.name for files in splits.values() for file in files}:
        print(f"{path}: of no split, and not read: {', '.join(sorted(others))}")
    return splits


def read_file(path: Path) -> list[dict]:
    """Rows of Parquet, CSV, a JSON list or JSON lines; texts stay the texts that they are."""
    with naming(path.name):
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path).to_pylist()
        with pyarrow.input_stream(str(path), compression="detect") as file:
            text = file.read().decode("utf-8-sig")
        if ".csv" in path.suffixes:
            csv.field_size_limit(1 << 30)
            return list(csv.DictReader(io.StringIO(text, newline=""), restkey="(no heading)", strict=True))
        if not text.lstrip().startswith("["):  # an object on each line, as one list
            text = "[" + re.sub(r"(\n\s*)(?=\{)", r"\1,", text.strip()) + "]"
        return json.loads(text)


class Row(UserDict):
    """A row that knows which of its columns have been asked for."""

    read = frozenset()

    def __getitem__(self, name):
        self.read |= {name}
        return self.data[name]


def encoded(rows, encode, notes: Path):
    """encode(row) of each row that is not Unusable; then `notes` says what was read and what left out."""
    read, every, dropped = set(), set(), Counter()
    for number, columns in enumerate(rows, 1):
        row = Row(columns)
        with naming(f"row {number}"):
            try:
                result = encode(row)
            except Unusable as error:
                dropped[str(error)] += 1
                continue
            names = ASKING + PROMPTS * row.read.isdisjoint(PROMPTS)
            asking = [name for name in columns if name not in row.read and columns[name] and name.lower() in names]
            if asking:
                raise ValueError(f"column {min(asking)!r} would not be read: rename it to prompt, join or remove it")
        read, every = read | row.read, every | columns.keys()
        # Lists as arrays, since one without elements has no type.
        yield {name: np.array(v, np.int32) if isinstance(v, list) else v for name, v in result.items()}
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    if not every:
        raise InputError(f"no usable row is left ({reasons})")
    facts = {"dropped": [reasons], "columns": sorted(every & read), "not read": sorted(every - read)}
    write_file(notes, "".join(f"; {what}: {', '.join(names)}" for what, names in facts.items() if any(names)))


def load_rows(flag: str, name: str, split: str, encode) -> datasets.Dataset:
    """What `encode(row)`, a functools.partial, makes of each row that is not Unusable: once for all starts, on disk, by
    the first rank of each machine."""

    def build():
        with naming(f"{flag} {name}"):
            content, read = find_rows(name, split)
            tokenizer = model_version(encode.keywords["tokenizer"].name_or_path, weights=False)
            path = cache_path("rows", content, encode.func.__name__, encode.keywords | {"tokenizer": tokenizer})
            notes = path.with_suffix(".txt")  # written before the rows are whole
            cache = {"cache_dir": str(path.parent), "fingerprint": path.name}
            rows = datasets.Dataset.from_generator(lambda: encoded(read(), encode, notes), **cache)
            return rows, notes.read_text(encoding="utf-8")

    rows, notes = on_rank_0(build, each_machine=True)
    say(f"{flag}: {len(rows)} rows{notes}")
    return rows


def column(rows, name: str) -> np.ndarray:
    """A column of numbers, (n,)."""
    return np.asarray(rows.with_format("numpy")[name][:])


def load_data(args, encode) -> tuple:
    """Rows to train on, none with --epochs 0, and held-out rows, of --eval_dataset or of --dataset."""
    if args.eval_dataset:
        held_out = load_rows("--eval_dataset", args.eval_dataset, "test", encode)
        rows = load_rows("--dataset", args.dataset, "train", encode) if args.epochs else held_out.select([])
        return rows, held_out
    rows = load_rows("--dataset", args.dataset, "train", encode)
    prompts, held_out, room = defaultdict(list), [], math.ceil(min(500, len(rows) / 10))
    for row, prompt in enumerate(rows["prompt"]):
        prompts[prompt or row].append(row)  # without a prompt each row is its own
    groups = list(prompts.values())
    for i in np.random.default_rng(args.seed).permutation(len(groups)):
        if len(held_out) + len(groups[i]) <= room:
            held_out += groups[i]
    if not held_out:
        raise InputError(f"--dataset {args.dataset}: no prompt has few enough rows to be held out: pass --eval_dataset")
    say(f"held out: {len(held_out)} rows, by whole prompts")
    train = sorted({*range(len(rows))} - {*held_out}) if args.epochs else []
    return rows.select(train), rows.select(sorted(held_out))


def load_ranked(args, encode) -> tuple:
    """Responses of --ranked_dataset, each the chosen one of a pair with the next, and each prompt's scores; of prompts
    with more than two responses, where all are usable."""
    pairs, human = [], []
    with naming(f"--ranked_dataset {args.ranked_dataset}"):
        for number, row in enumerate(find_rows(args.ranked_dataset, "test")[1]() if args.ranked_dataset else (), 1):
            with naming(f"row {number}"), suppress(Unusable):
                responses, scores = row["responses"], [float(score) for score in row["scores"]]
                if len(responses) != len(scores) or not np.isfinite(scores).all():
                    raise ValueError("scores must be a number for each of the responses")
                same = {"prompt": row["prompt"], "similarity": 1}  # which scores do not depend on
                partners = zip(responses, responses[1:] + responses[:1]) if len(responses) > 2 else ()
                own = [encode(same | {"chosen": a, "rejected": b}) for a, b in partners]
                pairs, human = pairs + own, human + [scores] * bool(own)
    if args.ranked_dataset:
        say(f"--ranked_dataset: {len(human)} prompts")
    return datasets.Dataset.from_list(pairs) if pairs else None, human


# -------- what a row says

# The columns of each format; the first that a row has is taken.
FORMATS = {
    "preference": ["chosen rejected", "preference output_1 output_2 instruction", "choice summaries info"],
    "demonstration": ["completion prompt", "messages", "output instruction", "summary post"],
    "prompt": ["prompt", "instruction", "post"],
}


def read_example(row: dict, tokenizer, kind: str) -> dict:
    """What a row in any known format says, a "preference" (chosen, rejected), a "demonstration" or its "prompt" alone:
    texts, tokens (answers with what ends them), and the user's last words (instruction, by which AlpacaEval knows a
    prompt). Unusable for ties and for missing or empty texts."""
    formats = FORMATS[kind] if kind != "prompt" else sum(FORMATS.values(), [])
    known = next((columns for columns in formats if row.keys() >= set(columns.split())), None)
    if known is None:
        needed = ", or ".join(columns.replace(" ", "/") for columns in formats)
        raise ValueError(f"the columns are {', '.join(row)}, but must be {needed}")
    prompt, answers = parts_of(row, known, kind)
    for part in (prompt, *answers):
        turns = isinstance(part, list) and all(isinstance(turn, dict) and turn.get("role") for turn in part)
        written = isinstance(part, str) and re.match(r"\s*\[\s*\{\s*['\"](role|content|from|value)['\"]", part)
        if written or not (turns or isinstance(part, str | None)):
            raise ValueError(f"{part!r:.80} is neither plain text nor a list of turns, each with role and content")
    if None in answers:
        raise Unusable("missing text")
    if any(isinstance(part, list) for part in (prompt, *answers)):
        return read_turns(prompt, answers, row.get("tools"), tokenizer, kind)
    if prompt is None:  # it is what the answers begin with, to the last turn or word within
        prompt = re.search(r"(?s)(.*\n\nAssistant:|.*\s|)", os.path.commonprefix(answers))[0].removesuffix(" ")
        answers = [answer.removeprefix(prompt) for answer in answers]  # with the blank before a word
    if not all(answer.strip() for answer in answers):
        raise Unusable("empty response")
    before, eos = beginning(tokenizer), [tokenizer.eos_token_id]
    ids, *answer_ids = tokenizer([prompt, *answers], add_special_tokens=False).input_ids
    return {
        "prompt": prompt,
        "prompt_ids": ids if ids[: len(before)] == before else before + ids,  # neither BOS nor EOS twice
        "instruction": prompt.removeprefix("\n\nHuman: ").removesuffix("\n\nAssistant: "),
        "answers": answers,
        "answer_ids": [ids if ids[-1:] == eos else ids + eos for ids in answer_ids],
    }


def parts_of(row: dict, known: str, kind: str) -> tuple:
    """A row's prompt, None where its answers begin with it, and its answers, each a text or a list of turns."""
    match known.split():
        case ["chosen", "rejected"]:
            return asked(row, "prompt", "instruction"), [row["chosen"], row["rejected"]]
        case ["preference", *_]:
            number = 1 if kind == "prompt" else row["preference"]
            if str(number).removesuffix(".0") not in ("0", "1", "2"):  # text in CSV
                raise ValueError(f"preference is {number!r:.80}, but must be 1, 2 or 0 (a tie)")
            if float(number) == 0:
                raise Unusable("tie")
            return asked(row, "instruction"), [row["output_1"], row["output_2"]][:: 1 if float(number) == 1 else -1]
        case ["choice", *_]:
            first, second = (summary["text"] for summary in row["summaries"])
            if isinstance(row["choice"], bool) or row["choice"] not in (0, 1):
                raise ValueError(f"choice is {row['choice']!r:.80}, but must be 0 or 1")
            return asked(row["info"], "post"), [first, second][:: -1 if row["choice"] else 1]
        case ["messages"]:
            *begun, last = row["messages"] or [None]
            if kind == "prompt" and isinstance(last, dict) and last.get("role") != "assistant":
                return row["messages"], []
            return begun, [last and [last]]
        case [answer, name]:
            return asked(row, name), [row[answer]] * (kind != "prompt" or isinstance(row[answer], list))
        case [name]:
            return asked(row, name), []


def asked(row: dict, *names: str) -> str | list | None:
    """The prompt in the first of these columns; an instruction or a post in the paper's wording."""
    name = next((name for name in names if name in row), None)
    if name and row[name] is None:  # null post: news
        raise Unusable("missing text")
    if name == "post":
        task = "Your task is to generate a short summary of a post."
        return f"\n\nHuman: {task}\n\nPost: {row['post']}\n\nSummary: \n\nAssistant: "
    if name != "instruction":
        return name and row[name]
    text, extra = row["instruction"], row.get("input") or ""
    repeated = text == extra or text.endswith((f" {extra}", f"\n{extra}"))  # the input is in the instruction already
    return f"\n\nHuman: {text if repeated else text + extra}\n\nAssistant: "


def read_turns(prompt, answers: list, tools, tokenizer, kind: str) -> dict:
    """A conversation by the tokenizer's chat template. Turns that all answers begin with belong to the prompt. Rendered
    and tokenized is the whole, as others score it; the answer is what follows the prompt."""

    def clean(value):  # without nulls, which Arrow puts where another turn has something
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        return json.loads(text, object_hook=lambda turn: {k: v for k, v in turn.items() if v is not None})

    def key(turn):
        content = turn.get("content") or ""
        return json.dumps(turn | {"content": content.strip() if isinstance(content, str) else content}, sort_keys=True)

    begun = clean([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or [])
    answers = [clean([{"role": "assistant", "content": a}] if isinstance(a, str) else a) for a in answers]
    shared = len(os.path.commonprefix([[key(turn) for turn in answer[:-1]] for answer in answers]))
    repeated, answers = answers[0][:shared] if answers else [], [answer[shared:] for answer in answers]
    # The answers may repeat the prompt, also behind other turns, or its end.
    ours, theirs = ([key(turn) for turn in turns] for turns in (begun, repeated))
    places = [(0, i) for i in range(len(theirs))] + [(own, 0) for own in range(len(ours) + 1)]
    own = next(own for own, i in places if theirs[i : i + len(ours) - own] == ours[own:])
    begun, answers = begun[:own] + repeated, answers if kind != "prompt" else []
    if not begun:
        raise Unusable("missing text")
    if any(answer[-1:] == [] or answer[-1]["role"] != "assistant" for answer in answers):
        raise Unusable("no answer at the end")
    if not all(str(turn.get("content") or "").strip() or turn.get("tool_calls") for a in answers for turn in a):
        raise Unusable("empty response")
    render = functools.partial(tokenizer.apply_chat_template, tools=clean(tools) or None, tokenize=False)
    start, wholes = render(begun, add_generation_prompt=True), [render(begun + answer) for answer in answers]
    if not all(whole.startswith(start) for whole in wholes):
        raise ValueError("the chat template does not go on with an answer where it asks for one")
    texts = [whole.removeprefix(start) for whole in wholes]
    prompt_ids, *whole_ids = tokenizer([start, *wholes], add_special_tokens=False).input_ids
    answer_ids = [ids[len(prompt_ids) :] for ids in whole_ids]
    if not all(ids[: len(prompt_ids)] == prompt_ids for ids in whole_ids):  # its last token grows with the answer
        answer_ids = tokenizer(texts, add_special_tokens=False).input_ids
    return {
        "prompt": start,
        "prompt_ids": prompt_ids,
        "instruction": str(next((turn.get("content", "") for turn in begun[::-1] if turn["role"] == "user"), "")),
        "answers": texts,
        "answer_ids": [ended(ids, tokenizer) for ids in answer_ids],
    }


def ended(ids: list[int], tokenizer) -> list[int]:
    """An answer up to the first special token behind its text, nothing after it; without one, with EOS."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {tokenizer.eos_token_id}
    behind = len(ids)
    while behind and (ids[behind - 1] in special or not tokenizer.decode(ids[behind - 1 : behind]).strip()):
        behind -= 1
    end = next((place for place in range(behind, len(ids)) if ids[place] in special), None)
    return ids + [tokenizer.eos_token_id] if end is None else ids[: end + 1]


@functools.cache
def beginning(tokenizer) -> list[int]:
    """What the tokenizer itself puts before a text."""
    ids, plain = (tokenizer("a", add_special_tokens=special).input_ids for special in (True, False))
    return next((ids[:i] for i in range(len(ids)) if ids[i : i + len(plain)] == plain), [])


def encode_pair(row: dict, tokenizer, max_length: int, given: bool = False, needs_prompt: bool = False) -> dict:
    """The columns of a pair: texts, tokens, how many both sequences begin with (prefix), and how many follow in each.
    given: also the row's own similarity."""
    columns = read_example(row, tokenizer, "preference")
    chosen, rejected = (columns["prompt_ids"] + ids for ids in columns.pop("answer_ids"))
    if chosen == rejected:
        raise Unusable("identical responses")
    if needs_prompt and not columns["prompt_ids"]:
        raise Unusable("prompt without a token")
    if max(len(chosen), len(rejected)) > max_length:
        raise Unusable(f"longer than --max_length {max_length}")  # Upstream: truncated
    prefix = len(os.path.commonprefix([chosen[:-1], rejected[:-1]]))  # each has a token of its own
    columns |= dict(zip(("chosen", "rejected"), columns.pop("answers")), chosen_ids=chosen, rejected_ids=rejected)
    columns |= dict(prefix=prefix, chosen_length=len(chosen) - prefix, rejected_length=len(rejected) - prefix)
    columns["row_length"] = len(chosen) + len(rejected) - prefix
    if given:
        columns["similarity"] = float(row["similarity"])
        if not 0 < columns["similarity"] <= 1:
            raise ValueError(f"similarity is {columns['similarity']}, but --constraint given needs it in (0, 1]")
    return columns


# -------- batches


def total_steps(args, rows: int) -> int:
    """Optimizer steps of the run; InputError where the rows do not fill one."""
    size = args.global_batch_size
    if args.epochs and rows < size:
        raise InputError(f"{rows} rows, without the held-out ones, do not fill a --global_batch_size {size}: lower it")
    return min(args.epochs * (rows // size), args.max_steps or sys.maxsize)


def global_batches(lengths: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: steps x size row numbers, a function of (seed, epoch) and the data alone. Like lengths
    come together: shuffled rows are sorted in windows of 50 global batches and cut, and the batches shuffled."""
    rng = np.random.default_rng([seed, epoch])
    # Rows too many go before sorting: later they would always be the longest.
    order = rng.permutation(len(lengths))[: len(lengths) // size * size]
    order = order[np.lexsort((lengths[order], np.arange(len(order)) // (50 * size)))]
    return rng.permutation(order.reshape(-1, size))


def padded(rows: list[list], value, device) -> torch.Tensor:
    """Rows padded on the right, (R, T), or of tuples (R, T, their length)."""
    width = max(map(len, rows))
    return torch.tensor(np.array([row + [value] * (width - len(row)) for row in rows]), device=device)


def collate_rows(ids: list[list[int]], starts: list[int], pad_token_id: int, device) -> dict:
    """Inputs for R rows, padded on the right, where causal attention needs no mask: input_ids (R, T); labels (R, T),
    the next token from each row's start on, else -100."""
    labels = [[NO_LABEL] * (start - 1) + row[start:] + [NO_LABEL] for row, start in zip(ids, starts)]
    return {"input_ids": padded(ids, pad_token_id, device), "labels": padded(labels, NO_LABEL, device)}


def response_row(ids: list[int], branch: int, fork: int = 0) -> list[tuple]:
    """(id, the next one or -100, branch, position) of each token; up to the fork the branch is 0."""
    return list(zip(ids, ids[1:] + [NO_LABEL], [0] * fork + [branch] * (len(ids) - fork), range(len(ids))))


def shared_row(chosen: list[int], rejected: list[int], prefix: int) -> list[tuple]:
    """The one row [prefix | chosen | rejected]. It forks a token early, so that each position predicts one token."""
    fork = max(prefix - 1, 0)
    return response_row(chosen, 1, fork) + response_row(rejected, 2, fork)[fork:]


def collate_pairs(batch: dict[str, list], pad_token_id: int, share_prefix: bool, dtype, device) -> tuple:
    """Inputs for B pairs (columns chosen_ids, rejected_ids, prefix), padded on the right; labels (R, T), the next token
    of the same response, else -100; branch (R, T), 0 what both responses begin with, 1 chosen, 2 rejected, -1 padding;
    positions (R, T). With a shared prefix R = B rows: rejected does not see chosen, and its positions restart. Else, or
    where fewer tokens result, R = 2 B rows, a pair's two together, and no mask."""
    pairs = list(zip(batch["chosen_ids"], batch["rejected_ids"], batch["prefix"]))
    width = max(max(len(chosen), len(rejected)) for chosen, rejected, _ in pairs)
    shared = share_prefix and max(len(c) + len(r) - max(prefix - 1, 0) for c, r, prefix in pairs) < 2 * width
    if shared:
        rows = [shared_row(*pair) for pair in pairs]
    else:
        rows = [response_row(ids, branch) for *both, _ in pairs for branch, ids in enumerate(both, 1)]
    ids, labels, branch, positions = padded(rows, (pad_token_id, NO_LABEL, -1, 0), device).unbind(2)  # each R T
    inputs = {"input_ids": ids}
    if shared:
        visible = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])  # R T T
        mask = torch.zeros(visible.shape, dtype=dtype, device=device)
        mask.masked_fill_(~visible.tril(), torch.finfo(dtype).min)
        inputs |= {"position_ids": positions, "attention_mask": mask[:, None]}  # R 1 T T
    return inputs, labels, branch, positions


@torch.no_grad()
def over_rows(module, forward, rows, args) -> torch.Tensor:
    """forward(columns of B rows), (B, k), for all rows: (n, k) fp32 on the CPU of every rank."""
    module.eval()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    order = np.argsort(-column(rows, "row_length"), kind="stable")
    batches = [order[i : i + args.micro_batch_size] for i in range(0, len(order), args.micro_batch_size)]
    batches += batches[-1:] * (-len(batches) % ranks)  # at ZeRO-3 each rank must run equally many
    mine = [forward(rows[batch]).float() for batch in batches[rank::ranks]]  # each B k
    results = torch.cat(interleaved([each.cpu() for each in mine]))[: len(order)][np.argsort(order)]  # n k
    module.train()
    if not results.isfinite().all():
        raise InputError("evaluation: a score is not finite: the model's weights are broken")
    return results


# -------- metrics


def margin_metrics(margin, bound, rank_loss, constraint_loss) -> dict[str, float]:
    """What any loss says of some pairs' margins, bounds (NaN: none) and the loss's terms, each (n,)."""
    return {
        "loss": (rank_loss + constraint_loss).mean().item(),
        "rank_loss": rank_loss.mean().item(),
        "constraint_loss": (constraint_loss + 0 * bound).mean().item(),
        "accuracy": (margin > 0).float().mean().item(),
        "margin_mean": margin.mean().item(),
        "margin_std": margin.std(correction=0).item(),
        "margin_max": margin.max().item(),
        "bound_mean": bound.mean().item(),
        "over_bound": ((margin > bound) + 0 * bound).mean().item(),
    }


def correlations(margin, similarity, pairs, scores: list[float], human: list[list[float]]) -> dict[str, float]:
    """How well length alone ranks the pairs; whether margins grow where responses differ; of ranked responses the rank
    correlation of scores with the human ones, the mean over prompts."""
    longer = np.sign(np.subtract(column(pairs, "chosen_length"), column(pairs, "rejected_length")))
    scores = iter(scores)
    both = [([next(scores) for _ in own], own) for own in human]
    return {
        "length_accuracy": float((longer + 1).mean() / 2),  # ties: a half
        "spearman_similarity": float(spearmanr(margin, similarity).statistic),
        "ranked_spearman": float(np.nanmean([spearmanr(*pair).statistic for pair in both])),
        "ranked_kendall": float(np.nanmean([kendalltau(*pair).statistic for pair in both])),
    }


class Metrics:
    """metrics.jsonl and TensorBoard; `shown` are the keys that a terminal gets."""

    def __init__(self, args, total_steps: int, shown: tuple[str, ...]):
        self.log_every, self.total_steps, self.shown = args.log_every, total_steps, shown
        self.path, self.board, self.purge_step = Path(args.output_dir, "metrics.jsonl"), None, None
        self.history, self.amounts, self.since = [], Counter(), time.perf_counter()

    def go_on(self, step: int, history: list[dict], size: int):
        """Go on after a step; what the file has got since then is cut off."""
        self.history, self.purge_step, self.since = history, step + 1, time.perf_counter()
        if dist.get_rank() == 0:
            os.truncate(self.path, size)

    def add(self, step: int, values: dict, last: bool = False, **amounts: int) -> bool:
        """Every --log_every steps write the values' means, and amounts per second; whether it wrote."""
        self.history.append({name: float(value) for name, value in values.items()})
        self.amounts.update(amounts)
        if not (last or step in (1, self.total_steps) or step % self.log_every == 0):
            return False
        means = {name: float(np.mean([line[name] for line in self.history])) for name in values}
        seconds, self.history = time.perf_counter() - self.since, []
        self.write(step, "train", means | {f"{name}_per_s": n / seconds for name, n in self.amounts.items()})
        return True

    def write(self, step: int, split: str, values: dict):
        if dist.get_rank() == 0:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json_line({"step": step, "split": split, **values}))
            self.board = self.board or SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=self.purge_step)
            for name, value in values.items():
                if math.isfinite(value):
                    self.board.add_scalar(f"{split}/{name}", value, step)
            self.board.flush()
        shown = [f"{name} {values[name]:.4g}" for name in self.shown if name in values]
        say(f"step {step} of {self.total_steps}, {split}: {', '.join(shown)}")
        self.amounts, self.since = Counter(), time.perf_counter()


# -------- models


def toy_model() -> str:
    """The embedded task's starting model, a Llama of 0.9 million random weights, made at first use."""
    folder = cache_path("toy", digest(sorted((DATA / "toy").iterdir())))
    if not folder.exists():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(DATA / "toy"))
        with writing(folder) as part:
            shutil.copytree(DATA / "toy", part)
            model.save_pretrained(part)
    return str(folder)


def load_tokenizer(path: str, trust_remote_code: bool):
    """The model's tokenizer, with EOS and a padding token that is not EOS: the last token that is not padding has the
    score. Where it has none, an unused special token serves (Llama-2: <unk>)."""
    with naming(f"tokenizer {path}"):
        remote = {"trust_remote_code": trust_remote_code}
        transformers.AutoConfig.from_pretrained(path, **remote)  # says so where a folder has no model
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **remote)
        if tokenizer.eos_token_id is None:
            raise ValueError("no EOS token, which ends every response")
        taken = {tokenizer.eos_token, tokenizer.bos_token, None}
        if tokenizer.pad_token in taken:
            special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
            free = [each for each in special if each not in taken and each not in str(tokenizer.chat_template or "")]
            if not free:
                raise ValueError("no padding token but EOS, and none to lend: set pad_token in tokenizer_config.json")
            tokenizer.pad_token = min(free, key=lambda each: ("pad" not in each.lower(), each != tokenizer.unk_token))
    return tokenizer


def check_tokenizer(flag: str, path: str, tokenizer, trust_remote_code: bool):
    """InputError unless the model at `path` has the same tokens, and begins and ends a text alike."""
    both = (tokenizer, load_tokenizer(path, trust_remote_code))
    ours, theirs = ((each.get_vocab(), each.eos_token, beginning(each)) for each in both)
    if ours != theirs:
        raise InputError(f"{flag} {path} has another vocabulary, BOS or EOS token than {tokenizer.name_or_path}")


def encoder_of(args, start: str) -> str:
    """--encoder of cos_sim, by default the model that training starts from."""
    if args.constraint != "cos_sim":
        return ""
    if not (args.encoder or args.epochs):
        raise InputError("--constraint cos_sim with --epochs 0 needs the --encoder of training")
    return args.encoder or start


def load_model(auto_class, flag: str, path: str, args, tokenizer, engine_config: dict, **values):
    """`auto_class.from_pretrained(path)` without dropout, and its loading information (`missing_keys` are new)."""
    # While this object lives, from_pretrained shards what it loads.
    sharding = transformers.integrations.HfDeepSpeedConfig(engine_config) if args.zero_stage == 3 else None
    with naming(f"{flag} {path}"):
        if transformers.utils.find_adapter_config_file(path):
            raise ValueError("adapter_config.json: an adapter is not read; merge it into the weights")
        remote = {"trust_remote_code": args.trust_remote_code}
        config = transformers.AutoConfig.from_pretrained(path, **remote)
        config.update(values | {"pad_token_id": tokenizer.pad_token_id})
        for part in (config, config.get_text_config()):  # two where a model also sees pictures
            rates = [k for k, v in vars(part).items() if isinstance(v, float) and re.search("drop|jitter", k)]
            part.update(dict.fromkeys(rates, 0.0))
        options = {"dtype": torch.bfloat16 if args.dtype == "bf16" else torch.float32, "use_safetensors": True}
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = auto_class.from_pretrained(path, config=config, **options, **remote)
        for name, found, wanted in info["mismatched_keys"]:
            raise ValueError(f"{name} has the shape {tuple(found)} in its weights, but {tuple(wanted)} is needed")
        rows = model.get_input_embeddings().num_embeddings
        if (last := max(tokenizer.get_vocab().values())) >= rows:
            raise ValueError(f"{rows} embeddings, but token {last} is {tokenizer.convert_ids_to_tokens(last)!r}")
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or args.max_length
        if args.max_length > positions:
            raise ValueError(f"{positions} positions for rows of up to {args.max_length} tokens: lower --max_*")
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable()
    del sharding
    return model, info


def load_language_model(flag: str, path: str, args, tokenizer, engine_config: dict):
    """A causal language model. Its generation_config names what ends an answer: the tokenizer's EOS, those that it
    listed, and what the chat template writes behind an answer."""
    model, info = load_model(transformers.AutoModelForCausalLM, flag, path, args, tokenizer, engine_config)
    if info["missing_keys"] or any(name.startswith("score.") for name in info["unexpected_keys"]):
        keys = f"missing {sorted(info['missing_keys'])}, unexpected {sorted(info['unexpected_keys'])}"
        raise InputError(f"{flag} {path} is no language model: {keys}")
    listed = model.generation_config.eos_token_id
    ends = set(listed if isinstance(listed, list) else [listed]) & tokenizer.added_tokens_decoder.keys()
    if tokenizer.chat_template:
        with suppress(Exception):  # a template that refuses this
            ends.add(read_turns("a", ["a"], None, tokenizer, "demonstration")["answer_ids"][0][-1])
    ends = sorted((ends | {tokenizer.eos_token_id}) - {tokenizer.pad_token_id})
    # Without the model's own top-p, suppressed tokens and the like.
    model.generation_config = transformers.GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    return model


class Scorer(torch.nn.Module):
    """A sequence classifier called as a language model is: logits are scores (N,) fp32 where logits_to_keep (R, T)."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier, self.config, self.dtype = classifier, classifier.config, classifier.dtype

    def forward(self, logits_to_keep: torch.Tensor, use_cache: bool = False, **inputs):
        hidden = self.classifier.base_model(use_cache=use_cache, **inputs).last_hidden_state  # R T H
        scores = self.classifier.score(hidden[logits_to_keep]).squeeze(-1).float()  # N
        return transformers.modeling_outputs.SequenceClassifierOutput(logits=scores)


def load_reward_model(flag: str, path: str, args, tokenizer, engine_config: dict, new_head: bool = False) -> Scorer:
    """A sequence classifier with one label; a new head is drawn from --seed."""
    kind, labels = transformers.AutoModelForSequenceClassification, {"num_labels": 1, "problem_type": "regression"}
    model, info = load_model(kind, flag, path, args, tokenizer, engine_config, **labels)
    missing = set(info["missing_keys"])
    if not hasattr(model, "score") or missing - ({"score.weight"} if new_head else set()):
        raise InputError(f"{flag} {path} is no decoder with a `score` head; missing {sorted(missing)}")
    with torch.device("meta"):  # what a language model of this kind has beside its body
        causal = transformers.AutoModelForCausalLM.from_config(model.config, trust_remote_code=args.trust_remote_code)
    ignored = "|".join([r"^embed_out\.", *(causal._keys_to_ignore_on_load_unexpected or [])])  # GPT-NeoX's on disk
    unused = {key for key in info["unexpected_keys"] if not re.search(ignored, key)} - causal.state_dict().keys()
    if unused:
        raise InputError(f"{flag} {path}: {sorted(unused)} would not be used; a head is score.weight alone")
    if missing:
        std = getattr(model.config.get_text_config(), "initializer_range", None) or 0.02
        with deepspeed.zero.GatheredParameters(model.score.weight, modifier_rank=0):
            head = torch.randn(model.score.weight.shape, generator=torch.Generator().manual_seed(args.seed))
            model.score.weight.data.copy_(head * std)
        say("score head: new, drawn from --seed")
    return Scorer(model)


def token_logps(model, labels: torch.Tensor, temperature: float = 1.0, **inputs) -> torch.Tensor:
    """log π of each label (R, T) that is not -100, row after row: (N,) fp32."""
    keep = labels != NO_LABEL  # R T
    logits = model(logits_to_keep=keep, use_cache=False, **inputs).logits  # N V
    logits = logits[keep] if logits.dim() == 3 else logits  # a model with code of its own may keep all

    def logps(logits, labels):
        logits = logits.float() if temperature == 1 else logits.float() / temperature
        return -torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    size = 64 if logits.device.type == "cpu" else 4096  # rows whose fp32 copy fits a cache; it is not kept
    parts = zip(logits.split(size), labels[keep].split(size))
    return torch.cat([checkpoint(logps, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])


def check_model(engine, model, args, process) -> bool:
    """Whether a pair may share one row, by scoring a made-up pair both ways. Sets model.reads_padding: whether padding
    before a prompt changes what follows."""
    config, fork = model.config.get_text_config(), max(4, min(args.max_length, 64) // 2)
    prefix, chosen, rejected = np.random.default_rng(0).integers(config.vocab_size, size=(3, fork)).tolist()
    batch = {"chosen_ids": [prefix + chosen], "rejected_ids": [prefix + rejected], "prefix": [fork]}

    def outputs(keep, **inputs):
        logits = engine(logits_to_keep=keep, use_cache=False, **inputs).logits
        return (logits[keep] if logits.dim() == 3 else logits).float()

    def pair(share):
        """Of chosen, then of rejected, from the fork on."""
        inputs, _, branch, positions = collate_pairs(batch, 0, share, model.dtype, process.device)
        return outputs((branch > 0) & (positions >= fork - 1), **inputs)

    def alike(some, others):
        return bool((some - others).abs().max() <= (1e-3 if args.dtype == "fp32" else 0.05) * apart.abs().max())

    engine.train()
    apart = pair(False)
    if not apart.isfinite().all():
        raise InputError(f"{config.name_or_path}: scores are not finite: broken weights, or too large for {args.dtype}")
    ids = torch.tensor([[0] * 16 + prefix + chosen], device=process.device)
    mask = torch.arange(ids.shape[1], device=process.device)[None] >= 16
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    model.reads_padding = True
    with suppress(Exception):  # it takes no mask or no positions
        model.reads_padding = not alike(outputs(mask.cumsum(1) == fork, **inputs), apart[:1])
    limits = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    if any(limit and limit < args.max_length for limit in limits):  # 64 tokens do not show it
        return False
    with suppress(Exception):
        return alike(pair(True), apart)
    return False


# -------- engine


def engine_config(args, accumulation: int) -> dict:
    # DeepSpeed offloads from stage 1 on, and at stage 0 its bf16 optimizer would step once on no gradient.
    args.zero_stage = max(args.zero_stage, int(args.dtype == "bf16" or args.offload))
    to_cpu = {"device": "cpu", "pin_memory": torch.cuda.is_available()} if args.offload else None
    return {
        "train_micro_batch_size_per_gpu": args.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": MAX_GRAD_NORM if args.zero_stage else 0.0,
        "bf16": {"enabled": args.dtype == "bf16"},
        "zero_optimization": {"stage": args.zero_stage, "offload_optimizer": to_cpu, "offload_param": to_cpu},
        "zero_force_ds_cpu_optimizer": False,  # torch's serves too, and compiles nothing
    }


def make_engine(module, args, config: dict, total_steps: int, process):
    """A DeepSpeed engine with AdamW (0.9, 0.95), a cosine schedule, and no weight decay on biases and norm weights.
    With no steps to run it has no optimizer, and below ZeRO-3 is the module itself."""
    if total_steps == 0:
        module = module.requires_grad_(False).to(process.device)
        return deepspeed.initialize(model=module, config=config)[0] if args.zero_stage == 3 else module
    shapes = {p: getattr(p, "ds_shape", p.shape) for p in module.parameters()}  # ZeRO-3 empties the parameters
    numbers = sum(map(math.prod, shapes.values()))
    if getattr(args, "task", "") == "toy" and numbers > 5_000_000:
        how = f"pass --task, or one for {numbers / 1e6:,.0f} million parameters"
        say(f"settings not given are those of --task toy, learning rate {args.learning_rate:g}: {how}")
    # DeepSpeed's default takes a gigabyte for the smallest model.
    config["zero_optimization"]["reduce_bucket_size"] = min(numbers, 500_000_000)
    groups = [{"params": [], "weight_decay": decay} for decay in (args.weight_decay, 0.0)]
    for parameter, shape in shapes.items():
        groups[len(shape) < 2]["params"].append(parameter)
    groups = [group for group in groups if group["params"]]  # OLMo has no norm weights
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, args.warmup_steps, total_steps)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, lr_scheduler=schedule, config=config)
    engine.enable_backward_allreduce = args.zero_stage > 0 or dist.get_world_size() > 1  # alone it only copies
    return engine


def optimizer_step(step: int, *engines) -> list[float]:
    """The last step() of a global batch for each (engine, its args); the gradients' norms before clipping.
    InputError on all ranks where one is not finite, which DeepSpeed skips in silence or writes into the weights."""
    norms = []
    for engine, args in engines:
        if args.zero_stage == 0:  # where the engine tells no norm
            norm = torch.nn.utils.clip_grad_norm_(engine.module.parameters(), MAX_GRAD_NORM)
        engine.step()
        norms.append(float(engine.get_global_grad_norm() if args.zero_stage else norm))  # inf: skipped
        if not math.isfinite(norms[-1]):
            how = f"lower the learning rate ({args.learning_rate:g}), look at the data, or use --dtype fp32"
            raise InputError(f"step {step}: the gradient is not finite: {how}")
    return norms


@contextmanager
def unsharded(engine):
    """Inside, every rank has all weights: ranks may generate for different numbers of steps."""
    if not isinstance(engine, deepspeed.DeepSpeedEngine) or engine.zero_optimization_stage() < 3:
        yield
        return
    sharding = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        sharding._remove_module_hooks()  # they would shard each layer again
        sharding.forward_hooks, sharding.backward_hooks = [], []
        yield
    sharding.setup_zero_stage3_hooks()


def save_model(engine, model, tokenizer, folder: Path):
    """Write a Hugging Face folder of `model`, engine.module or a part of it, with its tokenizer."""
    on_signals(signal.SIG_DFL)  # no step follows
    weights = engine._zero3_consolidated_16bit_state_dict() if engine.zero_optimization_stage() == 3 else None
    weights = weights and {name.removeprefix("classifier."): value for name, value in weights.items()}  # a Scorer's

    def write():
        with naming(f"cannot write {folder}"), writing(folder) as part:
            model.save_pretrained(part, state_dict=weights)
            tokenizer.save_pretrained(part)

    on_rank_0(write)


# -------- answers and pictures


def drawn(points, temperature: float, input_ids, scores: torch.Tensor) -> torch.Tensor:
    """Scores (R, V) that leave greedy decoding the drawn tokens alone. `points` gives each row's next random number
    (R, 1): what a row draws does not depend on those beside it."""
    cumulated = (scores.float() / temperature).softmax(-1).double().cumsum(-1)  # R V
    token = torch.searchsorted(cumulated, next(points) * cumulated[:, -1:], right=True)  # R 1
    return torch.full_like(scores, -math.inf).scatter_(1, token, 0.0)


@torch.no_grad()
def sample(engine, model, tokenizer, prompts, rooms, seeds, size: int, temperature: float = 1.0) -> list[list[int]]:
    """An answer to each of this rank's prompts, with what ends it where it ends within its room (in tokens), drawn from
    the model's own distribution. An answer is a function of its prompt and its seed."""
    engine.eval()
    answers, ends = [None] * len(prompts), model.generation_config.eos_token_id
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    with unsharded(engine):
        batches = []
        for row in sorted(range(len(prompts)), key=lambda row: len(prompts[row])):
            length, first = len(prompts[row]), batches[-1][0] if batches else 0
            # A batch takes its longest prompt plus its largest room, the shortest prompt's.
            full = not batches or len(batches[-1]) == size or length + rooms[first] > positions
            if full or model.reads_padding and length > len(prompts[first]):
                batches.append([])
            batches[-1].append(row)
        for rows in batches:
            ids = {"input_ids": [prompts[row] for row in rows]}
            inputs = tokenizer.pad(ids, padding_side="left", return_tensors="pt").to(model.device)
            width, length = inputs.input_ids.shape[1], max(rooms[row] for row in rows)
            points = torch.tensor(np.stack([np.random.default_rng(seeds[row]).random(length) for row in rows]))
            draw = [functools.partial(drawn, iter(points.to(model.device).T[..., None]), temperature)]
            output = model.generate(**inputs, logits_processor=draw, max_new_tokens=length, do_sample=False)  # R T+L
            for row, answer in zip(rows, output[:, width:].tolist()):
                end = next((place for place, token in enumerate(answer, 1) if token in ends), len(answer))
                answers[row] = answer[: min(end, rooms[row])]
    engine.train()
    return answers


def answer_prompts(engine, model, tokenizer, rows, args):
    """Answers to the first --generate different prompts of the rows: print some, and write all."""
    _, firsts = np.unique(np.array(rows["prompt"][:], object), return_index=True)
    rows = rows.select(sorted(firsts)[: args.generate])
    mine = range(dist.get_rank(), len(rows), dist.get_world_size())
    seeds, prompts = [[args.seed, row] for row in mine], rows["prompt_ids"][mine]
    rooms = [args.max_length - len(prompt) for prompt in prompts]
    answers = sample(engine, model, tokenizer, prompts, rooms, seeds, args.micro_batch_size)
    texts = interleaved(tokenizer.batch_decode(answers, skip_special_tokens=True))
    for prompt, answer in list(zip(rows["prompt"], texts))[:3]:
        say(f"sample: {prompt!r} -> {answer!r}")
    write_generations(list(zip(rows["instruction"], texts)), args)


def write_generations(answers: list[tuple[str, str]], args):
    """(instruction, answer) as AlpacaEval reads them: the last file of a run."""
    folder = Path(args.output_dir)
    results = [{"instruction": text, "output": answer, "generator": folder.name} for text, answer in answers]
    if dist.get_rank() == 0:
        write_file(folder / "generations.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def plot_margins(lines: list[dict], args, path: Path):
    """Margin and bound of each pair against its similarity."""
    from matplotlib.figure import Figure

    similarity, margin, bound = (np.array([x[name] for x in lines]) for name in ("similarity", "margin", "bound"))
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axis = figure.subplots()
    axis.scatter(similarity, margin, s=8, alpha=0.5, linewidths=0, label="margin")
    if args.constraint != "none":
        axis.scatter(similarity, bound, s=3, color="C3", label="bound δ*")
    axis.legend()
    axis.set(xlabel="similarity s", ylabel="margin", title=f"{args.constraint}: largest margin {margin.max():.1f}")
    axis.set_ylim(margin.min() - 0.5, max(margin.max(), 6) * 1.6)
    figure.savefig(path)
