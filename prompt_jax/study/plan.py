"""What a study is to find out: its cells, and how they are run.

A study file binds one `Study`: model sizes x methods x hyperparameters x tasks
x seeds. `cells` expands it; every cell is an ordinary configuration (gin files
and bindings) that could be run by hand. Cells that share a base and shapes make
one `Job`, one program (`together.py`). Not for running them (`workers.py`).
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import pathlib
from typing import Any

import prompt_jax
from prompt_jax.gin_rules import meant
from prompt_jax.study import configurations
from prompt_jax.study import published

# What two runs of one program may differ in.
_OF_MEMBERS = ('LEARNING_RATE', 'SEED', 'MIXTURE_OR_TASK_NAME')
# Settings that place a cell; the others are hyperparameters.
PLACE = ('method', 'size', 'task', 'seed', 'base_seed')


class StudyError(ValueError):
  """A study that cannot be what it says."""


@dataclasses.dataclass(frozen=True)
class Task:
  """A downstream task.

  Attributes:
    label: for people.
    chance: what guessing scores, in per cent.
    name: of the seqio task; '{base_seed}' and other settings are filled in.
  """

  label: str
  chance: float
  name: str


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A way to train: pretraining, or a method with its hyperparameters.

  Attributes:
    label: for people.
    gin_files: in addition to those of the study and of the size.
    bindings: macro -> value; a string that opens with '@' or '%' is gin's.
    grid: macro -> values to choose from on validation. A name in small letters
      is no macro, but may be filled into names of tasks.
    of_size: size -> macro -> value, or values where `grid` has that macro.
    task_name: name of the seqio task, if it is not the task's own; '{name}' is
      that, and all settings may be filled in.
    seeds: if they are not the study's (a method that draws nothing needs one).
    together: most runs to train as one program. 1: each trains by itself, saves
      checkpoints, and goes on where it was stopped; for large models.
  """

  label: str
  gin_files: Sequence[str] = ()
  bindings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  grid: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
  of_size: Mapping[str, Mapping[str, Any]] = dataclasses.field(
    default_factory=dict
  )
  task_name: str = '{name}'
  seeds: Sequence[int] | None = None
  together: int = 16

  def at(self, size: str) -> tuple[dict[str, Any], dict[str, Sequence[Any]]]:
    """Bindings and grid for a size of the model."""
    own = self.of_size.get(size, {})
    bindings = {k: own.get(k, v) for k, v in self.bindings.items()}
    bindings |= {k: v for k, v in own.items() if k not in self.grid}
    return bindings, {k: own.get(k, v) for k, v in self.grid.items()}


