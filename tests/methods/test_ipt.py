"""IPT: the autoencoder, its codes as prompts, and slices of the subspace."""

import dataclasses
import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prompt_jax import checkpoints
from prompt_jax import models
from prompt_jax import partitioning
from prompt_jax import train_state
from prompt_jax.methods import base
from prompt_jax.methods import initializers
from prompt_jax.methods import ipt
from prompt_jax.methods import saved_prompts
from prompt_jax.methods.soft_prompt import SoftPrompt

CONFIG = dataclasses.replace(helpers.SMALL, vocab_size=32)
D, P, S, Q, H = CONFIG.emb_dim, 3, 4, 5, 7
BARE = models.EncoderDecoderModel(CONFIG)
WORDS = initializers.SampledVocab()


@functools.cache
def frozen():
  init = jax.jit(BARE.init_network)
  return partitioning.unbox(init(jax.random.PRNGKey(0)))


def prompts(tasks=S, seed=1):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(tasks, P, D)).astype(np.float32)


def model(method):
  return models.EncoderDecoderModel(CONFIG, method=method)


def made(method):
  """The trainable parameters at their start, by path, and the constants."""
  m = model(method)
  own = partitioning.unbox(m.init_method(jax.random.PRNGKey(3), frozen()))
  own = {k: np.asarray(x) for k, x in train_state.flatten(own).items()}
  return own, partitioning.unbox(m.constants(frozen()))


def trainable(flat):
  return {'method': train_state.unflatten(flat), 'network': {}}


def rows(method, flat, constants):
  """What a method lays on the embedding, [G, P, D]."""
  m = model(method)
  laid = m.method_deltas(
    {**frozen(), 'constants': constants},
    trainable(flat),
    helpers.random_batch(CONFIG),
  )
  return np.asarray(laid['token_embedder/rows'].table).reshape(-1, P, D)


@pytest.fixture(scope='module')
def stage(tmp_path_factory):
  """A subspace with random parameters, its file and its prompts' files."""
  folder = tmp_path_factory.mktemp('ipt')
  saved_prompts.write(str(folder / 'all.npy'), prompts())
  for i, prompt in enumerate(prompts()):
    saved_prompts.write(str(folder / f'{i}.npy'), prompt)
  sources = (str(folder / 'all.npy'),)
  method = ipt.Subspace(sources, P, Q, H)
  flat, constants = made(method)
  rng = np.random.default_rng(5)
  flat = {k: x + rng.normal(scale=0.2, size=x.shape).astype(np.float32)
          for k, x in flat.items()}  # fmt: skip
  path = folder / 'trainable.safetensors'
  checkpoints.save_trainable(path, trainable(flat), {})
  return folder, method, flat, constants


def affine(x, flat, path):
  return x @ flat[f'{path}/kernel'] + flat[f'{path}/bias']


def by_hand(codes, flat):
  hidden = np.tanh(affine(codes, flat, 'decoder/hidden'))
  return affine(hidden, flat, 'decoder/out').reshape(-1, P, D)


# ---- stage 1 -----------------------------------------------------------------


@pytest.mark.parametrize('q', [3, 5, 10, 50, 100, 250])
def test_count_is_the_papers(q):
  """n q + q + 768 q + 768 + 768 n + n, and q in stage 2."""
  width, n = 512, 100 * 512
  context = base.Context(
    embedding=jax.ShapeDtypeStruct((5000, width), jnp.float32),
    config=dataclasses.replace(CONFIG, emb_dim=width),
    modules=('token_embedder',),
  )
  for method, count in (
    (ipt.Subspace((WORDS,), dimension=q), n * q + q + 769 * (q + n) + 768 - q),
    (ipt.SubspacePrompt(dimension=q), q),
  ):
    found = jax.eval_shape(method.init, jax.random.PRNGKey(0), context)
    assert sum(x.size for x in jax.tree.leaves(found['params'])) == count
  if q == 5:  # table H
    assert n * q + q + 769 * (q + n) + 768 - q == 39_633_413


