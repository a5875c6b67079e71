"""The Jinja template of the page that `write_page` writes."""

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>
:root { --ink: #202124; --pale: #62666d; --line: #e3e5e8; --accent: #2463c5; --wash: #f6f7f9; --warn: #b3261e; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 3rem; max-width: 82rem; color: var(--ink); background: #fff;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { margin: 2.6rem 0 .3rem; font-size: 1.15rem; }
p { margin: .3rem 0; max-width: 46rem; }
.pale, figcaption, dt, .note { color: var(--pale); }
.note { margin-bottom: .9rem; font-size: .88rem; }
.settings { display: flex; flex-wrap: wrap; gap: .35rem; margin: .8rem 0 0; padding: 0; list-style: none;
  font-size: .85rem; }
.settings li { padding: .1rem .6rem; border: 1px solid var(--line); border-radius: 1rem; background: var(--wash); }
.figures { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 1.4rem 0 0; }
.figures div { display: flex; flex-direction: column-reverse; }
.figures dt { font-size: .85rem; }
.figures dd { margin: 0; font-size: 1.65rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; min-width: 34rem; max-width: 56rem; height: auto; }
svg text { font: 11px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: var(--pale); }
.scroll { margin-top: .7rem; overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .65rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; }
th:first-child { padding-left: 0; text-align: left; }
.image { display: grid; grid-template-columns: 12rem minmax(0, 1fr); gap: .4rem 1.25rem; padding: 1rem 0;
  border-top: 1px solid var(--line); }
.image h3 { margin: 0 0 .3rem; font-size: 1rem; overflow-wrap: anywhere; }
.image dl { margin: 0; font-size: .88rem; }
.image dt { margin-top: .35rem; font-size: .8rem; }
.image dd { margin: 0; overflow-wrap: anywhere; }
.differs { color: var(--warn); }
.strip { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(8.5rem, 14rem); gap: .6rem;
  overflow-x: auto; }
figure { margin: 0; }
figcaption { margin-top: .15rem; font-size: .8rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
img { display: block; width: 100%; height: auto; outline: 1px solid rgba(0, 0, 0, .14); outline-offset: -1px; }
.rankings { display: flex; flex-wrap: wrap; gap: .5rem 2.5rem; }
.rankings > div { flex: 1 1 32rem; min-width: 0; }
.rankings h3 { margin: .6rem 0 0; font-size: .95rem; }
.ranking { display: grid; grid-template-columns: repeat(auto-fill, minmax(5.2rem, 1fr)); gap: .8rem .7rem;
  margin: .5rem 0 0; padding: 0; list-style: none; }
.ranking li { min-width: 0; font-size: .8rem; line-height: 1.35; }
.ranking .name { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.bar { display: block; height: 4px; margin: .35rem 0 .15rem; border-radius: 2px; background: var(--line); }
.bar span { display: block; height: 100%; border-radius: 2px; background: var(--accent); }
.heats .strip { grid-auto-columns: minmax(6rem, 8rem); }
footer { margin-top: 2.5rem; padding-top: .8rem; border-top: 1px solid var(--line); }
@media (max-width: 44rem) { .image { grid-template-columns: minmax(0, 1fr); } body { padding-top: 1.2rem; } }
@media print { .image { break-inside: avoid; } }
</style>
</head>
<body>
{% macro img(picture, alt) %}
<img src="{{ picture.source }}" width="{{ picture.width }}" height="{{ picture.height }}" alt="{{ alt }}">
{% endmacro %}
{% macro guess(guess) %}
<span title="{{ guess.full_label }}">{{ guess.label }}</span>
<span class="pale">{{ guess.score }}</span>
{% endmacro %}
<header>
<h1>{{ title }}</h1>
<p class="pale">{{ method }} on {{ model }}</p>
{% if settings %}
<ul class="settings" aria-label="Settings of {{ method }}">
{% for name, value in settings.items() %}
<li>{{ name }} <b>{{ value }}</b></li>
{% endfor %}
</ul>
{% endif %}
<dl class="figures">
<div><dt>of the multiply-adds of the layers</dt><dd>{{ "%.1f"|format(100 * share) }} %</dd></div>
<div><dt>of {{ maps.num_tokens }} tokens leave the last layer{{ ", on average" if adaptive }}</dt>
<dd>{{ "%.1f"|format(mean_counts[-1]) if adaptive else least_counts[-1] }}</dd></div>
{% if agreeing is not none %}
<div><dt>predictions are the same as the dense model's</dt><dd>{{ agreeing }} of {{ rows|length }}</dd></div>
{% else %}
<div><dt>{{ "image" if rows|length == 1 else "images" }}</dt><dd>{{ rows|length }}</dd></div>
{% endif %}
</dl>
</header>

<section id="tokens">
<h2>Tokens leaving each layer</h2>
<div class="scroll" tabindex="0" role="group" aria-label="Chart">
<svg viewBox="0 0 760 240" role="img" aria-label="Of {{ maps.num_tokens }} tokens, {{
"%.0f"|format(mean_counts[-1]) }} leave the last layer{{ ", on average" if adaptive }}">
{% for tick, y in chart.ticks %}
<line x1="{{ chart.left }}" x2="{{ chart.right }}" y1="{{ y }}" y2="{{ y }}" stroke="#e3e5e8"/>
<text x="{{ chart.left - 8 }}" y="{{ y + 4 }}" text-anchor="end">{{ tick }}</text>
{% endfor %}
{% for stage, x in chart.stages %}
<text x="{{ x }}" y="{{ chart.bottom + 17 }}" text-anchor="middle">{{ stage }}</text>
{% endfor %}
<text x="{{ (chart.left + chart.right) / 2 }}" y="{{ chart.bottom + 32 }}" text-anchor="middle">layer</text>
{% for line in chart.lines %}
<polyline class="one" points="{{ line.points }}" fill="none" stroke="#7d8896" stroke-opacity=".5"><title>{{
line.name }}: {{ line.tokens }} tokens after the last layer</title></polyline>
{% endfor %}
<polyline class="mean" points="{{ chart.mean.points }}" fill="none" stroke="#2463c5" stroke-width="2.5"
 stroke-linejoin="round"/>
<text x="{{ chart.right + 8 }}" y="{{ chart.mean.end + 4 }}" style="fill:#2463c5">{{
"mean %.1f"|format(chart.mean.tokens) if chart.lines else "%.0f, every image"|format(chart.mean.tokens) }}</text>
</svg></div>
<div class="scroll" tabindex="0" role="group" aria-label="Table"><table>
<tr><th scope="row">layer</th>{% for count in mean_counts %}<th scope="col">{{ loop.index0 }}</th>{% endfor %}</tr>
<tr><th scope="row">{{ "mean" if adaptive else "tokens" }}</th>
{% for count in mean_counts %}<td>{{ ("%.1f" if adaptive else "%.0f")|format(count) }}</td>{% endfor %}</tr>
{% if adaptive %}
<tr><th scope="row">fewest</th>{% for count in least_counts %}<td>{{ count }}</td>{% endfor %}</tr>
<tr><th scope="row">most</th>{% for count in most_counts %}<td>{{ count }}</td>{% endfor %}</tr>
{% endif %}
{% for label, values in thresholds.items() %}
<tr><th scope="row">{{ label }}</th>{% for value in values %}<td>{{ "%.3g"|format(value) }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
</section>

{% if ranking %}
<section id="ranking">
<h2>From the easiest image to the hardest</h2>
<p class="note">Images are sorted by the share of the dense model's multiply-adds that each of them took.</p>
<div class="rankings">
{% for label, entries in ranking.items() %}
<div>
{% if label %}
<h3>{{ label }}</h3>
{% endif %}
<ol class="ranking">
{% for entry in entries %}
<li>{{ img(entry.picture, entry.name ~ ": tokens after the last layer, " ~ entry.tokens ~ " left") -}}
<span class="bar"><span style="width:{{ "%.1f"|format(100 * entry.share) }}%"></span></span>
<span class="name" title="{{ entry.name }}">{{ entry.name }}</span>
<span class="pale">{{ "%.0f"|format(100 * entry.share) }} %<br>{{ entry.tokens }} tokens</span></li>
{% endfor %}
</ol>
</div>
{% endfor %}
</div>
</section>
{% endif %}

<section id="images">
<h2>What happened to the patches</h2>
<p class="note">
{% if heats %}
Tokens are mixtures of patches. Each patch is drawn as part of the token in which it weighs most. Patches of the same
token share their mean colour and an outline.
{% elif maps.gathers_the_rest() %}
Pale, flat areas show patches that were gathered into one token; otherwise they would have been dropped. Every other
patch is still a token of its own.
{% else %}
Faded patches were dropped. Patches that became one token share their mean colour and an outline. Every other patch is
still a token of its own.
{% endif %}
</p>
{% for row in rows %}
<article class="image">
<div>
<h3>{{ row.name }}</h3>
<dl>
{% if row.guess %}
<dt>reduced</dt><dd{% if row.dense and row.dense.decided != row.guess.decided %} class="differs"{% endif %}>{{
guess(row.guess) }}</dd>
{% endif %}
{% if row.dense %}
<dt>dense</dt><dd>{{ guess(row.dense) }}</dd>
{% endif %}
{% if adaptive %}
<dt>multiply-adds</dt><dd>{{ "%.0f"|format(100 * row.share) }} %</dd>
{% endif %}
</dl>
</div>
<div class="strip" tabindex="0" role="group" aria-label="Maps of {{ row.name }}">
<figure>{{ img(row.picture, row.name ~ ", as the model saw it") -}}
<figcaption>image<br>{{ maps.num_tokens }} tokens</figcaption></figure>
{% for map in row.maps %}
<figure>{{ img(map.picture, row.name ~ ": tokens after layer " ~ map.layer ~ ", " ~ map.tokens ~ " left") -}}
<figcaption>layer {{ map.layer }}<br>{{ map.tokens }} tokens</figcaption></figure>
{% endfor %}
</div>
</article>
{% endfor %}
</section>

{% if heats %}
<section id="mixtures" class="heats">
<h2>Patches in the last tokens</h2>
<p class="note">The pictures show the weight of each patch: first summed over all tokens, then in the tokens with the
largest single weights. Every picture has its own scale, from dark (no weight) to bright (the largest weight), by the
square root of the weight.</p>
{% for heat in heats %}
<article class="image">
<h3>{{ heat.name }}</h3>
<div class="strip" tabindex="0" role="group" aria-label="Weights of {{ heat.name }}">
<figure>{{ img(heat.total, heat.name ~ ": weight of each patch, all tokens together") -}}
<figcaption>all tokens</figcaption></figure>
{% for entry in heat.tokens %}
<figure>{{ img(entry.picture, heat.name ~ ": weight of each patch in token " ~ entry.token) -}}
<figcaption>token {{ entry.token }}</figcaption></figure>
{% endfor %}
</div>
</article>
{% endfor %}
</section>
{% endif %}

<footer class="note">
<p>Layers are counted from 0. Token counts include the class token and other prefix tokens, which are never merged or
dropped. Multiply-adds are those of the encoder's layers and of the method itself. Images are shown as the model saw
them.</p>
</footer>
</body>
</html>
"""
