"use strict";
// Which pairs are listed, in which order, and the list itself, of which only the part that is in view has elements.

const ROWS_AROUND = 10;
/** Pixels of a row before one is there to be measured. */
const ROW_HEIGHT = 51;
const NOTHING = "";

const gap = (one, other) => (typeof one === "number" && typeof other === "number" ? one - other : null);
const longer = (pair, unit) => Math.max(pair.chosen[unit] ?? 0, pair.rejected[unit] ?? 0);
const lengthGap = (pair, unit) => gap(pair.chosen[unit], pair.rejected[unit]);
const promptText = (pair) => pair.prompt.map((turn) => textOf(turn[1])).join("\n");

/** What a list may be sorted by: [name, value of a pair, in the unit of lengths]. */
const SORTS = {
  page: ["order of the run", (pair) => pair.index],
  margin: ["margin", (pair) => pair.margin],
  reward_gap: ["reward, chosen − rejected", (pair) => gap(pair.chosen.reward, pair.rejected.reward)],
  chosen_reward: ["reward of chosen", (pair) => pair.chosen.reward],
  rejected_reward: ["reward of rejected", (pair) => pair.rejected.reward],
  length_gap: ["length, chosen − rejected", lengthGap],
  length: ["length of the longer", longer],
  prompt: ["length of the prompt", (pair) => promptText(pair).length],
  correlation: ["correlation of reward and length", (pair) => pair.correlation],
  round: ["round", (pair) => pair.round],
  source: ["source", (pair) => pair.source],
};

/** The controls above the list, and the pairs that they leave, in order. */
class Filters {
  constructor(data, onChange) {
    this.data = data;
    this.unit = data.length_unit;
    this.texts = null;
    this.onChange = onChange;
    this.text = byId("find-text");
    this.flagged = byId("find-flagged");
    this.order = byId("sort-order");
    this.selects = this.fillSelects();
    byId("pair-filters").addEventListener("input", () => onChange());
    byId("pair-filters").addEventListener("submit", (event) => event.preventDefault());
    byId("clear-filters").addEventListener("click", () => this.clear());
    this.order.addEventListener("click", () => this.setDescending(!this.descending));
    this.selects.sort.addEventListener("input", () => this.setDescending(this.selects.sort.value !== "page", true));
    this.setDescending(false, true);
  }

  get descending() {
    return this.order.getAttribute("aria-pressed") === "true";
  }

  /** What prompts and answers are searched for. */
  get words() {
    return this.text.value.toLowerCase();
  }

  setDescending(value, quiet = false) {
    this.order.setAttribute("aria-pressed", String(value));
    this.order.textContent = value ? "Descending" : "Ascending";
    if (!quiet) this.onChange();
  }

  fillSelects() {
    const { pairs, runs, length_bounds: bounds } = this.data;
    const distinct = (value) => [...new Set(pairs.map(value))].sort((a, b) => (a > b ? 1 : a < b ? -1 : 0));
    const rounds = distinct((pair) => pair.round);
    const sources = distinct((pair) => pair.source);
    return {
      run: this.fill("find-run", runs.map((run, i) => [String(i), run])),
      round: this.fill("find-round", rounds.map((round) => [String(round), String(round ?? "–")])),
      source: this.fill("find-source", sources.map((source) => [source, source])),
      length: this.fill("find-length", this.bucketNames(bounds)),
      longer: this.fill("find-longer", [["chosen", "chosen"], ["rejected", "rejected"], ["equal", "neither"]]),
      sort: this.fill("sort-by", Object.entries(SORTS).map(([name, [label]]) => [name, label]), false),
    };
  }

  /** Options of a select; one that has no choice is not shown. */
  fill(id, options, any = true) {
    const select = byId(id);
    if (any) select.append(element("option", { value: NOTHING }, "any"));
    for (const [value, label] of options) {
      // A value begins with "=", so that no value of the data is that of "any".
      select.append(element("option", { value: any ? "=" + value : value }, oneLine(label, 60)));
    }
    byId(id + "-label").hidden = any && options.length < 2;
    return select;
  }

  bucketNames(bounds) {
    const unit = this.unit === "tokens" ? "tokens" : "characters";
    return [...bounds, null].map((bound, i) => {
      const from = i === 0 ? 0 : bounds[i - 1] + 1;
      const to = bound === null ? "and more" : `to ${count(bound)}`;
      return [String(i), `${count(from)} ${to} ${unit}`];
    });
  }

  clear() {
    this.text.value = "";
    this.flagged.checked = false;
    for (const [name, select] of Object.entries(this.selects)) if (name !== "sort") select.value = NOTHING;
    this.onChange();
  }

  /** The pairs that are left, sorted; what has no value comes last. */
  matches(flags) {
    const { words } = this;
    if (words && !this.texts) this.texts = this.data.pairs.map((pair) => searched(pair));
    const { run, round, source, length, longer: side } = this.selects;
    const bounds = this.data.length_bounds;
    const is = (select, value) => select.value === NOTHING || select.value === "=" + value;
    const found = this.data.pairs.filter((pair) =>
      is(run, pair.run) && is(round, pair.round) && is(source, pair.source) && is(side, longerSide(pair, this.unit))
      && is(length, bucketOf(longer(pair, this.unit), bounds))
      && (!this.flagged.checked || flags.has(pair)) && (!words || this.texts[pair.index].includes(words)));
    return this.sorted(found);
  }

