const { pictures, tables, leads } = data;
let current = -1;

function address(n) {
  return encodeURIComponent(pictures[n].file);
}

// Each way is a track of places, and last its target.
function lines({ size: [width, height], ways }) {
  const parts = ways.map((way) => {
    const [x, y] = way.at(-1), track = way.slice(0, -1), r = Math.max(width, height) / 60;
    return `<line class="a" x1="${track[0][0]}" y1="${track[0][1]}" x2="${x}" y2="${y}"/>
      <polyline class="b" points="${track.map((place) => place.join()).join(" ")}"/>
      <circle class="a" cx="${x}" cy="${y}" r="${r}"/>`;
  });
  const box = make("div", { className: "ways" });
  box.innerHTML = `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="the ways">${parts.join("")}</svg>`;
  return box;
}

function stage(n) {
  const { subject, prompt, file, ways } = pictures[n];
  const result = picture(address(n), `${file}: ${prompt}`);
  const before = leads[subject]?.[0];
  const paired = before && $("compare").checked;
  $("stage").replaceChildren(
    paired ? divider(picture(before.uri, before.label), result, [before.label, "result"]) : result);
  $("waying").hidden = !ways.length;
  if (ways.length && $("waysshown").checked) $("stage").append(lines(pictures[n]));
}

function show(n) {
  n = (n + pictures.length) % pictures.length;
  document.querySelector(".sheet .now")?.classList.remove("now");
  current = n;
  document.querySelector(`[data-number="${n}"]`)?.classList.add("now");
  stage(n);
  const { file, facts, config } = pictures[n];
  $("readout").textContent = file;
  $("open").href = address(n);
  $("about").replaceChildren(make("table", { className: "facts" }, make("tbody", {},
    ...Object.entries(facts).map(([name, value]) => make("tr", { title: data.definitions[name] ?? "" },
      make("th", { scope: "row", textContent: name }), make("td", { textContent: value }))))));
  $("again").replaceChildren(command(data.again + pictures[n].path));
  $("config").textContent = JSON.stringify({ ...data.common, ...config }, null, 2);
}

function cell(n) {
  if (n === null) return make("td", {});
  const image = picture(address(n), pictures[n].file);
  image.loading = "lazy";
  const button = make("button", { type: "button", title: Object.values(pictures[n].facts).join(" · ") }, image);
  button.dataset.number = n;
  button.addEventListener("click", () => {
    show(n);
    if (matchMedia("(max-width: 999px)").matches) $("look").scrollIntoView({ behavior: "smooth" });
  });
  return make("td", {}, button);
}

for (const { title, columns, rows } of tables) {
  const shown = rows.some(([, subject]) => leads[subject]);
  const heads = [...(shown ? leads[0].map(({ label }) => label) : []), ...columns];
  const table = make("table", { className: "sheet" });
  if (columns.length || shown)
    table.append(make("thead", {}, make("tr", {}, make("th", {}),
      ...heads.map((text) => make("th", { scope: "col", textContent: text })))));
  const body = make("tbody", {});
  for (const [label, subject, numbers] of rows) {
    const before = shown ? (leads[subject] ?? leads[0].map(() => null)) : [];
    body.append(make("tr", {}, make("th", { scope: "row", textContent: label }),
      ...before.map((lead) => make("td", {}, lead ? picture(lead.uri, lead.label) : "")), ...numbers.map(cell)));
  }
  table.append(body);
  $("tables").append(...(title ? [make("h2", { textContent: title })] : []),
    make("div", { className: "scroll" }, table));
}

function zoom(size) {
  $("zoom").value = size;
  $("tables").style.setProperty("--cell", `${$("zoom").value}px`);
}

$("comparing").hidden = !leads.length;
$("compare").addEventListener("change", () => stage(current));
$("waysshown").addEventListener("change", () => stage(current));
$("zoom").addEventListener("input", () => zoom($("zoom").value));
$("previous").addEventListener("click", () => show(current - 1));
$("next").addEventListener("click", () => show(current + 1));
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.("[type=range], pre")) return;
  const larger = (by) => zoom(Number($("zoom").value) + by);
  ({ ArrowLeft: () => show(current - 1), ArrowRight: () => show(current + 1), "+": () => larger(32),
    "-": () => larger(-32) })[event.key]?.();
});
// As large as lets a row be seen whole, or on a phone three pictures of it.
const across = Math.max(...tables.map(({ rows: [[, subject, numbers]] }) =>
  numbers.length + (leads[subject]?.length ?? 0)));
const room = $("tables").clientWidth;
zoom(room < 600 ? room / Math.min(across, 3) - 14 : Math.min(256, Math.max(96, (room - 190) / across - 16)));
show(0);
