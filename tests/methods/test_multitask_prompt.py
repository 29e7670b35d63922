"""Multi-task prompts: the reference's numbers, and whose part is whose."""

import dataclasses
import functools
import itertools

import helpers
import jax
import numpy as np
import pytest

from prompt_jax import models
from prompt_jax import partitioning
from prompt_jax.methods import initializers
from prompt_jax.methods.multitask_prompt import MultitaskPrompt
from prompt_jax.methods.soft_prompt import SoftPrompt
from prompt_jax.network import t5

CONFIG = helpers.SMALL
D, P, G = CONFIG.emb_dim, 5, 3
CLOSE = {'rtol': 1e-5, 'atol': 1e-5}
# The shapes of S and of T[g].
SHAPES = {
  ('add', None): ((P, D), (P, D)),
  ('concat', 2): ((P - 2, D), (2, D)),
  ('concat_features', 3): ((P, D - 3), (P, 3)),
  ('project', 3): ((P, 3), (4, D)),
}
every_way = pytest.mark.parametrize(('combine', 'size'), SHAPES)


@functools.cache
def frozen():
  init = jax.jit(models.EncoderDecoderModel(CONFIG).init_network)
  return partitioning.unbox(init(jax.random.PRNGKey(0)))


def model(combine='add', size=None, config=CONFIG, **fields):
  fields = {'length': P, 'num_tasks': G, **fields}
  method = MultitaskPrompt(combine=combine, part_size=size, **fields)
  return models.EncoderDecoderModel(config, method=method)


def rows(of, own):
  """The prompts of all tasks, [G, P, D]."""
  found = of.method.apply({'params': own}, of.context(frozen()))
  table = np.asarray(found['token_embedder/rows'].table)
  return table.reshape(*of.soft_ids.shape, D)


def draw(combine, size):
  rng = np.random.default_rng(0)
  shared, own = SHAPES[combine, size]
  return {
    'shared_prompt': rng.normal(size=shared).astype(np.float32),
    'task_prompts': rng.normal(size=(G, *own)).astype(np.float32),
  }


# ---- the reference ---------------------------------------------------------

GOLDEN = {
  'add': ('multitask_add', None),
  'concat': ('multitask_ConcatMultiTaskPrompt', 2),
  'concat_features': ('multitask_ConcatFeaturesMultiTaskPrompt', 1),
  'project': ('multitask_ProjectMultiTaskPrompt', 3),
}


def from_reference(combine, flat, shared):
  """The tasks' parts, from the reference's vectors (or their gradients)."""
  if combine != 'project':
    features = {'concat_features': 1}.get(combine, 4)
    return flat.reshape(len(flat), -1, features)
  split = 4 * shared.shape[1]
  kernel = flat[:, :split].reshape(len(flat), 4, -1)
  return np.concatenate([kernel.swapaxes(1, 2), flat[:, None, split:]], axis=1)


@pytest.fixture
def causal_prompts(monkeypatch):
  """Each of the P soft tokens in front sees no later one.

  The reference's configuration of multi-task prompts has it so.
  """
  usual, calls = t5.encoder_mask, itertools.count()

  def mask(tokens, *segments):
    seen = usual(tokens, *segments)
    if next(calls) % 2:  # of the decoder's attention to the encoder
      return seen
    at = np.arange(tokens.shape[1])
    later = at[None] > at[:, None]
    return seen & ~(later & (at < P)[None])

  monkeypatch.setattr(t5, 'encoder_mask', mask)


@pytest.mark.usefixtures('causal_prompts')
@pytest.mark.parametrize('combine', GOLDEN)
def test_numbers_are_the_references(shared, combine):
  name, size = GOLDEN[combine]
  found = helpers.golden(shared, 'extended')
  columns = found['logits_vocab_subset']
  found = helpers.below(found, f'{name}/')
  prefix = 'encoder/prompt/prompt/'
  part = found[f'param/{prefix}shared_prompt']
  own = found[f'param/{prefix}task_prompts/embedding']
  of = model(combine, size, config=helpers.TINY, num_tasks=8)
  of = dataclasses.replace(of, z_loss=1e-4)
  given = helpers.below(found, 'batch/')
  # There the first token says the task; here it is `task_ids`.
  tasks = 32099 - given['encoder_input_tokens'][:, 0]
  tokens = given['encoder_input_tokens'][:, 1:]
  soft = of.soft_ids[tasks]
  given['encoder_input_tokens'] = np.concatenate([soft, tokens], axis=1)
  batch = helpers.as_jax({**given, 'task_ids': tasks})
  trainable = {
    'method': {
      'shared_prompt': part,
      'task_prompts': from_reference(combine, own, part),
    },
    'network': {},
  }
  base = helpers.golden_params(shared, 'tiny')

  def loss_and_logits(trainable):
    loss, _ = of.loss_fn(base, trainable, batch)
    return loss, of.logits(base, trainable, batch)

  (loss, logits), grads = jax.jit(
    jax.value_and_grad(loss_and_logits, has_aux=True)
  )(trainable)
  real = given['decoder_target_tokens'] > 0
  np.testing.assert_allclose(
    logits[..., columns][real], found['logits_subset'][real], **CLOSE
  )
  np.testing.assert_allclose(loss, found['model_loss_fn'], rtol=1e-6)
  got = grads['method']
  flat = found[f'grad/{prefix}task_prompts/embedding']
  close = {'rtol': 1e-4, 'atol': 1e-5}
  np.testing.assert_allclose(
    got['shared_prompt'], found[f'grad/{prefix}shared_prompt'], **close
  )
  np.testing.assert_allclose(
    got['task_prompts'], from_reference(combine, flat, part), **close
  )


