"""Templates made of parts: PTR's conjunctions, ProQA's keys and values."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from prompt_jax import deltas
from prompt_jax.templates.files import Prompt
from prompt_jax.templates.language import Template


@dataclasses.dataclass(frozen=True)
class SubPrompt:
  """One condition of a rule, such as the type of a subject.

  Attributes:
    text: a template with one `<mask>`, as 'the <mask> {subject|keep}'.
    words: what the mask may be.
  """

  text: str
  words: tuple[str, ...]

  def __post_init__(self):
    object.__setattr__(self, 'words', tuple(self.words))
    found = Template(self.text).num_masks
    if found != 1:
      raise ValueError(
        f'A sub-prompt has one <mask>, but {self.text!r} has {found}.'
      )
    if len(set(self.words)) < max(len(self.words), 1):
      raise ValueError(
        f'The words of {self.text!r} must be different, got {self.words}.'
      )


@dataclasses.dataclass(frozen=True)
class Rules:
  """PTR: each class is a conjunction of sub-prompts, a word for each.

  The template is that of all sub-prompts, one behind the other; the score of a
  class sums the logits of its words, each at its own blank:

      log p(c) = log softmax_c  sum_j logits_j[word_j(c)]

  Attributes:
    sub_prompts: J of them.
    classes: class -> J words.
    context: template of what stands in front of the sub-prompts.

  Raises:
    ValueError: no classes, a class of another number of words, a word that its
      sub-prompt has not, or two classes with the same words.

  Source: Han et al. 2021, arXiv 2105.11259, sections 3.2 and 3.3, as known from
  the paper; checked against thunlp/PTR `src/modeling.py`.
  """

  sub_prompts: tuple[SubPrompt, ...]
  classes: Mapping[str, Sequence[str]]
  context: str = ''

  def __post_init__(self):
    object.__setattr__(self, 'sub_prompts', tuple(self.sub_prompts))
    seen: dict[tuple[str, ...], str] = {}
    for name, given in self.classes.items():
      words = tuple(given)
      if len(words) != len(self.sub_prompts):
        raise ValueError(
          f'Class {name!r} has {len(words)} words for '
          f'{len(self.sub_prompts)} sub-prompts: {words}.'
        )
      for word, sub in zip(words, self.sub_prompts, strict=True):
        if word not in sub.words:
          raise ValueError(
            f'Class {name!r}: {word!r} is no word of {sub.text!r}.'
            f'{deltas.near_misses(word, sub.words)}'
          )
      if words in seen:
        raise ValueError(
          f'Classes {seen[words]!r} and {name!r} have the same words {words}.'
        )
      seen[words] = name
    if len(seen) < 2 or not self.sub_prompts:
      raise ValueError('Rules need sub-prompts and two classes or more.')

  @functools.cached_property
  def index(self) -> Int[np.ndarray, 'C J']:
    """Number of each class's word in its sub-prompt's words."""
    rows = [
      [s.words.index(w) for w, s in zip(words, self.sub_prompts, strict=True)]
      for words in self.classes.values()
    ]
    return np.asarray(rows, np.int32)

  def prompt(self, name: str, label: str = 'label') -> Prompt:
    """The conjunction as templates of inputs and targets.

    The targets hold each blank and its word, which stand where teacher forcing
    reads the blanks' logits: `<mask> word <mask> word`.

    Args:
      name: of the template.
      label: the column with the class's number.
    """
    parts = [self.context, *(s.text for s in self.sub_prompts)]
    columns = zip(*self.classes.values(), strict=True)
    words = [f'<mask> {{{label}: {" | ".join(column)}}}' for column in columns]
    inputs = ' '.join(part for part in parts if part)
    return Prompt(name, Template(inputs), Template(' '.join(words)))

  def log_probs(
    self, logits: Sequence[Float[Array, 'B W']]
  ) -> Float[Array, 'B C']:
    """Log-probabilities of the classes.

    Args:
      logits: at each blank those of its own words.
    """
    scores = [
      jnp.take(jnp.asarray(x), self.index[:, j], axis=-1)
      for j, x in enumerate(self._checked(logits))
    ]
    return jax.nn.log_softmax(sum(scores), axis=-1)

  def loss(
    self, logits: Sequence[Float[Array, 'B W']], labels: Int[Array, ' B']
  ) -> Float[Array, ' B']:
    """Cross entropy of the classes, plus the blanks' own on average.

    Args:
      logits: at each blank those of its own words.
      labels: numbers of the classes.
    """
    joint = self.log_probs(logits)
    out = -jnp.take_along_axis(joint, labels[:, None], axis=-1)[:, 0]
    for j, x in enumerate(logits):
      gold = jnp.asarray(self.index[:, j])[labels]
      logs = jax.nn.log_softmax(jnp.asarray(x), axis=-1)
      own = jnp.take_along_axis(logs, gold[:, None], axis=-1)[:, 0]
      out -= own / len(self.sub_prompts)
    return out

  def _checked(
    self, logits: Sequence[Float[Array, 'B W']]
  ) -> Sequence[Float[Array, 'B W']]:
    got = [x.shape[-1] for x in logits]
    want = [len(s.words) for s in self.sub_prompts]
    if got != want:
      raise ValueError(
        f'logits must be those of {want} words, one array a blank, got {got}.'
      )
    return logits


@dataclasses.dataclass(frozen=True)
class StructuralPrompt:
  """ProQA: soft tokens of a format and a task, then keys and their values.

      <format> <task> <key> value <key> value ...

  A key, a format and a task are `rows` soft tokens each, the same wherever they
  stand, so that tasks share those of their format and of their keys. They lie
  in one table, [rows * (formats + tasks + keys), D], in that order.

  Attributes:
    formats: names.
    tasks: name -> its format.
    keys: names, as 'question' and 'passage'.
    rows: soft tokens of each.

  Raises:
    ValueError: a name that is not there or comes twice, or rows below 1.

  Source: Zhong et al. 2022, arXiv 2205.04040, section 3.2, as known from the
  paper; the paper's keys are words of the vocabulary.
  """

  formats: tuple[str, ...]
  tasks: Mapping[str, str]
  keys: tuple[str, ...]
  rows: int = 1

  def __post_init__(self):
    for task, name in self.tasks.items():
      if name not in self.formats:
        raise ValueError(
          f'Task {task!r} has the format {name!r}, which is none of '
          f'{", ".join(self.formats)}.{deltas.near_misses(name, self.formats)}'
        )
    for names in (self.formats, self.keys):
      if len(set(names)) < len(names):
        raise ValueError(f'A name comes twice in {names}.')
    if self.rows < 1:
      raise ValueError(f'rows must be at least 1, got {self.rows}.')

  @property
  def length(self) -> int:
    """Soft tokens in all, the method's PROMPT_LENGTH."""
    return self.rows * len(self._slots)

  @property
  def _slots(self) -> list[tuple[str, str]]:
    kinds = {'format': self.formats, 'task': self.tasks, 'key': self.keys}
    return [(kind, name) for kind, names in kinds.items() for name in names]

  def numbers(self, kind: str, name: str) -> range:
    """The soft tokens of a 'format', 'task' or 'key'.

    Raises:
      ValueError: there is none of that name.
    """
    names = [other for k, other in self._slots if k == kind]
    if (kind, name) not in self._slots:
      raise ValueError(
        f'There is no {kind} {name!r}.{deltas.near_misses(name, names)} '
        f'There are {", ".join(names)}.'
      )
    start = self.rows * self._slots.index((kind, name))
    return range(start, start + self.rows)

  def template(self, task: str, values: Mapping[str, str]) -> Template:
    """The template of a task.

    Args:
      task: its name.
      values: key -> template of its value, as '{passage|cut}'; a value of one
        column that is empty takes its key with it, if it is written
        '{if options}...{end}'.
    """
    parts = [self._soft('task', task)]
    parts.insert(0, self._soft('format', self.tasks[task]))
    for key, value in values.items():
      soft = self._soft('key', key)
      head = value[: value.index('}') + 1] if value.startswith('{if ') else ''
      parts.append(f'{head}{soft} {value[len(head) :]}')
    return Template(' '.join(parts))

  def _soft(self, kind: str, name: str) -> str:
    return ''.join(f'<soft:{k}>' for k in self.numbers(kind, name))
