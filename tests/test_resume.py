"""No run is lost: what is killed, stopped or refused room goes on with --resume to the same bits, or says why not."""

import common

import contextlib
import errno
import itertools
import json
import os
import resource
import shutil
import signal

import kill
import pytest
import safetensors.torch
from helpers import lines

import dpo
import ppo
import reward
import sft

SCRIPTS = dict(sft=sft, reward=reward, dpo=dpo, ppo=ppo)
SFT = kill.Config("sft")


class Cut(Exception):
    """Ends a run where a kill would."""


@pytest.fixture(scope="module")
def work(run, tmp_path_factory):
    """The folder of the runs that nobody cuts, and of the models that PPO starts from."""
    folder = tmp_path_factory.mktemp("work")
    for name in ("sft", "reward"):
        run(SCRIPTS[name], *kill.Config(name).flags(folder), "--output_dir", str(folder / name))
    return folder


@pytest.fixture
def train(run, work):
    """train(config, folder, "--flag value ...") runs a configuration in this process."""

    def call(config, folder, flags: str = "") -> None:
        run(SCRIPTS[config.script], *config.flags(work), "--output_dir", str(folder), *flags.split())

    return call


@pytest.fixture
def whole(train, work):
    """whole(config) is the folder of a run that nobody cuts."""

    def call(config):
        folder = work / f"whole-{config}"
        if not folder.exists():
            train(config, folder)
        return folder

    return call


@pytest.fixture
def cut(train, monkeypatch):
    """cut(config, folder, step, "--flag value ...") ends a run after a step, before its checkpoint."""

    def call(config, folder, step: int, flags: str = "") -> None:
        real = common.Checkpoints.step_done

        def step_done(self, now: int, **state) -> None:
            if now == step:
                raise Cut
            real(self, now, **state)

        with monkeypatch.context() as patch, pytest.raises(Cut):
            patch.setattr(common.Checkpoints, "step_done", step_done)
            train(config, folder, flags)

    return call


def steps(folder) -> list[int]:
    return [int(path.name[5:]) for path in common.whole(folder)]


# ---------------------------------------------------------------- the same bits


CONFIGS = ("sft 0 fp32", "sft 3 bf16", "reward 1 bf16", "reward 2 fp16", "dpo 2 bf16", "ppo 1 bf16")


@pytest.mark.parametrize("name", CONFIGS)
def test_cut_twice_a_run_comes_to_the_same(train, whole, cut, tmp_path, monkeypatch, name):
    """Once with lines written since the checkpoint, once with steps that no line has yet; epochs of three steps."""
    device = common.deepspeed.accelerator.get_accelerator()
    monkeypatch.setattr(device, "is_fp16_supported", lambda: True)
    script, stage, dtype = name.split()
    config = kill.Config(script, 1, int(stage), dtype)
    cut(config, tmp_path / "run", 6)
    assert steps(tmp_path / "run") == [2, 4] and metrics_step(tmp_path / "run") == 6
    cut(config, tmp_path / "run", 5, "--resume")
    assert steps(tmp_path / "run") == [2, 4] and metrics_step(tmp_path / "run") == 3
    train(config, tmp_path / "run", "--resume")
    assert kill.differences(tmp_path / "run", whole(config)) == []


def metrics_step(folder) -> int:
    return lines(folder / "metrics.jsonl")[-1]["step"]


def test_a_checkpoint_between_the_cut_and_the_next_line(train, whole, cut, tmp_path):
    """Its note of how long metrics.jsonl is must not count the lines that were cut off."""
    for step, flags in ((7, "--save_every 4"), (6, "--save_every 5 --resume")):
        cut(SFT, tmp_path / "run", step, flags)
    cut(SFT, tmp_path / "run", 7, "--save_every 0 --resume")
    train(SFT, tmp_path / "run", "--resume")
    assert kill.differences(tmp_path / "run", whole(SFT)) == []


def test_cut_after_the_last_evaluation(train, whole, tmp_path, monkeypatch):
    """The checkpoint of the last step is older than that evaluation, which is not there twice in the end."""

    def stop(*_):
        raise Cut

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(common, "answer_prompts", stop)
        train(SFT, tmp_path / "run")
    train(SFT, tmp_path / "run", "--resume")
    assert kill.differences(tmp_path / "run", whole(SFT)) == []


