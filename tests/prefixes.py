"""A small network, and what a prefix on it is, for the tests of prefixes."""

import dataclasses
import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np

from prompt_jax import models
from prompt_jax import partitioning
from prompt_jax import train_state
from prompt_jax.methods import activations
from prompt_jax.methods.prefix_tuning import PrefixTuning

CONFIG = dataclasses.replace(helpers.SMALL, vocab_size=264)
LM = dataclasses.replace(
  CONFIG, num_encoder_layers=0, logits_via_embedding=True
)
L, D, H, K = 2, CONFIG.emb_dim, CONFIG.num_heads, CONFIG.head_dim
P = 3


def model(config=CONFIG, length=P, **fields):
  method = PrefixTuning(length, **fields)
  if config.num_encoder_layers:
    return models.EncoderDecoderModel(config, method=method)
  return models.DecoderOnlyModel(config, method=method)


@functools.cache
def frozen(config=CONFIG):
  """Random weights with keys that tell queries apart, which T5's are."""
  init = jax.jit(model(config, mlp_dim=None).init_network)
  return partitioning.unbox(init(jax.random.PRNGKey(0)))


def own(of, params=None):
  """The method's parameters at the start."""
  params = frozen(of.config) if params is None else params
  return partitioning.unbox(of.init_method(jax.random.PRNGKey(1), params))


def trainable(method):
  return {'method': method, 'network': {}}


@functools.cache
def batch():
  return helpers.random_batch(CONFIG)


def logits(of, method, batch, rng=None):
  run = jax.jit(of.logits)
  return np.asarray(run(frozen(of.config), trainable(method), batch, rng))


def tables(found):
  """Parameters of plain tables [L, P, H, K], from attention -> (key, value)."""
  flat = {}
  for name, pair in found.items():
    stack, module = activations.ATTENTIONS[name]
    for part, x in zip(('key', 'value'), pair, strict=True):
      flat[f'{stack}/layers/{module}/prefix_{part}'] = jnp.asarray(x)
  return train_state.unflatten(flat)
