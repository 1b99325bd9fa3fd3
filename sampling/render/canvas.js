"use strict";

const LEAST = [0, 0.5, 0.7, 0.9, 0.99];  // probabilities at which a colour begins
const END = "∎", UNUSED = "·", BREAK = "↵";  // of sequence; behind the end; of a line

function make(tag, parent, className = "", text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  parent.append(element);
  return element;
}

/* Control characters and marks of direction as escapes; the signs of `marks` in place of some. */
function escaped(text, marks) {
  return text.replace(/[\p{Cc}\p{Cs}\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/gu, (character) =>
    marks[character] ?? "\\u" + character.codePointAt(0).toString(16).padStart(4, "0"));
}

const visible = (text) => escaped(text, { "\n": BREAK, "\t": "⇥" });
const shownText = (text) => escaped(text, { "\n": "\n", "\t": "\t" });

/* Explains the colours and signs. */
function diffusionLegend(parent) {
  const list = make("ul", parent, "legend");
  const entry = (className, text, sign = "") => {
    const item = make("li", list);
    make("i", item, className, sign);
    item.append(text);
  };
  LEAST.forEach((least, i) => entry(`p${i}`, i ? `from ${100 * least} %` : `probability below ${100 * LEAST[1]} %`));
  entry("masked", "masked");
  entry("p4 fresh", "committed by this step");
  entry("again", "was masked again");
  entry("sign", "end of sequence", END);
  entry("sign", "behind the end", UNUSED);
  entry("sign", "line break", BREAK);
}

/* Shows the steps of a recording in an element. Texts of the model only become text nodes and attributes. */
function diffusionViewer(root, header) {
  const canvases = [Array(header.length).fill({})], steps = [], ends = new Set(header.ends);
  let shown = 0, selected = null, timer = null, ended = false;

  for (const token of header.given) canvases[0][token.position] = { text: token.text, id: token.id };

  const body = make("div", root);
  const field = make("div", body, "canvas");
  field.setAttribute("role", "group");
  field.setAttribute("aria-label", "canvas: left and right go from token to token");
  const inspector = make("div", body, "inspector");
  const controls = make("div", body, "controls");
  const play = make("button", controls, "", "Play");
  play.type = "button";
  const slider = make("input", controls);
  Object.assign(slider, { type: "range", min: 0, max: 0, value: 0 });
  slider.setAttribute("aria-label", "step");
  const count = make("span", controls, "count");
  const label = make("label", controls, "numbers"), box = make("input", label);
  box.type = "checkbox";
  label.append("step of each token");

  const cells = canvases[0].slice(header.prompt_length).map((_, i) => {
    const cell = make("span", field, "cell"), end = make("span", field, "break");
    cell.tabIndex = i ? -1 : 0;
    cell.dataset.position = i + header.prompt_length;
    return { cell, end, drawn: null };
  });

  function after(canvas, step, number) {
    const next = canvas.slice();
    for (const position of step.remasked) next[position] = { again: (canvas[position].again ?? 0) + 1 };
    for (const { position, ...token } of step.committed) {
      next[position] = { ...token, step: number, again: next[position].again };
    }
    for (const position of step.unused) next[position] = { unused: true };
    for (const { position, text } of step.texts) next[position] = { ...next[position], text };
    return next;
  }

  function draw(place, i) {
    const position = i + header.prompt_length, token = canvases[shown][position];
    const final = canvases.at(-1)[position];  // a mask is as wide as its token will be: lines stay where they are
    const masked = token.text === undefined && !token.unused, text = (masked ? final.text : token.text) ?? "";
    const fresh = token.step !== undefined && token.step === shown;
    const key = [token, final, fresh];
    if (place.drawn?.every((each, n) => each === key[n])) return;
    place.drawn = key;
    const { cell, end } = place, special = !masked && ends.has(token.id);
    const level = LEAST.findLastIndex((least) => token.prob >= least);
    cell.textContent = token.unused ? UNUSED : special ? END : visible(text) || (masked ? "  " : "");
    cell.className = ["cell", masked && "masked", token.unused && "unused", special && "special", fresh && "fresh",
      token.again && "again", token.step ? `p${level}` : !masked && !token.unused && "given"].filter(Boolean).join(" ");
    if (token.step) cell.dataset.step = token.step;
    else delete cell.dataset.step;
    cell.setAttribute("aria-label", describe(position));
    end.hidden = !text.includes("\n");
  }

  function describe(position) {
    const token = canvases[shown][position], again = token.again ? ` · masked again ${token.again}×` : "";
    const place = `position ${position}`;
    if (token.unused) return `${place} · behind the end, not used`;
    if (token.text === undefined) return `${place} · masked${again}`;
    if (token.step === undefined) return `${place} · given · id ${token.id}`;
    const entropy = token.entropy === null ? "" : ` · entropy ${token.entropy.toPrecision(3)} nats`;
    return `step ${token.step} · probability ${token.prob.toPrecision(3)}${entropy} · ${place} · id ${token.id}${again}`;
  }

  function inspect() {
    inspector.replaceChildren();
    if (selected === null) {
      inspector.textContent = "Point at a token, or go to one by Tab and the arrow keys. Space plays.";
      return;
    }
    const { text } = canvases[shown][selected];
    if (text !== undefined) make("b", inspector, "", visible(text) || "(part of the character before)");
    inspector.append(text === undefined ? "" : "  ", describe(selected));
  }

  function show(number) {
    shown = Math.min(Math.max(number, 0), steps.length);
    slider.max = steps.length;
    slider.value = shown;
    cells.forEach(draw);
    const nfe = shown ? steps[shown - 1].nfe : 0;
    count.textContent = `step ${shown}${ended ? ` of ${steps.length}` : ""} · nfe ${nfe}`;
    slider.setAttribute("aria-valuetext", count.textContent);
    inspect();
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  }

  function toggle() {
    if (timer !== null) return stop();
    if (shown === steps.length) show(0);
    play.textContent = "Pause";
    timer = setInterval(() => {
      show(shown + 1);
      if (shown === steps.length) stop();
    }, Math.min(Math.max(6000 / steps.length, 50), 500));
  }

  function select(target) {
    const cell = target.closest?.(".cell");
    if (!cell) return;
    selected = Number(cell.dataset.position);
    inspect();
  }

  function focus(position) {
    const place = cells[position - header.prompt_length];
    if (!place) return;
    cells.forEach(({ cell }) => { cell.tabIndex = -1; });
    place.cell.tabIndex = 0;
    place.cell.focus();
  }

  function key(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === " " && !event.target.matches?.("button, input[type=checkbox], summary, textarea, select")) toggle();
    else if (move && field.contains(event.target)) focus(selected + move);
    else if (move && !event.target.matches?.("input, textarea, select")) { stop(); show(shown + move); }
    else return;
    event.preventDefault();
  }

  box.addEventListener("change", () => body.classList.toggle("numbered", box.checked));
  play.addEventListener("click", toggle);
  slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
  field.addEventListener("pointerover", (event) => select(event.target));
  field.addEventListener("click", (event) => select(event.target));
  field.addEventListener("focusin", (event) => select(event.target));
  show(0);
  return {
    show, toggle, key,
    /* Appends steps, and shows the last one if that of before was shown. */
    add(...added) {
      const follows = shown === steps.length;
      for (const step of added) {
        steps.push(step);
        canvases.push(after(canvases.at(-1), step, steps.length));
      }
      show(follows ? steps.length : shown);
    },
    /* Tells that no step follows. */
    end() { ended = true; show(shown); },
  };
}
