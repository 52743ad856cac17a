"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const special = new Set(data.special);
const byId = (id) => document.getElementById(id);

// --- numbers -----------------------------------------------------------------------------------------------------

const column = (text, type) => {
  if (text === null) return null;
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return new type(bytes.buffer);
};

// One side of a pair with its columns unpacked: texts, ids, logps, refs, scores, read (the loss's weights), counts.
const unpack = (side, name) => ({
  name, texts: side.t, ids: column(side.i, Int32Array), logps: column(side.p, Float32Array),
  refs: column(side.q, Float32Array), scores: column(side.s, Float64Array), read: column(side.w, Float32Array),
  counts: column(side.m, Uint8Array), reward: side.f, selected: side.k, length: side.t.length,
});
const counting = (side, i) => side.counts === null || side.counts[i] === 1;

const ordered = (side) => {
  if (side.ordered) return side.ordered;
  side.ordered = side.scores.filter((_, i) => counting(side, i)).sort();  // NaN stands last
  return side.ordered;
};

// The top share with equal shares among ties: K = ceil(percent · n / 100), exactly.
const topShare = (side, percent) => {
  const scores = ordered(side), n = scores.length, weights = new Float64Array(side.length);
  if (!n) return weights;
  const keep = Math.floor((percent * n + 99) / 100);
  if (Number.isNaN(scores[n - 1])) return weights.fill(NaN);
  const threshold = scores[n - keep];
  let above = 0, tied = 0;
  for (const score of scores) { if (score > threshold) above++; else if (score === threshold) tied++; }
  for (let i = 0; i < side.length; i++) {
    if (!counting(side, i)) continue;
    if (side.scores[i] > threshold) weights[i] = 1;
    else if (side.scores[i] === threshold) weights[i] = (keep - above) / tied;
  }
  return weights;
};
const aboveThreshold = (side, threshold) =>
  Float64Array.from(side.scores, (score, i) => (counting(side, i) && score > threshold ? 1 : 0));

const weigh = (side, rule) => {
  if (rule.kind === "read" || side.scores === null) return side.read;
  if (rule.kind === "threshold") return aboveThreshold(side, rule.threshold);
  return topShare(side, rule.kind === "sides" ? rule[side.name] : rule.percent);
};

const reward = (side, rule) => {
  if (rule.kind === "read" || data.beta === null || side.refs === null) return rule.kind === "read" ? side.selected : null;
  let sum = 0;
  for (let i = 0; i < side.length; i++) if (side.weights[i]) sum += side.weights[i] * (side.logps[i] - side.refs[i]);
  return data.beta * sum;
};

// --- the rule ------------------------------------------------------------------------------------------------------

const percentIn = (text) => Math.min(100, Math.max(1, Math.round(Number(text)) || 1));
const parseRule = (text) => {
  if (data.scale === null) return { kind: "read" };
  const [kind, rest] = text.split(":");
  if (kind === "threshold") return { kind, threshold: Number(rest) || 0 };
  if (kind === "sides") {
    const [chosen, rejected] = (rest || "40,10").split(",");
    return { kind, chosen: percentIn(chosen), rejected: percentIn(rejected) };
  }
  return /^\d+$/.test(kind) ? { kind: "share", percent: percentIn(kind) } : { kind: "read" };
};
const ruleOfControls = () => {
  const value = document.querySelector("input[name=rule]:checked").value;
  if (value === "threshold") return parseRule(`threshold:${byId("threshold").value}`);
  if (value === "sides") return parseRule(`sides:${byId("percent-chosen").value},${byId("percent-rejected").value}`);
  return parseRule(value);
};
const ruleText = (rule) => ({
  read: "read", share: `${rule.percent}`, threshold: `threshold:${rule.threshold}`, sides: `sides:${rule.chosen},${rule.rejected}`,
})[rule.kind];
const showRule = (rule) => {
  const value = rule.kind === "share" ? `${rule.percent}` : rule.kind;
  const button = document.querySelector(`input[name=rule][value="${value}"]`);
  if (button) button.checked = true;
  for (const numbers of document.querySelectorAll(".numbers")) numbers.classList.toggle("on", numbers.dataset.rule === rule.kind);
  if (rule.kind === "threshold") byId("threshold").value = rule.threshold;
  if (rule.kind === "sides") { byId("percent-chosen").value = rule.chosen; byId("percent-rejected").value = rule.rejected; }
};

