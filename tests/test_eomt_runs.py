"""EoMT by recipes, with Trainer and with the loop: annealed, frozen, with LoRA; resumed, merged; in two processes."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model
from typer.testing import CliRunner

from distributed import run_in_processes
from maskcls_hf import MaskClsForUniversalSegmentation, MaskClsImageProcessor
from maskcls_hf.cli.main import app
from maskcls_hf.inference.loading import load_model
from maskcls_hf.training import CollapseGuard, MaskClsTrainer, add_lora, load_recipe, prepare
from recipes import write_recipe, write_squares
from test_eomt import ours
from test_eomt_training import trainer_of
from test_recipe_run import arguments, logged, same, train_accelerate, train_trainer

VIT = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=32, patch_size=8)
MODEL = {
    "architecture": "encoder_only", "backbone_config": {"model_type": "dinov2", **VIT}, "query_blocks": 2,
    "upscale_blocks": 1, "num_queries": 8, "loss_points": 64,
}  # fmt: skip
OPTIMIZER = {"learning_rate": 1e-3, "layer_decay": 0.8}
SCHEDULE = {"max_steps": 6, "warmup_steps": 1, "backbone_warmup_steps": 1, "warmup_factor": 0.0}
SCRIPTS = {"trainer": train_trainer, "loop": train_accelerate}


@pytest.fixture(scope="module")
def squares(tmp_path_factory) -> Path:
    return write_squares(tmp_path_factory.mktemp("squares"))


def recipe_of(folder: Path, **sections) -> Path:
    return write_recipe(folder, **{"model": MODEL, "optimizer": OPTIMIZER, "schedule": SCHEDULE} | sections)


def vit_of(folder: Path) -> Path:
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**VIT)).save_pretrained(folder)
    return folder


def probabilities(folder: Path) -> list[float]:
    return json.loads((folder / "config.json").read_text())["mask_probabilities"]


def test_both_scripts_anneal_alike_and_resume(tmp_path, squares):
    recipe, weights = recipe_of(tmp_path), {}
    for name, script in SCRIPTS.items():
        out = tmp_path / name
        script.main(arguments(recipe, squares, out))
        assert probabilities(out) == [0, 0]
        weights[name] = load_file(out / "model.safetensors")
        log = logged(out)
        shutil.rmtree(out / "checkpoint-6")
        script.main(arguments(recipe, squares, out, "--resume"))
        resumed = load_file(out / "model.safetensors")
        assert all(torch.equal(value, resumed[n]) for n, value in weights[name].items())
        same(logged(out), log)
    assert all(torch.equal(value, weights["loop"][n]) for n, value in weights["trainer"].items())
    same(logged(tmp_path / "trainer"), logged(tmp_path / "loop"))
    assert probabilities(tmp_path / "trainer/checkpoint-4") == [0, 1]


@pytest.mark.parametrize("name", SCRIPTS)
def test_both_scripts_watch_for_empty_masks(tmp_path, squares, name, monkeypatch):
    """Each batch of the training, none of an evaluation; asked where losses are logged."""
    seen = []

    class Guard(CollapseGuard):
        def watch(self, outputs, class_labels):
            super().watch(outputs, class_labels)
            seen.append("watched" if self.found is not None else "nothing to say")

        def check(self, step, max_steps, warmup_steps):
            super().check(step, max_steps, warmup_steps)
            seen.append((step, max_steps, warmup_steps))

    monkeypatch.setattr(f"maskcls_hf.training.{name}.CollapseGuard", Guard)
    changes = ["--set=schedule.max_steps=4", "--set=training.log_steps=2", "--accumulate=2"]
    SCRIPTS[name].main(arguments(recipe_of(tmp_path), squares, tmp_path / "out", *changes))
    assert seen == [*["watched"] * 4, (2, 4, 2), *["watched"] * 4, (4, 4, 2)]


def test_probabilities_of_a_fine_tuned_model(tmp_path, squares, caplog):
    """They stay as stored, 0 as published, unless the recipe says to anneal anew."""
    caplog.set_level(logging.WARNING)
    model = MaskClsForUniversalSegmentation(prepare(load_recipe(recipe_of(tmp_path)), squares).model.config)
    model.config.mask_probabilities = [0.0, 0.25]
    model.save_pretrained(tmp_path / "model")
    MaskClsImageProcessor(num_labels=2).save_pretrained(tmp_path / "model")
    for name, script in SCRIPTS.items():
        given = ["--model", str(tmp_path / "model"), "--set=schedule.max_steps=2"]
        script.main(arguments(tmp_path / "tiny.yaml", squares, tmp_path / name, *given))
        assert probabilities(tmp_path / name) == [0.0, 0.25]
        assert "probabilities [0.0, 0.25] throughout" in caplog.text
        caplog.clear()
        given.append("--set=training.mask_annealing=true")
        script.main(arguments(tmp_path / "tiny.yaml", squares, tmp_path / f"{name}-anew", *given))
        assert probabilities(tmp_path / f"{name}-anew") == [0, 0]
        assert "annealed anew, instead of the [0.0, 0.25]" in caplog.text
        caplog.clear()


def test_a_frozen_encoder_of_a_recipe(tmp_path, squares, capsys):
    vit = vit_of(tmp_path / "vit")
    model = MODEL | {"backbone_checkpoint": str(vit), "freeze_backbone": True}
    train_trainer.main(arguments(recipe_of(tmp_path, model=model), squares, tmp_path / "out"))
    assert re.search(r"0\.0\d million parameters, of which 0\.0\d learn;", capsys.readouterr().out)
    trained = MaskClsForUniversalSegmentation.from_pretrained(tmp_path / "out")
    source = Dinov2Model.from_pretrained(vit).state_dict()
    assert all(torch.equal(value, source[name]) for name, value in trained.model.encoder.vit.state_dict().items())


@pytest.mark.parametrize("base", ["backbone", "model"])
def test_lora_of_a_recipe(tmp_path, squares, base):
    """Resumed exactly, merged by the command, alike with both scripts; other classes than the model had."""
    options, fields = [], dict(MODEL)
    if base == "backbone":
        fields["backbone_checkpoint"] = str(vit_of(tmp_path / "vit"))
    else:
        ours().save_pretrained(tmp_path / "model")  # of three classes
        MaskClsImageProcessor(num_labels=3).save_pretrained(tmp_path / "model")
        options = ["--model", str(tmp_path / "model")]
    recipe = recipe_of(tmp_path, model=fields, lora={"rank": 2, "alpha": 8.0, "targets": ["fc1", "fc2"]})
    adapters = {}
    for name, script in SCRIPTS.items():
        out = tmp_path / name
        script.main(arguments(recipe, squares, out, *options))
        adapters[name] = load_file(out / "adapter_model.safetensors")
        assert not (out / "model.safetensors").exists()
        shutil.rmtree(out / "checkpoint-6")
        script.main(arguments(recipe, squares, out, "--resume", *options))
        resumed = load_file(out / "adapter_model.safetensors")
        assert all(torch.equal(value, resumed[n]) for n, value in adapters[name].items())
    assert all(torch.equal(value, adapters["loop"][n]) for n, value in adapters["trainer"].items())
    result = CliRunner().invoke(app, ["convert", "--merge", str(tmp_path / "loop"), str(tmp_path / "merged")])
    assert result.exit_code == 0, result.output
    run = prepare(load_recipe(recipe), squares, model=None if base == "backbone" else tmp_path / "model")
    run.model.load_adapter(str(tmp_path / "loop"), "default")
    merged = MaskClsForUniversalSegmentation.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == run.model.config.id2label
    assert MaskClsImageProcessor.from_pretrained(tmp_path / "merged").do_resize is False
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        run.model.config.mask_probabilities = merged.config.mask_probabilities
        expected = run.model.eval()(pixel_values=pixel_values).masks_queries_logits
        torch.testing.assert_close(merged.eval()(pixel_values).masks_queries_logits, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="holds an adapter alone: `maskcls convert --merge"):
        load_model(tmp_path / "loop")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "keeps the weights of the backbone, which are random"),
        ({"backbone_checkpoint": "vit", "freeze_backbone": True}, "a frozen backbone does not learn"),
    ],
)
def test_lora_that_cannot_be(tmp_path, squares, options, message):
    options = options | ({"backbone_checkpoint": str(vit_of(tmp_path / "vit"))} if options else {})
    recipe = recipe_of(tmp_path, model=MODEL | options, lora={"rank": 2})
    with pytest.raises(ValueError, match=message):
        prepare(load_recipe(recipe), squares)
    with pytest.raises(ValueError, match="lora.modules_to_save leaves the rest of a new model random"):
        changes = [f"model.backbone_checkpoint={vit_of(tmp_path / 'vit')}", "lora.modules_to_save=[upscale.0]"]
        prepare(load_recipe(recipe, [*changes, "model.freeze_backbone=false"]), squares)


# -- two processes -----------------------------------------------------------------------------------------------------

VARIANTS = {"plain": ours, "frozen": lambda: ours(freeze_backbone=True), "LoRA": lambda: add_lora(ours(), rank=2)}


class Train:
    """A training of each variant, in one start of the processes."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, rank: int) -> dict[str, tuple[list[float], dict[str, torch.Tensor]]]:
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        results = {}
        for name, make in VARIANTS.items():
            model = make()
            processor = MaskClsImageProcessor(num_labels=3, do_resize=False)
            trainer: MaskClsTrainer = trainer_of(
                model, self.folder / name, processor, steps=3, save_steps=3, per_device_train_batch_size=1,
                ddp_find_unused_parameters=False,
            )  # fmt: skip
            trainer.train()
            learned = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
            results[name] = model.config.mask_probabilities, learned
        return results


