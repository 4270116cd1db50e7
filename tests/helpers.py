"""What several test files use."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows_file(folder: Path, *rows: dict) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def launch(script: str, ranks: int, *argv: str) -> subprocess.CompletedProcess:
    """Plain Python for 0 ranks, else the deepspeed launcher. Flags as for the fixture `run`."""
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    port = str(20000 + os.getpid() % 20000)  # another for each test run, so that two on one machine do not meet
    launcher = [deepspeed, "--num_gpus", str(ranks), "--master_port", port] if ranks else [sys.executable]
    argv = argv[0].split() if len(argv) == 1 else argv
    # Without what common.start() has set in this process.
    own = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    environment = {name: value for name, value in os.environ.items() if name not in own}
    # The whole tree ends where a rank waits for one that does not come: torch would let it wait for two hours.
    command = ["timeout", "300", *launcher, str(ROOT / script), *argv]
    return subprocess.run(command, capture_output=True, text=True, env=environment)
