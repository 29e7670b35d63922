r"""Named templates: a line of a file, or a list for one task.

    # reviews.txt
    was: {sentence} It was <mask>. ||| <mask> {label: terrible | great}
    write: Write a {label: bad | good} review. ||| {sentence}

A line is `name: inputs ||| targets`; `\n` is a line break, and lines that start
with # are comments. `@reviews.txt:was` names a line wherever a template may
stand: in `--inputs`, in gin, in `find`.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import pathlib
import re
from typing import Any

import tensorflow as tf

from prompt_jax import deltas
from prompt_jax import row_files
from prompt_jax.templates.language import Template
from prompt_jax.templates.language import TemplateError
from prompt_jax.templates.rendering import Rendering

ASSIGNMENTS = ('cycle', 'all', 'random')
_REFERENCE = re.compile(r'@([^{}<>\s]+?)(?::([\w.-]+))?')
_NAME = re.compile(r'\s*([\w.-]+):\s')


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A pair of templates.

  Attributes:
    name: what it is called.
    inputs: template of the inputs.
    targets: template of the targets.
  """

  name: str
  inputs: Template
  targets: Template

  @property
  def label_texts(self) -> tuple[str, ...]:
    """The target of each choice, if a choice is all that the targets read."""
    named = self.targets.named
    if len(named) != 1 or not self.targets.choices:
      return ()
    [field] = self.targets.choices
    return tuple(
      self.targets.render({field.name: i}).strip()
      for i in range(len(field.choices))
    )

  @property
  def rendering(self) -> Rendering:
    """The seqio preprocessor."""
    return Rendering(self.inputs, self.targets)


@dataclasses.dataclass(frozen=True)
class PromptSet:
  """Templates of one task, as FLAN's ten.

  Attributes:
    name: of the task.
    prompts: with names of their own; they read the same columns, or some.

  Raises:
    ValueError: no templates, or two of one name.

  Source: Wei et al. 2021, arXiv 2109.01652, section 2.1 (ten templates a data
  set, up to three of them inverted), as known from the paper; assigned in
  turn as in google-research/FLAN `flan/preprocessors.py`.
  """

  name: str
  prompts: tuple[Prompt, ...]

  def __post_init__(self):
    object.__setattr__(self, 'prompts', tuple(self.prompts))
    names = [p.name for p in self.prompts]
    twice = [name for name in names if names.count(name) > 1]
    if twice or not names:
      raise ValueError(
        f'The templates of {self.name!r} need names, each its own; got '
        f'{f"{twice[0]!r} twice" if twice else "no templates"}.'
      )

  def __len__(self) -> int:
    return len(self.prompts)

  def __getitem__(self, name: str) -> Prompt:
    for prompt in self.prompts:
      if prompt.name == name:
        return prompt
    names = [p.name for p in self.prompts]
    raise ValueError(
      f'{self.name!r} has no template {name!r}.'
      f'{deltas.near_misses(name, names)} It has {", ".join(names)}.'
    )

  @property
  def asked(self) -> str:
    """The column that most of the templates ask for."""
    found = [name for p in self.prompts for name in p.targets.fields]
    return max(dict.fromkeys(found), key=found.count, default='')

  @property
  def inverted(self) -> tuple[Prompt, ...]:
    """Those that swap what is asked: its column stands in the inputs."""
    return tuple(p for p in self.prompts if self._is_inverted(p))

  @property
  def direct(self) -> tuple[Prompt, ...]:
    """The others, by which a task is evaluated."""
    return tuple(p for p in self.prompts if not self._is_inverted(p))

  def _is_inverted(self, prompt: Prompt) -> bool:
    given, wanted = prompt.inputs.fields, prompt.targets.fields
    return self.asked in given and self.asked not in wanted

  def preprocessor(
    self, assign: str = 'cycle', evaluating: bool = False
  ) -> Callable[..., tf.data.Dataset]:
    """A seqio preprocessor that renders each row by one of the templates.

    A row also gets `template`, the number of its own.

    Args:
      assign: 'cycle', row i by template i modulo their number; 'all', each row
        by each of them, one after another; 'random', by draws with seqio's
        seed, so that another epoch has others.
      evaluating: by the direct ones only.

    Raises:
      ValueError: another `assign`, or no direct template.
    """
    if assign not in ASSIGNMENTS:
      raise ValueError(
        f'assign must be one of {", ".join(ASSIGNMENTS)}, got {assign!r}.'
        f'{deltas.near_misses(str(assign), ASSIGNMENTS)}'
      )
    prompts = self.direct if evaluating else self.prompts
    if not prompts:
      raise ValueError(f'All templates of {self.name!r} are inverted.')

    def render(
      dataset: tf.data.Dataset,
      output_features: Mapping[str, Any],
      sequence_length: Mapping[str, int] | None = None,
      seed: Any = None,
    ) -> tf.data.Dataset:
      rendered = [
        p.rendering(dataset, output_features, sequence_length).map(
          _numbered(i), tf.data.AUTOTUNE
        )
        for i, p in enumerate(prompts)
      ]
      # Each is the whole dataset, in the same order: a row is in all of them.
      rows = tf.data.Dataset.zip(tuple(rendered))
      if assign == 'all':
        return rows.flat_map(_each)
      if assign == 'cycle':
        return rows.enumerate().map(
          lambda i, row: _pick(row, tf.cast(i % len(prompts), tf.int32))
        )
      draws = tf.data.Dataset.random(seed=seed)
      return tf.data.Dataset.zip((draws, rows)).map(
        lambda i, row: _pick(row, tf.cast(i % len(prompts), tf.int32))
      )

    return render


