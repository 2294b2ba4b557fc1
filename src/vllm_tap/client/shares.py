"""Prompts of a call, spread over engines, with a capture of their own in each. Client process, in its event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from vllm_tap.client import missing
from vllm_tap.client.engines import Engines
from vllm_tap.client.joined import joined
from vllm_tap.client.lives import Lives
from vllm_tap.client.recording import Recording
from vllm_tap.client.result import Capture
from vllm_tap.client.tasks import all_of, finished
from vllm_tap.errors import BudgetError, PositionError
from vllm_tap.spec import Spec


class Shares:
    """Captures that have begun, by engine.

    Attributes:
        lives: Those of the engine of each prompt.
    """

    def __init__(self, lives: list[Lives], recordings: dict[Lives, Recording], spec: Spec) -> None:
        self.lives, self._recordings, self._spec = lives, recordings, spec

    def mark(self, params: Any, sample: int) -> Any:
        """Return the parameters that have the engine of a prompt capture it."""
        return self._recordings[self.lives[sample]].mark(params, sample)

    async def finish(self, outputs: list[Any]) -> Capture:
        """Return all rows; see `Recording.finish`."""
        finishing = (self._finish(lives, recording, outputs) for lives, recording in self._recordings.items())
        result = joined(await all_of(finishing), outputs)
        missing.check_result(self._spec, result.sequences, result)
        return result

    async def _finish(self, lives: Lives, recording: Recording, outputs: list[Any]) -> Capture:
        mine = [output if self.lives[sample] is lives else None for sample, output in enumerate(outputs)]
        with lives.blamed(but=BudgetError):  # the next call may fit
            return await asyncio.to_thread(_finished, recording, mine)


def _finished(recording: Recording, outputs: list[Any]) -> Capture:
    """Return the rows, also where some are missing, which is said of those of all engines together."""
    try:
        return recording.finish(outputs)
    except PositionError as error:
        result: Capture = error.result
        return result


@contextlib.asynccontextmanager
async def begun(engines: Engines, num_prompts: int, spec: Spec, **options: Any) -> AsyncIterator[Shares]:
    """Choose an engine for each prompt, and begin a capture in each of these; where the block fails, they stop.

    Args:
        engines: That there are.
        num_prompts: Prompts, of which each goes to the engine that has the fewest requests.
        spec: What to capture.
        **options: As `Recording` takes them.

    Raises:
        TapError: An engine cannot begin.
    """
    with contextlib.ExitStack() as counted:
        chosen = []
        for _ in range(num_prompts):
            chosen.append(engines.least_busy())
            counted.enter_context(chosen[-1].counted(1))
        lives = dict.fromkeys(chosen or [engines.least_busy()])
        starting = {one: asyncio.create_task(_begin(one, spec, options)) for one in lives}
        try:
            begun = await finished(all_of(starting.values()))
            yield Shares(chosen, dict(zip(starting, begun, strict=True)), spec)
        except BaseException:
            await _stop(list(starting.values()))
            raise


async def _begin(lives: Lives, spec: Spec, options: dict[str, Any]) -> Recording:
    with lives.blamed():
        return await asyncio.to_thread(Recording, lives.connection, spec, **options)


async def _stop(starting: list[asyncio.Task[Recording]]) -> None:
    """Stop captures that may be about to begin, whatever happens."""

    async def stop(one: asyncio.Task[Recording]) -> None:
        recording = await one
        if not recording.has_ended:
            await asyncio.to_thread(recording.stop)

    with contextlib.suppress(Exception):
        await finished(all_of(stop(one) for one in starting))
