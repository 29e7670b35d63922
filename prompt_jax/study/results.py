"""From `study.json` and the ledger to numbers: what the report shows.

Hyperparameters are chosen on validation, never on test; what is reported is the
test metrics of the chosen. A mean over tasks is taken within each pair of a
pretraining and a tuning seed, and only where every task of the study is there,
so that all means are of the same tasks. Drawing and printing is the job of
`report.py` and `plots.py`.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np

from prompt_jax import gin_rules
from prompt_jax.study import ledger

Record = ledger.Record
Seeds = tuple[int, int]  # of pretraining, of tuning

# A setting by any other name is a hyperparameter.
NAMED = ('method', 'size', 'task', 'seed', 'base_seed')


class StudyError(ValueError):
  """A study.json that is absent or malformed, or does not fit its ledger."""


@dataclasses.dataclass(frozen=True)
class Study:
  """What a study was to find out; the fields of `study.json`."""

  name: str
  title: str
  note: str
  metric: str  # by which hyperparameters are chosen; higher is better
  reference_method: str
  methods: dict[str, str]  # name -> label, in the order of the legend
  sizes: list[str]  # smallest first
  tasks: dict[str, dict[str, Any]]  # name -> label, chance (0..100)
  overlay: list[dict[str, Any]]  # label, source, points (total params, score)
  cells: list[dict[str, Any]]  # key, stage, settings: all that are expected

  def __post_init__(self):
    names = {'method': self.methods, 'size': self.sizes, 'task': self.tasks}
    if self.reference_method not in self.methods:
      raise StudyError(_unknown('method', self.reference_method, self.methods))
    for cell in self.cells:
      if cell['stage'] != 'tune':
        continue
      for kind, known in names.items():
        if cell['settings'].get(kind) not in known:
          raise StudyError(_unknown(kind, cell['settings'].get(kind), known))

  def chance(self, task: str | None) -> float | None:
    """Of guessing at a task, or on average over tasks; None: not known."""
    tasks = list(self.tasks) if task is None else [task]
    values = [self.tasks[name].get('chance') for name in tasks]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None

  def task_label(self, task: str | None) -> str:
    """As it stands in a title."""
    if task is None and len(self.tasks) > 1:
      return f'mean of {len(self.tasks)} tasks'
    name = task or next(iter(self.tasks))
    return self.tasks[name].get('label', name)


def _unknown(kind: str, name: Any, known: Iterable[str]) -> str:
  return (
    f'study.json has a cell or reference of the unknown {kind} {name!r}; it '
    f'lists {", ".join(known)}.{gin_rules.meant(str(name), known)}'
  )


def load_study(directory: str) -> Study:
  """Reads `DIR/study.json`.

  Raises:
    StudyError: it is not there, no JSON, or lacks fields.
  """
  path = pathlib.Path(directory) / 'study.json'
  try:
    values = json.loads(path.read_text())
  except OSError as e:
    raise StudyError(
      f'{path} could not be read: {e.strerror or e}. The directory of a study '
      'is the --model_dir of `prompt-jax study`, which writes that file first.'
    ) from e
  except ValueError as e:
    raise StudyError(f'{path} is not JSON: {e}.') from e
  names = [field.name for field in dataclasses.fields(Study)]
  absent = [name for name in names if name not in values]
  if absent:
    raise StudyError(f'{path} lacks {", ".join(absent)}.')
  return Study(**{name: values[name] for name in names})


@dataclasses.dataclass(frozen=True)
class Choice:
  """The hyperparameters that validation chose, and the runs with them."""

  method: str
  size: str
  task: str
  base_seed: int
  hyperparameters: dict[str, Any]
  tried: int  # how many settings it was chosen from
  validation: float  # mean over tuning seeds
  records: dict[int, Record]  # by tuning seed


@dataclasses.dataclass(frozen=True)
class Score:
  """A metric over seeds."""

  values: dict[Seeds, float]

  @property
  def mean(self) -> float:
    """Over all seeds."""
    return float(np.mean(list(self.values.values())))

  @property
  def deviation(self) -> float:
    """Standard deviation over all seeds (of a sample); NaN for one seed."""
    values = list(self.values.values())
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan

  @property
  def seeds(self) -> tuple[int, int]:
    """How many pretraining seeds, and the most tuning seeds on one of them."""
    per_base: dict[int, int] = {}
    for base, _ in self.values:
      per_base[base] = per_base.get(base, 0) + 1
    return len(per_base), max(per_base.values())

  def by_base(self) -> dict[int, list[float]]:
    """The values of each pretraining seed."""
    out: dict[int, list[float]] = {}
    for (base, _), value in self.values.items():
      out.setdefault(base, []).append(value)
    return out


@dataclasses.dataclass(frozen=True)
class Results:
  """All that came out of a study so far."""

  study: Study
  choices: list[Choice]
  bases: list[Record]  # finished pretraining cells
  missing: list[dict[str, Any]]  # cells that are not in the ledger
  failed: list[Record]
  stale: list[Record]  # in the ledger, but not expected (any more)

  @property
  def metrics(self) -> list[str]:
    """Names of all test metrics, the study's own first."""
    found = {self.study.metric: None}
    for choice in self.choices:
      for record in choice.records.values():
        found |= dict.fromkeys(record['metrics']['test'])
    return list(found)

  def chosen(
    self, method: str, size: str, task: str | None = None
  ) -> list[Choice]:
    """The choices of a method at a size, on one task or on all."""
    return [
      c
      for c in self.choices
      if (c.method, c.size) == (method, size) and task in (None, c.task)
    ]

  def score(
    self,
    method: str,
    size: str,
    task: str | None = None,
    metric: str | None = None,
  ) -> Score | None:
    """A test metric on a task, or on average over all tasks.

    Args:
      method: name.
      size: name.
      task: name, or None for the mean over tasks, of those pairs of seeds that
        have all of them.
      metric: name; the study's own by default.

    Returns:
      None where no seed has it.
    """
    metric = metric or self.study.metric
    tasks = list(self.study.tasks) if task is None else [task]
    per_seeds: dict[Seeds, dict[str, float]] = {}
    for choice in self.chosen(method, size, task):
      for seed, record in choice.records.items():
        value = record['metrics']['test'].get(metric)
        if value is not None:
          found = per_seeds.setdefault((choice.base_seed, seed), {})
          found[choice.task] = value
    values = {
      seeds: float(np.mean([found[name] for name in tasks]))
      for seeds, found in sorted(per_seeds.items())
      if len(found) == len(tasks)
    }
    return Score(values) if values else None

  def gaps(
    self, method: str, size: str, task: str | None = None
  ) -> dict[int, float]:
    """Reference method minus this one, by pretraining seed.

    Both means are over the tuning seeds on that pretraining seed, so that the
    same frozen model stands behind them.
    """
    ours = self.score(method, size, task)
    reference = self.score(self.study.reference_method, size, task)
    if ours is None or reference is None:
      return {}
    a, b = reference.by_base(), ours.by_base()
    both = [base for base in a if base in b]
    return {s: float(np.mean(a[s]) - np.mean(b[s])) for s in both}

  def budget(self, method: str, size: str) -> dict[str, float | None]:
    """Parameters, and what a run costs: means over tasks and seeds.

    Returns:
      total, non_embedding, trained (numbers of parameters) and the fields of
      a record's cost; None where no run has a value.
    """
    records = [
      record
      for choice in self.chosen(method, size)
      for record in choice.records.values()
    ]
    return mean_values([{**r['parameters'], **r['cost']} for r in records])

  def seeds(self) -> tuple[int, int]:
    """How many pretraining and tuning seeds stand behind the picture.

    Tuning seeds are the most of any point: prompt design, which trains
    nothing, needs one.
    """
    bases = {choice.base_seed for choice in self.choices}
    tuning = {seed for choice in self.choices for seed in choice.records}
    return len(bases), len(tuning)


