"""Which tokens a template can be made of, and the files of what was found."""

from collections.abc import Mapping, Sequence
import pathlib
import re
from typing import Any

from prompt_jax import checkpoints
from prompt_jax import row_files
from prompt_jax.row_files import UserDataError
from prompt_jax.templates.files import parse_line
from prompt_jax.verbalizers import kpt
from prompt_jax.verbalizers import words as words_lib
from prompt_jax.verbalizers.words import LabelWords

# What has a meaning in a template or in a list of words.
_SPECIAL = re.compile(r'[{}|<>,\s]')


def texts(vocabulary: Any) -> list[str]:
  """The text of each id; '' of one that cannot be written as a word.

  A word is read back as the same one token: so the pieces of SentencePiece
  that begin a word, and no special tokens.

  Args:
    vocabulary: a seqio vocabulary; V ids.
  """
  size = vocabulary.vocab_size
  special = (vocabulary.eos_id, vocabulary.unk_id, vocabulary.pad_id, None)
  out = [''] * size
  for i in range(size - vocabulary.extra_ids):
    if i in special:
      continue
    text = vocabulary.decode([i])
    if text and not _SPECIAL.search(text) and text.isprintable():
      if list(vocabulary.encode(text)) == [i]:
        out[i] = text
  return out


def check_numbers(path: pathlib.Path, field: str) -> None:
  """Refuses labels that are no numbers.

  New words are chosen by number: `{label: dull | fine}` reads 0 or 1.

  Raises:
    UserDataError: one is none; it says the line.
  """
  for line, row in row_files.read_rows(path):
    if not re.fullmatch(r'\d+', str(row.get(field, '')).strip()):
      raise UserDataError(
        f'{path}, line {line}: column {field!r} holds {row.get(field)!r}. The '
        f'words that are found are written as {{{field}: a | b}}, which takes '
        'numbers from 0: number the labels.'
      )


def read_words(path: str, names: Sequence[str], vocabulary: Any) -> LabelWords:
  """Label words of a file, `0: terrible, awful`, a line a label.

  Raises:
    UserDataError: as `kpt.read_words`, or the labels are not 0 to C - 1.
    ValueError: as `verbalizers.words.label_words`.
  """
  found = kpt.read_words(path)
  wanted = [str(i) for i in range(len(names))]
  if sorted(found) != sorted(wanted):
    listed = ', '.join(f'{i} ({name})' for i, name in enumerate(names))
    raise UserDataError(
      f'{path} has words of {", ".join(found)}, but the labels are {listed}: '
      'a line `0: word, word`, and so on, of each.'
    )
  return words_lib.label_words({i: found[i] for i in wanted}, vocabulary)


def write_words(path: pathlib.Path, words: Sequence[Sequence[str]]) -> None:
  """Writes what `read_words` reads."""
  lines = [f'{i}: {", ".join(own)}\n' for i, own in enumerate(words)]
  checkpoints.write_atomically(path, ''.join(lines).encode())


def write_templates(
  path: pathlib.Path,
  found: Mapping[str, tuple[str, str]],
  notes: Sequence[str] = (),
) -> None:
  """Writes templates, name -> (inputs, targets), behind comments.

  Raises:
    TemplateError: one is no template.
  """
  lines = [f'# {note}' for note in notes]
  for name, sides in found.items():
    inputs, targets = (side.replace('\n', '\\n') for side in sides)
    line = f'{name}: {inputs} ||| {targets}'
    parse_line(line)  # tells what is wrong with it here, not later
    lines.append(line)
  checkpoints.write_atomically(path, ('\n'.join(lines) + '\n').encode())


def one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
  """Refuses a value that is none of these, with near misses."""
  words_lib._one_of(name, value, allowed)
