"""gin, made strict: the only file that imports it.

What it adds to gin: a value lives in one file, so that the order in which
files are given changes nothing; and nothing matches silently, so that a
misspelt file, module, name, parameter or macro is an error that says where it
stands and what was probably meant. Not for defaults: those are in gin_configs.

    parse(['models/tiny.gin', 'methods/lora.gin', 'runs/train.gin'],
          ['MODEL_DIR=/tmp/run', 'TRAIN_STEPS=100'])
    for binding in resolved():
      print(*binding)
    run('train')

Three things differ from gin's own reading, all for the same reason:

*   Files given side by side may not bind one key to two values
    (`GinConflictError`). A file does override what it itself `include`s,
    wherever in it the `include` stands.
*   A binding to `%gin.REQUIRED` asks for a value: any other binding of the key,
    in whichever file, gives it.
*   Bindings from the command line override all files; of two, the last holds.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import copy
import dataclasses
import difflib
import functools
import importlib.resources
import inspect
import os
import pathlib
import pkgutil
import re
import sys
import tokenize
from types import ModuleType
from typing import Any, NamedTuple

from gin import config as gin
from gin import config_parser

Key = tuple[str, str, str]  # gin's: scope, selector, parameter

_DYNAMIC = '__gin__.dynamic_registration'
_REQUIRED = '%gin.REQUIRED'


class GinError(ValueError):
  """A gin file or binding that cannot mean what it says."""


class GinConflictError(GinError):
  """Files given side by side bind one key to different values."""


class Binding(NamedTuple):
  """A bound value, as it is printed.

  Attributes:
    key: `MACRO` or `module.Name.parameter`.
    value: in gin's syntax.
    source: `file:line`, or `flag`.
  """

  key: str
  value: str
  source: str


@dataclasses.dataclass(frozen=True)
class _Bound:
  """One `key = value`, and the file (None: the command line) it stands in."""

  pbk: gin.ParsedBindingKey
  value: Any
  file: pathlib.Path | None
  source: str

  @property
  def macro(self) -> str | None:
    """The macro's name; None where a parameter is bound."""
    return self.pbk.scope if self.pbk.complete_selector == 'gin.macro' else None

  @property
  def key(self) -> str:
    """The key as it is printed; a selector's last two names tell enough."""
    if self.macro:
      return self.macro
    scope = f'{self.pbk.scope}/' if self.pbk.scope else ''
    selector = '.'.join(self.pbk.complete_selector.split('.')[-2:])
    return f'{scope}{selector}.{self.pbk.arg_name}'


@dataclasses.dataclass
class _Config:
  """What was read: all bindings, those that hold, and who includes whom."""

  bound: dict[Key, list[_Bound]] = dataclasses.field(default_factory=dict)
  winners: dict[Key, _Bound] = dataclasses.field(default_factory=dict)
  # File -> all that it includes, at any depth.
  included: dict[pathlib.Path, set[pathlib.Path]] = dataclasses.field(
    default_factory=dict
  )


class _Reference(NamedTuple):
  """`@scope/name`, `@scope/name()` or `%name`, before it is looked up."""

  name: str
  evaluate: bool
  macro: bool = False


class _Delegate(config_parser.ParserDelegate):
  """Leaves names as they stand, so that an error can say where."""

  def configurable_reference(self, scoped_configurable_name, evaluate):
    return _Reference(scoped_configurable_name, evaluate)

  def macro(self, macro_name):
    return _Reference(macro_name, True, macro=True)


_config = _Config()


def packaged() -> pathlib.Path:
  """The folder of the gin files that ship with the package."""
  return pathlib.Path(str(importlib.resources.files('prompt_jax.gin_configs')))


def packaged_files() -> list[str]:
  """Every packaged gin file, as `parse` takes it: `models/tiny.gin`."""
  root = packaged()
  return sorted(p.relative_to(root).as_posix() for p in root.rglob('*.gin'))


