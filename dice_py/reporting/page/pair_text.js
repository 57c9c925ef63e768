"use strict";
// Texts of others, and the elements that show them. Nothing here reads a text as HTML: texts become text nodes.

/** Characters of a text that are shown at once; a button shows more. */
const FIRST_CHARACTERS = 20000;
const MORE_CHARACTERS = 250000;
/** Runs of escapes that get an element of their own. A text of nothing else would make the page slow. */
const MOST_ESCAPES = 1000;

// The rule of foreign_text.py: controls, format characters but joiners, surrogates, separators of lines and paragraphs.
const HIDDEN = /(?:(?![\n\t\u200c\u200d])[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}])+/gu;

function escapeCharacter(character) {
  const code = character.codePointAt(0);
  if (code < 0x100) return "\\x" + code.toString(16).padStart(2, "0");
  if (code < 0x10000) return "\\u" + code.toString(16).padStart(4, "0");
  return "\\U" + code.toString(16).padStart(8, "0");
}

/** The text with controls, format characters and surrogates as escapes, as foreign_text.visible has it. */
function visible(text) {
  return text.replace(HIDDEN, (run) => Array.from(run, escapeCharacter).join(""));
}

/** The first part of a text, which ends between two characters. */
function firstPart(text, length) {
  if (text.length <= length) return text;
  const half = text.charCodeAt(length - 1);
  return text.slice(0, half >= 0xd800 && half < 0xdc00 ? length - 1 : length);
}

/** One line of a text, for a list. */
function oneLine(text, length) {
  // Only what `visible` leaves as it is becomes a space: a carriage return is to be seen.
  const line = firstPart(text, 4 * length).replace(/[ \n\t]+/g, " ");
  const part = firstPart(line, length);
  return visible(part) + (part.length < line.length || text.length > 4 * length ? "…" : "");
}

/** An element with properties (`className`, `title`, …), and children that are elements or texts. */
function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  Object.assign(made, properties);
  made.append(...children);
  return made;
}

function byId(id) {
  return document.getElementById(id);
}

/** Appends a text, with what `visible` escapes in a class of its own, so that it is told from a written "\x1b". */
function appendText(parent, text) {
  let from = 0;
  let count = 0;
  for (const run of text.matchAll(HIDDEN)) {
    if (++count > MOST_ESCAPES) break;
    parent.append(text.slice(from, run.index), element("span", { className: "escape" }, visible(run[0])));
    from = run.index + run[0].length;
  }
  parent.append(visible(text.slice(from)));
}

/** A text of the data: a string, or [its first part, its number of characters] where it was cut. */
function textOf(value) {
  return typeof value === "string" ? value : value[0];
}

function cutNote(value) {
  if (typeof value === "string") return "";
  const kept = Array.from(value[0]).length;
  return `The page has the first ${count(kept)} of ${count(value[1])} characters.`;
}

/** Shows pieces ({text, className, …}) in a row, the first characters at once and more of them by a button. */
function fillPieces(parent, pieces, make = makePiece) {
  parent.replaceChildren();
  let next = 0;
  let inside = 0; // characters of the next piece that are shown already
  const total = pieces.reduce((sum, piece) => sum + piece.text.length, 0);
  let shown = 0;
  const showMore = (room) => {
    const fragment = document.createDocumentFragment();
    while (next < pieces.length && room > 0) {
      const piece = pieces[next];
      const text = firstPart(piece.text.slice(inside), Math.max(room, 2));
      fragment.append(make({ ...piece, text }, next));
      room -= text.length;
      shown += text.length;
      inside += text.length;
      if (inside >= piece.text.length) [next, inside] = [next + 1, 0];
    }
    parent.append(fragment);
    if (next < pieces.length) parent.append(moreButton());
  };
  const moreButton = () => {
    const left = total - shown;
    const step = Math.min(left, MORE_CHARACTERS);
    const button = element("button", { type: "button", className: "more" });
    button.textContent = step < left ? `Show ${count(step)} of ${count(left)} more characters`
      : `Show the other ${count(left)} characters`;
    button.addEventListener("click", () => {
      button.remove();
      showMore(MORE_CHARACTERS);
      parent.focus({ preventScroll: true });
    });
    return button;
  };
  showMore(FIRST_CHARACTERS);
}

function makePiece(piece) {
  if (!piece.className) {
    const fragment = document.createDocumentFragment();
    appendText(fragment, piece.text);
    return fragment;
  }
  const made = element(piece.className === "differs" ? "mark" : "span", { className: piece.className });
  appendText(made, piece.text);
  return made;
}

function count(value) {
  return value === null ? "–" : value.toLocaleString("en-US");
}

/** A reward, margin or credit in nats; `sign`: with a plus too. */
function figure(value, sign = true) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "string") return value; // NaN and infinities
  const size = Math.abs(value);
  const digits = size !== 0 && size < 0.0005 ? size.toExponential(1)
    : size < 1000 ? size.toFixed(3) : size.toPrecision(6);
  return (value < 0 ? "−" : sign && value > 0 ? "+" : "") + digits;
}

function signed(value) {
  return value === null ? "–" : (value < 0 ? "−" : value > 0 ? "+" : "") + count(Math.abs(value));
}
