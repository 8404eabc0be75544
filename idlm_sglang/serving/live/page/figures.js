
// The server's counters over the last minutes: sums since its start, from which rates are made here.
const LATEST = 5; // seconds that the large figures stand for
let samples = [];
let startedAt = null;

async function poll() {
  if (document.hidden) return setTimeout(poll, 1000);
  let wait = samples.length ? 2000 : 500;
  try {
    const newest = samples.length ? samples[samples.length - 1].time : 0;
    const response = await fetch(address(`idlm/stats?since=${newest}`), { cache: "no-store" });
    if (!response.ok) throw new Error(await refusal(response));
    const body = await response.json();
    if (body.started !== startedAt) { samples = []; if (startedAt !== null) { startedAt = null; return setTimeout(poll, 0); } }
    startedAt = body.started;
    samples.push(...body.samples);
    while (samples.length && samples[samples.length - 1].time - samples[0].time > body.kept) samples.shift();
    about(body);
    draw();
  } catch (problem) {
    wait = 3000;
    condition(false, problem instanceof TypeError ? "the server does not answer" : problem.message);
  }
  setTimeout(poll, wait);
}

function condition(good, text) {
  $("state").className = good ? "live" : "bad";
  if ($("state-text").textContent !== text) $("state-text").textContent = text;
}

function about(body) {
  $("model").textContent = body.model;
  document.title = `idlm live: ${body.model}`;
  const choice = $("ask-stride");
  if (choice.options.length !== body.max_stride) {
    const last = samples.length ? Math.max(...samples[samples.length - 1].strides) : body.max_stride;
    choice.replaceChildren();
    for (let n = 1; n <= body.max_stride; n++) choice.append(new Option(String(n), String(n), false, n === last));
  }
}

const total = (list) => Object.values(list).reduce((a, b) => a + b, 0);
const minus = (a, b) => a.map((x, i) => x - (b[i] || 0));

// The first and the last sample of the last `seconds`.
function span(seconds) {
  const last = samples[samples.length - 1];
  const first = samples.find((s) => last.time - s.time <= seconds) || last;
  return [first === last ? samples[Math.max(samples.length - 2, 0)] : first, last];
}

function ratios(a, b) {
  const rounds = total(b.rounds) - total(a.rounds), tokens = b.tokens_committed - a.tokens_committed, time = b.time - a.time;
  return { time: b.time, rate: time > 0 ? tokens / time : NaN, tpf: rounds > 0 ? tokens / rounds : NaN };
}

function draw() {
  if (!samples.length) return condition(true, "no figures yet");
  const last = samples[samples.length - 1];
  // As much of the time asked for as is known.
  const window_ = Math.max(Math.min(Number($("window").value), last.time - samples[0].time), 30);
  const [from] = span(window_), kept = samples.filter((s) => s.time >= last.time - window_);
  const [before] = span(LATEST), latest = ratios(before, last);
  condition(true, `live${last.replicas > 1 ? `, ${last.replicas} replicas` : ""}`);
  const steps = kept.slice(1).map((s, i) => ratios(kept[i], s));
  $("rate").textContent = shown(latest.rate, latest.rate < 100 ? 1 : 0);
  $("tpf").textContent = shown(latest.tpf, 2);
  plot("rate-chart", steps.map((s) => [s.time, s.rate]), last.time, window_, 0);
  plot("tpf-chart", steps.map((s) => [s.time, s.tpf]), last.time, window_, 1);
  $("load").textContent = `${last.running} / ${last.queued}`;
  plot("load-chart", kept.map((s) => [s.time, s.running]), last.time, window_, 0, kept.map((s) => [s.time, s.queued]));
  $("stride").replaceChildren(last.strides.join(", "), last.auto ? element("small", "", " auto") : "");
  plot("stride-chart", kept.map((s) => [s.time, Math.max(...s.strides)]), last.time, window_, 0);
  drawAcceptance(from, last);
  drawPhases(from, last);
}

const SVG = "http://www.w3.org/2000/svg";