def parse(
  gin_files: Sequence[str],
  gin_bindings: Sequence[str] = (),
  search_paths: Sequence[str | os.PathLike[str]] | None = None,
) -> None:
  """Reads files and command-line bindings, in place of all read before.

  Args:
    gin_files: paths on disk, absolute or below one of `search_paths`, or names
      of packaged files (`models/t5_1_1_base.gin`), in any order.
    gin_bindings: `KEY=VALUE` each; they override every file. A value that is
      no gin value is taken as a string, so that `MODEL_DIR=/tmp/run` needs no
      quotes within quotes; one that opens with a quote, a bracket, `@` or `%`
      is meant for gin, and an error where gin cannot read it.
    search_paths: folders in which relative names are looked up, first match
      first; by default the working directory, then the packaged files. An
      `include` is looked up beside the including file before that.

  Raises:
    GinConflictError: files side by side bind a key to different values.
    GinError: a file, module, name, parameter or macro does not exist, or a
      macro or a required value is not bound.
  """
  clear()
  paths = [pathlib.Path(p) for p in search_paths or ('.', packaged())]
  try:
    for name in gin_files:
      _read_file(_find(name, paths), paths, ())
    for text in gin_bindings:
      _add(_read_flag(text))
    for key, all_bound in _config.bound.items():
      _config.winners[key] = _winner(all_bound)
    _check_complete()
    _check_macros_are_used()
    for bound in _config.winners.values():
      gin.bind_parameter(bound.pbk, bound.value)
    gin.finalize()
  except BaseException:
    clear()
    raise


def clear() -> None:
  """Forgets everything that was parsed."""
  global _config
  _config = _Config()
  gin.clear_config()


def resolved() -> list[Binding]:
  """Every binding with macros replaced by their values; macros come first.

  References to functions and classes stay as they are, by their full path.
  """
  bound = sorted(_config.winners.values(), key=lambda b: (not b.macro, b.key))
  return [Binding(b.key, _text(b.value, _macro_text), b.source) for b in bound]


def config_str() -> str:
  """Everything that is bound, as a gin file that can be parsed again."""
  return gin.config_str()


def operative_config_str() -> str:
  """What has been called so far, defaults included, as a gin file."""
  return gin.operative_config_str()


def build(reference: str) -> Any:
  """The value of a reference: `build('%MODEL')`, `build('@t5.T5Config()')`.

  `@name` without parentheses is the configured function or class itself.

  Raises:
    GinError: nothing of that name was parsed.
  """
  name = reference.lstrip('%@').removesuffix('()')
  macros = [b.macro for b in _config.winners.values() if b.macro]
  if reference.startswith('%') and name not in macros:
    raise GinError(f'No macro {name!r} is bound.{_meant(name, macros)}')
  value = config_parser.ConfigParser(reference, _Delegate()).parse_value()
  return copy.deepcopy(_resolve(value, _parsed_selector))


def run(name: str, **kwargs: Any) -> Any:
  """Calls the function called `name` with the parameters bound for it.

  Args:
    name: the function, by the last parts of its path: `train` or `train.train`
      for `prompt_jax.train.train`.
    **kwargs: arguments that override the bound ones.

  Raises:
    GinError: the parsed files name no such function, or several.
  """
  return gin.get_configurable(_parsed_selector(name))(**kwargs)


def _add(bound: _Bound) -> None:
  _config.bound.setdefault(bound.pbk.scope_selector_arg, []).append(bound)


def _meant(name: str, known: Iterable[str]) -> str:
  """` Did you mean ...?`, or nothing where nothing is near."""
  near = difflib.get_close_matches(name, sorted(set(known)), n=3)
  return f' Did you mean {" or ".join(near)}?' if near else ''


# Reading.


def _find(name: str, paths: Sequence[pathlib.Path]) -> pathlib.Path:
  """The file called `name`: absolute, or in the first of `paths` with it."""
  for folder in paths:
    path = folder / name  # only `name` where that is absolute
    if path.is_file():
      return path.resolve()
  known = packaged_files()
  base = pathlib.Path(name).stem
  same = [k for k in known if pathlib.Path(k).stem == base]
  meant = f' Did you mean {" or ".join(same)}?' if same else _meant(name, known)
  searched = ', '.join(str(p) for p in dict.fromkeys(paths))
  raise GinError(f'No gin file {name!r} in: {searched}.{meant}')


