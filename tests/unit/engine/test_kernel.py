"""The tap's kernel as GPUs would run it: compiled without one, and read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_tap.engine.cuda import expert_kernel, kernel

HOPPER = 90
GROUP_WORDS = 20_000 // 16 * 16


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
    constants |= {"ROWS": rows, "BLOCK": min(triton.next_power_of_2(width), 1024), "GROUP": GROUP_WORDS}
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


def experts_ptx(rows: int, num_warps: int, **options: Any) -> list[str]:
    """Compile a variant of the kernel of 128 experts, of which 8 are chosen, and return its instructions."""
    function = expert_kernel._tap_experts
    constants = {"STREAM": 3, "EXPERTS": 128, "CHOICES": 8, "ROWS": rows, "EXPERTS_BLOCK": 128, "CHOICES_BLOCK": 8}
    constants |= {"LOGITS_ALIGN": 16, "LOGITS_ELEMENTS": 8, "IDS_ALIGN": 8, "IDS_ELEMENTS": 8, "WEIGHTS_ALIGN": 16}
    constants |= {"WEIGHTS_ELEMENTS": 4, "GATHER": False, "GROUP": GROUP_WORDS, **options}
    pointers = {"header": "*i64", "table": "*i32", "row_map": "*i32", "counts": "*i32", "sources": "*i64"}
    pointers |= {"logits": "*bf16", "ids": "*i32", "weights": "*fp32"}
    pointers |= {"logits_anchor": "*bf16", "ids_anchor": "*u8", "weights_anchor": "*fp32"}
    numbers = dict.fromkeys(("index", "first", "num_rows", "ids_stride", "weights_stride", "logits_stride"), "i32")
    names = function.arg_names
    source = ASTSource(
        fn=function,
        signature=pointers | numbers | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, "logits_stride")},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", HOPPER, 32), options={"num_warps": num_warps})
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
    assert len(labels) == 3
    assert min(labels) > rows


def test_one_kernel_waits_once_for_the_experts_of_a_layer() -> None:
    """In graphs: what does not depend on the layer is loaded before the wait, and all that does at once behind it."""
    lines = experts_ptx(rows=1, num_warps=4, CHOSEN=False, AHEAD=True, EARLY=True)
    (wait,) = places(lines, "griddepcontrol.wait")
    loads = places(lines, "ld.global")
    stores = places(lines, "st.global")
    assert sum(load < wait for load in loads) >= 3 * 4 + 2  # of each tap plane, mode, address, pitch; tokens, row
    assert sum(wait < load < min(stores) for load in loads) >= 3
    assert not places(lines, ".local")


@pytest.mark.parametrize("gathers", [False, True])
def test_logits_of_many_rows_move_by_sixteen_bytes(gathers: bool) -> None:
    """Several rows a program: outside graphs, and at the end of a large one, where addresses come from memory."""
    lines = experts_ptx(rows=32, num_warps=8, CHOSEN=not gathers, GATHER=gathers, AHEAD=gathers, EARLY=False)
    assert places(lines, "ld.global", ".v4.b32")
    assert places(lines, "st.global", ".v4.b32")


class Compiled:
    """What Triton compiled for one set of arguments."""

    def __init__(self, names: list[str], launches: list[dict[str, Any]]) -> None:
        self._names, self._launches = names, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self._launches.append(dict(zip(self._names, args, strict=True)))


class Function(Compiled):
    """Takes arguments as Triton's functions do: some by position, the rest by name, with options."""

    def __init__(self, names: list[str], launches: list[dict[str, Any]]) -> None:
        super().__init__(names, launches)
        self.num_compiled = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert len(grid) == 3

        def launch(*args: Any, num_warps: int, launch_pdl: bool = False, **constants: Any) -> Compiled:
            given = dict(zip(self._names, args, strict=False)) | constants
            assert list(given) == self._names
            self.num_compiled += 1
            self._launches.append(given)
            return Compiled(self._names, self._launches)

        return launch


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("experts", [False, True])
def test_what_is_compiled_is_launched_with_the_same_arguments(
    monkeypatch: pytest.MonkeyPatch, experts: bool, early: bool
) -> None:
    """Past Triton's own look-ups, unless there is anything that it compiles for anew."""
    module, name = (expert_kernel, "_tap_experts") if experts else (kernel, "_tap")
    launches: list[dict[str, Any]] = []
    function = Function(getattr(module, name).arg_names, launches)
    monkeypatch.setattr(module, name, function)
    monkeypatch.setattr(kernel, "_compiled", {})
    monkeypatch.setattr(kernel, "can_launch_early", lambda _: early)
    anchors = {out: torch.zeros(16, dtype=out) for out in OUTS}
    tables = {name: torch.zeros(64, dtype=torch.int32) for name in ("header", "table", "row_map", "counts")}
    state = SimpleNamespace(anchor=anchors.get, group_words=GROUP_WORDS, **tables)
    memory = torch.zeros(4096, dtype=torch.bfloat16)

    def launch(first: int = 0, stride: int = 32, **options: Any) -> int:
        before = function.num_compiled
        rows = memory[first:].as_strided((4, 32), (stride, 1))
        if experts:
            ids, weights = rows[:, :2].int(), rows[:, :2].float()
            expert_kernel.launch_tap_experts(state, [rows, ids, weights], 3, 3, OUTS, **options)
        else:
            kernel.launch_tap(state, rows, None, 3, 0, torch.bfloat16, **options)
        return function.num_compiled - before

    assert [launch(), launch(), launch(chosen=(2, 3)), launch(chosen=(2, 3))] == [1, 0, 1, 0]
    for once, again in zip(launches[::2], launches[1::2], strict=True):
        assert list(once) == list(again)
        assert [told(value) for value in once.values()] == [told(value) for value in again.values()]
    assert [launch(stride=40), launch(stride=40), launch(first=1), launch(first=8)] == [1, 0, 1, 0]
    assert [launch(ahead=True), launch(ahead=True), launch(large=True), launch(large=True)] == [1, 0, 1, 0]


OUTS = [torch.bfloat16, torch.uint8, torch.float32]


def told(value: Any) -> Any:
    """Return what a kernel learns of an argument."""
    return (value.dtype, value.shape, value.stride()) if isinstance(value, torch.Tensor) else value


def test_powers_of_two_are_those_of_triton() -> None:
    """Blocks of Triton's kernels have such sizes."""
    numbers = [*range(1, 300), 4095, 4096, 4097, 7168, 14336]
    assert [kernel.power_of_2(number) for number in numbers] == [triton.next_power_of_2(number) for number in numbers]