# ---- the equations ---------------------------------------------------------


@every_way
def test_prompts_are_the_equations(combine, size):
  own = draw(combine, size)
  s = own['shared_prompt']
  want = [
    {
      'add': lambda t: s + t,
      'concat': lambda t: np.concatenate([s, t]),
      'concat_features': lambda t: np.concatenate([s, t], axis=1),
      'project': lambda t: np.stack([row @ t[:3] + t[3] for row in s]),
    }[combine](t)
    for t in own['task_prompts']
  ]
  got = rows(model(combine, size), own)
  np.testing.assert_allclose(got, want, **CLOSE)


@every_way
def test_parts_have_their_shapes_and_tasks_start_apart(combine, size):
  for init in (initializers.RandomUniform(), initializers.SampledVocab()):
    of = model(combine, size, shared_init=init, task_init=init)
    boxed = of.init_method(jax.random.PRNGKey(0), frozen())
    assert boxed['task_prompts'].names[0] == 'task'
    own = partitioning.unbox(boxed)
    shared, task = SHAPES[combine, size]
    assert own['shared_prompt'].shape == shared
    assert own['task_prompts'].shape == (G, *task)
    found = rows(of, own)
    assert not (found[0] == found[1]).all(axis=-1).any() or combine == 'concat'
    assert (own['task_prompts'][0] != own['task_prompts'][1]).any()


def test_initializers_see_the_features_of_their_part():
  """Both parts of a row are what an embedding has there."""
  of = model(
    'concat_features',
    3,
    shared_init=initializers.SampledVocab(),
    task_init=initializers.SampledVocab(),
  )
  own = partitioning.unbox(of.init_method(jax.random.PRNGKey(0), frozen()))
  table = np.asarray(of.embedding(frozen()))
  for row in own['shared_prompt']:
    assert (table[:, : D - 3] == row).all(axis=1).any()
  for row in own['task_prompts'][1]:
    assert (table[:, D - 3 :] == row).all(axis=1).any()


# ---- whose part is whose ---------------------------------------------------


def test_no_parts_of_tasks_are_prompt_tuning_of_the_shared():
  own = draw('add', None)
  own['task_prompts'] = np.zeros_like(own['task_prompts'])
  of = model()
  tasks = np.array([2, 0, 1, 2], np.int32)
  text = helpers.random_batch(CONFIG)
  tokens = text['encoder_input_tokens']
  batch = {
    **text,
    'encoder_input_tokens': np.concatenate([of.soft_ids[tasks], tokens], 1),
    'task_ids': tasks,
  }
  plain = models.EncoderDecoderModel(CONFIG, method=SoftPrompt(P))
  np.testing.assert_allclose(
    jax.jit(of.logits)(frozen(), {'method': own, 'network': {}}, batch),
    jax.jit(plain.logits)(
      frozen(),
      helpers.prompted(own['shared_prompt']),
      helpers.with_prompt(text, plain),
    ),
    **CLOSE,
  )


@every_way
def test_a_tasks_part_is_in_its_own_prompt_alone(combine, size):
  own, of = draw(combine, size), model(combine, size)
  before = rows(of, own)
  own['task_prompts'][1] += 1
  after = rows(of, own)
  assert (before[[0, 2]] == after[[0, 2]]).all() and (
    before[1] != after[1]
  ).any()
  own['shared_prompt'] += 1
  assert (rows(of, own) != after).any(axis=(1, 2)).all()


# ---- bad inputs ------------------------------------------------------------


@pytest.mark.parametrize('field', ['length', 'num_tasks', 'part_size'])
@pytest.mark.parametrize('value', [0, -3, 2.0, '5', None])
def test_sizes_are_whole_numbers(field, value):
  message = f'MultitaskPrompt.{field} must be .* at least 1, got {value!r}'
  with pytest.raises(ValueError, match=message):
    MultitaskPrompt(**{'combine': 'concat', 'part_size': 2, field: value})


def test_wrong_combinations():
  with pytest.raises(
    ValueError, match="'concatenate'. Did you mean .*'concat'"
  ):
    MultitaskPrompt(combine='concatenate')
  with pytest.raises(ValueError, match='part_size must be None with .*; got 2'):
    MultitaskPrompt(part_size=2)


@pytest.mark.parametrize(
  ('combine', 'size', 'message'),
  [
    ('concat', P, f'below the length, {P}, .*; got {P}'),
    ('concat_features', D, f'below the emb_dim, {D}, .*; got {D}'),
    ('project', D + 1, f'below the emb_dim, {D}, .*; got {D + 1}'),
  ],
)
def test_a_part_as_large_as_the_whole(combine, size, message):
  of = model(combine, size)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(of.init_method, jax.random.PRNGKey(0), frozen())
