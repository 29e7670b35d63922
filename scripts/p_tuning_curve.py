"""P-tuning on a pocket model: accuracy after few and many steps.

    python scripts/p_tuning_curve.py --output=docs/results/p_tuning

A model of width 32 is pretrained to answer 'attribute : sentence' of the pocket
language, for eight attributes. Four soft tokens a task then ask for them: in
front of the sentence (prompt tuning), or in P-tuning's template, two in front,
an anchor that is the word ':', and two behind the sentence. Their embeddings
are a table, or what an MLP or a bidirectional LSTM makes of one. For every
number of steps each is trained anew with several learning rates; the best is
chosen on sentences for validation.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import pathlib
from typing import Any

import ipt_recovery
import jax
from matplotlib import figure as figures
import numpy as np
from prompt_jax.tasks import pocket_language
import small_runs
import tabulate

from prompt_jax.methods import initializers
from prompt_jax.methods.p_tuning import PTuning
from prompt_jax.methods.soft_prompt import SoftPrompt
from prompt_jax.study import plots

TASKS = len(ipt_recovery.ATTRIBUTES)
LENGTH = 4
ANCHOR = pocket_language.ids(':')[0]


@dataclasses.dataclass(frozen=True)
class Method:
  """What is compared.

  Attributes:
    name: in tables.
    module: the method.
    template: whether soft tokens stand in P-tuning's template.
    rates: learning rates to choose from.
  """

  name: str
  module: Any
  template: bool
  rates: Sequence[float]


METHODS = (
  Method(
    'Prompt tuning',
    SoftPrompt(LENGTH, TASKS, initializers.SampledVocab(400)),
    template=False,
    rates=(0.03, 0.1, 0.3),
  ),
  Method(
    'P-tuning, identity',
    PTuning(LENGTH, 'identity', num_tasks=TASKS),
    template=True,
    rates=(0.03, 0.1, 0.3),
  ),
  Method(
    'P-tuning, MLP',
    PTuning(LENGTH, 'mlp', num_tasks=TASKS),
    template=True,
    rates=(0.003, 0.01, 0.03),
  ),
  Method(
    'P-tuning, LSTM',
    PTuning(LENGTH, 'lstm', num_tasks=TASKS),
    template=True,
    rates=(0.003, 0.01, 0.03),
  ),
)


def asked(of: Any, method: Method, stream: int, count: int) -> dict[str, Any]:
  """Sentences with each row's soft tokens in the method's template."""
  data, tasks = ipt_recovery.sentences(stream, count)
  if not method.template:
    return small_runs.prompted(of, data, tasks)
  words = data['encoder_input_tokens']
  soft = of.soft_ids[tasks]
  anchor = np.full((count, 1), ANCHOR)
  parts = [soft[:, :2], anchor, words, soft[:, 2:]]
  text = np.concatenate(parts, axis=1)
  # What is behind the sentence moves up to it: padding stays last.
  order = np.argsort(text == 0, axis=1, kind='stable')
  text = np.take_along_axis(text, order, axis=1).astype(np.int32)
  return {**data, 'encoder_input_tokens': text, 'task_ids': tasks}


class Experiment:
  """A base, and methods trained on it."""

  def __init__(self, base_steps: int = 1500):
    recipe = {'learning_rate': 0.003, 'batch_size': 64}
    data, _ = ipt_recovery.sentences(1, 1 << 16, asked=True)
    self.base = small_runs.base(
      ipt_recovery.CONFIG, data, steps=base_steps, **recipe
    )

  def accuracy(self, method: Method, steps: int, seed: int = 0) -> float:
    """On test sentences in per cent, of the rate best in validation."""
    of = small_runs.model(ipt_recovery.CONFIG, method.module)
    data = asked(of, method, 2, 1 << 14)
    validation, test = (asked(of, method, s, 1 << 12) for s in (3, 4))
    found = []
    for rate in method.rates:
      trained, _ = small_runs.fit(
        of, self.base, self.base, data,
        steps=steps, learning_rate=rate, batch_size=64, seed=seed,
      )  # fmt: skip
      right = [
        100 * float(small_runs.right(of, self.base, trained, x).mean())
        for x in (validation, test)
      ]
      found.append(right)
      jax.clear_caches()
    return max(found)[1]


def write(
  found: dict[str, list[float]], steps: Sequence[int], output: pathlib.Path
) -> None:
  """The table and the picture."""
  output.mkdir(parents=True, exist_ok=True)
  table = tabulate.tabulate(
    [[name, *scores] for name, scores in found.items()],
    ['accuracy after steps', *map(str, steps)],
    tablefmt='github', floatfmt='.1f',
  )  # fmt: skip
  text = (__doc__ or '').split('\n\n')[2]
  chance = 100 * float(np.mean(list(ipt_recovery.CHANCE.values())))
  end = f'In per cent, over all tasks; chance is {chance:.1f}. One seed.'
  lines = ['# P-tuning on a pocket model', '', text, '', table, '', end]
  (output / 'README.md').write_text('\n'.join(lines) + '\n')
  figure = figures.Figure(figsize=(6, 4), layout='constrained')
  axes = figure.subplots()
  for name, scores in found.items():
    axes.plot(steps, scores, marker='o', label=name)
  axes.axhline(chance, color='grey', linestyle=':', label='chance')
  axes.set(
    xscale='log', xlabel='training steps', ylabel='accuracy, per cent',
    title='P-tuning and prompt tuning, pocket model of width 32',
  )  # fmt: skip
  axes.set_xticks(steps, [str(s) for s in steps])
  axes.minorticks_off()
  axes.legend(frameon=False)
  plots.save(figure, [output / 'accuracy.png'])


def main() -> None:
  """Trains, writes and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--output', default='docs/results/p_tuning')
  parser.add_argument('--steps', default='50,100,200,400,800')
  args = parser.parse_args()
  steps = [int(s) for s in args.steps.split(',')]
  experiment = Experiment()
  found = {}
  for method in METHODS:
    found[method.name] = [experiment.accuracy(method, s) for s in steps]
    print(method.name, found[method.name], flush=True)
  output = pathlib.Path(args.output)
  write(found, steps, output)
  print((output / 'README.md').read_text())


if __name__ == '__main__':
  main()
