"""What a run says: JSON lines, TensorBoard, a progress line, tables.

Nothing here needs TensorFlow: tensorboardX writes the event files by itself.
"""

import json
import math
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

from rich import box
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from tensorboardX import SummaryWriter

from swat_jax.errors import RunError
from swat_jax.files import replace_text
from swat_jax.jsonable import jsonable

Kind = Literal["train", "eval"]


class MetricsWriter:
    """Writes numbers to `<workdir>/metrics.jsonl` and `<workdir>/tensorboard/`.

    A line reads `{"step": 100, "kind": "train", "loss": 0.25, ...}`. What is not finite becomes
    null, since JSON has no word for it. Every line is on disk when `write` returns, so a killed run
    loses none. With several processes, only one of them may have a writer.

    Args:
      workdir: made where it is missing.

    Raises:
      RunError: the disk is full or cannot be written (every method).

    Example:
      >>> with MetricsWriter("run") as writer:
      ...     writer.truncate(0)
      ...     writer.write(100, {"loss": 0.25, "accuracy": 0.9})
      ...     writer.write(100, {"accuracy": 0.8}, kind="eval")
      >>> len(Path("run/metrics.jsonl").read_text().splitlines())
      2
    """

    def __init__(self, workdir: str | Path) -> None:
        self._lines = Path(workdir) / "metrics.jsonl"
        self._events = Path(workdir) / "tensorboard"
        self._tensorboard: SummaryWriter | None = None
        self._purge_step: int | None = None
        try:
            self._lines.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._lines.open("a", encoding="utf-8")
        except OSError as error:
            raise _cannot_write(self._lines, error) from error

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, Any], kind: Kind = "train") -> None:
        """Adds one line, and one TensorBoard scalar `kind/name` for each finite value.

        Args:
          step: optimizer steps done so far.
          values: name -> number (a Python, numpy or JAX scalar).
          kind: which part of the run the numbers describe.
        """
        numbers = {name: float(value) for name, value in values.items()}
        line = json.dumps(jsonable({"step": int(step), "kind": kind, **numbers}))
        try:
            self._file.write(line + "\n")
            self._file.flush()
            tensorboard = self._open_tensorboard()
            for name, number in numbers.items():
                if math.isfinite(number):  # what is not would only make tensorboardX complain
                    tensorboard.add_scalar(f"{kind}/{name}", number, int(step))
        except OSError as error:
            raise _cannot_write(self._lines, error) from error

    def truncate(self, step: int, *, scored: bool = True) -> None:
        """Drops what was written after `step`, so that a resumed run repeats nothing.

        TensorBoard keeps the old events and is told to hide them. A half-written last line, as a
        killed run may leave it, is dropped too.

        Args:
          step: the step of the checkpoint that the run goes on from; 0 drops all but step 0.
          scored: whether that checkpoint has its scores. Where it has not, the run evaluates it
            again, and a line "eval" of `step` itself is dropped too.
        """
        self._purge_step = step + 1
        try:
            kept = [
                line
                for line in self._lines.read_text(encoding="utf-8").splitlines()
                if _step_of(line) <= step and (scored or not _is_score_of(line, step))
            ]
            self._file.close()
            replace_text(self._lines, "".join(f"{line}\n" for line in kept))
            self._file = self._lines.open("a", encoding="utf-8")
        except OSError as error:
            raise _cannot_write(self._lines, error) from error

    def close(self) -> None:
        """Writes out what TensorBoard's writer still holds, and ends its thread."""
        try:
            self._file.close()
            if self._tensorboard is not None:
                self._tensorboard.close()
        except OSError as error:
            raise _cannot_write(self._events, error) from error

    def _open_tensorboard(self) -> SummaryWriter:
        # Late, so that a `truncate` before the first number reaches the event file's header.
        if self._tensorboard is None:
            self._tensorboard = SummaryWriter(
                str(self._events), purge_step=self._purge_step, flush_secs=10
            )
        return self._tensorboard


def write_json(path: str | Path, value: Any) -> None:
    """Writes a JSON file whole or not at all, even if the process is killed meanwhile.

    Args:
      path: the file; its directory is made where it is missing.
      value: nested dicts, lists, tuples and scalars (numpy's and JAX's too); what is not finite
        becomes null, and a path becomes text.

    Raises:
      RunError: the disk is full or cannot be written; an earlier file of that name is untouched.
      TypeError: the value holds something else.
    """
    path = Path(path)
    text = json.dumps(jsonable(value), indent=2) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)
    except OSError as error:
        raise _cannot_write(path, error) from error


