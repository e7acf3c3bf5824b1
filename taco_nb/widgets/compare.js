// Shows pictures of one size under a swipe handle, side by side, or as their difference. All zoom and pan together.
//
// Without this script the page shows the figures in a grid, each with its caption. With it, `enhance` builds the controls
// around those very figures, so that the static page and the live widget are one thing.

const MODES = { swipe: "Swipe", side: "Side by side", difference: "Difference" };
const LARGEST = 24; // times enlarged

const make = (tag, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
};
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

/** Build the controls in `root`, which holds figures. `state` is what the reader has chosen, kept from a root to the next. */
export function enhance(root, state = {}) {
  if (!root || root.dataset.ready) return;
  root.dataset.ready = "true";
  root.dataset.lmSuppressShortcuts = "true"; // or JupyterLab takes the arrow keys for its own
  const figures = [...root.querySelectorAll("figure")];
  const map = figures.find((figure) => "bits" in figure.dataset);
  const pictures = figures.filter((figure) => figure !== map);
  const last = pictures.length - 1;
  const chosen = { mode: "swipe", left: 0, right: 1, at: 50, zoom: 1, u: 0, v: 0, gain: 8, bits: false };
  for (const [name, value] of Object.entries(chosen)) state[name] ??= value;
  state.left = Math.min(state.left, last);
  state.right = Math.min(state.right, last);

  const image = (i) => pictures[i].querySelector("img");
  const label = (i) => pictures[i].dataset.label;
  const [width, height] = ["width", "height"].map((side) => Number(image(0).getAttribute(side)));

  // --- Panes: each shows one picture through a window; all scenes follow the same zoom and pan, by CSS variables
  const scene = (...children) => make("div", { className: "tc-scene" }, ...children, ...(map ? [overlay()] : []));
  const overlay = () => {
    const node = map.querySelector("img").cloneNode();
    node.className = "tc-bits";
    node.alt = "";
    node.style.width = `${map.dataset.width}%`;
    node.style.height = `${map.dataset.height}%`;
    return node;
  };
  for (const figure of pictures) {
    const own = figure.querySelector("img");
    const pane = make("div", { className: "tc-pane" });
    own.replaceWith(pane);
    pane.append(scene(own));
  }
  const sides = ["left", "right"].map((side) => {
    const shown = make("img", { draggable: false });
    return { shown, pane: make("div", { className: `tc-pane tc-${side}` }, scene(shown)) };
  });
  const canvas = make("canvas", { width, height });
  const difference = make("div", { className: "tc-pane tc-difference" }, scene(canvas));
  const handle = make("div", { className: "tc-handle", tabIndex: 0 }, make("span", { textContent: "◂▸" }));
  const values = { role: "slider", "aria-valuemin": 0, "aria-valuemax": 100, "aria-orientation": "horizontal" };
  for (const [name, value] of Object.entries(values)) handle.setAttribute(name, value);
  const stage = make("div", { className: "tc-stage", tabIndex: 0 }, ...sides.map(({ pane }) => pane), difference, handle);
  stage.setAttribute("role", "group");
  stage.setAttribute("aria-label", "The pictures. Plus and minus zoom, 0 resets, arrows move the part that is shown.");
  root.style.setProperty("--tc-ratio", width / height);
  root.style.setProperty("--tc-natural", `${Math.max(width, 720)}px`);

  // --- Controls
  const choice = (side) => {
    const select = make("select", { onchange: () => show({ [side]: Number(select.value) }) });
    pictures.forEach((_, i) => select.append(make("option", { value: i, textContent: label(i) })));
    return select;
  };
  const [left, right] = ["left", "right"].map(choice);
  const modes = Object.entries(MODES).map(([mode, text]) =>
    make("button", { type: "button", textContent: text, value: mode, onclick: () => show({ mode }) }),
  );
  const gain = make("input", { type: "range", min: 1, max: 32, oninput: () => show({ gain: Number(gain.value) }) });
  const factor = make("output");
  const bits = make("input", { type: "checkbox", onchange: () => show({ bits: bits.checked }) });
  const scale = make("button", { type: "button", title: "Back to the whole picture", onclick: () => zoom(0) });
  const group = (className, ...children) => make("span", { className }, ...children);
  const bar = make(
    "div",
    { className: "tc-bar" },
    group("tc-modes", ...modes),
    group("tc-zoom",
      make("button", { type: "button", textContent: "−", ariaLabel: "Zoom out", onclick: () => zoom(1 / 1.5) }),
      scale,
      make("button", { type: "button", textContent: "+", ariaLabel: "Zoom in", onclick: () => zoom(1.5) })),
    make("label", { className: "tc-gain" }, "gain ", gain, factor),
    ...(map ? [make("label", { className: "tc-check" }, bits, map.dataset.label, group("tc-range", map.dataset.range))] : []),
  );
  const captions = ["left", "right"].map((side, i) =>
    make("div", { className: "tc-caption" }, make("label", {}, `${side} `, [left, right][i]), make("div")),
  );
  const foot = make("div", { className: "tc-foot" }, ...captions);
  root.prepend(bar, stage, foot);

  // --- What is shown follows from the state
  function show(change = {}) {
    Object.assign(state, change);
    root.dataset.mode = state.mode;
    root.toggleAttribute("data-map", Boolean(map) && state.bits);
    root.toggleAttribute("data-zoomed", state.zoom > 1);
    root.toggleAttribute("data-pixels", (stage.clientWidth / width) * state.zoom >= 3);
    for (const [name, value] of [["zoom", state.zoom], ["u", state.u], ["v", state.v], ["at", `${state.at}%`]])
      root.style.setProperty(`--tc-${name}`, value);
    for (const button of modes) button.setAttribute("aria-pressed", button.value === state.mode);
    [left.value, right.value, gain.value, bits.checked] = [state.left, state.right, state.gain, state.bits];
    factor.textContent = ` ${state.gain}×`;
    scale.textContent = `${Math.round(100 * state.zoom)} %`;
    [state.left, state.right].forEach((i, side) => {
      if (sides[side].shown.src !== image(i).src) sides[side].shown.src = image(i).src;
      sides[side].shown.alt = image(i).alt;
      captions[side].lastChild.innerHTML = pictures[i].querySelector("figcaption").innerHTML;
    });
    handle.setAttribute("aria-label", `Boundary between ${label(state.left)} and ${label(state.right)}`);
    handle.setAttribute("aria-valuenow", Math.round(state.at));
    handle.setAttribute("aria-valuetext", `${label(state.left)} left of ${Math.round(state.at)} %`);
    if (state.mode === "difference") subtract();
  }

  let drawn = "";
  async function subtract() {
    const wanted = [state.left, state.right, state.gain].join();
    if (wanted === drawn) return;
    drawn = wanted;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `Difference of ${label(state.left)} and ${label(state.right)}, ${state.gain} times`);
    const pixels = [];
    for (const i of [state.left, state.right]) {
      await image(i).decode();
      const context = make("canvas", { width, height }).getContext("2d");
      context.drawImage(image(i), 0, 0);
      pixels.push(context.getImageData(0, 0, width, height));
    }
    const [a, b] = pixels;
    for (let i = 0; i < a.data.length; i++) if (i % 4 < 3) a.data[i] = state.gain * Math.abs(a.data[i] - b.data[i]);
    if (wanted === drawn) canvas.getContext("2d").putImageData(a, 0, 0);
  }

  /** Enlarge by `by` (0: back to the whole picture) about a point, in shares of the pane. */
  function zoom(by, x = 0.5, y = 0.5) {
    const next = clamp(by ? state.zoom * by : 1, 1, LARGEST);
    move(state.u + x / state.zoom - x / next, state.v + y / state.zoom - y / next, next);
  }
  function move(u, v, zoom = state.zoom) {
    show({ zoom, u: clamp(u, 0, 1 - 1 / zoom), v: clamp(v, 0, 1 - 1 / zoom) });
  }

  // --- Mouse, pen and fingers
  const pointers = new Map();
  let held = null; // what the first pointer holds: the handle or the picture
  const paneOf = (event) => event.target.closest(".tc-stage, .tc-pane");
  const within = (pane, event) => {
    const box = pane.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  };
  root.addEventListener("pointerdown", (event) => {
    const pane = stage.contains(event.target) ? stage : paneOf(event);
    if (!pane || event.button) return;
    pointers.set(event.pointerId, { pane, at: within(pane, event) });
    const swipes = state.mode === "swipe" && pane === stage && (state.zoom === 1 || handle.contains(event.target));
    if (pointers.size === 1) held = swipes ? handle : pane;
    if (pointers.size === 1 && held === handle) swipe(event);
    (held === handle ? handle : pane).focus({ preventScroll: true });
    pane.setPointerCapture(event.pointerId);
    if (event.pointerType === "mouse") event.preventDefault(); // no picture is dragged away
  });
  root.addEventListener("pointermove", (event) => {
    const pointer = pointers.get(event.pointerId);
    if (!pointer) return;
    const [x, y] = within(pointer.pane, event);
    const [was, other] = [pointer.at, [...pointers].find(([id]) => id !== event.pointerId)?.[1].at];
    pointer.at = [x, y];
    if (other) {
      const distance = (point) => Math.hypot(point[0] - other[0], point[1] - other[1]);
      zoom(distance([x, y]) / Math.max(distance(was), 1e-3), (x + other[0]) / 2, (y + other[1]) / 2);
    } else if (held === handle) swipe(event);
    else move(state.u - (x - was[0]) / state.zoom, state.v - (y - was[1]) / state.zoom);
  });
  for (const end of ["pointerup", "pointercancel"])
    root.addEventListener(end, (event) => pointers.delete(event.pointerId));
  const swipe = (event) => show({ at: clamp(100 * within(stage, event)[0], 0, 100) });
  root.addEventListener("wheel", (event) => {
    const pane = paneOf(event);
    if (!pane || !(event.ctrlKey || event.metaKey)) return; // the plain wheel scrolls the page; pinching a pad comes with Ctrl
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 200), ...within(pane, event));
  }, { passive: false });
  root.addEventListener("dblclick", (event) => {
    const pane = paneOf(event);
    if (pane && !handle.contains(event.target)) zoom(2, ...within(pane, event));
  });

  // --- Keys
  const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  stage.addEventListener("keydown", (event) => {
    const arrow = ARROWS[event.key];
    const step = event.shiftKey ? 10 : 2;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target === handle && arrow) show({ at: clamp(state.at + step * (arrow[0] - arrow[1]), 0, 100) });
    else if (event.target === handle && event.key === "Home") show({ at: 0 });
    else if (event.target === handle && event.key === "End") show({ at: 100 });
    else if (arrow) move(state.u + arrow[0] / 10 / state.zoom, state.v + arrow[1] / 10 / state.zoom);
    else if (event.key === "+" || event.key === "=") zoom(1.5);
    else if (event.key === "-") zoom(1 / 1.5);
    else if (event.key === "0") zoom(0);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  show();
}

export default {
  render({ model, el }) {
    const state = { ...model.get("start") };
    const draw = () => {
      const root = make("div", { className: "taco-compare" });
      root.innerHTML = model.get("figures");
      el.replaceChildren(root);
      if (root.querySelector("figure")) enhance(root, state);
    };
    model.on("change:figures", draw);
    draw();
  },
};
