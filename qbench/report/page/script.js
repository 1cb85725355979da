"use strict";

const root = document.documentElement;
const get = (id) => document.getElementById(id);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const count = (number) => number.toLocaleString("en");
const records = all(".record"); // data-r counts in these

// Theme. Storage may be forbidden where the page is opened as a file.

const systemDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches);
const nameTheme = () => { get("theme").textContent = isDark() ? "Light theme" : "Dark theme"; };
get("theme").addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  try { localStorage.setItem("qbench-theme", root.dataset.theme); } catch {}
  nameTheme();
});
systemDark.addEventListener("change", nameTheme);
nameTheme();

// Filters: a row is shown when it holds all words of its table's filter and of the page's.

const texts = new WeakMap();
const words = (input) => input.value.toLowerCase().split(/\s+/).filter(Boolean);
function textOf(element) {
  let text = texts.get(element);
  if (text === undefined) {
    text = [...(element.cells ?? [element])].map((part) => part.textContent).join("\n").toLowerCase();
    texts.set(element, text);
  }
  return text;
}
function showOnly(elements, wanted) {
  let shown = 0;
  for (const element of elements) {
    const matches = !wanted.length || wanted.every((word) => textOf(element).includes(word));
    if (element.hidden === matches) element.hidden = !matches;
    shown += matches;
  }
  return shown;
}
const ofAll = (shown, total, noun) =>
  `${shown === total ? "" : `${count(shown)} of `}${count(total)} ${noun}${total === 1 ? "" : "s"}`;

// Sorting: ascending, descending, then as it came; what is missing stays last.

const missing = new Set(["", "-", "–", "—", "n/a", "nan"]);
const collator = new Intl.Collator("en", { numeric: true });
const next = { none: "ascending", ascending: "descending", descending: "none" };
function keyOf(cell) {
  if (cell.dataset.n !== undefined) return cell.dataset.n === "" ? null : Number(cell.dataset.n);
  const text = cell.dataset.t ?? cell.textContent.trim();
  return missing.has(text.toLowerCase()) ? null : text;
}
const rank = (key) => (key === null ? 2 : typeof key === "number" ? 0 : 1);
function sorted(rows, column, direction) {
  if (direction === "none") return rows;
  const sign = direction === "ascending" ? 1 : -1;
  const keyed = rows.map((row) => [keyOf(row.cells[column]), row]);
  keyed.sort(([a], [b]) => {
    if (rank(a) !== rank(b)) return rank(a) - rank(b);
    if (a === null || a === b) return 0;
    return sign * (typeof a === "number" ? (a < b ? -1 : 1) : collator.compare(a, b));
  });
  return keyed.map(([, row]) => row);
}

class SortedTable {
  constructor(block) {
    this.block = block;
    this.table = block.querySelector("table");
    this.body = this.table.tBodies[0];
    this.rows = [...this.body.rows];
    this.heads = [...this.table.tHead.rows[0].cells];
    this.input = block.querySelector("input");
    this.input.addEventListener("input", filterAll);
    this.heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.title = "Sort";
      button.append(...head.childNodes);
      button.addEventListener("click", () => this.sort(column));
      head.append(button);
      head.setAttribute("aria-sort", "none");
    });
    this.body.addEventListener("keydown", (event) => this.walk(event));
    for (const link of all("a[data-r]", this.body)) link.tabIndex = -1;
    this.entrance = null;
    this.enterAt();
    new ResizeObserver(() => this.pin()).observe(block);
  }
  sort(column) {
    const direction = next[this.heads[column].getAttribute("aria-sort")];
    this.heads.forEach((head, i) => head.setAttribute("aria-sort", i === column ? direction : "none"));
    this.body.append(...sorted(this.rows, column, direction));
    this.enterAt();
  }
  filter(pageWords) {
    const shown = showOnly(this.rows, [...words(this.input), ...pageWords]);
    this.block.querySelector("output").textContent = ofAll(shown, this.rows.length, "row");
    this.block.querySelector(".empty").hidden = shown > 0;
    this.enterAt();
    return shown;
  }
  // One link of a table is reached with Tab, the others from there with the arrow keys.
  enterAt(link = this.body.querySelector("tr:not([hidden]) a[data-r]")) {
    if (this.entrance) this.entrance.tabIndex = -1;
    this.entrance = link;
    if (link) link.tabIndex = 0;
  }
  walk(event) {
    const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [0, 0];
    if ((!down && !right) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const cell = event.target.closest("td, th");
    let [row, column, link] = [cell.parentElement, cell.cellIndex, null];
    while (row && !link) {
      if (right) column += right;
      else do row = down > 0 ? row.nextElementSibling : row.previousElementSibling; while (row?.hidden);
      if (right && !row.cells[column]) return;
      link = row?.cells[column].querySelector("a[data-r]");
    }
    if (link) { this.enterAt(link); link.focus(); }
  }
  // Labels stay in view as long as they leave half of the width to the numbers.
  pin() {
    const scroll = this.table.parentElement;
    const lefts = [0]; // all are read before any is written, or each would lay the table out anew
    for (const head of this.heads.slice(0, 6)) {
      const right = lefts.at(-1) + head.offsetWidth;
      if (!head.classList.contains("label") || right > scroll.clientWidth / 2) break;
      lefts.push(right);
    }
    const left = lefts.pop();
    const pinned = lefts.map((_, i) => i + 1).join(" ");
    const style = lefts.map((at, i) => `--left-${i + 1}: ${at}px;`).join(" ");
    const height = this.heads[0].offsetHeight;
    if (this.table.style.cssText !== style) this.table.style.cssText = style;
    if (this.table.dataset.pin !== pinned) this.table.dataset.pin = pinned;
    scroll.style.scrollPadding = `${height}px 0 0 ${left}px`;
  }
}