def test_ppo_counts_on(train, cut, tmp_path, monkeypatch, capsys):
    """Five steps whose KL is below 0, with a cut after three of them: the warning comes at the fifth, and once."""
    config, real, calls = kill.Config("ppo"), ppo.per_token, itertools.count()

    def per_token(module, forward, *rest):
        """The reference's log-probabilities, of every second call for a language model, are too high."""
        high = forward is not ppo.critic_values and next(calls) % 2
        return real(module, forward, *rest) + high

    monkeypatch.setattr(ppo, "per_token", per_token)
    cut(config, tmp_path / "run", 4, "--save_every 3")
    assert json.loads((tmp_path / "run/checkpoints/step-3/state.json").read_text())["state"]["below_zero"] == 3
    train(config, tmp_path / "run", "--resume")
    warnings = [line for line in capsys.readouterr().out.splitlines() if "has been below 0" in line]
    assert [line.split(":")[1] for line in warnings] == [" step 5"]


def test_ppo_stopped_by_its_kl_and_by_a_signal_is_at_its_end(train, tmp_path, monkeypatch):
    """In one step: what goes on from that checkpoint trains no further."""
    config, real = kill.Config("ppo"), common.Checkpoints.step_done

    def step_done(self, step: int, last: bool = False, **state) -> None:
        self.signal = signal.SIGTERM if last else 0
        real(self, step, last, **state)

    with monkeypatch.context() as patch, pytest.raises(common.Stopped):
        patch.setattr(common.Checkpoints, "step_done", step_done)
        train(config, tmp_path / "run", "--max_kl 1e-9")
    stopped = metrics_step(tmp_path / "run")
    assert steps(tmp_path / "run")[-1] == stopped < 8
    train(config, tmp_path / "run", "--max_kl 1e-9 --resume")
    assert metrics_step(tmp_path / "run") == stopped and (tmp_path / "run" / "generations.json").exists()


@pytest.mark.parametrize("script, flags", [("sft", ""), ("ppo", "--max_kl 1e-9")])
def test_after_the_last_step_a_signal_ends_the_run_at_once(train, tmp_path, monkeypatch, script, flags):
    """No step will end with a checkpoint any more; before it, a signal is kept until the step is done."""
    real, found = common.optimizer_step, []

    def optimizer_step(*args):
        found.append(signal.getsignal(signal.SIGTERM))
        return real(*args)

    def save_model(*_):
        found.append(signal.getsignal(signal.SIGTERM))
        raise Cut

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(common, "optimizer_step", optimizer_step)
        patch.setattr(common, "save_model", save_model)
        train(kill.Config(script), tmp_path / "run", flags)
    assert len(found) > 1 and found[-1] is signal.SIG_DFL and signal.SIG_DFL not in found[:-1]


def test_a_model_that_moves_away_costs_no_checkpoint(train, toy, tmp_path, monkeypatch):
    """What it was is known since the start, not only when the first checkpoint is written."""
    model, real = shutil.copytree(toy, tmp_path / "model"), common.optimizer_step

    def optimizer_step(*args):
        shutil.rmtree(model, ignore_errors=True)
        return real(*args)

    monkeypatch.setattr(common, "optimizer_step", optimizer_step)
    train(SFT, tmp_path / "run", f"--model {model}")
    assert steps(tmp_path / "run") == [6, 8]


