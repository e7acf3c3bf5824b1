// Shows a caption's tokens as buttons. Over the picture it draws how much each position and the chosen token attend to each
// other, for one codec beside another.
//
// The maps come as one grey picture per layer, with the tokens' maps one below the other, and are coloured here. Without
// this script the page shows a static sheet of a few words.

const make = (tag, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
};

export async function enhance(root) {
  if (!root || root.dataset.ready) return;
  root.dataset.ready = "true";
  root.dataset.lmSuppressShortcuts = "true"; // or JupyterLab takes keys for its own
  const { tokens, weights, start, cold, hot } = JSON.parse(root.querySelector("[data-tokens]").dataset.tokens);
  const maps = [...root.querySelectorAll("[data-map]")].map((node) => ({ ...JSON.parse(node.dataset.map), image: node.firstChild }));
  await Promise.all(maps.map((map) => map.image.decode()));
  const picture = root.querySelector("[data-picture] img");
  const codecs = [...new Set(maps.map((map) => map.codec))];
  const layers = [...new Set(maps.map((map) => map.layer))];
  const state = { token: start, layer: layers.at(-1) };

  const most = weights && Math.max(...weights);
  const buttons = tokens.map((token, i) => {
    const button = make("button", { type: "button", textContent: token, onclick: () => show({ token: i }) });
    if (weights) {
      button.style.setProperty("--ta-weight", `${Math.round((100 * weights[i]) / most)}%`);
      button.title = `weight ${weights[i].toFixed(4)}`;
    }
    return button;
  });
  const layer = make("select", { onchange: () => show({ layer: layer.value }) });
  layers.forEach((name) => layer.append(make("option", { value: name, textContent: name })));
  const panes = codecs.map((codec) => {
    const canvas = make("canvas");
    canvas.setAttribute("role", "img");
    const text = make("figcaption");
    const over = make("div", { className: "ta-over" }, picture.cloneNode(), canvas);
    return { codec, canvas, text, figure: make("figure", { className: "ta-pane" }, over, text) };
  });
  const row = make("div", { className: "ta-tokens" }, ...buttons);
  row.setAttribute("role", "group");
  row.setAttribute("aria-label", "The caption's tokens");
  root.append(
    make("div", { className: "ta-bar" }, make("label", {}, "layer ", layer), row),
    make("div", { className: "ta-panes" }, ...panes.map((pane) => pane.figure)),
  );

  function show(change = {}) {
    Object.assign(state, change);
    layer.value = state.layer;
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", i === state.token));
    for (const { codec, canvas, text, figure } of panes) {
      const map = maps.find((map) => map.codec === codec && map.layer === state.layer);
      figure.hidden = !map;
      if (!map) continue;
      const [low, high] = map.ranges[state.token];
      Object.assign(canvas, { width: map.columns, height: map.rows });
      canvas.style.width = `${map.width}%`;
      canvas.style.height = `${map.height}%`;
      const context = canvas.getContext("2d", { willReadFrequently: true });
      context.drawImage(map.image, 0, -state.token * map.rows);
      const pixels = context.getImageData(0, 0, map.columns, map.rows);
      for (let i = 0; i < pixels.data.length; i++) {
        if (i % 4 === 3) continue;
        const share = pixels.data[i] / 255;
        pixels.data[i] = cold[i % 4] + share * (hot[i % 4] - cold[i % 4]);
      }
      context.putImageData(pixels, 0, 0);
      text.textContent = `${codec}: ${low.toFixed(4)} to ${high.toFixed(4)}`;
      canvas.setAttribute("aria-label", `Attention of ${codec} for the token ${tokens[state.token]}, ${text.textContent}`);
    }
  }
  show();
}
