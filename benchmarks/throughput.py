"""Images a second of `maskcls segment` on photographs of 1080p:  python benchmarks/throughput.py --images 1000

The photographs are JPEG files, made from those of a folder. What is timed is all that the command does with an image:
it reads the file, resizes, runs the network, makes the panoptic map, draws the overlay, and writes two PNG files and a
record; loading the model is not part of it. Beside it the stages of one image after the other, each in one thread but
the network, and what they would come to one after the other.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command does, before torch is imported

import torch  # noqa: E402
from measuring import HERE, finish, machine, neighbors, peak_memory, write_record  # noqa: E402
from PIL import Image  # noqa: E402
from precision import MODELS, photographs  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from stages import DEVICE  # noqa: E402
from transformers.utils import logging  # noqa: E402

from maskcls_hf.cli.coco import CocoRecords  # noqa: E402
from maskcls_hf.cli.results import Results  # noqa: E402
from maskcls_hf.cli.segmenter import Segmenter, draw, of_batch, read, segment_files  # noqa: E402
from maskcls_hf.utils.ahead import cores  # noqa: E402

HD = (1920, 1080)


def make_photographs(sources: list[Path], folder: Path, number: int) -> list[Path]:
    """So many files, of up to 16 contents."""
    contents = []
    for place, image in enumerate(photographs(sources, 16)):
        contents.append(folder / f"content_{place}.jpg")
        image.resize(HD, Image.Resampling.BICUBIC).save(contents[-1], quality=90)
    paths = [folder / f"{place:05}.jpg" for place in range(number)]
    for place, path in enumerate(paths):
        shutil.copy(contents[place % len(contents)], path)
    return paths


def images_a_second(segmenter: Segmenter, paths: list[Path], out: Path) -> float:
    start = time.perf_counter()
    errors = [error for _, error in segment_files(paths, segmenter, Results(out, segmenter.task)) if error]
    finish()
    assert not errors, errors[0]
    return len(paths) / (time.perf_counter() - start)


def seconds_of_stages(segmenter: Segmenter, paths: list[Path]) -> dict[str, float]:
    """Of an image, by stage: the median over the paths."""
    seconds: dict[str, list[float]] = {}

    def timed(stage: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        finish()
        seconds.setdefault(stage, []).append(time.perf_counter() - start)
        return result

    predict = segmenter.predictor
    records = CocoRecords(segmenter.task, segmenter.names, segmenter.classes_of_one_segment)
    post_process = getattr(predict.image_processor, f"post_process_{segmenter.task}_segmentation")
    prepare = partial(predict.image_processor, input_data_format="channels_first", return_tensors="pt")
    for path in paths:
        outcome = timed("read", partial(read, (0, path)))
        inputs = timed("resize, normalize", partial(prepare, outcome.image))
        outputs = timed("network", partial(predict.outputs, inputs))
        timed("map", lambda outputs=outputs: post_process(outputs)[0]["segmentation"].cpu())
        (outcome,) = of_batch([outcome], segmenter)
        timed("draw, record, PNG", partial(draw, outcome, "name", segmenter, records))
    return {stage: statistics.median(values) for stage, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--model", choices=[*MODELS], default=[*MODELS][-1], help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, help="(default: that of the command)")
    parser.add_argument("--dtype", default="auto", help="of the predictor (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of torch (default: as many as torch takes by itself)")
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="beside N busy processes")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of throughput.json (default: benchmarks)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    model = arguments.model
    folder, sources = MODELS[model]
    options = {"batch_size": arguments.batch_size, "dtype": arguments.dtype}
    segmenter = Segmenter(str(folder), "panoptic", DEVICE, options={"threshold": 0.5}, **options)
    title = f"{machine()}; {model}, {cores()} cores"
    with tempfile.TemporaryDirectory() as name, neighbors(arguments.busy):
        scratch = Path(name)
        paths = make_photographs(sources, scratch, arguments.images)
        batch_size = segmenter.predictor.batch_size
        images_a_second(segmenter, paths[: 2 * batch_size], scratch / "first")  # what is set up once for all
        stages = seconds_of_stages(segmenter, paths[:8])
        rates: list[float] = []
        run = lambda: rates.append(images_a_second(segmenter, paths, scratch / "out"))  # noqa: E731
        memory = peak_memory(run)
    one_by_one = sum(stages.values())
    table = Table(title=title)
    table.add_column("stage of one image")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    for stage, seconds in stages.items():
        table.add_row(stage, f"{1000 * seconds:.1f}", f"{100 * seconds / one_by_one:.0f} %")
    table.add_row("one after the other", f"{1000 * one_by_one:.1f}", f"{1 / one_by_one:.1f} images/s")
    how = f"maskcls segment, {arguments.images} images, batches of {batch_size}"
    table.add_row(how, f"{1000 / rates[0]:.1f}", f"[bold]{rates[0]:.1f} images/s[/]")
    Console(width=140).print(table)
    result = {"model": model, "images": arguments.images, "batch_size": batch_size, "dtype": arguments.dtype}
    result |= {"busy": arguments.busy, "images_a_second": rates[0], "seconds_of_stages": stages, "peak_memory": memory}
    suffix = "" if DEVICE == "cpu" else "_gpu"
    write_record(arguments.out / f"throughput{suffix}.json", title, 1, [result])


if __name__ == "__main__":
    main()
