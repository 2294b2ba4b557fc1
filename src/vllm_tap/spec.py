"""The wish of a user: which streams, layers and positions. Checked in the client process, sent to the workers.

A `Spec` knows nothing of a model; `resolve_layers` turns it into layer numbers once the model is known.
"""

from __future__ import annotations

import difflib
import json
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from vllm_tap.errors import LayerError, SpecError
from vllm_tap.positions import NEVER, Begin, Positions
from vllm_tap.streams import BLOCK_STREAMS, LAYERED_FIELDS, ROUTER_STREAMS, SINGLE_FIELDS

Layers = Literal["all"] | tuple[int, ...] | None

Choice = str | tuple[int, ...] | Positions
"""Positions of a `Spec`: a name, prompt positions, or an expression."""

MAX_NUMBER: Final = 2**31 - 1
"""Layers and positions are not numbered beyond."""

NAMED_POSITIONS: Final = ("all", "prompt", "generated", "last", "last_prompt", "last_generated")

GENERATED: Final = ("generated", "last_generated")
"""Positions of which a completion of one token has none: the last generated token never enters the model."""

LAST: Final = ("last", "last_prompt")
"""The last position of the prompt."""

AS_SHIPPED: Final = {"last_prompt": "last", "last_generated": "generated"}
"""Names that workers take for positions of another name. They do not know which step is a request's last."""

MISSING: Final = ("error", "skip")

LATER: Final = ("attention_output", "mlp_output", "reduce", "dtype")
"""Fields that files of earlier versions lack."""

REDUCTIONS: Final = ("last", "mean", "max", "sum")

