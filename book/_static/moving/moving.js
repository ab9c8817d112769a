// Figures that move. A page holds <moving-NAME> with its numbers as JSON inside; the
// script of that name calls defineMoving. Nothing here knows about models.
"use strict";

(() => {
  const SVG = "http://www.w3.org/2000/svg";
  let count = 0;

  // An HTML element with these attributes and children.
  function html(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes))
      node.setAttribute(key, value);
    node.append(...children);
    return node;
  }

  class MovingFigure extends HTMLElement {
    connectedCallback() {
      if (this.state) return;
      this.data = JSON.parse(this.querySelector("script").textContent);
      this.state = {};
      this.classList.add("moving-figure");
      this.parts = {}; // name -> function that makes its control show a value
      this.stage = html("div", { class: "moving-stage" });
      this.sentence = html("output", {
        class: "moving-sentence",
        "aria-live": "polite",
      });
      this.panel = html("div", { class: "moving-panel" });
      this.append(this.stage, this.sentence, this.panel);
      this.build();
      this.fit();
      new ResizeObserver(() => this.fit()).observe(this);
    }

    // For a figure to override: make controls; draw in a width; redraw from the state.
    build() {}
    draw(width) {}
    update() {}

    // Draw again when the width has changed, so that text keeps its size.
    fit() {
      const width = Math.max(280, Math.floor(this.stage.clientWidth));
      if (width === this.drawnWidth) return;
      this.drawnWidth = width;
      this.sentence.style.minHeight = "";
      this.draw(width);
      this.update();
    }

    // Change controls and state from outside of the controls: set({m: 4}).
    set(changes) {
      for (const [name, value] of Object.entries(changes)) this.parts[name](value);
      this.update();
    }

    slider({ name, label, min, max, step = 1, value, show = String }) {
      const id = `moving-${++count}`;
      const input = html("input", { type: "range", id, min, max, step });
      const text = html("span", { class: "moving-value", "aria-hidden": "true" });
      this.parts[name] = (next) => {
        input.value = next;
        this.state[name] = Number(input.value);
        text.textContent = show(this.state[name]);
        input.setAttribute("aria-valuetext", text.textContent);
      };
      this.parts[name](value);
      input.addEventListener("input", () => this.set({ [name]: input.value }));
      const words = html("label", { for: id }, label);
      this.panel.append(html("div", { class: "moving-slider" }, words, text, input));
      return input;
    }

    choice({ name, label, options, value }) {
      const group = `moving-${++count}`;
      const box = html(
        "fieldset",
        { class: "moving-choice" },
        html("legend", {}, label),
      );
      const inputs = options.map(([option, text]) => {
        const input = html("input", { type: "radio", name: group, value: option });
        input.addEventListener("change", () => this.set({ [name]: option }));
        box.append(html("label", {}, input, text));
        return [option, input];
      });
      this.parts[name] = (next) => {
        this.state[name] = next;
        for (const [option, input] of inputs) input.checked = option === next;
      };
      this.parts[name](value);
      this.panel.append(box);
      return box;
    }

    toggle({ name, label, value = false }) {
      const input = html("input", { type: "checkbox" });
      this.parts[name] = (next) => {
        this.state[name] = input.checked = Boolean(next);
      };
      this.parts[name](value);
      input.addEventListener("change", () => this.set({ [name]: input.checked }));
      this.panel.append(html("label", { class: "moving-toggle" }, input, label));
      return input;
    }

    button({ label, press }) {
      const button = html("button", { type: "button", class: "moving-button" }, label);
      button.addEventListener("click", () => {
        press();
        this.update();
      });
      this.panel.append(button);
      return button;
    }

    // A drawing of its own size: one unit is one pixel, as in the width given to draw.
    canvas(width, height, label) {
      const root = document.createElementNS(SVG, "svg");
      root.setAttribute("viewBox", `0 0 ${width} ${height}`);
      root.setAttribute("role", "img");
      root.setAttribute("aria-label", label);
      root.style.maxWidth = `${width}px`;
      this.stage.replaceChildren(root);
      return root;
    }

    svg(tag, attributes, parent) {
      const node = document.createElementNS(SVG, tag);
      for (const [key, value] of Object.entries(attributes)) {
        if (key === "text") node.textContent = value;
        else node.setAttribute(key, value);
      }
      parent.append(node);
      return node;
    }

    // Words in the drawing; anchor is start, middle or end.
    text(words, x, y, anchor, parent, more = {}) {
      const place = { x, y, "text-anchor": anchor, ...more };
      return this.svg("text", { ...place, text: words }, parent);
    }

    // A number in words, with a true minus, and none before a zero.
    signed(number, digits = 0) {
      const text = number.toFixed(digits);
      return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "\u2212");
    }

    // Call move({x, y}) with the drawing's coordinates while a finger or mouse drags.
    drag(root, move, touchAction = "none") {
      (root.ownerSVGElement ?? root).style.touchAction = touchAction;
      root.style.cursor = "grab";
      const at = (event) => {
        const point = new DOMPoint(event.clientX, event.clientY);
        const { x, y } = point.matrixTransform(root.getScreenCTM().inverse());
        move({ x, y }, event);
      };
      root.addEventListener("pointerdown", (event) => {
        root.setPointerCapture(event.pointerId);
        at(event);
      });
      root.addEventListener("pointermove", (event) => {
        if (root.hasPointerCapture(event.pointerId)) at(event);
      });
    }

    // The state in words, under the drawing. Its box grows and never shrinks, so that
    // the controls below stay under the finger.
    say(text) {
      if (this.sentence.textContent === text) return;
      this.sentence.textContent = text;
      const height = this.sentence.getBoundingClientRect().height;
      this.sentence.style.minHeight = `${Math.ceil(height)}px`;
    }
  }

  window.MovingFigure = MovingFigure;
  window.defineMoving = (name, figure) =>
    customElements.define(`moving-${name}`, figure);
})();
