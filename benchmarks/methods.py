"""What each method costs: FLOPs, memory, bytes and the time of a step.

Every file of `gin_configs/methods` on one model with random weights, in one
process; PEFT's versions of some in another. Steps alternate in rounds, so that
all see the same machine. The compiler's FLOPs stand beside what the arithmetic
must cost (`lib/closed_form.py`, `lib/method_products.py`).

    python benchmarks/methods.py
    python benchmarks/methods.py --model t5_1_1_base --no-times

PEFT is optional (`requirements-peft.txt`). Nothing here says how well a method
learns.
"""

import argparse
from collections.abc import Sequence
from concurrent import futures
import importlib.util
import json
import multiprocessing
import os
import pathlib
import tempfile
import time
from typing import Any

from lib import method_report
from lib import report

HERE = pathlib.Path(__file__).parent
# Threads of the one before may spin for a while after its step.
_PAUSE_S = 0.1
_QUICK = {
  'model': 'mini',
  'methods': 'fine_tune,soft_prompt,lora,lst',
  'batch': 4,
  'inputs': 16,
  'targets': 4,
  'steps': 2,
}
_PEFT_NEEDS = ('torch', 'transformers', 'peft')
_ENV = {
  'JAX_ENABLE_COMPILATION_CACHE': 'false',  # or nothing would be compiled
  'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
  'HF_HUB_OFFLINE': '1',
  'TF_CPP_MIN_LOG_LEVEL': '2',
}
# A worker's methods, in that process.
_kept: Any = None


# ---- workers ---------------------------------------------------------------


def _make(kind: str, args: argparse.Namespace) -> None:
  """Begins a worker's life."""
  global _kept
  if kind == 'peft':
    from lib import peft_methods as library
  else:
    from lib import method_worker as library
  _kept = library.Steps(args)


def _do(what: str, *args: Any) -> Any:
  return getattr(_kept, what)(*args)


def _timed(name: str) -> dict[str, float]:
  """Wall and CPU seconds, of all threads, of a method's step."""
  before = time.perf_counter(), time.process_time()
  _kept.step(name)
  after = time.perf_counter(), time.process_time()
  wall, cpu = (y - x for x, y in zip(before, after, strict=True))
  return {'wall': wall, 'cpu': cpu}


class Worker:
  """Methods in another process: `worker.do('count', 'lora')`."""

  def __init__(self, kind: str, args: argparse.Namespace):
    self._pool = futures.ProcessPoolExecutor(
      1, multiprocessing.get_context('spawn'), _make, (kind, args)
    )

  def do(self, what: str, *args: Any) -> Any:
    """What that method of `Steps` returns."""
    return self._pool.submit(_do, what, *args).result()

  def step(self, name: str) -> dict[str, float]:
    """Seconds of a step of a method that was counted before."""
    return self._pool.submit(_timed, name).result()

  def close(self) -> None:
    """Ends the process."""
    self._pool.shutdown()


# ---- measuring -------------------------------------------------------------


def count(ours: Worker, names: Sequence[str]) -> dict[str, dict[str, Any]]:
  """What is known before anything has run; compiles every step."""
  results = {}
  for name in names:
    found = results[name] = ours.do('count', name)
    print(
      f'{name}: {found["trained"]:,} trained, '
      f'{found["counted_flops"] / 1e9:.2f} GFLOP, '
      f'{method_report.excess(found):.3f} of the closed form, scratch '
      f'{report.mebibytes(found["scratch_bytes"])} MiB, compiled in '
      f'{found["compile_s"]:.0f} s',
      flush=True,
    )
  return results


def ready(args: argparse.Namespace, results: Any) -> Worker | None:
  """PEFT's worker with its methods, which then have a 'peft' in `results`."""
  missing = [n for n in _PEFT_NEEDS if importlib.util.find_spec(n) is None]
  if missing:
    print(f'Without PEFT: {", ".join(missing)} not installed.', flush=True)
    return None
  worker = Worker('peft', args)
  for name in worker.do('names'):
    if name not in results:
      continue
    try:
      found = worker.do('count', name)
      worker.step(name)
    except Exception as e:  # another library's; the others go on
      print(f'{name}: PEFT cannot: {type(e).__name__}: {e}', flush=True)
      continue
    results[name]['peft'] = found
    print(f'{name}: PEFT trains {found["trained"]:,}', flush=True)
  return worker


