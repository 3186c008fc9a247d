"""Stage 1: an encoder and a linear classifier trained with cross-entropy, under DDP or alone.

Everything random is a function of (seed, epoch, step, sample), so a resumed run continues exactly and the rank count
only changes floating-point order.
"""

import json
import math
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from cache import write_durably
from pipeline import distributed
from pipeline.backbone import checkpoint
from pipeline.backbone.events import Begin, Epoch, Event, Step, TrainResult
from pipeline.backbone.model import build_model, check_input, class_accuracy, input_transform, network_facts
from pipeline.config import Config
from pipeline.data import Dataset, load_dataset
from pipeline.data.transform import Loader
from pipeline.distributed import GO_ON, SAVE, STOP, Ranks, Signals
from pipeline.errors import ConfigError, DataError, PipelineError, Terminated
from pipeline.metrics import group_means
from pipeline.provenance import provenance
from pipeline.seeds import derive

UNREADABLE = -100  # label of a black image that stands for one that cannot be read
AGREE_EVERY = 20  # steps between two looks at signals and clocks where looking costs a collective


def train_backbone(
    config: Config,
    *,
    out: Path,
    device: str = "auto",
    overwrite: bool = False,
    report: Callable[[Event], None] = lambda event: None,
) -> TrainResult:
    """Trains the backbone of a configuration, or goes on; writes last.pt, best.pt, metrics.jsonl and run.json into `out`.

    report is called on rank 0 with Begin, Step and Epoch. Raises DataError (data, damaged checkpoint), ConfigError (a
    checkpoint of another configuration in `out`), Terminated (SIGTERM or Ctrl-C, checkpoint saved).
    """
    started = time.perf_counter()
    with distributed.ranks(device) as ranks, Signals() as signals:
        dataset = ranks.together(lambda: load_dataset(config.data))
        trainer = Trainer(config, dataset, out=out, ranks=ranks, signals=signals, overwrite=overwrite)
        before = trainer.epoch
        for event in trainer.run():
            if ranks.first:
                report(event)
        return TrainResult(
            checkpoint=out / "last.pt",
            epochs=config.backbone.epochs,
            trained_epochs=trainer.epoch - before,
            network=trainer.network,
            dataset=trainer.facts,
            last=_last_line(out / "metrics.jsonl"),
            best_val_accuracy=trainer.best,
            seconds=round(time.perf_counter() - started, 2),
        )


