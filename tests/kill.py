"""Kills runs at random moments, goes on with --resume, and compares with runs that nobody killed: bit for bit.

    python tests/kill.py --kills 40 --seed 0 [--only sft,ppo]

Each run is a few steps of a script on one or two ranks, at a ZeRO stage and a precision, killed (SIGKILL) one to four
times. Moments: any; in the steps; in a save; in the removal of an old checkpoint; after the last step. What a kill met
is told by what it left on the disk. Exit status 1 if a resumed run differs from the one that nobody killed.
"""

import argparse
import contextlib
import json
import logging
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "--max_steps 8 --log_every 3 --save_every 2 --eval_every 3 --global_batch_size 8"
OWN = dict(
    sft="--micro_batch_size 2 --generate 2",
    reward="--micro_batch_size 2 --constraint random",
    dpo="--micro_batch_size 2 --generate 2 --constraint len_rat",
    ppo="--micro_batch_size 1 --minibatches 2 --generate 3 --max_new_tokens 12",
)
MOMENTS = ("any", "steps", "save", "removal", "end")
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


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
        stages = [f"--zero_stage {self.stage}"]
        if self.script == "ppo":
            critic = {0: 0, 1: 1, 2: 3, 3: 3}[self.stage]
            stages = [f"--policy_zero_stage {self.stage} --critic_zero_stage {critic}"]
            stages += [f"--policy_model {work}/sft/model --reward_model {work}/reward/model"]
        files = [
            f"--{flag} {few_rows(work, f'{data}_{part}', count)}"
            for flag, part, count in (("dataset", "train", 24), ("eval_dataset", "eval", 4))
        ]  # three steps are an epoch
        return " ".join([FLAGS, OWN[self.script], f"--dtype {self.dtype}", *stages, *files]).split()


def few_rows(work: Path, name: str, count: int) -> Path:
    """A file of the first different rows of an embedded one."""
    path = work / f"{name}.jsonl"
    if not path.exists():
        lines = (ROOT / "data" / path.name).read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(list(dict.fromkeys(lines))[:count]), encoding="utf-8")
    return path


# ---------------------------------------------------------------- processes


@dataclass
class Started:
    """The processes of a run: one for each rank, or the launcher. What they say is in files beside the folder."""

    folder: Path
    processes: list = field(default_factory=list)

    def said(self, stream: str = "out", rank: int = 0) -> str:
        return Path(f"{self.folder}.{rank}.{stream}").read_text(encoding="utf-8", errors="replace")

    def wait_for(self, condition, limit: float = 300, pause: float = 0.002) -> bool:
        """Until condition() is true; False if the run ended before."""
        until = time.monotonic() + limit
        while not condition():
            if not self.running():
                return False
            if time.monotonic() > until:
                self.kill()
                raise TimeoutError(f"{self.folder}: nothing happened for {limit} s; {self.said()}{self.said('err')}")
            time.sleep(pause) if pause else None
        return True

    def running(self) -> bool:
        return any([process.poll() is None for process in self.processes])  # polls each

    def status(self, limit: float = 300) -> list[int]:
        """The exit status of each process."""
        self.wait_for(lambda: not self.running(), limit, pause=0.05)
        return [process.wait() for process in self.processes]

    def kill(self) -> None:
        """SIGKILL to the whole process group at once, and until none of it is left."""
        if not self.running():
            return
        group = self.processes[0].pid
        os.killpg(group, signal.SIGKILL)
        for process in self.processes:
            process.wait()
        with contextlib.suppress(ProcessLookupError):
            for _ in range(5000):  # the launcher's own, which somebody else waits for
                os.killpg(group, 0)
                time.sleep(0.001)


def start(command: list[str], folder: Path, ranks: int = 1, launcher: bool = False, file_limits=()) -> Started:
    """Start `command` (a Python file and its flags) in a process group of its own, on some ranks.

    file_limits: for each rank the size above which a write fails, in bytes; none where it is None.
    """
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    environment |= dict(PYTHONUNBUFFERED="1", HF_HUB_OFFLINE="1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command, started = [sys.executable, *command], Started(folder)
    if launcher:
        deepspeed = str(Path(sys.executable).with_name("deepspeed"))
        command = [deepspeed, "--num_gpus", str(ranks), "--master_port", port, *command[1:]]
    for rank in range(1 if launcher else ranks):
        if ranks > 1 and not launcher:
            own = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, MASTER_PORT=port)
            environment |= {name: str(value) for name, value in own.items()} | {"MASTER_ADDR": "127.0.0.1"}
        limit = file_limits[rank] if file_limits else None
        with open(f"{folder}.{rank}.out", "w") as out, open(f"{folder}.{rank}.err", "w") as err:
            started.processes.append(
                subprocess.Popen(
                    command,
                    stdout=out,
                    stderr=err,
                    env=environment,
                    process_group=started.processes[0].pid if rank else 0,
                    preexec_fn=limit
                    and (lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))),
                )
            )
    return started


