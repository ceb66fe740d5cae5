"use strict";
(() => {
  const by = (id) => document.getElementById(id);
  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  by("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((fold) => { fold.open = true; }));

  // --- charts: the value nearest to the pointer, or to where the arrow keys have walked --------------------------
  for (const chart of document.querySelectorAll(".chart")) {
    const points = JSON.parse(chart.dataset.points);
    const plot = chart.querySelector(".plot"), cursor = chart.querySelector(".cursor"), tip = chart.querySelector(".tip");
    let at = -1;
    const show = (index) => {
      at = Math.max(0, Math.min(points.length - 1, index));
      const [x, y, text] = points[at];
      cursor.hidden = tip.hidden = false;
      cursor.style.left = `${x}%`;
      cursor.style.top = `${y}%`;
      tip.textContent = text;
      const room = plot.clientWidth, half = tip.offsetWidth / 2;
      tip.style.left = `${Math.max(half, Math.min(room - half, x / 100 * room))}px`;
    };
    const hide = () => { cursor.hidden = tip.hidden = true; };
    const nearest = (event) => {
      const box = plot.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * 100;
      let best = 0;
      points.forEach((point, index) => { if (Math.abs(point[0] - x) < Math.abs(points[best][0] - x)) best = index; });
      show(best);
    };
    chart.addEventListener("pointermove", nearest);
    chart.addEventListener("pointerdown", nearest);
    chart.addEventListener("pointerleave", hide);
    chart.addEventListener("blur", hide);
    chart.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step) { event.preventDefault(); event.stopPropagation(); show(at + step); }
    });
  }

  // --- the browser of quadruples ---------------------------------------------------------------------------------
  const browser = by("browser");
  if (!browser) return;
  browser.hidden = false;
  const rows = JSON.parse(by("rows-data").textContent);
  const texts = ["prompt", "reference", "answer", "critique", "refinement"];
  const haystacks = rows.map((row) => [row.id, ...texts.map((name) => row[name])].join("\n").toLowerCase());
  const search = by("search"), verdict = by("verdict"), position = by("position"), card = by("row");
  let found = [], at = 0;

  const marked = (text, needle) => {
    const body = make("pre"), low = text.toLowerCase();
    let from = 0;
    // Lower case may change a text's length: then positions would lie, and nothing is marked.
    for (let hit = 0; needle && low.length === text.length && (hit = low.indexOf(needle, from)) >= 0; from = hit + needle.length) {
      body.append(text.slice(from, hit), make("mark", "", text.slice(hit, hit + needle.length)));
    }
    body.append(text.slice(from));
    return body;
  };
  const panel = (title, text, { aside = "", asideClass = "", wide = false } = {}) => {
    const box = make("div", wide ? "text wide" : "text"), head = make("h4", "", title);
    head.append(make("small", asideClass, aside));
    box.append(head, marked(text || "–", search.value.trim().toLowerCase()));
    return box;
  };
  const tokens = (row, name) => (row.tokens[name] === undefined ? "" : `${row.tokens[name]} tokens`);
  const draw = () => {
    position.textContent = found.length ? `${at + 1} of ${found.length}` : "none";
    if (!found.length) { card.replaceChildren(make("p", "empty wide", "No row matches.")); return; }
    const row = rows[found[at]];
    const panels = [
      panel("Prompt", row.prompt, { aside: row.id, wide: true }),
      panel("Student's answer", row.answer, { aside: tokens(row, "answer") }),
      panel("Teacher's critique", row.critique, { aside: `verdict: ${row.verdict}`, asideClass: `mark ${row.verdict}` }),
      panel("Teacher's refinement", row.refinement, { aside: tokens(row, "refinement") }),
    ];
    if (row.reference) panels.push(panel("Reference (the teacher has not seen it)", row.reference, { wide: true }));
    card.replaceChildren(...panels);
  };
  const filter = () => {
    const needle = search.value.trim().toLowerCase();
    found = rows.flatMap((row, index) =>
      (!verdict.value || row.verdict === verdict.value) && haystacks[index].includes(needle) ? [index] : []);
    at = 0;
    draw();
  };
  const turn = (step) => { if (found.length) { at = (at + step + found.length) % found.length; draw(); } };
  search.addEventListener("input", filter);
  verdict.addEventListener("change", filter);
  by("previous").addEventListener("click", () => turn(-1));
  by("next").addEventListener("click", () => turn(1));
  addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest("input, select, textarea, .scroll")) return;
    if (event.key === "ArrowLeft") turn(-1);
    if (event.key === "ArrowRight") turn(1);
  });
  filter();
})();
