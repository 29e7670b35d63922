"""Tasks in the pocket language, a synthetic English (`pocket_language.py`).

`register(vocabulary)` registers them if the vocabulary is `vocabulary()`, the
language's own. For each language s of `LANGUAGES`:

    pocket{s}_pretrain       256,000 examples of span corruption and queries
    pocket{s}_queries        fresh sentences, queries in the forms that
                             pretraining asks; its `token_accuracy` is how well
                             pretraining was learned, and its validation split
                             is that of `pretrain`, too
    pocket{s}_mood           is it happy? yes, no
    pocket{s}_agent          human, animal or machine? one, two, three
    pocket{s}_group          is it of food, trade, travel, health? yes, no
    pocket{s}_place          inside or outside? left, right
    pocket{s}_mood_design_0  and so on: 'is happy :' and the sentence

Pretraining never asks of a mood whether it 'is happy', has no word for the
group, and never reads 'one' or 'left': a method has to teach these answers. The
classes are balanced, and no two sentences of a task are the same.

Prompt design words the question, not the answers: every method ranks the task's
own labels. With answers of its own ('mood :' answered by happy or sad) a design
would ask what pretraining asked, and `pocket{s}_queries` tells how well that
goes. A study picks one of a task's designs on validation.

Language 0 is for trying out recipes; studies report the others, so that what is
reported was not chosen on them. Texts are made as ids, with padding: one core
reads about 100,000 examples a second. Not for another vocabulary.
"""

from collections.abc import Mapping
import dataclasses
import functools

import numpy as np
import seqio

from prompt_jax import metrics
from prompt_jax import vocabularies

from . import arrays
from . import pocket_language
from . import postprocessors
from .pocket_language import ATTRIBUTES

LANGUAGES = (0, 1, 2, 3)


@dataclasses.dataclass(frozen=True)
class Spec:
  """A classification.

  Attributes:
    attribute: that it is about.
    labels: the answers.
    classes: of each value of the attribute, the index of its label.
    designs: hand-written prompts, put in front of the sentence.
  """

  attribute: str
  labels: tuple[str, ...]
  classes: tuple[int, ...]
  designs: tuple[str, ...]


SPECS = {
  'mood': Spec(
    'mood', ('no', 'yes'), (1, 0),
    ('is happy :', 'mood :', 'happy or sad :', 'yes or no :',
     'mood is happy :', ''),
  ),
  'agent': Spec(
    'agent', ('one', 'two', 'three'), (0, 1, 2),
    ('agent :', 'human or animal :', 'animal or machine :', 'is human :',
     'one or two :', ''),
  ),
  'group': Spec(
    'topic', ('no', 'yes'), (1, 0, 0, 1, 0, 1, 1, 0),
    ('topic :', 'is food :', 'is trade :', 'is travel :', 'is health :',
     'food or trade :'),
  ),
  'place': Spec(
    'place', ('left', 'right'), (0, 1),
    ('place :', 'inside or outside :', 'is inside :', 'is outside :',
     'left or right :', ''),
  ),
}  # fmt: skip

# Of every classification: the texts of its labels.
LABELS = {
  f'pocket{seed}_{name}{end}': spec.labels
  for seed in LANGUAGES
  for name, spec in SPECS.items()
  for end in ('', *(f'_design_{i}' for i in range(len(spec.designs))))
}

_SIZES = {'train': 4096, 'validation': 1024, 'test': 1024}
_PRETRAIN_SIZES = {'train': 256_000, 'validation': 2048}
_QUERIES_SIZES = {'validation': 2048, 'test': 2048}
# What a language draws from its seed, after itself: each from its own numbers.
_STREAMS = ('language', 'train', 'validation', 'queries', *SPECS)


def vocabulary() -> vocabularies.SoftTokenVocabulary:
  """The vocabulary of every pocket language: 472 ids and 8 sentinels."""
  return vocabularies.SoftTokenVocabulary(
    vocabularies.WordVocabulary(
      pocket_language.WORDS, extra_ids=pocket_language.SENTINELS
    )
  )


