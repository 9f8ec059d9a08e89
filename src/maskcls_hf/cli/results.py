"""The folder of `maskcls segment`: at every moment whole, and never that of two runs at once."""

from __future__ import annotations

import io
import json
import os
import re
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.tasks import TASKS, Task
from ..utils.writing import replacing, write_text, written
from .counts import csv_text

if TYPE_CHECKING:
    from PIL import Image

try:
    import fcntl
except ImportError:  # Windows has no locks of folders
    fcntl = None  # type: ignore[assignment]

_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # by Windows
_NOT_IN_NAMES = re.compile(r'[\\/:*?"<>|\x00-\x1f\x7f\ud800-\udfff]')
LONGEST_NAME = 200  # bytes; file systems take 255, with number and suffix
SHARE_OF_WRITING = 0.05  # of the time of a run, spent on the JSON


class Results:
    """`overlay`, `map` and `TASK.json` in a folder; earlier results of other images stay.

    What an image gave is in a journal before the next image begins, and soon in the JSON; both are read by the next
    run, so that a killed one loses nothing.

    Args:
        out: the folder; nothing is written before [`Results.open`].
        task: of the run.
        csv: write `TASK.csv` too; where there is one already, it is kept up to date.

    Raises:
        ValueError: it holds results of another task, whose maps have the same names; or a JSON that is none of ours.
    """

    def __init__(self, out: Path, task: Task, csv: bool = False):
        self.out, self.task = out, task
        self.json, self.journal = out / f"{task}.json", out / f".{task}.jsonl"
        self.csv = out / f"{task}.csv"
        self.writes_csv = csv or self.csv.exists()
        self.categories: list[dict[str, Any]] | None = None
        self._seconds, self._written = 0.0, 0.0
        for other in TASKS:
            if other != task and any((out / name).exists() for name in (f"{other}.json", f".{other}.jsonl")):
                raise ValueError(
                    f"{out} holds results of --task {other}, whose maps have the same names: choose another folder."
                )
        self._read()

    # -- reading ---------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        self.records: dict[str, dict[str, Any]] = {}  # by the path of the image
        for file, read in ((self.json, self._read_json), (self.journal, self._read_journal)):
            if file.exists():
                try:
                    read(file.read_text(encoding="utf-8"))
                except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
                    raise ValueError(
                        f"{file} holds no results of this command ({type(error).__name__}: {error}): move it away, "
                        "or choose another folder."
                    ) from error

    def _read_json(self, text: str) -> None:
        content = json.loads(text)
        self.categories = list(content["categories"])
        of_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            of_image[annotation["image_id"]].append(annotation)
        for image in content["images"]:
            self._take({"image": image, "annotations": of_image[image["id"]]})

    def _read_journal(self, text: str) -> None:
        first, *lines = text.split("\n")
        if not lines:  # killed in the first line
            return
        self.categories = json.loads(first)["categories"]
        for line in lines[:-1]:  # after the last line break there is nothing, or a line that was not finished
            self._take(json.loads(line))

    def _take(self, record: dict[str, Any]) -> None:
        image = record["image"]
        name = str(image["file_name"])
        key = str(image.get("source", name))
        while "source" not in image and key in self.records:  # of an older version, which kept no paths
            key += "'"
        image.setdefault("map", f"{Path(name).stem}.png")
        self.records[key] = record

    # -- writing ---------------------------------------------------------------------------------------------------

    @contextmanager
    def open(self, categories: list[dict[str, Any]]) -> Iterator[None]:
        """Inside, results are added; no other run does so at the same time.

        Raises:
            ValueError: another run does; or the folder holds results of a model with other classes.
        """
        with written("map", self.out):
            (self.out / "map").mkdir(parents=True, exist_ok=True)
        with only_run(self.out):
            for leftover in self.out.glob("*/.writing-*"):  # of a run that was killed
                leftover.unlink(missing_ok=True)
            self._read()  # what other runs have added while the model was loaded
            if self.records and self.categories != categories:
                raise ValueError(f"{self.out} holds results of a model with other classes: choose another folder.")
            self.categories = categories
            self._write()
            self.journal.unlink(missing_ok=True)  # in which a line may be half-written
            try:
                yield
            finally:
                self._write()
                if self.writes_csv:
                    write_text(self.csv, csv_text(self.content()))
                self.journal.unlink(missing_ok=True)

    def names(self, paths: Sequence[Path]) -> list[str]:
        """Names of the files of each image: those that it has already, else new ones."""
        known = {source: Path(record["image"]["map"]).stem for source, record in self.records.items()}
        for path in paths:  # of an older version
            if path.name in known and source_of(path) not in known:
                self.records[source_of(path)] = self.records.pop(path.name)
                known[source_of(path)] = known.pop(path.name)
        return output_names(paths, known)

    def renew(self, paths: Sequence[Path]) -> None:
        """Say of some images that their pictures may soon be those of other settings than their records."""
        for path in paths:
            self.records.get(source_of(path), {"image": {}})["image"].pop("fingerprint", None)
        self._write()

    def has(self, path: Path, fingerprint: str, overlay: bool) -> bool:
        """Whether what this file gives is there already.

        That is its record, of this very file and these settings, and its pictures.

        Args:
            path: of the image.
            fingerprint: of file and settings, see `Segmenter.fingerprint`.
            overlay: whether an overlay is among the pictures.
        """
        image = self.records.get(source_of(path), {"image": {}})["image"]
        folders = ("overlay", "map") if overlay else ("map",)
        return image.get("fingerprint") == fingerprint and all(
            (self.out / folder / image["map"]).is_file() for folder in folders
        )

    def add(self, path: Path, name: str, overlay: bytes | None, map_: bytes, record: dict[str, Any]) -> None:
        """What was found in an image, its pictures as [`png`]; what was found in it before goes.

        Args:
            path: of the image.
            name: of its files, without ending, see `names`.
            overlay: content of the PNG; None: there is none.
            map_: content of the PNG.
            record: see `CocoRecords.of`.

        Raises:
            CannotWrite: the disk is full, or refuses; nothing half-written is left.
        """
        source = source_of(path)
        for folder, picture in (("overlay", overlay), ("map", map_)):
            target = self.out / folder / f"{name}.png"
            with written(folder, self.out):
                if picture is None:
                    target.unlink(missing_ok=True)  # of an earlier run
                    continue
                target.parent.mkdir(exist_ok=True)
            with replacing(target) as temporary:
                temporary.write_bytes(picture)
        record["image"] |= {"file_name": path.name, "map": f"{name}.png", "source": source}
        self.records[source] = record
        with written(self.journal.name, self.out), self.journal.open("a", encoding="utf-8") as file:
            lines = (
                [json.dumps(record)]
                if file.tell()
                else [json.dumps({"categories": self.categories}), json.dumps(record)]
            )
            file.write("".join(f"{line}\n" for line in lines))
        if (time.monotonic() - self._written) * SHARE_OF_WRITING > self._seconds:
            self._write()

    def _write(self) -> None:
        start = time.monotonic()
        write_text(self.json, json.dumps(self.content()))
        self._written = time.monotonic()
        self._seconds = self._written - start

    def content(self) -> dict[str, Any]:
        """All records as COCO has them, for the JSON."""
        from .coco import coco_content

        return coco_content(self.records.values(), self.categories)


