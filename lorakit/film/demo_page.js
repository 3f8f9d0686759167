const images = data.frames.map((uri, i) => picture(uri, `frame ${i}`));

for (const { title, caption, pictures, labels } of data.rows) {
  const photograph = picture(pictures[0], title), fitted = picture(pictures.at(-1), `${title}, with LoRA`);
  const cells = pictures.map((uri, i) => make("figure", {}, picture(uri, labels[i]),
    make("figcaption", { className: "soft", textContent: labels[i] })));
  $("rows").append(make("div", { className: "row" }, make("p", {}, make("b", { textContent: title }), ` “${caption}”`),
    divider(photograph, fitted, ["photograph", "with LoRA"]), make("div", {}, ...cells)));
}
for (const fps of [4, 8, 12, 24]) $("speed").add(new Option(`${fps} frames/s`, fps, fps === 8, fps === 8));
const frames = reel(images.length, (i) => {
  $("film").replaceChildren(images[i]);
  $("readout").textContent = `frame ${i} of ${images.length - 1}`;
}, { pauses: (i) => i === 0 || i === images.length - 1 });
frames.move(0);
