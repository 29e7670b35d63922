"""Tables and pictures of what was measured, and how quiet the machine was."""

import argparse
from collections.abc import Sequence
import dataclasses
import os
import pathlib
import platform
import statistics
import time
from typing import Any


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


class Meter:
  """How much of the machine other processes use from here on."""

  def __init__(self):
    self._wall = time.perf_counter()
    self._busy = _busy_seconds()
    self._own = time.process_time()

  def cpu_seconds(self) -> float:
    """What this process has used."""
    return time.process_time() - self._own

  def others(self, own: float) -> float | None:
    """The share of all CPUs that others had; None where unknown.

    Args:
      own: CPU seconds of the processes that are no others.
    """
    now = _busy_seconds()
    if self._busy is None or now is None:
      return None
    capacity = (time.perf_counter() - self._wall) * (os.cpu_count() or 1)
    return max(0.0, now - self._busy - own) / capacity


def _busy_seconds() -> float | None:
  """CPU seconds of all processes, stolen ones too."""
  try:
    line = pathlib.Path('/proc/stat').read_text().split('\n', 1)[0]
  except OSError:
    return None
  ticks = [int(x) for x in line.split()[1:9]]
  idle, iowait = ticks[3:5]
  return (sum(ticks) - idle - iowait) / os.sysconf('SC_CLK_TCK')


def dtype_of(name: str) -> str:
  """What a contestant computes in."""
  return 'bfloat16' if 'bfloat16' in name else 'float32'


def partner(name: str, results: Results) -> Result | None:
  """The PEFT contestant of the same dtype."""
  suffix = '+bfloat16' if dtype_of(name) == 'bfloat16' else ''
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
  product = results.get(f'product:{library}:{dtype_of(name)}')
  return product and product.info['flops'] / product.median('wall')


def table(rows: Sequence[dict[str, Any]]) -> str:
  """Markdown, with the keys of the first row as its head."""
  lines = [list(rows[0]), ['---'] * len(rows[0])]
  lines += [list(row.values()) for row in rows]
  return '\n'.join(f'| {" | ".join(map(str, cells))} |' for cells in lines)


def time_row(name: str, results: Results, flops: float) -> dict[str, str]:
  """How long a step takes, beside the machine's peak and beside PEFT."""
  r = results[name]
  shares = {}
  for library in ('JAX', 'torch'):
    top = peak(name, library.lower(), results)
    share = f'{flops / r.median("wall") / top:.1%}' if top else '-'
    shares[f'of the {library} peak'] = share
  return {
    'a step of': name,
    'wall s': spread(r.all('wall')),
    'CPU s': spread(r.all('cpu')),
    'page faults': f'{r.median("faults"):,.0f}',
    **shares,
    'wall, ours / PEFT': spread(ratios(name, 'wall', results)),
    'CPU, ours / PEFT': spread(ratios(name, 'cpu', results)),
  }


def size_row(name: str, info: dict[str, Any]) -> dict[str, str]:
  """What a contestant needs and leaves behind."""
  compile_s = info.get('compile_s')
  return {
    'memory and files of': name,
    'compile s': f'{compile_s:.1f}' if compile_s else '-',
    'after imports MiB': mebibytes(info.get('imports_bytes')),
    'peak MiB': mebibytes(info.get('peak_bytes')),
    "program's scratch MiB": mebibytes(info.get('scratch_bytes')),
    "device's peak MiB": mebibytes(info.get('device_bytes')),
    'trained part B': f'{info["trained_bytes"]:,}',
    'checkpoint B': f'{info["checkpoint_bytes"]:,}',
    'GFLOP counted': f'{info["flops"] / 1e9:,.1f}',
  }


def tables(results: Results, flops: float) -> str:
  """Markdown: time, then memory and files."""
  shown = [name for name in results if not name.startswith('product')]
  times = table([time_row(name, results, flops) for name in shown])
  sizes = table([size_row(name, results[name].info) for name in shown])
  return f'{times}\n\n{sizes}'


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
    machine(first['platform'], first['device']),
    f'{"; ".join(versions)}. {quiet(load, others)}',
    f'The compiler counts {flops / 1e12:.4g} TFLOP in a step. Products of '
    f'{args.matmul} x {args.matmul} matrices: '
    + ', '.join(
      f'{name.split(":", 1)[1]} '
      f'{r.info["flops"] / r.median("wall") / 1e9:,.0f} GFLOP/s'
      for name, r in results.items()
      if name.startswith('product')
    )
    + '.',
  ]
  return '\n'.join(lines)


def machine(platform_name: str, device: str) -> str:
  """Where it was measured."""
  return (
    f'On {platform_name} ({device}), {os.cpu_count()} CPUs ({processor()}).'
  )


def quiet(load: float, others: float | None) -> str:
  """Whether the machine had anything else to do."""
  said = f'Load before the start {load:.2f}'
  if others is None:
    return f'{said}.'
  busy = ': THE MACHINE WAS BUSY' if others > 0.1 else ''
  return f'{said}; other processes used {others:.0%} of the CPUs{busy}.'


def processor() -> str:
  """Its name."""
  try:
    text = pathlib.Path('/proc/cpuinfo').read_text()
  except OSError:
    return platform.processor()
  names = [s for s in text.splitlines() if s.startswith('model name')]
  return names[0].split(':', 1)[1].strip() if names else platform.machine()


def draw(results: Results, title: str, path: pathlib.Path) -> None:
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
