"use strict";
(() => {
  const rows = new Map();
  for (const row of document.querySelectorAll("#front tbody tr")) rows.set("#" + row.id, row);
  const points = [...document.querySelectorAll(".curve a")];
  const panel = document.getElementById("panel");
  const names = [...document.querySelectorAll("#front thead th")].map((cell) => cell.textContent.trim());

  const element = (tag, text) => {
    const made = document.createElement(tag);
    made.textContent = text;
    return made;
  };

  const show = (hash) => {
    const row = rows.get(hash);
    if (!row) return;
    const cells = [...row.cells].map((cell) => cell.textContent.trim());
    const list = document.createElement("dl");
    for (let i = 1; i < cells.length; i++) list.append(element("dt", names[i]), element("dd", cells[i]));
    panel.replaceChildren(element("h3", "Option " + cells[0]), list);
    for (const point of points) {
      if (point.getAttribute("href") === hash) point.setAttribute("aria-current", "true");
      else point.removeAttribute("aria-current");
    }
  };

  points.forEach((point, i) => {
    const open = () => {
      const hash = point.getAttribute("href");
      history.replaceState(null, "", hash);
      show(hash);
    };
    point.addEventListener("click", (event) => {
      event.preventDefault();
      open();
    });
    point.addEventListener("keydown", (event) => {
      const step = { ArrowRight: -1, ArrowDown: -1, ArrowLeft: 1, ArrowUp: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const next = points[i + step];
      if (next) {
        next.focus();
        next.dispatchEvent(new MouseEvent("click", { cancelable: true }));
      }
    });
  });
  addEventListener("hashchange", () => show(location.hash));
  show(rows.has(location.hash) ? location.hash : panel.dataset.start);

  const harmless = (cell) => (/^[=+\-@\t\r]/.test(cell) ? "'" + cell : cell);
  const quoted = (cell) => (/[",\r\n]/.test(cell) ? '"' + cell.replaceAll('"', '""') + '"' : cell);
  const line = (row) => [...row.cells].map((cell) => quoted(harmless(cell.textContent.trim()))).join(",") + "\n";
  const save = document.getElementById("save-trials");
  save.hidden = false;
  save.addEventListener("click", () => {
    const text = [...document.querySelectorAll("#trials tr")].map(line).join("");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = "trials.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });

  addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("details")) part.open = true;
  });
})();
