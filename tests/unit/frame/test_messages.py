"""Messages between client and worker: a trip there, and what is refused on arrival."""

from __future__ import annotations

import sys
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_tap import errors
from vllm_tap.errors import DescriptorError, SpecError, TapError
from vllm_tap.frame import messages
from vllm_tap.frame.layout import Stream, layout
from vllm_tap.frame.messages import (
    Chunk,
    Descriptor,
    Failure,
    Hello,
    Rank,
    Request,
    Start,
    Started,
    Stopped,
    StreamInfo,
)
from vllm_tap.frame.routing import Routing
from vllm_tap.positions import Positions

STREAM = Stream("hidden_states", "bfloat16", 64, (0, 5))
CAPTURE = "1-0-abc"
CHUNK_OFFSET, CHUNK_BYTES = 4096, 1 << 16

HELLO = Hello(
    rank=Rank(0, 0, 1, 0, 1), pid=1, engine="0.32.0", runner="V1", device="cpu", num_layers=6,
    streams=(StreamInfo("hidden_states", "bfloat16", 64, (0, 5), "hidden"),), residual="hidden", reasons={"x": "why"},
    routing={5: Routing(scoring="sigmoid", num_chosen=2, bias=(0.5, -0.25))}, wants_rows=0, address="a", calls="b",
    refusal="",
)  # fmt: skip
START = Start(
    capture_id=CAPTURE, streams={"hidden_states": (0, 5)}, positions=(0, -1), residual="hidden", shared=True,
    clients={0: 1}, budget_bytes=1, staging="auto", expected_rows=0,
)  # fmt: skip


def descriptor(*rows: tuple[int, int, int], **changed: Any) -> Descriptor:
    """Return a descriptor with these rows in its table, and one chunk."""
    fields: dict[str, Any] = {
        "rank": 0,
        "capture_id": CAPTURE,
        "streams": (STREAM,),
        "requests": (Request("r", 0, 0),),
        "first_request": 0,
        "chunks": (Chunk(1, CHUNK_OFFSET, CHUNK_BYTES, 1),),
        "blocks": np.array(rows, "<i8").tobytes(),
        "byte_order": sys.byteorder,
        "wait_seconds": 0.0,
    }
    return Descriptor(**{**fields, **changed})


WRITE = messages.Write(
    capture_id=CAPTURE, client=1, pool=bytes(16), folder="/run/.draft-a", descriptor=descriptor((0, CHUNK_OFFSET, 3)),
    shards=((0, 1), (0, 0)), rows=np.array([2, 0], "<i4").tobytes(),
)  # fmt: skip

REPLIES = [
    HELLO,
    Started(rank=0, streams=(STREAM,)),
    descriptor((0, CHUNK_OFFSET, 3)),
    descriptor((0, CHUNK_OFFSET, 3), labels=bytes(36)),
    messages.Written(rank=0),
    messages.Written(rank=0, files=(messages.WrittenFile("a", 1, 2),)),
    Stopped(rank=0),
    Failure(rank=1, error="LayerError", message="no", identity={"layer": 3}),
]


@pytest.mark.parametrize("message", REPLIES, ids=lambda message: type(message).__name__)
def test_a_reply_arrives_as_it_was_sent(message: messages.Message) -> None:
    """Every reply is equal to itself after encoding and decoding."""
    assert messages.decode_reply(messages.encode(message)) == message


CALLS = [
    START,
    msgspec.structs.replace(START, positions={"or": [{"prompt": [-8, None, None]}, {"mask": [1, 2]}]}),
    messages.Greet(),
    messages.Take(capture_id=CAPTURE),
    messages.Finish(capture_id=CAPTURE),
    messages.Finish(capture_id=CAPTURE, labels=True),
    WRITE,
    messages.Report(capture_id=CAPTURE),
    messages.Stop(capture_id=CAPTURE),
]


@pytest.mark.parametrize("message", CALLS, ids=lambda message: type(message).__name__)
def test_a_call_arrives_as_it_was_sent(message: messages.Message) -> None:
    """So is the argument of every call, numbers as keys included."""
    assert messages.decode_call(messages.encode(message)) == message


PLAIN = st.recursive(
    st.none() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(["all", "last"]),
    lambda part: (
        st.lists(part, max_size=3)
        | st.dictionaries(st.sampled_from(["or", "sub", "prompt", "at", "tokens", "x"]), part, max_size=2)
    ),
)


@given(PLAIN)
def test_positions_from_outside_are_some_or_are_refused(plain: Any) -> None:
    """Whatever came as positions: a call that does not decode, or a sentence before anything is taken."""
    try:
        call = messages.decode_call(msgspec.msgpack.encode({**msgspec.to_builtins(START), "positions": plain}))
    except (DescriptorError, OverflowError):
        return
    assert isinstance(call, Start)
    try:
        choice = call.choice()
    except SpecError:
        return
    assert isinstance(choice, str | tuple | Positions)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    """Bytes that are no message raise `DescriptorError` and nothing else."""
    with pytest.raises(DescriptorError):
        messages.decode_reply(data)
    with pytest.raises(DescriptorError):
        messages.decode_call(data)


