"""Tables, aims and the picture of `methods.py`."""

from collections.abc import Mapping
import pathlib
import statistics
from typing import Any

from lib import report

# A method's numbers, as `methods.py` gathers them.
Found = Mapping[str, Mapping[str, Any]]

WHOLE = 'fine_tune'  # what memory and times are compared with
LIMIT = 1.1  # of a step's FLOPs, over those of the closed form
LST_SHARE = 0.4  # of full fine-tuning's activations


def excess(found: Mapping[str, Any]) -> float:
  """The compiler's FLOPs over those of the closed form."""
  return found['counted_flops'] / found['closed_flops']


def share(name: str, key: str, results: Found) -> float | None:
  """A number of a method over full fine-tuning's; None where unknown."""
  mine, whole = (results.get(n, {}).get(key) for n in (name, WHOLE))
  return mine / whole if mine is not None and whole else None


def costs(results: Found) -> str:
  """Markdown: what does not depend on how busy the machine is."""
  rows = []
  for name, found in results.items():
    rows.append({
      'method': name,
      'trained': f'{found["trained"]:,}',
      'deployed': _number(found['deployed']),
      'GFLOP counted': f'{found["counted_flops"] / 1e9:,.2f}',
      'closed form': f'{found["closed_flops"] / 1e9:,.2f}',
      'counted / closed': f'{excess(found):.3f}',
      'memory MiB': report.mebibytes(found['peak_bytes']),
      'scratch MiB': report.mebibytes(found['scratch_bytes']),
      "scratch / fine_tune's": _ratio(share(name, 'scratch_bytes', results)),
      'activations MiB': report.mebibytes(found.get('activation_bytes')),
      'file B': f'{found["trained_bytes"]:,}',
      'exported B': _number(found['deployed_bytes']),
    })  # fmt: skip
  return report.table(rows)


def times(results: Found) -> str:
  """Markdown: how long a step takes; '' where nothing was timed."""
  rows = []
  for name, found in results.items():
    if 'walls' not in found:
      continue
    other = found.get('peft', {})
    rows.append({
      'a step of': name,
      'wall s': report.spread(found['walls']),
      "of fine_tune's": report.spread(pairs(found['walls'], results)),
      'PEFT wall s': report.spread(other.get('walls', [])),
      "PEFT, of fine_tune's": report.spread(
        pairs(other.get('walls', []), results)
      ),
      'ours / PEFT': report.spread([
        x / y
        for x, y in zip(found['walls'], other.get('walls', []), strict=False)
      ]),
      'PEFT trains': _number(other.get('trained')),
    })  # fmt: skip
  return report.table(rows) if rows else ''


def pairs(walls: list[float], results: Found) -> list[float]:
  """Over full fine-tuning's step of the same round."""
  whole = results[WHOLE]['walls']
  return [x / y for x, y in zip(walls, whole, strict=False)]


def aims(results: Found) -> list[str]:
  """What was to be reached, and whether it was."""
  over = {n: excess(f) for n, f in results.items() if excess(f) > LIMIT}
  said = ', '.join(f'{n} {x:.2f}' for n, x in over.items())
  lines = [
    f'No step counts more than {LIMIT} times its closed form: '
    + (f'NOT MET by {said}.' if over else 'met.')
  ]
  for key, what in (
    ('scratch_bytes', 'scratch memory, gradients included,'),
    ('activation_bytes', 'activations (scratch that grows with the batch)'),
  ):
    if (x := share('lst', key, results)) is not None:
      met = 'met' if x < LST_SHARE else 'NOT MET'
      lines.append(
        f"LST's {what} under {LST_SHARE:.0%} of full fine-tuning's: "
        f'{x:.1%}, {met}.'
      )
  for name, found in results.items():
    if full := found.get('with_kernel_gradients_flops'):
      counted = found['counted_flops']
      met = 'met' if counted < full else 'NOT MET'
      lines.append(
        f'{name} forms no gradient of a whole weight that it changes: '
        f'{counted / 1e9:,.2f} GFLOP counted, at least {full / 1e9:,.2f} if it '
        f'did: {met}.'
      )
  return lines


def draw(results: Found, title: str, path: pathlib.Path) -> None:
  """FLOPs, scratch memory and, if timed, the step, over fine-tuning's."""
  import matplotlib

  matplotlib.use('agg')
  from matplotlib import pyplot as plt

  names = sorted(results, key=lambda n: results[n]['counted_flops'])
  timed = 'walls' in results[WHOLE]
  fig, axes = plt.subplots(
    1, 2 + timed, figsize=(9, 0.9 + 0.2 * len(names)), sharey=True
  )
  places = range(len(names))

  def shares(key: str) -> list[float]:
    return [share(name, key, results) or 0.0 for name in names]

  axes[0].barh(places, shares('counted_flops'), color='tab:blue', alpha=0.5)
  whole = results[WHOLE]['counted_flops']
  closed = [results[name]['closed_flops'] / whole for name in names]
  axes[0].plot(closed, places, '|', color='black', label='closed form')
  axes[0].legend(fontsize=7, loc='lower right')
  axes[0].set_xlabel('FLOPs of a step')
  axes[1].barh(places, shares('scratch_bytes'), color='tab:green', alpha=0.5)
  axes[1].set_xlabel('scratch memory')
  if timed:
    _draw_times(axes[2], names, results)
  for ax in axes:
    ax.axvline(1.0, color='gray', linewidth=0.5)
  axes[0].set_yticks(places, names, fontsize=7)
  fig.suptitle(f'{title}: over full fine-tuning', fontsize=9)
  fig.tight_layout()
  fig.savefig(path, dpi=100)
  plt.close(fig)


def _draw_times(ax: Any, names: list[str], results: Found) -> None:
  for i, name in enumerate(names):
    mine = statistics.median(pairs(results[name]['walls'], results))
    ax.barh(i, mine, color='tab:blue', alpha=0.5)
    if walls := results[name].get('peft', {}).get('walls'):
      other = statistics.median(pairs(walls, results))
      ax.plot(other, i, 'o', color='tab:orange', markersize=4)
  ax.set_xlabel('wall time of a step (dots: PEFT)')


def _number(value: int | None) -> str:
  return '-' if value is None else f'{value:,}'


def _ratio(value: float | None) -> str:
  return '-' if value is None else f'{value:.3f}'
