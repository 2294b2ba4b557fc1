#!/usr/bin/env python3
"""Build a small, relocatable copy of stock vLLM for one GPU generation.

A GPU machine without network needs vLLM as files. The wheel is 300 MB, most of it GPU code for other
generations. This script downloads the wheel and the pure dependencies that a PyTorch image usually lacks,
zeroes the GPU code that an sm_90 (Hopper) card never loads, drops what bfloat16 work never imports, and packs
the rest as one archive of about 45 MB. Unpack it anywhere and put that folder on PYTHONPATH.

    python3 build_bundle.py OUT_DIR            # writes OUT_DIR/vllm-bundle.tar.xz, takes about 3 minutes

The target must have CPython 3.12, torch 2.11.0 (CUDA 13), torchvision 0.26, triton, transformers, numpy.
"""

from __future__ import annotations

import argparse
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

VLLM = "0.26.0"  # the newest release built for torch 2.11
SM = 90

DEPENDENCIES = """
annotated-types anthropic<1 apache-tvm-ffi==0.1.10 astor blake3 cachetools cbor2 cffi compressed-tensors==0.17.0
depyf==0.20.0 dill distro dnspython docstring_parser email-validator fastapi==0.136.3 googleapis-common-protos
httptools httpx-sse ijson interegular jiter jmespath jsonschema jsonschema-specifications lark==1.2.2
llguidance>=1.7,<1.8 lm-format-enforcer==0.11.3 loguru mcp<2 mistral_common==1.11.6
model-hosting-container-standards>=0.1.14 msgspec nvtx==0.2.15 openai>=2,<3 openai-harmony
opentelemetry-api==1.45.2 opentelemetry-sdk==1.45.2 opentelemetry-semantic-conventions==0.66b2
opentelemetry-semantic-conventions-ai==0.5.1 outlines_core==0.2.14 partial-json-parser
prometheus-fastapi-instrumentator pybase64 pycountry pycparser pydantic==2.14.3 pydantic_core==2.50.4
pydantic-extra-types pydantic-settings python-dotenv python-json-logger python-multipart pyzmq referencing
rpds-py setproctitle sniffio sse-starlette starlette==1.10.0 typing-inspection uvicorn watchfiles websockets
xgrammar==0.2.1 zstandard lz4
""".split()

PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (5, 12, 17, 24, 27, 28, 31, 34, 35)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64", "any"]
TARGET = ["--no-deps", "--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
TARGET += [word for p in PLATFORMS for word in ("--platform", p)]

UNUSED = """
vllm/vllm-rs vllm/third_party/deep_gemm vllm/third_party/fmha_sm100 vllm/third_party/flashmla
vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so vllm/_flashmla_C.abi3.so vllm/_flashmla_extension_C.abi3.so
vllm/_qutlass_C.abi3.so vllm/_rust_tool_parser.abi3.so vllm/entrypoints/serve/instrumentator/static
xgrammar/lib xgrammar/include xgrammar/3rdparty pycountry/locales mistral_common/data bin
""".split()

PRUNED = ["vllm/_C_stable_libtorch.abi3.so", "vllm/_moe_C_stable_libtorch.abi3.so"]

FATBIN = struct.pack("<I", 0xBA55ED50)
CUBIN = 2


def zero_other_architectures(path: Path, sm: int) -> None:
    """Zero every fatbin entry of a shared object except cubins for `sm`; sizes and offsets stay as they are."""
    blob = bytearray(path.read_bytes())
    at = blob.find(FATBIN)
    while at >= 0:
        _, version, header, size = struct.unpack_from("<IHHQ", blob, at)
        if version != 1 or header != 16 or at + header + size > len(blob):
            at = blob.find(FATBIN, at + 4)
            continue
        entry, end = at + header, at + header + size
        while entry < end:
            kind, _, entry_header, length = struct.unpack_from("<HHIQ", blob, entry)
            (architecture,) = struct.unpack_from("<I", blob, entry + 28)
            if (kind, architecture) != (CUBIN, sm):
                blob[entry + entry_header : entry + entry_header + length] = bytes(length)
            entry += entry_header + length
        at = blob.find(FATBIN, end)
    path.write_bytes(blob)


def run(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path(".gpu"), help="folder for the archive")
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        tree = Path(scratch) / "tree"
        pip = [sys.executable, "-m", "pip", "-q"]
        run(*pip, "download", *TARGET, "-d", scratch, f"vllm=={VLLM}")
        run(
            *pip,
            "install",
            "--no-compile",
            *TARGET,
            "--abi",
            "cp312",
            "--abi",
            "abi3",
            "--abi",
            "none",
            "--target",
            tree,
            *DEPENDENCIES,
        )
        wheel = next(Path(scratch).glob("vllm-*.whl"))
        run(sys.executable, "-m", "zipfile", "-e", wheel, tree)
        for name in UNUSED:
            path = tree / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for name in PRUNED:
            zero_other_architectures(tree / name, SM)
        for library in tree.rglob("*.so"):
            if "vllm" not in library.relative_to(tree).parts[0]:
                subprocess.run(["strip", "--strip-unneeded", library], check=False, stderr=subprocess.DEVNULL)
        archive = out / "vllm-bundle.tar.xz"
        run("tar", "-C", tree, "-I", "xz -T0 -4", "-cf", archive, ".")
    print(f"{archive}: {archive.stat().st_size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
