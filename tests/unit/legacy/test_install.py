"""`vllm.hidden_states` as a module that is not vLLM's: put in place lightly, and never over a real one.

Every case runs in a process of its own, with a small folder in vLLM's place: what is loaded there is what is tested.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

IMPORT = "import sys; from vllm_tap.legacy.install import install_vllm_hidden_states as install\n"


@pytest.fixture
def vllm(tmp_path: Path) -> Path:
    """A folder with a package that is called vllm and tells that it was loaded."""
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text("print('vllm was loaded')\n")
    return package


def run(folder: Path, code: str) -> str:
    """Return what `code` prints in a new process that finds `folder` first."""
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT + code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_installing_loads_neither_vllm_nor_torch(vllm: Path) -> None:
    """The module is in place while vLLM and torch are not loaded; torch comes with the first function."""
    code = """
install()
assert not {"vllm", "torch"} & set(sys.modules)
from vllm.hidden_states import deserialize_hidden_states
assert "torch" in sys.modules and "vllm" not in sys.modules
import vllm_tap.legacy.deserialize as home
assert deserialize_hidden_states is home.deserialize_hidden_states
"""
    assert run(vllm.parent, code) == ""


def test_all_functions_are_there_and_nothing_else(vllm: Path) -> None:
    """A star import brings the six functions, `dir` lists them, and any other name is an AttributeError."""
    code = """
module = install()
names = {}
exec("from vllm.hidden_states import *", names)
assert {name for name in names if name[0] != "_"} == set(module.__all__) <= set(dir(module))
assert len(module.__all__) == 6
assert not hasattr(module, "capture")
"""
    assert run(vllm.parent, code) == ""


def test_installing_again_changes_nothing(vllm: Path) -> None:
    """The second call returns the module of the first."""
    assert run(vllm.parent, "assert install() is install() is sys.modules['vllm.hidden_states']") == ""


def test_loaded_vllm_gets_the_attribute(vllm: Path) -> None:
    """With vLLM loaded first, `vllm.hidden_states` works without another import."""
    code = "import vllm; module = install(); assert vllm.hidden_states is module"
    assert run(vllm.parent, code) == "vllm was loaded\n"


def test_vllm_that_is_loaded_later_gets_it_on_import(vllm: Path) -> None:
    """With vLLM loaded afterwards, `import vllm.hidden_states as ...` finds the module."""
    code = "module = install(); import vllm.hidden_states as found; assert found is module"
    assert run(vllm.parent, code) == "vllm was loaded\n"


@pytest.mark.parametrize("later", ["import vllm", "import vllm.hidden_states", "from vllm import hidden_states"])
def test_vllm_that_is_loaded_later_gets_the_attribute(vllm: Path, later: str) -> None:
    """As where `easysteer.hidden_states` is imported before vLLM; vLLM is loaded as it would be without."""
    code = f"module = install(); {later}; import vllm; assert vllm.hidden_states is module; print(vllm.__file__)"
    assert run(vllm.parent, code) == f"vllm was loaded\n{vllm / '__init__.py'}\n"


def test_vllm_that_cannot_be_loaded_says_so_itself(vllm: Path) -> None:
    """What it raises is its own, and the next attempt is made anew; so it is when somebody only looks for it."""
    (vllm / "__init__.py").write_text("import os\nif 'BROKEN' in os.environ: raise ImportError('no CUDA here')\n")
    code = """
import importlib.util, os
module = install()
os.environ["BROKEN"] = "1"
for _ in range(2):
    try:
        import vllm
    except ImportError as error:
        print(error)
del os.environ["BROKEN"]
assert importlib.util.find_spec("vllm")
import vllm
assert vllm.hidden_states is module
"""
    assert run(vllm.parent, code) == "no CUDA here\n" * 2


def test_real_module_on_disk_is_left_to_python(vllm: Path) -> None:
    """Should vLLM ship the module, nothing is put in its place, and vLLM is not loaded to find out."""
    (vllm / "hidden_states.py").write_text("print('the real one')\n")
    assert run(vllm.parent, "assert install() is None; assert 'vllm' not in sys.modules") == ""
    assert run(vllm.parent, "install(); import vllm.hidden_states") == "vllm was loaded\nthe real one\n"


def test_real_module_that_is_loaded_is_returned(vllm: Path) -> None:
    """A real module that is already loaded is what the call returns."""
    (vllm / "hidden_states.py").write_text("real = True\n")
    assert run(vllm.parent, "import vllm.hidden_states; assert install().real") == "vllm was loaded\n"


def test_absent_vllm_is_no_hindrance() -> None:
    """Where vLLM is not installed, as on a client's machine, payloads can be read under the old name all the same."""
    code = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "vllm" else find(name, package)
install()
from vllm.hidden_states import is_moe_layer
assert not is_moe_layer(object())
"""
    assert run(Path(__file__).parent, code) == ""


def test_importing_this_package_offers_the_module(vllm: Path) -> None:
    """After `import vllm_tap` alone the old name can be imported; until then nothing is loaded, nor torch with it."""
    code = """
import vllm_tap
assert not {"vllm", "vllm.hidden_states", "torch"} & set(sys.modules)
import vllm.hidden_states as found
assert "torch" not in sys.modules
import vllm
assert vllm.hidden_states is found is install()
assert len(found.__all__) == 6 and found.is_moe_layer(object()) is False
"""
    assert run(vllm.parent, code) == "vllm was loaded\n"


def test_offered_module_comes_after_a_real_one(vllm: Path) -> None:
    """Should vLLM ship the module, it is the one that is imported."""
    (vllm / "hidden_states.py").write_text("print('the real one')\n")
    assert run(vllm.parent, "import vllm_tap, vllm.hidden_states") == "vllm was loaded\nthe real one\n"
