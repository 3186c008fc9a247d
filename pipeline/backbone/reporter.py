"""The lines and the progress bar of a training."""

import time
from dataclasses import asdict

from pipeline.backbone.events import Begin, Epoch, Event, Step, pace, short_accuracies
from pipeline.console import LINE_EVERY, Bar, Talk, clock, describe_dataset


class TrainingReporter:
    """A callback for the events of a training.

    Arguments:
        brief: leave out data and network, which an earlier training of the same command has shown.
    """

    def __init__(self, talk: Talk, bar: Bar, *, brief: bool = False):
        self.talk, self.bar, self.brief = talk, bar, brief
        self.epochs, self.printed_at, self.seconds_left, self.note = 0, 0.0, 0.0, ""
        self.started: float | None = None
        self.first_step = 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, Begin):
            self._begin(event)
        elif isinstance(event, Step):
            self._step(event)
        else:
            self._epoch(event)

    def _begin(self, event: Begin) -> None:
        self.epochs, network = event.epochs, event.network
        if not self.brief:
            self.talk.say(describe_dataset(event.dataset))
            self.talk.say(
                f"network: {network['network']}, {network['parameters']:,} parameters, {network['feature_width']}-d "
                f"features; {event.device}, {event.precision}, {event.ranks} rank(s)"
            )
        self.talk.notes(event.notes)
        if event.first_epoch >= event.epochs:
            self.talk.say("already trained to the end")
            return
        self.talk.say("accuracies: mean over classes (many/medium/few)")
        if event.first_epoch:
            self.talk.say(f"continuing after epoch {event.first_epoch}/{event.epochs}")

    def _step(self, event: Step) -> None:
        done, total = event.epoch * event.steps + event.step, self.epochs * event.steps
        if self.started is None:
            self.started, self.first_step = time.monotonic(), done
        self.seconds_left = (time.monotonic() - self.started) / max(1, done - self.first_step) * (total - done)
        self.bar.move(done, total, f"epoch {event.epoch + 1}{self.note}")

    def _epoch(self, event: Epoch) -> None:
        line = asdict(event)
        val = f"  val {text}" if (text := short_accuracies(line, "val")) else ""
        self.note = f"  loss {event.loss:.3f}{val}  {pace(line)}"
        moment = time.monotonic()
        if event.epoch < event.epochs and event.seconds < LINE_EVERY and moment - self.printed_at < LINE_EVERY:
            return  # short epochs: not every one is worth a line, metrics.jsonl has them all
        self.printed_at = self.bar.said_at = moment
        left_out = f"  ({event.left_out} unreadable images left out)" if event.left_out else ""
        self.talk.say(
            f"epoch {event.epoch}/{event.epochs}  loss {event.loss:.3f}  train {short_accuracies(line, 'train') or '–'}"
            f"{val}  {pace(line)}  {clock(self.seconds_left)} left{left_out}"
        )
