// The hand of one pair where it should be, and where few digits put it.
"use strict";

defineMoving("half-angle", class extends MovingFigure {
  build() {
    const { degrees, errors } = this.data;
    this.last = errors.float16["1"].length - 1;
    const ends = { min: 0, max: this.last };
    this.slider({ name: "position", label: "position", value: 2040, ...ends });
    const dtypes = ["float32", "float16", "bfloat16"].map((name) => [name, name]);
    const label = "the model computes in";
    this.choice({ name: "dtype", label, options: dtypes, value: "float16" });
    const pairs = Object.entries(degrees).map(([pair, step]) => [
      pair,
      `pair ${pair}: ${Math.round(step)}\u00b0 a token`,
    ]);
    this.choice({ name: "pair", label: "the hand of", options: pairs, value: "2" });
  }

  // Degrees that the hand is off at a position.
  errorAt(position) {
    const { dtype, pair } = this.state;
    if (dtype === "float32") return this.data.slopes[pair] * position;
    return this.data.errors[dtype][pair][position] / 10;
  }

  draw(width) {
    const wide = width >= 560;
    const size = wide ? 220 : 190;
    const label =
      "A dial with two hands, exact and computed, and the computed hand\u2019s error " +
      "against position. Drag in the chart to move along the text.";
    const root = this.canvas(width, wide ? 270 : size + 260, label);
    this.drawDial(root, wide ? 112 : width / 2, 12 + size / 2, size / 2 - 10);
    this.drawKey(root, wide ? 6 : width / 2 - 116, size + 26);
    if (wide) this.drawChart(root, 296, 34, width - 310, 180);
    else this.drawChart(root, 56, size + 76, width - 68, 130);
  }

  drawDial(root, x, y, radius) {
    const thin = { class: "line", "stroke-width": 1.5 };
    this.svg("circle", { cx: x, cy: y, r: radius, ...thin }, root);
    for (let i = 0; i < 12; i++) {
      const transform = `translate(${x} ${y}) rotate(${30 * i})`;
      this.svg("path", { d: `M0 ${-radius}v8`, ...thin, transform }, root);
    }
    this.wedge = this.svg("path", { class: "f2", "fill-opacity": 0.3 }, root);
    const hand = { d: `M0 0V${16 - radius}`, "stroke-width": 4 };
    this.hands = [
      this.svg("path", { ...hand, class: "c1" }, root),
      this.svg("path", { ...hand, class: "c2", "stroke-dasharray": "7 5" }, root),
    ];
    this.svg("circle", { cx: x, cy: y, r: 5, fill: "currentColor" }, root);
    this.dial = { x, y, r: radius - 30 };
  }

  drawKey(root, x, y) {
    const line = { d: `M${x} ${y}h26`, class: "c1", "stroke-width": 4 };
    this.svg("path", line, root);
    this.text("exact", x + 34, y + 5, "start", root);
    const dashed = { ...line, d: `M${x + 96} ${y}h26`, "stroke-dasharray": "7 5" };
    this.svg("path", { ...dashed, class: "c2" }, root);
    this.text("computed", x + 130, y + 5, "start", root);
  }

  drawChart(root, left, top, width, height) {
    const bottom = top + height;
    const chart = this.svg("g", {}, root);
    this.svg("rect", { x: left, y: top, width, height, fill: "transparent" }, chart);
    this.x = (position) => left + (position * width) / 2048;
    this.y = (error) => top + ((1 - error / this.range) * height) / 2;
    this.text("off by", left - 46, top - 14, "start", chart);
    this.ticks = [1, 0, -1].map((at) => {
      const y = top + ((1 - at) * height) / 2;
      this.svg("path", { d: `M${left} ${y}h${width}`, class: "faint" }, chart);
      return this.text("", left - 6, y + 5, "end", chart);
    });
    for (const p of width > 300 ? [0, 512, 1024, 1536, 2048] : [0, 1024, 2048])
      this.text(p, this.x(p), bottom + 22, p < 2048 ? "middle" : "end", chart);
    this.text("position", left + width, bottom + 44, "end", chart);
    const points = { class: "line", "stroke-width": 2, "stroke-linecap": "round" };
    this.cloud = this.svg("path", points, chart);
    const rule = { class: "c2", "stroke-width": 1.5, "stroke-dasharray": "4 4" };
    this.mark = this.svg("path", { d: `M0 ${top}V${bottom}`, ...rule }, chart);
    this.point = this.svg("circle", { r: 7, class: "c2", "stroke-width": 3 }, chart);
    const to = ({ x }) => Math.round(((x - left) * 2048) / width);
    const move = (at) => Math.max(0, Math.min(this.last, to(at)));
    this.drag(chart, (at) => this.set({ position: move(at) }), "pan-y");
  }

  update() {
    const { position, dtype, pair } = this.state;
    this.range = dtype === "bfloat16" ? 180 : 60;
    this.ticks.forEach((tick, i) => {
      tick.textContent = `${this.signed((1 - i) * this.range)}\u00b0`;
    });
    const points = [];
    for (let p = 0; p <= this.last; p++)
      points.push(`M${this.x(p).toFixed(1)} ${this.y(this.errorAt(p)).toFixed(1)}h.1`);
    this.cloud.setAttribute("d", points.join(""));
    const error = this.errorAt(position);
    this.mark.setAttribute("transform", `translate(${this.x(position)} 0)`);
    this.point.setAttribute("cx", this.x(position));
    this.point.setAttribute("cy", this.y(error));
    this.turnHands(position * this.data.degrees[pair], error);
    this.tell(error);
  }

  turnHands(exact, error) {
    const { x, y, r } = this.dial;
    const ends = [exact, exact + error];
    ends.forEach((degrees, i) => {
      const transform = `translate(${x} ${y}) rotate(${degrees % 360})`;
      this.hands[i].setAttribute("transform", transform);
    });
    const [from, to] = ends.map((degrees) => {
      const radians = (degrees * Math.PI) / 180;
      return `${x + r * Math.sin(radians)} ${y - r * Math.cos(radians)}`;
    });
    const arc = `A${r} ${r} 0 0 ${error > 0 ? 1 : 0} ${to}`;
    this.wedge.setAttribute("d", `M${x} ${y}L${from}${arc}Z`);
  }

  tell(error) {
    const { position, dtype, pair } = this.state;
    const right = Math.abs(error) < 0.5;
    const off = right ? "right to half a degree" : `off by ${this.signed(error)}\u00b0`;
    const words = `Position ${position}, pair ${pair}, model in ${dtype}: ${off}.`;
    if (position === 0) return this.say(words);
    const step = this.data.degrees[pair];
    const turned = step + error - this.errorAt(position - 1);
    const seen = ((turned + 900) % 360) - 180; // of a hand: -180 to 180
    const ought = `the hand should turn ${this.signed(step)}\u00b0`;
    const does = `turns ${this.signed(seen)}\u00b0`;
    this.say(`${words} From the token before, ${ought} and ${does}.`);
  }
});