@given(st.sampled_from(REPLIES), st.data())
def test_cut_messages_are_refused(message: messages.Message, data: st.DataObject) -> None:
    """A message that lacks its end raises `DescriptorError`."""
    encoded = messages.encode(message)
    with pytest.raises(DescriptorError):
        messages.decode_reply(encoded[: data.draw(st.integers(0, len(encoded) - 1))])


@given(st.sampled_from(REPLIES), st.data())
def test_damaged_messages_decode_or_are_refused(message: messages.Message, data: st.DataObject) -> None:
    """One wrong byte gives another valid message or `DescriptorError`; never another exception."""
    encoded = bytearray(messages.encode(message))
    encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    try:
        reply = messages.decode_reply(bytes(encoded))
    except DescriptorError:
        return
    assert isinstance(reply, messages.Message)


@pytest.mark.parametrize(
    "change",
    [
        {"version": messages.VERSION + 1},
        {"type": "Goodbye"},
        {"type": "Start"},
        {"more": 1},
        {"rank": "0"},
        {"rank": None},
        {"chunks": [[1, 2, 3]]},
        {"chunks": [[1, 2, 3, 4, 5]]},
        {"chunks": [[1, 2, 3, 1.5]]},
        {"blocks": "text"},
        {"streams": [["hidden_states", "bfloat16", 1.5, [0]]]},
        {"requests": {}},
    ],
    ids=str,
)
def test_a_field_of_another_kind_is_refused(change: dict[str, Any]) -> None:
    """Unknown names, other types, other lengths and another version do not decode."""
    fields = msgspec.msgpack.decode(messages.encode(descriptor((0, CHUNK_OFFSET, 3))))
    with pytest.raises(DescriptorError):
        messages.decode_reply(msgspec.msgpack.encode({**fields, **change}))


def test_a_missing_field_is_refused() -> None:
    """A message without one of its fields does not decode."""
    fields = msgspec.msgpack.decode(messages.encode(Stopped(rank=0)))
    del fields["rank"]
    with pytest.raises(DescriptorError, match="rank"):
        messages.decode_reply(msgspec.msgpack.encode(fields))


@pytest.mark.parametrize("fields", [{"rank": 0}, {"rank": 0, "new": 1}, {}, {"type": "Unheard of"}])
def test_another_version_says_what_to_do(fields: dict[str, Any]) -> None:
    """Two versions of the package give an error that names both and the cure, whether or not fields differ."""
    with pytest.raises(
        DescriptorError,
        match=rf"version {messages.VERSION + 1} came where version {messages.VERSION} runs: install the same vllm-tap",
    ):
        messages.decode_reply(msgspec.msgpack.encode({"type": "Stopped", "version": messages.VERSION + 1, **fields}))


