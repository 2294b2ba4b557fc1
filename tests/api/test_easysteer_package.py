"""`easysteer.hidden_states` where there is a real `easysteer` and where there is none: ours never stands in its way.

Every case runs in a process of its own, with folders that hold a copy of ours and a small package that stands for the
real one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

OURS = Path(__file__).resolve().parents[2] / "src"
NAMES = "import easysteer, easysteer.steer, easysteer.hidden_states as hs; print(easysteer.real, hs.real)"


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A folder with our part of `easysteer` alone, as an installation leaves it."""
    shutil.copytree(OURS / "easysteer", tmp_path / "ours" / "easysteer", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "ours"


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """A folder with a package that looks as the real one does."""
    make_real(tmp_path / "real")
    return tmp_path / "real"


def make_real(folder: Path) -> None:
    """Write the package."""
    for name in ("easysteer", "easysteer/hidden_states", "easysteer/steer"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "__init__.py").write_text("real = True\n")


def run(folders: list[Path], code: str) -> str:
    """Return what `code` prints in a new process that finds `folders` first; no other `easysteer` is in sight."""
    path = os.pathsep.join(map(str, folders))
    clean = f"import sys; sys.path[:] = [p for p in sys.path if p != {str(OURS)!r}]\n"
    done = subprocess.run(
        [sys.executable, "-c", clean + code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_ours_is_one_module_and_no_package() -> None:
    """A file `easysteer/__init__.py`, or a folder `hidden_states`, would take the place of the real one's."""
    assert [path.name for path in (OURS / "easysteer").iterdir() if path.name != "__pycache__"] == ["hidden_states.py"]


def test_without_a_real_one_ours_is_imported(ours: Path) -> None:
    """The old name works on its own, with nothing imported before."""
    code = f"""
sys.path.append({str(OURS)!r})
sys.path_importer_cache.clear()
import easysteer.hidden_states as hs
from vllm_tap.legacy import hidden_states
assert hs.get_all_hidden_states is hidden_states.get_all_hidden_states
print(hs.__file__)
"""
    assert run([ours], code) == str(ours / "easysteer" / "hidden_states.py")


@pytest.mark.parametrize("ours_first", [True, False])
def test_a_real_one_wins_in_both_orders(ours: Path, real: Path, ours_first: bool) -> None:
    """A package with `__init__.py` is what Python imports, also when our folder comes first."""
    assert run([ours, real] if ours_first else [real, ours], NAMES) == "True True"


def test_a_real_one_wins_in_the_same_folder(ours: Path) -> None:
    """Installed into one folder, neither overwrites a file of the other, and the real one is imported."""
    before = (ours / "easysteer" / "hidden_states.py").read_bytes()
    make_real(ours)
    assert (ours / "easysteer" / "hidden_states.py").read_bytes() == before
    assert run([ours], NAMES) == "True True"


def test_beside_an_editable_one_of_the_finder_kind_only_hidden_states_is_ours(ours: Path, real: Path) -> None:
    """setuptools may serve an editable package by a finder that is asked last: its other modules are still found.

    This is a limit, written down in docs/migration.md: `hidden_states` is ours here, and the package's `__init__` does
    not run.
    """
    code = f"""
from importlib.machinery import PathFinder
class Finder:  # what setuptools writes for an editable installation that is not a plain folder
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        folder = {str(real / "easysteer")!r}
        if name.rpartition(".")[0] == "easysteer":
            return PathFinder.find_spec(name, [folder])
sys.meta_path.append(Finder)
sys.path.append({str(OURS)!r})
import easysteer.steer, easysteer.hidden_states as hs
print(easysteer.steer.real, hs.__name__ == "easysteer.hidden_states" and not hasattr(hs, "real"))
"""
    assert run([ours], code) == "True True"
