"""What a run costs: seconds, and floating-point operations.

Not for parameters and memory (`jobs.py`).
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prompt_jax import partitioning
from prompt_jax import run as run_lib
from prompt_jax import train_state
from prompt_jax import trainer


@dataclasses.dataclass(frozen=True)
class Cost:
  """What training took.

  Attributes:
    compile_seconds: until the first step was done.
    train_seconds: of all other steps, evaluations left out.
    step_seconds: of a step (of all runs, where several train together).
    flops: of the training of one run, by the compiler's count; None where it
      does not count.
  """

  compile_seconds: float
  train_seconds: float
  step_seconds: float
  flops: float | None


def of_log(
  lines: Sequence[Mapping[str, Any]], seconds: float, flops: float | None
) -> Cost:
  """The cost of a run of `train.train`, by its own log.

  A run that went on where it had stopped counts as if it never had.

  Args:
    lines: of its metrics.jsonl.
    seconds: that the last start of it took.
    flops: of all of its steps.
  """
  train = [x for x in lines if x['split'] == 'train']
  rates = [x['steps_per_second'] for x in train]
  # The first line's steps waited for the compiler.
  step_seconds = 1 / float(np.median(rates[1:] or rates))
  train_seconds = train[-1]['step'] * step_seconds
  return Cost(
    compile_seconds=max(seconds - train_seconds, 0.0),
    train_seconds=train_seconds,
    step_seconds=step_seconds,
    flops=flops,
  )


def flops_of_step(
  run: run_lib.Run,
  optimizer: Any,
  learning_rate_fn: Any,
  batch_size: int,
  pack: bool = False,
) -> float | None:
  """Floating-point operations of one step of one run; nothing is computed.

  Args:
    run: with its tasks registered.
    optimizer: from `optimizers`.
    learning_rate_fn: from `schedules`.
    batch_size: B.
    pack: several examples in a row.

  Returns:
    The compiler's count before it optimises; None where it does not count.
  """
  # It counts a loop's body once, so no loop.
  config = dataclasses.replace(run.model.config, scan_unroll=0)
  step = functools.partial(
    trainer.train_step,
    model=dataclasses.replace(run.model, config=config),
    optimizer=optimizer,
    learning_rate_fn=learning_rate_fn,
  )
  lengths = run.converter(pack).get_model_feature_lengths(
    run.task_feature_lengths
  )
  batch = {
    name: jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
    for name, length in lengths.items()
  }
  with run.partitioner.activate():
    base = _abstract_base(run)
    state = run.abstract_state(optimizer, base)
    lowered = jax.jit(step).lower(state, base.frozen, batch)
  return (lowered.cost_analysis() or {}).get('flops')


def _abstract_base(run: run_lib.Run) -> run_lib.Base:
  """Shapes of the base as `Run.load` places it."""
  params = train_state.unflatten(run.expected)
  network, frozen = run.model.split(params)
  dtype = jnp.dtype(run.model.config.dtype)
  frozen = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), frozen)
  constants = jax.eval_shape(run.model.constants, params)
  if constants:
    frozen = {**frozen, 'constants': partitioning.unbox(constants)}
  return run_lib.Base(frozen, network, fingerprint={}, step=0)
