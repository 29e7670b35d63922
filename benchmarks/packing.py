"""What packing is worth: examples a second, packed and padded.

Prompt tuning on real text (SST-2). Soft tokens are tokens, so several examples,
each with its own prompt, share a row; the alternative is a row of fixed length
for each example. All lengths are positions of the encoder, soft tokens
included, and every layout has the same number of them in a batch. Steps of the
layouts alternate, so that all of them see the same machine.

    python benchmarks/packing.py --row 128,256,512 --padded 128,512

The data are `data/glue_sst2` and `data/t5_vocab` in the folder that
PROMPT_JAX_SHARED names, else in `shared` beside the checkout. The frozen base
is random: speed and equality of losses do not depend on it. Not for comparing
with other libraries (`train_step.py`).
"""

import argparse
from collections.abc import Sequence
import dataclasses
import functools
import itertools
import logging
import os
import pathlib
import statistics
import sys
import time
from typing import Any

import jax
from lib import ours
from lib import report
import numpy as np
import seqio

from prompt_jax import datasets
from prompt_jax import run as run_lib
from prompt_jax import tasks
from prompt_jax import trainer

HERE = pathlib.Path(__file__).parent
_TASK = 'benchmark_sst2'
_TOLERANCE = 1e-5
# What packing should be worth, examples a second over those of a padded row.
_AIMS = {'padded to 128': 3.5, 'padded to 512': 10.0}
_QUICK = {
  'model': 'mini',
  'positions': 1024,
  'steps': 3,
  'examples': 64,
  'pipeline': 512,
}


@dataclasses.dataclass
class Layout:
  """Rows of one length, packed or padded.

  Attributes:
    name: as it is printed.
    run: its lengths, with the model that all layouts share.
    pack: whether several examples share a row.
    rows: of a batch.
    batches: a few of them, on the host.
    compile_s: seconds.
    step: the compiled step.
    seconds: of each step.
  """

  name: str
  run: run_lib.Run
  pack: bool
  rows: int
  batches: list[dict[str, np.ndarray]] = dataclasses.field(default_factory=list)
  compile_s: float = 0.0
  step: Any = None
  seconds: list[float] = dataclasses.field(default_factory=list)

  def iterator(self, **fields: Any) -> datasets.TrainIterator:
    """Batches, shuffled and without end by default."""
    config = self.run.dataset_config(
      batch_size=self.rows, pack=self.pack, **fields
    )
    return datasets.TrainIterator(config, self.run.converter(self.pack))

  @property
  def examples(self) -> float:
    """Mean number of examples in a batch."""
    return statistics.mean(map(num_examples, self.batches))

  @property
  def rate(self) -> float:
    """Examples a second of the median step."""
    return self.examples / statistics.median(self.seconds)

  def times(self, other: 'Layout') -> list[float]:
    """This rate over another's, round by round."""
    # Both steps of a pair met the same machine.
    pairs = zip(self.seconds, other.seconds, strict=True)
    return [self.examples / other.examples * b / a for a, b in pairs]

  def filled(self, feature: str) -> float:
    """Share of positions that are no padding."""
    # The decoder's input starts with 0: count its targets.
    return statistics.mean(np.mean(b[feature] > 0) for b in self.batches)


def num_examples(batch: dict[str, np.ndarray]) -> int:
  """Examples in a batch: segments, or rows that hold anything."""
  segments = batch.get('encoder_segment_ids')
  if segments is None:
    return int(np.sum(np.any(batch['encoder_input_tokens'] > 0, axis=1)))
  return int(np.sum(np.max(segments, axis=1)))


