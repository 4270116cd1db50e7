"""Kills runs at random moments, goes on with --resume, and compares with runs that nobody killed: bit for bit.

    python tests/kill.py --kills 60 --seed 1 [--only sft,ppo]

Each run is a few steps of a script on one or two ranks, at a ZeRO stage and a precision, killed (SIGKILL) one to four
times. Moments: any; in the steps; in a save; in the removal of an old checkpoint; after the last step. What a kill met
is told by what it left on the disk. Exit status 1 if a resumed run differs from the one that nobody killed.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import common

import argparse
import json
import logging
import os
import random
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field

import torch
import transformers
from helpers import lines

FLAGS = "--max_steps 6 --epochs 2 --log_every 3 --save_every 2 --eval_every 3 --global_batch_size 8"
OWN = dict(
    sft="--max_length 72 --micro_batch_size 2 --generate 2",
    reward="--micro_batch_size 2 --constraint random",
    dpo="--max_length 72 --micro_batch_size 2 --generate 2 --constraint len_rat",
    ppo="--micro_batch_size 2 --minibatches 2 --generate 3 --max_new_tokens 8",
)
MOMENTS = ("any", "steps", "save", "removal", "end")


def prepare(work: Path) -> Path:
    """In `work`: 24 and 4 rows of each kind, and a tiny language and reward model whose answers end now and then."""
    work.mkdir(exist_ok=True)
    for name in ("sft", "preference", "prompts"):
        for part, count in (("train", 24), ("eval", 4)):
            rows = (common.DATA / f"{name}_{part}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            (work / f"{name}_{part}.jsonl").write_text("".join(list(dict.fromkeys(rows))[:count]), encoding="utf-8")
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=16)
    config = transformers.AutoConfig.from_pretrained(common.DATA / "toy", num_key_value_heads=2, num_labels=1, **sizes)
    tokenizer = common.load_tokenizer(str(common.DATA / "toy"), False)
    torch.manual_seed(0)
    for kind in ("CausalLM", "SequenceClassification"):
        model = getattr(transformers, f"AutoModelFor{kind}").from_config(config)
        model.get_input_embeddings().weight.data[tokenizer.eos_token_id] *= 6  # the head's, too
        model.save_pretrained(work / kind)
        tokenizer.save_pretrained(work / kind)
    return work


@dataclass(frozen=True)
class Config:
    """What decides a run's results."""

    script: str
    ranks: int = 1
    stage: int = 0
    dtype: str = "fp32"

    def __str__(self) -> str:
        return f"{self.script}-{self.ranks}-zero{self.stage}-{self.dtype}"

    def flags(self, work: Path) -> list[str]:
        data = {"sft": "sft", "ppo": "prompts"}.get(self.script, "preference")
        models = f"--model {work}/CausalLM --zero_stage {self.stage}"
        if self.script == "ppo":
            models = f"--policy_model {work}/CausalLM --policy_zero_stage {self.stage} "
            models += f"--reward_model {work}/SequenceClassification --critic_zero_stage {(0, 1, 3, 3)[self.stage]}"
        files = f"--dataset {work}/{data}_train.jsonl --eval_dataset {work}/{data}_eval.jsonl"
        return f"{FLAGS} {OWN[self.script]} --dtype {self.dtype} {models} {files}".split()


@dataclass
class Started:
    """The processes of a run: one for each rank, or the launcher. What they say is in files beside the folder."""

    folder: Path
    processes: list = field(default_factory=list)

    def said(self, stream: str = "out") -> str:
        return Path(f"{self.folder}.0.{stream}").read_text(encoding="utf-8", errors="replace")

    def wait_for(self, condition, limit: float = 300, pause: float = 0.002) -> bool:
        """Until condition() is true; False if the run ended before."""
        until = time.monotonic() + limit
        while not condition():
            if not self.running():
                return False
            if time.monotonic() > until:
                self.kill()
                raise TimeoutError(f"{self.folder}: nothing happened for {limit} s; {self.said()}{self.said('err')}")
            time.sleep(pause)
        return True

    def running(self) -> bool:
        return any([process.poll() is None for process in self.processes])  # polls each

    def status(self) -> list[int]:
        self.wait_for(lambda: False, pause=0.05)
        return [process.wait() for process in self.processes]

    def kill(self) -> None:
        """SIGKILL to the whole process group at once, and until none of it is left."""
        group = self.processes[0].pid
        try:
            os.killpg(group, signal.SIGKILL)
            for process in self.processes:
                process.wait()
            while True:  # the launcher's own, which somebody else waits for
                time.sleep(os.killpg(group, 0) or 0.001)
        except ProcessLookupError:
            pass


