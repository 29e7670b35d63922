"""Prompts in files: which files hold some, and which may stand together."""

import json

import commands
import numpy as np
import pytest
import runs

from prompt_jax import checkpoints
from prompt_jax import cli
from prompt_jax.methods import initializers
from prompt_jax.methods import saved_prompts

P, D = 3, 4
PROMPTS = np.random.default_rng(0).normal(size=(2, P, D)).astype(np.float32)


def save(path, prompts, own=None, **header):
  method = {'prompt': prompts, **(own or {})}
  tree = {'method': method, 'network': {}}
  checkpoints.save_trainable(path, tree, header)
  return str(path)


def test_every_form_is_read(tmp_path):
  saved_prompts.write(str(tmp_path / 'one.npy'), PROMPTS[0])
  saved_prompts.write(str(tmp_path / 'two.npy'), PROMPTS)
  save(tmp_path / 'one.safetensors', PROMPTS[0])
  (tmp_path / 'run').mkdir()
  save(tmp_path / 'run' / saved_prompts.FILE, PROMPTS)
  (tmp_path / 'export').mkdir()
  laid = {'token_embedder': {'rows': {'table': PROMPTS.reshape(1, -1, D)}}}
  checkpoints.save_trainable(
    tmp_path / 'export' / saved_prompts.FILE,
    {'method': laid, 'network': {}},
    {'exported': {'soft_tokens': [2, P], 'deltas': {}}},
  )
  for name in ('one.npy', 'two.npy', 'one.safetensors', 'run', 'export'):
    found = saved_prompts.read(str(tmp_path / name)).prompts
    want = PROMPTS[:1] if 'one' in name else PROMPTS
    np.testing.assert_array_equal(found, want, err_msg=name)
    assert found.dtype == np.float32


def test_what_is_written_starts_a_prompt(tmp_path):
  path = str(tmp_path / 'prompt.npy')
  saved_prompts.write(path, PROMPTS[1])
  init = initializers.FromFile(path)
  np.testing.assert_array_equal(init(None, (P, D), None), PROMPTS[1])
  with pytest.raises(ValueError, match=r'written as \.npy'):
    saved_prompts.write(str(tmp_path / 'prompt.txt'), PROMPTS[1])


def test_what_is_no_prompt_is_refused(tmp_path):
  more = save(tmp_path / 'a.safetensors', PROMPTS[0], {'u': PROMPTS[0]})
  with pytest.raises(ValueError, match=r"more than prompts: \['method/u'\]"):
    saved_prompts.read(more)
  none = tmp_path / 'b.safetensors'
  tree = {'method': {'lora_a': PROMPTS}, 'network': {}}
  checkpoints.save_trainable(none, tree, {})
  with pytest.raises(ValueError, match=r'no prompts; .*method/lora_a'):
    saved_prompts.read(str(none))
  np.save(tmp_path / 'flat.npy', PROMPTS.ravel())
  with pytest.raises(ValueError, match=r'shape \(24,\), expected \[P, D\]'):
    saved_prompts.read(str(tmp_path / 'flat.npy'))
  (tmp_path / 'text.npy').write_text('no array')
  with pytest.raises(ValueError, match='not a numpy array file'):
    saved_prompts.read(str(tmp_path / 'text.npy'))
  for name in ('none.npy', 'none.safetensors'):
    with pytest.raises(checkpoints.CheckpointError, match='No file'):
      saved_prompts.read(str(tmp_path / name))


def test_prompts_that_stand_together_are_alike(tmp_path):
  def file(name, prompts=PROMPTS, **header):
    path = save(tmp_path / f'{name}.safetensors', prompts, **header)
    return saved_prompts.read(path)

  plain = file('plain')
  first = file('first', base_digest='aa', vocabulary='v')
  saved_prompts.check_alike([first, plain, file('twin', base_digest='aa')])
  with pytest.raises(ValueError, match=r'other.*another base \(bb\) .*\(aa\)'):
    saved_prompts.check_alike([first, file('other', base_digest='bb')])
  with pytest.raises(ValueError, match='another vocabulary'):
    saved_prompts.check_alike([first, file('words', vocabulary='w')])
  with pytest.raises(ValueError, match=r'shape \(2, 4\), but in .* \(3, 4\)'):
    saved_prompts.check_alike([plain, file('short', PROMPTS[:, :2])])


@pytest.mark.slow
def test_an_export_goes_on_by_the_command_line(tmp_path, monkeypatch, capsys):
  """P-tuning, exported, starts prompt tuning; on another base it is refused."""
  monkeypatch.setattr(cli, '_set_up', lambda debug: None)
  runs.write_data(tmp_path, train=16, dev=4)
  macros = {'TRAIN_STEPS': 2, 'EVAL_PERIOD': 2, 'PROMPT_LENGTH': P}
  train = commands.train(tmp_path, model_dir=tmp_path / 'run', **macros)
  train = [a.replace('soft_prompt', 'p_tuning') for a in train]
  assert commands.here(*train) == 0
  export = f'--output={tmp_path / "prompt"}'
  assert commands.here('export', f'--model_dir={tmp_path / "run"}', export) == 0
  plain = commands.train(tmp_path, PROMPT_LENGTH=P)
  start = [
    *commands.without_training(plain, 'eval'),
    '--gin.PROMPT_INIT=@initializers.FromFile()',
    f'--gin.initializers.FromFile.path={tmp_path / "prompt"}',
  ]
  found = []
  for args in (['eval', f'--model_dir={tmp_path / "run"}'], start):
    assert commands.here(*args, f'--output={tmp_path / "eval.json"}') == 0
    metrics = json.loads((tmp_path / 'eval.json').read_text())
    found.append(metrics['user_data']['loss_per_token'])
  assert found[0] == pytest.approx(found[1], rel=1e-5)
  capsys.readouterr()
  assert commands.here(*start, '--gin.SEED=1') == 1  # another random base
  said = capsys.readouterr().err
  assert 'which METHOD reads, was made on another frozen base' in said
