"""The README's table of methods is what the methods' files say."""

import pathlib
import re

import contract

README = pathlib.Path(__file__).parent.parent / 'README.md'


def test_every_method_is_there_with_its_number():
  section = README.read_text().split('## Methods')[1].split('\n## ')[0]
  said = dict(re.findall(r'`(\w+)` ([\d,]*\d)', section))
  declared = {}
  for name in contract.METHODS:
    found = re.search(
      r'Trained parameters.*?\bbase ([\d,]*\d)', contract.header(name)
    )
    declared[name] = found and found[1]
  assert said == declared


def test_it_is_short():
  assert len(README.read_text().splitlines()) < 150
