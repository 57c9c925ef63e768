"use strict";
// The pair browser: what is selected, its address, the keys, and the flags. Its parts are in pair_*.js.

const PREFIX = "#pair=";
/** Milliseconds without a move after which the address follows. Browsers refuse too many changes of it. */
const SETTLED = 200;
const KEYS_OFF = "dice keys";

/** Keys of flagged pairs, kept by the browser for this file and these runs; in memory where it keeps nothing. */
class Flags {
  constructor(data) {
    this.name = `dice flags ${location.pathname} ${JSON.stringify(data.runs)}`;
    this.kept = true;
    this.keys = new Set(this.load());
  }

  load() {
    try {
      const stored = JSON.parse(localStorage.getItem(this.name) ?? "[]");
      return Array.isArray(stored) ? stored.filter((key) => typeof key === "string") : [];
    } catch (error) {
      // A stored text that is no JSON is not ours; a browser without storage throws another error.
      this.kept = error instanceof SyntaxError;
      return [];
    }
  }

  has(pair) {
    return this.keys.has(pair.key);
  }

  toggle(pair) {
    if (!this.keys.delete(pair.key)) this.keys.add(pair.key);
    try {
      localStorage.setItem(this.name, JSON.stringify([...this.keys]));
    } catch {
      this.kept = false;
    }
  }
}

class Browser {
  constructor(data) {
    this.data = data;
    data.pairs.forEach((pair, index) => (pair.index = index));
    this.byAddress = new Map(data.pairs.map((pair) => [visible(pair.key), pair]));
    this.flags = new Flags(data);
    this.view = new PairView(data);
    this.list = new PairList(data, this.flags, (pair) => this.select(pair));
    this.filters = new Filters(data, () => this.refresh());
    this.current = null;
    this.timer = 0;
    byId("pair-browser").hidden = false;
    this.rememberKeys();
    this.bindButtons();
    this.exporting();
    document.addEventListener("keydown", (event) => this.key(event));
    window.addEventListener("storage", (event) => {
      if (event.key !== this.flags.name) return;
      this.flags.keys = new Set(this.flags.load()); // another window has the page too
      this.showFlags();
      this.list.draw(true);
      this.showPlace();
    });
    window.addEventListener("hashchange", () => this.follow());
    this.matches = this.filters.matches(this.flags);
    this.countMatches();
    this.list.show(this.matches, null);
    if (!this.follow()) this.select(this.matches[0], false);
    this.showFlags();
  }

  bindButtons() {
    const actions = {
      "pair-next": () => this.move(1),
      "pair-previous": () => this.move(-1),
      "pair-flag": () => this.flag(),
      "pair-difference": () => this.view.toggle("difference"),
      "pair-credit": () => this.view.toggle("credit"),
      "open-help": () => this.help(),
    };
    for (const [id, action] of Object.entries(actions)) byId(id).addEventListener("click", action);
  }

  /** After a change of the filters: the list anew, and its first pair where the selected one is not in it. */
  refresh() {
    this.matches = this.filters.matches(this.flags);
    this.view.mark(this.filters.words);
    this.countMatches();
    const stays = this.matches.includes(this.current) || this.matches.length === 0;
    this.list.show(this.matches, stays ? this.current : this.matches[0]);
    if (stays) this.showPlace();
    else this.select(this.matches[0]);
  }

  countMatches() {
    byId("pair-count").textContent = `${count(this.matches.length)} of ${count(this.data.pairs.length)} pairs`;
  }

  select(pair, addressed = true) {
    if (!pair) return;
    const other = pair !== this.current;
    this.current = pair;
    this.list.select(pair); // first: it asks for places, which costs a layout once the pair's elements are new
    if (other) {
      this.view.show(pair);
      byId("pair-link").href = addressOf(pair);
    }
    this.showPlace();
    if (addressed) this.address();
  }

