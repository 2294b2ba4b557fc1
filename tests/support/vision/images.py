"""Captures prompts with images from a tiny Qwen3-VL-MoE and compares every row with Hugging Face.

Runs as a process of its own, with torchvision on its path: `python tests/support/vision/images.py FOLDER`.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from engine.engines import TOLERANCE, Engine, error, expected_rows, rows_of, sequence
from models import NUM_LAYERS, VOCAB_SIZE, _draw_weights, byte_tokenizer
from reference import Reference, ReferenceModel
from vllm_tap import Spec

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
# A random model would generate marks of images that are not there.
SAMPLING = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, "allowed_token_ids": list(range(256))}
SPEC = Spec(hidden_states="all", router_logits="all", embeddings=True, final_hidden_states=True)

TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "moe_intermediate_size": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    },
}
VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 128,
    "num_position_embeddings": 256,
    "deepstack_visual_indexes": [0, 1],
}


def make_model(folder: Path) -> Path:
    """Write a random model with its processor; return the folder of the copy that vLLM reads.

    vLLM reads the experts' weights as the published checkpoints have them, transposed to what transformers saves.
    """
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(MARKS))
    config = transformers.AutoConfig.for_model(
        "qwen3_vl_moe",
        text_config={**TEXT, "vocab_size": len(tokenizer)},
        vision_config=VISION,
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
        tie_word_embeddings=False,
    )
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    _draw_weights(model, torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    sizes = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(
            **sizes, size={"shortest_edge": 32 * 32, "longest_edge": 256 * 256}
        ),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen3VLVideoProcessor(**sizes),
    ).save_pretrained(folder)
    copy = folder.with_name(folder.name + "-vllm")
    shutil.copytree(folder, copy)
    weights = {
        name: weight.transpose(-1, -2).contiguous() if ".experts." in name and weight.ndim == 3 else weight
        for name, weight in load_file(folder / "model.safetensors").items()
    }
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


class Images(ReferenceModel):
    """Hugging Face's model and processor, run over prompts with and without an image."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.processor = transformers.AutoProcessor.from_pretrained(folder)
        super().__init__(folder)

    def load(self, folder: Path | str) -> Any:
        """Return the model, which reads images as well as text."""
        return transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )

    def over(self, prompt: Any, tokens: list[int]) -> Reference:
        """Return the forward pass over a whole sequence that began with a prompt."""
        if isinstance(prompt, str):
            return self.run(tokens)
        inputs = self.processor(
            text=[prompt["prompt"]], images=[prompt["multi_modal_data"]["image"]], return_tensors="pt"
        )
        given = inputs["input_ids"][0].tolist()
        assert tokens[: len(given)] == given, "the engine expanded the image into other tokens"
        kinds = torch.tensor([[int(token == self.processor.image_token_id) for token in tokens]])
        return self.run(
            tokens,
            pixel_values=inputs["pixel_values"],
            image_grid_thw=inputs["image_grid_thw"],
            mm_token_type_ids=kinds,
        )


def prompts() -> list[Any]:
    """Return prompts with images of two sizes, one of them twice, and one without."""
    rng = np.random.default_rng(0)
    small, large = (
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        for height, width in ((64, 96), (160, 128))
    )
    return [
        {"prompt": f"look {IMAGE} what is it?", "multi_modal_data": {"image": small}},
        "text alone",
        {"prompt": f"{IMAGE} and this?", "multi_modal_data": {"image": large}},
        {"prompt": f"once more {IMAGE}", "multi_modal_data": {"image": small}},
    ]


def compare(result: Any, reference: Images) -> float:
    """Compare all rows of all streams; return the largest error, relative to the stream's scale."""
    worst = 0.0
    for prompt, output, sample in zip(prompts(), result.outputs, result, strict=True):
        tokens = sequence(output)
        assert sample.token_ids.tolist() == tokens
        assert sample.positions.tolist() == list(range(len(tokens)))
        expected = reference.over(prompt, tokens)
        for stream, layers in result.layers.items():
            for layer in layers:
                whole = expected_rows(expected, stream, layer)
                off = error(rows_of(sample, stream, layer), whole, whole.square().mean().sqrt())
                assert off < TOLERANCE, f"{stream}[{layer}] is off by {off:.2g} of its scale"
                worst = max(worst, off)
    return worst


def main(folder: Path) -> None:
    """Capture through both interfaces, twice, so that the second time images come from vLLM's cache."""
    import easysteer.hidden_states as hs

    copy = make_model(folder)
    engine = Engine(
        copy,
        enforce_eager=True,
        max_model_len=512,
        max_num_batched_tokens=96,
        limit_mm_per_prompt={"image": 1, "video": 0},
    )
    reference = Images(folder)
    for _ in range(2):
        print("worst", compare(engine.capture(prompts(), SPEC, **SAMPLING), reference))
    given = prompts()
    states, outputs = hs.get_all_hidden_states_generate(engine.llm, given, **SAMPLING)
    logits, _ = hs.get_moe_router_logits_generate(engine.llm, given, split_by_samples=True, **SAMPLING)
    for prompt, output, layers, gates in zip(given, outputs, states, logits, strict=True):
        expected = reference.over(prompt, sequence(output))
        for layer in range(NUM_LAYERS):
            for rows, whole in (
                (layers[layer], expected.hidden_states[layer]),
                (gates[layer], expected.router_logits[layer]),
            ):
                assert error(rows, whole, whole.square().mean().sqrt()) < TOLERANCE
    engine.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        main(Path(made) / "qwen3_vl_moe")