def make_layouts(args: argparse.Namespace, model: Any) -> list[Layout]:
  """Padded ones first, then packed ones."""
  found = []
  for pack, lengths in ((False, args.padded), (True, args.row)):
    for length in map(int, lengths.split(',')):
      targets = length // args.inputs_to_targets if pack else args.targets
      sizes = {'inputs': length - args.prompt, 'targets': targets}
      found.append(
        Layout(
          name=f'{"packed into" if pack else "padded to"} {length}',
          run=run_lib.Run(model, _TASK, sizes),
          pack=pack,
          rows=max(1, args.positions // length),
        )
      )
  return found


def register(
  name: str, shared: pathlib.Path, vocabulary: seqio.Vocabulary
) -> None:
  """The packaged task of that name, with SST-2's training rows."""
  tasks.register(vocabulary)
  path = shared / 'data' / 'glue_sst2' / 'train.jsonl'
  tasks.with_local_source(name, {'train': path}, new_name=_TASK)


# ---- measuring -------------------------------------------------------------


def measure(
  layouts: Sequence[Layout], made: ours.Recipe, args: argparse.Namespace
) -> float | None:
  """Compiles a step for each layout, then lets them take turns.

  Returns:
    The share of the machine that other processes used.
  """
  base = layouts[0].run.load()
  states = {}
  for layout in layouts:
    run = layout.run
    with run.partitioner.activate():
      layout.batches = list(itertools.islice(layout.iterator(), args.steps))
      abstract = run.abstract_state(made.optimizer, base)
      state = run.init_state(made.optimizer, base, abstract)
      batch = run.partitioner.put_batch(layout.batches[0])
      start = time.perf_counter()
      layout.step = made.compile(run, abstract, state, base.frozen, batch)
      layout.compile_s = time.perf_counter() - start
      states[layout.name], metrics = layout.step(state, base.frozen, batch)
      jax.block_until_ready(metrics)  # to warm up
    print(f'{layout.name}: compiled in {layout.compile_s:.1f} s', flush=True)
  meter = report.Meter()
  for i in range(args.steps):
    for layout in layouts:
      batch = layout.run.partitioner.put_batch(layout.batches[i])
      jax.block_until_ready(batch)
      start = time.perf_counter()
      new = layout.step(states[layout.name], base.frozen, batch)
      jax.block_until_ready(new)
      layout.seconds.append(time.perf_counter() - start)
      states[layout.name] = new[0]
    line = ', '.join(f'{x.name} {x.seconds[-1]:.3g} s' for x in layouts)
    print(f'round {i + 1}: {line}', flush=True)
  return meter.others(own=meter.cpu_seconds())


def pipeline_rate(layout: Layout, count: int) -> float:
  """Examples a second from rows in memory to batches, without training."""
  iterator = layout.iterator()
  next(iterator)  # fills the buffer that shuffles
  start, seen = time.perf_counter(), 0
  while seen < count:
    seen += num_examples(next(iterator))
  return seen / (time.perf_counter() - start)


def total_loss(
  layout: Layout, trainable: Any, frozen: Any, count: int
) -> tuple[float, int]:
  """Sum of the losses of the task's first examples, and of their targets.

  Without dropout; the same examples in every layout.
  """
  run = layout.run
  ds = datasets.find_task(_TASK).get_dataset(
    run.task_feature_lengths, split='train', shuffle=False, num_epochs=1
  )
  converter = run.converter(layout.pack)
  rows = converter(ds.take(count), run.task_feature_lengths).batch(layout.rows)
  step = jax.jit(functools.partial(trainer.eval_step, model=run.model))
  loss, targets = 0.0, 0
  for batch in rows.as_numpy_iterator():
    # The last batch may be short, and one program is enough.
    short = layout.rows - len(batch['encoder_input_tokens'])
    batch = {k: np.pad(v, ((0, short), (0, 0))) for k, v in batch.items()}
    sums = step(trainable, frozen, batch)
    loss += float(sums['loss'])
    targets += int(sums['target_tokens'])
  return loss, targets


def compare_losses(
  layouts: Sequence[Layout], made: ours.Recipe, args: argparse.Namespace
) -> tuple[str, bool]:
  """Whether packing changes the sum of the losses by less than 1e-5 of it."""
  run = layouts[0].run
  base = run.load()
  state = trainer.init_state(
    run.init_rng(), base.params, model=made.model, optimizer=made.optimizer
  )
  found = [
    total_loss(x, state.trainable, base.frozen, args.examples) for x in layouts
  ]
  reference, targets = found[0]
  worst = max(abs(loss / reference - 1) for loss, _ in found)
  same = worst <= _TOLERANCE and all(n == targets for _, n in found)
  losses = ', '.join(
    f'{x.name} {loss:.8g}' for x, (loss, _) in zip(layouts, found, strict=True)
  )
  return (
    f'Sum of the losses of {args.examples} examples ({targets} targets), no '
    f'dropout: {losses}. Largest relative difference {worst:.1e}: '
    f'{"equal" if same else "NOT EQUAL"} (tolerance {_TOLERANCE:.0e}).'
  ), same


# ---- reporting -------------------------------------------------------------


def rows_of(
  layouts: Sequence[Layout], args: argparse.Namespace
) -> list[dict[str, str]]:
  """A line of the table for each layout."""
  padded = [x for x in layouts if not x.pack]
  found = []
  for x in layouts:
    line = {
      'layout': x.name,
      'rows': f'{x.rows}',
      'examples a row': f'{x.examples / x.rows:.2f}',
      'encoder filled': f'{x.filled("encoder_input_tokens"):.1%}',
      'decoder filled': f'{x.filled("decoder_target_tokens"):.1%}',
      'step s': report.spread(x.seconds),
      'examples / s': f'{x.rate:.3g}',
    }
    for other in padded:
      line[f'times {other.name}'] = report.spread(x.times(other))
    line['pipeline, examples / s'] = f'{pipeline_rate(x, args.pipeline):,.0f}'
    found.append(line)
  return found


def verdict(layouts: Sequence[Layout]) -> str:
  """The fastest packed row, beside what was hoped for."""
  packed = [x for x in layouts if x.pack]
  best = max(packed, key=lambda x: x.rate)
  aims = []
  for other in layouts:
    if not other.pack:
      times = statistics.median(best.times(other))
      aim = _AIMS.get(other.name)
      hoped = f' (aim {aim:g})' if aim else ''
      aims.append(f'{times:.3g} times {other.name}{hoped}')
  return f'Fastest: {best.name}, {", ".join(aims)}.'


def lengths(args: argparse.Namespace) -> str:
  """Tokens of the texts."""
  limits = {'inputs': 512 - args.prompt, 'targets': args.targets}
  rows = datasets.find_task(_TASK).get_dataset(
    limits, split='train', shuffle=False, num_epochs=1
  )
  rows = list(rows.take(2000).as_numpy_iterator())
  inputs, targets = (
    statistics.mean(len(row[key]) for row in rows) for key in limits
  )
  return (
    f'Mean tokens of {len(rows)} examples: inputs {inputs:.1f} '
    f'({inputs + args.prompt:.1f} with {args.prompt} soft ones), targets '
    f'{targets:.1f}.'
  )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    description=(__doc__ or '').split('\n', 1)[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add = parser.add_argument
  add('--model', default='t5_1_1_small', help='of gin_configs/models')
  add('--task', default='taskless_glue_sst2', help='or glue_sst2')
  add('--row', default='128,256,512', help='lengths of packed rows')
  add('--padded', default='128,512', help='lengths of padded rows')
  add('--prompt', type=int, default=20, help='soft tokens of an example')
  add('--targets', type=int, default=16, help='length of padded targets')
  add('--inputs-to-targets', type=int, default=16,
      help='length of a packed row over that of its targets; if too large, '
      'rows run out of targets first')  # fmt: skip
  add(
    '--positions',
    type=int,
    default=2048,
    help="of the encoder in a batch: a layout's rows times their length",
  )
  add('--dropout', type=float, default=0.1)
  add('--steps', type=int, default=5, help='measured, of each layout')
  add('--examples', type=int, default=128, help='whose losses are compared')
  add(
    '--pipeline',
    type=int,
    default=2048,
    help='examples to time the input pipeline with',
  )
  add('--quick', action='store_true', help='a check: tiny and few')
  add('--out', type=pathlib.Path, help='a file for the table')
  if parser.parse_args(argv).quick:
    parser.set_defaults(**_QUICK)
  return parser.parse_args(argv)


def main() -> int:
  """Measures and prints; 1 if the losses are not equal."""
  args = parse()
  load = os.getloadavg()[0]
  logging.getLogger('absl').setLevel(logging.ERROR)  # the base is random
  shared = pathlib.Path(
    os.environ.get('PROMPT_JAX_SHARED', HERE.parent.parent / 'shared')
  )
  path = shared / 'data' / 't5_vocab' / 'spiece.model'
  if not path.exists():
    print(f'No data at {shared}: set PROMPT_JAX_SHARED to their folder.')
    return 1
  made = ours.recipe(
    args.model, args.prompt, str(path), dropout_rate=args.dropout
  )
  register(args.task, shared, made.model.vocabulary)
  layouts = make_layouts(args, made.model)
  with layouts[0].run.partitioner.activate():
    losses, same = compare_losses(layouts, made, args)
  others = measure(layouts, made, args)
  text = '\n'.join([
    f'{args.model}: about {args.positions} encoder positions a batch, dropout '
    f'{args.dropout}; {args.steps} steps in turns, median (min to max).',
    report.machine(jax.default_backend(), jax.devices()[0].device_kind),
    f'jax {jax.__version__}. {report.quiet(load, others)}',
    lengths(args), losses, '', report.table(rows_of(layouts, args)), '',
    verdict(layouts),
  ])  # fmt: skip
  print(f'\n{text}')
  if args.out is not None:
    args.out.write_text(text + '\n')
  return 0 if same else 1


if __name__ == '__main__':
  sys.exit(main())
