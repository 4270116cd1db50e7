"""What is the same for any loss: process, flags, rows, models, the DeepSpeed engine, metrics and files.

Nothing of a method lives here. A script calls, in this order: parse_args, run, check_flags, start, load_tokenizer,
read_rows, load_model, make_engine, open_output, Metrics, optimizer_step, save_model. Errors that the user can mend
are `InputError`s: one line on stderr.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import hashlib
import json
import math
import os
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import datasets
import deepspeed
import numpy as np
import torch
import torch.distributed as dist
import transformers
import tyro
from tqdm import tqdm

DATA = Path(__file__).resolve().parent / "data"  # the embedded data set
LOGITS_AT_ONCE = 1 << 24  # numbers in one piece of a vocabulary head's output: 32 MiB in bf16
LOGITS_HELD = 8  # pieces that wait for the backward pass


class InputError(Exception):
    """Something that the user can mend. The message says what, where and how, in one line."""


# ---------------------------------------------------------------- flags


def parse_args(args_class, preset, argv: list[str] | None = None):
    """Flags over the task's values over the dataclass's own.

    --task and --constraint are read first, and `preset(task, constraint)` gives what they set; these values are the
    defaults that tyro then sees, so that `--help` shows them and every flag on the command line wins. A --dataset or
    --eval_dataset of the user's own cancels the evaluation data that belongs to the task's.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--task", "--constraint", "--dataset", "--eval_dataset"):
        first.add_argument(flag)
    given, _ = first.parse_known_args(argv)
    values = dict(preset(given.task or "toy", given.constraint or "none"))
    if given.dataset is not None:
        values |= {"eval_dataset": "", "ranked_dataset": ""}
    if given.eval_dataset is not None:
        values |= {"ranked_dataset": ""}
    names = {field.name for field in dataclasses.fields(args_class)}
    default = args_class(**{name: value for name, value in values.items() if name in names})
    rank = int(os.environ.get("RANK", 0))  # one usage message, not one for each rank
    args = tyro.cli(args_class, default=default, args=argv, use_underscores=True, console_outputs=rank == 0)
    if getattr(args, "model", None) == "" and args.task != "toy":
        if rank == 0:
            name = f"{Path(sys.argv[0]).name}: error: --task {args.task} needs --model"
            print(f"{name}, the folder or Hub id of the model to start from", file=sys.stderr)
        sys.exit(2)
    return args


def check_flags(args) -> None:
    """InputError for a value out of range, and for results that must not be replaced; before any work."""
    least = dict(
        max_length=1, epochs=0, max_steps=0, micro_batch_size=1, global_batch_size=1, warmup_steps=0, seed=0,
        log_every=1, eval_every=0, learning_rate=0, weight_decay=0, generate=0, kl_beta=0,
        label_smoothing=0, kl_coef=0, max_kl=0, score_clip=0, missing_eos_penalty=0, gamma=0, gae_lambda=0, cliprange=0,
        cliprange_value=0, ppo_epochs=1, minibatches=1, temperature=1e-3, max_prompt_length=1, max_new_tokens=1,
        policy_learning_rate=0, critic_learning_rate=0,
    )
    most = dict(label_smoothing=0.5, gamma=1, gae_lambda=1)
    for name, minimum in least.items():
        value, maximum = getattr(args, name, minimum), most.get(name, sys.float_info.max)
        if not minimum <= value <= maximum:
            limit = f"at most {maximum}" if value > maximum and name in most else f"at least {minimum}"
            raise InputError(f"--{name} is {value}, but must be {limit}")
    if not args.output_dir:
        return
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder} is a file: choose a folder")
    if not args.overwrite and any((folder / name).exists() for name in ("eval.jsonl", "generations.json", "model")):
        raise InputError(f"--output_dir {folder} holds a finished run: choose another, or pass --overwrite")
    for flag in ("model", "ref_model", "policy_model", "reward_model", "judge_model"):
        model = getattr(args, flag, "")
        if model and (folder / "model").resolve() in (Path(model).resolve(), *Path(model).resolve().parents):
            raise InputError(f"--output_dir {folder} holds --{flag} {model} itself: choose another folder")


# ---------------------------------------------------------------- process


@dataclasses.dataclass(frozen=True)
class Process:
    rank: int
    world_size: int
    device: torch.device

    def print(self, message: str) -> None:
        if self.rank == 0:
            tqdm.write(message)


