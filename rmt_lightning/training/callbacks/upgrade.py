"""Checkpoints of version 0.1, made what those of today are: a data module and callbacks held what phases hold now."""

from __future__ import annotations

from typing import Any

from torch import Tensor

# What callbacks were called, and what the phases are called that they have become.
_CALLBACKS = {"SegmentCurriculum": "curriculum", "FixedSteps": "fixed_steps", "CarriedStates": "state_passing"}


def upgraded(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The same checkpoint as this version would have written it."""
    if "phases" in checkpoint or "callbacks" not in checkpoint:
        return checkpoint
    data: dict[str, Any] = checkpoint.pop("FactDataModule", None) or checkpoint.pop("DocumentDataModule", {})
    phases: dict[str, Any] = {
        _CALLBACKS[name]: state for name, state in checkpoint["callbacks"].items() if name in _CALLBACKS
    }
    if "curriculum" in phases:
        phases["curriculum"] = (
            {"lesson_steps": 0}
            | phases["curriculum"]
            | {
                "first_step": 0,
                "schedule_step": phases["curriculum"]["first_step"],
                "num_segments": data["num_segments"],
                "lesson": data.get("lesson"),
            }
        )
    if "fixed_steps" in phases:
        phases["fixed_steps"] |= {"first_step": 0}
    checkpoint["phases"] = {"consumed": data.get("consumed", 0)} | phases
    checkpoint["tensors"] = {}
    if "memories" in checkpoint:
        (old, age), (blank, blank_age) = checkpoint.pop("memories")
        # Those from before all questions were kept fill anew.
        if isinstance(old["state"], Tensor) and "questions" in old:
            kept = [old[name] for name in ("state", "waits", "story", "gap", "questions", "answers")]
            checkpoint["tensors"]["state_passing"] = [age, *kept, blank_age, blank]
    return checkpoint
