"""LoRA (Hu et al., 2021) through the library peft; adapters are saved, and merged into a model.

The backbone keeps its weights and learns by small matrices beside them, all else learns as ever.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..convert.pretrained_backbones import open_backbone
from ..inference.loading import load_image_processor, load_model
from ..models.checkpoint_manifest import require_whole
from ..models.kinds import KIND_OF_TYPE
from ..models.options import similar

BASE = "lora_base.json"  # beside an adapter: the configuration of its network, and where its other weights come from
LAYERS = (nn.Linear, nn.Conv2d)  # that have adapters


def add_lora(
    model: PreTrainedModel,
    rank: int,
    targets: Sequence[str] | None = None,
    alpha: float | None = None,
    dropout: float = 0.0,
    modules_to_save: Sequence[str] | None = None,
    base: Mapping[str, Any] | None = None,
) -> Any:
    """A `peft.PeftModel` whose backbone learns by matrices of a low rank. `MaskClsTrainer` takes it like any model.

    Statistics of the backbone's batch norms stay: an adapter does not hold them.

    Args:
        model: is changed.
        rank: of the matrices.
        targets: names of layers of the backbone, or the ends of names, such as `q_proj`; None: all its linear layers.
        alpha: the update is multiplied by alpha / rank; None: by 1.
        dropout: of what goes into the matrices.
        modules_to_save: names of modules that learn in full and are saved with the adapter; None: all outside of the
            backbone (heads, queries, upscaling or decoders).
        base: where the other weights come from, {"model": folder or name} or {"backbone": ..., "backbone_weights": ...}
            as `open_backbone` takes them; for [`merge_adapter`]. None: the place that the model was loaded from.

    Raises:
        ValueError: peft is not installed, nothing is called so, or the backbone is frozen.
    """
    _require_peft()
    from peft import LoraConfig, get_peft_model

    if model.config.freeze_backbone:
        raise ValueError("lora and model.freeze_backbone: a frozen backbone does not learn, and LoRA keeps it anyway.")
    backbone = next(name for name, _ in model.named_modules() if _is_backbone(name))
    layers = {name: m for name, m in model.named_modules() if name.startswith(f"{backbone}.") and isinstance(m, LAYERS)}
    layers = {name: m for name, m in layers.items() if "feature_pyramid" not in name.split(".")}
    own_targets = [name for name, module in layers.items() if isinstance(module, nn.Linear)]
    if targets is not None or not own_targets:
        own_targets = matching(targets or [], list(layers), "targets")
    if modules_to_save is None:
        modules = [*_modules_outside(model, backbone)]
    else:
        modules = matching(modules_to_save, [name for name, _ in model.named_modules()], "modules_to_save")
    model.config.freeze_batch_norm = True
    scale: Any = rank if alpha is None else alpha
    settings = LoraConfig(
        r=rank, lora_alpha=scale, lora_dropout=dropout, target_modules=own_targets,
        modules_to_save=modules,
    )  # fmt: skip
    adapted: Any = get_peft_model(model, settings)
    adapted.train(model.training)
    adapted.lora_base = dict(base or {})
    settings.base_model_name_or_path = adapted.lora_base.get("model") or adapted.lora_base.get("backbone")
    return adapted


def _require_peft() -> None:
    if find_spec("peft") is None:
        raise ValueError("lora needs the library peft, which is not installed: pip install maskcls-hf[lora]")


def _is_backbone(name: str) -> bool:
    """Of a module's name: a plain ViT, or the backbone that is none."""
    return name.split(".")[-1] in ("backbone", "vit")


def matching(given: Sequence[str], known: Sequence[str], option: str) -> list[str]:
    """Those of the `known` names that are `given`, or end so, sorted.

    Args:
        given: names, or their ends from a dot on.
        known: names of modules.
        option: of the recipe, for the message.

    Raises:
        ValueError: one of the given fits none, or nothing is given.

    Examples:
        >>> matching(["q_proj"], ["layer.0.q_proj", "layer.0.k_proj"], "targets")
        ['layer.0.q_proj']
    """
    found = {end: [name for name in known if f".{name}".endswith(f".{end}")] for end in given}
    if unknown := [end for end, names in found.items() if not names] or (not given and ["nothing"]):
        ends = sorted({name.split(".")[-1] for name in known if not name.split(".")[-1].isdigit()})
        meant = similar(unknown[0], ends)
        hint = f"did you mean {meant}? " if meant else ""
        raise ValueError(
            f"lora.{option}: nothing in the {'backbone' if option == 'targets' else 'model'} is called {unknown[0]} "
            f"({hint}there are {', '.join(ends[:20])})."
        )
    return sorted({name for names in found.values() for name in names})