def run(main, args) -> None:
    """Call main(args); an InputError becomes one line on stderr and exit status 1, on however many ranks."""
    try:
        main(args)
        if not torch.cuda.is_available() and dist.get_world_size() > 1:
            # Gloo's threads now and then abort a process of several that ends in the usual way, after all work is done.
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(0)
    except InputError as error:
        rank = int(os.environ.get("RANK", 0))
        if rank:  # rank 0 says what all ranks found; the launcher ends this one meanwhile, unless it stands alone
            time.sleep(10)
        tqdm.write(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)  # clears a progress bar before it
        sys.exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def start(seed: int) -> Process:
    """Join the process group of the deepspeed launcher or torchrun, or be the only process under plain Python."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
        for name, value in {**alone, "MASTER_PORT": free.getsockname()[1]}.items():
            os.environ.setdefault(name, str(value))
    local_rank = int(os.environ["LOCAL_RANK"])
    deepspeed.utils.logger.setLevel("ERROR")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # read_rows says what is wrong, in one line
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        deepspeed.ops.__compatible_ops__ = {}  # else init_distributed compiles a C++ all-reduce, for over a minute
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        local_ranks = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1  # deepspeed's, torchrun's
        torch.set_num_threads(max(1, cores // int(local_ranks)))
        keep_freed_memory()
    # Ranks wait for rank 0 where it alone works; DeepSpeed's own limit is ten minutes.
    deepspeed.init_distributed(verbose=False, timeout=datetime.timedelta(hours=2))
    transformers.set_seed(seed)
    return Process(dist.get_rank(), dist.get_world_size(), device)


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that are freed: activations come back each step, and mapping them anew is slow."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
                libc.mallopt(parameter, 1 << 30)


def on_rank_0(process: Process, function):
    """function() on rank 0 alone; every rank gets its result, or its InputError."""
    box = [None, None]
    if process.rank == 0:
        try:
            box[0] = function()
        except InputError as error:
            box[1] = str(error)
        except OSError as error:  # no room, no permission
            box[1] = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    dist.broadcast_object_list(box, src=0, device=process.device)
    if box[1] is not None:
        raise InputError(box[1])
    return box[0]


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """The tensors of all ranks, of one shape, stacked along a new first dimension: ranks x shape."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)


def accumulation_steps(args, process: Process) -> int:
    """Micro batches per optimizer step. A micro batch is cut down to a rank's share of the global batch."""
    share, rest = divmod(args.global_batch_size, process.world_size)
    args.micro_batch_size = min(args.micro_batch_size, share)
    if rest or args.micro_batch_size < 1 or share % args.micro_batch_size:
        raise InputError(
            f"--global_batch_size {args.global_batch_size} is not a multiple of {process.world_size} ranks x "
            f"--micro_batch_size {args.micro_batch_size}: change one of them"
        )
    return share // args.micro_batch_size


# ---------------------------------------------------------------- rows and files


def cache_root() -> Path:
    """$PCRM_CACHE or ~/.cache/pcrm: the embedded task's model, similarities."""
    return Path(os.environ.get("PCRM_CACHE") or Path.home() / ".cache" / "pcrm")


def read_rows(flag: str, name: str, split: str) -> datasets.Dataset:
    """Rows of a JSON, JSONL or Parquet file, here or at hf://, of a folder, or of a data set on the Hub.

    `name` may end with `:SPLIT`. On the Hub and in a folder that names a split (without it `split` is taken, or the
    only one); in a file it keeps the rows whose column `split` says so. A file without it is used whole.
    """
    path, _, wanted = name.rpartition(":")
    if not path or "/" in wanted or Path(name).exists():
        path, wanted = name, ""
    loader = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}.get(Path(path).suffix)
    where = f"{flag} {name}"
    try:
        if Path(path).is_file() or "://" in path:
            if loader is None:
                raise InputError(f"{where}: a data file ends with .json, .jsonl or .parquet")
            rows = datasets.load_dataset(loader, data_files=path, split="train")
            if wanted:
                if "split" not in rows.column_names:
                    raise InputError(f"{where}: the file has no column `split` to select {wanted!r} from")
                found = set(rows["split"])
                if wanted not in found:
                    raise InputError(f"{where}: no row has split {wanted!r}; there are {sorted(map(str, found))}")
                rows = rows.select([i for i, value in enumerate(rows["split"]) if value == wanted])
        elif loader is not None:
            raise InputError(f"{where}: there is no such file")
        else:
            splits = datasets.load_dataset(path)
            names = list(splits)
            chosen = wanted or (names[0] if len(names) == 1 else split)
            if chosen not in names:
                raise InputError(f"{where}: no split {chosen!r}; it has {', '.join(names)}: write {path}:SPLIT")
            rows = splits[chosen]
    except InputError:
        raise
    except Exception as error:  # the library raises many kinds: an unreachable Hub, a loading script, broken JSON
        fault = json_fault(Path(path)) if loader == "json" and Path(path).is_file() else None
        reason = fault or " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if not Path(path).exists():
            reason += f". Neither a file or folder here, nor to be had from the Hub: download it and pass {flag} FILE"
        raise InputError(f"{where}: {reason}") from error
    if len(rows) == 0:
        raise InputError(f"{where}: no rows")
    return rows


