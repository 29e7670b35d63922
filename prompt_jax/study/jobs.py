"""Runs a job of a study and says what came of it, as records of the ledger.

Pretraining is a run like any other (`train.train`), in a directory of its own,
and goes on there when it was stopped; so is a tuning run that trains alone.
Other tuning runs train together. Each leaves one `.safetensors` a cell. Not for
choosing what to run (`workers.py`).
"""

from collections.abc import Mapping
import datetime
import importlib.metadata
import os
import pathlib
import time
from typing import Any

import jax
import numpy as np

import prompt_jax
from prompt_jax import checkpoints
from prompt_jax import fingerprints
from prompt_jax import gin_utils
from prompt_jax import reporting
from prompt_jax import run as run_lib
from prompt_jax import train_state
from prompt_jax.study import costs
from prompt_jax.study import plan
from prompt_jax.study import processes
from prompt_jax.study import together
from prompt_jax.study.ledger import Record

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'seqio')
_EMBEDDINGS = ('token_embedder/', 'logits_dense/')


def base_path(directory: pathlib.Path, key: str) -> pathlib.Path:
  """The directory of a pretraining run."""
  return directory / 'bases' / key


def run(job: plan.Job, directory: pathlib.Path) -> list[Record]:
  """Runs a job.

  Args:
    job: its base, if it has one, is done.
    directory: of the study.

  Returns:
    A record of each cell, 'failed' for those whose loss was not finite.

  Raises:
    Exception: whatever went wrong; no cell is done then.
  """
  start = time.monotonic()
  memory = _Memory()
  if job.cells[0].stage == 'pretrain':
    found = [_pretrain(job.cells[0], directory)]
  else:
    found = _tune(job, directory)
  seconds = time.monotonic() - start
  for record in found:
    record['cost'] |= {
      'wall_seconds': seconds,
      'peak_bytes': memory.peak(),
      'runs_together': len(job.cells),
    }
  return found


def failed(job: plan.Job, error: str, session: str) -> list[Record]:
  """Records of a job that ended with an error."""
  return [
    {
      **_head(cell, 'failed', error),
      'metrics': {},
      'parameters': {},
      'cost': {},
      'origin': {'code': prompt_jax.__version__, 'session': session},
    }
    for cell in job.cells
  ]


def _head(cell: plan.Cell, status: str, error: str | None) -> Record:
  return {
    'key': cell.key,
    'stage': cell.stage,
    'status': status,
    'error': error,
    'settings': dict(cell.settings),
  }


def _pretrain(cell: plan.Cell, directory: pathlib.Path) -> Record:
  folder = base_path(directory, cell.key)
  gin_utils.parse(cell.gin_files, cell.flags(MODEL_DIR=str(folder)))
  start = time.monotonic()
  gin_utils.run('train.train')
  seconds = time.monotonic() - start
  processes.barrier('pretrained')
  made: run_lib.Run = gin_utils.build('@run.Run()')
  lines = reporting.read_metrics(folder / 'metrics.jsonl')
  steps = max(x['step'] for x in lines)
  found = {}
  for line in lines:  # the last evaluation counts
    if line['split'] != 'train' and line['step'] == steps:
      found[line['split']] = dict(tuple(line.items())[3:])
  file = folder / 'trainable.safetensors'
  header = checkpoints.load_trainable(str(file))[1]
  total, inner = _sizes(made)
  flops = costs.flops_of_step(
    made, *map(gin_utils.build, ('%OPTIMIZER', '%LEARNING_RATE_FN')),
    batch_size=gin_utils.build('%BATCH_SIZE'), pack=gin_utils.build('%PACK'),
  )  # fmt: skip
  cost = costs.of_log(lines, seconds, flops and flops * steps)
  return {
    **_head(cell, 'done', None),
    'config': _config(),
    'metrics': found,
    'parameters': {'total': total, 'non_embedding': inner, 'trained': total},
    'cost': _cost(cost, steps) | {'trained_bytes': file.stat().st_size},
    'origin': _origin(made, header['base_digest']),
  }


def _tune(job: plan.Job, directory: pathlib.Path) -> list[Record]:
  more = {}
  base_key = job.cells[0].base
  if base_key is not None:
    more['INITIAL_CHECKPOINT_PATH'] = str(base_path(directory, base_key))
  configs = []
  for cell in reversed(job.cells):  # the first one's stays
    if job.alone:
      more['MODEL_DIR'] = str(directory / 'cells' / cell.key)
    gin_utils.parse(cell.gin_files, cell.flags(**more))
    configs.insert(0, _config())
  if job.alone:
    outcome, base, cost = gin_utils.run('alone.train')
    outcomes = [outcome]
  else:
    members = _members(job)
    outcomes, base, cost = gin_utils.run('together.train', members=members)
  steps = int(gin_utils.build('%TRAIN_STEPS'))
  return [
    _tuned(directory, *one, base, _cost(cost, steps))
    for one in zip(job.cells, configs, outcomes, strict=True)
  ]


