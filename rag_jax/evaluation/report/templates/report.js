"use strict";
// Everything that comes from data is set as text, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const questions = data.questions;
  const PAGE = 50;
  const LIST_LETTERS = 160;
  const at = (id) => document.getElementById(id);
  const state = { shown: [], page: 0, chosen: -1 };
  const places = new Map(questions.map((question, place) => [question.id, place]));
  const narrow = window.matchMedia("(max-width: 800px)");

  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }
  const scrolled = (name, table) =>
    make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": name }, table);
  const text = (tag, content, attributes) => make(tag, { dir: "auto", ...attributes }, content);
  const start = (content) => (content.length > LIST_LETTERS ? content.slice(0, LIST_LETTERS) + "…" : content);
  const link = (question) => "#" + encodeURIComponent(question.id);

  // --- what there is at the top --------------------------------------------------------------------------------------

  function overview() {
    at("title").textContent = data.title;
    const rows = data.figures.slice(1).map(([label, ...values]) =>
      make("tr", {}, make("th", { scope: "row" }, label), ...values.map((value) => make("td", {}, value))));
    if (rows.length) {
      const head = data.figures[0].map((name) => make("th", { scope: "col" }, name));
      const table = make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
      at("figures").append(scrolled("Figures", table));
    }
    for (const plot of data.plots)
      at("plots").append(make("figure", {}, make("img", { src: plot.src, alt: plot.title, loading: "lazy" }),
        make("figcaption", {}, plot.title + ". " + plot.about)));
    for (const [name, value] of data.about) at("about").append(make("dt", {}, name), text("dd", value));
  }

  // --- the list ------------------------------------------------------------------------------------------------------

  const FILTERS = {
    all: ["All", () => true],
    right: ["Right", (q) => q.right === true],
    wrong: ["Wrong", (q) => q.right === false],
    misread: ["Wrong though a gold passage was read", (q) => q.right === false && q.read.some((one) => one[3])],
    unfound: ["No gold passage found", (q) => q.golden > 0 && q.rank === 0],
    unanswerable: ["Without an answer", (q) => q.unanswerable],
    ahead: ["Right in the first run, wrong in another", (q) => q.right === true && q.runs.some((run) => run[1] === false)],
    behind: ["Wrong in the first run, right in another", (q) => q.right === false && q.runs.some((run) => run[1] === true)],
  };
  const ORDERS = {
    file: ["As in the file", null],
    sure: ["Most confident first", (a, b) => b.score - a.score],
    unsure: ["Least confident first", (a, b) => a.score - b.score],
    f1: ["Lowest F1 first", (a, b) => a.f1 - b.f1],
  };
  const said = (q) => (q.prediction === null ? "" : q.prediction || "(nothing)");

  function controls() {
    for (const [name, [label, holds]] of Object.entries(FILTERS)) {
      const count = questions.filter(holds).length;
      if (count || name === "all") at("filter").append(make("option", { value: name }, `${label} (${count})`));
    }
    const answered = questions.some((q) => q.prediction !== null);
    for (const [name, [label]] of Object.entries(ORDERS))
      if (name === "file" || (answered && (name !== "f1" || questions.every((q) => q.f1 !== null))))
        at("order").append(make("option", { value: name }, label));
    for (const name of ["query", "filter", "order"]) at(name).addEventListener("input", select);
    at("controls").addEventListener("submit", (event) => event.preventDefault());
    at("back").addEventListener("click", () => turn(state.page - 1));
    at("forth").addEventListener("click", () => turn(state.page + 1));
  }

  function words(q) {
    q.words ??= [q.id, q.question, said(q), q.target || "", ...q.answers].join("\n").toLowerCase();
    return q.words;
  }

  function select() {
    const wanted = at("query").value.trim().toLowerCase();
    const holds = FILTERS[at("filter").value][1];
    const order = ORDERS[at("order").value][1];
    state.shown = [...questions.keys()].filter(
      (place) => holds(questions[place]) && (!wanted || words(questions[place]).includes(wanted)));
    if (order) state.shown.sort((a, b) => order(questions[a], questions[b]) || a - b);
    turn(0);
    if (location.hash.length < 2) show(narrow.matches ? -1 : state.shown[0] ?? -1);
  }

  function turn(page) {
    const pages = Math.max(1, Math.ceil(state.shown.length / PAGE));
    state.page = Math.min(Math.max(page, 0), pages - 1);
    const first = state.page * PAGE;
    const items = state.shown.slice(first, first + PAGE).map(item);
    at("items").replaceChildren(...items);
    at("items").setAttribute("start", first + 1);
    const count = state.shown.length.toLocaleString("en");
    at("count").textContent = `${count} of ${questions.length.toLocaleString("en")} questions. ${data.shown}`;
    at("page").textContent = `page ${state.page + 1} of ${pages}`;
    at("back").disabled = state.page === 0;
    at("forth").disabled = state.page === pages - 1;
    at("pages").hidden = pages === 1;
    mark();
  }

  function verdict(q, long) {
    if (q.right === null) return make("span", {}, long || "");
    const word = q.right ? "right" : "wrong";
    const sign = make("span", { "aria-hidden": "true" }, q.right ? "✓" : "✗");
    return make("span", { class: "verdict " + word }, sign, long ? " " + word : make("span", { class: "hidden" }, word));
  }

  function item(place) {
    const q = questions[place];
    const about = q.prediction === null ? place_of_gold(q) : start(said(q));
    const anchor = make("a", { href: link(q), "data-place": place }, verdict(q), text("span", start(q.question)),
      text("span", about, { class: "said" }));
    return make("li", {}, anchor);
  }

  function mark() {
    for (const anchor of at("items").querySelectorAll("a")) {
      const current = Number(anchor.dataset.place) === state.chosen;
      if (current) anchor.setAttribute("aria-current", "true");
      else anchor.removeAttribute("aria-current");
    }
  }

  // --- one question --------------------------------------------------------------------------------------------------

  function place_of_gold(q) {
    if (!q.golden) return "";
    return q.rank ? `first gold passage at rank ${q.rank} of ${q.found}` : `no gold passage among ${q.found} found`;
  }

  function show(place) {
    state.chosen = place;
    document.body.dataset.view = place >= 0 && location.hash.length > 1 ? "one" : "list";
    at("detail").replaceChildren(...(place >= 0 ? detail(questions[place]) : []));
    at("detail").scrollTop = 0;
    mark();
  }

  function detail(q) {
    const facts = make("dl");
    const fact = (name, ...values) => values.length && facts.append(make("dt", {}, name), ...values);
    q.runs.forEach(([answer, right, score], i) => fact(data.runs[i], make("dd", {}, verdict({ right }, true), " ",
      make("bdi", {}, answer || "(nothing)"), score === null ? "" : ` (log p = ${score.toFixed(2)})`)));
    const alone = !q.runs.length; // else the first run's stand there already
    if (q.prediction !== null && alone) fact("Answer", text("dd", said(q), { class: "answer" }));
    fact("Wanted", ...q.answers.map((answer) => text("dd", answer)));
    if (q.target) fact("Wanted", text("dd", q.target));
    if (q.unanswerable) fact("Wanted", make("dd", {}, "no answer: there is none"));
    if (q.right !== null && alone) fact("Verdict", make("dd", {}, verdict(q, true), q.f1 === null ? "" : ` (F1 ${q.f1.toFixed(2)})`));
    else if (q.f1 !== null && alone) fact("F1", make("dd", {}, q.f1.toFixed(2)));
    if (q.prediction !== null && alone)
      fact("Confidence", make("dd", {}, q.score === null ? "none" : `log p = ${q.score.toFixed(2)}, p = ${Math.exp(q.score).toPrecision(2)}`));
    if (q.golden) fact("Retrieval", make("dd", {}, place_of_gold(q)));
    const place = state.shown.indexOf(state.chosen);
    const step = (label, to) => {
      const button = make("button", { type: "button" }, label);
      button.disabled = state.shown[to] === undefined;
      button.addEventListener("click", () => go(to));
      return button;
    };
    const steps = make("div", { class: "steps" }, make("a", { href: "#", class: "list-link" }, "All questions"),
      step("Previous", place - 1), step("Next", place + 1));
    const parts = [steps, text("h2", q.question), make("p", { class: "note" }, "id ", make("bdi", {}, q.id)), facts];
    if (q.heat) parts.push(make("h3", {}, "Which passage each token came from: p(z | x, y₁ … yₜ)"), heat(q));
    if (q.read.length) parts.push(make("h3", {}, data.runs.length ? `Passages read by ${data.runs[0]}` : "Passages read"));
    q.read.forEach((one, rank) => parts.push(passage(q, one, `${rank + 1}.`)));
    if (q.unread.length) parts.push(make("h3", {}, "Gold passages that were not read"));
    q.unread.forEach((number) => parts.push(passage(q, [number, null, null, true, null], "")));
    return parts;
  }

  const stored = (number) => (number === null ? ["", "", "(no longer in the corpus)", 0] : data.passages[number]);

  function passage(q, [number, prior, posterior, gold, has], label) {
    const [id, title, body, left] = stored(number);
    const wanted = q.answers.concat(q.target ? [q.target] : []);
    const name = title ? highlighted("bdi", title, wanted, said(q)) : null;
    const head = make("h4", {}, label, name, make("bdi", { class: "id" }, id),
      gold ? make("span", { class: "badge right" }, "gold") : null,
      has ? make("span", { class: "badge" }, "has the answer") : null);
    const article = make("article", {}, head);
    if (prior !== null) article.append(bar("prior", prior));
    if (posterior !== null && q.prediction !== null) article.append(bar("posterior", posterior));
    article.append(highlighted("p", body, wanted, said(q)));
    if (left) article.append(make("p", { class: "note" }, `${left.toLocaleString("en")} more characters are left out here`));
    return article;
  }

  function bar(name, share) {
    const fill = make("div", { class: "fill" });
    fill.style.setProperty("--p", share);
    return make("div", { class: "bar " + name }, make("span", {}, name), make("div", { class: "track" }, fill),
      make("span", { class: "value" }, share.toFixed(3)));
  }

  // The paper's figure 2: documents by tokens, in the direction in which the answer is written.
  function heat(q) {
    const probe = text("span", said(q));
    document.body.append(probe);
    const direction = getComputedStyle(probe).direction;
    probe.remove();
    const head = make("tr", {}, make("th", { scope: "col" }, make("span", { class: "hidden" }, "passage")),
      ...q.tokens.map((token) => make("th", { scope: "col" }, make("bdi", {}, token.trim() || "…"))));
    const rows = q.read.map(([number], rank) => {
      const cells = q.heat.map((shares, t) => {
        const cell = make("td", { title: `${q.tokens[t].trim()}: ${shares[rank]}` }, shares[rank].toFixed(2));
        cell.style.setProperty("--p", shares[rank]);
        return cell;
      });
      const [id, title] = stored(number);
      return make("tr", {}, make("th", { scope: "row" }, `${rank + 1}. `, make("bdi", {}, title || id)), ...cells);
    });
    const table = make("table", { class: "heat", dir: direction }, make("thead", {}, head), make("tbody", {}, ...rows));
    return scrolled("Posterior by token", table);
  }

  // --- answers in passages: the rule of `matching.has_answer` ----------------------------------------------------------

  const ALONE = "\\p{Script=Han}\\p{Script=Hiragana}\\p{Script=Katakana}\\p{Script=Thai}\\p{Script=Lao}" +
    "\\p{Script=Khmer}\\p{Script=Myanmar}";
  const TOKEN = new RegExp(`[${ALONE}]\\p{M}*|(?:(?![${ALONE}])[\\p{L}\\p{N}\\p{M}])+|[^\\p{Z}\\p{C}]`, "gu");

  function tokens(content) {
    return Array.from(content.matchAll(TOKEN), (match) => (
      { word: match[0].normalize("NFD").toLowerCase(), from: match.index, to: match.index + match[0].length }));
  }

  function spans(found, phrase) {
    const wanted = tokens(phrase).map((token) => token.word);
    if (!wanted.length) return [];
    const fits = (first) => wanted.every((word, i) => found[first + i]?.word === word);
    return [...found.keys()].filter(fits).map((first) => [found[first].from, found[first + wanted.length - 1].to]);
  }

  function highlighted(tag, content, wanted, answer) {
    const found = tokens(content);
    const marked = wanted.flatMap((phrase) => spans(found, phrase).map((span) => [...span, ""]));
    marked.push(...spans(found, answer).map((span) => [...span, "said"]));
    marked.sort((a, b) => a[0] - b[0] || b[1] - a[1]);
    const element = text(tag, "");
    let end = 0;
    for (const [from, to, name] of marked) {
      if (from < end) continue;
      element.append(content.slice(end, from), make("mark", name ? { class: name } : {}, content.slice(from, to)));
      end = to;
    }
    element.append(content.slice(end));
    return element;
  }

  // --- moving about --------------------------------------------------------------------------------------------------

  function go(to) {
    const place = state.shown[to];
    if (place === undefined) return;
    const page = Math.floor(to / PAGE);
    if (page !== state.page) turn(page);
    location.hash = link(questions[place]);
    show(place); // at once: the next key may come before the browser tells of the new hash
    at("items").querySelector(`[data-place="${place}"]`).scrollIntoView({ block: "nearest" });
  }

  function follow() {
    let id = "";
    try {
      id = decodeURIComponent(location.hash.slice(1));
    } catch {
      // a link that was cut short names no question
    }
    show(places.get(id) ?? (narrow.matches ? -1 : state.shown[0] ?? -1));
    if (narrow.matches) window.scrollTo(0, 0);
  }

  function key(event) {
    const typing = ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName);
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && typing) event.target.blur();
    if (typing) return;
    const place = state.shown.indexOf(state.chosen);
    const free = event.target.closest(".scroll") === null; // there the arrows scroll
    if (event.key === "j" || (event.key === "ArrowRight" && free)) go(place + 1);
    else if (event.key === "k" || (event.key === "ArrowLeft" && free)) go(place - 1);
    else if (event.key === "/") {
      event.preventDefault();
      at("query").focus();
    }
  }

  at("summary").open = !narrow.matches; // a long way to the questions else
  overview();
  controls();
  select();
  follow();
  window.addEventListener("hashchange", follow);
  document.addEventListener("keydown", key);
})();
