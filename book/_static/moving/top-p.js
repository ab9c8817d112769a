// The next token's probabilities as a strip; top-p keeps the front of it.
"use strict";

defineMoving("top-p", class extends MovingFigure {
  build() {
    const { prompts, cuts, temperatures } = this.data;
    const options = prompts.map((prompt, i) => [i, `${prompt.text} …`]);
    this.choice({ name: "prompt", label: "After", options, value: 0 });
    const p = (i) => cuts[i].toFixed(2);
    const start = cuts.indexOf(0.8);
    this.slider({ name: "cut", label: "p", min: 0, max: cuts.length - 1, value: start, show: p });
    const t = (i) => String(temperatures[i]);
    const value = temperatures.indexOf(1);
    this.slider({ name: "warm", label: "temperature", min: 0, max: temperatures.length - 1, value, show: t });
  }

  draw(width) {
    const rows = this.data.prompts[0].words.length + 1;
    this.room = width - 2;
    this.middle = width < 500 ? 112 : 140; // where the bars of the rows start
    const root = this.canvas(width, 106 + 29 * rows, "A strip of probabilities, and the best tokens as bars");
    const hatch = { id: "moving-cut", width: 7, height: 7, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" };
    const pattern = this.svg("pattern", hatch, this.svg("defs", {}, root));
    this.svg("line", { x1: 0, y1: 0, x2: 0, y2: 7, class: "c2", "stroke-width": 3 }, pattern);
    const strip = this.svg("g", {}, root);
    this.strip = this.svg("g", {}, strip);
    this.label = this.svg("text", { y: 16, "font-weight": 600, "text-anchor": "middle" }, strip);
    this.mark = this.svg("path", { class: "f4", d: "M0 88 l-9 12 h18 z M-1.5 24 h3 v64 h-3 z" }, strip);
    this.svg("rect", { x: 0, y: 0, width, height: 104, fill: "transparent" }, strip);
    this.drag(strip, ({ x }) => {
      const { cuts } = this.data;
      const near = cuts.map((p) => Math.abs(p - (x - 1) / this.room));
      this.set({ cut: near.indexOf(Math.min(...near)) });
    }, "pan-y");
    this.rows = this.svg("g", {}, root);
    this.wide = width;
    this.reserve();
  }

  // Make room for the longest sentence, so that no other moves the controls.
  reserve() {
    const { prompts, temperatures, cuts } = this.data;
    const texts = prompts.flatMap((_, prompt) => temperatures.flatMap((_, warm) =>
      cuts.map((_, cut) => this.words({ prompt, warm, cut }))));
    this.say(texts.reduce((a, b) => (b.length > a.length ? b : a)));
  }

  // What the state says: probabilities, how many tokens stay, and what these had.
  look({ prompt, warm, cut }) {
    const { words, temperatures } = this.data.prompts[prompt];
    const { shares, kept, mass } = temperatures[warm];
    return { words, shares, p: this.data.cuts[cut], stay: kept[cut], had: mass[cut] };
  }

  update() {
    const { words, shares, p, stay, had } = this.look(this.state);
    this.lay(shares, stay, had);
    const x = 1 + this.room * p;
    this.mark.setAttribute("transform", `translate(${x} 0)`);
    this.label.textContent = `p = ${p.toFixed(2)}`;
    this.label.setAttribute("x", Math.min(Math.max(x, 32), this.wide - 32));
    this.list(words, shares, stay, had);
    this.say(this.words(this.state));
  }

  words(state) {
    const { words, shares, p, stay, had } = this.look(state);
    const percent = (share) => `${(100 * share).toFixed(1)}\u00a0%`;
    const count = (tokens) => tokens.toLocaleString("en");
    const many = stay === 1 ? "1 token stays" : `${count(stay)} tokens stay`;
    return `Temperature ${this.data.temperatures[state.warm]}, p = ${p.toFixed(2)}: ${many}, `
      + `of ${count(this.data.vocab_size)}; ${stay === 1 ? "it" : "they"} had ${percent(had)}. `
      + `“${words[0]}” had ${percent(shares[0])}, and now has ${percent(shares[0] / had)}.`;
  }

  // Lay the best tokens and the tail end to end; what is cut is hatched.
  lay(shares, stay, had) {
    this.strip.replaceChildren();
    const piece = (from, to, state) => {
      const box = { x: 1 + this.room * from, y: 32, width: Math.max(0, this.room * (to - from)), height: 46 };
      const part = this.svg("rect", { ...box, class: state === "cut" ? "c2" : `f${state}` }, this.strip);
      if (state === "cut") part.style.fill = "url(#moving-cut)";
      else part.style.stroke = "var(--pst-color-background)";
    };
    let reached = 0;
    shares.forEach((share, i) => {
      piece(reached, reached + share, i >= stay ? "cut" : i % 2 ? 3 : 1);
      reached += share;
    });
    if (stay > shares.length) piece(reached, had, 5);
    const end = Math.max(reached, had);
    if (stay < this.data.vocab_size && end < 1) piece(end, 1, "cut");
  }

  // A row for each of the best: what it had as a frame, what it has now as a bar.
  list(words, shares, stay, had) {
    this.rows.replaceChildren();
    const rest = this.data.vocab_size - shares.length;
    const room = this.wide - this.middle - 68;
    const front = shares.reduce((sum, share) => sum + share, 0);
    const more = [`${rest.toLocaleString("en")} more`, 1 - front, stay > shares.length, Math.max(0, had - front)];
    const rows = words.map((word, i) => [`“${word}”`, shares[i], i < stay, shares[i]]);
    [...rows, more].forEach(([word, share, stays, left], i) => {
      const y = 110 + 29 * i;
      this.svg("text", { x: 0, y: y + 18, text: word }, this.rows);
      const bar = { x: this.middle, y: y + 4, height: 18 };
      if (stays) this.svg("rect", { ...bar, width: (room * left) / had, class: i < shares.length ? "f1" : "f5" }, this.rows);
      const frame = this.svg("rect", { ...bar, width: room * share, class: stays ? "line" : "c2", "stroke-width": 1.5 }, this.rows);
      if (!stays) frame.style.fill = "url(#moving-cut)";
      const said = stays ? `${((100 * left) / had).toFixed(1)} %` : "cut";
      this.svg("text", { x: this.wide, y: y + 18, "text-anchor": "end", "font-weight": stays ? 600 : 400, text: said }, this.rows);
    });
  }
});