def register(given: seqio.Vocabulary) -> list[str]:
  """Registers the tasks; with another vocabulary, takes them away.

  Returns:
    Their names.
  """
  if given != vocabulary():
    for seed in LANGUAGES:
      for name in _names(seed):
        seqio.TaskRegistry.remove(name)
    return []
  names = []
  for seed in LANGUAGES:
    pretrain, ask, *classify = _names(seed)
    rows = functools.partial(_pretrain, seed)
    names.append(arrays.add(pretrain, given, rows, _PRETRAIN_SIZES))
    rows = functools.partial(_queries, seed)
    names.append(
      arrays.add(
        ask, given, rows, _QUERIES_SIZES, metric_fn=metrics.exact_match
      )
    )
    for name in classify:
      names.append(_add_classification(name, given))
  return names


def _names(seed: int) -> list[str]:
  start = f'pocket{seed}_'
  classify = [name for name in LABELS if name.startswith(start)]
  return [f'{start}pretrain', f'{start}queries', *classify]


def _add_classification(name: str, given: seqio.Vocabulary) -> str:
  language, task, *design = name.split('_')
  spec = SPECS[task]
  rows = functools.partial(
    _classification,
    int(language.removeprefix('pocket')),
    task,
    spec.designs[int(design[1])] if design else '',
  )
  labels = postprocessors.LabelId(spec.labels)
  return arrays.add(name, given, rows, _SIZES, labels, metrics.accuracy)


def _generator(seed: int, stream: str) -> np.random.Generator:
  return pocket_language.generator(seed, _STREAMS.index(stream))


@functools.lru_cache(maxsize=2)
def _pretrain(seed: int, split: str) -> arrays.Rows:
  if split == 'validation':  # as of `queries`: what pretraining is judged by
    return _queries(seed, split)
  inputs, targets = pocket_language.Language(seed).examples(
    _generator(seed, split), _PRETRAIN_SIZES[split]
  )
  return {'inputs': inputs, 'targets': targets}


def _queries(seed: int, split: str) -> arrays.Rows:
  rng = _generator(seed, 'queries')
  n = sum(_QUERIES_SIZES.values())
  language = pocket_language.Language(seed)
  inputs, answers, _ = pocket_language.queries(rng, *language.sentences(rng, n))
  part = _part(_QUERIES_SIZES, split)
  # Without EOS: token accuracy is then that of the answers.
  return {'inputs': inputs[part], 'targets': answers[part, None]}


def _classification(
  seed: int, task: str, design: str, split: str
) -> arrays.Rows:
  sentences, labels = _sentences(seed, task)
  part = _part(_SIZES, split)
  prompt = pocket_language.ids(design)
  answers = pocket_language.ids(' '.join(SPECS[task].labels))[labels[part]]
  eos = np.full_like(answers, pocket_language.EOS)
  return {
    'inputs': pocket_language.with_prompt(sentences[part], prompt),
    'targets': np.stack([answers, eos], 1),
  }


@functools.lru_cache(maxsize=len(SPECS))
def _sentences(seed: int, task: str) -> tuple[np.ndarray, np.ndarray]:
  """Different sentences of all splits with balanced classes, and the classes.

  The classes take turns, so that the first so many rows are balanced too.
  """
  spec, total = SPECS[task], sum(_SIZES.values())
  drawn, values = pocket_language.Language(seed).sentences(
    _generator(seed, task), 2 * total
  )
  _, first = np.unique(drawn, axis=0, return_index=True)
  different = np.sort(first)
  value = values[different, list(ATTRIBUTES).index(spec.attribute)]
  drawn_labels = np.array(spec.classes)[value]
  labels = np.concatenate(
    [np.arange(n) % len(spec.labels) for n in _SIZES.values()]
  )
  taken = np.empty(total, int)
  for label in range(len(spec.labels)):
    where = np.flatnonzero(labels == label)
    found = np.flatnonzero(drawn_labels == label)
    taken[where] = different[found[: len(where)]]
  return drawn[taken], labels


def _part(sizes: Mapping[str, int], split: str) -> slice:
  """The rows of a split, if the splits lie one after another."""
  names = list(sizes)
  start = sum(sizes[name] for name in names[: names.index(split)])
  return slice(start, start + sizes[split])
