// A chapter that is pointed at or focused lights its boxes on the map beside it, and a
// box lights its chapters. Without this script the links are links all the same.
for (const map of document.querySelectorAll(".book-map")) {
  const chapters = [...map.querySelectorAll("li a")];
  const boxes = [...map.querySelectorAll("svg [data-parts]")];
  const parts = (end) => end.dataset.parts.split(" ");
  const light = (end, on) => {
    const lit = chapters.includes(end) ? boxes : [...chapters, ...boxes];
    for (const other of lit) {
      if (other !== end && parts(other).some((part) => parts(end).includes(part))) {
        other.classList.toggle("lit", on);
      }
    }
  };
  for (const end of [...chapters, ...boxes]) {
    for (const event of ["pointerenter", "focusin"]) end.addEventListener(event, () => light(end, true));
    for (const event of ["pointerleave", "focusout"]) end.addEventListener(event, () => light(end, false));
  }
}
