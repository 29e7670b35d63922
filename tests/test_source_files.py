"""Files that a method reads are of the run's base and vocabulary."""

import dataclasses
import pathlib

import numpy as np
import pytest
import runs

from prompt_jax import checkpoints
from prompt_jax import fingerprints
from prompt_jax import optimizers
from prompt_jax import run as run_lib
from prompt_jax import sources
from prompt_jax.methods import attempt
from prompt_jax.methods import base
from prompt_jax.methods import exported
from prompt_jax.methods import initializers
from prompt_jax.methods import ipt
from prompt_jax.methods import ladder
from prompt_jax.methods import mpt
from prompt_jax.methods import pruning
from prompt_jax.methods import saved_prompts
from prompt_jax.methods import spot
from prompt_jax.methods.soft_prompt import SoftPrompt

P, D = 3, runs.CONFIG.emb_dim
PROMPT = np.random.default_rng(0).normal(size=(P, D)).astype(np.float32)

# Every way for a method to read a file.
READERS = {
  'teachers': lambda f: mpt.MPT(P, teachers=(f,)),
  'source': lambda f: mpt.MPT(P, source=f),
  'attempt': lambda f: attempt.Attempt((f,), P),
  'ipt': lambda f: ipt.Subspace((f,), P),
  'subspace': lambda f: ipt.SubspacePrompt(f, P),
  'code': lambda f: ipt.SubspacePrompt('none.safetensors', P, start=f),
  'slice': lambda f: ipt.SubspacePrompt('none.safetensors', P, sources=(f,)),
  'start': lambda f: SoftPrompt(P, prompt_init=initializers.FromFile(f)),
  'bank': lambda f: SoftPrompt(P, prompt_init=spot.FromBank(f, f)),
  'units': lambda f: ladder.LST(start=pruning.FromFile(f)),
  'exported': lambda f: exported.Exported(f),
  'in a source': lambda f: attempt.Attempt((initializers.FromFile(f),), P),
  'in a chain': lambda f: base.Chain(
    {
      'a': SoftPrompt(2),
      'b': base.Chain({'c': mpt.MPT(P, source=f)}),
    }
  ),
}


@pytest.fixture(scope='module', autouse=True)
def one_base():
  """A random base of each width is drawn once."""
  draw, drawn = run_lib.Run._read_base, {}

  def read(run):
    width = run.model.config.emb_dim
    if width not in drawn:
      drawn[width] = draw(run)[0]
    return dict(drawn[width]), 0

  patch = pytest.MonkeyPatch()
  patch.setattr(run_lib.Run, '_read_base', read)
  yield
  patch.undo()


@pytest.fixture(scope='module')
def here(tmp_path_factory):
  """The fingerprints of base and vocabulary of a run."""
  run = runs.make(tmp_path_factory.mktemp('here'))
  return run.load().fingerprint, run.vocabulary_fingerprint


@pytest.fixture(scope='module')
def elsewhere(tmp_path_factory):
  """The fingerprint of a wider base."""
  config = {'emb_dim': 2 * D}
  run = runs.make(tmp_path_factory.mktemp('elsewhere'), config=config)
  return run.load().fingerprint


def save(folder, **header):
  path = folder / saved_prompts.FILE
  tree = {'method': {'prompt': PROMPT}, 'network': {}}
  checkpoints.save_trainable(path, tree, header)
  return str(path)


def make(folder, method):
  run = runs.make(folder)
  model = dataclasses.replace(run.model, method=method)
  return dataclasses.replace(run, model=model)


@pytest.mark.parametrize('reader', READERS)
def test_another_base_or_vocabulary_is_refused(
  reader, here, elsewhere, tmp_path
):
  """When the base is loaded, before anything of the method is made."""
  fingerprint, vocabulary = here
  own = {'base': fingerprint, 'vocabulary': vocabulary}
  read = READERS[reader]

  path = save(tmp_path, **{**own, 'base': elsewhere})
  with pytest.raises(fingerprints.BaseMismatch) as caught:
    make(tmp_path, read(path)).load()
  said = str(caught.value)
  assert f'{path}, which METHOD reads, was made on another frozen' in said
  assert fingerprints.digest(elsewhere) in said
  assert fingerprints.digest(fingerprint) in said
  assert 'parameters of another shape' in said and 'MODEL_DIR' not in said

  path = save(tmp_path, **{**own, 'vocabulary': 'other'})
  message = f'another vocabulary .fingerprint other; .* here is {vocabulary}'
  with pytest.raises(checkpoints.CheckpointError, match=message):
    make(tmp_path, read(path)).load()

  # As `prompt-jax prune` writes it.
  path = save(tmp_path, base_digest='abc')
  with pytest.raises(fingerprints.BaseMismatch, match='fingerprint abc; the'):
    make(tmp_path, read(path)).load()

  # By the name of its directory.
  with pytest.raises(fingerprints.BaseMismatch, match='fingerprint abc; the'):
    sources.check([str(tmp_path)], *here)

  path = save(tmp_path, base_digest=fingerprints.digest(fingerprint), **own)
  [*_, last] = sources.files(read(path))
  assert last == path
  sources.check(sources.files(read(path)), *here)


def test_a_prompt_of_the_run_s_base_starts_one(here, tmp_path):
  fingerprint, vocabulary = here
  path = save(tmp_path, base=fingerprint, vocabulary=vocabulary)
  run = make(tmp_path, READERS['start'](path))
  loaded = run.load()
  abstract = run.abstract_state(optimizers.sgd(), loaded)
  state = run.init_state(optimizers.sgd(), loaded, abstract)
  np.testing.assert_array_equal(state.trainable['method']['prompt'], PROMPT)


def test_a_prompt_may_be_carried_over_on_purpose(elsewhere, tmp_path):
  """A `.npy` names no base, as `prompt-jax recycle` writes it; or by a flag."""
  file = str(tmp_path / 'prompt.npy')
  saved_prompts.write(file, PROMPT)
  make(tmp_path, READERS['start'](file)).load()
  path = save(tmp_path, base=elsewhere, vocabulary='other')
  init = initializers.FromFile(path, other_base=True)
  make(tmp_path, SoftPrompt(P, prompt_init=init)).load()
  # Its width has to be the network's all the same, which is told while the
  # shapes of the state are computed.
  np.save(file, np.zeros((P, 2 * D), np.float32))
  for name in ('start', 'ipt', 'attempt', 'teachers'):
    run = make(tmp_path, READERS[name](file))
    with pytest.raises(ValueError, match=r'\(.*3, 32\), expected .*3, 16\)'):
      run.abstract_state(optimizers.sgd(), run.load())


def test_a_file_that_is_not_there_is_its_reader_s(tmp_path):
  path = str(tmp_path / 'none.safetensors')
  sources.check([path], {}, 'any')
  run = make(tmp_path, READERS['start'](path))
  with pytest.raises(checkpoints.CheckpointError, match='No file .*none'):
    run.abstract_state(optimizers.sgd(), run.load())
  pathlib.Path(path).write_bytes(b'no file of that kind')
  with pytest.raises(checkpoints.CheckpointError, match='not a whole'):
    run.load()


def test_methods_without_files():
  lst = ladder.LST()
  assert sources.files(None) == sources.files(lst) == []
  bank = SoftPrompt(P, prompt_init=spot.FromBank())
  assert sources.files(bank) == []
  several = attempt.Attempt(('a', initializers.SampledVocab(), 'b'), P)
  assert sources.files(several) == ['a', 'b']
