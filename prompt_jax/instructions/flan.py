"""FLAN: template sets, options, exemplars; whole clusters are held out.

A run's data in place of `user_data.UserData`; see `runs/flan.gin`.

An example of a training set is rendered by template i modulo their number, the
inverted ones among them. A direct one may end with its options:

    OPTIONS:
    - no
    - yes

and exemplars, rendered by the same template, may stand in front. A held-out set
is evaluated with each of its direct templates.

Source: Wei et al. 2021, arXiv 2109.01652, section 2, and Longpre et al. 2023,
arXiv 2301.13688, as known from the papers; google-research/FLAN
`flan/templates.py`, `flan/mixtures.py`, `flan/preprocessors.py`. The templates
are our own.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses

import numpy as np
import seqio

from prompt_jax import deltas
from prompt_jax.instructions import prompted
from prompt_jax.instructions import rows as rows_lib
from prompt_jax.instructions import t0
from prompt_jax.instructions.prompted import Heldout
from prompt_jax.instructions.prompted import Ranked
from prompt_jax.row_files import UserDataError
from prompt_jax.templates import sets
from prompt_jax.templates.files import Prompt
from prompt_jax.templates.files import PromptSet
from prompt_jax.templates.language import CUT
from prompt_jax.templates.language import FIXED
from prompt_jax.templates.language import PLAIN

Part = tuple[str, int]
SEPARATOR = '\n\n'


@dataclasses.dataclass(frozen=True)
class FlanSet:
  """A benchmark task and its templates.

  Attributes:
    templates: a name of `templates.sets.SETS`.
    labels: words of the labels, in the task's order.
    columns: the set's column -> the task's.
  """

  templates: str
  labels: tuple[str, ...]
  columns: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def prompts(self) -> PromptSet:
    """The templates with these labels and columns."""
    return sets.get(self.templates, self.labels, self.columns)


_POLARITY = ('negative', 'positive')
_NLI = ('yes', 'maybe', 'no')
_SENTENCES = {'premise': 'sentence1', 'hypothesis': 'sentence2'}
_QUESTIONS = {'sentence1': 'question1', 'sentence2': 'question2'}
_ANLI = FlanSet('nli', _NLI, {'premise': 'context'})
SETS: Mapping[str, FlanSet] = {
  'glue_sst2': FlanSet('sentiment', _POLARITY, {'text': 'sentence'}),
  'imdb': FlanSet('sentiment', _POLARITY),
  'mr': FlanSet('sentiment', _POLARITY),
  'cr': FlanSet('sentiment', _POLARITY),
  'sst5': FlanSet(
    'sentiment',
    ('very negative', 'negative', 'neutral', 'positive', 'very positive'),
  ),
  'glue_mnli': FlanSet('nli', _NLI),
  'snli': FlanSet('nli', _NLI),
  'anli_r1': _ANLI,
  'anli_r2': _ANLI,
  'anli_r3': _ANLI,
  'glue_rte': FlanSet('nli', ('yes', 'no'), _SENTENCES),
  'glue_wnli': FlanSet('nli', ('no', 'yes'), _SENTENCES),
  'super_glue_rte': FlanSet('nli', ('yes', 'no')),
  'super_glue_cb': FlanSet('nli', ('yes', 'no', 'maybe')),
  'glue_mrpc': FlanSet('paraphrase', ('no', 'yes')),
  'glue_qqp': FlanSet('paraphrase', ('no', 'yes'), _QUESTIONS),
}


@dataclasses.dataclass(frozen=True)
class Flan:
  """The mixture as a configuration.

  Attributes:
    data_sets: names of `SETS`, held-out ones included; (): all.
    holdout: names among them, or clusters; the rest of a held-out one's cluster
      is left out of training too.
    lengths: tokens of inputs and targets, EOS included: texts marked `cut` give
      way, and exemplars are left out whole, the first ones first.
    max_rows: training rows of a data set, the first.
    cap: the most that a data set counts for: rate min(rows, cap).
    eval_rows: rows of a held-out set, the first.
    inverted: whether to train on inverted templates.
    options_share: share of direct training examples with their options.
    exemplars: in front of some training examples; 0: of none.
    exemplar_share: share of training examples with exemplars.
    eval_exemplars: in front of each held-out example, from its training rows.
    rows_dir: folder of local rows; None: TFDS.
    seed: of the draws.
  """

  data_sets: Sequence[str] = ()
  holdout: Sequence[str] = ()
  lengths: Mapping[str, int] | None = None
  max_rows: int | None = 30_000
  cap: int = 3_000
  eval_rows: int | None = 200
  inverted: bool = True
  options_share: float = 1.0
  exemplars: int = 0
  exemplar_share: float = 0.5
  eval_exemplars: int = 0
  rows_dir: str | None = None
  seed: int = 0
  # Each data set has its own.
  labels = None
  given = True

  def __post_init__(self):
    for name in ('options_share', 'exemplar_share'):
      share = getattr(self, name)
      if not 0 <= share <= 1:
        raise UserDataError(f'{name} must be from 0 to 1, got {share}.')
    for name in ('exemplars', 'eval_exemplars'):
      if getattr(self, name) < 0:
        raise UserDataError(f'{name} must be 0 or more.')
    if self.cap < 1:
      raise UserDataError(f'cap must be 1 or more, got {self.cap}.')

  def register(self, name: str, vocabulary: seqio.Vocabulary) -> seqio.Mixture:
    """Registers all tasks and the mixture.

    Raises:
      UserDataError: a name, file or row is wrong; or nothing is left to train
        on or to evaluate.
    """
    names = list(self.data_sets) or list(SETS)
    unknown = [x for x in names if x not in SETS]
    if unknown:
      raise UserDataError(
        f'There are no FLAN templates of {unknown[0]!r}.'
        f'{deltas.near_misses(unknown[0], SETS)} There are those of '
        f'{", ".join(SETS)}.'
      )
    trained, held_out = t0.divide(names, self.holdout)
    length = (self.lengths or {}).get('inputs')
    fit = _Fit(vocabulary, None if length is None else length - 1)
    rates = {}
    for data_set in trained:
      task = prompted.task_name(name, data_set)
      examples = self._examples(data_set, fit)
      prompted.add_training(task, examples, vocabulary)
      rates[task] = float(min(len(examples), self.cap))
    evaluated = []
    for data_set in held_out:
      for prompt, rows in self._ranked(data_set, fit).items():
        task = prompted.task_name(name, 'held_out', data_set, prompt)
        about = Heldout(data_set, prompt)
        prompted.add_ranked(task, about, rows, vocabulary)
        evaluated.append(task)
    return prompted.register(name, rates, evaluated)

  def _rows(self, data_set: str, split: str, limit: int | None) -> list:
    rows = rows_lib.read(data_set, split, self.rows_dir, limit)
    labelled = [row for row in rows if row['label'] >= 0]
    if not labelled:
      raise UserDataError(f'No row of {data_set!r} ({split}) has a label.')
    return labelled

  def _examples(self, data_set: str, fit: '_Fit') -> list[dict[str, str]]:
    """The training examples, row i by template i modulo their number."""
    entry = SETS[data_set]
    rows = self._rows(data_set, 'train', self.max_rows)
    prompts = entry.prompts.prompts if self.inverted else entry.prompts.direct
    direct = {p.name for p in entry.prompts.direct}
    rng = np.random.default_rng(self.seed)
    out = []
    for i, row in enumerate(rows):
      prompt = prompts[i % len(prompts)]
      asked = prompt.name in direct and rng.random() < self.options_share
      labels = entry.labels if asked else ()
      count = self.exemplars if rng.random() < self.exemplar_share else 0
      # One more, for the row itself may be among them.
      drawn = rng.permutation(len(rows))[: count + 1] if count else ()
      shown = [rows[j] for j in drawn if j != i][:count]
      inputs = assemble(prompt, row, shown, labels, fit)
      out.append({'inputs': inputs, 'targets': prompt.targets.render(row)})
    return out

  def _ranked(self, data_set: str, fit: '_Fit') -> dict[str, list[Ranked]]:
    """The held-out rows by each direct template."""
    entry = SETS[data_set]
    rows = self._rows(data_set, 'validation', self.eval_rows)
    pool = []
    if self.eval_exemplars:
      pool = self._rows(data_set, 'train', self.max_rows)
    labels = entry.labels if self.options_share else ()
    out = {}
    for prompt in entry.prompts.direct:
      rng = np.random.default_rng(self.seed)
      found = out[prompt.name] = []
      for row in rows:
        drawn = rng.permutation(len(pool))[: self.eval_exemplars]
        shown = [pool[j] for j in drawn]
        inputs = assemble(prompt, row, shown, labels, fit)
        right = [prompt.targets.render(row)]
        found.append(Ranked(inputs, prompt.label_texts, right))
    return out


def options(labels: Sequence[str]) -> str:
  r"""The suffix that lists the options; '' for none.

  >>> options(['no', 'yes'])
  '\nOPTIONS:\n- no\n- yes'
  """
  return '\nOPTIONS:' + ''.join(f'\n- {x}' for x in labels) if labels else ''


def assemble(
  prompt: Prompt,
  row: Mapping[str, object],
  exemplars: Sequence[Mapping[str, object]],
  labels: Sequence[str],
  fit: '_Fit',
) -> str:
  """Exemplars, the text of a row, and its options, as long as they fit."""
  parts = [*prompt.inputs.parts(row, ()), (options(labels), FIXED)]
  text = fit(parts)
  front = ''
  # The first are left out first: those in front of the text stay longest.
  for shown in reversed(exemplars):
    inputs = prompt.inputs.render(shown) + options(labels)
    one = f'{inputs}\n{prompt.targets.render(shown)}{SEPARATOR}'
    if not fit.holds(one + front + text):
      break
    front = one + front
  return front + text


class _Fit:
  """Cuts a text of parts until it fits, as `templates.fitting` does.

  Args:
    vocabulary: that counts.
    room: tokens without EOS; None: no end.
  """

  def __init__(self, vocabulary: seqio.Vocabulary, room: int | None):
    self.vocabulary, self.room = vocabulary, room

  def holds(self, text: str) -> bool:
    """Whether a text is short enough."""
    return self.room is None or len(self.vocabulary.encode(text)) <= self.room

  def __call__(self, parts: Sequence[Part]) -> str:
    """The text; where nothing may be cut it is as long as it is."""
    text = ''.join(part for part, _ in parts)
    if self.holds(text):
      return text
    caps: dict[int, int] = {}
    for rule in (CUT, PLAIN):
      longest = max((len(p) for p, r in parts if r == rule), default=0)
      cut = _with_cap(parts, caps, rule)
      low, high = 0, longest
      while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if self.holds(cut(middle)) else (
          low, middle - 1,
        )  # fmt: skip
      text = cut(low)
      if self.holds(text):
        return text
      caps[rule] = 0
    return text


def _with_cap(
  parts: Sequence[Part], caps: Mapping[int, int], rule: int
) -> Callable[[int], str]:
  def cut(cap: int) -> str:
    limits = {**caps, rule: cap}
    return ''.join(part[: limits.get(r)] for part, r in parts)

  return cut
