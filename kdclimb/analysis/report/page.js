"use strict";
/* Charts to explore, filters and run pages, from the tables that the page carries. It computes nothing: what is drawn and
   shown are cells, as the page has them. Without it the page still has its words, tables and figures. */
(async () => {
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

  // ---- what the page carries

  async function unpack(id) {
    const bytes = Uint8Array.from(atob($(`#${id}`).textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  }

  if (typeof DecompressionStream === "undefined") return; // a browser of before 2023 keeps the still figures
  const data = JSON.parse(await unpack("data"));
  const library = document.createElement("script");
  library.textContent = await unpack("plotly");
  document.head.append(library);
  document.documentElement.classList.add("live");

  function rowsOf(name) {
    const table = data.tables[name];
    if (!table) return [];
    const columns = Object.keys(table);
    return table[columns[0]].map((_, i) => Object.fromEntries(columns.map((column) => [column, table[column][i]])));
  }

  function grouped(rows, key) {
    const groups = new Map();
    for (const row of rows) {
      if (!groups.has(row[key])) groups.set(row[key], []);
      groups.get(row[key]).push(row);
    }
    return groups;
  }

  const tables = {};
  const table = (name) => (tables[name] ??= rowsOf(name));
  const traces = grouped(table("traces"), "run_id");
  const runs = new Map();
  for (const row of table("runs")) if (!runs.has(row.run_id)) runs.set(row.run_id, row);
  const first = ({ run_id, arm, label }) => runs.get(run_id)?.arm === arm && runs.get(run_id).label === label;
  const curves = grouped(
    table("curves").filter((row) => row.step > 0 && first(row)), // a run that several arms share stands there for each
    "run_id",
  );
  const pages = new Map(table("run_pages").map((row) => [row.run_id, row]));

  // ---- how it looks

  const DASHES = { "-": "solid", "--": "dash", "-.": "dashdot", ":": "dot" };
  const SYMBOLS = {
    ce: "triangle-up",
    kd: "circle",
    screen: "circle",
    control_random: "square",
    control_boost: "diamond",
  };
  const X_NAMES = {
    step: "step",
    tokens: "tokens",
    train_time_ms: `${data.modelled ? "modelled " : ""}student's training time (ms)`,
    time_with_teacher_ms: `${data.modelled ? "modelled " : ""}training time, teacher's added (ms)`,
  };
  const Y_NAMES = { val_loss: "validation loss (nats)", train_loss: "training loss, hard, normalised (nats)" };
  const PAPER_WIDTH = 640; // CSS pixels: A4 without its margins
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--fig-${name}`).trim();
  const colour = (arm) => css(data.arms[arm]?.colour ?? "muted");
  const paper = () => document.documentElement.hasAttribute("data-paper");
  const narrow = () => innerWidth < 600;
  const state = { x: "step", y: "val_loss", horizon: 0, only: null };

  function layout(x, y, more = {}) {
    const axis = { gridcolor: css("grid"), linecolor: css("muted"), zerolinecolor: css("muted"), zeroline: false };
    axis.title = { standoff: 8 };
    axis.automargin = true;
    const { xaxis = {}, yaxis = {}, ...rest } = more;
    return {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: css("ink"), size: narrow() ? 11 : 13, family: "system-ui, sans-serif" },
      margin: { l: 10, r: 10, t: 10, b: 10 },
      height: narrow() ? 320 : 400,
      hovermode: "closest",
      hoverlabel: {
        align: "left",
        bgcolor: css("card"),
        bordercolor: css("muted"),
        font: { color: css("ink"), size: 12 },
      },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
      xaxis: { ...axis, ...xaxis, title: { text: x, standoff: 8, font: { size: narrow() ? 11 : 13 } } },
      yaxis: { ...axis, ...yaxis, title: { text: y, standoff: 8, font: { size: narrow() ? 11 : 13 } } },
      ...rest,
    };
  }

  const CONFIG = {
    responsive: true,
    displaylogo: false,
    modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"],
    toImageButtonOptions: { format: "svg" },
  };

  const escaped = (text) =>
    String(text).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
  const rounded = (value) => String(Number(value.toPrecision(3)));
  const cell = (value) => (value === null || value === undefined || value === "" ? "–" : escaped(value));

  function nameOf(row) {
    const arm = data.arms[row.arm]?.name ?? row.arm;
    return `${arm}${row.arm === "ce" ? "" : ` ${row.label}`}, ${row.horizon} steps, seed ${row.seed}`;
  }

  // What hovering over a point shows: the run, and the cells behind the point.
  const hover = (title, row, columns) =>
    `<b>${escaped(title)}</b>${columns.map((column) => `<br>${escaped(column)} ${cell(row[column])}`).join("")}<extra></extra>`;

  function line(rows, x, y, run, more = {}) {
    const arm = data.arms[run.arm] ?? {};
    const known = rows.filter((row) => row[x] != null && row[y] != null);
    return {
      type: "scatter",
      mode: "lines",
      x: known.map((row) => row[x]),
      y: known.map((row) => row[y]),
      name: escaped(arm.name ?? run.arm),
      line: { color: colour(run.arm), dash: DASHES[arm.dash] ?? "solid", width: 1.8 },
      marker: { symbol: SYMBOLS[run.arm] ?? "circle-open", size: 6 },
      customdata: known.map(() => run.run_id),
      hovertemplate: known.map((row) => hover(nameOf(run), row, [...new Set(["step", x, y])])),
      ...more,
    };
  }

  // One legend entry an arm, which switches all its runs.
  function oneEntry(traces) {
    const seen = new Set();
    for (const trace of traces) {
      trace.legendgroup = trace.name;
      trace.showlegend = !seen.has(trace.name);
      seen.add(trace.name);
    }
    return traces;
  }

  // A log axis of milliseconds with ticks at 1, 2 and 5, as the tables write times.
  function timeAxis(values) {
    const tickvals = [];
    for (let ten = 1; ten < 1e10; ten *= 10) tickvals.push(ten, 2 * ten, 5 * ten);
    const seconds = (ms) => (ms < 1000 ? `${ms} ms` : `${(ms / 1000).toLocaleString("en")} s`);
    const [low, high] = [Math.min(...values) / 1.3, Math.max(...values) * 1.3];
    return { type: "log", range: [low, high].map(Math.log10), tickvals, ticktext: tickvals.map(seconds) };
  }

  const rule = (more) => ({ type: "line", line: { color: css("muted"), width: 1.2, dash: "dash" }, ...more });
  const across = (y) => rule({ xref: "paper", x0: 0, x1: 1, y0: y, y1: y });
  const note = (text, more) => ({ text, showarrow: false, font: { color: css("muted"), size: 11 }, ...more });

  function targets() {
    const found = [[data.target, "target"], ...data.fixed.map((value) => [value, "fixed target"])];
    return found.filter(([value]) => value != null);
  }

  function targetLines() {
    const shapes = targets().map(([value]) => across(value));
    const place = { xref: "paper", x: 1, xanchor: "right", yanchor: "bottom" };
    return {
      shapes,
      annotations: targets().map(([value, name]) => note(`${name} ${value.toFixed(4)}`, { y: value, ...place })),
    };
  }

  // ---- KD's phases

  // [[phase, from, to], ...] of a run, along x, from the rows of its trace.
  function phasesOf(runId, x) {
    const rows = (traces.get(runId) ?? []).filter((row) => row.phase && row[x] != null);
    const spans = [];
    let from = 0;
    rows.forEach((row, i) => {
      const last = spans[spans.length - 1];
      if (last && last[0] === row.phase) last[2] = row[x];
      else spans.push([row.phase, i ? rows[i - 1][x] : from, row[x]]);
    });
    return spans;
  }

  function phaseStrip(runId, x) {
    const strip = { shapes: [], annotations: [] };
    for (const [phase, from, to] of phasesOf(runId, x)) {
      const place = { xref: "x", yref: "paper", x0: from, x1: to, y0: 0.955, y1: 1, layer: "below" };
      const shade = { A: 0.3, B: 0.17, C: 0.08 }[phase];
      strip.shapes.push({ type: "rect", ...place, fillcolor: css("kd"), opacity: shade, line: { width: 0 } });
      strip.annotations.push(
        note(phase, { x: (from + to) / 2, y: 1, yref: "paper", yanchor: "top", font: { size: 11, color: css("ink") } }),
      );
    }
    return strip;
  }

  function joined(...parts) {
    const all = { shapes: [], annotations: [] };
    for (const part of parts) for (const key of Object.keys(all)) all[key].push(...part[key]);
    return all;
  }

  function stopMarks(ids, source, x, y) {
    const marks = [];
    for (const id of ids) {
      const run = runs.get(id);
      const row = (source.get(id) ?? []).find((row) => run?.kd_stop_step != null && row.step >= run.kd_stop_step);
      if (!row || row[x] == null || row[y] == null) continue;
      marks.push({
        type: "scatter",
        mode: "markers",
        name: "KD stops",
        x: [row[x]],
        y: [row[y]],
        customdata: [id],
        marker: { color: colour("kd"), size: 9, symbol: "circle", line: { color: css("card"), width: 1.5 } },
        hovertemplate: [
          hover(`KD stops: ${nameOf(run)}`, { ...row, kd_stop_step: run.kd_stop_step }, ["kd_stop_step", x, y]),
        ],
      });
    }
    return marks;
  }

  // ---- the charts: each returns [traces, layout]

  const LONGER = ["control_batch", "control_extra"];
  const AT_HORIZON = ["ce", "kd", "ngram", "control_boost", "control_smooth", "log", ...LONGER];

  // Of these arms, the runs at the chosen horizon; controls of more steps than KD's have one of their own.
  function idsAtHorizon(arms = AT_HORIZON) {
    const mine = [...runs.values()].filter((row) => row.horizon === state.horizon || LONGER.includes(row.arm));
    return arms.flatMap((arm) => mine.filter((row) => row.arm === arm).map((row) => row.run_id));
  }

  function lossChart() {
    const source = state.y === "val_loss" ? curves : traces;
    const ids = idsAtHorizon();
    const lines = ids.map((id) =>
      line(
        source.get(id) ?? [],
        state.x,
        state.y,
        runs.get(id),
        state.y === "val_loss" ? { mode: "lines+markers" } : {},
      ),
    );
    const longer = LONGER.map((arm) => escaped(data.arms[arm].name));
    for (const trace of lines) if (longer.includes(trace.name)) trace.visible = "legendonly";
    const kd = ids.filter((id) => runs.get(id).arm === "kd");
    const strip = kd.length ? phaseStrip(kd[0], state.x) : { shapes: [], annotations: [] };
    const words = joined(targetLines(), strip);
    const time = state.x.endsWith("_ms");
    const xaxis = time ? { ticksuffix: "", exponentformat: "none", separatethousands: true } : {};
    return [
      oneEntry([...lines, ...stopMarks(kd, source, state.x, state.y)]),
      layout(X_NAMES[state.x], Y_NAMES[state.y], { ...words, xaxis, height: narrow() ? 380 : 480 }),
    ];
  }

  const stepChart = (column, words) => () => {
    const ids = idsAtHorizon(["ce", "kd"]);
    const kd = ids.filter((id) => runs.get(id).arm === "kd");
    const strip = kd.length ? phaseStrip(kd[0], "step") : { shapes: [], annotations: [] };
    const lines = ids.map((id) => line(traces.get(id) ?? [], "step", column, runs.get(id)));
    lines.forEach((trace, i) => {
      if (runs.get(ids[i]).arm === "ce") trace.line.dash = "dash";
    });
    return [
      oneEntry(lines),
      layout("step", words, { ...strip, yaxis: column === "step_ms" ? { rangemode: "tozero" } : {} }),
    ];
  };

  function trendChart() {
    const mine = table("trend").filter((row) => row.label === data.point);
    const dashes = ["solid", "dash", "dot", "dashdot"];
    const lines = [...grouped(mine, "seed")].map(([seed, rows], i) => {
      const run = [...runs.values()].find(
        (row) => row.arm === "kd" && row.seed === seed && row.horizon === rows[0].horizon && row.label === data.point,
      );
      return {
        type: "scatter",
        mode: "lines+markers",
        name: `seed ${seed}`,
        x: rows.map((row) => row.val_loss),
        y: rows.map((row) => row.steps_saved),
        line: { color: colour("kd"), dash: dashes[i % 4] },
        customdata: rows.map(() => run?.run_id),
        hovertemplate: rows.map((row) => hover(`seed ${seed}`, row, ["val_loss", "ce_step", "kd_step", "steps_saved"])),
      };
    });
    const shapes = [rule({ xref: "paper", x0: 0, x1: 1, y0: 0, y1: 0, line: { color: css("ink"), width: 1 } })];
    const annotations = [];
    for (const [value, name] of targets()) {
      shapes.push(rule({ yref: "paper", x0: value, x1: value, y0: 0, y1: 1 }));
      annotations.push(
        note(`${name} ${value.toFixed(4)}`, {
          x: value,
          y: 1,
          yref: "paper",
          yanchor: "top",
          xanchor: "left",
          textangle: 90,
        }),
      );
    }
    return [
      lines,
      layout("validation loss (nats), falling to the right", "steps saved", {
        shapes,
        annotations,
        xaxis: { autorange: "reversed" },
      }),
    ];
  }

  // At which side of its point each candidate's name has room, by the plot's size in pixels, about: none where no side
  // has, and what hovers tells it. The selected one's comes first.
  function namesApart(rows) {
    const width = narrow() ? 260 : 680;
    const height = 220;
    const times = [...rows.map((row) => row.train_time_ms), data.budget_ms].filter((ms) => ms != null).map(Math.log);
    const losses = rows.map((row) => row.final_val);
    const place = (value, all, pixels) =>
      ((value - Math.min(...all)) / (Math.max(...all) - Math.min(...all) || 1)) * pixels;
    const centre = (row) => [
      place(Math.log(row.train_time_ms), times, width),
      place(row.final_val, losses, height),
    ];
    const taken = rows.map((row) => {
      const [x, y] = centre(row);
      return [x - 7, x + 7, y - 7, y + 7];
    });
    const sides = new Map();
    const named = rows.filter((row) => row.verdict !== "rejected");
    for (const row of named.sort((a, b) => (b.verdict === "selected") - (a.verdict === "selected"))) {
      const [x, y] = centre(row);
      const long = 6 * row.candidate.length;
      const found = [
        ["top center", x - long / 2, y + 9],
        ["bottom center", x - long / 2, y - 21],
        ["middle left", x - long - 9, y - 6],
        ["middle right", x + 9, y - 6],
      ].find(([, left, low]) => !taken.some(([l, r, b, t]) => left < r && l < left + long && low < t && b < low + 12));
      if (!found) continue;
      const [side, left, low] = found;
      sides.set(row, side);
      taken.push([left, left + long, low, low + 12]);
    }
    return sides;
  }

  function teacherChart() {
    const rows = table("teachers");
    const KINDS = {
      selected: ["star", "kd", 16],
      survivor: ["circle", "ce", 10],
      rejected: ["x", "muted", 9],
    };
    const columns = ["train_time_ms", "projected_ms", "final_val", "budget_ms", "flops_per_token", "reason"];
    const trained = rows.filter((row) => row.final_val != null && row.train_time_ms != null);
    const sides = namesApart(trained);
    const points = Object.entries(KINDS).flatMap(([kind, [symbol, hue, size]]) => {
      const mine = trained.filter((row) => row.verdict === kind);
      return mine.length
        ? [
            {
              type: "scatter",
              mode: kind === "rejected" ? "markers" : "markers+text",
              name: kind,
              text: mine.map((row) => (sides.get(row) ? escaped(row.candidate) : "")),
              textposition: mine.map((row) => sides.get(row) || "top center"),
              textfont: { size: 10, color: css("ink") },
              cliponaxis: false,
              x: mine.map((row) => row.train_time_ms),
              y: mine.map((row) => row.final_val),
              customdata: mine.map((row) => row.run_id),
              marker: { symbol: mine.map((row) => (row.imported ? `${symbol}-open` : symbol)), color: css(hue), size },
              hovertemplate: mine.map((row) => hover(`${row.candidate}: ${row.verdict}`, row, columns)),
            },
          ]
        : [];
    });
    const lost = rows.filter((row) => (row.final_val == null || row.train_time_ms == null) && row.projected_ms != null);
    if (lost.length) {
      const losses = rows.map((row) => row.final_val).filter((value) => value != null);
      const [low, high] = losses.length ? [Math.min(...losses), Math.max(...losses)] : [0, 1];
      const floor = low - 0.12 * (high - low || 1); // below all losses, since these have none
      points.push({
        type: "scatter",
        mode: "markers",
        name: "rejected on its projection: no loss",
        x: lost.map((row) => row.projected_ms),
        y: lost.map(() => floor),
        customdata: lost.map((row) => row.probe_run_id),
        marker: { symbol: "triangle-down-open", color: css("muted"), size: 10 },
        hovertemplate: lost.map((row) =>
          hover(`${row.candidate}: ${row.verdict}`, row, ["projected_ms", "budget_ms", "reason"]),
        ),
      });
    }
    const shapes =
      data.budget_ms == null
        ? []
        : [
            rule({
              yref: "paper",
              x0: data.budget_ms,
              x1: data.budget_ms,
              y0: 0,
              y1: 1,
              line: { color: css("ink"), width: 1.5, dash: "dash" },
            }),
          ];
    const annotations =
      data.budget_ms == null
        ? []
        : [
            note("budget", {
              x: Math.log10(data.budget_ms),
              y: 1,
              yref: "paper",
              xanchor: "left",
              yanchor: "top",
              font: { color: css("ink"), size: 12 },
            }),
          ];
    const times = [data.budget_ms, ...points.flatMap((trace) => trace.x)].filter((ms) => ms != null);
    return [
      points,
      layout("teacher's training time (log)", "final validation loss (nats)", {
        shapes,
        annotations,
        xaxis: timeAxis(times),
      }),
    ];
  }

  const HUES_OF_PARTS = ["muted", "random", "ce", "kd", "boost", "ink"];
  const PATTERNS = ["", "/", "x", ".", "-", "\\", "+"];

  // Each isolate holds all of those above it that are shorter: drawn one over the other, the widest first, a stack.
  function isolateChart() {
    const rows = table("isolates").filter((row) => row.step_ms_median != null);
    const names = rows.map((row) => row.label);
    const hues = ["ce", "random", "kd", "boost", "muted"];
    const parts = rows.map((part, i) => {
      const holding = rows.filter((row, j) => j === i || (j > i && row.step_ms_median >= part.step_ms_median));
      return {
        type: "bar",
        orientation: "h",
        name: escaped(i ? `up to ${part.label}` : part.label),
        y: holding.map((row) => row.label),
        width: 0.55,
        x: holding.map(() => part.step_ms_median),
        customdata: holding.map(() => part.run_id),
        marker: {
          color: css(hues[i % 5]),
          pattern: { shape: PATTERNS[i % 5], fillmode: "overlay", fgcolor: css("card"), size: 7 },
          line: { color: css("card"), width: 1 },
        },
        hovertemplate: holding.map(() =>
          hover(part.label, part, ["step_ms_median", "ratio_to_ce", "device", "threads"]),
        ),
      };
    });
    const ordered = [...parts].sort((a, b) => Math.max(...b.x) - Math.max(...a.x)); // the widest is drawn first
    const ratio = (row) => (row.ratio_to_ce == null ? "" : ` (${rounded(row.ratio_to_ce)} × CE)`);
    const annotations = rows.map((row) =>
      note(`${rounded(row.step_ms_median)} ms${ratio(row)}`, {
        x: row.step_ms_median,
        y: row.label,
        xanchor: "left",
        xshift: 6,
        font: { color: css("ink"), size: 12 },
      }),
    );
    const yaxis = { categoryorder: "array", categoryarray: [...names].reverse(), showgrid: false };
    const xaxis = { range: [0, (narrow() ? 2.2 : 1.45) * Math.max(...rows.map((row) => row.step_ms_median))] };
    return [
      ordered,
      layout("median step (ms)", "", {
        barmode: "overlay",
        annotations,
        yaxis,
        xaxis,
        height: 300,
        legend: { orientation: "h", y: 1.02, yanchor: "bottom", traceorder: "reversed" },
      }),
    ];
  }

  // Where the time of each isolate's step goes, part upon part.
  function partsChart() {
    const rows = table("profile");
    const names = [...new Set(rows.map((row) => row.label))];
    const bars = [...grouped(rows, "part")].map(([name, mine], i) => ({
      type: "bar",
      orientation: "h",
      name: escaped(name),
      x: mine.map((row) => row.ms_median),
      y: mine.map((row) => escaped(row.label)),
      width: 0.55,
      customdata: mine.map((row) => row.run_id),
      marker: {
        color: css(HUES_OF_PARTS[i % 6]),
        pattern: { shape: PATTERNS[i % 7], fillmode: "overlay", fgcolor: css("card"), size: 7 },
        line: { color: css("card"), width: 1 },
      },
      hovertemplate: mine.map((row) =>
        hover(`${name} of ${row.label}`, row, ["ms_median", "ms_p90", "share_of_step", "step_ms_median"]),
      ),
    }));
    return [
      bars,
      layout("median of the step's part (ms)", "", {
        barmode: "stack",
        yaxis: { categoryorder: "array", categoryarray: names.map(escaped).reverse(), showgrid: false },
        height: 320,
      }),
    ];
  }

  // Between low and high, from end to end; nothing where fewer than two horizons have an interval.
  function band(rows, hue, common) {
    if (rows.length < 2) return [];
    const back = [...rows].reverse();
    return [
      {
        ...common,
        mode: "lines",
        fill: "toself",
        fillcolor: hue,
        opacity: 0.16,
        line: { width: 0 },
        hoverinfo: "skip",
        showlegend: false,
        x: [...rows, ...back].map((row) => row.horizon),
        y: [...rows.map((row) => row.high), ...back.map((row) => row.low)],
      },
    ];
  }

  function horizonChart() {
    const parts = [];
    const arms = [...grouped(table("horizon_curve"), "arm").values()];
    for (const rows of arms.flatMap((mine) => [...grouped(mine, "label").values()])) {
      const { arm, label } = rows[0],
        hue = colour(arm),
        name = arm === "ce" ? "CE" : `KD ${label}`.trim();
      const seeds = rows.filter((row) => row.seed != null),
        means = rows.filter((row) => row.seed == null);
      const known = means.filter((row) => row.low != null);
      const common = { type: "scatter", legendgroup: name };
      parts.push(...band(known, hue, common), {
        ...common,
        mode: "lines",
        name,
        showlegend: means.length > 0,
        x: means.map((row) => row.horizon),
        y: means.map((row) => row.fitted),
        line: { color: hue, width: 2.2 },
        error_y: {
          type: "data",
          symmetric: false,
          array: means.map((row) => (row.low == null ? 0 : row.high - row.final_val)),
          arrayminus: means.map((row) => (row.low == null ? 0 : row.final_val - row.low)),
          color: hue,
          thickness: 1.2,
          width: 5,
          visible: known.length > 0,
        },
        hovertemplate: means.map((row) =>
          hover(row.n_seeds == null ? name : `${name}, mean of ${row.n_seeds} seeds`, row, [
            "horizon",
            "final_val",
            "fitted",
            "low",
            "high",
          ]),
        ),
      });
      const ids = seeds.map(
        (row) =>
          row.run_id ??
          [...runs.values()].find(
            (run) =>
              run.arm === arm &&
              run.seed === row.seed &&
              run.horizon === row.horizon &&
              (arm === "ce" || run.label === label),
          )?.run_id,
      );
      parts.push({
        ...common,
        mode: "markers",
        name,
        showlegend: !means.length,
        x: seeds.map((row) => row.horizon),
        y: seeds.map((row) => row.final_val),
        customdata: ids,
        marker: { color: hue, symbol: SYMBOLS[arm], size: 9, opacity: 0.75 },
        hovertemplate: seeds.map((row) =>
          hover(row.run_id ?? `${name}, seed ${row.seed}`, row, ["horizon", "final_val", "fitted"]),
        ),
      });
    }
    const ticks = [...new Set(table("horizon_curve").map((row) => row.horizon))];
    return [
      parts,
      layout("horizon (steps, log)", "final validation loss (nats)", {
        ...targetLines(),
        xaxis: { type: "log", tickvals: ticks, ticktext: ticks.map(String) },
      }),
    ];
  }

  // A column of the matched claims, a line each, about the level at which the two runs are alike.
  const claimsChart = (column, words, level) => () => {
    const rows = table("claims").filter((row) => row[column] != null);
    const known = column === "val_delta" ? rows.filter((row) => row.noise != null) : [];
    const names = rows.map((row) => `${escaped(row.run_id)}<br>against ${escaped(row.against)}`);
    const noise = known.map((row) => {
      const i = rows.indexOf(row);
      const place = { xref: "x", yref: "y", x0: -row.noise, x1: row.noise, y0: i - 0.45, y1: i + 0.45, layer: "below" };
      return { type: "rect", ...place, fillcolor: css("muted"), opacity: 0.2, line: { width: 0 } };
    });
    const points = {
      type: "scatter",
      mode: "markers",
      x: rows.map((row) => row[column]),
      y: rows.map((_, i) => i),
      customdata: rows.map((row) => row.run_id),
      marker: { color: colour("kd"), size: 11 },
      hovertemplate: rows.map((row) => hover(row.claim, row, [column, "noise", "steps_worth_low", "steps_worth_high"])),
    };
    const shapes = [...noise, rule({ yref: "paper", x0: level, x1: level, y0: 0, y1: 1 })];
    const yaxis = { tickvals: rows.map((_, i) => i), ticktext: names, autorange: "reversed", showgrid: false };
    yaxis.tickfont = { size: narrow() ? 9 : 10 };
    yaxis.automargin = false;
    const margin = { l: narrow() ? 150 : 175, r: 15, t: 10, b: 10 };
    return [rows.length ? [points] : [], layout(words, "", { shapes, yaxis, margin, height: 70 + 38 * rows.length })];
  };

  function breakEvenChart() {
    const rows = table("break_even")
      .filter((row) => row.needed != null || row.measured != null)
      .sort((a, b) => a.target_value - b.target_value); // the first to be met is on top
    const y = rows.map((row) => String(row.target_value));
    const columns = [
      "target_value",
      "label",
      "needed",
      "needed_amortized",
      "measured",
      "measured_low",
      "measured_high",
      "overhead",
      "teacher_share",
      "note",
    ];
    const text = rows.map((row) => hover(`target ${row.target}`, row, columns));
    const part = (key, name, marker, more = {}) => ({
      type: "scatter",
      mode: "markers",
      name,
      x: rows.map((row) => row[key]),
      y,
      marker: { size: 12, ...marker },
      hovertemplate: text,
      ...more,
    });
    const open = (row) => row.measured_low == null || row.measured_high == null || row.measured == null;
    const bars = {
      type: "data",
      symmetric: false,
      array: rows.map((row) => (open(row) ? 0 : row.measured_high - row.measured)),
      arrayminus: rows.map((row) => (open(row) ? 0 : row.measured - row.measured_low)),
      color: colour("kd"),
      thickness: 1.5,
    };
    const parts = [
      part("measured", "measured, with its interval", { color: colour("kd"), symbol: "circle" }, { error_x: bars }),
      part("needed", "needed to break even", { color: css("ink"), symbol: "diamond" }),
      part("needed_amortized", "needed if the teacher is shared", { color: css("ink"), symbol: "diamond-open" }),
    ];
    const shapes = [rule({ yref: "paper", x0: 0, x1: 0, y0: 0, y1: 1, line: { color: css("muted"), width: 1 } })];
    return [
      parts,
      layout("share of CE's tokens saved", "target (nats)", {
        shapes,
        xaxis: { tickformat: ".0%" },
        yaxis: { type: "category", range: [-0.6, rows.length - 0.4] },
        height: 320,
      }),
    ];
  }

  function aliveChart() {
    const screen = table("screen").find((row) => row.label === data.point);
    const start = screen && runs.get(screen.run_id);
    if (!start) return [[], {}];
    const same = [...runs.values()].filter((row) => row.horizon === start.horizon && row.seed === start.seed);
    const ids = [
      start.run_id,
      ...same
        .filter((row) => row.arm === "ce" || (row.arm === "control_random" && row.label === data.point))
        .map((row) => row.run_id),
    ];
    const lines = ids.map((id) => {
      const run = runs.get(id),
        trace = line(curves.get(id) ?? [], "step", "val_loss", run);
      return {
        ...trace,
        mode: "lines+markers",
        marker: { symbol: SYMBOLS[run.arm], size: 9 },
        name: run.arm === "screen" ? "KD" : trace.name,
      };
    });
    return [lines, layout("step", Y_NAMES.val_loss)];
  }

  // ---- the sweep

  const OUTCOMES =
    "rank label run_id status reason miss_reason steps_to_target final_val best_val stability first_val kd_stop_step kd_share_mean".split(
      " ",
    );
  const short = (column) => column.replace(/^lr_/, "").replaceAll("_", " ");

  function knobs() {
    const rows = table("screen");
    return Object.keys(rows[0] ?? {}).filter(
      (column) =>
        !OUTCOMES.includes(column) && new Set(rows.map((row) => row[column]).filter((value) => value != null)).size > 1,
    );
  }

  function parallelChart() {
    const rows = table("screen").filter((row) => row.final_val != null);
    const columns = [...knobs(), "first_val", "final_val"].filter((column) => rows.some((row) => row[column] != null));
    const values = Object.fromEntries(
      columns.map((c) => [
        c,
        [...new Set(rows.map((row) => row[c]).filter((value) => value != null))].sort((a, b) => (a > b ? 1 : -1)),
      ]),
    );
    const place = (row, c) => {
      const [all, value] = [values[c], row[c]];
      if (value == null) return null;
      if (typeof value === "string") return all.length > 1 ? all.indexOf(value) / (all.length - 1) : 0.5;
      return all.length > 1 ? (value - all[0]) / (all.at(-1) - all[0]) : 0.5;
    };
    const lines = [...rows]
      .sort((a, b) => b.rank - a.rank)
      .map((row) => ({
        type: "scatter",
        mode: "lines+markers",
        name: escaped(row.label),
        connectgaps: true,
        showlegend: false,
        x: columns.map((_, i) => i),
        y: columns.map((c) => place(row, c)),
        customdata: columns.map(() => row.run_id),
        line: {
          color: row.rank === 1 ? colour("kd") : css("muted"),
          width: row.rank === 1 ? 4 : 1.5,
          dash: row.status === "ok" ? "solid" : "dot",
        },
        opacity: row.rank === 1 ? 1 : 0.65,
        hovertemplate: columns.map(() =>
          hover(`${row.rank}. ${row.label}`, row, [
            "final_val",
            "steps_to_target",
            ...knobs(),
            "stability",
            "kd_share_mean",
          ]),
        ),
      }));
    const ends = columns.flatMap((c, i) =>
      [
        [values[c].at(-1), 1, "bottom"],
        [values[c][0], 0, "top"],
      ].map(([value, y, anchor]) =>
        note(cell(value), {
          x: i,
          y,
          yanchor: anchor,
          yshift: anchor === "top" ? -4 : 4,
          font: { size: 11, color: css("ink") },
        }),
      ),
    );
    const shapes = columns.map((_, i) => rule({ x0: i, x1: i, y0: 0, y1: 1, line: { color: css("muted"), width: 1 } }));
    const xaxis = {
      tickvals: columns.map((_, i) => i),
      ticktext: columns.map(short),
      showgrid: false,
      range: [-0.35, columns.length - 0.65],
    };
    return [
      lines,
      layout("", "", { annotations: ends, shapes, xaxis, yaxis: { visible: false, range: [-0.12, 1.12] } }),
    ];
  }

  function knobChart() {
    const rows = table("screen").filter((row) => row.final_val != null),
      names = knobs();
    const points = names.map((knob, i) => {
      const mine = rows.filter((row) => row[knob] != null);
      return {
        type: "scatter",
        mode: "markers",
        showlegend: false,
        xaxis: `x${i + 1}`,
        yaxis: "y",
        x: mine.map((row) => row[knob]),
        y: mine.map((row) => row.final_val),
        customdata: mine.map((row) => row.run_id),
        marker: {
          size: 10,
          color: colour("kd"),
          symbol: mine.map((row) => (row.label === data.point ? "circle" : "circle-open")),
        },
        hovertemplate: mine.map((row) =>
          hover(`${row.rank}. ${row.label}`, row, ["final_val", knob, "steps_to_target"]),
        ),
      };
    });
    const base = layout("", "final validation loss (nats)", {
      grid: { rows: 1, columns: Math.max(1, names.length), pattern: "coupled" },
    });
    names.forEach((knob, i) => {
      const all = [...new Set(rows.map((row) => row[knob]).filter((value) => value != null))];
      base[i ? `xaxis${i + 1}` : "xaxis"] = {
        ...base.xaxis,
        title: { ...base.xaxis.title, text: short(knob) },
        tickvals: all,
        type: all.every((v) => typeof v === "number") ? "linear" : "category",
      };
    });
    return [points, base];
  }

  const CHARTS = {
    val_loss_steps: lossChart,
    step_deltas: stepChart("step_ms", "step (ms, median of its block)"),
    lr_phases: stepChart("lr_mult", "LR multiplier"),
    steps_saved_trend: trendChart,
    teachers: teacherChart,
    isolates: isolateChart,
    step_parts: partsChart,
    horizon_curve: horizonChart,
    claims: claimsChart("val_delta", "nats against the other run, less is better", 0),
    claim_times: claimsChart("time_ratio", "time, as a multiple of the other's", 1),
    break_even: breakEvenChart,
    kd_alive: aliveChart,
    sweep_parallel: parallelChart,
    sweep_knobs: knobChart,
  };

  async function draw(element, chart, anew = false) {
    const [parts, how] = chart();
    if (!parts.length) return;
    if (!element.classList.contains("drawn")) {
      element.replaceChildren();
      element.classList.add("drawn");
      element.setAttribute("role", "group"); // its parts can be reached now; what it shows is said below it too
      anew = true;
    }
    const { height, ...rest } = how;
    element.style.height = `${height}px`; // or Plotly would lose it when the window changes its size
    element.style.width = paper() ? `${PAPER_WIDTH}px` : "";
    await (anew ? Plotly.newPlot : Plotly.react)(element, parts, rest, CONFIG);
    if (anew) element.on("plotly_click", ({ points: [point] }) => point.customdata && only(point.customdata));
  }

  const still = new Set();
  const drawAll = () =>
    Promise.all(
      [...still].map((element) => {
        still.delete(element);
        return draw(element, CHARTS[element.dataset.chart]);
      }),
    );
  const watcher = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries)
        if (isIntersecting && still.delete(target)) draw(target, CHARTS[target.dataset.chart]);
    },
    { rootMargin: "400px" },
  );
  const redraw = (names, anew) =>
    $$("#report .drawn")
      .filter((e) => !names || names.includes(e.dataset.chart))
      .forEach((e) => draw(e, CHARTS[e.dataset.chart], anew));

  // Paper is light and narrow, whatever the screen is.
  function onPaper(yes) {
    document.documentElement.toggleAttribute("data-paper", yes);
    redraw(null, true);
    drawAll();
    charts.forEach(([box, chart]) => box.isConnected && draw(box, chart, true));
  }

  // ---- filters

  function only(runId) {
    state.only = runId;
    for (const body of $$("#report tbody")) {
      const rows = $$("tr[data-run]", body);
      const here = rows.some((row) => row.dataset.run === runId);
      for (const row of rows) row.hidden = runId !== null && here && row.dataset.run !== runId;
    }
    say();
  }

  const chosen = new Set();

  function say() {
    const bar = $("#chosen");
    const link = (words, href) => Object.assign(document.createElement("a"), { textContent: words, href });
    const button = (words, act) =>
      Object.assign(document.createElement("button"), { type: "button", textContent: words, onclick: act });
    bar.replaceChildren();
    if (state.only) {
      const run = runs.get(state.only);
      bar.append(
        `Tables show ${run ? nameOf(run) : state.only} alone. `,
        ...(run ? [link("Its page", `#run=${state.only}`)] : []),
        button("Show all", () => only(null)),
      );
    }
    if (chosen.size) {
      const ids = [...chosen];
      bar.append(`${ids.length} of 2 runs chosen. `);
      if (ids.length === 2) bar.append(link("Side by side", `#runs=${ids.join(",")}`));
      bar.append(
        button("Choose none", () => {
          $$("[data-choose]").forEach((box) => (box.checked = false));
          chosen.clear();
          say();
        }),
      );
    }
    bar.hidden = !bar.childNodes.length || location.hash.startsWith("#run");
  }

  function choose(box) {
    if (box.checked) chosen.add(box.dataset.choose);
    else chosen.delete(box.dataset.choose);
    while (chosen.size > 2) {
      const [first] = chosen;
      chosen.delete(first);
      $(`[data-choose="${CSS.escape(first)}"]`).checked = false;
    }
    say();
  }

  function find(text) {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of $$("#runs tbody tr"))
      row.hidden = !words.every((word) => `${row.textContent} ${row.dataset.run}`.toLowerCase().includes(word));
  }

  // ---- run pages

  const el = (tag, attributes = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), attributes);
    made.append(...children.filter((child) => child !== null));
    return made;
  };

  function configOf(runId) {
    const found = data.configs.runs[runId];
    return found
      ? new Map(data.configs.keys.map((key, i) => [key, found[i] < 0 ? null : data.configs.values[found[i]]]))
      : new Map();
  }

  function differences(ids) {
    const all = ids.map(configOf);
    return data.configs.keys
      .filter((key) => new Set(all.map((config) => config.get(key) ?? null)).size > 1)
      .map((key) => [key, ...all.map((config) => config.get(key) ?? "–")]);
  }

  function tableOf(head, body) {
    const rows = body.map((cells) =>
      el(
        "tr",
        {},
        ...cells.map((text, i) =>
          el(i ? "td" : "th", { className: "left", scope: i ? "" : "row" }, String(text ?? "–")),
        ),
      ),
    );
    const heading = el("tr", {}, ...head.map((text) => el("th", { className: "left", scope: "col" }, text)));
    const whole = el("table", {}, el("thead", {}, heading), el("tbody", {}, ...rows));
    return el("div", { className: "scroll", tabIndex: 0 }, whole);
  }

  const HUES = [
    ["kd", "solid"],
    ["ce", "dash"],
  ];

  // On a phone a legend has room for the arm alone.
  const titleOf = (id) => (narrow() ? (data.arms[runs.get(id).arm]?.name ?? runs.get(id).arm) : nameOf(runs.get(id)));

  function runChart(ids, source, y, words, more = () => []) {
    const box = el("div", { className: "plot" });
    const title = `${words} of ${ids.map((id) => (runs.get(id) ? nameOf(runs.get(id)) : id)).join(" and ")}`;
    box.setAttribute("aria-label", title);
    const chart = () => {
      const lines = ids
        .map((id, i) => {
          const [hue, dash] = HUES[i % 2];
          return line(source.get(id) ?? [], "step", y, runs.get(id), {
            name: escaped(ids.length > 1 ? `${i + 1}: ${titleOf(id)}` : titleOf(id)),
            line: { color: css(hue), dash, width: 2 },
            mode: y === "val_loss" ? "lines+markers" : "lines",
          });
        })
        .filter((trace) => trace.x.length);
      if (!lines.length) return [[], {}];
      return [
        [...lines, ...more()],
        layout("step", words, {
          ...(y === "lr_mult" || y === "val_loss" ? phaseStrip(ids[0], "step") : {}),
          height: 300,
        }),
      ];
    };
    charts.push([box, chart]);
    return el("figure", {}, box, el("figcaption", {}, words));
  }

  const charts = [];

  function spikes(ids) {
    return ids
      .map((id) => {
        const rows = (traces.get(id) ?? []).filter((row) => row.spike);
        return {
          type: "scatter",
          mode: "markers",
          name: "spike: over twice the run's median",
          x: rows.map((row) => row.step),
          y: rows.map((row) => row.step_ms_max),
          marker: { color: css("random"), symbol: "x", size: 9 },
          hovertemplate: rows.map((row) => hover("spike", row, ["step", "step_ms_max", "step_ms"])),
        };
      })
      .filter((trace) => trace.x.length);
  }

  const FACTS =
    "arm label horizon seed status reason steps tokens train_time_ms step_ms_median step_ms_p90 best_val final_val kd_stop_step peak_alloc_gib params_active flops_per_token mfu clock device threads shared_device broken code_hash data_hash".split(
      " ",
    );

  function artifacts(id) {
    const page = pages.get(id),
      folder = data.folders[id];
    const names = (page?.files ?? "").split(" ").filter(Boolean);
    const items = names.map((name) => el("li", {}, el("a", { href: `${folder}/${encodeURIComponent(name)}` }, name)));
    return el(
      "div",
      {},
      el("h3", {}, "Artifacts"),
      el("p", {}, el("a", { href: `${folder}/` }, page?.artifact_dir ?? id)),
      el("ul", { className: "files" }, ...items),
      el("h3", {}, "Made again by"),
      page?.command ? el("pre", {}, page.command) : el("p", { className: "empty" }, "not trained here"),
    );
  }

  function runsPage(ids) {
    charts.length = 0;
    const known = ids.filter((id) => runs.has(id));
    const back = el("p", {}, el("a", { href: "#report" }, "← the report"));
    if (!known.length) return [back, el("p", { className: "empty" }, `No run ${ids.join(", ")} in this report.`)];
    const base = pages.get(known[0])?.base_run_id;
    const against = known.length > 1 ? known : base && base !== known[0] && runs.has(base) ? [known[0], base] : known;
    const title = el("h1", {}, known.map((id) => nameOf(runs.get(id))).join(" and "));
    const facts = FACTS.filter((key) => known.some((id) => runs.get(id)[key] != null && runs.get(id)[key] !== ""));
    const link = (id) => el("a", { href: `#run=${id}` }, id);
    const lead = el(
      "p",
      {},
      known.length > 1 ? "Side by side: " : "Run ",
      ...known.flatMap((id, i) => (i ? [" and ", link(id)] : [link(id)])),
    );
    if (known.length === 1 && against.length === 2)
      lead.append(
        ". Its base is ",
        link(base),
        " (",
        el("a", { href: `#runs=${known[0]},${base}` }, "side by side"),
        ").",
      );
    const changed = differences(against);
    const difference = el(
      "section",
      {},
      el("h2", {}, known.length > 1 ? "What differs in the configs" : "Config, against its base"),
      changed.length
        ? tableOf(["key", ...against], changed)
        : el("p", { className: "empty" }, against.length > 1 ? "nothing" : "This run is the base of its arm."),
    );
    const drawn = el(
      "section",
      {},
      el("h2", {}, "Curves"),
      el(
        "div",
        { className: "pair" },
        runChart(against, curves, "val_loss", Y_NAMES.val_loss),
        runChart(against, traces, "train_loss", Y_NAMES.train_loss),
        runChart(known, traces, "lr_mult", "LR multiplier, with KD's phases"),
        runChart(known, traces, "step_ms", "step (ms, median of its block)", () => spikes(known)),
        runChart(
          known.filter((id) => (traces.get(id) ?? []).some((row) => row.kd_share != null)),
          traces,
          "kd_share",
          "KD's share of the gradient",
        ),
      ),
    );
    return [
      back,
      title,
      lead,
      el(
        "section",
        {},
        el("h2", {}, "Figures"),
        tableOf(
          ["", ...known],
          facts.map((key) => [key, ...known.map((id) => runs.get(id)[key])]),
        ),
      ),
      difference,
      drawn,
      el("section", { className: "pair" }, ...known.map(artifacts)),
    ];
  }

  let left = null; // where the reader was, to come back to

  function route() {
    const match = /^#runs?=(.+)$/.exec(location.hash);
    const page = $("#runs-page");
    $("#report").hidden = Boolean(match);
    page.hidden = !match;
    if (match) {
      page.replaceChildren(...runsPage(match[1].split(",").map(decodeURIComponent)));
      for (const [box, chart] of charts) {
        if (chart()[0].length) draw(box, chart);
        else box.closest("figure").remove();
      }
      scrollTo(0, 0);
      $("a", page).focus({ preventScroll: true }); // or the keyboard would start anew
    } else {
      page.replaceChildren();
      if (left && location.hash === "#report") {
        scrollTo({ top: left.top, behavior: "instant" });
        left.link.focus({ preventScroll: true });
      } else document.getElementById(location.hash.slice(1))?.scrollIntoView();
      left = null;
    }
    say();
  }

  // ---- start

  const horizon = $("[name=horizon]");
  state.horizon = horizon ? Number(horizon.value) : 0;
  $("#contents").append(
    ...$$("#report section[id]").map((part) =>
      el("a", { href: `#${part.id}` }, $("h2", part)?.textContent ?? "Verdict"),
    ),
  );
  addEventListener("change", ({ target }) => {
    if (target.matches("[name=x], [name=y]")) {
      state[target.name] = target.value;
      redraw(["val_loss_steps"]);
    }
    if (target.matches("[name=horizon]")) {
      state.horizon = Number(target.value);
      redraw(["val_loss_steps", "step_deltas", "lr_phases"]);
    }
    if (target.matches("[data-choose]")) choose(target);
  });
  $("#find")?.addEventListener("input", ({ target }) => find(target.value));
  addEventListener("hashchange", route);
  addEventListener("click", ({ target }) => {
    const inside = target.closest("#report, #chosen");
    if (inside && target.matches('a[href^="#run"]')) left = { link: target, top: scrollY };
  });
  addEventListener("beforeprint", () => onPaper(true));
  addEventListener("afterprint", () => onPaper(false));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    redraw();
    route();
  });
  for (const element of $$("#report [data-chart]"))
    if (CHARTS[element.dataset.chart]) {
      still.add(element);
      watcher.observe(element);
    }
  route();
  document.documentElement.dataset.ready = "1";
})();
