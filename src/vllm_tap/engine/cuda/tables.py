"""Device memory that the taps' kernels read: for each group of rows the same tables, side by side. Worker process."""

from __future__ import annotations

from typing import Final

import torch

from vllm_tap.engine.cuda import kernel

PART_WORDS: Final = 16
"""Tables begin on multiples of so many int64: a cache line of the device."""


class Tables:
    """Tables of one group that the kernels read; see `kernel`. A few bytes per token of a step.

    Args:
        words: Memory of the group, int64; that of the next group lies right behind it.
        max_tokens: Of a step.
        max_taps: That there is room for.
        anchors: Of all groups; see `anchor`.
    """

    def __init__(
        self, words: torch.Tensor, max_tokens: int, max_taps: int, anchors: dict[torch.dtype, torch.Tensor]
    ) -> None:
        self.group_words = len(words)
        sizes = _sizes(max_tokens, max_taps)
        header, row_map, numbers, table, counts = words[: sum(sizes)].split(sizes)
        self.header = header[: kernel.HEADER_WORDS]
        self.row_map = row_map.view(torch.int32)
        self.numbers = numbers.view(torch.int32)
        self.table = table.view(torch.int32)[: 2 * max_taps].view(max_taps, 2).fill_(-1)
        self.counts = counts.view(torch.int32)[:max_taps]
        self._anchors = anchors

    def anchor(self, dtype: torch.dtype) -> torch.Tensor:
        """Return a device pointer of a dtype from which destinations are counted; see `kernel`."""
        if dtype not in self._anchors:
            self._anchors[dtype] = torch.empty(16, dtype=dtype, device=self.header.device)
        return self._anchors[dtype]


def new_tables(max_tokens: int, max_taps: int, device: torch.device) -> list[Tables]:
    """Return the tables of all groups, which say that nothing is wanted."""
    group_words, anchors = sum(_sizes(max_tokens, max_taps)), dict[torch.dtype, torch.Tensor]()
    words = torch.zeros(kernel.MAX_GROUPS, group_words, dtype=torch.int64, device=device)
    return [Tables(group, max_tokens, max_taps, anchors) for group in words]


def _sizes(max_tokens: int, max_taps: int) -> list[int]:
    """Return the words of header, row map, numbers, table and counts."""
    words = kernel.HEADER_WORDS, max_tokens, (max_tokens + 1) // 2, max_taps, (max_taps + 1) // 2
    return [-(-size // PART_WORDS) * PART_WORDS for size in words]
