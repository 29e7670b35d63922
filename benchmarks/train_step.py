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
from collections.abc import Mapping, Sequence
import dataclasses
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from typing import Any

import workers

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


@dataclasses.dataclass
class Result:
  """What is known of a contestant.

  Attributes:
    info: what it said at the start and at the end.
    steps: `wall`, `cpu` and `faults` of each step, in the order of the rounds.
  """

  info: dict[str, Any]
  steps: list[dict[str, float]]

  def all(self, key: str) -> list[float]:
    """One number of each step."""
    return [step[key] for step in self.steps]

  def median(self, key: str) -> float:
    """Its median."""
    return statistics.median(self.all(key))


Results = dict[str, Result]


# ---- measuring -------------------------------------------------------------


def contestants(args: argparse.Namespace) -> list[str]:
  """Names, in the order of their turns."""
  ours = args.variants.split(',')
  if args.env == 'malloc':
    ours += [f'{name}+malloc' for name in ours]
  dtypes = sorted({_dtype(name) for name in ours}, reverse=True)
  names = [*ours]
  missing = [n for n in _PEFT_NEEDS if importlib.util.find_spec(n) is None]
  if missing and args.peft:
    print(f'Without PEFT: {", ".join(missing)} not installed.')
  elif args.peft:
    names += ['peft' if d == 'float32' else f'peft+{d}' for d in dtypes]
  libraries = ['jax'] if 'torch' in missing else ['jax', 'torch']
  names += [f'product:{lib}:{d}' for d in dtypes for lib in libraries]
  return names


def _dtype(name: str) -> str:
  return 'bfloat16' if 'bfloat16' in name else 'float32'


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
    if name.startswith('peft') or name.startswith('product:torch'):
      from workers import peft_torch as library
    else:
      from workers import ours as library
    if name.startswith('product'):
      return library.Product(args.matmul, name.split(':')[2])
    cls = library.Peft if name.startswith('peft') else library.Ours
    return cls(args, name)

  workers.serve(make)


def measure(args: argparse.Namespace) -> tuple[Results, float | None]:
  """All contestants in turns, and the share of the machine others used."""
  names = contestants(args)
  groups = [[name] for name in names] if args.one_at_a_time else [names]
  results: Results = {}
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
  results: Results,
) -> float | None:
  """One step of each, again and again; the share of the machine of others."""
  for worker in running:
    results[worker.name] = Result(dict(worker.info), [])
  for _ in range(args.warmup):
    for worker in running:
      worker.step(1)
  before = time.perf_counter(), _busy_seconds()
  for i in range(args.steps):
    line = []
    for worker in running:
      time.sleep(_PAUSE_S)
      found = worker.step(args.inner)
      results[worker.name].steps.append(found)
      line.append(f'{worker.name} {found["wall"]:.4g} s')
    print(f'round {i + 1}: {", ".join(line)}', flush=True)
  after = time.perf_counter(), _busy_seconds()
  if before[1] is None or after[1] is None:
    return None
  own = sum(sum(results[w.name].all('cpu')) for w in running) * args.inner
  capacity = (after[0] - before[0]) * (os.cpu_count() or 1)
  return max(0.0, after[1] - before[1] - own) / capacity


def _busy_seconds() -> float | None:
  """CPU seconds of all processes, stolen ones too; None where unknown."""
  try:
    line = pathlib.Path('/proc/stat').read_text().split('\n', 1)[0]
  except OSError:
    return None
  ticks = [int(x) for x in line.split()[1:9]]
  idle, iowait = ticks[3:5]
  return (sum(ticks) - idle - iowait) / os.sysconf('SC_CLK_TCK')


def flops_of_a_step(results: Results, args: argparse.Namespace) -> float:
  """The compiler's count, of a program in which no layer is in a loop."""
  for name, result in results.items():
    if name.startswith(('loop', 'unrolled_scan')) and '+remat' not in name:
      return result.info['flops']
  worker = start('loop', args, None)
  worker.close()
  return worker.info['flops']


