"""A process that holds methods on one model, to be counted and timed."""

import argparse
import dataclasses
import json
import logging
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lib import closed_form
from lib import method_steps
from prompt_jax import partitioning


class Steps:
  """Methods on one model, their frozen weights shared.

  Args:
    args: of `methods.py`, with a `folder` for files.
  """

  def __init__(self, args: argparse.Namespace):
    logging.getLogger('absl').setLevel(logging.ERROR)  # the base is random
    self._args = args
    self._ready: dict[str, Any] = {}
    self._network: Any = None

  def names(self) -> list[str]:
    """Of all methods."""
    return method_steps.names()

  def where(self) -> dict[str, str]:
    """What computes, and the model's sizes as JSON."""
    config = method_steps.read('fine_tune', self._args).model.config
    return {
      'platform': jax.default_backend(),
      'device': jax.devices()[0].device_kind,
      'version': f'jax {jax.__version__}',
      'sizes': json.dumps(dataclasses.asdict(config)),
    }

  def count(self, name: str) -> dict[str, Any]:
    """What is known of a step before it has run."""
    args = self._args
    setup = method_steps.read(name, args)
    data = method_steps.batch(setup, args)
    start = time.perf_counter()
    program, jaxpr = method_steps.compiled(setup, data)
    found = {
      'positions': data['encoder_input_tokens'].shape[1],
      'compile_s': time.perf_counter() - start,
      'counted_flops': method_steps.counted(program, jaxpr),
      'closed_flops': closed_form.flops(method_steps.products(setup, data)),
      **method_steps.memory(program),
      **method_steps.saved(setup, args.folder),
    }
    if whole := method_steps.with_kernel_gradients(setup, data):
      found['with_kernel_gradients_flops'] = closed_form.flops(whole)
    if name in args.activations.split(','):
      found['activation_bytes'] = self._activations(setup)
    if args.times:
      self._ready[name] = [program, *self._arguments(setup), data]
    return found

  def _activations(self, setup: method_steps.Setup) -> int:
    """What scratch memory grows by with the batch, from 2 B to 4 B, halved.

    At B what the optimizer needs may be all that there is to see.
    """
    sizes = []
    for times in (2, 4):
      more = {**vars(self._args), 'batch': times * self._args.batch}
      data = method_steps.batch(setup, argparse.Namespace(**more))
      program, _ = method_steps.compiled(setup, data)
      sizes.append(method_steps.memory(program)['scratch_bytes'])
    return (sizes[1] - sizes[0]) // 2

  def _arguments(self, setup: method_steps.Setup) -> tuple[Any, Any]:
    """State and frozen weights; those of the method are of any values."""
    if self._network is None:
      init = jax.jit(
        lambda rng: partitioning.unbox(setup.model.init_network(rng))
      )
      self._network = init(jax.random.PRNGKey(0))
    state, _ = setup.shapes
    rng = np.random.default_rng(0)
    method = jax.tree.map(
      lambda s: (0.02 * rng.standard_normal(s.shape)).astype(s.dtype),
      state.trainable['method'],
    )
    tuned, _ = setup.model.split(self._network)
    state = method_steps.zeros(state).replace(
      trainable={'method': method, 'network': tuned},
      rng=jax.random.PRNGKey(0),
    )
    # Copies, for the step is given them away.
    state = jax.tree.map(lambda x: jnp.array(x, copy=True), state)
    constants = setup.model.constants(self._network)
    return state, setup.frozen(self._network, partitioning.unbox(constants))

  def step(self, name: str) -> None:
    """One update."""
    program, state, frozen, data = self._ready[name]
    state, metrics = program(state, frozen, data)
    jax.block_until_ready((state, metrics))
    self._ready[name][1] = state
    if not bool(metrics['finite']):
      raise FloatingPointError(f'{name}: the loss is not finite.')
