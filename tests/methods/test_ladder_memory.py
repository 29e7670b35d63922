"""LST: what a step keeps of the frozen network, and how much memory it needs.

Activations are counted in the program that JAX makes of the backward pass; the
slow test asks the compiler.
"""

import dataclasses

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_jax import models
from prompt_jax import partitioning
from prompt_jax.methods import ladder

# Small, not tiny. No two widths are equal.
WIDE = dataclasses.replace(
  helpers.SMALL,
  emb_dim=128,
  head_dim=24,
  mlp_dim=320,
  num_encoder_layers=4,
  num_decoder_layers=4,
  dropout_rate=0.1,
)
KEY = jax.ShapeDtypeStruct((2,), jnp.uint32)


ROWS, INPUTS, TARGETS = 7, 36, 20


def step(of):
  """The gradient's function, and shapes of its arguments."""
  params = partitioning.unbox(
    models.EncoderDecoderModel(of.config).abstract_network
  )
  tuned, frozen = of.split(params)
  method = jax.eval_shape(of.init_method, jax.random.PRNGKey(0), params)
  own = {'method': partitioning.unbox(method), 'network': tuned}
  batch = helpers.random_batch(of.config, ROWS, INPUTS, TARGETS)

  def loss(own, frozen, batch, rng):
    return of.loss_fn(frozen, own, batch, rng)[0]

  return loss, (own, frozen, batch, KEY)


def kept(of):
  """Shapes of the activations that the backward pass is given."""
  loss, arguments = step(of)

  def residuals(own, *others):
    return jax.vjp(lambda own: loss(own, *others), own)[1]

  found = jax.tree.leaves(jax.eval_shape(residuals, *arguments))
  return [x.shape for x in found if ROWS in x.shape]


def lst():
  return models.EncoderDecoderModel(WIDE, method=ladder.LST(start=None))


def full(config=WIDE):
  return models.EncoderDecoderModel(config, trainable_patterns=['.*'])


@pytest.mark.slow
def test_of_the_frozen_network_only_what_is_read_is_kept():
  found, all_of_it = kept(lst()), kept(full())
  size = lambda shapes: sum(map(np.prod, shapes))
  assert size(found) < 0.4 * size(all_of_it)
  layers, width = WIDE.num_encoder_layers, WIDE.emb_dim
  heads = WIDE.num_heads, WIDE.head_dim
  own = (width, heads[0] * heads[1], WIDE.mlp_dim)

  def frozen(shape):
    return shape[-1] in own or shape[-2:] == heads

  embedded = {(ROWS, length, width) for length in (INPUTS, TARGETS)}
  read = {(layers, *shape) for shape in embedded}
  of_it = {shape for shape in found if frozen(shape)}
  assert read <= of_it <= read | embedded
  assert len({s for s in all_of_it if frozen(s)} - read - embedded) > 3
  # The attentions of both networks look alike: it keeps as many as the side
  # network would by itself.
  narrow = full(lst().method.network(WIDE).side)

  def attentions(shapes):
    return sorted(s for s in shapes if s[-1] in (INPUTS, TARGETS))

  assert attentions(found) == attentions(kept(narrow))


@pytest.mark.slow
def test_a_compiled_step_needs_a_fraction_of_the_memory():
  sizes = []
  for of in (lst(), full()):
    loss, arguments = step(of)
    compiled = jax.jit(jax.grad(loss)).lower(*arguments).compile()
    sizes.append(compiled.memory_analysis().temp_size_in_bytes)
  assert sizes[0] < 0.4 * sizes[1]
