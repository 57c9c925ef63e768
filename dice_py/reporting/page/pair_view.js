"use strict";
// The pair that is shown: prompt, both answers with their words or tokens marked, and all candidates.

const SIDES = ["chosen", "rejected"];
/** Places of a text that was filtered by, which are marked in the shown pair. */
const MOST_FOUND = 500;

class PairView {
  constructor(data) {
    this.data = data;
    this.bounds = data.credit_bounds;
    this.difference = false;
    this.credit = false;
    this.words = "";
    byId("pair-credit").hidden = this.bounds === null;
    if (this.bounds) this.fillLegend();
    for (const side of SIDES) this.readTokens(side);
  }

  show(pair) {
    this.pair = pair;
    byId("pair-name").replaceChildren(visible(pair.key));
    fillFacts(byId("pair-facts"), this.facts(pair));
    this.turns(byId("pair-prompt"), pair.prompt, plainPieces(pair.prompt), true);
    this.showAnswers();
    this.showCandidates(pair);
  }

  /** Marks what the filter by text has found, where the browser can without a change of the elements. */
  mark(words = this.words) {
    this.words = words;
    if (!CSS.highlights) return;
    const ranges = [];
    for (const box of words ? document.querySelectorAll("#pair-prompt .text, .side .text") : []) {
      const walker = document.createTreeWalker(box, NodeFilter.SHOW_TEXT);
      while (ranges.length < MOST_FOUND && walker.nextNode()) ranges.push(...rangesOf(walker.currentNode, words));
    }
    CSS.highlights.set("found", new Highlight(...ranges));
  }

  facts(pair) {
    const unit = this.data.length_unit;
    return [
      ["run", this.data.runs.length > 1 ? visible(this.data.runs[pair.run]) : null],
      ["round", pair.round],
      ["source", visible(pair.source)],
      ["margin", figure(pair.margin)],
      ["reward, chosen − rejected", figure(gap(pair.chosen.reward, pair.rejected.reward))],
      [`${unit === "tokens" ? "tokens" : "characters"}, chosen − rejected`, signed(lengthGap(pair, unit))],
      ...pair.labels.map(([name, value]) => [visible(name), oneLine(textOf(value), 200)]),
    ].filter(([, value]) => value !== null);
  }

  /** Switches the difference or the credit on or off. Both mark words, so one switches the other off. */
  toggle(name) {
    const on = !this[name];
    [this.difference, this.credit] = [false, false];
    this[name] = on && (name !== "credit" || this.bounds !== null);
    this.showAnswers();
  }

  /** Both answers, with what is switched on. */
  showAnswers() {
    const { pair } = this;
    const notes = [];
    let pieces = { chosen: plainPieces(pair.chosen.turns), rejected: plainPieces(pair.rejected.turns) };
    if (this.difference) {
      const found = differencePieces(pair.chosen.turns, pair.rejected.turns);
      pieces = { chosen: found.left, rejected: found.right };
      notes.push(...found.notes);
    }
    for (const side of SIDES) {
      const answer = pair[side];
      fillFacts(byId(`${side}-facts`), answerFacts(answer));
      byId(`${side}-readout`).hidden = !this.credit;
      const box = byId(`${side}-text`);
      box.classList.toggle("credited", this.credit);
      if (this.credit && answer.credit) this.showTokens(side, box, answer);
      else {
        this.turns(box, answer.turns, pieces[side], false);
        if (this.credit) byId(`${side}-readout`).textContent = "This answer has no token credit.";
      }
    }
    byId("credit-legend").hidden = !this.credit;
    byId("difference-note").hidden = notes.length === 0;
    byId("difference-note").textContent = notes.join(" ");
    setPressed("pair-difference", this.difference);
    setPressed("pair-credit", this.credit);
    this.mark();
  }

  /** Turns of a conversation, with their roles where these say something. */
  turns(box, turns, pieces, roles) {
    box.replaceChildren(...turns.map((turn, i) => {
      const made = element("div", { className: "turn" });
      if (roles || turns.length > 1 || turn[0] !== "assistant") made.append(roleLine(turn[0]));
      made.append(textBox(turn[1], pieces[i]));
      // What a turn says besides its content, as JSON: calls of tools, names.
      if (turn.length > 2) made.append(roleLine("further fields"), textBox(turn[2], plainPieces([turn.slice(1)])[0]));
      return made;
    }));
    if (turns.length === 0) box.append(element("p", { className: "note" }, "empty"));
  }

  showTokens(side, box, answer) {
    const { credit } = answer;
    const text = element("div", { className: "text tokens", tabIndex: 0, dir: "auto" });
    text.setAttribute("role", "group");
    text.setAttribute("aria-label", `tokens of ${side}; left and right arrow go from token to token`);
    const pieces = credit.texts.map((token, i) => {
      return { text: token || "∅", className: `token ${creditClass(credit.credits[i], this.bounds)}` };
    });
    fillPieces(text, pieces, (piece, i) => {
      const made = makePiece(piece);
      made.dataset.token = String(i);
      return made;
    });
    box.replaceChildren(text);
    if (credit.texts.length < credit.count) {
      const parts = `${count(credit.texts.length)} of ${count(credit.count)}`;
      box.append(element("p", { className: "note" }, `The page has the credit of the first ${parts} tokens.`));
    }
    byId(`${side}-readout`).textContent = sumText(answer);
  }

