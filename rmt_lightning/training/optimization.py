"""AdamW with linear warm-up and decay, begun anew at each stage of the curriculum (RMT-2023, appendix)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TypeVar

from annotated_types import Ge, Gt, Le, MinLen

from rmt_lightning.core.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import AdamW
    from torch.optim.lr_scheduler import LambdaLR

Number = TypeVar("Number", int, float)
# AdamW divides it, and must stay within float32.
Rate = Annotated[float, Gt(0), Le(1e30)]


def at_stage(values: Number | list[Number], num_segments: int) -> Number:
    """A setting's value at a stage: a list names the first stages' values, and its last entry holds from there on."""
    if not isinstance(values, list):
        return values
    return values[min(num_segments, len(values)) - 1]


@dataclass(frozen=True)
class WarmupDecay:
    """How weights are optimized within a stage.

    Attributes:
        steps: budget of a stage, over which the learning rate rises and falls; a list gives one for each stage.
        lr: highest learning rate; a list gives one for each stage.
        weight_decay: of all weights.
        warmup: share of `steps` during which the learning rate rises from 0.

    Raises:
        UserError: if weight decay alone would turn the weights around.
    """

    steps: Annotated[int, Ge(1)] | Annotated[list[Annotated[int, Ge(1)]], MinLen(1)]
    lr: Rate | Annotated[list[Rate], MinLen(1)]
    weight_decay: Annotated[float, Ge(0), Le(1e30)] = 1e-3
    warmup: Annotated[float, Ge(0), Le(1)] = 0.1

    def __post_init__(self) -> None:
        highest = max(self.lr) if isinstance(self.lr, list) else self.lr
        # Of a rate that is too high the loss tells.
        if self.weight_decay > 1 and highest * self.weight_decay > 1:
            raise UserError(
                f"weight_decay={self.weight_decay:g}: with lr={highest:g} a step would take more from the weights than "
                f"there is; give {1 / highest:g} or less"
            )

    def build(
        self, parameters: Iterable[nn.Parameter], num_segments: int, fused: bool = False
    ) -> tuple[AdamW, LambdaLR]:
        """Optimizer and schedule for the stage at which inputs are `num_segments` long.

        Args:
            parameters: what is optimized.
            num_segments: the stage.
            fused: update all of them at once, which is faster, but does not go together with scaled gradients.
        """
        # Imported when used: settings are checked without torch.
        from torch.optim import AdamW
        from torch.optim.lr_scheduler import LambdaLR

        steps = at_stage(self.steps, num_segments)
        optimizer = AdamW(parameters, lr=at_stage(self.lr, num_segments), weight_decay=self.weight_decay, fused=fused)
        rising = self.warmup * steps

        def scale(step: int) -> float:
            if step < rising:
                return (step + 1) / (rising + 1)
            return max(0.0, (steps - step) / max(1.0, steps - rising))

        return optimizer, LambdaLR(optimizer, scale)