def run_of(config: Config, work: Path, folder: Path, *flags: str, **options) -> Started:
    """Start the run of a configuration."""
    command = [str(ROOT / f"{config.script}.py"), *config.flags(work), "--output_dir", str(folder), *flags]
    return start(command, folder, config.ranks, **options)


def reference(config: Config, work: Path) -> Path:
    """The folder of the run that nobody killed; made when it is first asked for."""
    if config.script == "ppo":
        for script in ("sft", "reward"):  # the models that it starts from
            if not (work / script).exists():
                reference(Config(script), work).rename(work / script)
    folder = work / f"whole-{config}"
    if not folder.exists():
        started = run_of(config, work, folder)
        if any(started.status()):
            raise RuntimeError(f"{config} fails without a kill:\n{started.said()}{started.said('err')}")
    return folder


# ---------------------------------------------------------------- moments


def newest_step(folder: Path) -> int | None:
    """Of the newest checkpoint that has its whole name."""
    steps = [path.name[5:] for path in folder.glob("checkpoints/step-*")]
    return max([int(step) for step in steps if step.isdigit()], default=None)


def half_done(folder: Path) -> dict[str, str]:
    """The names of what a save or a removal has left half done, and which of both."""
    try:
        names = os.listdir(folder / "checkpoints")
    except FileNotFoundError:
        return {}
    kinds = {r"step-\d+\.\d+\.part": "save", r"step-\d+\.part": "removal"}
    return {name: kind for name in names for pattern, kind in kinds.items() if re.fullmatch(pattern, name)}


def reach(moment: str, started: Started, draw: random.Random, seconds: float) -> bool:
    """Wait until the moment, but for a random short time more; False if the run ended before."""
    folder, before = started.folder, set(half_done(started.folder))
    if moment == "any":
        until = time.monotonic() + draw.uniform(0, seconds)
        return started.wait_for(lambda: time.monotonic() > until)
    if not started.wait_for(lambda: " steps on " in started.said()):
        return False
    if moment == "steps":
        wait = draw.uniform(0, 1.5)
    elif moment == "end":
        ends = re.compile(r"step 8 train:|resumed from \S+step-8\b")
        if not started.wait_for(lambda: ends.search(started.said())):
            return False
        wait = draw.uniform(0, 1.5)
    else:
        seen, nth = set(), draw.choice((1, 1, 1, 2))

        def found() -> bool:
            seen.update(name for name, kind in half_done(folder).items() if kind == moment and name not in before)
            return len(seen) >= nth

        if not started.wait_for(found, pause=0):  # a removal takes a millisecond
            return False
        wait = draw.uniform(0, 0.02) if moment == "save" else 0
    time.sleep(wait)
    return started.running()


# ---------------------------------------------------------------- what must be the same


def is_rate(name: str) -> bool:
    return name.endswith("_per_s") or name.startswith("seconds_")


