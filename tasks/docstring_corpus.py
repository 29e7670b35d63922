"""What the docstrings of installed libraries say, and of what they say it.

    {"words": "compute the sum along an axis", "library": "numpy",
     "kind": "function", ...}

English that is on every machine: the first sentence of every docstring of the
Python standard library and of libraries that this package needs, with what the
code below it is. The files are parsed, never imported. What is found depends on
the versions of the libraries, `versions()`; it is kept in a file, `path()`,
whose contents decide what a study reads.

A summary is there once. One that several libraries have is left out, since it
could not be said which it is of. Not for other languages than English, nor for
whole docstrings.
"""

import ast
from collections.abc import Iterator, Mapping, Sequence
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import re
import sysconfig
import tempfile
import warnings

from absl import logging

# Library -> the distributions and packages that it is read from.
_PACKAGES = {
  'numpy': {'numpy': 'numpy'},
  'scipy': {'scipy': 'scipy'},
  'sklearn': {'scikit-learn': 'sklearn'},
  'jax': {
    'jax': 'jax',
    'flax': 'flax',
    'optax': 'optax',
    'orbax-checkpoint': 'orbax',
  },
  'tensorflow': {'tensorflow': 'tensorflow'},
  'matplotlib': {'matplotlib': 'matplotlib'},
  'nltk': {'nltk': 'nltk'},
}
ATTRIBUTES = {
  'library': ('python', *_PACKAGES),
  'kind': ('function', 'method', 'property', 'class'),
  'arguments': ('none', 'one', 'several'),
  'returns': ('value', 'nothing'),
  'access': ('public', 'private'),
  'detail': ('brief', 'detailed'),
  'size': ('small', 'medium', 'large'),
}
# Words of a summary; the end of a longer one is left out.
LENGTH = 24
_SHORTEST = 3
# Lines of code, without the docstring.
_SMALL, _MEDIUM = 5, 20

# Tests are not what they test; the others are other people's packages.
_OUTSIDE = frozenset(
  'test tests testing idle_test site-packages dist-packages'.split()
)

Record = dict[str, str]
_Function = ast.FunctionDef | ast.AsyncFunctionDef


class CorpusError(OSError):
  """The docstrings cannot be read."""


def versions() -> dict[str, str]:
  """Of Python and of every distribution that is read."""
  found = {'python': platform.python_version()}
  for packages in _PACKAGES.values():
    for name in packages:
      try:
        found[name] = importlib.metadata.version(name)
      except importlib.metadata.PackageNotFoundError:
        raise CorpusError(
          f'The docstrings of {name} are read, but it is not installed: '
          f'pip install {name}.'
        ) from None
  return found


def path() -> pathlib.Path:
  """The file with the records, a JSON line each; made if it is not there."""
  decisive = json.dumps(versions()) + pathlib.Path(__file__).read_text()
  name = hashlib.sha256(decisive.encode()).hexdigest()[:16]
  folder = pathlib.Path('~/.cache/prompt_jax').expanduser()
  file = folder / f'docstrings-{name}.jsonl'
  if not file.exists():
    logging.info('Reading docstrings, once: half a minute.')
    lines = [json.dumps(record) + '\n' for record in extract(_folders())]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
      written = pathlib.Path(scratch, 'docstrings')
      written.write_text(''.join(lines))
      os.replace(written, file)
  return file


def records() -> list[Record]:
  """The words and attributes of every summary, in the order of the files."""
  with path().open() as lines:
    return [json.loads(line) for line in lines]


def extract(folders: Mapping[str, Sequence[pathlib.Path]]) -> list[Record]:
  """The records of all Python files below some folders.

  Args:
    folders: of each library.
  """
  found: dict[str, Record | None] = {}
  for library, parts in folders.items():
    for folder in parts:
      for file in sorted(folder.rglob('*.py')):
        place = file.relative_to(folder)
        if not _OUTSIDE & set(place.parts) and 'test' not in place.stem:
          for record in _read(file, library):
            first = found.setdefault(record['words'], record)
            if first and first['library'] != library:
              found[record['words']] = None
  return [record for record in found.values() if record]