def test_two_processes(tmp_path):
    """No parameter waits for a gradient, the probabilities are alike, and the weights too."""
    first, second = run_in_processes(Train(tmp_path), 2)
    for name in VARIANTS:
        assert first[name][0] == second[name][0] == [0, 0]
        assert first[name][1].keys() == second[name][1].keys() and first[name][1]
        assert all(torch.equal(value, second[name][1][n]) for n, value in first[name][1].items())
        assert (tmp_path / name / "checkpoint-3").is_dir()


@pytest.mark.slow
def test_sharded_weights(tmp_path, squares):
    """FSDP2 that wraps the blocks of the ViT, which are run by their own forward: the losses of one process."""
    settings = {"ema_decay": None, "mask_annealing": [[0.0, 0.01], [0.5, 0.51]]}  # 1 or 0: nothing is random
    recipe = recipe_of(tmp_path, training=settings, model=MODEL | {"loss_points": None})
    here, examples = Path(__file__).parent, Path(train_trainer.__file__)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", here / "fsdp_on_cpu.py",
        examples, *arguments(recipe, squares, tmp_path / "sharded"),
    ]  # fmt: skip
    environment = os.environ | {"FSDP_TRANSFORMER_CLS_TO_WRAP": "Dinov2Layer", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    train_trainer.main(arguments(recipe, squares, tmp_path / "whole"))
    assert probabilities(tmp_path / "sharded") == probabilities(tmp_path / "whole") == [0, 0]
    sharded, whole = ([e["loss"] for e in logged(tmp_path / out) if "loss" in e] for out in ("sharded", "whole"))
    assert len(whole) == 6 and sharded == pytest.approx(whole, rel=1e-3)
