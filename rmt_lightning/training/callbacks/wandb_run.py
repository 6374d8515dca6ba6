"""What Weights & Biases is told of a run. Its id stays in the run folder, so that a resumed run goes on there."""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from rmt_lightning.core.errors import UserError
from rmt_lightning.core.files import read_csv, write_atomically
from rmt_lightning.core.quoting import for_shell
from rmt_lightning.core.run_folder import CHECKPOINTS, EVALUATION
from rmt_lightning.training.phases.phase import Phase, Phases

# wandb takes a second to import, and most runs do without it.
if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

STEP = "trainer/global_step"
# What the run folder holds at the end and W&B shows.
TABLES = ("*.csv", "evaluations/*/*.csv")
PICTURES = ("*.png", "evaluations/*/*.png", "attention/**/*.png")


class WandbRun(WandbLogger):
    """A run on W&B: online if there is a key and a network, else offline; it never asks for a key.

    The W&B step of a row is the optimizer step, but never smaller than that of the row before. So the parts of a
    resumed run follow each other, online and after `wandb sync` alike, and what a killed run had logged already is not
    there twice.

    Args:
        save_dir: the run folder; the end of its path names the run.
        project: where the run belongs.
        entity: user or team; None: that of the key.
        group: what runs of a sweep have in common.
        job_type: what kind of run it is within the group.
        tags: short words to find it by.
        mode: None: online if there is a key.
        log_checkpoints: whether the weights of each stage become versions of an artifact.

    Raises:
        UserError: if W&B would not take the name of the project.
    """

    def __init__(
        self,
        save_dir: str | Path,
        project: str,
        entity: str | None = None,
        group: str | None = None,
        job_type: str = "train",
        tags: list[str] | None = None,
        mode: Literal["online", "offline"] | None = None,
        log_checkpoints: bool = False,
    ) -> None:
        if not project or set(project) & set("/\\#?%:"):
            raise UserError(f"logger.project={project}: must be a name without / \\ # ? % :")
        self.folder = Path(save_dir)
        self._memory = self.folder / "wandb" / "run.json"
        super().__init__(
            name="/".join(self.folder.resolve().parts[-2:]),
            save_dir=save_dir,
            project=project,
            entity=entity,
            group=group,
            job_type=job_type,
            tags=tags,
        )
        self.mode = mode
        self.log_checkpoints = log_checkpoints
        self._step = 0
        self._phases: set[str] = set()

    @property
    @rank_zero_experiment
    def experiment(self) -> wandb.Run:
        """The W&B run, which begins when it is first asked for."""
        if self._experiment is None:
            self._experiment = self._begin()
        return cast("wandb.Run", self._experiment)

    def _begin(self) -> wandb.Run:
        import wandb

        # What waits to be uploaded stays in the run folder too.
        os.environ["WANDB_DATA_DIR"] = str((self.folder / "wandb").resolve())
        # The log tells the same in one line.
        wandb.setup(wandb.Settings(silent=True))
        mode = self._possible_mode()
        try:
            # The commit is in the config; the address of a remote, which W&B would add, may hold a password.
            settings = wandb.Settings(silent=True, disable_git=True)
            run = wandb.init(**self._wandb_init | self._place(), mode=mode, settings=settings)
        except (wandb.errors.CommError, wandb.errors.UsageError) as error:
            raise UserError(f"logger: W&B says: {' '.join(str(error).split())}; or give logger.mode=offline") from None
        there = os.path.relpath(self.folder / "wandb")
        # It must not be taken for an option.
        typed = for_shell(f"./{there}" if there.startswith("-") else there)
        place = run.url or f"offline; wandb sync {typed} uploads it"
        log.info("W&B run %s: %s", run.id, place)
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP)
        run.define_metric("train/tokens_per_second", step_metric=STEP, summary="mean")
        for memory in ("train/host_memory_mb", "train/device_memory_mb"):
            run.define_metric(memory, step_metric=STEP, summary="max")
        run.define_metric("test/accuracy", step_metric="test/segments")
        self._step = max(self._recall()["step"], run.starting_step)
        return run

    def _possible_mode(self) -> Any:
        """What is wanted, or offline if W&B cannot be reached or there is no key for it."""
        import wandb

        wanted = self.mode or os.environ.get("WANDB_MODE") or "online"
        if wanted != "online":
            return wanted
        try:
            # Gives up after 10 seconds; wandb.init would only after three minutes.
            return "online" if wandb.login(prompt=False, verify=True) else "offline"
        except wandb.errors.CommError as error:
            log.warning("W&B: %s The run is kept offline.", str(error).splitlines()[0])
            return "offline"

    def _place(self) -> dict[str, Any]:
        """The run's id, group and job type: those it began with, unless others are given."""
        known, given = self._recall(), self._wandb_init
        group, job_type = given.get("group") or known.get("group"), given["job_type"]
        if job_type == "train":
            job_type = known.get("job_type", job_type)
        self._remember(known["step"], id=known["id"], group=group, job_type=job_type)
        return {"id": known["id"], "group": group, "job_type": job_type}

    def _recall(self) -> dict[str, Any]:
        """The run's id and the first step that is free, among others; made when it begins."""
        if not self._memory.exists():
            return {"id": secrets.token_hex(4), "step": 0}
        remembered: dict[str, Any] = json.loads(self._memory.read_text(encoding="utf-8"))
        return remembered

    def _remember(self, step: int, **others: Any) -> None:
        write_atomically(self._memory, json.dumps(self._recall() | {"step": step} | others).encode())

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log a row."""
        run = self.experiment
        self._step = max(self._step, step or 0)
        run.log({**metrics, STEP: step}, step=self._step)

    @rank_zero_only
    def log_row(self, phase: Phase, row: Mapping[str, Any]) -> None:
        """Log a row of what a phase has found, over the first of its columns."""
        over, *_ = row
        if phase.name not in self._phases:
            self._phases.add(phase.name)
            self.experiment.define_metric(f"{phase.name}/*", step_metric=f"{phase.name}/{over}")
        self.experiment.log({f"{phase.name}/{name}": value for name, value in row.items()}, step=self._step)

    @rank_zero_only
    def log_milestone(self, phase: Phase, name: str) -> None:
        """Log the checkpoint of what has been reached, if that is wanted."""
        import wandb

        path = self.folder / CHECKPOINTS / f"{name}.ckpt"
        if self.log_checkpoints and path.exists():
            artifact = wandb.Artifact(f"stages-{self.experiment.id}", type="model", metadata=phase.rows()[-1])
            # The checkpoint stays where it is, so there is no need of a copy until it is uploaded.
            artifact.add_file(str(path), policy="immutable")
            with _survived():
                self.experiment.log_artifact(artifact, aliases=[name])

    @rank_zero_only
    def log_results(self) -> None:
        """Log what the run folder holds at the end: accuracy over segments, each table, each picture."""
        import wandb

        run = self.experiment
        evaluation = [_numbers(row) for row in read_csv(self.folder / EVALUATION)]
        # The longest input last: the summary keeps it.
        for row in sorted(evaluation, key=lambda row: row.get("segments", 0)):
            self._step += 1
            run.log({f"test/{name}": value for name, value in row.items() if value is not None}, step=self._step)
            # Of running text nothing is right or wrong.
            if "accuracy" in row:
                length = "segments" if row.get("tokens") is None else "tokens"
                run.summary[f"test/accuracy_{length}_{row[length]}"] = row["accuracy"]
        found: dict[str, Any] = {}
        for path in self._own(TABLES):
            with _survived():
                if rows := [_numbers(row) for row in read_csv(path)]:
                    found[self._key(path)] = wandb.Table(list(rows[0]), [list(row.values()) for row in rows])
        for path in self._own(PICTURES):
            with _survived():
                found[self._key(path)] = wandb.Image(str(path))
        self._step += 1
        with _survived():
            run.log(found, step=self._step)
        # These rows are beyond the steps of the optimizer; should it go on, its rows must not fall among them.
        self._remember(self._step + 1)

    def _own(self, patterns: Iterable[str]) -> list[Path]:
        """What stands in the run folder; where links lead out of it, nothing is sent from."""
        found = sorted(path for pattern in patterns for path in self.folder.glob(pattern))
        return [path for path in found if path.resolve().is_relative_to(self.folder.resolve())]

    def _key(self, path: Path) -> str:
        return f"results/{path.relative_to(self.folder).with_suffix('')}"


class PhaseRecords(Callback):
    """Tells W&B what phases find. Must stand after the checkpoints, which it may hand on.

    Args:
        run: on W&B.
        phases: what the run goes through.
    """

    def __init__(self, run: WandbRun, phases: Phases) -> None:
        super().__init__()
        self.run = run
        self.phases = phases

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._told = {phase.name: len(phase.rows()) for phase in self.phases}
        self._kept = {name for phase in self.phases for name in phase.milestones}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for phase in self.phases:
            rows = phase.rows()
            for row in rows[self._told[phase.name] :]:
                self.run.log_row(phase, row)
            self._told[phase.name] = len(rows)
            for name in phase.milestones:
                if name not in self._kept:
                    self._kept.add(name)
                    self.run.log_milestone(phase, name)


@contextmanager
def _survived() -> Iterator[None]:
    """Files and tables are announced to the server at once; a connection that is lost must not end the run."""
    try:
        yield
    except Exception as error:  # each obstacle has a type of its own, not all of them public
        log.warning("W&B: %s", " ".join(str(error).split()))


def _numbers(row: Mapping[str, str]) -> dict[str, Any]:
    """The cells of a row of a csv file as the numbers, truths and words that they are."""
    return {name: _value(cell) for name, cell in row.items()}


def _value(cell: str) -> Any:
    if cell in ("True", "False"):
        return cell == "True"
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            pass
    return cell or None
