const [wide, high] = data.size; // of the picture; what is done here is in pixels of the page's, `scale` times those
const canvas = $("canvas"), screen = canvas.getContext("2d");
const base = new Image(), painted = make("canvas", {}), brush = painted.getContext("2d", { willReadFrequently: true });
let scale = 1, pixels = null, actions = [], pending = null, stroke = null, moved = null, asked = false;

const tool = () => document.querySelector("[name=tool]:checked").value;
const ways = () => actions.filter((action) => action.way).map((action) => action.way);
const hasMask = () => actions.some((action) => action.mask || (action.stroke && !action.stroke.erase));
const distance = ([a, b], [c, d]) => Math.hypot(a - c, b - d);
const round = (value) => Math.round(10 * value) / 10;

// ---- the mask: white strokes on black, made anew by every undo ----

function paint({ places, radius, erase }) {
  brush.strokeStyle = brush.fillStyle = erase ? "#000" : "#fff";
  brush.lineWidth = 2 * radius;
  brush.lineCap = brush.lineJoin = "round";
  brush.beginPath();
  places.forEach(([x, y]) => brush.lineTo(x, y));
  brush.stroke();
  if (places.length === 1) {
    brush.beginPath();
    brush.arc(...places[0], radius, 0, 2 * Math.PI);
    brush.fill();
  }
}

function repaint() {
  brush.fillStyle = "#000";
  brush.fillRect(0, 0, painted.width, painted.height);
  for (const action of actions) {
    if (action.mask) brush.drawImage(action.mask, 0, 0, painted.width, painted.height);
    if (action.stroke) paint(action.stroke);
  }
}

// Float, 0 to 1; without a mask anything may change.
function inside() {
  const found = new Uint8Array(painted.width * painted.height).fill(1);
  if (!hasMask()) return found;
  const values = brush.getImageData(0, 0, painted.width, painted.height).data;
  return found.map((_, i) => values[4 * i] >= 128);
}

// ---- the pixels moved, as drag.py moves them: lorakit/pictures/warping.py ----

const SOFT = 1.5;
const disc = (i, [x, y], radius, width) => Math.min(1, Math.max(0,
  (radius + SOFT - Math.hypot((i % width) + 0.5 - x, Math.floor(i / width) + 0.5 - y)) / SOFT));

function at(values, x, y, width, height, channel) {
  x = Math.min(width - 1, Math.max(0, x));
  y = Math.min(height - 1, Math.max(0, y));
  const left = Math.floor(x), top = Math.floor(y), right = Math.min(left + 1, width - 1);
  const low = Math.min(top + 1, height - 1), a = x - left, b = y - top;
  const of = (column, row) => values[4 * (row * width + column) + channel];
  return (1 - b) * ((1 - a) * of(left, top) + a * of(right, top)) + b * ((1 - a) * of(left, low) + a * of(right, low));
}

// From the rim, harmonic: by turns on the two colours of a chessboard, over-relaxed.
function fill(values, hole, width, height) {
  const cells = [...hole.keys()].filter((i) => hole[i]);
  if (!cells.length) return;
  const [least, most] = cells.reduce(([a, b], i) => [Math.min(a, i % width), Math.max(b, i % width)], [width, 0]);
  const side = Math.max(most - least, (cells.at(-1) - cells[0]) / width) + 3;
  const around = (i) => [i % width ? i - 1 : i, (i + 1) % width ? i + 1 : i, i >= width ? i - width : i,
    i + width < width * height ? i + width : i];
  const rim = cells.flatMap(around).filter((i) => !hole[i]);
  const omega = 2 / (1 + Math.sin(Math.PI / side));
  const turns = [0, 1].map((colour) => cells.filter((i) => ((i % width) + Math.floor(i / width)) % 2 === colour)
    .map((i) => [i, around(i)]));
  for (let channel = 0; channel < 3; channel++) {
    const mean = rim.reduce((sum, i) => sum + values[4 * i + channel], 0) / Math.max(1, rim.length);
    for (const i of cells) values[4 * i + channel] = mean;
    for (let k = 0; k < 100; k++)
      for (const turn of turns)
        for (const [i, [a, b, c, d]] of turn) {
          const value = (values[4 * a + channel] + values[4 * b + channel] + values[4 * c + channel] +
            values[4 * d + channel]) / 4;
          values[4 * i + channel] += omega * (value - values[4 * i + channel]);
        }
  }
}

function movedPixels(radius, mask, width, height) {
  const found = Float32Array.from(pixels), own = ways();
  const hole = new Uint8Array(width * height);
  for (let i = 0; i < hole.length; i++) hole[i] = mask[i] && own.some(({ handle }) => disc(i, handle, radius, width));
  fill(found, hole, width, height);
  for (const { handle, target } of own)
    for (let i = 0; i < hole.length; i++) {
      const share = mask[i] * disc(i, target, radius, width);
      for (let channel = 0; share && channel < 3; channel++) {
        const value = at(pixels, (i % width) - target[0] + handle[0],
          Math.floor(i / width) - target[1] + handle[1], width, height, channel);
        found[4 * i + channel] += share * (value - found[4 * i + channel]);
      }
    }
  return found;
}