const tables = all(".table").map((block) => new SortedTable(block));
const total = all(".table tbody tr").length;
function filterAll() {
  const pageWords = words(get("page-filter"));
  const rows = tables.reduce((sum, table) => sum + table.filter(pageWords), 0);
  const shown = showOnly(records, pageWords);
  get("record-count").textContent = ofAll(shown, records.length, "record");
  get("page-count").textContent = pageWords.length ? `${ofAll(rows, total, "row")}, ${get("record-count").textContent}` : "";
  get("record-list").nextElementSibling.hidden = shown > 0;
}
get("page-filter").addEventListener("input", filterAll);

// The panel that lists the records behind a number.

const panel = get("panel");
const most = 100;
function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}
function about(link) {
  const cell = link.closest("td, th");
  if (!cell) return link.closest(".card").querySelector("h3").textContent;
  const head = cell.closest("table").tHead.rows[0].cells[cell.cellIndex].textContent;
  const labels = all("th", cell.parentElement).filter((th) => th !== cell).map((th) => th.textContent);
  return `${[...labels, head].filter(Boolean).join(" · ")}: ${link.textContent}`;
}
function listed(record) {
  const item = element("li", "");
  item.append(element("div", record.querySelector("summary").firstChild.textContent.trim()));
  const status = record.querySelector("summary strong");
  const reason = all("dt", record).find((name) => name.textContent === "reason");
  if (status) item.append(status.cloneNode(true), reason ? `: ${reason.nextElementSibling.textContent} ` : " ");
  const facts = element("a", "Facts");
  facts.href = `#${record.id}`;
  item.append(...all("p a", record).map((link) => link.cloneNode(true)), facts);
  return item;
}
function openPanel(link) {
  const behind = link.dataset.r.split(" ");
  get("panel-title").textContent = about(link);
  const items = behind.slice(0, most).map((place) => listed(records[place]));
  const rest = behind.length - items.length;
  panel.querySelector("ul").replaceChildren(...items, ...(rest ? [element("li", `and ${count(rest)} more`)] : []));
  panel.showPopover();
  const [at, width, height] = [link.getBoundingClientRect(), panel.offsetWidth, panel.offsetHeight];
  const left = Math.max(8, Math.min(at.left, root.clientWidth - width - 8));
  const below = at.bottom + 6 + height <= innerHeight || at.top < height + 6;
  const top = below ? at.bottom + 6 : at.top - 6 - height;
  Object.assign(panel.style, { left: `${left + scrollX}px`, top: `${top + scrollY}px` });
  panel.focus();
}
panel.tabIndex = -1;
panel.querySelector("button").addEventListener("click", () => panel.hidePopover());

// Links to records: a number's opens the panel, others unfold the record that they lead to.

function reveal(id) {
  const record = id.startsWith("record-") ? get(id) : null;
  if (!record?.matches(".record")) return;
  record.hidden = false;
  record.open = true;
  record.scrollIntoView();
}
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[href^='#']");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  if (link.dataset.r && panel.showPopover) {
    event.preventDefault();
    openPanel(link);
    return;
  }
  if (panel.contains(link)) panel.hidePopover();
  reveal(link.hash.slice(1));
});
addEventListener("hashchange", () => reveal(location.hash.slice(1)));
reveal(location.hash.slice(1));

for (const link of all(".download")) {
  link.addEventListener("click", () => {
    const drawing = new XMLSerializer().serializeToString(link.closest("figure").querySelector("svg"));
    link.href = URL.createObjectURL(new Blob([drawing], { type: "image/svg+xml" }));
    link.download = link.dataset.name;
  });
}

// Contents: always open beside the page, folded above it.

const contents = document.querySelector("nav details");
const beside = matchMedia("(min-width: 64rem)");
const fold = () => { contents.open = beside.matches; };
beside.addEventListener("change", fold);
fold();
const entries = all("a", contents).map((link) => [link, get(link.hash.slice(1))]);
function markPlace() {
  const passed = entries.filter(([, target]) => target.getBoundingClientRect().top < innerHeight / 4);
  for (const [link] of entries) link.removeAttribute("aria-current");
  passed.at(-1)?.[0].setAttribute("aria-current", "location");
}
addEventListener("scroll", () => requestAnimationFrame(markPlace), { passive: true });
contents.addEventListener("click", (event) => { if (event.target.closest("a")) fold(); });
