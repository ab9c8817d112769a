// Query heads that share KV heads: wires fold together, and the cache shrinks.
"use strict";

defineMoving("gqa-groups", class extends MovingFigure {
  build() {
    const { kv_heads: kvHeads, models } = this.data;
    const names = Object.keys(models);
    const counts = kvHeads.map((count, i) => [i, String(count)]);
    this.choice({ name: "i", label: "KV heads for 8 query heads", options: counts, value: 2 });
    const options = names.map((name) => [name, name]);
    this.choice({ name: "model", label: "Cache of", options, value: "Llama-3-8B" });
    this.toggle({ name: "tiled", label: "wire with repeat instead (the mistake)" });
  }

  // Where a KV head stands: below the middle of those that should read it.
  place(kv) {
    const readers = this.data.reads[this.state.i].flatMap((head, n) => (head === kv ? [n] : []));
    return this.x(readers.reduce((sum, n) => sum + n, 0) / readers.length);
  }

  x(n) {
    return this.left + n * this.gap;
  }

  draw(width) {
    const count = this.data.reads[0].length;
    const root = this.canvas(width, 424, "Query heads above, KV heads below, and bars of cache");
    this.gap = Math.min(64, (width - 36) / (count - 1));
    this.left = (width - this.gap * (count - 1)) / 2;
    const digit = { "text-anchor": "middle", style: "fill: var(--pst-color-background); font-weight: 700" };
    this.svg("text", { x: 0, y: 16, text: "query heads" }, root);
    this.svg("text", { x: 0, y: 190, text: "KV heads" }, root);
    this.heads = Array.from({ length: count }, (_, n) => {
      const wire = this.svg("line", { x1: this.x(n), y1: 56, y2: 136, "stroke-width": 3 }, root);
      return { wire, from: null };
    });
    for (const [n, head] of this.heads.entries()) {
      head.top = this.svg("circle", { cx: this.x(n), cy: 42, r: 15 }, root);
      this.svg("text", { x: this.x(n), y: 48, ...digit, text: n }, root);
      head.square = this.svg("rect", { y: 136, width: 32, height: 32, rx: 3 }, root);
      head.digit = this.svg("text", { y: 158, ...digit }, root);
      head.from = null;
    }
    this.bars = this.svg("g", {}, root);
    this.wide = width;
    this.reserve();
  }

  // Make room for the longest sentence, so that no other moves the controls.
  reserve() {
    const names = Object.keys(this.data.models);
    const texts = this.data.kv_heads.flatMap((_, i) => names.flatMap((model) =>
      [false, true].map((tiled) => this.words({ i, model, tiled }))));
    this.say(texts.reduce((a, b) => (b.length > a.length ? b : a)));
  }

  update() {
    this.aim();
    this.weigh();
    this.say(this.words(this.state));
  }

  // Let every wire and its square go where they belong, in a third of a second.
  aim() {
    const { reads, tiled } = this.data;
    const wiring = (this.state.tiled ? tiled : reads)[this.state.i];
    for (const [n, head] of this.heads.entries()) {
      head.now ??= {};
      head.goal = { end: this.place(wiring[n]), square: this.place(reads[this.state.i][n]) };
      head.wire.setAttribute("class", `c${(wiring[n] % 5) + 1}`);
      head.wire.setAttribute("stroke-dasharray", wiring[n] === reads[this.state.i][n] ? "none" : "7 5");
      head.top.setAttribute("class", `f${(wiring[n] % 5) + 1}`);
      head.square.setAttribute("class", `f${(reads[this.state.i][n] % 5) + 1}`);
      head.digit.textContent = reads[this.state.i][n];
    }
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const first = this.heads[0].from === null;
    for (const head of this.heads) head.from = first ? head.goal : head.shown;
    cancelAnimationFrame(this.frame);
    const begin = performance.now();
    const step = (time) => {
      const part = first || still ? 1 : Math.min(1, Math.max(0, time - begin) / 350);
      this.show(part * part * (3 - 2 * part));
      if (part < 1) this.frame = requestAnimationFrame(step);
    };
    step(begin);
  }

  show(part) {
    for (const head of this.heads) {
      const between = (key) => head.from[key] + part * (head.goal[key] - head.from[key]);
      head.shown = { end: between("end"), square: between("square") };
      head.wire.setAttribute("x2", head.shown.end);
      head.square.setAttribute("x", head.shown.square - 16);
      head.digit.setAttribute("x", head.shown.square);
    }
  }

  // A bar for each way to share; the chosen one is full.
  weigh() {
    const model = this.data.models[this.state.model];
    this.bars.replaceChildren();
    const most = Math.max(...model.token_bytes);
    this.svg("text", { x: 0, y: 228, text: `One token's cache in ${this.state.model}` }, this.bars);
    for (const [i, bytes] of model.token_bytes.entries()) {
      const y = 248 + 44 * i;
      const chosen = i === this.state.i;
      const built = model.kv_heads[i] === model.built ? ", as built" : "";
      const words = `${model.kv_heads[i]} KV heads${built}`;
      const weight = chosen ? "700" : "400";
      this.svg("text", { x: 0, y: y + 14, "font-weight": weight, text: words }, this.bars);
      const size = `${(bytes / 1024).toLocaleString("en")} KiB`;
      this.svg("text", { x: this.wide, y: y + 14, "text-anchor": "end", "font-weight": weight, text: size }, this.bars);
      const bar = { x: 1, y: y + 20, width: ((this.wide - 2) * bytes) / most, height: 12 };
      this.svg("rect", { ...bar, class: chosen ? "f1" : "c1", "stroke-width": 1.5 }, this.bars);
    }
  }

  words({ i, tiled, model: name }) {
    const right = this.data.reads[i];
    const wiring = tiled ? this.data.tiled[i] : right;
    const count = this.data.kv_heads[i];
    const lists = Array.from({ length: count }, (_, kv) =>
      wiring.flatMap((read, n) => (read === kv ? [n] : [])));
    const readers = lists.map((heads, kv) => `${heads.join(" ")} read${heads.length > 1 ? "" : "s"} ${kv}`);
    const who = count === wiring.length ? "each query head has its own" : readers.join(", ");
    const good = wiring.filter((read, n) => read === right[n]).length;
    const found = good === wiring.length ? "the mistake does not show" : `${good} of ${wiring.length} query heads read the right one`;
    const model = this.data.models[name];
    const size = `${(model.token_bytes[i] / 1024).toLocaleString("en")} KiB a token, ${(model.text_bytes[i] / 2 ** 20).toLocaleString("en")} MiB for 4,096`;
    const built = model.kv_heads[i] === model.built ? "as it was built" : "if it shared so";
    return `8 on ${count}: ${who}${tiled ? `; with repeat, ${found}` : ""}. ${name}, ${built}: ${model.kv_heads[i]} KV heads a layer, ${size}.`;
  }
});
