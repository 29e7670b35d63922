"""IPT on a pocket model: how much of prompt tuning few numbers recover.

    python scripts/ipt_recovery.py --output=docs/results/ipt

A model of width 32 is pretrained to answer 'attribute : sentence' of the pocket
language, for eight attributes. A prompt is tuned for each, in place of the
question; `ipt.Subspace` is trained on six of them (seen), and with
`ipt.SubspacePrompt` the numbers of all eight are tuned on other sentences, with
that decoder and with a random one.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np
from prompt_jax.tasks import pocket_language
import small_runs

from prompt_jax import checkpoints
from prompt_jax import recovery
from prompt_jax.methods import initializers
from prompt_jax.methods import ipt
from prompt_jax.methods import saved_prompts
from prompt_jax.methods.soft_prompt import SoftPrompt
from prompt_jax.network.layers import T5Config
from prompt_jax.study import plots

ATTRIBUTES = list(pocket_language.ATTRIBUTES)
UNSEEN = ('speed', 'weather')
SEEN = tuple(a for a in ATTRIBUTES if a not in UNSEEN)
CONFIG = T5Config(
  vocab_size=pocket_language.SIZE,
  emb_dim=32,
  num_heads=4,
  head_dim=8,
  mlp_dim=64,
  num_encoder_layers=2,
  num_decoder_layers=2,
  relpos_num_buckets=16,
  relpos_max_distance=48,
)
LENGTH, HIDDEN = 4, 64
CHANCE = {a: 1 / len(v) for a, v in pocket_language.ATTRIBUTES.items()}


@dataclasses.dataclass(frozen=True)
class Steps:
  """How long each part is trained."""

  base: int = 1500
  prompts: int = 800
  subspace: int = 600
  numbers: int = 600


def sentences(
  stream: int, count: int, asked: bool = False
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """Sentences with the value of an attribute as target, and which it is, [n].

  With `asked` the attribute stands in front.
  """
  rng = pocket_language.generator(0, 60, stream)
  words, values = pocket_language.Language(0).sentences(rng, count)
  tasks = rng.integers(len(ATTRIBUTES), size=count)
  ids = [pocket_language.ids(' '.join(v)) for v in
         pocket_language.ATTRIBUTES.values()]  # fmt: skip
  answers = [ids[t][values[i, t]] for i, t in enumerate(tasks)]
  question = np.zeros((count, 0), np.int32)
  if asked:
    names = pocket_language.ids(' '.join(ATTRIBUTES))[tasks]
    colon = np.full(count, pocket_language.ids(':')[0])
    question = np.stack([names, colon], axis=1)
  inputs = pocket_language.with_prompt(words, question)
  return small_runs.rows(inputs, np.array(answers)[:, None]), tasks


class Experiment:
  """The base, the tuned prompts, and what a subspace makes of them."""

  def __init__(self, steps: Steps = Steps()):
    self.steps = steps
    recipe = {'learning_rate': 0.003, 'batch_size': 64}
    asked, _ = sentences(1, 1 << 16, asked=True)
    self.base = small_runs.base(CONFIG, asked, steps=steps.base, **recipe)
    self.test, self.test_tasks = sentences(4, 1 << 13)
    init = initializers.SampledVocab(400)
    method = SoftPrompt(LENGTH, len(ATTRIBUTES), init)
    found, self.tuned = self._train(method, 2, steps.prompts, 0.1)
    self.prompts = found['method']['prompt']

  def _train(
    self,
    method: Any,
    stream: int,
    steps: int,
    rate: float,
    names: Sequence[str] = ATTRIBUTES,
    **adamw: Any,
  ) -> tuple[Any, recovery.Scores]:
    """What a method learns of these tasks, and its accuracy in per cent."""
    of = small_runs.model(CONFIG, method)
    frozen = {**self.base, 'constants': of.constants(self.base)}
    data, tasks = _only(*sentences(stream, 1 << 15), names)
    test, test_tasks = _only(self.test, self.test_tasks, names)
    found, _ = small_runs.fit(
      of, frozen, self.base, small_runs.prompted(of, data, tasks),
      steps=steps, learning_rate=rate, batch_size=128, **adamw,
    )  # fmt: skip
    batch = small_runs.prompted(of, test, test_tasks)
    right = small_runs.right(of, frozen, found, batch)
    scores = {
      name: 100 * float(right[test_tasks == i].mean())
      for i, name in enumerate(names)
    }
    return found, scores

  def subspace(self, dimension: int, folder: pathlib.Path) -> recovery.Scores:
    """Stage 1 on the seen tasks; writes its file."""
    places = [ATTRIBUTES.index(a) for a in SEEN]
    saved_prompts.write(str(folder / 'seen.npy'), self.prompts[places])
    sources = (str(folder / 'seen.npy'),)
    method = ipt.Subspace(sources, LENGTH, dimension, HIDDEN, alpha=1.0)
    found, scores = self._train(
      method, 2, self.steps.subspace, 0.01, SEEN, global_norm_clip_threshold=1.0
    )
    path = folder / f'{dimension}.safetensors'
    checkpoints.save_trainable(path, found, {})
    return scores

  def numbers(self, dimension: int, path: str | None) -> recovery.Scores:
    """Stage 2 on all tasks, other sentences; None is a random decoder."""
    method = ipt.SubspacePrompt(
      path, LENGTH, dimension, len(ATTRIBUTES), hidden_dim=HIDDEN
    )
    return self._train(method, 3, self.steps.numbers, 0.3)[1]


def _only(
  data: dict[str, np.ndarray], tasks: np.ndarray, names: Sequence[str]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """The rows of some attributes, numbered anew."""
  places = [ATTRIBUTES.index(name) for name in names]
  number = np.full(len(ATTRIBUTES), -1)
  number[places] = np.arange(len(places))
  keep = number[tasks] >= 0
  return {k: x[keep] for k, x in data.items()}, number[tasks][keep]


def compare(
  experiment: Experiment, dimensions: Sequence[int]
) -> dict[str, list[recovery.Recovery]]:
  """What is recovered at each dimension, by the title of its table."""
  decoded, tuned, random = [], [], []
  reference = experiment.tuned
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    for k in dimensions:
      scores = experiment.subspace(k, folder)
      decoded.append(recovery.compare(scores, reference, k))
      for kind, path in (
        (tuned, str(folder / f'{k}.safetensors')),
        (random, None),
      ):
        scores = experiment.numbers(k, path)
        kind.append(recovery.compare(scores, reference, k, UNSEEN))
      jax.clear_caches()
  return {
    'Decoded prompts of the subspace': decoded,
    'Tuned numbers, decoder of the subspace': tuned,
    'Tuned numbers, random decoder': random,
  }


def write(
  found: dict[str, list[recovery.Recovery]], output: pathlib.Path
) -> None:
  """Tables and the picture."""
  output.mkdir(parents=True, exist_ok=True)
  lines = ['# IPT on a pocket model', '', (__doc__ or '').split('\n\n')[2], '']
  for title, results in found.items():
    table = recovery.table(results, 'accuracy')
    lines += [f'## {title}', '', '```', table, '```', '']
  chance = ', '.join(f'{a} {100 * x:.1f}' for a, x in CHANCE.items())
  lines.append(f'Chance is {chance}. One seed.')
  (output / 'README.md').write_text('\n'.join(lines) + '\n')
  _, tuned, random = found.values()
  figure = recovery.draw(tuned, 'accuracy', {'random decoder': random})
  plots.save(figure, [output / 'recovery.png'])


def main() -> None:
  """Trains, writes and prints."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--output', default='docs/results/ipt')
  parser.add_argument('--dimensions', default='2,5,10,32')
  args = parser.parse_args()
  output = pathlib.Path(args.output)
  dimensions = [int(k) for k in args.dimensions.split(',')]
  write(compare(Experiment(), dimensions), output)
  print((output / 'README.md').read_text())


if __name__ == '__main__':
  main()
