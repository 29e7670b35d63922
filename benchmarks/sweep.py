"""What training many prompts together is worth: one program for 12 runs.

Four tasks x three seeds of a pocket model on a random base. The same runs three
ways, in turns, in one process: `mapped`, one program that trains one run after
the other at each step; `vmapped`, one program that trains all at once; `alone`,
each run with data, program and dispatches of its own, as `prompt-jax train` has
them. Programs are compiled anew on each turn.

    python benchmarks/sweep.py

Nothing is evaluated or written, and the base, imports and start of a process
are left out: a run of its own pays for these, too. Not for the speed of a step
of a large model (`train_step.py`).
"""

import argparse
from collections.abc import Callable, Sequence
import dataclasses
import functools
import logging
import os
import pathlib
import time
from typing import Any

os.environ['JAX_ENABLE_COMPILATION_CACHE'] = 'false'  # before JAX is imported

import jax
from lib import report
import numpy as np

from prompt_jax import feeds
from prompt_jax import gin_utils
from prompt_jax import run as run_lib
from prompt_jax import trainer
from prompt_jax.study import together

HERE = pathlib.Path(__file__).parent
_ROWS = 1 << 20  # a task has fewer
_QUICK = {'model': 'pocket_8', 'seeds': 1, 'steps': 30, 'rounds': 1}


@dataclasses.dataclass(frozen=True)
class Run(run_lib.Run):
  """A run whose base is there already.

  Attributes:
    base: of all runs.
  """

  base: run_lib.Base | None = None

  def load(self) -> run_lib.Base:
    """The base."""
    return self.base or super().load()


@dataclasses.dataclass(frozen=True)
class Sweep:
  """The runs.

  Attributes:
    run: what they have in common.
    members: in what they differ.
    settings: of `together.train`.
  """

  run: Run
  members: Sequence[together.Member]
  settings: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Turn:
  """All runs, trained once.

  Attributes:
    total: seconds, all included.
    first: seconds of the first dispatches, which compile.
    step: seconds of a step of one run, compiled.
    losses: mean of each run, over its steps.
  """

  total: float
  first: float
  step: float
  losses: np.ndarray


def make(args: argparse.Namespace) -> Sweep:
  """Reads the gin files and draws the base."""
  bindings = {
    'MIXTURE_OR_TASK_NAME': '',
    'TASK_FEATURE_LENGTHS': {'inputs': 15, 'targets': 2},
    'TRAIN_STEPS': args.steps,
    'PROMPT_LENGTH': args.prompt,
    'DROPOUT_RATE': 0.0,
  }
  gin_utils.parse(
    [f'models/{args.model}.gin', 'methods/soft_prompt.gin', 'runs/study.gin'],
    [f'{k}={v!r}' for k, v in bindings.items()],
  )
  plain = gin_utils.build('@run.Run()')
  fields = {f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)}
  return Sweep(
    run=Run(**fields, base=plain.load()),
    members=[
      together.Member(f'pocket0_{task}', seed)
      for task in args.tasks.split(',')
      for seed in range(args.seeds)
    ],
    settings={
      'total_steps': args.steps,
      'batch_size': args.batch,
      'optimizer': gin_utils.build('%OPTIMIZER'),
      'learning_rate_fn': gin_utils.build('%LEARNING_RATE_FN'),
    },
  )


# ---- measuring -------------------------------------------------------------


def train_together(sweep: Sweep, at_once: int) -> Turn:
  """One program."""
  jax.clear_caches()
  start = time.perf_counter()
  outcomes, _, cost = together.train(
    sweep.run,
    sweep.members,
    eval_config=None,
    eval_period=sweep.settings['total_steps'],
    at_once=at_once,
    **sweep.settings,
  )
  total = time.perf_counter() - start
  losses = np.array([o.history[0][1] for o in outcomes])
  step = cost.step_seconds / len(sweep.members)
  return Turn(total, cost.compile_seconds, step, losses)


def train_alone(sweep: Sweep) -> Turn:
  """One run after the other."""
  found = [_alone(sweep, member) for member in sweep.members]
  return Turn(
    total=sum(t.total for t in found),
    first=sum(t.first for t in found),
    step=float(np.mean([t.step for t in found])),
    losses=np.concatenate([t.losses for t in found]),
  )