def _members(job: plan.Job) -> list[together.Member]:
  rate = job.cells[0].bindings.get('LEARNING_RATE')
  return [
    together.Member(
      cell.bindings['MIXTURE_OR_TASK_NAME'],
      cell.bindings['SEED'],
      cell.bindings['LEARNING_RATE'] / rate if rate else 1.0,
    )
    for cell in job.cells
  ]


def _tuned(
  directory: pathlib.Path,
  cell: plan.Cell,
  config: dict[str, str],
  one: together.Outcome,
  base: run_lib.Base,
  cost: Record,
) -> Record:
  """Writes what a cell has trained; its record."""
  if not one.finite:
    error = (
      'The loss, its gradient or its update was not finite: a lower '
      'LEARNING_RATE may help.'
    )
    return {**_head(cell, 'failed', error), 'cost': {}, 'origin': {}}
  path = directory / 'cells' / f'{cell.key}.safetensors'
  if processes.is_first():
    path.parent.mkdir(parents=True, exist_ok=True)
    one.run.export(path, one.trainable, base, one.step, one.metrics)
  total, inner = _sizes(one.run)
  flat = train_state.flatten(one.trainable)
  trained = sum(int(np.size(x)) for x in flat.values())
  size = path.stat().st_size if trained and path.exists() else 0
  return {
    **_head(cell, 'done', None),
    'config': config,
    'metrics': dict(one.metrics),
    'history': [list(x) for x in one.history],
    'parameters': {'total': total, 'non_embedding': inner, 'trained': trained},
    'cost': {**cost, 'best_step': one.step, 'trained_bytes': size},
    'origin': _origin(one.run, fingerprints.digest(base.fingerprint)),
  }


def _cost(cost: costs.Cost, steps: int) -> Record:
  return {
    'steps': steps,
    'train_flops': cost.flops,
    'step_seconds': cost.step_seconds,
    'train_seconds': cost.train_seconds,
    'compile_seconds': cost.compile_seconds,
  }


def _config() -> dict[str, str]:
  """Every resolved value; where the study lies does not belong to it."""
  places = ('MODEL_DIR', 'INITIAL_CHECKPOINT_PATH', 'OUTPUT')
  here = {b.key: b.value for b in gin_utils.resolved()}
  hidden = {here.get(name) for name in places} - {None, 'None'}
  return {
    key: value
    for key, value in here.items()
    if key not in places and value not in hidden
  }


def _sizes(made: run_lib.Run) -> tuple[int, int]:
  """Parameters of the network, and those that are no embedding."""
  counts = {path: int(np.prod(s.shape)) for path, s in made.expected.items()}
  inner = sum(
    n
    for path, n in counts.items()
    if not any(name in path for name in _EMBEDDINGS)
  )
  return sum(counts.values()), inner


def _origin(made: run_lib.Run, base: str) -> Record:
  device = jax.devices()[0]
  cores = len(os.sched_getaffinity(0)) if device.platform == 'cpu' else 0
  what = (
    f'{device.device_kind} ({cores} cores)' if cores else device.device_kind
  )
  now = datetime.datetime.now(datetime.UTC)
  return {
    'base': base,
    'vocabulary': made.vocabulary_fingerprint,
    'code': prompt_jax.__version__,
    'versions': {name: importlib.metadata.version(name) for name in _PACKAGES},
    'device': what,
    'time': now.isoformat(timespec='seconds'),
  }


class _Memory:
  """The most memory in use since then: of the device or, on a CPU, ours."""

  def __init__(self):
    try:  # Linux counts anew from here
      pathlib.Path('/proc/self/clear_refs').write_text('5')
    except OSError:
      pass

  def peak(self) -> int | None:
    device = jax.local_devices()[0]
    stats: Mapping[str, Any] = device.memory_stats() or {}
    if 'peak_bytes_in_use' in stats:
      return int(stats['peak_bytes_in_use'])
    try:
      lines = pathlib.Path('/proc/self/status').read_text().splitlines()
    except OSError:
      return None
    found = [x.split()[1] for x in lines if x.startswith('VmHWM:')]
    return int(found[0]) * 1024 if found else None
