"""Runs of sft.py in which a rank dies, fails, sleeps or is told to end, for test_resume.py.

    python tests/ends.py FOLDER FLAG...

All at once, each rank forked from one process that has loaded the libraries: a start of Python for each would take
longer than the runs. FOLDER gets WAY.RANK.out and .err, and ended.json: status and time of each rank's end.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import common

import sft

# ---------------------------------------------------------------- what happens, on which rank


def at_step(step: int, action) -> None:
    """action() before the weights change."""
    real = common.optimizer_step

    def optimizer_step(now: int, *rest):
        if now == step:
            action()
        return real(now, *rest)

    common.optimizer_step = optimizer_step


def while_loading(action) -> None:
    real = common.load_data

    def load_data(args, encode, process):
        action(process)
        return real(args, encode, process)

    common.load_data = load_data


def signal_self(number: int) -> None:
    os.kill(os.getpid(), number)


def die() -> None:
    signal_self(signal.SIGKILL)


def fail() -> None:
    raise RuntimeError("a fault")


def refuse() -> None:
    raise common.InputError("a fault to mend")


def first_rank_asleep(rank: int) -> None:
    """Rank 0 works alone for two hours; the one that waits for it dies."""

    def action(process) -> None:
        threading.Timer(2, die if rank else int).start()
        common.on_rank_0(process, lambda: time.sleep(7200))

    while_loading(action)


def signals(number: int, seconds: float) -> None:
    """A step that takes two hours, and the signal twice, so many seconds apart."""

    def stuck() -> None:
        for after in (0, seconds):
            threading.Timer(after, signal_self, [number]).start()
        time.sleep(7200)

    at_step(3, stuck)


def slow_last_file(rank: int) -> None:
    """Rank 0 writes its last file for longer than another rank may be silent for: here 8 s."""
    real, wait = common.write_generations, common.ENDING.wait
    common.ENDING.wait = lambda seconds: wait(seconds / 5)

    def write_generations(*rest) -> None:
        time.sleep(12 * (rank == 0))
        real(*rest)

    common.write_generations = write_generations


def interrupted(rank: int) -> None:
    """Ctrl-C while rank 0 waits for rank 1, before there is anything to keep."""

    def action(process) -> None:
        if rank:
            time.sleep(2)
            signal_self(signal.SIGINT)
        threading.Timer(2, signal_self, [signal.SIGINT]).start()
        common.gather_objects(0)

    while_loading(action)


WAYS = {  # ranks, and what a rank does before it runs
    "fails": (2, lambda rank: rank and at_step(3, fail)),
    "refuses": (2, lambda rank: rank and at_step(3, refuse)),
    "dies": (2, lambda rank: rank and at_step(3, die)),
    "first dies": (2, lambda rank: rank or at_step(3, die)),
    "first asleep": (2, first_rank_asleep),
    "slow last file": (2, slow_last_file),
    "interrupted": (2, interrupted),
    "SIGTERM twice": (1, lambda rank: signals(signal.SIGTERM, 2.5)),
    "SIGINT twice": (1, lambda rank: signals(signal.SIGINT, 2.5)),
}

# ---------------------------------------------------------------- processes


def child(way: str, rank: int, port: int, folder: Path, flags: list[str]) -> None:
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{way}.{rank}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    ranks, prepare = WAYS[way]
    if ranks > 1:
        own = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, MASTER_PORT=port)
        os.environ |= {name: str(value) for name, value in own.items()} | {"MASTER_ADDR": "127.0.0.1"}
    sys.argv = ["sft.py", *flags, "--output_dir", str(folder / way)]
    status = 99
    try:
        prepare(rank)
        common.run(sft.main, sft.Args, sft.preset)
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main(folder: str, *flags: str) -> None:
    ports = [socket.create_server(("127.0.0.1", 0)) for _ in WAYS]
    numbers, children, ended = [port.getsockname()[1] for port in ports], {}, {}
    for port in ports:
        port.close()
    for way, port in zip(WAYS, numbers):
        for rank in range(WAYS[way][0]):
            if (pid := os.fork()) == 0:
                child(way, rank, port, Path(folder), list(flags))
            children[pid] = f"{way} {rank}"
    while children:
        pid, status = os.wait()
        ended[children.pop(pid)] = os.waitstatus_to_exitcode(status), time.monotonic()
    (Path(folder) / "ended.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main(*sys.argv[1:])
