"""What a run says of itself: progress, metrics.jsonl, TensorBoard, a plot.

`metrics.jsonl` holds one object a line; a resumed run cuts off what lies after
the step from which it goes on, so that the file is that of a run that never
stopped.
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import time
from typing import Any

from absl import logging
import jax

from prompt_jax import checkpoints


@dataclasses.dataclass
class Window:
  """Sums over the steps since the last line of the log."""

  sums: dict[str, float] = dataclasses.field(default_factory=dict)
  steps: int = 0
  rows: int = 0

  def add(self, metrics: Mapping[str, Any], rows: int) -> None:
    """Takes one step in."""
    for name, value in metrics.items():
      self.sums[name] = self.sums.get(name, 0.0) + float(value)
    self.steps += 1
    self.rows += rows

  def saved(self) -> dict[str, Any]:
    """What a checkpoint keeps, so that a window may span a stop."""
    return dataclasses.asdict(self)

  def means(self) -> dict[str, float]:
    """Of the steps, and of the tokens; empties the window."""
    steps, sums = max(self.steps, 1), self.sums
    tokens = max(sums.get('target_tokens', 0.0), 1.0)
    out = {
      'loss': sums.get('loss', 0.0) / steps,
      'z_loss': sums.get('z_loss', 0.0) / steps,
      'token_accuracy': 100 * sums.get('correct_tokens', 0.0) / tokens,
      'target_tokens': sums.get('target_tokens', 0.0),
      'grad_norm': sums.get('grad_norm', 0.0) / steps,
      'learning_rate': sums.get('learning_rate', 0.0) / steps,
    }
    self.sums, self.steps, self.rows = {}, 0, 0
    return out


class Reporter:
  """Writes the files of a run, on process 0, and shows its progress."""

  def __init__(
    self, directory: pathlib.Path, step: int, total_steps: int, task: str
  ):
    """Opens the files and cuts off what lies after `step`.

    Args:
      directory: of the run.
      step: from which the run goes on.
      total_steps: at which it ends.
      task: name of the mixture or task that is trained.
    """
    self.directory, self.total_steps, self.task = directory, total_steps, task
    self.last_evaluation: dict[str, dict[str, float]] = {}
    self._main = jax.process_index() == 0
    self._path = directory / 'metrics.jsonl'
    self._bar: Any = None
    self._events: Any = None
    self._since = (time.monotonic(), step)
    if self._main:
      _cut(self._path, step)
      self._recall()
      self._events = _Events(directory / 'tensorboard', step)

  def _recall(self) -> None:
    """The last evaluation of the part of the run that is on the disk."""
    if not self._path.exists():
      return
    for line in read_metrics(self._path):
      if line['split'] != 'train':
        values = {k: line[k] for k in tuple(line)[3:]}
        self.last_evaluation[line['task']] = values

  @contextlib.contextmanager
  def progress(self, step: int) -> Iterator[None]:
    """A bar on a terminal; lines of the log are enough elsewhere."""
    self._since = (time.monotonic(), step)
    if self._main and sys.stderr.isatty():
      from tqdm import tqdm

      self._bar = tqdm(
        total=self.total_steps, initial=step, unit='step', smoothing=0.1
      )
    try:
      yield
    finally:
      if self._bar is not None:
        self._bar.close()
        self._bar = None

  def tick(self, step: int) -> None:
    """One more step is done."""
    if self._bar is not None:
      self._bar.update(step - self._bar.n)

  def train(self, step: int, window: Window) -> None:
    """A line on the steps since the last one."""
    now = time.monotonic()
    rows, steps = window.rows, window.steps
    before, first = self._since
    rate = (step - first) / max(now - before, 1e-9)
    self._since = (now, step)
    values = window.means()
    values['steps_per_second'] = rate
    values['examples_per_second'] = rate * rows / max(steps, 1)
    self._write(step, 'train', self.task, values)
    left = (self.total_steps - step) / max(rate, 1e-9)
    if self._bar is not None:
      self._bar.set_postfix_str(
        f'loss {values["loss"]:.4g}, '
        f'{values["examples_per_second"]:.1f} examples/s'
      )
      return
    logging.info(
      'step %d/%d: loss %.5g, token accuracy %.1f %%, %.2f steps/s, '
      '%.1f examples/s, %s left',
      step,
      self.total_steps,
      values['loss'],
      values['token_accuracy'],
      rate,
      values['examples_per_second'],
      _duration(left),
    )

  def evaluation(
    self, step: int, split: str, found: Mapping[str, Mapping[str, float]]
  ) -> None:
    """A line for each task."""
    self.last_evaluation = {k: dict(v) for k, v in found.items()}
    for task, values in found.items():
      self._write(step, split, task, values)
      text = ', '.join(f'{k} {v:.5g}' for k, v in values.items())
      logging.info('step %d, %s (%s): %s', step, task, split, text)
    # What an evaluation takes is no part of the training speed.
    self._since = (time.monotonic(), step)

  def _write(
    self, step: int, split: str, task: str, values: Mapping[str, float]
  ) -> None:
    if not self._main:
      return
    line = {'step': step, 'split': split, 'task': task, **values}
    try:
      with open(self._path, 'a') as f:
        f.write(json.dumps(line) + '\n')
      self._events.add(step, f'{split}/{task}', values)
    except OSError as e:
      raise checkpoints.CheckpointError(
        f'{self._path} could not be written: {e.strerror or e}. The last '
        'checkpoint is untouched; free some space and start again.'
      ) from e

  def close(self) -> None:
    """Closes the files and draws the curves."""
    if not self._main:
      return
    self._events.close()
    draw(self._path, self.directory / 'curves.png')


class _Events:
  """TensorBoard's event file: records of protocol buffers, one a line.

  Written at once and in this thread, so that a full disk is an error here.
  """

  def __init__(self, folder: pathlib.Path, step: int):
    """Opens a new file; TensorBoard hides older events after `step`."""
    import tensorflow as tf

    self._tf = tf
    name = f'events.out.tfevents.{time.time():.6f}.{os.getpid()}'
    folder.mkdir(exist_ok=True)
    self._file = tf.io.TFRecordWriter(str(folder / name))
    log = tf.compat.v1.SessionLog
    self._write(file_version='brain.Event:2')
    self._write(step=step + 1, session_log=log(status=log.START))

  def add(self, step: int, prefix: str, values: Mapping[str, float]) -> None:
    """Scalars of one step.

    Raises:
      OSError: they could not be written.
    """
    summary = self._tf.compat.v1.Summary()
    for name, value in values.items():
      summary.value.add(tag=f'{prefix}/{name}', simple_value=value)
    self._write(step=step, summary=summary)

  def _write(self, **fields: Any) -> None:
    event = self._tf.compat.v1.Event(wall_time=time.time(), **fields)
    try:
      self._file.write(event.SerializeToString())
      self._file.flush()
    except self._tf.errors.OpError as e:
      raise OSError(e.message) from e

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


def _cut(path: pathlib.Path, step: int) -> None:
  """Leaves the lines up to a step; half a line at the end goes too."""
  if not path.exists():
    return
  kept = [line for line in read_metrics(path) if line['step'] <= step]
  text = ''.join(json.dumps(line) + '\n' for line in kept)
  checkpoints.write_atomically(path, text.encode())


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of a metrics.jsonl; a last line that is not whole is left out."""
  lines = []
  for text in path.read_text().splitlines():
    try:
      lines.append(json.loads(text))
    except json.JSONDecodeError:
      logging.warning('%s: left out an incomplete line.', path)
  return lines