def run_of(config: Config, work: Path, folder: Path, *flags: str, launcher: bool = False) -> Started:
    """Start the run of a configuration in a process group of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command, started = [sys.executable], Started(folder)
    if launcher:
        deepspeed = str(Path(sys.executable).with_name("deepspeed"))
        command = [deepspeed, "--num_gpus", str(config.ranks), "--master_port", port]
    command += [f"{ROOT}/{config.script}.py", *config.flags(work), "--output_dir", str(folder), *flags]
    for rank in range(1 if launcher else config.ranks):
        own = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=config.ranks, LOCAL_WORLD_SIZE=config.ranks)
        own = {name: str(value) for name, value in own.items()} | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | ({} if launcher or config.ranks == 1 else own)
        group = started.processes[0].pid if rank else 0
        with open(f"{folder}.{rank}.out", "w") as out, open(f"{folder}.{rank}.err", "w") as err:
            options = dict(stdout=out, stderr=err, env=environment, process_group=group)
            started.processes.append(subprocess.Popen(command, **options))
    return started


def reference(config: Config, work: Path) -> Path:
    """The folder of the run that nobody killed; made when it is first asked for."""
    folder = work / f"whole-{config}"
    if not folder.exists():
        started = run_of(config, work, folder)
        assert not any(started.status()), started.said() + started.said("err")
    return folder


def half_done(folder: Path) -> set[str]:
    """What is going on in the folder: only older checkpoints than the newest whole one are removed."""
    steps = [int(path.name[5:-5]) for path in folder.glob("checkpoints/step-*.part")]
    newest = max([int(path.name[5:]) for path in common.whole(folder)], default=0)
    return {"removal" if step < newest else "save" for step in steps}


def reach(moment: str, started: Started, draw: random.Random) -> bool:
    """Wait until the moment, but for a random short time more; False if the run ended before."""
    until = time.monotonic() + draw.uniform(0, 15)
    if moment == "any":
        return started.wait_for(lambda: time.monotonic() > until)
    if not started.wait_for(lambda: " steps on " in started.said()):  # what was left half done is gone now
        return False
    if moment == "end" and not started.wait_for(lambda: re.search("step 6 of 6, train:|/step-6\n", started.said())):
        return False
    if moment in ("save", "removal") and not started.wait_for(lambda: moment in half_done(started.folder), pause=0):
        return False
    time.sleep(draw.uniform(0, {"save": 0.02, "removal": 0}.get(moment, 1)))  # a removal takes a millisecond
    return started.running()


# ---------------------------------------------------------------- what must be the same


def is_rate(name: str) -> bool:
    return name.endswith("_per_s") or "seconds_" in name


def scalars_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of TensorBoard's scalars, without times, rates, and repeats of the last that late cuts leave."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it would say that a run was resumed
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in sorted(events.Tags()["scalars"]) if not is_rate(tag)]
    points = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    for each in points.values():
        while len(each) > 1 and each[-2] == each[-1]:
            each.pop()
    return points


def differences(folder: Path, whole: Path) -> list[str]:
    """What is not as in the run that nobody killed, or is there twice, or should be gone."""
    both = [lines(each / "metrics.jsonl") for each in (folder, whole)]
    metrics, expected = ([{key: line[key] for key in line if not is_rate(key)} for line in each] for each in both)
    found = [f"metrics.jsonl: {a} is not {b}" for a, b in zip(metrics, expected) if a != b][:1]
    found += [f"metrics.jsonl has {len(metrics)} lines, not {len(expected)}"] * (len(metrics) != len(expected))
    found += ["TensorBoard's scalars differ"] * (scalars_of(folder) != scalars_of(whole))
    for path in sorted(path.relative_to(whole) for path in [*whole.glob("model/*"), *whole.glob("eval.jsonl")]):
        found += [f"{path} differs"] * ((folder / path).read_bytes() != (whole / path).read_bytes())
    if (whole / "generations.json").exists():
        texts = [json.loads((each / "generations.json").read_text(encoding="utf-8")) for each in (folder, whole)]
        answers = [[answer | {"generator": ""} for answer in text] for text in texts]
        found += ["generations.json differs"] * (answers[0] != answers[1])
    return found + [f"{path.name} is left" for path in folder.rglob("*.part")]


# ---------------------------------------------------------------- the whole


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(OWN), help="scripts, with commas between")
    options = parser.parse_args()
    work = prepare(Path(tempfile.mkdtemp(prefix="kill-")))
    os.environ.setdefault("PCRM_CACHE", str(work / "cache"))
    draw, met, wrong, began = random.Random(options.seed), Counter(), [], time.monotonic()
    number = runs = resumes = 0
    while number < options.kills:
        script, ranks = draw.choice(options.only.split(",")), draw.choice((1, 2))
        config = Config(script, ranks, draw.choice((0, 2, 3)), draw.choice(("fp32", "fp32", "bf16")))
        launcher, keep = ranks == 2 and draw.random() < 0.2, draw.choice("12")
        moments = draw.choices(MOMENTS, k=min(draw.choice((1, 2, 3, 4)), options.kills - number))
        whole, folder, name = reference(config, work), work / f"run-{runs}", f"{config}{' launcher' * launcher}"
        runs, killed = runs + 1, True
        while killed:
            newest = [path.name for path in common.whole(folder)][-1:]
            started = run_of(config, work, folder, "--keep", keep, "--resume", launcher=launcher)
            killed = bool(moments) and reach(moment := moments.pop(0), started, draw)
            if killed:
                started.kill()
            status, said = started.status(), started.said()
            number, resumes, left = number + killed, resumes + bool(newest), common.whole(folder)
            if killed:
                inside = next(iter(half_done(folder) if " steps on " in said else ()), "neither")
                met[inside] += 1
                print(f"kill {number}: {name} keep {keep}, moment {moment}, in {inside}, left {left[-1:]}", flush=True)
            if " steps on " in said and newest and f"{newest[0]}\n" not in said:
                wrong.append(f"{folder} ({name}): did not go on from {newest[0]}: {said}")
            if newest and (not left or int(left[-1].name[5:]) < int(newest[0][5:])):
                wrong.append(f"{folder} ({name}): {newest[0]} is gone")
        found = [f"{status}\n{said}{started.said('err')}"] if any(status) else differences(folder, whole)
        wrong += [f"{folder} ({name}): {what}" for what in found]
        print(f"  {name}: {'; '.join(found) or 'as if nobody had killed it'}", flush=True)
    inside = ", ".join(f"{met[kind]} in a {kind}" for kind in ("save", "removal"))
    print(f"{number} kills ({inside}) of {runs} runs, {resumes} resumes, {time.monotonic() - began:.0f} s")
    print("\n".join(wrong) or "nothing lost")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
