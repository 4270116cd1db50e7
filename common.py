"""What is the same for any loss: process, flags, rows, batches, models, the DeepSpeed engine, metrics and files.

Nothing of a method lives here. A script calls, in this order: run, check_flags, start, engine_config, load_tokenizer,
load_data, load_language_model or load_reward_model, make_engine, check_model, open_output, Metrics, optimizer_step,
save_model. Errors that the user can mend are `InputError`s: one line on stderr.

Symbols in the shapes: R rows of a micro batch, T tokens of a row, N chosen positions, B pairs, V vocabulary, n rows.
"""

import os

# Read when torch is loaded, so scripts import this file first. Idle threads that spin slow down whatever else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import contextlib
import csv
import ctypes
import dataclasses
import datetime
import errno
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
import threading
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import datasets
import deepspeed
import filelock
import huggingface_hub
import numpy as np
import pyarrow.parquet
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
import tyro
from datasets.arrow_writer import ArrowWriter
from safetensors import SafetensorError
from scipy.stats import kendalltau, spearmanr
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

CONSTANT = "An input array is constant|Mean of empty slice|One or more sample arg"
warnings.filterwarnings("ignore", message=CONSTANT)  # a correlation is NaN then, null in files
DATA = Path(__file__).resolve().parent / "data"  # the embedded data set
NO_LABEL = -100
LOCKS = []  # of output folders, until the process ends
ENDING = threading.Event()  # set when this rank ends
MODEL_FLAGS = ("model", "ref_model", "policy_model", "reward_model", "judge_model", "encoder")
# Flags that --resume may change: neither weights nor answers depend on them.
FREE_FLAGS = "resume overwrite output_dir save_every keep log_every eval_every local_rank".split()


class InputError(Exception):
    """Something that the user can mend. The message says what, where and how, in one line, not too long."""

    def __init__(self, message):
        message = re.sub(r"\s*\n\s*", " ", str(message))
        super().__init__(message if len(message) < 900 else f"{message[:600]} ... {message[-200:]}")


class Stopped(InputError):
    """A signal has ended the run, after a checkpoint."""


class Unusable(Exception):
    """A row that cannot be used, and why. Such rows are counted and left out."""


def said(error: BaseException) -> str:
    """What an exception says, in one short line; of a chain the innermost, which has the reason."""
    while error.__cause__ is not None and not isinstance(error, InputError):
        error = error.__cause__
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# ---------------------------------------------------------------- flags


def parse_args(args_class, preset, argv: list[str] | None = None):
    """Flags over the task's values over the dataclass's own.

    --task and --constraint are read first, and `preset(task, constraint)` gives what they set; these values are the
    defaults that tyro then sees, so that `--help` shows them and every flag on the command line wins. A --dataset or
    --eval_dataset of the user's own cancels the evaluation data that belongs to the task's.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows a ?
    rank = int(os.environ.get("RANK", 0))  # one usage message, not one for each rank
    read = functools.partial(tyro.cli, args_class, args=argv, use_underscores=True, console_outputs=rank == 0)
    absent = "\0"
    given, _ = read(default=args_class(dataset=absent, eval_dataset=absent), add_help=False, return_unknown_args=True)
    values = dict(preset(given.task, getattr(given, "constraint", "none")))
    own = given.dataset != absent, given.eval_dataset != absent
    values |= {"eval_dataset": ""} if own[0] else {}
    values |= {"ranked_dataset": ""} if any(own) and hasattr(given, "ranked_dataset") else {}
    args = read(default=args_class(**values))
    for name, value in vars(args).items():
        if isinstance(value, str):
            setattr(args, name, os.path.expanduser(value))
    if getattr(args, "model", None) == "" and args.task != "toy":
        what = f"--task {args.task} needs --model, the folder or Hub id of the model to start from"
        print(f"{Path(sys.argv[0]).name}: error: {what}" if rank == 0 else "", file=sys.stderr)
        sys.exit(2)
    return args


def check_flags(args, outputs: tuple[str, ...]) -> None:
    """InputError for a value out of range, and for results that must not be replaced; before any work."""
    counts = "max_length max_prompt_length max_new_tokens micro_batch_size global_batch_size log_every minibatches"
    at_least = dict.fromkeys(f"{counts} ppo_epochs".split(), 1) | {"temperature": 1e-3}  # others 0
    at_most = dict(label_smoothing=0.5, gamma=1, gae_lambda=1)
    for name, value in vars(args).items():
        least, most = at_least.get(name, 0), at_most.get(name, sys.float_info.max)
        if re.search("beta[123]|_bound|random_|local_rank", name):  # priors.py's
            continue
        if isinstance(value, int | float) and not least <= value <= most:
            limit = f"at most {most}" if name in at_most else "a finite number"
            raise InputError(f"--{name} is {value}, but must be {f'at least {least}' if value < least else limit}")
    if getattr(args, "shuffle_bounds", False) and args.constraint in ("none", "random", "fixed"):
        raise InputError(f"--shuffle_bounds is for the bounds of a prior, but --constraint {args.constraint} has none")
    if args.output_dir:
        check_output(args, Path(args.output_dir), outputs)


# ---------------------------------------------------------------- process


@dataclasses.dataclass(frozen=True)
class Process:
    rank: int
    world_size: int
    device: torch.device

    def print(self, message: str) -> None:
        if self.rank == 0:
            tqdm.write(message)


def run(main, args_class, preset) -> None:
    """Parse the flags and call main(args). What ends a run early is the last thing on the screen.

    The status, on all ranks, is 1 after an error, 128 + its number after a signal.
    """
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)  # the disk's fault, not the program's
    status, message, together = 0, "", True
    try:
        find_ranks()
        main(parse_args(args_class, preset))
        if dist.is_initialized():
            dist.barrier()  # under watch: rank 0 may still write for a while
    except Stopped as stopped:
        status, message = stopped.status, stopped if os.environ["RANK"] == "0" else ""
    except KeyboardInterrupt:
        status, together = 130, False  # the other ranks may wait elsewhere
    except Exception as error:
        ENDING.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher's
        status, together, rank = 1, False, int(os.environ.get("RANK", 0))
        if isinstance(error, InputError) or isinstance(error, OSError) and error.errno in full:
            time.sleep(10 * (rank > 0))  # rank 0 says what all ranks found, and the launcher ends this one
            message = f"error: {said(error)}"
        elif re.search(r"(?i)closed by peer|reset by peer|broken pipe|gloo|nccl", str(error)):
            time.sleep(20)  # the rank that failed says why
            message = f"error: rank {rank} has lost another rank, whose message, if it left one, stands above"
        else:
            traceback.print_exc()
            message = f"error: rank {rank}: {said(error)}"
    if message:
        tqdm.write(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)  # clears a progress bar before it
    ENDING.set()
    several = dist.is_initialized() and dist.get_world_size() > 1
    if several and together:
        dist.barrier()  # none of the others watches this rank any longer
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # A Gloo thread that drops the tensors of its last work wants the GIL. If Python is finalizing by then, it is
    # ended inside a C++ destructor, which aborts the process; hence no finalizing (seen: 2 of 50, busy cores).
    (os._exit if several and not torch.cuda.is_available() else sys.exit)(status)


def watch(store, rank: int, world_size: int) -> None:
    """End this process within a minute after another, where it waits or works alone and would not notice."""
    last = idle = [0] * world_size
    while not ENDING.wait(5):
        with contextlib.suppress(Exception):  # the store is rank 0's
            store.add(f"ticks {rank}", 1)
            now = [store.add(f"ticks {other}", 0) for other in range(world_size)]
            idle = [count + 1 if a == b else 0 for a, b, count in zip(last, now, idle)]  # in ticks: a job may sleep
            last = now
            if max(idle) < 8 or ENDING.is_set():
                continue
        os.write(2, f"error: rank {rank} ends, because rank {idle.index(max(idle))} has ended\n".encode())
        os._exit(1)


def find_ranks() -> None:
    """Set RANK, WORLD_SIZE and LOCAL_RANK as the launcher means them: deepspeed, torchrun, srun, mpirun or none."""
    env, names = os.environ, ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    mpi = "OMPI_COMM_WORLD_"
    for rank, size, local_rank, one_machine in (
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", env.get("SLURM_STEP_NUM_NODES") == "1"),
        (f"{mpi}RANK", f"{mpi}SIZE", f"{mpi}LOCAL_RANK", env.get(f"{mpi}LOCAL_SIZE") == env.get(f"{mpi}SIZE")),
    ):
        if "RANK" not in env and int(env.get(size, 1)) > 1:
            theirs = [env.get(rank), env[size], env.get(local_rank), *["127.0.0.1", "29500"] * one_machine]
            env |= {name: value for name, value in zip(names, theirs) if value is not None and name not in env}
    if int(env.get("WORLD_SIZE", 1)) == 1:
        env |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": env.get("LOCAL_RANK", "0")}
    elif missing := [name for name in names if name not in env]:
        raise InputError(
            f"WORLD_SIZE is {env['WORLD_SIZE']}, but {', '.join(missing)} not set, nor by SLURM_ or OMPI_ variables: "
            "start with deepspeed or torchrun, set them too, or unset WORLD_SIZE"
        )


def start(seed: int) -> Process:
    """Join the other ranks, or be the only process."""
    find_ranks()
    rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    deepspeed.utils.logger.setLevel("ERROR")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # read_rows says what is wrong, in one line
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        deepspeed.ops.__compatible_ops__ = {}  # else init_distributed compiles a C++ all-reduce, for over a minute
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        names = "LOCAL_SIZE LOCAL_WORLD_SIZE OMPI_COMM_WORLD_LOCAL_SIZE SLURM_STEP_TASKS_PER_NODE"  # of each launcher
        local_ranks = [re.match(r"\d+", os.environ.get(name, "")) for name in names.split()]
        torch.set_num_threads(max(1, cores // int(next(filter(None, local_ranks), [1])[0])))
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
            # Keep large blocks that are freed: activations come back each step, and mapping them anew is slow.
            for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
                libc.mallopt(parameter, 1 << 30)
    wait, work = datetime.timedelta(minutes=1), datetime.timedelta(hours=2)  # for ranks to come; for rank 0 at work
    if not dist.is_initialized():
        try:
            store = dist.HashStore() if world_size == 1 else next(dist.rendezvous("env://", timeout=wait))[0]
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            if "EADDRINUSE" in str(error):
                hint = f"choose one: deepspeed --master_port 29501 {sys.argv[0]} ..."
                raise InputError(f"the port of {where} is taken, by another run? {hint}") from error
            what = f"rank {rank} waited a minute at {where} for the other ranks of WORLD_SIZE {world_size}"
            raise InputError(f"{what} ({said(error)})") from error
        store.set_timeout(work)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=work)
        if world_size > 1:
            threading.Thread(target=watch, args=(store.clone(), rank, world_size), daemon=True).start()
    deepspeed.init_distributed(verbose=False, timeout=work)
    deepspeed.comm.comm.cdb.new_group = functools.partial(dist.new_group, timeout=work)  # else 10 minutes with NCCL
    transformers.set_seed(seed)
    return Process(rank, world_size, device)


def on_rank_0(process: Process, function, each_machine: bool = False):
    """function() on rank 0, or on the first rank of each machine; every rank gets rank 0's result, or the error."""
    result = error = message = None
    if process.rank == 0 or each_machine and os.environ["LOCAL_RANK"] == "0":
        try:
            result = function()
        except Exception as caught:  # whatever it is, the other ranks must not wait for ever
            error, message = caught, said(caught)
    everyone = gather_objects((result, message))
    if error is not None and not isinstance(error, InputError | OSError):
        raise error
    for _, message in everyone:
        if message is not None:
            raise InputError(message) from error
    return everyone[0][0]


