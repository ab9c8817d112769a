"""What is asked of a page, in JavaScript: run inside it, it returns plain data."""

from pathlib import Path

import axe_playwright_python

AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js").read_text("utf-8")

OPEN = "document.querySelectorAll('details').forEach(closed => closed.open = true)"
THEME = "scheme => document.documentElement.dataset.theme === scheme"
TAKE = "scheme => { document.documentElement.dataset.theme = scheme; }"
# What the page does about a new width, it has done after two frames.
DRAWN = """() => new Promise(
  done => requestAnimationFrame(() => requestAnimationFrame(done)))"""

# preload is off, as axe would ask for style sheets, which a file may not
RUN_AXE = """async (rules) => {
  axe.configure({rules: [{id: "color-contrast", selector: "[data-look]"}]});
  const only = rules ? {runOnly: rules} : {};
  const found = await axe.run(
    {preload: false, resultTypes: ["violations"], ...only});
  return found.violations.flatMap(rule => rule.nodes.map(
    node => `${rule.id}: ${node.target.join(" ")}: ${node.html.slice(0, 160)}`));
}"""

# Links, and formulas that were not drawn.
LOOK = r"""() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const apart = "code, pre, script, style, textarea, annotation";
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const raw = [];
  while (walker.nextNode()) {
    const {data, parentElement} = walker.currentNode;
    if (/\\[(\[]|\$\$|\\begin\{/.test(data) && !parentElement.closest(apart))
      raw.push(`not a formula: ${data.trim().slice(0, 80)}`);
  }
  const empty = all(".math").filter(math => !math.querySelector(".katex math"));
  return {
    links: all("a[href]").map(a => a.getAttribute("href")).map(
      written => [written, new URL(written, document.baseURI).href]),
    formulas: [
      ...empty.map(math => `not drawn: ${math.textContent.trim().slice(0, 80)}`),
      ...all(".katex-error").map(error => `an error: ${error.title}`), ...raw],
  };
}"""

# Load also the images that would be loaded later. One without alt text decorates if
# it is hidden from screen readers, which says that this is meant.
IMAGES = """async () => {
  const images = [...document.images];
  for (const image of images) image.loading = "eager";
  await Promise.all(images.map(image => image.decode().catch(() => null)));
  return images.map(image => ({
    source: image.getAttribute("src").slice(0, 80), alt: image.getAttribute("alt"),
    loaded: image.naturalWidth > 0,
    decorates: image.closest("[aria-hidden=true], [role=presentation]") !== null,
  }));
}"""

# Nine in ten elements of a chapter are coloured words of code and parts of formulas,
# which axe would look at one by one. Of those that look the same, by their own class
# and those around them, one is left as it is. The text of the others stays, and the
# size of a formula; what a screen reader reads of it is not touched.
THIN = """() => {
  const seen = new Set();
  const first = (element) => {
    const names = [];
    for (let e = element; e && e.tagName !== "ARTICLE"; e = e.parentElement)
      names.push(e.tagName, e.className);
    const key = names.join(" ");
    return !seen.has(key) && seen.add(key);
  };
  const sizes = [...document.querySelectorAll(".katex-html")]
    .filter(drawn => !first(drawn))
    .map(drawn => [drawn, drawn.getBoundingClientRect()]);
  for (const [drawn, {width, height}] of sizes) {
    drawn.textContent = "";
    drawn.style.cssText =
      `display: inline-block; width: ${width}px; height: ${height}px`;
  }
  for (const number of [...document.querySelectorAll(".source-number")].slice(1))
    number.remove();
  for (const word of document.querySelectorAll("pre span[class]:not([id])"))
    if (!word.children.length && !first(word)) word.replaceWith(...word.childNodes);
}"""

# Colour, what is behind it, size and weight decide about contrast. Mark one text for
# each look that is not known yet, for axe to measure; return these looks.
MARK = """(known) => {
  const seen = new Set(known), fresh = [], behind = new Map();
  const ground = (element) => {
    if (!element) return "";
    if (!behind.has(element)) {
      const {backgroundColor, backgroundImage, opacity} = getComputedStyle(element);
      const own = [backgroundColor, backgroundImage, opacity].join(" ");
      const clear = own === "rgba(0, 0, 0, 0) none 1";
      behind.set(element, (clear ? "" : own) + ground(element.parentElement));
    }
    return behind.get(element);
  };
  const speaks = (element) => element.matches("input, select, textarea")
    || [...element.childNodes].some(
      child => child.nodeType === Node.TEXT_NODE && child.data.trim());
  document.querySelectorAll("[data-look]").forEach(e => e.removeAttribute("data-look"));
  for (const element of document.body.querySelectorAll("*")) {
    if (!speaks(element) || !element.checkVisibility()) continue;
    const {color, fill, fontSize, fontWeight} = getComputedStyle(element);
    const within = element.closest("a, button, summary, label, svg");
    const look = [color, fill, fontSize, fontWeight, ground(element),
      within && within.tagName].join(" ");
    if (seen.has(look)) continue;
    seen.add(look);
    fresh.push(look);
    element.setAttribute("data-look", "");
  }
  return fresh;
}"""

# A page that scrolls sideways, and up to three things that are too wide.
SIDEWAYS = """() => {
  window.scrollTo({left: 1000, behavior: "instant"});
  const moved = window.scrollX;
  window.scrollTo({left: 0, behavior: "instant"});
  const wide = [...document.querySelectorAll("main *, header *, footer *")].filter(
    e => moved && e.checkVisibility()
      && e.getBoundingClientRect().right > innerWidth + 1);
  const names = wide.slice(0, 3).map(e => e.outerHTML.slice(0, 80));
  return moved ? [`by ${moved} pixels: ${names.join(" | ")}`] : [];
}"""

# Boxes that scroll sideways, and that the keyboard cannot reach to do so.
UNREACHED = """() => {
  const reached = "a[href], button, input, summary, [tabindex='0']";
  return [...document.body.querySelectorAll("*")].filter(e =>
    e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0 && e.checkVisibility()
    && ["auto", "scroll"].includes(getComputedStyle(e).overflowX)
    && e.tabIndex < 0 && !e.querySelector(reached)
  ).map(e => e.outerHTML.slice(0, 120));
}"""
