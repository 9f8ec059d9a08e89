"""Checkpoints are whole or absent; damaged ones are named and skipped; divergence ends a training."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

import resumable
from maskcls_hf import MaskClsForUniversalSegmentation
from maskcls_hf.training import checkpoints
from maskcls_hf.training.checkpoints import (
    MANIFEST,
    WRITING,
    CheckpointNotFound,
    CorruptCheckpoint,
    checkpoint_to_resume,
    last_good_checkpoint,
    list_checkpoints,
    remove_leftovers,
    rotate,
    saving,
    verify,
)
from maskcls_hf.training.divergence import DivergenceError, check_finite, check_weights, reraise_as_divergence
from tiny import maskcls_config, segments


def write(output: Path, step: int, text: str = "abcdefgh") -> Path:
    final = output / f"checkpoint-{step}"
    with saving(final) as folder:
        (folder / "weights").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "part").write_text(str(step))
    return final


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(checkpoints.logger, "warning", said.append)
    return said


def truncate(folder: Path) -> None:
    os.truncate(folder / "weights", 4)


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "weights").read_bytes())
    data[3] ^= 4
    (folder / "weights").write_bytes(data)


def remove_a_file(folder: Path) -> None:
    (folder / "sub" / "part").unlink()


def remove_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def truncate_the_manifest(folder: Path) -> None:
    os.truncate(folder / MANIFEST, 20)


DAMAGES = {
    truncate: "weights has 4 bytes instead of 8",
    flip_a_bit: "the bytes of weights have changed",
    remove_a_file: "sub/part is missing",
    remove_the_manifest: "manifest.json is missing",
    truncate_the_manifest: "manifest.json cannot be read",
}


class TestWriting:
    def test_has_its_name_when_it_is_whole(self, tmp_path):
        with saving(tmp_path / "checkpoint-1") as folder:
            (folder / "weights").write_text("a")
            assert not (tmp_path / "checkpoint-1").exists() and not list_checkpoints(tmp_path)
        assert verify(tmp_path / "checkpoint-1") is None
        assert os.listdir(tmp_path) == ["checkpoint-1"]

    def test_an_error_leaves_nothing(self, tmp_path):
        with pytest.raises(OSError, match="full"), saving(tmp_path / "checkpoint-1") as folder:
            (folder / "weights").write_text("a")
            raise OSError("disc full")
        assert not list_checkpoints(tmp_path) and not list((tmp_path / WRITING).iterdir())

    def test_replaces_an_older_one_of_the_same_step(self, tmp_path):
        write(tmp_path, 1, "old")
        write(tmp_path, 1, "new")
        assert (tmp_path / "checkpoint-1" / "weights").read_text() == "new"
        assert os.listdir(tmp_path) == ["checkpoint-1"]

    def test_killed_while_it_replaces_one(self, tmp_path, monkeypatch):
        """Between the two renames the old one has lost its name and the new one has none yet."""
        write(tmp_path, 1, "old")
        rename, renamed = Path.rename, []

        def once(self: Path, target: Path) -> Path:
            if renamed:
                raise KeyboardInterrupt
            renamed.append(target)
            return rename(self, target)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "rename", once)
            write(tmp_path, 1, "new")
        assert last_good_checkpoint(tmp_path) is None
        remove_leftovers(tmp_path)
        assert (tmp_path / "checkpoint-1" / "weights").read_text() == "old"
        assert os.listdir(tmp_path) == ["checkpoint-1"]


class TestFinding:
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_a_damaged_one_is_named_and_the_one_before_is_used(self, damage, tmp_path, warnings):
        for step in (9, 10, 100):
            write(tmp_path, step)
        damage(tmp_path / "checkpoint-100")
        assert last_good_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
        (warning,) = warnings
        assert str(tmp_path / "checkpoint-100") in warning and DAMAGES[damage] in warning

    def test_none(self, tmp_path):
        (tmp_path / "checkpoint-best").mkdir()
        (tmp_path / "checkpoint-3").touch()
        assert last_good_checkpoint(tmp_path) is None and last_good_checkpoint(tmp_path / "absent") is None

    def test_all_damaged(self, tmp_path, warnings):
        truncate(write(tmp_path, 1))
        remove_a_file(write(tmp_path, 2))
        with pytest.raises(CorruptCheckpoint, match="(?s)checkpoint-2: sub/part.*checkpoint-1: weights"):
            checkpoint_to_resume(tmp_path)

    def test_files_that_were_added_do_no_harm(self, tmp_path):
        (write(tmp_path, 1) / "notes.txt").write_text("mine")
        assert verify(tmp_path / "checkpoint-1") is None

    def test_leftovers_are_removed(self, tmp_path):
        write(tmp_path, 1)
        (tmp_path / WRITING / "checkpoint-2").mkdir(parents=True)
        (tmp_path / WRITING / "checkpoint-2" / "weights").write_text("ab")
        assert checkpoint_to_resume(tmp_path) == tmp_path / "checkpoint-1"
        assert os.listdir(tmp_path) == ["checkpoint-1"]


class TestRotation:
    def remaining(self, output: Path) -> list[int]:
        return [int(path.name.split("-")[1]) for path in list_checkpoints(output)]

    def test_the_oldest_go(self, tmp_path):
        for step in (5, 10, 15, 20):
            write(tmp_path, step)
        rotate(tmp_path, 2, tmp_path / "checkpoint-20")
        assert self.remaining(tmp_path) == [15, 20]
        rotate(tmp_path, None, tmp_path / "checkpoint-20")
        assert self.remaining(tmp_path) == [15, 20]

    def test_the_best_stays(self, tmp_path):
        for step in (5, 10, 15):
            write(tmp_path, step)
        rotate(tmp_path, 1, tmp_path / "checkpoint-15", best=tmp_path / "checkpoint-5")
        assert self.remaining(tmp_path) == [5, 15]

    def test_the_last_good_one_stays(self, tmp_path):
        """A truncated one takes no place of a good one, nor does one of a later step."""
        for step in (5, 10, 15, 30):
            write(tmp_path, step)
        truncate(tmp_path / "checkpoint-10")
        rotate(tmp_path, 2, tmp_path / "checkpoint-15")
        assert self.remaining(tmp_path) == [5, 15]
        rotate(tmp_path, 1, tmp_path / "checkpoint-15")
        assert self.remaining(tmp_path) == [15]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    resumable.train_trainer(output, resume=False, workers=0, batch=2, steps=7)
    return output


class TestTrainer:
    """Checkpoints of a real training."""

    @pytest.fixture
    def output(self, trained, tmp_path) -> Path:
        return Path(shutil.copytree(trained, tmp_path / "run"))

    @pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "ema.pt"])
    def test_goes_on_from_the_one_before_a_damaged_one(self, name, output, trained, warnings):
        assert [path.name for path in list_checkpoints(output)] == ["checkpoint-6", "checkpoint-7"]
        os.truncate(output / "checkpoint-7" / name, os.path.getsize(output / "checkpoint-7" / name) // 2)
        (output / "losses.txt").unlink()
        resumable.train_trainer(output, resume=True, workers=0, batch=2, steps=7)
        assert any("checkpoint-7" in warning and name in warning for warning in warnings)
        assert (output / "losses.txt").read_text().split()[::2] == ["7", "-7"]
        assert verify(output / "checkpoint-7") is None

    def test_all_damaged(self, output, warnings):
        for path in list_checkpoints(output):
            (path / "rng_state.pth").unlink()
        with pytest.raises(CorruptCheckpoint, match="rng_state.pth is missing"):
            resumable.train_trainer(output, resume=True, workers=0, batch=2)

    def test_nothing_to_go_on_from(self, tmp_path):
        with pytest.raises(CheckpointNotFound, match="no checkpoint in"):
            resumable.train_trainer(tmp_path, resume=True, workers=0, batch=2)

    def test_a_named_checkpoint_must_be_whole(self, output):
        (output / "checkpoint-7" / "scheduler.pt").unlink()
        with pytest.raises(CorruptCheckpoint, match=r"checkpoint-7 is not a whole checkpoint: scheduler.pt is missing"):
            resumable.train_trainer(output, resume=str(output / "checkpoint-7"), workers=0, batch=2)

    def test_the_best_checkpoint_has_its_final_name(self, tmp_path):
        trainer = resumable.make_trainer(
            tmp_path, workers=0, batch=2, steps=3, eval_steps=1, save_steps=1, load_best_model_at_end=True,
            save_total_limit=1,
        )  # fmt: skip
        trainer.train()
        best = Path(trainer.state.best_model_checkpoint)
        assert best in list_checkpoints(tmp_path)
        saved = json.loads((best / "trainer_state.json").read_text())
        assert saved["best_model_checkpoint"] == str(best) and verify(best) is None

    def test_final_model_and_evaluation_have_the_averaged_weights(self, tmp_path):
        trainer = resumable.make_trainer(tmp_path, workers=0, batch=2, steps=2)
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
        trainer.save_model(tmp_path / "final")
        loaded = MaskClsForUniversalSegmentation.from_pretrained(tmp_path / "final")
        averaged = trainer.ema.average.module.state_dict()
        assert all(torch.equal(value, averaged[name]) for name, value in loaded.state_dict().items())
        raw = trainer.model.state_dict()
        assert any(not torch.equal(value, raw[name]) for name, value in loaded.state_dict().items())
        trainer.ema = None
        assert trainer.evaluate()["eval_loss"] != loss


class TestDivergence:
    def test_names_step_term_and_checkpoint(self, tmp_path):
        write(tmp_path, 40)
        truncate(write(tmp_path, 60))
        terms = {"loss_mask": torch.tensor(math.nan), "loss_dice": torch.tensor(1.0)}
        with pytest.raises(DivergenceError) as error:
            check_finite(torch.tensor(math.nan), terms, 73, tmp_path)
        assert "loss_mask, loss became NaN or infinite in step 73" in str(error.value)
        assert f"The last good checkpoint is {tmp_path / 'checkpoint-40'}." in str(error.value)

    def test_gradients_count(self, tmp_path):
        with pytest.raises(DivergenceError, match=r"^gradient norm .* step 2. There is no good checkpoint"):
            check_finite(torch.tensor(1.0), {}, 2, tmp_path, grad_norm=torch.tensor(math.inf))

    def test_finite(self, tmp_path):
        check_finite(torch.tensor(1.0), {"loss_mask": torch.tensor(0.0)}, 1, tmp_path, grad_norm=3.0)

    def test_other_errors_of_the_forward_pass_stay(self):
        with pytest.raises(ValueError, match="labels") as error, reraise_as_divergence(1):
            raise ValueError("labels do not fit")
        assert not isinstance(error.value, DivergenceError)

    @pytest.mark.parametrize(
        ("weight", "options", "message"),
        [
            (math.nan, {}, r"The class cost of image 0"),
            (1.0, {"cross_entropy_weight": 3e38, "mask_weight": 3e38}, r"The matching cost of image 0 .* overflows"),
        ],
    )
    def test_costs_of_the_matcher(self, tmp_path, weight, options, message):
        model = MaskClsForUniversalSegmentation(maskcls_config(**options))
        nn.init.constant_(model.segmentation_module.class_predictor.weight, weight)
        nn.init.constant_(model.segmentation_module.mask_embedder.layers[-1].bias, 1e3)
        masks, labels = segments([(64, 64)], [2])
        with pytest.raises(DivergenceError, match=rf"step 8\. {message}"), reraise_as_divergence(8, tmp_path):
            model(torch.randn(1, 3, 64, 64), mask_labels=masks, class_labels=labels)

    def test_weights(self, tmp_path):
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        check_weights(model, 5, tmp_path)
        model[1].running_var[1] = math.inf
        with pytest.raises(DivergenceError, match=r"1.running_var became NaN or infinite by step 5"):
            check_weights(model, 5, tmp_path)

    @pytest.mark.parametrize("what", ["loss", "gradient", "weight", "matching"])
    def test_ends_a_training_before_its_checkpoint(self, what, tmp_path):
        trainer = resumable.make_trainer(tmp_path, workers=0, batch=2, steps=8, save_steps=2)
        trainer.add_callback(Poison(trainer, what, step=4))
        with pytest.raises(DivergenceError) as error:
            trainer.train()
        message = str(error.value)
        assert "step 4" in message and f"The last good checkpoint is {tmp_path / 'checkpoint-2'}." in message
        assert {"loss": "loss_dice", "gradient": "gradient norm", "weight": ".weight", "matching": "The mask cost"}[
            what
        ] in message
        assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"]


class Poison(TrainerCallback):
    """Makes something NaN or infinite in one step."""

    def __init__(self, trainer, what: str, step: int):
        self.trainer, self.what, self.step = trainer, what, step

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step + 1 != self.step:
            return
        model = self.trainer.model
        if self.what == "loss":
            loss = model.criterion.losses["mask"]

            def poisoned(*args):
                sums = loss(*args)
                return sums | {"loss_dice": sums["loss_dice"] * math.nan}

            poisoned.normalizer = loss.normalizer
            model.criterion.losses["mask"] = poisoned
        elif self.what == "gradient":
            next(model.parameters()).register_hook(lambda gradient: gradient * math.inf)
        elif self.what == "matching":
            nn.init.constant_(list(model.segmentation_module.mask_embedder.parameters())[-1], math.nan)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step and self.what == "weight":
            nn.init.constant_(next(self.trainer.model.parameters()), math.nan)
