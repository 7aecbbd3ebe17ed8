"use strict";
// Sorting, filters and the viewer of a report. Everything is readable without it.

const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// Sort a table by a column: numbers as numbers, what was not measured last.
function sortTable(header) {
  const table = header.closest("table"), body = table.tBodies[0], column = header.cellIndex;
  const direction = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const key = row => row.cells[column].textContent.trim();
  const value = text => (text !== "" && !isNaN(text) ? Number(text) : NaN);
  const rows = [...body.rows].sort((a, b) => {
    const [s, t] = [key(a), key(b)], [u, v] = [value(s), value(t)];
    if (s === "" || t === "") return (s === "") - (t === "");
    return direction * (isNaN(u) || isNaN(v) ? s.localeCompare(t) : u - v);
  });
  body.append(...rows);
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
}

// Show the chosen task and methods, in tables, charts and the viewer.
function filter() {
  const task = document.getElementById("task").value;
  const off = new Set(all("nav.tools input:not(:checked)").map(box => box.value));
  for (const section of all("section[data-task]")) section.hidden = task !== "" && section.dataset.task !== task;
  for (const item of all("[data-name]")) item.hidden = off.has(item.dataset.name);
  for (const item of all("svg [data-name]")) item.style.display = off.has(item.dataset.name) ? "none" : "";
}

const make = (name, properties, ...children) => {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
};

// A picture of a sheet whose lines are images and whose columns are what is shown of each.
function tile(sheet, lines, line, column, label) {
  const pane = make("div", { className: "pane" });
  const columns = sheet.columns.length, at = (k, n) => (n > 1 ? (100 * k) / (n - 1) : 0);
  pane.style.backgroundImage = `url("${encodeURI(sheet.file)}")`;
  pane.style.backgroundSize = `${100 * columns}% ${100 * lines}%`;
  pane.style.backgroundPosition = `${at(column, columns)}% ${at(line, lines)}%`;
  const box = make("div", { className: "tile", tabIndex: 0 }, pane);
  box.setAttribute("role", "img");
  box.setAttribute("aria-label", label);
  return make("figure", {}, box, make("figcaption", { textContent: sheet.columns[column] }));
}

function viewer(root, pictures) {
  const task = root.querySelector("[name=picture-task]"), image = root.querySelector("[name=image]");
  const strips = root.querySelector(".strips"), view = { zoom: 1, x: 0, y: 0 };

  function strip(name, label, note, sheet, lines, line) {
    const header = make("header", {}, make("b", { textContent: label }), make("br"), note);
    const tiles = sheet.columns.map((c, i) => tile(sheet, lines, line, i, `${label}: ${c}, image ${line + 1}`));
    const row = make("div", { className: "strip" }, header, ...tiles);
    if (name) row.dataset.name = name;
    return row;
  }

  function show() {
    const scene = pictures.tasks[task.value], line = Number(image.value);
    strips.replaceChildren(strip("", `image ${line + 1}`, task.value, scene, scene.images, line));
    for (const m of scene.methods) {
      if (line >= m.images) continue;
      const note = m.psnr[line] ? `PSNR ${m.psnr[line]}` : "";
      strips.append(strip(m.name, m.nfe ? `${m.name}, ${m.nfe} NFE` : m.name, note, m, m.images, line));
    }
    filter();
  }

  function list() {
    const before = image.value, count = pictures.tasks[task.value].images;
    image.replaceChildren(...Array.from({ length: count }, (_, i) => make("option", { value: i, textContent: i + 1 })));
    image.value = before !== "" && Number(before) < count ? before : 0;
    show();
  }

  // One view for all tiles: x and y move the picture, in sides of a tile, and keep it inside.
  function look(zoom, x, y) {
    view.zoom = Math.min(16, Math.max(1, zoom));
    const inside = v => Math.min(0, Math.max(1 - view.zoom, v));
    [view.x, view.y] = [inside(x), inside(y)];
    for (const key of ["zoom", "x", "y"]) root.style.setProperty(`--${key}`, view[key]);
    root.classList.toggle("zoomed", view.zoom > 1);
  }

  // Zoom by a factor; the point (u, v) of a tile, in sides of it, stays where it is.
  function zoomAt(factor, u = 0.5, v = 0.5) {
    const next = Math.min(16, Math.max(1, view.zoom * factor)), ratio = next / view.zoom;
    look(next, u - (u - view.x) * ratio, v - (v - view.y) * ratio);
  }

  let drag = null;
  strips.addEventListener("pointerdown", event => {
    const box = event.target.closest(".tile");
    if (!box || event.button) return;
    drag = { box, side: box.clientWidth, at: [event.clientX, event.clientY], from: [view.x, view.y], moved: false };
    if (view.zoom > 1) box.setPointerCapture(event.pointerId);
  });
  strips.addEventListener("pointermove", event => {
    if (!drag) return;
    const [dx, dy] = [event.clientX - drag.at[0], event.clientY - drag.at[1]];
    if (Math.hypot(dx, dy) > 4) drag.moved = true;
    if (drag.moved && view.zoom > 1) look(view.zoom, drag.from[0] + dx / drag.side, drag.from[1] + dy / drag.side);
  });
  addEventListener("pointerup", event => {
    if (drag && !drag.moved) {
      const box = drag.box.getBoundingClientRect();
      const place = [(event.clientX - box.left) / drag.side, (event.clientY - box.top) / drag.side];
      if (view.zoom >= 16) look(1, 0, 0);
      else zoomAt(event.shiftKey ? 0.5 : 2, ...place);
    }
    drag = null;
  });
  addEventListener("pointercancel", () => (drag = null));
  strips.addEventListener("keydown", event => {
    const moves = { ArrowLeft: [0.25, 0], ArrowRight: [-0.25, 0], ArrowUp: [0, 0.25], ArrowDown: [0, -0.25] };
    const move = moves[event.key];
    if (move && view.zoom > 1) look(view.zoom, view.x + move[0], view.y + move[1]);
    else if (event.key === "+" || event.key === "Enter") zoomAt(2);
    else if (event.key === "-") zoomAt(0.5);
    else if (event.key === "0" || event.key === "Escape") look(1, 0, 0);
    else return;
    event.preventDefault();
  });
  root.querySelector("[name=closer]").addEventListener("click", () => zoomAt(2));
  root.querySelector("[name=further]").addEventListener("click", () => zoomAt(0.5));
  root.querySelector("[name=whole]").addEventListener("click", () => look(1, 0, 0));
  root.querySelector("[name=side]").addEventListener("input", event =>
    root.style.setProperty("--tile", `${event.target.value}px`));
  task.addEventListener("change", list);
  image.addEventListener("change", show);
  list();
}

for (const button of all("thead button")) button.addEventListener("click", () => sortTable(button.closest("th")));
for (const input of all("nav.tools select, nav.tools input")) input.addEventListener("change", filter);
for (const [id, checked] of [["every", true], ["none", false]]) {
  document.getElementById(id).addEventListener("click", () => {
    for (const box of all("nav.tools input")) box.checked = checked;
    filter();
  });
}
const pictures = document.getElementById("pictures");
if (pictures) viewer(document.getElementById("viewer"), JSON.parse(pictures.textContent));