@dataclasses.dataclass(frozen=True)
class Study:
  """A whole study; a gin file binds it.

  Attributes:
    name: one word.
    title: of the pictures.
    note: what a reader must know; it stands on every picture.
    sizes: name -> gin files of the model, smallest first.
    tasks: name -> task.
    methods: name -> recipe.
    seeds: of tuning.
    base_seeds: of pretraining (and whatever names of tasks make of it).
    pretraining: makes the base of each size; None if `checkpoints` do.
    checkpoints: size -> base checkpoint, where there is no pretraining.
    gin_files: of every tuning run.
    bindings: of every run.
    task_files: of `tasks/`, whose text decides what the data are.
    metric: that methods are compared by.
    reference_method: the gap to which is measured.
    overlay: published curves, by name (`published.py`).
  """

  name: str
  title: str
  note: str
  sizes: Mapping[str, Sequence[str]]
  tasks: Mapping[str, Task]
  methods: Mapping[str, Recipe]
  seeds: Sequence[int] = (0,)
  base_seeds: Sequence[int] = (0,)
  pretraining: Recipe | None = None
  checkpoints: Mapping[str, str] = dataclasses.field(default_factory=dict)
  gin_files: Sequence[str] = ('runs/study.gin',)
  bindings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  task_files: Sequence[str] = ()
  metric: str = 'rank_accuracy'
  reference_method: str = 'fine_tune'
  overlay: Sequence[str] = ()

  def __post_init__(self):
    for field in ('sizes', 'tasks', 'methods', 'seeds', 'base_seeds'):
      if not getattr(self, field):
        raise StudyError(f'Study {self.name!r} has no {field}: nothing to run.')
    self._check_known('overlay', self.overlay, published.CURVES)
    self._check_known('reference_method', [self.reference_method], self.methods)
    recipes = dict(self.methods)
    if self.pretraining is not None:
      recipes['pretraining'] = self.pretraining
      if self.pretraining.grid:
        raise StudyError('pretraining has a grid: give one value a size.')
    else:
      missing = [size for size in self.sizes if size not in self.checkpoints]
      if missing:
        raise StudyError(
          f'No pretraining, and no checkpoint of size {missing[0]!r}.'
        )
    for name, recipe in recipes.items():
      self._check_known(f'of_size of {name}', recipe.of_size, self.sizes)
      if recipe.together < 1:
        raise StudyError(
          f'{name}: together is to be at least 1, got {recipe.together}.'
        )
      for size in self.sizes:
        for key, values in recipe.at(size)[1].items():
          if isinstance(values, str) or not isinstance(values, Sequence):
            raise StudyError(
              f'{name}, {size}: the grid of {key} is to be a list of values, '
              f'got {values!r}.'
            )
          if not values:
            raise StudyError(f'{name}, {size}: the grid of {key} is empty.')

  def _check_known(self, what: str, names: Any, known: Any) -> None:
    for name in names:
      if name not in known:
        raise StudyError(
          f'Study {self.name!r}, {what}: no {name!r}.{meant(name, known)} '
          f'There are {", ".join(known)}.'
        )


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run of a study.

  Attributes:
    key: hash of all that decides its result.
    stage: 'pretrain' or 'tune'.
    settings: where it stands in the study, and its hyperparameters.
    gin_files: its configuration.
    bindings: over the files, macro -> value.
    base: key of the pretraining cell whose result it tunes; None: the base is
      the checkpoint in `bindings`, or there is none.
  """

  key: str
  stage: str
  settings: Mapping[str, Any]
  gin_files: tuple[str, ...]
  bindings: Mapping[str, Any]
  base: str | None

  def flags(self, **more: Any) -> list[str]:
    """The bindings as `gin_utils.parse` takes them."""
    values = {**self.bindings, **more}
    return [
      f'{name}={configurations.text(value)}' for name, value in values.items()
    ]


@dataclasses.dataclass(frozen=True)
class Job:
  """Cells that run as one program.

  Attributes:
    cells: one pretraining cell, or tuning cells of one base and one shape.
    weight: how long it takes, in no unit; the largest are begun first.
    alone: whether it is one cell that trains by itself and goes on where it
      was stopped.
  """

  cells: tuple[Cell, ...]
  weight: float
  alone: bool = False

  @functools.cached_property
  def key(self) -> str:
    """Hash of the cells' keys."""
    return configurations.digest([cell.key for cell in self.cells])

  @property
  def base(self) -> str | None:
    """Key of the pretraining cell that must be done before."""
    return self.cells[0].base

  def __str__(self) -> str:
    s = self.cells[0].settings
    if self.cells[0].stage == 'pretrain':
      return f'pretraining of {s["size"]}, seed {s["base_seed"]}'
    return (
      f'{s["method"]} on {s["size"]}, base {s["base_seed"]}: '
      f'{len(self.cells)} run{"s" * (len(self.cells) > 1)}'
    )


def cells(study: Study) -> list[Cell]:
  """All cells, bases before what is tuned on them.

  Raises:
    StudyError: two cells are the same; a name of a task cannot be filled in.
    gin_utils.GinError: a configuration that cannot be read.
  """
  out: list[Cell] = []
  for base_seed, size in itertools.product(study.base_seeds, study.sizes):
    base = None
    if study.pretraining is not None:
      base = _pretraining(study, size, base_seed)
      out.append(base)
    for method in study.methods:
      out += _tuning(study, method, size, base_seed, base and base.key)
  seen: dict[str, Cell] = {}
  for cell in out:
    if cell.key in seen:
      raise StudyError(
        f'Two cells of the study are the same: {dict(cell.settings)} and '
        f'{dict(seen[cell.key].settings)}.'
      )
    seen[cell.key] = cell
  return out