def draw(metrics: pathlib.Path, picture: pathlib.Path) -> None:
  """Draws the training loss and every evaluation metric against the step."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
  for line in read_metrics(metrics):
    wanted = ('loss',) if line['split'] == 'train' else tuple(line)[3:]
    for name in wanted:
      panel = f'training {name}' if line['split'] == 'train' else name
      label = f'{line["task"]}, {line["split"]}'
      curves.setdefault(panel, {}).setdefault(label, []).append(
        (line['step'], line[name])
      )
  if not curves:
    return
  columns = min(3, len(curves))
  rows = -(-len(curves) // columns)
  figure = Figure(figsize=(4.5 * columns, 3.2 * rows), layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.subplots(rows, columns, squeeze=False).ravel()
  for ax, (panel, lines) in zip(axes, curves.items(), strict=False):
    for label, points in lines.items():
      x, y = zip(*points, strict=True)
      ax.plot(x, y, marker='.', label=label)
    ax.set(title=panel.replace('_', ' '), xlabel='step')
    ax.legend(fontsize='small')
  for ax in axes[len(curves) :]:
    ax.set_axis_off()
  temporary = picture.with_name(f'.{picture.name}')
  figure.savefig(temporary, dpi=120, format='png')
  temporary.replace(picture)


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours} h {minutes:02d} min'
  return f'{minutes} min {seconds:02d} s' if minutes else f'{seconds} s'