def _display(path: pathlib.Path) -> str:
  """A path as messages give it; a packaged file's from the package on."""
  root = packaged().resolve()
  if path.is_relative_to(root):
    return path.relative_to(root).as_posix()
  return os.path.relpath(path)


@contextlib.contextmanager
def _located(where: str) -> Iterator[None]:
  """Says `where` in every error from inside."""
  try:
    yield
  except GinError as error:
    raise type(error)(f'{where}: {error}') from error
  except Exception as error:
    error.add_note(f'Raised on behalf of {where}.')
    raise


def _read_file(
  path: pathlib.Path,
  paths: Sequence[pathlib.Path],
  includers: tuple[pathlib.Path, ...],
) -> None:
  """Adds to `_config` what a file, and every file it includes, binds."""
  if path in includers:
    chain = ' includes '.join(_display(p) for p in (*includers, path))
    raise GinError(f'{chain}: a circle.')
  if path not in _config.included:
    _config.included[path] = set()
    # gin keeps one file's imports from another's inside its own parse_config
    # only, which tells nobody where a binding stood; hence two private names.
    with gin._parse_scope() as context:
      names: dict[str, ModuleType | None] = {}
      for statement in _statements(path):
        where = f'{_display(path)}:{statement.location.line_num}'
        with _located(where):
          if isinstance(statement, config_parser.ImportStatement):
            _import(statement, context, names)
          elif isinstance(statement, config_parser.BlockDeclaration):
            _imported_selector(statement.selector, names)
          elif isinstance(statement, config_parser.BindingStatement):
            lookup = functools.partial(_imported_selector, names=names)
            _add(_bind(statement, lookup, path, where))
          else:
            included = _find(statement.filename, [path.parent, *paths])
        if isinstance(statement, config_parser.IncludeStatement):
          _read_file(included, paths, (*includers, path))
      gin._IMPORTS.update(context.imports)
  for includer in includers:
    _config.included[includer] |= {path, *_config.included[path]}


def _statements(path: pathlib.Path) -> Iterator[Any]:
  """What a file says, statement by statement."""
  with path.open() as file:
    try:
      yield from config_parser.ConfigParser(file, _Delegate())
    except (SyntaxError, tokenize.TokenError) as error:
      line = getattr(error, 'lineno', None) or error.args[1][0]
      raise GinError(f'{_display(path)}:{line}: {error.args[0]}') from error


def _import(
  statement: config_parser.ImportStatement,
  context: gin.ParseContext,
  names: dict[str, ModuleType | None],
) -> None:
  """Imports a module and adds the name that it goes by to `names`."""
  try:
    context.process_import(statement)
  except ModuleNotFoundError as error:
    missing = error.name or ''
    if not f'{statement.module}.'.startswith(f'{missing}.'):
      raise  # the module is there; something that it needs is not
    parent = sys.modules.get(missing.rpartition('.')[0])
    beside = pkgutil.iter_modules(getattr(parent, '__path__', []))
    known = [f'{parent and parent.__name__}.{m.name}' for m in beside]
    raise GinError(f'No module {missing!r}.{_meant(missing, known)}') from error
  if statement.module == _DYNAMIC:
    names['gin'] = None
  elif statement.is_from or statement.alias:
    names[statement.bound_name()] = sys.modules[statement.module]
  else:
    names[statement.bound_name()] = sys.modules[statement.bound_name()]


def _imported_selector(
  selector: str, names: dict[str, ModuleType | None]
) -> str:
  """`selector`, having checked that the file's imports lead to it."""
  if 'gin' not in names:
    raise GinError(
      f'{selector!r} needs `from __gin__ import dynamic_registration` as the '
      'first statement of its file, then an import of its module.'
    )
  first, *rest = selector.split('.')
  if first == 'gin':
    return selector
  if first not in names:
    raise GinError(
      f'{first!r} of {selector!r} is not imported in this file.'
      f'{_meant(first, names)}'
    )
  value: Any = names[first]
  for i, name in enumerate(rest):
    if not hasattr(value, name):
      path = '.'.join([first, *rest[:i]])
      raise GinError(f'{path} has no {name!r}.{_meant(name, dir(value))}')
    value = getattr(value, name)
  if not callable(value):
    raise GinError(f'{selector!r} is neither a function nor a class.')
  return selector


