"""One process group and one cache for the whole test run; nothing is read from the network."""

import functools
import os
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PCRM_CACHE"] = tempfile.mkdtemp(prefix="pcrm-tests-")
worker = os.environ.get("PYTEST_XDIST_WORKER")
if worker and hasattr(os, "sched_setaffinity"):  # each of pytest-xdist's workers has its own cores
    cores, count = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, cores[int(worker[2:]) :: count] or cores)

import common  # before torch

import pytest
import torch
import transformers

import reward


@pytest.fixture(scope="session")
def process():
    return common.start(seed=0)


@pytest.fixture(scope="session")
def toy(process) -> str:
    return common.toy_model()


@pytest.fixture(scope="session")
def tokenizer(toy):
    return common.load_tokenizer(toy, False)


@pytest.fixture(scope="session")
def run(process):
    """run(script, "--flag", "value", ...) or run(script, "--flag value ...") runs a script's main in this process."""

    def call(script, *argv: str) -> None:
        argv = argv[0].split() if len(argv) == 1 else list(argv)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            script.main(common.parse_args(script.Args, script.preset, argv))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    return call


@pytest.fixture
def train(run):
    """run() of reward.py."""
    return functools.partial(run, reward)


@pytest.fixture(scope="session")
def toy_reward(toy, tokenizer, tmp_path_factory) -> str:
    """The folder of the embedded model as a reward model, with a random head."""
    folder = tmp_path_factory.mktemp("toy") / "reward"
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(toy, num_labels=1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
