"""Recycling: maps that are known are found, and files go in and come out."""

import inspect
import json

import helpers
import jax
import numpy as np
import pytest

from prompt_jax import checkpoints
from prompt_jax import models
from prompt_jax import partitioning
from prompt_jax import recycle
from prompt_jax import vocabularies
from prompt_jax.methods import initializers
from prompt_jax.methods import recycling
from prompt_jax.methods import saved_prompts

V, S, T, P = 60, 8, 12, 3  # rows, widths of the models, prompt length
RNG = np.random.default_rng(0)
SOURCE = RNG.normal(size=(V, S))
MATRIX = RNG.normal(size=(S, T))
PROMPT = RNG.normal(size=(P, S))
WORDS = np.arange(10, 40)


def test_v2v_lin_finds_a_linear_map():
  got = recycling.v2v_lin(SOURCE, SOURCE @ MATRIX, PROMPT)
  np.testing.assert_allclose(got, PROMPT @ MATRIX, rtol=1e-5, atol=1e-5)
  assert got.dtype == np.float32


@pytest.mark.parametrize('method', ['v2v-lin', 'lin-comb'])
def test_only_the_words_count(method):
  target = SOURCE @ MATRIX
  wrong = np.array(target)
  wrong[:10] += 5.0
  fn = recycling.METHODS[method]
  np.testing.assert_allclose(
    fn(SOURCE, wrong, PROMPT, WORDS), PROMPT @ MATRIX, rtol=1e-4, atol=1e-4
  )
  assert np.abs(fn(SOURCE, wrong, PROMPT) - PROMPT @ MATRIX).max() > 0.1


def test_the_network_is_the_papers():
  """Inner width 4 D_t, batches of 50 words, 25 epochs, Adam at 3e-4."""
  known = inspect.signature(recycling.v2v_nn).parameters.values()
  got = {p.name: p.default for p in known if p.kind is p.KEYWORD_ONLY}
  want = {'hidden_scale': 4, 'batch_size': 50, 'epochs': 25}
  assert got == {**want, 'learning_rate': 3e-4, 'seed': 0}
  words = inspect.signature(recycling.latin_words).parameters
  assert (words['num_words'].default, words['offset'].default) == (4000, 1000)


def test_v2v_lin_is_least_squares():
  target = RNG.normal(size=(V, T))
  got = recycling.v2v_lin(SOURCE, target, np.eye(S), WORDS)
  x, y = SOURCE[WORDS], target[WORDS]
  want = np.linalg.solve(x.T @ x, x.T @ y)  # the normal equations
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_lin_comb_takes_words_to_words():
  """Rows of s to the same rows of t, where they are independent."""
  few = np.arange(5, 5 + S)  # as many words as dimensions
  target = RNG.normal(size=(V, T))
  got = recycling.lin_comb(SOURCE, target, SOURCE[few[[4, 0, 7]]], few)
  np.testing.assert_allclose(got, target[few[[4, 0, 7]]], rtol=1e-4, atol=1e-4)


def test_lin_comb_of_many_words_has_the_smallest_weights():
  target = RNG.normal(size=(V, T))
  got = recycling.lin_comb(SOURCE, target, PROMPT)
  weights = PROMPT @ np.linalg.pinv(SOURCE)
  np.testing.assert_allclose(weights @ SOURCE, PROMPT, atol=1e-8)
  np.testing.assert_allclose(got, weights @ target, rtol=1e-4, atol=1e-4)


def test_prompts_of_several_tasks_are_one_after_the_other():
  both = np.stack([PROMPT, 2 * PROMPT])
  for fn in (recycling.v2v_lin, recycling.lin_comb):
    got = fn(SOURCE, SOURCE @ MATRIX, both)
    assert got.shape == (2, P, T)
    np.testing.assert_allclose(got[1], 2 * got[0], rtol=1e-5)
    one = fn(SOURCE, SOURCE @ MATRIX, PROMPT)
    np.testing.assert_allclose(got[0], one, rtol=1e-5)


def test_v2v_nn_learns_what_no_matrix_is():
  rng = np.random.default_rng(1)
  source = rng.normal(size=(1030, S))  # the last step of an epoch has 30 words
  target = np.abs(source @ MATRIX)
  fresh = rng.normal(size=(200, S))
  want = np.abs(fresh @ MATRIX)
  options = {'epochs': 60, 'learning_rate': 3e-3}
  got = recycling.v2v_nn(source, target, fresh, **options)
  assert got.shape == want.shape
  error = np.mean((got - want) ** 2)
  linear = np.mean((recycling.v2v_lin(source, target, fresh) - want) ** 2)
  assert error < 0.1 * linear
  again = recycling.v2v_nn(source, target, fresh, **options)
  np.testing.assert_array_equal(got, again)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'prompt': PROMPT[:, 1:]}, 'width 7, but the source model 8'),
    ({'target': SOURCE[:9]}, 'embed 60 and 9 ids; give `words`'),
    ({'words': [0, V]}, 'ids from 0 to 60, but .* 60 rows'),
    ({'words': [-1, 2]}, 'ids from -1 to 2'),
    ({'words': []}, 'must be a list of ids'),
    ({'words': [0.5]}, 'must be a list of ids'),
  ],
)
@pytest.mark.parametrize('method', recycling.METHODS)
def test_what_does_not_fit_is_refused(method, change, message):
  arrays = {'source': SOURCE, 'target': SOURCE, 'prompt': PROMPT, **change}
  with pytest.raises(ValueError, match=message):
    recycling.METHODS[method](**arrays)


