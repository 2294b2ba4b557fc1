"""The documents say what the code does, are short enough to read, and their examples run."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import vllm_tap
from vllm_tap.bench.render import render
from vllm_tap.frame import messages
from vllm_tap.transport.tcp import access, frames

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
QUICKSTART = (ROOT / "examples" / "quickstart.py").read_text()
FORMAT = (ROOT / "docs" / "format.md").read_text()
DOCUMENTS = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))


@pytest.fixture(scope="module")
def prose() -> ModuleType:
    """`docs/check_prose.py`, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("check_prose", ROOT / "docs" / "check_prose.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_shows_the_quickstart() -> None:
    """Its first Python block is examples/quickstart.py, word for word, which tests/engine runs."""
    found = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert found is not None
    assert found[1] == QUICKSTART
    assert "\nOUTPUT\n" not in README, "paste what examples/quickstart.py prints"
    assert len([line for line in QUICKSTART.splitlines() if line.strip()]) <= 10


def test_the_example_uses_what_exists() -> None:
    """It is guarded, and names only attributes of samples and fields of `Spec` that there are."""
    tree = ast.parse(QUICKSTART)
    (spec,) = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "Spec"]
    vllm_tap.Spec(**{keyword.arg: ast.literal_eval(keyword.value) for keyword in spec.keywords if keyword.arg})
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "sample"}
    assert used
    assert all(hasattr(vllm_tap.Sample, name) for name in used)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_are_guarded(path: Path) -> None:
    """vLLM starts processes by spawn, so an example without the guard would start itself again."""
    tree = ast.parse(path.read_text())
    assert "__main__" in ast.dump(tree.body[-1])


def test_python_blocks_compile() -> None:
    """Every Python block of every document is Python."""
    for document in DOCUMENTS:
        for block in re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL):
            compile(block, document, "exec")


@pytest.mark.parametrize("document", ["README.md", "docs/benchmarks.md", "docs/measured.md"])
def test_tables_are_up_to_date(document: str) -> None:
    """Every figure of a table is rendered from a results file."""
    path = ROOT / document
    link = "bench/results" if path.parent == ROOT else "../bench/results"
    text = path.read_text()
    assert "<!-- bench:" in text
    assert render(text, ROOT / "bench" / "results", link) == text


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    """Relative links of the documents name files that exist, and headings that these have."""
    path = ROOT / document
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]*))?\)", path.read_text()):
        linked = path.parent / target if target else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"


def anchors(path: Path) -> set[str]:
    """Return the names that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "docs/design.md", "docs/support.md"])
def test_files_that_documents_name_exist(document: str) -> None:
    """Paths of the tree in code marks, and targets of make."""
    text = (ROOT / document).read_text()
    paths = re.findall(r"`((?:src|tests|docs|bench|examples|architectures)/[\w./-]*)`", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    named = re.findall(r"(?:`|^)make ([a-z][a-z-]*)", text, re.MULTILINE)
    targets = {target for target in named if not target.endswith("-")}
    makefile = (ROOT / "Makefile").read_text()
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_rooms_of_the_design_exist() -> None:
    """The table of rooms names modules that there are, and none of the package's folders is missing."""
    table = (ROOT / "docs" / "design.md").read_text().partition("## Rooms")[2].partition("\n## ")[0]
    named = {
        room for row in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE) for room in re.findall(r"`([^`]*)`", row)
    }
    package = Path(vllm_tap.__file__).parent
    assert [room for room in named if not (package / room).exists() and not (package / f"{room}.py").exists()] == []
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    assert {room.partition("/")[0] for room in named} >= folders


def test_every_field_of_a_message_is_in_the_format() -> None:
    """The table of messages has all that cross between processes, with all of their fields."""
    found: dict[str, set[str]] = {}
    for names, fields in re.findall(r"^\| (`[A-Z][^|]*) \| (.*) \|$", FORMAT, re.MULTILINE):
        found |= {name: set(re.findall(r"`(\w+)`", fields)) for name in re.findall(r"`(\w+)`", names)}
    kinds = {kind for kind in vars(messages).values() if isinstance(kind, type) and issubclass(kind, messages.Message)}
    assert len(kinds) > 10
    for kind in kinds - {messages.Message}:
        assert set(kind.__struct_fields__) - {"version"} <= found.get(kind.__name__, set()), kind.__name__


def test_frames_of_the_format_are_as_long_as_they_are() -> None:
    """Those of a network, whose lengths the tables state, and their codecs in order."""
    network = FORMAT.partition("\n## Network")[2].partition("\n## ")[0].replace("\n", " ")
    for frame in (access.PREFACE, access.ANSWER):
        assert f"| {frame.size} | `vtpn`" in network
    for frame in (frames.HELLO, frames.FETCH, frames.ROWS):
        assert f"| {frame.size} bytes:" in network
    assert ", ".join(f"`{name}`" for name in frames.CODECS) in network
    assert f"1 to {frames.MAX_PIECE_BYTES >> 20} MiB" in network


def test_nothing_is_too_long_to_read(prose: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """No sentence over the limit, no README over its length, no docstring that opens vaguely."""
    with pytest.raises(SystemExit) as ended:
        prose.main()
    assert not ended.value.code, capsys.readouterr().out


def test_long_sentences_are_found(prose: ModuleType) -> None:
    """In prose alone, not in code and tables; a colon in front of a capital ends a sentence."""
    words = "word " * 25
    long = f"A {words}and {words}end."
    assert len(list(prose.check_document("a.md", long))) == 1
    for harmless in (f"A {words}end: The {words}end.", f"```\n{long}\n```", f"| {long} |", f"- A {words}\n- {words}"):
        assert list(prose.check_document("a.md", harmless)) == []
    assert len(list(prose.check_document("README.md", "line\n\n" * 100))) == 1


@pytest.mark.parametrize("word", ["What", "Where", "Whether", "How"])
def test_vague_docstrings_are_found(prose: ModuleType, word: str) -> None:
    """Of modules, classes, functions and attributes."""
    assert len(list(prose.check_docstrings("a.py", f'"""{word} it is."""\nx = 1\n"""{word} x is."""\n'))) == 2
    assert list(prose.check_docstrings("a.py", f'"""Return a thing. {word} it is."""\n')) == []


def test_hooks_run_what_make_check_runs() -> None:
    """Every part of `make check` is a hook of pre-commit, and no other; the workflow runs `.ci/run`."""
    found = re.search(r"^check: ([\w -]+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found is not None
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for hook in local["hooks"]] == [f"make {target}" for target in found[1].split()]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert {"run": ".ci/run"} in workflow["jobs"]["check-and-test"]["steps"]
