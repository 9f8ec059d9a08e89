"""Saved models as commands load them: found at once or not at all, with all of their weights, without their code."""

from __future__ import annotations

import json
import os
import pickle
import socket
import threading
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants
from safetensors import safe_open
from transformers import AutoProcessor, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..models.checkpoint_manifest import CONFIG_FILES, DamagedCheckpoint, require_whole
from ..models.configuration_maskcls import what_reads
from ..models.custom_parts import saved_fields
from ..models.image_processing_maskcls import MaskClsImageProcessor
from ..models.kinds import KIND_OF_TYPE
from ..utils.places import require_model_place
from ..utils.quiet import quiet
from .universal import NOT_RUN, UniversalProcessor, universal_class

logger = logging.get_logger(__name__)

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_PATIENCE = 3.0  # seconds until the Hub counts as out of reach


def saved_config(name: str | os.PathLike[str]) -> dict[str, Any]:
    """Content of the `config.json` of a saved model.

    Args:
        name: its folder, or its name on the Hub.

    Raises:
        ValueError: there is none; a folder that does not exist, and the Hub out of reach, are said at once.
    """
    options = where_to_look(name)
    require_whole(name, CONFIG_FILES)
    if os.path.isfile(Path(name, "adapter_config.json")) and not os.path.isfile(Path(name, "config.json")):
        raise ValueError(f"{name} holds an adapter alone: `maskcls convert --merge {name} OUT` makes a model of it.")
    try:
        with quiet():
            config = PreTrainedConfig.get_config_dict(name, **options)[0]
            if not isinstance(config["model_type"], str):
                raise TypeError("model_type is no text")
    except Exception as error:  # a broken config.json raises errors of many kinds
        reason = "its config.json names no model_type" if isinstance(error, KeyError) else _first_line(error)
        if isinstance(error, (AttributeError, TypeError, RecursionError)):
            reason = "its config.json does not hold the fields of a configuration"
        if options.get("local_files_only"):
            reason = "the Hub cannot be reached, and it was not downloaded before"
        raise ValueError(f"{name} is neither the folder of a saved model nor a model on the Hub ({reason}).") from error
    return config


def where_to_look(name: str | os.PathLike[str]) -> dict[str, Any]:
    """Options of `from_pretrained` for a folder or a name on the Hub: where the Hub is out of reach, its files here.

    Raises:
        ValueError: neither a folder nor a possible name.
    """
    require_model_place(name)
    if os.path.isdir(name):
        return {}
    return {} if constants.HF_HUB_OFFLINE or hub_answers() else {"local_files_only": True}


def hub_answers() -> bool:
    """Whether a connection to the Hub, or to the proxy before it, can be opened.

    huggingface_hub itself would try for half a minute.
    """
    address = urlsplit(constants.ENDPOINT)
    proxy = urllib.request.getproxies().get(address.scheme)
    if proxy and not urllib.request.proxy_bypass(address.hostname or ""):
        address = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    place = (address.hostname or "", address.port or (80 if address.scheme == "http" else 443))
    answers: list[bool] = []

    def connect() -> None:
        with suppress(OSError), socket.create_connection(place, timeout=_PATIENCE):
            answers.append(True)

    thread = threading.Thread(target=connect, daemon=True)  # looking up a name has no time limit of its own
    thread.start()
    thread.join(_PATIENCE)
    return bool(answers)


def class_of_saved(name: str | os.PathLike[str]) -> type[PreTrainedModel]:
    """The class of a saved model: of this package, or the universal one of transformers that runs as it is.

    Args:
        name: its folder, or its name on the Hub.

    Raises:
        ValueError: there is no saved model, or one of another kind.
    """
    model_type = saved_config(name)["model_type"]
    if model_type in KIND_OF_TYPE:
        own: type[PreTrainedModel] = KIND_OF_TYPE[model_type].model_class
        return own
    theirs: type[PreTrainedModel] | None = universal_class(model_type)
    if theirs is not None:
        return theirs
    raise ValueError(
        f"{name} has model_type {model_type!r}; this package runs {', '.join(KIND_OF_TYPE)} and universal segmentation "
        f"models of transformers such as oneformer. {NOT_RUN.get(model_type) or what_reads(model_type)}."
    )


def load_model(name: str | os.PathLike[str], model_class: Any = None, **options: Any) -> Any:
    """A saved model of this package or a universal one of transformers, with all of its weights.

    `from_pretrained` alone replaces weights that are missing by random ones and says so in a warning.

    Args:
        name: its folder, or its name on the Hub.
        model_class: another class with a `from_pretrained`.
        options: of `from_pretrained`, and fields of the configuration; a head that these add starts at random.

    Raises:
        ValueError: no model there, or one of another kind; weights that are missing, of another shape, left over, NaN
            or infinite; files that cannot be read.
        OSError: files are missing, or are not those that the checkpoint was saved with.
    """
    if model_class is None:
        model_class = class_of_saved(name)
    else:
        require_whole(name)  # our own classes do so themselves
    try:
        _check_files(name)
        with quiet():
            model, report = model_class.from_pretrained(
                name, output_loading_info=True, ignore_mismatched_sizes=True, **where_to_look(name), **options
            )
    except (OSError, TypeError):
        raise
    except ValueError as error:
        raise ValueError(f"The model in {name} cannot be loaded: {error}") from error
    except RuntimeError as error:
        raise ValueError(f"The weights in {name} do not fit its config.json: {_first_line(error)}") from error
    except pickle.UnpicklingError as error:  # torch advises to let it run
        raise ValueError(
            f"The weights in {name} cannot be read: they hold more than tensors, what could run code."
        ) from error
    except Exception as error:  # safetensors and unpickling raise errors of many kinds
        raise ValueError(f"The weights in {name} cannot be read: {_first_line(error)}") from error
    if options.keys() & vars(model.config).keys():
        report = report | _without_changes(report, model_class, name)
    check_weights(model, report, name)
    return model


