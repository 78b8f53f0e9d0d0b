"""Initial weights."""

import torch.nn as nn


def init_own(root: nn.Module) -> None:
    """Let the layers inside ``root`` that have an ``init_weights`` of their own use it.

    Called after a general initialisation, which would otherwise have the last word.
    """
    for module in root.modules():
        if module is not root and hasattr(module, 'init_weights'):
            module.init_weights()
