"""One step of prompt tuning: prompt_jax beside PEFT on PyTorch, in turns.

Each contestant lives in a process of its own and does one step on request, so
that the steps of all of them alternate on one machine: A B C A B C. The same
shapes, random weights, optimizer (Adafactor, learning rate 0.3) and batch
without padding. Large matrix products, one in JAX and one in PyTorch, take
their turn too: the machine's peak, measured at the same time.

    python benchmarks/train_step.py --variants scan,unrolled_scan,loop

PEFT is optional (`requirements-peft.txt`). Not for comparing results: both
train on noise. The frozen base is random, and data pipelines are left out.
"""

import argparse
from collections.abc import Sequence
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

from lib import report
from lib import workers

HERE = pathlib.Path(__file__).parent
# Threads of the one before may spin for a while after its step.
_PAUSE_S = 0.3
_MALLOC = ':'.join(
  f'glibc.malloc.{name}'
  for name in (
    'mmap_threshold=17179869184',
    'trim_threshold=17179869184',
    'hugetlb=1',
  )
)
_QUICK = {
  'model': 'mini',
  'batch': 4,
  'inputs': 32,
  'targets': 8,
  'prompt': 10,
  'steps': 3,
  'warmup': 1,
  'matmul': 512,
}
_PEFT_NEEDS = ('torch', 'transformers', 'peft')
# One of ours is called by a form and any modifiers, 'loop+bfloat16+malloc'; the
# fields are `T5Config`'s.
_FORMS: dict[str, dict[str, Any]] = {
  'scan': {'scan_layers': True, 'scan_unroll': 1},
  'unrolled_scan': {'scan_layers': True, 'scan_unroll': 0},
  'loop': {'scan_layers': False},
}
_MODIFIERS: dict[str, dict[str, Any]] = {
  'bfloat16': {'dtype': 'bfloat16'},
  'einsum': {'attention_implementation': 'einsum'},
  'xla': {'attention_implementation': 'xla'},
  'cudnn': {'attention_implementation': 'cudnn'},
  'remat': {'remat_policy': 'minimal'},
  'malloc': {},  # the environment's business
}


# ---- measuring -------------------------------------------------------------


def fields_of(variant: str) -> dict[str, Any]:
  """`T5Config`'s fields of one of ours.

  Raises:
    ValueError: an unknown form or modifier.
  """
  form, *modifiers = variant.split('+')
  if form not in _FORMS or not set(modifiers) <= _MODIFIERS.keys():
    raise ValueError(
      f'{variant!r} is no variant: expected one of {", ".join(_FORMS)}, with '
      f'any of +{", +".join(_MODIFIERS)}.'
    )
  fields = dict(_FORMS[form])
  for modifier in modifiers:
    fields |= _MODIFIERS[modifier]
  return fields


def contestants(args: argparse.Namespace) -> list[str]:
  """Names, in the order of their turns."""
  ours = args.variants.split(',')
  if args.env == 'malloc':
    ours += [f'{name}+malloc' for name in ours]
  dtypes = sorted({report.dtype_of(name) for name in ours}, reverse=True)
  names = [*ours]
  missing = [n for n in _PEFT_NEEDS if importlib.util.find_spec(n) is None]
  if missing and args.peft:
    print(f'Without PEFT: {", ".join(missing)} not installed.')
  elif args.peft:
    names += ['peft' if d == 'float32' else f'peft+{d}' for d in dtypes]
  libraries = ['jax'] if 'torch' in missing else ['jax', 'torch']
  names += [f'product:{lib}:{d}' for d in dtypes for lib in libraries]
  return names


def start(name: str, args: argparse.Namespace, sizes: Any) -> workers.Worker:
  """The contestant in a process of its own; returns when it is ready."""
  env = {
    # Several processes share an accelerator.
    'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
    'JAX_ENABLE_COMPILATION_CACHE': 'false',  # or nothing would be compiled
    'HF_HUB_OFFLINE': '1',
    'TF_CPP_MIN_LOG_LEVEL': '2',
  }
  if 'malloc' in name:
    env['GLIBC_TUNABLES'] = _MALLOC
  print(f'starting {name}', flush=True)
  command = [sys.executable, __file__, '--worker', name]
  options = {**vars(args), 'sizes': json.dumps(sizes)}
  return workers.Worker(name, [*command, json.dumps(options)], env)


def work(name: str, args: argparse.Namespace) -> None:
  """The other side of `start`."""

  def make() -> Any:
    if name.startswith(('peft', 'product:torch')):
      from lib import peft_torch as library
    else:
      from lib import ours as library
    if name.startswith('product'):
      return library.Product(args.matmul, name.split(':')[2])
    if name.startswith('peft'):
      return library.Peft(args, report.dtype_of(name))
    return library.Ours(args, fields_of(name))

  workers.serve(make)


