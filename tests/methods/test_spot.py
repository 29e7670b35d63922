"""SPoT: similarities of prompts, the bank, and the start that comes of it."""

import dataclasses
import shutil

import helpers
import jax
import numpy as np
import pytest

from prompt_jax import checkpoints
from prompt_jax import models
from prompt_jax import partitioning
from prompt_jax.methods import spot
from prompt_jax.methods.soft_prompt import SoftPrompt

CONFIG = helpers.SMALL
D, P = CONFIG.emb_dim, 3
KINDS = sorted(spot.SIMILARITIES)
BASE = '0123456789abcdef'


def prompts(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# ---- similarity ------------------------------------------------------------


def test_similarities_are_their_equations():
  x, y = prompts(4, D), prompts(6, D, seed=1)
  mean_x, mean_y = x.mean(0), y.mean(0)
  cosine = mean_x @ mean_y / np.linalg.norm(mean_x) / np.linalg.norm(mean_y)
  got = spot.similarity(x, y, 'average_tokens')
  np.testing.assert_allclose(got, cosine, rtol=1e-5)
  pairs = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a in x for b in y]
  got = spot.similarity(x, y, 'per_token_average')
  np.testing.assert_allclose(got, np.mean(pairs), rtol=1e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_the_order_of_tokens_does_not_count(kind):
  x, y = prompts(5, D), prompts(5, D, seed=1)
  order = np.random.default_rng(2).permutation(5)
  want = spot.similarity(x, y, kind)
  for a, b in ((x[order], y), (x, y[order]), (y, x), (3 * x, 0.5 * y)):
    np.testing.assert_allclose(spot.similarity(a, b, kind), want, atol=1e-7)


def test_a_prompt_is_like_itself():
  x = prompts(5, D)
  np.testing.assert_allclose(spot.similarity(x, x), 1.0, rtol=1e-6)
  np.testing.assert_allclose(spot.similarity(x, -x), -1.0, rtol=1e-6)
  # Tokens are not all alike, so that of pairs is less.
  assert 0 < spot.similarity(x, x, 'per_token_average') < 0.6


def test_an_unknown_similarity():
  with pytest.raises(ValueError, match="Did you mean 'average_tokens'"):
    spot.similarity(prompts(2, D), prompts(2, D), 'average_token')


def test_weights_sum_to_one_and_drop_what_is_not_similar():
  got = spot.weights([0.6, -0.9, 0.2, 0.0])
  np.testing.assert_allclose(got, [0.75, 0.0, 0.25, 0.0])
  with pytest.raises(ValueError, match=r'No prompt is similar.*\[-0.1, 0.0\]'):
    spot.weights([-0.1, 0.0])


# ---- the bank --------------------------------------------------------------


def save(path, prompt, base=None):
  path.parent.mkdir(parents=True, exist_ok=True)
  header = {} if base is None else {'base_digest': base}
  checkpoints.save_trainable(path, helpers.prompted(prompt), header)


@pytest.fixture
def bank(tmp_path):
  """A folder, and the target's file: near `near`, then `mid`; far of `far`."""
  target, other = prompts(P, D), prompts(P, D, seed=1)
  save(tmp_path / 'target.safetensors', target, BASE)
  for name, mix in {'near': 0.2, 'mid': 1.0}.items():
    path = tmp_path / 'bank' / name / 'trainable.safetensors'
    save(path, target + mix * other, BASE)
  save(tmp_path / 'bank' / 'far.safetensors', -target + 0.1 * other, BASE)
  return tmp_path / 'bank', tmp_path / 'target.safetensors'


def names(ranked):
  parts = [one.path.split('/bank/')[1].split('/')[0] for one in ranked]
  return [part.removesuffix('.safetensors') for part in parts]


@pytest.mark.parametrize('kind', KINDS)
def test_ranking_is_by_similarity(bank, kind):
  folder, target = bank
  ranked = spot.ranking(str(target), str(folder), kind)
  assert names(ranked) == ['near', 'mid', 'far']
  own = prompts(P, D)
  for _, prompt, found in ranked:
    assert found == spot.similarity(prompt, own, kind)
  lines = spot.table(ranked).splitlines()
  assert lines[0].startswith(f'{ranked[0].similarity:7.4f}')
  assert lines[0].endswith('near/trainable.safetensors') and len(lines) == 3


def test_the_target_in_its_bank_is_left_out(bank):
  folder, target = bank
  shutil.move(target, folder / 'target.safetensors')
  ranked = spot.ranking(str(folder / 'target.safetensors'), str(folder))
  assert names(ranked) == ['near', 'mid', 'far']


def test_of_a_run_the_end_counts_alone(bank):
  folder, target = bank
  save(folder / 'near' / 'best.safetensors', prompts(P, D), BASE)
  save(folder / 'alone' / 'best.safetensors', prompts(P, D), BASE)
  ranked = spot.ranking(str(target), str(folder))
  assert names(ranked) == ['alone', 'near', 'mid', 'far']
  assert ranked[1].path.endswith('near/trainable.safetensors')


def test_a_bank_of_several_places(bank):
  folder, target = bank
  places = [str(folder / name) for name in ('mid', 'far.safetensors', 'mid')]
  ranked = spot.ranking(str(target), places)
  assert names(ranked) == ['mid', 'far']


def test_another_base_is_refused(bank):
  folder, target = bank
  save(folder / 'other.safetensors', prompts(P, D), 'fedcba9876543210')
  message = r'other.safetensors .* another base \(fedcba.* than .*\(012345'
  with pytest.raises(ValueError, match=message):
    spot.ranking(str(target), str(folder))
  # Without a fingerprint, by its width.
  save(folder / 'other.safetensors', prompts(P, 8))
  message = r'other.safetensors: a prompt of width 8, but .* is 16 wide'
  with pytest.raises(ValueError, match=message):
    spot.ranking(str(target), str(folder))


def test_a_file_of_several_tasks(bank):
  folder, target = bank
  save(folder / 'tasks.safetensors', np.stack([prompts(P, D)] * 2), BASE)
  paths = [one.path for one in spot.ranking(str(target), str(folder))]
  assert [path.rpartition('/')[2] for path in paths[:2]] == [
    'tasks.safetensors#0', 'tasks.safetensors#1'
  ]  # fmt: skip
  with pytest.raises(ValueError, match='prompts of 2 tasks; the target is one'):
    spot.ranking(str(folder / 'tasks.safetensors'), str(folder))


def test_a_bank_that_is_none(bank, tmp_path):
  folder, target = bank
  with pytest.raises(FileNotFoundError, match='No folder of prompts'):
    spot.ranking(str(target), str(folder / 'nowhere'))
  (tmp_path / 'empty').mkdir()
  with pytest.raises(FileNotFoundError, match='empty: no .safetensors but'):
    spot.ranking(str(target), str(tmp_path / 'empty'))
  with pytest.raises(checkpoints.CheckpointError, match='No file'):
    spot.ranking(str(tmp_path / 'none.safetensors'), str(folder))
  checkpoints.save_trainable(
    folder / 'tasks.safetensors', {'method': {'u': np.zeros(3)}}, {}
  )
  with pytest.raises(ValueError, match='tasks.safetensors: no prompts; there'):
    spot.ranking(str(target), str(folder))


# ---- the start -------------------------------------------------------------


def start(init, length=P, width=D):
  return init(jax.random.PRNGKey(0), (length, width), prompts(64, width))


def test_starts_at_the_most_similar(bank):
  folder, target = map(str, bank)
  got = start(spot.FromBank(folder, target))
  want = spot.ranking(target, folder)[0].prompt
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('kind', KINDS)
def test_starts_at_the_weighted_mean(bank, kind):
  folder, target = map(str, bank)
  got = start(spot.FromBank(folder, target, top_k=3, kind=kind))
  ranked = spot.ranking(target, folder, kind)
  near, mid, far = [one.similarity for one in ranked]
  assert far < 0 < mid < near
  want = near * ranked[0].prompt + mid * ranked[1].prompt
  want /= near + mid
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_first_logits_are_those_of_the_source(bank):
  folder, target = map(str, bank)
  init = jax.jit(models.EncoderDecoderModel(CONFIG).init_network)
  frozen = partitioning.unbox(init(jax.random.PRNGKey(0)))
  method = SoftPrompt(P, prompt_init=spot.FromBank(folder, target))
  model = models.EncoderDecoderModel(CONFIG, method=method)
  # As a run makes its state: traced.
  made = jax.jit(model.init_method)(jax.random.PRNGKey(0), frozen)
  trainable = {'method': partitioning.unbox(made), 'network': {}}
  batch = helpers.with_prompt(helpers.random_batch(CONFIG), model)
  logits = jax.jit(model.logits)
  source = spot.ranking(target, folder)[0].prompt
  np.testing.assert_array_equal(
    logits(frozen, trainable, batch),
    logits(frozen, helpers.prompted(source), batch),
  )


def test_without_a_bank_nothing_is_transferred(caplog):
  own = dataclasses.replace(spot.FromBank(), fallback=lambda *_: 'drawn')
  assert start(own) == 'drawn'
  assert 'nothing is transferred' in caplog.text


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'bank': 'b'}, "both a bank and the file of the target, got 'b' and None"),
    ({'target': 't'}, "got None and 't'"),
    ({'top_k': 0}, 'top_k must be a whole number of at least 1, got 0'),
    ({'top_k': 1.0}, 'top_k must be a whole number of at least 1, got 1.0'),
  ],
)
def test_bad_settings(fields, message):
  with pytest.raises(ValueError, match=message):
    spot.FromBank(**fields)


def test_another_length_or_width_is_refused(bank):
  init = spot.FromBank(*map(str, bank))
  for length, width in ((P + 1, D), (P, 2 * D)):
    message = rf'shape \(3, 16\), expected \({length}, {width}\)'
    with pytest.raises(ValueError, match=message):
      start(init, length, width)