def test_rows_are_the_decoded_prompts(stage):
  _, method, flat, constants = stage
  np.testing.assert_array_equal(constants['prompts'], prompts())
  codes = affine(prompts().reshape(S, -1), flat, 'encoder')
  got = rows(method, flat, constants)
  np.testing.assert_allclose(got, by_hand(codes, flat), rtol=1e-5, atol=1e-5)
  assert method.soft_tokens == (S, P)
  assert model(method).soft_ids[1].tolist() == [35, 36, 37]


@pytest.mark.slow
def test_each_task_sees_its_own_decoded_prompt(stage):
  _, method, flat, constants = stage
  tasks = np.array([2, 0, 3, 2], np.int32)
  together, alone = model(method), model(SoftPrompt(P))
  text = helpers.random_batch(CONFIG)
  soft = together.soft_ids[tasks]
  tokens = np.concatenate([soft, text['encoder_input_tokens']], axis=1)
  batch = {**text, 'encoder_input_tokens': tokens, 'task_ids': tasks}
  own = {**frozen(), 'constants': constants}
  got = jax.jit(together.logits)(own, trainable(flat), batch)
  single = jax.jit(alone.logits)
  decoded = rows(method, flat, constants)
  for task in (0, 2, 3):
    want = single(
      frozen(),
      helpers.prompted(decoded[task]),
      helpers.with_prompt(text, alone),
    )
    mine = tasks == task
    np.testing.assert_allclose(got[mine], want[mine], rtol=1e-5, atol=1e-5)
    assert np.abs(got[~mine] - want[~mine]).max() > 1e-3


@pytest.mark.slow
def test_the_loss_has_the_reconstruction_error(stage):
  _, method, flat, constants = stage
  own = {**frozen(), 'constants': constants}
  batch = helpers.random_batch(CONFIG)
  decoded = rows(method, flat, constants)
  error = np.mean((decoded - prompts()) ** 2)
  for alpha in (0.0, 200.0):
    of = model(method.clone(alpha=alpha))
    _, _, penalty = of.lay(own, trainable(flat), batch)
    np.testing.assert_allclose(penalty, alpha * error, rtol=1e-5)
  exporting = of.context(frozen(), exporting=True)
  method.apply({'params': train_state.unflatten(flat), 'constants': constants},
               exporting)  # nothing to add a loss to  # fmt: skip


def test_overfits_one_prompt():
  """The decoded prompt comes arbitrarily near: MSE < 1e-6."""
  method = ipt.Subspace((WORDS,), P, 2, H, alpha=1.0)
  flat, constants = made(method)
  of, own = model(method), {**frozen(), 'constants': constants}
  batch = helpers.random_batch(CONFIG)

  def error(flat):
    return of.lay(own, trainable(flat), batch)[2]

  optimizer = optax.adam(optax.linear_schedule(0.02, 0.0, 400))

  def step(carry, _):
    flat, state = carry
    value, grads = jax.value_and_grad(error)(flat)
    updates, state = optimizer.update(grads, state)
    return (optax.apply_updates(flat, updates), state), value

  with jax.numpy_dtype_promotion('standard'):
    start = flat, optimizer.init(flat)
    (flat, _), errors = jax.jit(lambda c: jax.lax.scan(step, c, length=400))(
      start
    )
  assert errors[0] > 0.1 and errors[-1] < 1e-6
  np.testing.assert_allclose(
    rows(method, flat, constants)[0], constants['prompts'][0], atol=5e-3
  )


def test_files_and_initializers_are_sources(stage):
  folder, *_ = stage
  files = [str(folder / f'{i}.npy') for i in range(S)]
  method = ipt.Subspace((files[1], WORDS, files[0]), P, Q, H)
  _, constants = made(method)
  assert method.soft_tokens == (3, P)
  found = np.asarray(constants['prompts'])
  np.testing.assert_array_equal(found[[0, 2]], prompts()[[1, 0]])
  table = np.asarray(frozen()['token_embedder']['embedding'])
  assert np.isin(found[1], table).all()


