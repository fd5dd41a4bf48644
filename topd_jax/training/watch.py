"""Alarms: numbers of a step that say that a run goes wrong, each by name.

Judged on the host from the metrics that a step logs, once they are known: no
step waits for an alarm. Entropies are known where ``log.statistics_every``
asks for them. An update that is not finite was left out by the step itself;
every other alarm changes nothing in the run.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from topd_jax.training.config import GuardSettings

# Compared with the last steps, because they fall as a run learns; and with the
# large ones among them, because a few among many small ones are usual.
_SPIKES = {"loss": "loss_spike", "grad_norm": "gradient_spike"}
_LARGE = 0.9  # quantile
# Compared with the first steps, because they may go wrong slowly.
_RISES = {"truncated": "truncation", "repetition": "repetition"}
# Nats a token that only log 0 in place of a probability explains.
_IMPOSSIBLE = 1e9
Row = Mapping[str, Any]


class Alarm(NamedTuple):
    """What went wrong in a step.

    Attributes:
      step: it happened in.
      name: the kind of alarm.
      text: the numbers behind it.
      metrics: of the step.
    """

    step: int
    name: str
    text: str
    metrics: Row


class Watch:
    """What is known of a run's numbers so far.

    Attributes:
      counts: name of an alarm -> steps that raised it.
      fresh: the first alarms of their names, until someone takes them.
      in_a_row: updates left out without one between them, up to now.
      last_skipped: the alarm of the newest of them.
      hopeless: whether there were ever more of them than allowed.
    """

    def __init__(self, settings: GuardSettings, max_skipped: int) -> None:
        """Start.

        Args:
          settings: of the alarms.
          max_skipped: updates in a row that may be left out.
        """
        self._settings, self._most = settings, max_skipped
        self.set_state(None)

    @property
    def state(self) -> dict[str, Any]:
        """What a run that resumes has to know, JSON-able."""
        known = {name: list(values) for name, values in self._known.items()}
        return {"counts": dict(self.counts), "known": known}

    def set_state(self, state: Row | None) -> None:
        """Go on from a checkpoint.

        Args:
          state: what :attr:`state` was there; None: nothing is known yet.
        """
        state = state or {"counts": {}, "known": {}}
        self.counts = dict(state["counts"])
        self._known = {k: list(v) for k, v in state["known"].items()}
        self.fresh: list[Alarm] = []
        self.in_a_row, self.hopeless = 0, False
        self.last_skipped: Alarm | None = None

    def look(self, step: int, row: Row) -> list[Alarm]:
        """Judge the metrics of the next step.

        Args:
          step: of the metrics.
          row: name -> number, None where it is not finite.

        Returns:
          The alarms of the step; those whose name is new are in
          :attr:`fresh` too.
        """
        alarms = [Alarm(step, *found, row) for found in self._alarms(row)]
        for alarm in alarms:
            if alarm.name not in self.counts:
                self.fresh.append(alarm)
            self.counts[alarm.name] = self.counts.get(alarm.name, 0) + 1
            if alarm.name == "non_finite":
                self.last_skipped = alarm
        skipped = bool(row.get("skipped"))
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self.hopeless |= self.in_a_row > self._most
        return alarms

    def _alarms(self, row: Row) -> Iterator[tuple[str, str]]:
        if row.get("skipped"):
            yield "non_finite", "loss or gradient; the update is left out"
        if row.get("num_tokens") == 0:
            yield "no_tokens", "the batch has no token to learn from"
            return
        if row.get("length_mean") == 1:
            yield "all_eos", "every completion ends with its first token"
        loss = row.get("teacher_token_loss", 0.0)
        if loss is None or loss > _IMPOSSIBLE:
            size = "not finite" if loss is None else f"{loss:.3g} nats a token"
            yield "teacher_impossible", f"the teacher's own loss is {size}"
        factor, rise = self._settings.factor, self._settings.rise
        for name, alarm in _SPIKES.items():
            value, usual = self._compared(row, name, keep="last")
            if usual is not None and abs(value) > factor * usual:
                yield alarm, f"{value:.3g}, lately {usual:.3g}"
        for name, alarm in _RISES.items():
            value, usual = self._compared(row, name, keep="first")
            if usual is not None and value > usual + rise:
                yield alarm, f"{value:.2f} of all, at the start {usual:.2f}"
        entropy, teacher = (
            row.get("student_entropy"),
            row.get("teacher_entropy"),
        )
        if None not in (entropy, teacher) and entropy < teacher / factor:
            text = f"{entropy:.3g} nats a token, the teacher's {teacher:.3g}"
            yield "entropy_collapse", text

    def _compared(
        self, row: Row, name: str, keep: str
    ) -> tuple[float, float | None]:
        """Return a number and what it is compared with, and remember it.

        The second is None until as many steps are known as are compared with.
        """
        value, window = row.get(name), self._settings.window
        if value is None:
            return 0.0, None
        known = self._known.setdefault(name, [])
        if len(known) < window:
            known.append(abs(value))
            return value, None
        quantile = _LARGE if keep == "last" else 0.5
        usual = float(np.quantile(known, quantile))
        if keep == "last":
            self._known[name] = [*known[1:], abs(value)]
        return value, usual
