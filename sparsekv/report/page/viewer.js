// The token viewer: one context, each token coloured by what a press keeps of it in the caches of a model.
// Everything from the data enters the page as textContent.
"use strict";
(() => {
  const data = document.getElementById("viewer-data");
  if (!data) return;
  const { views, classes: CLASS_NAMES } = JSON.parse(data.textContent);
  const root = document.getElementById("token-viewer");
  const part = (name) => root.querySelector(`[data-part="${name}"]`);
  const ALL = "all";
  const BRIGHTEST = 5; // log2 of the relative attention at which the colour is full
  const box = part("tokens"), tip = part("tip"), map = part("map");
  const SELECTS = ["run", "place", "press", "ratio", "layer", "head", "colour"];
  const select = Object.fromEntries(SELECTS.map((name) => [name, part(name)]));
  let view = null, cell = null, spans = [], fixed = [], needles = new Set(), cursor = -1, kept = null;

  // ---- arrays ----

  const range = (count) => Array.from({ length: count }, (_, index) => index);
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const bits = (packed, count) => Uint8Array.from({ length: count }, (_, i) => (packed[i >> 3] >> (7 - (i & 7))) & 1);
  const unique = (values) => [...new Set(values)];

  /** Decode a view's arrays at its first use. */
  function ready(each) {
    if (each.arrays) return each;
    const count = each.tokens.length;
    each.arrays = {
      classes: bytes(each.classes),
      anchors: bits(bytes(each.anchors), count),
      relative: Float32Array.from(bytes(each.received), (code) => 2 ** ((code - 128) / 16)),
    };
    return each;
  }

  /** Sum of an array [layers, heads, context] over some heads of some layers: Float32[context]. */
  function sum(array, layers, heads) {
    const count = view.tokens.length, total = new Float32Array(count);
    for (const layer of layers)
      for (const head of heads) {
        const start = (layer * view.kv_heads + head) * count;
        for (let i = 0; i < count; i++) total[i] += array[start + i];
      }
    return total;
  }

  const layersShown = () => (select.layer.value === ALL ? range(view.layers) : [Number(select.layer.value)]);
  const headsShown = () => (select.head.value === ALL ? range(view.kv_heads) : [Number(select.head.value)]);

  /** Which tokens the expected answers stand in. */
  function findNeedles() {
    const tokens = view.tokens.map((token) => token.toLowerCase());
    const text = tokens.join(""), found = new Set(), ends = [];
    for (const token of tokens) ends.push((ends.at(-1) ?? 0) + token.length);
    for (const answer of view.expected.map((each) => each.toLowerCase()).filter(Boolean))
      for (let at = text.indexOf(answer); at >= 0; at = text.indexOf(answer, at + answer.length))
        ends.forEach((end, i) => end > at && end - tokens[i].length < at + answer.length && found.add(i));
    return found;
  }

  // ---- selects ----

  /** Fill a select; the value stays where it is still offered. */
  function fill(name, options) {
    const before = select[name].value;
    select[name].replaceChildren(...options.map(([value, label]) => new Option(label, value)));
    if (options.some(([value]) => String(value) === before)) select[name].value = before;
    select[name].disabled = options.length < 2;
  }

  const same = (values) => unique(values).map((value) => [value, value]);
  const numbered = (count, all) => [[ALL, all], ...range(count).map((index) => [index, index])];

  /** From the first select to the last: each offers what is there for those before it. */
  function choose() {
    fill("run", same(views.map((each) => each.run)));
    const ofRun = views.filter((each) => each.run === select.run.value);
    fill("place", same(ofRun.map((each) => each.place)));
    const next = ready(ofRun.find((each) => each.place === select.place.value));
    if (next !== view) show(next);
    fill("press", same(view.cells.map((each) => each.press)));
    const ofPress = view.cells.filter((each) => each.press === select.press.value);
    fill("ratio", same(ofPress.map((each) => each.compression_ratio)));
    if (!cell && ofPress.some((each) => each.compression_ratio === 0.5)) select.ratio.value = 0.5;
    fill("layer", numbered(view.layers, "all"));
    fill("head", numbered(view.kv_heads, "all"));
    cell = ofPress.find((each) => String(each.compression_ratio) === select.ratio.value);
    kept = bits(bytes(cell.kept), view.layers * view.kv_heads * view.tokens.length);
    paint();
  }

  // ---- the page ----

  /** What a token looks like: line ends and lone spaces can be seen. */
  function visible(token) {
    if (!token) return "◌";
    const text = token.replace(/\t/g, "⇥\t").replace(/\r?\n/g, "↵\n");
    return /^ +$/.test(token) ? "·".repeat(token.length) : text;
  }

  /** Build the tokens of a view once; colours come later. */
  function show(next) {
    view = next;
    cursor = -1;
    hide();
    needles = findNeedles();
    fixed = view.tokens.map((_, i) => `t${view.arrays.anchors[i] ? " a" : ""}${needles.has(i) ? " n" : ""}`);
    spans = view.tokens.map((token, i) => {
      const span = document.createElement("span");
      span.textContent = visible(token);
      span.dataset.i = i;
      return span;
    });
    box.replaceChildren(...spans);
    box.scrollTop = 0;
    part("question").textContent = view.question.trim() || "(none)";
    part("expected").textContent = view.expected.join(" · ") || "(none)";
    part("source").textContent = view.source;
    part("jump").hidden = needles.size === 0;
    const listed = view.not_shown.map((each) => {
      const item = document.createElement("li");
      item.textContent = `${each.press} at ${each.compression_ratio}: ${each.reason}`;
      return item;
    });
    part("left-out").hidden = listed.length === 0;
    part("left-out").querySelector("summary").textContent = `Not shown here: ${listed.length} of the run's cells`;
    part("left-out").querySelector("ul").replaceChildren(...listed);
  }

  /** 0 … 10; the ends only where the share is 0 or 1. */
  const level = (share) => (share <= 0 ? 0 : share >= 1 ? 10 : Math.min(9, Math.max(1, Math.round(share * 10))));
  const brightness = (relative) => Math.min(1, Math.max(0, Math.log2(relative) / BRIGHTEST));

  /** Colour every token and the map for what is selected. */
  function paint() {
    const layers = layersShown(), heads = headsShown(), n = layers.length * heads.length;
    const byKept = select.colour.value === "kept";
    root.dataset.colour = select.colour.value;
    const counts = sum(kept, layers, heads), relative = sum(view.arrays.relative, layers, heads);
    view.shown = { counts, relative: relative.map((value) => value / n), n };
    for (let i = 0; i < spans.length; i++) {
      const tint = byKept ? level(counts[i] / n) : level(brightness(relative[i] / n));
      spans[i].className = `${fixed[i]} l${tint}${i === cursor ? " cursor" : ""}`;
    }
    count(counts, n);
    said("full", view.full);
    said("answer", cell);
    drawMap(byKept, heads);
    if (!tip.hidden) describe(Number(tip.dataset.i));
  }

  function said(name, { answer, score }) {
    const known = answer !== null && answer !== undefined;
    part(name).textContent = known ? answer.trim() || "(nothing)" : "(not among the results)";
    if (!known || score === null || score === undefined) return;
    const mark = document.createElement("span");
    mark.className = "viewer-score";
    mark.textContent = `${view.metric} ${Number(score.toPrecision(4))}`;
    part(name).append(" ", mark);
  }

  const percent = (share) => `${(100 * share).toFixed(1)}%`;

  function count(counts, n) {
    const length = counts.length, total = counts.reduce((sum, value) => sum + value, 0) / n;
    let text = `${cell.press} keeps ${Number(total.toFixed(1))} of ${length} tokens (${percent(total / length)})`;
    text += n === 1 ? " in this head." : ` on average over ${n} heads.`;
    if (needles.size) {
      const left = [...needles].reduce((sum, i) => sum + counts[i], 0) / n;
      text += ` Of the answer's own tokens it keeps ${percent(left / needles.size)}.`;
    }
    part("count").textContent = text;
  }

  /** One pixel a layer and position; under them the places of the answer. */
  function drawMap(byKept, heads) {
    const length = view.tokens.length, margin = Math.ceil(view.layers / 15);
    const context = map.getContext("2d"), look = getComputedStyle(root);
    map.width = length;
    map.height = view.layers + 2 * margin;
    map.style.height = `${Math.min(220, Math.max(60, 5 * map.height))}px`;
    const shown = select.layer.value === ALL ? null : Number(select.layer.value);
    const source = byKept ? kept : view.arrays.relative;
    context.fillStyle = `rgb(${look.getPropertyValue("--ground")})`;
    for (const layer of range(view.layers)) {
      const row = sum(source, [layer], heads);
      const faint = shown === null || shown === layer ? 1 : 0.35;
      for (let i = 0; i < length; i++) {
        const share = row[i] / heads.length;
        context.globalAlpha = faint * (byKept ? share : brightness(share));
        if (context.globalAlpha > 0) context.fillRect(i, layer, 1, 1);
      }
    }
    context.globalAlpha = 1;
    context.fillStyle = look.getPropertyValue("--answer");
    const width = Math.max(1, length / 200);
    for (const i of needles) context.fillRect(i + 0.5 - width / 2, view.layers + margin, width, margin);
  }

  // ---- one token ----

  function describe(i) {
    const { counts, relative, n } = view.shown;
    const lines = [
      `position ${i} · ${CLASS_NAMES[view.arrays.classes[i]]}${view.arrays.anchors[i] ? " · anchor" : ""}`,
      `attention received: ${relative[i] < 0.095 ? relative[i].toFixed(3) : relative[i].toPrecision(3)} × its even share`,
      n === 1 ? (counts[i] ? "kept" : "evicted") : `kept by ${counts[i]} of ${n} heads`,
    ];
    const name = document.createElement("b");
    name.textContent = JSON.stringify(view.tokens[i]);
    tip.replaceChildren(name, ...lines.map((text) => Object.assign(document.createElement("div"), { textContent: text })));
    tip.dataset.i = i;
    tip.hidden = false;
    const frame = box.parentElement.getBoundingClientRect(), token = spans[i].getClientRects()[0];
    if (!token) return;
    const left = Math.min(token.left - frame.left, frame.width - tip.offsetWidth - 4);
    const below = token.bottom - frame.top + 4;
    const fits = below + tip.offsetHeight <= frame.height;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${fits ? below : token.top - frame.top - tip.offsetHeight - 4}px`;
  }

  function hide() {
    tip.hidden = true;
  }

  /** Move the cursor, scroll the box (never the page) to it, and describe the token. */
  function go(i) {
    spans[cursor]?.classList.remove("cursor");
    cursor = Math.max(0, Math.min(spans.length - 1, i));
    const span = spans[cursor], margin = 24;
    span.classList.add("cursor");
    const top = span.offsetTop - box.offsetTop;
    if (top < box.scrollTop + margin) box.scrollTop = top - margin;
    const bottom = top + span.offsetHeight - box.clientHeight + margin;
    if (bottom > box.scrollTop) box.scrollTop = bottom;
    describe(cursor);
  }

  /** The token nearest to the cursor in the next line (step 1) or the one before (step −1). */
  function nextLine(step) {
    const from = spans[Math.max(0, cursor)];
    let i = cursor + step;
    while (spans[i] && spans[i].offsetTop === from.offsetTop) i += step;
    const line = spans[i]?.offsetTop;
    let best = i;
    for (; spans[i]?.offsetTop === line; i += step)
      if (Math.abs(spans[i].offsetLeft - from.offsetLeft) < Math.abs(spans[best].offsetLeft - from.offsetLeft)) best = i;
    return best;
  }

  const KEYS = {
    ArrowRight: () => cursor + 1,
    ArrowLeft: () => cursor - 1,
    ArrowDown: () => nextLine(1),
    ArrowUp: () => nextLine(-1),
    Home: () => 0,
    End: () => spans.length - 1,
  };

  for (const name of SELECTS) select[name].addEventListener("change", choose);
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    if (!(event.key in KEYS) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    go(KEYS[event.key]());
  });
  box.addEventListener("pointerover", (event) => event.target.dataset.i && describe(Number(event.target.dataset.i)));
  box.addEventListener("click", (event) => event.target.dataset.i && go(Number(event.target.dataset.i)));
  box.addEventListener("pointerleave", hide);
  box.addEventListener("blur", hide);
  box.addEventListener("scroll", () => tip.dataset.i !== String(cursor) && hide());
  map.addEventListener("click", (event) => {
    const { left, width } = map.getBoundingClientRect();
    go(Math.floor(((event.clientX - left) / width) * spans.length));
  });
  part("jump").addEventListener("click", () => {
    const starts = [...needles].filter((i) => !needles.has(i - 1)).sort((one, two) => one - two);
    box.focus({ preventScroll: true });
    go(starts.find((i) => i > cursor) ?? starts[0]);
  });
  new MutationObserver(paint).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  choose();
})();
