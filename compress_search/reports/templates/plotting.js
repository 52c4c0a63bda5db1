// Draws every figure of the page, for its width and its colours, and again when these change.
const dark = matchMedia("(prefers-color-scheme: dark)"), narrow = matchMedia("(max-width: 720px)");
const figures = [...document.querySelectorAll("[data-figure]")].map(
  (place) => [place, JSON.parse(document.getElementById(`${place.id}-data`).textContent)]);
// Plotly's toolbar offers by default to send the figure to a server; a study is nobody else's business.
const config = {
  responsive: true, displaylogo: false, showSendToCloud: false, modeBarButtonsToRemove: ["select2d", "lasso2d"],
};
const draw = () => {
  for (const [place, { data, layouts }] of figures) {
    const layout = layouts[narrow.matches ? "narrow" : "wide"][dark.matches ? "dark" : "light"];
    // When the window is resized, Plotly takes the height from the place, not from the layout any more.
    place.style.height = `${layout.height}px`;
    Plotly.react(place, data, structuredClone(layout), config);
  }
};
dark.addEventListener("change", draw);
narrow.addEventListener("change", draw);
draw();

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
