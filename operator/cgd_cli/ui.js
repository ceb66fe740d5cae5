"use strict";
(() => {
  const by = (id) => document.getElementById(id);
  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const set = (element, text) => { if (element.textContent !== text) element.textContent = text; };
  const give = (element, name, value) => { if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value); };

  // The choice of light or dark holds for all pages.
  const root = document.documentElement, kept = localStorage.getItem("cgd-theme");
  if (kept) root.dataset.theme = kept;
  by("theme").addEventListener("click", () => localStorage.setItem("cgd-theme", root.dataset.theme));

  // --- time -------------------------------------------------------------------------------------------------------
  const span = (seconds) => {
    const whole = Math.max(0, Math.round(seconds)), two = (value) => String(value).padStart(2, "0");
    if (whole < 60) return `${whole} s`;
    if (whole < 3600) return `${Math.floor(whole / 60)} min ${two(whole % 60)} s`;
    if (whole < 86400) return `${Math.floor(whole / 3600)} h ${two(Math.floor(whole % 3600 / 60))} min`;
    return `${Math.floor(whole / 86400)} d ${Math.floor(whole % 86400 / 3600)} h`;
  };
  const since = (text, until) => ((until ? Date.parse(until) : Date.now()) - Date.parse(text)) / 1000;
  const clocks = new Set();
  setInterval(() => clocks.forEach((tick) => tick()), 5000);

  // --- tables that keep their elements and change only texts -------------------------------------------
  const cell = (row, column) => {
    const element = row.appendChild(make(column.head ? "th" : "td", column.className));
    element.setAttribute("role", column.head ? "rowheader" : "cell");
    if (column.head) element.scope = "row";
    if (column.label && !column.head) element.dataset.label = column.label;
    const update = column.build ? column.build(element) : (item) => set(element, column.text(item));
    return update;
  };
  // `columns`: {title, label on narrow screens, className, head, text(item) or build(element) -> update(item)}.
  class Table {
    constructor(parent, name, columns, why) {
      this.columns = columns;
      this.why = why;
      this.lines = new Map();
      const table = parent.appendChild(make("table"));
      table.setAttribute("role", "table");
      table.setAttribute("aria-label", name);
      const head = table.appendChild(make("thead")), row = head.appendChild(make("tr"));
      head.setAttribute("role", "rowgroup");
      row.setAttribute("role", "row");
      for (const column of columns) {
        const title = row.appendChild(make("th", column.className, column.title));
        title.scope = "col";
        title.setAttribute("role", "columnheader");
      }
      this.body = table.appendChild(make("tbody"));
      this.body.setAttribute("role", "rowgroup");
      this.element = table;
    }
    put(key, item) {
      let line = this.lines.get(key);
      if (!line) {
        const row = make("tr");
        row.setAttribute("role", "row");
        line = { row, updates: this.columns.map((column) => cell(row, column)), more: null };
        this.lines.set(key, line);
      }
      line.item = item;
      line.updates.forEach((update) => update(item));
      this.explain(line, this.why ? this.why(item) : "");
      return line;
    }
    // A second line for a text that is too long for a column.
    explain(line, text) {
      if (text && !line.more) {
        line.more = make("tr", "why");
        line.more.setAttribute("role", "row");
        const wide = line.more.appendChild(make("td"));
        wide.colSpan = this.columns.length;
        wide.setAttribute("role", "cell");
        wide.append(make("small"));
        if (line.row.parentNode) line.row.after(line.more);
      }
      if (!text && line.more) {
        line.more.remove();
        line.more = null;
      }
      if (text) set(line.more.querySelector("small"), text);
      line.row.classList.toggle("more", Boolean(text));
    }
    drop(key) {
      const line = this.lines.get(key);
      if (!line) return;
      line.row.remove();
      line.more?.remove();
      this.lines.delete(key);
    }
    // Only these lines, in this order; a line already in its place stays untouched.
    arrange(keys) {
      const kept = new Set(keys);
      for (const key of [...this.lines.keys()]) if (!kept.has(key)) this.drop(key);
      let next = this.body.firstChild;
      for (const key of keys) {
        const line = this.lines.get(key);
        for (const row of line.more ? [line.row, line.more] : [line.row]) {
          if (row === next) next = next.nextSibling;
          else this.body.insertBefore(row, next);
        }
      }
    }
    fill(items, key) {
      items.forEach((item, index) => this.put(key(item, index), item));
      this.arrange(items.map(key));
      this.element.hidden = !items.length;
    }
  }

  const stateColumn = { title: "State", build: (element) => {
    const shown = element.appendChild(make("span"));
    return (item) => { set(shown, item.state); give(shown, "class", `state ${item.look}`); };
  } };
  const figure = (title, label, name) => ({ title, label, className: "num", text: (item) => item[name] });

  // --- the stream ---------------------------------------------------------------------------------------------------
  let trouble = "", cut = "";
  const showTrouble = () => {
    const text = cut || trouble;
    set(by("trouble"), text);
    by("trouble").hidden = !text;
    set(by("link"), text ? "not live" : "live");
  };
  const follow = (path, listeners) => {
    const source = new EventSource(path);
    for (const [name, listen] of Object.entries(listeners)) {
      source.addEventListener(name, (event) => {
        const data = JSON.parse(event.data);
        cut = "";
        trouble = data.trouble;
        listen(data);
        showTrouble();
      });
    }
    source.addEventListener("error", () => {
      cut = "cgd ui does not answer: this page may be old. It tries again; if cgd ui has ended, start it again.";
      showTrouble();
      if (source.readyState === EventSource.CLOSED) setTimeout(() => follow(path, listeners), 3000);
    });
  };
  const tell = (text) => { by("told").textContent = text; };

  // --- all runs -----------------------------------------------------------------------------------------------------
  const allRuns = () => {
    const search = by("search"), state = by("state"), space = by("space");
    const table = new Table(by("run-lines"), "Runs", [
      { title: "Run", head: true, build: (element) => {
        const link = element.appendChild(make("a")), where = element.appendChild(make("small"));
        return (run) => { set(link, run.name); give(link, "href", run.page); set(where, run.namespace); };
      } },
      stateColumn,
      { title: "Progress", className: "at", build: (element) => {
        const text = element.appendChild(make("small")), bar = element.appendChild(make("progress"));
        bar.max = 100;
        return (run) => {
          set(text, run.stage ? `${run.percent}\u202f% · ${run.stage}` : `${run.percent}\u202f%`);
          if (bar.value !== run.percent) bar.value = run.percent;
          give(bar, "aria-label", `Progress of ${run.key}`);
        };
      } },
      { title: "Result", label: "result", text: (run) => run.result },
      figure("Rows", "rows", "rows"),
      figure("Rejected", "rejected", "rejected"),
      figure("Tokens/s", "tokens/s", "speed"),
      figure("ETA", "ETA", "eta"),
      figure("GPU-hours", "GPU-h", "gpuHours"),
      { title: "Age", label: "age", className: "num", build: (element) => (run) => {
        set(element, span(since(run.created)));
        element.title = run.created;
      } },
    ], (run) => run.why);

    const options = (select, values) => {
      const current = [...select.options].map((option) => option.value).slice(1);
      const sorted = [...new Set([...values, ...(select.value ? [select.value] : [])])].sort();
      if (current.join("\n") === sorted.join("\n")) return;
      const chosen = select.value;
      select.replaceChildren(select.options[0], ...sorted.map((value) => new Option(value, value)));
      select.value = chosen;
    };
    const lines = () => [...table.lines.values()];
    const filter = () => {
      const words = search.value.trim().toLowerCase().split(/\s+/);
      let shown = 0;
      for (const line of lines()) {
        const run = line.item, text = `${run.key} ${run.stage} ${run.state} ${run.why}`.toLowerCase();
        const matches = words.every((word) => text.includes(word)) && (!state.value || run.state === state.value) && (!space.value || run.namespace === space.value);
        line.row.hidden = !matches;
        if (line.more) line.more.hidden = !matches;
        shown += matches;
      }
      const all = table.lines.size, groups = ["at work", "waiting", "suspended", "failed", "succeeded"];
      const parts = groups.map((group) => [lines().filter((line) => line.item.group === group).length, group]);
      set(by("counts"), [`${shown === all ? all : `${shown} of ${all}`} run${all === 1 ? "" : "s"}`, ...parts.filter(([count]) => count).map(([count, word]) => `${count} ${word}`)].join(" · "));
      table.element.hidden = !shown;
      by("none").hidden = Boolean(shown);
      set(by("none"), all ? "No run matches the search." : "There are no runs here. kubectl apply -f run.yaml creates one; cgd ui -A shows those of all namespaces.");
      space.parentElement.hidden = space.options.length < 3 && !space.value;
    };
    const remember = () => {
      const chosen = new URLSearchParams();
      for (const field of [search, state, space]) if (field.value) chosen.set(field.id, field.value);
      history.replaceState(null, "", chosen.size ? `#${chosen}` : location.pathname);
      filter();
    };
    const chosen = new URLSearchParams(location.hash.slice(1));
    search.value = chosen.get("search") ?? "";
    for (const field of [state, space]) {
      const value = chosen.get(field.id);
      if (value) field.add(new Option(value, value));
      field.value = value ?? "";
    }
    search.addEventListener("input", remember);
    state.addEventListener("change", remember);
    space.addEventListener("change", remember);
    addEventListener("keydown", (event) => {
      if (event.key === "/" && !event.target.closest("input, select")) { event.preventDefault(); search.focus(); }
      if (event.key === "Escape" && event.target === search) { search.value = ""; remember(); }
    });

    const newestFirst = (a, b) => b.item.created.localeCompare(a.item.created) || a.item.key.localeCompare(b.item.key);
    const show = () => {
      options(state, lines().map((line) => line.item.state));
      options(space, lines().map((line) => line.item.namespace));
      filter();
    };
    const arrange = () => table.arrange(lines().sort(newestFirst).map((line) => line.item.key));
    follow("/changes", {
      all: (data) => {
        data.changed.forEach((run) => table.put(run.key, run));
        const keys = new Set(data.changed.map((run) => run.key));
        [...table.lines.keys()].filter((key) => !keys.has(key)).forEach((key) => table.drop(key));
        arrange();
        show();
      },
      some: (data) => {
        const before = data.changed.map((run) => table.lines.get(run.key)?.item.state);
        data.changed.forEach((run) => table.put(run.key, run));
        data.gone.forEach((key) => table.drop(key));
        if (before.includes(undefined)) arrange();
        show();
        const turned = data.changed.filter((run, index) => run.state !== before[index]).map((run) => `${run.name}: ${run.state}`);
        if (turned.length) tell(turned.length > 3 ? `${turned.length} runs have changed their state` : turned.join(", "));
      },
    });
    clocks.add(() => lines().forEach((line) => table.put(line.item.key, line.item)));
  };

  // --- one run ------------------------------------------------------------------------------------------------------
  const oneRun = () => {
    const when = (name) => ({ build: (element) => (item) => {
      set(element, item[name] ? `${span(since(item[name]))} ago` : "");
      element.title = item[name];
    } });
    // The loss of a training, and its way since this page was opened.
    const lossColumn = { title: "Loss", label: "loss", className: "num loss", build: (element) => {
      const text = make("span"), space = "http://www.w3.org/2000/svg", svg = document.createElementNS(space, "svg");
      const line = svg.appendChild(document.createElementNS(space, "polyline")), seen = [];
      svg.setAttribute("viewBox", "0 0 60 18");
      svg.setAttribute("role", "img");
      return (stage) => {
        if (!stage.loss) return;
        if (!text.parentNode) element.append(text);
        set(text, stage.loss);
        if (seen.at(-1) !== Number(stage.loss)) seen.push(Number(stage.loss));
        if (seen.length > 240) seen.shift();
        if (seen.length < 2) return;
        if (!svg.parentNode) element.append(svg);
        const low = Math.min(...seen), high = Math.max(...seen);
        const point = (loss, index) => `${(1 + 58 * index / (seen.length - 1)).toFixed(1)},${(2 + 14 * (high - loss) / (high - low || 1)).toFixed(1)}`;
        give(line, "points", seen.map(point).join(" "));
        give(svg, "aria-label", `Loss since this page was opened, from ${seen[0]} to ${seen.at(-1)}`);
      };
    } };
    let first = 0, last = 1;
    const stages = new Table(by("stage-lines"), "Stages", [
      { title: "Stage", head: true, text: (stage) => stage.name },
      stateColumn,
      { title: "Timeline", className: "track-cell", build: (element) => {
        const track = element.appendChild(make("div", "track")), space = "http://www.w3.org/2000/svg";
        const svg = track.appendChild(document.createElementNS(space, "svg")), bar = document.createElementNS(space, "rect");
        svg.setAttribute("viewBox", "0 0 100 10");
        svg.setAttribute("preserveAspectRatio", "none");
        svg.setAttribute("aria-hidden", "true");
        bar.setAttribute("height", "10");
        return (stage) => {
          if (!stage.start) { bar.remove(); return; }
          const from = (Date.parse(stage.start) - first) / (last - first) * 100;
          const to = ((stage.end ? Date.parse(stage.end) : last) - first) / (last - first) * 100;
          give(bar, "class", `k-${stage.kind}`);
          give(bar, "x", Math.min(from, 99.4).toFixed(2));
          give(bar, "width", Math.max(to - from, 0.6).toFixed(2));
          if (!bar.parentNode) svg.append(bar);
        };
      } },
      { title: "Done", className: "at", build: (element) => {
        const text = element.appendChild(make("small")), bar = element.appendChild(make("progress"));
        bar.max = 100;
        return (stage) => {
          bar.hidden = text.hidden = !stage.started;
          set(text, `${stage.percent}\u202f%`);
          if (bar.value !== stage.percent) bar.value = stage.percent;
          give(bar, "aria-label", `Progress of ${stage.name}`);
        };
      } },
      { title: "Time", label: "time", className: "num", text: (stage) => stage.start ? span(since(stage.start, stage.end)) : "" },
      figure("Rows", "rows", "rows"),
      figure("Rejected", "rejected", "rejected"),
      figure("Tokens/s", "tokens/s", "speed"),
      figure("ETA", "ETA", "eta"),
      figure("Attempts", "attempts", "attempts"),
      figure("GPU-hours", "GPU-h", "gpuHours"),
      lossColumn,
    ], (stage) => stage.message);
    const conditions = new Table(by("condition-lines"), "Conditions", [
      { title: "Condition", head: true, text: (condition) => condition.type },
      { title: "Status", text: (condition) => condition.status },
      { title: "Reason", text: (condition) => condition.reason },
      { title: "Message", className: "text-cell", text: (condition) => condition.message },
      { title: "For", label: "for", className: "num", text: (condition) => span(since(condition.lastTransitionTime)) },
    ]);
    const events = new Table(by("event-lines"), "Events", [
      { title: "Reason", head: true, text: (event) => event.reason },
      { title: "Type", text: (event) => event.type },
      { title: "When", ...when("when") },
      { title: "Message", className: "text-cell", text: (event) => event.message },
    ]);
    const facts = new Map();
    const fact = (name, text) => {
      if (!facts.has(name)) {
        const part = by("facts").appendChild(make("div"));
        part.append(make("dt", "", name), make("dd"));
        facts.set(name, part.lastChild);
      }
      set(facts.get(name), text);
      facts.get(name).parentElement.hidden = !text;
    };
    let artifacts = "", shown = null;
    const command = (text) => {
      const line = make("p"), button = make("button", "copy", "Copy");
      button.type = "button";
      button.setAttribute("aria-label", `Copy ${text}`);
      button.addEventListener("click", () => navigator.clipboard.writeText(text).then(() => tell("Copied"), () => tell("The browser does not let this page copy: select the command yourself")));
      line.append(make("code", "uri", text), button);
      return line;
    };
    const artifact = (item) => {
      const part = make("div", "artifact"), texts = make("div");
      const uri = texts.appendChild(make("p"));
      uri.append(make("code", "uri", item.uri));
      texts.append(command(item.command));
      if (item.open) {
        const link = texts.appendChild(make("p")).appendChild(make("a", "", "Open the report"));
        link.href = item.open;
      }
      part.append(make("b", "", item.what), texts);
      return part;
    };
    const show = (run) => {
      const verdict = by("verdict");
      verdict.className = `verdict ${{ good: "better", bad: "worse" }[run.look] ?? ""}`;
      set(verdict.firstChild, run.why ? `${run.state}: ${run.why}` : run.state);
      set(verdict.lastChild, run.who);
      document.querySelector(".whole progress").value = run.percent;
      set(by("percent"), `${run.percent}\u202f%`);
      const figures = { Result: run.result, Stage: run.stage, Rows: run.rows, Rejected: run.rejected, "Tokens/s": run.speed, ETA: run.eta, "GPU-hours": run.gpuHours, Tokens: run.tokens, Age: span(since(run.created)), Student: run.student, Teacher: run.teacher };
      for (const [name, text] of Object.entries(figures)) fact(name, text);
      const starts = run.stages.filter((stage) => stage.start);
      first = Math.min(...starts.map((stage) => Date.parse(stage.start)));
      last = Math.max(first + 1000, ...starts.map((stage) => stage.end ? Date.parse(stage.end) : Date.now()));
      stages.fill(run.stages, (stage) => stage.name);
      conditions.fill(run.conditions, (condition) => condition.type);
      events.fill(run.events, (event) => `${event.when} ${event.reason} ${event.message}`);
      by("events").querySelector(".empty").hidden = run.events.length > 0;
      set(by("manifest"), run.manifest);
      const made = JSON.stringify(run.artifacts);
      if (made !== artifacts) by("artifact-lines").replaceChildren(...run.artifacts.map(artifact));
      artifacts = made;
      by("artifacts").querySelector(".empty").hidden = run.artifacts.length > 0;
    };
    follow(`${location.pathname}/changes`, {
      run: (data) => {
        if (data.run) {
          if (shown && (shown.state !== data.run.state || shown.stage !== data.run.stage)) tell(`${data.run.state}, ${data.run.stage}`);
          shown = data.run;
          by("all").hidden = false;
          show(shown);
        } else if (!data.trouble) {
          trouble = shown ? "This run has been deleted; below is its last state." : "No run has this name.";
        }
        set(by("eventless"), data.eventless);
        by("eventless").hidden = !data.eventless;
      },
    });
    clocks.add(() => { if (shown) show(shown); });

    // The end of the log. Of a run that works it is asked for again and again, of any other once for each change.
    let told = "";
    const readLog = async () => {
      const now = shown ? `${shown.state} ${shown.stage}` : "";
      if (!shown || document.hidden || (now === told && shown.look !== "work")) return;
      const answer = await fetch(`${location.pathname}/log`).then((response) => response.json()).catch(() => null);
      if (!answer) return;
      told = now;
      const lines = by("log-lines"), atEnd = lines.scrollHeight - lines.scrollTop - lines.clientHeight < 40;
      set(by("log-of"), answer.trouble || `${answer.of}, the last lines. All of it: cgd logs ${shown.name} -n ${shown.namespace} -f`);
      lines.hidden = !answer.lines.length;
      set(lines, answer.lines.join("\n"));
      if (atEnd) lines.scrollTop = lines.scrollHeight;
    };
    setInterval(readLog, 2000);
  };

  ({ runs: allRuns, run: oneRun })[by("main").dataset.page]();
})();