def _without_changes(report: Mapping[str, Any], model_class: Any, name: str | os.PathLike[str]) -> dict[str, set[str]]:
    """The report on a model with other fields of its configuration, without the heads that these change.

    That new heads are random is logged.
    """
    config = model_class.config_class.from_pretrained(name, **where_to_look(name))
    with torch.device("meta"):
        own = set(model_class(config).state_dict())
    new = set(report["missing_keys"]) - own
    if new:
        logger.warning(f"New in the model of {name}, with random weights: {', '.join(sorted(new))}.")
    return {"missing_keys": set(report["missing_keys"]) & own, "unexpected_keys": set(report["unexpected_keys"]) - own}


def check_weights(model: PreTrainedModel, report: Mapping[str, Any], where: object) -> None:
    """Refuses a model unless all weights were there, had a place, and are finite.

    Args:
        model: as loaded.
        report: of `from_pretrained`, with the keys that were missing, unexpected and of another shape.
        where: it was loaded from, for messages.

    Raises:
        ValueError: names a weight.
    """
    if mismatched := sorted(report["mismatched_keys"]):
        name, *shapes = mismatched[0]
        saved, expected = (tuple(shape) for shape in shapes)
        raise ValueError(
            f"The weights in {where} do not fit its config.json: {name} has the shape {saved} instead of {expected}, "
            f"the first of {len(mismatched)}."
        )
    for problem, names in (("lack", report["missing_keys"]), ("have unknown", report["unexpected_keys"])):
        if names:
            raise ValueError(f"The weights in {where} {problem} {len(names)} entries, such as {min(names)}.")
    for name, values in model.state_dict().items():
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise ValueError(f"The weights in {where} are broken: {name} holds NaN or infinite values.")


def _check_files(name: str | os.PathLike[str]) -> None:
    """Refuses weights that transformers would take, or leave out, without a word.

    Raises:
        ValueError: a folder's files of weights, or their index, hold such.
    """
    files = [Path(name, "model.safetensors")]
    for index in (Path(name, file) for file in _INDEXES):
        if not index.is_file():
            continue
        try:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            outside = [shard for shard in places.values() if Path(shard).name != shard or "\\" in shard]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{index} is no index of weights ({type(error).__name__}: {error}).") from error
        if outside:
            raise ValueError(f"{index} names {outside[0]}, a file outside of its folder.")
        if files[0].is_file():  # which is loaded in their place
            continue
        shards = sorted({*places.values()})
        files += [Path(name, shard) for shard in shards if shard.endswith(".safetensors")]
        for file in files[1:]:
            listed = {weight for weight, shard in places.items() if shard == file.name}
            if file.is_file() and (other := listed ^ _stored_types(file).keys()):
                raise ValueError(f"{file} holds other weights than {index.name} says, such as {min(other)}.")
    for file in files:
        for weight, kind in _stored_types(file).items() if file.is_file() else ():
            if weight.endswith(("weight", "bias")) and not kind.startswith(("F", "BF")):
                raise ValueError(f"{file} holds {weight} as {kind}, not as floating-point numbers.")


def _stored_types(file: Path) -> dict[str, str]:
    """Weight -> its type, as the header of a safetensors file names it: "F32", "BF16", "I8"."""
    with safe_open(file, "pt") as tensors:
        return {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 (no mapping)


def load_image_processor(name: str | os.PathLike[str], **options: Any) -> Any:
    """The image processor beside a saved model: a `MaskClsImageProcessor`, or what stands in its place.

    Args:
        name: folder of the model, or its name on the Hub.
        options: of the image processor, over the saved ones.

    Raises:
        OSError: there is none.
        ValueError: it cannot be read.
    """
    model_type = str(saved_fields(name, where_to_look(name)).get("model_type"))
    if model_type not in KIND_OF_TYPE and universal_class(model_type) is not None:
        return UniversalProcessor(_load_their_processor(name))
    try:
        with quiet():
            return MaskClsImageProcessor.from_pretrained(name, **where_to_look(name), **options)
    except DamagedCheckpoint:
        raise
    except OSError as error:
        if not any(os.path.lexists(Path(name, file)) for file in PROCESSORS):
            raise
        raise ValueError(f"The {PROCESSORS[0]} in {name} cannot be read: it is damaged.") from error
    except Exception as error:  # fields of a wrong value or type
        raise ValueError(f"The {PROCESSORS[0]} in {name} cannot be used: {error}") from error


def _load_their_processor(name: str | os.PathLike[str]) -> Any:
    """The processor of a universal model of transformers. A file of its class metadata is looked for beside it first.

    Raises:
        OSError: there is none.
        ValueError: it cannot be loaded.
    """
    options = where_to_look(name)
    with quiet():
        reader: Any = MaskClsImageProcessor
        fields = reader.get_image_processor_dict(name, **options)[0]
        metadata = fields.get("class_info_file")
        if metadata and Path(name, metadata).is_file():
            options["repo_path"] = os.fspath(name)
        try:
            return AutoProcessor.from_pretrained(name, trust_remote_code=False, **options)
        except Exception as error:  # of tokenizers, of the Hub, of fields of a wrong type
            places = f"beside it and in {fields.get('repo_path', 'shi-labs/oneformer_demo')}"
            hint = f" Its class metadata, {metadata}, was looked for {places}." if metadata else ""
            raise ValueError(f"The processor of {name} cannot be loaded: {_first_line(error)}{hint}") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