# ---- reporting -------------------------------------------------------------


def partner(name: str, results: Results) -> Result | None:
  """The PEFT contestant of the same dtype."""
  suffix = '+bfloat16' if _dtype(name) == 'bfloat16' else ''
  return results.get(f'peft{suffix}')


def ratios(name: str, key: str, results: Results) -> list[float]:
  """Ours / PEFT, round by round; empty where there is no PEFT."""
  other = partner(name, results)
  if other is None or name.startswith('peft'):
    return []
  pairs = zip(results[name].all(key), other.all(key), strict=True)
  return [x / y for x, y in pairs]


def spread(values: Sequence[float], form: str = '.3g') -> str:
  """'median (min to max)'."""
  if not values:
    return '-'
  low, middle, high = min(values), statistics.median(values), max(values)
  return f'{middle:{form}} ({low:{form}} to {high:{form}})'


def peak(name: str, library: str, results: Results) -> float | None:
  """FLOP/s of the interleaved products of the contestant's dtype."""
  product = results.get(f'product:{library}:{_dtype(name)}')
  return product and product.info['flops'] / product.median('wall')


def row(cells: Sequence[Any]) -> str:
  """A line of a Markdown table."""
  return f'| {" | ".join(map(str, cells))} |'


def tables(results: Results, flops: float) -> str:
  """Markdown: time, then size."""
  shown = {k: v for k, v in results.items() if not k.startswith('product')}
  head = ['', 'wall s', 'CPU s', 'page faults', '% of JAX peak',
          '% of torch peak', 'wall, ours / PEFT', 'CPU, ours / PEFT']  # fmt: skip
  lines = [row(head), row(['---'] * len(head))]
  for name, r in shown.items():
    shares = []
    for library in ('jax', 'torch'):
      top = peak(name, library, results)
      shares.append(f'{flops / r.median("wall") / top:.1%}' if top else '-')
    lines.append(
      row([
        name, spread(r.all('wall')), spread(r.all('cpu')),
        f'{r.median("faults"):,.0f}', *shares,
        spread(ratios(name, 'wall', results)),
        spread(ratios(name, 'cpu', results)),
      ])
    )  # fmt: skip
  head = ['', 'compile s', 'MiB after imports', 'peak MiB', 'scratch MiB',
          'device peak MiB', 'trained part, bytes', 'checkpoint, bytes',
          'GFLOP counted']  # fmt: skip
  lines += ['', row(head), row(['---'] * len(head))]
  for name, r in shown.items():
    info = r.info
    compile_s = info.get('compile_s')
    lines.append(
      row([
        name, f'{compile_s:.1f}' if compile_s else '-',
        *(mebibytes(info.get(f'{key}_bytes'))
          for key in ('imports', 'peak', 'scratch', 'device')),
        f'{info["trained_bytes"]:,}', f'{info["checkpoint_bytes"]:,}',
        f'{info["flops"] / 1e9:,.1f}',
      ])
    )  # fmt: skip
  return '\n'.join(lines)


def mebibytes(number: float | None) -> str:
  """Bytes as MiB."""
  return '-' if number is None else f'{number / 2**20:,.0f}'


