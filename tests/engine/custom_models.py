"""Models of a user's own, made of vLLM's Llama layers: captures from each are compared with Hugging Face.

A program of its own, as the models are registered in the process that the engine runs in:
`python custom_models.py FOLDER OF A LLAMA MODEL, FOLDER OF ITS FIRST TWO LAYERS`. It writes one line of JSON per model:
its name, and what was captured or the error.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from vllm import ModelRegistry
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel

from engine.engines import Engine, References, compare, prompts
from models import NUM_LAYERS
from vllm_tap import Spec
from vllm_tap.errors import TapError


class OwnModel(LlamaModel):
    """Llama's layers in an order of one's own."""

    leave, last = NUM_LAYERS, "norm"

    def run(self, positions: Any, hidden: Any) -> Any:
        """Return final hidden states."""
        residual = None
        for index, layer in enumerate(self.layers[: self.leave]):
            hidden, residual = self.after(index, *layer(positions, hidden, residual))
        return getattr(self, self.last)(hidden, residual)[0]

    def after(self, index: int, hidden: Any, residual: Any) -> tuple[Any, Any]:
        """Do something behind a layer."""
        return hidden, residual

    def forward(self, input_ids: Any, positions: Any, stage: Any = None, inputs_embeds: Any = None, **_: Any) -> Any:
        hidden = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        return self.run(positions, hidden)


class Exit(OwnModel):
    """A model that leaves after two layers."""

    leave = 2


class Twins(OwnModel):
    """A model with a list of adapters, as long as that of the layers and before it."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        layers = self._modules.pop("layers")
        self.adapters = torch.nn.ModuleList(torch.nn.Identity() for _ in layers)
        self.layers = layers

    def after(self, index: int, hidden: Any, residual: Any) -> tuple[Any, Any]:
        return self.adapters[index](hidden), residual


class Decoys(OwnModel):
    """A model with a second list of decoder layers and a second norm, which never run; both come first."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        layers, norm = self._modules.pop("layers"), self._modules.pop("norm")
        self.spare = torch.nn.ModuleList(
            LlamaDecoderLayer(vllm_config=vllm_config, prefix=f"{prefix}.spare.{index}") for index in range(len(layers))
        )
        self.final_norm = torch.nn.LayerNorm(vllm_config.model_config.get_hidden_size())
        self.layers, self.norm = layers, norm


class Letters(LlamaDecoderLayer):
    """A layer that calls its arguments h and r."""

    def forward(self, where: Any, h: Any, r: Any) -> Any:
        return super().forward(where, h, r)


class Names(OwnModel):
    """A model whose norm is called ln_out, and the arguments of its layers h and r."""

    last = "ln_out"

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=Letters)
        self.ln_out = self._modules.pop("norm")


class Alone(LlamaDecoderLayer):
    """A layer that takes and returns the whole stream in a list, beside something else."""

    def forward(self, where: Any, h: Any) -> Any:
        hidden, residual = super().forward(where, h, None)
        return [hidden + residual, hidden]


class Lists(OwnModel):
    """A model of such layers, in a plain Sequential."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=Alone)
        self.ln_out = self._modules.pop("norm")
        self.layers = torch.nn.Sequential(*self._modules.pop("layers"))

    def run(self, positions: Any, hidden: Any) -> Any:
        for layer in self.layers:
            hidden, _ = layer(positions, hidden)
        return self.ln_out(hidden)


MODELS = {kind.__name__: kind for kind in (OwnModel, Exit, Twins, Decoys, Names, Lists)}


class OwnForCausalLM(LlamaForCausalLM):
    """Llama around one of these."""

    kind: type[LlamaModel] = OwnModel

    def _init_model(self, vllm_config: Any, prefix: str = "", **_: Any) -> LlamaModel:
        return self.kind(vllm_config=vllm_config, prefix=prefix)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load them, under the names of this model; decoys have none."""
        to = "model.ln_out." if hasattr(self.model, "ln_out") else "model.norm."
        super().load_weights((name.replace("model.norm.", to), weight) for name, weight in weights)
        return {name for name, _ in self.named_parameters()}


def main(folder: Path, short: Path) -> None:
    """Capture from each model and compare."""
    ModelRegistry.register_model("OwnForCausalLM", OwnForCausalLM)
    whole, half = References(folder), References(short)
    for name, OwnForCausalLM.kind in MODELS.items():
        engine = Engine(folder, enforce_eager=True, hf_overrides={"architectures": ["OwnForCausalLM"]})
        said: dict[str, Any] = {"model": name}
        try:
            result = engine.capture(prompts(), Spec(hidden_states="all", embeddings=True, final_hidden_states=True))
            compare(result, half if name == "Exit" else whole)
            said |= {"layers": result.layers, "conventions": result.conventions}
        except TapError as error:
            said["error"] = str(error)
        if name == "Exit":
            try:
                engine.capture(prompts(), Spec(hidden_states=[1, 3]))
            except TapError as error:
                said["refused"] = str(error)
        assert [len(tokens) for tokens in engine.generate(prompts())] == [8] * len(prompts())
        print(json.dumps(said), flush=True)
        engine.llm = None
        gc.collect()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