# ---- stage 2 -----------------------------------------------------------------


@pytest.mark.slow
def test_the_code_of_a_prompt_is_its_decoded_prompt(stage):
  """Bit for bit, in the rows and in the logits."""
  folder, *_ = stage
  source = str(folder / '2.npy')
  subspace = str(folder / 'trainable.safetensors')
  first = ipt.Subspace((source,), P, Q, H)
  _, constants = made(first)
  _, _, flat, _ = stage
  second = ipt.SubspacePrompt(subspace, P, start=source)
  z, decoder = made(second)
  assert z.keys() == {'z'} and z['z'].shape == (Q,)
  batch = helpers.with_prompt(helpers.random_batch(CONFIG), model(first))
  want = rows(first, flat, constants)
  np.testing.assert_array_equal(rows(second, z, decoder), want)
  logits = [
    jax.jit(model(m).logits)({**frozen(), 'constants': c}, trainable(x), batch)
    for m, c, x in ((first, constants, flat), (second, decoder, z))
  ]
  np.testing.assert_array_equal(*logits)
  assert np.isfinite(logits[0]).all()


def test_start_and_codes_of_several_tasks(stage):
  folder, _, flat, _ = stage
  subspace = str(folder / 'trainable.safetensors')
  several = ipt.SubspacePrompt(
    subspace, P, num_tasks=S, start=str(folder / 'all.npy')
  )
  z, decoder = made(several)
  codes = affine(prompts().reshape(S, -1), flat, 'encoder')
  np.testing.assert_allclose(z['z'], codes, rtol=1e-5, atol=1e-5)
  got = rows(several, z, decoder)
  np.testing.assert_allclose(got, by_hand(codes, flat), rtol=1e-4, atol=1e-5)
  both = several.clone(num_tasks=2, start=None)
  z, decoder = made(both)
  assert z['z'].shape == (2, Q) and (z['z'][0] != z['z'][1]).all()
  assert 0.003 < np.std(z['z']) < 0.06  # 0.02, of ten numbers
  with pytest.raises(ValueError, match='prompts of 4 tasks, but .* is 2'):
    made(several.clone(num_tasks=2))


def test_a_slice_holds_the_training_tasks(stage):
  """S codes lie in S - 1 dimensions; of fewer the nearest is left."""
  folder, _, flat, _ = stage
  subspace = str(folder / 'trainable.safetensors')
  codes = affine(prompts().reshape(S, -1), flat, 'encoder').astype(np.float64)
  mean = codes.mean(axis=0)
  _, _, v = np.linalg.svd(codes - mean, full_matrices=False)
  for k in (1, 2, S - 1):
    method = ipt.SubspacePrompt(
      subspace, P, k, S, (str(folder / 'all.npy'),), str(folder / 'all.npy')
    )
    z, decoder = made(method)
    assert z['z'].shape == (S, k)
    inside = mean + (codes - mean) @ v[:k].T @ v[:k]
    np.testing.assert_allclose(
      rows(method, z, decoder), by_hand(inside, flat), rtol=1e-3, atol=1e-4
    )
  assert np.abs(inside - codes).max() < 1e-5
  with pytest.raises(ValueError, match='slice of 4 .* 4 training tasks differ'):
    made(method.clone(dimension=S))
  with pytest.raises(ValueError, match='has 5 dimensions; for a slice of 2'):
    made(method.clone(dimension=2, sources=()))
  whole = method.clone(dimension=Q, sources=())
  z, _ = made(whole)
  np.testing.assert_allclose(z['z'], codes, rtol=1e-5, atol=1e-5)