# ---------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def left(request, tmp_path_factory, run, work):
    """A run that was cut after step 5, with the checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("left") / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Cut):
        real = common.Metrics.add

        def add(self, step: int, *rest, **more):
            if step == 6:
                raise Cut
            return real(self, step, *rest, **more)

        patch.setattr(common.Metrics, "add", add)
        run(sft, *SFT.flags(work), "--output_dir", str(folder))
    return folder


@pytest.fixture
def folder(left, tmp_path):
    """A copy of it."""
    return shutil.copytree(left, tmp_path / "run")


@pytest.fixture
def refuses(train):
    """refuses("a", "b", …, config=, folder=, flags=) is refused in one line that has all of these in it."""

    def call(*facts: str, folder, flags: str = "--resume", config=SFT) -> None:
        common.model_version.cache_clear()  # a process of its own has read no file
        with pytest.raises(common.InputError) as caught:
            train(config, folder, flags)
        message = str(caught.value)
        assert "\n" not in message and len(message) < 1000
        for fact in facts:
            assert fact in message, (fact, message)

    return call


def test_another_flag(refuses, folder):
    refuses("--seed is 7, but 42", folder=folder, flags="--resume --seed 7")
    refuses("--micro_batch_size is 4, but 2", folder=folder, flags="--resume --micro_batch_size 4")
    assert steps(folder) == [2, 4]


def test_other_rows_or_weights_under_the_same_name(refuses, cut, toy, tmp_path, work):
    model, data = shutil.copytree(toy, tmp_path / "model"), tmp_path / "rows.jsonl"
    rows = (work / "sft_train.jsonl").read_text()
    data.write_text(rows)
    flags = f"--model {model} --dataset {data}"
    cut(SFT, tmp_path / "run", 3, flags)
    data.write_text(rows.replace("Aisle", "aisle"))
    refuses("the digest of the rows is ", "but was ", folder=tmp_path / "run", flags=f"{flags} --resume")
    data.write_text(rows)
    weights = safetensors.torch.load_file(model / "model.safetensors")
    weights["model.norm.weight"] += 1
    safetensors.torch.save_file(weights, model / "model.safetensors", {"format": "pt"})
    refuses("--model is ", "but was ", folder=tmp_path / "run", flags=f"{flags} --resume")
    common.model_version.cache_clear()


def test_checkpoints_are_not_replaced_unasked(refuses, train, whole, folder):
    refuses("holds checkpoints", "--resume", "--overwrite", folder=folder, flags="")
    assert steps(folder) == [2, 4]
    train(SFT, folder, "--overwrite --save_every 0")
    assert steps(folder) == [] and kill.differences(folder, whole(SFT)) == []


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_checkpoint_that_cannot_be_read(refuses, cut, tmp_path, stage):
    """Any of its files, gone or cut short; and what is older stays."""
    config = kill.Config("sft", 1, stage)
    cut(config, tmp_path / "run", 5)
    newest = tmp_path / "run" / "checkpoints" / "step-4"
    files = [path for path in newest.rglob("*") if path.is_file()]
    assert len(files) == (3 if stage else 2)
    for path in files:
        kept = path.read_bytes()
        path.unlink()
        refuses("step-4", config=config, folder=tmp_path / "run")
        path.write_bytes(kept[: len(kept) // 2])
        refuses("step-4", config=config, folder=tmp_path / "run")
        path.write_bytes(kept)
    assert steps(tmp_path / "run") == [2, 4]


# ---------------------------------------------------------------- where it begins


def test_without_a_checkpoint_it_begins_at_the_start(train, whole, cut, capsys, tmp_path):
    """With no folder, with a run that left none, and with one whose save was not done."""
    cut(SFT, tmp_path / "run", 2, "--resume")
    (tmp_path / "run" / "checkpoints" / "step-2.123.part" / "engine").mkdir(parents=True)
    train(SFT, tmp_path / "run", "--resume")
    assert "resumed" not in capsys.readouterr().out
    assert kill.differences(tmp_path / "run", whole(SFT)) == []


@pytest.mark.parametrize("suffix", [".123.part", ".part"])
def test_what_is_half_saved_or_half_removed_is_not_trusted(train, whole, capsys, folder, suffix):
    newest = folder / "checkpoints" / "step-4"
    newest.rename(f"{newest}{suffix}")
    train(SFT, folder, "--resume")
    assert f"resumed from {folder}/checkpoints/step-2\n" in capsys.readouterr().out
    assert kill.differences(folder, whole(SFT)) == []


@pytest.mark.parametrize("flags", ["--overwrite", "--resume"])
def test_killed_while_an_old_run_was_removed(train, whole, folder, monkeypatch, flags):
    """A large checkpoint takes a while: what is left of it is neither refused nor gone on from."""

    def rmtree(path, **_):
        raise Cut

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(shutil, "rmtree", rmtree)
        train(SFT, folder, "--overwrite")
    train(SFT, folder, flags)
    assert kill.differences(folder, whole(SFT)) == []


def test_the_newest_stay(train, tmp_path):
    for keep, left in ((0, [8]), (3, [4, 6, 8])):
        train(SFT, tmp_path / str(keep), f"--keep {keep}")
        assert steps(tmp_path / str(keep)) == left


def test_a_finished_run_says_so(train, whole, capsys):
    with pytest.raises(SystemExit) as ended:
        train(SFT, whole(SFT), "--resume")
    assert not ended.value.code and f"{whole(SFT)} holds this run, finished" in capsys.readouterr().out


# ---------------------------------------------------------------- no room


@contextlib.contextmanager
def room_for(size: int):
    """Inside, a write beyond `size` bytes of a file fails, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 100, 100_000])
