"""Looks whether the hub has a model, before anything waits for it. Runs in the process that will own the engine."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Final

from vllm_tap.errors import EngineUnsupportedError

TIMEOUT_S: Final = 10.0
"""Seconds for the one request; vLLM and its libraries try again for minutes."""


@functools.cache
def require_found(model: str, revision: str | None = None, download_dir: str | None = None) -> None:
    """Refuse a model that is no folder, not in the cache and not to be had from the hub.

    Anything else than a name of the hub is left to vLLM, and so is everything where another hub is asked.

    Args:
        model: Folder or name.
        revision: Of it, on the hub.
        download_dir: A cache beside the usual one.

    Raises:
        EngineUnsupportedError: The hub has no such model, cannot be reached, or is not to be asked.

    Cost:
        One request for a model that is to be downloaded, nothing for another.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    elsewhere = os.environ.get("VLLM_USE_MODELSCOPE", "0").lower() in ("1", "true")
    caches = [Path(folder) for folder in (constants.HF_HUB_CACHE, download_dir) if folder]
    if elsewhere or Path(model).exists() or not _is_name(model) or any(_has(cache, model) for cache in caches):
        return
    if constants.HF_HUB_OFFLINE:
        raise EngineUnsupportedError(
            f"{model} is neither a folder nor in {' or '.join(map(str, caches))}, and HF_HUB_OFFLINE keeps vLLM from "
            "downloading it: name the folder of a model, or unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE.",
            path=model,
        )
    try:
        HfApi().model_info(model, revision=revision, timeout=TIMEOUT_S)
    except GatedRepoError:
        return  # vLLM says what is missing
    except RepositoryNotFoundError as error:
        raise EngineUnsupportedError(
            f"{model} is neither a folder nor a public model of {constants.ENDPOINT}: check its name. A private one "
            "needs a token (hf auth login).",
            path=model,
        ) from error
    except HfHubHTTPError:
        return  # it answers
    except Exception as error:
        raise EngineUnsupportedError(
            f"{model} is no folder, and {constants.ENDPOINT} cannot be reached ({error}): name the folder of a model.",
            path=model,
        ) from error


def _is_name(model: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return True


def _has(cache: Path, model: str) -> bool:
    from huggingface_hub.file_download import repo_folder_name

    return (cache / repo_folder_name(repo_id=model, repo_type="model")).is_dir()
