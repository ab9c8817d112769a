// A query's and a key's pair on a circle; their product, against the distance.
"use strict";

defineMoving("rope-pair", class extends MovingFigure {
  build() {
    const { wavelengths, query } = this.data;
    this.last = query[0].length - 1;
    const ends = { min: 0, max: this.last };
    this.slider({ name: "m", label: "query\u2019s position m", value: 8, ...ends });
    this.slider({ name: "n", label: "key\u2019s position n", value: 4, ...ends });
    const show = () => `${this.state.m} and ${this.state.n}`;
    const both = { name: "both", label: "move both", value: 4, show };
    this.both = this.slider({ ...both, min: 0, max: this.last - 4 });
    const options = wavelengths.map((w, i) => [`${i}`, `${w} tokens`]);
    this.choice({ name: "pair", label: "the pair turns once in", options, value: "1" });
  }

  // Both sliders follow "move both", and it follows them.
  set(changes) {
    if ("both" in changes) {
      const { m, n } = this.state;
      const step = Number(changes.both) - Math.min(m, n);
      changes = { m: m + step, n: n + step };
    }
    const { m, n } = { ...this.state, ...changes };
    this.both.max = this.last - Math.abs(m - n);
    super.set({ ...changes, both: Math.min(m, n) });
  }

  draw(width) {
    const wide = width >= 560;
    const size = wide ? 230 : 200;
    const label =
      "Two arrows on a circle, the query\u2019s and the key\u2019s; " +
      "beside them their product against their distance.";
    const root = this.canvas(width, wide ? 304 : size + 230, label);
    this.drawLine(root, width);
    const x = wide ? 125 : width / 2;
    const [y, radius] = [(wide ? 70 : 60) + size / 2, size / 2 - 18];
    this.circle = { x, y, radius };
    const rim = { cx: x, cy: y, r: radius, class: "line", "stroke-width": 1.5 };
    this.svg("circle", rim, root);
    this.wedge = this.svg("path", { class: "f5", "fill-opacity": 0.3 }, root);
    const k = this.drawArrow(root, "k", 2, "6 4");
    this.arrows = { k, q: this.drawArrow(root, "q", 1, "none") };
    if (wide) this.drawWave(root, 290, 94, width - 300, 164);
    else this.drawWave(root, 42, size + 86, width - 52, 104);
  }

  // The text as a line of ticks, with a mark at each of the two tokens.
  drawLine(root, width) {
    this.tick = (p) => 16 + (p * (width - 32)) / this.last;
    for (let p = 0; p <= this.last; p++) {
      const d = `M${this.tick(p)} ${p % 6 ? 28 : 25}V34`;
      this.svg("path", { d, class: "line", "stroke-width": 1.5 }, root);
      if (p % 6 === 0) this.text(p, this.tick(p), 54, "middle", root);
    }
    this.span = this.svg("path", { class: "c5", "stroke-width": 4 }, root);
    const [k, q] = [2, 1].map((i) => this.svg("g", { class: `f${i}` }, root));
    this.svg("rect", { x: -6, y: 22, width: 12, height: 12 }, k);
    this.svg("circle", { cx: 0, cy: 28, r: 7 }, q);
    this.marks = { k, q };
    for (const [name, mark] of Object.entries(this.marks))
      this.text(name, 0, 15, "middle", mark, { "font-weight": 700 });
  }

  drawArrow(root, name, colour, dash) {
    const { radius } = this.circle;
    const arrow = this.svg("g", { class: `c${colour}`, "stroke-width": 3.5 }, root);
    this.svg("path", { d: `M0 0H${radius - 10}`, "stroke-dasharray": dash }, arrow);
    this.svg("path", { d: `M${radius} 0l-14 -7v14z`, class: `f${colour}` }, arrow);
    const look = { class: `f${colour} halo`, "font-weight": 700 };
    return { arrow, label: this.text(name, 0, 0, "middle", root, look) };
  }

  // Products against distance, a dot for each distance that the table has.
  drawWave(root, left, top, width, height) {
    const x = (d) => left + ((d + this.last) * width) / (2 * this.last);
    const y = (v) => top + ((1 - v) * height) / 2;
    this.at = (d, v) => `${x(d)} ${y(v)}`;
    for (const v of [1, 0, -1]) {
      this.svg("path", { d: `M${left} ${y(v)}h${width}`, class: "faint" }, root);
      this.text(this.signed(v), left - 6, y(v) + 5, "end", root);
    }
    const bottom = top + height;
    for (const d of [-20, -10, 0, 10, 20])
      this.text(this.signed(d), x(d), bottom + 20, "middle", root);
    this.text("distance m \u2212 n", left + width, bottom + 40, "end", root);
    this.text("product q \u00b7 k", left, top - 12, "start", root);
    this.wave = this.svg("path", { class: "line", "stroke-width": 1.5 }, root);
    this.dots = this.svg("g", { class: "f1" }, root);
    const ring = { r: 8, fill: "none", stroke: "currentColor", "stroke-width": 3 };
    this.here = this.svg("circle", ring, root);
  }

  update() {
    const { m, n, pair } = this.state;
    const [q, k] = [this.data.query[pair][m], this.data.key[pair][n]];
    this.turn("q", q, 13);
    this.turn("k", k, -34);
    const between = ((q - k + 540) % 360) - 180;
    this.wedge.setAttribute("d", this.sector(k, between));
    this.marks.k.setAttribute("transform", `translate(${this.tick(n)} 0)`);
    this.marks.q.setAttribute("transform", `translate(${this.tick(m)} 0)`);
    this.span.setAttribute("d", `M${this.tick(n)} 28H${this.tick(m)}`);
    const table = this.data.products[pair];
    this.plot(table);
    this.here.setAttribute("transform", `translate(${this.at(m - n, table[m][n])})`);
    this.tell(table, between);
  }

  // Where a radius of this length ends; degrees count as in the table, from the right.
  end(degrees, length) {
    const { x, y } = this.circle;
    const radians = (degrees * Math.PI) / 180;
    return [x + length * Math.cos(radians), y - length * Math.sin(radians)];
  }

  turn(name, degrees, beyond) {
    const { x, y, radius } = this.circle;
    const { arrow, label } = this.arrows[name];
    arrow.setAttribute("transform", `translate(${x} ${y}) rotate(${-degrees})`);
    const [left, middle] = this.end(degrees, radius + beyond);
    label.setAttribute("x", left);
    label.setAttribute("y", middle + 5);
  }

  sector(from, turned) {
    const { x, y, radius } = this.circle;
    const r = radius * 0.45;
    const [start, end] = [from, from + turned].map((d) => this.end(d, r).join(" "));
    return `M${x} ${y}L${start}A${r} ${r} 0 0 ${turned > 0 ? 0 : 1} ${end}Z`;
  }

  plot(table) {
    const points = [];
    for (let d = -this.last; d <= this.last; d++)
      points.push(this.at(d, table[Math.max(d, 0)][Math.max(-d, 0)]));
    this.wave.setAttribute("d", `M${points.join("L")}`);
    this.dots.replaceChildren();
    for (const point of points)
      this.svg("circle", { r: 3, transform: `translate(${point})` }, this.dots);
  }

  // Count in the table how many places of this distance have this product.
  tell(table, between) {
    const { m, n } = this.state;
    const product = table[m][n];
    const places = table.flatMap((row, p) => row.filter((_, key) => p - key === m - n));
    const same = places.filter((value) => value === product).length;
    const every = same === 1 ? "the only place" : `all ${same} places`;
    const all = same === places.length ? every : `${same} of ${places.length} places`;
    this.say(
      `Query at ${m}, key at ${n}: the angle from k to q is ` +
        `${this.signed(between)}\u00b0, the product ${this.signed(product, 2)}, ` +
        `the same at ${all} where m \u2212 n is ${this.signed(m - n)}.`,
    );
  }
});