def metrics_of(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without times and rates."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{name: value for name, value in line.items() if not is_rate(name)} for line in lines]


def scalars_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each of TensorBoard's scalars, without times and rates."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it would say that a run was resumed
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in sorted(events.Tags()["scalars"]) if not is_rate(tag.split("/")[1])]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def differences(folder: Path, whole: Path) -> list[str]:
    """What is not as in the run that nobody killed, or is there twice, or should be gone."""
    found, metrics, scalars = [], metrics_of(folder), scalars_of(folder)
    twice = [key for key, count in Counter((line["step"], line["split"]) for line in metrics).items() if count > 1]
    found += [f"metrics.jsonl has {key} twice" for key in twice]
    found += [f"metrics.jsonl: {a} is not {b}" for a, b in zip(metrics, metrics_of(whole)) if a != b][:1]
    found += ["metrics.jsonl has other lines"] * (len(metrics) != len(metrics_of(whole)))
    found += [
        f"TensorBoard: {tag} has steps {[step for step, _ in points]}"
        for tag, points in scalars.items()
        if [step for step, _ in points] != sorted({step for step, _ in points})
    ][:3]
    found += ["TensorBoard's scalars differ"] * (scalars != scalars_of(whole))
    files = {path.relative_to(whole) for path in whole.glob("model/*") if path.name != "README.md"}  # names its folder
    for path in sorted(files | {Path("eval.jsonl")}):
        if (whole / path).exists() and (folder / path).read_bytes() != (whole / path).read_bytes():
            found.append(f"{path} differs")
    if (whole / "generations.json").exists():
        ours, theirs = (json.loads((each / "generations.json").read_text(encoding="utf-8")) for each in (folder, whole))
        texts = [[{**answer, "generator": ""} for answer in answers] for answers in (ours, theirs)]
        found += ["generations.json differs"] * (texts[0] != texts[1])
    found += [f"{path.name} is left" for path in [*folder.glob("*.part"), *folder.glob("checkpoints/*.part")]]
    return found


# ---------------------------------------------------------------- the whole


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(OWN), help="scripts, with commas between")
    parser.add_argument("--moments", default=",".join(MOMENTS), help="moments, with commas between")
    parser.add_argument("--work", default="", help="folder for the runs; a temporary one if it is not given")
    options = parser.parse_args()
    work = Path(options.work or tempfile.mkdtemp(prefix="kill-"))
    work.mkdir(exist_ok=True)
    os.environ.setdefault("PCRM_CACHE", str(work / "cache"))
    draw, met, wrong, number, runs, resumes = random.Random(options.seed), Counter(), [], 0, 0, 0
    began = time.monotonic()
    while number < options.kills:
        script, ranks = draw.choice(options.only.split(",")), draw.choice((1, 2))
        config = Config(script, ranks, draw.choice((0, 2, 3)), draw.choice(("fp32", "fp32", "bf16")))
        launcher, keep = ranks == 2 and draw.random() < 0.2, draw.choice((1, 2))
        moments = draw.choices(options.moments.split(","), k=draw.choice((1, 2, 3, 4)))
        moments = moments[: options.kills - number]
        clock = time.monotonic()
        whole = reference(config, work)
        seconds = time.monotonic() - clock if time.monotonic() - clock > 2 else 10  # of a run, about
        folder, runs, start_again = work / f"run-{runs}", runs + 1, False
        name = f"{config}{' launcher' * launcher}"
        while True:
            newest, before = newest_step(folder), set(half_done(folder))
            started = run_of(config, work, folder, "--keep", str(keep), "--resume", launcher=launcher)
            moment = moments.pop(0) if moments else None
            killed = moment and reach(moment, started, draw, seconds)
            if killed:
                started.kill()
            status, said = started.status(), started.said()
            number, resumes = number + bool(killed), resumes + start_again
            if killed:
                left = {kind for name, kind in half_done(folder).items() if name not in before}
                inside = next(iter(sorted(left)), "neither")
                met[inside] += 1
                steps = f"newest checkpoint {newest_step(folder)}"
                print(f"kill {number}: {name} keep {keep}, moment {moment}, in {inside}, {steps}", flush=True)
            if " steps on " in said and newest is not None and f"step-{newest}\n" not in said:
                wrong.append(f"{folder} ({name}): did not go on from step {newest}: {said}")
            if newest is not None and (newest_step(folder) or 0) < newest:
                wrong.append(f"{folder} ({name}): the checkpoint of step {newest} is gone")
            start_again = True
            if not killed:
                break
        if any(status) or "Traceback" in started.said("err"):
            wrong.append(f"{folder} ({name}): status {status}\n{said}{started.said('err')}")
        else:
            found = differences(folder, whole)
            wrong += [f"{folder} ({name}): {what}" for what in found]
            print(f"  {name}: {'; '.join(found) or 'as if nobody had killed it'}", flush=True)
    inside = ", ".join(f"{met[kind]} in a {kind}" for kind in ("save", "removal"))
    print(f"{number} kills ({inside}) of {runs} runs, {resumes} resumes, {time.monotonic() - began:.0f} s")
    print("\n".join(wrong) or "nothing lost")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
