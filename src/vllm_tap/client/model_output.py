"""The class of `Sample.as_hf`'s result: transformers' own kind of output where it is installed. Client process.

Imported when it is first needed: transformers takes a second.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    Base = OrderedDict[str, Any]
else:
    try:
        from transformers.utils import ModelOutput as Base
    except ImportError:

        class Base(OrderedDict):
            """As much of `transformers.utils.ModelOutput` as reading takes."""

            def __post_init__(self):
                for field in dataclasses.fields(self):
                    if getattr(self, field.name) is not None:
                        self[field.name] = getattr(self, field.name)

            def __getitem__(self, key):
                return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

            def to_tuple(self):
                return tuple(self[name] for name in self)

            def __reduce__(self):
                return type(self), tuple(getattr(self, field.name) for field in dataclasses.fields(self))


@dataclasses.dataclass
class HuggingFaceOutput(Base):
    """Outputs of a Hugging Face model beside its logits, for a batch of one sequence.

    Like any of transformers' outputs it is read as `out.hidden_states`, `out["hidden_states"]`, `out[0]` or
    `out.to_tuple()`; what is None is no item.

    Attributes:
        hidden_states: L + 1 tensors [1, R, D]: the embeddings, the residual stream after each decoder layer but the
            last, and the output of the final norm; of the last one itself where the model has no final norm, as an
            encoder. None where hidden states were not captured.
        router_logits: A tensor [R, E] for each layer with experts, in order. None where they were not captured.
    """

    hidden_states: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