def test_without_room_the_run_goes_on(train, whole, tmp_path, monkeypatch, capsys, room):
    """A save that fails leaves the checkpoint before as it is, and nothing else; the next one is made again."""
    real, seen = common.Checkpoints.save, []

    def save(self, step: int, state: dict) -> None:
        with room_for(room) if step in (4, 6) else contextlib.nullcontext():
            try:
                real(self, step, state)
            finally:
                seen.append([path.name for path in sorted((self.folder / "checkpoints").iterdir())])

    monkeypatch.setattr(common.Checkpoints, "save", save)
    train(SFT, tmp_path / "run")
    assert seen == [["step-2"], ["step-2"], ["step-2"], ["step-2", "step-8"]]
    said = capsys.readouterr().out.splitlines()
    warnings = [line for line in said if line.startswith("warning: no checkpoint at step")]
    assert len(warnings) == 2 and all("File too large" in line for line in warnings), said
    assert kill.differences(tmp_path / "run", whole(SFT)) == []


def test_what_cannot_be_made_or_removed_ends_no_run(train, whole, tmp_path, monkeypatch, capsys):
    """A file in the place of the folder of the checkpoints, then an old one that stays where it is."""
    real, rmtree, folder = common.Checkpoints.save, shutil.rmtree, tmp_path / "run"

    def save(self, step: int, state: dict) -> None:
        (folder / "checkpoints").write_text("") if step == 2 else (folder / "checkpoints").unlink() if step == 4 else 0
        real(self, step, state)

    def busy(path, *rest):
        if path == folder / "checkpoints" / "step-4.part":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        rmtree(path, *rest)

    monkeypatch.setattr(common.Checkpoints, "save", save)
    monkeypatch.setattr(shutil, "rmtree", busy)
    train(SFT, folder, "--keep 1")
    said = capsys.readouterr().out
    assert "warning: no checkpoint at step 2: " in said and "step-4 cannot be removed: " in said
    assert steps(folder) == [8]
    rmtree(folder / "checkpoints" / "step-4.part")
    assert kill.differences(folder, whole(SFT)) == []


# ---------------------------------------------------------------- processes


@pytest.fixture(scope="module", autouse=True)
def ends(work, tmp_path_factory):
    """The runs of ends.py, started before all tests of this file, as most of them wait: what they left, in the end."""
    folder = tmp_path_factory.mktemp("ends")
    started = kill.start([str(kill.ROOT / "tests" / "ends.py"), str(folder), *SFT.flags(work)], folder / "ends")
    try:
        yield lambda: (started.status(), folder)[1]
    finally:
        started.kill()


def kill_in_a_save(started) -> None:
    assert started.wait_for(lambda: kill.half_done(started.folder), pause=0)
    started.kill()
    assert list(kill.half_done(started.folder).values()) == ["save"]


def test_ctrl_c_and_a_kill_in_ppo(whole, work, tmp_path):
    """Ctrl-C without --save_every, then a kill in a save; each time the same command again."""
    config, folder = kill.Config("ppo", 1, 2), tmp_path / "run"
    first = kill.run_of(config, work, folder, "--save_every", "0")
    assert first.wait_for(lambda: "step 1 train:" in first.said())
    os.kill(first.processes[0].pid, signal.SIGINT)
    assert first.status() == [130]
    (step,) = steps(folder)
    last = first.said("err").splitlines()[-1]
    assert f"ppo.py: stopped after step {step}" in last and f"--resume --output_dir {folder}" in last

    killed = kill.run_of(config, work, folder, "--resume")
    kill_in_a_save(killed)
    assert f"resumed from {folder}/checkpoints/step-{step}\n" in killed.said()
    kept = steps(folder)[-1]
    again = kill.run_of(config, work, folder, "--resume")
    assert again.status() == [0] and f"resumed from {folder}/checkpoints/step-{kept}\n" in again.said()
    assert kill.differences(folder, whole(config)) == []


