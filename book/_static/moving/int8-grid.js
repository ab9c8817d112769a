// The weights of a matrix over the levels that they may have, while one weight grows.
"use strict";

defineMoving("int8-grid", class extends MovingFigure {
  shared = { matrix: "the matrix", row: "each row", group: "each 32 weights" };

  build() {
    const { times, outlier } = this.data;
    const size = (i) => `${times[i]} ×, ${this.number(times[i] * outlier, 2)}`;
    this.slider({ name: "i", label: "The largest weight", min: 0, max: times.length - 1, value: 3, show: size });
    const bits = [["8", "8"], ["4", "4"]];
    this.choice({ name: "bits", label: "Bits a weight", options: bits, value: "4" });
    const options = Object.entries(this.shared);
    this.choice({ name: "sharing", label: "One scale for", options, value: "matrix" });
  }

  number(x, digits) {
    return x.toFixed(digits).replace("-", "−");
  }

  x(weight) {
    return this.wide * (0.5 + (0.5 * weight) / this.limit);
  }

  draw(width) {
    this.wide = width;
    this.limit = 1.02 * Math.abs(this.data.outlier);
    this.root = this.canvas(width, 352, "A histogram of weights, and under it the levels that they may have");
    const counts = this.data.histogram;
    const most = Math.max(...counts);
    const edge = Math.abs(this.data.outlier);
    const step = (2 * edge) / counts.length;
    let path = `M${this.x(-edge)} 150`;
    counts.forEach((count, i) => {
      path += ` V${150 - (124 * count) / most} H${this.x(-edge + (i + 1) * step)}`;
    });
    path += " V150 Z";
    const clip = this.svg("clipPath", { id: "moving-zeros" }, this.svg("defs", {}, this.root));
    this.clip = this.svg("rect", { y: 0, height: 152 }, clip);
    const shape = this.svg("path", { d: path, class: "line", "stroke-width": 1.5 }, this.root);
    shape.style.fill = "var(--moving-wash)";
    this.svg("path", { d: path, class: "f2", "clip-path": "url(#moving-zeros)" }, this.root);
    this.svg("text", { x: 0, y: 16, text: "all weights" }, this.root);
    this.svg("text", { x: width, y: 16, "text-anchor": "end", text: "filled: become 0" }, this.root);
    this.tail = this.svg("g", {}, this.root);
    this.lanes = this.svg("g", {}, this.root);
    this.reserve();
  }

  // Make room for the longest sentence, so that no other moves the controls.
  reserve() {
    const texts = ["8", "4"].flatMap((bits) => Object.keys(this.shared).flatMap((sharing) =>
      this.data.times.map((_, i) => this.words({ bits, sharing, i }))));
    this.say(texts.reduce((a, b) => (b.length > a.length ? b : a)));
  }

  // Point at the outlier: in the drawing, or beyond its edge.
  point() {
    const { times, outlier } = this.data;
    const value = times[this.state.i] * outlier;
    const side = Math.sign(value);
    const x = this.x(Math.max(-this.limit, Math.min(this.limit, value)));
    const inside = Math.abs(value) <= this.limit;
    const d = inside ? `M${x} 122 l-6 -12 h12 z M${x - 1} 122 h2 v28 h-2 z` : `M${x} 122 l${-14 * side} -7 v14 z`;
    const text = { x: x - 20 * side, y: 128, "text-anchor": side > 0 ? "end" : "start", class: "halo" };
    this.tail.replaceChildren();
    this.svg("path", { d, class: "f4" }, this.tail);
    this.svg("text", { ...text, text: this.number(value, 2) }, this.tail);
  }

  update() {
    const { bits, sharing, i } = this.state;
    const { places } = this.data.grids[bits][sharing][i];
    const most = places[2][0]; // the scale that nearly all weights have
    this.clip.setAttribute("x", this.x(-most / 2));
    this.clip.setAttribute("width", this.x(most / 2) - this.x(-most / 2));
    this.point();
    this.lanes.replaceChildren();
    const names = ["its 32 neighbours", "the rest of its row", `${this.data.shape[0] - 1} other rows`];
    names.forEach((name, lane) => this.lane(180 + 58 * lane, name, places[lane]));
    this.say(this.words(this.state));
  }

  words({ bits, sharing, i }) {
    const { places, all } = this.data.grids[bits][sharing][i];
    const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)}\u00a0%`;
    const [group, row, others] = places.map((place) => percent(place[1]));
    const largest = this.number(this.data.times[i] * this.data.outlier, 2);
    return `${bits} bits, one scale for ${this.shared[sharing]}, the largest weight ${largest}: `
      + `of its group ${group} become 0, of the rest of its row ${row}, of the other rows ${others}. `
      + `Over all, the error is ${percent(all[2])} of the weights.`;
  }

  // One line of levels; the zone in which every weight becomes 0 is filled.
  lane(y, name, [scale, zeros]) {
    const half = 2 ** (this.state.bits - 1);
    this.svg("text", { x: 0, y, text: name }, this.lanes);
    const words = `${(100 * zeros).toFixed(zeros < 0.1 ? 1 : 0)} % become 0`;
    this.svg("text", { x: this.wide, y, "text-anchor": "end", text: words }, this.lanes);
    const zone = { x: Math.max(0, this.x(-scale / 2)), y: y + 8, height: 26, class: "f2" };
    this.svg("rect", { ...zone, width: Math.min(this.wide, this.x(scale / 2)) - zone.x }, this.lanes);
    let path = "";
    for (let level = -half; level < half; level++) {
      const x = this.x(level * scale);
      if (x >= 0 && x <= this.wide) path += `M${x.toFixed(1)} ${y + 8}v26`;
    }
    this.svg("path", { d: path, style: "stroke: currentColor; stroke-width: 1" }, this.lanes);
    this.svg("line", { x1: 0, x2: this.wide, y1: y + 34, y2: y + 34, class: "line" }, this.lanes);
  }
});
