// A text being written, twice: what each step computes without a cache and with one.
"use strict";

defineMoving("kv-cache", class extends MovingFigure {
  build() {
    const { computed } = this.data.with_cache;
    const show = (step) => `${step} of ${computed.length}, ${step === 1 ? "prefill" : "decode"}`;
    this.slider({ name: "step", label: "Step", min: 1, max: computed.length, value: 4, show });
  }

  // Draw the words as boxes that flow into lines; return the boxes and their height.
  flow(words, left, top, width, parent) {
    let [x, y] = [left, top];
    const boxes = words.map((word) => {
      const group = this.svg("g", {}, parent);
      const box = this.svg("rect", { x: 1, y: 1, height: 30, rx: 3, "stroke-width": 1.5 }, group);
      const text = this.svg("text", { x: 9, y: 21, text: word }, group);
      const wide = Math.ceil(text.getComputedTextLength()) + 16;
      box.setAttribute("width", wide);
      if (x + wide > left + width) [x, y] = [left, y + 36];
      group.setAttribute("transform", `translate(${x} ${y})`);
      x += wide + 5;
      return { group, box, text };
    });
    return { boxes, bottom: y + 36 };
  }

  draw(width) {
    const wide = width >= 640;
    const room = wide ? (width - 32) / 2 : width;
    const root = this.canvas(width, 100, "A text of twelve words, twice: without a cache and with one");
    const defs = this.svg("defs", {}, root);
    const hatch = { id: "moving-again", width: 7, height: 7, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" };
    const pattern = this.svg("pattern", hatch, defs);
    this.svg("line", { x1: 0, y1: 0, x2: 0, y2: 7, class: "c2", "stroke-width": 4, opacity: 0.55 }, pattern);
    const names = { without: "Without a cache", with_cache: "With a cache" };
    let [left, top, bottom] = [0, 0, 0];
    this.panels = Object.entries(names).map(([name, title]) => {
      this.svg("text", { x: left, y: top + 16, "font-weight": 600, text: title }, root);
      const { boxes, bottom: end } = this.flow(this.data.words, left, top + 26, room, root);
      const total = this.svg("text", { x: left, y: end + 20 }, root);
      const frame = { x: left + 1, y: end + 28, height: 14, "stroke-width": 1.5 };
      const bar = this.svg("rect", { ...frame, class: name === "without" ? "f2" : "f1" }, root);
      this.svg("rect", { ...frame, width: room - 2, class: "faint" }, root);
      bottom = end + 58;
      if (wide) left = room + 32;
      else top = bottom;
      return { name, boxes, total, bar, room: room - 2 };
    });
    const states = ["first", "again", "read", "drawn"];
    const words = ["computed", "computed again", "read from the cache", "drawn now"];
    const key = this.flow(words, 0, bottom, width, root);
    key.boxes.forEach((part, i) => this.paint(part, states[i]));
    root.setAttribute("viewBox", `0 0 ${width} ${key.bottom}`);
    this.say(this.words(this.data.without.computed.length)); // the longest: make room for it
  }

  paint({ group, box, text }, state) {
    group.setAttribute("visibility", state === "later" ? "hidden" : "visible");
    box.setAttribute("class", { first: "f1", again: "c2", read: "line", drawn: "line" }[state] ?? "");
    box.style.fill = { again: "url(#moving-again)", read: "var(--moving-wash)" }[state] ?? "";
    box.setAttribute("stroke-dasharray", state === "drawn" ? "5 4" : "none");
    text.setAttribute("class", state === "again" ? "halo" : "");
    text.style.fill = state === "first" ? "var(--pst-color-background)" : "";
  }

  update() {
    const { data } = this;
    const at = this.state.step - 1;
    const most = this.sum(data.without.computed, data.without.computed.length);
    for (const { name, boxes, total, bar, room } of this.panels) {
      const { computed, read } = data[name];
      const length = computed[at] + read[at]; // of the text, before this step draws
      const known = at ? computed[at - 1] + read[at - 1] : 0;
      boxes.forEach((box, n) => {
        const stays = n < read[at] ? "read" : n < known ? "again" : "first";
        this.paint(box, n < length ? stays : n === length ? "drawn" : "later");
      });
      const passed = this.sum(computed, this.state.step);
      total.textContent = `tokens through the layers so far: ${passed}`;
      bar.setAttribute("width", (room * passed) / most);
    }
    this.say(this.words(this.state.step));
  }

  sum(numbers, end) {
    return numbers.slice(0, end).reduce((a, b) => a + b, 0);
  }

  words(step) {
    const { without, with_cache: cached, token_bytes: bytes } = this.data;
    const at = step - 1;
    const again = at ? `, ${without.computed[at - 1]} of them again` : "";
    const [fresh, read] = [cached.computed[at], cached.read[at]];
    const both = (numbers) => numbers.map((list) => this.sum(list, step));
    const [all, few] = both([without.computed, cached.computed]);
    const [much, little] = both([without.operations, cached.operations]).map((n) => (n / 1e6).toFixed(2));
    return `Step ${step}: without a cache ${without.computed[at]} tokens pass through every layer${again}; `
      + `with one, ${fresh}, and ${read} are read back. So far ${all} against ${few} tokens, `
      + `${much} against ${little} million operations. The cache holds ${fresh + read} tokens, `
      + `${((fresh + read) * bytes).toLocaleString("en")} bytes.`;
  }
});
