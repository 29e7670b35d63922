"""The input pipeline alone: examples and tokens a second, without training.

Real rows through the tasks as they are: read, templated, tokenized, with soft
tokens, padded or packed, batched. Each layout is fed in four ways:

    cold     a first epoch, from the files
    rows     the epochs after it: rows in memory, tokenized anew each time
    cache    SeqIO's cache (`prompt_jax.caching`): tokenized rows on the disk
    resident rows converted once and drawn in a new order, as training keeps
             small sets (`RESIDENT_ROWS`)

Beside them the examples a second that a training step of small models takes on
this machine: a pipeline is fast enough where it gives more.

    python benchmarks/data.py

The data are `data/glue_sst2`, `data/squad` and `data/t5_vocab` in the folder
that PROMPT_JAX_SHARED names, else in `shared` beside the checkout. Not for how
long a step takes (`train_step.py`), nor for what packing is worth
(`packing.py`).
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
import dataclasses
import itertools
import logging
import os
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import jax
from lib import ours
from lib import report
import numpy as np
from packing import num_examples
import seqio

from prompt_jax import caching
from prompt_jax import datasets
from prompt_jax import feeds
from prompt_jax import run as run_lib
from prompt_jax import tasks

HERE = pathlib.Path(__file__).parent
_AIM = 20_000  # examples a second of SST-2, packed, from the cache
_QUICK = {'models': 'tiny', 'repeats': 2, 'window': 256, 'rows': 600}
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Text:
  """A set, and its lengths in positions of the encoder, soft tokens included.

  Attributes:
    task: of the package.
    folder: of its rows below the data.
    padded: length of a padded row, and of its targets.
    packed: the same of a packed row.
  """

  task: str
  folder: str
  padded: tuple[int, int]
  packed: tuple[int, int]


TEXTS = {
  'SST-2': Text('taskless_glue_sst2', 'glue_sst2', (128, 4), (256, 32)),
  'SQuAD': Text('squad', 'squad', (512, 32), (512, 64)),
}


@dataclasses.dataclass
class Layout:
  """A set, padded or packed.

  Attributes:
    text: its name in `TEXTS`.
    pack: whether several examples share a row.
    run: its task and lengths.
    rows: of a batch.
  """

  text: str
  pack: bool
  run: run_lib.Run
  rows: int

  @property
  def name(self) -> str:
    """As it is printed."""
    length = self.run.task_feature_lengths['inputs']
    length += self.run.model.soft_ids.shape[1]
    how = 'packed into' if self.pack else 'padded to'
    return f'{self.text}, {how} {length}'

  def config(self, **fields: Any) -> datasets.DatasetConfig:
    """Shuffled, without end by default."""
    config = self.run.dataset_config(batch_size=self.rows, pack=self.pack)
    return dataclasses.replace(config, **fields)

  def batches(self, **fields: Any) -> Iterator[Batch]:
    """Batches as training reads them."""
    converter = self.run.converter(self.pack)
    return datasets.TrainIterator(self.config(**fields), converter)


@dataclasses.dataclass(frozen=True)
class Rate:
  """What one way of feeding gave.

  Attributes:
    examples: a second, of each repeat.
    tokens: of text, without soft ones, a second.
  """

  examples: list[float]
  tokens: list[float]

  @property
  def median(self) -> float:
    """Examples a second."""
    return statistics.median(self.examples)


def register(
  text: Text, shared: pathlib.Path, limit: int | None, new_name: str
) -> None:
  """The packaged task of a set, with the first rows of its training file.

  All of them are read and checked, as by a run.
  """
  path = shared / 'data' / text.folder / 'train.jsonl'
  if limit is None:
    tasks.with_local_source(text.task, {'train': path}, new_name)
    return
  rows = tasks.sources.read_rows(text.task, {'train': path})
  tasks.sources.use_rows(
    text.task, {split: found[:limit] for split, found in rows.items()}, new_name
  )


def num_tokens(batch: Batch, vocab_size: int) -> int:
  """Tokens of text in a batch, EOS among them; no soft ones."""
  keys = ('encoder_input_tokens', 'decoder_target_tokens')
  return sum(
    int(np.sum((batch[key] > 0) & (batch[key] < vocab_size))) for key in keys
  )


# ---- measuring -------------------------------------------------------------


def measure(
  batches: Iterator[Batch], window: int, repeats: int, vocab_size: int
) -> Rate:
  """Examples and tokens a second of a stream that is under way.

  A first window is not counted: it fills buffers, and traces.
  """
  found = Rate([], [])
  for i in range(repeats + 1):
    taken: list[Batch] = []
    count = seconds = 0
    while count < window:
      start = time.perf_counter()
      taken.append(next(batches))
      seconds += time.perf_counter() - start
      count += num_examples(taken[-1])
    if i:
      tokens = sum(num_tokens(batch, vocab_size) for batch in taken)
      found.examples.append(count / seconds)
      found.tokens.append(tokens / seconds)
  return found


def measure_cold(
  layout: Layout, begin: Callable[[], None], repeats: int, vocab_size: int
) -> tuple[Rate, list[float]]:
  """A first epoch from the files; and the seconds until its first batch."""
  found, firsts = Rate([], []), []
  for i in range(repeats + 1):
    start = time.perf_counter()
    begin()
    batches = layout.batches(num_epochs=1)
    taken = [next(batches)]
    first = time.perf_counter() - start
    taken += batches
    seconds = time.perf_counter() - start
    if i:  # what is imported and traced once is not counted
      firsts.append(first)
      found.examples.append(sum(map(num_examples, taken)) / seconds)
      tokens = sum(num_tokens(batch, vocab_size) for batch in taken)
      found.tokens.append(tokens / seconds)
  return found, firsts


def resident(layout: Layout) -> Iterator[Batch]:
  """Batches of rows that are in memory, as `feeds.Resident` draws them."""
  config = layout.config()
  data = feeds.read_rows(config, layout.run.converter(layout.pack), 1 << 20)
  assert data is not None
  size = len(next(iter(data.values())))
  for position in itertools.count():
    [rows] = feeds.order(size, layout.rows, config.seed, position, 1)
    yield {name: x[rows] for name, x in data.items()}


def same(layout: Layout) -> bool:
  """Whether the cache gives the batches that the rows give, to the last id."""
  fresh, cached = (
    layout.batches(num_epochs=1, shuffle=False, use_cached=use_cached)
    for use_cached in (False, True)
  )
  return all(
    one is not None
    and other is not None
    and all(np.array_equal(x, other[key]) for key, x in one.items())
    for one, other in itertools.zip_longest(fresh, cached)
  )


def step_rate(
  made: ours.Recipe, layout: Layout, run: run_lib.Run, steps: int
) -> float:
  """Examples a second that compiled training steps take."""
  with run.partitioner.activate():
    base = run.load()
    abstract = run.abstract_state(made.optimizer, base)
    state = run.init_state(made.optimizer, base, abstract)
    hosts = list(itertools.islice(layout.batches(), steps))
    batches = [run.partitioner.put_batch(batch) for batch in hosts]
    step = made.compile(run, abstract, state, base.frozen, batches[0])
    seconds = []
    for batch in (batches[0], *batches):  # the first warms up
      start = time.perf_counter()
      state, metrics = step(state, base.frozen, batch)
      jax.block_until_ready(metrics)
      seconds.append(time.perf_counter() - start)
  examples = statistics.mean(map(num_examples, hosts))
  return examples / statistics.median(seconds[1:])


# ---- reporting -------------------------------------------------------------


def rows_of(
  name: str, rates: dict[str, Rate], steps: dict[str, float]
) -> list[dict[str, str]]:
  """A line of the table for each way of feeding a layout."""
  found = []
  for way, rate in rates.items():
    line = {
      'layout': name,
      'from': way,
      'examples / s': report.spread(rate.examples, ',.0f'),
      'tokens / s': f'{statistics.median(rate.tokens):,.0f}',
      'times cold': f'{rate.median / rates["cold"].median:.2f}',
    }
    for model, step in steps.items():
      line[f'times {model}'] = f'{rate.median / step:.1f}'
    found.append(line)
  return found


def verdict(name: str, rates: dict[str, Rate], steps: dict[str, float]) -> str:
  """What the models take, and whether the pipeline gives more."""
  slowest = min(
    ('rows', 'cache', 'resident'), key=lambda way: rates[way].median
  )
  taken = ', '.join(f'{m} {step:,.0f}' for m, step in steps.items())
  ahead = all(rates[slowest].median > step for step in steps.values())
  said = 'outruns' if ahead else 'DOES NOT OUTRUN'
  return (
    f'{name}: training steps take {taken} examples / s; the pipeline {said} '
    f'them from {slowest}, its slowest after the first epoch.'
  )


def measure_text(
  name: str, args: argparse.Namespace, shared: pathlib.Path, made: Any
) -> list[str]:
  """Prints and gives the lines about a set."""
  text = TEXTS[name]
  task = f'benchmark_{text.folder}'
  first: Any = next(iter(made.values())).model
  tasks.register(first.vocabulary)
  begin = lambda: register(text, shared, args.rows, task)  # noqa: E731
  begin()
  count = seqio.TaskRegistry.get(task).num_input_examples('train')
  lines, table = [f'{name}: {count:,} rows.'], []
  with tempfile.TemporaryDirectory() as folder, caching.caches(folder):
    start = time.perf_counter()
    caching.cache(task, folder)
    seconds = time.perf_counter() - start
    lines[0] += f' Its cache is written in {seconds:.1f} s.'
    for pack, (length, targets) in ((False, text.padded), (True, text.packed)):
      sizes = {'inputs': length - args.prompt, 'targets': targets}
      run = run_lib.Run(first, task, sizes)
      layout = Layout(name, pack, run, max(1, args.positions // length))
      if not same(layout):
        raise AssertionError(f'{layout.name}: the cache gives other batches.')
      cold, firsts = measure_cold(
        layout, begin, args.repeats, first.config.vocab_size
      )
      streams = {
        'rows': layout.batches(),
        'cache': layout.batches(use_cached=True),
        'resident': resident(layout),
      }
      sizes = (args.window, args.repeats, first.config.vocab_size)
      rates = {'cold': cold}
      rates |= {way: measure(x, *sizes) for way, x in streams.items()}
      steps = {
        model: step_rate(
          recipe, layout, dataclasses.replace(run, model=recipe.model), 5
        )
        for model, recipe in made.items()
      }
      table += rows_of(layout.name, rates, steps)
      lines.append(verdict(layout.name, rates, steps))
      lines.append(f'Its first batch is there after {report.spread(firsts)} s.')
      if name == 'SST-2' and pack:
        met = 'met' if rates['cache'].median >= _AIM else 'NOT MET'
        lines.append(f'Aim, {_AIM:,} examples / s from the cache: {met}.')
      print('\n'.join(lines[-2:]), flush=True)
  return [*lines, '', report.table(table), '']


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    description=(__doc__ or '').split('\n', 1)[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add = parser.add_argument
  add('--texts', default=','.join(TEXTS), help='sets')
  add('--models', default='tiny,mini', help='whose steps are timed')
  add('--prompt', type=int, default=20, help='soft tokens of an example')
  add('--positions', type=int, default=8192,
      help='of the encoder in a batch')  # fmt: skip
  add('--window', type=int, default=8192, help='examples of a repeat')
  add('--repeats', type=int, default=5, help='after one to warm up')
  add('--rows', type=int, help='the first of a set; all by default')
  add('--quick', action='store_true', help='a check: tiny and few')
  add('--out', type=pathlib.Path, help='a file for the table')
  if parser.parse_args(argv).quick:
    parser.set_defaults(**_QUICK)
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
  """Measures and prints; 1 where there are no data."""
  args = parse(argv)
  load = os.getloadavg()[0]
  logging.getLogger('absl').setLevel(logging.ERROR)  # the base is random
  shared = pathlib.Path(
    os.environ.get('PROMPT_JAX_SHARED', HERE.parent.parent / 'shared')
  )
  path = shared / 'data' / 't5_vocab' / 'spiece.model'
  needed = [path, *(shared / 'data' / t.folder for t in TEXTS.values())]
  missing = [place for place in needed if not place.exists()]
  if missing:
    print(f'No data: there is no {missing[0]}. PROMPT_JAX_SHARED names the '
          'folder that holds data/.')  # fmt: skip
    return 1
  made = {
    name: ours.recipe(name, args.prompt, str(path))
    for name in args.models.split(',')
  }
  meter = report.Meter()
  lines = [
    line
    for name in args.texts.split(',')
    for line in measure_text(name, args, shared, made)
  ]
  others = meter.others(own=meter.cpu_seconds())
  text = '\n'.join([
    f'{args.repeats} repeats of {args.window:,} examples, median (min to max); '
    f'prompt {args.prompt}, {args.positions:,} encoder positions a batch.',
    report.machine(jax.default_backend(), jax.devices()[0].device_kind),
    f'jax {jax.__version__}. {report.quiet(load, others)}', '', *lines,
  ])  # fmt: skip
  print(f'\n{text}')
  if args.out is not None:
    args.out.write_text(text + '\n')
  return 0


if __name__ == '__main__':
  sys.exit(main())
