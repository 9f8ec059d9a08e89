"""A training that is killed with SIGKILL and resumed equals one that was not, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import resumable
from maskcls_hf.training.checkpoints import WRITING, last_good_checkpoint, list_checkpoints
from recipes import write_recipe
from test_data import write_instances

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")


def start(output: Path, processes: int, *options: str, script: str = resumable.__file__) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, script, *options]
    output.mkdir(parents=True, exist_ok=True)
    started = []
    for rank in range(processes):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if processes > 1:
            environment |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
            }  # fmt: skip
        with (output / f"log-{rank}.txt").open("a") as log:
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
    return started


def finish(output: Path, processes: list[subprocess.Popen]) -> None:
    try:
        for rank, process in enumerate(processes):
            assert process.wait(timeout=300) == 0, (output / f"log-{rank}.txt").read_text()[-3000:]
    finally:
        kill(processes)


def kill(processes: list[subprocess.Popen]) -> None:
    """SIGKILL for each process and the loader workers that it has started."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def kill_when_stopped(output: Path, processes: list[subprocess.Popen]) -> None:
    try:
        until = time.monotonic() + 300
        while not (output / "stopped").exists():
            failed = [rank for rank, process in enumerate(processes) if process.poll() is not None]
            assert not failed, (output / f"log-{failed[0]}.txt").read_text()[-3000:]
            assert time.monotonic() < until
            time.sleep(0.02)
    finally:
        kill(processes)


def losses(output: Path) -> dict[str, str]:
    """Step -> loss, in hexadecimal; of a step that was made twice, the second."""
    return dict(line.split() for line in (output / "losses.txt").read_text().splitlines())


def assert_same(output: Path, reference: Path) -> None:
    assert losses(output) == losses(reference)
    assert len(losses(reference)) == resumable.STEPS + resumable.STEPS // resumable.EVALUATE_EVERY
    for kind, expected in torch.load(reference / "weights.pt").items():
        weights = torch.load(output / "weights.pt")[kind]
        for name, tensor in expected.items():
            assert torch.equal(weights[name], tensor), (kind, name)


def test_killed_while_it_writes_a_checkpoint(tmp_path):
    """The checkpoint of step 6 is half written; the training goes on from step 3, in the middle of an epoch."""
    reference, output = tmp_path / "whole", tmp_path / "killed"
    running = start(output, 1, str(output), "--loop=trainer", "--stop=inside", "--stop-step=6")
    reference.mkdir()
    resumable.train_trainer(reference, resume=False, workers=2, batch=2)
    kill_when_stopped(output, running)
    assert (output / WRITING / "checkpoint-6" / "optimizer.pt").exists()
    assert last_good_checkpoint(output) == output / "checkpoint-3" and len(list_checkpoints(output)) == 1
    resumable.train_trainer(output, resume=True, workers=2, batch=2)
    assert not (output / WRITING).exists()
    assert_same(output, reference)


def test_a_finished_training_makes_no_step_more(tmp_path):
    resumable.train_trainer(tmp_path, resume=False, workers=0, batch=2, steps=3)
    before, lines = torch.load(tmp_path / "weights.pt"), losses(tmp_path)
    resumable.train_trainer(tmp_path, resume=True, workers=0, batch=2, steps=3)
    assert losses(tmp_path) == lines
    for name, tensor in torch.load(tmp_path / "weights.pt")["model"].items():
        assert torch.equal(tensor, before["model"][name]), name


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("loop", ["trainer", "accelerate"])
class TestBitForBit:
    @pytest.fixture
    def reference(self, loop, processes, tmp_path_factory) -> Path:
        output = tmp_path_factory.mktemp("reference")
        finish(output, start(output, processes, str(output), f"--loop={loop}", "--batch=2"))
        return output

    def test_wherever_it_is_killed(self, loop, processes, reference, tmp_path):
        stops = [("inside", 6), ("before_rename", 6), ("after", random.Random().randint(4, 8)), ("after", 6)]
        for number, (stop, step) in enumerate(stops):
            output = tmp_path / str(number)
            options = (str(output), f"--loop={loop}", "--batch=2")
            kill_when_stopped(output, start(output, processes, *options, f"--stop={stop}", f"--stop-step={step}"))
            finish(output, start(output, processes, *options, "--resume"))
            print(stop, step)
            assert_same(output, reference)


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


class Example:
    """Runs of a script on tiny data, two steps an epoch."""

    def __init__(
        self,
        folder: Path,
        script: str,
        processes: int,
        wrapper: str | None = None,
        model: dict | None = None,
        **training,
    ):
        self.folder, self.processes = folder, processes
        self.recipe = write_recipe(
            folder,
            schedule={"max_steps": 12},
            model=model or {},
            training={"batch_size": 4, "save_steps": 3, **training},
            evaluation={"tasks": ["semantic"], "every_steps": 3},
        )
        if not (folder / "squares").exists():
            for split in ("train", "val"):
                write_instances(folder / "squares", split, count=9)
        path = str(EXAMPLES / f"{script}.py")
        self.script, self.wrapped = (path, []) if wrapper is None else (wrapper, [path])

    def start(self, out: Path, *more: str) -> list[subprocess.Popen]:
        options = [f"--recipe={self.recipe}", f"--data={self.folder / 'squares'}", f"--out={out}", *more]
        return start(self.logs(out), self.processes, *self.wrapped, *options, script=self.script)

    def run(self, out: Path, *more: str) -> None:
        finish(self.logs(out), self.start(out, *more))

    def logs(self, out: Path) -> Path:
        return self.folder / f"log-{out.name}"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("script", ["train_trainer", "train_accelerate"])
