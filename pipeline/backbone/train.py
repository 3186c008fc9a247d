"""Stage 1: an encoder and a linear classifier trained on long-tailed images, under DDP or alone.

Everything random is a function of (seed, epoch, step, sample), so a resumed run continues exactly and the rank count
only changes floating-point order.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import distributed
from pipeline.backbone import diagnosis
from pipeline.backbone.build import (
    augmentation_facts,
    build_model,
    check_input,
    class_accuracy,
    input_transform,
    network_facts,
)
from pipeline.backbone.ema import WeightAverage
from pipeline.backbone.epoch_counts import Tally
from pipeline.backbone.events import Begin, Epoch, Event, Step, TrainResult
from pipeline.backbone.learner import Learner, Parallel
from pipeline.backbone.losses import UNREADABLE, Objective
from pipeline.backbone.mixup import Mixup
from pipeline.backbone.precision import (
    MEMORY_FORMATS,
    SMALL_NETWORK,
    choose_precision,
    fastest_memory_format,
    forward_operations,
    name_of,
)
from pipeline.backbone.sampling import epoch_order, nth_draw, refuse_empty_shares, shares, steps_of
from pipeline.backbone.schedule import learning_rate, peak_memory_mb, seed_step
from pipeline.backbone.training_dir import (
    TrainingFolder,
    alone_in,
    identity_of,
    recorded_precision,
    refuse_among_images,
    refuse_frozen,
)
from pipeline.backbone.weakening import Weakening, check_place
from pipeline.config import Config
from pipeline.data import Dataset, load_dataset
from pipeline.data.copies import on_device
from pipeline.data.transform import Loader
from pipeline.distributed import GO_ON, SAVE, STOP, Obeyed, Ranks, Signals
from pipeline.errors import DataError, Diverged, Elsewhere, PipelineError, Terminated
from pipeline.killpoint import KillPoint
from pipeline.metrics import group_means, sampling_error
from pipeline.provenance import provenance
from pipeline.seeds import derive

AGREE_EVERY = 20  # steps between two looks at signals and clocks where looking costs a collective
SAVING_SHARE = 0.05  # of the time that saving after short epochs may take


def train_backbone(
    config: Config,
    *,
    out: Path,
    device: str = "auto",
    overwrite: bool = False,
    report: Callable[[Event], None] = lambda event: None,
    images: Dataset | None = None,
) -> TrainResult:
    """Trains the backbone of a configuration, or goes on; writes last.pt, best.pt, metrics.jsonl and run.json into `out`.

    report is called on rank 0 with Begin, Step and Epoch. images: the configuration's data set, if it is loaded. Raises
    DataError (data, damaged checkpoint), ConfigError (a checkpoint of another configuration in `out`, or `out` among the
    images), Terminated (SIGTERM or Ctrl-C, checkpoint saved).
    """
    started = time.perf_counter()
    with distributed.ranks(device) as ranks, Signals() as signals:
        ranks.together(lambda: refuse_frozen(config.backbone))
        dataset = ranks.together(lambda: images or load_dataset(config.data))
        ranks.together(lambda: refuse_among_images(out, config.data))
        with alone_in(out, ranks) as notes:
            trainer = Trainer(config, dataset, out=out, ranks=ranks, signals=signals, overwrite=overwrite)
            trainer.folder.notes[:0] = notes
            before = trainer.epoch
            for event in trainer.run():
                if ranks.first:
                    report(event)
            trainer.folder.close()
        return TrainResult(
            checkpoint=out / "last.pt",
            epochs=config.backbone.epochs,
            trained_epochs=trainer.epoch - before,
            network=trainer.network,
            dataset=trainer.facts,
            last=trainer.folder.last_line,
            best_val_accuracy=trainer.best,
            seconds=round(time.perf_counter() - started, 2),
        )


class Trainer:
    """The state of one training: model, optimiser, and how far it has come."""

    def __init__(self, config: Config, dataset: Dataset, *, out: Path, ranks: Ranks, signals: Signals, overwrite: bool):
        self.config, self.dataset, self.ranks, self.signals = config, dataset, ranks, signals
        self.settings = settings = config.backbone
        self.steps = steps_of(len(dataset.train), settings.batch_size)
        self.weakening = Weakening(
            settings.weaken, dataset.train.labels, dataset.counts, seed=settings.seed, device=ranks.device
        )
        self.mixup = Mixup(settings.mixup, group=settings.weaken.group, seed=settings.seed, device=ranks.device)
        self.group = max(self.weakening.group, self.mixup.group)
        smallest = len(dataset.train) // self.steps
        ranks.together(lambda: refuse_empty_shares(smallest, ranks.world, settings.accumulate, group=self.group))
        self.transform = input_transform(config.data, settings, dataset.train)
        self.facts = dataset.summary()
        device = ranks.device
        cuda = device.type == "cuda"
        if cuda:
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.benchmark = True
        self.model = build_model(settings, num_classes=len(dataset.class_names)).to(device)
        check_input(self.model, self.transform, device)
        check_place(self.model, settings.weaken.at, size=self.transform.size, device=device)
        self.network = network_facts(settings, self.model) | augmentation_facts(settings, self.transform)
        self.objective = Objective(settings, dataset.counts, device=device)
        self.optimiser = torch.optim.SGD(
            self.model.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        self.epoch, self.step_in_epoch, self.best = 0, 0, None  # type: int, int, float | None
        self.tally = Tally(len(dataset.class_names), device=device)
        self.kill = KillPoint(os.environ.get("PIPELINE_KILL_AT"), rank=ranks.rank)
        identity = identity_of(settings, dataset=dataset.training_fingerprint, transform=self.transform.to_dict())
        self.folder = TrainingFolder(out, identity, kill=self.kill)
        self.learner = Learner(self.model, settings.weaken, scale=self.objective.scale)
        self.average = WeightAverage(self.learner, decay=settings.ema) if settings.ema else None
        self._resume(overwrite)
        self.parallel = Parallel(self.learner, ranks, sync_batch_norm=settings.sync_batch_norm, mode=settings.compile)
        self.train_loader = Loader(dataset.train, self.transform, device=device, workers=config.data.workers)
        self.val_loader = (
            Loader(dataset.val, self.transform, device=device, workers=config.data.workers) if dataset.val else None
        )
        train = dataset.train
        self.diagnosed = diagnosis.fixed_rows(
            train.labels, train.ids, per_class=settings.diagnose_per_class, seed=config.data.subset_seed
        )

    @property
    def shown(self) -> Learner:
        """What is validated and kept for use: the averaged weights where there are such."""
        return self.average.learner if self.average else self.learner

    @property
    def _may_skip(self) -> bool:
        return self.config.dump.on_error == "skip"

    def run(self) -> Iterator[Event]:
        """Trains to the end, yielding what happens; saves after every epoch, every few minutes, and on SIGTERM."""
        epochs = self.settings.epochs
        yield Begin(
            self.network, self.facts, str(self.ranks.device), name_of(self.precision), self.ranks.world,
            self.epoch, epochs, self.steps, tuple(self.folder.notes),
        )  # fmt: skip
        self.saved_at, self.saving = time.monotonic(), 0.0
        cuda = [self.ranks.device] if self.ranks.device.type == "cuda" else []
        while self.epoch < epochs:
            # dropout and the like are seeded per step, nobody else's generator moves
            with torch.random.fork_rng(devices=cuda):
                yield from self._train_epoch()
            yield self._finish_epoch()
        self.ranks.barrier()  # nobody says it is done before the last checkpoint is written

    def _train_epoch(self) -> Iterator[Step]:
        settings, ranks, labels = self.settings, self.ranks, self.dataset.train.labels
        self.epoch_started, self.first_step = time.perf_counter(), self.step_in_epoch
        order = epoch_order(labels, seed=settings.seed, epoch=self.epoch, sampler=settings.sampler)
        batches, draws = (np.array_split(of, self.steps)[self.step_in_epoch :] for of in (order, nth_draw(order)))
        cut = {"world": ranks.world, "parts": settings.accumulate, "group": self.group}
        mine, nth = ([shares(batch, **cut)[ranks.rank] for batch in of] for of in (batches, draws))
        parts = self._read(list(chain(*mine)), draws=list(chain(*nth)))
        self.parallel.train()
        for batch, own in zip(batches, mine, strict=True):
            step = self.epoch * self.steps + self.step_in_epoch
            self.kill.before(f"step-{step + 1}")
            seed_step(derive(settings.seed, "step", step, ranks.rank), ranks.device)
            for group in self.optimiser.param_groups:
                group["lr"] = learning_rate(step, steps=self.steps, settings=settings)
            # DDP averages over ranks
            scale = ranks.world / self.objective.denominator(labels[batch], epoch=self.epoch)
            self.optimiser.zero_grad(set_to_none=True)
            for part, rows in enumerate(own):
                pixels, wanted = self._wait_for(parts, step, begun=part > 0)
                weakened = self.weakening.inputs(rows, wanted, epoch=self.epoch, step=self.step_in_epoch)
                mixture = self.mixup.of(rows, wanted, epoch=self.epoch, step=self.step_in_epoch)
                with self.parallel.summing(last=part == settings.accumulate - 1):
                    with self._autocast():
                        logits = self.parallel(mixture.images(pixels), *weakened)
                    losses = partial(self.objective.terms, logits.float(), epoch=self.epoch)
                    terms = mixture.terms(losses, wanted)
                    self.scaler.scale(terms.sum() * scale).backward()
                self.tally.add(logits.detach(), wanted, terms.detach())
            self.kill.before(f"update-{step + 1}")
            self.scaler.step(self.optimiser)
            self.scaler.update()
            if self.average:
                self.average.update(self.learner, step=step)
            self.step_in_epoch += 1
            self.kill.after(f"step-{step + 1}")
            yield Step(self.epoch, self.step_in_epoch, self.steps)
            wish = self._agreed_wish(step)
            if wish == STOP:
                raise self._saved_and_stopped()
            if wish == SAVE:
                self._save(complete=False)

    def _wait_for(self, parts: Iterator[tuple[Tensor, Tensor]], step: int, *, begun: bool) -> tuple[Tensor, Tensor]:
        """The next part of a batch. Of one process a signal ends the wait, unless the step has begun."""
        self.kill.before(f"data-{step + 1}")
        if begun or self.ranks.world > 1:
            return next(parts)
        try:
            with self.signals.obeyed():
                return next(parts)
        except Obeyed:
            raise self._saved_and_stopped() from None

    def _read(
        self, rows: list[np.ndarray], *, draws: list[np.ndarray] | None = None, augmented: bool = True
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(pixels, labels) of each array of training positions, augmented for this epoch, another way at each draw, or
        clean.
        """
        bad: list[int] = []
        key = derive(self.settings.seed, "augment", self.epoch) if augmented else None
        labels = self.dataset.train.labels
        images = self.train_loader.batches(
            rows, key=key, draws=draws, unreadable=bad.append if self._may_skip else None
        )
        for positions, pixels in zip(rows, images, strict=True):
            known = np.where(np.isin(positions, bad), UNREADABLE, labels[positions]) if bad else labels[positions]
            bad.clear()
            yield self._laid_out(pixels), on_device(known, self.ranks.device)

    def _finish_epoch(self) -> Epoch:
        settings = self.settings
        right, seen, loss = self.tally.total(self.ranks)
        if not seen.any():
            raise DataError(f"{self.dataset.name}: not one training image could be read; --on-error fail says why")
        if not math.isfinite(loss):
            before = (
                f"{self.folder.last} holds an epoch before" if self.folder.last.exists() else "nothing is saved yet"
            )
            raise Diverged(
                f"epoch {self.epoch + 1}: the loss is {loss}; {before}; lower backbone.lr (now {settings.lr}) "
                "or set backbone.warmup_epochs, and train with --overwrite"
            )
        seconds = time.perf_counter() - self.epoch_started
        last = self.epoch + 1 == settings.epochs
        val: dict[str, float | None] = dict.fromkeys(("all", "many", "medium", "few"))
        error: float | None = None
        if self.val_loader is not None and (last or (self.epoch + 1) % settings.validate_every == 0):
            accuracy = self._validate()
            val = group_means(accuracy, self.dataset.counts)
            error = sampling_error(accuracy, np.bincount(self.val_loader.split.labels, minlength=len(accuracy)))
        train = group_means(class_accuracy(right, seen), self.dataset.counts)
        result = Epoch(
            epoch=self.epoch + 1,
            epochs=settings.epochs,
            lr=learning_rate((self.epoch + 1) * self.steps - 1, steps=self.steps, settings=settings),
            loss=loss / self.objective.denominator(np.repeat(np.arange(len(seen)), seen.astype(int)), epoch=self.epoch),
            train_accuracy=train["all"],
            train_many=train["many"],
            train_medium=train["medium"],
            train_few=train["few"],
            val_accuracy=val["all"],
            val_many=val["many"],
            val_medium=val["medium"],
            val_few=val["few"],
            images_per_s=round(len(self.dataset.train) * (1 - self.first_step / self.steps) / seconds, 1),
            seconds=round(seconds, 3),
            peak_memory_mb=round(peak_memory_mb(self.ranks.device), 1),
            left_out=len(self.dataset.train) - round(seen.sum()),
            val_standard_error=error,
            time=round(time.time(), 3),
        )
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        self.tally.clear()
        better = result.val_accuracy is not None and (self.best is None or result.val_accuracy > self.best)
        self.best = result.val_accuracy if better else self.best
        due = settings.diagnose_every and (last or self.epoch % settings.diagnose_every == 0)
        diagnosed = diagnosis.lines(self.epoch, self._diagnose(), self.dataset.counts) if due else None
        if self.ranks.first:  # before the checkpoint: a kill between the two repeats the epoch, resuming drops its line
            self.folder.append(result, diagnosed)
        if self.ranks.largest(last or self._worth_saving()):
            self._save(complete=last, best=better)
        elif better and self.ranks.first:
            self.folder.remember_best(self._state(complete=False))
        return result

    def _worth_saving(self) -> bool:
        """Whether so much was done since the last save that another one takes little of the time."""
        patience = min(self.saving / SAVING_SHARE, 60 * self.settings.save_every_minutes)
        return self.ranks.first and time.monotonic() - self.saved_at >= patience

    @torch.inference_mode()
    def _validate(self) -> np.ndarray:
        """(C,) validation accuracy in 0…1 per class; each rank looks at its own share."""
        assert self.val_loader is not None
        labels = self.val_loader.split.labels
        share = np.array_split(np.arange(len(labels)), self.ranks.world)[self.ranks.rank]
        rows = np.array_split(share, max(1, math.ceil(len(share) / 256))) if len(share) else []
        counts = np.zeros((2, len(self.dataset.class_names)))
        self.ranks.take_from_first(self.shown.buffers())
        self.shown.eval()
        bad: list[int] = []
        batches = self.val_loader.batches(rows, unreadable=bad.append if self._may_skip else None)
        try:
            with self.signals.obeyed():
                for asked, pixels in zip(rows, batches, strict=True):
                    with self._autocast():
                        guess = self.shown(self._laid_out(pixels)).argmax(1).cpu().numpy()
                    read = ~np.isin(asked, bad)
                    positions, guess = asked[read], guess[read]
                    np.add.at(counts[0], labels[positions], guess == labels[positions])
                    np.add.at(counts[1], labels[positions], 1)
                    self.kill.before(f"validation-{self.epoch + 1}")
        except Obeyed:
            pass
        if self.ranks.largest(bool(self.signals.received)):
            raise self._saved_and_stopped()
        self.kill.after(f"validation-{self.epoch + 1}")
        correct, seen = self.ranks.total(counts)
        return class_accuracy(correct, seen)

    def _diagnose(self) -> np.ndarray:
        """(3, C) what `diagnosis.class_sums` says of the fixed training images; each rank looks at its own share."""
        share = np.array_split(self.diagnosed, self.ranks.world)[self.ranks.rank]
        rows = np.array_split(share, max(1, math.ceil(len(share) / 256))) if len(share) else []
        self.ranks.take_from_first(self.model.buffers())
        self.learner.eval()
        sums = diagnosis.class_sums(
            self.learner,
            self._read(rows, augmented=False),
            classes=len(self.dataset.class_names),
            autocast=self._autocast,
        )
        return self.ranks.total(sums)

    def _laid_out(self, pixels: Tensor) -> Tensor:
        return pixels.contiguous(memory_format=MEMORY_FORMATS[self.memory_format])

    def _autocast(self) -> AbstractContextManager:
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.ranks.device.type, dtype=self.precision)

    def _agreed_wish(self, step: int) -> int:
        """What all ranks do after this step: go on, save, or save and stop."""
        if self.ranks.world > 1 and self.ranks.device.type == "cuda" and step % AGREE_EVERY:
            return GO_ON
        late = time.monotonic() - self.saved_at > 60 * self.settings.save_every_minutes
        wish = STOP if self.signals.received else SAVE if late and self.ranks.first else GO_ON
        return wish if self.ranks.world == 1 else self.ranks.largest(wish)

    def _saved_and_stopped(self) -> PipelineError:
        self._save(complete=False)
        stop = Terminated(
            f"stopped at epoch {self.epoch + 1}, step {self.step_in_epoch}/{self.steps}; saved in {self.folder.last}: "
            "the same command continues"
        )
        stop.exit_code = self.signals.exit_code
        return stop if self.ranks.first else Elsewhere(stop.exit_code)

    def _save(self, *, complete: bool, best: bool = False) -> None:
        started = time.monotonic()
        tally = self.tally.state(self.ranks)
        if self.ranks.first:
            resume = {"optimiser": self.optimiser.state_dict(), "scaler": self.scaler.state_dict(), **tally}
            if self.average or self.learner.scale is not None:  # what is kept for use is not what training goes on with
                resume["learner"] = self.learner.state_dict()
            if self.average:
                resume["average"] = self.average.learner.state_dict()
            self.folder.save(self._state(complete=complete), resume=resume, best=best)
        self.saved_at = time.monotonic()
        self.saving = self.saved_at - started

    def _state(self, *, complete: bool) -> dict[str, Any]:
        return {
            "model": self.shown.model_state(),
            "config": self.config.model_dump(mode="json"),
            "identity": self.folder.identity | {"backbone.precision": name_of(self.precision)},
            "memory_format": self.memory_format,
            "transform": self.transform.to_dict(),
            "class_names": list(self.dataset.class_names),
            "counts": self.dataset.counts.tolist(),
            "dataset": self.facts,
            "network": self.network,
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "best": self.best,
            "complete": complete,
            "provenance": self.provenance,
        }

    def _choose_arithmetic(self, state: dict[str, Any] | None) -> None:
        """Sets precision and memory format: those of the checkpoint that training resumes from, else what suits the device.

        Ranks take what rank 0 chose, so that a timed trial cannot make them differ.
        """
        device, size = self.ranks.device, self.transform.size
        recorded = recorded_precision(state) if state is not None else None
        if recorded is not None and self.settings.precision == "auto":
            self.precision = choose_precision(recorded, device)
        else:
            operations = forward_operations(self.model, size, device)
            self.precision = choose_precision(self.settings.precision, device, operations=operations)
        self.memory_format = "contiguous"
        if state is not None:
            self.memory_format = state.get("memory_format") or (
                "channels_last" if device.type == "cuda" else "contiguous"
            )
        elif device.type == "cuda" or forward_operations(self.model, size, device) >= SMALL_NETWORK:
            chosen = fastest_memory_format(self.model, size, device, self.precision) if self.ranks.first else ""
            self.memory_format = self.ranks.gathered(chosen)[0]
        self.model.to(memory_format=MEMORY_FORMATS[self.memory_format])
        if self.average:
            self.average.learner.to(memory_format=MEMORY_FORMATS[self.memory_format])
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)

    def _resume(self, overwrite: bool) -> None:
        """Takes up the checkpoint in the folder, if it is of this configuration; else starts anew there."""
        state = self.folder.take_up(self.ranks, overwrite=overwrite)
        self._choose_arithmetic(state)
        self.provenance = provenance(
            command="train-backbone", config=self.config.model_dump(mode="json"), device=str(self.ranks.device),
            ranks=self.ranks.world, threads=torch.get_num_threads(),
            precision=name_of(self.precision), memory_format=self.memory_format, seed=self.settings.seed,
            dataset=self.facts, network=self.network,
        )  # fmt: skip
        if state is not None:
            if "learner" in state:
                self.learner.load_state_dict(state["learner"])
            else:
                self.model.load_state_dict(state["model"])
            if self.average:
                self.average.learner.load_state_dict(state["average"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.scaler.load_state_dict(state["scaler"])
            self.epoch, self.step_in_epoch, self.best = state["epoch"], state["step_in_epoch"], state["best"]
            if self.ranks.first:
                self.tally.load(state)
        if self.ranks.first and self.epoch < self.settings.epochs:
            self.folder.begin(self.provenance, epoch=self.epoch)
        if self.settings.tensorboard:
            self.ranks.together(lambda: self.folder.show_in_tensorboard() if self.ranks.first else None)