DTYPES: Final = ("float32", "float16", "fp8")
"""Dtypes that rows may be asked for in, beside their own."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint such as ` Did you mean 'router_logits'?`, or the list of what is known."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(known)}."


@dataclass(frozen=True, init=False)
class Spec:
    """A choice of rows to capture. Immutable, comparable, and the same after a trip through JSON.

    Args:
        hidden_states: `"all"`, or decoder layers (0-based; negative numbers count from the end). The residual stream
            after each layer, before the final norm.
        attention_output: `"all"`, or layers. The attention of a layer, or what stands in its place, hands this to the
            residual stream: behind its output projection, and any norm or scale that comes before the sum.
        mlp_output: `"all"`, or layers. The same of the MLP or the experts.
        router_logits: `"all"`, or layers with experts. The gate's output before softmax or sigmoid.
        routed_experts: `"all"`, or layers with experts. Expert ids and weights as the router chose them.
        embeddings: The input of decoder layer 0.
        final_hidden_states: The output of the final norm.
        positions: `"all"`, `"prompt"`, `"generated"` (the generated tokens but the last, which never enters the model),
            `"last_prompt"` or `"last"` (the last token of the prompt), `"last_generated"` (the last generated one that
            entered the model), prompt positions (negative numbers count from the end of the prompt), or what is made of
            `Positions`.
        missing: For listed positions that a prompt does not have, generated rows of a completion of one token, and
            router streams of a model without experts: `"error"`, or `"skip"`, which leaves out what cannot be.
            `Positions` choose as a slice does: where they find nothing a sample has no rows, and that is no error.
        reduce: `"last"`, `"mean"`, `"max"` or `"sum"` over the positions: a sample has one row, or none where it has no
            position. Computed in float32. Its label is that of the last position that went into it. Of
            `routed_experts` there is `"last"` alone.
        dtype: `"float32"` or `"float16"`; by default the model's, also of what was computed in float32. Expert ids are
            integers in any case. `"fp8"`, for hidden states alone: a sample then has `hidden_states_fp8` (e4m3) and
            `hidden_states_scale` (a float32 for each row and layer) in their place.

    Cost:
        Rows of positions that are not asked for are never written, with these exceptions: for `"last_generated"`, for
        `Positions.generated` from the end and for `Positions.tokens` workers write all rows that could be meant, since
        none knows which step will be the last nor which tokens come, and the result keeps these in memory. So they do
        for all generated tokens that an expression may take where the engine decodes speculatively. Workers write
        all rows that are chosen in the model's dtype: `reduce` is computed from them in the user's process at the end,
        in one pass after which their memory is free, and `dtype` each time a tensor is read.

    Raises:
        SpecError: A field that does not exist, a value of the wrong kind, or nothing to capture.
    """

    hidden_states: Layers
    attention_output: Layers
    mlp_output: Layers
    router_logits: Layers
    routed_experts: Layers
    embeddings: bool
    final_hidden_states: bool
    positions: Choice
    missing: str
    reduce: str | None
    dtype: str | None

    def __init__(
        self,
        *,
        hidden_states: str | Iterable[int] | None = None,
        attention_output: str | Iterable[int] | None = None,
        mlp_output: str | Iterable[int] | None = None,
        router_logits: str | Iterable[int] | None = None,
        routed_experts: str | Iterable[int] | None = None,
        embeddings: bool = False,
        final_hidden_states: bool = False,
        positions: str | Iterable[int] | Positions | Mapping[str, Any] = "all",
        missing: str = "error",
        reduce: str | None = None,
        dtype: str | None = None,
        **unknown: Any,
    ) -> None:
        for name in unknown:
            raise SpecError(f"Spec has no field {name!r}.{nearest(name, self.__dataclass_fields__)}")
        chosen = {"hidden_states": hidden_states, "attention_output": attention_output, "mlp_output": mlp_output}
        chosen |= {"router_logits": router_logits, "routed_experts": routed_experts}
        for name, layers in chosen.items():
            object.__setattr__(self, name, _checked_layers(name, layers))
        for name, flag in (("embeddings", embeddings), ("final_hidden_states", final_hidden_states)):
            if not isinstance(flag, bool):
                raise SpecError(f"Spec({name}=...) is True or False, got {flag!r}.")
            object.__setattr__(self, name, flag)
        object.__setattr__(self, "positions", _checked_positions(positions))
        if missing not in MISSING:
            raise SpecError(f'Spec(missing=...) is "error" or "skip", got {missing!r}.')
        object.__setattr__(self, "missing", missing)
        for name, given, values in (("reduce", reduce, REDUCTIONS), ("dtype", dtype, DTYPES)):
            if given is not None and given not in values:
                raise SpecError(f"Spec({name}={given!r}) is not known.{nearest(str(given), values)}")
            object.__setattr__(self, name, given)
        if reduce not in (None, "last") and routed_experts is not None:
            raise SpecError(
                f'Spec(reduce={reduce!r}) of expert ids means nothing: leave out routed_experts, or "last".'
            )
        others = [name for name in self.streams if name != "hidden_states"]
        if dtype == "fp8" and others:
            raise SpecError(f'Spec(dtype="fp8") is for hidden_states alone: leave out {", ".join(others)}.')
        if not self.streams:
            raise SpecError('This Spec captures nothing: choose a stream, for example Spec(hidden_states="all").')

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams that this specification asks for."""
        return tuple(name for name in LAYERED_FIELDS + SINGLE_FIELDS if getattr(self, name) not in (None, False))

    @property
    def shipped_positions(self) -> Choice:
        """The positions that workers are asked for; `positions`, or more."""
        return AS_SHIPPED.get(self.positions, self.positions) if isinstance(self.positions, str) else self.positions

    @property
    def least_prompt_len(self) -> int:
        """Tokens that a prompt needs to have all positions that are asked for."""
        if not isinstance(self.positions, tuple):
            return 0
        return max(max(self.positions) + 1, -min(self.positions))

    @property
    def needs_end(self) -> bool:
        """True if positions count from the end of what is generated: which they are shows when that is known."""
        if isinstance(self.positions, Positions):
            return self.positions.needs_end
        return self.positions == "last_generated"

    def __repr__(self) -> str:
        """Return a call that makes this, with the fields that were given."""
        plain = {"positions": "all", "missing": "error"}
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        given = [f"{name}={value!r}" for name, value in fields.items() if value not in (None, False, plain.get(name))]
        return f"Spec({', '.join(given)})"

    def to_json(self) -> str:
        """Return this specification as a JSON object; `from_json` gives an equal one back."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        # Fields of later versions are left out where they say nothing: earlier ones read it, and it stays equal.
        fields = {name: value for name, value in fields.items() if name not in LATER or value is not None}
        return json.dumps({**fields, "positions": plain_positions(self.positions)})

    @classmethod
    def from_json(cls, text: str) -> Spec:
        """Build a specification from what `to_json` wrote."""
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise SpecError(f"A Spec in JSON is an object, got {type(fields).__name__}.")
        return cls(**fields)


def _checked_layers(name: str, layers: str | Iterable[int] | None) -> Layers:
    if layers is None:
        return None
    if isinstance(layers, str) and layers == "all":
        return "all"
    if isinstance(layers, str | Mapping | bool) or not isinstance(layers, Iterable):
        raise SpecError(f'Spec({name}=...) is "all" or a list of layer numbers, got {layers!r}.')
    numbers = tuple(_integer(name, layer) for layer in layers)
    if not numbers:
        raise SpecError(f"Spec({name}=[]) chooses no layer: leave {name} out, or name layers.")
    return numbers


def _integer(name: str, number: Any) -> int:
    refusal = SpecError(f"Spec({name}=...) takes whole numbers, got {number!r}.")
    if isinstance(number, bool) or str(getattr(number, "dtype", "")).endswith("bool"):
        raise refusal
    try:
        whole = int(operator.index(number))
    except TypeError:
        raise refusal from None
    if abs(whole) > MAX_NUMBER:
        raise refusal
    return whole


def _checked_positions(positions: str | Iterable[int] | Positions | Mapping[str, Any]) -> Choice:
    if isinstance(positions, Positions):
        return positions
    if isinstance(positions, Mapping):
        return Positions.from_plain(positions)
    if isinstance(positions, str):
        if positions not in NAMED_POSITIONS:
            raise SpecError(f"Spec(positions={positions!r}) is not known.{nearest(positions, NAMED_POSITIONS)}")
        return positions
    if not isinstance(positions, Iterable):
        raise SpecError(
            "Spec(positions=...) is a name or a list of prompt positions, or made of vllm_tap.Positions, "
            f"got {positions!r}."
        )
    numbers = tuple(sorted({_integer("positions", number) for number in positions}))
    if not numbers:
        raise SpecError('Spec(positions=[]) chooses no position: leave it out for "all".')
    return numbers


def plain_positions(positions: Choice) -> Any:
    """Return positions as JSON and msgpack hold them: a name, a list, or an object for an expression."""
    return positions.to_plain() if isinstance(positions, Positions) else positions


def read_positions(plain: Any) -> Choice:
    """Return positions from what `plain_positions` returned, perhaps in another process.

    Raises:
        SpecError: It is something else.
    """
    return _checked_positions(plain)


def begin_of(positions: Choice) -> Begin:
    """Return a lower bound of the positions that are taken."""
    if isinstance(positions, Positions):
        return positions.begin
    if isinstance(positions, tuple):
        return Positions.at(positions).begin
    if positions in GENERATED or positions in LAST:
        return Begin(NEVER, int(positions in LAST))
    return Begin(0, -1)


def takes_generated(positions: Choice) -> bool:
    """Tell whether generated tokens may be among the positions that are taken."""
    if isinstance(positions, Positions):
        return positions.takes_generated
    return positions == "all" or positions in GENERATED


def resolve_layers(name: str, layers: Layers, available: list[int], num_layers: int) -> list[int]:
    """Turn a field of a specification into sorted layer numbers of one model.

    Args:
        name: Stream, for messages.
        layers: The field's value.
        available: Layers in which the model has this stream.
        num_layers: Decoder layers of the model; negative numbers count from here.

    Raises:
        LayerError: A layer that the model does not have, or in which this stream does not exist.
    """
    if layers is None:
        return []
    if layers == "all":
        return available
    numbers = {layer + num_layers if layer < 0 else layer for layer in layers}
    for given in layers:
        layer = given + num_layers if given < 0 else given
        if not 0 <= layer < num_layers:
            raise LayerError(
                f"{name}: the model has no layer {given}: it has {num_layers} decoder layers, "
                f"0 to {num_layers - 1} (or -{num_layers} to -1).",
                layer=given,
            )
        if layer not in available:
            kind = "has no experts" if available else "belongs to a model without experts"
            if name in BLOCK_STREAMS:
                kind = (
                    "adds nothing of the kind to the residual stream, or has not run in any forward pass that was seen"
                )
            elif name not in ROUTER_STREAMS:
                kind = "has not run in any forward pass that was seen: the model leaves before it, or does not use it"
            raise LayerError(f"{name}: layer {given} {kind}. Layers with {name}: {available}.", layer=given)
    return sorted(numbers)


def wanted_tokens(
    positions: str | tuple[int, ...],
    prompt_lens: npt.NDArray[np.integer],
    starts: npt.NDArray[np.integer],
    begins: npt.NDArray[np.integer],
) -> npt.NDArray[np.int64]:
    """Return which tokens are asked for, of pieces of sequences that lie behind one another.

    Args:
        positions: The field of a specification. "last_generated" is for whole sequences: of a piece it is the last
            generated token of that piece.
        prompt_lens: Length of the prompt of each sequence, [S].
        starts: Where the piece of each sequence starts among all tokens, and where the last one ends, [S + 1].
        begins: Position in its sequence at which each piece begins, [S].

    Returns:
        Numbers of the tokens, ascending: int64 [R].

    Cost:
        Some numpy calls, of arrays as long as there are sequences or tokens asked for.
    """
    if positions == "all":
        return np.arange(starts[-1])
    offsets = starts[:-1] - begins  # where position 0 would be
    ends = starts[1:] - offsets
    if positions in GENERATED:
        first = np.maximum(begins, prompt_lens)
        if positions == "last_generated":
            first = np.maximum(first, ends - 1)
        return ranges(offsets + first, np.maximum(ends - first, 0))
    ends = np.minimum(ends, prompt_lens)
    if positions == "prompt":
        return ranges(starts[:-1], np.maximum(ends - begins, 0))
    numbers = np.array([-1] if isinstance(positions, str) else sorted(positions), np.int64)
    num_negative = int(np.searchsorted(numbers, 0))
    found = []
    for some, zero in ((numbers[:num_negative], prompt_lens), (numbers[num_negative:], np.zeros_like(prompt_lens))):
        if len(some):
            first, last = np.searchsorted(some, begins - zero), np.searchsorted(some, ends - zero)
            counts = np.maximum(last - first, 0)
            found.append(np.repeat(offsets + zero, counts) + some[ranges(first, counts)])
    # Of a short prompt, a number from the beginning and one from the end may mean the same position.
    return found[0] if len(found) == 1 else np.unique(np.concatenate(found))


def ranges(firsts: npt.NDArray[np.integer], lengths: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """Return the numbers of ranges, one behind the other."""
    ends = np.cumsum(lengths)
    numbers: npt.NDArray[np.int64] = np.arange(lengths.sum()) + np.repeat(firsts - (ends - lengths), lengths)
    return numbers
