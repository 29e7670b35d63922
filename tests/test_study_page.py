"""report.html in a real browser that cannot reach anything."""

import html
import re
import shutil
import subprocess

import made_up_study
import pytest

from prompt_jax.study import report

pytest.importorskip('plotly', reason="the extra 'report' is not installed")

BROWSERS = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  path = tmp_path_factory.mktemp('study')
  made_up_study.write(path)
  report.write_report(str(path))
  return path


@pytest.fixture
def browse(directory, tmp_path):
  """The elements of the page, after a script has run in it."""
  browser = next(filter(None, map(shutil.which, BROWSERS)), None)
  if browser is None:
    pytest.skip(f'no browser: none of {", ".join(BROWSERS)} is installed')
  text = (directory / 'report.html').read_text()

  def dump(address='', script=''):
    page = tmp_path / 'page.html'
    extra = f'<script>{script}</script></body>'
    page.write_text(text.replace('</body>', extra) if script else text)
    ran = subprocess.run(
      [
        browser,
        '--headless',
        '--no-sandbox',
        '--disable-gpu',
        '--host-resolver-rules=MAP * ~NOTFOUND',
        '--virtual-time-budget=5000',
        f'--user-data-dir={tmp_path / "profile"}',
        '--dump-dom',
        f'file://{page}{address}',
      ],
      capture_output=True,
      text=True,
      timeout=120,
    )
    assert '</html>' in ran.stdout, ran.stderr
    return ran.stdout

  return dump


def plotted(elements):
  """What the picture holds: (line, size) -> (x, y, deviation)."""
  table = re.search(r'<table id="values">(.*?)</table>', elements, re.DOTALL)
  assert table is not None
  rows = [
    re.findall(r'<td>(.*?)</td>', row)
    for row in re.findall(r'<tr>(.*?)</tr>', table[1])
  ]
  return {
    (html.unescape(line), size): tuple(float(v or 'nan') for v in values)
    for line, size, *values in rows[1:]
  }


def test_first_view_is_the_mean_over_tasks(browse):
  elements = browse()
  points = plotted(elements)
  assert len(points) == 12
  assert points['Prompt tuning', 'd8'] == (3_232, 56.0, 1.0)
  assert points['Prompt design', 'd64'] == (197_504, 46.0, 0.0)
  # Drawn, not only listed: a marker a point.
  assert elements.count('class="point"') == 12
  assert 'Nothing here was measured.' in elements


def test_address_switches_task_metric_and_axis(browse):
  elements = browse('#task=agent&metric=accuracy&x=trained')
  points = plotted(elements)
  # Exact match is made up to be half; prompt design trains nothing.
  assert points['Prompt tuning', 'd32'] == (256, 45.0, 0.5)
  assert {line for line, _ in points} == {'Prompt tuning', 'Model tuning'}
  assert 'Nothing to draw on these axes: Prompt design.' in elements


def test_boxes_switch_and_pointer_shows_values(browse):
  elements = browse(
    script="""
    const box = document.getElementById('task');
    box.value = 'mood';
    box.dispatchEvent(new Event('change'));
    document.getElementById('x').value = 'train_flops';
    document.getElementById('x').dispatchEvent(new Event('change'));
    Plotly.Fx.hover('plot', [{curveNumber: 0, pointNumber: 2}]);
    document.body.dataset.address = location.hash;
    """
  )
  points = plotted(elements)
  assert 'task=mood&amp;metric=rank_accuracy&amp;x=train_flops' in elements
  assert points['Model tuning', 'd16'] == (1.2608e10, 96.0, 1.0)
  layer = elements[elements.index('class="hoverlayer"') :]
  layer = re.sub(r'<[^>]*>', ' ', layer[: layer.index('</svg>')])
  assert 'd32' in layer and '90.00 ± 1.00' in layer
  assert 'gap to Model tuning: 6.00' in layer
  assert '1 pretraining x 3 tuning seeds' in layer


def test_nothing_is_loaded_from_elsewhere(directory):
  text = (directory / 'report.html').read_text()
  own = re.sub(r'<script>.*?</script>', '', text, flags=re.DOTALL)
  assert not re.search(r'(src|href)=|https?://', own)


def test_text_of_a_study_cannot_break_the_page(tmp_path):
  made_up_study.write(tmp_path)
  path = tmp_path / 'study.json'
  path.write_text(
    path.read_text().replace('"mood", "chance"', '"</script><b>", "chance"')
  )
  report.write_report(str(tmp_path))
  text = (tmp_path / 'report.html').read_text()
  assert '</script><b>' not in text and '&lt;/script&gt;&lt;b&gt;' in text
