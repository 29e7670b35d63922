"""`report.html`: the curve to look at more closely, in one file that is whole.

Plotly's program is in the file, so that it works offline. Task, metric and
x-axis are switched by the boxes above the picture or by the address
(`report.html#task=mood&x=total`); the values that are drawn stand in a table
below it.
"""

from collections.abc import Sequence
import html
import json
import math
import string
from typing import Any

from prompt_jax.study import plots
from prompt_jax.study.results import Results
from prompt_jax.study.tables import Table

_SYMBOLS = (
  'circle',
  'square',
  'diamond',
  'triangle-down',
  'triangle-up',
  'cross',
)

_PAGE = string.Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto;
  max-width: 62rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
label { margin-right: 1.5rem; color: #555; } select { font: inherit; }
#plot { height: 30rem; margin-top: .5rem; }
.note { color: #666; font-size: .88rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .9rem .2rem 0; text-align: left;
  border-bottom: 1px solid #e4e4e4; vertical-align: top; }
td { white-space: nowrap; } td:last-child { white-space: normal; }
th { color: #555; font-weight: 600; border-bottom-color: #999; }
</style>
</head>
<body>
<h1>$title</h1>
<p>
<label>Task <select id="task"></select></label>
<label>Metric <select id="metric"></select></label>
<label>x-axis <select id="x"></select></label>
</p>
<div id="plot"></div>
<p class="note">$note <span id="left_out"></span></p>
<details><summary>Plotted values</summary>
<div class="wide"><table id="values"></table></div></details>
$tables
<script id="data" type="application/json">$data</script>
<script>$plotly</script>
<script>$script</script>
</body>
</html>
""")

_SCRIPT = """
'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const boxes = {};
for (const name of ['task', 'metric', 'x']) {
  boxes[name] = document.getElementById(name);
  for (const [value, label] of data.choices[name])
    boxes[name].add(new Option(label, value));
  boxes[name].onchange = () => {
    const state = Object.entries(boxes).map(([k, box]) => [k, box.value]);
    history.replaceState(null, '', '#' + new URLSearchParams(state));
    draw();
  };
}

function readAddress() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  for (const [name, box] of Object.entries(boxes)) {
    const known = data.choices[name].map(choice => choice[0]);
    const value = wanted.get(name);
    box.value = known.includes(value) ? value : known[0];
  }
  draw();
}

const short = new Intl.NumberFormat('en',
  {notation: 'compact', maximumSignificantDigits: 3});
const round = value => value === null ? '' : value.toFixed(2);
const count = value =>
  value === null ? '' : Math.round(value).toLocaleString('en');

function hover(point) {
  return [
    `<b>${point.size}</b>: ${round(point.mean)}` +
      (point.deviation === null ? '' : ` ± ${round(point.deviation)}`),
    `${point.base_seeds} pretraining x ${point.seeds} tuning seeds`,
    point.gap === null ? '' : `gap to ${data.reference}: ${round(point.gap)}`,
    `parameters: ${count(point.total)}, ` +
      `non-embedding ${count(point.non_embedding)}`,
    `trained: ${point.trained === null ? 'nothing' : count(point.trained)}`,
    point.train_flops === null ? '' :
      `FLOPs of tuning: ${point.train_flops.toExponential(2)}`,
  ].filter(line => line).join('<br>');
}

function traces(task, metric, x) {
  const out = [];
  for (const method of data.methods) {
    const points = method.points[task][metric].filter(p => p[x] !== null);
    if (points.length) out.push({
      name: method.label, x: points.map(p => p[x]), y: points.map(p => p.mean),
      error_y: {array: points.map(p => p.deviation || 0), thickness: 1.2,
        width: 4},
      sizes: points.map(p => p.size), text: points.map(hover),
      hovertemplate: '%{text}', mode: 'lines+markers',
      line: {color: method.colour},
      marker: {symbol: method.symbol, size: 9,
        line: {color: 'white', width: 1}},
    });
  }
  if (x === 'total' && metric === data.metric && task === '')
    for (const other of data.overlay) out.push({
      name: other.label, x: other.points.map(p => p[0]),
      y: other.points.map(p => p[1]), sizes: other.points.map(() => ''),
      text: other.points.map(p => `${other.source}<br>${p[1]}`),
      hovertemplate: '%{text}', mode: 'lines+markers',
      line: {color: '#999', dash: 'dot'}, marker: {symbol: 'star', size: 11},
    });
  return out;
}

function draw() {
  const [task, metric, x] = ['task', 'metric', 'x'].map(k => boxes[k].value);
  const shown = traces(task, metric, x);
  const name = box => box.options[box.selectedIndex].text;
  const layout = {
    margin: {l: 60, r: 20, t: 20, b: 60}, hovermode: 'closest',
    hoverlabel: {align: 'left'}, legend: {traceorder: 'reversed'},
    font: {family: 'system-ui, sans-serif'},
    xaxis: {title: {text: name(boxes.x)}, type: 'log', showgrid: false,
      exponentformat: 'SI', showline: true, linecolor: '#999', dtick: 1},
    yaxis: {title: {text: name(boxes.metric) + ', ' + name(boxes.task)},
      gridcolor: '#e8e8e8', zeroline: false},
    shapes: [], annotations: [],
  };
  const chance = data.chance[task];
  if (metric === data.metric && chance !== null) {
    layout.shapes.push({type: 'line', xref: 'paper', x0: 0, x1: 1, y0: chance,
      y1: chance, line: {color: '#777', width: 1, dash: 'dash'}});
    layout.annotations.push({xref: 'paper', x: 1, y: chance, text: 'chance',
      showarrow: false, xanchor: 'right', yanchor: 'bottom',
      font: {color: '#777'}});
  }
  if (x === 'total' || x === 'non_embedding') {
    const ticks = new Map();
    for (const trace of shown) trace.x.forEach((value, i) =>
      ticks.set(value, short.format(value) + '<br>' + trace.sizes[i]));
    Object.assign(layout.xaxis,
      {tickvals: [...ticks.keys()], ticktext: [...ticks.values()]});
  }
  const drawn = new Set(shown.map(trace => trace.name));
  const absent = data.methods.map(m => m.label).filter(m => !drawn.has(m));
  document.getElementById('left_out').textContent = absent.length ?
    'Nothing to draw on these axes: ' + absent.join(', ') + '.' : '';
  Plotly.react('plot', shown, layout, {responsive: true, displaylogo: false,
    toImageButtonOptions: {format: 'svg', filename: 'curve'}});
  list();
}

// What Plotly holds, not what it was given.
function list() {
  const table = document.getElementById('values');
  table.replaceChildren();
  const add = cells => {
    const row = table.insertRow();
    for (const cell of cells) row.insertCell().textContent = cell;
  };
  add(['line', 'size', boxes.x.value, boxes.metric.value, 'deviation']);
  for (const trace of document.getElementById('plot').data)
    trace.x.forEach((x, i) => add([trace.name, trace.sizes[i], x,
      round(trace.y[i]), trace.error_y ? round(trace.error_y.array[i]) : '']));
}

window.onhashchange = readAddress;
readAddress();
"""


def page(results: Results, tables: Sequence[Table]) -> str:
  """The text of the file.

  Args:
    results: of the study.
    tables: for below the picture.

  Raises:
    ImportError: plotly is not installed.
  """
  from plotly import offline

  data = json.dumps(_clean(_data(results)), allow_nan=False)
  return _PAGE.substitute(
    title=html.escape(results.study.title),
    note=html.escape(plots.caption(results)),
    tables='\n'.join(_section(table) for table in tables),
    # A title may hold what would end the element.
    data=data.replace('<', '\\u003c'),
    plotly=offline.get_plotlyjs(),
    script=_SCRIPT,
  )


def _section(table: Table) -> str:
  note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ''
  body = f'<div class="wide">{table.text("html")}</div>' if table.rows else ''
  return f'<h2>{html.escape(table.title)}</h2>\n{body}\n{note}'


def _data(results: Results) -> dict[str, Any]:
  """All that the script draws from."""
  study = results.study
  tasks: list[str | None] = [None, *study.tasks]
  methods = []
  for i, (method, colour) in enumerate(plots.colours(results).items()):
    methods.append(
      {
        'label': study.methods[method],
        'colour': colour,
        'symbol': _SYMBOLS[i % len(_SYMBOLS)],
        'points': {
          task or '': {
            metric: _points(results, method, task, metric)
            for metric in results.metrics
          }
          for task in tasks
        },
      }
    )
  axes = [axis for axis in plots.AXES if _has(methods, axis)]
  return {
    'metric': study.metric,
    'reference': study.methods[study.reference_method],
    'methods': methods,
    'overlay': study.overlay,
    'chance': {task or '': study.chance(task) for task in tasks},
    'choices': {
      'task': [[task or '', study.task_label(task)] for task in tasks],
      'metric': [[m, plots.metric_label(m)] for m in results.metrics],
      'x': [[axis, plots.AXES[axis]] for axis in axes],
    },
  }


def _has(methods: Sequence[dict[str, Any]], axis: str) -> bool:
  """Whether any point has a place on an axis."""
  return any(
    point[axis] is not None
    for method in methods
    for by_metric in method['points'].values()
    for points in by_metric.values()
    for point in points
  )


def _points(
  results: Results, method: str, task: str | None, metric: str
) -> list[dict[str, Any]]:
  """Points with the gap to the reference method."""
  out = []
  for point in plots.points(results, method, task, metric):
    reference = results.score(
      results.study.reference_method, point['size'], task, metric
    )
    gap = None
    if reference is not None and method != results.study.reference_method:
      gap = reference.mean - point['mean']
    out.append({**point, 'gap': gap})
  return out


def _clean(value: Any) -> Any:
  """JSON knows neither NaN nor infinity: null."""
  if isinstance(value, dict):
    return {k: _clean(v) for k, v in value.items()}
  if isinstance(value, list):
    return [_clean(v) for v in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
