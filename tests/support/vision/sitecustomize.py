"""Lets the Python part of torchvision be imported beside a torch whose build cannot load torchvision's own library.

On the PYTHONPATH of a test process alone. Image processors use the Python part only, but its import asks for two
operators of the library; here they are declared, and never called.
"""

import torch

LIBRARY = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