def gather_objects(item) -> list:
    """One object of each rank, in order, on every rank."""
    items = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def interleaved(mine: list) -> list:
    """The items of all ranks in order, where this rank has every world_size-th, from its own number on."""
    parts = gather_objects(mine)
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """(k, share of the rank) of all ranks as (k, global batch), on the CPU."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts, 1).cpu()


def accumulation_steps(args, process: Process) -> int:
    """Micro batches per optimizer step. A micro batch is cut down to a rank's share of that step's batch."""
    share, rest = divmod(args.global_batch_size, process.world_size * getattr(args, "minibatches", 1))
    size = min(args.micro_batch_size, share)
    if rest or not share or share % size:
        names = ["minibatches"] * hasattr(args, "minibatches") + ["micro_batch_size"] * (not rest and share > 0)
        parts = " x ".join([f"{process.world_size} ranks", *[f"--{name} {getattr(args, name)}" for name in names]])
        raise InputError(f"--global_batch_size {args.global_batch_size} is not a multiple of {parts}: change one")
    args.micro_batch_size = size
    return share // size


# ---------------------------------------------------------------- files and caches


def cached_path(kind: str, content, suffix: str) -> Path:
    """Where what follows from `content` alone is kept: $PCRM_CACHE or ~/.cache/pcrm."""
    root = Path(os.environ.get("PCRM_CACHE") or Path.home() / ".cache" / "pcrm")
    content = json.dumps([content, torch.__version__, transformers.__version__])
    return root / kind / (hashlib.sha256(content.encode()).hexdigest()[:32] + suffix)


def cached(kind: str, content, compute, process: Process) -> torch.Tensor:
    """compute(), on all ranks; or what it gave when `content()`, read on rank 0, was last the same."""

    def read() -> tuple:
        path = cached_path(kind, content(), ".npy")
        with optional(path, "cannot be read and is made again", Exception):  # cut short
            return path, np.load(path) if path.exists() else None
        return path, None

    path, found = on_rank_0(process, read)
    if found is not None:
        return torch.from_numpy(found)
    result = compute()
    if process.rank == 0:
        with optional(path, "is not kept for the next run"), writing(path) as part, open(part, "wb") as file:
            np.save(file, result.numpy())
    return result


def cached_folder(kind: str, content, write, read) -> Path:
    """A folder in the cache which write(folder) fills, unless read(folder) can read what another run has put there."""
    path = cached_path(kind, content, "")
    if path.exists():
        with optional(path, "cannot be read and is made again", Exception):
            read(path)
            return path
        shutil.rmtree(path, ignore_errors=True)
    for place in (path, Path(tempfile.gettempdir()) / f"pcrm-{path.name}"):
        with optional(place, "cannot be written", (OSError, SafetensorError)), writing(place, replace=False) as part:
            part.mkdir()
            write(part)
            return place
    raise InputError(f"no place for the {kind} of this run: set PCRM_CACHE to a folder that can be written")


@contextlib.contextmanager
def optional(path: Path, what: str, faults=OSError):
    """Inside, a cache is read or written: what fails is said, and the run goes on."""
    try:
        yield
    except faults as error:
        tqdm.write(f"warning: {path} {what}: {said(error)}")


@contextlib.contextmanager
def writing(path: Path, replace: bool = True):
    """Another name to write to, which becomes `path` at the end: a file or folder is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        if path.is_dir() and replace:
            shutil.rmtree(path)
        if replace or not path.exists():
            os.replace(part, path)
    finally:
        shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)