def jobs(study: Study) -> list[Job]:
  """The cells, put together; the same study gives the same jobs."""
  groups: dict[Any, list[Cell]] = {}
  for cell in cells(study):
    own = {k: v for k, v in cell.bindings.items() if k not in _OF_MEMBERS}
    alone = cell.key if cell.stage == 'pretrain' else None
    shape = (alone, cell.gin_files, cell.base, json.dumps(own, default=repr))
    groups.setdefault(shape, []).append(cell)
  out = []
  for group in groups.values():
    first = group[0]
    recipe = study.methods.get(first.settings.get('method', ''))
    size = recipe.together if recipe else 1
    shared = {k: v for k, v in first.bindings.items() if k not in _OF_MEMBERS}
    weight = configurations.weight(first.gin_files, shared)
    for i in range(0, len(group), size):
      members = tuple(group[i : i + size])
      alone = recipe is None or recipe.together == 1
      out.append(Job(members, weight * len(members), alone))
  return out


def _pretraining(study: Study, size: str, base_seed: int) -> Cell:
  recipe = study.pretraining
  assert recipe is not None
  settings = {'size': size, 'base_seed': base_seed}
  bindings, _ = recipe.at(size)
  bindings = {**study.bindings, **bindings, 'SEED': base_seed}
  task = _filled(recipe.task_name, {**settings, 'name': ''}, 'pretraining')
  bindings['MIXTURE_OR_TASK_NAME'] = task
  files = (*study.sizes[size], *recipe.gin_files)
  return _cell(study, 'pretrain', settings, files, bindings, None)


def _tuning(
  study: Study, method: str, size: str, base_seed: int, base: str | None
) -> Iterator[Cell]:
  recipe = study.methods[method]
  bindings, grid = recipe.at(size)
  bindings = {**study.bindings, **bindings}
  if base is None:
    bindings['INITIAL_CHECKPOINT_PATH'] = study.checkpoints[size]
  files = (*study.sizes[size], *recipe.gin_files, *study.gin_files)
  files += ('runs/study_alone.gin',) if recipe.together == 1 else ()
  seeds = study.seeds if recipe.seeds is None else recipe.seeds
  for values in itertools.product(*grid.values()):
    chosen = dict(zip(grid, values, strict=True))
    macros = {k: v for k, v in chosen.items() if not k.islower()}
    for task, seed in itertools.product(study.tasks, seeds):
      place = (method, size, task, seed, base_seed)
      settings = {**dict(zip(PLACE, place, strict=True)), **chosen}
      name = _filled(study.tasks[task].name, settings, task)
      name = _filled(recipe.task_name, {**settings, 'name': name}, method)
      own = {**macros, 'SEED': seed, 'MIXTURE_OR_TASK_NAME': name}
      yield _cell(study, 'tune', settings, files, {**bindings, **own}, base)


def _filled(template: str, settings: Mapping[str, Any], where: str) -> str:
  try:
    return template.format_map(settings)
  except KeyError as e:
    raise StudyError(
      f'{where}: the name {template!r} asks for {e.args[0]!r}.'
      f'{meant(e.args[0], settings)} There are {", ".join(settings)}.'
    ) from None


def _cell(
  study: Study,
  stage: str,
  settings: Mapping[str, Any],
  files: tuple[str, ...],
  bindings: Mapping[str, Any],
  base: str | None,
) -> Cell:
  shared = {k: v for k, v in bindings.items() if k not in _OF_MEMBERS}
  own = {k: v for k, v in bindings.items() if k in _OF_MEMBERS}
  decisive = {
    'stage': stage,
    'settings': dict(settings),
    'config': configurations.resolved(files, shared),
    'own': own,
    'base': base,
    'code': prompt_jax.__version__,
    'data': _data_fingerprint(tuple(study.task_files)),
  }
  return Cell(
    configurations.digest(decisive), stage, settings, files, bindings, base
  )


@functools.cache
def _data_fingerprint(task_files: tuple[str, ...]) -> str:
  """Changes with the code that makes the data.

  The user's own files are part of the configuration, by their contents.
  """
  spec = importlib.util.find_spec('prompt_jax.tasks')
  assert spec is not None and spec.submodule_search_locations
  (folder,) = spec.submodule_search_locations
  text = b''.join((pathlib.Path(folder) / f).read_bytes() for f in task_files)
  return hashlib.sha256(text).hexdigest()[:16]
