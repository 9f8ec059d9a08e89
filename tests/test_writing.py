"""Files are whole or absent; what cannot be written is named with its folder and the cause."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from maskcls_hf.utils.writing import CannotWrite, replacing, write_json, write_text, written

resource = pytest.importorskip("resource")


@pytest.fixture
def small_files():
    """A limit on the size of files, which ends a write as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


class TestReplacing:
    def test_has_its_name_when_it_is_whole(self, tmp_path):
        with replacing(tmp_path / "a.png") as temporary:
            temporary.write_text("new")
            assert temporary.suffix == ".png" and not (tmp_path / "a.png").exists()
        assert os.listdir(tmp_path) == ["a.png"]

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
    def test_an_error_keeps_the_old_content(self, error, tmp_path):
        write_text(tmp_path / "a.txt", "old")
        with pytest.raises(error), replacing(tmp_path / "a.txt") as temporary:
            temporary.write_text("ne")
            raise error
        assert os.listdir(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"

    def test_through_a_link(self, tmp_path):
        (tmp_path / "far").mkdir()
        (tmp_path / "link.json").symlink_to(tmp_path / "far" / "real.json")
        write_json(tmp_path / "link.json", {"a": 1})
        assert (tmp_path / "link.json").is_symlink()
        assert json.loads((tmp_path / "far" / "real.json").read_text()) == {"a": 1}

    def test_a_device_is_not_replaced(self):
        reading, writing = os.pipe()
        write_text(f"/dev/fd/{writing}", "text")
        assert os.read(reading, 10) == b"text"

    def test_names_of_any_length(self, tmp_path):
        write_text(tmp_path / ("é" * 125 + ".json"), "é")


class TestWhatCannotBeWritten:
    def test_a_full_disk(self, small_files, tmp_path):
        write_text(tmp_path / "a.txt", "old")
        with pytest.raises(CannotWrite) as error:
            write_text(tmp_path / "a.txt", "x" * 200_000)
        assert str(error.value) == f"a.txt could not be written to {tmp_path}: File too large."
        assert os.listdir(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"

    @pytest.mark.parametrize(
        "save", [lambda tensor, path: save_file({"a": tensor}, path), torch.save], ids=["safetensors", "torch"]
    )
    def test_tensors(self, save, small_files, tmp_path):
        """safetensors and torch raise errors of their own kinds, torch without the cause."""
        with pytest.raises(CannotWrite) as error, written("The model", tmp_path, scratch=tmp_path):
            save(torch.zeros(100_000), tmp_path / "weights")
        assert str(error.value) == f"The model could not be written to {tmp_path}: File too large."

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR])
    def test_causes(self, number, tmp_path):
        with pytest.raises(CannotWrite, match=os.strerror(number)), written("It", tmp_path):
            raise OSError(number, os.strerror(number))

    def test_no_such_folder(self, tmp_path):
        (tmp_path / "file").touch()
        for folder in ("absent", "file"):
            with pytest.raises(CannotWrite, match=f"a.json could not be written to {tmp_path / folder}: No"):
                write_json(tmp_path / folder / "a.json", {})

    def test_a_copy(self, small_files, tmp_path):
        """Python names its source."""
        (tmp_path / "source").mkdir()
        source, folder = tmp_path / "source" / "large", tmp_path / "folder"
        with source.open("wb") as file:
            file.write(bytes(60_000))
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        folder.mkdir()
        with pytest.raises(CannotWrite, match=f"It could not be written to {folder}: File too"), written("It", folder):
            shutil.copyfile(source, folder / "large")

    def test_what_cannot_be_read_is_something_else(self, tmp_path):
        with pytest.raises(FileNotFoundError), written("It", tmp_path / "folder"):
            (tmp_path / "other" / "image.png").read_bytes()

    def test_other_errors_stay(self, tmp_path):
        with pytest.raises(RuntimeError, match="out of memory") as error, written("It", tmp_path):
            raise RuntimeError("CUDA out of memory")
        assert not isinstance(error.value, CannotWrite)