class Progress:
    """One line that says how far training is.

    On a terminal it is a bar that moves; elsewhere it is plain lines, the first and the last update
    and no more than one in `interval` seconds between them.

    Args:
      total_steps: optimizer steps in the whole run.
      start_step: steps that were done before (a resumed run).
      steps_per_epoch: where given, the epoch is shown too.
      stream: where to write; None means standard error.
      interval: seconds between plain lines.

    Example:
      >>> with Progress(1000, start_step=0) as progress:
      ...     progress.update(10, loss=1.5, accuracy=0.4, rate=4000.0)
      ...     progress.message("saved a checkpoint")
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        steps_per_epoch: int | None = None,
        stream: TextIO | None = None,
        interval: float = 10.0,
    ) -> None:
        self._total = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._interval = interval
        # Colours may be asked for elsewhere (FORCE_COLOR), a bar that moves may not.
        is_terminal = (sys.stderr if stream is None else stream).isatty()
        self._console = Console(
            file=stream, stderr=stream is None, highlight=False, force_terminal=is_terminal
        )
        # (time, step) of the last few updates, so compilation soon leaves the time that is left.
        self._recent: deque[tuple[float, int]] = deque(maxlen=20)
        self._said = -math.inf
        self._bar: Bar | None = None
        if self._console.is_terminal:
            # It is redrawn at updates only: no thread that could write in between.
            self._bar = Bar(
                BarColumn(bar_width=14),
                TextColumn("{task.description}"),
                console=self._console,
                auto_refresh=False,
            )
            self._task = self._bar.add_task(
                "compiling ...", total=total_steps, completed=start_step
            )

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
            self._bar.refresh()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, *, loss: float, accuracy: float, rate: float) -> None:
        """Shows the state after `step` optimizer steps.

        Args:
          step: steps done in the whole run.
          loss: of the last steps.
          accuracy: of the last steps, as a fraction.
          rate: images per second of the last steps, without what was no training. The first one
            is not shown: it compiles.
        """
        now = time.monotonic()
        self._recent.append((now, step))
        text = self._describe(step, loss, accuracy, rate)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text, refresh=True)
        elif now - self._said >= self._interval or step >= self._total:
            self._said = now
            self._print(text)

    def message(self, text: str) -> None:
        """Prints a line of its own, above the bar where there is one."""
        self._print(text)

    def _print(self, text: str) -> None:
        # A narrow or unknown width must not break a line in two: whoever reads a log greps lines.
        self._console.print(text, soft_wrap=True, markup=False)

    def _describe(self, step: int, loss: float, accuracy: float, rate: float) -> str:
        narrow = self._bar is not None  # the bar has to fit beside the text in 80 columns
        parts = []
        if self._steps_per_epoch:
            epochs = math.ceil(self._total / self._steps_per_epoch)
            parts.append(f"epoch {max(1, math.ceil(step / self._steps_per_epoch))}/{epochs}")
        if not (narrow and parts):
            parts.append(f"step {step}/{self._total}")
        parts += [f"loss {loss:.4f}", f"{'acc' if narrow else 'accuracy'} {accuracy:.1%}"]
        (start, first), (end, last) = self._recent[0], self._recent[-1]
        if last > first:
            # Of all that was done meanwhile: evaluations and checkpoints are still to come too.
            left = (self._total - step) * (end - start) / (last - first)
            unit = "img/s" if narrow else "images/s"
            parts += [f"{format_rate(rate)} {unit}", f"{format_seconds(left)} left"]
        return "  ".join(parts)


class LayerRow(NamedTuple):
    """One line of the per-layer table; sparsities are fractions, None where there is none.

    The measured activation sparsity counts every zero that the layer was given, ReLU's too; the
    measured weight sparsity is that of the masked weights.
    """

    path: str
    kernel_shape: Sequence[int]
    weight_sparsity: float
    measured_weight_sparsity: float | None
    activation_sparsity: float
    measured_activation_sparsity: float | None


def layer_table(rows: Sequence[LayerRow], title: str = "Sparsity by layer") -> str:
    """The per-layer table: what was asked for beside what was measured.

    Args:
      rows: one for each layer, in order of execution.
      title: above the table.

    Returns:
      Plain text, lines no longer than the names make them.
    """
    weights = sum(math.prod(row.kernel_shape) for row in rows)
    body = [
        [
            row.path,
            "x".join(map(str, row.kernel_shape)),
            f"{math.prod(row.kernel_shape):,}",
            _percent(row.weight_sparsity),
            _percent(row.measured_weight_sparsity),
            _percent(row.activation_sparsity),
            _percent(row.measured_activation_sparsity),
        ]
        for row in rows
    ]
    total = [
        "all",
        "",
        f"{weights:,}",
        *(_percent(_weight_mean(rows, name)) for name in LayerRow._fields[2:4]),
        "-",
        "-",
    ]
    return table(
        title,
        ("layer", "kernel", "weights", "W asked", "W measured", "A asked", "A measured"),
        [*body, total],
    )


# Key of result.json -> what the final table calls it, and how it writes the number.
_RESULTS: tuple[tuple[str, str, str], ...] = (
    ("test_accuracy", "test accuracy, masked", "percent"),
    ("pruned_test_accuracy", "test accuracy, hard-pruned", "percent"),
    ("dense_master_accuracy", "test accuracy, without masks", "percent"),
    ("final_loss", "final loss", "number"),
    ("weight_sparsity", "weight sparsity", "percent"),
    ("activation_sparsity", "activation sparsity", "percent"),
    ("training_flop_reduction", "training FLOP reduction", "of 100"),
    ("seconds", "time", "seconds"),
    ("images_per_second", "images per second", "rate"),
)


def final_table(results: Mapping[str, Mapping[str, Any]], title: str = "Result") -> str:
    """What came out, one column for each run.

    Args:
      results: name of the run (such as its method) -> the contents of its `result.json`.
        Accuracies and sparsities are fractions, the FLOP reduction is in percent. A key that no run
        has is left out; what is None or missing in some is a dash.
      title: above the table.

    Returns:
      Plain text.

    Example:
      >>> "98.61 %" in final_table({"u90": {"pruned_test_accuracy": 0.9861}})
      True
    """
    body = []
    for key, name, form in _RESULTS:
        values = [result.get(key) for result in results.values()]
        if any(value is not None for value in values):
            body.append([name, *(_result(value, form) for value in values)])
    return table(title, ("", *results), body)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain-text table: the first column to the left, the others to the right.

    Args:
      title: above the table.
      columns: the heads.
      rows: text, as many cells as there are columns.

    Returns:
      Lines without trailing newline; as wide as the cells need, whatever the terminal's width.
    """
    grid = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="")
    for index, name in enumerate(columns):
        grid.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        grid.add_row(*row)
    console = Console(file=StringIO(), width=10_000, color_system=None, markup=False)
    with console.capture() as capture:
        console.print(grid)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    return "\n".join(line for line in lines if line)