def write_file(path: Path, content: str) -> None:
    with writing(path) as part, open(part, "w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def json_line(values: dict) -> str:
    """One line of JSON. A value that does not apply is null: None, and numbers that are not finite."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(clean, allow_nan=False) + "\n"


@functools.cache
def model_version(path: str, what: str = "model", weights: bool = True) -> str:
    """What changes when the model does (without weights: its tokenizer): the Hub's commit, or a digest of its files."""
    if not Path(path).is_dir():
        with loading(what, path):
            return f"{path}@{Path(transformers.utils.cached_file(path, 'config.json')).parent.name}"
    kinds = (".json", ".txt", ".model", ".py", ".jinja", *[".safetensors"] * weights)
    return digest(sorted(file for file in Path(path).iterdir() if file.suffix in kinds))


def digest(files) -> str:
    total = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def open_output(args, process: Process, outputs: tuple[str, ...]) -> Path:
    """Make --output_dir, runs/<script>-<constraint>-<time> by default, lock it, and write args.json into it.

    `outputs` is what the script writes there, the last one at its end. Only what an earlier run of the script left is
    replaced: one that was cut off, or with --overwrite a finished one; nothing where --resume finds a checkpoint.
    """

    def make() -> str:
        script, now = Path(sys.modules[type(args).__module__].__file__).stem, datetime.datetime.now()
        parts = (script, getattr(args, "constraint", ""), f"{now:%Y%m%d-%H%M%S}", f"{now.microsecond:06}")
        folder = Path(args.output_dir or f"runs/{'-'.join(filter(None, parts))}")  # two may start in one second
        folder.mkdir(parents=True, exist_ok=True)
        try:
            LOCKS.append(filelock.FileLock(folder / ".lock", timeout=0, is_singleton=True))
            LOCKS[-1].acquire()
        except filelock.Timeout as error:
            raise InputError(f"--output_dir {folder} is in use by another run: choose another folder") from error
        old = check_output(args, folder, outputs, resolved=True)
        old = [] if args.resume and whole(folder) else old[::-1]  # first what says that the run is finished
        stay = ("args.json", *["model"] * (args.epochs > 0))  # until the new ones are whole
        parts = [*folder.glob("*.part"), *folder.glob("checkpoints/*.part")]  # of a run that was killed
        for path in parts + [path for path in old if path.name not in stay]:
            if path.is_dir():  # killed in here, it leaves a part, no checkpoint that looks whole
                shutil.rmtree(path if path in parts else path.rename(f"{path}.part"))
            else:
                path.unlink(missing_ok=True)
        args.output_dir = str(folder)
        write_file(folder / "args.json", json.dumps(vars(args), indent=2) + "\n")
        return str(folder)

    args.output_dir = on_rank_0(process, make)
    return Path(args.output_dir)


def check_output(args, folder: Path, outputs: tuple[str, ...], resolved: bool = False) -> list[Path]:
    """What would be replaced in the folder; InputError if it must not be. Ends a process that resumes a finished run.

    resolved: flags that were left empty have their values by now.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder} is a file: choose a folder")
    for flag in MODEL_FLAGS:
        model = Path(getattr(args, flag, "") or "-").resolve()
        if (folder / "model").resolve() in (model, *model.parents):
            raise InputError(f"--output_dir {folder} holds --{flag} {model} itself: choose another folder")
    try:
        theirs = json.loads((folder / "args.json").read_text(encoding="utf-8"))
        ours = theirs.keys() == vars(args).keys()
    except (OSError, ValueError, AttributeError):
        ours = False
    found = [folder / name for name in ("args.json", "metrics.jsonl", "tensorboard", "model", "checkpoints", *outputs)]
    found = [path for path in found if path.exists()]
    if found and not ours:
        raise InputError(f"--output_dir {folder} holds {found[-1].name}, left by no run of this script: choose another")
    finished = (folder / outputs[-1]).exists()
    if args.resume and (finished or whole(folder)):
        for name, value in vars(args).items():
            given = resolved or value != "" and name != "micro_batch_size"
            if given and name not in FREE_FLAGS and theirs[name] != value:
                raise InputError(f"--resume: --{name} is {value}, but {theirs[name]} in the run in {folder}")
        if finished:
            print(f"{folder} holds this run, finished" if os.environ.get("RANK", "0") == "0" else "")
            sys.exit(0)
    elif finished and not args.overwrite:
        raise InputError(f"--output_dir {folder} holds a finished run: choose another, or pass --overwrite")
    elif whole(folder) and not args.overwrite:
        raise InputError(f"--output_dir {folder} holds checkpoints of a run: pass --resume to go on, or --overwrite")
    return found


# ---------------------------------------------------------------- checkpoints


def whole(folder: Path) -> list[Path]:
    """The checkpoints of a run that are whole, the newest last."""
    steps = [path for path in folder.glob("checkpoints/step-*") if path.name[5:].isdigit()]
    return sorted(steps, key=lambda path: int(path.name[5:]))


class Checkpoints:
    """checkpoints/step-N: all that decides the rest of a run, from which --resume goes on to the same bits.

    Written every --save_every steps, and after the step in which SIGTERM or SIGINT comes. `step` and `state` (what the
    script wants back) are those of the checkpoint that this run goes on from; without one 0 and empty.
    """

    def __init__(self, folder: Path, metrics, args, process: Process, rows, **engines):
        self.folder, self.metrics, self.args, self.process, self.rows = folder, metrics, args, process, rows
        self.engines, self.step, self.state = engines, 0, {}
        self.failures, self.signal, self.since = [], 0, math.inf
        if not metrics.total_steps:
            return
        self.identity = on_rank_0(process, self.identify)  # now: files may change while the run goes on
        for engine in engines.values():
            engine.checkpoint_engine.save, engine._copy_recovery_script = self.write, lambda path: None
        newest = on_rank_0(process, lambda: args.resume and next(iter(whole(folder)[::-1]), None))
        if newest:
            with loading("checkpoint", str(newest)):
                saved = on_rank_0(process, lambda: json.loads((newest / "state.json").read_text()))
                for name, now in self.identity.items():
                    if (then := saved["identity"].get(name)) != now:
                        raise InputError(f"--resume: {name} is {now}, but was {then} when {newest} was written")
                for tag, engine in engines.items():
                    engine.load_checkpoint(str(newest), tag=tag)
            self.step, self.state = saved["step"], saved["state"]
            metrics.go_on(self.step, **saved["metrics"])
            process.print(f"resumed from {newest}")
        if self.step < metrics.total_steps:
            self.handle_signals(self.on_signal)

    def handle_signals(self, handler) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, handler)

    def identify(self) -> dict:
        """What must not change until the run goes on, and is no flag."""
        files = [Path(file["filename"]) for rows in self.rows for file in rows.cache_files]
        skipped = "" if getattr(self.args, "constraint", "") == "cos_sim" else "encoder"
        models = {flag: getattr(self.args, flag, "") for flag in MODEL_FLAGS if flag != skipped}
        versions = {f"--{flag}": model_version(path) for flag, path in models.items() if path}
        return {"the number of ranks": self.process.world_size, "the digest of the rows": digest(files)} | versions

    def rest_of(self, epoch: int, batches: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """(step, batch) of the epoch's batches that are still to be trained on."""
        steps = enumerate(batches, epoch * len(batches) + 1)
        return [(step, batch) for step, batch in steps if self.step < step <= self.metrics.total_steps]

    def on_signal(self, number: int, frame) -> None:
        if time.monotonic() > self.since + 2:  # before, it is the launcher that passes the first one on
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.signal and self.process.rank == 0:
            os.write(2, b"\nsignal: a checkpoint follows the step in hand; a second signal ends the run at once\n")
        self.signal, self.since = number, min(self.since, time.monotonic())

    def step_done(self, step: int, last: bool = False, **state) -> None:
        """After a step and its evaluation: a checkpoint if one is due; Stopped, on all ranks, after a signal to any.

        After the last step, the run's or one that the script calls so, a signal ends the process at once.
        """
        number = torch.tensor(self.signal, device=self.process.device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        if number == 0 and (last or step == self.metrics.total_steps):
            self.handle_signals(signal.SIG_DFL)
        if number == 0 and not (self.args.save_every and step % self.args.save_every == 0):
            return
        try:
            with self.metrics.paused():
                self.save(step, {"step": step, "state": state, "metrics": self.metrics.state()})
        except InputError as error:  # the run goes on, with the checkpoint before
            self.process.print(f"warning: no checkpoint at step {step}: {error}")
        if number:
            newest = on_rank_0(self.process, lambda: whole(self.folder)[-1:])
            how = f"give the same command again with --resume --output_dir {self.folder}"
            stopped = Stopped(f"stopped after step {step}, kept: {[p.name for p in newest]}; to go on, {how}")
            stopped.status = 128 + int(number)
            raise stopped

    def save(self, step: int, state: dict) -> None:
        path = self.folder / "checkpoints" / f"step-{step}"
        on_rank_0(self.process, lambda: path.parent.mkdir(exist_ok=True))  # not in writing(), on rank 0 alone
        with writing(path) if self.process.rank == 0 else contextlib.nullcontext() as part:
            part = on_rank_0(self.process, lambda: [(part / tag).mkdir(parents=True) for tag in self.engines] and part)
            for tag, engine in self.engines.items():
                engine.save_checkpoint(str(part), tag=tag, save_latest=False)
            failures, self.failures = sum(gather_objects(self.failures), []), []
            if failures:
                raise InputError(failures[0])
            state = json.dumps(state | {"identity": self.identity})
            on_rank_0(self.process, lambda: write_file(part / "state.json", state))
        for old in whole(self.folder)[: -max(self.args.keep, 1)] if self.process.rank == 0 else ():
            with optional(old, "cannot be removed"):
                shutil.rmtree(old.rename(f"{old}.part"))  # killed in here, it does not look whole

    def write(self, state_dict, path: str) -> None:
        """In place of DeepSpeed's own, which on one rank's full disk would leave the others waiting."""
        try:
            with open(path, "wb") as file:
                torch.save(state_dict, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            reason = error if isinstance(error, OSError) else error.__context__ or error  # torch's own hides it
            self.failures.append(f"{path}: {said(reason)}")


# ---------------------------------------------------------------- rows


def read_rows(flag: str, name: str, split: str):
    """Rows of a JSON, JSONL, CSV or Parquet file, here or at hf://, of a folder, or of a data set on the Hub.

    `name` may end with `:SPLIT`. On the Hub and in a folder that names a split (without it `split` is taken, or the
    only one); in a file it keeps the rows whose column `split` says so. A file without it is used whole. A pattern such
    as part-*.jsonl stands for all files that match, where no file has that very name.
    """
    with reading(flag, name):
        path, wanted, files = find_files(name)
        if files is None:
            with tempfile.TemporaryDirectory() as temporary:
                here = {}
                if Path(path).is_dir():  # files may change and keep name and time, and [ or * in a path is no pattern
                    shutil.copytree(Path(path).resolve(), f"{temporary}/data", copy_function=os.symlink)
                    here = dict(path=f"{temporary}/data", cache_dir=temporary)
                if any((Path(path) / saved).is_file() for saved in ("state.json", "dataset_dict.json")):
                    splits = datasets.load_from_disk(path)
                    splits = splits if isinstance(splits, dict) else {split: splits}
                else:
                    splits = datasets.load_dataset(**{"path": path, **here})
                chosen = wanted or (list(splits)[0] if len(splits) == 1 else split)
                if chosen not in splits:
                    raise InputError(f"no split {chosen!r}; it has {', '.join(splits)}: write {path}:SPLIT")
                return splits[chosen].to_list() if here else splits[chosen]
        if not files:
            raise InputError("there is no such file")
        rows = [row for file in files for row in read_file(file)]
        chosen = [row for row in rows if not wanted or row.get("split") == wanted]
        if not chosen:
            found = sorted({str(row.get("split")) for row in rows})
            raise InputError(f"no row has split {wanted!r}; there are {found}" if found else "no rows")
        return chosen


@contextlib.contextmanager
def reading(flag: str, name: str):
    """Inside, rows are read: an InputError for whatever the libraries raise, which are many kinds."""
    try:
        yield
    except Exception as error:  # ours, an unreachable Hub, a loading script, a broken file
        reason = said(error)
        here = any(Path(path).exists() for path in (name, name.rpartition(":")[0] or name))
        if not here and not isinstance(error, InputError):
            reason += f". Neither a file or folder here, nor to be had from the Hub: download it and pass {flag} FILE"
        raise InputError(f"{flag} {name}: {reason}") from error


def find_files(name: str) -> tuple[str, str, list[Path] | None]:
    """Path and SPLIT of path:SPLIT, and the files that the path, a pattern or an hf:// address stands for.

    None for a folder or the name of a data set.
    """
    path, _, wanted = name.rpartition(":")
    path, wanted = (name, "") if not path or "/" in wanted or Path(name).exists() else (path, wanted)
    address = re.fullmatch(r"hf://datasets/([^/]+/[^/@]+)(?:@(refs/\w+/[^/]+|[^/]+))?/(.+)", path)
    if not re.search(r"\.((json|jsonl|ndjson|csv)(\.(gz|bz2|zst))?|parquet)$", path):
        if address or Path(path).is_file():
            raise InputError("a data file ends with .json, .jsonl, .ndjson, .csv (also .gz, .bz2, .zst) or .parquet")
        return path, wanted, None
    if address:
        repo, revision, pattern = address.groups()
        where = huggingface_hub.snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=pattern)
        return path, wanted, sorted(Path(where).glob(pattern))
    return path, wanted, [Path(path)] if Path(path).is_file() else sorted(map(Path, glob.glob(path)))


def read_file(path: Path) -> list[dict]:
    """Rows of Parquet, CSV, a JSON list, or of a JSON object on each line; texts stay the texts that they are."""
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    with pyarrow.input_stream(str(path), compression="detect") as file:
        data = file.read().removeprefix(b"\xef\xbb\xbf")
    if ".csv" in path.suffixes:
        csv.field_size_limit(1 << 30)
        return list(csv.DictReader(io.StringIO(data.decode("utf-8"), newline=""), restkey="more", strict=True))
    whole, rows = data.lstrip().startswith(b"["), []
    for number, line in enumerate([data] if whole else data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line.decode("utf-8"))
        except json.JSONDecodeError as error:
            raise InputError(f"line {number + error.lineno - 1} is not JSON: {error.msg}") from error
        except UnicodeDecodeError as error:
            number += line[: error.start].count(b"\n")
            raise InputError(f"line {number} is not UTF-8: {error.reason}") from error
        escaped = b"\\ud" in line.lower()
        for place, row in enumerate(found if whole else [found], 1 if whole else number):
            where = f"{'row' if whole else 'line'} {place}"
            if not isinstance(row, dict):
                raise InputError(f"{where} is not a JSON object: {row!r:.80}")
            if escaped and re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False)):
                raise InputError(f"{where} has a lone surrogate, half a character, which is no text")
            rows.append(row)
    return rows


def text(row: dict, name: str) -> str | list[dict] | None:
    """A text, or the turns of a conversation, which messages always are."""
    value = row.get(name)
    if value is None or isinstance(value, str) and name != "messages":
        return value
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        turns = [{key: turn.get(key) for key in ("role", "content")} for turn in value]
        if all(isinstance(string, str) for turn in turns for string in turn.values()):
            return turns
    wanted = "text, or " * (name != "messages") + "a list of turns with role and content"
    raise ValueError(f"{name} is {value!r:.80}, but must be {wanted}")