// --- pictures ------------------------------------------------------------------------------------------------------

const make = (tag, className, text) => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
};
const number = (value, digits = 3) => {
  if (value === null || value === undefined) return "–";
  if (!Number.isFinite(value)) return "not finite";
  const text = Math.abs(value) >= 1e4 || (value !== 0 && Math.abs(value) < 1e-3) ? value.toExponential(2) : value.toFixed(digits);
  return text.replace("-", "−");
};
const signed = (value, digits) => (value > 0 ? "+" : "") + number(value, digits);
const kept = (weights) => weights.reduce((sum, weight) => sum + weight, 0);
const amount = (value) => number(value, Number.isInteger(value) ? 0 : 1);
const facts = (parts) => {
  const paragraph = make("p", "facts");
  parts.forEach(([name, value], at) => {
    paragraph.append(`${at ? " · " : ""}${name} `, make("b", "", value));
  });
  return paragraph;
};

// −4 … 4: the edges of the steps grow with the square, so that small scores are told apart.
const step = (score) => {
  const size = Math.ceil(4 * Math.sqrt(Math.min(1, Math.abs(score) / data.scale)) - 0.5);
  return Math.sign(score) * Math.min(4, Math.max(0, size));
};
const tint = (side, i) => {
  if (side.scores === null || !counting(side, i)) return "";
  if (Number.isNaN(side.scores[i])) return " n";
  const at = step(side.scores[i]);
  return at ? ` ${at > 0 ? "h" : "l"}${Math.abs(at)}` : "";
};
const tokenClass = (side, i) => {
  if (!counting(side, i)) return "t x";
  const weight = side.weights[i];
  const line = weight >= 1 ? " k" : weight > 0 ? " f" : "";
  return `t token${line}${tint(side, i)}${special.has(side.ids[i]) ? " s" : ""}${side.texts[i] === "" ? " b" : ""}`;
};

const drawTokens = (side) => {
  const box = side.box, fragment = document.createDocumentFragment();
  for (let i = 0; i < side.length; i++) {
    const token = make("span", tokenClass(side, i), side.texts[i]);
    if (counting(side, i)) {
      token.dataset.i = i;
      token.dataset.w = side.weights[i];
      token.tabIndex = -1;
      if (side.texts[i] === "") token.setAttribute("aria-label", "part of the next character");
      token.setAttribute("role", "option");
      token.setAttribute("aria-selected", side.weights[i] > 0);
    }
    fragment.append(token);
  }
  box.replaceChildren(fragment);
  const first = box.querySelector(".token");
  if (first) first.tabIndex = 0;
  side.drawn = true;
};
const repaintTokens = (side) => {
  for (const token of side.box.querySelectorAll(".token")) {
    const i = Number(token.dataset.i);
    token.className = tokenClass(side, i);
    token.dataset.w = side.weights[i];
    token.setAttribute("aria-selected", side.weights[i] > 0);
  }
};