def format_seconds(seconds: float) -> str:
    """`0:05`, `12:40`, `3:07:09`."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_rate(rate: float) -> str:
    """`12,346`, `0.74`: two digits at least, for networks that are slow on a CPU."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _result(value: Any, form: str) -> str:
    if value is None:
        return "-"
    match form:
        case "percent":
            return _percent(value)
        case "of 100":
            return f"{value:.1f} %"
        case "seconds":
            return format_seconds(value)
        case "rate":
            return format_rate(value)
        case _:
            return f"{value:.4f}"


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.2f} %"


def _weight_mean(rows: Sequence[LayerRow], name: str) -> float | None:
    """Over all weights of the layers that have the figure."""
    known = [(math.prod(row.kernel_shape), getattr(row, name)) for row in rows]
    known = [(size, value) for size, value in known if value is not None]
    weights = sum(size for size, _ in known)
    return sum(size * value for size, value in known) / weights if known else None


def _step_of(line: str) -> float:
    """The line's step; infinity where it is not a whole line."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _is_score_of(line: str, step: int) -> bool:
    values = json.loads(line)
    return values["step"] == step and values["kind"] == "eval"


def _cannot_write(path: Path, error: OSError) -> RunError:
    return RunError(
        f"cannot write {path}: {error.strerror or error}; make room there and run again"
    )
