"""Rank classification of many runs in one program.

The same rule and numbers as `evaluation.Evaluation`, for K trained parts on one
frozen base at once: of each example the label string with the highest
log-likelihood. The rows of all tasks lie on the devices, each example once a
label. Not for generated text.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import numpy as np

from prompt_jax import evaluation
from prompt_jax import run as run_lib


@dataclasses.dataclass(frozen=True)
class _Task:
  """Where a task's rows lie among those of all: example-major, then label."""

  start: int
  gold: np.ndarray  # [N]
  lengths: np.ndarray  # [C], tokens of each label


class Ranking:
  """Ranks the labels of each run's own task; call it often.

  Args:
    runs: K runs that differ in task and seed only; their tasks are registered.
    config: split, batch size, labels, number of examples.

  Raises:
    ValueError: a task without labels, or with a target that is none of them.
  """

  def __init__(
    self, runs: Sequence[run_lib.Run], config: evaluation.EvalConfig
  ):
    rows, tasks, start = [], {}, 0
    for run in runs:
      name = run.mixture_or_task_name
      if name not in tasks:
        found, gold, lengths = _rows(run, config)
        rows.append(found)
        tasks[name] = _Task(start, gold, lengths)
        start += len(gold) * len(lengths)
    self._tasks = [tasks[run.mixture_or_task_name] for run in runs]
    data = {k: np.concatenate([r[k] for r in rows]) for k in rows[0]}
    self._data = jax.device_put(data, runs[0].partitioner.replicated)
    sizes = [len(t.gold) * len(t.lengths) for t in self._tasks]
    steps = -(-max(sizes) // config.batch_size)
    index = np.zeros((len(runs), steps * config.batch_size), np.int32)
    for row, task, size in zip(index, self._tasks, sizes, strict=True):
      row[:size] = task.start + np.arange(size)
    index = index.reshape(len(runs), steps, config.batch_size)
    self._index = np.swapaxes(index, 0, 1)  # [S, K, B]
    score = runs[0].model.score_batch

    def scores(frozen, trainable, data, index):
      def one(rows):
        batch = {name: x[rows] for name, x in data.items()}
        return map_runs(lambda x: score(frozen, *x), (trainable, batch))

      return jax.lax.map(one, index)

    self._scores = jax.jit(scores)

  def __call__(self, trainable: Any, frozen: Any) -> list[dict[str, float]]:
    """Metrics of each run, in per cent.

    Args:
      trainable: of all runs, [K, ...] each.
      frozen: the base.
    """
    found = self._scores(frozen, trainable, self._data, self._index)
    found = np.swapaxes(jax.device_get(found), 0, 1).reshape(
      len(self._tasks), -1
    )
    out = []
    for scores, task in zip(found, self._tasks, strict=True):
      n, c = len(task.gold), len(task.lengths)
      ranked = (scores[: n * c].reshape(n, c), task.gold, task.lengths)
      out.append(evaluation.rank_metrics([ranked], c))
    return out


def map_runs(function: Any, runs: Any, at_once: int | None = None) -> Any:
  """`function` of each run; the first axis of all arrays is that of runs.

  Args:
    function: of one run's part.
    runs: a tree of arrays, [K, ...] each.
    at_once: runs of one `jax.vmap`; None: one on a CPU, all elsewhere.
  """
  count = len(jax.tree.leaves(runs)[0])
  if at_once is None:
    at_once = 1 if jax.default_backend() == 'cpu' else count
  if at_once == 1:
    return jax.lax.map(function, runs)
  return jax.lax.map(function, runs, batch_size=at_once)


def known_labels(reader: evaluation.Evaluation, task: str) -> list[str]:
  """The strings that a task's answers are chosen from.

  Raises:
    ValueError: it has none.
  """
  labels = reader.labels(task)
  if not labels:
    raise ValueError(
      f'{task!r} has no labels to choose from: give RANK_LABELS, or --labels '
      'with your own data.'
    )
  return labels


def _rows(
  run: run_lib.Run, config: evaluation.EvalConfig
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
  """Every example with every label, [N * C, ...]; gold [N]; tokens [C]."""
  name = run.mixture_or_task_name
  reader = evaluation.Evaluation(run, config)
  labels = known_labels(reader, name)
  tokens = reader.label_tokens(labels)
  parts, gold = [], []
  for rows, batch in reader.batches(name):
    choices = [run.model.with_targets(batch, ids) for ids in tokens]
    gold.append(evaluation.gold_labels(batch, choices)[:rows])
    stacked = {
      k: np.stack([c[k][:rows] for c in choices], axis=1) for k in batch
    }
    parts.append({k: x.reshape(-1, *x.shape[2:]) for k, x in stacked.items()})
  data = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
  return data, np.concatenate(gold), np.sum(tokens > 0, axis=1)