def _parsed_selector(name: str) -> str:
  """The full path of the one configurable in the files that ends in `name`."""
  values = [b for all_bound in _config.bound.values() for b in all_bound]
  known = {b.pbk.complete_selector for b in values if not b.macro}
  for bound in values:
    known |= {r.configurable.selector for r in _references(bound.value)}
  known = {selector for selector in known if not selector.startswith('gin.')}
  found = [s for s in sorted(known) if f'.{s}'.endswith(f'.{name}')]
  if len(found) == 1:
    return found[0]
  if found:
    raise GinError(f'{name!r} may be {" or ".join(found)}: say more of it.')
  short = ['.'.join(s.split('.')[-1 - name.count('.') :]) for s in known]
  raise GinError(f'The gin files name no {name!r}.{_meant(name, short)}')


def _bind(
  statement: config_parser.BindingStatement,
  lookup: Callable[[str], str],
  file: pathlib.Path | None,
  source: str,
) -> _Bound:
  """A statement with its names looked up."""
  scope, selector, parameter, value, _ = statement
  value = _resolve(value, lookup)
  if not parameter:
    macro = f'{scope}/{selector}' if scope else selector
    pbk = gin.ParsedBindingKey(macro, 'gin.macro', 'gin.macro', 'value')
    return _Bound(pbk, value, file, source)
  selector = lookup(selector)
  try:
    pbk = gin.ParsedBindingKey.parse((scope, selector, parameter))
  except ValueError as error:
    wrapped = gin.ConfigurableReference(selector, False).configurable.wrapped
    known = list(inspect.signature(wrapped).parameters)
    raise GinError(
      f'{selector} has no parameter {parameter!r}.{_meant(parameter, known)}'
    ) from error
  return _Bound(pbk, value, file, source)


