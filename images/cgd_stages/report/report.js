"use strict";
(() => {
  const by = (id) => document.getElementById(id);
  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };

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
      const box = plot.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width * 100, y = (event.clientY - box.top) / box.height * 100;
      // By columns first: of several points above each other the nearest in height.
      const away = ([left, top]) => [Math.abs(left - x), Math.abs(top - y)];
      let best = 0;
      points.forEach((point, index) => {
        const [across, along] = away(point), [leastAcross, leastAlong] = away(points[best]);
        if (across < leastAcross || (across === leastAcross && along < leastAlong)) best = index;
      });
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

  // --- the first figure as a picture: SVG is copied as text, see shell.js ---------------------------------------
  for (const button of document.querySelectorAll("button.png")) {
    button.addEventListener("click", () => {
      const figure = by(button.dataset.of), picture = new Image(), scale = 2;
      picture.addEventListener("load", () => {
        const canvas = document.createElement("canvas");
        canvas.width = scale * figure.viewBox.baseVal.width;
        canvas.height = scale * figure.viewBox.baseVal.height;
        canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
        const link = make("a");
        link.download = "outcome.png";
        link.href = canvas.toDataURL("image/png");
        link.click();
      });
      picture.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(new XMLSerializer().serializeToString(figure))}`;
    });
  }

  // --- the browser of quadruples ---------------------------------------------------------------------------------
  const browser = by("browser");
  if (!browser) return;
  browser.hidden = false;
  const rows = JSON.parse(by("rows-data").textContent);
  const texts = ["prompt", "reference", ...["answer", "critique", "refinement"].flatMap((name) => [`${name}_thinking`, name])];
  const several = rows.some((row) => row.sample > 0);
  const haystacks = rows.map((row) => [row.id, row.reason, row.detail, ...texts.map((name) => row[name])].join("\n").toLowerCase());
  const search = by("search"), choice = by("choice"), order = by("order"), changed = by("changed"), position = by("position"), card = by("row");
  let found = [], at = 0;

  // The reference's word where there is one, else the teacher's.
  const draft = (row) => row.draft_right ?? { right: true, wrong: false }[row.verdict] ?? null;
  const choices = {
    all: () => true,
    "draft-wrong": (row) => draft(row) === false,
    "draft-right": (row) => draft(row) === true,
    mended: (row) => row.draft_right === false && row.refinement_right === true,
    broken: (row) => row.draft_right === true && row.refinement_right === false,
    "refinement-wrong": (row) => row.refinement_right === false,
    misjudged: (row) => row.draft_right !== null && row.verdict !== "missing" && row.draft_right !== (row.verdict === "right"),
    "verdict-right": (row) => row.verdict === "right",
    "verdict-wrong": (row) => row.verdict === "wrong",
    "verdict-missing": (row) => row.verdict === "missing",
  };
  const chosen = (row) => (choice.value === "rejected") === Boolean(row.stage) && (row.stage || choices[choice.value](row));

  const needle = () => search.value.trim().toLowerCase();
  const append = (element, text) => {
    const low = text.toLowerCase(), wanted = needle();
    let from = 0;
    // Lower case may change a text's length: then positions would lie, and nothing is marked.
    for (let hit = 0; wanted && low.length === text.length && (hit = low.indexOf(wanted, from)) >= 0; from = hit + wanted.length) {
      element.append(text.slice(from, hit), make("mark", "", text.slice(hit, hit + wanted.length)));
    }
    element.append(text.slice(from));
  };

  // Which words of two texts are in their longest common subsequence, as two lists of booleans.
  const common = (one, other) => {
    const a = one.map((word) => word.trim()), b = other.map((word) => word.trim());
    const width = b.length + 1, length = new Uint16Array((a.length + 1) * width);
    for (let i = a.length - 1; i >= 0; i--) {
      for (let j = b.length - 1; j >= 0; j--) {
        length[i * width + j] = a[i] === b[j]
          ? length[(i + 1) * width + j + 1] + 1
          : Math.max(length[(i + 1) * width + j], length[i * width + j + 1]);
      }
    }
    const keptA = a.map(() => false), keptB = b.map(() => false);
    for (let i = 0, j = 0; i < a.length && j < b.length;) {
      if (a[i] === b[j]) { keptA[i++] = keptB[j++] = true; }
      else if (length[(i + 1) * width + j] >= length[i * width + j + 1]) i++;
      else j++;
    }
    return [keptA, keptB];
  };
  const words = (text) => text.match(/\s*\S+\s*?(?=\s|$)/g) || [];
  const compared = (list, kept, tag) => {
    const body = make("pre");
    for (let start = 0; start < list.length;) {
      let end = start;
      while (end < list.length && kept[end] === kept[start]) end++;
      const text = list.slice(start, end).join(""), bare = text.trimStart(), part = kept[start] ? body : make(tag);
      body.append(text.slice(0, text.length - bare.length));
      append(part, bare);
      if (part !== body) body.append(part);
      start = end;
    }
    return body;
  };
  const plain = (text) => { const body = make("pre"); append(body, text || "–"); return body; };
  const panel = (title, body, { aside = "", asideClass = "", thought = "", wide = false } = {}) => {
    const box = make("div", wide ? "text wide" : "text"), head = make("h3", "", title);
    head.append(make("small", asideClass, aside));
    box.append(head, ...(thought ? [folded("Thought", plain(thought))] : []), body);
    return box;
  };
  const folded = (title, body) => {
    const box = make("details", "thought");
    // A match of the search is not hidden.
    box.open = Boolean(body.querySelector("mark"));
    box.append(make("summary", "", title), body);
    return box;
  };
  const judged = (right) => ({ true: ["right by the reference", "mark right"], false: ["wrong by the reference", "mark wrong"] }[right] || ["", ""]);
  const aside = (row, name, right, more = "") => {
    const [word, asideClass] = judged(right);
    const told = [word, row.tokens[name] === undefined ? "" : `${row.tokens[name]} tokens`, more];
    return { aside: told.filter(Boolean).join(" · "), asideClass, thought: row[`${name}_thinking`] };
  };
  // As `cgd rows` names a row, where a prompt has several.
  const identity = (row) => (several ? `${row.id} / ${row.sample}` : row.id);
  const quadruple = (row) => {
    const before = words(row.answer), after = words(row.refinement), [keptBefore, keptAfter] = common(before, after);
    const share = after.length ? `${Math.round(100 * keptAfter.filter(Boolean).length / after.length)} % of its words kept` : "";
    const show = (text, list, kept, tag) => (changed.checked && list.length ? compared(list, kept, tag) : plain(text));
    return [
      panel("Prompt", plain(row.prompt), { aside: identity(row), wide: true }),
      panel("Student's answer", show(row.answer, before, keptBefore, "del"), aside(row, "answer", row.draft_right)),
      panel("Teacher's critique", plain(row.critique), { aside: `verdict: ${row.verdict}`, asideClass: `mark ${row.verdict}`, thought: row.critique_thinking }),
      panel("Teacher's refinement", show(row.refinement, after, keptAfter, "ins"), aside(row, "refinement", row.refinement_right, share)),
      ...(row.reference ? [panel("Reference (the teacher has not seen it)", plain(row.reference), { wide: true })] : []),
    ];
  };
  const rejection = (row) => [
    panel("Prompt", plain(row.prompt), { aside: identity(row), wide: true }),
    panel(`Rejected in ${row.stage}`, plain(row.detail), { aside: row.reason, asideClass: "mark wrong", wide: true }),
  ];

  const draw = () => {
    position.textContent = found.length ? `${at + 1} of ${found.length}` : "none";
    if (!found.length) { card.replaceChildren(make("p", "empty wide", "No row matches.")); return; }
    const row = rows[found[at]];
    card.replaceChildren(...(row.stage ? rejection(row) : quadruple(row)));
  };
  const filter = () => {
    found = rows.flatMap((row, index) => (chosen(row) && haystacks[index].includes(needle()) ? [index] : []));
    if (order.value) {
      const size = (index) => rows[index].tokens?.[order.value] ?? -1;
      found.sort((one, other) => size(other) - size(one));
    }
    at = 0;
    draw();
  };
  const turn = (step) => { if (found.length) { at = (at + step + found.length) % found.length; draw(); } };
  if (rows.every((row) => row.stage)) choice.value = "rejected";
  search.addEventListener("input", filter);
  choice.addEventListener("change", filter);
  order.addEventListener("change", filter);
  changed.addEventListener("change", draw);
  by("previous").addEventListener("click", () => turn(-1));
  by("next").addEventListener("click", () => turn(1));
  search.addEventListener("keydown", (event) => {
    const step = { ArrowUp: -1, ArrowDown: 1, Enter: 1 }[event.key];
    if (step) { event.preventDefault(); turn(step); }
    if (event.key === "Escape") {
      event.preventDefault();
      if (search.value) { search.value = ""; filter(); } else search.blur();
    }
  });
  addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest("input, select, textarea, .scroll")) return;
    if (event.key === "ArrowLeft") turn(-1);
    if (event.key === "ArrowRight") turn(1);
    if (event.key === "/") { event.preventDefault(); search.focus(); search.select(); }
  });
  filter();
})();