def json_fault(path: Path) -> str | None:
    """Where a file stops being JSON, as `line N: what`."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if text.lstrip().startswith("["):
        lines = [(text, 0)]
    else:
        lines = [(line, number) for number, line in enumerate(text.splitlines()) if line.strip()]
    for line, number in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            return f"line {number + error.lineno} is not JSON: {error.msg}"
        if not isinstance(row, dict | list):
            return f"line {number + 1} is not a JSON object"
    return "no rows" if not lines else None


def open_output(args, process: Process, script: str) -> Path:
    """Make --output_dir, runs/<script>-<constraint>-<time> by default, and write args.json into it."""

    def make() -> str:
        name = "-".join(filter(None, (script, getattr(args, "constraint", ""), time.strftime("%Y%m%d-%H%M%S"))))
        path = Path(args.output_dir or Path("runs") / name)
        path.mkdir(parents=True, exist_ok=True)
        check_flags(args)  # once more: another run may have finished there meanwhile
        ours = list(path.iterdir()) if (path / "args.json").exists() or args.overwrite else []
        for old in ours:  # of a run that was cut off or is replaced: what the scripts write, and nothing else
            if old.name in ("args.json", "metrics.jsonl", "eval.jsonl", "margins.png", "generations.json", "ppo.png"):
                old.unlink()
            elif old.name in ("model", "tensorboard"):
                shutil.rmtree(old)
        args.output_dir = str(path)
        write_file(path / "args.json", json.dumps(dataclasses.asdict(args), indent=2) + "\n")
        return str(path)

    args.output_dir = on_rank_0(process, make)
    return Path(args.output_dir)


def write_file(path: Path, text: str) -> None:
    """Write a whole file or none of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a whole .npy file or none of it, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{time.time_ns()}.part.npy")
    np.save(part, array)
    part.replace(path)


def json_line(values: dict) -> str:
    """One line of JSON. A value that does not apply is null: None, and numbers that are not finite."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(clean, allow_nan=False) + "\n"


class Metrics:
    """metrics.jsonl, TensorBoard and a progress bar, on rank 0."""

    def __init__(self, folder: Path, process: Process, total_steps: int):
        self.enabled = process.rank == 0
        self.bar = tqdm(total=total_steps, unit="step", disable=None if self.enabled and total_steps else True)
        if self.enabled:
            from torch.utils.tensorboard import SummaryWriter

            self.file = open(folder / "metrics.jsonl", "w", encoding="utf-8", buffering=1)
            self.board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, split: str, values: dict) -> None:
        if not self.enabled:
            return
        self.file.write(json_line({"step": step, "split": split, **values}))
        for name, value in values.items():
            if value is not None and math.isfinite(value):
                self.board.add_scalar(f"{split}/{name}", value, step)
        names = ("loss", "perplexity", "accuracy", "margin_mean", "margin_max", "score_mean", "kl")
        shown = {k: values[k] for k in names if values.get(k) is not None}
        if split == "train" and not self.bar.disable:
            self.bar.set_postfix({k: f"{v:.3g}" for k, v in shown.items()})
        else:  # no terminal: no bar, but lines
            tqdm.write(f"step {step} {split}: " + ", ".join(f"{k} {v:.4g}" for k, v in shown.items()))

    def close(self) -> None:
        self.bar.close()
        if self.enabled:
            self.file.close()
            self.board.close()


# ---------------------------------------------------------------- models


def toy_model() -> str:
    """The folder of the embedded task's starting model, a random Llama of 0.9 million parameters with a byte-level BPE.

    Built at first use, in a second or two; an ordinary Hugging Face folder from then on.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    files = sorted(DATA.glob("*_train.jsonl"))
    source = Path(__file__).read_bytes() + b"".join(path.read_bytes() for path in files)
    folder = cache_root() / f"toy-{hashlib.sha256(source).hexdigest()[:12]}"
    if folder.exists():
        return str(folder)
    rows = [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator((text for row in rows for text in row.values()), trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=1024
    )
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=1024, initializer_range=0.1, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix="toy-", dir=folder.parent))
    tokenizer.save_pretrained(part)
    model.save_pretrained(part)
    try:
        part.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(part)
    return str(folder)


