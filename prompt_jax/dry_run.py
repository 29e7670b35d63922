"""`--dry_run`: what a command would do, shown before anything is computed.

Every value with the place that it comes from, the base checkpoint against the
network, all parameters, the mesh, lengths of the texts, and the first batch as
the model sees it.
"""

from typing import Any

import jax
import numpy as np

from prompt_jax import convert
from prompt_jax import datasets
from prompt_jax import gin_utils
from prompt_jax import infer
from prompt_jax import run as run_lib
from prompt_jax import train_state


def show(rows: int = 3) -> None:
  """Prints it all; `rows` of the first batch."""
  print(_bindings())
  run = gin_utils.build('@run.Run()')
  with run.partitioner.activate():
    print(_parameters(run))
    print(_mesh(run))
    if run.initial_checkpoint_path is None:
      print('\nBase: random (INITIAL_CHECKPOINT_PATH is None).')
    else:
      checkpoint = run.open_base()
      print(f'\nBase: {checkpoint.path} ({checkpoint.kind}).')
      print(convert.report(checkpoint, run.expected))
      convert.fit(checkpoint, run.expected)
    run.register_tasks()
    print(_data(run, rows))
  print('\nDry run: nothing was written.')


def _table(rows: Any, headers: Any) -> str:
  from tabulate import tabulate

  return tabulate(rows, headers, tablefmt='simple', disable_numparse=True)


def _bindings() -> str:
  rows = [(b.key, b.value, b.source) for b in gin_utils.resolved()]
  return _table(rows, ('setting', 'value', 'from'))


def _parameters(run: run_lib.Run) -> str:
  tuned, _ = run.model.split(run.expected)
  tuned = set(train_state.flatten(tuned))
  rows = []
  totals = {'frozen': 0, 'trainable': 0}

  def add(path: str, shape: Any, kind: str, sharding: Any) -> None:
    count = int(np.prod(shape, dtype=np.int64))
    totals[kind] += count
    rows.append((path, 'x'.join(map(str, shape)), kind, f'{count:,}', sharding))

  for path, leaf in run.expected.items():
    kind = 'trainable' if path in tuned else 'frozen'
    add(path, leaf.shape, kind, run.network_shardings[path].spec)
  params = train_state.unflatten(run.expected)
  boxed = jax.eval_shape(run.model.init_method, run.init_rng(), params)
  places = train_state.flatten(run.partitioner.shardings(boxed))
  for path, leaf in train_state.flatten(boxed).items():
    leaf = getattr(leaf, 'value', leaf)
    add(f'method/{path}', leaf.shape, 'trainable', places[path].spec)
  table = _table(
    rows, ('parameter', 'shape', 'kind', 'number', 'over the mesh')
  )
  share = totals['trainable'] / sum(totals.values())
  return (
    f'\n{table}\n\nFrozen: {totals["frozen"]:,}. Trainable: '
    f'{totals["trainable"]:,} ({share:.4%}). Computed in '
    f'{run.model.config.dtype}.'
  )


def _mesh(run: run_lib.Run) -> str:
  mesh = run.partitioner.mesh
  shape = ', '.join(f'{name} {size}' for name, size in mesh.shape.items())
  device = jax.devices()[0]
  return (
    f'\nMesh: {shape}; {jax.device_count()} devices ({device.device_kind}), '
    f'{jax.process_count()} processes.'
  )


def _data(run: run_lib.Run, rows: int) -> str:
  parts = []
  provider = datasets.find_task(run.mixture_or_task_name)
  split = 'train' if 'train' in provider.splits else next(iter(provider.splits))
  for task in datasets.subtasks(provider):
    if split not in task.splits:  # of a mixture, those only evaluated
      continue
    report = datasets.length_report(task.name, split, run.task_feature_lengths)
    parts.append(str(report))
  config = run.dataset_config(split=split, batch_size=rows, shuffle=True)
  batch = next(datasets.TrainIterator(config, run.converter()))
  shapes = ', '.join(f'{k} {list(v.shape[1:])}' for k, v in batch.items())
  parts.append(f'\nA row of a batch: {shapes}.')
  shown = infer.show(run, batch)
  for i in range(rows):
    parts.append(f'\n[{i}] inputs:  {shown["inputs"][i]}')
    parts.append(f'    targets: {shown["targets"][i]}')
  ids = next(iter(batch.values()))[0]
  parts.append(f'\nIds of row 0: {ids[ids > 0].tolist()}')
  return '\n' + '\n'.join(parts)
