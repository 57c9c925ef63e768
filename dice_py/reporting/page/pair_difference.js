"use strict";
// The words in which two answers differ: Myers' greedy algorithm (Algorithmica 1, 1986) on words, with bounds.

/** Characters of an answer that are compared. */
const COMPARED_CHARACTERS = 100000;
/** Words that may be left out or added on the way from one answer to the other. Memory grows with the square. */
const MOST_EDITS = 2000;

/** Words, spaces and marks of a text, which together are the text; of every script, by Unicode's rules. */
function wordsOf(text) {
  const segmenter = new Intl.Segmenter("en", { granularity: "word" });
  return Array.from(segmenter.segment(text), (part) => part.segment);
}

/** Whether each word of `left` and of `right` has no partner in the other.
 *
 * Returns {left, right, complete}: arrays of booleans; not complete where the answers differ in more than MOST_EDITS
 * words, and the rest of both is marked as a whole.
 */
function compareWords(left, right) {
  const only = { left: new Array(left.length).fill(false), right: new Array(right.length).fill(false) };
  let start = 0;
  let endLeft = left.length;
  let endRight = right.length;
  while (start < endLeft && start < endRight && left[start] === right[start]) start++;
  while (endLeft > start && endRight > start && left[endLeft - 1] === right[endRight - 1]) {
    endLeft--;
    endRight--;
  }
  const path = shortestPath(left.slice(start, endLeft), right.slice(start, endRight));
  only.complete = path.complete;
  for (const x of path.removed) only.left[start + x] = true;
  for (const y of path.added) only.right[start + y] = true;
  only.left.fill(true, start + path.x, endLeft);
  only.right.fill(true, start + path.y, endRight);
  markSpaces(left, only.left);
  markSpaces(right, only.right);
  return only;
}

/** The way of fewest edits from `a` to `b`: the indices removed from `a` and added from `b`, up to (x, y). */
function shortestPath(a, b) {
  const most = Math.min(a.length + b.length, MOST_EDITS);
  const origin = most + 1;
  const furthest = new Int32Array(2 * most + 3); // x by diagonal k = x - y
  const trace = []; // of each number of edits, the part of `furthest` before it
  for (let edits = 0; edits <= most; edits++) {
    trace.push(furthest.slice(origin - edits - 1, origin + edits + 2));
    for (let k = -edits; k <= edits; k += 2) {
      const down = k === -edits || (k !== edits && furthest[origin + k - 1] < furthest[origin + k + 1]);
      let x = down ? furthest[origin + k + 1] : furthest[origin + k - 1] + 1;
      while (x < a.length && x - k < b.length && a[x] === b[x - k]) x++;
      furthest[origin + k] = x;
      if (x >= a.length && x - k >= b.length) {
        return { ...wayBack(trace, edits, k, x), x: a.length, y: b.length, complete: true };
      }
    }
  }
  let best = { k: 0, x: -1 };
  for (let k = -most; k <= most; k += 2) {
    const x = furthest[origin + k];
    if (x <= a.length && x - k <= b.length && 2 * x - k > 2 * best.x - best.k) best = { k, x };
  }
  return { ...wayBack(trace, most, best.k, best.x), x: best.x, y: best.x - best.k, complete: false };
}

function wayBack(trace, edits, k, x) {
  const removed = [];
  const added = [];
  for (; edits > 0; edits--) {
    const before = trace[edits]; // its middle, at edits + 1, is diagonal 0
    const at = (diagonal) => before[edits + 1 + diagonal];
    const down = k === -edits || (k !== edits && at(k - 1) < at(k + 1));
    k += down ? 1 : -1;
    x = at(k);
    if (down) added.push(x - k);
    else removed.push(x);
  }
  return { removed, added };
}

/** Spaces between marked words are marked with them, those at the ends of marked words are not: so it reads best. */
function markSpaces(words, only) {
  const marked = only.slice();
  for (let i = 0; i < words.length; i++) {
    if (words[i].trim() !== "") continue;
    const neighbors = Number(marked[i - 1] ?? false) + Number(marked[i + 1] ?? false);
    if (neighbors === 2) only[i] = true;
    if (neighbors === 1) only[i] = false;
  }
}

/** Pieces of the turns of both answers, with the class "differs" at words that only one of them has.
 *
 * Returns {left, right, notes}: lists of pieces for each turn, and what was not compared.
 */
function differencePieces(leftTurns, rightTurns) {
  const left = turnWords(leftTurns);
  const right = turnWords(rightTurns);
  const only = compareWords(left.words, right.words);
  const notes = [];
  if (left.short || right.short) {
    notes.push(`The first ${count(COMPARED_CHARACTERS)} characters of an answer are compared.`);
  }
  if (!only.complete) {
    notes.push(`The answers differ in more than ${count(MOST_EDITS)} words; what follows these is marked as a whole.`);
  }
  return { left: left.pieces(only.left), right: right.pieces(only.right), notes };
}

function turnWords(turns) {
  const texts = turns.map((turn) => textOf(turn[1]));
  let room = COMPARED_CHARACTERS;
  const parts = texts.map((text) => {
    const part = firstPart(text, room);
    room -= part.length;
    return part;
  });
  const words = parts.map((part) => (part ? wordsOf(part) : []));
  const pieces = (only) => {
    let at = 0;
    return words.map((ofTurn, turn) => {
      const made = [];
      for (const word of ofTurn) {
        const className = only[at++] ? "differs" : "";
        const last = made.at(-1);
        if (last && last.className === className) last.text += word;
        else made.push({ text: word, className });
      }
      const rest = texts[turn].slice(parts[turn].length);
      return rest ? [...made, { text: rest, className: "" }] : made;
    });
  };
  return { words: words.flat(), short: parts.some((part, i) => part.length < texts[i].length), pieces };
}