def test_examples_killed_again_and_again(script, processes, tmp_path):
    """At random moments, while they write a checkpoint every third step."""
    example = Example(tmp_path, script, processes, workers=2)
    reference, output, moments = tmp_path / "whole", tmp_path / "killed", random.Random()
    example.run(reference, "--accumulate=2")
    for number in range(3):
        running = example.start(output, "--accumulate=2", *["--resume"] * (number > 0))
        seen = list_checkpoints(output)
        while list_checkpoints(output) in ([], seen) and all(process.poll() is None for process in running):
            time.sleep(0.01)
        time.sleep(moments.random() / 2)
        kill(running)
    example.run(output, "--accumulate=2", "--resume")
    assert log_of(output) == log_of(reference) and len(log_of(reference)) >= 12
    assert_same_weights(output, reference)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_trainer", "train_accelerate"])
def test_epochs_and_images_held_out_in_two_processes(script, tmp_path):
    """As in one, and after a resume; the length is in epochs, the data has no validation split."""
    one, output, resumed = tmp_path / "one", tmp_path / "two", tmp_path / "resumed"
    options = {"model": {"dropout": 0.0, "freeze_batch_norm": True}}
    example = Example(tmp_path, script, 1, **options)
    shutil.rmtree(tmp_path / "squares" / "val")
    length = ("--set=schedule.epochs=4.5", "--set=data.val_share=0.12")  # 8 images left, 2 steps an epoch
    example.run(one, *length, "--accumulate=2")
    two = Example(tmp_path, script, 2, **options)
    two.run(output, *length)
    expected = log_of(one)
    assert max(step for step, _ in expected) == 9
    for out in (one, output):
        entries = json.loads((out / "trainer_state.json").read_text())["log_history"]
        assert max(entry["epoch"] for entry in entries) == 4.5
    assert log_of(output) == pytest.approx(expected, rel=1e-3)
    assert (output / "split.json").read_text() == (one / "split.json").read_text()
    assert len(json.loads((one / "split.json").read_text())["images"]) == 1
    for rank in range(2):
        said = (two.logs(output) / f"log-{rank}.txt").read_text().count("1 of its 9 images are held out")
        assert said == (rank == 0)
    shutil.copytree(output, resumed)
    for step in (6, 9):
        shutil.rmtree(resumed / f"checkpoint-{step}")
    two.run(resumed, *length, "--resume")
    assert log_of(resumed) == log_of(output)
    assert_same_weights(resumed, output)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_trainer", "train_accelerate"])
def test_sharded_weights(script, tmp_path):
    """FSDP2 in two processes: the steps of one process, an exact resume, a model that loads."""
    one, output, resumed = tmp_path / "one", tmp_path / "sharded", tmp_path / "resumed"
    options = {"model": {"dropout": 0.0, "freeze_batch_norm": True}, "ema_decay": None}
    Example(tmp_path, script, 1, **options).run(one)
    sharded = Example(tmp_path, script, 2, str(Path(__file__).parent / "fsdp_on_cpu.py"), **options)
    sharded.run(output)
    assert (output / "checkpoint-12" / "pytorch_model_fsdp.bin").is_file(), "it was not sharded"
    expected = log_of(one)
    assert {key: value for key, value in log_of(output).items() if key[1] == "loss"} == pytest.approx(
        {key: value for key, value in expected.items() if key[1] == "loss"}, rel=1e-3
    )
    assert json.loads((output / "config.json").read_text()) == json.loads((one / "config.json").read_text())
    assert {path.name for path in one.glob("*.py")} == {path.name for path in output.glob("*.py")}
    shutil.copytree(output, resumed)
    for step in (9, 12):
        shutil.rmtree(resumed / f"checkpoint-{step}")
    sharded.run(resumed, "--resume")
    assert log_of(resumed) == log_of(output)
    assert_same_weights(resumed, output)


def assert_same_weights(output: Path, reference: Path) -> None:
    weights = load_file(output / "model.safetensors")
    for name, tensor in load_file(reference / "model.safetensors").items():
        assert torch.equal(weights[name], tensor), name


def log_of(output: Path) -> dict[tuple[int, str], float]:
    """Losses and scores of each step."""
    entries = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return {
        (entry["step"], name): value
        for entry in entries
        for name, value in entry.items()
        if "loss" in name and name != "train_loss" or "iou" in name
    }