def png(picture: Image.Image) -> bytes:
    """Content of a file: a fifth larger than at best, in a third of the time."""
    content = io.BytesIO()
    picture.save(content, "png", compress_level=1)
    return content.getvalue()


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Inside, no other process is at the folder; one that is killed is no longer.

    Raises:
        ValueError: another one is.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"Another run is writing to {folder}: wait until it is done, or choose another folder."
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def source_of(path: Path) -> str:
    """The same for all ways to name a file in a folder."""
    return str(path.parent.resolve() / path.name)


def output_names(paths: Sequence[Path], known: Mapping[str, str] | None = None) -> list[str]:
    """For each path its stem, numbered where it is taken, also by one that differs in case only.

    Args:
        paths: of images.
        known: names that stay, by [`source_of`].

    Examples:
        >>> output_names([Path("a/one.png"), Path("b/One.jpg"), Path("two.png")])
        ['one', 'One_2', 'two']
    """
    known = known or {}
    taken = {_compared(name) for name in known.values()}
    names = []
    for path in paths:
        name = known.get(source_of(path))
        if name is None:
            stem, number = file_name(path.stem), 2
            name = stem
            while _compared(name) in taken:
                name, number = f"{stem}_{number}", number + 1
            taken.add(_compared(name))
        names.append(name)
    return names


def _compared(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def file_name(stem: str) -> str:
    """A stem that is one on every system.

    Examples:
        >>> file_name("what?"), file_name("con")
        ('what_', 'con_')
    """
    name = _NOT_IN_NAMES.sub("_", stem).encode()[:LONGEST_NAME].decode(errors="ignore").rstrip(". ") or "_"
    return f"{name}_" if _RESERVED.fullmatch(name) else name