  /** Tells of the token under the pointer, or of that to which the arrow keys have gone. */
  readTokens(side) {
    const box = byId(`${side}-text`);
    const tell = (token) => {
      box.querySelector(".current")?.classList.remove("current");
      if (token) token.classList.add("current");
      const answer = this.pair[side];
      const words = token ? tokenText(answer.credit, Number(token.dataset.token)) : sumText(answer);
      byId(`${side}-readout`).textContent = words;
    };
    box.addEventListener("pointerover", (event) => {
      const token = event.target.closest("[data-token]");
      if (token) tell(token);
    });
    box.addEventListener("pointerleave", () => {
      if (this.credit && this.pair[side].credit) tell(null);
    });
    box.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step || !event.target.classList.contains("tokens")) return;
      event.preventDefault();
      const current = box.querySelector(".current");
      const beside = step > 0 ? "nextElementSibling" : "previousElementSibling";
      const token = current ? current[beside] : box.querySelector("[data-token]");
      if (token?.dataset.token) {
        tell(token);
        token.scrollIntoView({ block: "nearest" });
      }
    });
  }

  fillLegend() {
    const [one, two, three, four] = this.bounds.map((bound) => String(bound));
    const names = [
      ["minus-4", `≤ −${four}`], ["minus-3", `−${four} to −${three}`],
      ["minus-2", `−${three} to −${two}`], ["minus-1", `−${two} to −${one}`],
      ["zero", `within ±${one}`],
      ["plus-1", `${one} to ${two}`], ["plus-2", `${two} to ${three}`],
      ["plus-3", `${three} to ${four}`], ["plus-4", `≥ ${four}`],
    ];
    const note = "Credit of a token, β·(log π − log π_ref) in nats. The sum over an answer is its reward.";
    const swatches = names.map(([name, words]) => element("li", { className: `token ${name}` }, words));
    byId("credit-legend").replaceChildren(element("p", { className: "note" }, note), element("ul", {}, ...swatches));
  }

  showCandidates(pair) {
    const all = pair.candidates;
    byId("pair-candidates").hidden = all.length === 0;
    const parts = [`${count(pair.candidate_count)} responses to this prompt, best first by penalized reward.`];
    if (all.length < pair.candidate_count) parts.push(`${count(all.length)} of them are on this page.`);
    if (pair.correlation !== null) parts.push(`Rank correlation of reward and length: ${figure(pair.correlation)}.`);
    byId("candidates-note").textContent = parts.join(" ");
    byId("candidate-rows").replaceChildren(...all.map((candidate) => candidateRow(pair, candidate)));
  }
}

/** Where a node has a text, in any case. A letter whose lower case is longer would shift the places. */
function rangesOf(node, words) {
  const text = node.data.toLowerCase();
  const found = [];
  if (text.length !== node.data.length) return found;
  let at = text.indexOf(words);
  while (at >= 0 && found.length < MOST_FOUND) {
    const range = new Range();
    range.setStart(node, at);
    range.setEnd(node, at + words.length);
    found.push(range);
    at = text.indexOf(words, at + words.length);
  }
  return found;
}

function candidateRow(pair, candidate) {
  const value = candidate.text ?? pair[candidate.role].turns[0][1];
  const open = element("details", {}, element("summary", { dir: "auto" }, oneLine(textOf(value), 100) || "–"));
  // The complete text gets elements only when it is asked for: there may be many candidates.
  open.addEventListener("toggle", () => {
    if (open.open && open.childElementCount === 1) open.append(textBox(value, [{ text: textOf(value) }]));
  });
  const numbers = [figure(candidate.reward), figure(candidate.penalized), count(candidate.tokens)];
  return element("tr", { className: candidate.role ?? "" },
    element("td", { className: "number" }, String(candidate.rank)),
    element("td", { className: "role" }, candidate.role ?? ""),
    ...numbers.map((words) => element("td", { className: "number" }, words)),
    element("td", {}, visible(candidate.finish ?? "–")),
    element("td", { className: "number" }, count(candidate.sample)),
    element("td", { className: "response" }, open));
}

function plainPieces(turns) {
  return turns.map((turn) => [{ text: textOf(turn[1]) }]);
}

function roleLine(role) {
  return element("p", { className: "role" }, visible(role));
}

/** A text of the data in a box of its own, whose direction is that of its first letter. */
function textBox(value, pieces) {
  const text = element("div", { className: "text", dir: "auto", tabIndex: -1 });
  fillPieces(text, pieces);
  if (!textOf(value)) text.append(element("span", { className: "note" }, "empty"));
  const note = cutNote(value);
  return note ? element("div", {}, text, element("p", { className: "note" }, note)) : text;
}

function answerFacts(answer) {
  return [
    ["reward", figure(answer.reward)],
    ["penalized", figure(answer.penalized)],
    ["tokens", count(answer.tokens)],
    ["characters", count(answer.chars)],
    ["finish", visible(answer.finish ?? "–")],
  ];
}

function fillFacts(list, facts) {
  list.replaceChildren(...facts.map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, String(value ?? "–")))));
}

/** The class of a token's color: "minus-4" to "plus-4". */
function creditClass(value, bounds) {
  if (typeof value !== "number") return "unknown";
  const step = bounds.filter((bound) => Math.abs(value) >= bound).length;
  return step === 0 ? "zero" : `${value < 0 ? "minus" : "plus"}-${step}`;
}

function tokenText(credit, i) {
  const token = JSON.stringify(visible(credit.texts[i]));
  const logps = `log π ${figure(credit.logps[i])}, log π_ref ${figure(credit.ref_logps[i])}`;
  return `${token}, token ${count(i + 1)} of ${count(credit.count)}: credit ${figure(credit.credits[i])}, ${logps}`;
}

function sumText(answer) {
  const { credit, reward } = answer;
  return `The credits of ${count(credit.count)} tokens sum to ${figure(credit.sum)}; the reward is ${figure(reward)}.`;
}

function setPressed(id, value) {
  byId(id).setAttribute("aria-pressed", String(value));
}
