"""Nothing that a resume loads runs code, whoever has written the folder."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as sharded
from safetensors.torch import load_file

from maskcls_hf.models.checkpoint_manifest import MANIFEST, sha256
from maskcls_hf.training import TimeBudget, TrainingLog
from maskcls_hf.training.checkpoints import FORCE, FORCE_NOT, CorruptCheckpoint, list_checkpoints, tensors_only
from recipes import write_recipe, write_squares
from test_recipe_run import arguments, train_accelerate, train_trainer

FILES = {
    train_accelerate: ["optimizer.bin", "random_states_0.pkl"] + [f"custom_checkpoint_{i}.pkl" for i in range(4)],
    train_trainer: ["optimizer.pt", "scheduler.pt", "rng_state.pth", "callbacks.pt", "ema.pt"],
}


class Evil:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of each script's finished training, with the arguments of a resume."""
    folder = tmp_path_factory.mktemp("trained")
    recipe, squares = write_recipe(folder), write_squares(folder / "squares")
    for script in FILES:
        script.main(arguments(recipe, squares, folder / script.__name__))
    return lambda script, out: (shutil.copytree(folder / script.__name__, out), arguments(recipe, squares, out))[1]


@pytest.mark.parametrize(
    ("script", "name"), [(script, name) for script, names in FILES.items() for name in names], ids=str
)
def test_a_resume_runs_nothing(script, name, trained, tmp_path):
    out, mark = tmp_path / "out", tmp_path / "mark"
    options = trained(script, out)
    shutil.rmtree(out / "checkpoint-6")
    (checkpoint,) = list_checkpoints(out)
    path, manifest = checkpoint / name, json.loads((checkpoint / MANIFEST).read_text())
    torch.save({"state": Evil(mark)}, path)
    assert name in manifest["files"]
    manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(SystemExit, match=r"checkpoint-4 is not loaded: a file in it asks for \w+.mkdir"):
        script.main([*options, "--resume"])
    assert not mark.exists()


def test_a_recipe_that_is_damaged_does_not_matter(trained, tmp_path, caplog):
    for text in ("", "model: {a: 1}"):
        out = tmp_path / "out"
        options = trained(train_trainer, out)
        (out / "recipe.yaml").write_text(text)
        train_trainer.main([*options, "--resume"])
        assert "recipe.yaml" in caplog.text and (out / "recipe.yaml").read_text() != text
        caplog.clear()
        shutil.rmtree(out)


@pytest.mark.parametrize("state", ["{}", "null", '{"global_step": 4, "log_history": {}}', "[" * 100_000, None])
def test_a_state_of_another_kind_is_said(state, trained, tmp_path):
    """Of the training; None: it is missing."""
    options = trained(train_trainer, tmp_path / "out")
    checkpoint = tmp_path / "out" / "checkpoint-6"
    path, manifest = checkpoint / "trainer_state.json", json.loads((checkpoint / MANIFEST).read_text())
    if state is None:
        path.unlink()
        del manifest["files"][path.name]
    else:
        path.write_text(state)
        manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(SystemExit, match="checkpoint-6"):
        train_trainer.main([*options, "--resume"])


def test_a_model_of_other_sizes_is_said(trained, tmp_path):
    for script in FILES:
        options = trained(script, tmp_path / script.__name__)
        with pytest.raises(SystemExit, match="checkpoint-6 cannot be loaded: .*size mismatch"):
            script.main([*options, "--resume", "--set=model.num_queries=5"])


class TestTensorsOnly:
    def test_what_states_hold(self, tmp_path):
        """Random numbers of numpy, scores that are numbers of numpy."""
        state = {"numpy": np.random.get_state(), "score": np.float64(0.5), "count": np.int64(3), "list": [1, "a", None]}
        torch.save(state, tmp_path / "states.pkl")
        with tensors_only(tmp_path):
            loaded = torch.load(tmp_path / "states.pkl", weights_only=True)
        assert loaded["score"] == 0.5 and loaded["count"] == 3 and loaded["list"] == [1, "a", None]
        assert (loaded["numpy"][1] == state["numpy"][1]).all()

    def test_nothing_global_is_left_changed(self, tmp_path, monkeypatch):
        monkeypatch.setenv(FORCE_NOT, "1")
        torch.serialization.add_safe_globals([np.dtype])
        try:
            before = set(torch.serialization.get_safe_globals())
            with pytest.raises(CorruptCheckpoint), tensors_only(tmp_path):
                assert os.environ[FORCE] == "1"
                raise pickle.UnpicklingError("broken")
            assert set(torch.serialization.get_safe_globals()) == before
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(list(before - {np.dtype}))
        assert FORCE not in os.environ and os.environ[FORCE_NOT] == "1"

    def test_callers_that_ask_for_more(self, tmp_path):
        torch.save(Evil(tmp_path / "mark"), tmp_path / "states.pkl")
        with pytest.raises(CorruptCheckpoint, match="mkdir"), tensors_only(tmp_path):
            torch.load(tmp_path / "states.pkl", weights_only=False)
        assert not (tmp_path / "mark").exists()

    @pytest.mark.parametrize("content", [b"", b"PK\3\4", b"\x80\4.", b"text", bytes(600)])
    def test_broken_files(self, content, tmp_path):
        (tmp_path / "states.pkl").write_bytes(content)
        with pytest.raises(CorruptCheckpoint, match="cannot be loaded") as caught, tensors_only(tmp_path):
            torch.load(tmp_path / "states.pkl")
        assert "PyTorch 2.6" not in str(caught.value), "no advice to run what is in it"

    @pytest.mark.parametrize("content", [b"", b"text", bytes(64)])
    def test_broken_weights(self, content, tmp_path):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(CorruptCheckpoint, match="cannot be loaded"), tensors_only(tmp_path):
            load_file(tmp_path / "model.safetensors")

    def test_states_of_another_kind(self, tmp_path):
        optimizer = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())
        for owner in (optimizer, TrainingLog(3), TimeBudget(1.0)):
            for state in (None, [], {}, {"entries": [1], "minutes_spent": "1"}, {"entries": [{}]}):
                with pytest.raises(CorruptCheckpoint, match="cannot be loaded"), tensors_only(tmp_path):
                    owner.load_state_dict(state)


class TestShardedStates:
    """Those of torch.distributed.checkpoint, which has a plain pickle in `.metadata`."""

    @pytest.fixture
    def saved(self, tmp_path):
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}
        sharded.save(state, checkpoint_id=tmp_path / "shards", no_dist=True)
        return tmp_path, {"model": torch.nn.Linear(3, 2).state_dict(), "optimizer": optimizer.state_dict(), "step": 0}

    def test_they_load(self, saved):
        folder, state = saved
        with tensors_only(folder):
            sharded.load(state, checkpoint_id=folder / "shards", no_dist=True)
        assert state["step"] == 3

    @pytest.mark.parametrize("where", ["metadata", "shard"])
    def test_they_run_nothing(self, where, saved):
        folder, state = saved
        evil = Evil(folder / "mark")
        if where == "metadata":
            (folder / "shards" / ".metadata").write_bytes(pickle.dumps(evil))
        else:
            shutil.rmtree(folder / "shards")
            sharded.save({**state, "step": evil}, checkpoint_id=folder / "shards", no_dist=True)
        with pytest.raises(CorruptCheckpoint, match="mkdir"), tensors_only(folder):
            sharded.load(state, checkpoint_id=folder / "shards", no_dist=True)
        assert not (folder / "mark").exists()
