"""Checks all families, or the named ones, and renders the table: `python architectures/run.py [FAMILY ...]`.

Each family runs in a process of its own, forked from this one after the libraries are loaded. Results are written as
they come; those of families that are not run again stay. Exits with 1 when a row is wrong. `--render` runs nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "architectures"))

RESULTS = ROOT / "architectures" / "results.json"
TIMEOUT_S = 300


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--missing", action="store_true", help="only families that have no result yet")
    parser.add_argument("--render", action="store_true", help="only write the table again")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, metavar="SECONDS")
    options = parser.parse_args()
    from families import FAMILIES

    unknown = [name for name in options.families if name not in FAMILIES]
    if unknown:
        parser.error(f"no such family: {', '.join(unknown)}. Known: {', '.join(FAMILIES)}")
    results = read()
    results["families"] = {name: row for name, row in results["families"].items() if name in FAMILIES}
    if not options.render:
        names = options.families or list(FAMILIES)
        run([name for name in names if not (options.missing and name in results["families"])], results, options.timeout)
    from render import render

    render(results)
    wrong = [name for name, row in results["families"].items() if row["status"] == "wrong"]
    if wrong:
        print(f"wrong: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def read() -> dict[str, Any]:
    """Read the results so far."""
    return dict(json.loads(RESULTS.read_text())) if RESULTS.exists() else {"versions": {}, "families": {}}


def run(names: list[str], results: dict[str, Any], timeout_s: float) -> None:
    """Check families one after another and keep each result as soon as it is there."""
    if not names:
        return
    results["versions"] = preload()
    from families import FAMILIES

    for number, name in enumerate(names, 1):
        began = time.monotonic()
        row = check(name, timeout_s)
        results["families"][name] = row
        results["families"] = {known: results["families"][known] for known in FAMILIES if known in results["families"]}
        write(results)
        error = f"{row['error']:.1e}" if row.get("error") is not None else ""
        print(
            f"{number}/{len(names)} {name}: {row['status']} {error} {row.get('reason', '')[:160]} "
            f"({time.monotonic() - began:.0f} s)",
            flush=True,
        )


def write(results: dict[str, Any]) -> None:
    """Replace the file of results in one move."""
    draft = RESULTS.with_suffix(".draft")
    draft.write_text(json.dumps(results, indent=1) + "\n")
    draft.replace(RESULTS)


def preload() -> dict[str, str]:
    """Load the libraries that every check needs, and return their versions."""
    import check  # noqa: F401  (sets the environment that vLLM reads)
    import torch
    import transformers
    import vllm
    from vllm import LLM  # noqa: F401
    from vllm.model_executor.models import registry

    # vLLM looks at each model class in a fresh interpreter, which here takes longer than the check itself. The process
    # of a family ends after it, so it may as well look there.
    registry._run_in_subprocess = lambda function: function()
    return {"vllm": vllm.__version__, "transformers": transformers.__version__, "torch": torch.__version__}


def check(name: str, timeout_s: float) -> dict[str, Any]:
    """Check one family in a process forked from this one, and end it if it takes too long."""
    with tempfile.NamedTemporaryFile("w+", prefix=f"vllm-tap-{name}-", suffix=".log") as log:
        readable, writable = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(readable)
            _child(name, writable, log.fileno())
        os.close(writable)
        try:
            answer = _read(readable, timeout_s)
        finally:
            os.close(readable)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        if answer:
            return dict(json.loads(answer))
        log.seek(0)
        last = [line.strip() for line in log.read().splitlines() if line.strip()][-1:]
        reason = f"no result within {timeout_s:.0f} s" if answer is None else f"the process ended: {' '.join(last)}"
        return {"family": name, "status": "not-run", "reason": reason[:400], "note": ""}


def _child(name: str, writable: int, log: int) -> None:
    code = 1
    try:
        for stream in (1, 2):
            os.dup2(log, stream)
        import check

        answer = json.dumps(check.main(name)).encode()
        with os.fdopen(writable, "wb") as pipe:
            pipe.write(answer)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _read(readable: int, timeout_s: float) -> bytes | None:
    """Return all that comes until the other end closes; None if that takes too long."""
    deadline, pieces = time.monotonic() + timeout_s, []
    while True:
        ready, _, _ = select.select([readable], [], [], max(deadline - time.monotonic(), 0.0))
        if not ready:
            return None
        piece = os.read(readable, 1 << 16)
        if not piece:
            return b"".join(pieces)
        pieces.append(piece)


if __name__ == "__main__":
    sys.exit(main())
