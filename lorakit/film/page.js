const count = data.frames.length;
const paired = data.other.length === count && count > 0;
// One element per frame, swapped whole: nothing is decoded while it plays, so nothing flickers.
const first = data.frames.map((uri, i) => picture(uri, `${data.label}, frame ${i}`));
const second = data.other.map((uri, i) => picture(uri, `${data.other_label}, frame ${i}`));
const marks = [];

function describe(i) {
  const { alpha, segment } = data.rows[i] ?? {};
  const between = data.segments > 1 && segment !== null ? `, pictures ${segment + 1} → ${segment + 2}` : "";
  return `frame ${i} of ${count - 1}` + (alpha === null ? "" : `, α ${alpha.toFixed(3)}`) + between;
}

function show(i, before) {
  $("strip").children[before]?.classList.remove("now");
  $("first").firstElementChild.replaceChildren(first[i]);
  if (paired) $("second").firstElementChild.replaceChildren(second[i]);
  $("readout").textContent = describe(i);
  const item = $("strip").children[i];
  item.classList.add("now");
  $("strip").scrollLeft = item.offsetLeft - ($("strip").clientWidth - item.clientWidth) / 2;
  marks.forEach((mark) => mark());
}

// Of each film, values whose points lie `offset` frames to the right of their index.
function curve(section, series, offset, name) {
  const films = series.filter((values) => values.some((value) => value !== null));
  const tell = (x) => {
    const i = Math.min(offset ? Math.floor(x) : Math.round(x), films[0].length - 1);
    const values = films.map((each) => number(each[i])).join(" and ");
    return offset ? `frames ${i} → ${i + 1}: ${values}` : `frame ${i}: ${values}`;
  };
  const lines = films.map((values, k) =>
    ({ kind: "ab"[k], dots: true, points: values.map((value, i) => [i + offset, value]) }));
  const pick = (x) => frames.move(Math.round(x));
  marks.push(chart(section, { lines, least: 0, last: count - 1, tell, pick, at: frames.at, name }));
}

const frames = reel(count, show, { pauses: (i) => i === 0 || i === count - 1 });
first[0].decode().then(() =>
  $("stage").style.setProperty("--aspect", first[0].naturalWidth / first[0].naturalHeight));
for (const part of [$("second"), $("views"), $("first").lastElementChild]) part.hidden = !paired;
if (paired) $("keys").textContent += ", C compares";
for (const fps of data.speeds)
  $("speed").add(new Option(`${fps} frames/s`, fps, fps === data.speed, fps === data.speed));
$("pingpong").checked = !data.loop;
data.frames.forEach((uri, i) => {
  const alpha = data.rows[i].alpha;
  const button = make("button", { type: "button", tabIndex: -1, title: describe(i) },
    picture(uri, ""), ...(paired ? [picture(data.other[i], "")] : []),
    alpha === null ? `${i}` : `α ${alpha.toFixed(3)}`);
  button.addEventListener("click", () => frames.move(i));
  $("strip").append(make("li", {}, button));
});
const sharpness = [data.rows, data.other_rows].map((rows) => rows.map((row) => row.sharpness));
curve($("speed-curve"), [data.distances, data.other_distances], 0.5, "distances");
curve($("sharpness-curve"), sharpness, 0, "sharpness");
frames.move(0);

document.querySelectorAll("#inputs button").forEach((button) =>
  button.addEventListener("click", () => frames.move(Number(button.dataset.frame))));
const radios = [...document.querySelectorAll("[name=view]")];
radios.forEach((radio) =>
  radio.addEventListener("change", () => { $("stage").dataset.view = radio.value; }));
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
  if (event.key.toLowerCase() === "c" && paired)
    radios[(radios.findIndex((radio) => radio.checked) + 1) % 3].click();
});
