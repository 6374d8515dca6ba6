"""Recurrent Memory Transformers on PyTorch Lightning."""

import lazy_loader

__version__ = "0.2.0.dev0"

# The public names stand in __init__.pyi. They are imported when first used: --help should not have to wait for torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
