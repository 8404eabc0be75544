
// The same prompt twice: with the stride, and at one token per step; every token coloured by how it came.
const SAID = {
  first: () => "from the prefill",
  accepted: (t) => `accepted draft at position ${t.position}`,
  salvaged: (t) => `accepted survivor of a rejection, at position ${t.position}`,
  corrected: (t) => `correction of the draft rejected at position ${t.position}`,
  bonus: (t) => `bonus behind ${t.position - 1} accepted ${t.position === 2 ? "draft" : "drafts"}`,
  cold: () => "of a step without drafts",
  single: () => "the step's only token",
};

class Lane {
  constructor(id) {
    this.root = $(id);
    this.answer = this.root.querySelector(".answer");
    this.count = this.root.querySelector(".count");
    this.detail = this.root.querySelector(".detail");
    this.answer.addEventListener("pointerover", (event) => this.choose(this.spans.indexOf(event.target)));
    this.answer.addEventListener("click", (event) => this.choose(this.spans.indexOf(event.target)));
    this.answer.addEventListener("keydown", (event) => this.walk(event));
    this.clear();
  }

  clear() {
    this.tokens = []; this.spans = []; this.queue = [];
    this.chosen = -1; this.steps = 0; this.end = null; this.problem = null;
    this.answer.replaceChildren();
    this.count.textContent = this.detail.textContent = "";
  }

  // One token, shown.
  show(token) {
    const span = element("span", `token ${token.origin}`, token.text);
    if (token.special) { span.textContent = token.text + token.special; span.classList.add("special"); }
    if (token.step > this.steps) { span.classList.add("begins"); this.steps = token.step; }
    if (token.origin === "accepted") span.style.setProperty("--ahead", Math.min(token.position, 6));
    span.title = this.said(token);
    this.tokens.push(token);
    this.spans.push(span);
    const follows = this.answer.scrollHeight - this.answer.scrollTop - this.answer.clientHeight < 40;
    this.answer.append(span);
    if (follows) this.answer.scrollTop = this.answer.scrollHeight;
  }

  // What has come: all of it, or one step.
  advance(wholly) {
    const step = this.queue.length ? this.queue[0].step : 0;
    while (this.queue.length && (wholly || this.queue[0].step === step)) this.show(this.queue.shift());
    if (!this.queue.length && this.end && this.end.rest) { this.answer.append(this.end.rest); this.end.rest = ""; }
    const behind = this.tokens.filter((t) => t.origin !== "first").length;
    const ratio = this.steps ? `, ${shown(behind / this.steps, 2)} per step` : "";
    if (this.tokens.length) this.count.textContent = `${this.steps} ${this.steps === 1 ? "step" : "steps"}, ${this.tokens.length} tokens${ratio}`;
  }

  get done() { return !this.queue.length && (this.end !== null || this.problem !== null); }

  said(token) {
    const where = token.step ? ` (step ${token.step})` : "";
    return `${SAID[token.origin](token)}${where}`;
  }

  choose(i) {
    if (i < 0 || i >= this.spans.length) return;
    if (this.chosen >= 0) this.spans[this.chosen].classList.remove("chosen");
    this.chosen = i;
    this.spans[i].classList.add("chosen");
    const token = this.tokens[i];
    this.detail.textContent = `token ${i + 1}, ${JSON.stringify(token.special || token.text)}: ${this.said(token)}`;
  }

  walk(event) {
    const to = { ArrowRight: this.chosen + 1, ArrowLeft: this.chosen - 1, Home: 0, End: this.spans.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.choose(Math.min(Math.max(to, 0), this.spans.length - 1));
    if (this.chosen >= 0) this.spans[this.chosen].scrollIntoView({ block: "nearest" });
  }

  // Ask the server, and queue what comes.
  async ask(body, signal) {
    try {
      const response = await fetch(address("idlm/decode"), { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });
      if (!response.ok) throw new Error(await refusal(response));
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (let part = await reader.read(); !part.done; part = await reader.read()) {
        const lines = (rest + part.value).split("\n");
        rest = lines.pop();
        for (const line of lines) this.take(JSON.parse(line));
      }
      if (this.end === null) throw new Error("the answer was cut off");
    } catch (problem) {
      this.problem = problem.name === "AbortError" ? "stopped" : problem instanceof TypeError ? "the server does not answer" : problem.message;
    }
  }

  take(event) {
    if (event.tokens) this.queue.push(...event.tokens);
    if (event.error) throw new Error(event.error.message);
    if (event.end) this.end = event.end;
    if (event.end && event.end.message) throw new Error(event.end.message);
  }
}

const lanes = [new Lane("strided"), new Lane("single")];
let running = null;

function verdict(text, bad) {
  $("verdict").className = bad ? "bad" : "";
  $("verdict").textContent = text;
}

function busy(is) {
  $("run").disabled = is;
  $("stop").disabled = !is;
}

function whole(id) {
  const text = $(id).value.trim();
  return text === "" ? undefined : Number(text);
}

async function run(event) {
  event?.preventDefault();
  if (running) return;
  const stopper = running = new AbortController();
  busy(true);
  const [strided, single] = lanes, stride = Number($("ask-stride").value) || undefined;
  const body = { prompt: $("prompt").value, mode: document.querySelector("[name=mode]:checked").value };
  body.max_tokens = whole("max-tokens");
  body.temperature = whole("temperature");
  body.seed = whole("seed");
  // Both lanes draw with the same noise: then they say the same.
  if (body.temperature > 0 && body.seed === undefined) body.seed = Math.floor(Math.random() * 2 ** 32);
  lanes.forEach((lane) => lane.clear());
  strided.root.querySelector(".name").textContent = stride ? `stride ${stride}` : "the server's stride";
  verdict(body.temperature > 0 ? `decoding, seed ${body.seed}` : "decoding, greedy");
  const asked = Promise.all([strided.ask({ ...body, stride }, stopper.signal), single.ask({ ...body, stride: 1 }, stopper.signal)]);
  await Promise.all([asked, play(stopper.signal)]);
  lanes.forEach((lane) => lane.advance(true));
  conclude(strided, single, body);
  running = null;
  busy(false);
}

// Show what has come: at once, or a step of both lanes at a time.
function play(signal) {
  return new Promise((resolve) => {
    const next = () => {
      const pace = signal.aborted ? 0 : Number($("pace").value);
      lanes.forEach((lane) => lane.advance(!pace));
      if (lanes.every((lane) => lane.done)) return resolve();
      setTimeout(next, pace ? 1000 / pace : 40);
    };
    next();
  });
}

function conclude(strided, single, body) {
  const problem = [strided, single].map((lane) => lane.problem).find((text) => text !== null);
  if (problem !== undefined) return verdict(problem, problem !== "stopped");
  const ids = lanes.map((lane) => lane.tokens.map((t) => t.id)), length = Math.min(ids[0].length, ids[1].length);
  let same = 0;
  while (same < length && ids[0][same] === ids[1][same]) same++;
  const with_ = body.temperature > 0 ? `, seed ${body.seed}` : "";
  if (same < Math.max(ids[0].length, ids[1].length)) return verdict(`the answers part at token ${same + 1}${with_}`, true);
  const fewer = strided.steps ? `: ${strided.steps} steps in place of ${single.steps}` : "";
  verdict(`the same ${same} tokens${fewer}${with_}`);
}

$("ask").addEventListener("submit", run);
$("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target === $("prompt")) run(event);
});
if (matchMedia("(prefers-reduced-motion: reduce)").matches) $("pace").value = "0";
