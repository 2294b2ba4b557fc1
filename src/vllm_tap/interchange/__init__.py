"""Rows in the forms in which other programs read them: folders, iterators, replay records. In any process.

`export` writes folders; the other modules return objects. None needs vLLM; packages are imported on first use.
"""

from vllm_tap.interchange.batches import activations
from vllm_tap.interchange.export import export
from vllm_tap.interchange.replay import Replay, replay

__all__ = ["Replay", "activations", "export", "replay"]