const drawShell = (pair, at) => {
  const article = make("article"), header = make("header"), sides = make("div", "sides");
  article.id = `pair-${at + 1}`;
  header.append(make("h2", "", pair.place), (pair.line = make("p")));
  article.append(header);
  if (pair.loss === null) article.append(make("p", "note", "The loss of this pair is not finite: a log-prob in it is broken."));
  if (pair.prompt) {
    const details = make("details", "prompt"), summary = make("summary", "", "Prompt ");
    const start = pair.prompt.slice(0, 400).replace(/\s+/g, " ").trim();
    summary.append(make("em", "", start.length > 110 ? `${start.slice(0, 110)}…` : start));
    details.append(summary);
    details.addEventListener("toggle", () => {
      if (details.open && details.children.length === 1) {
        const text = make("p", "", pair.prompt);
        text.dir = "auto";
        details.append(text);
      }
    });
    article.append(details);
  }
  for (const side of pair.sides) {
    const part = make("section", "side"), title = side.name === "chosen" ? "Chosen" : "Rejected";
    side.box = make("div", "text");
    side.box.dir = "auto";
    side.box.style.minHeight = `${Math.ceil(side.texts.join("").length / 60) * 1.9}rem`;
    side.box.setAttribute("role", "listbox");
    side.box.setAttribute("aria-multiselectable", "true");
    side.box.setAttribute("aria-label", `${title} response of ${pair.place}: tokens, kept ones selected`);
    side.box.side = side;
    part.append(make("h3", "", title), (side.facts = make("p", "facts")), side.box);
    sides.append(part);
  }
  article.append(sides);
  article.pair = pair;
  return article;
};

const pairs = data.pairs.map((pair) => ({
  place: pair.place, prompt: pair.prompt, loss: pair.loss,
  sides: [unpack(pair.c, "chosen"), ...(pair.r ? [unpack(pair.r, "rejected")] : [])],
}));

const mean = (values) => {
  const known = values.filter((value) => value !== null && Number.isFinite(value));
  return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
};
const margin = (pair, name) => {
  const [chosen, rejected] = pair.sides.map((side) => side[name]);
  return rejected === undefined || chosen === null || rejected === null ? null : chosen - rejected;
};

const update = (rule) => {
  for (const pair of pairs) {
    for (const side of pair.sides) {
      side.weights = weigh(side, rule);
      side.now = reward(side, rule);
      const line = facts([["kept", `${amount(kept(side.weights))} of ${tokensOf(side)}`], ["reward", signed(side.reward)], ["of kept tokens", signed(side.now)]]);
      side.facts.replaceChildren(...line.childNodes);
      if (side.drawn) repaintTokens(side);
    }
    const parts = [["margin", signed(margin(pair, "reward"))], ["of kept tokens", signed(margin(pair, "now"))]];
    if (rule.kind === "read") parts.push(["loss", number(pair.loss)]);
    pair.line.replaceChildren(...facts(parts).childNodes);
  }
  const full = pairs.map((pair) => margin(pair, "reward")), selected = pairs.map((pair) => margin(pair, "now"));
  const share = pairs.flatMap((pair) => pair.sides).filter((side) => tokensOf(side)).map((side) => kept(side.weights) / tokensOf(side));
  const items = [
    ["Pairs", `${pairs.length}`],
    ["Kept", share.length ? `${number(100 * mean(share), 1)} %` : "–"],
    ["Margin, full responses", signed(mean(full))],
    ["Margin, kept tokens", signed(mean(selected))],
    ["Full margin above 0", `${full.filter((value) => value > 0).length} of ${pairs.length}`],
  ];
  if (rule.kind === "read") items.push(["Loss", number(mean(pairs.map((pair) => pair.loss)))]);
  byId("sum").replaceChildren(...items.map(([name, value]) => {
    const item = make("div");
    item.append(make("dt", "", name), make("dd", "", value));
    return item;
  }));
  showRule(rule);
};
const tokensOf = (side) => (side.counts === null ? side.length : side.counts.reduce((a, b) => a + b, 0));

// --- one token -----------------------------------------------------------------------------------------------------

const panel = byId("panel"), list = panel.firstElementChild;
const describe = (token) => {
  const side = token.parentElement.side, i = Number(token.dataset.i);
  const points = [...side.texts[i]].slice(0, 6).map((c) => `U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`);
  const items = [["token", side.texts[i] === "" ? "part of the next character" : `“${side.texts[i]}”`, "word"], ["id", `${side.ids[i]}`]];
  items.push(["policy log-prob", number(side.logps[i])]);
  if (side.refs) items.push(["reference log-prob", number(side.refs[i])]);
  if (side.scores) {
    const scores = ordered(side), n = scores.length;
    let better = 0;
    while (better < n && scores[n - 1 - better] > side.scores[i]) better++;
    items.push(["score", signed(side.scores[i])], ["rank", `${better + 1} of ${n}`]);
  }
  items.push(["weight", number(side.weights[i], Number.isInteger(side.weights[i]) ? 0 : 3)]);
  if (points.length) items.push(["characters", points.join(" ") + ([...side.texts[i]].length > 6 ? " …" : "")]);
  list.replaceChildren(...items.map(([name, value, className]) => {
    const item = make("div", className);
    item.append(make("dt", "", name), make("dd", "", value));
    return item;
  }));
  panel.classList.add("on");
};
const hide = () => panel.classList.remove("on");

