"""How long a model takes for an image on this machine."""

from __future__ import annotations

import platform
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from ..inference.eval_mode import in_eval_mode


class Speed(NamedTuple):
    """The time that a model takes for an image.

    Args:
        milliseconds: of a forward pass of one image, the median of several.
        size: height and width of the network input.
        machine: processor and software that it was measured with.
    """

    milliseconds: float
    size: tuple[int, int]
    machine: str


@torch.inference_mode()
def measure_speed(
    model: PreTrainedModel, image_processor: Any, size: tuple[int, int] = (480, 640), repeats: int = 10
) -> Speed:
    """Time forward passes of one image, on the model's device; reading and post-processing are not part of it.

    Args:
        model: brought to evaluation mode while it is measured.
        image_processor: of the model.
        size: height and width of the image, before the image processor resizes it.
        repeats: number of passes, after two that warm up.
    """
    model, generator = in_eval_mode(model), torch.Generator("cpu").manual_seed(0)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator, device="cpu")
    inputs = image_processor(image, input_data_format="channels_first", return_tensors="pt").to(
        model.device, dtype=model.dtype
    )
    seconds = []
    for _ in range(2 + repeats):
        start = time.perf_counter()
        model(**inputs)
        if model.device.type != "cpu":
            torch.accelerator.synchronize(model.device)
        seconds.append(time.perf_counter() - start)
    height, width = inputs["pixel_values"].shape[-2:]
    milliseconds = 1000 * statistics.median(seconds[2:])
    return Speed(milliseconds, (height, width), f"{describe_device(model.device)}, torch {torch.__version__}")


def describe_device(device: torch.device) -> str:
    """Name of the processor; of a CPU also the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{device.type} of {platform.platform()}"
    threads = torch.get_num_threads()
    return f"{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def _cpu_name() -> str:
    """What the machine calls its processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