function svg(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

// A line over time; gaps where a value is not defined.
function plot(id, points, now, seconds, digits, second) {
  const place = $(id), values = [...points, ...(second || [])].map((p) => p[1]).filter(Number.isFinite);
  const top = Math.max(...values, 1e-9), x = (t) => ((t - now + seconds) / seconds * 300).toFixed(1), y = (v) => (58 - v / top * 54).toFixed(1);
  const path = (list) => {
    let d = "", open = false;
    for (const [t, v] of list) {
      if (Number.isFinite(v)) d += `${open ? "L" : "M"}${x(t)} ${y(v)}`;
      open = Number.isFinite(v);
    }
    return d;
  };
  const drawing = svg("svg", { viewBox: "0 0 300 60", preserveAspectRatio: "none", class: "plot", "aria-hidden": "true" });
  drawing.append(svg("line", { x1: 0, x2: 300, y1: 58, y2: 58, class: "base" }));
  const whole = points.filter((p) => Number.isFinite(p[1]));
  if (whole.length > 1 && whole.length === points.length) drawing.append(svg("path", { class: "area", d: `${path(whole)}L${x(whole[whole.length - 1][0])} 58L${x(whole[0][0])} 58Z` }));
  drawing.append(svg("path", { class: "line", d: path(points) }));
  if (second) drawing.append(svg("path", { class: "line second", d: path(second) }));
  const axis = element("div", "axis");
  axis.append(element("span", "", seconds < 100 ? `${shown(seconds, 0)} s ago` : `${shown(seconds / 60, 1)} min ago`), element("span", "", values.length ? `up to ${shown(Math.max(...values), digits)}` : "nothing yet"), element("span", "", "now"));
  place.replaceChildren(drawing, axis);
}

function bar(share, kind) {
  const track = element("span", "track"), fill = element("span", `fill ${kind}`);
  fill.style.width = `${(100 * Math.min(Math.max(share, 0), 1)).toFixed(1)}%`;
  track.append(fill);
  return track;
}

function drawAcceptance(from, last) {
  const sums = {};
  for (const name of ["drafts_proposed", "drafts_accepted", "salvage_proposed", "salvage_accepted"]) sums[name] = minus(last[name], from[name]);
  const rows = [];
  sums.drafts_proposed.forEach((proposed, i) => {
    const survived = sums.salvage_proposed[i];
    if (!proposed && !survived) return;
    const tracks = element("span"), said = [];
    for (const [kind, tried, stood] of [["accepted", proposed, sums.drafts_accepted[i]], ["salvaged", survived, sums.salvage_accepted[i]]]) {
      if (!tried) continue;
      tracks.append(bar(stood / tried, kind));
      said.push(`${shown(100 * stood / tried, 0)} %`);
    }
    rows.push(element("span", "label", String(i + 1)), tracks, element("span", "value", said.join(" · ")));
  });
  $("acceptance").replaceChildren(...(rows.length ? rows : [element("span", "none", "no drafts verified in this time")]));
}

const PHASES = { prepare: "before the forward", forward: "forward", choose: "verify, next drafts", process: "results, answers" };

function drawPhases(from, last) {
  const steps = last.timed_steps - from.timed_steps, rows = [];
  const of = (phase) => (last.step_seconds[phase] || 0) - (from.step_seconds[phase] || 0);
  const sum = Object.keys(PHASES).reduce((a, phase) => a + of(phase), 0);
  if (steps > 0 && sum > 0) {
    for (const [phase, name] of Object.entries(PHASES)) rows.push(element("span", "label", name), bar(of(phase) / sum, ""), element("span", "value", shown(1000 * of(phase) / steps, 2)));
    rows.push(element("span", "label", "a step"), element("span", "", ""), element("span", "value", shown(1000 * sum / steps, 2)));
  }
  $("phases").replaceChildren(...(rows.length ? rows : [element("span", "none", "no decode steps in this time")]));
}

$("window").addEventListener("change", draw);
document.addEventListener("visibilitychange", () => { if (!document.hidden) draw(); });
poll();
