"""Recurrent Memory Transformers on PyTorch Lightning."""

from importlib import import_module

import lazy_loader

from rmt_lightning.core.imports import when_imported

__version__ = "0.2.0.dev0"

# The public names stand in __init__.pyi. They are imported when first used: --help should not have to wait for torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

# transformers' AutoConfig and AutoModel open what this package has saved. They take seconds to import, so they are told
# of it when the program has imported them.
_AUTO = "transformers.models.auto"
when_imported(f"{_AUTO}.configuration_auto", lambda: import_module("rmt_lightning.models.configuration").register())
when_imported(f"{_AUTO}.modeling_auto", lambda: import_module("rmt_lightning.models.auto").register())