class Rendered(str):
    """A prompt as a chat template writes it, with all that begins a text."""


def from_turns(tokenizer, prompt: str | list[dict] | None, *answers: list[dict]) -> tuple[str, ...]:
    """The texts of a conversation, by the tokenizer's chat template: its prompt, and each answer.

    Turns that all answers begin with belong to the prompt (a single answer is its last turn). What a template puts
    behind EOS, a line break, is left out.
    """
    alike = [all(turn == turns[0] for turn in turns) for turns in zip(*answers)] + [False]
    shared = min([alike.index(False), *[len(answer) - 1 for answer in answers]])
    begun, answers = [turn for answer in answers[:1] for turn in answer[:shared]], [a[shared:] for a in answers]
    if isinstance(prompt, list) and prompt:
        prompt = begun if begun[: len(prompt)] == prompt else prompt + begun
    elif begun or prompt:  # the turns may repeat a prompt that is text
        prompt = begun or [{"role": "user", "content": prompt}]
    else:
        raise Unusable("missing text")
    if not all(turn["content"].strip() for answer in answers for turn in answer):
        raise Unusable("empty response")
    if not tokenizer.chat_template:
        raise ValueError("it is a conversation, but the tokenizer has no chat template")
    try:
        start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        whole = [tokenizer.apply_chat_template(prompt + answer, tokenize=False) for answer in answers]
    except Exception as error:  # the template's own
        raise ValueError(f"the chat template refuses it: {said(error)}") from error
    if not all(one.startswith(start) for one in whole):
        raise ValueError("the chat template does not go on with an answer where it asks for one")
    eos = re.escape(tokenizer.eos_token)
    return Rendered(start), *[re.sub(rf"({eos})\s*\Z", r"\1", one.removeprefix(start)) for one in whole]


def prompt_of(row: dict, tokenizer=None) -> str | list[dict] | None:
    """The prompt of a row: as it stands (turns, given a tokenizer: as text), or an instruction or a post in the paper's
    wording. The row has the columns of one format (see check_columns)."""
    if "messages" in row or "prompt" in row:
        prompt = text(row, "messages" if "messages" in row else "prompt")
        if isinstance(prompt, list) and tokenizer:
            return from_turns(tokenizer, prompt[:-1] if prompt[-1]["role"] == "assistant" else prompt)[0]
        return prompt
    if "instruction" in row:
        instruction, extra = text(row, "instruction"), text(row, "input") or ""
        if instruction is None:
            return None
        # The input is left out where the instruction repeats it as a whole.
        repeated = instruction == extra or instruction.endswith((f" {extra}", f"\n{extra}"))
        return f"\n\nHuman: {instruction if repeated else instruction + extra}\n\nAssistant: "
    if text(row, "post") is None:  # a news article, not from Reddit
        return None
    task = "Your task is to generate a short summary of a post."
    return f"\n\nHuman: {task}\n\nPost: {row['post']}\n\nSummary: \n\nAssistant: "


def preference_of(row: dict, tokenizer=None) -> tuple[str, str, str]:
    """Prompt, chosen and rejected response of a row in any known format."""
    alpaca_farm, comparison = "instruction[/input]/output_1/output_2/preference", "info/summaries/choice"
    row = check_columns(row, "[prompt/]chosen/rejected", alpaca_farm, comparison)
    if "chosen" in row:
        prompt, chosen, rejected = (text(row, name) for name in ("prompt", "chosen", "rejected"))
        if isinstance(chosen, list) and isinstance(rejected, list):
            prompt, chosen, rejected = from_turns(tokenizer, prompt, chosen, rejected)
        elif "prompt" not in row and isinstance(chosen, str) and isinstance(rejected, str):
            alike = os.path.commonprefix([chosen, rejected])  # the prompt: to the last turn or word within
            prompt = re.search(r"(?s)(.*\n\nAssistant:|.*\s|)", alike)[0]
            chosen, rejected = chosen.removeprefix(prompt), rejected.removeprefix(prompt)
    elif "preference" in row:
        prompt, first, second = prompt_of(row), text(row, "output_1"), text(row, "output_2")
        if row["preference"] not in (0, 1, 2, *"012"):  # text in CSV
            raise ValueError(f"preference is {row['preference']!r:.80}, but must be 1, 2 or 0 (a tie)")
        if int(row["preference"]) == 0:
            raise Unusable("tie")
        chosen, rejected = (first, second) if int(row["preference"]) == 1 else (second, first)
    else:
        info, choice, summaries = row["info"], row["choice"], row["summaries"] or ()
        if choice not in (0, 1) or len(summaries) != 2 or not all(isinstance(x, dict) for x in (info, *summaries)):
            raise ValueError(f"info must hold a post, choice (here {choice!r:.80}) be 0 or 1 of 2 texts")
        prompt = prompt_of({"post": info.get("post")})
        chosen, rejected = (text(summaries[int(i)], "text") for i in (choice, 1 - choice))
    return check_texts(prompt, chosen, rejected)


def demonstration_of(row: dict, tokenizer=None) -> tuple[str, str]:
    """Prompt and completion of a row in any known format."""
    row = check_columns(row, "prompt/completion", "messages", "instruction[/input]/output", "post/summary")
    answer = text(row, [*row][-1])
    if isinstance(answer, list):
        if answer[-1]["role"] != "assistant":
            raise Unusable("no answer at the end")
        return check_texts(*from_turns(tokenizer, text(row, "prompt"), answer))
    return check_texts(prompt_of(row), answer)


def check_columns(row: dict, *formats: str) -> dict:
    """The columns of the first format that the row has, such as "prompt/completion", [optional] ones if they are there;
    no other column may meddle. ValueError if it has none."""
    for columns in formats:
        if set(re.sub(r"\[.*?\]", "", columns).split("/")) <= row.keys():
            return {name: row[name] for name in re.findall(r"\w+", columns) if name in row}
    wanted = ", or ".join(columns.replace("[", "").replace("]", "") for columns in formats)
    raise ValueError(f"the columns are {', '.join(row)}, but must be {wanted}")


def check_texts(prompt: str | None, *responses: str | None) -> tuple[str, ...]:
    """The texts; Unusable unless all are there, and no response is empty."""
    if prompt is None or None in responses:
        raise Unusable("missing text")
    if any(isinstance(part, list) for part in (prompt, *responses)):
        raise ValueError("some of its columns are text and some are turns")
    if not all(response.strip() for response in responses):
        raise Unusable("empty response")
    return prompt, *responses


def tokenize(tokenizer, prompt: str, *responses: str) -> list[list[int]]:
    """Tokens of the prompt with what begins a text (BOS), and of each response with EOS, each as generation sees it."""
    before, eos = [] if isinstance(prompt, Rendered) else beginning(tokenizer), [tokenizer.eos_token_id]
    first, *others = tokenizer([prompt, *responses], add_special_tokens=False).input_ids
    first = first if first[: len(before)] == before else before + first  # neither BOS nor EOS twice
    return [first] + [ids if ids[-1:] == eos else ids + eos for ids in others]


@functools.cache
def beginning(tokenizer) -> list[int]:
    """The tokens that the tokenizer itself puts before a text."""
    ids, plain = (tokenizer("a", add_special_tokens=special).input_ids for special in (True, False))
    return next((ids[:i] for i in range(len(ids)) if ids[i : i + len(plain)] == plain), [])


def encode_pair(row: dict, tokenizer, max_length: int, given: bool = False, needs_prompt: bool = False) -> dict:
    """The columns of a pair: texts, tokens, how many of them the two sequences begin with alike (prefix), and how many
    follow in each. given: also the row's own similarity.
    """
    prompt, chosen, rejected = preference_of(row, tokenizer)
    prompt_ids, chosen_ids, rejected_ids = tokenize(tokenizer, prompt, chosen, rejected)
    if chosen == rejected or chosen_ids == rejected_ids:
        raise Unusable("identical responses")
    if needs_prompt and not prompt_ids:
        raise Unusable("prompt without a token")  # nothing would predict the response's first one
    chosen_ids, rejected_ids = prompt_ids + chosen_ids, prompt_ids + rejected_ids
    if max(len(chosen_ids), len(rejected_ids)) > max_length:
        raise Unusable(f"longer than --max_length {max_length}")  # Upstream: truncated
    prefix = len(os.path.commonprefix([chosen_ids, rejected_ids]))
    prefix = min(prefix, len(chosen_ids) - 1, len(rejected_ids) - 1)  # each has a token of its own
    columns = dict(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        chosen_ids=chosen_ids,
        rejected_ids=rejected_ids,
        prompt_ids=prompt_ids,
        prefix=prefix,
        row_length=len(chosen_ids) + len(rejected_ids) - prefix,
        chosen_length=len(chosen_ids) - prefix,
        rejected_length=len(rejected_ids) - prefix,
    )
    if given:
        with contextlib.suppress(TypeError, ValueError):
            columns["similarity"] = float(row.get("similarity"))
        if not 0 < columns.get("similarity", 0) <= 1:
            raise ValueError(f"similarity is {row.get('similarity')!r:.80}, but --constraint given needs it in (0, 1]")
    return columns