def _numbered(number: int) -> Any:
  return lambda row: {**row, 'template': tf.constant(number)}


def _each(*rows: Any) -> tf.data.Dataset:
  first, *rest = [tf.data.Dataset.from_tensors(row) for row in rows]
  for one in rest:
    first = first.concatenate(one)
  return first


def _pick(rows: Sequence[Any], index: tf.Tensor) -> Any:
  return tf.switch_case(index, [lambda row=row: row for row in rows])


def parse_line(line: str, default_name: str = '') -> Prompt:
  """The pair of `name: inputs ||| targets`.

  Raises:
    TemplateError: no name, not two parts, or no template.
  """
  named = _NAME.match(line)
  if named is None and not default_name:
    raise TemplateError('expected `name: inputs ||| targets`, with a name.')
  name = named[1] if named else default_name
  sides = line[named.end() if named else 0 :].split('|||')
  if len(sides) != 2:
    raise TemplateError(
      f'{name}: expected inputs and targets with one ||| between them, got '
      f'{len(sides) - 1} of it.'
    )
  texts = [side.strip().replace('\\n', '\n') for side in sides]
  return Prompt(name, Template(texts[0]), Template(texts[1]))


def read(path: str | pathlib.Path, name: str | None = None) -> PromptSet:
  """The templates of a file.

  Args:
    path: the file.
    name: of the set; None: the file's, without its suffix.

  Raises:
    UserDataError: the file is not there or empty, or a line is wrong: it says
      which.
  """
  path = pathlib.Path(path)
  lines = row_files._text(path).splitlines()
  found: list[Prompt] = []
  for number, line in enumerate(lines, start=1):
    if not line.strip() or line.lstrip().startswith('#'):
      continue
    try:
      found.append(parse_line(line))
      PromptSet(path.stem, tuple(found))
    except ValueError as error:
      raise TemplateError(f'{path}, line {number}: {error}') from None
  if not found:
    raise TemplateError(f'{path}: no templates, only comments.')
  return PromptSet(name or path.stem, tuple(found))


def is_reference(text: str | None) -> bool:
  """Whether a text names a line of a file, `@file:name`."""
  return bool(text and _REFERENCE.fullmatch(text))


def find(reference: str) -> Prompt:
  """The templates that `@file:name` names; `@file` where it has only one.

  Raises:
    UserDataError: there are none.
  """
  named = _REFERENCE.fullmatch(reference)
  if named is None:
    raise TemplateError(f'{reference!r} is no @file:name.')
  found = read(named[1])
  if named[2] is None and len(found) > 1:
    names = ', '.join(p.name for p in found.prompts)
    raise TemplateError(
      f'{named[1]} has {len(found)} templates, so say which, as in '
      f'@{named[1]}:{found.prompts[0].name}. It has {names}.'
    )
  try:
    return found.prompts[0] if named[2] is None else found[named[2]]
  except ValueError as error:
    raise TemplateError(f'{named[1]}: {error}') from None