  sorted(pairs) {
    const value = SORTS[this.selects.sort.value][1];
    const sign = this.descending ? -1 : 1;
    const keyed = pairs.map((pair) => {
      const key = value(pair, this.unit);
      const known = key !== null && (typeof key === "number" || this.selects.sort.value === "source");
      return { pair, key, known };
    });
    keyed.sort((a, b) => {
      if (a.known !== b.known) return a.known ? -1 : 1;
      if (a.known && a.key !== b.key) return a.key < b.key ? -sign : sign;
      return a.pair.index - b.pair.index;
    });
    return keyed.map((item) => item.pair);
  }
}

/** Prompt and answers in lower case, for the filter by text. */
function searched(pair) {
  const turns = [...pair.prompt, ...pair.chosen.turns, ...pair.rejected.turns];
  return turns.map((turn) => textOf(turn[1])).join("\n").toLowerCase();
}

function bucketOf(length, bounds) {
  const bucket = bounds.findIndex((bound) => length <= bound);
  return String(bucket < 0 ? bounds.length : bucket);
}

function longerSide(pair, unit) {
  const difference = lengthGap(pair, unit);
  return difference === null ? "unknown" : difference > 0 ? "chosen" : difference < 0 ? "rejected" : "equal";
}

/** A listbox whose rows all have one height. */
class PairList {
  constructor(data, flags, onSelect) {
    this.unit = data.length_unit;
    this.flags = flags;
    this.box = byId("pair-list");
    this.rows = byId("pair-rows");
    this.pairs = [];
    this.selected = null;
    this.first = -1;
    this.height = 0;
    window.addEventListener("resize", () => {
      this.height = 0; // a zoom may round it in another way
      this.draw(true);
    });
    byId("index-columns").textContent = `margin, length gap in ${this.unit === "tokens" ? "tokens" : "characters"}`;
    this.box.addEventListener("scroll", () => this.draw(), { passive: true });
    this.box.addEventListener("click", (event) => {
      const row = event.target.closest("[role=option]");
      if (row) onSelect(this.pairs[Number(row.dataset.place)]);
    });
  }

  show(pairs, selected) {
    this.pairs = pairs;
    this.first = -1;
    this.select(selected);
  }

  select(pair) {
    this.selected = pair;
    const place = this.pairs.indexOf(pair);
    if (place >= 0) this.scrollTo(place);
    this.draw();
    this.mark(place);
  }

  /** Pixels, which may be no whole number. It is measured once: each time would cost a layout of the page. */
  get rowHeight() {
    this.height ||= this.rows.firstElementChild?.getBoundingClientRect().height ?? 0;
    return this.height || ROW_HEIGHT;
  }

  /** Gives the list the height of all of its rows, so that each place can be scrolled to; returns that of one. */
  stretch() {
    const height = this.rowHeight;
    this.rows.style.height = `${this.pairs.length * height}px`;
    return height;
  }

  scrollTo(place) {
    const height = this.stretch();
    const top = place * height;
    const view = this.box.clientHeight;
    if (top < this.box.scrollTop) this.box.scrollTop = top;
    else if (top + height > this.box.scrollTop + view) this.box.scrollTop = top + height - view;
  }

  /** Makes the rows that are in view, and some around them. */
  draw(again = false) {
    const height = this.stretch();
    const first = Math.max(0, Math.floor(this.box.scrollTop / height) - ROWS_AROUND);
    if (first === this.first && !again) return;
    this.first = first;
    const last = Math.min(this.pairs.length, first + Math.ceil(this.box.clientHeight / height) + 2 * ROWS_AROUND + 1);
    this.rows.style.paddingTop = `${first * height}px`;
    this.rows.replaceChildren(...this.pairs.slice(first, last).map((pair, i) => this.row(pair, first + i)));
    this.mark(this.pairs.indexOf(this.selected));
  }

  mark(place) {
    this.rows.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
    const row = byId(`pair-row-${place}`);
    row?.setAttribute("aria-selected", "true");
    if (row) this.box.setAttribute("aria-activedescendant", row.id);
    else this.box.removeAttribute("aria-activedescendant");
  }

  row(pair, place) {
    const made = element("div", { className: "row", id: `pair-row-${place}` },
      element("span", { className: "name" }, visible(pair.key)),
      element("span", { className: "flag" }, this.flags.has(pair) ? "⚑" : ""),
      element("span", { className: "number" }, figure(pair.margin)),
      element("span", { className: "line", dir: "auto" }, oneLine(lastTurn(pair), 90)),
      element("span", { className: "number" }, signed(lengthGap(pair, this.unit))));
    made.dataset.place = String(place);
    made.setAttribute("role", "option");
    made.setAttribute("aria-selected", "false");
    made.setAttribute("aria-setsize", String(this.pairs.length));
    made.setAttribute("aria-posinset", String(place + 1));
    return made;
  }
}

function lastTurn(pair) {
  return pair.prompt.length ? textOf(pair.prompt.at(-1)[1]) : "";
}
