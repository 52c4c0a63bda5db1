// Draws each figure of the page when its reader comes near it, for its width and its colours, and again when these
// change. Those that nobody scrolls to cost nothing; a print has them all.
const dark = matchMedia("(prefers-color-scheme: dark)"), narrow = matchMedia("(max-width: 720px)");
const figures = new Map([...document.querySelectorAll("[data-figure]")].map(
  (place) => [place, JSON.parse(document.getElementById(`${place.id}-data`).textContent)]));
const drawn = new Set();
// Plotly's toolbar offers by default to send the figure to a server; a study is nobody else's business.
const config = {
  responsive: true, displaylogo: false, showSendToCloud: false, modeBarButtonsToRemove: ["select2d", "lasso2d"],
};
const layoutOf = (place) =>
  figures.get(place).layouts[narrow.matches ? "narrow" : "wide"][dark.matches ? "dark" : "light"];
// Also of what is not drawn yet: the page does not move under its reader. And when the window is resized, Plotly takes
// the height from the place, not from the layout any more.
const takePlaces = () => {
  for (const place of figures.keys()) place.style.height = `${layoutOf(place).height}px`;
};
const draw = (place) => {
  near.unobserve(place);
  drawn.add(place);
  Plotly.react(place, figures.get(place).data, structuredClone(layoutOf(place)), config);
};
const near = new IntersectionObserver((places) => {
  for (const { target, isIntersecting } of places) if (isIntersecting) draw(target);
}, { rootMargin: "50%" });
const look = () => {
  takePlaces();
  drawn.forEach(draw);
};
dark.addEventListener("change", look);
narrow.addEventListener("change", look);
addEventListener("beforeprint", () => {
  for (const place of figures.keys()) if (!drawn.has(place)) draw(place);
});
takePlaces();
for (const place of figures.keys()) near.observe(place);

// Reads the page again every so many seconds, and goes on where its reader was.
const followStudy = (seconds) => {
  const key = `compress_search ${location.pathname}`, boxes = [...document.querySelectorAll(".scroll")];
  try {
    const { page, inside, sorted } = JSON.parse(sessionStorage.getItem(key));
    for (const [id, column, order] of sorted) {
      sortTable(document.getElementById(id), column, order);
    }
    boxes.forEach((box, index) => box.scrollTo(...(inside[index] ?? [0, 0])));
    scrollTo(...page);
  } catch { /* The first time there is nothing, and a page without storage begins at its top. */ }
  setTimeout(() => {
    const sorted = [...document.querySelectorAll("th[aria-sort]")].map(
      (head) => [head.closest("table").id, head.cellIndex, head.getAttribute("aria-sort")]);
    const inside = boxes.map((box) => [box.scrollLeft, box.scrollTop]);
    try {
      sessionStorage.setItem(key, JSON.stringify({ page: [scrollX, scrollY], inside, sorted }));
    } catch { /* As above. */ }
    location.reload();
  }, 1000 * seconds);
};