def load_tokenizer(path: str, trust_remote_code: bool):
    """The model's tokenizer, with EOS and a padding token that is not EOS; no token is added to the vocabulary.

    Scores are read at the last token that is not padding, by Transformers and by those who load the model: if padding
    were EOS, they would be read before EOS. A tokenizer without a padding token of its own lends an unused special
    token (Llama-2: <unk>).
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # OSError, ValueError, KeyError and the Hub's own, by what is missing
        raise model_error("tokenizer", path, error) from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"{path}: its tokenizer has no EOS token, which ends every response")
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    if tokenizer.pad_token is None or tokenizer.pad_token in taken:
        special = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
        free = [t for t in special if t not in taken and t not in str(tokenizer.chat_template or "")]
        named_pad = [t for t in free if "pad" in t.lower()]
        unknown = [tokenizer.unk_token] if tokenizer.unk_token and tokenizer.unk_token not in taken else []
        candidates = named_pad + unknown + free
        if not candidates:
            raise InputError(
                f"{path}: its tokenizer has no padding token that differs from EOS, and no unused special "
                "token to lend: set `pad_token` in its tokenizer_config.json to a token that texts never contain"
            )
        tokenizer.pad_token = candidates[0]
    return tokenizer


def load_model(auto_class, path: str, args, engine_config: dict, **config_values):
    """`auto_class.from_pretrained(path)` with dropout off, sharded from the start at ZeRO-3.

    Returns the model and transformers' loading information (`missing_keys` are those newly initialized).
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
    # While this object lives, from_pretrained shards every model that it loads; hence made and dropped here.
    sharding = transformers.integrations.HfDeepSpeedConfig(engine_config) if args.zero_stage == 3 else None
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=args.trust_remote_code)
        for name, value in config.to_dict().items():
            if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")):
                setattr(config, name, 0.0)
        for name, value in config_values.items():
            setattr(config, name, value)
        model, info = auto_class.from_pretrained(
            path, config=config, dtype=dtype, attn_implementation="sdpa", use_safetensors=True,
            trust_remote_code=args.trust_remote_code, output_loading_info=True,
        )
    except Exception as error:  # OSError, ValueError, RuntimeError, KeyError and the Hub's own, by what is missing
        raise model_error("model", path, error) from error
    finally:
        del sharding
    rows = model.get_input_embeddings().num_embeddings
    if config_values.get("pad_token_id", 0) >= rows:
        raise InputError(
            f"{path}: padding token {config_values['pad_token_id']} is outside the model's {rows} embeddings: set "
            "`pad_token` in its tokenizer_config.json to an unused token that the model has"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    for table in model.modules():  # learned positions: beyond the table there are none (OPT's has two rows more)
        is_table = isinstance(table, torch.nn.Embedding) and table is not model.get_input_embeddings()
        if is_table and 0 <= table.num_embeddings - positions <= 2 and args.max_length > positions:
            raise InputError(
                f"{path} has {positions} learned positions, but a row may have {args.max_length} tokens: lower "
                "--max_length (ppo.py: --max_prompt_length or --max_new_tokens)"
            )
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, info


def model_error(what: str, path: str, error: Exception) -> InputError:
    folder = Path(path)
    if folder.is_dir() and list(folder.glob("*.bin")) and not list(folder.glob("*.safetensors")):
        reason = "only pickled weights, which can run code when loaded: convert them to safetensors first"
    elif folder.is_dir() and not (folder / "config.json").exists() and (folder / "model").is_dir():
        reason = f"it is the folder of a run: pass {folder / 'model'}"
    elif "scaled_dot_product_attention" in str(error):
        reason = "transformers has no `sdpa` attention for this architecture, the one kind that is used here"
    elif "trust_remote_code" in str(error):
        reason = "it needs code of its own: read that code, then pass --trust_remote_code"
    else:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if not folder.exists():
            reason = f"there is no such folder, nor could the Hub give it; download it and pass its folder ({reason})"
    return InputError(f"cannot load the {what} {path}: {reason}")


def engine_config(args, accumulation: int) -> dict:
    """The DeepSpeed configuration of one engine."""
    if args.offload and args.zero_stage == 0:
        raise InputError("--offload moves ZeRO's shards to the CPU: it needs ZeRO stage 1, 2 or 3")
    device = deepspeed.accelerator.get_accelerator()
    supported = {"fp32": True, "bf16": device.is_bf16_supported(), "fp16": device.is_fp16_supported()}
    if not supported[args.dtype]:
        others = " or ".join(dtype for dtype in supported if supported[dtype])
        raise InputError(f"--dtype {args.dtype} is not supported on this device: use {others}")
    zero = {"stage": args.zero_stage}
    if args.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if args.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": args.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": args.dtype == "bf16"},
        "fp16": {"enabled": args.dtype == "fp16"},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW serves offloading too, and compiles nothing
        "steps_per_print": 1 << 30,
    }


