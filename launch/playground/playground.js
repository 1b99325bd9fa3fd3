/* Shows the runs of the component's value, and goes on as their steps arrive. */
const view = document.createElement("div");
view.className = "diffusion results";
element.append(view);
let drawn = { id: -1, runs: [] };

function draw(value) {
  for (const { url } of drawn.runs) URL.revokeObjectURL(url);
  view.replaceChildren();
  for (const { role, content } of value.turns) {
    const turn = make("div", view, "turn");
    make("b", turn, "", role);
    turn.append(shownText(content));
  }
  const message = make("p", view, "message");
  message.setAttribute("role", "status");
  const grid = make("div", view, "runs");
  const link = make("p", view, "facts link");
  drawn = { id: value.id, message, grid, link, runs: [], legend: false, note: "" };
}

function drawRun(run) {
  const box = make("section", drawn.grid, "run");
  if (run.label) make("h3", box, "", run.label);
  const facts = make("p", box, "facts");
  const viewer = diffusionViewer(box, JSON.parse(run.header));
  box.addEventListener("keydown", viewer.key);
  return { viewer, box, facts, count: 0, done: false, url: "" };
}

function finish(place, { result, page }) {
  place.done = true;
  place.viewer.end();
  const speed = (result.tokens / Math.max(result.seconds, 1e-9)).toPrecision(3);
  const facts = [`${result.tokens} tokens`, `nfe ${result.nfe}`,
    `${result.tokens_per_forward.toFixed(2)} tokens a forward`, `${Number(speed)} tokens/s`];
  place.facts.replaceChildren();
  for (const fact of facts) make("span", place.facts, "", fact);
  const details = make("details", place.box, "text");
  make("summary", details, "", "Text");
  make("pre", details, "", shownText(result.text));
  const save = make("a", place.box, "export", "export as HTML");
  save.download = "sampling.html";
  save.href = place.url = URL.createObjectURL(new Blob([page], { type: "text/html" }));
}

function update() {
  const value = props.value;
  if (!element.contains(view)) element.append(view);
  if (value.id > drawn.id) draw(value);
  const left = value.id < drawn.id, text = props.status || (left ? drawn.note : value.message);
  drawn.message.textContent = shownText(text);
  drawn.message.hidden = !text;
  if (left) return;
  value.runs.forEach((run, i) => {
    const place = (drawn.runs[i] ??= drawRun(run));
    const steps = run.steps.slice(place.count).map((line) => JSON.parse(line));
    place.count += steps.length;
    place.viewer.add(...steps);
    if (run.result && !place.done) finish(place, run);
    if (!run.result) place.facts.textContent = run.before ? `waiting for ${run.before} other …` : "sampling …";
  });
  if (value.runs.length && !drawn.legend) {
    drawn.legend = true;
    const legend = make("div", view);
    view.insertBefore(legend, drawn.link);
    diffusionLegend(legend);
  }
  if (value.link && !drawn.link.firstChild) {
    make("a", drawn.link, "", "Link to this prompt and these settings").href = value.link;
  }
}

/* The user leaves a run here, not by a value of the server: a draft that is on its way could replace that. */
function leave(change) {
  update();
  change(Math.floor(drawn.id) + 0.5);  // above the id of the run's drafts, below that of the next run
  update();
}

function stop(id) {
  Object.assign(drawn, { id, note: "stopped" });
  for (const { done, facts, count } of drawn.runs) if (!done) facts.textContent = `stopped at step ${count}`;
}

const clear = (id) => draw({ id, turns: [] });

document.addEventListener("click", ({ target }) => {
  if (target.closest("#stop:enabled")) leave(stop);
  if (target.closest("#forget")) leave(clear);
});
document.addEventListener("change", ({ target }) => { if (target.closest("#mode")) leave(clear); });

let waits = false;
watch(["value", "status"], () => {  // drafts that come within a frame are drawn once
  if (!waits) requestAnimationFrame(() => { waits = false; update(); });
  waits = true;
});
update();