def _alone(sweep: Sweep, member: together.Member) -> Turn:
  """One run, without the files that `train.train` writes."""
  jax.clear_caches()
  start = time.perf_counter()
  run = dataclasses.replace(
    sweep.run, mixture_or_task_name=member.task, seed=member.seed
  )
  total_steps, batch_size, optimizer, learning_rate_fn = sweep.settings.values()
  with run.partitioner.activate():
    run.register_tasks()
    base = run.load()
    abstract = run.abstract_state(optimizer, base)
    state = run.init_state(optimizer, base, abstract)
    config = run.dataset_config(split='train', batch_size=batch_size)
    rows = feeds.read_rows(config, run.converter(), _ROWS)
    step_fn = functools.partial(
      trainer.train_step,
      model=run.model,
      optimizer=optimizer,
      learning_rate_fn=learning_rate_fn,
    )
    count = len(next(iter(rows.values())))
    feed = feeds.Resident(
      rows=rows,
      data=jax.device_put(rows, run.partitioner.replicated),
      step_fn=jax.jit(
        functools.partial(trainer.train_steps, step_fn=step_fn),
        donate_argnums=0,
      ),
      order=functools.partial(feeds.order, count, batch_size, run.seed),
    )
    losses, calls = [], []
    while feed.position < total_steps:
      before = time.perf_counter()
      done = feed(state, base.frozen, total_steps - feed.position)
      state, metrics = done.state, jax.device_get(done.metrics)
      calls.append((time.perf_counter() - before, done.count))
      losses.append(metrics['loss'][: done.count])
  (first, _), *rest = calls
  seconds, steps = map(sum, zip(*rest, strict=True))
  return Turn(
    total=time.perf_counter() - start,
    first=first,
    step=seconds / steps,
    losses=np.mean(np.concatenate(losses), keepdims=True),
  )


Turns = dict[str, list[Turn]]


def measure(sweep: Sweep, rounds: int) -> tuple[Turns, float | None]:
  """All ways in turns, and the share of the machine that others used."""
  ways: dict[str, Callable[[Sweep], Turn]] = {
    'mapped': functools.partial(train_together, at_once=1),
    'vmapped': functools.partial(train_together, at_once=len(sweep.members)),
    'alone': train_alone,
  }
  found: Turns = {name: [] for name in ways}
  meter = report.Meter()
  for i in range(rounds):
    for name, way in ways.items():
      found[name].append(way(sweep))
      seconds = found[name][-1].total
      print(f'round {i + 1}: {name} {seconds:.1f} s', flush=True)
  return found, meter.others(own=meter.cpu_seconds())


# ---- reporting -------------------------------------------------------------


def row(name: str, found: Turns) -> dict[str, str]:
  """A line of the table."""

  def spread(key: str, factor: float = 1.0) -> str:
    return report.spread([factor * getattr(t, key) for t in found[name]])

  def times(key: str) -> str:
    pairs = zip(found['alone'], found[name], strict=True)
    return report.spread([getattr(a, key) / getattr(b, key) for a, b in pairs])

  return {
    'trained': name,
    'total s': spread('total'),
    'of that until the first steps s': spread('first'),
    'a step of a run ms': spread('step', 1e3),
    'total, alone / this': times('total'),
    'a step, alone / this': times('step'),
  }


def differences(found: Turns) -> str:
  """Whether all ways trained the same."""
  want = found['alone'][0].losses
  worst = {
    name: float(np.max(np.abs(found[name][0].losses / want - 1)))
    for name in ('mapped', 'vmapped')
  }
  said = ', '.join(f'{name} {value:.1e}' for name, value in worst.items())
  return (
    "Largest relative difference of a run's mean training loss from that of "
    f'the run alone: {said}.'
  )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    description=(__doc__ or '').split('\n', 1)[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add = parser.add_argument
  add('--model', default='pocket_32', help='of gin_configs/models; a pocket')
  add('--tasks', default='mood,agent,group,place', help='of tasks/pocket.py')
  add('--seeds', type=int, default=3, help='of each task')
  add('--batch', type=int, default=32, help='examples of a run')
  add('--prompt', type=int, default=16, help='soft tokens')
  add('--steps', type=int, default=600, help='of each run')
  add('--rounds', type=int, default=3, help='turns of each way')
  add('--quick', action='store_true', help='a check: tiny and few')
  add(
    '--out',
    type=pathlib.Path,
    help='folder for sweep.md; here by default, none with --quick',
  )
  if parser.parse_args(argv).quick:
    parser.set_defaults(**_QUICK)
  args = parser.parse_args(argv)
  if not args.quick and args.out is None:
    args.out = HERE
  return args


def main() -> None:
  """Measures, prints, writes."""
  args = parse()
  load = os.getloadavg()[0]
  logging.getLogger('absl').setLevel(logging.ERROR)  # the base is random
  sweep = make(args)
  found, others = measure(sweep, args.rounds)
  text = '\n'.join([
    f'{args.model}: {len(sweep.members)} prompts ({args.tasks} x {args.seeds} '
    f'seeds), {args.steps} steps of {args.batch} examples each, prompt '
    f'{args.prompt}; {args.rounds} rounds in turns, median (min to max).',
    report.machine(jax.default_backend(), jax.devices()[0].device_kind),
    f'jax {jax.__version__}. {report.quiet(load, others)}',
    differences(found), '', report.table([row(name, found) for name in found]),
  ])  # fmt: skip
  print(f'\n{text}')
  if args.out is not None:
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / 'sweep.md').write_text(text + '\n')
    print(f'\nWritten: {args.out / "sweep.md"}')


if __name__ == '__main__':
  main()