def _modules_outside(model: nn.Module, backbone: str, name: str = "") -> Iterator[str]:
    """Names of the largest modules with parameters that neither hold the backbone nor are mere lists."""
    for child_name, child in model.named_children():
        path = f"{name}.{child_name}".removeprefix(".")
        if path == backbone and not hasattr(child, "feature_pyramid") or next(child.parameters(), None) is None:
            continue
        if f"{backbone}.".startswith(f"{path}.") or isinstance(child, nn.ModuleList):
            yield from _modules_outside(child, f"{backbone}.vit" if path == backbone else backbone, path)
        else:
            yield path


def network_of(model: nn.Module) -> Any:
    """The network beneath adapters."""
    return model.get_base_model() if _is_adapted(model) else model  # type: ignore[operator]


def _is_adapted(model: nn.Module) -> bool:
    return hasattr(type(model), "get_base_model")


def save_base(model: nn.Module, folder: str | Path) -> None:
    """Beside a saved adapter, what [`merge_adapter`] needs. Models without one: nothing."""
    if _is_adapted(model):
        network = network_of(model)
        base = getattr(model, "lora_base", None) or {"model": network.name_or_path or None}
        base = {name: os.path.abspath(place) if os.path.exists(str(place)) else place for name, place in base.items()}
        content = {**base, "config": network.config.to_dict()}
        Path(folder, BASE).write_text(json.dumps(content, indent=1), encoding="utf-8")


def merge_adapter(source: str | Path, folder: str | Path) -> None:
    """Write the model of a LoRA training, its adapter merged into its weights, with its image processor.

    Args:
        source: folder of a training's results, of one of its checkpoints, or of an adapter alone.
        folder: where the model is written.

    Raises:
        OSError: no adapter there, or its base cannot be found.
        ValueError: peft is not installed, or the adapter is for another network.
    """
    _load_merged(source).save_pretrained(folder)
    with suppress(OSError):
        load_image_processor(str(source)).save_pretrained(folder)


def _load_merged(source: str | Path) -> Any:
    """The model of [`merge_adapter`]."""
    _require_peft()
    from peft import PeftModel

    if not Path(source, BASE).is_file() or not Path(source, "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"{source} holds no adapter of this package ({BASE} and adapter_config.json): a training with lora.rank "
            "writes them."
        )
    require_whole(source)
    base = json.loads(Path(source, BASE).read_text(encoding="utf-8"))
    try:
        kind = KIND_OF_TYPE[base["config"]["model_type"]]
        model = kind.model_class(kind.config_class.from_dict(base["config"])).eval()
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{Path(source, BASE)} does not hold the configuration of a network.") from error
    own = model.state_dict()
    if base.get("model"):
        weights = load_model(base["model"]).state_dict()
        fitting = {name: value for name, value in weights.items() if name in own and value.shape == own[name].shape}
        model.load_state_dict(fitting, strict=False)
        missing = own.keys() - fitting.keys()
    elif base.get("backbone"):
        open_backbone(base["backbone"], base.get("backbone_weights")).load_into(model)
        missing = {name for name in own if not any(map(_is_backbone, parents(name))) or "feature_pyramid" in name}
    else:
        raise FileNotFoundError(f"{source} does not say which weights its adapter was trained over.")
    adapted: Any = PeftModel.from_pretrained(model, str(source))
    saved = tuple(f"{name}." for name in adapted.peft_config["default"].modules_to_save or ())
    if lost := sorted(name for name in missing if not name.startswith(saved)):
        raise ValueError(f"Neither the adapter in {source} nor its base has {len(lost)} weights, such as {lost[0]}.")
    return adapted.merge_and_unload()


def parents(name: str) -> list[str]:
    """Names of the modules that a parameter lies in.

    Examples:
        >>> parents("model.head.weight")
        ['model', 'model.head']
    """
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]
