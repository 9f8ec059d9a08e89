"""How `maskcls` begins: what it imports when, how threads wait, parts of users; and the names of the package."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import maskcls_hf
from maskcls_hf.cli.main import app
from maskcls_hf.models.configuration_maskcls import REGISTRIES
from recipes import write_recipe, write_squares

ROOT = Path(maskcls_hf.__file__).parents[1]
COMMANDS = ("segment", "evaluate", "tune", "convert", "validate", "train", "push")
START = "import sys, maskcls_command; sys.argv[0] = 'maskcls'; maskcls_command.main()"
SAYS = "import os; print(os.environ.get('OMP_WAIT_POLICY'), flush=True); raise KeyboardInterrupt"
PARTS = """
from maskcls_hf import register_pixel_decoder
from maskcls_hf.models.pixel_decoders import FPNPixelDecoder

class Mine(FPNPixelDecoder):
    pass

register_pixel_decoder("mine", Mine)
"""


@pytest.fixture
def start(tmp_path):
    """Runs Python where a module is replaced by some lines."""

    def run(*arguments: object, code: str = START, env: dict | None = None, **replaced: str):
        (tmp_path / "replaced").mkdir()
        for name, lines in replaced.items():
            (tmp_path / "replaced" / f"{name}.py").write_text(lines)
        unset = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
        kept = {name: value for name, value in os.environ.items() if name not in unset}
        path = os.pathsep.join([str(tmp_path / "replaced"), str(ROOT)])
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)], env=kept | {"PYTHONPATH": path} | (env or {}),
            capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip

    return run


class TestImports:
    def test_help_needs_no_torch(self, start):
        code = f"""
import sys, maskcls_command
for command in {COMMANDS}:
    sys.argv = ["maskcls", command, "--help"]
    try:
        maskcls_command.main()
    except SystemExit as end:
        assert not end.code
"""
        ended = start(code=code, torch="raise ImportError('torch')", transformers="raise ImportError('transformers')")
        assert ended.returncode == 0, ended.stderr
        assert all(f"maskcls {command}" in ended.stdout for command in COMMANDS)
        assert ended.stdout.count("--import") == len(COMMANDS)

    def test_as_a_module(self, start):
        code = "import runpy, sys; sys.argv = ['x', '-h']; runpy.run_module('maskcls_command', run_name='__main__')"
        ended = start(code=code, torch="raise ImportError('torch')", transformers="raise ImportError('transformers')")
        assert ended.returncode == 0 and "segment" in ended.stdout, ended.stderr

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["segment", "a.png", "-m", "./none", "-o", "out"], "there is no such folder"),
            (["evaluate", "-m", "./none", "-d", "."], "there is no such folder"),
            (["evaluate", "-m", ".", "-d", "none"], "No data set folder none."),
            (["train", "-r", "camvid", "-d", "none", "-o", "out"], "No data set folder none."),
        ],
    )
    def test_wrong_paths_are_said_first(self, arguments, message, start):
        ended = start(*arguments, torch="raise SystemExit('torch')", transformers="raise SystemExit('transformers')")
        assert (ended.returncode, ended.stdout) == (1, "") and ended.stderr.startswith("Error: ")
        assert message in ended.stderr and ended.stderr.count("\n") == 1

    @pytest.mark.parametrize(
        ("module", "lines", "code", "word"),
        [
            ("typer", "raise KeyboardInterrupt", 130, "Ctrl-C"),
            ("torch", "raise KeyboardInterrupt", 130, "Ctrl-C"),
            ("torch", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)", 143, "SIGTERM"),
        ],
    )
    def test_stopped_while_importing(self, module, lines, code, word, start):
        ended = start("convert", "a.pkl", "out", **{module: lines})
        assert (ended.returncode, ended.stderr) == (code, f"Stopped by {word}.\n")

    def test_stopped_while_recipes_are_listed(self, start):
        ended = start("train", "--list", torch="raise KeyboardInterrupt")
        assert (ended.returncode, ended.stderr) == (130, "Stopped by Ctrl-C.\n")


class TestWaitPolicy:
    """Read by OpenMP when torch is imported."""

    def test_is_set(self, start):
        ended = start("convert", "a.pkl", "out", torch=SAYS)
        assert (ended.stdout, ended.returncode) == ("PASSIVE\n", 130)

    @pytest.mark.parametrize(
        ("env", "found"),
        [
            ({"OMP_WAIT_POLICY": "active"}, "active"),
            ({"GOMP_SPINCOUNT": "9"}, "None"),
            ({"KMP_BLOCKTIME": "9"}, "None"),
        ],
    )
    def test_what_a_user_sets_is_kept(self, env, found, start):
        assert start("convert", "a.pkl", "out", env=env, torch=SAYS).stdout == f"{found}\n"

    def test_the_library_sets_nothing(self, start):
        assert start(code="import maskcls_hf", torch=SAYS).stdout == "None\n"

    def test_worker_processes_inherit_it(self, start):
        code = """
import os, sys, maskcls_command
sys.argv = ["maskcls", "--version"]
try:
    maskcls_command.main()
except SystemExit:
    os.system("echo $OMP_WAIT_POLICY")
