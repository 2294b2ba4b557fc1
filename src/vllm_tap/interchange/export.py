"""`export`: rows of a capture or a dataset as a folder that another program reads. In any process."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from vllm_tap.errors import SpecError
from vllm_tap.interchange.folder import drafted
from vllm_tap.interchange.source import model_of
from vllm_tap.spec import nearest

FORMAT: Final = "vllm-tap export 1"
FACTS_NAME: Final = "vllm_tap.json"

FORMS: Final = {
    "speculators": ("speculators", "write"),
    "specforge": ("specforge", "write"),
    "modelopt": ("modelopt", "write"),
    "deepspec": ("deepspec", "write"),
    "saelens": ("saelens", "write"),
    "hf": ("tables", "write_hf"),
    "npz": ("tables", "write_npz"),
}
"""{name: module and function that writes it}"""


def export(source: Any, to: str, path: Any, **options: Any) -> dict[str, Any]:
    """Write rows as another program reads them; the folder is there whole or not at all.

    Args:
        source: A `Capture` or a `Dataset`.
        to: Name of the form: speculators, specforge, modelopt, deepspec, saelens, hf or npz.
        path: A folder that is not there yet, or is empty.
        **options: Those of the form; see docs/interchange.md.

    Returns:
        Facts of the export, which stand in its `vllm_tap.json` too: layers by the numbers of vllm-tap and of the
        reader, whether the last state is before the final norm, model and conventions.

    Raises:
        SpecError: There is no such form or option, or one is missing.
        LayerError: A layer or stream that the form needs is not there; the message names the `Spec` that has it.
        PositionError: A form of whole sequences, and positions without rows.
        DatasetError: The folder is not empty, or cannot be written to.

    Source:
        See `conventions` of the source, which the export repeats.

    Cost:
        One pass over the rows; one sequence in memory at a time.
    """
    require_form(to, options)
    writer = writer_of(to)
    with drafted(Path(path)) as folder:
        facts = {"format": FORMAT, "to": to, "model": model_of(source), **writer(source, folder, **options)}
        facts["conventions"] = dict(source.conventions)
        (folder / FACTS_NAME).write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def writer_of(to: str) -> Callable[..., dict[str, Any]]:
    """Return the function that writes a form."""
    module, name = FORMS[to]
    writer: Callable[..., dict[str, Any]] = getattr(import_module(f"vllm_tap.interchange.{module}"), name)
    return writer


def require_form(to: str, options: Mapping[str, Any]) -> None:
    """Refuse a form that there is not, and options that it does not take or lacks; nothing is read.

    Raises:
        SpecError: As for `export`.
    """
    if to not in FORMS:
        raise SpecError(f"there is no export {to!r}.{nearest(str(to), FORMS)}")
    known = dict(list(inspect.signature(writer_of(to)).parameters.items())[2:])
    for name in options:
        if name not in known:
            listed = ", ".join(known) or "none"
            raise SpecError(f"the export {to} has no option {name!r}: it has {listed}.")
    missing = [name for name, one in known.items() if one.default is one.empty and name not in options]
    if missing:
        raise SpecError(f"the export {to} needs {', '.join(missing)}: {to} leaves it open, so it has no default.")
