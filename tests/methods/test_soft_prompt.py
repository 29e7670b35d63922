"""Prompt tuning: the count, where soft tokens stand, and whose they are."""

import dataclasses
import functools
import pathlib
import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_jax import gin_rules
from prompt_jax import models
from prompt_jax import partitioning
from prompt_jax import vocabularies
from prompt_jax.methods import base
from prompt_jax.methods import initializers
from prompt_jax.methods.soft_prompt import SoftPrompt

V = 264
CONFIG = dataclasses.replace(helpers.SMALL, vocab_size=V)
D = CONFIG.emb_dim
CLOSE = {'rtol': 1e-5, 'atol': 1e-5}
TEXT = 'it was'  # an id a byte: six pieces
PIECES = np.frombuffer(TEXT.encode(), np.uint8).astype(np.int32) + 3


@functools.cache
def frozen():
  init = jax.jit(models.EncoderDecoderModel(CONFIG).init_network)
  return partitioning.unbox(init(jax.random.PRNGKey(0)))


def model(length=6, **fields):
  method = SoftPrompt(length, **fields)
  return models.EncoderDecoderModel(CONFIG, method=method)


BARE = models.EncoderDecoderModel(CONFIG)


def logits(of, trainable, batch):
  return np.asarray(jax.jit(of.logits)(frozen(), trainable, batch))


def prompts(*shape):
  return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def with_tokens(ids, columns, feature='encoder_input_tokens'):
  """The batch with these ids at these columns of every row."""
  batch = helpers.random_batch(CONFIG, inputs=14, targets=12)
  tokens = batch[feature].copy()
  tokens[:, columns] = ids
  return {**batch, feature: tokens}


# ---- how many --------------------------------------------------------------


def test_count_is_length_times_width_and_the_header_says_so():
  path = gin_rules.packaged() / 'methods' / 'soft_prompt.gin'
  text = pathlib.Path(path).read_text()
  length = int(re.findall(r'^PROMPT_LENGTH = (\d+)', text, re.M)[0])
  widths = {'small': 512, 'base': 768, 'large': 1024, 'xl': 2048, 'xxl': 4096}
  said = re.findall(r'\b(\w+) ([\d,]+)[;.]', text.split('__gin__')[0])
  said = {name: int(n.replace(',', '')) for name, n in said if name in widths}
  assert said == {name: length * d for name, d in widths.items()}
  for width in widths.values():
    config = dataclasses.replace(CONFIG, emb_dim=width)
    context = base.Context(
      embedding=jax.ShapeDtypeStruct((5000, width), jnp.float32),
      config=config,
      modules=('token_embedder',),
    )
    method = SoftPrompt(length)
    found = jax.eval_shape(method.init, jax.random.PRNGKey(0), context)
    sizes = [x.size for x in jax.tree.leaves(found)]
    assert sizes == [length * width]


@pytest.mark.parametrize('field', ['length', 'num_tasks'])
@pytest.mark.parametrize('value', [0, -3, 2.0, '5', None])
def test_length_and_tasks_are_whole_numbers(field, value):
  message = f'SoftPrompt.{field} must be .* at least 1, got {value!r}'
  with pytest.raises(ValueError, match=message):
    SoftPrompt(**{field: value})


# ---- soft tokens are tokens ------------------------------------------------


def test_prompt_from_a_string_is_that_string():
  """With exactly as many rows as pieces: the logits of the literal text."""
  vocabulary = vocabularies.bytes_vocabulary(0)
  init = initializers.FromString(TEXT, vocabulary)
  prompted = model(prompt_init=init)
  own = prompted.init_method(jax.random.PRNGKey(0), frozen())
  trainable = {'method': partitioning.unbox(own), 'network': {}}
  text = helpers.random_batch(CONFIG)
  batch = helpers.with_prompt(text, prompted)
  literal = np.tile(PIECES, (len(text['encoder_input_tokens']), 1))
  tokens = np.concatenate([literal, text['encoder_input_tokens']], axis=1)
  np.testing.assert_allclose(
    logits(prompted, trainable, batch),
    logits(BARE, helpers.NOTHING, {**text, 'encoder_input_tokens': tokens}),
    **CLOSE,
  )


@pytest.mark.parametrize(
  'feature', ['encoder_input_tokens', 'decoder_input_tokens']
)
def test_rows_that_are_embeddings_are_those_tokens_anywhere(feature):
  """Not at the front alone: in the middle, in any order, in the decoder."""
  columns, order = [1, 2, 4], [2, 0, 5]
  prompted = model()
  trainable = helpers.prompted(np.asarray(prompted.embedding(frozen()))[PIECES])
  soft = with_tokens(prompted.soft_ids[0, order], columns, feature)
  literal = with_tokens(PIECES[order], columns, feature)
  got = logits(prompted, trainable, soft)
  np.testing.assert_allclose(
    got, logits(BARE, helpers.NOTHING, literal), **CLOSE
  )
  other = with_tokens(PIECES[order[::-1]], columns, feature)
  wrong = logits(BARE, helpers.NOTHING, other)
  assert np.abs(got - wrong).max() > 1e-2