def test_two_ranks_lose_nothing(work, refuses, tmp_path):
    """SIGTERM to one rank only; then no room on the other rank only, and a kill in a save; and a broken shard."""
    config, folder = kill.Config("reward", 2, 3), tmp_path / "run"
    whole = kill.reference(config, work)
    first = kill.run_of(config, work, folder, "--resume", "--save_every", "0")
    assert first.wait_for(lambda: "step 1 train:" in first.said())
    os.kill(first.processes[1].pid, signal.SIGTERM)
    assert first.status() == [143, 143]
    (step,) = steps(folder)
    assert "stopped after" in first.said("err") and "stopped after" not in first.said("err", 1)

    refuses("the number of ranks is 1, but was 2", folder=shutil.copytree(folder, tmp_path / "one"), config=config)
    shard = next(shutil.copytree(folder, tmp_path / "broken").rglob("*rank_1*optim_states.pt"))
    os.truncate(shard, shard.stat().st_size // 2)
    broken = kill.run_of(config, work, tmp_path / "broken", "--resume")

    full = kill.run_of(config, work, folder, "--resume", "--save_every", "1", file_limits=(None, 1 << 20))
    assert full.wait_for(lambda: f"no checkpoint at step {step + 1}: " in full.said())
    kill_in_a_save(full)
    warnings = [line for line in full.said().splitlines() if line.startswith("warning: no checkpoint")]
    assert all("zero_pp_rank_1" in line and "File too large" in line for line in warnings)
    assert steps(folder) == [step]

    last = kill.run_of(config, work, folder, "--resume")
    assert last.status() == [0, 0] and f"resumed from {folder}/checkpoints/step-{step}\n" in last.said()
    assert kill.differences(folder, whole) == []
    assert broken.status() == [1, 1] and "cannot load the checkpoint" in broken.said("err", 1).splitlines()[-1]
    assert "Traceback" not in broken.said("err") + broken.said("err", 1)


# ---------------------------------------------------------------- what ends a rank


def test_how_ranks_end(ends):
    """Within a minute, whatever the others wait for, with the reason and nothing else in the last line."""
    folder = ends()
    ended = json.loads((folder / "ended.json").read_text())
    lost = "sft.py: error: rank {} has lost another rank, whose message, if it left one, stands above"
    watched = "error: rank {} ends, because rank {} has ended"
    signalled = "signal: a checkpoint follows the step in hand; a second signal ends the run at once"
    expected = {  # status and last line of rank 0 and of rank 1
        "fails": [(1, lost.format(0)), (1, "sft.py: error: rank 1: RuntimeError: a fault")],
        "refuses": [(1, lost.format(0)), (1, "sft.py: error: a fault to mend")],
        "dies": [(1, lost.format(0)), (-9, "")],
        "first dies": [(-9, ""), (1, lost.format(1))],
        "first asleep": [(1, watched.format(0, 1)), (-9, "")],
        "slow last file": [(0, ""), (0, "")],
        "interrupted": [(130, ""), (130, "")],
        "SIGTERM twice": [(-15, signalled)],
        "SIGINT twice": [(-2, signalled)],
    }
    found, seconds = {}, {}
    for way, ranks in expected.items():
        errors = [(folder / f"{way}.{rank}.err").read_text() for rank in range(len(ranks))]
        assert [("Traceback" in error) for error in errors] == [way == "fails" and rank for rank in range(len(ranks))]
        both = [ended[f"{way} {rank}"] for rank in range(len(ranks))]
        found[way] = [(status, (["", *error.splitlines()])[-1]) for (status, _), error in zip(both, errors)]
        seconds[way] = max(time for _, time in both) - min(time for _, time in both)
    assert found == expected
    assert max(seconds.values()) < 60 and seconds["refuses"] > 5, seconds