// How far each pixel lies from the nearest one outside, in steps along and across; the picture's rim is none.
function toEdge(mask, width, height) {
  const all = mask.every(Boolean), far = Float32Array.from(mask, (value) => (value ? 1e9 : 0));
  const step = (i, dx, dy) => {
    const x = (i % width) + dx, y = Math.floor(i / width) + dy;
    const here = x >= 0 && x < width && y >= 0 && y < height;
    const value = here ? far[y * width + x] : all ? -1 : 1e9;
    far[i] = Math.min(far[i], value + Math.hypot(dx, dy));
  };
  for (let i = 0; i < far.length; i++) [[-1, 0], [-1, -1], [0, -1], [1, -1]].forEach((by) => step(i, ...by));
  for (let i = far.length - 1; i >= 0; i--) [[1, 0], [1, 1], [0, 1], [-1, 1]].forEach((by) => step(i, ...by));
  return far;
}

function stretchedPixels(mask, width, height) {
  const found = Float32Array.from(pixels), own = ways(), edge = toEdge(mask, width, height);
  for (let i = 0; i < edge.length; i++) {
    if (!mask[i] || edge[i] <= 0) continue;
    const x = i % width, y = Math.floor(i / width);
    const away = own.map(({ target }) => Math.hypot(x + 0.5 - target[0], y + 0.5 - target[1]) + 1e-6);
    const all = away.reduce((sum, d) => sum + d ** -2, 0);
    let dx = 0, dy = 0;
    own.forEach(({ handle, target }, k) => {
      const share = (edge[i] / (edge[i] + away[k])) * (away[k] ** -2 / all);
      dx += share * (target[0] - handle[0]);
      dy += share * (target[1] - handle[1]);
    });
    for (let channel = 0; channel < 3; channel++)
      found[4 * i + channel] = at(pixels, x - dx, y - dy, width, height, channel);
  }
  return found;
}

function preview() {
  moved = null;
  if (!$("preview").checked || !ways().length) return;
  const { width, height } = canvas, mask = inside();
  const found = $("kind").value === "move" ? movedPixels(radius() * scale, mask, width, height)
    : stretchedPixels(mask, width, height);
  moved = new ImageData(Uint8ClampedArray.from(found), width, height);
}

// ---- what is seen ----

const radius = () => Number($("radius").value);

function draw() {
  const { width, height } = canvas;
  screen.drawImage(base, 0, 0, width, height);
  if (moved) screen.putImageData(moved, 0, 0);
  if (hasMask() || stroke) { // what is kept lies in the shade
    const shade = brush.getImageData(0, 0, width, height);
    for (let i = 0; i < shade.data.length; i += 4) {
      shade.data[i + 3] = shade.data[i] >= 128 ? 0 : 120;
      shade.data[i] = shade.data[i + 1] = shade.data[i + 2] = 0;
    }
    const layer = make("canvas", { width, height });
    layer.getContext("2d").putImageData(shade, 0, 0);
    screen.drawImage(layer, 0, 0);
  }
  const thick = Math.max(1.5, Math.min(width, height) / 250);
  const line = (colour, draw_path) => {
    for (const [style, extra] of [["#fff", 2], [colour, 0]]) {
      screen.strokeStyle = style;
      screen.lineWidth = thick + extra;
      screen.beginPath();
      draw_path();
      screen.stroke();
    }
  };
  const ring = (place, r, colour) => line(colour, () => screen.arc(...place, r, 0, 2 * Math.PI));
  for (const { handle, target } of pending ? [...ways(), pending] : ways()) {
    if (target) {
      line("#1f6feb", () => { screen.moveTo(...handle); screen.lineTo(...target); });
      ring(target, 4 * thick, "#1f6feb");
    }
    if ($("kind").value === "move") ring(handle, radius() * scale, "#c2560c");
    ring(handle, 1.5 * thick, "#c2560c");
  }
  if (data.seen) {
    const [x0, y0, x1, y1] = data.seen.map((value) => value * scale);
    screen.fillStyle = "#d0021b66"; // cut away
    for (const [x, y, w, h] of [[0, 0, width, y0], [0, y1, width, height], [0, y0, x0, y1 - y0], [x1, y0, width, y1 - y0]])
      if (w > 0 && h > 0) screen.fillRect(x, y, w, h);
  }
}

function tell() {
  const lengths = ways().map(({ handle, target }) => (distance(handle, target) / scale).toFixed(0));
  const asks = pending ? "Click where it shall go." : "Click what shall move, then where it shall go; or draw from one to the other.";
  const said = lengths.length ? `${lengths.length} way${lengths.length > 1 ? "s" : ""} of ${lengths.join(", ")} pixels. ` : "";
  const mask = hasMask() ? "" : " Without a mask everything may change.";
  $("told").textContent = tool() === "point" ? said + asks + mask : `${said}Draw over what may change.`;
  $("readout").textContent = `${radius()} pixels`;
  $("json").textContent = JSON.stringify({ ...config(), mask: hasMask() ? "…" : null }, null, 2);
}

