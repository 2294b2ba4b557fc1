"""Directions of the residual stream in the objects of libraries that steer with them. In any process.

A direction of layer k is added to what decoder layer k returns, by both libraries: their numbers are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vllm_tap.errors import SpecError


def steering_vector(directions: Mapping[int, Any]) -> Any:
    """Return a `steering_vectors.SteeringVector` of directions by layer, float32.

    Args:
        directions: {layer: [D]}, such as `LabelMeans.difference` returns them.

    Raises:
        SpecError: steering_vectors is not installed.
    """
    import torch

    try:
        from steering_vectors import SteeringVector
    except ImportError as error:
        raise SpecError("this needs steering-vectors: pip install steering-vectors.") from error
    return SteeringVector({layer: torch.from_numpy(_row(one)) for layer, one in directions.items()})


def control_vector(model_type: str, directions: Mapping[int, Any]) -> Any:
    """Return a `repeng.ControlVector` of directions by layer, float32.

    Args:
        model_type: That of the model's configuration, such as "llama".
        directions: {layer: [D]}, such as `LabelMeans.difference` returns them.

    Raises:
        SpecError: repeng is not installed.
    """
    try:
        from repeng import ControlVector
    except ImportError as error:
        raise SpecError("this needs repeng: pip install repeng.") from error
    return ControlVector(model_type=model_type, directions={layer: _row(one) for layer, one in directions.items()})


def _row(direction: Any) -> Any:
    row = np.array(direction, np.float32)
    if row.ndim != 1:
        raise SpecError(f"a direction is one row [D], got {list(row.shape)}.")
    return row