def _resolve(value: Any, lookup: Callable[[str], str]) -> Any:
  """`value` with gin's own references in place of our names."""
  if isinstance(value, _Reference):
    if value.macro:
      return gin.ParserDelegate().macro(value.name)
    *scopes, selector = value.name.split('/')
    name = '/'.join([*scopes, lookup(selector)])
    return gin.ConfigurableReference(name, value.evaluate)
  if isinstance(value, dict):
    return {_resolve(k, lookup): _resolve(v, lookup) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return type(value)(_resolve(v, lookup) for v in value)
  return value


def _read_flag(text: str) -> _Bound:
  """A binding from the command line."""
  key, equals, value = (part.strip() for part in text.partition('='))
  if not (key and equals and value):
    raise GinError(
      f"Expected --gin.KEY=VALUE, got {text!r}. An empty string is ''."
    )
  with _located(f'--gin.{text}'):
    statement = _parse_flag(key, value)
    if statement is None:
      if value[0] in '\'"[({@%':
        raise GinError(f'gin cannot read the value {value}')
      statement = _parse_flag(key, repr(value))
    if statement is None:
      raise GinError(f'{key!r} is not a key: MACRO or module.Name.parameter.')
    return _bind(statement, _parsed_selector, None, 'flag')


def _parse_flag(key: str, value: str) -> config_parser.BindingStatement | None:
  """`key = value` parsed; None unless it is one whole binding."""
  try:
    parser = config_parser.ConfigParser(f'{key} = {value}', _Delegate())
    statement, rest = parser.parse_statement(), parser.parse_statement()
  except (SyntaxError, tokenize.TokenError):
    return None
  whole = isinstance(statement, config_parser.BindingStatement) and not rest
  return statement if whole else None


# Checking and showing.


def _winner(all_bound: list[_Bound]) -> _Bound:
  """Of all bindings of one key, the one that holds.

  Raises:
    GinConflictError: two of them differ, and neither's file includes the
      other's.
  """
  given = [b for b in all_bound if _text(b.value) != _REQUIRED]
  if not given:
    return all_bound[0]
  if given[-1].file is None:  # flags are read last
    return given[-1]
  overridden = set().union(*(_config.included[b.file] for b in given if b.file))
  top = [b for b in given if b.file not in overridden]
  for other in top[1:]:
    if _text(other.value) != _text(top[0].value):
      lines = '\n'.join(
        f'  {b.source}: {b.key} = {_text(b.value)}' for b in top
      )
      raise GinConflictError(
        f'{top[0].key} has two values, and no file includes the other:\n'
        f'{lines}\nKeep one, or override both: --gin.{top[0].key}=...'
      )
  return top[0]


def _references(value: Any) -> Iterator[gin.ConfigurableReference]:
  """Every reference inside a value."""
  return gin.iterate_references({None: value})


def _macros(value: Any) -> list[str]:
  """The macros inside a value."""
  refs = _references(value)
  return [
    '/'.join(r.scopes) for r in refs if r.configurable.wrapped is gin.macro
  ]


def _check_complete() -> None:
  """Raises where a macro or a required value is unbound, or macros circle."""
  winners = {b.macro: b for b in _config.winners.values() if b.macro}
  missing: dict[str, list[str]] = {}
  for bound in _config.winners.values():
    if _text(bound.value) == _REQUIRED:
      missing.setdefault(bound.key, []).append(f'required by {bound.source}')
  for bound in _config.winners.values():
    for name in _macros(bound.value):
      if name not in winners or name in missing:
        missing.setdefault(name, []).append(f'used by {bound.source}')
  if missing:
    rows = [
      f'  --gin.{name}=...  ({", ".join(dict.fromkeys(where))})'
      f'{"" if name in winners else _meant(name, winners)}'
      for name, where in missing.items()
    ]
    raise GinError('These have no value; set them:\n' + '\n'.join(rows))
  for start in winners:
    seen, todo = set(), [start]
    while todo:
      todo = [n for name in todo for n in _macros(winners[name].value)]
      if start in todo:
        raise GinError(f'{winners[start].source}: {start} refers to itself.')
      todo = [name for name in todo if name not in seen]
      seen.update(todo)


def _check_macros_are_used() -> None:
  """Raises where a macro is bound that nothing reads: a misspelt name.

  One from a file may be meant for a packaged file that is not given now, such
  as the optimizer in an evaluation; one from the command line may not. The
  packaged files' own are checked in tests.
  """
  bound = [b for all_bound in _config.bound.values() for b in all_bound]
  in_files = {b.macro for b in bound if b.macro and b.file}
  used = {name for b in bound for name in _macros(b.value)}
  for b in bound:
    if b.macro is None or b.macro in used:
      continue
    if b.file is None and b.macro not in in_files:
      meant = _meant(b.macro, used)
      raise GinError(f'--gin.{b.macro}: no gin file uses that macro.{meant}')
    ours = b.file and b.file.is_relative_to(packaged().resolve())
    if b.file and not ours and b.macro not in _packaged_macros():
      meant = _meant(b.macro, used)
      raise GinError(f'{b.source}: no gin file uses {b.macro}.{meant}')


@functools.cache
def _packaged_macros() -> frozenset[str]:
  """Every macro that a packaged file uses."""
  texts = [(packaged() / name).read_text() for name in packaged_files()]
  return frozenset(re.findall(r'%([\w/]+)', '\n'.join(texts)))


def _text(value: Any, macro: Callable[[str], str] | None = None) -> str:
  """A value in gin's syntax, its macros replaced by `macro` of their names."""
  if isinstance(value, gin.ConfigurableReference):
    wrapped, scopes = value.configurable.wrapped, '/'.join(value.scopes)
    if wrapped is gin.macro:
      return macro(scopes) if macro else f'%{scopes}'
    if value.configurable.selector == 'gin.constant':
      return f'%{scopes}'
    name = '/'.join([*value.scopes, value.configurable.selector])
    return f'@{name}()' if value.evaluate else f'@{name}'
  if isinstance(value, dict):
    items = (f'{_text(k, macro)}: {_text(v, macro)}' for k, v in value.items())
    return f'{{{", ".join(items)}}}'
  if isinstance(value, (list, tuple)):
    items = ', '.join(_text(v, macro) for v in value)
    if isinstance(value, list):
      return f'[{items}]'
    return f'({items},)' if len(value) == 1 else f'({items})'
  return repr(value)


def _macro_text(name: str) -> str:
  """The resolved value of a macro."""
  bound = _config.winners[(name, 'gin.macro', 'value')]
  return _text(bound.value, _macro_text)
