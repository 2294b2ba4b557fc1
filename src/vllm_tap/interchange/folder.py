"""A folder that is written beside its place and takes its name when it is whole. In any process."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_tap.errors import DatasetError
from vllm_tap.store.local import sync_folder


def require_free(path: Path) -> None:
    """Refuse a place that holds anything.

    Raises:
        DatasetError: It is a file, or a folder with something in it.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DatasetError(f"{path} is not empty: name a folder that is not there yet.", path=str(path))


@contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """Yield an empty folder that is renamed to `path` at the end; on an error nothing stays.

    A process that is killed leaves a hidden folder `.NAME.draft-...` beside it, which can be removed.

    Raises:
        DatasetError: `path` is not empty, or cannot be written to.
    """
    path = path.absolute()
    require_free(path)
    draft = path.parent / f".{path.name}.draft-{secrets.token_hex(4)}"
    try:
        draft.mkdir(parents=True)
        yield draft
        _sync(draft)
        draft.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        where = error.filename or path
        raise DatasetError(f"{where}: {error.strerror or error}. Nothing was exported.", path=str(where)) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Make files and names last before the folder is seen."""
    for parent, _, names in os.walk(folder):
        for name in names:
            fd = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        sync_folder(Path(parent))
