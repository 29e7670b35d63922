"""`prompt-jax prune`: the units that matter most to a task, for LST's start.

Squared gradients of the frozen base on examples of the task choose them
(`methods/pruning.py`). Not for training the side network: that is
`prompt-jax train` with methods/lst.gin, which reads what is written here.
"""

from collections.abc import Iterator
import dataclasses
import pathlib
from typing import Any

from absl import logging
import jax

from prompt_jax import checkpoints
from prompt_jax import datasets
from prompt_jax import fingerprints
from prompt_jax import run as run_lib
from prompt_jax import schedules
from prompt_jax.methods import ladder
from prompt_jax.methods import pruning


def prune(
  run: run_lib.Run,
  *,
  output: str | None,
  reduction_factor: int = 8,
  examples: int = 1024,
  split: str = 'train',
  batch_size: int = 32,
) -> pruning.Units:
  """Measures squared gradients of the base, and writes the chosen units.

  Args:
    run: model, task, base. Its method is not looked at; the seed draws the
      examples.
    output: the file, for `pruning.FromFile`.
    reduction_factor: r; 1 / r of the units are chosen.
    examples: how many are read; all, where the split has fewer.
    split: of the task.
    batch_size: examples of one program call; the result does not depend on it.

  Raises:
    ValueError: no file, a number below 1, a reduction factor that does not
      divide the network's widths, no such task or split, several processes.
    CheckpointError: the file cannot be written.
    convert.CheckpointMismatch: a base of another network.
  """
  if output is None or pathlib.Path(output).is_dir():
    raise ValueError(
      f'Give --output=FILE, a file to write the units to; got {output!r}.'
    )
  for name, value in (('examples', examples), ('batch_size', batch_size)):
    whole = isinstance(value, int) and value >= 1
    schedules.require(whole, name, 'a whole number of at least 1', value)
  if jax.process_count() > 1:
    raise ValueError('`prompt-jax prune` runs in one process.')
  # Tells which width it does not divide.
  ladder.LST(reduction_factor, start=None).network(run.model.config)
  path = pathlib.Path(output)
  checkpoints.check_writable(str(path.parent))
  # All of it is differentiated, so that all of it stays float32.
  model = dataclasses.replace(
    run.model, method=None, trainable_patterns=('.*',)
  )
  bare = dataclasses.replace(run, model=model)
  with bare.partitioner.activate():
    bare.register_tasks()
    base = bare.load()
    config = bare.dataset_config(
      split=split, batch_size=min(batch_size, examples), num_epochs=1
    )
    read = _Examples(config, bare.converter(), examples)
    header = {
      'base_digest': fingerprints.digest(base.fingerprint),
      'task': f'{bare.mixture_or_task_name} ({split})',
    }
    units = pruning.measure(
      model, base.network, read, output, reduction_factor, examples, header
    )
  if read.count < examples:
    logging.warning('The split has %d examples.', read.count)
  print(
    f'Wrote {path}: 1/{reduction_factor} of the units of each kind, by squared '
    f'gradients on {read.count} examples of {header["task"]}. Start at them by '
    f'--gin.START=@pruning.FromFile() --gin.UNITS_PATH={path}'
  )
  return units


@dataclasses.dataclass
class _Examples:
  """Batches of a split, counted, with a line for each tenth of them."""

  config: datasets.DatasetConfig
  converter: Any
  wanted: int
  count: int = 0

  def __iter__(self) -> Iterator[datasets.Batch]:
    source = datasets.get_dataset(
      self.config, self.converter, drop_remainder=False
    )
    for batch in datasets.TrainIterator(source):
      before = self.count
      rows = len(next(iter(batch.values())))
      self.count = min(before + rows, self.wanted)
      yield batch
      # Here the examples before the next batch have been measured.
      if 10 * self.count // self.wanted > 10 * before // self.wanted:
        logging.info('%d of %d examples.', self.count, self.wanted)