def rounds(
  ours: Worker, theirs: Worker | None, args: argparse.Namespace, results: Any
) -> float | None:
  """Steps of all in turns; the share of the machine that others used."""
  for found in results.values():
    found['walls'] = []
    if 'peft' in found:
      found['peft']['walls'] = []
  meter, own = report.Meter(), 0.0
  for i in range(-args.warmup, args.steps):
    if not i:
      meter, own = report.Meter(), 0.0
    start = time.perf_counter()
    for name, found in results.items():
      turns = [(ours, found)]
      if theirs is not None and 'peft' in found:
        turns.append((theirs, found['peft']))
      for worker, into in turns:
        time.sleep(_PAUSE_S)
        took = worker.step(name)
        own += took['cpu']
        if i >= 0:
          into['walls'].append(took['wall'])
    seconds = time.perf_counter() - start
    which = f'round {i + 1}' if i >= 0 else 'to warm up'
    print(f'{which}: {seconds:.0f} s', flush=True)
  return meter.others(own + meter.cpu_seconds())


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
  """All results, and where and how they were measured."""
  load = os.getloadavg()[0]
  ours, theirs, others = Worker('ours', args), None, None
  try:
    names = chosen(args.methods, ours.do('names'))
    results = count(ours, names)
    where = ours.do('where')
    args.sizes = where['sizes']
    if args.times:
      if args.peft:
        theirs = ready(args, results)
      others = rounds(ours, theirs, args, results)
  finally:
    for worker in (ours, theirs):
      if worker is not None:
        worker.close()
  made = [
    f'{args.model}: batch {args.batch}, inputs {args.inputs}, targets '
    f'{args.targets}, soft tokens besides, dropout {args.dropout}.',
    report.machine(where['platform'], where['device']),
    where['version'] + '.',
  ]
  if args.times:
    made.append(
      f'{args.steps} steps in turns after {args.warmup} to warm up, median '
      f'(min to max). {report.quiet(load, others)}'
    )
  return results, '\n'.join(made)


def chosen(said: str, names: Sequence[str]) -> list[str]:
  """The methods to measure, full fine-tuning first.

  Raises:
    ValueError: an unknown name.
  """
  wanted = said.split(',') if said else list(names)
  if unknown := set(wanted) - set(names):
    raise ValueError(
      f'No method {", ".join(sorted(unknown))}; there are {", ".join(names)}.'
    )
  whole = method_report.WHOLE
  return [whole, *(name for name in wanted if name != whole)]


# ---- command line ----------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    description=(__doc__ or '').split('\n', 1)[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add = parser.add_argument
  add('--model', default='t5_1_1_small', help='of gin_configs/models')
  add('--methods', default='', help='comma-separated; all by default')
  add('--times', action=argparse.BooleanOptionalAction, default=True,
      help='else compile only: parameters, FLOPs, memory, bytes')  # fmt: skip
  add('--peft', action=argparse.BooleanOptionalAction, default=True,
      help='beside ours, where it is installed')  # fmt: skip
  add('--activations', default='fine_tune,lst',
      help='methods compiled twice more, for larger batches: what their '
      'scratch memory grows by are activations')  # fmt: skip
  add('--batch', type=int, default=8)
  add('--inputs', type=int, default=64, help='tokens, without soft ones')
  add('--targets', type=int, default=8, help='tokens')
  add('--dropout', type=float, default=0.1)
  add('--scan', action='store_true',
      help='layers stacked as a method has them by default, not apart (as '
      'last_layers needs them)')  # fmt: skip
  add('--steps', type=int, default=5, help='measured, of each')
  add('--warmup', type=int, default=1, help='steps before, of each')
  add('--quick', action='store_true', help='a check: tiny and few')
  add('--out', type=pathlib.Path,
      help='folder for methods_MODEL.md, .json and .png; here by default, none '
      'with --quick')  # fmt: skip
  if parser.parse_args(argv).quick:
    parser.set_defaults(**_QUICK)
  args = parser.parse_args(argv)
  if not args.quick and args.out is None:
    args.out = HERE
  return args


def write(results: Any, made: str, args: argparse.Namespace) -> None:
  """Prints the tables; writes them, the numbers and the picture."""
  tables = [made, method_report.costs(results)]
  if timed := method_report.times(results):
    tables.append(timed)
  tables.append('\n'.join(f'*   {x}' for x in method_report.aims(results)))
  text = '\n\n'.join(tables)
  print(f'\n{text}')
  if args.out is None:
    return
  args.out.mkdir(parents=True, exist_ok=True)
  stem = args.out / f'methods_{args.model}'
  stem.with_suffix('.md').write_text(text + '\n')
  found = {'made': made, 'methods': results}
  stem.with_suffix('.json').write_text(json.dumps(found, indent=1) + '\n')
  title = f'{args.model}, batch {args.batch}'
  method_report.draw(results, title, stem.with_suffix('.png'))
  print(f'\nWritten: {stem}.md, .json, .png')


def main() -> None:
  """Measures, prints, writes."""
  args = parse()
  os.environ.update(_ENV)
  out, args.out = args.out, None
  with tempfile.TemporaryDirectory() as args.folder:
    results, made = measure(args)
  args.out = out
  write(results, made, args)


if __name__ == '__main__':
  main()
