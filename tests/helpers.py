"""What several test files use."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_file(folder: Path, *rows: dict) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def launch(script: str, ranks: int, *argv: str) -> subprocess.CompletedProcess:
    """Plain Python for 0 ranks, else the deepspeed launcher."""
    launcher = (
        [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks)] if ranks else [sys.executable]
    )
    # Another port for each test run, so that two on one machine do not meet.
    port = ["--master_port", str(20000 + os.getpid() % 20000)] if ranks else []
    # Without what common.start() has set in this process.
    own = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    environment = {name: value for name, value in os.environ.items() if name not in own}
    return subprocess.run(
        [*launcher, *port, str(ROOT / script), *argv], capture_output=True, text=True, env=environment
    )
