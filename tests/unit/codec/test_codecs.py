"""Every codec against the conformance suite, against the libraries behind it, and the suite against broken codecs."""

from __future__ import annotations

import struct
import sys

import lz4.block
import pytest
import zstandard

from vllm_tap import codec
from vllm_tap.codec import blocks, conformance
from vllm_tap.codec.raw import Raw
from vllm_tap.errors import DescriptorError, SpecError

DATA = bytes(range(256)) * 8192  # 2 MiB: two blocks


@pytest.mark.parametrize("name", codec.names())
def test_codec_conforms(name: str) -> None:
    """Every codec passes the suite that is shipped, and the suite runs its checks."""
    assert conformance.check(codec.get(name)) > 2000


@pytest.mark.parametrize("name", codec.names())
def test_name_is_the_registered_one(name: str) -> None:
    """A codec states the name under which it is found: the name travels in the payload."""
    assert codec.get(name).name == name


def test_unknown_name_is_refused_with_the_nearest() -> None:
    """A typing error is answered with the codec that was meant."""
    with pytest.raises(SpecError, match=r"'zsdt'.*did you mean 'zstd'"):
        codec.get("zsdt")


def test_lz4_is_a_plain_block() -> None:
    """What the lz4 codec writes is a block that python-lz4 reads, and the other way round."""
    encoded = codec.get("lz4").encode(memoryview(DATA), 2)
    assert lz4.block.decompress(encoded, uncompressed_size=len(DATA)) == DATA
    written = lz4.block.compress(DATA, mode="high_compression", store_size=False)
    assert bytes(codec.get("lz4").decode(memoryview(written), len(DATA), 2)) == DATA


@pytest.mark.parametrize(("name", "num_planes"), [("zstd", 1), ("bytesplit", 2)])
def test_zstd_blocks_are_plain_frames(name: str, num_planes: int) -> None:
    """Each frame is a length and what zstandard reads; frames hold the planes of 1 MiB after 1 MiB."""
    encoded, offset, frames = codec.get(name).encode(memoryview(DATA), 2), 0, []
    while offset < len(encoded):
        (length,) = struct.unpack_from("<I", encoded, offset)
        frames.append(zstandard.ZstdDecompressor().decompress(encoded[offset + 4 : offset + 4 + length]))
        offset += 4 + length
    mib = 1 << 20
    want = [DATA[start : start + mib][plane::num_planes] for start in (0, mib) for plane in range(num_planes)]
    assert frames == want


def test_odd_bytes_after_the_last_element_are_kept_as_they_are() -> None:
    """Seven bytes of 4-byte elements are one element and a tail of three."""
    encoded = codec.get("bytesplit").encode(memoryview(b"abcdefg"), 4)
    assert encoded.endswith(b"efg")
    assert bytes(codec.get("bytesplit").decode(memoryview(encoded), 7, 4)) == b"abcdefg"


def test_frame_that_states_another_size_is_refused_before_it_is_decompressed() -> None:
    """A frame of 1 GiB of zeros, 32 KiB long, stands where 1 MiB is expected: nothing is decompressed."""
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 30))
    encoded = struct.pack("<I", len(bomb)) + bomb
    with pytest.raises(DescriptorError, match="states 1073741824 bytes, expected 1048576"):
        codec.get("zstd").decode(memoryview(encoded), blocks.BLOCK_BYTES, 1)


def test_expansion_bound_of_zstd_holds_for_its_best_case() -> None:
    """Zeros, the best that zstd can get, stay within the bound by which declared lengths are refused."""
    nbytes = 1 << 28
    frame = zstandard.ZstdCompressor(level=19).compress(bytes(nbytes))
    assert nbytes <= blocks.MAX_EXPANSION * len(frame)


@pytest.mark.parametrize(("name", "module"), [("lz4", "lz4.block"), ("zstd", "zstandard"), ("bytesplit", "zstandard")])
def test_missing_package_names_the_remedy(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its package a codec still imports, and says on first use what to install."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SpecError, match=r"pip install vllm-tap\[codecs\]"):
        codec.get(name).encode(memoryview(b"abcd"), 2)
    with pytest.raises(SpecError, match=r"pip install vllm-tap\[codecs\]"):
        codec.get(name).decode(memoryview(b"abcdabcd"), 8, 2)


def test_lz4_refuses_more_than_a_block_holds() -> None:
    """A tensor longer than LZ4_MAX_INPUT_SIZE is refused by name and limit, before it is read."""

    class Long:
        nbytes = 0x7E000001

    with pytest.raises(SpecError, match="at most 2113929216 bytes"):
        codec.get("lz4").encode(Long(), 2)  # type: ignore[arg-type]


class Forgets(Raw):
    """Decodes to what it has, whatever was declared."""

    def decode(self, data: memoryview, nbytes: int, itemsize: int) -> memoryview:
        return data


class Changes(Raw):
    """Encodes other bytes."""

    def encode(self, data: memoryview, itemsize: int) -> bytes:
        return bytes(len(data))


class Leaks(Raw):
    """Lets an exception of its own out."""

    def decode(self, data: memoryview, nbytes: int, itemsize: int) -> memoryview:
        if data.nbytes != nbytes:
            raise ValueError("length")
        return data


BROKEN = [(Forgets, AssertionError, "declared"), (Changes, AssertionError, "differ"), (Leaks, ValueError, "length")]


@pytest.mark.parametrize(("broken", "error", "message"), BROKEN)
def test_suite_finds_broken_codecs(broken: type[Raw], error: type[Exception], message: str) -> None:
    """The suite fails a codec that ignores the declared length, changes bytes, or raises what nobody catches."""
    with pytest.raises(error, match=message):
        conformance.check(broken())
