// Make a book of Sphinx's single page, just before it is printed. `makeBook()` returns
// the links that lead nowhere. There should be none.
"use strict";

const MONO = /^(n|nn|nb|nf|nc|ne|ni|bp|fm|vm|p|o|ow|w|mi|mf|mb|mh|x|linenos)$/;

// Chapters stand where the list of contents was; each gets a box of its own.
function boxDocuments(main) {
  for (const mark of [...main.querySelectorAll('span[id^="document-"]')].reverse()) {
    const box = document.createElement("article");
    box.id = mark.id;
    let next = mark.nextElementSibling;
    mark.replaceWith(box);
    while (next && !next.matches('article[id^="document-"]')) {
      const after = next.nextElementSibling;
      box.append(next);
      next = after;
    }
  }
}

// Pages repeat each other's ids ("exercises"), so that ids get their page's name.
function nameApart(main) {
  const page = (node) => node.closest("article")?.id ?? "document-index";
  for (const node of main.querySelectorAll("[id]"))
    if (!node.matches("article, svg *")) node.id = `${page(node)}--${node.id}`;
  const dead = [];
  for (const link of document.querySelectorAll('a[href^="#"]')) {
    const [first, label] = link.getAttribute("href").slice(1).split("#");
    if (first.startsWith("document-") && !document.getElementById(first)) {
      link.replaceWith(...link.childNodes); // a page that is not printed
      continue;
    }
    let id = label ? `${first}--${label}` : first;
    if (!label && !first.startsWith("document-")) id = `${page(link)}--${first}`;
    link.setAttribute("href", `#${id}`);
    if (!document.getElementById(id)) dead.push(`${page(link)}: #${id}`);
  }
  return dead;
}

// h1 is a part, h2 a chapter: the PDF's outline is made of these.
function setLevels(box, wanted) {
  const headings = [...box.querySelectorAll("h1, h2, h3, h4, h5, h6")];
  if (!headings.length) return;
  const shift = wanted - Number(headings[0].tagName[1]);
  for (const old of headings) {
    const level = Math.min(6, Math.max(wanted, Number(old.tagName[1]) + shift));
    const heading = document.createElement(`h${level}`);
    heading.append(...old.childNodes);
    heading.className = old.className;
    old.replaceWith(heading);
  }
}

// Pages in the order of the contents, the captions there as titles of parts.
function order(main, contents) {
  const whole = [...main.childNodes];
  for (const caption of contents.querySelectorAll("p.caption")) caption.removeAttribute("role");
  for (const entry of contents.querySelectorAll("li:not(:has(a[href^='#']))")) entry.remove();
  for (const list of contents.querySelectorAll("ul:not(:has(li))")) {
    if (list.previousElementSibling?.matches("p.caption")) list.previousElementSibling.remove();
    list.remove();
  }
  for (const entry of contents.querySelectorAll("p.caption, li.toctree-l1 > a")) {
    if (entry.matches("a")) {
      const box = document.getElementById(entry.getAttribute("href").slice(1));
      setLevels(box, 2);
      main.append(box);
    } else {
      const part = document.createElement("h1");
      part.className = "part";
      part.append(entry.textContent);
      main.append(part);
    }
  }
  return whole;
}

// There is no index on paper: what led to it becomes words.
function dropOtherPages() {
  for (const link of document.querySelectorAll("a[href]"))
    if (!/^(#|\w+:)/.test(link.getAttribute("href"))) link.replaceWith(...link.childNodes);
}

// The first page's lines up to its first section; what follows is for the web.
function makeTitlePage(whole) {
  const title = document.getElementById("title-page");
  const root = whole.find((node) => node.querySelector?.("h1"));
  for (const node of [...root.children].filter((child) => !child.matches("section, span")))
    title.append(node);
  whole.forEach((node) => node.remove());
}

// A hundred boxes for a formula become one, with its TeX as the text.
function nameFormulas() {
  for (const formula of document.querySelectorAll(".katex")) {
    const source = formula.querySelector("annotation").textContent;
    formula.setAttribute("role", "img");
    formula.setAttribute("aria-label", source);
    formula.querySelector(".katex-mathml").remove();
  }
}

function openAll() {
  document.querySelectorAll(".cell.tag_answer > details .cell_input").forEach((box) => box.remove());
  for (const box of document.querySelectorAll("details")) box.open = true;
  for (const box of document.querySelectorAll("details.hide")) {
    box.querySelector("summary")?.remove();
    box.replaceWith(...box.childNodes);
  }
  for (const span of document.querySelectorAll("pre span"))
    if (MONO.test(span.className) || !span.className) span.replaceWith(...span.childNodes);
  document.querySelectorAll("pre, code").forEach((box) => box.normalize());
}

// What is wider than the page gets smaller type.
function fit() {
  for (const box of document.querySelectorAll("main :is(table, pre, .katex-display)")) {
    const room = box.parentElement.clientWidth;
    const width = Math.max(box.scrollWidth, box.getBoundingClientRect().width);
    if (!room || width <= room + 1) continue;
    const size = parseFloat(getComputedStyle(box).fontSize);
    box.style.fontSize = `${Math.max(7, (0.98 * size * room) / width)}px`;
    box.classList.add("fitted");
  }
}

// `only` is a part of the names of the pages to print; the empty text prints all.
function makeBook(only) {
  const main = document.querySelector("main");
  const contents = document.getElementById("contents");
  document.documentElement.dataset.theme = "light";
  boxDocuments(main);
  for (const box of main.querySelectorAll('article[id^="document-"]'))
    if (!box.id.includes(only)) box.remove();
  const dead = nameApart(main);
  const whole = order(main, contents);
  makeTitlePage(whole);
  dropOtherPages();
  nameFormulas();
  openAll();
  return dead;
}

// The numbers come from a first printing. Returned is what has none.
function numberContents(numbers) {
  const missing = [];
  for (const link of document.querySelectorAll("#contents a")) {
    const id = link.getAttribute("href").slice(1);
    const page = numbers[id] ?? numbers[encodeURIComponent(id)];
    if (page) link.dataset.page = page;
    else missing.push(id);
  }
  return missing;
}

function aboutBook() {
  const author = document.querySelector('meta[name="author"]').content;
  return { Title: document.title, Author: author };
}