def load_data(args, encode, process: Process) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Rows to train on, none with --epochs 0, and held-out rows: --eval_dataset, or prompts of --dataset."""
    if args.eval_dataset:
        held_out = load_rows("--eval_dataset", args.eval_dataset, "test", encode, process)
        rows = load_rows("--dataset", args.dataset, "train", encode, process) if args.epochs else held_out.select([])
        return rows, held_out
    rows = load_rows("--dataset", args.dataset, "train", encode, process)
    names = list(dict.fromkeys(prompts := rows["prompt"][:]))
    if len(names) == 1 and args.epochs:
        raise InputError(f"--dataset {args.dataset} has one prompt, so none can be held out: pass --eval_dataset")
    place = {names[i]: k for k, i in enumerate(np.random.default_rng(args.seed).permutation(len(names)))}
    order = sorted(range(len(rows)), key=lambda row: place[prompts[row]])  # all rows of a prompt on one side
    count = place[prompts[order[math.ceil(min(500, len(rows) / 10)) - 1]]] + 1  # prompts
    held_out = sum(place[prompt] < count for prompt in prompts)  # rows
    process.print(f"held out: {held_out} rows, all those of {count} of {len(names)} prompts")
    return rows.select(order[held_out:] if args.epochs else []), rows.select(order[:held_out])


def load_rows(flag: str, name: str, split: str, encode, process: Process) -> datasets.Dataset:
    """The columns that `encode(row)`, a functools.partial, makes of each row; those that are Unusable are counted.

    The first rank of each machine encodes them and keeps them on disk, where all read them without a copy in memory; a
    later start encodes nothing.
    """

    def read(folder: Path) -> tuple[datasets.Dataset, dict]:
        return datasets.Dataset.from_file(f"{folder}/rows.arrow"), json.loads((folder / "dropped.json").read_text())

    def build() -> Path:
        read_all = functools.cache(functools.partial(read_rows, flag, name, split))
        with reading(flag, name):
            path, wanted, files = find_files(name)
        files = files or sorted(file for file in Path(path).rglob("*") if file.is_file())
        content = [digest(files) if files else read_all()._fingerprint, wanted or split]  # not the path, nor a time
        content += [str(file.relative_to(path)) for file in files if Path(path).is_dir()]  # they name the splits
        content += [{key: value for key, value in encode.keywords.items() if key != "tokenizer"}]
        content += [model_version(encode.keywords["tokenizer"].name_or_path, weights=False)]
        content += [digest([__file__, encode.func.__code__.co_filename])]
        return cached_folder("rows", content, lambda part: write_rows(read_all(), part, f"{flag} {name}", encode), read)

    kept, counts = read(on_rank_0(process, build, each_machine=True))
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    process.print(f"{flag}: {len(kept)} rows" + (f"; dropped {sum(counts.values())}: {reasons}" if counts else ""))
    return kept


def write_rows(rows, folder: Path, where: str, encode) -> None:
    """Write the encoded rows as Arrow, and how many were left out, by reason."""
    counts, writer = Counter(), None
    integers, real, string = (datasets.Value(kind) for kind in ("int32", "float32", "string"))
    kinds = {int: integers, float: real, str: string, list: datasets.List(integers)}
    for number, row in enumerate(rows, 1):
        try:
            columns = encode(row)
        except Unusable as error:
            counts[str(error)] += 1
            continue
        except ValueError as error:
            raise InputError(f"{where}, row {number}: {error}") from error
        if writer is None:
            features = {key: next(kinds[k] for k in kinds if isinstance(value, k)) for key, value in columns.items()}
            writer = ArrowWriter(path=f"{folder}/rows.arrow", features=datasets.Features(features))
        writer.write(columns)
    if writer is None:
        raise InputError(f"{where}: no usable row is left ({', '.join(f'{n} {why}' for why, n in counts.items())})")
    writer.finalize()
    (folder / "dropped.json").write_text(json.dumps(counts))


def load_ranked(args, encode, process: Process) -> tuple[datasets.Dataset | None, list[list[float]]]:
    """Responses of --ranked_dataset as rows, each the chosen one of a pair with the next; and each prompt's scores.

    Of prompts with more than two responses, where all can be used.
    """
    if not args.ranked_dataset:
        return None, []

    def read() -> tuple[list[dict], list[list[float]]]:
        pairs, human = [], []
        for number, row in enumerate(rows := read_rows("--ranked_dataset", args.ranked_dataset, "test"), 1):
            try:
                check_columns(row, "prompt/responses/scores")
                prompt, responses, scores = row["prompt"], list(row["responses"] or ()), list(row["scores"] or ())
                fits = [isinstance(score, int | float) and math.isfinite(score) for score in scores]
                fits += [isinstance(string, str) for string in (prompt, *responses)]
                if len(responses) != len(scores) or not all(fits):
                    raise ValueError("prompt must be text, responses a list of texts, scores a number each")
                partners = zip(responses, responses[1:] + responses[:1]) if len(responses) > 2 else ()
                same = {"prompt": prompt, "similarity": 1}  # which scores do not depend on
                pairs += [encode(same | {"chosen": a, "rejected": b}) for a, b in partners]
                human += [scores] * (len(responses) > 2)
            except Unusable:
                continue
            except (ValueError, TypeError) as error:
                raise InputError(f"--ranked_dataset {args.ranked_dataset}, row {number}: {error}") from error
        process.print(f"--ranked_dataset: {len(human)} of {len(rows)} prompts have more than two responses, all usable")
        return pairs, human

    pairs, human = on_rank_0(process, read)
    return datasets.Dataset.from_list(pairs) if pairs else None, human


def rank_correlations(scores: list[float], human: list[list[float]]) -> dict[str, float | None]:
    """Mean over prompts of the rank correlation of a model's scores, prompt after prompt, with the human ones."""
    scores = iter(scores)
    both = [([next(scores) for _ in own], own) for own in human]
    kinds = {"ranked_spearman": spearmanr, "ranked_kendall": kendalltau}
    values = {name: [kind(*pair).statistic for pair in both] for name, kind in kinds.items()}
    return {name: float(np.nanmean(each)) if each else None for name, each in values.items()}


def margin_metrics(margin, bound, rank_loss, constraint_loss) -> dict[str, float | None]:
    """What any loss says of the margins of some pairs, their bounds (NaN: none) and the loss's terms, each (n,)."""
    bounded = not bound.isnan().any()
    return {
        "loss": (rank_loss + constraint_loss).mean().item(),
        "rank_loss": rank_loss.mean().item(),
        "constraint_loss": constraint_loss.mean().item() if bounded else None,
        "accuracy": (margin > 0).float().mean().item(),
        "margin_mean": margin.mean().item(),
        "margin_std": margin.std(correction=0).item(),
        "margin_max": margin.max().item(),
        "bound_mean": bound.mean().item() if bounded else None,
        "over_bound": (margin > bound).float().mean().item() if bounded else None,
    }


def pair_correlations(margin: torch.Tensor, similarity: torch.Tensor, pairs) -> dict[str, float]:
    """How well length alone would rank the pairs, and whether the margin grows where the responses differ."""
    longer = np.sign(np.subtract(pairs["chosen_length"][:], pairs["rejected_length"][:]))
    spearman = spearmanr(margin, similarity).statistic
    return {"length_accuracy": float((longer + 1).mean() / 2), "spearman_similarity": float(spearman)}  # ties: a half


# ---------------------------------------------------------------- batches


