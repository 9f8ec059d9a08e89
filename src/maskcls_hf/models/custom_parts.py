"""Parts of a model that somebody else has registered: their files travel with a checkpoint."""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_relative_import_files

from .configuration_maskcls import REGISTRIES, check_references
from .options import DOWNLOAD_OPTIONS, chosen


def saved_fields(path: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the configuration that `from_pretrained` of `path` with these options finds; {} where there is none."""
    if path is None:
        return {}
    try:
        fields, _ = PreTrainedConfig.get_config_dict(path, **chosen(options, DOWNLOAD_OPTIONS))
    except OSError:  # no configuration: the ordinary way of loading explains it
        return {}
    return fields


def load_custom_parts(path: Any, custom_parts: Any, options: Mapping[str, Any]) -> None:
    """Register the parts of a checkpoint's own that are not known yet, if its code is trusted.

    Args:
        path: of the checkpoint, a folder or a name on the Hub.
        custom_parts: field of its configuration, {kind: {name: "file.Class"}}.
        options: of `from_pretrained`; without `trust_remote_code` nothing is loaded.

    Raises:
        ValueError: `custom_parts` has another form.
    """
    is_remote_code = __name__.startswith("transformers_modules.")  # then it was trusted before
    if not custom_parts or not (options.get("trust_remote_code") or is_remote_code):
        return
    check_references(custom_parts)
    download = chosen(options, [name for name in DOWNLOAD_OPTIONS if name != "subfolder"])
    for kind, parts in custom_parts.items():
        for name, reference in parts.items():
            if name not in REGISTRIES[kind]:
                REGISTRIES[kind].register(name, get_class_from_dynamic_module(reference, path, **download))


def copy_custom_parts(config: Any, folder: Path) -> None:
    """Copy the files of parts that are not ours into a folder, and note them in `config.custom_parts`."""
    ours = {file.name: file for file in Path(__file__).parent.glob("*.py")}
    noted = config.custom_parts  # of a checkpoint whose code was loaded, where they lie beside ours
    custom_parts: dict[str, dict[str, str]] = {}
    for kind, name in _parts_of(config):
        part = REGISTRIES[kind].get(name)
        if part is None:  # a matcher or a loss, which predicting does without
            if name in noted.get(kind, {}):
                raise ValueError(f"{kind} {name!r} of this checkpoint is not known here: its file cannot be saved.")
            continue
        is_ours = part.__module__.rpartition(".")[0] == __name__.rpartition(".")[0]
        if is_ours and name not in noted.get(kind, {}):
            continue
        file = getattr(sys.modules.get(part.__module__), "__file__", None)
        if part.__module__ == "__main__" or file is None:
            raise ValueError(
                f"{kind} {name!r}: {part.__qualname__} is defined in {part.__module__}; put it into a file."
            )
        folder.mkdir(parents=True, exist_ok=True)
        for source in map(Path, [file, *get_relative_import_files(file)]):
            if source.name in ours and not source.samefile(ours[source.name]):
                raise ValueError(
                    f"{kind} {name!r} needs {source.name}, which is the name of one of our files: rename it."
                )
            if not (folder / source.name).exists() or not source.samefile(folder / source.name):
                shutil.copyfile(source, folder / source.name)
        custom_parts.setdefault(kind, {})[name] = f"{Path(file).stem}.{part.__qualname__}"
    config.custom_parts = custom_parts


def _parts_of(config: Any) -> list[tuple[str, str]]:
    """Kind and name of each part that a configuration names."""
    kinds = {"pixel_decoder": "pixel_decoder", "transformer_decoder": "transformer_decoder", "matching": "matcher"}
    named = [(kind, getattr(config, field)) for field, kind in kinds.items() if hasattr(config, field)]
    return named + [("loss", name) for name in getattr(config, "losses", {})]
