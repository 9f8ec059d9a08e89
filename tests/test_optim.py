"""Optimizer groups, clipping and schedules, against the paper's code (tests/data/papers_code)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn

from maskcls_hf import MaskClsForUniversalSegmentation
from maskcls_hf.convert.original_names import our_names, parameters
from maskcls_hf.training.optim import (
    SCHEDULES,
    build_optimizer,
    build_scheduler,
    learning_rate_factor,
    parameter_groups,
)
from maskcls_hf.training.recipe import load_recipe
from original_checkpoints import numbers
from test_recipes import meta_model, oracle_keys
from tiny import maskcls_config

# The configurations of tests/data/papers_code/optimizer.json.gz.
RECIPES = ["ade20k_r50", "ade20k_swin_tiny", "cityscapes_r101", "coco_panoptic_r50"]


def oracle_optimizer(name: str) -> dict[str, Any]:
    return numbers("optimizer")[name]


def named_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each parameter that the optimizer has."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = optimizer.param_groups
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


@pytest.mark.parametrize("name", RECIPES)
class TestAsThePapersCode:
    def test_every_parameter_has_its_learning_rate_and_decay(self, name):
        recipe, expected, shapes = load_recipe(name), oracle_optimizer(name), oracle_keys(name)["shapes"]
        model = meta_model(recipe, oracle_keys(name)["num_labels"])
        settings = dataclasses.asdict(recipe.optimizer)
        settings.pop("clip_norm")
        groups = named_groups(model, build_optimizer(model, **settings))
        backbone = model.config.backbone_config
        backbone.stem_type = getattr(backbone, "stem_type", "basic")  # the names of a ResNet depend on it
        wanted = {}
        for original, group in expected["parameters_lr_weight_decay"].items():
            one = {original: torch.empty(shapes[original], device="meta")}
            wanted |= dict.fromkeys(our_names(parameters(one), model.config), group)
        assert groups.keys() == wanted.keys()
        assert len(wanted) >= len(expected["parameters_lr_weight_decay"])
        for parameter, (learning_rate, weight_decay) in wanted.items():
            assert groups[parameter] == (pytest.approx(learning_rate, rel=1e-12), weight_decay), parameter

    def test_adamw_betas_clipping_batch_and_length(self, name):
        recipe, expected = load_recipe(name), oracle_optimizer(name)
        optimizer = build_optimizer(nn.Linear(2, 2), 1e-4, 1e-4, betas=recipe.optimizer.betas)
        assert expected["optimizer"] == ["FullModelGradientClippingOptimizer", type(optimizer).__name__]
        assert list(optimizer.defaults["betas"]) == expected["betas"]
        assert optimizer.defaults["eps"] == expected["eps"]
        assert recipe.optimizer.clip_norm == expected["clip_full_model_norm"]
        assert recipe.training.batch_size == expected["batch"]
        assert recipe.schedule.max_steps == expected["iterations"]

    def test_the_learning_rate_at_every_listed_iteration(self, name):
        recipe, expected = load_recipe(name), oracle_optimizer(name)["learning_rate_at"]
        settings = recipe.schedule.curve(recipe.schedule.steps(1))
        rates = {i: recipe.optimizer.learning_rate * learning_rate_factor(int(i), **settings) for i in expected}
        assert rates == pytest.approx(expected, rel=1e-12, abs=0)

    def test_the_scheduler_walks_these_learning_rates(self, name):
        recipe, expected = load_recipe(name), oracle_optimizer(name)["learning_rate_at"]
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=recipe.optimizer.learning_rate)
        scheduler = build_scheduler(optimizer, **recipe.schedule.curve(recipe.schedule.steps(1)))
        rates = {}
        for step in range(102):
            rates[str(step)] = optimizer.param_groups[0]["lr"]
            optimizer.step()
            scheduler.step()
        early = {step: rate for step, rate in expected.items() if int(step) <= 101}
        assert len(early) > 5
        assert {step: rates[step] for step in early} == pytest.approx(early, rel=1e-12, abs=0)


class TestGroups:
    def test_every_parameter_that_learns_once(self):
        model = MaskClsForUniversalSegmentation(maskcls_config(pixel_decoder="fpn_encoder"))
        model.model.backbone.embedder.requires_grad_(False)
        grouped = [p for group in parameter_groups(model, 1e-3, 0.1, 0.1) for p in group["params"]]
        wanted = [p for p in model.parameters() if p.requires_grad]
        assert len(grouped) == len(wanted) and {id(p) for p in grouped} == {id(p) for p in wanted}

    def test_norms_embeddings_and_backbone(self):
        model = MaskClsForUniversalSegmentation(maskcls_config())
        group_of = {
            id(p): (group["lr"], group["weight_decay"])
            for group in build_optimizer(model, 1.0, 0.5, 0.1).param_groups
            for p in group["params"]
        }
        network = model.model
        assert group_of[id(network.transformer_decoder.queries_embedder.weight)] == (1.0, 0.0)
        assert group_of[id(network.pixel_decoder.laterals[0].norm.bias)] == (1.0, 0.0)
        assert group_of[id(network.pixel_decoder.mask_projection.bias)] == (1.0, 0.5)
        norm = next(m for m in network.backbone.modules() if isinstance(m, nn.BatchNorm2d))
        assert group_of[id(norm.weight)] == (0.1, 0.0)

    def test_betas_reach_the_optimizer(self):
        optimizer = build_optimizer(nn.Linear(2, 2), 1e-3, 0.1, betas=(0.8, 0.95))
        assert all(group["betas"] == (0.8, 0.95) for group in optimizer.param_groups)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"learning_rate": -1e-3}, "learning_rate=-0.001 must not be negative"),
            ({"learning_rate": math.nan}, "learning_rate=nan must"),
            ({"learning_rate": math.inf}, "learning_rate=inf must not be negative and finite"),
            ({"weight_decay": -0.1}, "weight_decay=-0.1 must not be negative"),
            ({"weight_decay": math.nan}, "weight_decay=nan must"),
            ({"backbone_multiplier": -1}, "backbone_multiplier=-1 must not be negative"),
            ({"backbone_multiplier": math.nan}, "backbone_multiplier=nan must"),
            ({"betas": (0.9, 1.0)}, "betas=1.0 must be from 0 to 1, without 1"),
        ],
    )
    def test_wrong_settings_are_named(self, settings, message):
        with pytest.raises(ValueError, match=message):
            build_optimizer(nn.Linear(2, 2), **{"learning_rate": 1e-3, "weight_decay": 0.1, **settings})


def make_optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)


def rates_of(steps: int, **settings: Any) -> list[float]:
    optimizer = make_optimizer()
    scheduler = build_scheduler(optimizer, **settings)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


class TestSchedules:
    def test_cosine_equals_torchs(self):
        optimizer = make_optimizer()
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        expected = []
        for _ in range(11):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert rates_of(11, kind="cosine", max_steps=10) == pytest.approx(expected, abs=1e-12)

    def test_poly_equals_torchs(self):
        optimizer = make_optimizer()
        scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, 10, power=0.9)
        expected = []
        for _ in range(11):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert rates_of(11, kind="poly", max_steps=10) == pytest.approx(expected, abs=1e-12)

    def test_multistep_falls_at_each_milestone(self):
        rates = rates_of(6, kind="multistep", max_steps=6, milestones=[2, 4], gamma=0.5)
        assert rates == [2.0, 2.0, 1.0, 1.0, 0.5, 0.5]

    def test_constant(self):
        assert rates_of(4, kind="constant", max_steps=3) == [2.0] * 4

    def test_warmup_starts_at_its_factor_and_the_curve_goes_on_underneath(self):
        rates = rates_of(5, kind="cosine", max_steps=8, warmup_steps=2, warmup_factor=0.1)
        curve = rates_of(5, kind="cosine", max_steps=8)
        assert rates == pytest.approx([0.1 * curve[0], 0.55 * curve[1], *curve[2:]])

    def test_warmup_by_default_never_learns_at_zero(self):
        assert rates_of(4, kind="constant", max_steps=9, warmup_steps=3) == pytest.approx([0.5, 1.0, 1.5, 2.0])

    @pytest.mark.parametrize("kind", SCHEDULES)
    def test_steps_beyond_the_last_have_its_rate(self, kind):
        settings = {"kind": kind, "max_steps": 5, "milestones": [3]}
        assert learning_rate_factor(9, **settings) == learning_rate_factor(5, **settings)

    def test_progress_can_run_ahead_of_the_steps_but_not_of_the_warmup(self):
        rates = rates_of(4, kind="cosine", max_steps=100, warmup_steps=2, progress=lambda step: 0.5 if step < 3 else 1)
        assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, 0.0])
        slow = rates_of(4, kind="poly", max_steps=4, progress=lambda step: 0.0)
        assert slow == rates_of(4, kind="poly", max_steps=4)

    def test_milestones_are_met_exactly_by_progress_in_parts(self):
        for max_steps in (7, 90, 5544):
            milestone = math.floor(max_steps * 2 / 3)
            settings = {"kind": "multistep", "max_steps": max_steps, "milestones": [milestone]}
            plain = rates_of(max_steps, **settings)
            assert plain.index(0.2) == milestone
            assert rates_of(max_steps, **settings, progress=lambda step, n=max_steps: step / n) == plain

    def test_a_scheduler_resumes_where_it_was(self):
        settings = {"kind": "poly", "max_steps": 10, "warmup_steps": 3}
        optimizer = make_optimizer()
        scheduler = build_scheduler(optimizer, **settings)
        for _ in range(5):
            optimizer.step()
            scheduler.step()
        state = (optimizer.state_dict(), scheduler.state_dict())
        again = make_optimizer()
        resumed = build_scheduler(again, **settings)
        again.load_state_dict(state[0])
        resumed.load_state_dict(state[1])
        for o, s in ((optimizer, scheduler), (again, resumed)):
            o.step()
            s.step()
        assert resumed.get_last_lr() == scheduler.get_last_lr() == [rates_of(7, **settings)[6]]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"kind": "exponential"}, "Unknown schedule 'exponential'"),
            ({"max_steps": 0}, "max_steps=0 must be at least 1"),
            ({"warmup_steps": -1}, "warmup_steps=-1 must not be negative"),
            ({"warmup_factor": 2.0}, "warmup_factor=2.0 must be from 0 to 1"),
            ({"warmup_factor": math.nan}, "warmup_factor=nan must be"),
            ({"max_steps": math.nan}, "max_steps=nan must be an integer"),
            ({"power": -1.0}, "power=-1.0 must not be negative"),
            ({"power": math.nan}, "power=nan must not be negative and finite"),
            ({"kind": "multistep", "milestones": [3], "gamma": -0.1}, "gamma=-0.1 must not be negative"),
            ({"kind": "multistep", "milestones": [-3, 2]}, "milestones=-3 must be at least 1"),
            ({"kind": "multistep"}, "milestones=.. of a multistep schedule"),
            ({"kind": "multistep", "milestones": [3, 2]}, "must be ascending"),
        ],
    )
    def test_wrong_settings_are_named(self, settings, message):
        with pytest.raises(ValueError, match=message):
            build_scheduler(make_optimizer(), **{"kind": "poly", "max_steps": 5, **settings})