def test_soft_tokens_at_the_start_of_the_decoder_are_forced():
  """Decoding reads them first and goes on as teacher forcing would."""
  prompted = model(3)
  trainable = helpers.prompted(prompts(3, D))
  batch = helpers.random_batch(CONFIG, targets=8)
  soft = prompted.soft_ids[0]
  batch['decoder_input_tokens'][:, 1:4] = soft
  batch['decoder_input_tokens'][:, 4:] = 7  # of the targets: not looked at
  predict = jax.jit(prompted.predict_batch)
  decoded, _ = predict(frozen(), trainable, helpers.as_jax(batch))
  decoded = np.asarray(decoded)[:, 0]
  np.testing.assert_array_equal(decoded[:, :3], np.tile(soft, (4, 1)))
  assert (decoded[:, 3:] < V).all() and decoded[:, 3:].any()
  read = np.pad(decoded, ((0, 0), (1, 0)))[:, :-1]
  forced = {**batch, 'decoder_input_tokens': read}
  best = logits(prompted, trainable, forced).argmax(-1)
  ended = np.cumsum(decoded == 1, axis=1) - (decoded == 1) > 0
  ended[:, :3] = True  # those are given
  np.testing.assert_array_equal(decoded[~ended], best[~ended])
  # Another prompt, another text: they are read, not only written.
  other, _ = predict(frozen(), helpers.prompted(prompts(3, D)[::-1]),
                     helpers.as_jax(batch))  # fmt: skip
  assert (np.asarray(other)[:, 0, 3:] != decoded[:, 3:]).any()


# ---- tasks -----------------------------------------------------------------


@pytest.mark.slow
def test_each_task_has_its_own_rows():
  tasks = np.array([2, 0, 1, 2], np.int32)
  length, together = 3, model(3, num_tasks=3)
  table = prompts(3, length, D)
  assert together.soft_ids.tolist() == [
    [V, V + 1, V + 2], [V + 3, V + 4, V + 5], [V + 6, V + 7, V + 8]
  ]  # fmt: skip
  text = helpers.random_batch(CONFIG)
  tokens = text['encoder_input_tokens']
  mixed = {
    **text,
    'encoder_input_tokens': np.concatenate(
      [together.soft_ids[tasks], tokens], axis=1
    ),
    'task_ids': tasks,
  }
  got = logits(together, helpers.prompted(table), mixed)
  alone = model(length)
  batch = helpers.with_prompt(text, alone)
  for task in range(3):
    want = logits(alone, helpers.prompted(table[task]), batch)
    mine = tasks == task
    np.testing.assert_allclose(got[mine], want[mine], **CLOSE)
    assert np.abs(got[~mine] - want[~mine]).max() > 1e-2
  # The gradient of a task's examples reaches the rows of that task alone.
  weights = (tasks == 2)[:, None] * mixed['decoder_loss_weights']
  mixed['decoder_loss_weights'] = weights.astype(np.int32)

  def loss(trainable, batch):
    return together.loss_fn(frozen(), trainable, batch)[0]

  grads = jax.jit(jax.grad(loss))(helpers.prompted(table), mixed)
  grad = np.asarray(grads['method']['prompt'])
  assert (grad[:2] == 0).all() and (np.abs(grad[2]).max(-1) > 0).all()


def test_tasks_start_apart():
  several = model(3, num_tasks=3)
  own = several.init_method(jax.random.PRNGKey(0), frozen())
  own = np.asarray(partitioning.unbox(own)['prompt'])
  assert own.shape == (3, 3, D)
  assert not np.isin(own[0], own[1]).any() and not np.isin(own[1], own[2]).any()


# ---- chains ----------------------------------------------------------------


def test_soft_ids_of_a_chain_stand_one_behind_the_other():
  chain = base.Chain({'a': SoftPrompt(2), 'b': SoftPrompt(3)})
  assert base.soft_ids(chain, 10).tolist() == [[10, 11, 12, 13, 14]]
  # One shared prompt and one a task: 2 rows, then 2 x 3.
  chain = base.Chain({'a': SoftPrompt(2), 'b': SoftPrompt(3, num_tasks=2)})
  assert base.soft_ids(chain, 10).tolist() == [
    [10, 11, 12, 13, 14], [10, 11, 15, 16, 17]
  ]  # fmt: skip
  nested = base.Chain({'x': chain, 'c': SoftPrompt(1)})
  assert base.soft_ids(nested, 10)[:, -1].tolist() == [18, 18]
  assert base.soft_ids(None, 10).shape == (1, 0)
  unequal = base.Chain(
    {'a': SoftPrompt(2, num_tasks=3), 'b': SoftPrompt(3, num_tasks=2)}
  )
  with pytest.raises(ValueError, match='keep 2 and 3 tasks apart'):
    base.soft_ids(unequal, 10)


def test_a_chain_of_prompts_is_one_long_prompt():
  chain = base.Chain({'a': SoftPrompt(2), 'b': SoftPrompt(4)})
  chained = models.EncoderDecoderModel(CONFIG, method=chain)
  batch = helpers.with_prompt(helpers.random_batch(CONFIG), chained)
  rows = prompts(6, D)
  own = chained.init_method(jax.random.PRNGKey(0), frozen())
  names = jax.tree.structure(partitioning.unbox(own))
  trainable = {
    'method': jax.tree.unflatten(names, [rows[:2], rows[2:]]),
    'network': {},
  }
  np.testing.assert_allclose(
    logits(chained, trainable, batch),
    logits(model(6), helpers.prompted(rows), batch),
    **CLOSE,
  )