@pytest.mark.parametrize('option', ['hidden_scale', 'batch_size', 'epochs'])
def test_numbers_of_the_network_are_whole(option):
  with pytest.raises(ValueError, match=f'{option} must be .* got 0'):
    recycling.v2v_nn(SOURCE, SOURCE, PROMPT, **{option: 0})


# ---- words -------------------------------------------------------------------


def test_words_of_a_file(tmp_path):
  path = tmp_path / 'words.json'
  path.write_text(json.dumps({'4': 'X', '9': 'a', '8': 'the', '12': 'to'}))
  assert recycling.word_list(str(path), 2, 1).tolist() == [9, 8]
  with pytest.raises(ValueError, match='has 4 words, but 1 are .* 4 taken'):
    recycling.word_list(str(path), 4, 1)
  path.write_text('["the"]')
  with pytest.raises(ValueError, match='expected a JSON object of words by id'):
    recycling.word_list(str(path), 1, 0)


def test_latin_words():
  words = ['.', 'soon', '7up', 'roses', 'über', 'at']
  vocabulary = vocabularies.WordVocabulary(words, extra_ids=3)
  assert recycling.latin_words(vocabulary, 2, 1).tolist() == [6, 8]
  with pytest.raises(ValueError, match='The vocabulary has 3 words'):
    recycling.latin_words(vocabulary, 3, 1)


# ---- the command -------------------------------------------------------------


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Two bases of one vocabulary as runs that trained them, and a prompt."""
  folder = tmp_path_factory.mktemp('recycling')
  model = models.EncoderDecoderModel(helpers.SMALL)
  init = jax.jit(model.init_network)
  for seed, name in enumerate(('s', 't')):
    params = partitioning.unbox(init(jax.random.PRNGKey(seed)))
    (folder / name).mkdir()
    path = folder / name / 'trainable.safetensors'
    own = {'method': {}, 'network': jax.device_get(params)}
    checkpoints.save_trainable(path, own, {})
    np.save(folder / f'{name}.npy', params['token_embedder']['embedding'])
  prompt = np.random.default_rng(3).normal(size=(P, helpers.SMALL.emb_dim))
  checkpoints.save_trainable(
    folder / 'prompt.safetensors', helpers.prompted(prompt), {}
  )
  return folder


@pytest.mark.parametrize('method', recycling.METHODS)
def test_the_command_writes_what_starts_a_prompt(folder, capsys, method):
  source, target = (np.load(folder / f'{n}.npy') for n in ('s', 't'))
  prompt = saved_prompts.read(str(folder / 'prompt.safetensors')).prompts[0]
  output = str(folder / f'{method}.npy')
  options = {'epochs': 2} if method == 'v2v-nn' else {}
  words = list(range(3, 50))
  recycle.recycle(
    str(folder / 's'), str(folder / 't'), str(folder / 'prompt.safetensors'),
    output, method, words, **options,
  )  # fmt: skip
  assert f'Wrote {output}: {method}' in capsys.readouterr().out
  got = initializers.FromFile(output)(None, prompt.shape, None)
  want = recycling.METHODS[method](source, target, prompt, words, **options)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  assert np.abs(got - prompt).max() > 0.1


def test_the_command_reads_a_word_list(folder):
  (folder / 'words.json').write_text(json.dumps({i: 'x' for i in range(50)}))
  paths = [str(folder / n) for n in ('s', 't', 'prompt.safetensors', 'w.npy')]
  got = recycle.recycle(*paths, words=str(folder / 'words.json'),
                          num_words=20, offset=10)  # fmt: skip
  want = recycle.recycle(*paths, words=list(range(10, 30)))
  np.testing.assert_array_equal(got, want)


def test_the_command_refuses(folder):
  paths = [str(folder / n) for n in ('s', 't', 'prompt.safetensors', 'x.npy')]
  with pytest.raises(
    ValueError, match="got 'v2v-line'. Did you mean 'v2v-lin'"
  ):
    recycle.recycle(*paths, method='v2v-line')
  with pytest.raises(ValueError, match=r"v2v-lin has no options, got \['epo"):
    recycle.recycle(*paths, epochs=3)
  with pytest.raises(ValueError, match=r'written as \.npy'):
    recycle.recycle(*paths[:3], str(folder / 'x.txt'))
  with pytest.raises(ValueError):  # a prompt is no base
    recycle.recycle(paths[2], *paths[1:])
