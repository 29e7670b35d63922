"""Members of an ensemble: trained runs as tasks of one method, and their votes.

For `prompt_jax/ensemble.py`, which evaluates them.
"""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int
import numpy as np

from prompt_jax import partitioning
from prompt_jax import train_state
from prompt_jax.methods import base

# ---- what members agree on ---------------------------------------------------


def majority(answers: Sequence[Any], scores: Sequence[float]) -> int:
  """The member that speaks for all.

  >>> majority(['no', 'yes', 'yes'], [-0.1, -3.0, -2.0])
  1
  >>> majority(['no', 'yes'], [-0.1, -3.0])
  0

  Args:
    answers: of each member.
    scores: log-likelihood that each gives its own answer.

  Returns:
    The first member with the answer that most give; of answers given equally
    often the one with the highest sum of scores.
  """
  votes = collections.Counter(answers)
  total: dict[Any, float] = collections.defaultdict(float)
  for answer, score in zip(answers, scores, strict=True):
    total[answer] += float(score)
  best = max(votes, key=lambda answer: (votes[answer], total[answer]))
  return list(answers).index(best)


def combine_labels(
  scores: Float[np.ndarray, 'B C N'], combine: str = 'majority'
) -> Float[np.ndarray, 'B C']:
  """Scores of labels, of which the highest is the ensemble's answer.

  Args:
    scores: log-likelihood of each label by each member.
    combine: 'mean' gives the mean; 'majority' 1 to the winner and 0 to others.
  """
  if combine == 'mean':
    return scores.mean(axis=-1)
  out = np.zeros(scores.shape[:2])
  answers = scores.argmax(axis=1)
  for row, said, own in zip(out, answers, scores.max(axis=1), strict=True):
    row[said[majority(said.tolist(), own.tolist())]] = 1.0
  return out


# ---- members as tasks --------------------------------------------------------


def with_tasks(method: Any, count: int) -> Any:
  """A method of one task as one that keeps `count` tasks apart.

  Raises:
    ValueError: it cannot, or keeps some apart already.
  """
  if isinstance(method, base.Chain):
    parts = {k: with_tasks(m, count) for k, m in method.methods.items()}
    return method.clone(methods=parts)
  tasks = getattr(method, 'num_tasks', None)
  if tasks != 1:
    name = type(method).__name__
    why = 'keeps no tasks apart' if tasks is None else f'has {tasks} tasks'
    raise ValueError(
      f'{name} {why}, so its runs cannot stand in one batch: an ensemble needs '
      'a method with num_tasks = 1, such as SoftPrompt.'
    )
  return method.clone(num_tasks=count)


def stack(model: Any, members: Sequence[Any]) -> tuple[Any, Any]:
  """The model and the trainable parameters of which each member is a task.

  Args:
    model: of the members, with a method of one task.
    members: trainable parameters of each.

  Raises:
    ValueError: fewer than two members, a method without tasks, members that
      differ in what its tasks share, or that change the network itself.
  """
  if len(members) < 2:
    raise ValueError(
      f'An ensemble has two members or more, got {len(members)}.'
    )
  if any(train_state.flatten(m['network']) for m in members):
    raise ValueError(
      'The members train parameters of the network itself, so they cannot '
      'stand in one batch: TRAINABLE_PATTERNS must be ().'
    )
  method = with_tasks(model.method, len(members))
  together = dataclasses.replace(model, method=method)
  network = partitioning.unbox(model.abstract_network)
  boxed = jax.eval_shape(together.init_method, jax.random.PRNGKey(0), network)
  flat = [train_state.flatten(jax.device_get(m['method'])) for m in members]
  out = {}
  for path, box in train_state.flatten(boxed).items():
    each = [member[path] for member in flat]
    if 'task' in getattr(box, 'names', ()):
      axis = box.names.index('task')
      shape = [n for i, n in enumerate(box.value.shape) if i != axis]
      out[path] = np.stack([x.reshape(shape) for x in each], axis)
    elif all((x == each[0]).all() for x in each[1:]):
      out[path] = each[0]
    else:
      raise ValueError(
        f'The members differ in {path}, which the tasks of '
        f'{type(model.method).__name__} share. If it makes a prompt, write '
        'each by `prompt-jax export` first.'
      )
  return together, {'method': train_state.unflatten(out), 'network': {}}


def expand(
  batch: Mapping[str, Any], soft_ids: Int[np.ndarray, 'N P']
) -> dict[str, Any]:
  """A batch with each example N times, the soft tokens of any task as its own.

  Rows n, N + n, 2 N + n, ... are those of member n.

  Args:
    batch: of model features, with the soft tokens of one of the members.
    soft_ids: ids of the soft tokens of each member.
  """
  count = len(soft_ids)
  out = {k: jnp.repeat(jnp.asarray(x), count, axis=0) for k, x in batch.items()}
  rows = len(next(iter(out.values())))
  member = jnp.arange(rows, dtype=jnp.int32) % count
  if soft_ids.size:
    first, size = int(soft_ids.min()), int(np.ptp(soft_ids)) + 1
    table = np.broadcast_to(first + np.arange(size), (count, size)).copy()
    for ids in soft_ids:  # whoever's they are
      table[:, ids - first] = soft_ids
    table = jnp.asarray(table, jnp.int32)
    for key in ('encoder_input_tokens', 'decoder_input_tokens'):
      if key in out:
        tokens = out[key]
        place = jnp.clip(tokens - first, 0, size - 1)
        own = table[member[:, None], place]
        out[key] = jnp.where(tokens >= first, own, tokens)
  return {**out, 'task_ids': member}