const focusOn = (token) => {
  if (!token) return;
  for (const other of token.parentElement.querySelectorAll('.token[tabindex="0"]')) other.tabIndex = -1;
  token.tabIndex = 0;
  token.focus();
};
const lineAway = (token, direction) => {
  const tokens = [...token.parentElement.querySelectorAll(".token")], from = token.getBoundingClientRect();
  const middle = from.left + from.width / 2;
  let found = null, line = null;
  for (let at = tokens.indexOf(token) + direction; at >= 0 && at < tokens.length; at += direction) {
    const box = tokens[at].getBoundingClientRect();
    if (Math.abs(box.top - from.top) < 4) continue;
    if (line !== null && Math.abs(box.top - line) > 4) break;
    line = box.top;
    const distance = Math.abs(box.left + box.width / 2 - middle);
    if (!found || distance < found.distance) found = { token: tokens[at], distance };
  }
  return found && found.token;
};
const neighbour = (token, direction, wanted) => {
  let next = token;
  do next = direction > 0 ? next.nextElementSibling : next.previousElementSibling;
  while (next && !next.matches(wanted));
  return next;
};
const moves = {
  ArrowRight: (token) => neighbour(token, 1, ".token"),
  ArrowLeft: (token) => neighbour(token, -1, ".token"),
  ArrowDown: (token) => lineAway(token, 1),
  ArrowUp: (token) => lineAway(token, -1),
  Home: (token) => token.parentElement.querySelector(".token"),
  End: (token) => [...token.parentElement.querySelectorAll(".token")].pop(),
  n: (token) => neighbour(token, 1, ".k, .f"),
  p: (token) => neighbour(token, -1, ".k, .f"),
};

// --- start ---------------------------------------------------------------------------------------------------------

const root = byId("pairs");
root.append(...pairs.map(drawShell));
if (data.scale !== null) {
  byId("low").textContent = `score ${number(-data.scale, 1)}`;
  byId("high").textContent = `${signed(data.scale, 1)} nats`;
}
update(parseRule(decodeURIComponent(location.hash.slice(1))));
const draw = (article) => article.pair.sides.forEach((side) => { if (!side.drawn) { side.box.style.minHeight = ""; drawTokens(side); } });
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) { draw(entry.target); watcher.unobserve(entry.target); }
}, { rootMargin: "1500px" });
for (const article of root.children) watcher.observe(article);
addEventListener("beforeprint", () => { for (const article of root.children) draw(article); });
addEventListener("hashchange", () => update(parseRule(decodeURIComponent(location.hash.slice(1)))));
byId("rules").addEventListener("input", () => {
  const rule = ruleOfControls();
  try { history.replaceState(null, "", `#${ruleText(rule)}`); } catch { /* a page inside a notebook has no address */ }
  update(rule);
});
root.addEventListener("pointerover", (event) => { const token = event.target.closest(".token"); if (token) describe(token); });
root.addEventListener("focusin", (event) => { const token = event.target.closest(".token"); if (token) describe(token); });
root.addEventListener("click", (event) => focusOn(event.target.closest(".token")));
root.addEventListener("focusout", hide);
root.addEventListener("pointerleave", hide);
root.addEventListener("keydown", (event) => {
  const token = event.target.closest(".token"), move = moves[event.key];
  if (event.key === "Escape") hide();
  if (!token || !move || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  focusOn(move(token));
});
})();
