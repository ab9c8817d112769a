// What scrolls sideways inside its box, a wide table, formula or listing, can be
// reached and scrolled with the keyboard.
"use strict";

function markScrollable() {
  for (const box of document.querySelectorAll(".bd-content :is(table, pre, div.math)")) {
    if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}

// A picture leads to itself at full size: its words are small on a phone.
function linkPictures() {
  for (const picture of document.querySelectorAll(".bd-content figure img")) {
    if (picture.closest("a")) continue;
    const link = document.createElement("a");
    link.href = picture.src;
    picture.replaceWith(link);
    link.append(picture);
  }
}

linkPictures();
addEventListener("load", markScrollable);
addEventListener("resize", markScrollable);
document.addEventListener("toggle", markScrollable, true); // details open
