"""Ways of rows from an engine worker to a client: memory that both map, or a network. Used by both processes.

In each of the rooms `segment` and `tcp` a `server` runs in the worker and a `reader` in the client; `calls` brings
messages to the workers of either.
"""

from __future__ import annotations

from typing import Final

AUTO: Final = "auto"
SEGMENT: Final = "segment"
NETWORK: Final = "tcp"
INLINE: Final = "inline"

TRANSPORTS: Final = (AUTO, SEGMENT, NETWORK, INLINE)
"""Names that users choose from; calls through vLLM, which are inline, need nothing of this package."""

OTHER_NAMES: Final = {"shared_memory": SEGMENT}
"""Second names of transports."""