class Trainer:
    """The state of one training: model, optimiser, and how far it has come."""

    def __init__(self, config: Config, dataset: Dataset, *, out: Path, ranks: Ranks, signals: Signals, overwrite: bool):
        self.config, self.dataset, self.out, self.ranks, self.signals = config, dataset, out, ranks, signals
        settings = config.backbone
        self.transform = input_transform(config.data, settings, dataset.train)
        self.facts = dataset.summary()
        if settings.batch_size < ranks.world:
            raise ConfigError(
                f"backbone.batch_size={settings.batch_size} is less than the {ranks.world} ranks; take fewer ranks"
            )
        device = ranks.device
        cuda = device.type == "cuda"
        self.precision = choose_precision(settings.precision, device)
        if cuda:
            torch.set_float32_matmul_precision("high")
        # channels_last is slower on a CPU for small networks
        self.memory_format = torch.channels_last if cuda else torch.contiguous_format
        self.model = build_model(settings, num_classes=len(dataset.class_names)).to(device)
        self.model.to(memory_format=self.memory_format)
        check_input(self.model, self.transform, device)
        self.network = network_facts(settings, self.model)
        self.optimiser = torch.optim.SGD(
            self.model.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.epoch, self.step_in_epoch, self.best = 0, 0, None  # type: int, int, float | None
        self.sums = np.zeros(3)  # loss, correct, seen of the epoch so far, this rank's share
        self._resume(overwrite)
        self.parallel: nn.Module = self.model
        if ranks.world > 1:
            self.parallel = DistributedDataParallel(
                self.model, device_ids=[device.index] if cuda else None, gradient_as_bucket_view=True
            )
        self.train_loader = Loader(dataset.train, self.transform, device=device, workers=config.data.workers)
        self.val_loader = (
            Loader(dataset.val, self.transform, device=device, workers=config.data.workers) if dataset.val else None
        )

    @property
    def _may_skip(self) -> bool:
        return self.config.dump.on_error == "skip"

    @property
    def steps(self) -> int:
        """Optimiser steps an epoch: every image once, in batches of equal size (±1), none dropped."""
        return max(1, math.ceil(len(self.dataset.train) / self.config.backbone.batch_size))

    def run(self) -> Iterator[Event]:
        """Trains to the end, yielding what happens; saves after every epoch, every few minutes, and on SIGTERM."""
        epochs = self.config.backbone.epochs
        yield Begin(
            self.network, self.facts, str(self.ranks.device), str(self.precision).removeprefix("torch."), self.ranks.world,
            self.epoch, epochs, self.steps,
        )  # fmt: skip
        self.saved_at = time.monotonic()
        cuda = [self.ranks.device] if self.ranks.device.type == "cuda" else []
        while self.epoch < epochs:
            with torch.random.fork_rng(
                devices=cuda
            ):  # dropout and the like are seeded per step, nobody else's generator moves
                yield from self._train_epoch()
            yield self._finish_epoch()

    def _train_epoch(self) -> Iterator[Step]:
        settings, ranks = self.config.backbone, self.ranks
        self.epoch_started, self.first_step = time.perf_counter(), self.step_in_epoch
        order = np.random.default_rng(derive(settings.seed, "order", self.epoch)).permutation(len(self.dataset.train))
        batches = np.array_split(order, self.steps)[self.step_in_epoch :]
        mine = [np.array_split(batch, ranks.world)[ranks.rank] for batch in batches]
        bad: list[int] = []
        key = derive(settings.seed, "augment", self.epoch)
        images = self.train_loader.batches(mine, key=key, unreadable=bad.append if self._may_skip else None)
        sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)
        sums += torch.from_numpy(self.sums).to(ranks.device)
        self.parallel.train()
        for batch, rows, pixels in zip(batches, mine, images, strict=True):
            step = self.epoch * self.steps + self.step_in_epoch
            torch.manual_seed(derive(settings.seed, "step", step, ranks.rank))
            for group in self.optimiser.param_groups:
                group["lr"] = learning_rate(step, steps=self.steps, settings=settings)
            known = np.where(np.isin(rows, bad), UNREADABLE, self.dataset.train.labels[rows])
            wanted = torch.from_numpy(known).to(ranks.device)
            bad.clear()
            with self._autocast():
                logits = self.parallel(pixels.contiguous(memory_format=self.memory_format))
            loss_sum = F.cross_entropy(logits.float(), wanted, reduction="sum", ignore_index=UNREADABLE)
            self.optimiser.zero_grad(set_to_none=True)
            self.scaler.scale(loss_sum * (ranks.world / len(batch))).backward()  # DDP averages over ranks
            self.scaler.step(self.optimiser)
            self.scaler.update()
            sums += torch.stack(
                [
                    loss_sum.detach().double(),
                    (logits.argmax(1) == wanted).sum().double(),
                    (wanted != UNREADABLE).sum().double(),
                ]
            )
            self.step_in_epoch += 1
            _kill_armed_at(step)
            yield Step(self.epoch, self.step_in_epoch, self.steps)
            wish = self._agreed_wish(step)
            if wish != GO_ON:
                self.sums = sums.cpu().numpy()
                self._save(complete=False)
                if wish == STOP:
                    raise self._stopped()
        self.sums = sums.cpu().numpy()

    def _finish_epoch(self) -> Epoch:
        settings = self.config.backbone
        loss, correct, seen = self.ranks.total(self.sums).tolist()
        if not seen:
            raise DataError(f"{self.dataset.name}: not one training image could be read; --on-error fail says why")
        if not math.isfinite(loss):
            raise PipelineError(
                f"epoch {self.epoch + 1}: the loss is {loss}; {self.out / 'last.pt'} holds the epoch before; lower backbone.lr "
                f"(now {settings.lr}) or set backbone.warmup_epochs, and train with --overwrite"
            )
        seconds = time.perf_counter() - self.epoch_started
        last = self.epoch + 1 == settings.epochs
        val: dict[str, float | None] = dict.fromkeys(("all", "many", "medium", "few"))
        if self.val_loader is not None and (last or (self.epoch + 1) % settings.validate_every == 0):
            val = group_means(self._validate(), self.dataset.counts)
        result = Epoch(
            epoch=self.epoch + 1,
            epochs=settings.epochs,
            lr=learning_rate((self.epoch + 1) * self.steps - 1, steps=self.steps, settings=settings),
            loss=loss / seen,
            train_accuracy=100 * correct / seen,
            val_accuracy=val["all"],
            val_many=val["many"],
            val_medium=val["medium"],
            val_few=val["few"],
            images_per_s=round(len(self.dataset.train) * (1 - self.first_step / self.steps) / seconds, 1),
            seconds=round(seconds, 3),
            peak_memory_mb=round(peak_memory_mb(self.ranks.device), 1),
            left_out=len(self.dataset.train) - round(seen),
        )
        self.epoch, self.step_in_epoch, self.sums = self.epoch + 1, 0, np.zeros(3)
        better = result.val_accuracy is not None and (self.best is None or result.val_accuracy > self.best)
        self.best = result.val_accuracy if better else self.best
        if (
            self.ranks.first
        ):  # the line first: a kill between the two only repeats the epoch, and resuming drops its line
            with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(result)) + "\n")
        self._save(complete=last, best=better)
        return result

    @torch.inference_mode()
    def _validate(self) -> np.ndarray:
        """(C,) validation accuracy in 0…1 per class; each rank looks at its own share."""
        assert self.val_loader is not None
        labels = self.val_loader.split.labels
        share = np.array_split(np.arange(len(labels)), self.ranks.world)[self.ranks.rank]
        rows = np.array_split(share, max(1, math.ceil(len(share) / 256))) if len(share) else []
        counts = np.zeros((2, len(self.dataset.class_names)))
        self.model.eval()
        bad: list[int] = []
        batches = self.val_loader.batches(rows, unreadable=bad.append if self._may_skip else None)
        for asked, pixels in zip(rows, batches, strict=True):
            with self._autocast():
                guess = self.model(pixels.contiguous(memory_format=self.memory_format)).argmax(1).cpu().numpy()
            read = ~np.isin(asked, bad)
            positions, guess = asked[read], guess[read]
            np.add.at(counts[0], labels[positions], guess == labels[positions])
            np.add.at(counts[1], labels[positions], 1)
        correct, seen = self.ranks.total(counts)
        return class_accuracy(correct, seen)

    def _autocast(self):
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.ranks.device.type, dtype=self.precision)

    def _agreed_wish(self, step: int) -> int:
        """What all ranks do after this step: go on, save, or save and stop."""
        if self.ranks.world > 1 and self.ranks.device.type == "cuda" and step % AGREE_EVERY:
            return GO_ON
        late = time.monotonic() - self.saved_at > 60 * self.config.backbone.save_every_minutes
        wish = STOP if self.signals.received else SAVE if late and self.ranks.first else GO_ON
        return wish if self.ranks.world == 1 else self.ranks.largest(wish)

    def _stopped(self) -> Terminated:
        stop = Terminated(
            f"stopped at epoch {self.epoch + 1}, step {self.step_in_epoch}/{self.steps}; saved in {self.out / 'last.pt'}: "
            "the same command continues"
        )
        stop.exit_code = self.signals.exit_code
        return stop

    def _save(self, *, complete: bool, best: bool = False) -> None:
        sums = self.ranks.total(self.sums)
        if self.ranks.first:
            state = {
                "model": self.model.state_dict(),
                "config": self.config.model_dump(mode="json"),
                "identity": self._identity(),
                "transform": self.transform.to_dict(),
                "class_names": list(self.dataset.class_names),
                "counts": self.dataset.counts.tolist(),
                "dataset": self.facts,
                "network": self.network,
                "epoch": self.epoch,
                "step_in_epoch": self.step_in_epoch,
                "sums": sums.tolist(),
                "best": self.best,
                "complete": complete,
                "provenance": self.provenance,
            }
            if best:
                checkpoint.save(self.out / "best.pt", state)
            checkpoint.save(
                self.out / "last.pt",
                state | {"optimiser": self.optimiser.state_dict(), "scaler": self.scaler.state_dict()},
            )
        self.saved_at = time.monotonic()

    def _identity(self) -> dict[str, Any]:
        """What decides the result: two checkpoints that differ in any of it are different trainings."""
        backbone = self.config.backbone.model_dump(
            mode="json", exclude={"save_every_minutes", "validate_every", "pretrained"}
        )
        images = {
            "dataset": self.dataset.fingerprint,
            "transform": json.dumps(self.transform.to_dict(), sort_keys=True),
        }
        return {f"backbone.{key}": value for key, value in backbone.items()} | {
            f"data ({key})": value for key, value in images.items()
        }

    def _resume(self, overwrite: bool) -> None:
        """Takes up the checkpoint in `out`, if it is of this configuration; else starts anew there."""
        path = self.out / "last.pt"
        self.provenance = provenance(
            command="train-backbone", config=self.config.model_dump(mode="json"), device=str(self.ranks.device),
            ranks=self.ranks.world, threads=torch.get_num_threads(),
            precision=str(self.precision).removeprefix("torch."), seed=self.config.backbone.seed,
            dataset=self.facts, network=self.network,
        )  # fmt: skip
        if overwrite and self.ranks.first:
            for name in ("last.pt", "best.pt", "metrics.jsonl"):
                (self.out / name).unlink(missing_ok=True)
        self.ranks.barrier()
        if path.is_file():
            state = checkpoint.read(path)
            self._refuse_other(path, state.get("identity", {}))
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.scaler.load_state_dict(state["scaler"])
            self.epoch, self.step_in_epoch, self.best = state["epoch"], state["step_in_epoch"], state["best"]
            self.sums = np.array(state["sums"]) if self.ranks.first else np.zeros(3)
        self.ranks.barrier()
        if self.ranks.first:
            self.out.mkdir(parents=True, exist_ok=True)
            write_durably(self.out / "run.json", json.dumps(self.provenance, indent=1))
            write_durably(self.out / "metrics.jsonl", "".join(_lines_until(self.out / "metrics.jsonl", self.epoch)))

    def _refuse_other(self, path: Path, theirs: dict[str, Any]) -> None:
        mine = self._identity()
        differing = [k for k in mine | theirs if mine.get(k) != theirs.get(k)]
        if differing:
            shown = "; ".join(f"{k} was {_short(theirs.get(k))}, now {_short(mine.get(k))}" for k in differing)
            raise ConfigError(
                f"{path} is of another training: {shown}. Take another --out, or --overwrite to start anew"
            )


