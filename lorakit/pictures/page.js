"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const number = (value) => (typeof value === "number" ? Number(value.toPrecision(3)).toString() : "–");
const picture = (src, alt) => Object.assign(new Image(), { src, alt });
const make = (tag, properties, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

// ---- #slider, #play and the keys over `count` pictures; #speed and #pingpong where the page has them ----

function reel(count, show, { pauses = () => false } = {}) {
  let current = -1, timer = null, direction = 1;
  const back = () => $("pingpong")?.checked ?? false;

  function go(i) {
    i = Math.max(0, Math.min(count - 1, i));
    if (i === current) return;
    const before = current;
    current = i;
    $("slider").value = i;
    show(i, before);
    $("slider").setAttribute("aria-valuetext", $("readout").textContent);
  }
  function play(on) {
    clearTimeout(timer);
    timer = null;
    $("play").textContent = on ? "Pause" : "Play";
    if (!on || count < 2) return;
    if (!back()) direction = 1;
    timer = setTimeout(() => {
      if (!back()) go((current + 1) % count);
      else {
        if (current + direction < 0 || current + direction >= count) direction = -direction;
        go(current + direction);
      }
      play(true);
    }, 1000 / ($("speed")?.value ?? 2) + (pauses(current) ? 300 : 0));
  }
  function move(i) {
    play(false);
    go(i);
  }

  $("slider").max = count - 1;
  $("slider").addEventListener("input", (event) => move(Number(event.target.value)));
  $("play").addEventListener("click", () => play(timer === null));
  document.addEventListener("keydown", (event) => {
    const target = event.target;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    // What has the focus keeps the keys that it understands: a button the space, a slider the arrows.
    const takesSpace = target.closest?.("button, summary, a, input:not(#slider), select");
    const takesArrows = target.closest?.("[type=range], [type=radio], select, pre");
    if (event.key === " " ? takesSpace : takesArrows) return;
    const action = { ArrowLeft: () => move(current - 1), ArrowRight: () => move(current + 1),
      Home: () => move(0), End: () => move(count - 1), " ": () => play(timer === null) }[event.key];
    if (action) {
      event.preventDefault();
      action();
    }
  });
  return { move, at: () => current };
}

// ---- curves in a section that has an svg and a .value ----

// `lines` are {kind, points: [[x, y], …], dots}; `tell(x)` says what is there, `pick(x)` goes there, `at()` is
// where the page is. Returns a function that draws the mark anew.
function chart(section, { lines, least, last, tell, pick, at, name, shown = String }) {
  const svg = section.querySelector("svg"), told = section.querySelector(".value");
  lines = lines.map((line) => ({ ...line, points: line.points.filter(([, y]) => typeof y === "number") }))
    .filter((line) => line.points.length);
  section.hidden = !lines.length;
  if (!lines.length) return () => {};
  const left = 48, right = 10, top = 8, bottom = 22, height = 170;
  const values = lines.flatMap((line) => line.points.map(([, y]) => y));
  const most = Math.max(...values), low = least ?? Math.min(...values);
  const high = low + ((most - low) * 1.08 || 1);
  let width = 0;
  const x = (value) => left + (width - left - right) * (value / Math.max(1, last));
  const y = (value) => top + (height - top - bottom) * (1 - (value - low) / (high - low));
  const under = (event) => {
    const place = event.clientX - svg.getBoundingClientRect().left;
    return Math.max(0, Math.min(last, ((place - left) / (width - left - right)) * last));
  };
  const mark = () => {
    const line = svg.querySelector(".mark");
    line?.setAttribute("x1", x(at()));
    line?.setAttribute("x2", x(at()));
    told.textContent = tell(at());
  };
  const draw = () => {
    width = svg.clientWidth;
    let parts = "";
    for (const value of [low, (low + high) / 2, most])
      parts += `<line class="grid" x1="${left}" x2="${width - right}" y1="${y(value)}" y2="${y(value)}"/>
        <text x="${left - 6}" y="${y(value) + 4}" text-anchor="end">${Number(value.toPrecision(3))}</text>`;
    const most_ticks = Math.max(2, width / 56);
    const every = [1, 2, 5, 10].map((n) => n * 10 ** Math.max(0, Math.floor(Math.log10(last / most_ticks))))
      .find((step) => last / step <= most_ticks) ?? 1;
    for (let i = 0; i <= last; i += every)
      parts += `<text x="${x(i)}" y="${height - 5}" text-anchor="middle">${i}</text>`;
    for (const { kind, points, dots } of lines) {
      const places = points.map(([px, py]) => [x(px).toFixed(1), y(py).toFixed(1)]);
      parts += `<polyline class="${kind}" points="${places.join(" ")}"/>`;
      for (const [px, py] of dots ? places : [])
        parts += `<circle class="${kind}-dot" cx="${px}" cy="${py}" r="3"/>`;
    }
    svg.innerHTML = parts + `<line class="mark" y1="${top}" y2="${height - bottom}"/>`;
    mark();
  };
  const spoken = lines.map((line) => line.points.slice(0, 100).map(([, py]) => number(py)).join(", "));
  svg.setAttribute("aria-label", `${name}: ${spoken.join("; ")}`);
  svg.addEventListener("pointermove", (event) => {
    told.textContent = tell(under(event));
    if (event.buttons) pick(under(event));
  });
  svg.addEventListener("pointerdown", (event) => pick(under(event)));
  svg.addEventListener("pointerleave", mark);
  new ResizeObserver(draw).observe(svg);
  return mark;
}

// ---- two pictures of one shape, with a line between them to draw ----

function divider(before, after, labels) {
  before.className = "before";
  after.className = "after";
  const range = make("input", { type: "range", min: 0, max: 100, step: "any", value: 50 });
  range.setAttribute("aria-label", `${labels[0]} and ${labels[1]}`);
  const box = make("div", { className: "divider" }, before, after, range, ...labels.map((text) =>
    make("span", { textContent: text })));
  range.addEventListener("input", () => box.style.setProperty("--at", `${range.value}%`));
  return box;
}

// ---- commands that a button copies ----

function command(text) {
  return make("div", { className: "command" }, make("pre", { textContent: text, tabIndex: 0 }),
    make("button", { type: "button", textContent: "Copy" }));
}

async function copy(block, button) {
  const text = block.textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch { // a browser that gives files no clipboard
    getSelection().selectAllChildren(block);
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest?.(".command button");
  if (button) copy(button.parentElement.querySelector("pre"), button);
});
