"""The client's side of a worker whose rows NIXL brings; session and calls are those of TCP. Client process."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from vllm_tap.errors import DescriptorError, SpecError, TransportError
from vllm_tap.transport.nixl.agent import require_nixl
from vllm_tap.transport.nixl.lane import Lane
from vllm_tap.transport.tcp import access
from vllm_tap.transport.tcp.access import Access
from vllm_tap.transport.tcp.fetching import MOST_BREAKS, Piece
from vllm_tap.transport.tcp.reader import NetworkReader


class NixlReader(NetworkReader):
    """Reads what one worker publishes to this process out of the worker's memory; see `NetworkReader`.

    Raises:
        TransportError: There is no NIXL here or in the worker, or as for `NetworkReader`.
        SpecError: A codec was asked for.
    """

    def __init__(self, text: str, terms: Access) -> None:
        require_nixl()
        if terms.codec not in ("auto", "raw"):
            raise SpecError(f'transport="nixl" brings rows as they are: leave codec={terms.codec!r} out.')
        super().__init__(text, terms._replace(codec="raw"))
        self._terms = terms
        self._reading = threading.RLock()
        self._lane: Lane | None = None
        try:
            self._lane = self._opened()
        except (OSError, EOFError) as error:
            self.close()
            raise TransportError(f"the worker at {text} ended the connection ({error}): see its log.") from error
        except BaseException:
            self.close()
            raise

    def fetch(self, pieces: Iterable[Piece]) -> None:
        """Read bytes of published blocks into memory of this process; a connection that breaks is made anew.

        Raises:
            DescriptorError: As for `NetworkReader.fetch`.
            TransportError: So it is, or NIXL failed.

        Cost:
            No copy in user space where UCX has hardware for it, or reads memory of the same host.
        """
        self._require_open()
        wanted = list(pieces)
        try:
            with self._reading:
                self._fetch(wanted)
        except DescriptorError:
            raise
        except TransportError:
            self.close()
            raise

    def _fetch(self, pieces: list[Piece]) -> None:
        for is_last in (*[False] * MOST_BREAKS, True):
            self._lane = lane = self._lane or self._opened()
            try:
                return lane.fetch(pieces)
            except DescriptorError:
                raise
            except TimeoutError as error:
                self._drop()
                raise TransportError(f"the worker is silent for {self._terms.timeout_s:g} s ({error}).") from error
            except (OSError, EOFError) as error:
                self._drop()
                if is_last:
                    raise TransportError(f"the connection to the worker breaks again and again ({error}).") from error
            except BaseException:
                self._drop()
                raise
        raise AssertionError

    def _opened(self) -> Lane:
        return Lane(self.connect(access.MEMORY), self.is_local, self._terms.timeout_s)

    def _drop(self) -> None:
        lane, self._lane = self._lane, None
        if lane is not None:
            lane.close()

    def close(self) -> None:
        """End the connections, as `NetworkReader.close` does; a read that is under way fails."""
        super().close()
        lane = self._lane
        if lane is not None:
            lane.stop()
            with self._reading:
                self._drop()
