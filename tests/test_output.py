"""A training has its folder to itself, and says what it cannot write and what is left."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from maskcls_hf.training import TrainingProgress
from maskcls_hf.training.checkpoints import list_checkpoints, verify
from maskcls_hf.training.output import LOCK, FolderInUse, occupied, training_in
from maskcls_hf.utils.writing import CannotWrite
from recipes import write_recipe, write_squares
from test_recipe_run import arguments, train_accelerate, train_trainer

fcntl, resource = pytest.importorskip("fcntl"), pytest.importorskip("resource")
SCRIPTS = pytest.mark.parametrize("script", [train_trainer, train_accelerate], ids=lambda script: script.__name__)
HOLD = (
    "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); input()"
)


@pytest.fixture(scope="module")
def squares(tmp_path_factory) -> Path:
    return write_squares(tmp_path_factory.mktemp("squares"))


@pytest.fixture
def small_files():
    """Call it, and files can have 100 kB from then on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size=100_000: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


class TestLock:
    def test_another_process(self, tmp_path):
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLD, tmp_path / LOCK], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            holder.stdout.readline()
            with pytest.raises(FolderInUse, match=f"Another training writes to {tmp_path}"), occupied(tmp_path):
                pass
            assert (tmp_path / LOCK).exists()
        finally:
            holder.kill()  # SIGKILL: the lock goes with it
            holder.wait()
        with occupied(tmp_path):
            pass
        assert os.listdir(tmp_path) == []

    def test_the_same_process(self, tmp_path):
        with occupied(tmp_path):
            link = tmp_path.with_name("link")
            link.symlink_to(tmp_path)
            for path in (tmp_path, link):
                with pytest.raises(FolderInUse, match="in this process"), occupied(path):
                    pass
        with occupied(tmp_path):
            pass

    def test_a_disk_without_locks(self, tmp_path, monkeypatch, caplog):
        def fail(*arguments):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "lockf", fail)
        with occupied(tmp_path):
            pass
        assert "without locks" in caplog.text

    def test_a_child_does_not_keep_it(self, tmp_path):
        """Loader workers live on for some seconds when their process is killed."""
        with occupied(tmp_path):
            sleeper = os.fork()
            if not sleeper:
                os.execvp("sleep", ["sleep", "20"])
            probe = subprocess.run([sys.executable, "-c", HOLD.replace("LOCK_EX", "LOCK_EX | fcntl.LOCK_NB"),
                                    tmp_path / LOCK], input=b"\n", capture_output=True)  # fmt: skip
            assert b"BlockingIOError" in probe.stderr
        try:
            with occupied(tmp_path):
                pass
        finally:
            os.kill(sleeper, 9)
            os.waitpid(sleeper, 0)

    def test_folder_that_was_made_for_nothing(self, tmp_path):
        with pytest.raises(ValueError, match="no data"), training_in(tmp_path / "a" / "out"):
            raise ValueError("no data")
        assert not (tmp_path / "a" / "out").exists()

    @SCRIPTS
    def test_scripts(self, script, squares, tmp_path):
        recipe, out = write_recipe(tmp_path), tmp_path / "out"
        with occupied(out), pytest.raises(SystemExit, match=f"^Error: Another training .* writes to {out}"):
            script.main(arguments(recipe, squares, out))
        assert not out.exists()

    @SCRIPTS
    def test_a_model_is_not_replaced(self, script, squares, tmp_path):
        recipe, out = write_recipe(tmp_path), tmp_path / "out"
        out.mkdir()
        (out / "model.safetensors").write_text("mine")
        with pytest.raises(SystemExit, match=r"holds a model \(model.safetensors\), which would be replaced"):
            script.main(arguments(recipe, squares, out))
        assert (out / "model.safetensors").read_text() == "mine"

    @SCRIPTS
    def test_a_folder_in_the_place_of_a_file(self, script, squares, tmp_path):
        """Said before the training, not after it."""
        recipe, out = write_recipe(tmp_path), tmp_path / "out"
        for name in ("eval_results.json", "preprocessor_config.json"):
            (out / name).mkdir(parents=True)
            with pytest.raises(SystemExit, match=f"{name} is a folder, where the training writes a file"):
                script.main(arguments(recipe, squares, out))
            (out / name).rmdir()
        assert not any(out.iterdir())


class TestWhatCannotBeWritten:
    @SCRIPTS
    def test_a_checkpoint(self, script, squares, tmp_path, small_files, monkeypatch):
        """The one before is whole, and named; nothing is left of this one."""
        recipe, out = write_recipe(tmp_path), tmp_path / "out"
        advance = TrainingProgress.advance
        monkeypatch.setattr(
            TrainingProgress, "advance", lambda self, step: (small_files() if step == 5 else None, advance(self, step))
        )
        with pytest.raises(SystemExit) as ended:
            script.main(arguments(recipe, squares, out))
        assert ended.value.code == (
            f"Error: The checkpoint checkpoint-6 could not be written to {out}: File too large. "
            f"The last good checkpoint is {out / 'checkpoint-4'}."
        )
        assert sorted(os.listdir(out)) == ["checkpoint-4", "recipe.yaml"]
        assert verify(out / "checkpoint-4") is None

    @SCRIPTS
    @pytest.mark.parametrize(
        ("name", "what"),
        [
            ("recipe.yaml", "recipe.yaml could"),
            ("model.safetensors", "The model could"),
            ("trainer_state.json", "trainer_state.json could"),
            ("eval_results.json", "eval_results.json could"),
        ],
    )
    def test_a_file_of_the_results(self, script, name, what, squares, tmp_path, monkeypatch):
        recipe, out = write_recipe(tmp_path, schedule={"max_steps": 1}), tmp_path / "out"
        replace = os.replace

        def full(source, target):
            if Path(target) == out / name:
                raise OSError(errno.ENOSPC, "No space left on device")
            replace(source, target)

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(SystemExit) as ended:
            script.main(arguments(recipe, squares, out))
        left = "There is no good checkpoint to return to." if name == "recipe.yaml" else "The last good checkpoint is"
        message = f"Error: {what} not be written to {out}: No space left on device. {left}"
        assert ended.value.code.startswith(message), ended.value.code
        assert not (out / name).exists() and not [path for path in out.rglob("*") if "writing" in path.name]
        assert len(list_checkpoints(out)) == (name != "recipe.yaml")

    @SCRIPTS
    def test_tensorboard(self, script, squares, tmp_path, monkeypatch, capfd):
        from tensorboard.summary.writer.record_writer import RecordWriter

        def full(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        recipe, out = write_recipe(tmp_path), tmp_path / "out"
        monkeypatch.setattr(RecordWriter, "write", full)
        hook = threading.excepthook
        with pytest.raises(SystemExit, match="^Error: A file in .*out could not be written: No space left on device"):
            script.main(arguments(recipe, squares, out, "--tensorboard"))
        assert "Traceback" not in capfd.readouterr().err and threading.excepthook is hook

    def test_other_errors_stay(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="image.png"), training_in(tmp_path):
            (tmp_path / "data" / "image.png").read_bytes()

    @pytest.mark.parametrize("out", ["file", "file/out"])
    def test_a_file_in_place_of_a_folder(self, out, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises((CannotWrite, ValueError), match="is a file|Not a directory"), training_in(tmp_path / out):
            pass
