"""What each method's file trains with: the numbers of its source, by hand.

A number is written here from the paper or the released code, not read from the
file. Where the project differs from a source the file's header says so, and
the comment here.
"""

import ast
import dataclasses
import inspect
import re
from typing import Any

import contract
import numpy as np
import pytest

from prompt_jax import gin_utils
from prompt_jax import optimizers

STEPS = 10_000


# Factors of the highest rate, by step of 10,000.
CONSTANT = {0: 1, 5000: 1, 9999: 1}
FALLS = {0: 1, 5000: 0.5, 10_000: 0}  # linearly
RISES_500 = {0: 0, 250: 0.5, 500: 1, 5250: 0.5, 10_000: 0}  # and falls
RISES_6_PERCENT = {0: 0, 300: 0.5, 600: 1, 5300: 0.5, 10_000: 0}


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Of a method's file.

  Attributes:
    optimizer: its name.
    rate: the highest.
    factors: of the rate, by step.
    settings: arguments of the optimizer; others have its defaults.
    part: scope of the parameters that this is of, in a file with several.
    bound: other bindings, by the end of their names.
    said: flags of the command in the header.
  """

  optimizer: str
  rate: float
  factors: dict[int, float] = dataclasses.field(default_factory=dict)
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)
  part: str | None = None
  bound: dict[str, Any] = dataclasses.field(default_factory=dict)
  said: dict[str, int] = dataclasses.field(default_factory=dict)


def adafactor(rate, factors=CONSTANT, decay=None, scale=True, **fields):
  settings = {'weight_decay_rate': decay, 'multiply_by_parameter_scale': scale}
  return Recipe('adafactor', rate, factors, settings, **fields)


def adamw(rate, factors=CONSTANT, decay=0.0, clip=None, **fields):
  settings = {'weight_decay': decay, 'global_norm_clip_threshold': clip}
  return Recipe('adamw', rate, factors, settings, **fields)


def prompt_tuning(rate=0.3, factors=CONSTANT, **fields):
  """Lester 2021: 0.3, no parameter scale, weight decay 1e-5."""
  return adafactor(rate, factors, decay=1e-5, scale=False, **fields)


def t_few(rate, steps=1000, **fields):
  """r-three/t-few, configs/default.json: 8 examples, 6 %, linear decay."""
  said = {'TRAIN_STEPS': steps, 'BATCH_SIZE': 8}
  return adafactor(rate, RISES_6_PERCENT, said=said, **fields)


# 2103.10385, THUDM/P-tuning LAMA: Adam, 0.98 after an epoch. That of the file
# is SST-2's 67,349 rows in batches of 32.
P_TUNING = adamw(
  1e-5,
  {0: 1, 2104: 1, 2105: 0.98, 4210: 0.9604, 9999: 0.98**4},
  decay=5e-4,
)
# 2101.00121, YerevaNN/WARP: Adam, clipped at 1, 6 % of the steps.
WARP = adamw(1e-3, RISES_6_PERCENT, clip=1.0, said={'BATCH_SIZE': 8})
# 2110.07602, THUDM/P-tuning-v2: 5e-3 (RTE), dropout of the prefix 0.1.
P_TUNING_V2 = adamw(
  5e-3, FALLS, bound={'PrefixTuning.dropout_rate': 0.1, 'BATCH_SIZE': 32}
)
# 2206.06522, the T5 baseline of LST: AdamW at 3e-4.
LORA = adamw(3e-4, bound={'LoRA.dropout_rate': 0.0})
# T5 1.1 and T5X, finetune.gin: constant, with parameter scale.
FINE_TUNE = adafactor(1e-3)

RECIPES = {
  # 2104.08691; 30,000 steps of 32.
  'soft_prompt': [
    prompt_tuning(said={'TRAIN_STEPS': 30_000}, bound={'BATCH_SIZE': 32})
  ],
  # 2110.07904: 2^18 steps of prompt tuning.
  'spot': [prompt_tuning(said={'TRAIN_STEPS': 262_144})],
  # 2112.08348: prompt tuning with gamma 0.01.
  'wayward': [prompt_tuning(bound={'Wayward.gamma': 0.01})],
  # google-research/prompt-tuning, extended: as prompt tuning.
  'multitask_prompt': [prompt_tuning()],
  'hidden_prompt': [prompt_tuning()],
  # 2109.04332, thu-coai/PPT scripts: 0.1 / sqrt(step + 1).
  'ppt': [
    adamw(
      0.1,
      {0: 1, 3: 0.5, 99: 0.1, 9999: 0.01},
      decay=1e-2,
      clip=1.0,
      said={'TRAIN_STEPS': 200_000, 'BATCH_SIZE': 256},
    )
  ],
  # The same; 50 epochs of 32 examples.
  'ppt_tune': [
    adamw(
      0.05,
      decay=1e-2,
      clip=1.0,
      said={'TRAIN_STEPS': 100, 'BATCH_SIZE': 16},
    )
  ],
  'p_tuning': [P_TUNING],
  'p_tuning_mlp': [P_TUNING],
  # 2303.02861: 0.3 and, of the factors, 0.4.
  'mpt': [prompt_tuning(part='prompt'), prompt_tuning(0.4, part='factors')],
  'mpt_source': [
    prompt_tuning(part='prompt', bound={'MPT.distillation': 0.9}),
    prompt_tuning(0.4, part='factors'),
  ],
  # 2205.11961, AkariAsai/ATTEMPT: 500 steps of warm-up, batch 32.
  'attempt': [
    prompt_tuning(
      0.3, {0: 0, 250: 0.5, 500: 1, 9999: 1}, said={'BATCH_SIZE': 32}
    )
  ],
  # 2110.07867, thunlp/Intrinsic-Prompt-Tuning: clipped at 0.1, 6 %.
  'ipt': [
    adamw(
      3e-5,
      RISES_6_PERCENT,
      clip=0.1,
      bound={
        'EncoderDecoderModel.label_smoothing': 0.1,
        'Subspace.alpha': 200.0,
        # A sum, to which that alpha belongs.
        'EncoderDecoderModel.loss_normalizing_factor': None,
      },
      said={'TRAIN_STEPS': 100_000, 'BATCH_SIZE': 64},
    )
  ],
  'ipt_tune': [
    adamw(
      1e-5,
      RISES_6_PERCENT,
      clip=0.1,
      bound={'EncoderDecoderModel.label_smoothing': 0.1},
      said={'TRAIN_STEPS': 100_000, 'BATCH_SIZE': 4},
    )
  ],
  # Ours: the source has AdamW at 1e-5, on BART.
  'intrinsic_prompt': [adafactor(0.3, scale=False)],
  # configs/intrinsic_said_20k.json.
  'intrinsic_model': [t_few(3e-2, 3000)],
  # 2101.00190, XiangLi1999/PrefixTuning: 5e-5, linear.
  'prefix_tuning': [adamw(5e-5, FALLS)],
  # The paper has no recipe for the plain table: P-tuning v2's rate.
  'prefix_tuning_plain': [adamw(5e-3, FALLS)],
  'p_tuning_v2': [P_TUNING_V2],
  'p_tuning_v2_head': [P_TUNING_V2],
  'lora': [LORA],
  'rslora': [LORA],
  'dora': [LORA],
  # configs/lora.json, ia3.json, layernorm.json, bitfit.json.
  'lora_all': [t_few(3e-3)],
  'ia3': [t_few(3e-3)],
  'layer_norm': [t_few(3e-4)],
  # Ours: no parameter scale, since biases start at 0.
  'bitfit': [
    dataclasses.replace(
      t_few(3e-4),
      settings={
        'weight_decay_rate': None,
        'multiply_by_parameter_scale': False,
      },
    )
  ],
  # rabeehk/compacter, for T5: 3e-4, of Compacter 3e-3; 500 steps of warm-up.
  'houlsby': [adamw(3e-4, RISES_500)],
  'pfeiffer': [adamw(3e-4, RISES_500)],
  'compacter': [adamw(3e-3, RISES_500)],
  # Ours: as the other adapters (2110.04366: 5e-5, on BART).
  'parallel_adapter': [adamw(3e-4, RISES_500)],
  # 2110.04366: the prefix at 5e-5, linear; ours for the adapters.
  'mam': [
    adamw(3e-4, FALLS, part='adapters'),
    adamw(5e-5, FALLS, part='prefix'),
  ],
  # Ours: each as alone.
  'prompt_lora': [
    prompt_tuning(part='prompt'),
    adamw(3e-4, part='lora'),
  ],
  # 2206.06522: 3e-3, 500 steps of warm-up, linear decay.
  'lst': [adamw(3e-3, RISES_500)],
  'soft_verbalizer': [WARP],
  'warp': [WARP],
  'last_layers': [FINE_TUNE],
  'fine_tune': [FINE_TUNE],
}


def test_every_file_has_a_recipe():
  assert RECIPES.keys() == set(contract.METHODS)


@pytest.fixture
def parsed(request):
  files = [str(contract.SMALL), f'methods/{request.param}.gin']
  flags = ['MIXTURE_OR_TASK_NAME=none', f'TRAIN_STEPS={STEPS}']
  gin_utils.parse([*files, 'runs/train.gin'], flags)
  yield request.param, {b.key: b.value for b in gin_utils.resolved()}
  gin_utils.clear()


def bound_to(bindings, name):
  """A value by the end of its name; None if nothing is bound."""
  found = [
    v for k, v in bindings.items() if k == name or k.endswith(f'.{name}')
  ]
  return ast.literal_eval(found[0]) if found else None


@pytest.mark.parametrize('parsed', contract.METHODS, indirect=True)
def test_the_file_trains_by_its_recipe(parsed):
  name, bindings = parsed
  for recipe in RECIPES[name]:
    function, schedule = 'OPTIMIZER', 'LEARNING_RATE_FN'
    scope = ''
    if recipe.part is not None:
      assert bindings['OPTIMIZER'] == '@prompt_jax.learning_rates.by_part()'
      scope = f'{recipe.part}/'
      function, schedule = (
        f'{scope}learning_rates.Part.{field}'
        if f'{scope}learning_rates.Part.{field}' in bindings
        else f'learning_rates.Part.{field}'
        for field in ('optimizer', 'learning_rate_fn')
      )
    want = f'@prompt_jax.optimizers.{recipe.optimizer}()'
    assert bindings[function] == want
    check_settings(recipe, bindings)
    reference = bindings[schedule].removeprefix('@')
    reference = reference.replace('prompt_jax.schedules', 'schedules')
    rate = gin_utils.build(f'@{scope}{reference}')
    for step, factor in recipe.factors.items():
      want = recipe.rate * factor
      # T5X's schedules are never below 1e-8.
      np.testing.assert_allclose(
        rate(step), want, rtol=1e-5, atol=1e-8, err_msg=f'step {step}'
      )
    normalizer = 'EncoderDecoderModel.loss_normalizing_factor'
    bound = {'DROPOUT_RATE': 0.1, 'EncoderDecoderModel.z_loss': None}
    if recipe.optimizer == 'adamw':
      bound[normalizer] = 'NUM_REAL_TARGET_TOKENS'
    for key, value in (bound | recipe.bound).items():
      assert bound_to(bindings, key) == value, key
    for flag, value in recipe.said.items():
      said = re.findall(rf'--gin\.{flag}=(\d+)', contract.header(name))
      assert said == [str(value)], flag


def check_settings(recipe, bindings):
  """All arguments of the optimizer: those given, and else the defaults."""
  start = f'optimizers.{recipe.optimizer}.'
  if recipe.part is not None:  # no part has settings of its own
    assert not [k for k in bindings if f'/{start}' in k]
  given = {
    k.removeprefix(start): ast.literal_eval(v)
    for k, v in bindings.items()
    if k.startswith(start)
  }
  made = getattr(optimizers, recipe.optimizer)
  defaults = {
    k: p.default for k, p in inspect.signature(made).parameters.items()
  }
  assert defaults | given == defaults | recipe.settings


def test_what_all_have():
  """T5X: z-loss 1e-4, no label smoothing; prompt tuning: dropout 0.1."""
  flags = ['MIXTURE_OR_TASK_NAME=none', f'TRAIN_STEPS={STEPS}']
  files = [str(contract.SMALL), 'methods/soft_prompt.gin', 'runs/train.gin']
  gin_utils.parse(files, flags)
  try:
    model = gin_utils.build('%MODEL')
  finally:
    gin_utils.clear()
  assert (model.z_loss, model.label_smoothing) == (1e-4, 0.0)
  assert model.config.dropout_rate == 0.1
