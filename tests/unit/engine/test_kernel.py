"""The tap's kernel as GPUs would run it: compiled without one, and read."""

from __future__ import annotations

from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_tap.engine import kernel

HOPPER = 90


def ptx(
    capability: int = HOPPER, dtype: str = "bf16", itemsize: int = 2, width: int = 4096, rows: int = 1, **options: Any
) -> list[str]:
    """Compile a variant and return its instructions."""
    chosen = {
        "HAS_RESIDUAL": True,
        "EXPLICIT": False,
        "CHOSEN": False,
        "AHEAD": True,
        "EARLY": capability >= HOPPER,
    } | options
    align = min(width * itemsize & -(width * itemsize), 16)
    constants = {"WIDTH": width, "ALIGN": align, "ELEMENTS": align // itemsize} | chosen
    constants |= {"ROWS": rows, "BLOCK": min(triton.next_power_of_2(width), 1024)}
    pointers = {"header": "*i64", "table": "*i32", "row_map": "*i32", "counts": "*i32"}
    pointers |= dict.fromkeys(("anchor", "hidden", "residual"), f"*{dtype}")
    numbers = {"index": "i32", "stream": "i32", "address": "i64", "first": "i32", "num_rows": "i32"}
    strides = dict.fromkeys(("hidden_stride", "residual_stride"), "i32")
    names = kernel._tap.arg_names
    # As at a launch: tensors start on multiples of 16 bytes, and so do the rows of a wide one.
    multiples = pointers | (strides if width % 16 == 0 else {})
    source = ASTSource(
        fn=kernel._tap,
        signature=pointers | numbers | strides | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in multiples},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    return [line.strip() for line in compiled.asm["ptx"].splitlines()]


def places(lines: list[str], *words: str) -> list[int]:
    """Return the lines that have all the words."""
    return [number for number, line in enumerate(lines) if all(word in line for word in words)]


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_rows_move_by_sixteen_bytes(capability: int) -> None:
    """One load of hidden, one of residual, one store a thread, 16 bytes each; nothing spills."""
    lines = ptx(capability)
    assert len(places(lines, "ld.global", ".v4.b32")) == 2
    assert len(places(lines, "st.global", ".v4.b32")) == 1
    assert not places(lines, ".local")


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_chosen_rows_move_by_sixteen_bytes(capability: int) -> None:
    """Also where a kernel outside graphs looks up which tokens they are."""
    lines = ptx(capability, CHOSEN=True, AHEAD=False, EARLY=False)
    assert len(places(lines, "ld.global", ".v4.b32")) == 2
    assert len(places(lines, "st.global", ".v4.b32")) == 1


def test_many_short_rows_move_by_sixteen_bytes() -> None:
    """Logits of 128 experts in a large step: several rows a program, as much at once as of a long row."""
    lines = ptx(dtype="fp32", itemsize=4, width=128, rows=32, HAS_RESIDUAL=False, CHOSEN=True, AHEAD=False, EARLY=False)
    assert places(lines, "st.global", ".v4.b32")
    assert not places(lines, "st.global", ".b16")


def test_rows_of_an_odd_size_are_stored_element_by_element() -> None:
    """What starts anywhere must not be stored as if it started on a multiple of 16."""
    lines = ptx(dtype="fp32", itemsize=4, width=5, rows=2, HAS_RESIDUAL=False)
    assert not places(lines, "st.global", ".v4")
    assert not places(lines, "st.global", ".v2")


def test_bfloat16_sums_are_rounded_to_nearest() -> None:
    """Once, as by the model's own add."""
    lines = ptx(80)
    assert places(lines, "cvt.rn.bf16") or places(lines, "fma.rn.bf16x2")
    assert not places(lines, ".rz.")


def test_only_what_the_layer_made_is_loaded_after_the_wait_for_it() -> None:
    """On Hopper the kernel starts before the layer's last one has ended: what does not depend on it is loaded first."""
    lines = ptx(HOPPER)
    (wait,) = places(lines, "griddepcontrol.wait")
    rows = places(lines, "ld.global", ".v4.b32")
    assert min(rows) > wait
    control = [number for number in places(lines, "ld.global") if number < wait]
    assert len(control) >= 5  # plane, mode, tokens, destination row, address and pitch
    assert not places(ptx(80), "griddepcontrol")


def test_the_labels_come_after_the_rows() -> None:
    """The one tap that writes the labels does not hold its rows up."""
    lines = ptx(HOPPER)
    (rows,) = places(lines, "st.global", ".v4.b32")
    labels = [number for number in places(lines, "st.global", ".b32") if ".v4" not in lines[number]]
    assert len(labels) == 2
    assert min(labels) > rows
