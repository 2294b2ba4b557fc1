"""Ways of rows from an engine worker to a client: memory that both map, or a network. Used by both processes.

In each of the rooms `segment`, `tcp` and `nixl` a `server` runs in the worker and a `reader` in the client; `calls`
brings messages to the workers of any.
"""

from __future__ import annotations

from typing import Final

AUTO: Final = "auto"
SEGMENT: Final = "segment"
NETWORK: Final = "tcp"
NIXL: Final = "nixl"
INLINE: Final = "inline"

TRANSPORTS: Final = (AUTO, SEGMENT, NETWORK, NIXL, INLINE)
"""Names that users choose from; calls through vLLM, which are inline, need nothing of this package."""

NETWORKS: Final = frozenset({NETWORK, NIXL})
"""Those that a worker serves which was told to listen."""

OTHER_NAMES: Final = {"shared_memory": SEGMENT}
"""Second names of transports."""
