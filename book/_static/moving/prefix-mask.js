// One sentence cut into context and answer: who sees whom, and each token's numbers.
"use strict";

defineMoving("prefix-mask", class extends MovingFigure {
  build() {
    const context = { name: "context", label: "tokens of context" };
    this.most = this.data["[MASK]"].length;
    this.slider({ ...context, min: 1, max: this.most, value: 5 });
    const options = ["[MASK]", "[gMASK]"].map((kind) => [kind, kind]);
    this.choice({ name: "kind", label: "the blank", options, value: "[MASK]" });
  }

  draw(width) {
    const count = this.data["[MASK]"][0].words.length;
    const [left, top] = [74, 82];
    const cell = Math.min(40, Math.floor((width - left) / count));
    const side = count * cell;
    const label =
      "A square table of tokens that look, by row, and tokens looked at, by column; " +
      "below each column its place and its step. Drag sideways in the table to move " +
      "the border of the context.";
    const root = this.canvas(left + side, top + side + 118, label);
    this.grid = { left, top, cell, count, bottom: top + side };
    this.area = this.svg("g", {}, root);
    const touched = { x: left, y: 0, width: side, height: top + side + 64 };
    this.svg("rect", { ...touched, fill: "transparent" }, this.area);
    const wash = { fill: "var(--moving-wash)", x: left, y: top - 4, rx: 4 };
    this.shade = this.svg("rect", { ...wash, height: side + 66 }, this.area);
    this.cells = this.svg("g", {}, this.area);
    const dashes = { class: "c2", "stroke-width": 3, "stroke-dasharray": "7 4" };
    const d = `M0 ${top - 10}V${top + side + 64}`;
    this.border = this.svg("path", { d, ...dashes }, this.area);
    this.words = this.drawWords(root);
    this.drawKey(root, top + side + 96);
    const to = ({ x }) => Math.round((x - left) / cell);
    const move = (at) => Math.max(1, Math.min(this.most, to(at)));
    this.drag(this.area, (at) => this.set({ context: move(at) }), "pan-y");
  }

  // Words beside the rows and above the columns, and the two rows of numbers.
  drawWords(root) {
    const { left, top, cell, count, bottom } = this.grid;
    const names = { rows: [], columns: [], places: [], steps: [] };
    for (let i = 0; i < count; i++) {
      const middle = (i + 0.5) * cell;
      const x = left + middle;
      names.rows.push(this.text("", left - 6, top + middle + 5, "end", root));
      const turn = { transform: `translate(${x + 5} ${top - 10}) rotate(-90)` };
      names.columns.push(this.text("", 0, 0, "start", this.area, turn));
      names.places.push(this.text("", x, bottom + 24, "middle", this.area));
      names.steps.push(this.text("", x, bottom + 50, "middle", this.area));
    }
    const bold = { "font-weight": 700 };
    this.text("place", left - 6, bottom + 24, "end", root, bold);
    this.text("step", left - 6, bottom + 50, "end", root, bold);
    return names;
  }

  drawKey(root, y) {
    const roomy = this.drawnWidth >= 324;
    const kinds = { back: 10, ahead: roomy ? 126 : 88, hidden: roomy ? 250 : 172 };
    for (const [kind, x] of Object.entries(kinds)) {
      const words = roomy && kind !== "hidden" ? `sees ${kind}` : kind;
      this.drawCell(root, `translate(${x} ${y - 5})`, kind, 8);
      this.text(words, x + 14, y + 1, "start", root);
    }
  }

  drawCell(parent, transform, kind, r) {
    const [tag, look] = {
      back: ["rect", { x: -r, y: -r, width: 2 * r, height: 2 * r, rx: 2, class: "f1" }],
      ahead: ["circle", { r, class: "f2" }],
      hidden: ["circle", { r: 2, class: "line" }],
    }[kind];
    this.svg(tag, { ...look, transform }, parent);
  }

  update() {
    const { context, kind } = this.state;
    const { words, mask, places, steps } = this.data[kind][context - 1];
    const { left, top, cell } = this.grid;
    this.shade.setAttribute("width", context * cell);
    this.border.setAttribute("transform", `translate(${left + context * cell} 0)`);
    const shown = { rows: words, columns: words, places, steps };
    for (const [name, nodes] of Object.entries(this.words))
      nodes.forEach((node, i) => {
        node.textContent = shown[name][i];
        node.setAttribute("font-weight", i < context ? 400 : 700);
      });
    const pairs = { back: 0, ahead: 0, hidden: 0 };
    this.cells.replaceChildren();
    mask.forEach((row, t) =>
      [...row].forEach((sees, s) => {
        const which = sees === "0" ? "hidden" : s > t ? "ahead" : "back";
        pairs[which]++;
        const [x, y] = [left + (s + 0.5) * cell, top + (t + 0.5) * cell];
        this.drawCell(this.cells, `translate(${x} ${y})`, which, cell * 0.36);
      }),
    );
    this.tell(pairs, places, steps);
  }

  tell({ back, ahead, hidden }, places, steps) {
    const { context, kind } = this.state;
    const tokens = context === 1 ? "1 token" : `${context} tokens`;
    const inside = `${ahead} of them look ahead, all inside the context`;
    const extra = ahead ? inside : "none of them looks ahead: the mask is causal";
    this.say(
      `${kind}, ${tokens} of context: ${back + ahead} of ${back + ahead + hidden} ` +
        `pairs may look, ${extra}. The answer, from <sop> on, stands at ` +
        `place ${places.at(-1)}, steps ${steps[context]} to ${steps.at(-1)}.`,
    );
  }
});