def heading(
  args: argparse.Namespace,
  results: Results,
  flops: float,
  load: float,
  others: float | None,
) -> str:
  """What was measured, where, and how quiet it was there."""
  versions = sorted({r.info['version'] for r in results.values()})
  first = next(iter(results.values())).info
  lines = [
    f'{args.model}: batch {args.batch}, inputs {args.inputs}, targets '
    f'{args.targets}, prompt {args.prompt}, dropout {args.dropout}; '
    f'{args.steps} steps in turns after {args.warmup} to warm up, median '
    '(min to max).',
    f'On {first["platform"]} ({first["device"]}), {os.cpu_count()} CPUs '
    f'({processor()}), {"; ".join(versions)}.',
    f'The compiler counts {flops / 1e12:.4g} TFLOP in a step. Products of '
    f'{args.matmul} x {args.matmul} matrices: '
    + ', '.join(
      f'{name.split(":", 1)[1]} '
      f'{r.info["flops"] / r.median("wall") / 1e9:,.0f} GFLOP/s'
      for name, r in results.items()
      if name.startswith('product')
    )
    + '.',
    f'Load before the start: {load:.2f}.',
  ]
  if others is not None:
    lines.append(
      f'Other processes (the kernel among them) used {others:.0%} of the '
      f'CPUs{": THE MACHINE WAS BUSY" if others > 0.1 else ""}.'
    )
  return '\n'.join(lines)


def processor() -> str:
  """Its name."""
  try:
    text = pathlib.Path('/proc/cpuinfo').read_text()
  except OSError:
    return platform.processor()
  names = [s for s in text.splitlines() if s.startswith('model name')]
  return names[0].split(':', 1)[1].strip() if names else platform.machine()


def draw(results: Mapping[str, Result], title: str, path: pathlib.Path) -> None:
  """Wall and CPU seconds of each contestant, each step a point."""
  import matplotlib

  matplotlib.use('agg')
  from matplotlib import pyplot as plt

  shown = {k: v for k, v in results.items() if not k.startswith('product')}
  height = 0.9 + 0.35 * len(shown)
  fig, axes = plt.subplots(1, 2, figsize=(7, height), sharey=True)
  for ax, key in zip(axes, ('wall', 'cpu'), strict=True):
    for i, (name, r) in enumerate(shown.items()):
      color = 'tab:orange' if name.startswith('peft') else 'tab:blue'
      ax.barh(i, r.median(key), color=color, alpha=0.5)
      values = r.all(key)
      ax.plot(values, [i] * len(values), '|', color='black', markersize=6)
    ax.set_xlabel('wall seconds a step' if key == 'wall' else 'CPU seconds')
    ax.set_xlim(left=0)
  axes[0].set_yticks(range(len(shown)), list(shown))
  axes[0].invert_yaxis()
  fig.suptitle(title, fontsize=9)
  fig.tight_layout()
  fig.savefig(path, dpi=100)
  plt.close(fig)


# ---- command line ----------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  """The command line, with defaults that suit the backend."""
  parser = argparse.ArgumentParser(
    description=(__doc__ or '').split('\n', 1)[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add = parser.add_argument
  add('--variants', default='scan,unrolled_scan,loop',
      help='ours: scan, unrolled_scan or loop, each with any of +bfloat16, '
      '+cudnn, +nodropout, +remat, +malloc')  # fmt: skip
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
      help='matrices for the peak; 0: 4096 on CPUs, 16384 elsewhere')  # fmt: skip
  add('--one-at-a-time', action='store_true',
      help='no turns; always so on TPUs, which one process holds')  # fmt: skip
  add('--quick', action='store_true', help='a check: tiny and few')
  add('--out', type=pathlib.Path,
      help='folder for train_step.md and train_step.png; here by default, none '
      'with --quick')  # fmt: skip
  args = parser.parse_args(argv)
  if args.quick:
    given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(_QUICK)))
    for name, value in _QUICK.items():
      if getattr(given, name) is None:
        setattr(args, name, value)
  elif args.out is None:
    args.out = HERE
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
  text = heading(args, results, flops, load, others)
  text += '\n\n' + tables(results, flops)
  print(f'\n{text}')
  if out is not None:
    out.mkdir(parents=True, exist_ok=True)
    (out / 'train_step.md').write_text(text + '\n')
    title = text.split('\n', 1)[0].split(';')[0]
    draw(results, title, out / 'train_step.png')
    print(f'\nWritten: {out / "train_step.md"}, {out / "train_step.png"}')


if __name__ == '__main__':
  main()