// All that follows from the actions, once for a frame.
function change() {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => {
    asked = false;
    preview();
    draw();
    tell();
    document.body.dataset.frames = Number(document.body.dataset.frames ?? 0) + 1;
  });
}

// ---- what is saved ----

// The mask at the picture's own size: black and white, nothing between.
function maskPng() {
  const whole = make("canvas", { width: wide, height: high }), pen = whole.getContext("2d");
  pen.drawImage(painted, 0, 0, wide, high);
  const values = pen.getImageData(0, 0, wide, high);
  for (let i = 0; i < values.data.length; i += 4)
    values.data.fill(values.data[i] >= 128 ? 255 : 0, i, i + 3);
  pen.putImageData(values, 0, 0);
  return whole.toDataURL("image/png");
}

function config() {
  const own = ([x, y]) => [Math.min(round(x / scale), wide - 0.1), Math.min(round(y / scale), high - 0.1)].map(round);
  return { ...data.config, prompt: $("prompt").value, kind: $("kind").value, radius: radius(),
    points: ways().map(({ handle, target }) => [own(handle), own(target)]) };
}

function save(name, address) {
  const link = make("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
}

$("save").addEventListener("click", () => {
  const text = JSON.stringify({ ...config(), mask: hasMask() ? maskPng() : null }, null, 2);
  save("drag.json", `data:application/json;charset=utf-8,${encodeURIComponent(text + "\n")}`);
});
$("savemask").addEventListener("click", () => save("mask.png", maskPng()));

// ---- hands ----

function place(event) {
  const box = canvas.getBoundingClientRect();
  const inner = (value, side) => Math.min(side - 0.05, Math.max(0, value));
  return [inner(((event.clientX - box.left) / box.width) * canvas.width, canvas.width),
    inner(((event.clientY - box.top) / box.height) * canvas.height, canvas.height)];
}

canvas.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  canvas.setPointerCapture(event.pointerId);
  const here = place(event);
  if (tool() !== "point") {
    stroke = { places: [here], radius: Number($("brush").value) * scale, erase: tool() === "erase" };
    paint(stroke);
    draw();
  } else if (pending) {
    actions.push({ way: { handle: pending.handle, target: here } });
    pending = null;
  } else pending = { handle: here, held: true };
  change();
});
canvas.addEventListener("pointermove", (event) => {
  if (stroke) {
    const last = stroke.places.at(-1), here = place(event);
    stroke.places.push(here);
    paint({ ...stroke, places: [last, here] });
    draw();
  } else if (pending?.held) {
    pending.target = place(event);
    draw();
  }
});
canvas.addEventListener("pointerup", (event) => {
  if (stroke) actions.push({ stroke });
  else if (pending?.held && distance(pending.handle, place(event)) > 4 * scale) {
    actions.push({ way: { handle: pending.handle, target: place(event) } });
    pending = null;
  } else if (pending) pending = { handle: pending.handle };
  stroke = null;
  change();
});

function undo() {
  if (pending) pending = null;
  else actions.pop();
  repaint();
  change();
}

$("undo").addEventListener("click", undo);
$("clear").addEventListener("click", () => {
  actions = [];
  pending = null;
  repaint();
  change();
});
$("around").addEventListener("click", () => {
  for (const { handle, target } of ways()) {
    const wider = $("kind").value === "move" ? 1.5 * radius() + 0.03 * Math.min(wide, high) : 0.2 * Math.min(wide, high);
    actions.push({ stroke: { places: [handle, target], radius: wider * scale, erase: false } });
  }
  repaint();
  change();
});
$("zoom").addEventListener("input", () => { canvas.style.width = `${$("zoom").value}%`; });
for (const id of ["kind", "radius", "prompt", "preview"]) $(id).addEventListener("input", change);
for (const each of document.querySelectorAll("[name=tool]")) each.addEventListener("change", tell);
document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key === "z" && event.target.id !== "prompt") {
    event.preventDefault();
    undo();
  }
});

base.addEventListener("load", () => {
  for (const each of [canvas, painted]) [each.width, each.height] = [base.naturalWidth, base.naturalHeight];
  scale = base.naturalWidth / wide;
  screen.drawImage(base, 0, 0);
  pixels = screen.getImageData(0, 0, canvas.width, canvas.height).data;
  const least = Math.min(wide, high);
  $("radius").max = $("brush").max = Math.round(least / 3);
  $("radius").value = data.config.radius ?? least / 16;
  $("brush").value = least / 12;
  $("prompt").value = data.config.prompt;
  $("kind").value = data.config.kind;
  for (const [handle, target] of data.points)
    actions.push({ way: { handle: handle.map((v) => v * scale), target: target.map((v) => v * scale) } });
  const mask = new Image();
  mask.addEventListener("load", () => {
    actions.unshift({ mask });
    repaint();
    change();
  });
  if (data.mask) mask.src = data.mask;
  repaint();
  change();
});
base.src = data.picture;
