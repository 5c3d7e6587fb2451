"""Progress of training for people: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


class ProgressDisplay:
    """What a training run prints while it goes.

    Args:
        first_step: the number of slow steps that have been taken already.
        num_steps: the number of slow steps in all.
        has_bar: whether a bar is shown on a terminal; if not, plain lines are printed there too.
    """

    def __init__(self, first_step: int, num_steps: int, has_bar: bool = True) -> None:
        is_shown = has_bar and sys.stderr.isatty()
        self.bar = tqdm(total=num_steps, initial=first_step, unit="step", disable=not is_shown, leave=False)
        self.num_steps = num_steps
        self._num_taken, self._seconds = 0, 0.0

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def step(self, record: dict[str, Any] | None, seconds: float) -> None:
        """Count a step that took so long; `record` is its line of metrics, if it has one."""
        self.bar.update()
        self._num_taken += 1
        self._seconds += seconds
        if record is None:
            return
        text = f"{loss_text(record)}, {record['tokens_per_second']:,.0f} tokens/s"
        if self.bar.disable:
            # By all steps: the last few tell more of what else the machine does.
            left = time_text((self.num_steps - record["step"]) * self._seconds / self._num_taken)
            print(f"step {record['step']}/{self.num_steps}: {text}, {left} left", flush=True)
        else:
            self.bar.set_postfix_str(text)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def loss_text(record: dict[str, Any]) -> str:
    """The loss in a line of metrics, in the unit of all figures where it is one: bits per byte."""
    bits = record.get("bits_per_byte")
    if bits is not None:
        nats = record["nelbo_nats_per_token"]
        nats = record["nll_nats_per_token"] if nats is None else nats
        return f"{bits:.3f} bits/byte ({nats:.3f} nats/token)"
    joint = record.get("neg_log_joint_nats_per_token")
    of_joint = "" if joint is None else f", with log p(z) {joint:.3f}"
    return f"{record['nll_nats_per_token']:.3f} nats/token given z{of_joint}"


def time_text(seconds: float) -> str:
    """A time in words, such as 5 s, 3 min 20 s or 2 h 05 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
