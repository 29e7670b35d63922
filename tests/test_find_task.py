"""Tasks that are there with one vocabulary are told to those without it."""

from prompt_jax.tasks import pocket
import pytest

from prompt_jax import datasets
from prompt_jax import tasks
from prompt_jax import vocabularies


@pytest.mark.parametrize(
  ('name', 'files'),
  [('pocket0_mood', 'pocket_'), ('docstrings_class', 'docstrings_')],
)
def test_another_vocabulary(name, files):
  tasks.register(vocabularies.bytes_vocabulary())
  with pytest.raises(ValueError, match=rf"{name}' is .*=models/{files}\*\.gin"):
    datasets.find_task(name)


def test_misspelt_with_its_own_vocabulary():
  tasks.register(pocket.vocabulary())
  assert datasets.find_task('pocket0_mood').name == 'pocket0_mood'
  with pytest.raises(ValueError, match="Did you mean 'pocket0_mood'"):
    datasets.find_task('pocket0_mod')
