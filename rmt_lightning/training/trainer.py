"""Lightning's Trainer, with the settings that a run obeys. All others are the run's own business."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import lightning as L
import torch
from annotated_types import Ge, MinLen
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from rmt_lightning.core.errors import UserError
from rmt_lightning.models import state as tree
from rmt_lightning.models.recurrence import Segment
from rmt_lightning.models.segment_model import SegmentModel
from rmt_lightning.training.callbacks.checkpoints import AtomicCheckpointIO

log = logging.getLogger(__name__)

# With weights in float16, the ε of AdamW is 0, and so is what it divides by.
Precision = Literal[
    64, 32, 16, "64", "32", "16", "bf16", "64-true", "32-true", "bf16-true", "16-mixed", "bf16-mixed"
]  # fmt: skip

CompileMode = Literal["default", "reduce-overhead", "max-autotune"]


class RunTrainer(L.Trainer):
    """Trains in the short epochs of the data module, until the phases of the run end it or a budget is spent.

    Args:
        folder: the run folder.
        callbacks: the run's.
        logger: where metrics go.
        accelerator: what to train on.
        devices: how many of them, or which; on a CPU the number of processes.
        num_nodes: machines. On several, srun or torchrun starts the processes.
        strategy: how several processes work together.
        precision: None is bf16-mixed on GPUs and 32-true elsewhere.
        max_steps: optimizer steps of the whole run; -1 is no limit.
        max_time: of this start of the run, as days:hours:minutes:seconds, or as what `timedelta` takes.
        gradient_clip_val: None or 0 does not clip.
        gradient_clip_algorithm: by norm or by value.
        accumulate_grad_batches: training batches of an optimizer step.
        log_every_n_steps: how often to log within an epoch.
        deterministic: whether torch may use nothing else.
        benchmark: whether cuDNN looks for the fastest way.
        detect_anomaly: whether autograd says where a NaN comes from.
        threads: of each process on a CPU; None is torch's choice. Several runs at once on one machine share its cores.
        compile: torch.compile's mode for the step of a segment; None does not compile. It takes a minute before the
            first step; reduce-overhead replays CUDA graphs.

    Raises:
        UserError: if this machine has not got what is asked for, or something does not go together.
    """

    def __init__(
        self,
        folder: Path,
        callbacks: Sequence[Callback],
        logger: Sequence[Logger],
        accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto",
        devices: Literal["auto", -1] | Annotated[int, Ge(1)] | Annotated[list[int], MinLen(1)] = "auto",
        num_nodes: Annotated[int, Ge(1)] = 1,
        strategy: Literal["auto", "ddp", "ddp_find_unused_parameters_true"] = "auto",
        precision: Precision | None = None,
        max_steps: Literal[-1] | Annotated[int, Ge(1)] = -1,
        max_time: str | dict[str, int] | None = None,
        gradient_clip_val: Annotated[float, Ge(0)] | None = None,
        gradient_clip_algorithm: Literal["norm", "value"] = "norm",
        accumulate_grad_batches: Annotated[int, Ge(1)] = 1,
        log_every_n_steps: Annotated[int, Ge(1)] = 50,
        deterministic: bool | Literal["warn"] = False,
        benchmark: bool | None = None,
        detect_anomaly: bool = False,
        threads: Annotated[int, Ge(1)] | None = None,
        compile: CompileMode | None = None,
    ) -> None:
        if threads and threads > (most := max(64, os.cpu_count() or 1)):
            # OpenMP would end the process without a word.
            raise UserError(f"trainer.threads={threads}: too many for {os.cpu_count()} CPU cores; give {most} or less")
        if threads:
            torch.set_num_threads(threads)
        self.compile_mode = compile
        self.budget = TimeBudget(max_time) if max_time is not None else None
        on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        if not on_gpu and not (accelerator == "mps" and torch.backends.mps.is_available()):
            _check_cpu(accelerator, devices, precision)
        if gradient_clip_algorithm == "value" and not gradient_clip_val:
            raise UserError(
                "trainer.gradient_clip_algorithm=value: clips nothing without trainer.gradient_clip_val; give it"
            )
        try:
            super().__init__(
                accelerator=accelerator,
                devices=devices,
                num_nodes=num_nodes,
                strategy=strategy,
                precision=precision or ("bf16-mixed" if on_gpu else "32-true"),
                max_epochs=-1,
                max_steps=max_steps,
                gradient_clip_val=gradient_clip_val,
                gradient_clip_algorithm=gradient_clip_algorithm,
                accumulate_grad_batches=accumulate_grad_batches,
                log_every_n_steps=log_every_n_steps,
                deterministic=deterministic,
                benchmark=benchmark,
                detect_anomaly=detect_anomaly,
                default_root_dir=folder,
                # Before the checkpoints, which save where a budget ends.
                callbacks=[*([self.budget] if self.budget else []), *callbacks],
                logger=list(logger),
                plugins=[AtomicCheckpointIO()],
                # Keys are sharded by the data module, and the phases must not see an untrained validation.
                use_distributed_sampler=False,
                num_sanity_val_steps=0,
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=False,
            )
        except Exception as error:  # each setting, device and cluster has its own way to say that it is not there
            raise UserError(f"trainer: {' '.join(str(error).split()) or type(error).__name__}") from error
        self._check_processes()

    def compile(self, model: SegmentModel[Any]) -> None:
        """Let the model take its steps compiled, if that has been asked for.

        Raises:
            UserError: if this machine cannot compile, or graphs do not go together with something else.
        """
        if self.compile_mode is None:
            return
        # Graphs write over gradients that wait for those of the next batch, and fail in a backward pass that has to
        # compute forward (pytorch issues 169545 and 154306).
        clashes = {
            f"trainer.accumulate_grad_batches={self.accumulate_grad_batches}": self.accumulate_grad_batches > 1,
            "model.gradient_checkpointing=true": model.gradient_checkpointing,
        }
        if self.compile_mode != "default" and (clash := next((key for key, there in clashes.items() if there), None)):
            raise UserError(
                f"trainer.compile={self.compile_mode}: its CUDA graphs do not go together with {clash}; give "
                "trainer.compile=default, or leave one of them out"
            )
        try:
            torch.compile(torch.neg, mode=self.compile_mode)(torch.ones(2, device=self.strategy.root_device))
        except Exception as error:  # compilers fail in ways of their own
            raise UserError(
                f"trainer.compile={self.compile_mode}: nothing can be compiled here "
                f"({str(error).splitlines()[0][:150]}); install a C++ compiler, or leave it out"
            ) from None
        compile_step(model, self.compile_mode)

    def _check_processes(self) -> None:
        """Whether the processes that are asked for are there, or are about to be started."""
        strategy = self.strategy
        if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or (
            isinstance(strategy, DDPStrategy) and strategy._start_method != "popen"
        ):
            raise UserError(
                f"trainer.strategy={type(strategy).__name__}: has not been tried with this program; give auto or ddp"
            )
        cluster = self._accelerator_connector.cluster_environment
        asked, started = self.num_devices * self.num_nodes, _started(cluster)
        ranks = {"LOCAL_RANK": self.num_devices, "NODE_RANK": self.num_nodes}
        beyond = [name for name, most in ranks.items() if int(os.environ.get(name, 0)) >= most]
        if beyond or started not in (None, asked):
            told = f"{beyond[0]}={os.environ[beyond[0]]}" if beyond else f"{started} processes were started"
            raise UserError(
                f"trainer.devices × trainer.num_nodes = {asked}: but {told}; give as many as there are, or unset what "
                "another program has left in the environment"
            )
        if self.num_nodes == 1 or not isinstance(cluster, LightningEnvironment):
            return
        if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]:
            raise UserError(
                f"trainer.num_nodes={self.num_nodes}: nothing starts the other machines; use srun or torchrun, or set "
                f"{', '.join(missing)} on each of them"
            )
        log.info("waiting for %d machines at %s:%d", self.num_nodes, cluster.main_address, cluster.main_port)


def compile_step(model: SegmentModel[Any], mode: CompileMode) -> None:
    """Let a model take its steps compiled.

    One segment is compiled, not all of them: another number of segments would be another program.

    Args:
        model: on the device where it will be used.
        mode: torch.compile's.

    Raises:
        UserError: if it does not read step by step.
    """
    if (schedule := getattr(model, "schedule", "vertical")) != "vertical":
        raise UserError(
            f"model.schedule={schedule}: what trainer.compile compiles is whole segments; leave out one of the two"
        )
    step = torch.compile(model.step, mode=mode)

    def alike(segment: Segment, state: Any) -> tuple[Tensor, Any]:
        # Laid out alike in memory, whichever segment of how many it is: one program for all.
        read: tuple[Tensor, Any] = step(*tree.map(Tensor.contiguous, (segment, state)))
        # A graph writes where it has written before, and may do so as soon as no backward pass is due: over the state
        # that it is given, which is its own last result, too. So what leaves it is a copy.
        return read if mode == "default" else tree.map(Tensor.clone, read)

    # As an attribute of this object, for a compiled module would name its weights otherwise.
    vars(model)["step"] = alike


def _started(cluster: Any) -> int | None:
    """How many processes something else has started; None if it does not tell, or there is no such thing."""
    if not isinstance(cluster, LightningEnvironment):
        return int(cluster.world_size())
    told = os.environ.get("WORLD_SIZE")
    return int(told) if told and cluster.creates_processes_externally else None


def _check_cpu(accelerator: str, devices: Any, precision: Any) -> None:
    if accelerator in ("gpu", "cuda") or (accelerator == "mps" and not torch.backends.mps.is_available()):
        raise UserError(f"trainer.accelerator={accelerator}: torch finds no GPU; give cpu or auto")
    cores = os.cpu_count() or 1
    most = max(8, cores)
    if isinstance(devices, list) or devices == -1:
        raise UserError(f"trainer.devices={devices}: names GPUs; on a CPU give the number of processes, or auto")
    if devices != "auto" and devices > most:
        raise UserError(f"trainer.devices={devices}: too many processes for {cores} CPU cores; give {most} or less")
    if precision in (16, "16", "16-mixed"):
        raise UserError(f"trainer.precision={precision}: is for GPUs alone; give bf16-mixed or 32-true")


class TimeBudget(Callback):
    """Ends a run as `max_steps` does, with the step in which its time is over.

    Args:
        limit: days:hours:minutes:seconds, or what `timedelta` takes.

    Raises:
        UserError: if it is no time.
    """

    def __init__(self, limit: str | dict[str, int]) -> None:
        super().__init__()
        self.limit = limit
        self.over = False
        try:
            if isinstance(limit, str):
                parts = limit.split(":")
                if not all(map(str.isdecimal, parts)):
                    # int would read -00 as 0.
                    raise ValueError
                days, hours, minutes, seconds = map(int, parts)
                limit = {"days": days, "hours": hours, "minutes": minutes, "seconds": seconds}
            self.seconds = timedelta(**limit).total_seconds()
            if self.seconds < 0:
                raise ValueError
        except (ValueError, TypeError, OverflowError):
            raise UserError(
                f"trainer.max_time={self.limit}: is no time; give days:hours:minutes:seconds, such as 00:08:00:00"
            ) from None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end = time.monotonic() + self.seconds
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        # Not between the batches of one step.
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        # All ranks end with the same step.
        if trainer.strategy.reduce_boolean_decision(time.monotonic() > self._end, all=False):
            self.over = True
            trainer.fit_loop.epoch_loop.max_steps = trainer.global_step
