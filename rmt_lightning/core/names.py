"""What a class is called in configs and saved models: by its public name, wherever it stands in the package."""

from __future__ import annotations

import rmt_lightning

# Marks, in an `Annotated`, what a run sets itself, so that no yaml holds it and nobody types it.
BY_THE_RUN = "set by the run itself"

# What saved runs call by an earlier name.
_RENAMED = {"CarriedStates": "StatePassing"}
_REPLACED = {"lightning.Trainer": "rmt_lightning.RunTrainer"}


def public_name(path: str) -> str:
    """The public name of a class of this package that may be given by an earlier name or place; others stay as is.

    "rmt_lightning.models.lstm.LSTM" -> "rmt_lightning.LSTM"
    """
    path = _REPLACED.get(path, path)
    package, _, inner = path.partition(".")
    name = inner.rpartition(".")[2]
    name = _RENAMED.get(name, name)
    return f"{package}.{name}" if package == rmt_lightning.__name__ and name in dir(rmt_lightning) else path
