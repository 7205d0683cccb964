"use strict";
(async () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const [T, H, W] = data.grid, P = H * W, N = T * P;
  const [left, top, width, height] = data.field;
  const NAMES = ["kept", "merged", "dropped"];
  const told = document.getElementById("told");
  const SVG = "http://www.w3.org/2000/svg";

  if (!("DecompressionStream" in window)) return; // the page is whole without: no token can be pointed at

  async function bytes(text) {
    const packed = new Blob([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))]);
    return new Response(packed.stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer();
  }
  const indices = async (text) => new (data.wide ? Uint32Array : Uint16Array)(await bytes(text));
  const weights = async (text) => new Float32Array(Uint32Array.from(new Uint16Array(await bytes(text)), (x) => x << 16).buffer);

  // -- what the trace says ------------------------------------------------------------------------------------------
  async function mergeOf([survivor, source, weight]) {
    const merge = { survivor: await indices(survivor), source: await indices(source), weight: await weights(weight), first: new Map() };
    merge.survivor.forEach((token, i) => { if (!merge.first.has(token)) merge.first.set(token, i); });
    return merge;
  }
  const sides = await Promise.all(data.sides.map(async (side, number) => ({
    ...side, number, merges: await Promise.all(side.merges.map(mergeOf)), place: new Uint8Array(await bytes(side.place)),
    content: new Uint8Array(await bytes(side.content)), stage: side.stages.length, token: 0, carriers: null, frames: [],
  })));
  const fateAt = (place, content, stage) => stage === 0 ? -1 : (place < stage) + (content < stage);
  const fate = (side, token) => fateAt(side.place[token], side.content[token], side.stage);

  // Weights by token: what a token that is kept after `stage` was mixed from.
  function sources(side, token, stage) {
    let i = -1;
    while (stage > 0 && (i = side.merges[stage - 1].first.get(token) ?? -1) < 0) stage--;
    if (stage === 0) return new Map([[token, 1]]);
    const merge = side.merges[stage - 1], mixed = new Map();
    for (; i < merge.survivor.length && merge.survivor[i] === token; i++) {
      for (const [origin, w] of sources(side, merge.source[i], stage - 1)) {
        mixed.set(origin, (mixed.get(origin) ?? 0) + merge.weight[i] * w);
      }
    }
    for (const [origin, w] of mixed) if (!w) mixed.delete(origin);
    return mixed;
  }
  // The kept tokens that a merged one lives on in.
  function carriers(side, token) {
    if (!side.carriers) {
      side.carriers = new Map();
      for (let kept = 0; kept < N; kept++) {
        if (side.place[kept] < side.stage) continue;
        for (const origin of sources(side, kept, side.stage).keys()) {
          if (origin !== kept) side.carriers.set(origin, [...(side.carriers.get(origin) ?? []), kept]);
        }
      }
    }
    return side.carriers.get(token) ?? [];
  }

  // -- words --------------------------------------------------------------------------------------------------------
  const rowOf = (token) => Math.floor(token / P);
  const cellOf = (token) => [token % W, Math.floor(token % P / W)];
  const title = (row) => data.rows[row][0] + (data.rows[row][1] ? " (" + data.rows[row][1] + ")" : "");
  const at = (token) => `${title(rowOf(token))}, row ${cellOf(token)[1] + 1}, column ${cellOf(token)[0] + 1}`;
  const lower = (text) => text[0].toLowerCase() + text.slice(1);

  function byFrame(tokens) {
    const count = new Map();
    for (const token of tokens) count.set(rowOf(token), (count.get(rowOf(token)) ?? 0) + 1);
    const rows = [...count].sort((a, b) => a[0] - b[0]), shown = rows.slice(0, 8);
    const words = shown.map(([row, n]) => `${n} in ${lower(data.rows[row][0])}`);
    return words.join(", ") + (rows.length > 8 ? ` and others in ${rows.length - 8} more` : "");
  }
  function describe(side, token) {
    const where = `${side.letter}, ${at(token)}: `;
    switch (fate(side, token)) {
      case -1: return [where + "nothing was compressed yet.", []];
      case 0: {
        const mixed = sources(side, token, side.stage), others = [...mixed.keys()].filter((t) => t !== token);
        if (!others.length && mixed.get(token) === 1) return [where + "kept as it was.", []];
        const own = mixed.has(token) ? `its own weight is ${(100 * mixed.get(token)).toPrecision(2)} %` : "nothing of its own is left";
        return [where + `kept, merged from ${mixed.size} token${mixed.size > 1 ? "s" : ""} (${byFrame(mixed.keys())}); ${own}.`, others];
      }
      case 1: {
        const into = carriers(side, token), first = into.slice(0, 3).map((t) => lower(at(t))).join("; ");
        const more = into.length > 3 ? ` and ${into.length - 3} more` : "";
        return [where + `merged ${side.stages[side.place[token]]}, into ${into.length} kept token${into.length > 1 ? "s" : ""}: ${first}${more}.`, into];
      }
      default: return [where + `dropped ${side.stages[side.content[token]]}.`, []];
    }
  }

  // -- drawing ------------------------------------------------------------------------------------------------------
  const layer = (side, row) => document.querySelector(`#t${side.number}-${row} .t`);
  let marks = [];
  function mark(side, row, name, tokens) {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("class", name);
    path.setAttribute("d", tokens.map((token) => `M${cellOf(token).join(" ")}h1v1h-1z`).join(""));
    layer(side, row).append(path);
    marks.push(path);
  }
  function clear() {
    marks.forEach((path) => path.remove());
    marks = [];
  }
  let shown = "";
  function show(side, token) {
    const key = `${side.number} ${side.stage} ${token}`;
    if (key === shown) return;
    shown = key;
    clear();
    const [text, related] = describe(side, token), rows = new Map();
    for (const other of related) rows.set(rowOf(other), [...(rows.get(rowOf(other)) ?? []), other]);
    for (const [row, tokens] of rows) mark(side, row, "hot", tokens);
    mark(side, rowOf(token), "here", [token]);
    told.hidden = false;
    told.textContent = text;
  }
  function hide() {
    clear();
    shown = "";
    told.hidden = true;
  }
  function setStage(side, stage) {
    side.stage = stage;
    side.carriers = null;
    hide();
    for (let row = 0; row < T; row++) {
      for (const path of layer(side, row).children) {
        const [place, content] = path.dataset.f.split(" ").map(Number);
        path.setAttribute("class", { "-1": "a", 0: "k", 1: "m", 2: "d" }[fateAt(place, content, stage)]);
      }
      const count = [0, 0, 0];
      for (let token = row * P; token < (row + 1) * P; token++) count[Math.max(0, fate(side, token))]++;
      const frame = side.frames[row];
      frame.parentElement.querySelectorAll(".c b").forEach((cell, i) => { cell.textContent = count[i]; });
      frame.setAttribute("aria-label", `${side.letter}, ${data.rows[row][0]}: ` + count.map((n, i) => `${n} ${NAMES[i]}`).join(", "));
    }
  }

  // -- pointer and keyboard -----------------------------------------------------------------------------------------
  document.querySelectorAll(".frame").forEach((frame) => {
    const side = sides[frame.dataset.side], row = Number(frame.dataset.row);
    side.frames[row] = frame;
    const under = (event) => {
      const picture = event.target.closest("svg");
      if (!picture) return -1;
      const box = picture.getBoundingClientRect();
      const x = Math.floor(((event.clientX - box.left) / box.width - left) / width * W);
      const y = Math.floor(((event.clientY - box.top) / box.height - top) / height * H);
      return x < 0 || y < 0 || x >= W || y >= H ? -1 : row * P + y * W + x;
    };
    const point = (event) => {
      const token = under(event);
      if (token >= 0) show(side, token);
      return token;
    };
    frame.addEventListener("pointermove", point);
    frame.addEventListener("pointerdown", (event) => {
      const token = point(event);
      if (token >= 0) side.token = token;
    });
    frame.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse" && document.activeElement !== frame) hide(); });
    frame.addEventListener("blur", hide);
    frame.addEventListener("focus", () => {
      side.frames.forEach((other) => { other.tabIndex = other === frame ? 0 : -1; });
      if (rowOf(side.token) !== row) side.token = row * P + side.token % P;
      show(side, side.token);
    });
    frame.addEventListener("keydown", (event) => move(side, event));
  });
  function neighbour(side, step) {
    if (side.stage === 0) return side.token;
    for (let token = side.token + step; token >= 0 && token < N; token += step) if (side.place[token] >= side.stage) return token;
    return side.token;
  }
  function move(side, event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const [x, y] = cellOf(side.token), row = rowOf(side.token);
    const steps = {
      ArrowLeft: side.token - (x || row ? 1 : 0),
      ArrowRight: Math.min(N - 1, side.token + 1),
      ArrowUp: y ? side.token - W : side.token,
      ArrowDown: y < H - 1 ? side.token + W : side.token,
      PageUp: Math.max(side.token % P, side.token - P),
      PageDown: Math.min(N - P + side.token % P, side.token + P),
      Home: side.token % P,
      End: N - P + side.token % P,
    };
    const key = event.key.toLowerCase();
    if (key === "escape") return hide();
    if (!(event.key in steps) && key !== "n" && key !== "p") return;
    event.preventDefault();
    side.token = event.key in steps ? Math.max(0, steps[event.key]) : neighbour(side, key === "n" ? 1 : -1);
    const frame = side.frames[rowOf(side.token)];
    if (document.activeElement === frame) show(side, side.token);
    else frame.focus();
  }
  document.querySelectorAll("input[type=radio]").forEach((input) => {
    const side = sides.find((s) => s.letter === input.dataset.side);
    input.addEventListener("change", () => setStage(side, Number(input.value)));
    if (input.checked && Number(input.value) !== side.stage) setStage(side, Number(input.value)); // a reload kept it
  });
  window.addEventListener("beforeprint", () => {
    hide();
    document.querySelectorAll("details").forEach((part) => { part.open = true; });
  });
  document.documentElement.dataset.ready = "";
})();
