"""One process group and one cache for the whole test run; nothing is read from the network."""

import functools
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PCRM_CACHE"] = tempfile.mkdtemp(prefix="pcrm-tests-")

import pytest

import common
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


@pytest.fixture
def run(process):
    """run(script, "--constraint", "fixed", ...) runs a script's main in this process."""

    def call(script, *argv: str) -> None:
        script.main(common.parse_args(script.Args, script.preset, list(argv)))

    return call


@pytest.fixture
def train(run):
    """train("--constraint", "fixed", ...) runs reward.py's main in this process."""
    return functools.partial(run, reward)
