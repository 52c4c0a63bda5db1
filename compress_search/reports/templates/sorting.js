// Sorts a table by a column: numbers by value, texts by the reader's language, empty cells always last.
const sortTable = (table, column, order) => {
  const body = table.tBodies[0], sign = order === "descending" ? -1 : 1;
  const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  const compare = (a, b) => {
    if (a === "" || b === "") return (a === "") - (b === "");
    const difference = a - b;
    return sign * (Number.isNaN(difference) ? a.localeCompare(b) : difference);
  };
  body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
  for (const head of table.tHead.rows[0].cells) head.removeAttribute("aria-sort");
  table.tHead.rows[0].cells[column].setAttribute("aria-sort", order);
};
for (const table of document.querySelectorAll("table.sortable")) {
  for (const head of table.tHead.rows[0].cells) {
    head.querySelector("button").addEventListener("click", () => {
      sortTable(table, head.cellIndex, head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending");
    });
  }
}