def learning_rate(step: int, *, steps: int, settings: Any) -> float:
    """Linear warm-up, then cosine to 0 (Loshchilov and Hutter, 2017), per step; a pure function of the step."""
    warm, total = settings.warmup_epochs * steps, settings.epochs * steps
    if step < warm:
        return settings.lr * (step + 1) / (warm + 1)
    return 0.5 * settings.lr * (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1)))


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where a GPU computes in it, float16 on older GPUs, float32 on a CPU. ConfigError for half there."""
    if device.type == "cpu":
        if wanted in ("auto", "float32"):
            return torch.float32
        raise ConfigError(f"backbone.precision={wanted}: only for GPUs; on a CPU take float32 or auto")
    if wanted == "auto":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return getattr(torch, wanted)


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MiB: allocated on the GPU, else resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _kill_armed_at(step: int) -> None:
    """Dies as by `kill -9` after the step named in PIPELINE_KILL_AFTER_STEP: how tests prove that resuming is exact."""
    if os.environ.get("PIPELINE_KILL_AFTER_STEP") == str(step):
        os.kill(os.getpid(), 9)


def _lines_until(path: Path, epoch: int) -> list[str]:
    """The metric lines of epochs that the checkpoint has; a torn last line is dropped."""
    if not path.is_file():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if json.loads(line)["epoch"] <= epoch and line.endswith("\n"):
                kept.append(line)
        except ValueError:
            continue
    return kept


def _last_line(path: Path) -> dict[str, Any] | None:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return json.loads(lines[-1]) if lines else None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"