def total_steps(args, rows: int) -> int:
    """Optimizer steps of the run; InputError where the rows do not fill one."""
    size = args.global_batch_size
    if args.epochs and rows < size:
        raise InputError(f"{rows} rows, without the held-out ones, do not fill a --global_batch_size {size}: lower it")
    return min(args.epochs * (rows // size), args.max_steps or sys.maxsize)


def global_batches(lengths: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: steps x size row numbers, a function of (seed, epoch) and the data alone.

    Like lengths come together: the shuffled rows are sorted in windows of 50 global batches and cut, and the batches
    are shuffled. A global batch is then cut to ranks and micro batches, so their number changes nothing.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    # Drop the incomplete batch before sorting; after it, always the longest rows would be dropped.
    order = order[: len(order) // size * size]
    windows = [order[i : i + 50 * size] for i in range(0, len(order), 50 * size)]
    order = np.concatenate([window[np.argsort(lengths[window], kind="stable")] for window in windows])
    return rng.permutation(order.reshape(-1, size))


def collate_rows(ids: list[list[int]], starts: list[int], pad_token_id: int, device: torch.device) -> dict:
    """Model inputs for R rows, padded on the right (causal attention then needs no mask), and what they predict.

    Returns:
        input_ids (R, T); labels (R, T), the next token from each row's start on, else -100.
    """
    labels = [[NO_LABEL] * (start - 1) + row[start:] + [NO_LABEL] for row, start in zip(ids, starts)]
    input_ids, labels = (
        pad_sequence([torch.tensor(row) for row in rows], True, value).to(device)
        for rows, value in ((ids, pad_token_id), (labels, NO_LABEL))
    )
    return {"input_ids": input_ids, "labels": labels}


def collate_pairs(batch: dict[str, list], pad_token_id: int, share_prefix: bool, dtype, device) -> tuple[dict, ...]:
    """Model inputs for B pairs (columns chosen_ids, rejected_ids, prefix), and what lies where.

    With a shared prefix, R = B rows [prefix | chosen | rejected]: rejected does not see chosen, and its positions
    restart. They fork one token before the first that differs, so that each position predicts one token. Without,
    R = 2 B rows, a pair's two together, padded on the right; causal attention then needs no mask at all. The cheaper
    form is taken, by the tokens that the model would have to read.

    Returns:
        Model inputs: input_ids (R, T), if shared also position_ids (R, T) and attention_mask (R, 1, T, T), added to the
        attention's scores; labels (R, T), the next token of the same response, -100 at its end and in padding; branch
        (R, T), 0 what both responses begin with, 1 chosen, 2 rejected, -1 padding; positions (R, T).
    """
    pairs = list(zip(batch["chosen_ids"], batch["rejected_ids"], batch["prefix"]))
    width = max(max(len(chosen), len(rejected)) for chosen, rejected, _ in pairs)
    shared = share_prefix and max(len(c) + len(r) - max(prefix - 1, 0) for c, r, prefix in pairs) < 2 * width
    rows = []
    for chosen, rejected, prefix in pairs:
        if shared:
            k = max(prefix - 1, 0)
            rows.append(
                (
                    chosen + rejected[k:],
                    chosen[1:] + [NO_LABEL] + rejected[k + 1 :] + [NO_LABEL],
                    [0] * k + [1] * (len(chosen) - k) + [2] * (len(rejected) - k),
                    [*range(len(chosen)), *range(k, len(rejected))],
                )
            )
        else:
            for branch, ids in ((1, chosen), (2, rejected)):
                rows.append((ids, ids[1:] + [NO_LABEL], [branch] * len(ids), [*range(len(ids))]))
    input_ids, labels, branch, positions = (
        pad_sequence([torch.tensor(row) for row in column], True, value).to(device)
        for column, value in zip(zip(*rows), (pad_token_id, NO_LABEL, -1, 0))
    )  # each R T
    inputs = {"input_ids": input_ids}
    if shared:
        visible = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])  # R T T
        mask = torch.zeros(visible.shape, dtype=dtype, device=device)
        mask.masked_fill_(~visible.tril(), torch.finfo(dtype).min)
        inputs |= {"position_ids": positions, "attention_mask": mask[:, None]}  # R 1 T T
    return inputs, labels, branch, positions


@torch.no_grad()
def over_rows(module, forward, rows, args, process: Process) -> torch.Tensor:
    """forward(columns of B rows), (B, k), for all rows: (n, k) fp32 on the CPU of every rank."""
    module.eval()
    order = np.argsort([-length for length in rows["row_length"][:]], kind="stable")
    batches = [order[i : i + args.micro_batch_size] for i in range(0, len(order), args.micro_batch_size)]
    results = None
    for first in range(0, len(batches), process.world_size):
        number = first + process.rank  # at ZeRO-3 each rank must run equally many batches: the last ones may idle
        chosen = batches[min(number, len(batches) - 1)]
        result = forward(rows[chosen]).float()  # B k
        if results is None:
            results = result.new_zeros(len(rows), result.shape[1])
        if number < len(batches):
            results[torch.as_tensor(chosen, device=results.device)] = result
    dist.all_reduce(results)
    module.train()
    if not results.isfinite().all():
        raise InputError("evaluation: a score is not finite; the model has diverged or its weights are broken")
    return results.cpu()


# ---------------------------------------------------------------- metrics


class Metrics:
    """metrics.jsonl, TensorBoard and a progress bar, on rank 0.

    `shown` are the keys that a terminal gets, `derived` gives further values of a line's means.
    """

    def __init__(self, folder: Path, process: Process, args, total_steps: int, shown, derived=lambda values: {}):
        from torch.utils.tensorboard import SummaryWriter

        self.log_every, self.total_steps, self.shown, self.derived = args.log_every, total_steps, shown, derived
        self.history, self.amounts, self.since, self.enabled = [], Counter(), time.perf_counter(), process.rank == 0
        self.bar = tqdm(total=total_steps, unit="step", disable=None if self.enabled and total_steps else True)
        if self.enabled:
            self.file = open(folder / "metrics.jsonl", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
            self.board = SummaryWriter(str(folder / "tensorboard"))

    def state(self) -> dict:
        """What later lines depend on."""
        if self.enabled:
            self.board.flush()
        return {"history": self.history, "size": self.file.tell() if self.enabled else 0}

    def go_on(self, step: int, history: list[dict], size: int) -> None:
        """Go on after the step at which state() was taken: what was written since then is cut off."""
        self.history, self.bar.initial, self.bar.n, self.since = history, step, step, time.perf_counter()
        if self.enabled:
            self.file.truncate(min(size, self.file.tell()))
            self.file.seek(0, os.SEEK_END)  # else tell() still counts what was cut off
            # An evaluation may have come at this very step, after state(): the board loses the step, and gets it anew.
            self.board = type(self.board)(self.board.log_dir, purge_step=step)
            for line in Path(self.file.name).read_text(encoding="utf-8").splitlines():
                if (values := json.loads(line))["step"] == step:
                    self.draw(**values)

    def add(self, step: int, values: dict, last: bool = False, **amounts: int) -> bool:
        """Keep a step's values; every --log_every steps write their means, and amounts per second. Whether it wrote."""
        self.history.append({name: None if value is None else float(value) for name, value in values.items()})
        self.amounts.update(amounts)
        self.bar.update()
        if not (last or step in (1, self.total_steps) or step % self.log_every == 0):
            return False
        seconds, columns = time.perf_counter() - self.since, zip(*(line.values() for line in self.history))
        means = {name: None if None in column else float(np.mean(column)) for name, column in zip(values, columns)}
        self.write(step, "train", means | {f"{name}_per_s": n / seconds for name, n in self.amounts.items()})
        self.history, self.amounts, self.since = [], Counter(), time.perf_counter()
        return True

    @contextlib.contextmanager
    def paused(self):
        """Inside, the clock of the rates stands still."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def write(self, step: int, split: str, values: dict) -> None:
        if not self.enabled:
            return
        values = values | self.derived(values)
        self.file.write(json_line({"step": step, "split": split, **values}))
        self.draw(step, split, **values)
        shown = {name: f"{values[name]:.4g}" for name in self.shown if values.get(name) is not None}
        if split == "train" and not self.bar.disable:
            self.bar.set_postfix(shown)
        else:  # no terminal: no bar, but lines
            tqdm.write(f"step {step} {split}: " + ", ".join(map(" ".join, shown.items())))

    def draw(self, step: int, split: str, **values) -> None:
        for name, value in values.items():
            if value is not None and math.isfinite(value):
                self.board.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        self.bar.close()
        if self.enabled:
            self.file.close()
            self.board.close()


# ---------------------------------------------------------------- models


def toy_model() -> str:
    """The folder of the embedded task's starting model, a Llama of 0.9 million parameters with random weights.

    Made at first use; an ordinary Hugging Face folder from then on.
    """
    source = DATA / "toy"

    def write(folder: Path) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(source))
        shutil.copytree(source, folder, dirs_exist_ok=True)
        model.save_pretrained(folder)

    content = digest(sorted(source.iterdir()))
    return str(cached_folder("toy", content, write, transformers.LlamaForCausalLM.from_pretrained))


def load_tokenizer(path: str, trust_remote_code: bool):
    """The model's tokenizer, with EOS and a padding token that is not EOS; no token is added to the vocabulary.

    Scores are read at the last token that is not padding, by Transformers and by those who load the model: if padding
    were EOS, they would be read before EOS. A tokenizer without a padding token of its own lends an unused special
    token (Llama-2: <unk>).
    """
    with loading("tokenizer", path):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise InputError(f"{path}: its tokenizer has no EOS token, which ends every response")
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    if tokenizer.pad_token is None or tokenizer.pad_token in taken:
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        free = [token for token in special if token not in taken and token not in str(tokenizer.chat_template or "")]
        if not free:
            raise InputError(
                f"{path}: its tokenizer has no padding token that differs from EOS, and no unused special token to "
                "lend: set `pad_token` in its tokenizer_config.json to a token that texts never contain"
            )
        tokenizer.pad_token = min(free, key=lambda token: ("pad" not in token.lower(), token != tokenizer.unk_token))
    return tokenizer


def check_tokenizer(flag: str, path: str, tokenizer, flag_of_tokenizer: str, trust_remote_code: bool) -> None:
    """InputError unless the model at `path` has the same tokens, and the same one ends a text."""
    other, what = load_tokenizer(path, trust_remote_code), f"{flag} {path} has another"
    own = f"than {flag_of_tokenizer} {tokenizer.name_or_path}"
    if other.get_vocab() != tokenizer.get_vocab():
        raise InputError(f"{what} vocabulary {own}")
    if other.eos_token != tokenizer.eos_token:
        raise InputError(f"{what} EOS token, {other.eos_token!r}, {own}, {tokenizer.eos_token!r}")


def encoder_of_training(args) -> tuple[str, str]:
    """--encoder and --encoder_pooling; without the former the reference, or the model that training starts from.

    For evaluation alone what gave the bounds of the model's training, as the args.json beside it says: by then --model
    is the trained one.
    """
    if not (args.encoder or args.epochs):
        with contextlib.suppress(OSError, ValueError, KeyError):
            trained = json.loads((Path(args.model).parent / "args.json").read_text(encoding="utf-8"))
            return trained["encoder"] or trained["model"], trained["encoder_pooling"]
    encoder = args.encoder or getattr(args, "ref_model", args.model if args.epochs else "")
    if not encoder:
        raise InputError("--constraint cos_sim with --epochs 0 needs the --encoder of training")
    return encoder, args.encoder_pooling


def zero_stage(args) -> int:
    """At stage 0 DeepSpeed's 16 bit optimizer would step once on no gradient; 16 bits run at stage 1 instead."""
    return max(args.zero_stage, int(args.dtype != "fp32"))


def load_model(auto_class, flag: str, path: str, args, tokenizer, engine_config: dict, **values):
    """`auto_class.from_pretrained(path)` with whatever is random in training off, sharded from the start at ZeRO-3.

    Returns the model and transformers' loading information (`missing_keys` are those newly initialized).
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
    # While this object lives, from_pretrained shards every model that it loads; hence made and dropped here.
    sharding = transformers.integrations.HfDeepSpeedConfig(engine_config) if zero_stage(args) == 3 else None
    with loading("model", path):
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=args.trust_remote_code)
        no_dropout(config)
        for name, value in (values | {"pad_token_id": tokenizer.pad_token_id}).items():
            setattr(config, name, value)
        model, info = auto_class.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=args.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    del sharding
    what = f"{flag} {path}"
    for name, found, wanted in info["mismatched_keys"]:
        if name == "score.weight":
            raise InputError(f"{what} gives {found[0]} labels, but a reward model has one")
        raise InputError(f"{what}: {name} has the shape {tuple(found)} in its weights, but {tuple(wanted)} is needed")
    rows = model.get_input_embeddings().num_embeddings
    beyond = min(((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows), default=None)
    if beyond:
        raise InputError(
            f"{what} has {rows} embeddings, but its tokenizer {len(tokenizer)} tokens; the first without one is "
            f"{beyond[0]}, {beyond[1]!r}: resize the model's embeddings, or take the tokenizer of its training"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or args.max_length
    tables = [t for t in model.modules() if isinstance(t, torch.nn.Embedding) and t is not model.get_input_embeddings()]
    sizes = {table.num_embeddings for table in tables}
    if args.max_length > positions and sizes & {positions, positions + 2}:  # a table ends there (OPT's 2 rows later)
        raise InputError(
            f"{what} has {positions} learned positions, but a row may have {args.max_length} tokens: lower "
            "--max_length (ppo.py: --max_prompt_length or --max_new_tokens)"
        )
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, info


def no_dropout(config) -> None:
    """Set every probability of dropping or jittering to 0, in nested configurations too."""
    for name, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            no_dropout(value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and re.search("drop|jitter", name):
            setattr(config, name, type(value)(0))


def load_language_model(flag: str, path: str, args, tokenizer, engine_config: dict):
    """A causal language model."""
    model, info = load_model(transformers.AutoModelForCausalLM, flag, path, args, tokenizer, engine_config)
    if any(name.startswith("score.") for name in info["unexpected_keys"]):
        raise InputError(f"{flag} {path} is a reward model, but a language model is needed: pass the SFT model")
    if info["missing_keys"]:
        raise InputError(f"{flag} {path}: no language model; missing {sorted(info['missing_keys'])}")
    # Else `generate` would take the model's own suppressed tokens, top-p and the like over.
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


class Scorer(torch.nn.Module):
    """A sequence classifier whose head sees chosen positions only, called as a language model is."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier, self.config, self.dtype = classifier, classifier.config, classifier.dtype

    def forward(self, logits_to_keep: torch.Tensor, use_cache: bool = False, **inputs):
        """logits: scores (N,) fp32 where logits_to_keep (R, T) is True."""
        hidden = self.classifier.base_model(use_cache=use_cache, **inputs).last_hidden_state  # R T H
        scores = self.classifier.score(hidden[logits_to_keep]).squeeze(-1).float()  # N
        return transformers.modeling_outputs.SequenceClassifierOutput(logits=scores)


def load_reward_model(flag: str, path: str, args, tokenizer, engine_config: dict, new_head: bool = False) -> Scorer:
    """A sequence classifier with one label. A new head is drawn from the seed, alike on all ranks and ZeRO stages."""
    model, info = load_model(
        transformers.AutoModelForSequenceClassification,
        flag,
        path,
        args,
        tokenizer,
        engine_config,
        num_labels=1,
        problem_type="regression",
    )
    missing, what = set(info["missing_keys"]), f"{flag} {path}"
    if not hasattr(model, "score") or missing - {"score.weight"}:
        raise InputError(f"{what}: not a decoder with a `score` head; missing {sorted(missing)}")
    if missing and not new_head:
        raise InputError(f"{what} is no reward model: pass what reward.py wrote")
    if missing:
        with torch.device("meta"):  # the names that a language model of this kind has beside its body
            causal = transformers.AutoModelForCausalLM
            known = causal.from_config(model.config, trust_remote_code=args.trust_remote_code).state_dict()
        if unused := sorted(set(info["unexpected_keys"]) - set(known) - {"embed_out.weight"}):  # GPT-NeoX's on disk
            raise InputError(f"{what}: {unused} would not be used; rename a reward model's head to score.weight")
        config = model.config.get_text_config()
        std = getattr(config, "initializer_range", None) or getattr(config, "init_std", None) or 0.02  # OPT: init_std
        with deepspeed.zero.GatheredParameters(model.score.weight, modifier_rank=0):
            head = torch.randn(model.score.weight.shape, generator=torch.Generator().manual_seed(args.seed))
            model.score.weight.data.copy_(head * std)
    return Scorer(model)


@contextlib.contextmanager
def loading(what: str, path: str):
    """Inside, a library loads something: whatever it raises, by what is missing, is an InputError."""
    folder = Path(path)
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if list(folder.glob("*.bin")) and not list(folder.glob("*.safetensors")):
            reason = "only pickled weights, which can run code when loaded: convert them to safetensors first"
        elif (folder / "model").is_dir() and not (folder / "config.json").exists():
            reason = f"it is the folder of a run: pass {folder / 'model'}"
        elif "trust_remote_code" in str(error):
            reason = "it needs code of its own: read that code, then pass --trust_remote_code"
        elif folder.exists():
            reason = said(error) + "; delete it to go on from the one before" * (what == "checkpoint")
        else:
            reason = f"there is no such folder, nor could the Hub give it; download it and pass that ({said(error)})"
        raise InputError(f"cannot load the {what} {path}: {reason}") from error


class TargetLogps(torch.autograd.Function):
    """Log-probability of each target, in fp32. Overwrites the logits with their softmax, which is all that the backward
    pass needs: in bf16 half of what `cross_entropy` keeps, and no buffer for gradients."""

    @staticmethod
    def forward(ctx, logits, targets, temperature):
        logps = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
        size = 32 if logits.device.type == "cpu" else 4096  # rows whose fp32 copy stays in a CPU's cache
        for rows, target, logp in zip(logits.split(size), targets.split(size), logps.split(size)):
            scaled = rows.float() if temperature == 1 else rows.float() / temperature
            logp.copy_(-F.cross_entropy(scaled, target, reduction="none"))
            if ctx.needs_input_grad[0]:
                rows.copy_((rows if temperature == 1 else scaled).softmax(-1))
        ctx.temperature = temperature
        ctx.save_for_backward(logits, targets, logps)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        softmax, targets, logps = ctx.saved_tensors
        grad = grad / ctx.temperature
        own = -torch.expm1(logps) * grad  # d log π / d logits = 1 - π at the target, and -π elsewhere
        grads = softmax.mul_(-grad.to(softmax.dtype)[:, None])  # n V
        return grads.scatter_(1, targets[:, None], own.to(grads.dtype)[:, None]), None, None


def token_logps(model, labels: torch.Tensor, temperature: float = 1.0, never=(), **inputs) -> torch.Tensor:
    """log π of each label (R, T) that is not -100, row after row: (N,) fp32. The head sees no other position.

    Under the distribution at a temperature, without the tokens `never`.
    """
    keep = labels != NO_LABEL  # R T
    logits = model(logits_to_keep=keep, use_cache=False, **inputs).logits  # N V
    logits = logits[keep] if logits.dim() == 3 else logits  # a model with code of its own may keep all
    logits = logits.index_fill(1, never, -math.inf) if len(never) else logits
    return TargetLogps.apply(logits, labels[keep], temperature)


def unnamed_tokens(model, tokenizer, process: Process) -> torch.Tensor:
    """Tokens of the model's vocabulary that its tokenizer cannot name, where the vocabulary is padded beyond it."""
    named = set(tokenizer.get_vocab().values())
    size = model.config.get_text_config().vocab_size
    return torch.tensor([i for i in range(size) if i not in named], dtype=torch.long, device=process.device)


@torch.no_grad()
def check_model(engine, model, args, process: Process) -> bool:
    """Whether a pair may share one row with its prefix, found out by scoring a made-up pair both ways.

    InputError for a model that is random in training, or that looks ahead.
    """
    length, config, name = max(args.max_length, 8), model.config.get_text_config(), model.config.name_or_path
    fork = length // 2  # tokens that the two begin with alike
    prefix, chosen, rejected, other = np.random.default_rng(0).integers(config.vocab_size, size=(4, fork)).tolist()

    def outputs(share: bool, chosen: list[int] = chosen) -> torch.Tensor:
        """Before the fork, at it, at two tokens after it and at the end of each response."""
        pair = dict(chosen_ids=[prefix + chosen], rejected_ids=[prefix + rejected], prefix=[fork])
        inputs, labels, branch, positions = collate_pairs(pair, 0, share, model.dtype, process.device)
        keep = (branch >= 0) & (labels == NO_LABEL) | (positions >= fork - 2) & (positions < fork + 2)  # R T
        logits = engine(logits_to_keep=keep, use_cache=False, **inputs).logits
        return (logits[keep] if logits.dim() == 3 else logits).float()

    def differ(some: torch.Tensor, others: torch.Tensor, far: float) -> bool:
        return not (some - others).abs().max() <= far * apart.abs().max()

    engine.train()
    apart = outputs(False)  # 5 of chosen, 5 of rejected
    rounding = 1e-3 if args.dtype == "fp32" else 0.05
    if not apart.isfinite().all():
        raise InputError(f"{name} gives what is not finite: its weights are broken, or too large for {args.dtype}")
    if differ(apart, outputs(False), rounding):
        raise InputError(f"{name}: scores change from one pass to the next; something in it is random in training")
    if differ(apart[:2], apart[5:7], rounding):
        raise InputError(f"{name} is not causal: what follows a token changes what the model says before it")
    if (getattr(config, "sliding_window", None) or length) < length:  # in 16 bits this could hide in the rounding
        return False
    try:
        shared = outputs(True)  # 1 before the fork, 4 of chosen, 4 of rejected
        alone = not differ(shared[5:], outputs(True, other)[5:], 1e-4)  # rejected does not see chosen
        return alone and not differ(shared, torch.cat([apart[:5], apart[6:]]), rounding)
    except Exception:  # it takes no mask or no positions of ours
        return False


# ---------------------------------------------------------------- engine


def engine_config(args, accumulation: int) -> dict:
    """The DeepSpeed configuration of one engine."""
    if args.offload and zero_stage(args) == 0:
        raise InputError("--offload moves ZeRO's shards to the CPU: it needs ZeRO stage 1, 2 or 3")
    device = deepspeed.accelerator.get_accelerator()
    supported = {"fp32": True, "bf16": device.is_bf16_supported(), "fp16": device.is_fp16_supported()}
    if not supported[args.dtype]:
        others = " or ".join(dtype for dtype in supported if supported[dtype])
        raise InputError(f"--dtype {args.dtype} is not supported on this device: use {others}")
    to_cpu = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    names = ("offload_optimizer", *["offload_param"] * (zero_stage(args) == 3)) if args.offload else ()
    return {
        "train_micro_batch_size_per_gpu": args.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": args.dtype == "bf16"},
        "fp16": {"enabled": args.dtype == "fp16"},
        "zero_optimization": {"stage": zero_stage(args), **dict.fromkeys(names, to_cpu)},
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW serves offloading too, and compiles nothing
        "steps_per_print": 1 << 30,
    }


def make_engine(module: torch.nn.Module, args, config: dict, total_steps: int, process: Process):
    """A DeepSpeed engine with AdamW (0.9, 0.95), a cosine schedule, and no weight decay on biases and norm weights.

    With no steps to run, what evaluates the module without room for an optimizer: at ZeRO-3 an engine, else itself.
    """
    if total_steps == 0:
        module = module.requires_grad_(False).to(process.device)
        return deepspeed.initialize(model=module, config=config)[0] if zero_stage(args) == 3 else module
    groups, numbers = [{"params": [], "weight_decay": args.weight_decay}, {"params": [], "weight_decay": 0.0}], 0
    for parameter in module.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 empties the parameter itself
        groups[len(shape) < 2]["params"].append(parameter)
        numbers += math.prod(shape)
    # Gradients are reduced in buckets, whose default is this limit: a gigabyte for the smallest model.
    config["zero_optimization"]["reduce_bucket_size"] = min(numbers, 500_000_000)
    groups = [group for group in groups if group["params"]]  # OLMo has no norm weights
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, args.warmup_steps, total_steps)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, lr_scheduler=schedule, config=config)
    return engine


def optimizer_step(step: int, losses: list[torch.Tensor], *engines) -> list[float]:
    """The last step() of a global batch, of each (engine, its args); returns the gradients' norms before clipping.

    Stops on all ranks, with the weights as they were, where a loss or a gradient is not finite: DeepSpeed would skip
    the step in silence, or in fp32 without ZeRO write NaN into the weights. (With ZeRO, of two engines the first has
    stepped when the second's gradient is found.)
    """
    rates = ", ".join(f"{args.learning_rate:g}" for _, args in engines)
    remedy = f"lower the learning rate ({rates}), look at the data, or use --dtype bf16 or fp32"
    finite = torch.stack(losses).isfinite().all().float()
    dist.all_reduce(finite, dist.ReduceOp.MIN)
    if not finite:
        raise InputError(f"step {step}: the loss is not finite, and has changed no weight: {remedy}")
    norms = {}
    for engine, args in engines:
        if zero_stage(args) == 0:  # the engine neither reports nor checks it here
            gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
            norms[engine] = float(torch.nn.utils.get_total_norm(gradients))
            if not math.isfinite(norms[engine]):
                raise InputError(f"step {step}: the gradient is not finite, and has changed no weight: {remedy}")
    for engine, args in engines:
        skipped = engine.skipped_steps
        try:
            engine.step()
        except Exception as error:  # fp16 skips steps while its loss scale settles; this is where that has no end
            if "loss scale" not in str(error):
                raise
            raise InputError(f"step {step}: {error} {remedy}") from error
        if engine.skipped_steps > skipped and args.dtype != "fp16":
            raise InputError(f"step {step}: the gradient is not finite, and DeepSpeed skipped the step: {remedy}")
        norms.setdefault(engine, float(engine.get_global_grad_norm() or math.nan))
    return [norms[engine] for engine, _ in engines]


@contextlib.contextmanager
def unsharded(engine):
    """Inside, every rank has all weights, gathered once: ranks may then generate for different numbers of steps."""
    if not isinstance(engine, deepspeed.DeepSpeedEngine) or engine.zero_optimization_stage() < 3:
        yield
        return
    sharding = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        sharding._remove_module_hooks()  # they would shard each layer again behind its forward pass
        sharding.forward_hooks.clear()
        sharding.backward_hooks.clear()
        yield
    sharding.setup_zero_stage3_hooks()


def save_model(engine, model, tokenizer, folder: Path, process: Process) -> None:
    """Write a Hugging Face folder (safetensors, configuration, tokenizer) of `model`, engine.module or a part of it."""
    prefix = next(name for name, module in engine.module.named_modules() if module is model)
    weights = engine._zero3_consolidated_16bit_state_dict() if engine.zero_optimization_stage() == 3 else None
    if weights is not None:
        weights = {name.removeprefix(f"{prefix}."): value for name, value in weights.items()}

    def write() -> None:
        try:
            with writing(folder) as part:
                model.save_pretrained(part, state_dict=weights)
                tokenizer.save_pretrained(part)
        except Exception as error:  # OSError, and safetensors' own
            size = sum(value.numel() * value.element_size() for value in (weights or model.state_dict()).values())
            raise InputError(f"cannot write {folder}, which takes {size / 1e9:.3g} GB: {said(error)}") from error

    on_rank_0(process, write)


def write_card(folder: Path, args, auto_class: str, process: Process) -> None:
    """model/README.md: how to load the model, how it did on held-out rows, and what it was trained with."""
    if process.rank:
        return
    logged = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    last = [line for line in logged if line["split"] == "eval"][-1:]
    figures = [item for line in last for item in line.items() if item[0] != "split" and item[1] is not None]
    script = Path(sys.modules[type(args).__module__].__file__).name
    load = f"`transformers.{auto_class}.from_pretrained(folder)` loads it, with the tokenizer beside it."
    write_file(folder / "model" / "README.md", "\n".join([
        "---\nlibrary_name: transformers\ntags: [pcrm]\n---",
        f"Trained by `{script}` (Prior Constraints-based Reward Model training, arXiv 2404.00978). {load}",
        "\n| on held-out rows | |\n| --- | --- |",
        *[f"| {name} | {f'{value:.4g}' if isinstance(value, float) else value} |" for name, value in figures],
        "\n| trained with | |\n| --- | --- |",
        *[f"| {name} | {value} |" for name, value in vars(args).items() if value != ""], "",
    ]))  # fmt: skip


# ---------------------------------------------------------------- answers and pictures


class Sampling(transformers.LogitsProcessor):
    """Draws the next tokens but those of `never`, and leaves greedy decoding no other choice.

    Each row has its own random numbers (R, L), so that what it draws does not depend on the rows beside it.
    """

    def __init__(self, points: torch.Tensor, width: int, temperature: float, never: torch.Tensor):
        self.points, self.width, self.temperature, self.never = points, width, temperature, never

    def __call__(self, input_ids, scores):
        scores = scores.float() / self.temperature  # R V
        scores = scores.index_fill(1, self.never, -math.inf) if len(self.never) else scores
        cumulated = scores.softmax(-1).double().cumsum(-1)  # R V
        step = input_ids.shape[1] - self.width
        point = self.points[:, step : step + 1] * cumulated[:, -1:]  # R 1
        drawn = torch.searchsorted(cumulated, point, right=True)  # R 1
        return torch.full_like(scores, -math.inf).scatter_(1, drawn, 0.0)


@torch.no_grad()
def sample(engine, model, tokenizer, prompts, rooms, seeds, size: int, process, temperature=1.0) -> list[list[int]]:
    """An answer to each of this rank's prompts, EOS included where it ends within its room (in tokens).

    Drawn from the model's own distribution: no top-k, no top-p. An answer is a function of its prompt and its seed.
    """
    engine.eval()
    answers, eos, never = [None] * len(prompts), tokenizer.eos_token_id, unnamed_tokens(model, tokenizer, process)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    with unsharded(engine):
        batches = []
        for row in sorted(range(len(prompts)), key=lambda row: len(prompts[row])):
            # Positions count from the longest prompt, new tokens from the largest room, the shortest one's.
            if not batches or len(batches[-1]) == size or len(prompts[row]) + rooms[batches[-1][0]] > positions:
                batches.append([])
            batches[-1].append(row)
        for rows in batches:
            ids = {"input_ids": [prompts[row] for row in rows]}
            inputs = tokenizer.pad(ids, padding_side="left", return_tensors="pt").to(process.device)
            width, length = inputs.input_ids.shape[1], max(rooms[row] for row in rows)
            points = torch.tensor(np.stack([np.random.default_rng(seeds[row]).random(length) for row in rows]))
            sampling = [Sampling(points.to(process.device), width, temperature, never)]
            settings = transformers.GenerationConfig(
                max_new_tokens=length, do_sample=False, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id
            )
            output = model.generate(**inputs, logits_processor=sampling, generation_config=settings)  # R T + L
            for row, answer in zip(rows, output[:, width:].tolist()):
                end = answer.index(eos) + 1 if eos in answer else len(answer)
                answers[row] = answer[: min(end, rooms[row])]
    engine.train()
    return answers


def answer_prompts(engine, model, tokenizer, rows: datasets.Dataset, args, process: Process) -> None:
    """Sample answers to the first --generate different prompts of the rows: print some, and write all."""
    prompts = {}
    for prompt, ids in zip(rows["prompt"], rows["prompt_ids"]):
        if len(prompts) < args.generate:
            prompts.setdefault(prompt, ids)
    mine = list(prompts.values())[process.rank :: process.world_size]
    seeds = [[args.seed, number] for number in range(process.rank, len(prompts), process.world_size)]
    rooms = [args.max_length - len(ids) for ids in mine]
    answers = sample(engine, model, tokenizer, mine, rooms, seeds, args.micro_batch_size, process)
    texts = interleaved([tokenizer.decode(answer, skip_special_tokens=True) for answer in answers])
    for prompt, answer in list(zip(prompts, texts))[:3]:
        process.print(f"sample: {prompt!r} -> {answer!r}")
    write_generations(list(zip(prompts, texts)), args, process)


def write_generations(answers: list[tuple[str, str]], args, process: Process) -> None:
    """(prompt, answer) as AlpacaEval reads them: the last file of a run."""
    dataset = args.eval_dataset or args.dataset
    dataset = Path(dataset).name if Path(dataset).exists() else dataset
    same = {"generator": Path(args.output_dir).name, "dataset": dataset}
    results = [
        {"instruction": prompt.removeprefix("\n\nHuman: ").removesuffix("\n\nAssistant: "), "output": answer, **same}
        for prompt, answer in answers
    ]
    if process.rank == 0:
        result = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
        write_file(Path(args.output_dir) / "generations.json", result)


def plot_margins(lines: list[dict], args, path: Path) -> None:
    """Margin and bound of each held-out pair against its similarity, and the margins' histogram."""
    from matplotlib.figure import Figure

    lines = sorted(lines, key=lambda line: line["similarity"])
    similarity, margin = (np.array([line[name] for line in lines]) for name in ("similarity", "margin"))
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    left.scatter(similarity, margin, s=8, alpha=0.5, linewidths=0, label="margin")
    if args.constraint != "none":
        style = "." if args.constraint == "random" or args.shuffle_bounds else "-"
        left.plot(similarity, [line["bound"] for line in lines], style, markersize=3, color="C3", label="bound δ*")
    left.axhline(0, color="0.6", linewidth=0.8)
    left.legend()
    kind = {"cos_sim": "cosine, angular", "given": "given"}.get(args.constraint, "length ratio")
    left.set(xlabel=f"similarity s ({kind})", ylabel="margin", title=f"{args.constraint}: held-out pairs")
    left.set_ylim(margin.min() - 0.5, max(margin.max(), 6) * 1.6)
    right.hist(margin, bins=40, orientation="horizontal")
    right.set(xlabel="pairs", title=f"largest margin {margin.max():.1f}")
    figure.savefig(path)