def test_principal_directions_are_the_same_everywhere():
  codes = np.random.default_rng(0).normal(size=(6, 4)) * [5, 1, 3, 2]
  mean, found = ipt.principal(codes, 3)
  np.testing.assert_allclose(found @ found.T, np.eye(3), atol=1e-6)
  again_mean, again = ipt.principal(codes[::-1], 3)
  np.testing.assert_allclose(again, found, atol=1e-5)
  np.testing.assert_allclose(again_mean, mean, atol=1e-6)
  assert np.abs(found).argmax(axis=1).tolist()[:2] == [0, 2]
  assert (found[range(3), np.abs(found).argmax(axis=1)] > 0).all()
  variance = ((codes - mean) @ found.T).var(axis=0)
  assert variance[0] > variance[1] > variance[2]


def test_without_a_subspace_the_decoder_is_random():
  method = ipt.SubspacePrompt(None, P, Q, hidden_dim=H)
  z, decoder = made(method)
  assert {k: x.shape for k, x in decoder['decoder'].items()} == {
    'decoder/hidden/kernel': (Q, H), 'decoder/hidden/bias': (H,),
    'decoder/out/kernel': (H, P * D), 'decoder/out/bias': (P * D,),
  }  # fmt: skip
  for path, x in decoder['decoder'].items():
    inputs = Q if 'hidden' in path else H
    assert np.abs(x).max() <= inputs**-0.5
  _, again = made(method)
  _, other = made(method.clone(seed=1))
  same = [
    [bool((x == y).all()) for x, y in zip(*map(jax.tree.leaves, pair),
                                          strict=True)]
    for pair in ((decoder, again), (decoder, other))
  ]  # fmt: skip
  assert same == [[True] * 4, [False] * 4]
  got = rows(method, z, decoder)
  want = by_hand(np.asarray(z['z'])[None], decoder['decoder'])
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


# ---- what is refused ---------------------------------------------------------


@pytest.mark.parametrize('field', ['length', 'dimension', 'hidden_dim'])
@pytest.mark.parametrize('value', [0, -1, 2.5, '3', None])
def test_sizes_are_whole_numbers(field, value):
  message = f'{field} must be a whole number of at least 1, got {value!r}'
  with pytest.raises(ValueError, match=message):
    ipt.Subspace((WORDS,), **{field: value})
  with pytest.raises(ValueError, match=message):
    ipt.SubspacePrompt(**{'dimension': 5, field: value})
  with pytest.raises(ValueError, match='num_tasks must be'):
    ipt.SubspacePrompt(dimension=5, num_tasks=value)


@pytest.mark.parametrize('alpha', [-1.0, float('nan'), float('inf'), '200'])
def test_alpha_is_a_number(alpha):
  with pytest.raises(ValueError, match='alpha must be a number of at least 0'):
    ipt.Subspace((WORDS,), alpha=alpha)


@pytest.mark.parametrize('sources', [(), 'prompt.npy'])
def test_sources_are_a_list(sources):
  with pytest.raises(ValueError, match='sources must be a list'):
    ipt.Subspace(sources)


def test_files_that_do_not_fit(stage, tmp_path):
  folder, *_ = stage
  subspace = str(folder / 'trainable.safetensors')
  source = str(folder / '0.npy')
  with pytest.raises(ValueError, match=r'shape \(3, 16\), expected \(4, 16\)'):
    made(ipt.Subspace((source,), 4, Q, H))
  with pytest.raises(ValueError, match=r'prompts of 48 numbers, expected \(4'):
    made(ipt.SubspacePrompt(subspace, 4))
  with pytest.raises(checkpoints.CheckpointError, match='No file'):
    made(ipt.SubspacePrompt(str(tmp_path / 'x.safetensors'), P))
  with pytest.raises(ValueError, match='`subspace` is None'):
    ipt.SubspacePrompt(None, P, Q, start=source)
  other = tmp_path / 'prompt.safetensors'
  checkpoints.save_trainable(other, helpers.prompted(prompts()[0]), {})
  with pytest.raises(ValueError, match='no subspace, which has'):
    made(ipt.SubspacePrompt(str(other), P))
