"""The command `vllm` for builds of vLLM under any name: `python -m vllm_tap.vllm.serving serve MODEL ...`."""

from __future__ import annotations

import importlib.metadata
import sys


def main() -> None:
    """Run the command."""
    import vllm
    from vllm.platforms import current_platform

    # Chosen now, also by the name of the distribution.
    _ = current_platform.device_type
    from vllm.entrypoints.cli.main import main as command

    installed = importlib.metadata.version

    def version(distribution_name: str) -> str:
        # The command asks for the distribution `vllm`; that of builds for CPUs is called otherwise.
        return str(vllm.__version__) if distribution_name == "vllm" else installed(distribution_name)

    importlib.metadata.version = version
    sys.argv[0] = "vllm"
    command()


if __name__ == "__main__":
    main()
