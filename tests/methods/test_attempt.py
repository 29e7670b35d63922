"""ATTEMPT: the equation, what is text, and what it refuses."""

import dataclasses
import math
import pathlib

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_jax import checkpoints
from prompt_jax import export
from prompt_jax import gin_utils
from prompt_jax import models
from prompt_jax import partitioning
from prompt_jax.methods import base
from prompt_jax.methods import initializers
from prompt_jax.methods.attempt import Attempt
from prompt_jax.methods.attempt import attention

CONFIG = helpers.SMALL
V, D, P, M, S = CONFIG.vocab_size, CONFIG.emb_dim, 3, 5, 2
CLOSE = {'rtol': 1e-5, 'atol': 1e-5}


@dataclasses.dataclass(frozen=True)
class Given:
  """A prompt by its seed."""

  seed: int

  def __call__(self, rng, shape, embedding):
    return prompts(*shape, seed=self.seed)


def prompts(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def method(sources=(1, 2), **fields):
  given = tuple(map(Given, sources))
  return Attempt(given, **{'length': P, 'hidden_dim': M, **fields})


def model(*args, **fields):
  return models.EncoderDecoderModel(CONFIG, method=method(*args, **fields))


@pytest.fixture(scope='module')
def network():
  init = jax.jit(models.EncoderDecoderModel(CONFIG).init_network)
  return partitioning.unbox(init(jax.random.PRNGKey(0)))


def frozen(of, network):
  return {**network, 'constants': of.constants(network)}


def trainable(of, network):
  """Parameters that all do something."""
  made = of.init_method(jax.random.PRNGKey(0), network)
  own = jax.tree.map(
    lambda x: x + prompts(*x.shape, seed=x.size), partitioning.unbox(made)
  )
  return {'method': own, 'network': {}}


def rows(of, network, own, batch):
  laid = of.method_deltas(frozen(of, network), own, batch)
  [(path, delta)] = laid.items()
  assert path == 'token_embedder/rows' and delta.group is None
  return np.asarray(delta.table)


def batch(of, **fields):
  text = helpers.random_batch(CONFIG)
  return helpers.with_prompt({**text, **fields}, of)


# ---- the equation ----------------------------------------------------------


def by_hand(own, sources, embedding, texts, temperature):
  """The prompts [B, P, D] of texts, one at a time."""
  own = {k: np.asarray(x, np.float64) for k, x in own.items()}
  out = []
  for text in texts:
    x = np.max([embedding[i] for i in text], axis=0)
    h = x @ own['down']
    h = h / (1 + np.exp(-h)) @ own['up']
    h = (h - h.mean()) / np.sqrt(h.var() + 1e-5)
    h = h * own['norm_scale'] + own['norm_bias']
    every = [*sources, own['prompt']]
    scores = np.array([p.max(axis=0) @ h for p in every]) / temperature
    a = np.exp(scores) / np.exp(scores).sum()
    mixed = sum(share * p for share, p in zip(a, every, strict=True))
    out.append(own['prompt'] + mixed)
  return np.stack(out)


@pytest.mark.parametrize('temperature', [None, 2.0])
def test_prompt_is_the_equation(network, temperature):
  of = model(temperature=temperature)
  own, given = trainable(of, network), batch(of)
  got = rows(of, network, own, given)
  assert got.shape == (4, P, D)
  want = by_hand(
    own['method'],
    [prompts(P, D, seed=1), prompts(P, D, seed=2)],
    np.asarray(of.embedding(network)),
    [[i for i in row if 0 < i < V] for row in given['encoder_input_tokens']],
    temperature or math.e * D,
  )
  np.testing.assert_allclose(got, want, **CLOSE)
  assert np.abs(got[0] - got[1]).max() > 1e-4  # by the input


def test_count_and_the_published_temperature():
  context = base.Context(
    embedding=jax.ShapeDtypeStruct((5000, 768), jnp.float32),
    config=dataclasses.replace(CONFIG, emb_dim=768),
    modules=('token_embedder',),
  )
  made = jax.eval_shape(
    Attempt((Given(0),)).init, jax.random.PRNGKey(0), context
  )
  count = sum(x.size for x in jax.tree.leaves(made['params']))
  assert count == 100 * 768 + 200 * 768 + 2 * 768 == 231_936
  assert int(math.e * 768) == 2087


def test_shares_sum_to_one_and_follow_their_sources():
  h, target = prompts(4, D, seed=3), prompts(P, D, seed=4)
  sources = prompts(5, P, D)
  a = np.asarray(attention(h, sources, target, 2.0))
  assert a.shape == (4, 6)
  np.testing.assert_allclose(a.sum(-1), 1.0, rtol=1e-6)
  order = np.array([3, 0, 4, 1, 2])
  moved = np.asarray(attention(h, sources[order], target, 2.0))
  np.testing.assert_allclose(moved, a[:, [*order, 5]], rtol=1e-6)
  assert np.abs(moved - a).max() > 1e-2


def test_the_order_of_sources_does_not_count(network):
  of, reverse = model((1, 2)), model((2, 1))
  own, given = trainable(of, network), batch(of)
  np.testing.assert_allclose(
    rows(of, network, own, given), rows(reverse, network, own, given), **CLOSE
  )


def test_equal_prompts_give_their_double(network):
  of = model((1, 1, 1))
  own = trainable(of, network)
  own['method']['prompt'] = prompts(P, D, seed=1)
  got = rows(of, network, own, batch(of))
  want = np.broadcast_to(2 * prompts(P, D, seed=1), got.shape)
  np.testing.assert_allclose(got, want, **CLOSE)


# ---- what is text ----------------------------------------------------------


def test_padding_and_soft_tokens_are_no_text(network):
  of = model()
  own, given = trainable(of, network), batch(of)
  want = rows(of, network, own, given)
  tokens = given['encoder_input_tokens']
  longer = np.pad(tokens, ((0, 0), (0, 4)))
  moved = np.concatenate([longer[:, P:], longer[:, :P]], axis=1)
  for changed in (longer, moved, tokens[:, P:]):
    again = {**given, 'encoder_input_tokens': changed}
    np.testing.assert_array_equal(rows(of, network, own, again), want)
  text = tokens.copy()
  text[:, P] = 7 + (text[:, P] == 7)
  changed = {**given, 'encoder_input_tokens': text}
  assert np.abs(rows(of, network, own, changed) - want).max() > 1e-4


@pytest.mark.slow
def test_a_row_of_padding_is_finite(network):
  of = model()
  given = batch(of)
  given['encoder_input_tokens'][1] = 0
  given = helpers.as_jax(given)

  def loss(own):
    return of.loss_fn(frozen(of, network), own, given)[0]

  value, grads = jax.jit(jax.value_and_grad(loss))(trainable(of, network))
  assert np.isfinite(value)
  for x in jax.tree.leaves(grads):
    assert np.isfinite(x).all() and (x != 0).any()


# ---- tasks -----------------------------------------------------------------


def test_each_task_has_its_own_target(network):
  together, alone = model(num_tasks=3), model()
  assert together.soft_ids.shape == (1, P)
  own = trainable(together, network)
  tasks = np.array([2, 0, 1, 2], np.int32)
  given = batch(together, task_ids=tasks)
  got = rows(together, network, own, given)
  for task in range(3):
    single = {**own['method'], 'prompt': own['method']['prompt'][task]}
    want = rows(alone, network, {**own, 'method': single}, given)
    np.testing.assert_allclose(got[tasks == task], want[tasks == task], **CLOSE)
    assert np.abs(got[tasks != task] - want[tasks != task]).max() > 1e-2
  with pytest.raises(ValueError, match='keeps 3 tasks apart, but the batch'):
    rows(together, network, own, batch(together))


# ---- sources ---------------------------------------------------------------


def test_sources_are_files_too(network, tmp_path):
  np.save(tmp_path / 'one.npy', prompts(P, D, seed=1))
  mixed = Attempt((str(tmp_path / 'one.npy'), Given(2)), P, hidden_dim=M)
  of = models.EncoderDecoderModel(CONFIG, method=mixed)
  np.testing.assert_array_equal(
    of.constants(network)['sources'], model().constants(network)['sources']
  )
  # Of several tasks, in one file.
  np.save(tmp_path / 'both.npy', [prompts(P, D, seed=1), prompts(P, D, seed=2)])
  mixed = Attempt((str(tmp_path / 'both.npy'),), P, hidden_dim=M)
  both = dataclasses.replace(of, method=mixed)
  np.testing.assert_array_equal(
    both.constants(network)['sources'], of.constants(network)['sources']
  )
  np.save(tmp_path / 'one.npy', prompts(P + 1, D))
  with pytest.raises(ValueError, match=r'\(4, 16\), expected \(3, 16\)'):
    of.constants(network)


def test_sources_of_different_bases_are_refused(network, tmp_path):
  paths = [str(tmp_path / f'{i}.safetensors') for i in range(2)]
  for i, path in enumerate(paths):
    checkpoints.save_trainable(
      pathlib.Path(path),
      helpers.prompted(prompts(P, D)),
      {'base_digest': f'{i}'},
    )
  of = models.EncoderDecoderModel(CONFIG, method=Attempt(paths, P))
  with pytest.raises(ValueError, match=r'1.safetensors was .* another base'):
    of.constants(network)


def test_without_a_file_nothing_is_transferred(network, caplog):
  model().constants(network)
  assert 'none of the sources is the file of a prompt' in caplog.text


def test_files_by_a_flag(tmp_path):
  flags = [
    f'{name}=none'
    for name in ('VOCABULARY', 'VOCABULARY_PATH', 'MIXTURE_OR_TASK_NAME')
  ]
  flags.append('TRAIN_STEPS=1')
  flags.append(f"SOURCES=('{tmp_path}/a.npy', '{tmp_path}/b.npy')")
  gin_utils.parse(
    ['models/tiny.gin', 'methods/attempt.gin', 'runs/train.gin'], flags
  )
  made = gin_utils.build('%METHOD')
  gin_utils.clear()
  assert made.sources == (f'{tmp_path}/a.npy', f'{tmp_path}/b.npy')
  assert made.prompt_init == initializers.SampledVocab()


# ---- what is refused -------------------------------------------------------


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'length': 0}, 'Attempt.length must be .* at least 1, got 0'),
    ({'hidden_dim': 2.0}, 'Attempt.hidden_dim must be .* at least 1, got 2.0'),
    ({'num_tasks': '3'}, "Attempt.num_tasks must be .* at least 1, got '3'"),
    ({'temperature': 0}, 'None or a number above 0, got 0'),
    ({'temperature': math.nan}, 'None or a number above 0, got nan'),
    ({'temperature': 'e'}, "None or a number above 0, got 'e'"),
  ],
)
def test_bad_settings(fields, message):
  with pytest.raises(ValueError, match=message):
    method(**fields)


@pytest.mark.parametrize('sources', [(), 'prompt.npy'])
def test_no_list_of_sources(sources):
  with pytest.raises(ValueError, match='at least one source prompt, got'):
    Attempt(sources)


def test_packed_rows_and_exports_are_refused(network):
  of = model()
  own = trainable(of, network)
  packed = {**batch(of), 'encoder_segment_ids': np.ones((4, 13), np.int32)}
  with pytest.raises(ValueError, match='not for packed rows'):
    of.method_deltas(frozen(of, network), own, packed)
  with pytest.raises(ValueError, match='cannot be exported'):
    export.deployed(of, frozen(of, network), own)