def summary(docstring: str) -> str:
  """The words of its first sentence, in small letters, without all else."""
  paragraph = re.split(r'\n\s*\n', docstring.strip())[0]
  # Not after 'e.g.'.
  sentence = re.split(r'(?<!\.\w)[.:;]\s', paragraph)[0]
  return ' '.join(re.findall('[a-z]+', sentence.lower())[:LENGTH])


def _folders() -> dict[str, list[pathlib.Path]]:
  found = {'python': [pathlib.Path(sysconfig.get_path('stdlib'))]}
  for library, packages in _PACKAGES.items():
    found[library] = []
    for package in packages.values():
      spec = importlib.util.find_spec(package)
      if spec is None or not spec.submodule_search_locations:
        raise CorpusError(f'The source of {package} is not installed.')
      places = map(pathlib.Path, spec.submodule_search_locations)
      found[library] += sorted(places)
  return found


def _read(file: pathlib.Path, library: str) -> Iterator[Record]:
  with warnings.catch_warnings():  # of the files' own escapes
    warnings.simplefilter('ignore')
    try:
      tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # templates, and samples of mistakes
      return
  parents: list[tuple[ast.AST, bool]] = [(tree, False)]
  for node, in_class in parents:
    is_class = isinstance(node, ast.ClassDef)
    parents += [(child, is_class) for child in ast.iter_child_nodes(node)]
    if is_class or isinstance(node, _Function):
      docstring = ast.get_docstring(node)
      words = summary(docstring or '')
      if docstring and len(words.split()) >= _SHORTEST:
        more = len(docstring.strip().splitlines()) > 1
        yield {
          'words': words,
          'library': library,
          **_attributes(node, in_class),
          'detail': 'detailed' if more else 'brief',
        }


def _attributes(node: ast.ClassDef | _Function, in_class: bool) -> Record:
  text = node.body[0]
  lines = (node.end_lineno or 0) - node.lineno
  lines -= (text.end_lineno or 0) - text.lineno + 1
  size = 'small' if lines <= _SMALL else 'medium'
  hidden = node.name.startswith('_') and not node.name.startswith('__')
  kind = _kind(node, in_class)
  count = _arguments(node, in_class)
  return {
    'kind': kind,
    'arguments': ATTRIBUTES['arguments'][min(count, 2)],
    'returns': 'value' if _returns(node) else 'nothing',
    'access': 'private' if hidden else 'public',
    'size': 'large' if lines > _MEDIUM else size,
  }


def _kind(node: ast.ClassDef | _Function, in_class: bool) -> str:
  if isinstance(node, ast.ClassDef):
    return 'class'
  if any('property' in name for name in _decorators(node)):
    return 'property'
  return 'method' if in_class else 'function'


def _arguments(node: ast.ClassDef | _Function, in_class: bool) -> int:
  """Without `self`; of a class those of its `__init__`."""
  if isinstance(node, ast.ClassDef):
    made = [
      part
      for part in node.body
      if isinstance(part, ast.FunctionDef) and part.name == '__init__'
    ]
    return _arguments(made[0], True) if made else 0
  a = node.args
  count = len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs)
  count += (a.vararg is not None) + (a.kwarg is not None)
  bound = in_class and 'staticmethod' not in _decorators(node)
  return max(count - bound, 0)


def _decorators(node: _Function) -> list[str]:
  return [ast.unparse(decorator) for decorator in node.decorator_list]


def _returns(node: ast.AST) -> bool:
  """Whether it returns or yields a value itself; a class does not."""
  if isinstance(node, ast.ClassDef):
    return False
  own = list(ast.iter_child_nodes(node))
  for part in own:
    if isinstance(part, ast.Yield | ast.YieldFrom):
      return True
    if isinstance(part, ast.Return) and part.value is not None:
      return True
    if not isinstance(part, _Function | ast.ClassDef | ast.Lambda):
      own += ast.iter_child_nodes(part)
  return False
