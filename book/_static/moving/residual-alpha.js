// Where the last vector of 28 blocks comes from, and how large the stream is, by alpha.
"use strict";

defineMoving("residual-alpha", class extends MovingFigure {
  build() {
    const { alphas, root, chatglm } = this.data;
    this.blocks = chatglm[0].shares.length - 1;
    this.root = `\u221a${2 * this.blocks}`;
    this.named = (i) => (i === root ? `${alphas[i]} = ${this.root}` : `${alphas[i]}`);
    const ends = { min: 0, max: alphas.length - 1, value: 0 };
    const alpha = { name: "alpha", label: "\u03b1", show: this.named, ...ends };
    this.dial = this.slider(alpha);
    const press = () => this.set({ wiring: "chatglm", alpha: root });
    this.button({ label: `\u03b1 of ChatGLM-6B, ${this.root}`, press });
    const chatglmToo = ["chatglm", "ChatGLM-6B\u2019s"];
    const options = [chatglmToo, ["llama", "Llama\u2019s, without \u03b1"]];
    this.choice({ name: "wiring", label: "the wiring", options, value: "chatglm" });
  }

  draw(width) {
    const label =
      "Two bar charts: the size of the stream before each block and behind the last, " +
      "and what share of the last vector the input and each block made.";
    const root = this.canvas(width, 396, label);
    this.left = 52;
    this.step = (width - this.left - 8) / (this.blocks + 1);
    const sizes = { top: 34, height: 110, ends: [0, 8, 16], colours: ["f3", "f3"] };
    this.sizes = this.drawBars(root, "size of the stream (RMS)", String, sizes);
    const percent = (share) => `${100 * share}%`;
    const shares = { top: 204, height: 140, ends: [0, 0.5, 1], colours: ["f2", "f1"] };
    this.shares = this.drawBars(root, "share of the last vector", percent, shares);
    for (const i of [7, 14, 21, 28])
      this.text(i, this.left + (i + 0.5) * this.step, 366, "middle", root);
    this.text("input", this.left - 4, 366, "start", root);
    this.text("block", width - 4, 388, "end", root);
  }

  // Draw axes and empty bars; return the function that sets the bars' heights.
  drawBars(root, title, show, { top, height, ends, colours }) {
    const { left, step } = this;
    const most = ends.at(-1);
    const y = (value) => top + height * (1 - Math.max(0, value) / most);
    this.text(title, left, top - 14, "start", root);
    for (const end of ends) {
      const d = `M${left} ${y(end)}h${step * (this.blocks + 1)}`;
      this.svg("path", { d, class: "faint" }, root);
      this.text(show(end), left - 6, y(end) + 5, "end", root);
    }
    const bars = [];
    for (let i = 0; i <= this.blocks; i++) {
      const bar = { x: left + (i + 0.12) * step, width: 0.76 * step };
      bars.push(this.svg("rect", { ...bar, class: colours[i ? 1 : 0] }, root));
    }
    return (values) =>
      values.forEach((value, i) => {
        bars[i].setAttribute("y", y(value));
        bars[i].setAttribute("height", Math.max(top + height - y(value), 1));
      });
  }

  update() {
    const { alpha, wiring } = this.state;
    const { chatglm, llama } = this.data;
    const { stream, shares } = wiring === "llama" ? llama : chatglm[alpha];
    this.dial.disabled = wiring === "llama";
    this.sizes(stream);
    this.shares(shares);
    const small = shares[0] < 0.005;
    const input = small ? "less than 1%" : `${Math.round(100 * shares[0])}%`;
    const newest = shares.slice(-4).reduce((sum, share) => sum + share);
    const sizes = stream.slice(1);
    const size = this.range(Math.min(...sizes), Math.max(...sizes));
    this.say(
      `${wiring === "llama" ? "Pre-norm" : `\u03b1 = ${this.named(alpha)}`}: ` +
        `${input} of the last vector is the input\u2019s, ` +
        `${Math.round(100 * newest)}% comes from the last 4 of ` +
        `${this.blocks} blocks. ` +
        `The stream\u2019s size behind the blocks is ${size}.`,
    );
  }

  range(low, high) {
    const [first, last] = [low.toFixed(1), high.toFixed(1)];
    return first === last ? first : `${first} to ${last}`;
  }
});
