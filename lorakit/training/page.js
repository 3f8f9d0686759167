const { steps, rows } = data.samples;
const images = rows.map((row) =>
  row.pictures.map((uri, i) => uri && picture(uri, `${row.label}, step ${steps[i]}`)));
let markLoss = () => {};
let at = data.done;

// The last [x, y] of a curve that is not behind x.
const before = (points, x) => points.findLast(([px]) => px <= x)?.[1];

function losses(x) {
  const found = { loss: before(data.smoothed, x), validation: before(data.validation, x) };
  return Object.entries(found).filter(([, value]) => typeof value === "number")
    .map(([name, value]) => `${name} ${value.toFixed(4)}`).join(", ");
}

function show(i) {
  at = steps[i];
  rows.forEach((row, k) => {
    const cell = $("pairs").children[k];
    cell.children[1].replaceChildren(images[k][i] ?? "");
    cell.children[3].textContent = steps[i] ? `step ${steps[i]}` : "step 0";
  });
  $("readout").textContent = `step ${steps[i]} of ${data.done}`;
  markLoss();
}

$("samples").hidden = !steps.length;
if (steps.length) {
  for (const row of rows) {
    const without = picture(row.pictures[0], `${row.label}, ${data.first}`);
    $("pairs").append(make("figure", { className: "pair" }, make("div", {}, without), make("div", {}),
      make("small", { textContent: data.first }), make("small", {}),
      make("figcaption", { textContent: row.label })));
  }
}
const samples = steps.length ? reel(steps.length, show) : null;

// To the sample that is nearest to a step.
function pick(x) {
  const distance = steps.map((step) => Math.abs(step - x));
  samples?.move(distance.indexOf(Math.min(...distance)));
}

const legend = [["c", data.stride > 1 ? `mean of ${data.stride} steps` : "each step", data.loss],
  ["a", "running mean", data.smoothed], ["b", "validation, fixed noise", data.validation]];
for (const [kind, text, points] of legend)
  if (points.length) $("legend").append(make("span", {}, make("i", { className: kind }), text));
if (data.best !== null) $("legend").append(make("span", { textContent: `best at step ${data.best}` }));
markLoss = chart($("loss"), {
  lines: legend.map(([kind, , points]) => ({ kind, points, dots: kind === "b" })),
  last: data.done, pick, at: () => at, name: "loss",
  tell: (x) => `step ${Math.round(x)}: ${losses(x)}`,
});
samples?.move(steps.length - 1);