def mean_values(
  rows: Sequence[Mapping[str, float | None]],
) -> dict[str, float | None]:
  """Means by name, over the rows that have a value."""
  out: dict[str, float | None] = {}
  for name in dict.fromkeys(name for row in rows for name in row):
    values = [v for row in rows if (v := row.get(name)) is not None]
    out[name] = float(np.mean(values)) if values else None
  return out


def hyperparameters(settings: Mapping[str, Any]) -> dict[str, Any]:
  """The settings that a study searches over."""
  return {k: v for k, v in settings.items() if k not in NAMED}


def load(directory: str) -> Results:
  """Reads a study's directory.

  Raises:
    StudyError: as `load_study`, or a record lacks the study's metric.
    ledger.LedgerError: as `Ledger.latest`.
  """
  path = pathlib.Path(directory) / 'results.jsonl'
  return collect(load_study(directory), ledger.Ledger(path).latest())


def collect(study: Study, records: Mapping[str, Record]) -> Results:
  """Chooses hyperparameters and sorts cells into done, missing and so on.

  Args:
    study: what is expected.
    records: by key, as `Ledger.latest` has them.

  Raises:
    StudyError: a record lacks the study's metric.
  """
  cells = {cell['key']: cell for cell in study.cells}
  found = {key: records[key] for key in cells if key in records}
  done = {k: r for k, r in found.items() if r['status'] == 'done'}
  # What is reported of each (method, size, task, base_seed), tried settings
  # in the order of the study, by what identifies them.
  grid: dict[tuple[str, str, str, int], dict[str, dict[int, Record]]] = {}
  for key, record in done.items():
    if cells[key]['stage'] != 'tune':
      continue
    settings = cells[key]['settings']
    _check_metric(study, record)
    point = (
      settings['method'],
      settings['size'],
      settings['task'],
      settings['base_seed'],
    )
    which = json.dumps(hyperparameters(settings), sort_keys=True)
    tried = grid.setdefault(point, {}).setdefault(which, {})
    tried[settings['seed']] = record
  return Results(
    study=study,
    choices=[_choose(study, *point, tried) for point, tried in grid.items()],
    bases=[r for k, r in done.items() if cells[k]['stage'] == 'pretrain'],
    missing=[cell for key, cell in cells.items() if key not in found],
    failed=[
      {**record, 'settings': cells[key]['settings']}
      for key, record in found.items()
      if record['status'] == 'failed'
    ],
    stale=[record for key, record in records.items() if key not in cells],
  )


def _check_metric(study: Study, record: Record) -> None:
  for split in ('validation', 'test'):
    have = record.get('metrics', {}).get(split, {})
    if study.metric not in have:
      raise StudyError(
        f'The record of cell {record["key"]} has no {split} metric '
        f'{study.metric!r}; it has {", ".join(have) or "none"}.'
        f'{gin_rules.meant(study.metric, have)}'
      )


def _choose(
  study: Study,
  method: str,
  size: str,
  task: str,
  base_seed: int,
  tried: Mapping[str, Mapping[int, Record]],
) -> Choice:
  """The best setting by mean validation metric; of equals the first."""

  def validation(records: Mapping[int, Record]) -> float:
    values = [
      r['metrics']['validation'][study.metric] for r in records.values()
    ]
    mean = float(np.mean(values))
    return -math.inf if math.isnan(mean) else mean

  best = max(tried, key=lambda which: validation(tried[which]))
  return Choice(
    method=method,
    size=size,
    task=task,
    base_seed=base_seed,
    hyperparameters=json.loads(best),
    tried=len(tried),
    validation=validation(tried[best]),
    records=dict(sorted(tried[best].items())),
  )