def measure(args: argparse.Namespace) -> tuple[report.Results, float | None]:
  """All contestants in turns, and the share of the machine others used."""
  names = contestants(args)
  groups = [[name] for name in names] if args.one_at_a_time else [names]
  results: report.Results = {}
  shares: list[float | None] = []
  sizes = None
  for group in groups:
    running: list[workers.Worker] = []
    try:
      for name in group:
        running.append(start(name, args, sizes))
        sizes = sizes or running[0].info['sizes']
      shares.append(_rounds(running, args, results))
      for worker in running:
        results[worker.name].info |= worker.finish()
    finally:
      for worker in running:
        worker.close()
  found = [share for share in shares if share is not None]
  return results, max(found, default=None)


def _rounds(
  running: Sequence[workers.Worker],
  args: argparse.Namespace,
  results: report.Results,
) -> float | None:
  """One step of each, again and again; the share of the machine of others."""
  for worker in running:
    results[worker.name] = report.Result(dict(worker.info), [])
  for _ in range(args.warmup):
    for worker in running:
      worker.step(1)
  meter = report.Meter()
  for i in range(args.steps):
    line = []
    for worker in running:
      time.sleep(_PAUSE_S)
      found = worker.step(args.inner)
      results[worker.name].steps.append(found)
      line.append(f'{worker.name} {found["wall"]:.4g} s')
    print(f'round {i + 1}: {", ".join(line)}', flush=True)
  own = sum(sum(results[w.name].all('cpu')) for w in running) * args.inner
  return meter.others(own + meter.cpu_seconds())


def flops_of_a_step(results: report.Results, args: argparse.Namespace) -> float:
  """The compiler's count, of a program in which no layer is in a loop."""
  for name, result in results.items():
    if name.startswith(('loop', 'unrolled_scan')) and '+remat' not in name:
      return result.info['flops']
  worker = start('loop', args, None)
  worker.close()
  return worker.info['flops']


# ---- command line ----------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  """The command line, with defaults that suit the backend."""
  parser = argparse.ArgumentParser(
    description=(__doc__ or '').split('\n', 1)[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add = parser.add_argument
  add('--variants', default='scan,unrolled_scan,loop',
      help=f'of ours: {", ".join(_FORMS)}, each with any of '
      f'+{", +".join(_MODIFIERS)}')  # fmt: skip
  add('--env', choices=['plain', 'malloc'], default='plain',
      help='malloc: each of ours a second time, with a glibc that keeps freed '
      'memory')  # fmt: skip
  add('--no-peft', dest='peft', action='store_false', help='ours alone')
  add('--model', default='t5_1_1_small', help='of gin_configs/models')
  add('--batch', type=int, default=32)
  add('--inputs', type=int, default=128, help='tokens, without the prompt')
  add('--targets', type=int, default=16, help='tokens')
  add('--prompt', type=int, default=100, help='soft tokens')
  add('--dropout', type=float, default=0.1)
  add('--steps', type=int, default=10, help='measured, of each')
  add('--warmup', type=int, default=2, help='steps before, of each')
  add('--inner', type=int, default=0,
      help='steps on each turn; 0: 1 on CPUs, 20 elsewhere')  # fmt: skip
  add('--matmul', type=int, default=0,
      help='width of the matrices; 0: 4096 or, elsewhere, 16384')  # fmt: skip
  add('--one-at-a-time', action='store_true',
      help='no turns; always so on TPUs, which one process holds')  # fmt: skip
  add('--quick', action='store_true', help='a check: tiny and few')
  add('--out', type=pathlib.Path,
      help='folder for train_step.md and train_step.png; here by default, none '
      'with --quick')  # fmt: skip
  if parser.parse_args(argv).quick:
    parser.set_defaults(**_QUICK)
  args = parser.parse_args(argv)
  if not args.quick and args.out is None:
    args.out = HERE
  try:
    for variant in args.variants.split(','):
      fields_of(variant)
  except ValueError as e:
    parser.error(str(e))
  return args


def backend() -> str:
  """JAX's, asked in another process: a TPU belongs to who asked first."""
  code = 'import jax; print(jax.default_backend())'
  done = subprocess.run(
    [sys.executable, '-c', code], check=True, capture_output=True, text=True
  )
  return done.stdout.strip()


def main() -> None:
  """Measures, prints, writes."""
  if sys.argv[1:2] == ['--worker']:
    work(sys.argv[2], argparse.Namespace(**json.loads(sys.argv[3])))
    return
  args = parse()
  load = os.getloadavg()[0]
  where = backend()
  args.inner = args.inner or (1 if where == 'cpu' else 20)
  args.matmul = args.matmul or (4096 if where == 'cpu' else 16384)
  args.one_at_a_time |= where == 'tpu'
  out, args.out = args.out, None
  results, others = measure(args)
  flops = flops_of_a_step(results, args)
  text = report.heading(args, results, flops, load, others)
  text += '\n\n' + report.tables(results, flops)
  print(f'\n{text}')
  if out is not None:
    out.mkdir(parents=True, exist_ok=True)
    (out / 'train_step.md').write_text(text + '\n')
    title = text.split('\n', 1)[0].split(';')[0]
    report.draw(results, title, out / 'train_step.png')
    print(f'\nWritten: {out / "train_step.md"}, {out / "train_step.png"}')


if __name__ == '__main__':
  main()