def make_engine(module: torch.nn.Module, args, config: dict, total_steps: int, process: Process):
    """A DeepSpeed engine with AdamW (0.9, 0.95), a cosine schedule, and no weight decay on biases and norm weights.

    With no steps to run, what evaluates the module without room for an optimizer: at ZeRO-3 an engine, else itself.
    """
    if total_steps == 0:
        module = module.to(process.device)
        return deepspeed.initialize(model=module, config=config)[0] if args.zero_stage == 3 else module
    decayed, plain = [], []
    for parameter in module.parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 empties the parameter itself
            (decayed if len(shape) > 1 else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, args.warmup_steps, total_steps)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, lr_scheduler=schedule, config=config)
    return engine


def optimizer_step(engine, args, step: int, losses: list[torch.Tensor]) -> float:
    """The last engine.step() of a global batch; returns the gradient's norm before clipping.

    Stops on all ranks, with the weights as they were, where a loss or a gradient is not finite: DeepSpeed would skip
    the step in silence, or in fp32 without ZeRO write NaN into the weights.
    """
    remedy = f"lower the learning rate ({args.learning_rate:g}), look at the data, or use --dtype bf16 or fp32"
    finite = torch.stack(losses).isfinite().all().float()
    dist.all_reduce(finite, dist.ReduceOp.MIN)
    if not finite:
        raise InputError(f"step {step}: the loss is not finite, and no weight was changed by this step: {remedy}")
    norm = None
    if args.dtype == "fp32" and args.zero_stage == 0:  # the engine neither reports nor checks it here
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            raise InputError(f"step {step}: the gradient is not finite, and no weight was changed: {remedy}")
    skipped = engine.skipped_steps
    try:
        engine.step()
    except Exception as error:  # fp16 skips steps while its loss scale settles; this is where that has no end
        if "loss scale" not in str(error):
            raise
        raise InputError(f"step {step}: {error} {remedy}") from error
    if engine.skipped_steps > skipped and args.dtype != "fp16":
        raise InputError(f"step {step}: the gradient is not finite, and DeepSpeed skipped the step: {remedy}")
    norm = engine.get_global_grad_norm() if norm is None else norm
    return float("nan") if norm is None else float(norm)


@contextlib.contextmanager
def unsharded(engine):
    """Inside, every rank has all weights, gathered once: ranks may then generate for different numbers of steps."""
    optimizer = getattr(engine, "optimizer", None)
    if not isinstance(engine, deepspeed.DeepSpeedEngine) or engine.zero_optimization_stage() < 3:
        yield
        return
    sharding = getattr(optimizer, "parameter_offload", optimizer)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        sharding._remove_module_hooks()  # they would shard each layer again behind its forward pass
        sharding.forward_hooks.clear(), sharding.backward_hooks.clear()
        yield
    sharding.setup_zero_stage3_hooks()


def save_model(engine, model, tokenizer, folder: Path, process: Process) -> None:
    """Write a Hugging Face folder (safetensors, configuration, tokenizer) from `model`, a part of engine.module."""
    prefix = next(name for name, module in engine.module.named_modules() if module is model)
    weights = engine._zero3_consolidated_16bit_state_dict() if engine.zero_optimization_stage() == 3 else None
    if process.rank == 0:
        if weights is not None:
            weights = {name.removeprefix(prefix + "."): value for name, value in weights.items()}
        part = folder.with_name(folder.name + ".part")
        for left_over in (part, folder):
            shutil.rmtree(left_over, ignore_errors=True)
        model.save_pretrained(part, state_dict=weights)
        tokenizer.save_pretrained(part)
        part.rename(folder)
    dist.barrier()