"""
        assert start(code=code).stdout.endswith("PASSIVE\n")


class TestPublicNames:
    def test_are_there(self):
        assert all(callable(getattr(maskcls_hf, name)) for name in maskcls_hf.__all__)
        assert maskcls_hf.MaskClsConfig.__name__ == "MaskClsConfig" and "register_matcher" in maskcls_hf.__all__
        assert {*maskcls_hf.__all__} <= {*dir(maskcls_hf)}
        with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
            _ = maskcls_hf.Nothing

    def test_type_checkers_see_the_same(self):
        (block,) = (node for node in ast.parse(Path(maskcls_hf.__file__).read_text()).body if isinstance(node, ast.If)
                    and isinstance(node.test, ast.Name))  # fmt: skip
        seen = {alias.asname: node.module for node in block.body for alias in node.names}
        assert seen == maskcls_hf._MODULE_OF

    def test_importing_the_package_registers(self, start):
        code = (
            "import maskcls_hf; from transformers import AutoConfig; print(AutoConfig.for_model('maskcls').model_type)"
        )
        assert start(code=code).stdout == "maskcls\n"


class TestParts:
    """`--import FILE` and the entry points, before the work of a command; here of one that has none."""

    @pytest.fixture(autouse=True)
    def as_before(self, monkeypatch):
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setattr(sys, "modules", sys.modules)
        yield
        for name in ("parts_of_mine", "more_of_mine"):
            sys.modules.pop(name, None)

    def run(self, *files: Path) -> str:
        options = [f"--import={file}" for file in files]
        result = CliRunner().invoke(app, ["convert", "none.pkl", "nowhere", *options])
        assert result.exit_code == 1 and result.stderr.count("\n") == 1, result.stderr
        return result.stderr

    def test_files_are_run_once(self, tmp_path):
        file, other = tmp_path / "parts_of_mine.py", tmp_path / "more_of_mine.py"
        file.write_text("runs = globals().get('runs', 0) + 1\n")
        other.write_text("import parts_of_mine\n")
        assert "There is no file none.pkl" in self.run(file, other, file)
        assert "There is no file none.pkl" in self.run(file)
        assert sys.modules["parts_of_mine"].runs == 1  # found by its name, as worker processes look for it

    @pytest.mark.parametrize(
        ("code", "message"),
        [
            ("a = 1\n\nb = c\n", "parts_of_mine.py, line 3: NameError: name 'c' is not defined"),
            ("a = 1\nb = (\n", "parts_of_mine.py, line 2: SyntaxError: '(' was never closed"),
            (
                "import no_such_module_of_mine\n",
                "line 1: ModuleNotFoundError: No module named 'no_such_module_of_mine'",
            ),
            ("def check():\n    raise ValueError('two\\nlines')\n\ncheck()\n", "line 2: ValueError: two lines"),
        ],
    )
    def test_faults_are_said_with_their_place(self, code, message, tmp_path):
        (tmp_path / "parts_of_mine.py").write_text(code)
        said = self.run(tmp_path / "parts_of_mine.py")
        assert said.startswith(f"Error: --import {tmp_path}") and message in said
        assert "parts_of_mine" not in sys.modules

    def test_no_file_or_no_name(self, tmp_path):
        assert "there is no such file" in self.run(tmp_path / "parts_of_mine.py")
        for name in ("my-parts.py", "parts.txt", "json.py", "statistics.py"):
            (tmp_path / name).write_text("")
        for name in ("my-parts.py", "parts.txt"):
            assert "expected a Python file" in self.run(tmp_path / name)
        for name in ("json", "statistics"):
            assert f"there is another module {name}" in self.run(tmp_path / f"{name}.py")

    def test_entry_points(self, tmp_path, monkeypatch):
        loaded = []
        point = SimpleNamespace(
            load=lambda: loaded.append(1), value="others.parts", dist=SimpleNamespace(name="others")
        )
        monkeypatch.setattr("maskcls_hf.cli.parts.entry_points", lambda group: [point][: group == "maskcls_hf.parts"])
        assert "There is no file none.pkl" in self.run() and loaded == [1]
        point.load = lambda: 1 / 0
        assert "The parts of others (maskcls_hf.parts: others.parts): ZeroDivisionError" in self.run()

    def test_a_part_is_trained_saved_and_loaded(self, tmp_path):
        """The name is taken from then on, by `--set` too; where the part is not known, that is said."""
        file, out, data = tmp_path / "parts_of_mine.py", tmp_path / "out", write_squares(tmp_path / "squares")
        file.write_text(PARTS)
        recipe = write_recipe(
            tmp_path, schedule={"max_steps": 1, "warmup_steps": 0}, evaluation={"tasks": ["semantic"]}
        )
        train = ["train", "-r", recipe, "-d", data, "-o", out, "--set=model.pixel_decoder=mine"]
        score = ["evaluate", "-m", out, "-d", data, "--task=semantic"]

        def run(*command: object) -> tuple[int, str]:
            before, path = {kind: dict(registry) for kind, registry in REGISTRIES.items()}, [*sys.path]
            result = CliRunner().invoke(app, [str(word) for word in command])
            for kind, registry in REGISTRIES.items():  # as in a process of its own
                registry.clear()
                registry.update(before[kind])
            sys.modules.pop("parts_of_mine", None)
            sys.path[:] = path
            return result.exit_code, result.output

        code, said = run(*train)
        assert code == 1 and "pixel_decoder='mine' must be one of" in said and not out.exists()
        assert run(*train, f"--import={file}")[0] == 0
        assert (out / "parts_of_mine.py").read_text() == PARTS
        code, said = run(*score)
        assert code == 1 and "pixel_decoder='mine' must be one of" in said
        code, said = run(*score, f"--import={out / 'parts_of_mine.py'}")
        assert code == 0 and "mean_iou" in said, said
