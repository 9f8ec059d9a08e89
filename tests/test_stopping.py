"""Ctrl-C and SIGTERM end a training with a checkpoint, from which it goes on as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from typer.testing import CliRunner

from maskcls_hf.cli.main import app
from maskcls_hf.metrics import Evaluator
from maskcls_hf.training import TrainingProgress, TrainingStopped, checkpoints, load_recipe, run, stop_signals, train
from maskcls_hf.training.checkpoints import list_checkpoints, verify
from maskcls_hf.training.stopping import SIGNALS, shield_workers
from recipes import write_recipe, write_squares
from test_recipe_run import arguments, logged, same, train_accelerate, train_trainer
from test_resume import Example, assert_same_weights, kill, log_of

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs signals")
SCRIPTS = [train_trainer, train_accelerate]


@pytest.fixture(scope="module")
def squares(tmp_path_factory) -> Path:
    return write_squares(tmp_path_factory.mktemp("squares"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """Six steps, evaluated after 2, 4 and 6, saved after 4 and 6."""
    return write_recipe(tmp_path_factory.mktemp("recipe"), evaluation={"tasks": ["semantic"], "every_steps": 2})


@pytest.fixture(scope="module", params=SCRIPTS, ids=lambda script: script.__name__)
def reference(request, tmp_path_factory, squares, recipe):
    out = tmp_path_factory.mktemp(request.param.__name__)
    request.param.main(arguments(recipe, squares, out))
    return request.param, out


@pytest.fixture(autouse=True)
def handlers():
    """Those of a terminal, also where the tests run in the background, which ignores what a terminal sends."""
    usual = {number: signal.SIG_DFL for number in SIGNALS} | {signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    left = {number: signal.signal(number, handler) for number, handler in before.items()}
    assert left == usual


def when(monkeypatch, owner, name: str, call: int, *numbers: int) -> None:
    """Send these signals in the given call of a function, counted from 1."""
    function, calls = getattr(owner, name), []

    def and_send(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            for number in numbers:
                os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, and_send)


INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
# Function, its call (`measure`: the first tries the evaluation before the training), signals
# -> exit code, what is said, steps of the checkpoints
MOMENTS = {
    "in a step": ((TrainingProgress, "advance", 3), (TERM,), 143, "SIGTERM: stopped after step 3, go on with", [3]),
    "Ctrl-C": ((TrainingProgress, "advance", 1), (INT,), 130, "SIGINT: stopped after step 1, go on with --resume", [1]),
    "terminal closed": ((TrainingProgress, "advance", 1), (HUP,), 129, "SIGHUP: stopped after step 1, go on with", [1]),
    "before an evaluation": ((TrainingProgress, "advance", 2), (TERM,), 143, "stopped after step 2, go on", [2]),
    "in an evaluation": ((Evaluator, "measure", 2), (TERM,), 143, "stopped after step 2, go on", [2]),
    "while it saves": ((checkpoints, "_write_manifest", 1), (TERM,), 143, "stopped after step 4, go on", [4]),
    "in the last evaluation": ((Evaluator, "measure", 6), (INT,), 130, "stopped after step 6, go on", [4, 6]),
    "twice": ((TrainingProgress, "advance", 5), (TERM, TERM), 143, ", at once: go on from the last", [4]),
    "twice while it saves": ((checkpoints, "_write_manifest", 2), (INT, TERM), 143, "after step 6, at once: ", [4]),
}  # fmt: skip


@pytest.mark.parametrize("moment", MOMENTS)
def test_goes_on_as_if_nothing_had_been(moment, reference, squares, recipe, tmp_path, monkeypatch, capfd):
    (owner, name, call), numbers, code, message, steps = MOMENTS[moment]
    script, whole = reference
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        when(patch, owner, name, call, *numbers)
        script.main(arguments(recipe, squares, out))
    assert stopped.value.code == code and message in capfd.readouterr().err
    assert [int(path.name.split("-")[1]) for path in list_checkpoints(out)] == steps
    assert all(verify(path) is None for path in list_checkpoints(out))
    assert not (out / "model.safetensors").exists() and not (out / ".writing").exists()
    script.main(arguments(recipe, squares, out, "--resume"))
    assert_same_weights(out, whole)
    same(logged(out), logged(whole))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_before_the_first_step(script, squares, recipe, tmp_path, monkeypatch, capfd):
    when(monkeypatch, run, "open_splits", 1, TERM)
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments(recipe, squares, tmp_path / "out"))
    assert stopped.value.code == 143
    assert "SIGTERM: stopped before the first step of this run" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_between_two_steps(script, squares, recipe, tmp_path, monkeypatch, capfd):
    """What is done has a checkpoint, whenever the signal comes."""
    when(monkeypatch, TrainingProgress, "resume_clock", 2, TERM)
    with pytest.raises(SystemExit):
        script.main(arguments(recipe, squares, tmp_path))
    (checkpoint,) = list_checkpoints(tmp_path)
    assert f"stopped after step {checkpoint.name.split('-')[1]}, go on" in capfd.readouterr().err


def test_nobody_reads_on(squares, recipe, tmp_path):
    """A Ctrl-C ends the `tee` that the output goes to, too: what cannot be said does not keep the checkpoint out."""
    command = [sys.executable, "-m", "maskcls_hf.cli", "train", *arguments(recipe, squares, tmp_path / "out")]
    running = subprocess.Popen([*command, "--set=schedule.max_steps=1000"], stderr=subprocess.PIPE, text=True)
    try:
        next(line for line in running.stderr if line.startswith("step 1/"))
        running.stderr.close()
        running.send_signal(INT)
        assert running.wait(timeout=100) == 130
    finally:
        running.kill()
    assert all(verify(path) is None for path in list_checkpoints(tmp_path / "out"))
    assert list_checkpoints(tmp_path / "out")


def test_command(squares, recipe, tmp_path, monkeypatch):
    when(monkeypatch, TrainingProgress, "advance", 1, TERM)
    result = CliRunner().invoke(app, ["train", *arguments(recipe, squares, tmp_path / "out")])
    assert result.exit_code == 143 and "SIGTERM: stopped after step 1, go on with --resume" in result.output


def test_while_the_final_model_is_saved(squares, recipe, tmp_path, monkeypatch):
    """It is not half written; the checkpoint of the last step is there."""
    recipe, out = load_recipe(recipe, ["schedule.max_steps=1"]), tmp_path / "out"
    when(monkeypatch, torch, "save", 6, INT)  # training_args.bin, after those of the checkpoint
    with pytest.raises(TrainingStopped, match="after step 1"):
        train(recipe, squares, out)
    assert sorted(os.listdir(out)) == ["checkpoint-1", "recipe.yaml"]


def test_in_another_thread(squares, recipe, tmp_path):
    recipe, results = load_recipe(recipe, ["schedule.max_steps=1"]), []
    thread = threading.Thread(target=lambda: results.append(train(recipe, squares, tmp_path / "out")))
    thread.start()
    thread.join()
    assert "eval_mean_iou" in results[0]


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # nohup, a shell's `&`
    try:
        with stop_signals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        assert stop.number is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_launcher_passes_on_what_came_from_the_terminal(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with stop_signals() as stop, stop.patient():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert stop.agreed()


class Slow(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        time.sleep(0.1)
        return os.getpid()


def test_workers_outlive_signals_to_the_group():
    loader = shield_workers(DataLoader(Slow(), batch_size=1, num_workers=1))
    assert shield_workers(loader).worker_init_fn.args == (None,), "not shielded twice"
    batches = iter(loader)
    worker = int(next(batches))
    for number in SIGNALS:
        subprocess.run(["kill", f"-{int(number)}", str(worker)], check=True)
    assert {int(batch) for batch in batches} == {worker}


def test_workers_end_when_their_process_says_so():
    batches = iter(shield_workers(DataLoader(Slow(), batch_size=1, num_workers=1, persistent_workers=True)))
    next(batches)
    (worker,) = batches._workers
    worker.terminate()
    worker.join(5)
    assert worker.exitcode == 0
    del batches


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_trainer", "train_accelerate"])
@pytest.mark.parametrize("whom", ["one rank", "all of the group"])
def test_processes_agree(script, whom, tmp_path):
    """On the step, with workers; the resume gives what an uninterrupted training gives."""
    example = Example(tmp_path, script, 2, workers=1, save_steps=100)
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    example.run(whole)
    running = example.start(out)
    log = example.logs(out) / "log-0.txt"
    try:
        while "step 2/" not in log.read_text():
            time.sleep(0.01)
        if whom == "one rank":
            running[1].send_signal(signal.SIGTERM)
        else:
            for process in running:
                os.killpg(process.pid, signal.SIGTERM)
        assert [process.wait(timeout=100) for process in running] == [143, 143], log.read_text()[-2000:]
    finally:
        kill(running)
    (checkpoint,) = list_checkpoints(out)
    assert f"stopped after step {checkpoint.name.split('-')[1]}, go on" in log.read_text()
    example.run(out, "--resume")
    assert_same_weights(out, whole)
    assert log_of(out) == log_of(whole)
