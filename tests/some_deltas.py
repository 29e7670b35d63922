"""Deltas of every kind with random numbers, and a network to lay them on."""

import functools

from flax import linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np

from prompt_jax import deltas
from prompt_jax import train_state
from prompt_jax.deltas import Routed
from prompt_jax.network import t5

C = helpers.SMALL
B, G, L = 4, 3, 2
WIDTH = C.num_heads * C.head_dim
GROUP = jnp.asarray([2, 0, 0, 1])
CLOSE = {'rtol': 1e-5, 'atol': 1e-5}


def draw(*shape, seed=0, scale=0.5):
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)


def make(kind, lead, seed=0, width=WIDTH):
  """A table of that kind with the leading axes `lead`, ((L,) G)."""
  d = functools.partial(draw, *lead, seed=seed)
  return {
    'rows': lambda: d(2, C.emb_dim),
    'low_rank': lambda: (d(C.emb_dim, 2), d(2, width)),
    'scale': lambda: 1 + d(width),
    'shift': lambda: d(width),
    'prefix': lambda: (
      d(3, C.num_heads, C.head_dim),
      d(3, C.num_heads, C.head_dim, seed=seed + 1),
    ),
    'hidden': lambda: (d(1), d(C.emb_dim)),
    'kernel': lambda: d(C.emb_dim, width),
    'bottleneck': lambda: deltas.Adapter(
      d(C.emb_dim, 2), d(2), d(2, C.emb_dim), d(C.emb_dim)
    ),
    'parallel': lambda: deltas.Adapter(
      d(C.emb_dim, 2), d(2), d(2, C.emb_dim), d(C.emb_dim), 'silu'
    ),
  }[kind]()


# Of what a table may be: shared, one a task (routed), one an example.
WHOSE = {
  'shared': lambda kind, lead, seed: Routed(make(kind, (*lead, 1), seed)),
  'task': lambda kind, lead, seed: Routed(
    make(kind, (*lead, G), seed), jnp.broadcast_to(GROUP, (*lead, B))
  ),
  'example': lambda kind, lead, seed: Routed(make(kind, (*lead, B), seed)),
}


def whose(kind, owner, lead=(), seed=0):
  return WHOSE[owner](kind, lead, seed)


def by_example(delta, kind):
  """What each of the B examples gets, [(L,) B, ...]: a definition by hand."""
  groups_on = {'rows': 3, 'scale': 2, 'shift': 2, 'prefix': 4}.get(kind, 3)
  scanned = jax.tree.leaves(delta.table)[0].ndim > groups_on
  leaves = []
  for leaf in jax.tree.leaves(delta.table):
    leaf = np.asarray(leaf)
    leaf = leaf if scanned else leaf[None]
    index = np.zeros(B, int) if leaf.shape[1] == 1 else np.arange(B)
    if delta.group is not None:
      index = np.asarray(delta.group).reshape(-1, B)[0]
    leaf = leaf[:, index]
    leaves.append(leaf if scanned else leaf[0])
  return leaves


@functools.cache
def params(scan=True):
  """The same weights, stacked or layer by layer."""
  if not scan:
    flat = helpers.unstack_layers(train_state.flatten(params()))
    return train_state.unflatten(flat)
  one = np.ones((1, 1), np.int32)
  init = jax.jit(t5.T5(C).init)
  return nn.meta.unbox(init(jax.random.PRNGKey(0), one, one)['params'])


def tokens():
  batch = helpers.random_batch(C, rows=B)
  return batch['encoder_input_tokens'], batch['decoder_input_tokens']