def test_oversized_messages_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is on the bytes, whatever is in them."""
    data = messages.encode(Stopped(rank=0))
    monkeypatch.setattr(messages, "MAX_MESSAGE_BYTES", len(data) - 1)
    with pytest.raises(DescriptorError, match="exceeds the limit"):
        messages.decode_reply(data)


@pytest.mark.parametrize("name", sorted(errors.BY_NAME))
def test_a_failure_is_the_exception_it_names(name: str) -> None:
    """An exception of a worker is raised in the client under its own class, with rank and identity."""
    caught = Failure(rank=3, error=name, message="why", identity={"layer": 7}).exception()
    assert type(caught) is errors.BY_NAME[name]
    assert (str(caught), caught.rank, caught.layer) == ("rank 3: why", 3, 7)


def test_an_unknown_failure_is_still_ours() -> None:
    """A class that this package does not have, or should not raise for others, becomes a `CaptureError`."""
    for name in ("SystemExit", "os.system", ""):
        assert type(Failure(rank=0, error=name, message="why").exception()) is errors.CaptureError


def check(candidate: Descriptor) -> None:
    """Validate as a client does."""
    candidate.validate(CAPTURE, sys.byteorder)


@given(st.lists(st.integers(1, 40), max_size=12))
def test_blocks_that_a_session_places_are_accepted(counts: list[int]) -> None:
    """Blocks placed one behind another in a chunk that holds them validate, the last one to the last byte."""
    rows, offset = [], CHUNK_OFFSET
    for num_rows in counts:
        rows.append((0, offset, num_rows))
        offset = -(-layout(offset, num_rows, [STREAM]).end // 64) * 64
    end = layout(rows[-1][1], rows[-1][2], [STREAM]).end if rows else CHUNK_OFFSET
    candidate = descriptor(*rows, chunks=(Chunk(1, CHUNK_OFFSET, end - CHUNK_OFFSET, 1),))
    check(candidate)
    assert candidate.table().tolist() == [list(row) for row in rows]
    if rows:
        with pytest.raises(DescriptorError, match="does not fit"):
            check(descriptor(*rows, chunks=(Chunk(1, CHUNK_OFFSET, end - CHUNK_OFFSET - 1, 1),)))


@pytest.mark.parametrize(
    "row",
    [
        (1, CHUNK_OFFSET, 1),
        (-1, CHUNK_OFFSET, 1),
        (0, CHUNK_OFFSET - 4, 1),
        (0, CHUNK_OFFSET + CHUNK_BYTES, 1),
        (0, CHUNK_OFFSET + CHUNK_BYTES + 4, 1),
        (0, -1, 1),
        (0, 2**62, 1),
        (0, 2**63 - 1, 1),
        (0, -(2**63), 1),
        (0, CHUNK_OFFSET, 0),
        (0, CHUNK_OFFSET, -1),
        (0, CHUNK_OFFSET, 1 << 24),
        (0, CHUNK_OFFSET, (1 << 24) + 1),
        (0, CHUNK_OFFSET, 2**62),
        (2**62, CHUNK_OFFSET, 1),
    ],
)
def test_a_block_that_lies_elsewhere_is_refused(row: tuple[int, int, int]) -> None:
    """A block outside its chunk, in no chunk, or with an impossible number of rows is refused, also after good ones."""
    for rows in ([row], [(0, CHUNK_OFFSET, 1), row]):
        with pytest.raises(DescriptorError):
            check(descriptor(*rows))


@pytest.mark.parametrize(
    "chunk", [Chunk(1, -4096, 8192, 1), Chunk(1, 0, -1, 1), Chunk(1, 2**43, 1, 1), Chunk(1, 0, 2**62, 1)]
)
def test_a_chunk_that_cannot_be_is_refused(chunk: Chunk) -> None:
    """Negative or absurd chunks are refused even when no block lies in them."""
    with pytest.raises(DescriptorError, match="out of range"):
        check(descriptor(chunks=(chunk,)))


@pytest.mark.parametrize("nbytes", [1, 8, 23, 25])
def test_a_torn_table_is_refused(nbytes: int) -> None:
    """A table that is not a whole number of rows is refused."""
    with pytest.raises(DescriptorError, match="no table"):
        check(descriptor(blocks=bytes(nbytes)))


@pytest.mark.parametrize("nbytes", [0, 12, 35, 48])
def test_labels_of_another_number_of_rows_are_refused(nbytes: int) -> None:
    """Three int32 for each row of the table."""
    check(descriptor((0, CHUNK_OFFSET, 3), labels=bytes(36)))
    with pytest.raises(DescriptorError, match="no labels of 3 rows"):
        check(descriptor((0, CHUNK_OFFSET, 3), labels=bytes(nbytes)))


def test_another_capture_or_byte_order_is_refused() -> None:
    """A descriptor of another capture, or of a machine with the other byte order, is refused."""
    candidate = descriptor((0, CHUNK_OFFSET, 1))
    for capture_id, byte_order in (("other", sys.byteorder), (CAPTURE, "middle")):
        with pytest.raises(DescriptorError, match="endian"):
            candidate.validate(capture_id, byte_order)


@pytest.mark.parametrize("stream", [Stream("x", "complex64", 4, (0,)),
                                    Stream("x", "bfloat16", 0, (0,)), Stream("x", "bfloat16", -4, (0,))])  # fmt: skip
def test_streams_that_cannot_be_are_refused(stream: Stream) -> None:
    """A dtype outside the list or an impossible width is refused with the descriptor that carries it."""
    with pytest.raises(DescriptorError):
        check(descriptor((0, CHUNK_OFFSET, 1), streams=(stream,)))


def test_sizes_that_leave_64_bits_are_refused() -> None:
    """Layers times rows times row bytes must not wrap around to something that seems to fit."""
    num_rows, layers = 1 << 24, tuple(range(1 << 14))
    wide = Stream("hidden_states", "float64", 1 << 23, layers)
    assert len(layers) * num_rows * wide.row_bytes == 1 << 64
    chunk = Chunk(1, CHUNK_OFFSET, 1 << 40, 1)
    with pytest.raises(DescriptorError):
        check(descriptor((0, CHUNK_OFFSET, num_rows), streams=(wide,), chunks=(chunk,)))


def test_every_exception_has_a_name_on_the_wire() -> None:
    """No class of the exception tree is missing from the table that replies are decoded with."""

    def tree(kind: type[TapError]) -> set[type[TapError]]:
        return {kind}.union(*map(tree, kind.__subclasses__()))

    assert set(errors.BY_NAME.values()) == {kind for kind in tree(TapError) if kind.__module__ == errors.__name__}
