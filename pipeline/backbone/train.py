"""Stage 1: an encoder and a linear classifier trained on long-tailed images, under DDP or alone.

Everything random is a function of (seed, epoch, step, sample), so a resumed run continues exactly and the rank count
only changes floating-point order.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import distributed
from pipeline.backbone import diagnosis
from pipeline.backbone.arithmetic import training_arithmetic
from pipeline.backbone.build import build_model, class_accuracy
from pipeline.backbone.ema import WeightAverage
from pipeline.backbone.epoch_counts import EpochCounts, hits_by_class
from pipeline.backbone.events import Begin, Epoch, Event, Step, TrainResult, group_fields
from pipeline.backbone.image_classifier import ImageClassifier, Parallel
from pipeline.backbone.labelled_images import LabelledImages
from pipeline.backbone.losses import TrainingLoss
from pipeline.backbone.prepare import PreparedTraining, prepare_training
from pipeline.backbone.sampling import TrainingBatch, epoch_batches, rank_batches
from pipeline.backbone.training_dir import TrainingFolder, exclusive
from pipeline.config import Config
from pipeline.data import Dataset
from pipeline.distributed import GO_ON, SAVE, STOP, Obeyed, Ranks, Signals
from pipeline.errors import DataError, Diverged, Elsewhere, PipelineError, Terminated
from pipeline.killpoint import KillPoint
from pipeline.metrics import group_means, sampling_error
from pipeline.provenance import provenance
from pipeline.resources import keep_freed_memory, peak_memory_mb
from pipeline.schedule import learning_rate
from pipeline.seeds import derive, seed_torch

AGREE_EVERY = 20  # steps between two looks at signals and clocks where looking costs a collective
SAVING_SHARE = 0.05  # of the time that saving after short epochs may take
Report = Callable[[Event], object]


def train_backbone(
    config: Config,
    *,
    out: Path,
    device: str = "auto",
    overwrite: bool = False,
    report: Report = lambda event: None,
    images: Dataset | None = None,
) -> TrainResult:
    """Train the backbone of a configuration, or go on; write last.pt, best.pt, metrics.jsonl and run.json into `out`.

    Arguments:
        report: is called on rank 0 with Begin, Step and Epoch.
        images: the configuration's data set, if it is loaded.

    Raises:
        DataError: images that cannot be used, or a damaged checkpoint.
        ConfigError: a checkpoint of another configuration in `out`, or `out` among the images.
        Terminated: SIGTERM or Ctrl-C; the checkpoint is saved.
    """
    with distributed.ranks(device) as ranks:
        prepared = ranks.together(
            lambda: prepare_training(config, out=out, overwrite=overwrite, images=images, ranks=ranks)
        )
        return train(prepared, ranks=ranks, report=report)


def train(prepared: PreparedTraining, *, ranks: Ranks, report: Report = lambda event: None) -> TrainResult:
    """Execute a prepared training; raises as `train_backbone` does."""
    started = time.perf_counter()
    kill = KillPoint.from_environment(rank=ranks.rank)
    with Signals() as signals, exclusive(prepared.out, ranks) as notes:
        trainer = Trainer(prepared, ranks=ranks, signals=signals, kill=kill, notes=notes)
        first_epoch = trainer.epoch
        for event in trainer.run():
            if ranks.first:
                report(event)
        trainer.folder.close()
    return TrainResult(
        checkpoint=trainer.folder.last,
        epochs=trainer.settings.epochs,
        trained_epochs=trainer.epoch - first_epoch,
        network=prepared.network,
        dataset=trainer.dataset_facts,
        last=trainer.folder.last_line,
        best_val_accuracy=trainer.best,
        seconds=round(time.perf_counter() - started, 2),
    )


class Trainer:
    """The state of one training: model, optimiser, and how far it has come.

    Arguments:
        kill: where a test lets the process die.
        notes: remarks for a person that were made before it began.
    """

    def __init__(
        self,
        prepared: PreparedTraining,
        *,
        ranks: Ranks,
        signals: Signals,
        kill: KillPoint | None = None,
        notes: Sequence[str] = (),
    ):
        self.config, self.dataset, self.transform = prepared.config, prepared.dataset, prepared.transform
        self.settings = settings = self.config.backbone
        self.prepared, self.ranks, self.signals, self.kill = prepared, ranks, signals, kill or KillPoint(None, rank=0)
        self.steps, self.dataset_facts = prepared.steps, self.dataset.summary()
        self.learning_rate = partial(
            learning_rate,
            peak=settings.lr,
            epochs=settings.epochs,
            steps_per_epoch=self.steps,
            warmup_epochs=settings.warmup_epochs,
        )
        device, classes = ranks.device, len(self.dataset.class_names)
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.benchmark = True
        else:
            keep_freed_memory()
        self.model = build_model(settings, num_classes=classes).to(device)
        self.objective = TrainingLoss(settings, self.dataset.counts, device=device)
        self.optimiser = torch.optim.SGD(
            self.model.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        self.classifier = ImageClassifier(self.model, settings.weaken, scale=self.objective.scale)
        self.average = WeightAverage(self.classifier, decay=settings.ema) if settings.ema else None
        self.epoch, self.step_in_epoch, self.best = 0, 0, None  # type: int, int, float | None
        self.counts = EpochCounts(classes, device=device)
        self.folder = TrainingFolder(prepared.out, prepared.identity, kill=self.kill)
        self.folder.notes += notes
        self._resume()
        self.parallel = Parallel(
            self.classifier, ranks, sync_batch_norm=settings.sync_batch_norm, mode=settings.compile
        )
        images = partial(
            LabelledImages, transform=self.transform, arithmetic=self.arithmetic, device=device,
            workers=self.config.data.workers, skip=self.config.dump.on_error == "skip",
        )  # fmt: skip
        self.train_images = images(self.dataset.train)
        self.val_images = images(self.dataset.val) if self.dataset.val else None

    @property
    def evaluated(self) -> ImageClassifier:
        """Return the weights that are validated and saved for use: the averaged ones where there are such."""
        return self.average.classifier if self.average else self.classifier

    def run(self) -> Iterator[Event]:
        """Train to the end, yielding what happens; save after every epoch, every few minutes, and on SIGTERM."""
        yield Begin(
            self.prepared.network, self.dataset_facts, str(self.ranks.device), self.arithmetic.precision_name,
            self.ranks.world, self.epoch, self.settings.epochs, self.steps, tuple(self.folder.notes),
        )  # fmt: skip
        self.saved_at, self.saving_seconds = time.monotonic(), 0.0
        cuda = [self.ranks.device] if self.ranks.device.type == "cuda" else []
        while self.epoch < self.settings.epochs:
            # dropout and the like are seeded per step, nobody else's generator moves
            with torch.random.fork_rng(devices=cuda):
                yield from self._train_epoch()
            yield self._finish_epoch()
        self.ranks.barrier()  # nobody says it is done before the last checkpoint is written

    def _train_epoch(self) -> Iterator[Step]:
        self.epoch_started, self.first_step = time.perf_counter(), self.step_in_epoch
        batches = epoch_batches(
            self.dataset.train.labels, seed=self.settings.seed, epoch=self.epoch, sampler=self.settings.sampler,
            steps=self.steps, rank=self.ranks.rank, world=self.ranks.world, parts=self.settings.accumulate,
            group=self.prepared.group,
        )[self.step_in_epoch :]  # fmt: skip
        images = self.train_images.batches(
            [part for batch in batches for part in batch.parts],
            key=derive(self.settings.seed, "augment", self.epoch),
            draws=[part for batch in batches for part in batch.draws],
        )
        self.parallel.train()
        for batch in batches:
            step = self.epoch * self.steps + self.step_in_epoch
            with self.kill.around(f"step-{step + 1}"):
                seed_torch(derive(self.settings.seed, "step", step, self.ranks.rank), self.ranks.device)
                self._backward(batch, images, step)
                with self.kill.around(f"update-{step + 1}"):
                    self._update(step)
                self.step_in_epoch += 1
            yield Step(self.epoch, self.step_in_epoch, self.steps)
            wish = self._agreed_wish(step)
            if wish == STOP:
                raise self._saved_and_stopped()
            if wish == SAVE:
                self._save(complete=False)

    def _backward(self, batch: TrainingBatch, images: Iterator[tuple[Tensor, Tensor]], step: int) -> None:
        """Add up the gradients of a global batch from this rank's parts of it."""
        at = {"epoch": self.epoch, "step": self.step_in_epoch}
        # DDP averages over ranks
        scale = self.ranks.world / self.objective.denominator(self.dataset.train.labels[batch.rows], epoch=self.epoch)
        self.optimiser.zero_grad(set_to_none=True)
        for number, rows in enumerate(batch.parts):
            pixels, labels = self._next_part(images, step, started=number > 0)
            weakened = self.prepared.weakening.inputs(rows, labels, **at)
            mixture = self.prepared.mixup.mixture(rows, labels, **at)
            with self.parallel.summing(last=number == len(batch.parts) - 1):
                with self.arithmetic.autocast(self.ranks.device):
                    logits = self.parallel(mixture.images(pixels), *weakened)
                losses = partial(self.objective.terms, logits.float(), epoch=self.epoch)
                terms = mixture.terms(losses, labels)
                self.scaler.scale(terms.sum() * scale).backward()
            self.counts.add(logits.detach(), labels, terms.detach())

    def _update(self, step: int) -> None:
        """Take the optimiser step and move the averaged weights."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate(step)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if self.average:
            self.average.update(self.classifier, step=step)

    def _next_part(self, images: Iterator[tuple[Tensor, Tensor]], step: int, *, started: bool) -> tuple[Tensor, Tensor]:
        """Return the next part of a batch. In a single process a signal ends the wait, unless the step has begun."""
        self.kill.before(f"data-{step + 1}")
        if started or self.ranks.world > 1:
            return next(images)
        try:
            with self.signals.obeyed():
                return next(images)
        except Obeyed:
            raise self._saved_and_stopped() from None

    def _finish_epoch(self) -> Epoch:
        settings, class_counts = self.settings, self.dataset.counts
        correct, totals, loss = self.counts.total(self.ranks)
        seconds = time.perf_counter() - self.epoch_started
        self._refuse_useless(totals, loss)
        number, last = self.epoch + 1, self.epoch + 1 == settings.epochs
        val_accuracy = self._validate() if last or number % settings.validate_every == 0 else None
        epoch = Epoch(
            epoch=number,
            epochs=settings.epochs,
            lr=self.learning_rate(number * self.steps - 1),
            loss=loss
            / self.objective.denominator(np.repeat(np.arange(len(totals)), totals.astype(int)), epoch=self.epoch),
            **group_fields("train", group_means(class_accuracy(correct, totals), class_counts)),
            **group_fields("val", {} if val_accuracy is None else group_means(val_accuracy, class_counts)),
            images_per_s=round(len(self.dataset.train) * (1 - self.first_step / self.steps) / seconds, 1),
            seconds=round(seconds, 3),
            peak_memory_mb=round(peak_memory_mb(self.ranks.device), 1),
            left_out=len(self.dataset.train) - round(totals.sum()),
            val_standard_error=None if val_accuracy is None else self._val_standard_error(val_accuracy),
            time=round(time.time(), 3),
        )
        self.epoch, self.step_in_epoch = number, 0
        self.counts.clear()
        better = epoch.val_accuracy is not None and (self.best is None or epoch.val_accuracy > self.best)
        self.best = epoch.val_accuracy if better else self.best
        due = settings.diagnose_every and (last or number % settings.diagnose_every == 0)
        diagnosed = diagnosis.lines(number, self._diagnose(), class_counts) if due else None
        if self.ranks.first:  # before the checkpoint: a kill between the two repeats the epoch, resuming drops its line
            self.folder.append(epoch, diagnosed)
        if self.ranks.largest(last or self._worth_saving()):
            self._save(complete=last, best=better)
        elif better and self.ranks.first:
            self.folder.remember_best(self._state(complete=False))
        return epoch

    def _val_standard_error(self, accuracy: np.ndarray) -> float:
        assert self.dataset.val is not None
        return sampling_error(accuracy, np.bincount(self.dataset.val.labels, minlength=len(accuracy)))

    def _refuse_useless(self, totals: np.ndarray, loss: float) -> None:
        if not totals.any():
            raise DataError(f"{self.dataset.name}: not one training image could be read; --on-error fail says why")
        if not math.isfinite(loss):
            saved = self.folder.last.exists()
            checkpoint = f"{self.folder.last} holds an epoch before" if saved else "nothing is saved yet"
            raise Diverged(
                f"epoch {self.epoch + 1}: the loss is {loss}; {checkpoint}; lower backbone.lr (now {self.settings.lr}) "
                "or set backbone.warmup_epochs, and train with --overwrite"
            )

    def _validate(self) -> np.ndarray | None:
        """Return (C,) validation accuracy in 0…1 per class, None without a validation split."""
        if self.val_images is None:
            return None
        rows, classes = np.arange(len(self.val_images.labels)), len(self.dataset.class_names)
        batches = rank_batches(rows, rank=self.ranks.rank, world=self.ranks.world)
        self.ranks.take_from_first(self.evaluated.buffers())
        self.evaluated.eval()
        sums = np.zeros((2, classes))
        try:
            with self.signals.obeyed():
                for pixels, labels in self.val_images.batches(batches):
                    sums += hits_by_class(self._predict(pixels), labels.cpu().numpy(), classes=classes)
                    self.kill.before(f"validation-{self.epoch + 1}")
        except Obeyed:
            pass
        if self.ranks.largest(bool(self.signals.received)):
            raise self._saved_and_stopped()
        self.kill.after(f"validation-{self.epoch + 1}")
        return class_accuracy(*self.ranks.total(sums))

    @torch.inference_mode()
    def _predict(self, pixels: Tensor) -> np.ndarray:
        with self.arithmetic.autocast(self.ranks.device):
            return self.evaluated(pixels).argmax(1).cpu().numpy()

    def _diagnose(self) -> np.ndarray:
        """Return (3, C) the `diagnosis.class_sums` of the fixed training images."""
        train = self.dataset.train
        rows = diagnosis.fixed_rows(
            train.labels, train.ids, per_class=self.settings.diagnose_per_class, seed=self.config.data.subset_seed
        )
        batches = rank_batches(rows, rank=self.ranks.rank, world=self.ranks.world)
        self.ranks.take_from_first(self.model.buffers())
        self.classifier.eval()
        sums = diagnosis.class_sums(
            self.classifier,
            self.train_images.batches(batches),
            classes=len(self.dataset.class_names),
            arithmetic=self.arithmetic,
        )
        return self.ranks.total(sums)

    def _worth_saving(self) -> bool:
        """Return whether so much was done since the last save that another one takes little of the time."""
        patience = min(self.saving_seconds / SAVING_SHARE, 60 * self.settings.save_every_minutes)
        return self.ranks.first and time.monotonic() - self.saved_at >= patience

    def _agreed_wish(self, step: int) -> int:
        """Return what all ranks do after this step: go on, save, or save and stop."""
        if self.ranks.world > 1 and self.ranks.device.type == "cuda" and step % AGREE_EVERY:
            return GO_ON
        late = time.monotonic() - self.saved_at > 60 * self.settings.save_every_minutes
        wish = STOP if self.signals.received else SAVE if late and self.ranks.first else GO_ON
        return wish if self.ranks.world == 1 else self.ranks.largest(wish)

    def _saved_and_stopped(self) -> PipelineError:
        """Save the checkpoint and return the error that ends the command."""
        self._save(complete=False)
        stop = Terminated(
            f"stopped at epoch {self.epoch + 1}, step {self.step_in_epoch}/{self.steps}; saved in {self.folder.last}: "
            "the same command continues"
        )
        stop.exit_code = self.signals.exit_code
        return stop if self.ranks.first else Elsewhere(stop.exit_code)

    def _save(self, *, complete: bool, best: bool = False) -> None:
        started = time.monotonic()
        counts = self.counts.state(self.ranks)
        if self.ranks.first:
            resume = {"optimiser": self.optimiser.state_dict(), "scaler": self.scaler.state_dict(), **counts}
            if (
                self.average or self.classifier.scale is not None
            ):  # what is saved for use is not what training goes on with
                resume["learner"] = self.classifier.state_dict()
            if self.average:
                resume["average"] = self.average.classifier.state_dict()
            self.folder.save(self._state(complete=complete), resume=resume, best=best)
        self.saved_at = time.monotonic()
        self.saving_seconds = self.saved_at - started

    def _state(self, *, complete: bool) -> dict[str, Any]:
        """Return the content of a checkpoint, without what only resuming needs."""
        return {
            "model": self.evaluated.model_state(),
            "config": self.config.model_dump(mode="json"),
            "identity": self.folder.identity | {"backbone.precision": self.arithmetic.precision_name},
            "memory_format": self.arithmetic.memory_format,
            "transform": self.transform.to_dict(),
            "class_names": list(self.dataset.class_names),
            "counts": self.dataset.counts.tolist(),
            "dataset": self.dataset_facts,
            "network": self.prepared.network,
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "best": self.best,
            "complete": complete,
            "provenance": self.provenance,
        }

    def _resume(self) -> None:
        """Load the checkpoint in the folder, or start anew there, and choose the arithmetic."""
        settings, ranks = self.settings, self.ranks
        state = self.folder.resume(ranks, overwrite=self.prepared.overwrite)
        self.arithmetic = training_arithmetic(
            self.model, self.transform.size, ranks, setting=settings.precision, state=state
        )
        self.scaler = self.arithmetic.gradient_scaler(ranks.device)
        for network in (self.model, *([self.average.classifier] if self.average else [])):
            self.arithmetic.arrange_weights(network)
        self.provenance = provenance(
            command="train-backbone", config=self.config.model_dump(mode="json"), device=str(ranks.device),
            ranks=ranks.world, threads=torch.get_num_threads(), precision=self.arithmetic.precision_name,
            memory_format=self.arithmetic.memory_format, seed=settings.seed, dataset=self.dataset_facts,
            network=self.prepared.network,
        )  # fmt: skip
        if state is not None:
            self._load(state)
        if ranks.first and self.epoch < settings.epochs:
            self.folder.begin(self.provenance, epoch=self.epoch)
        if settings.tensorboard:
            ranks.together(lambda: self.folder.show_in_tensorboard() if ranks.first else None)

    def _load(self, state: dict[str, Any]) -> None:
        if "learner" in state:
            self.classifier.load_state_dict(state["learner"])
        else:
            self.model.load_state_dict(state["model"])
        if self.average:
            self.average.classifier.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step_in_epoch, self.best = state["epoch"], state["step_in_epoch"], state["best"]
        if self.ranks.first:
            self.counts.load(state)
