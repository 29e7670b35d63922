"""The template language: one line from the columns of a row to a text.

    review: {sentence|cut} {if title}Title: {title|keep} {end}It was <mask>.

-   `{column}`: the column, text or a number;
-   `{column|cut}`, `{column|keep}`: it gives way first where the text is too
    long; it never does (see `fitting.py`);
-   `{column: bad | good}`: a word, by its number in the column, from 0, or the
    word itself;
-   `{if column}...{else}...{end}`: the first part where the column is not
    empty, that is no blank text, false or null; a number never is;
-   `<soft:k>`: soft token k of the task's prompt, anywhere;
-   `<mask>`: a blank to fill: T5's sentinels, the first `<extra_id_0>`;
-   `{{` and `}}`: braces.

Soft tokens and words mix freely: a template of words alone is hard, one of soft
tokens and columns alone soft. Not for tensors: `rendering.py`.

Source: parts of a template, and which of them may be cut: Schick & Schuetze
2021 (PET), arXiv 2001.07676; soft tokens between words: Liu et al. 2021
(P-tuning), arXiv 2103.10385; as known from the papers.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import json
import re
from typing import Any

from prompt_jax import deltas
from prompt_jax.row_files import UserDataError

RULES = ('keep', '', 'cut')  # by what a part is worth when text is too long
FIXED, PLAIN, CUT = range(3)

_TOKEN = re.compile(
  r'\{\{|\}\}|\{[^{}]*\}|[{}]|<soft:\d{1,6}>|<soft:[^>\s]*>?|<mask>'
)


class TemplateError(UserDataError):
  """A template is wrong, or a row has not what it needs."""


@dataclasses.dataclass(frozen=True)
class Words:
  """Fixed text; soft tokens are part of it."""

  text: str


@dataclasses.dataclass(frozen=True)
class Mask:
  """Blank number `index` of the text."""

  index: int


@dataclasses.dataclass(frozen=True)
class Field:
  """A column; `place` is where it stands in the template."""

  name: str
  place: int
  rule: str = ''
  choices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Condition:
  """`{if name}then{else}other{end}`."""

  name: str
  place: int
  then: tuple['Piece', ...]
  other: tuple['Piece', ...]


Piece = Words | Mask | Field | Condition
Part = tuple[str, int]  # text, and one of FIXED, PLAIN and CUT


@dataclasses.dataclass(frozen=True)
class Template:
  """A parsed template.

  Attributes:
    text: as it was written.

  Raises:
    TemplateError: the text is no template; it shows the place.
  """

  text: str

  def __post_init__(self):
    _ = self.pieces  # what is wrong is said at once

  @functools.cached_property
  def pieces(self) -> tuple[Piece, ...]:
    """The parts, in their order."""
    return _Parser(self.text).pieces()

  @functools.cached_property
  def fields(self) -> tuple[str, ...]:
    """Columns that are shown or asked about, each once."""
    return tuple(dict.fromkeys(p.name for p in self.named))

  @functools.cached_property
  def named(self) -> tuple[Field | Condition, ...]:
    """The pieces that read a column, those inside of conditions too."""
    found = _walk(self.pieces)
    return tuple(p for p in found if isinstance(p, Field | Condition))

  @property
  def choices(self) -> tuple[Field, ...]:
    """The fields that choose a word."""
    return tuple(p for p in self.named if isinstance(p, Field) and p.choices)

  @property
  def num_masks(self) -> int:
    """Blanks of a text."""
    indices = [p.index for p in _walk(self.pieces) if isinstance(p, Mask)]
    return max(indices, default=-1) + 1

  @functools.cached_property
  def soft_tokens(self) -> tuple[int, ...]:
    """The numbers k of its `<soft:k>`, ascending."""
    words = [p.text for p in _walk(self.pieces) if isinstance(p, Words)]
    found = {int(k) for w in words for k in re.findall(r'<soft:(\d+)>', w)}
    return tuple(sorted(found))

  @property
  def kind(self) -> str:
    """'hard' without soft tokens, 'soft' without words, else 'mixed'."""
    if not self.soft_tokens:
      return 'hard'
    words = [p.text for p in _walk(self.pieces) if isinstance(p, Words)]
    left = re.sub(r'<soft:\d+>', '', ''.join(words)).strip()
    return 'mixed' if left else 'soft'

  @property
  def needs_fitting(self) -> bool:
    """Whether trimming the text at its end would not do."""
    rules = any(isinstance(p, Field) and p.rule for p in self.named)
    return rules or self.num_masks > 0

  def parts(self, row: Mapping[str, Any], masks: Sequence[str]) -> list[Part]:
    """The text of a row in parts, each with its rule.

    Args:
      row: column -> text or number.
      masks: the text of each blank, as `masks.texts` gives them.

    Raises:
      TemplateError: the row has no such column, or nothing to show in it.
    """
    return list(self._parts(self.pieces, row, masks))

  def render(
    self, row: Mapping[str, Any], masks: Sequence[str] | None = None
  ) -> str:
    """The text of a row; the arguments are those of `parts`.

    >>> Template('{a} is <mask>{if b}, {b}{end}.').render({'a': 1, 'b': ''})
    '1 is <extra_id_0>.'
    """
    if masks is None:
      masks = [f'<extra_id_{i}>' for i in range(self.num_masks)]
    return ''.join(text for text, _ in self.parts(row, masks))

  def _parts(
    self, pieces: Sequence[Piece], row: Mapping[str, Any], masks: Sequence[str]
  ) -> Iterator[Part]:
    for piece in pieces:
      if isinstance(piece, Words):
        yield piece.text, FIXED
      elif isinstance(piece, Mask):
        yield masks[piece.index], FIXED
      elif isinstance(piece, Condition):
        self.check_columns(row, [piece])
        chosen = piece.then if _holds(row[piece.name]) else piece.other
        yield from self._parts(chosen, row, masks)
      else:
        self.check_columns(row, [piece])
        yield _value(row[piece.name], piece), rule_of(piece)

  def check_columns(
    self,
    columns: Mapping[str, Any],
    pieces: Sequence[Field | Condition] | None = None,
  ) -> None:
    """Refuses columns of which one is missing.

    Raises:
      TemplateError: one is; with near misses and its place.
    """
    for piece in self.named if pieces is None else pieces:
      if piece.name in columns:
        continue
      near = deltas.near_misses(piece.name, columns)
      near = re.sub(r"'(.*?)'", r'{\1}', near)
      raise TemplateError(
        f'no column {piece.name!r}, which template {self.text!r} needs.{near} '
        f'The columns: {", ".join(map(str, columns)) or "none"}.'
        f'{pointer(self.text, piece.place)}'
      )


def rule_of(piece: Field) -> int:
  """FIXED, PLAIN or CUT."""
  return FIXED if piece.choices else RULES.index(piece.rule)


def chosen(value: Any, choices: Sequence[str], name: str) -> int:
  """The number of the choice that a column names, by its text or its number.

  Raises:
    TemplateError: it names none.
  """
  text = str(value)
  if text in choices:
    return list(choices).index(text)
  listed = ', '.join(f'{i} = {c!r}' for i, c in enumerate(choices))
  try:
    index = int(value) if isinstance(value, bool) else int(text)
  except ValueError:
    near = deltas.near_misses(text, choices)
    raise TemplateError(
      f'column {name!r} holds {text!r}, which is no label.{near} '
      f'The labels: {listed}.'
    ) from None
  if not 0 <= index < len(choices):
    raise TemplateError(
      f'column {name!r} holds label number {index}, but they are: {listed}.'
    )
  return index


def pointer(text: str, place: int) -> str:
  """The line of a text, and a caret under a place in it."""
  start = text.rfind('\n', 0, place) + 1
  line = text[start:].split('\n', 1)[0]
  return f'\n  {line}\n  {" " * (place - start)}^'


def _walk(pieces: Sequence[Piece]) -> Iterator[Piece]:
  for piece in pieces:
    yield piece
    if isinstance(piece, Condition):
      yield from _walk(piece.then)
      yield from _walk(piece.other)


def _holds(value: Any) -> bool:
  """Whether there is something in a column; a number always is."""
  if isinstance(value, str):
    return bool(value.strip())
  return value is not None and value is not False


def _value(value: Any, field: Field) -> str:
  if field.choices:
    return field.choices[chosen(value, field.choices, field.name)]
  if isinstance(value, str | int | float):
    return str(value)
  raise TemplateError(
    f'column {field.name!r} holds {json.dumps(value, default=str)[:40]}, '
    'expected text or a number.'
  )


class _Parser:
  """Reads a template from left to right."""

  def __init__(self, text: str):
    self.text = text
    self.tokens = self._split()
    self.at = 0
    self.open: list[int] = []  # places of the conditions that are open

  def _split(self) -> list[tuple[str, int, bool]]:
    """(text, place, whether it is special) of each token."""
    out, end = [], 0
    for found in _TOKEN.finditer(self.text):
      if found.start() > end:
        out.append((self.text[end : found.start()], end, False))
      out.append((found[0], found.start(), True))
      end = found.end()
    if end < len(self.text):
      out.append((self.text[end:], end, False))
    return out

  def error(self, place: int, what: str) -> TemplateError:
    return TemplateError(
      f'Template {self.text!r}: {what}{pointer(self.text, place)}'
    )

  def pieces(self) -> tuple[Piece, ...]:
    found, _, _ = self._sequence(0)
    return found

  def _sequence(self, masks: int) -> tuple[tuple[Piece, ...], str, int]:
    """Pieces up to the end of a branch, what ended it, and blanks so far."""
    out: list[Piece] = []

    def add(text: str) -> None:
      if out and isinstance(out[-1], Words):
        text = out.pop().text + text  # pyright: ignore
      out.append(Words(text))

    while self.at < len(self.tokens):
      text, place, special = self.tokens[self.at]
      self.at += 1
      inside = text[1:-1].strip()
      if not special or re.fullmatch(r'<soft:\d{1,6}>', text):
        add(text)
      elif text in ('{{', '}}'):
        add(text[0])
      elif text == '<mask>':
        out.append(Mask(masks))
        masks += 1
      elif text.startswith('<soft:'):
        raise self.error(
          place, 'a soft token is <soft:k>, k of one to six digits.'
        )
      elif text in ('{', '}'):
        what = 'not closed' if text == '{' else 'not opened'
        raise self.error(
          place, f'the brace is {what}. A brace itself is written {{{{ or }}}}.'
        )
      elif self.open and inside in ('else', 'end'):
        return tuple(out), inside, masks
      elif text.startswith('{if '):
        condition, masks = self._condition(inside[3:].strip(), place, masks)
        out.append(condition)
      else:
        out.append(self._field(text[1:-1], place))
    if self.open:
      raise self.error(self.open[-1], '{if ...} has no {end}.')
    return tuple(out), '', masks

  def _condition(
    self, name: str, place: int, masks: int
  ) -> tuple[Condition, int]:
    self._check_name(name, '', place)
    self.open.append(place)
    then, end, after = self._sequence(masks)
    other: tuple[Piece, ...] = ()
    after_other = masks
    if end == 'else':
      other, end, after_other = self._sequence(masks)
      if end == 'else':
        at = self.tokens[self.at - 1][1]
        raise self.error(at, 'a second {else} of one {if ...}.')
    if after != after_other:
      raise self.error(
        place, 'both parts of a condition must hold as many <mask>.'
      )
    self.open.pop()
    return Condition(name, place, then, other), after

  def _field(self, content: str, place: int) -> Field:
    name, colon, words = content.partition(':')
    if colon and '|' in words:
      choices = tuple(word.strip() for word in words.split('|'))
      name = name.strip()
      self._check_name(name, '', place)
      if not all(choices):
        raise self.error(place, 'one of the choices is empty.')
      return Field(name, place, choices=choices)
    name, bar, rule = content.partition('|')
    if bar:
      name, rule = name.strip(), rule.strip()
    if bar and rule not in ('cut', 'keep'):
      near = deltas.near_misses(rule, ('cut', 'keep'))
      raise self.error(
        place, f'what follows | is cut or keep, not {rule!r}.{near}'
      )
    self._check_name(name, content, place)
    return Field(name, place, rule)

  def _check_name(self, name: str, content: str, place: int) -> None:
    if not name.strip() or set(name) & set('.[]:!'):
      raise self.error(
        place,
        'only plain columns such as {text} are filled in, and choices such as '
        f'{{label: bad | good}}, not {{{content or name}}}.',
      )