  /** The address follows once the reader stays: each pair that was stayed at is one step of the history. */
  address() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      // Not by location.hash, of which an event comes later: a reader who has moved on by then would be taken back.
      if (location.hash !== addressOf(this.current)) history.pushState(null, "", addressOf(this.current));
    }, SETTLED);
  }

  /** Shows the pair that the address names; false if it names none. */
  follow() {
    if (!location.hash.startsWith(PREFIX)) return false;
    clearTimeout(this.timer);
    const key = decoded(location.hash.slice(PREFIX.length));
    const pair = this.byAddress.get(key);
    if (pair && pair === this.current) return true;
    if (pair) this.select(pair, false);
    else if (this.current === null) this.select(this.matches[0], false);
    if (!pair) this.notice(`This page has no pair ${oneLine(key, 80)}.`);
    this.reveal();
    return true;
  }

  showPlace() {
    const place = this.matches.indexOf(this.current);
    byId("pair-place").textContent = place < 0 ? "" : `${count(place + 1)} of ${count(this.matches.length)}`;
    byId("pair-previous").disabled = place <= 0;
    byId("pair-next").disabled = this.matches.length === 0 || place === this.matches.length - 1;
    setPressed("pair-flag", this.flags.has(this.current));
    this.notice(place < 0 ? "The filters hide this pair." : "");
  }

  notice(words) {
    byId("pair-hidden").textContent = words;
    byId("pair-hidden").hidden = !words;
  }

  /** Scrolls to the pair where its beginning is out of view. */
  reveal() {
    const { top } = byId("pair").getBoundingClientRect();
    if (top < 0 || top > 0.7 * window.innerHeight) byId("pair").scrollIntoView();
  }

  move(step) {
    const place = this.matches.indexOf(this.current);
    const next = place < 0 ? this.matches[0] : this.matches[place + step];
    if (!next) return;
    this.select(next);
    this.reveal();
  }

  flag() {
    this.flags.toggle(this.current);
    this.showFlags();
    if (byId("find-flagged").checked) this.refresh();
    else this.list.draw(true);
    this.showPlace();
  }

  showFlags() {
    const { size } = this.flags.keys;
    const here = this.data.pairs.filter((pair) => this.flags.has(pair)).length;
    byId("flag-count").textContent = `${count(size)} flagged` + (here < size ? `, ${count(here)} on this page` : "");
    byId("flag-download").disabled = byId("flag-copy").disabled = size === 0;
    if (!this.flags.kept) byId("flag-note").textContent = "This browser keeps no flags: they end with the page.";
  }

  exporting() {
    const text = () => [...this.flags.keys].map((key) => visible(key) + "\n").join("");
    byId("flag-download").addEventListener("click", () => {
      const address = URL.createObjectURL(new Blob([text()], { type: "text/plain" }));
      element("a", { href: address, download: "flagged-pairs.txt" }).click();
      setTimeout(() => URL.revokeObjectURL(address), 10000);
    });
    byId("flag-copy").addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(text());
        byId("flag-note").textContent = "Copied.";
      } catch {
        const field = byId("flag-text");
        [field.value, field.hidden] = [text(), false];
        field.select();
        byId("flag-note").textContent = "This browser does not let the page copy: copy the selected text.";
      }
    });
  }

  /** Whoever speaks to the browser, or has another use for letters, can switch them off for all pages. */
  rememberKeys() {
    const box = byId("keys-on");
    box.checked = stored(KEYS_OFF) === null;
    box.addEventListener("change", () => {
      try {
        if (box.checked) localStorage.removeItem(KEYS_OFF);
        else localStorage.setItem(KEYS_OFF, "off");
      } catch {
        // For this page it is as the box says.
      }
    });
  }

  help() {
    byId("pair-help").showModal();
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || byId("pair-help").open) return;
    const { target } = event;
    const typing = target.matches("input:not([type=checkbox]), textarea, select, [contenteditable]");
    let action = null;
    if (event.key.length > 1) action = this.longKey(event, typing);
    else if (!typing && byId("keys-on").checked) action = this.letter(event.key);
    if (!action) return;
    event.preventDefault();
    action();
  }

  letter(key) {
    return {
      j: () => this.move(1),
      k: () => this.move(-1),
      d: () => this.view.toggle("difference"),
      c: () => this.view.toggle("credit"),
      f: () => this.flag(),
      "/": () => byId("find-text").focus(),
      "?": () => this.help(),
    }[key];
  }

  longKey({ key, target }, typing) {
    const inList = target.id === "pair-list";
    if (key === "Escape" && target.closest("#pair-browser")) return () => byId("pair-list").focus();
    if (key === "Enter" && target.id === "find-text") return () => byId("pair-list").focus();
    if (key === "Enter" && inList) return () => byId("pair").focus();
    if (typing || !inList) return null;
    const page = Math.max(1, Math.floor(this.list.box.clientHeight / this.list.rowHeight) - 1);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    return key in steps ? () => this.jump(steps[key]) : null;
  }

  jump(step) {
    const place = this.matches.indexOf(this.current) + step;
    this.select(this.matches[Math.min(Math.max(place, 0), this.matches.length - 1)]);
  }
}

/** What the browser keeps under a name; null if it has nothing, or keeps nothing. */
function stored(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}

/** The fragment of the address. A name with half of a surrogate pair, as in no UTF-8, cannot stand there as it is. */
function addressOf(pair) {
  return PREFIX + encodeURIComponent(visible(pair.key));
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

if (byId("pair-data")) new Browser(JSON.parse(byId("pair-data").textContent));
