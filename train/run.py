"""The files of a training run in its folder: checkpoints, log and picture; and when the run ends."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from bsdiff_rt.errors import SettingsError
from train.checkpoint import last_checkpoint, load_checkpoint, unjudged_path, write_checkpoint
from train.log import Log
from train.loop import DIVERGED, Trainee, prefetch
from train.progress import StepProgress, format_figures

logger = logging.getLogger(__name__)

Validate = Callable[[Path], dict[str, float]]  # path of the picture to write -> figures by name


class Run:
    """A training run in a folder: NAME.pt, NAME.csv, NAME_samples.png, tensorboard/NAME.

    A checkpoint is saved as NAME_unjudged.pt and becomes NAME.pt after its validation. So an interrupted validation
    costs no training, and a checkpoint whose figure is not finite does not replace a good one.

    Args:
        folder: of the run.
        name: of the stage.
        trainee: the network in training. It continues from the last checkpoint in the folder, if there is one.
        figure: part of the name of the validation figure that early stopping watches. Larger is better.
        validate: writes a picture to the path it is given and returns the figures.
        extra: returns what else a checkpoint must hold.
        header: plain values that a checkpoint holds. A run is continued only with the same ones.

    Raises:
        SettingsError: the checkpoint in the folder was trained with another header, or its run is finished.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        trainee: Trainee,
        figure: str,
        validate: Validate,
        extra: Callable[[], dict[str, Any]] = dict,
        **header: Any,
    ) -> None:
        self.folder, self.name, self.trainee, self.figure, self.header = folder, name, trainee, figure, header
        self.path, self.best_path = folder / f"{name}.pt", folder / f"{name}_best.pt"
        self.unjudged_path = unjudged_path(folder, name)
        self.best, self.checks, self.finished = -math.inf, 0, False
        self.restored: dict[str, Any] = {}
        self._validate, self._extra = validate, extra
        if last := last_checkpoint(folder, name):
            self._restore(last)
        trainee.accelerator.wait_for_everyone()  # all have read the same file before one replaces it
        self._log = Log(folder, name, trainee.step) if trainee.accelerator.is_main_process else None
        self._sums: dict[str, float] = {}
        self._steps = 0
        self._progress: StepProgress | None = None

    def _restore(self, last: Path) -> None:
        """Continue from a checkpoint."""
        trainee = self.trainee
        self.restored = trainee.restore(last)
        for what, now in self.header.items():
            before = self.restored.get(what, now)
            if before != now:
                raise SettingsError(
                    f"{last}: trained with {what} {before}, not {now}. Give the same, or another folder."
                )
        for option, now in asdict(trainee.options).items():
            before = self.restored["options"].get(option, now)
            if before != now:
                logger.warning("%s: trained with %s %s so far, continues with %s", last, option, before, now)
        stopping = self.restored.get("stopping", {})
        self.best, self.checks = stopping.get("best", self.best), stopping.get("checks", 0)
        self.finished = stopping.get("finished", False)
        if self.finished and trainee.options.steps != self.restored["options"].get("steps", trainee.options.steps):
            raise SettingsError(
                f"{last}: this run is finished and holds its best checkpoint, so it cannot be continued. Train into "
                "another folder."
            )
        state = "is finished" if self.finished else "continues"
        logger.info("%s: %s %s at step %s", last, self.name, state, f"{trainee.step:,}")

    def batches(self, make: Callable[[int], NDArray[Any]]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield `(index, batch)` for every remaining step. First finish what an interruption left undone.

        Args:
            make: returns the batch of a step. A worker thread calls it ahead of time.

        Yields:
            A seed for whatever else is random in the step, and the batch on the device. The last one comes after the
            last step, or when early stopping ends the run.
        """
        trainee = self.trainee
        if "unjudged" in self.restored:
            self._check(self.restored.pop("unjudged"))
        elif self._over() and not self.finished and self.best_path.exists():
            if trainee.accelerator.is_main_process:
                self._keep_best()
            self.finished = True
        if self.finished:
            return
        shown = trainee.accelerator.is_main_process
        self._progress = StepProgress(self.name, trainee.step, trainee.options.steps, shown=shown)
        try:
            for step, batch in prefetch(make, trainee.step, trainee.options.steps):
                yield trainee.sample_index(step), batch.to(trainee.accelerator.device, non_blocking=True)
                if self.finished:
                    return
        finally:
            self._progress.close()

    def after_step(self, losses: dict[str, float]) -> None:
        """Add up a step's losses. When a checkpoint is due, save, validate and log it, and see whether the run is over.

        Args:
            losses: by name.

        Raises:
            SettingsError: the checkpoint's weights or its figure are not finite, or it cannot be written.
        """
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._steps += 1
        trainee, progress = self.trainee, self._progress
        if progress is not None:
            progress.update(trainee.step, losses["loss"])
        if trainee.step % trainee.options.save_every and trainee.step != trainee.options.steps:
            return
        accelerator = trainee.accelerator
        own = torch.tensor([value / self._steps for value in self._sums.values()], device=accelerator.device)
        means = dict(zip(self._sums, accelerator.reduce(own, "mean").tolist(), strict=True))
        started = time.monotonic()
        if accelerator.is_main_process:
            rate = progress.describe_rate() if progress is not None else ""
            steps = f"{trainee.step:,} of {trainee.options.steps:,}"
            logger.info("%s: step %s, %s, %s", self.name, steps, format_figures(means), rate)
            self._save(self.unjudged_path, unjudged=means)
        self._check(means)
        if progress is not None:
            progress.pause(time.monotonic() - started)
        self._sums, self._steps = {}, 0

    def _check(self, means: dict[str, float]) -> None:
        """Validate, keep and log the checkpoint in NAME_unjudged.pt, and see whether the run is over.

        Args:
            means: its mean losses since the last checkpoint, by name.
        """
        trainee = self.trainee
        verdict = torch.zeros(1, device=trainee.accelerator.device)
        if trainee.accelerator.is_main_process:
            logger.info("%s: validating step %s", self.name, f"{trainee.step:,}")
            quality = self._validate(self.folder / f"{self.name}_samples.png")
            logger.info("%s: step %s, validation: %s", self.name, f"{trainee.step:,}", format_figures(quality))
            verdict += self._judge(quality)
            assert self._log is not None
            self._log.write(trainee.step, trainee.options.rate(trainee.step - 1), means, quality)
            self.unjudged_path.unlink()
        self.finished = bool(trainee.accelerator.reduce(verdict, "sum"))

    def _judge(self, quality: dict[str, float]) -> bool:
        """Keep the checkpoint as NAME.pt; with early stopping, keep the best one, too.

        Returns:
            Whether the run is over. NAME.pt is then the best checkpoint.
        """
        name, figure = [(name, value) for name, value in quality.items() if self.figure in name][-1]
        if not math.isfinite(figure):
            self.unjudged_path.unlink()
            raise SettingsError(f"{name} is {figure} after step {self.trainee.step}, which is not kept. {DIVERGED}")
        if self.trainee.options.patience:
            self.checks += 1
            if figure > self.best:
                self.best, self.checks = figure, 0
                self._save(self.best_path)
            if self._over():
                self._keep_best()
                return True
        self._save(self.path)
        return False

    def _over(self) -> bool:
        options = self.trainee.options
        return bool(options.patience) and (self.checks >= options.patience or self.trainee.step >= options.steps)

    def _keep_best(self) -> None:
        best = load_checkpoint(self.best_path)
        state = best | {"stopping": best["stopping"] | {"finished": True}}
        write_checkpoint(state, self.path, self.trainee.saved_step)
        logger.info(
            "%s: ended at step %s, kept the best checkpoint, of step %s", self.name, self.trainee.step, best["step"]
        )

    def _save(self, path: Path, **more: Any) -> None:
        stopping = {"best": self.best, "checks": self.checks, "finished": False}
        self.trainee.save(path, **self.header, **self._extra(), stopping=stopping, **more)
